"""The same convolution by the library (cuDNN, through PyTorch), on a materialised input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.gpu.source import Source
from p2pfast.ops.norm import triton as norms


def _image(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def _input(sources: Sequence[Source], pad: tuple[int, int, int, int], pad_mode: str) -> Tensor:
    """(N, C, H, W) in channels_last: what the convolution reads, with its border."""
    first = sources[0]
    bare = first.scale is None and first.act == "none"
    if len(sources) == 1 and bare and not any(pad):
        return _image(first.tensor)
    n, h, w, _ = first.tensor.shape
    channels = sum(s.tensor.shape[3] for s in sources)
    whole = torch.empty(
        (n, channels, h + pad[0] + pad[1], w + pad[2] + pad[3]),
        dtype=first.tensor.dtype,
        device=first.tensor.device,
        memory_format=torch.channels_last,
    )
    at = 0
    for s in sources:
        end = at + s.tensor.shape[3]
        norms.apply(
            _image(s.tensor),
            s.scale,
            s.shift,
            s.act,
            s.slope,
            out=whole[:, at:end],
            pad=pad,
            pad_mode=pad_mode,
        )
        at = end
    return whole


def library_refuses(
    size: tuple[int, int],
    out_size: tuple[int, int],
    kernel: tuple[int, int],
    stride: int,
    padding: tuple[int, int],
    transposed: bool,
) -> str | None:
    """Why the library cannot make an output of this size; None if it can."""
    if not transposed:
        return None
    for length, out, k, p in zip(size, out_size, kernel, padding, strict=True):
        extra = out - ((length - 1) * stride - 2 * p + k)
        if not 0 <= extra < max(stride, 2):
            return f"an output of {out_size[0]}x{out_size[1]} asks for an output padding of {extra}"
    return None


def library_conv(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    pad_mode: str = "zeros",
    transposed: bool = False,
    act: str = "none",
    slope: float = 0.0,
    residual: Source | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Does what ``conv`` of this folder does; ``weight`` is PyTorch's, of the sources' dtype.

    Statistics are those of the rounded output of the convolution.

    Returns:
        partial (N, parts, 2, Cout) and count (parts,) if ``statistics``, else None.
    """
    size = sources[0].tensor.shape[1:3]
    kernel = weight.shape[2:]
    bias = None if bias is None else bias.to(weight.dtype)
    if transposed:
        extra = [
            o - ((s - 1) * stride - 2 * p + k)
            for s, o, k, p in zip(size, out.shape[1:3], kernel, padding, strict=True)
        ]
        x = _input(sources, (0, 0, 0, 0), "zeros")
        y = F.conv_transpose2d(x, weight, bias, stride, padding, extra)
    else:
        after = [
            max(0, (o - 1) * stride + k - p - s)
            for s, o, k, p in zip(size, out.shape[1:3], kernel, padding, strict=True)
        ]
        # The library pads with zeros at both ends alike, and may then make rows that nobody asked for.
        alike = pad_mode == "zeros" and all(a in (p, p - 1) for a, p in zip(after, padding, strict=True))
        if alike:
            y = F.conv2d(_input(sources, (0, 0, 0, 0), "zeros"), weight, bias, stride, padding)
        else:
            pad = (padding[0], after[0], padding[1], after[1])
            y = F.conv2d(_input(sources, pad, pad_mode), weight, bias, stride)
        y = y[:, :, : out.shape[1], : out.shape[2]]
    found = norms.statistics(y) if statistics else None
    if residual is None:
        norms.apply(y, None, None, act, slope, out=_image(out))
    else:
        r = residual
        added = _image(r.tensor), r.scale, r.shift
        norms.apply(
            y, None, None, act, slope, *added, out=_image(out), residual_act=r.act, residual_slope=r.slope
        )
    return found
