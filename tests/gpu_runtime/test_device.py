"""Plans on a GPU: CUDA graphs, streams, threads and changes of weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SMALL, drops, leaves, make, relative, seed_weights, street
from torch import Tensor, nn

import p2pfast
from p2pfast import models
from p2pfast.ops.gpu import interpreted
from p2pfast.pipeline import transfers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET is set"),
]

DEVICE = torch.device("cuda:0")


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Failures are raised, and products of float32 are not rounded."""
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def on_device(name: str, device: torch.device = DEVICE) -> tuple[nn.Module, tuple[Tensor, ...]]:
    net, inputs = make(name)
    return net.to(device), tuple(x.to(device) for x in inputs)


def fused(net: nn.Module, **options: Any) -> nn.Module:
    return p2pfast.optimize(net, backend="cuda", **options)


def how(fast: nn.Module) -> str:
    state: Any = fast.__dict__["_p2pfast"]
    return str(state.engine.how())


@pytest.mark.parametrize("name", [name for name in SMALL if "dropout" not in name and name != "unet-batch"])
def test_answers(name: str) -> None:
    """The first call, the one that is captured, and replays with other inputs."""
    net, inputs = on_device(name)
    reference, fast = copy.deepcopy(net), fused(net)
    for call in range(4):
        given = tuple(x + 0.1 * call if x.is_floating_point() else x for x in inputs)
        with torch.no_grad():
            expected = reference(*given)
        for e, f in zip(leaves(expected), leaves(fast(*given)), strict=True):
            assert f.shape == e.shape and f.stride() == e.stride() and f.device == e.device
            assert relative(f, e) < 1e-4, call
    for (key, a), (_, b) in zip(net.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_label_maps(dtype: torch.dtype) -> None:
    net = seed_weights(models.build("pix2pixhd-local", ngf=8)).to(DEVICE)
    given = street(1, 256, 512).to(DEVICE)
    dense = given.dense()
    with torch.no_grad():
        expected = copy.deepcopy(net).double()(dense.double())
        eager = copy.deepcopy(net).to(dtype)(dense.to(dtype))
    fast = fused(net, dtype=dtype)
    for _ in range(4):
        assert relative(fast(given), expected) < max(2 * relative(eager, expected), 1e-4)
    assert "a CUDA graph" in how(fast)


def test_measured_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring leaves the caller's random numbers alone."""
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    net, (x,) = on_device("global")
    before = torch.cuda.get_rng_state(DEVICE)
    fast = fused(net, dtype=torch.bfloat16)
    found = fast(x)
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before)
    assert torch.equal(fast(x), found) and torch.equal(fast(x), found)


def test_dropout_draws_what_pytorch_draws() -> None:
    net, (x,) = on_device("resnet-dropout")
    assert drops(net)
    reference, fast = copy.deepcopy(net), fused(net)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            expected = reference(x)
        torch.manual_seed(seed)
        assert relative(fast(x), expected) < 1e-4
    assert "no CUDA graph" in how(fast)


def test_changed_weights() -> None:
    net, (x,) = on_device("resnet")
    reference, fast = copy.deepcopy(net), fused(net)
    for _ in range(4):
        with torch.no_grad():
            for a, b in zip(net.parameters(), reference.parameters(), strict=True):
                a.mul_(1.01)
                b.mul_(1.01)
            expected = reference(x)
        assert relative(fast(x), expected) < 1e-4


def test_threads_with_streams_of_their_own() -> None:
    net, (x,) = on_device("resnet")
    reference, fast = copy.deepcopy(net), fused(net)
    images = [x + i for i in range(4)]
    with torch.no_grad():
        expected = [reference(image) for image in images]
    torch.cuda.synchronize(DEVICE)
    errors: list[Any] = []

    def call(image: Tensor, truth: Tensor) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                found = [fast(image) for _ in range(20)]
                errors.extend(relative(y, truth) for y in found)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(images, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80 and all(isinstance(e, float) and e < 1e-4 for e in errors), errors


def test_results_survive_later_calls_and_explain() -> None:
    net, (x,) = on_device("global")
    fast = fused(net)
    kept = [fast(x + i) for i in range(5)]
    report = p2pfast.explain(fast)
    again = [fast(x + i) for i in range(5)]
    assert report.rows
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_in_a_graph_of_the_callers() -> None:
    net, (x,) = on_device("resnet")
    reference, fast = copy.deepcopy(net), fused(net)
    fast(x)
    held = x.clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(DEVICE)
    with torch.cuda.graph(graph):
        y = fast(held)
    for i in range(3):
        other = fast(x - i)  # calls in between use other memory
        held.copy_(x + i)
        graph.replay()
        with torch.no_grad():
            assert relative(y, reference(x + i)) < 1e-4 and relative(other, reference(x - i)) < 1e-4


def test_streams_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x,) = on_device("multiscale-features")
    found = []
    for streams, graphs in (("1", "off"), ("3", "off"), ("1", "on"), ("3", "on")):
        monkeypatch.setenv("P2PFAST_STREAMS", streams)
        monkeypatch.setenv("P2PFAST_CUDA_GRAPHS", graphs)
        fast = fused(net.eval())
        found.append([leaves(fast(x)) for _ in range(4)])
    for calls in found:
        for results in calls:
            assert all(torch.equal(a, b) for a, b in zip(results, found[0][0], strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU, or none")
def test_two_devices() -> None:
    """The current device is the first one throughout."""
    for device in (torch.device("cuda:0"), torch.device("cuda:1")):
        net, (x,) = on_device("resnet", device)
        reference, fast = copy.deepcopy(net), fused(net)
        with torch.no_grad():
            expected = reference(x)
        for _ in range(4):
            assert relative(fast(x), expected) < 1e-4
        assert "a CUDA graph" in how(fast) and torch.cuda.current_device() == 0


def test_batches_are_copied_beside_computing() -> None:
    """Many, two of them on their way: memory of one is not another's too early."""
    moving = transfers.Transfers(transfers.CudaStreams(DEVICE))
    waiting: list[tuple[int, transfers.Pictures]] = []
    wrong = []

    def compute(x: Any) -> Tensor:
        total = x.float()
        for _ in range(20):
            total = total + x
        return (total / 21 + 1).round().to(torch.uint8)

    def settle() -> None:
        number, pictures = waiting.pop(0)
        wrong.append(int((pictures.result() != number + 1).sum()))

    for number in range(50):
        given = torch.full((1, 512, 1024, 3), number, dtype=torch.uint8)
        waiting.append((number, moving.run(transfers.pinned(given), compute)))
        if len(waiting) == 2:
            settle()
    settle()
    assert wrong == [0] * 50
