"""A training convolution and its gradients, by PyTorch or by the native kernels: what measures faster.

On a GPU they are the library's (cuDNN), in channels_last; nothing is measured here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfast.ops.conv.op import run_conv
from p2pfast.ops.conv_norm_act.pad import padded, unpadded
from p2pfast.ops.conv_norm_act.weight import weight_gradient as native_weight_gradient
from p2pfast.ops.measured import fastest

aten = torch.ops.aten

_LARGEST_KERNEL = 16
_LARGEST_UP_STRIDE = 4
_MOST_FOLDED = 64  # columns of the thin kernel's product


@dataclass(frozen=True)
class Geometry:
    """As for ``p2pfast.ops.conv.conv``."""

    stride: int
    padding: int
    output_padding: int
    transposed: bool
    padding_mode: str

    @property
    def zeros(self) -> int:
        """Padding that the convolution itself adds."""
        return self.padding if self.padding_mode == "zeros" else 0


def _channels_last(x: Tensor) -> bool:
    """Whether it can be read so; a single channel or pixel can be read either way."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _key(kind: str, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[object, ...]:
    return kind, tuple(x.shape), _channels_last(x), tuple(weight.shape), x.dtype, geometry


def _algorithms(x: Tensor, weight: Tensor, g: Geometry, outputs: int, pixels: int) -> list[str]:
    """The native algorithms worth a try for a convolution of x with zero padding ``g.padding`` or another
    mode, to ``outputs`` channels of ``pixels`` pixels in the batch; the safest choice last."""
    kernel, channels = tuple(weight.shape[2:]), x.shape[1]
    if x.device.type != "cpu":
        return []
    if not _channels_last(x) or x.dtype != weight.dtype or max(kernel) > _LARGEST_KERNEL:
        return []
    if g.transposed and (g.stride > _LARGEST_UP_STRIDE or g.padding >= min(kernel)):
        return []
    folded = outputs * kernel[1] * (kernel[0] if g.transposed else 1)
    if outputs <= 4 and (g.transposed or g.stride == 1) and folded <= _MOST_FOLDED:
        return ["thin"]
    up = g.stride == 2 and g.padding == 1 if g.transposed else g.stride <= 2
    if kernel not in ((3, 3), (4, 4)) or not up or channels < 16:
        return ["direct"]
    found = ["direct"] if outputs < 16 else []
    if pixels <= 2048:
        return [*found, "streamed2", "streamed"]
    if kernel == (3, 3) and g.stride == 1 and pixels > 8192:
        found.append("winograd6")
    return [*found, *(["streamed"] if pixels <= 32768 else []), "winograd"]


