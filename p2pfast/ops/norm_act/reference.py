from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.norm.reference import instance_norm_act_reference


def norm_act_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    over_batch: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalisation, affine, residual addition and activation in plain PyTorch: the definition of right.

    ``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)``, computed in float32 (float64 for
    float64 tensors), in x's dtype; the arguments are those of ``norm_act``. Differentiable any number of
    times.

    Returns:
        (N, C, H, W).
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = None if residual is None else residual.to(dtype)
    y = instance_norm_act_reference(
        x.to(dtype), weight, bias, mean, variance, over_batch, eps, act, slope, wide
    )
    return y.to(x.dtype)
