"""A training convolution and its data gradient, by PyTorch or by the native kernels: what measures faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.op import _conv
from p2pfast.ops.conv_norm_act.minimal import weight_gradient as minimal_filtering
from p2pfast.ops.conv_norm_act.pad import padded, unpadded
from p2pfast.ops.measured import fastest

aten = torch.ops.aten


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
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _native_fits(x: Tensor, weight: Tensor, stride: int, transposed: bool) -> bool:
    """Whether minimal filtering is likely to pay: the other layers stay with the library unmeasured."""
    if not _channels_last(x) or min(weight.shape[:2]) < 16 or x.dtype != weight.dtype:
        return False
    kernel = tuple(weight.shape[2:])
    return kernel == (3, 3) and stride in (1, 2) or kernel == (4, 4) and stride == 2


def _key(kind: str, x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[object, ...]:
    return kind, tuple(x.shape), _channels_last(x), tuple(weight.shape), x.dtype, geometry


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of x (N, C, H, W), in x's memory format."""
    g = geometry

    def library() -> Tensor:
        source = padded(x, g.padding, g.padding_mode)
        two = [g.stride] * 2
        return torch.convolution(
            source, weight, bias, two, [g.zeros] * 2, [1, 1], g.transposed, [g.output_padding] * 2, 1
        )

    def native() -> Tensor:
        result: Tensor = _conv(
            [x], weight, bias, g.stride, g.padding, g.output_padding, g.transposed, g.padding_mode
        )
        return result

    if not _native_fits(x, weight, g.stride, g.transposed):
        return library()
    return fastest(_key("forward", x, weight, g), library, native)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient for the weight from the output's gradient and the input.

    By the library as the tensors lie, by the library from contiguous copies (its kernels for channels_last
    may be several times slower), or by minimal filtering.
    """
    g = geometry
    source = padded(x, g.padding, g.padding_mode)

    def library() -> Tensor:
        return _library_backward(grad, source, weight, g, 1)

    def planes() -> Tensor:
        return _library_backward(grad.contiguous(), source.contiguous(), weight, g, 1)

    def minimal() -> Tensor:
        full = F.pad(source, [g.zeros] * 4) if g.zeros else source
        return minimal_filtering(grad, full).to(weight.dtype)

    candidates = [library]
    if _channels_last(grad) or _channels_last(source):
        candidates.append(planes)
    channels = min(weight.shape[:2])
    if g.stride == 1 and not g.transposed and tuple(weight.shape[2:]) == (3, 3) and channels >= 16:
        candidates.append(minimal)
    if len(candidates) == 1:
        return library()
    return fastest(_key("weight", grad, weight, g), *candidates)


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
    height, width = (s + extra for s in size[2:])
    shape = (size[0], size[1], height, width)

    def library() -> Tensor:
        # Only the shape of the input is read.
        source = grad.new_empty(1).expand(shape)
        if _channels_last(grad):
            source = grad.new_empty(shape).contiguous(memory_format=torch.channels_last)
        return _library_backward(grad, source, weight, g, 0)

    def native() -> Tensor:
        result: Tensor
        if g.transposed:
            result = _conv([grad], weight, None, g.stride, g.padding)
        elif g.stride == 1:
            turned = weight.flip((2, 3)).transpose(0, 1)
            result = _conv([grad], turned, None, 1, weight.shape[2] - 1 - g.zeros)
        else:
            left = height - ((grad.shape[2] - 1) * g.stride - 2 * g.zeros + weight.shape[2])
            result = _conv([grad], weight, None, g.stride, g.zeros, left, True)
        return result

    found: Tensor
    if _can_turn(grad, weight, g, shape):
        found = fastest(_key("data", grad, weight, g), library, native)
    else:
        found = library()
    return unpadded(found, g.padding, g.padding_mode)


def _can_turn(grad: Tensor, weight: Tensor, g: Geometry, shape: tuple[int, ...]) -> bool:
    if not _native_fits(grad, weight, g.stride, not g.transposed):
        return False
    if g.transposed:
        return True
    if g.stride == 1:
        return g.zeros < weight.shape[2]
    # A transposed convolution has one output padding for both sides.
    left = [
        s - ((o - 1) * g.stride - 2 * g.zeros + k)
        for s, o, k in zip(shape[2:], grad.shape[2:], weight.shape[2:], strict=True)
    ]
    return left[0] == left[1] and 0 <= left[0] < g.stride and g.zeros < min(weight.shape[2:])
