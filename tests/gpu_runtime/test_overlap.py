"""Translation on a GPU starts a batch before it asks for the one before, and copies beside computing; here
with a pretended device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_runtime.streams import PretendedStreams
from torch import nn

from p2pfast.errors import UsageError
from p2pfast.labelmap import LabelMap
from p2pfast.pipeline import network, sizes, transfers, translate
from p2pfast.pipeline.files import Item


def job(kind: str) -> translate.Job:
    made = network.Network(nn.Identity(), 3, sizes.Fit(1, 1), torch.device(kind), torch.float32, False)
    return translate.Job(made, None, sizes.SizePolicy("original"))


def given(name: str) -> Any:
    item = Item(name, Path(name), None, Path(name))
    return translate._Input(item, np.zeros((4, 6, 3), np.uint8), None, 4, 6)


@pytest.fixture
def pageable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a driver there is no pinned memory."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(translate, "stacked", lambda arrays, device: transfers.stacked(arrays, cpu))


@pytest.mark.usefixtures("pageable")
@pytest.mark.parametrize(("kind", "order"), [("cuda", "s s r s r r"), ("cpu", "s r s r s r")])
def test_one_batch_ahead(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    happened = []

    class Pictures:
        def result(self) -> None:
            happened.append("r")

    def start(network: Any, x: Any, prepare: Any) -> Pictures:
        happened.append("s")
        return Pictures()

    monkeypatch.setattr(translate, "start", start)
    for _, started in translate._started(job(kind), iter([[given("a")], [given("b")], [given("c")]])):
        started().result()
    assert " ".join(happened) == order


@pytest.mark.usefixtures("pageable")
def test_an_error_belongs_to_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(network: Any, x: Any, prepare: Any) -> Any:
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


def batches(streams: PretendedStreams, count: int) -> list[int]:
    """Wrong values in the results of ``count`` batches, two of them on their way at a time."""
    moving, waiting, wrong = transfers.Transfers(streams), [], []

    def compute(x: LabelMap | torch.Tensor) -> torch.Tensor:
        assert isinstance(x, LabelMap) and x.instances is not None
        first = streams.does("run", x.labels, lambda labels: labels + 1)
        ids = streams.does("run", x.instances, lambda instances: instances * 2)
        return streams.does("run", first, lambda labels: labels + ids)

    def settle() -> None:
        number, pictures = waiting.pop(0)
        wrong.append(int((pictures.result() != number + 1 + 2 * 3).sum()))

    for number in range(count):
        labels = torch.full((1, 1, 2, 3), number, dtype=torch.uint8)
        given = LabelMap(labels, torch.full_like(labels, 3), num_classes=250)
        waiting.append((number, moving.run(given, compute)))
        if len(waiting) == 2:
            settle()
    settle()
    streams.work(lambda: False)
    return wrong


@pytest.mark.parametrize("seed", range(20))
def test_copies_wait_for_what_they_need(seed: int) -> None:
    assert batches(PretendedStreams(seed), 5) == [0] * 5


@pytest.mark.parametrize("missing", ["wait", "keep"])
def test_the_pretended_device_notices(missing: str) -> None:
    assert any(any(batches(PretendedStreams(seed, missing), 5)) for seed in range(20))


def test_directions_overlap() -> None:
    """In some orders a batch is copied in (twice) before the one before has been computed (in three
    launches), and out when the next one is half done."""
    early = late = False
    for seed in range(20):
        streams = PretendedStreams(seed)
        batches(streams, 3)
        third = [i for i, name in enumerate(streams.order) if name == "run"][2]
        early |= streams.order[:third].count("in") > 2
        late |= streams.order[: streams.order.index("out")].count("run") > 3
    assert early and late


def test_pixels_become_the_networks_input_where_it_runs() -> None:
    given = torch.tensor([0, 255, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    made = network.Network(nn.Identity(), 3, sizes.Fit(1, 1), torch.device("cpu"), torch.float32, False)
    assert network.start(made, given, translate._network_range).result().flatten().tolist() == [0, 255, 255]


def test_batches_are_stacked_where_the_device_can_copy_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = [np.full((2, 3), i, np.int32) for i in range(2)]
    assert torch.equal(transfers.stacked(arrays, torch.device("cpu")), torch.from_numpy(np.stack(arrays)))
    asked, empty = [], torch.empty

    def pretended(*size: int, pin_memory: bool = False, **kind: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*size, **kind)

    monkeypatch.setattr(torch, "empty", pretended)
    batch = transfers.stacked(arrays, torch.device("cuda"))
    assert asked == [True] and batch.dtype == torch.int32 and batch[1].eq(1).all()
