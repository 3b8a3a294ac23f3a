from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.channels_last.reference import channels_last_reference
from p2pfast.ops.pages import empty
from p2pfast.ops.pointwise import is_direct
from p2pfast.ops.threads import use_torch_threads

_DTYPES = (torch.float32, torch.bfloat16)
_LEAST = 6  # channels: of fewer, most of a square is empty


def channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another dtype and memory format, in one pass: what training layers make of a first input.

    Native for planes of float32 and bfloat16 on the CPU, where ``Tensor.to`` and ``Tensor.contiguous`` take
    five times as long; everything else is those two. Differentiable, any number of times.

    Args:
        x: (N, C, H, W).
        dtype: of the result.

    Returns:
        The values as channels_last; ``x`` itself if it is that already. The gradient of a contiguous ``x`` is
        contiguous.
    """
    if x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.dim() != 4 or not is_direct((x,)):
        return channels_last_reference(x, dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _ChannelsLast.apply(x, dtype)
        return result
    return _run(x, dtype)


class _ChannelsLast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype, ctx.contiguous = x.dtype, x.is_contiguous()
        return _run(x, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.to(ctx.dtype)
        # Code that reads a gradient, a penalty's say, may take it for a view of rows, as the tensor is.
        return grad.contiguous() if ctx.contiguous else grad, None


def _run(x: Tensor, dtype: torch.dtype) -> Tensor:
    images, channels, height, width = x.shape
    if x.stride(3) != 1 or channels < _LEAST or x.dtype not in _DTYPES or dtype not in _DTYPES:
        return channels_last_reference(x, dtype)
    image_stride, channel_stride, row_stride, _ = x.stride()
    out = empty(x.shape, dtype, torch.channels_last)
    use_torch_threads()
    _C.channels_last(
        data=x.data_ptr(),
        dtype=int(x.dtype == torch.bfloat16),
        images=images,
        channels=channels,
        height=height,
        width=width,
        image_stride=image_stride,
        channel_stride=channel_stride,
        row_stride=row_stride,
        out=out.data_ptr(),
        out_dtype=int(dtype == torch.bfloat16),
    )
    return out
