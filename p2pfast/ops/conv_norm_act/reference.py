from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.conv.reference import conv_reference
from p2pfast.ops.norm_act.reference import norm_act_reference


def conv_norm_act_reference(
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
    use_running: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """``conv_norm_act`` in plain PyTorch: the definition of right, without the update of running statistics.

    Returns:
        (N, Cout, H', W').
    """
    raw = conv_reference(x, weight, bias, stride, padding, output_padding, transposed, padding_mode)
    if norm == "none":
        return activate(raw if residual is None else raw + residual, act, slope)
    mean, variance = (running_mean, running_var) if use_running else (None, None)
    affine = norm_weight, norm_bias
    return norm_act_reference(raw, *affine, mean, variance, norm == "batch", eps, act, slope, residual)


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, values: int, momentum: float
) -> None:
    """Moves running statistics towards those of a batch, as ``torch.nn`` does: unbiased, and averaged over
    images.

    Args:
        mean, variance: (C,) or (N, C), the variance biased.
        values: how many each of them is of.
    """
    with torch.no_grad():
        if mean.dim() == 2:
            mean, variance = mean.mean(0), variance.mean(0)
        unbiased = variance * (values / max(values - 1, 1))
        # By data, as PyTorch's own norms: no backward pass reads what is changed, and none is to complain.
        running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.data.lerp_(unbiased.to(running_var.dtype), momentum)
