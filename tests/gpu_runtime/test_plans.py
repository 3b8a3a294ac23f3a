"""Plans for a GPU on CPU tensors, with kernels in plain PyTorch: the answer, order and memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_runtime.plain import PlainKernels, ShuffledFrame
from networks import SMALL, drops, leaves, make, relative

import p2pfast
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
