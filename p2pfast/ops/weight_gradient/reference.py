from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def weight_gradient_reference(
    grad: Tensor, x: Tensor, kernel: tuple[int, int], stride: int, padding: int, padding_mode: str
) -> Tensor:
    """``weight_gradient`` in plain PyTorch, in float64: the definition of right.

    Returns:
        (Cout, C, *kernel), float64.
    """
    mode = "constant" if padding_mode == "zeros" else padding_mode
    source = F.pad(x.double(), [padding] * 4, mode=mode)
    return conv2d_weight(source, (grad.shape[1], x.shape[1], *kernel), grad.double(), stride)
