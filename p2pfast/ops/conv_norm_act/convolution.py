"""A training convolution and its gradients, by PyTorch or by the own kernels: what measures faster.

On a CPU those are the native algorithms (``on_cpu``), on a GPU the Triton kernels (``on_gpu``) beside
cuDNN in channels_last. Without measuring (``P2PFAST_TUNE=off``, PyTorch's deterministic mode) native ones and
cuDNN run.

Weights may have another dtype than what they are multiplied with: under autocast they are float32. The native
kernels read them as they are, which spares a copy of all weights in each direction of each step; where a
library multiplies, they are rounded for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from p2pfast.ops.channels_last import channels_last
from p2pfast.ops.conv_norm_act import on_cpu
from p2pfast.ops.conv_norm_act.geometry import Geometry, in_channels_last
from p2pfast.ops.conv_norm_act.pad import padded, unpadded
from p2pfast.ops.gpu import allows_tf32
from p2pfast.ops.measured import fastest, fixed, settled

aten = torch.ops.aten


def _own(x: Tensor) -> ModuleType | None:
    """The own kernels for x; Triton's have nothing to offer without tensor cores."""
    if x.device.type == "cpu":
        return on_cpu
    if x.device.type != "cuda" or fixed() or (x.dtype == torch.float32 and not allows_tf32()):
        return None
    from p2pfast.ops.conv_norm_act import on_gpu

    return on_gpu


def _key(kind: str, x: Tensor, weight: Tensor, geometry: Geometry, *rest: object) -> tuple[object, ...]:
    """What the ways and their times depend on; ``rest`` is what the other arguments leave open."""
    dtypes = x.dtype, weight.dtype
    return kind, tuple(x.shape), in_channels_last(x), tuple(weight.shape), *dtypes, geometry, *rest


def _readable(weight: Tensor, x: Tensor) -> Tensor:
    """The weight in a dtype that the own kernels for x read."""
    as_it_is = x.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    return weight if as_it_is else weight.to(x.dtype)


def _narrow(a: Sequence[int], b: Sequence[int], weight: Tensor) -> bool:
    """Whether images of size a or b, the convolution's ends, are smaller than its kernel."""
    return min(*a[2:], *b[2:]) < max(weight.shape[2:])


def _named(name: str, run: Callable[[str], Tensor]) -> Callable[[], Tensor]:
    def way() -> Tensor:
        return run(name)

    way.__name__ = name
    return way


def _names(library: Sequence[str], own: Sequence[str], x: Tensor, narrow: bool) -> list[str]:
    """The library's ways and the own kernels for operands like x, the one to take without measuring last."""
    if x.device.type != "cpu":
        return [*own, *library]
    # Without a convolution of its own for the dtype PyTorch takes seconds for one: not worth a try. With one,
    # oneDNN 3.12 leaves gradients of taps that see only padding unwritten, in channels_last.
    if own and x.dtype == torch.bfloat16 and (narrow or not library_has_bfloat16()):
        return [*own]
    return [*library, *own]


def _fastest(
    key: tuple[object, ...], run: Callable[[str], Tensor], names: Callable[[], list[str]], x: Tensor
) -> Tensor:
    """What ``run`` returns for the fastest of ``names``."""
    device = _device(x)
    name = settled(key, device)
    if name is not None:
        return run(name)
    return fastest(key, *(_named(name, run) for name in names()), device=device)


def _device(x: Tensor) -> torch.device | None:
    return None if x.device.type == "cpu" else x.device


@functools.cache
def library_has_bfloat16() -> bool:
    """Whether the library convolves bfloat16 on this processor, other than one value after another."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a build without it, or of another version
        return True


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of x (N, C, H, W), in x's dtype and memory format."""
    g, weight = geometry, _readable(weight, x)
    shape, kernels = g.result_shape(x, weight), _own(x)

    def library() -> Tensor:
        source = padded(x, g.padding, g.padding_mode)
        two = [g.stride] * 2
        return torch.convolution(
            source,
            weight.to(x.dtype),
            bias,
            two,
            [g.zeros] * 2,
            [1, 1],
            g.transposed,
            [g.output_padding] * 2,
            1,
        )

    def run(name: str) -> Tensor:
        if name == "library":
            return library()
        assert kernels is not None  # the name is its
        result: Tensor = kernels.convolve(name, x, weight, bias, shape, g, False)
        return result

    def names() -> list[str]:
        own = kernels.convolutions(x, weight, shape, g) if kernels else []
        return _names(["library"], own, x, _narrow(x.shape, shape, weight))

    return _fastest(_key("forward", x, weight, g), run, names, x)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient for the weight, in its dtype, from the output's gradient and the input."""
    run, names = _weight_gradient(grad, x, weight, geometry)
    rest = *x.shape[2:], in_channels_last(x), x.dtype
    found = _fastest(_key("weight", grad, weight, geometry, *rest), run, names, grad)
    return found.to(weight.dtype)


