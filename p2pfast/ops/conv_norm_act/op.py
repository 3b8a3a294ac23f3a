from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.channels_last import channels_last
from p2pfast.ops.conv.activation import activate, activation_code
from p2pfast.ops.conv_norm_act import convolution
from p2pfast.ops.conv_norm_act.check import NORMS, check_geometry, check_rest
from p2pfast.ops.conv_norm_act.convolution import Geometry
from p2pfast.ops.conv_norm_act.pad import padded
from p2pfast.ops.conv_norm_act.recipe import NormRecipe, kept_as_recipes, recipe_of, versions
from p2pfast.ops.conv_norm_act.reference import conv_norm_act_reference, update_running
from p2pfast.ops.gradients import activation_gradient, from_output
from p2pfast.ops.lowering import without_autocast
from p2pfast.ops.norm_act.op import is_fused, norm_act, norm_act_backward
from p2pfast.ops.twice import differentiable_gradients


@dataclass
class _Options:
    geometry: Geometry
    norm: str
    eps: float
    frozen: bool
    act: str
    slope: float

    def reference(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
    ) -> Tensor:
        g = self.geometry
        return conv_norm_act_reference(
            x,
            weight,
            bias,
            stride=g.stride,
            padding=g.padding,
            output_padding=g.output_padding,
            transposed=g.transposed,
            padding_mode=g.padding_mode,
            norm=self.norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            running_mean=mean,
            running_var=variance,
            use_running=self.frozen,
            eps=self.eps,
            act=self.act,
            slope=self.slope,
            residual=residual,
        )


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    use_running: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A layer for training: ``act(norm(conv(pad(x), weight) + bias) + residual)``.

    Kept for the backward pass are the raw convolution output and the statistics. The input is not, where it
    came out of a layer like this one: it is made again from what that layer keeps. float32 and bfloat16 on
    the CPU, and float16 too on a GPU, where convolutions and their gradients are cuDNN's or Triton's, as
    measured, and the norm's passes Triton's. Other dtypes, gelu on the CPU, and everything under
    torch.compile run the same through PyTorch's autograd. Under autocast the convolution's operands are
    lowered, statistics are not; of the weight no lowered copy is kept.

    Args:
        x: (N, C, H, W). The fused path takes it as channels_last (a copy, if it is not).
        weight: (Cout, C, Kh, Kw), (C, Cout, Kh, Kw) if transposed.
        bias: (Cout,) or None.
        stride, padding, output_padding, transposed, padding_mode: as for ``p2pfast.ops.conv.conv``.
        norm: ``"none"``, ``"instance"`` or ``"batch"``.
        norm_weight, norm_bias: the norm's affine parameters (Cout,), or None.
        running_mean, running_var: (Cout,), or None; updated with ``momentum`` unless ``use_running``.
        use_running: normalise with them, as a norm in eval mode does.
        eps: the norm's.
        act, slope: as for ``p2pfast.ops.conv.conv``.
        residual: like the result, added before the activation; or None.

    Returns:
        (N, Cout, H', W'), on the fused path channels_last. Differentiable, also twice.

    Raises:
        TypeError: a dtype that is not floating point.
        ValueError: an unknown name, shapes that do not fit, running statistics that are missing.
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; choose one of {', '.join(NORMS)}")
    if use_running and (norm == "none" or running_mean is None or running_var is None):
        raise ValueError("use_running is True; it needs a norm, running_mean and running_var")
    activation_code(act)
    geometry = Geometry(stride, padding, output_padding, transposed, padding_mode)
    vectors = {"bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    vectors |= {"running_mean": running_mean, "running_var": running_var}
    check_rest(x, weight, check_geometry(x, weight, geometry), vectors, residual)
    options = _Options(geometry, norm, eps, use_running, act, slope)
    statistics = (running_mean, running_var) if use_running else (None, None)

    kind = x.device.type
    lowered = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    recipe = recipe_of(x)
    fused = is_fused(x, act) and (lowered in (torch.float32, torch.bfloat16) or kind != "cpu")
    if torch.compiler.is_compiling() or not fused:
        y, mean, variance = _composed(x, weight, bias, norm_weight, norm_bias, residual, statistics, options)
    else:
        source = channels_last(x, lowered)
        if source is not x:
            recipe = None
        with without_autocast(kind), kept_as_recipes([(source, recipe)]):
            y, raw, mean, variance = _ConvNormAct.apply(
                source,
                weight,
                bias,
                norm_weight,
                norm_bias,
                None if residual is None else residual.to(lowered),
                *statistics,
                options,
            )
        if norm != "none" and residual is None and y.requires_grad:
            parameters = norm_weight, norm_bias
            y._p2pfast_recipe = NormRecipe(
                raw, mean, variance, *parameters, eps, act, slope, y._version, versions(*parameters)
            )
    if norm != "none" and not use_running and running_mean is not None and running_var is not None:
        values = y.shape[2:].numel() * (y.shape[0] if norm == "batch" else 1)
        update_running(running_mean, running_var, mean, variance, values, momentum)
    return y


def _composed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    residual: Tensor | None,
    statistics: tuple[Tensor | None, Tensor | None],
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of differentiable parts."""
    g = options.geometry
    source = padded(x, g.padding, g.padding_mode)
    two = [g.stride] * 2
    if g.transposed:
        raw = torch.conv_transpose2d(source, weight, bias, two, [g.zeros] * 2, [g.output_padding] * 2)
    else:
        raw = torch.conv2d(source, weight, bias, two, [g.zeros] * 2)
    if residual is not None:
        residual = residual.to(raw.dtype)
    if options.norm == "none":
        nothing = raw.new_empty(0)
        return (
            activate(raw if residual is None else raw + residual, options.act, options.slope),
            nothing,
            nothing,
        )
    over_batch = options.norm == "batch"
    affine = norm_weight, norm_bias
    return norm_act(raw, *affine, *statistics, over_batch, options.eps, options.act, options.slope, residual)


class _ConvNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = None if bias is None else bias.to(x.dtype)
        raw = channels_last(convolution.forward(x, weight, given, options.geometry), x.dtype)
        act, slope = options.act, options.slope
        nothing = raw.new_empty(0)
        kept: Tensor | None
        if options.norm == "none":
            value = raw if residual is None else raw.add_(residual)
            y = activate(value, act, slope)
            # What the activation's derivative is told from.
            kept = None if act == "none" else y if from_output(act, slope) else value
            raw, mean, variance = nothing, nothing.clone(), nothing.clone()
        else:
            y, mean, variance = norm_act(
                raw,
                norm_weight,
                norm_bias,
                running_mean,
                running_var,
                options.norm == "batch",
                options.eps,
                act,
                slope,
                residual,
            )
            kept = raw
        ctx.options = options
        ctx.size = x.shape
        ctx.has_residual = residual is not None
        ctx.mark_non_differentiable(raw, mean, variance)
        ctx.set_materialize_grads(False)
        for_act = residual if act != "none" else None
        ctx.save_for_backward(weight, bias, norm_weight, norm_bias, for_act, kept, mean, variance, x)
        return y, raw, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        if torch.is_grad_enabled():
            return _differentiable_backward(ctx, grad)
        # A backward pass may run within autocast, which would take what is padded to float32.
        with without_autocast(grad.device.type):
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    weight, bias, norm_weight, norm_bias, residual, kept, mean, variance, x = ctx.saved_tensors
    options: _Options = ctx.options
    needs = ctx.needs_input_grad
    act, slope = options.act, options.slope
    of_norm_weight = of_norm_bias = of_residual = None
    if options.norm == "none":
        if act != "none":
            grad = activation_gradient(grad, kept, act, slope, from_output(act, slope))
        of_raw = grad
        of_residual = grad if ctx.has_residual else None
    else:
        of_raw, dweight, dbias, of_residual = norm_act_backward(
            grad,
            kept,
            norm_weight,
            norm_bias,
            mean,
            variance,
            options.frozen,
            options.eps,
            act,
            slope,
            residual,
            ctx.has_residual and needs[5],
        )
        of_norm_weight = None if norm_weight is None else dweight.to(norm_weight.dtype)
        of_norm_bias = None if norm_bias is None else dbias.to(norm_bias.dtype)
    of_raw = channels_last(of_raw, of_raw.dtype)
    of_bias = of_weight = of_x = None
    if needs[2]:
        # A norm on its own statistics takes out whatever was added to a whole channel.
        own = options.norm != "none" and not options.frozen
        of_bias = torch.zeros_like(bias) if own else of_raw.float().sum((0, 2, 3)).to(bias.dtype)
    if needs[0]:
        of_x = convolution.data_gradient(of_raw, ctx.size, weight, options.geometry)
    if needs[1]:
        of_weight = convolution.weight_gradient(of_raw, channels_last(x, x.dtype), weight, options.geometry)
    return of_x, of_weight, of_bias, of_norm_weight, of_norm_bias, of_residual, None, None, None


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Through PyTorch's autograd, so that it can be differentiated again."""
    *parameters, residual, _, mean, variance, x = ctx.saved_tensors

    def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Tensor | None) -> Tensor:
        lowered = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        result: Tensor = ctx.options.reference(x, *lowered, *rest, mean, variance)
        return result

    with without_autocast(grad.device.type):
        *given, given_residual = differentiable_gradients(reference, [x, *parameters, residual], grad)
    if ctx.has_residual and residual is None:
        given_residual = grad
    return *given, given_residual, None, None, None
