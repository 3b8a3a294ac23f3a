"""Operators as functions.

Tensors that the native kernels do not take (other devices and dtypes, dilated or grouped convolutions) go
through PyTorch, and what PyTorch refuses raises what PyTorch raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops import autocast, gradients
from p2pfast.ops.conv.activation import activate, activation_code
from p2pfast.ops.conv.op import conv
from p2pfast.ops.conv.source import PADDING_MODES
from p2pfast.ops.conv_norm_act.geometry import Geometry
from p2pfast.ops.conv_norm_act.op import conv_norm_act as training_layer
from p2pfast.ops.cuda import native
from p2pfast.ops.gpu import on_kernels
from p2pfast.ops.image_uint8.op import image_uint8
from p2pfast.ops.image_uint8.reference import image_uint8_reference
from p2pfast.ops.instance_edges.op import instance_edges
from p2pfast.ops.instance_pool.op import instance_pool
from p2pfast.ops.norm_act.op import norm_act

gradients.register()
autocast.register()

__all__ = [
    "conv_norm_act",
    "image_to_uint8",
    "instance_edges",
    "instance_norm_act",
    "instance_pool",
    "up_conv_norm_act",
]

NORMS = ("instance", "batch", None)
_DTYPES = (torch.float32, torch.bfloat16)
_LARGEST_KERNEL = 16
_LARGEST_UP_STRIDE = 4

Size = int | tuple[int, int]


def _pair(value: Size) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _is_image(x: Tensor) -> bool:
    native = x.dtype in _DTYPES if x.device.type == "cpu" else on_kernels(x)
    return native and x.dim() == 4 and x.numel() > 0


def _check_choice(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(str, known))}")


def _slope(activation: str | None, negative_slope: float, alpha: float) -> tuple[str, float]:
    """An activation's name for the kernels and its number."""
    act = activation or "none"
    activation_code(act, "activation")
    return act, negative_slope if act == "leaky_relu" else alpha if act == "elu" else 0.0


def _has_kernels(
    sources: Sequence[Tensor],
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    padding_mode: str,
    dilation: tuple[int, int],
    groups: int,
    transposed: bool,
) -> bool:
    first = sources[0]
    if not all(_is_image(t) and t.dtype == first.dtype and t.shape[2:] == first.shape[2:] for t in sources):
        return False
    if weight.device != first.device or weight.dim() != 4 or len(sources) > 2:
        return False
    if not weight.is_floating_point() or weight.dtype == torch.float64:
        return False
    if first.device.type == "cpu" and weight.dtype not in _DTYPES:
        return False
    if weight.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
        return False
    if groups != 1 or dilation != (1, 1) or padding_mode not in PADDING_MODES:
        return False
    if any(a != b for a, b in (stride, padding, output_padding)):
        return False
    kernel, size = weight.shape[2:], first.shape[2:]
    channels = sum(t.shape[1] for t in sources)
    if channels != weight.shape[0 if transposed else 1] or max(kernel) > _LARGEST_KERNEL:
        return False
    if transposed:
        return stride[0] <= _LARGEST_UP_STRIDE and padding[0] < min(kernel)
    reflects = padding_mode == "reflect" and padding[0] >= min(size)
    return not reflects and min(size) + 2 * padding[0] >= max(kernel)


def _convolved(
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    slope: float,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    output_padding: tuple[int, int],
    padding_mode: str,
    dilation: tuple[int, int],
    groups: int,
    transposed: bool,
) -> Tensor:
    shape = (stride, padding, output_padding)
    # On a GPU weights would be packed in every call, for which the library does not have to wait.
    on_cpu = weight.device.type == "cpu"
    if on_cpu and _has_kernels(sources, weight, *shape, padding_mode, dilation, groups, transposed):
        numbers = (stride[0], padding[0], output_padding[0])
        return conv(sources, weight, bias, *numbers, transposed, padding_mode, act=act, slope=slope)
    x = sources[0] if len(sources) == 1 else torch.cat(sources, 1)
    if transposed:
        y = F.conv_transpose2d(x, weight, bias, *shape, groups, dilation)
    else:
        if padding_mode != "zeros" and padding != (0, 0):
            x = F.pad(x, [padding[1], padding[1], padding[0], padding[0]], mode=padding_mode)
            padding = (0, 0)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return activate(y, act, slope)


@torch.no_grad()
def _update_running(
    running: Tensor | None, new: Tensor, momentum: float, scale: float, over_batch: bool
) -> None:
    """A running statistic as PyTorch's norms update it, those of instances averaged."""
    if running is not None:
        average = new if over_batch else new.mean(0)
        running.lerp_((scale * average).to(running.dtype), momentum)


