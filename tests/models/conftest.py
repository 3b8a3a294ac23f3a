"""Fixtures around the small networks of every kind and the golden files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import FIXTURES, SMALL, Small, seed_weights
from torch import Tensor, nn

from p2pfast import models


@pytest.fixture(params=list(SMALL))
def small(request: pytest.FixtureRequest) -> Small:
    return SMALL[request.param]


@pytest.fixture(
    params=[name for name in SMALL if name.startswith(("global", "local", "encoder", "unet", "resnet"))]
)
def small_generator(request: pytest.FixtureRequest) -> Small:
    return SMALL[request.param]


@pytest.fixture(scope="session")
def seeded() -> Callable[[nn.Module], nn.Module]:
    """Gives a network the weights of the golden files."""
    return seed_weights


@pytest.fixture(scope="session")
def golden_input() -> Callable[..., Tensor]:
    """(golden name, input name, shape) to the input of the golden file."""

    def make(name: str, which: object, shape: tuple[int, ...]) -> Tensor:
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"input:{name}:{which}".encode())))
        return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))

    return make


@pytest.fixture(scope="session")
def golden_facts() -> Callable[[str], Any]:
    """Name of a golden JSON file to what it holds."""
    return lambda name: json.loads((FIXTURES / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def golden_outputs() -> Callable[[str], list[Tensor]]:
    """Name of a golden network to its outputs, in order."""

    def read(name: str) -> list[Tensor]:
        with np.load(FIXTURES / f"{name}.npz") as arrays:
            return [torch.from_numpy(arrays[f"out{i}"]) for i in range(len(arrays.files))]

    return read


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    if isinstance(model, models.Encoder):
        out: Any = model(x, torch.zeros_like(x[:, :1], dtype=torch.int64))
    else:
        out = model(x)
    flat: list[Tensor] = []
    stack = [out]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            flat.append(item)
        else:
            stack.extend(reversed(item))
    return flat


@pytest.fixture(scope="session")
def run() -> Callable[[nn.Module, Tensor], list[Tensor]]:
    """Runs a network of any kind and flattens what it returns."""
    return _run
