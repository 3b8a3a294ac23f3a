"""Plans for a GPU on CPU tensors, with kernels in plain PyTorch: the answer, order and memory."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from gpu_runtime.plain import PlainKernels, ShuffledFrame
from networks import SMALL, drops, leaves, make, relative, seed_weights, street

import p2pfast
from p2pfast import models
from p2pfast.runtime.gpu import engine


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels(), "frame": ShuffledFrame})


def use(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels(), "frame": ShuffledFrame, **options})


@pytest.mark.parametrize("form", ["prologue", "applied", "library", None])
@pytest.mark.parametrize("name", list(SMALL))
def test_answer(name: str, form: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, form=form)
    monkeypatch.setenv("P2PFAST_STREAMS", "3")
    net, inputs = make(name)
    net.train()
    reference, fast = copy.deepcopy(net), p2pfast.optimize(net, backend="cuda")
    with torch.no_grad():
        torch.manual_seed(3)
        expected = reference(*inputs)
    torch.manual_seed(3)
    found = fast(*inputs)
    assert type(found) is type(expected)
    for e, f in zip(leaves(expected), leaves(found), strict=True):
        assert f.shape == e.shape and f.dtype == torch.float32 and f.stride() == e.stride()
        assert relative(f, e) < 3e-5
    for (key, a), (_, b) in zip(net.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5), key
    rows = p2pfast.explain(fast).rows
    assert rows or name.startswith("encoder")
    assert drops(net) == any(r.kernel == "dropout" for r in rows)


@pytest.mark.parametrize("streams", ["1", "2", "4"])
def test_flagship_from_labels(streams: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published depth; the branches of label maps at both resolutions run beside each other."""
    monkeypatch.setenv("P2PFAST_STREAMS", streams)
    given = street(1)
    net = seed_weights(models.build("pix2pixhd-local", ngf=2))
    dense = given.dense()
    n, c, h, w = dense.shape
    assert h % 32 == 0 and w % 32 == 0
    expected = net(dense).detach()
    fast = p2pfast.optimize(net, backend="cuda")
    for _ in range(2):
        assert relative(fast(given), expected) < 3e-5
    plan = fast.__dict__["_p2pfast"].engine.last[0]
    assert plan.schedule.count == min(2, int(streams)) and not plan.obstacles
    assert plan.dense_inputs == set()
    rows = {row.name: row for row in p2pfast.explain(fast).rows}
    assert sum(row.kernel == "label_conv" for row in rows.values()) == 2
    assert all(row.reason for row in rows.values() if row.kernel.startswith("conv"))


def test_weights_are_packed_again_when_they_change() -> None:
    net, (x,) = make("resnet-batch")
    fast = p2pfast.optimize(net.eval(), backend="cuda")
    fast(x)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
        next(b for b in net.buffers() if b.dim() == 1).add_(0.3)
    assert relative(fast(x), net(x).detach()) < 3e-5


def test_calls_at_the_same_time_have_memory_of_their_own() -> None:
    net, (x,) = make("local")
    fast = p2pfast.optimize(net, backend="cuda")
    expected, answers = fast(x), []

    def work() -> None:
        for _ in range(3):
            answers.append(fast(x))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(answers) == 9 and all(torch.equal(a, expected) for a in answers)


def test_what_pytorch_runs_keeps_a_plan_out_of_cuda_graphs() -> None:
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.cumsum(self.first(x), 1)
            x.add_(1.0)
            return self.second(y) + self.second(self.first(x))

    net, x = Doubled(), torch.randn(1, 3, 9, 11)
    fast = p2pfast.optimize(net, backend="cuda")
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        expected = net(a)
    assert relative(fast(b), expected) < 3e-5 and torch.equal(a, b)
    text = str(p2pfast.explain(fast))
    assert "cumsum" in text and "no CUDA graph" in text


@pytest.mark.parametrize("name", ["local", "unet-batch"])
def test_memory_is_reused(name: str) -> None:
    net, inputs = make(name)
    fast = p2pfast.optimize(net, backend="cuda")
    fast(*inputs)
    plan = fast.__dict__["_p2pfast"].engine.last[0]
    assert plan.arena_bytes < 0.7 * sum(m.bytes for m in plan.memories)