def _normalised(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
) -> Tensor:
    over_batch = norm == "batch"
    values = x.shape[2:].numel() * (x.shape[0] if over_batch else 1)
    frozen = not use_input_stats
    parameters = (weight, bias, running_mean, running_var)
    native = (
        _is_image(x)
        and (values > 1 or frozen)
        and not (frozen and (running_mean is None or running_var is None))
        and all(t is None or (t.device == x.device and t.shape == (x.shape[1],)) for t in parameters)
        and (residual is None or (_is_image(residual) and residual.shape == x.shape))
    )
    if native:
        if residual is not None and residual.dtype != x.dtype:
            residual = residual.to(x.dtype)
        stored = (running_mean, running_var) if frozen else (None, None)
        y, mean, variance = norm_act(x, weight, bias, *stored, over_batch, eps, act, slope, residual)
        if not frozen:
            _update_running(running_mean, mean, momentum, 1.0, over_batch)
            _update_running(running_var, variance, momentum, values / (values - 1), over_batch)
        return y
    if over_batch:
        y = F.batch_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    else:
        y = F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return activate(y if residual is None else y + residual, act, slope)


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    norm: str = "instance",
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(x) + residual)`` with two reads and one write of ``x``; statistics in float32.

    Instance normalisation as in Ulyanov et al. 2016 (arXiv:1607.08022), batch normalisation as in Ioffe and
    Szegedy 2015 (arXiv:1502.03167).

    Args:
        x: (N, C, H, W), any floating-point dtype; float32 and bfloat16 on the CPU run natively.
        weight, bias: (C,), the affine parameters, or None.
        running_mean, running_var: (C,), updated in place with ``use_input_stats``, used without; or None.
        norm: ``"instance"`` or ``"batch"``.
        use_input_stats: normalise by x's own statistics instead of the running ones.
        momentum: share of the new statistics in an update of the running ones.
        eps: added to the variance.
        activation: None, ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"``, ``"elu"``, ``"silu"`` or
            ``"gelu"``.
        negative_slope: of ``"leaky_relu"``.
        alpha: of ``"elu"``.
        residual: (N, C, H, W), added before the activation; or None.

    Returns:
        (N, C, H, W) of x's dtype; channels_last if a native kernel made it.

    Raises:
        ValueError: an unknown ``norm`` or ``activation``, or one value a channel to take statistics of.
        RuntimeError: shapes that do not fit, as PyTorch raises them.
    """
    _check_choice("norm", norm, NORMS[:2])
    act, slope = _slope(activation, negative_slope, alpha)
    return _normalised(
        x,
        norm,
        weight,
        bias,
        running_mean,
        running_var,
        use_input_stats,
        momentum,
        eps,
        act,
        slope,
        residual,
    )


def conv_norm_act(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    padding_mode: str = "zeros",
    norm: str | None = "instance",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv2d(pad(x), weight, bias)) + residual)``, the step that image-to-image networks repeat.

    Padding is done by index as the convolution reads, never by a copy. Forward and backward, also twice.
    Source: Isola et al. 2017 (arXiv:1611.07004), appendix: "Convolution-BatchNorm-ReLU".

    Args:
        x: (N, C, H, W); or two such tensors, used as if concatenated along the channels (a U-Net's skip).
        weight: (Cout, C / groups, Kh, Kw). bias: (Cout,) or None.
        stride, padding, dilation, groups: as for ``torch.nn.functional.conv2d``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        norm: ``"instance"``, ``"batch"`` or None.
        norm_weight, norm_bias, running_mean, running_var, use_input_stats, momentum, eps, activation,
            negative_slope, alpha, residual: as for :func:`instance_norm_act`, of Cout channels.

    Float32 and bfloat16 on the CPU run natively unless the convolution is dilated, grouped, padded circularly
    or unevenly, or has a kernel above 16. On a GPU, with float16 too, convolutions are the library's and the
    rest Triton's.

    Returns:
        (N, Cout, H', W') of x's dtype; channels_last if a native kernel made it.

    Raises:
        ValueError: an unknown ``norm``, ``activation`` or ``padding_mode``.
        RuntimeError: shapes or dtypes that do not fit, as PyTorch raises them.
    """
    _check_choice("padding_mode", padding_mode, (*PADDING_MODES, "circular"))
    geometry = {
        "stride": _pair(stride),
        "padding": _pair(padding),
        "output_padding": _pair(0),
        "padding_mode": padding_mode,
        "dilation": _pair(dilation),
        "groups": groups,
        "transposed": False,
    }
    statistics = {
        "weight": norm_weight,
        "bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "use_input_stats": use_input_stats,
        "momentum": momentum,
        "eps": eps,
    }
    sources = [x] if isinstance(x, Tensor) else list(x)
    finish = (*_slope(activation, negative_slope, alpha), residual)
    return _chain(sources, weight, bias, geometry, norm, statistics, *finish)


