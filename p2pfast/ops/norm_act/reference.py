from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate


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
    value = x.to(dtype)
    if mean is None or variance is None:
        dims = (0, 2, 3) if over_batch else (2, 3)
        mean, variance = value.mean(dims), value.var(dims, correction=0)
    y = (value - mean[..., None, None].to(dtype)) * torch.rsqrt(variance[..., None, None].to(dtype) + eps)
    if weight is not None:
        y = y * weight[:, None, None].to(dtype)
    if bias is not None:
        y = y + bias[:, None, None].to(dtype)
    if residual is not None:
        y = y + residual.to(dtype)
    return activate(y, act, slope).to(x.dtype)
