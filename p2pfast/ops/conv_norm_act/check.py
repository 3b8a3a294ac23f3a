from __future__ import annotations

from torch import Tensor

from p2pfast.ops.conv.source import PADDING_MODES
from p2pfast.ops.conv_norm_act.geometry import Geometry

NORMS = ("none", "instance", "batch")


def check_geometry(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[int, int, int, int]:
    """The result's shape; raises a ValueError if the convolution has none."""
    g = geometry
    if g.padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode is {g.padding_mode!r}; choose one of {', '.join(PADDING_MODES)}")
    if g.transposed and g.padding_mode != "zeros":
        raise ValueError(f"padding_mode is {g.padding_mode!r}; a transposed convolution has only 'zeros'")
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a filled (images, channels, height, width) is expected"
        )
    channels, size = x.shape[1], x.shape[2:]
    if weight.dim() != 4 or weight.numel() == 0 or weight.shape[0 if g.transposed else 1] != channels:
        first = f"({channels}, out_channels" if g.transposed else f"(out_channels, {channels}"
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; {first}, kernel_h, kernel_w) is expected for "
            f"{channels} input channels"
        )
    if g.stride < 1 or g.padding < 0 or not 0 <= g.output_padding < (g.stride if g.transposed else 1):
        raise ValueError(
            f"stride is {g.stride}, padding {g.padding}, output_padding {g.output_padding}; at least 1, at "
            "least 0, and 0 or below the stride of a transposed convolution are expected"
        )
    if g.padding_mode == "reflect" and g.padding >= min(size):
        raise ValueError(
            f"padding is {g.padding}; reflection needs it below the input's height and width, here "
            f"{size[0]}x{size[1]}"
        )
    shape = g.result_shape(x, weight)
    if min(shape) < 1:
        raise ValueError(
            f"x of {size[0]}x{size[1]} with padding {g.padding} and a kernel of "
            f"{weight.shape[2]}x{weight.shape[3]} would give an output of {shape[2]}x{shape[3]}; use a "
            "larger input or another padding"
        )
    return shape


def check_rest(
    x: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    vectors: dict[str, Tensor | None],
    residual: Tensor | None,
) -> None:
    """Raises a TypeError or ValueError unless ``vectors``, by their names, have a value a channel of a result
    of ``shape``, ``residual`` is like the result, and all is floating point on x's device."""
    for name, t in (("x", x), ("weight", weight), ("residual", residual), *vectors.items()):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{name} has dtype {t.dtype}; a floating-point dtype is expected")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; they must be on one device")
    channels = shape[1]
    for name, t in vectors.items():
        if t is not None and t.shape != (channels,):
            raise ValueError(f"{name} has shape {tuple(t.shape)}; ({channels},) is expected")
    if residual is not None and residual.shape != shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, the result {shape}; they must be equal"
        )
