"""From planes to pixels: exactly what PyTorch's two calls give."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.channels_last import channels_last
from p2pfast.ops.channels_last.reference import channels_last_reference

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [
    (1, 3, 5, 7),
    (2, 1, 4, 4),
    (2, 16, 3, 16),
    (1, 36, 33, 70),
    (3, 17, 1, 1),
    (1, 64, 2, 1030),
    (0, 3, 4, 4),
]


def same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.float().nan_to_num(7.0), expected.float().nan_to_num(7.0))
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize(("dtype", "to"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(cpu_level: str, size: tuple[int, ...], dtype: torch.dtype, to: torch.dtype) -> None:
    x = (torch.randn(size) * 3).to(dtype)
    if x.numel():
        x.view(-1)[0], x.view(-1)[-1] = float("nan"), float("-inf")
    n, c, h, w = size
    wide = torch.full((n, c + 1, h + 2, w + 3), float("nan"), dtype=dtype)
    wide[:, 1:, 1:-1, 2:-1] = x
    for view in (
        x,
        wide[:, 1:, 1:-1, 2:-1],
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3),
    ):
        same(channels_last(view, to), channels_last_reference(view, to))


@pytest.mark.parametrize("to", DTYPES, ids=str)
def test_nothing_is_read_or_written_outside(cpu_level: str, buffers: Any, to: torch.dtype) -> None:
    for size in ((2, 5, 3, 9), (1, 36, 7, 33), (1, 18, 1, 5)):
        x = buffers(*size)
        x.normal_()
        out = buffers(size[0], size[2], size[3], size[1], dtype=to)
        _C.channels_last(
            data=x.data_ptr(), dtype=0, images=size[0], channels=size[1], height=size[2], width=size[3],
            image_stride=x.stride(0), channel_stride=x.stride(1), row_stride=x.stride(2),
            out=out.data_ptr(), out_dtype=DTYPES.index(to),
        )  # fmt: skip
        assert torch.equal(out.permute(0, 3, 1, 2), x.to(to))


def test_itself() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert channels_last(x, torch.float32) is x


def test_gradient() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    grad = torch.randn(2, 3, 4, 5)
    y = channels_last(x, torch.bfloat16)
    (got,) = torch.autograd.grad(y, x, grad.bfloat16())
    assert got.dtype == torch.float32 and torch.equal(got, grad.bfloat16().float())
    y = channels_last(x, torch.float32) ** 3
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())


def test_other_dtypes() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    same(channels_last(x, torch.float16), channels_last_reference(x, torch.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": -1}, "images is -1"),
        ({"channels": -3}, "channels is -3"),
        ({"dtype": 2}, "dtype is 2"),
        ({"out_dtype": 5}, "dtype is 5"),
        ({"out": 0}, "data or out is null"),
    ],
)
def test_bad_native_arguments(change: dict[str, Any], message: str) -> None:
    t = torch.zeros(16)
    call = {
        "data": t.data_ptr(),
        "dtype": 0,
        "images": 1,
        "channels": 2,
        "height": 2,
        "width": 2,
        "out": t.data_ptr(),
    }
    call |= {"image_stride": 8, "channel_stride": 4, "row_stride": 2, "out_dtype": 0}
    with pytest.raises(ValueError, match=message):
        _C.channels_last(**(call | change))
