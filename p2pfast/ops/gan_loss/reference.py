from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def gan_loss_reference(
    predictions: Sequence[Tensor], loss: str, target: float, weight: float = 1.0
) -> Tensor:
    """``gan_loss`` in plain PyTorch, one scale after the other: the definition of right.

    In float32, or in float64 for float64 predictions; the arguments are those of ``gan_loss``.

    Returns:
        A scalar.
    """
    terms = []
    for x in predictions:
        x = x if x.dtype == torch.float64 else x.float()
        match loss:
            case "logistic":
                terms.append(F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)))
            case "square":
                terms.append(F.mse_loss(x, torch.full_like(x, target)))
            case "hinge":
                terms.append(F.relu(1 - target * x).mean())
            case "linear":
                terms.append((target * x).mean())
            case _:
                raise ValueError(f"loss is {loss!r}; choose one of logistic, square, hinge, linear")
    return weight * torch.stack(terms).sum()