def up_conv_norm_act(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    *,
    norm: str | None = "instance",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    alpha: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(norm(conv_transpose2d(x, weight, bias)) + residual)``: the step that makes images larger.

    A transposed convolution is done as one ordinary convolution for each phase of its output, without the
    multiplications by inserted zeros. Forward and backward, also twice.
    Source: Radford et al. 2016 (arXiv:1511.06434).

    Args:
        x: (N, C, H, W); or two such tensors, used as if concatenated along the channels.
        weight: (C, Cout / groups, Kh, Kw). bias: (Cout,) or None.
        stride, padding, output_padding, groups, dilation: as for ``torch.nn.functional.conv_transpose2d``.
        norm and the rest: as for :func:`conv_norm_act`.

    Returns:
        (N, Cout, H', W') of x's dtype; channels_last if a native kernel made it.

    Raises:
        ValueError: an unknown ``norm`` or ``activation``.
        RuntimeError: shapes or dtypes that do not fit, as PyTorch raises them.
    """
    geometry = {
        "stride": _pair(stride),
        "padding": _pair(padding),
        "output_padding": _pair(output_padding),
        "padding_mode": "zeros",
        "dilation": _pair(dilation),
        "groups": groups,
        "transposed": True,
    }
    statistics = {
        "weight": norm_weight,
        "bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "use_input_stats": use_input_stats,
        "momentum": momentum,
        "eps": eps,
    }
    sources = [x] if isinstance(x, Tensor) else list(x)
    finish = (*_slope(activation, negative_slope, alpha), residual)
    return _chain(sources, weight, bias, geometry, norm, statistics, *finish)


def _trained(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: dict[str, Any],
    norm: str | None,
    statistics: dict[str, Any],
    act: str,
    slope: float,
    residual: Tensor | None,
) -> Tensor | None:
    """The chain as one step of autograd; None where it has to be done in parts, or needs no gradient."""
    affine = statistics["weight"], statistics["bias"]
    running = statistics["running_mean"], statistics["running_var"]
    needs = any(t is not None and t.requires_grad for t in (x, weight, bias, residual, *affine))
    if not (needs and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return None
    channels = weight.shape[1 if geometry["transposed"] else 0] if weight.dim() == 4 else 0
    frozen = norm is not None and not statistics["use_input_stats"]
    vectors = [t for t in (bias, *affine, *running) if t is not None]
    if (
        not _has_kernels([x], weight, **geometry)
        or any(t.device != x.device or t.shape != (channels,) for t in vectors)
        or (frozen and (running[0] is None or running[1] is None))
    ):
        return None
    stride, padding, output_padding = (geometry[name][0] for name in ("stride", "padding", "output_padding"))
    layer = Geometry(stride, padding, output_padding, geometry["transposed"], geometry["padding_mode"])
    # Another shape may be one that PyTorch expands.
    if residual is not None and not (
        _is_image(residual)
        and residual.device == x.device
        and residual.shape == layer.result_shape(x, weight)
    ):
        return None
    return training_layer(
        x,
        weight,
        bias,
        **layer._asdict(),
        norm=norm or "none",
        norm_weight=affine[0],
        norm_bias=affine[1],
        running_mean=running[0],
        running_var=running[1],
        momentum=statistics["momentum"],
        use_running=frozen,
        eps=statistics["eps"],
        act=act,
        slope=slope,
        residual=residual,
    )


def _chain(
    sources: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    geometry: dict[str, Any],
    norm: str | None,
    statistics: dict[str, Any],
    act: str,
    slope: float,
    residual: Tensor | None,
) -> Tensor:
    """The convolution, and the norm where there is one; whichever is last takes the activation."""
    _check_choice("norm", norm, NORMS)
    if len(sources) == 1:
        trained = _trained(sources[0], weight, bias, geometry, norm, statistics, act, slope, residual)
        if trained is not None:
            return trained
    if norm is not None:
        y = _convolved(sources, weight, bias, "none", 0.0, **geometry)
        return _normalised(y, norm, **statistics, act=act, slope=slope, residual=residual)
    if residual is not None:
        return activate(_convolved(sources, weight, bias, "none", 0.0, **geometry) + residual, act, slope)
    return _convolved(sources, weight, bias, act, slope, **geometry)


def image_to_uint8(image: Tensor, tanh: bool = False) -> Tensor:
    """A generator's output as 8-bit pixels: (x + 1) / 2 * 255, clipped and truncated as the published
    ``tensor2im`` does.

    Args:
        image: (N, C, H, W) floating point, 1 to 4 channels, any strides; in [-1, 1] unless ``tanh``.
        tanh: apply tanh first.

    Returns:
        (N, H, W, C) uint8 on the image's device, contiguous.

    Raises:
        TypeError, ValueError: a dtype or shape that is no image.
    """
    if native(image.device, "image_uint8") and image.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return image_uint8(image, tanh)
    return image_uint8_reference(image, tanh)
