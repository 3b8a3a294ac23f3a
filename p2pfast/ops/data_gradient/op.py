"""On the CPU, by the native kernel (csrc/cpu/data_gradient.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.prepared import Prepared, prepared, slot
from p2pfast.ops.conv.source import describe_geometry, describe_output, describe_source
from p2pfast.ops.pages import empty


def data_gradient(
    grad: Tensor, weight: Tensor, size: Sequence[int], padding: int, padding_mode: str
) -> Tensor:
    """The gradient for the input of a 3x3 convolution of stride 1, by the transpose of minimal filtering.

    Sums are float32; their order depends on the shapes alone.

    Args:
        grad: (N, Cout, H', W'), the output's gradient, channels_last, float32 or bfloat16.
        weight: (Cout, C, 3, 3), float32 or bfloat16.
        size: (N, C, H, W), the input's as it is before the padding.
        padding, padding_mode: of the convolution.

    Returns:
        Of that size, grad's dtype, and channels_last.
    """
    weight = weight.contiguous()
    result = empty(tuple(size), grad.dtype, torch.channels_last)
    layout = grad.shape, grad.stride(), grad.dtype, weight.shape, weight.dtype
    key = ("data_gradient", *layout, result.shape, padding, padding_mode)
    addresses = grad.data_ptr(), weight.data_ptr(), result.data_ptr()
    prepared(key, lambda: _prepare(grad, weight, result, padding, padding_mode)).run(addresses)
    return result


def _prepare(grad: Tensor, weight: Tensor, result: Tensor, padding: int, padding_mode: str) -> Prepared:
    """The call, of which the tensors' addresses are the slots."""
    call = {
        "sources": [describe_source(result) | {"data": slot(2)}],
        **describe_geometry(result, grad.shape, weight.shape[2:], 1, padding, padding_mode),
        "weight": slot(1),
        "weight_dtype": int(weight.dtype == torch.bfloat16),
        "weight_out_stride": weight.stride(0),
        "weight_in_stride": weight.stride(1),
        "out": describe_output(grad) | {"data": slot(0)},
    }
    written, program = describe_output(result) | {"data": slot(2)}, _C.Program()
    needed = _C.data_gradient_workspace(call, written)
    program.data_gradient(call | {"workspace": slot(3)}, written)
    return Prepared(program, (needed,))
