"""Rows: which input rows a band of output rows needs, and the band as an image of its own.

A kernel never learns that it runs a band. Inside the image the band's window has no padding above, and it
ends where the window ends; at the true borders it keeps the image's padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from p2pfast.fuse.graph import ConvOp, Op, PoolOp


@dataclass(frozen=True)
class Part:
    """Output rows [begin, end) of one image, or of all images where ``image`` is None."""

    image: int | None
    begin: int
    end: int

    @property
    def first_image(self) -> int:
        return self.image or 0


@dataclass(frozen=True)
class Window:
    """Input rows [begin, end), and the padding above the first of them."""

    begin: int
    end: int
    pad_top: int


def step_of(op: Op, modules: dict[str, nn.Module]) -> int:
    """Bands of the operation's output begin at multiples of this."""
    if not isinstance(op, ConvOp):
        return 1
    module: Any = modules[op.path]
    return int(module.stride[0]) if module.transposed else 1


def window_of(op: Op, modules: dict[str, nn.Module], begin: int, end: int, height: int) -> Window:
    """What rows [begin, end) of the operation's output read of an input of ``height`` rows."""
    if isinstance(op, PoolOp):
        return _ordinary(begin, end, height, op.kernel, op.stride, op.pad, False)
    if not isinstance(op, ConvOp):
        return Window(begin, end, 0)
    module: Any = modules[op.path]
    kernel, stride = module.kernel_size[0], module.stride[0]
    if not module.transposed:
        return _ordinary(begin, end, height, kernel, stride, op.pad_top, op.pad_mode == "reflect")
    first = max(0, -(-(begin + op.pad_top - kernel + 1) // stride))
    last = min(height, (end - 1 + op.pad_top) // stride + 1)
    return Window(first, max(last, first + 1), op.pad_top + begin - first * stride)


def _ordinary(
    begin: int, end: int, height: int, kernel: int, stride: int, pad: int, reflects: bool
) -> Window:
    low, high = begin * stride - pad, (end - 1) * stride - pad + kernel
    first, last = max(0, low), min(height, high)
    if reflects:
        # Rows that the border reflects; below, they lie inside the window (see splittable).
        last = max(last, min(height, 1 - low))
    return Window(first, last, first - low)


def splittable(op: Op, modules: dict[str, nn.Module], in_height: int, out_height: int) -> bool:
    """Whether bands of the operation can be described: reflection must stay inside a band's window."""
    if not isinstance(op, ConvOp) or op.pad_mode != "reflect":
        return True
    module: Any = modules[op.path]
    kernel, stride = module.kernel_size[0], module.stride[0]
    below = (out_height - 1) * stride - op.pad_top + kernel - in_height
    return 2 * max(op.pad_top, below) <= kernel - 1 and 2 * op.pad_top < in_height