def _named(name: str, run: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    def way() -> Tensor:
        return run(name)

    way.__name__ = name
    return way


def _fastest(
    key: tuple[object, ...],
    library: Sequence[Callable[[], Tensor]],
    names: Sequence[str],
    native: Callable[[str], Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """By the library or by one of the native algorithms."""
    ways = [_named(name, native) for name in names]
    # Without a convolution of its own for the dtype PyTorch takes seconds for one: not worth a try.
    if not ways or dtype != torch.bfloat16 or library_has_bfloat16():
        ways = [*library, *ways]
    return fastest(key, *ways)


@functools.cache
def library_has_bfloat16() -> bool:
    """Whether the library convolves bfloat16 on this processor, other than one value after another."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without it, or of another version
        return True


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of x (N, C, H, W), in x's memory format."""
    g = geometry

    def library() -> Tensor:
        source = padded(x, g.padding, g.padding_mode)
        two = [g.stride] * 2
        return torch.convolution(
            source, weight, bias, two, [g.zeros] * 2, [1, 1], g.transposed, [g.output_padding] * 2, 1
        )

    def native(algorithm: str) -> Tensor:
        numbers = g.stride, g.padding, g.transposed, g.padding_mode
        return run_conv([x], weight, bias, shape, *numbers, algorithm=algorithm)

    shape = _out_shape(x, weight, g)
    names = _algorithms(x, weight, g, shape[1], shape[0] * shape[2] * shape[3])
    return _fastest(_key("forward", x, weight, g), [library], names, native, x.dtype)


def _out_shape(x: Tensor, weight: Tensor, g: Geometry) -> tuple[int, int, int, int]:
    height, width = (
        (s - 1) * g.stride - 2 * g.padding + k + g.output_padding
        if g.transposed
        else (s + 2 * g.padding - k) // g.stride + 1
        for s, k in zip(x.shape[2:], weight.shape[2:], strict=True)
    )
    return x.shape[0], weight.shape[1 if g.transposed else 0], height, width


def weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, dtype: torch.dtype
) -> Tensor:
    """The gradient for the weight, in ``dtype``, from the output's gradient and the input.

    By the library as the tensors lie, by the library from contiguous copies (its kernels for channels_last
    may be several times slower), or by a native algorithm.
    """
    g = geometry

    def library() -> Tensor:
        return _library_backward(grad, padded(x, g.padding, g.padding_mode), weight, g, 1)

    def planes() -> Tensor:
        source = padded(x, g.padding, g.padding_mode)
        return _library_backward(grad.contiguous(), source.contiguous(), weight, g, 1)

    def native(algorithm: str) -> Tensor:
        # Of a transposed convolution, input and output have exchanged their parts.
        still, windows = (x, grad) if g.transposed else (grad, x)
        kernel = weight.shape[2], weight.shape[3]
        numbers = kernel, g.stride, g.padding, g.padding_mode
        return native_weight_gradient(still, windows, *numbers, algorithm, dtype if written else None)

    written = dtype in (torch.float32, torch.bfloat16)
    names = _weight_algorithms(grad, x, weight, g)
    planar = grad.device.type != "cpu" or not (_channels_last(grad) or _channels_last(x))
    ways = [library] if planar else [library, planes]
    return _fastest(_key("weight", grad, weight, g), ways, names, native, grad.dtype).to(dtype)


def _weight_algorithms(grad: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> list[str]:
    """As ``_algorithms``."""
    if grad.device.type != "cpu":
        return []
    if not (_channels_last(grad) and _channels_last(x)) or not grad.dtype == x.dtype == weight.dtype:
        return []
    kernel = tuple(weight.shape[2:])
    minimal = kernel in ((3, 3), (4, 4)) and g.stride <= 2
    still = x if g.transposed else grad
    pixels = still.shape[0] * still.shape[2] * still.shape[3]
    found = []
    if min(weight.shape[:2]) <= 64:
        found.append("rows")
    if pixels <= 512 or not (minimal or found):
        found.append("taps")
    if minimal and min(weight.shape[:2]) >= 16 and pixels >= 16:
        found.append("minimal")
    return found


def _library_backward(grad: Tensor, source: Tensor, weight: Tensor, g: Geometry, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    found = aten.convolution_backward(
        grad,
        source,
        weight,
        None,
        [g.stride] * 2,
        [g.zeros] * 2,
        [1, 1],
        g.transposed,
        [g.output_padding] * 2,
        1,
        mask,
    )
    result: Tensor = found[which]
    return result


def data_gradient(grad: Tensor, size: torch.Size, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient for the input of shape ``size``; a convolution itself, of the output's gradient.

    That of a convolution with stride s is the transposed one with the same weight, and the other way round;
    with stride 1, the plain one with the weight turned by 180° and its channels exchanged.
    """
    g = geometry
    extra = 2 * (g.padding - g.zeros)
    shape = (size[0], size[1], size[2] + extra, size[3] + extra)

    def backward(of: Tensor, channels_last: bool) -> Tensor:
        # Only the shape of the input is read.
        source = of.new_empty(1).expand(shape)
        if channels_last:
            source = of.new_empty(shape).contiguous(memory_format=torch.channels_last)
        return _library_backward(of, source, weight, g, 0)

    def library() -> Tensor:
        if grad.device.type != "cpu":
            # Of the input it reads the shape alone; the layout it takes from the weight.
            like = weight.contiguous(memory_format=torch.channels_last)
            return _library_backward(grad, grad.new_empty(1).expand(shape), like, g, 0)
        return backward(grad, _channels_last(grad) and not grad.is_contiguous())

    def planes() -> Tensor:
        found = backward(grad.contiguous(), False)
        return found.contiguous(memory_format=torch.channels_last)

    turns = g.stride == 1 and not g.transposed
    same = Geometry(g.stride, g.zeros, 0, not g.transposed, "zeros")
    if turns:
        same = Geometry(1, weight.shape[2] - 1 - g.zeros, 0, False, "zeros")

    def native(algorithm: str) -> Tensor:
        numbers = same.stride, same.padding, same.transposed
        given = weight.flip((2, 3)) if turns else weight
        return run_conv([grad], given, None, shape, *numbers, algorithm=algorithm, exchanged=turns)

    names = []
    if _can_turn(grad, weight, g, shape):
        names = _algorithms(grad, weight, same, shape[1], shape[0] * shape[2] * shape[3])
    ways = [library, planes] if names and not grad.is_contiguous() else [library]
    found = _fastest(_key("data", grad, weight, g), ways, names, native, grad.dtype)
    return unpadded(found, g.padding, g.padding_mode)


def _can_turn(grad: Tensor, weight: Tensor, g: Geometry, shape: tuple[int, ...]) -> bool:
    """Whether the data gradient is a convolution that the native kernels have."""
    if g.transposed:
        return True
    if g.stride == 1:
        return weight.shape[2] == weight.shape[3] and g.zeros < weight.shape[2]
    # A transposed convolution has one output padding for both sides.
    left = [
        s - ((o - 1) * g.stride - 2 * g.zeros + k)
        for s, o, k in zip(shape[2:], grad.shape[2:], weight.shape[2:], strict=True)
    ]
    return left[0] == left[1] and 0 <= left[0] < g.stride and g.zeros < min(weight.shape[2:])
