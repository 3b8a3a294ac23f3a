from __future__ import annotations

import torch
from torch import Tensor


def image_uint8_reference(x: Tensor, tanh: bool = False) -> Tensor:
    """From a generator's output to 8-bit pixels in plain PyTorch: the definition of right.

    The rule of ``tensor2im`` in pix2pix and pix2pixHD: (x + 1) / 2 * 255 in float32, clipped to [0, 255] and
    truncated (not rounded). NaN becomes 0.

    Args:
        x: (N, C, H, W), any floating-point dtype, in [-1, 1] (or before tanh).
        tanh: apply tanh, in float32, first.

    Returns:
        (N, H, W, C) uint8, contiguous.
    """
    x = x.to(torch.float32)
    if tanh:
        x = torch.tanh(x)
    x = ((x + 1) / 2 * 255).clip(0, 255).nan_to_num(0)
    return x.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
