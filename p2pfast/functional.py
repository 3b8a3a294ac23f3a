"""Operators as functions."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops import autocast, gradients
from p2pfast.ops.image_uint8.op import image_uint8
from p2pfast.ops.image_uint8.reference import image_uint8_reference
from p2pfast.ops.instance_edges.op import instance_edges

gradients.register()
autocast.register()

__all__ = ["image_to_uint8", "instance_edges"]


def image_to_uint8(image: Tensor, tanh: bool = False) -> Tensor:
    """A generator's output as 8-bit pixels: (x + 1) / 2 * 255, clipped and truncated as the published
    ``tensor2im`` does.

    Args:
        image: (N, C, H, W) floating point, 1 to 4 channels, any strides; in [-1, 1] unless ``tanh``.
        tanh: apply tanh first.

    Returns:
        (N, H, W, C) uint8 on the image's device, contiguous.

    Raises:
        TypeError, ValueError: a dtype or shape that is no image.
    """
    if image.device.type == "cpu" and image.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return image_uint8(image, tanh)
    return image_uint8_reference(image, tanh)
