"""The operator ``p2pfast::conv`` on (N, C, H, W) tensors, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pfast.ops.conv.gpu.call import conv
from p2pfast.ops.conv.gpu.configs import Config
from p2pfast.ops.conv.gpu.pack import pack
from p2pfast.ops.conv.gpu.source import Source


def _view(x: Tensor) -> Tensor:
    """(N, C, H, W) as an NHWC view with adjacent channels; a copy where x is not such."""
    x = x.detach()
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1)


def run(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    stride: int,
    padding: int,
    transposed: bool,
    padding_mode: str,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
    layout: str | None = None,
    config: Config | None = None,
) -> Tensor:
    """A convolution whose arguments (those of ``p2pfast.ops.conv.conv``) fit together and make ``shape``.

    Weights are packed at every call. Their layout and the tile, as for ``pack`` and ``conv``, are the ones
    that suit the shape where they are None.
    """
    out = torch.empty(shape, dtype=x[0].dtype, device=x[0].device, memory_format=torch.channels_last)
    sources, at = [], 0
    for t in x:
        channels = slice(at, at + t.shape[1])
        norm = [v if v is None else v.detach()[..., channels].contiguous() for v in (scale, shift)]
        sources.append(Source(_view(t), norm[0], norm[1], input_act, input_slope))
        at = channels.stop
    packed = pack(
        weight,
        transposed,
        out.dtype,
        stride=stride,
        padding=(padding, padding),
        channels=tuple(t.shape[1] for t in x),
        layout=layout,
    )
    conv(
        sources,
        packed,
        None if bias is None else bias.detach().contiguous(),
        out.permute(0, 2, 3, 1),
        stride=stride,
        padding=(padding, padding),
        pad_mode=padding_mode,
        act=act,
        slope=slope,
        config=config,
    )
    return out
