from __future__ import annotations

import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from p2pfast.train.config import CONFIGS, Config
from p2pfast.train.objective import Objective

#: Networks of a few thousand weights on streets of 64x32 pixels.
TINY: dict[str, dict[str, Any]] = {
    "pix2pix": {"netG": "unet_32", "ngf": 4, "ndf": 4, "crop_size": 32, "load_size": 36},
    "cyclegan": {"netG": "resnet_1blocks", "ngf": 4, "ndf": 4, "crop_size": 32, "load_size": 36},
    "pix2pixhd": {
        "ngf": 4,
        "ndf": 4,
        "n_downsample_global": 2,
        "n_blocks_global": 1,
        "n_blocks_local": 1,
        "load_size": 64,
        "preprocess": "scale_width",
    },
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of runs for all tests, so that streets are drawn once."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def tiny(runs: Path, request: pytest.FixtureRequest) -> Callable[..., Config]:
    """(kind, options) to a configuration of four drawn streets, named after the test."""
    made = 0

    def make(kind: str, **options: Any) -> Config:
        nonlocal made
        made += 1
        name = "".join(c if c.isalnum() else "_" for c in request.node.name)
        common: dict[str, Any] = {
            "name": f"{name}-{made}",
            "checkpoints_dir": str(runs),
            "scenes": 4,
            "scene_width": 64,
            "n_epochs": 1,
            "n_epochs_decay": 1,
            "num_threads": 0,
            "device": "cpu",
            "no_tensorboard": True,
        }
        return CONFIGS[kind](**{**common, **TINY[kind], **options})

    return make


def golden_input(name: str, which: str, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"input:{name}:{which}".encode())))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def gradients(objective: Objective) -> dict[str, Tensor]:
    """Filled by the next step: every gradient that an optimiser takes."""
    taken: dict[str, Tensor] = {}
    for name, run in objective.networks.items():
        for optimizer in objective.optimizers.values():

            def note(*_: Any, name: str = name, network: torch.nn.Module = run.network) -> None:
                for key, parameter in network.named_parameters():
                    if parameter.grad is not None:
                        taken[f"{name}.{key}"] = parameter.grad.clone()

            optimizer.register_step_pre_hook(note)
    return taken


def arguments(config: Config) -> list[str]:
    """The command line of a configuration: options that differ from the defaults."""
    from dataclasses import fields

    line = ["train", config.kind]
    for entry in fields(config):
        value = getattr(config, entry.name)
        flag = "--" + entry.name.replace("_", "-")
        if value == entry.default:
            continue
        if isinstance(value, bool):
            line.append(flag if value else "--no-" + flag[2:])
        else:
            line += [flag, str(value)]
    return line


def start(line: list[str], **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    import os

    return subprocess.Popen(
        [sys.executable, "-m", "p2pfast", *line],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def networks(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Every network file of a run by name."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*_net_*.pth"))}


def assert_identical(first: Any, second: Any, path: str = "") -> None:
    """The same values to the last bit, in nested dictionaries and lists too."""
    if isinstance(first, Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, Mapping):
        assert list(first) == list(second), path
        for key in first:
            assert_identical(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            assert_identical(a, b, f"{path}.{i}")
    else:
        assert first == second, path
