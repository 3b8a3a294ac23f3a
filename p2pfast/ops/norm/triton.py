"""GPU kernels of normalisation: statistics, their merge, and the pass that applies them.

Tensors are (N, C, H, W) with adjacent channels ("channels_last") or, where ``planes`` says so, contiguous.
Storage is float32, bfloat16 or float16, arithmetic float32, merges float64. Sums have a fixed order, which
does not depend on the batch: no atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.gpu import (
    Launch,
    Shipped,
    channels_last,
    check_tensor,
    evenly_spaced,
    on_device,
    pixel_stride,
)
from p2pfast.ops.gpu.device import activate, clamped, inverse_root, reflected, store

import triton  # isort: skip
import triton.language as tl  # isort: skip

# Elements of a tile: 32 a thread, so that enough loads are in flight.
TILE = 4096
# Elements of the largest map that one program keeps in registers.
RESIDENT = 32768
# Programs an image is split into at least, where it has so many tiles.
PROGRAMS = 512
# Partial statistics that one program merges.
GROUP = 128
PAD_MODES = ("none", "zeros", "reflect", "replicate")


class Merged(NamedTuple):
    """Float32, (N, C) or over the batch (C,): ``scale * x + shift`` normalises; the variance is biased."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor


@triton.jit
def tile_offsets(pixel, channel, stride, PLANES: tl.constexpr):
    """Of a (pixels, channels) tile; ``stride`` is from a pixel to the next, of planes from a channel."""
    if PLANES:
        return pixel[:, None] + channel[None, :].to(tl.int64) * stride
    else:
        return pixel[:, None] * stride + channel[None, :]


@triton.jit
def channel_offsets(channel, stride, PLANES: tl.constexpr):
    """Of a tile's first pixel."""
    if PLANES:
        return channel.to(tl.int64) * stride
    else:
        return channel


@triton.jit
def tile_base(x, image, image_stride, first, stride, PLANES: tl.constexpr):
    """Where pixel ``first`` of an image begins; in 64 bits, as an image may have more than 2^31 values."""
    x += image.to(tl.int64) * image_stride
    if PLANES:
        return x + first
    else:
        return x + first.to(tl.int64) * stride


