from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_matching_reference(
    fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float], squared: bool = False
) -> Tensor:
    """``feature_matching`` in plain PyTorch, one feature after the other: the definition of right.

    In float32, or in float64 for float64 features; the arguments are those of ``feature_matching``.

    Returns:
        A scalar.
    """
    terms = []
    for x, y, weight in zip(fake, real, weights, strict=True):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        distance = F.mse_loss if squared else F.l1_loss
        terms.append(weight * distance(x.to(dtype), y.detach().to(dtype)))
    return torch.stack(terms).sum()
