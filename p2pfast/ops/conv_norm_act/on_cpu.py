"""A training convolution and its gradients by the native kernels: what is worth a try, and runs."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.op import run_conv
from p2pfast.ops.conv_norm_act.geometry import Geometry, in_channels_last
from p2pfast.ops.data_gradient import data_gradient
from p2pfast.ops.weight_gradient import weight_gradient

_LARGEST_KERNEL = 16
_LARGEST_UP_STRIDE = 4
_MOST_FOLDED = 64  # columns of the thin kernel's product
_PAIRS = ", pairs"
_DTYPES = (torch.float32, torch.bfloat16)


def _multiplies_pairs(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and bool(_C.multiplies_pairs())


def convolutions(
    x: Tensor, weight: Tensor, shape: tuple[int, int, int, int], geometry: Geometry
) -> list[str]:
    """Algorithms for ``convolve``, the safest choice last."""
    g, kernel, channels = geometry, tuple(weight.shape[2:]), x.shape[1]
    outputs, pixels = shape[1], shape[0] * shape[2] * shape[3]
    if x.dtype not in _DTYPES or not in_channels_last(x) or max(kernel) > _LARGEST_KERNEL:
        return []
    if g.transposed and (g.stride > _LARGEST_UP_STRIDE or g.padding >= min(kernel)):
        return []
    folded = outputs * kernel[1] * (kernel[0] if g.transposed else 1)
    if outputs <= 4 and (g.transposed or g.stride == 1) and folded <= _MOST_FOLDED:
        return ["thin"]
    up = g.stride == 2 and g.padding == 1 if g.transposed else g.stride <= 2
    # Products of bfloat16 pairs with float32 sums are what PyTorch computes; in tiles, whose points are
    # rounded too, they would have more than twice its error.
    direct = ["direct" + _PAIRS, "direct"] if _multiplies_pairs(x) else ["direct"]
    if kernel not in ((3, 3), (4, 4)) or not up or channels < 16:
        return direct
    found = direct if outputs < 16 else []
    if pixels <= 2048:
        return [*found, "streamed2", "streamed"]
    if kernel == (3, 3) and g.stride == 1 and pixels > 8192:
        found.append("winograd6")
    return [*found, *(["streamed"] if pixels <= 32768 else []), "winograd"]


def convolve(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    geometry: Geometry,
    turned: bool,
) -> Tensor:
    """The convolution of x (N, C, H, W) to a result of ``shape``, in channels_last, by the way of that name.

    Args:
        turned: the weight is that of the convolution whose data gradient this is: its first two axes are
            exchanged, and its kernel is turned by 180°.
    """
    g = geometry
    numbers = g.stride, g.padding, g.transposed, g.padding_mode
    algorithm = name.removesuffix(_PAIRS)
    return run_conv(
        [x], weight, bias, shape, *numbers, algorithm=algorithm, turned=turned, pairs=name != algorithm
    )


def has_adjoint(weight: Tensor, geometry: Geometry) -> bool:
    """Whether ``adjoint`` takes the place of the streamed convolution in a data gradient.

    It has the forward pass's tiles, where the convolution has those of the padded input, and it folds the
    padding. Zeros leave both the same.
    """
    g = geometry
    padded = g.padding > 0 and g.padding_mode != "zeros"
    return padded and g.stride == 1 and not g.transposed and tuple(weight.shape[2:]) == (3, 3)


def adjoint(grad: Tensor, weight: Tensor, size: torch.Size, geometry: Geometry) -> Tensor:
    """The data gradient by the transpose of minimal filtering."""
    return data_gradient(grad, weight, size, geometry.padding, geometry.padding_mode)


def weight_gradients(still: Tensor, windows: Tensor, weight: Tensor, geometry: Geometry) -> list[str]:
    """Algorithms for ``gradient_of_weight``; its first two arguments."""
    if not (in_channels_last(still) and in_channels_last(windows)):
        return []
    if still.dtype != windows.dtype or still.dtype not in _DTYPES:
        return []
    minimal = tuple(weight.shape[2:]) in ((3, 3), (4, 4)) and geometry.stride <= 2
    pixels = still.shape[0] * still.shape[2] * still.shape[3]
    found = []
    if min(weight.shape[:2]) <= 64:
        found.append("rows")
        if _multiplies_pairs(still):
            found.append("pairs")
    if pixels <= 512 or not (minimal or found):
        found.append("taps")
    if minimal and min(weight.shape[:2]) >= 16 and pixels >= 16:
        found.append("minimal")
    return found


def gradient_of_weight(
    name: str,
    still: Tensor,
    windows: Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """The weight gradient by an algorithm, in ``dtype`` where the kernel can write that.

    Args:
        still: the output's gradient, one pixel of which multiplies each window; of a transposed convolution
            the input.
        windows: the other of the two.
    """
    written = dtype if dtype in _DTYPES else None
    numbers = kernel, geometry.stride, geometry.padding, geometry.padding_mode
    return weight_gradient(still, windows, *numbers, name, written)
