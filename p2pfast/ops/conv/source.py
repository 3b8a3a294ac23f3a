"""Tensors as the native kernels read and write them (``Source`` and ``Output`` of csrc/cpu/conv.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# In the order of the native enumeration.
PADDING_MODES = ("zeros", "reflect", "replicate")


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def readable(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) itself where the kernels can read it, else a channels_last copy.

    They take any strides, but where channels are adjacent they read whole vectors up to the next pixel: a
    slice of another tensor's channels has no room for that after its last pixel.
    """
    if x.stride(1) == 1 and x.shape[3] > 1 and x.stride(3) > x.shape[1]:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def describe_source(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    first: int = 0,
    act: int = 0,
    slope: float = 0.0,
) -> dict[str, Any]:
    """A source. Keep ``x`` (from ``readable``), ``scale`` and ``shift`` alive while it is used.

    Args:
        scale, shift: (channels,) or (N, channels) float32, contiguous, of which those from ``first`` are x's.
        act: code of the activation that follows them.
    """
    image_stride, channel_stride, row_stride, pixel_stride = x.stride()
    source = {
        "data": x.data_ptr(),
        "image_stride": image_stride,
        "row_stride": row_stride,
        # Of a single column it may be anything, but must not promise channels that are not there.
        "pixel_stride": pixel_stride if x.shape[3] > 1 else x.shape[1],
        "channel_stride": channel_stride,
        "channels": x.shape[1],
        "dtype": int(x.dtype == torch.bfloat16),
        "act": act,
        "slope": slope,
    }
    if scale is not None and shift is not None:
        source["scale"] = scale.data_ptr() + 4 * first
        source["shift"] = shift.data_ptr() + 4 * first
        source["norm_stride"] = scale.shape[1] if scale.dim() == 2 else 0
    return source


def describe_output(out: Tensor) -> dict[str, Any]:
    """An output that is contiguous in channels_last memory format."""
    _, channels, height, width = out.shape
    return {
        "data": out.data_ptr(),
        "image_stride": height * width * channels,
        "row_stride": width * channels,
        "pixel_stride": channels,
        "dtype": int(out.dtype == torch.bfloat16),
    }


def describe_geometry(
    x: Tensor,
    out: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    padding: int,
    padding_mode: str,
) -> dict[str, Any]:
    """A convolution's sizes, of an input and an output shape (N, C, H, W)."""
    return {
        "images": out[0],
        "height": x.shape[2],
        "width": x.shape[3],
        "out_height": out[2],
        "out_width": out[3],
        "out_channels": out[1],
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "stride": stride,
        "pad_top": padding,
        "pad_left": padding,
        "pad": PADDING_MODES.index(padding_mode),
    }
