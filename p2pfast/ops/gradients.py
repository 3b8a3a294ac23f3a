"""Backward formulas of ``conv`` and ``instance_norm_act`` from PyTorch's own derivatives.

They are differentiable themselves (a gradient penalty differentiates a gradient), take every combination of
arguments the operators take, and work under torch.compile.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.conv.op import _conv
from p2pfast.ops.norm.op import instance_norm_act

aten = torch.ops.aten


def from_output(act: str, slope: float) -> bool:
    """Whether an activation's derivative can be told from its result alone."""
    return act not in ("silu", "gelu") and not (act in ("leaky_relu", "elu") and slope < 0)


def activation_gradient(grad: Tensor, value: Tensor, act: str, slope: float, is_output: bool) -> Tensor:
    """The gradient before an activation from the one after it.

    Args:
        grad: of the activation's result.
        value: the result itself if ``is_output`` (see ``from_output``), else what the activation is given.
        act, slope: as for ``p2pfast.ops.conv.conv``.
    """
    result: Tensor
    match act:
        case "relu":
            result = aten.threshold_backward(grad, value, 0)
        case "leaky_relu":
            result = aten.leaky_relu_backward(grad, value, slope, is_output)
        case "tanh":
            result = aten.tanh_backward(grad, value if is_output else value.tanh())
        case "sigmoid":
            result = aten.sigmoid_backward(grad, value if is_output else value.sigmoid())
        case "elu":
            result = aten.elu_backward(grad, slope, 1, 1, is_output, value)
        case "silu":
            gate = value.sigmoid()  # aten.silu_backward has no derivative
            result = grad * gate * (1 + value * (1 - gate))
        case "gelu":
            result = aten.gelu_backward(grad, value)
        case _:
            result = grad
    return result


def _per_channel(values: Tensor) -> Tensor:
    """(C,) or (N, C) as it multiplies (N, C, H, W)."""
    return values[..., None, None]


def _keep_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *numbers, algorithm, dilation, groups = inputs
    stride, padding, output_padding, transposed, padding_mode, scale, shift, *acts = numbers
    ctx.geometry = stride, padding, output_padding, transposed, padding_mode
    ctx.acts = acts
    known = acts[2] == "none" or not from_output(acts[2], acts[3])
    ctx.save_for_backward(weight, bias, scale, shift, None if known else output, *x)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, bias, scale, shift, out, *x = ctx.saved_tensors
    stride, padding, output_padding, transposed, padding_mode = ctx.geometry
    input_act, input_slope, act, slope = ctx.acts
    if act != "none":
        value = out
        if value is None:
            value = _conv(x, weight, bias, *ctx.geometry, scale, shift, input_act, input_slope)
        grad = activation_gradient(grad, value, act, slope, out is not None)

    joined = x[0] if len(x) == 1 else torch.cat(x, 1)
    scaled = joined
    if scale is not None:
        scaled = (joined * _per_channel(scale) + _per_channel(shift)).to(joined.dtype)
    given = activate(scaled, input_act, input_slope)
    padded, pads = given, [padding] * 4
    reflects = padding_mode != "zeros" and padding > 0
    if reflects:
        padded = F.pad(given, pads, mode=padding_mode)
        padding = 0
    scales = scale is not None and (scale.requires_grad or shift.requires_grad)
    kind = joined.dtype
    of_padded, of_weight, of_bias = aten.convolution_backward(
        grad.to(kind),
        padded,
        weight.to(kind),
        None if bias is None else [grad.shape[1]],
        [stride] * 2,
        [padding] * 2,
        [1, 1],
        transposed,
        [output_padding] * 2,
        1,
        [scales or any(t.requires_grad for t in x), weight.requires_grad, bias is not None],
    )
    of_scale = of_shift = None
    of_x: list[Tensor | None] = [None] * len(x)
    if of_padded is not None:
        if reflects:
            undo = (
                aten.reflection_pad2d_backward
                if padding_mode == "reflect"
                else aten.replication_pad2d_backward
            )
            of_padded = undo(of_padded, given, pads)
        of_given = activation_gradient(of_padded, scaled, input_act, input_slope, False)
        if scale is not None:
            dims = [0, 2, 3] if scale.dim() == 1 else [2, 3]
            of_scale = (of_given.float() * joined.float()).sum(dims)
            of_shift = of_given.float().sum(dims)
            of_given = (of_given * _per_channel(scale)).to(kind)
        of_x = list(of_given.split([t.shape[1] for t in x], 1))
    of_weight = None if of_weight is None else of_weight.to(weight.dtype)
    of_bias = None if of_bias is None else of_bias.to(bias.dtype)
    # The dispatcher leaves out trailing arguments that have their default values.
    found = (of_x, of_weight, of_bias, *[None] * 5, of_scale, of_shift, *[None] * 7)
    return found[: len(ctx.needs_input_grad)]


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, mean, variance, over_batch, eps, act, slope, residual = inputs
    ctx.numbers = over_batch, eps, act, slope
    known = act == "none" or not from_output(act, slope)
    ctx.save_for_backward(x, weight, bias, mean, variance, None if known else output, residual)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, mean, variance, out, residual = ctx.saved_tensors
    over_batch, eps, act, slope = ctx.numbers
    if act != "none":
        value = out
        if value is None:
            value = instance_norm_act(x, weight, bias, mean, variance, over_batch, eps, residual=residual)
        grad = activation_gradient(grad, value, act, slope, out is not None)
    of_residual = grad if residual is not None else None

    # The derivative of batch norm; where every image has statistics of its own, so has every one of its
    # channels. They are functions of x there: no gradient passes through the arguments.
    images, channels = x.shape[:2]
    batched = over_batch or (mean is not None and mean.dim() == 1)
    folded, incoming = x.float(), grad.float()
    gain = None if weight is None else weight.float()
    if not batched:
        shape = (1, images * channels, *x.shape[2:])
        folded, incoming = folded.reshape(shape), incoming.reshape(shape)
        gain = None if gain is None else gain.repeat(images)
    center = deviation = None
    if mean is None:
        spread, center = torch.var_mean(folded.detach(), (0, 2, 3), correction=0)
        deviation = torch.rsqrt(spread + eps)
    stored = [None if t is None else t.float().reshape(-1) for t in (mean, variance)]
    wanted = [True, weight is not None, bias is not None]
    of_x, of_gain, of_bias = aten.native_batch_norm_backward(
        incoming, folded, gain, *stored, center, deviation, mean is None, eps, wanted
    )
    of_weight = of_gain
    if not batched:
        of_x = of_x.reshape(x.shape)
        of_weight = None if of_gain is None else of_gain.reshape(images, channels).sum(0)
        of_bias = None if of_bias is None else of_bias.reshape(images, channels).sum(0)
    of_mean = of_variance = None
    if mean is not None and (mean.requires_grad or variance.requires_grad):
        dims = [0, 2, 3] if mean.dim() == 1 else [2, 3]
        of_mean = -of_x.sum(dims)
        centered = x.float() - _per_channel(mean.float())
        of_variance = (of_x * centered).sum(dims) / (-2 * (variance.float() + eps))
    typed = [
        None if g is None else g.to(t.dtype)
        for g, t in (
            (of_x, x),
            (of_weight, weight),
            (of_bias, bias),
            (of_mean, mean),
            (of_variance, variance),
        )
    ]
    return *typed, None, None, None, None, of_residual


def register() -> None:
    """Gives the operators their derivatives; called once when the package is imported."""
    _conv.register_autograd(_conv_backward, setup_context=_keep_conv)
    instance_norm_act.register_autograd(_norm_backward, setup_context=_keep_norm)
