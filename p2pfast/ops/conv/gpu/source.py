"""Tensors as the Triton kernels read them, with what is still to be done to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.gpu import check_tensor


@dataclass(frozen=True)
class Source:
    """A tensor and the normalisation and activation that its reader applies: ``act(scale * tensor + shift)``.

    Attributes:
        tensor: (N, H, W, C) view, float32, bfloat16 or float16, channel stride 1 and any other strides: a
            slice of the channels of a wider tensor is read in place.
        scale, shift: (C,) or (N, C) float32, the deferred normalisation; or both None.
        act, slope: applied after it, as for ``p2pfast.ops.conv.conv``.
    """

    tensor: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    slope: float = 0.0


def check_view(name: str, t: Tensor) -> None:
    """Whether a tensor is an NHWC view that the kernels read and write in place."""
    check_tensor(name, t)
    if t.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; (images, height, width, channels) is expected")
    if t.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: an empty tensor has no convolution")
    if t.shape[3] > 1 and t.stride(3) != 1:
        raise ValueError(
            f"{name} has strides {t.stride()}; channels must be adjacent: use the permuted view "
            "t.permute(0, 2, 3, 1) of a channels_last tensor"
        )


def check_source(name: str, source: Source) -> None:
    """Checks one source by itself; raises TypeError and ValueError."""
    t = source.tensor
    check_view(name, t)
    activation_code(source.act)
    if (source.scale is None) != (source.shift is None):
        raise ValueError(f"{name}: scale and shift go together; one of them is None")
    if source.scale is None or source.shift is None:
        return
    images, channels = t.shape[0], t.shape[3]
    for key, value in (("scale", source.scale), ("shift", source.shift)):
        check_tensor(f"{name}.{key}", value, (torch.float32,))
        if value.shape not in ((channels,), (images, channels)):
            raise ValueError(
                f"{name}.{key} has shape {tuple(value.shape)}; ({channels},) or ({images}, {channels}) is "
                "expected"
            )
        if channels > 1 and value.stride(-1) != 1:
            raise ValueError(f"{name}.{key} has strides {value.stride()}; its channels must be adjacent")
    if source.scale.shape != source.shift.shape or source.scale.stride() != source.shift.stride():
        raise ValueError(f"{name}: scale and shift differ in shape or strides; they must be laid out alike")


def norm_stride(source: Source) -> int:
    """Elements from one image's scales to the next's; 0 where all images share them."""
    scale = source.scale
    return scale.stride(0) if scale is not None and scale.dim() == 2 else 0
