"""InstanceNorm + ReLU + residual as its passes, and the operator as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.source import describe_output, describe_source
from p2pfast.ops.norm import instance_norm_act

# (height, width, channels) of the flagship.
SHAPES = {"local": (512, 1024, 64), "middle": (128, 256, 256), "bottleneck": (32, 64, 1024)}


def make(shape: str, full: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    height, width, channels = SHAPES[shape]
    small = 1 if full or height < 100 else 2
    size = (1, channels, height // small, width // small)
    x, residual = (torch.randn(size).to(dtype, memory_format=torch.channels_last) for _ in range(2))
    return x + 1, residual


def eager(x: Tensor, residual: Tensor) -> Tensor:
    return F.relu(F.instance_norm(x) + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_operator(compare: Callable[..., None], full: bool, shape: str, dtype: torch.dtype) -> None:
    x, residual = make(shape, full, dtype)
    y = instance_norm_act(x, act="relu", residual=residual)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y, eager(x, residual), rtol=tolerance, atol=tolerance)
    # x twice: once for the statistics.
    compare(
        lambda: instance_norm_act(x, act="relu", residual=residual),
        lambda: eager(x, residual),
        bytes_moved=4 * x.nbytes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(compare: Callable[..., None], full: bool, shape: str, dtype: torch.dtype) -> None:
    x, _ = make(shape, full, dtype)
    call: dict[str, Any] = {
        "source": describe_source(x),
        "images": 1,
        "height": x.shape[2],
        "width": x.shape[3],
    }
    parts = _C.statistics_parts(call)
    partial, count = torch.empty(parts, 2, x.shape[1]), torch.empty(parts)
    call |= {"partial": partial.data_ptr(), "count": count.data_ptr()}
    _C.run_statistics(call)
    mean = (partial[:, 0] * count[:, None]).sum(0) / count.sum()
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    compare(
        lambda: _C.run_statistics(call),
        lambda: torch.var_mean(x, (2, 3), correction=0),
        bytes_moved=x.nbytes,
    )


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_apply(
    compare: Callable[..., None], full: bool, shape: str, dtype: torch.dtype, in_place: bool
) -> None:
    x, residual = make(shape, full, dtype)
    scale, shift = torch.rand(1, x.shape[1]) * 0.2 + 0.5, torch.zeros(1, x.shape[1])
    wide_scale, wide_shift = (t[..., None, None].to(dtype) for t in (scale, shift))

    def plain() -> Tensor:
        return F.relu(x * wide_scale + wide_shift + residual)

    expected = plain()
    out = x if in_place else torch.full_like(x, float("nan"))
    call = {
        "first": describe_source(x, scale, shift),
        "second": describe_source(residual),
        "images": 1,
        "height": x.shape[2],
        "width": x.shape[3],
        "out": describe_output(out),
        "act": 1,
    }
    _C.run_apply(call)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    compare(lambda: _C.run_apply(call), plain, bytes_moved=3 * x.nbytes)
