"""Tile configurations that are in use."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from p2pfast.ops.conv.gpu.pack import Packed, power_of_two


@dataclass(frozen=True)
class Config:
    """Sizes of a tile (pixels, columns, depth of a step), warps of a program and stages of its pipeline."""

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3


def default_config(packed: Packed, x: Tensor, out: Tensor) -> Config:
    """A configuration for a convolution of x (N, H, W, C) to out (N, H', W', Cout) that was not measured."""
    bn = min(128, max(16, power_of_two(packed.columns)))
    bk = 16 if max(packed.channels) <= 16 else 32 if max(packed.channels) <= 32 else 64
    pixels = out.shape[1] * out.shape[2] // (packed.stride**2 if packed.transposed else 1)
    bm = min(128, max(16, power_of_two(pixels)))
    return Config(bm, bn, bk, 8 if bm * bn >= 128 * 128 else 4, 3)