@triton.jit
def _statistics_kernel(
    x, partial, count, pixels, channels, parts, image_stride, stride,
    BP: tl.constexpr, CB: tl.constexpr, ITERATIONS: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of each part (ITERATIONS tiles of BP pixels) and channel.

    The values are shifted by the part's first one, which a mean of many deviations needs, and every row of
    the tile is a lane with a mean and an M2 of its own (Welford), so that a first value that is an outlier
    does no harm. Lanes are merged at the end.
    """
    part = tl.program_id(0)
    block = tl.program_id(1)
    image = tl.program_id(2)
    channel = block * CB + tl.arange(0, CB)
    row = tl.arange(0, BP)
    first = part * (BP * ITERATIONS)
    base = tile_base(x, image, image_stride, first, stride, PLANES)
    left = pixels - first
    there = channel < channels
    k = tl.load(base + channel_offsets(channel, stride, PLANES), mask=there, other=0.0).to(tl.float32)
    mean = tl.zeros((BP, CB), tl.float32)
    m2 = tl.zeros((BP, CB), tl.float32)
    for i in range(ITERATIONS):
        pixel = i * BP + row
        offsets = tile_offsets(pixel, channel, stride, PLANES)
        if EVEN:
            v = tl.load(base + offsets).to(tl.float32) - k[None, :]
            d = v - mean
        else:
            mask = (pixel < left)[:, None] & there[None, :]
            v = tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32) - k[None, :]
            d = tl.where(mask, v - mean, 0.0)
        mean += d * (1.0 / (i + 1))
        m2 += d * (v - mean)
    n = tl.minimum(left, BP * ITERATIONS).to(tl.float32)
    if EVEN:
        seen = tl.full((BP,), ITERATIONS, tl.float32)
    else:
        seen = tl.minimum(tl.maximum((left - row + (BP - 1)) // BP, 0), ITERATIONS).to(tl.float32)
    center = tl.sum(mean * seen[:, None], 0) / n
    d = mean - center[None, :]
    out = partial + (image.to(tl.int64) * parts + part) * 2 * channels + channel
    tl.store(out, k + center, mask=there)
    tl.store(out + channels, tl.sum(m2 + d * d * seen[:, None], 0), mask=there)
    if (block == 0) & (image == 0):
        tl.store(count + part, n)


@triton.jit
def _merge_rows(
    partial, count, first, rows, parts, channels, channel,
    STEPS: tl.constexpr, BR: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Count, mean and M2 in float64 of ``rows`` parts from ``first``: Chan's formula for any number of parts.

    With d = mean of a part - k, where k is the first part's:  mean = k + sum(n d) / sum(n),
    M2 = sum(M2 of a part + n d^2) - sum(n d)^2 / sum(n).
    """
    there = (channel < channels)[None, :]
    base = partial + first.to(tl.int64) * 2 * channels
    k = tl.load(base + channel, mask=channel < channels, other=0.0).to(tl.float64)
    k = tl.where(tl.load(count + first % parts) > 0, k, 0.0)
    row = tl.arange(0, BR)
    n = tl.zeros((BR,), tl.float64)
    s = tl.zeros((BR, CB), tl.float64)
    q = tl.zeros((BR, CB), tl.float64)
    for i in range(STEPS):
        j = i * BR + row
        c = tl.load(count + (first + j) % parts, mask=j < rows, other=0.0).to(tl.float64)
        mask = (c > 0)[:, None] & there
        at = base + j[:, None].to(tl.int64) * 2 * channels + channel[None, :]
        mean = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        m2 = tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
        d = tl.where(mask, mean - k[None, :], 0.0)
        n += c
        s += d * c[:, None]
        q += m2 + d * d * c[:, None]
    total = tl.sum(n, 0)
    sums = tl.sum(s, 0)
    share = sums * (1.0 / total)
    return total, k + share, tl.maximum(tl.sum(q, 0) - sums * share, 0.0)


@triton.jit
def _merge_kernel(
    partial, count, out, out_count, rows, parts, channels, group, groups,
    STEPS: tl.constexpr, BR: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Merges groups of parts into parts."""
    g = tl.program_id(0)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    instance = tl.program_id(2)
    mine = tl.minimum(rows - g * group, group)
    n, mean, m2 = _merge_rows(
        partial, count, instance * rows + g * group, mine, parts, channels, channel, STEPS, BR, CB
    )
    at = out + (instance.to(tl.int64) * groups + g) * 2 * channels + channel
    tl.store(at, mean.to(tl.float32), mask=channel < channels)
    tl.store(at + channels, m2.to(tl.float32), mask=channel < channels)
    if (instance == 0) & (tl.program_id(1) == 0):
        tl.store(out_count + g, n.to(tl.float32))


@triton.jit
def _scale_and_shift(mean, variance, weight, bias, channel, channels, eps):
    """In float64 and rounded once: scale * x and shift nearly cancel far from zero."""
    scale = tl.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * tl.load(weight + channel, mask=channel < channels, other=0.0).to(tl.float64)
    shift = -mean * scale
    if bias is not None:
        shift = shift + tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float64)
    return scale.to(tl.float32), shift.to(tl.float32)


@triton.jit
def _finish_kernel(
    partial, count, weight, bias, out, rows, parts, channels, instances, eps,
    STEPS: tl.constexpr, BR: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Scale, shift, mean and variance of an instance from its parts: out is (4, instances, channels)."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    instance = tl.program_id(1)
    there = channel < channels
    n, mean, m2 = _merge_rows(partial, count, instance * rows, rows, parts, channels, channel, STEPS, BR, CB)
    variance = m2 * (1.0 / n)
    scale, shift = _scale_and_shift(mean, variance, weight, bias, channel, channels, eps)
    at = out + instance * channels + channel
    step = instances * channels
    tl.store(at, scale, mask=there)
    tl.store(at + step, shift, mask=there)
    tl.store(at + 2 * step, mean.to(tl.float32), mask=there)
    tl.store(at + 3 * step, variance.to(tl.float32), mask=there)


@triton.jit
def _fold_kernel(mean, variance, weight, bias, out, channels, instances, eps, CB: tl.constexpr):
    """Scale and shift of given statistics: out is (2, instances, channels)."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    instance = tl.program_id(1)
    there = channel < channels
    at = instance * channels + channel
    center = tl.load(mean + at, mask=there, other=0.0).to(tl.float64)
    spread = tl.load(variance + at, mask=there, other=1.0).to(tl.float64)
    scale, shift = _scale_and_shift(center, spread, weight, bias, channel, channels, eps)
    tl.store(out + at, scale, mask=there)
    tl.store(out + instances * channels + at, shift, mask=there)


@triton.jit
def _apply_kernel(
    x, center, scale, shift, residual, residual_scale, residual_shift, out,
    columns, height, width, channels, top, left,
    x_image, x_row, x_stride, residual_image, residual_row, residual_stride, out_image, out_row, out_stride,
    norm_stride, residual_norm_stride, input_slope, residual_slope, slope,
    INPUT_ACT: tl.constexpr, RESIDUAL_ACT: tl.constexpr, ACT: tl.constexpr, PAD: tl.constexpr,
    BP: tl.constexpr, CB: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """act(input_act(scale (x - center) + shift) + residual_act(residual_scale residual + residual_shift)).

    A program writes BP columns of a row of the output; without padding, and where every tensor's pixels are
    evenly spaced, an image is one row of all its pixels.
    """
    tiles = tl.cdiv(columns, BP)
    y = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BP
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    image = tl.program_id(2)
    there = channel < channels
    lane = tl.arange(0, BP)
    if EVEN:
        mask = None
        read = None
    else:
        mask = (first + lane < columns)[:, None] & there[None, :]
        read = mask
    source_row = y
    start = first
    column = lane
    if PAD != 0:
        source_row = y - top
        column = first + lane - left
        start = 0
        if PAD == 1:
            limit = tl.where((source_row >= 0) & (source_row < height), width, 0)
            read = mask & ((column >= 0) & (column < limit))[:, None]
        elif PAD == 2:
            source_row = reflected(source_row, height)
            # Lanes past the last column would read outside: they are masked, and clamped for good measure.
            column = clamped(reflected(column, width), width)
        else:
            source_row = clamped(source_row, height)
            column = clamped(column, width)
    base = tile_base(x, image, x_image, start, x_stride, PLANES) + source_row.to(tl.int64) * x_row
    v = load(base + tile_offsets(column, channel, x_stride, PLANES), read).to(tl.float32)
    if center is not None:
        v -= tl.load(center + image * norm_stride + channel, mask=there, other=0.0)[None, :]
        v *= tl.load(scale + image * norm_stride + channel, mask=there, other=0.0)[None, :]
        if shift is not None:
            v += tl.load(shift + channel, mask=there, other=0.0)[None, :]
    elif scale is not None:
        s = tl.load(scale + image * norm_stride + channel, mask=there, other=0.0)
        t = tl.load(shift + image * norm_stride + channel, mask=there, other=0.0)
        v = v * s[None, :] + t[None, :]
    v = activate(v, INPUT_ACT, input_slope)
    if residual is not None:
        base = tile_base(residual, image, residual_image, start, residual_stride, PLANES)
        base += source_row.to(tl.int64) * residual_row
        r = load(base + tile_offsets(column, channel, residual_stride, PLANES), read).to(tl.float32)
        if residual_scale is not None:
            s = tl.load(residual_scale + image * residual_norm_stride + channel, mask=there, other=0.0)
            t = tl.load(residual_shift + image * residual_norm_stride + channel, mask=there, other=0.0)
            r = r * s[None, :] + t[None, :]
        v += activate(r, RESIDUAL_ACT, residual_slope)
    v = activate(v, ACT, slope)
    if PAD == 1:
        v = tl.where(read, v, 0.0)
    base = tile_base(out, image, out_image, first, out_stride, PLANES) + y.to(tl.int64) * out_row
    store(base + tile_offsets(lane, channel, out_stride, PLANES), v, mask)


@triton.jit
def load(pointers, mask):
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def map_offsets(row, channel, pixels, image_stride, stride, PLANES: tl.constexpr, OVER_BATCH: tl.constexpr):
    """Of all values of a map, or of a batch of maps one after the other."""
    if OVER_BATCH:
        within = tile_offsets(row % pixels, channel, stride, PLANES)
        return within + (row // pixels)[:, None].to(tl.int64) * image_stride
    else:
        return tile_offsets(row, channel, stride, PLANES)


@triton.jit
def _map_kernel(
    x, residual, weight, bias, out, mean_out, variance_out,
    values, pixels, channels, x_image, x_stride, residual_image, residual_stride, out_image, out_stride,
    eps, slope,
    ACT: tl.constexpr, BP: tl.constexpr, CB: tl.constexpr, PLANES: tl.constexpr, OVER_BATCH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A whole map of CB channels in registers: one read, statistics, one write."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    image = tl.program_id(1).to(tl.int64)
    there = channel < channels
    row = tl.arange(0, BP)
    if EVEN:
        mask = None
    else:
        mask = (row < values)[:, None] & there[None, :]
    at = map_offsets(row, channel, pixels, x_image, x_stride, PLANES, OVER_BATCH)
    v = load(x + image * x_image + at, mask).to(tl.float32)
    # Not values.to(): where it is 1, the compiler makes it a Python integer.
    n = 1.0 * values
    center = tl.sum(v, 0) / n
    d = v - center[None, :]
    if not EVEN:
        d = tl.where(mask, d, 0.0)
    # What rounding left in the mean of large numbers: d has lost nothing, and is not rounded again.
    rest = tl.sum(d, 0) / n
    variance = tl.maximum(tl.sum(d * d, 0) / n - rest * rest, 0.0)
    scale = inverse_root(variance + eps)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=there, other=0.0)
    shift = -rest * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=there, other=0.0)
    v = d * scale[None, :] + shift[None, :]
    if residual is not None:
        at = map_offsets(row, channel, pixels, residual_image, residual_stride, PLANES, OVER_BATCH)
        v += load(residual + image * residual_image + at, mask).to(tl.float32)
    at = map_offsets(row, channel, pixels, out_image, out_stride, PLANES, OVER_BATCH)
    store(out + image * out_image + at, activate(v, ACT, slope), mask)
    if mean_out is not None:
        tl.store(mean_out + image * channels + channel, center + rest, mask=there)
        tl.store(variance_out + image * channels + channel, variance, mask=there)


class Tiles(NamedTuple):
    """Tiles of BP pixels and CB channels, ITERATIONS of them a program."""

    BP: int
    CB: int
    ITERATIONS: int
    num_warps: int


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def tiles(pixels: int, channels: int, itemsize: int, planes: bool, elements: int | None = None) -> Tiles:
    """By the image's size alone, so that results do not depend on the batch."""
    cb = 1 if planes else min(power_of_2(channels), 128 // itemsize)
    bp = max(min(power_of_2(pixels), (elements or TILE) // cb), 1)
    programs = -(-pixels // bp) * -(-channels // cb)
    iterations = 1
    while iterations < 16 and programs >= 2 * PROGRAMS * iterations:
        iterations *= 2
    return Tiles(bp, cb, iterations, warps(bp * cb))


def warps(elements: int) -> int:
    """For a tile: 32 elements a thread, of large ones 64."""
    return min(max(power_of_2(elements) // 1024, 1), 16 if elements > 16384 else 8)


class Layout(NamedTuple):
    """Elements from an image to the next, from a row to the next, and from a pixel (a channel of planes)."""

    image: int
    row: int
    stride: int


def layout(x: Tensor, planes: bool) -> Layout:
    images, channels, height, width = x.shape
    image = x.stride(0)
    if planes:
        return Layout(image, width, x.stride(1) if channels > 1 else height * width)
    return Layout(image, x.stride(2), pixel_stride(x))


def map_tiles(values: int, channels: int, itemsize: int, planes: bool, limit: int) -> Tiles | None:
    """Of a program that keeps a whole map; None where it would have more than ``limit`` elements."""
    bp = power_of_2(values)
    # Of every pixel a sector of memory, or half of one: its other half is another program's.
    for width in (32, 16):
        cb = min(power_of_2(channels), width // itemsize)
        if planes:
            cb = max(min(cb, 512 // bp), 1)
        if bp * cb <= limit:
            return Tiles(bp, cb, 1, warps(bp * cb))
    return None


def statistics_launch(x: Tensor, partial: Tensor, count: Tensor, planes: bool) -> Launch:
    images, channels, height, width = x.shape
    pixels = height * width
    t = tiles(pixels, channels, x.element_size(), planes)
    of = layout(x, planes)
    even = pixels % (t.BP * t.ITERATIONS) == 0 and channels % t.CB == 0
    return Launch(
        _statistics_kernel,
        (count.shape[0], -(-channels // t.CB), images),
        {
            "x": x,
            "partial": partial,
            "count": count,
            "pixels": pixels,
            "channels": channels,
            "parts": count.shape[0],
            "image_stride": of.image,
            "stride": of.stride,
        },
        {"BP": t.BP, "CB": t.CB, "ITERATIONS": t.ITERATIONS, "PLANES": planes, "EVEN": even},
        t.num_warps,
    )


def partial_buffers(x: Tensor, planes: bool) -> tuple[Tensor, Tensor]:
    """(N, parts, 2, C) and (parts,), float32."""
    images, channels, height, width = x.shape
    t = tiles(height * width, channels, x.element_size(), planes)
    parts = -(-height * width // (t.BP * t.ITERATIONS))
    partial = torch.empty((images, parts, 2, channels), dtype=torch.float32, device=x.device)
    return partial, torch.empty((parts,), dtype=torch.float32, device=x.device)


def statistics(x: Tensor, planes: bool = False) -> tuple[Tensor, Tensor]:
    """Partial statistics of each image and channel: one read of x.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, with adjacent channels (others are copied), or
            contiguous where ``planes``.

    Returns:
        partial (N, parts, 2, C) float32: the mean of a part's pixels, and M2, the sum of squared deviations
        from that mean. count (parts,) float32: the pixels of each part, the same for every image.
    """
    check_tensor("x", x)
    if not planes:
        x = channels_last(x)
    partial, count = partial_buffers(x, planes)
    with on_device(x):
        statistics_launch(x, partial, count, planes).run()
    return partial, count


def merge_launches(
    partial: Tensor, count: Tensor, over_batch: bool, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[list[Launch], Tensor]:
    """One launch, or two where there are many parts; and the result, (4, N or 1, C)."""
    images, parts, _, channels = partial.shape
    instances, rows = (1, images * parts) if over_batch else (images, parts)
    cb = min(power_of_2(channels), 8)  # a sector of memory
    blocks = -(-channels // cb)

    def loop(rows: int) -> dict[str, int]:
        br = min(power_of_2(rows), 64)
        return {"STEPS": -(-rows // br), "BR": br, "CB": cb}

    launches = []
    if rows > GROUP:
        group = max(GROUP, power_of_2(-(-rows // GROUP)))
        groups = -(-rows // group)
        merged = partial.new_empty((instances, groups, 2, channels))
        merged_count = count.new_empty((groups,))
        arguments = {
            "partial": partial,
            "count": count,
            "out": merged,
            "out_count": merged_count,
            "rows": rows,
            "parts": parts,
            "channels": channels,
            "group": group,
            "groups": groups,
        }
        launches.append(Launch(_merge_kernel, (groups, blocks, instances), arguments, loop(group)))
        partial, count, rows, parts = merged, merged_count, groups, groups
    out = partial.new_empty((4, instances, channels))
    arguments = {
        "partial": partial,
        "count": count,
        "weight": weight,
        "bias": bias,
        "out": out,
        "rows": rows,
        "parts": parts,
        "channels": channels,
        "instances": instances,
        "eps": float(eps),
    }
    launches.append(Launch(_finish_kernel, (blocks, instances), arguments, loop(rows)))
    return launches, out


def merge(
    partial: Tensor,
    count: Tensor,
    over_batch: bool = False,
    eps: float = 1e-5,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Merged:
    """Merges partial statistics, of ``statistics`` or of a convolution, in float64 and a fixed order.

    Args:
        partial: (N, parts, 2, C) float32, contiguous; mean and M2 of each part.
        count: (parts,) float32, the pixels of each part; a part of none is ignored.
        over_batch: one mean for the batch instead of one an image.
        weight, bias: (C,), or None.

    Returns:
        scale, shift, mean, variance; float32, (N, C), or (C,) with ``over_batch``.
    """
    check_tensor("partial", partial, (torch.float32,))
    check_tensor("count", count, (torch.float32,))
    if partial.dim() != 4 or partial.shape[2] != 2 or count.shape != partial.shape[1:2]:
        raise ValueError(
            f"partial has shape {tuple(partial.shape)}, count {tuple(count.shape)}; "
            "(N, parts, 2, C) and (parts,) are expected"
        )
    launches, out = merge_launches(
        partial.contiguous(), count.contiguous(), over_batch, eps, floats(weight), floats(bias)
    )
    with on_device(partial):
        for launch in launches:
            launch.run()
    return Merged(*(out[:, 0] if over_batch else out))


def floats(t: Tensor | None) -> Tensor | None:
    """As a contiguous float32 tensor without gradient."""
    return None if t is None else t.detach().to(torch.float32).contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def fold(
    mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32, of given statistics (C,) or (N, C); in float64, rounded once."""
    check_tensor("mean", mean, (*_FLOATING,))
    launch, out = fold_launch(floats(mean), floats(variance), eps, floats(weight), floats(bias))
    with on_device(mean):
        launch.run()
    return out[0], out[1]


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fold_launch(
    mean: Tensor | None, variance: Tensor | None, eps: float, weight: Tensor | None, bias: Tensor | None
) -> tuple[Launch, Tensor]:
    assert mean is not None and variance is not None
    channels = mean.shape[-1]
    instances = mean.numel() // channels
    out = mean.new_empty((2, *mean.shape))
    arguments = {
        "mean": mean,
        "variance": variance,
        "weight": weight,
        "bias": bias,
        "out": out,
        "channels": channels,
        "instances": instances,
        "eps": float(eps),
    }
    cb = min(power_of_2(channels), 128)
    return Launch(_fold_kernel, (-(-channels // cb), instances), arguments, {"CB": cb}, 1), out


def _norm_stride(name: str, scale: Tensor | None, shift: Tensor | None, x: Tensor) -> int:
    if (scale is None) != (shift is None):
        raise ValueError(f"{name}scale and {name}shift go together; one of them is None")
    if scale is None or shift is None:
        return 0
    images, channels = x.shape[:2]
    for what, t in (("scale", scale), ("shift", shift)):
        if t.dtype != torch.float32 or t.shape not in ((channels,), (images, channels)):
            raise ValueError(
                f"{name}{what} is {t.dtype} {tuple(t.shape)}; float32 ({channels},) or "
                f"({images}, {channels}) is expected"
            )
    if scale.shape != shift.shape:
        raise ValueError(f"{name}scale has shape {tuple(scale.shape)}, {name}shift {tuple(shift.shape)}")
    return channels if scale.dim() == 2 else 0


def apply_launch(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    slope: float,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    residual_shift: Tensor | None,
    out: Tensor,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    pad_mode: str = "none",
    input_act: str = "none",
    input_slope: float = 0.0,
    residual_act: str = "none",
    residual_slope: float = 0.0,
    planes: bool = False,
    center: Tensor | None = None,
) -> Launch:
    """With ``center``, which is laid out as scale, shift is (channels,) or None."""
    images, channels, height, width = x.shape
    rows, columns = out.shape[2:]
    of_x, of_out = layout(x, planes), layout(out, planes)
    of_residual = Layout(0, 0, 0) if residual is None else layout(residual, planes)
    padded = any(pad)
    if planes or not padded and all(evenly_spaced(v) for v in (x, residual, out) if v is not None):
        rows, columns = 1, height * width
    t = tiles(columns, channels, x.element_size(), planes)
    even = not padded and columns % t.BP == 0 and channels % t.CB == 0
    return Launch(
        _apply_kernel,
        (rows * -(-columns // t.BP), -(-channels // t.CB), images),
        {
            "x": x,
            "center": center,
            "scale": scale,
            "shift": shift,
            "residual": residual,
            "residual_scale": residual_scale,
            "residual_shift": residual_shift,
            "out": out,
            "columns": columns,
            "height": height,
            "width": width,
            "channels": channels,
            "top": pad[0],
            "left": pad[2],
            "x_image": of_x.image,
            "x_row": of_x.row,
            "x_stride": of_x.stride,
            "residual_image": of_residual.image,
            "residual_row": of_residual.row,
            "residual_stride": of_residual.stride,
            "out_image": of_out.image,
            "out_row": of_out.row,
            "out_stride": of_out.stride,
            "norm_stride": 0 if scale is None or scale.dim() == 1 else channels,
            "residual_norm_stride": 0 if residual_scale is None or residual_scale.dim() == 1 else channels,
            "input_slope": float(input_slope),
            "residual_slope": float(residual_slope),
            "slope": float(slope),
        },
        {
            "INPUT_ACT": activation_code(input_act),
            "RESIDUAL_ACT": activation_code(residual_act),
            "ACT": activation_code(act),
            "PAD": PAD_MODES.index(pad_mode) if padded else 0,
            "BP": t.BP,
            "CB": t.CB,
            "PLANES": planes,
            "EVEN": even,
        },
        warps(t.BP * t.CB),
    )


def apply(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    out: Tensor | None = None,
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
    pad_mode: str = "reflect",
    input_act: str = "none",
    input_slope: float = 0.0,
    residual_act: str = "none",
    residual_slope: float = 0.0,
) -> Tensor:
    """``act(input_act(scale * x + shift) + residual_act(residual_scale * residual + residual_shift))``.

    One read of each input and one write; in place (``out`` is x or residual) where nothing is padded.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16, with adjacent channels (others are copied); it may be a
            slice of a wider tensor's channels, or the inside of one with a border.
        scale, shift: float32, (C,) or (N, C); None leaves x as it is.
        act, slope, input_act, ...: as for ``p2pfast.ops.conv.conv``.
        residual: (N, C, H, W), any of the dtypes, or None; with its own scale and shift, or None.
        out: (N, C, top + H + bottom, left + W + right) with adjacent channels, any of the dtypes; it may be
            a slice of a wider tensor's channels, or the inside of a tensor with a border. None: a new
            channels_last tensor of x's dtype.
        pad: rows and columns added at the top, bottom, left and right, made of the result.
        pad_mode: "zeros", "reflect" or "replicate".

    Returns:
        out.

    Raises:
        TypeError, ValueError, RuntimeError: tensors that do not fit or that the kernels do not take.
    """
    check_tensor("x", x)
    images, channels, height, width = x.shape
    top, bottom, left, right = pad
    if pad_mode not in PAD_MODES[1:]:
        raise ValueError(f"pad_mode is {pad_mode!r}; choose one of {', '.join(PAD_MODES[1:])}")
    if min(pad) < 0:
        raise ValueError(f"pad is {pad}; it must not be negative")
    if pad_mode == "reflect" and (max(top, bottom) >= height or max(left, right) >= width):
        raise ValueError(f"pad is {pad} of an image of {height} x {width}; reflect padding must be smaller")
    shape = (images, channels, top + height + bottom, left + width + right)
    _norm_stride("", scale, shift, x)
    _norm_stride("residual_", residual_scale, residual_shift, x)
    x = channels_last(x.detach(), any_rows=True)
    if residual is not None:
        check_tensor("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}")
        residual = channels_last(residual.detach(), any_rows=True)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    else:
        check_tensor("out", out)
        if out.shape != shape:
            raise ValueError(f"out has shape {tuple(out.shape)}; {shape} is expected")
        if out.stride(1) != 1 and channels > 1:
            raise ValueError(f"out has strides {out.stride()}; its channels must be adjacent")
    for name, t in (
        ("scale", scale),
        ("shift", shift),
        ("residual", residual),
        ("residual_scale", residual_scale),
        ("residual_shift", residual_shift),
        ("out", out),
    ):
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; they must be on one device")
    launch = apply_launch(
        x,
        _contiguous(scale),
        _contiguous(shift),
        act,
        slope,
        residual,
        _contiguous(residual_scale),
        _contiguous(residual_shift),
        out,
        pad,
        pad_mode,
        input_act,
        input_slope,
        residual_act,
        residual_slope,
    )
    with on_device(x):
        launch.run()
    return out


def map_launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    out: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    planes: bool,
) -> Launch | None:
    """None where a map is too large for one program."""
    images, channels, height, width = x.shape
    pixels = height * width
    values = pixels * images if over_batch else pixels
    # What is loaded stays in registers beside its float32 values where it is added or has to be widened, and
    # so do masks, where a tile is not full.
    full = values == power_of_2(values) and channels % 8 == 0
    wide = full and residual is None and (planes or x.element_size() == 4)
    limit = RESIDENT if wide else RESIDENT // 2
    t = map_tiles(values, channels, x.element_size(), planes, limit)
    if t is None:
        return None
    of_x, of_out = layout(x, planes), layout(out, planes)
    of_residual = Layout(0, 0, 0) if residual is None else layout(residual, planes)
    return Launch(
        _map_kernel,
        (-(-channels // t.CB), 1 if over_batch else images),
        {
            "x": x,
            "residual": residual,
            "weight": weight,
            "bias": bias,
            "out": out,
            "mean_out": mean,
            "variance_out": variance,
            "values": values,
            "pixels": pixels,
            "channels": channels,
            "x_image": of_x.image,
            "x_stride": of_x.stride,
            "residual_image": of_residual.image,
            "residual_stride": of_residual.stride,
            "out_image": of_out.image,
            "out_stride": of_out.stride,
            "eps": float(eps),
            "slope": float(slope),
        },
        {
            "ACT": activation_code(act),
            "BP": t.BP,
            "CB": t.CB,
            "PLANES": planes,
            "OVER_BATCH": over_batch and images > 1,
            "EVEN": values == t.BP and channels % t.CB == 0,
        },
        t.num_warps,
    )


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    planes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)``, the mean and the variance.

    x, residual and the result have adjacent channels, or are contiguous where ``planes``. Small maps are kept
    in the registers of one program; of others statistics, merge and apply are passes of their own.
    """
    check_tensor("x", x)
    if residual is not None:
        check_tensor("residual", residual)
    weight, bias = floats(weight), floats(bias)
    images, channels = x.shape[:2]
    memory_format = torch.contiguous_format if planes else torch.channels_last
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format)
    with on_device(x):
        if mean is not None and variance is not None:
            mean, variance = floats(mean), floats(variance)
            fold_it, scales = fold_launch(mean, variance, eps, weight, bias)
            fold_it.run()
            scale = scales[0]
        else:
            shape = (channels,) if over_batch else (images, channels)
            used = torch.empty((2, *shape), dtype=torch.float32, device=x.device)
            whole = map_launch(
                x, weight, bias, over_batch, eps, act, slope, residual, out, used[0], used[1], planes
            )
            if whole is not None:
                whole.run()
                return out, used[0], used[1]
            partial, count = partial_buffers(x, planes)
            statistics_launch(x, partial, count, planes).run()
            launches, merged = merge_launches(partial, count, over_batch, eps, weight, bias)
            for launch in launches:
                launch.run()
            scale, _, mean, variance = Merged(*(merged[:, 0] if over_batch else merged))
        # Not as scale * x + shift, which nearly cancel far from zero.
        apply_launch(x, scale, bias, act, slope, residual, None, None, out, planes=planes, center=mean).run()
    assert mean is not None and variance is not None
    return out, mean, variance


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    over_batch: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The operator of ``p2pfast.ops.norm`` on the GPU, also for float16; arguments are not checked again."""
    x = channels_last(x.detach())
    residual = None if residual is None else channels_last(residual.detach())
    return normalise(x, weight, bias, mean, variance, over_batch, eps, act, slope, residual, False)[0]


def shipped() -> list[Shipped]:
    """What the networks' sizes lead to, for ``p2pfast.ops.gpu.compile``."""
    found: list[Shipped] = []

    def meta(*shape: int, dtype: torch.dtype = torch.float32, planes: bool = True) -> Tensor:
        memory_format = torch.contiguous_format if planes or len(shape) != 4 else torch.channels_last
        return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)

    def add(what: str, launch: Launch) -> None:
        found.append(launch.shipped(what))

    for dtype, planes, size in (
        (torch.bfloat16, False, (1, 64, 1024, 2048)),
        (torch.float32, False, (1, 64, 1024, 2048)),
        (torch.bfloat16, False, (1, 1024, 32, 64)),
        (torch.float32, False, (1, 3, 255, 255)),
        (torch.bfloat16, True, (1, 64, 1024, 2048)),
        (torch.float32, True, (1, 64, 511, 511)),
    ):
        x = meta(*size, dtype=dtype, planes=planes)
        images, channels, height, width = size
        kind = f"{str(dtype)[6:]} {'NCHW' if planes else 'NHWC'} {channels}x{height}x{width}"
        add(f"statistics {kind}", statistics_launch(x, *partial_buffers(x, planes), planes))
        scale = meta(images, channels)
        if channels != 1024:
            plain = apply_launch(
                x, scale, None, "relu", 0.0, None, None, None, x, planes=planes, center=scale
            )
            add(f"apply {kind}", plain)
        if planes:
            continue
        padded = meta(images, channels, height + 2, width + 2, dtype=dtype, planes=False)
        if channels == 1024:
            for mode in PAD_MODES[1:]:
                launch = apply_launch(x, scale, scale, "none", 0.0, x, None, None, padded, (1, 1, 1, 1), mode)
                add(f"apply, residual, {mode} {kind}", launch)
        else:
            launch = apply_launch(x, scale, scale, "relu", 0.0, x, scale, scale, x)
            add(f"apply, two norms {kind}", launch)
    for dtype, planes, size, over_batch, added in (
        (torch.bfloat16, False, (1, 1024, 32, 64), False, False),
        (torch.bfloat16, False, (1, 1024, 32, 64), False, True),
        (torch.float32, False, (1, 256, 64, 64), False, False),
        (torch.float32, False, (1, 256, 64, 64), False, True),
        (torch.bfloat16, False, (16, 512, 4, 4), True, False),
        (torch.bfloat16, True, (1, 64, 128, 256), False, False),
        (torch.float32, True, (1, 256, 127, 127), False, True),
        (torch.bfloat16, True, (16, 512, 4, 4), True, True),
    ):
        x = meta(*size, dtype=dtype, planes=planes)
        affine = meta(size[1])
        kind = f"{str(dtype)[6:]} {'NCHW' if planes else 'NHWC'} {'x'.join(map(str, size))}"
        whole = map_launch(
            x, affine, affine, over_batch, 1e-5, "relu", 0.0, x if added else None, x, affine, affine, planes
        )
        if whole is not None:
            add(f"whole map{', residual' if added else ''} {kind}", whole)
    for parts in (100, 16384):
        launches, _ = merge_launches(meta(1, parts, 2, 64), meta(parts), False, 1e-5, None, None)
        for i, launch in enumerate(launches):
            add(f"merge {parts} parts, pass {i + 1} of {len(launches)}", launch)
    add("frozen statistics", fold_launch(meta(64), meta(64), 1e-5, meta(64), meta(64))[0])
    return found
