from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate, activation_code
from p2pfast.ops.conv_norm_act.recipe import Itself, JoinedRecipe, joined, recipe_of
from p2pfast.ops.gradients import activation_gradient, from_output
from p2pfast.ops.threads import use_torch_threads

_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def join(tensors: Sequence[Tensor], act: str = "none", slope: float = 0.0) -> Tensor:
    """``act(torch.cat(tensors, 1))``, a U-Net's skip connection, that is not kept for the backward pass.

    Where the tensors came out of ``conv_norm_act`` with a norm, nothing is kept but what these layers keep;
    other tensors are kept themselves. Tensors of different dtypes, other devices, activations whose
    derivative needs their argument, and everything under torch.compile, run the same through PyTorch's
    autograd.

    Args:
        tensors: (N, C_i, H, W), on one device.
        act, slope: as for ``p2pfast.ops.conv.conv``.

    Returns:
        (N, ΣC_i, H, W), channels_last where it is not kept. Differentiable, also twice.

    Raises:
        ValueError: an unknown activation.
        RuntimeError: shapes that do not fit; in the backward pass, a tensor that was changed in place since.
    """
    activation_code(act)
    tensors = list(tensors)
    first = tensors[0]
    grows = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    kind = first.device, first.dtype, first.shape[:1], first.shape[2:]
    alike = all((t.device, t.dtype, t.shape[:1], t.shape[2:]) == kind and t.dim() == 4 for t in tensors)
    native = first.dtype in _DTYPES.get(first.device.type, ())
    if torch.compiler.is_compiling() or not (grows and alike and native and from_output(act, slope)):
        return activate(torch.cat(tensors, 1), act, slope)
    made = [recipe_of(t) or Itself(t.detach(), t._version) for t in tensors]
    recipe = JoinedRecipe(made, act, slope, first.device.type)
    with torch.autograd.graph.saved_tensors_hooks(lambda _: recipe, lambda kept: kept.take()):
        result: Tensor = _Join.apply(act, slope, *tensors)
    recipe.version = result._version
    result._p2pfast_recipe = recipe  # type: ignore[attr-defined]
    return result


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: str, slope: float, *tensors: Tensor) -> Tensor:
        use_torch_threads()
        ctx.act, ctx.slope = act, slope
        ctx.channels = [t.shape[1] for t in tensors]
        result = joined(tensors, act, slope)
        if act != "none":
            ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        parts = grad.split(ctx.channels, 1)
        if ctx.act != "none":
            (result,) = ctx.saved_tensors
            values = result.split(ctx.channels, 1)
            parts = tuple(
                activation_gradient(g, value, ctx.act, ctx.slope, True)
                for g, value in zip(parts, values, strict=True)
            )
        return None, None, *parts
