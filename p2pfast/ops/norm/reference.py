from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate


def instance_norm_act_reference(
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

    ``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)`` in x's dtype, which may be any
    floating-point one; the arguments are those of ``instance_norm_act``.

    Returns:
        (N, C, H, W).
    """
    if mean is None or variance is None:
        dims = (0, 2, 3) if over_batch else (2, 3)
        mean = x.mean(dims)
        variance = x.var(dims, correction=0)
    y = (x - mean[..., None, None].to(x.dtype)) * torch.rsqrt(variance[..., None, None].to(x.dtype) + eps)
    if weight is not None:
        y = y * weight[:, None, None].to(x.dtype)
    if bias is not None:
        y = y + bias[:, None, None].to(x.dtype)
    if residual is not None:
        y = y + residual
    return activate(y, act, slope)
