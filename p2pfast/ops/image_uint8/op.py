from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.cuda import launch, require_kernel
from p2pfast.ops.threads import use_torch_threads

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _check(x: Tensor) -> tuple[int, int, int, int]:
    """Checks the image; returns the output's shape (N, H, W, C)."""
    if x.dtype not in _TYPES:
        raise TypeError(f"x has dtype {x.dtype}; float32, bfloat16 or float16 is expected")
    if x.dim() != 4 or not 1 <= x.shape[1] <= 4:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; (images, 1 to 4 channels, height, width) is expected"
        )
    images, channels, height, width = x.shape
    return images, height, width, channels


def _numbers(x: Tensor, tanh: bool, out: Tensor) -> dict[str, Any]:
    images, channels, height, width = x.shape
    image_stride, channel_stride, row_stride, pixel_stride = x.stride()
    return {
        "data": x.data_ptr(),
        "type": _TYPES[x.dtype],
        "images": images,
        "channels": channels,
        "height": height,
        "width": width,
        "image_stride": image_stride,
        "channel_stride": channel_stride,
        "row_stride": row_stride,
        "pixel_stride": pixel_stride,
        "tanh": tanh,
        "out": out.data_ptr(),
    }


@torch.library.custom_op("p2pfast::image_uint8", mutates_args=(), device_types="cpu")
def image_uint8(x: Tensor, tanh: bool = False) -> Tensor:
    """Converts a generator's output to 8-bit pixels in one pass.

    (x + 1) / 2 * 255 in float32, clipped to [0, 255] and truncated: ``tensor2im`` of pix2pix and pix2pixHD.
    NaN becomes 0, infinities become 0 and 255. Runs on the CPU (``torch.get_num_threads()`` threads) and on
    NVIDIA GPUs.

    Args:
        x: (N, C, H, W), 1 to 4 channels, float32, bfloat16 or float16, any strides (contiguous and
            channels_last are the quickest), in [-1, 1] after tanh.
        tanh: apply tanh first, in float32 and accurate to a few units in the last place: a pixel differs
            from the reference's only where x is within 1e-6 of a step from one value to the next.

    Returns:
        (N, H, W, C) uint8, contiguous: what PIL and the encoders take.

    Raises:
        TypeError: another dtype.
        ValueError: not four dimensions, or not 1 to 4 channels.
    """
    out = torch.empty(_check(x), dtype=torch.uint8, device="cpu")
    use_torch_threads()
    _C.image_uint8(**_numbers(x.detach(), tanh, out))
    return out


@image_uint8.register_kernel("cuda")
def _on_cuda(x: Tensor, tanh: bool = False) -> Tensor:
    require_kernel("image_uint8", "image_uint8", "x")
    out = torch.empty(_check(x), dtype=torch.uint8, device=x.device)
    launch("image_uint8", x.device, **_numbers(x.detach(), tanh, out))
    return out


@image_uint8.register_fake
def _(x: Tensor, tanh: bool = False) -> Tensor:
    return torch.empty(_check(x), dtype=torch.uint8, device=x.device)
