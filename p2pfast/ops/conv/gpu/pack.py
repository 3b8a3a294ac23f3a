"""Weights as the Triton kernels read them: one row a column of the product, its depth contiguous."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

LAYOUTS = ("plain", "phases", "columns", "rows")

# Sources with fewer channels take several taps in one step of the product's depth.
FLAT_BELOW = 16


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def power_of_two(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """A convolution, and how one layout of the kernels sees it.

    Attributes:
        layout: ``"plain"``: columns of the product are output channels. Transposed: ``"phases"``: the taps of
            each sub-pixel phase one after the other, phases by the residue of their taps; or ``"columns"``:
            columns are (phase row, phase column, channel), over the union of the phases' windows. ``"rows"``
            (few output channels, stride 1): columns are (output row, horizontal tap, channel), the last two
            padded to powers of two, and depth is input rows times channels.
        window: height and width of the window that a column's depth covers.
        padding: top and left, of a window; of ``"columns"``, of the union's.
        given: the padding that ``pack`` was given.
        rows: output rows of a tile of the layout ``"rows"``, else 1.
        columns, depth: of the packed weights.
    """

    layout: str
    kernel: tuple[int, int]
    window: tuple[int, int]
    stride: int
    padding: tuple[int, int]
    given: tuple[int, int]
    transposed: bool
    channels: tuple[int, ...]
    out_channels: int
    rows: int
    columns: int
    depth: int

    @property
    def flat(self) -> tuple[bool, ...]:
        """Of each source: whether a step takes several taps."""
        return tuple(c < FLAT_BELOW for c in self.channels)


@dataclass(frozen=True)
class Packed(Geometry):
    """A convolution's weights for one layout of the kernels.

    Attributes:
        data: (columns, depth), depth contiguous: for each source, taps times channels. The channels of a tap
            are padded with zeros to a multiple of 16; of a source with fewer than 16 channels, only the end.
    """

    data: Tensor = field(compare=False)

    @property
    def geometry(self) -> Geometry:
        """Without the weights."""
        return Geometry(*(getattr(self, f.name) for f in fields(Geometry)))


def _depth(weight: Tensor, channels: tuple[int, ...]) -> Tensor:
    """(columns, window height, window width, C) as (columns, depth)."""
    columns, height, width, _ = weight.shape
    taps = height * width
    rows = []
    for part in weight.split(list(channels), 3):
        c = part.shape[3]
        size = round_up(taps * c, 16) if c < FLAT_BELOW else round_up(c, 16)
        flat = part.reshape(columns, taps * c) if c < FLAT_BELOW else part.reshape(columns, taps, c)
        padded = torch.nn.functional.pad(flat, (0, size - flat.shape[-1]))
        rows.append(padded.reshape(columns, -1))
    return torch.cat(rows, 1)


def _union(kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """First offset and size of the window that holds the taps of all phases of one direction."""
    lows, highs = [], []
    for at in range(stride):
        taps = -(-(kernel - (at + padding) % stride) // stride)
        if taps > 0:
            lows.append((at + padding) // stride - taps + 1)
            highs.append((at + padding) // stride)
    return min(lows), max(highs) - min(lows) + 1


def _phase_columns(weight: Tensor, stride: int, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """(Cout, Kh, Kw, C) as (stride, stride, Cout, height, width, C) over the union, and its padding."""
    (low_y, size_y), (low_x, size_x) = (_union(weight.shape[1 + i], stride, padding[i]) for i in range(2))
    out = weight.new_zeros(stride, stride, weight.shape[0], size_y, size_x, weight.shape[3])
    for ky in range(weight.shape[1]):
        at_y = (ky - padding[0]) % stride
        y = (at_y + padding[0] - ky) // stride - low_y
        for kx in range(weight.shape[2]):
            at_x = (kx - padding[1]) % stride
            x = (at_x + padding[1] - kx) // stride - low_x
            out[at_y, at_x, :, y, x] = weight[:, ky, kx]
    return out, (-low_y, -low_x)


def _row_columns(weight: Tensor, rows: int) -> Tensor:
    """(Cout, Kh, Kw, C) as (columns, rows + Kh - 1, 1, C): columns are (row, horizontal tap, channel)."""
    cout, height, width, c = weight.shape
    out = weight.new_zeros(rows, power_of_two(width), power_of_two(cout), rows + height - 1, c)
    for row in range(rows):
        out[row, :width, :cout, row : row + height] = weight.permute(2, 0, 1, 3)
    return out.flatten(0, 2).unsqueeze(2)


def fold_rows(kernel: tuple[int, int], out_channels: int) -> int:
    """Output rows of a tile of the layout ``"rows"``: as many as make 64 to 128 columns, at most 4."""
    return max(1, min(4, 128 // (power_of_two(kernel[1]) * power_of_two(out_channels))))


def pack(
    weight: Tensor,
    transposed: bool,
    dtype: torch.dtype,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    channels: tuple[int, ...] | None = None,
    layout: str | None = None,
) -> Packed:
    """Packs a convolution's weights for ``conv``, once.

    Args:
        weight: (Cout, C, Kh, Kw), (C, Cout, Kh, Kw) if transposed; any floating-point dtype.
        dtype: that of the tensors the convolution reads.
        stride, padding: of the convolution, the padding at the top and at the left.
        channels: of each of the sources; None: one source.
        layout: see ``Geometry``; None: what is quickest as a rule (``preferred``).

    Raises:
        ValueError: channels that do not sum to C, or a layout that cannot do this convolution.
    """
    if weight.dim() != 4 or weight.numel() == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; four dimensions, none of them 0, are expected"
        )
    w = weight.detach().permute(1, 2, 3, 0) if transposed else weight.detach().permute(0, 2, 3, 1)
    cout, height, width, c = w.shape
    channels = (c,) if channels is None else tuple(channels)
    if sum(channels) != c or len(channels) > 2 or min(channels) < 1:
        raise ValueError(
            f"channels is {channels}; one or two numbers that sum to the weight's {c} are expected"
        )
    layout = layout or preferred(transposed, stride, (height, width), cout, padding)
    wrong = refuses(layout, transposed, stride, (height, width), cout)
    if wrong:
        raise ValueError(f"layout is {layout!r}: {wrong}")
    if transposed and (padding[0] >= height or padding[1] >= width):
        raise ValueError(
            f"padding is {padding}; it must be below the transposed kernel's size {height}x{width}"
        )
    w = w.to(dtype)
    given = padding[0], padding[1]
    window, rows = (height, width), 1
    if layout == "plain":
        data = _depth(w, channels)
    elif layout == "phases":
        taken = [w[:, y::stride, x::stride].flip(1, 2) for y in range(stride) for x in range(stride)]
        data = torch.cat([_depth(t, channels) for t in taken], 1)
    elif layout == "columns":
        phases, padding = _phase_columns(w, stride, padding)
        window = phases.shape[3], phases.shape[4]
        data = _depth(phases.flatten(0, 2), channels)
    else:
        rows = fold_rows((height, width), cout)
        window = rows + height - 1, 1
        data = _depth(_row_columns(w, rows), channels)
    return Packed(
        layout=layout,
        kernel=(height, width),
        window=window,
        stride=stride,
        padding=(padding[0], padding[1]),
        given=given,
        transposed=transposed,
        channels=channels,
        out_channels=cout,
        rows=rows,
        columns=data.shape[0],
        depth=data.shape[1],
        data=data.contiguous(),
    )


def refuses(layout: str, transposed: bool, stride: int, kernel: tuple[int, int], cout: int) -> str | None:
    """Why a layout cannot do a convolution; None if it can."""
    if layout not in LAYOUTS:
        return f"choose one of {', '.join(LAYOUTS)}"
    if transposed != (layout in ("phases", "columns")):
        return f"it is not for {'transposed' if transposed else 'ordinary'} convolutions"
    if layout == "rows":
        if stride != 1:
            return f"it takes stride 1, here {stride}"
        columns = fold_rows(kernel, cout) * power_of_two(kernel[1]) * power_of_two(cout)
        if not 16 <= columns <= 128:
            return f"{cout} channels and {kernel[1]} horizontal taps make {columns} columns; 16 to 128 fit"
    return None


def preferred(
    transposed: bool, stride: int, kernel: tuple[int, int], cout: int, padding: tuple[int, int]
) -> str:
    """The layout that reads its input least often without much more arithmetic."""
    if transposed:
        columns = stride * stride * cout
        unions = [_union(k, stride, p)[1] for k, p in zip(kernel, padding, strict=True)]
        inside = unions[0] * unions[1] * max(16, columns)
        return (
            "columns" if columns <= 128 and inside <= 2 * kernel[0] * kernel[1] * max(16, cout) else "phases"
        )
    if cout <= 4 and kernel[1] > 1 and not refuses("rows", False, stride, kernel, cout):
        return "rows"
    return "plain"
