"""Plans for a GPU on CPU tensors with the real kernels, in Triton's interpreter."""

from __future__ import annotations

import copy
import functools

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["resnet", "unet-batch", "multiscale-features", "global-affine", "local-zero", "pixel", "encoder-batch"],
)
def test_networks(name: str, dtype: torch.dtype) -> None:
    net, inputs = make(name)
    check(net.train(), tuple(x[:1] for x in inputs) if name != "unet-batch" else inputs, dtype)
