"""What plans for a GPU leave to a convolution's epilogue: stored statistics, additions, slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_runtime.plain import PlainKernels, ShuffledFrame
from networks import make, relative, seed_weights
from torch import Tensor, nn

import p2pfast
from p2pfast.runtime.gpu import engine


@pytest.fixture(autouse=True, params=["prologue", "applied", "library"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    options = {"kernels": PlainKernels(), "frame": ShuffledFrame, "form": request.param}
    monkeypatch.setattr(engine, "on_cpu", options)
    return str(request.param)


def answer(net: nn.Module, *inputs: Tensor) -> list[Any]:
    """The rows of ``explain``, after the answer has been compared."""
    fast = p2pfast.optimize(net, backend="cuda")
    with torch.no_grad():
        expected = net(*inputs)
    for _ in range(2):
        assert relative(fast(*inputs), expected) < 3e-5
    with torch.no_grad():
        for t in (*net.parameters(), *net.buffers()):
            if t.is_floating_point():
                t.mul_(1.1)
        assert relative(fast(*inputs), net(*inputs)) < 3e-5
    rows: list[Any] = p2pfast.explain(fast).rows
    return rows


class Blocks(nn.Module):
    """Additions of every kind: of a convolution on the left and on the right, of two, with statistics of the
    sum, with an activation after it, of a convolution that is read elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, 1, 1, padding_mode="reflect") for _ in range(8))
        self.norm = nn.InstanceNorm2d(6)
        self.end = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        c = self.convs
        x = x + c[1](torch.relu(c[0](x)))
        x = torch.relu(c[2](x) + x)
        x = c[3](x) + c[4](x)
        x = self.norm(c[5](x) + x)
        y = c[6](x)
        x = torch.relu(y + x) + y
        x = torch.relu(c[7](x)) + x
        return self.end(torch.cat([x, x], 1)[:, :6])


def test_additions() -> None:
    torch.manual_seed(0)
    rows = answer(Blocks(), torch.randn(2, 6, 9, 11))
    fused = [row for row in rows if "+residual" in row.detail]
    assert len(fused) == 4
    assert sum(row.kernel == "add" for row in rows) == 3


def test_stored_statistics() -> None:
    net, (x,) = make("resnet-batch")
    rows = answer(net.eval(), x)
    convs = [row for row in rows if "→" in row.detail]
    assert sum("+norm" in row.detail for row in convs) == len(convs) - 1
    assert sum("+residual" in row.detail for row in convs) == 2
    assert not any(row.kernel in ("add", "apply") for row in rows)


class Skips(nn.Module):
    """Concatenations of what a convolution, a pooling and an input make."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(7, 5, 3, 1, 1)
        self.c, self.d = nn.Conv2d(9, 4, 3, 1, 1), nn.Conv2d(8, 2, 3, 1, 1)
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        z = self.b(torch.cat([x, y], 1))
        z = self.c(torch.cat([nn.functional.avg_pool2d(y, 3, 1, 1), z], 1))
        return self.d(torch.cat([self.norm(z), y], 1))


def test_slices(form: str) -> None:
    torch.manual_seed(0)
    rows = answer(seed_weights(Skips()), torch.randn(2, 3, 8, 12))
    written = [row for row in rows if "in a slice" in row.detail]
    # The library's own tensor goes where it belongs in a pass that does something else as well.
    assert len(written) == {"prologue": 0, "applied": 2, "library": 1}[form]


def test_a_frozen_unet(form: str) -> None:
    net, (x,) = make("unet-batch")
    rows = answer(net.eval(), x)
    assert form == "prologue" or sum("in a slice" in row.detail for row in rows) >= 3
