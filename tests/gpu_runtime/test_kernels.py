"""Plans for a GPU on CPU tensors with the real kernels, in Triton's interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from gpu_runtime.plain import ShuffledFrame
from networks import leaves, make, relative, seed_weights
from torch import Tensor, nn

import p2pfast
from p2pfast import models
from p2pfast.ops.gpu import interpreted
from p2pfast.runtime.gpu import engine

pytestmark = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not set")

INSTANCE = models.norm_layer_of("instance")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(engine, "on_cpu", {"frame": ShuffledFrame})


def check(net: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, given: object = None) -> None:
    """The plan's answer against the network's own; ``given`` is what the plan gets instead of ``inputs``."""
    with torch.no_grad():
        torch.manual_seed(3)
        expected = copy.deepcopy(net)(*inputs)
        rounded = copy.deepcopy(net).to(dtype)
        torch.manual_seed(3)
        eager = rounded(*(x.to(dtype) for x in inputs))
    torch.manual_seed(3)
    fast = p2pfast.optimize(net, dtype=dtype, backend="cuda")
    found = fast(*inputs) if given is None else fast(given)
    for e, f, g in zip(leaves(expected), leaves(found), leaves(eager), strict=True):
        assert f.shape == e.shape and f.dtype == dtype
        assert relative(f, e) < (3e-5 if dtype == torch.float32 else max(2 * relative(g, e), 0.02))


@pytest.mark.parametrize(
    ("name", "dtype"), [("multiscale-features", torch.float32), ("pixel", torch.float16)]
)
def test_discriminators(name: str, dtype: torch.dtype) -> None:
    net, inputs = make(name)
    check(net.train(), tuple(x[:1] for x in inputs), dtype)


def test_unet() -> None:
    """Batch statistics and dropout, both live, and skips as two sources."""
    net = models.UnetGenerator(3, 2, 5, 4, models.norm_layer_of("batch"), use_dropout=True)
    seed_weights(net)
    check(net.train(), (torch.randn(2, 3, 32, 32),), torch.bfloat16)


def test_resnet() -> None:
    net = models.ResnetGenerator(3, 3, 4, INSTANCE, False, 2)
    seed_weights(net)
    check(net, (torch.randn(1, 3, 16, 24),), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flagship(dtype: torch.dtype) -> None:
    """The published coarse-to-fine network with all its blocks, narrow, from a label map with instances."""
    net = models.build("pix2pixhd-local", ngf=2, input_nc=6, n_downsample_global=3)
    seed_weights(net)
    check(net, (street_of(32, 64).dense(),), dtype, street_of(32, 64))


def street_of(height: int, width: int) -> p2pfast.LabelMap:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 5, (1, 1, height // 8, width // 8), generator=generator)
    labels = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    instances = (labels + torch.arange(width) // 24).int()
    return p2pfast.LabelMap(labels, instances, num_classes=5)


def test_forms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways to feed a convolution, on one network with every kind of border."""
    net = models.GlobalGenerator(3, 3, 2, 2, 1, INSTANCE)
    seed_weights(net)
    x = torch.randn(1, 3, 16, 16)
    expected = net(x).detach()
    for form in ("prologue", "applied", "library"):
        monkeypatch.setattr(engine, "on_cpu", {"frame": ShuffledFrame, "form": form})
        fast = p2pfast.optimize(net, backend="cuda")
        assert relative(fast(x), expected) < 3e-5, form
        kinds = {row.kernel for row in p2pfast.explain(fast).rows}
        assert {"prologue": "conv", "applied": "conv, applied", "library": "library"}[form] in kinds
