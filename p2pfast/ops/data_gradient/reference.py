from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def data_gradient_reference(
    grad: Tensor, weight: Tensor, size: Sequence[int], padding: int, padding_mode: str
) -> Tensor:
    """``data_gradient`` by PyTorch's autograd, in float64: the definition of right.

    Returns:
        (N, C, H, W), float64.
    """
    mode = "constant" if padding_mode == "zeros" else padding_mode
    with torch.enable_grad():
        x = torch.zeros(tuple(size), dtype=torch.float64, requires_grad=True)
        y = F.conv2d(F.pad(x, [padding] * 4, mode=mode), weight.detach().double())
    (found,) = torch.autograd.grad(y, x, grad.double())
    return found