def weight_gradient_ways(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> list[Callable[[], Tensor]]:
    """What ``weight_gradient`` chooses of; the own kernels' results may be in the weight's dtype already."""
    run, names = _weight_gradient(grad, x, weight, geometry)
    return [_named(name, run) for name in names()]


def _weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry
) -> tuple[Callable[[str], Tensor], Callable[[], list[str]]]:
    """By the library as the tensors lie, on a CPU also from contiguous copies (its kernels for channels_last
    may be several times slower), or by the own kernels."""
    g, kernels = geometry, _own(grad)
    # Of a transposed convolution, input and output have exchanged their parts.
    still, windows = (x, grad) if g.transposed else (grad, x)

    def run(name: str) -> Tensor:
        if name in ("library", "planes"):
            of, source = grad, padded(x, g.padding, g.padding_mode)
            if name == "planes":
                of, source = of.contiguous(), source.contiguous()
            return _library_backward(of, source, weight, g, 1)
        assert kernels is not None  # the name is its
        kernel = weight.shape[2], weight.shape[3]
        result: Tensor = kernels.gradient_of_weight(name, still, windows, kernel, g, weight.dtype)
        return result

    def names() -> list[str]:
        own = kernels.weight_gradients(still, windows, weight, g) if kernels else []
        planar = grad.device.type != "cpu" or not (in_channels_last(grad) or in_channels_last(x))
        library = ["library"] if planar else ["library", "planes"]
        return _names(library, own, grad, _narrow(x.shape, grad.shape, weight))

    return run, names


def _library_backward(grad: Tensor, source: Tensor, weight: Tensor, g: Geometry, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    if weight.dtype != grad.dtype:  # of which the weight's own gradient only reads the shape
        weight = weight.to(grad.dtype) if which == 0 else torch.empty_like(weight, dtype=grad.dtype)
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
    """The gradient for the input of shape ``size``."""
    weight = _readable(weight, grad)  # autocast's float32 ones are no other kind of layer
    run, names = _data_gradient(grad, size, weight, geometry)
    return _fastest(_key("data", grad, weight, geometry, *size[2:]), run, names, grad)


def data_gradient_ways(
    grad: Tensor, size: torch.Size, weight: Tensor, geometry: Geometry
) -> list[Callable[[], Tensor]]:
    """What ``data_gradient`` chooses of."""
    run, names = _data_gradient(grad, size, _readable(weight, grad), geometry)
    return [_named(name, run) for name in names()]


def _data_gradient(
    grad: Tensor, size: torch.Size, weight: Tensor, geometry: Geometry
) -> tuple[Callable[[str], Tensor], Callable[[], list[str]]]:
    """A convolution of the output's gradient, whose result is the padded input's, or the transpose of the
    convolution's algorithm.

    The convolution of one with stride s is the transposed one with the same weight, and the other way round;
    with stride 1, the plain one with the weight turned by 180° and its channels exchanged.
    """
    g = geometry
    extra = 2 * (g.padding - g.zeros)
    shape = (size[0], size[1], size[2] + extra, size[3] + extra)
    kernels = _own(grad) if _can_turn(grad, weight, g, shape) else None
    turns = g.stride == 1 and not g.transposed
    same = Geometry(g.stride, g.zeros, 0, not g.transposed, "zeros")
    if turns:
        same = Geometry(1, weight.shape[2] - 1 - g.zeros, 0, False, "zeros")

    def library(of: Tensor, last: bool) -> Tensor:
        # Only the shape of the input is read; on a GPU its layout is told from the weight.
        source, like = of.new_empty(1).expand(shape), weight
        if of.device.type != "cpu":
            like = weight.contiguous(memory_format=torch.channels_last)
        elif last:
            source = of.new_empty(shape).contiguous(memory_format=torch.channels_last)
        return _library_backward(of, source, like, g, 0)

    def run(name: str) -> Tensor:
        if name == "adjoint":
            return on_cpu.adjoint(grad, weight, size, g)
        if name == "library":
            found = library(grad, in_channels_last(grad) and not grad.is_contiguous())
        elif name == "planes":
            found = channels_last(library(grad.contiguous(), False), grad.dtype)
        else:
            assert kernels is not None  # the name is its
            found = kernels.convolve(name, grad, weight, None, shape, same, turns)
        return unpadded(found, g.padding, g.padding_mode)

    def names() -> list[str]:
        own = kernels.convolutions(grad, weight, shape, same) if kernels else []
        if kernels is on_cpu and on_cpu.has_adjoint(weight, g):
            own = ["adjoint" if name == "streamed" else name for name in own]
        several = grad.device.type == "cpu" and own and not grad.is_contiguous()
        library = ["library", "planes"] if several else ["library"]
        return _names(library, own, grad, _narrow(size, grad.shape, weight))

    return run, names


def _can_turn(grad: Tensor, weight: Tensor, g: Geometry, shape: tuple[int, ...]) -> bool:
    """Whether the data gradient is a convolution that the own kernels have."""
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
