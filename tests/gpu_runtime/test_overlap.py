"""Translation on a GPU starts a batch before it asks for the one before; here with a pretended device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from p2pfast.errors import UsageError
from p2pfast.labelmap import LabelMap
from p2pfast.pipeline import network, sizes, translate
from p2pfast.pipeline.files import Item


def job(kind: str) -> translate.Job:
    made = network.Network(nn.Identity(), 3, sizes.Fit(1, 1), torch.device(kind), torch.float32, False)
    return translate.Job(made, None, sizes.SizePolicy("original"))


def given(name: str) -> Any:
    item = Item(name, Path(name), None, Path(name))
    return translate._Input(item, np.zeros((4, 6, 3), np.uint8), None, 4, 6)


@pytest.mark.parametrize(("kind", "order"), [("cuda", "s s r s r r"), ("cpu", "s r s r s r")])
def test_one_batch_ahead(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    class Pictures:
        def result(self) -> None:
            happened.append("r")

    def start(network: Any, x: Any) -> Pictures:
        happened.append("s")
        return Pictures()

    monkeypatch.setattr(translate, "start", start)
    for _, started in translate._started(job(kind), iter([[given("a")], [given("b")], [given("c")]])):
        started().result()
    assert " ".join(happened) == order


def test_an_error_belongs_to_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(network: Any, x: Any) -> Any:
        raise RuntimeError("too large")

    monkeypatch.setattr(translate, "start", start)
    found: list[tuple[Any, Callable[[], Any]]] = list(translate._started(job("cuda"), iter([[given("a")]])))
    with pytest.raises(RuntimeError, match="too large"):
        found[0][1]()


def test_float16_is_for_gpus() -> None:
    assert network.choose_dtype("float16") == torch.float16
    with pytest.raises(UsageError, match="only GPUs have kernels"):
        network.accelerate(nn.Conv2d(3, 3, 1), torch.float16, torch.device("cpu"))


def test_maps_move_together() -> None:
    labels = LabelMap(torch.zeros(1, 1, 2, 3, dtype=torch.uint8), torch.ones(1, 1, 2, 3).int(), num_classes=2)
    moved = labels.changed(lambda tensor: tensor.clone())
    assert moved.labels is not labels.labels and torch.equal(moved.dense(), labels.dense())
