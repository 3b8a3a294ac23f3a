"""On NVIDIA GPUs: the weight gradient as a matrix product over pixels. Importing this imports triton.

Rows of the product are output channels, columns the window's taps times input channels, and its depth all
pixels of the batch, which several programs may share; see this operator's README.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.conv.gpu.configs import Config, Machine, machine, shared_bytes, with_depth
from p2pfast.ops.conv.source import PADDING_MODES
from p2pfast.ops.gpu import Launch, Shipped, allows_tf32, channels_last, check_tensor, on_device
from p2pfast.ops.gpu.device import dot, padded_index, rounded

import triton  # isort: skip
import triton.language as tl  # isort: skip

# bm: output channels, bn: columns, bk: pixels. For 16-bit storage; with 32 bits the depth of a step is half,
# and the largest spills registers.
TILES = (
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 64, 4, 3),
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 64, 4, 4),
    Config(16, 128, 64, 4, 4),
)
_LARGEST_OF_32_BITS = 128 * 64
_LARGEST_FLAT = 64 * 64  # where every value has an address of its own
# float32 without tensor cores.
PLAIN = Config(64, 32, 16, 4, 2)
MOST_CONTENDERS = 3
_WORTH_MEASURING = 1.5
_LEAST_STEPS = 8  # of a split, for a pipeline to be worth filling
_MOST_WORK = 2**24  # float32 values between the two launches
_MERGED = 1024  # weights that a program of the second launch adds up
_LARGEST = 2**31 - 1024


@triton.jit
def _products_kernel(
    grad, x, out, total, out_pixels, out_width, height, width, rows, channels, kernel_w, taps,
    stride, padding, grad_image, grad_row, grad_pixel, x_image, x_row, x_pixel, splits,
    PAD: tl.constexpr, FLAT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of BM output channels and BN columns, over one share of the pixels; the grid is (tiles, splits).

    ``total`` pixels of the batch are the depth. FLAT: columns go through taps x channels; otherwise a tile
    lies in one tap, whose window is the same for all of its columns. WHOLE: the sums are the gradient,
    (rows, channels, taps); otherwise they are stored as (splits, rows, taps x channels) float32.
    """
    of_tap = tl.cdiv(channels, BN)
    column_blocks = tl.cdiv(taps * channels, BN) if FLAT else taps * of_tap
    block = tl.program_id(0) % column_blocks
    m = (tl.program_id(0) // column_blocks) * BM + tl.arange(0, BM)
    if FLAT:
        column = block * BN + tl.arange(0, BN)
        there = column < taps * channels
        tap = column // channels
        c = column % channels
    else:
        tap = block // of_tap
        c = (block % of_tap) * BN + tl.arange(0, BN)
        there = c < channels
        column = tap * channels + c
    down = tap // kernel_w - padding
    right = tap % kernel_w - padding

    share = tl.cdiv(tl.cdiv(total, BK), splits)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, tl.cdiv(total, BK))
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(begin, end):
        k = step * BK + tl.arange(0, BK)
        exists = k < total
        image = (k // out_pixels).to(tl.int64)
        y = k % out_pixels // out_width
        z = k % out_pixels % out_width
        a = tl.load(
            (grad + image * grad_image + y.to(tl.int64) * grad_row + z * grad_pixel)[:, None] + m[None, :],
            mask=exists[:, None] & (m < rows)[None, :],
            other=0.0,
        )
        if FLAT:
            i = (y * stride)[:, None] + down[None, :]
            j = (z * stride)[:, None] + right[None, :]
            inside = exists[:, None] & there[None, :]
            window = (x + image * x_image)[:, None]
        else:
            i = y * stride + down
            j = z * stride + right
            inside = exists
            window = x + image * x_image
        if PAD == "zeros":
            inside = inside & (i >= 0) & (i < height) & (j >= 0) & (j < width)
        i = padded_index(i, height, PAD)
        j = padded_index(j, width, PAD)
        window += i.to(tl.int64) * x_row + j * x_pixel
        if FLAT:
            b = tl.load(window + c[None, :], mask=inside, other=0.0)
        else:
            b = tl.load(window[:, None] + c[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)

    mask = (m < rows)[:, None] & there[None, :]
    if WHOLE:
        place = out + (m[:, None] * channels + c[None, :]) * taps
        place += tap[None, :] if FLAT else tap
        tl.store(place, rounded(acc, out.dtype.element_ty), mask=mask)
    else:
        out += tl.program_id(1).to(tl.int64) * rows * taps * channels
        tl.store(out + m[:, None] * (taps * channels) + column[None, :], acc, mask=mask)


@triton.jit
def _merge_kernel(work, out, weights, channels, taps, splits, BLOCK: tl.constexpr):
    """The splits' sums, in their order, as (rows, channels, taps)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = e < weights
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(work + e, mask=there, other=0.0)
        work += weights
    column = e % (taps * channels)
    place = (e - column) + column % channels * taps + column // channels
    tl.store(out + place, rounded(acc, out.dtype.element_ty), mask=there)


def _flat(config: Config, channels: int) -> bool:
    """Whether a tile's columns span taps: with fewer channels than columns most of it would be empty."""
    return channels < config.bn


def _fitted(channels: int, itemsize: int) -> list[Config]:
    """Tiles for a dtype; where columns span taps, the smaller ones, half as deep."""
    found = []
    for tile in TILES:
        config, area = with_depth(tile, itemsize), tile.bm * tile.bn
        if itemsize == 4 and area > _LARGEST_OF_32_BITS:
            continue
        if _flat(config, channels):
            if area > _LARGEST_FLAT:
                continue
            config = dataclasses.replace(config, bk=config.bk // 2)
        found.append(config)
    return found


def _tiles(config: Config, rows: int, channels: int, taps: int) -> int:
    columns = (
        -(-taps * channels // config.bn) if _flat(config, channels) else taps * -(-channels // config.bn)
    )
    return -(-rows // config.bm) * columns


def contenders(
    rows: int, channels: int, kernel: tuple[int, int], pixels: int, itemsize: int, on: Machine
) -> list[Config]:
    """Tiles worth a measurement, the likeliest first, with as many splits as fill a device.

    Args:
        rows, channels: of the output and of the input.
        pixels: of the output, in the whole batch.
    """
    taps = kernel[0] * kernel[1]
    timed = []
    for tile in _fitted(channels, itemsize):
        if shared_bytes(tile, 0, itemsize) > on.shared:
            continue
        tiles = _tiles(tile, rows, channels, taps)
        steps = -(-pixels // tile.bk)
        most = max(1, min(steps // _LEAST_STEPS, _MOST_WORK // (rows * channels * taps)))
        splits = min(most, max(1, 2 * on.processors // tiles))
        # Arithmetic, or what has to come from the cache: a tile is worth its area or its border.
        step = max(tile.bm * tile.bn, 48 * (tile.bm + tile.bn))
        waves = -(-tiles * splits // on.processors)
        timed.append((waves * -(-steps // splits) * step * tile.bk, dataclasses.replace(tile, splits=splits)))
    timed.sort(key=lambda pair: pair[0])
    return [c for seconds, c in timed if seconds < _WORTH_MEASURING * timed[0][0]][:MOST_CONTENDERS]


def launches(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    stride: int,
    padding: int,
    padding_mode: str,
    config: Config,
    precision: str,
) -> list[Launch]:
    """The launches of a gradient whose arguments are right; tensors may be on the meta device."""
    images, rows, out_height, out_width = grad.shape
    channels, taps = x.shape[1], out.shape[2] * out.shape[3]
    whole = config.splits == 1
    work = out
    if not whole:
        work = torch.empty((config.splits, out.numel()), dtype=torch.float32, device=out.device)
    arguments = {
        "grad": grad,
        "x": x,
        "out": work,
        "total": images * out_height * out_width,
        "out_pixels": out_height * out_width,
        "out_width": out_width,
        "height": x.shape[2],
        "width": x.shape[3],
        "rows": rows,
        "channels": channels,
        "kernel_w": out.shape[3],
        "taps": taps,
        "stride": stride,
        "padding": padding,
        **{f"grad_{name}": grad.stride(dim) for name, dim in (("image", 0), ("row", 2), ("pixel", 3))},
        **{f"x_{name}": x.stride(dim) for name, dim in (("image", 0), ("row", 2), ("pixel", 3))},
        "splits": config.splits,
    }
    constants = {
        # Windows past the image at the bottom and at the right belong to no output.
        "PAD": padding_mode if padding else "none",
        "FLAT": _flat(config, channels),
        "WHOLE": whole,
        "PRECISION": precision,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
    }
    grid = _tiles(config, rows, channels, taps), config.splits
    found = [Launch(_products_kernel, grid, arguments, constants, config.warps, config.stages)]
    if not whole:
        sums: dict[str, Any] = {"work": work, "out": out, "weights": out.numel(), "channels": channels}
        sums |= {"taps": taps, "splits": config.splits}
        found.append(Launch(_merge_kernel, (-(-out.numel() // _MERGED),), sums, {"BLOCK": _MERGED}))
    return found


def refuses(grad: Tensor, x: Tensor, kernel: tuple[int, int]) -> str:
    """Why the kernel cannot do this one; "" where it can."""
    if grad.shape[0] * grad.shape[2:].numel() > _LARGEST:
        return f"a batch of more than {_LARGEST} pixels"
    if grad.shape[1] * x.shape[1] * kernel[0] * kernel[1] > _LARGEST:
        return f"more than {_LARGEST} weights"
    return ""


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: tuple[int, int],
    stride: int,
    padding: int,
    padding_mode: str,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
    precision: str | None = None,
) -> Tensor:
    """As ``p2pfast.ops.weight_gradient.weight_gradient``, on a GPU; sums have a fixed order, without atomics.

    Args:
        grad: (N, Cout, H', W'), float32, bfloat16 or float16; copied where it is not channels_last.
        x: (N, C, H, W), of grad's dtype, as it is before the padding.
        kernel, stride, padding, padding_mode: of the convolution.
        dtype: of the result; None takes grad's.
        config: None: the likeliest of ``contenders``.
        precision: of float32 products, as for ``conv``; None: as ``torch.backends.cudnn.allow_tf32`` says.

    Returns:
        (Cout, C, *kernel), contiguous.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: a device of compute capability below 8.0.
    """
    for name, t in (("grad", grad), ("x", x)):
        check_tensor(name, t)
        if t.dim() != 4 or t.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(t.shape)}; a filled (images, channels, height, width)")
    if grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"grad is {grad.dtype} on {grad.device}, x {x.dtype} on {x.device}; they must be alike"
        )
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode is {padding_mode!r}; choose one of {', '.join(PADDING_MODES)}")
    if min(stride - 1, padding) < 0:
        raise ValueError(f"stride is {stride} and padding {padding}; at least 1 and 0 are expected")
    if padding_mode == "reflect" and padding >= min(x.shape[2:]):
        raise ValueError(
            f"padding is {padding}; reflection needs it below the height and width of x, {tuple(x.shape[2:])}"
        )
    reach = [(o - 1) * stride + k - 2 * padding for o, k in zip(grad.shape[2:], kernel, strict=True)]
    if grad.shape[0] != x.shape[0] or reach[0] > x.shape[2] or reach[1] > x.shape[3]:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)}; no convolution of {tuple(x.shape)} with a kernel of "
            f"{tuple(kernel)}, stride {stride} and padding {padding} has such an output"
        )
    reason = refuses(grad, x, kernel)
    if reason:
        raise ValueError(f"grad has shape {tuple(grad.shape)} and x {tuple(x.shape)}: {reason}")
    grad, x = channels_last(grad.detach(), any_rows=True), channels_last(x.detach(), any_rows=True)
    out = torch.empty((grad.shape[1], x.shape[1], *kernel), dtype=dtype or grad.dtype, device=grad.device)
    if precision is None:
        precision = "tf32" if allows_tf32() else "ieee"
    if grad.dtype != torch.float32:
        precision = "tf32"  # means nothing: one kernel for all
    if config is None:
        pixels = grad.shape[0] * grad.shape[2:].numel()
        ends = grad.shape[1], x.shape[1]
        config = PLAIN
        if precision != "ieee":
            config = contenders(*ends, kernel, pixels, grad.dtype.itemsize, machine(grad.device))[0]
    with on_device(grad):
        for launch in launches(grad, x, out, stride, padding, padding_mode, config, precision):
            launch.run()
    return out


def shipped() -> list[Shipped]:
    """Every tile with what is heaviest for it, for ``ops.gpu.compile``."""
    found: list[Shipped] = []

    usual: dict[str, Any] = {"kernel": 3, "stride": 1, "padding": 1, "padding_mode": "reflect"}
    usual["precision"] = "tf32"

    def add(what: str, config: Config, dtype: torch.dtype, channels: int, size: int, **options: Any) -> None:
        of = usual | options
        meta: dict[str, Any] = {"dtype": dtype, "device": "meta"}
        rows, length = config.bm if config.bm > 16 else 3, size // int(of["stride"])
        grad = torch.empty((2, rows, length, length), memory_format=torch.channels_last, **meta)
        x = torch.empty((2, channels, size, size), memory_format=torch.channels_last, **meta)
        out = torch.empty((rows, channels, of["kernel"], of["kernel"]), **meta)
        numbers = of["stride"], of["padding"], of["padding_mode"]
        steps = launches(grad, x, out, *numbers, config, of["precision"])
        names = [f"{what}, {str(dtype)[6:]} {config}", "merging splits"]
        for launch, name in zip(steps, names, strict=False):
            multiplies = of["precision"] != "ieee" and launch.kernel is _products_kernel
            found.append(launch.shipped(name, multiplies))

    bf16, f32 = torch.bfloat16, torch.float32
    for dtype in (bf16, f32):
        for tile in _fitted(256, dtype.itemsize):
            add("3x3", tile, dtype, 256, 64)
        for tile in _fitted(32, dtype.itemsize):
            add("3x3, few channels in", tile, dtype, 32, 64)
        add("7x7, three channels in", _fitted(3, dtype.itemsize)[0], dtype, 3, 64, kernel=7, padding=3)
    add("4x4, stride 2", TILES[0], torch.float16, 256, 64, kernel=4, stride=2, padding_mode="zeros")
    add("3x3, split", dataclasses.replace(TILES[0], splits=8), bf16, 512, 32)
    add("3x3, ieee", PLAIN, f32, 64, 32, precision="ieee")
    return found
