"""On the CPU, by the native kernels (csrc/cpu/weight_gradient.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.prepared import Prepared, prepared, slot
from p2pfast.ops.conv.source import describe_geometry, describe_output, describe_source, readable
from p2pfast.ops.pages import empty

# In the order of the native enumeration.
ALGORITHMS = ("minimal", "taps", "rows", "pairs")


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    padding_mode: str,
    algorithm: str,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Σ over images and pixels of ``grad[o, y, x] * pad(x)[i, stride * y + u, stride * x + v]``.

    That of a transposed convolution is the same with ``grad`` and ``x`` exchanged. Sums are float32; their
    order depends on the shapes alone.

    Args:
        grad: (N, Cout, H', W'), channels_last, float32 or bfloat16.
        x: (N, C, H, W), of grad's dtype, as it is before the padding.
        kernel, stride, padding, padding_mode: of the convolution.
        algorithm: ``"minimal"`` (3×3 and 4×4, stride 1 and 2), ``"taps"`` (few pixels), ``"rows"`` (few
            channels) or ``"pairs"`` (the same by products of bfloat16 pairs, for bfloat16).
        dtype: of the result, float32 or bfloat16; None takes grad's.

    Returns:
        (Cout, C, *kernel), contiguous.
    """
    x = readable(x)
    result = empty((grad.shape[1], x.shape[1], *kernel), dtype or grad.dtype)
    common = kernel, stride, padding, padding_mode, algorithm
    layout = tuple((t.shape, t.stride(), t.dtype) for t in (grad, x))
    key = ("weight_gradient", layout, result.dtype, *common)
    addresses = grad.data_ptr(), x.data_ptr(), result.data_ptr()
    prepared(key, lambda: _prepare(grad, x, result, *common)).run(addresses)
    return result


def _prepare(
    grad: Tensor,
    x: Tensor,
    result: Tensor,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    padding_mode: str,
    algorithm: str,
) -> Prepared:
    """The call, of which the tensors' addresses are the slots."""
    taps = kernel[0] * kernel[1]
    call = {
        "sources": [describe_source(x) | {"data": slot(1)}],
        **describe_geometry(x, grad.shape, kernel, stride, padding, padding_mode),
        "weight_out_stride": x.shape[1] * taps,
        "weight_in_stride": taps,
        "out": describe_output(grad) | {"data": slot(0)},
    }
    number, program = ALGORITHMS.index(algorithm), _C.Program()
    needed = _C.weight_gradient_workspace(number, call)
    narrow = int(result.dtype == torch.bfloat16)
    program.weight_gradient(number, call | {"workspace": slot(3)}, slot(2), narrow)
    return Prepared(program, (needed,))
