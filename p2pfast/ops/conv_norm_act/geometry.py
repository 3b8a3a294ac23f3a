from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """As for ``p2pfast.ops.conv.conv``."""

    stride: int
    padding: int
    output_padding: int
    transposed: bool
    padding_mode: str

    def result_shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """(N, Cout, H', W') for x (N, C, H, W)."""
        height, width = (
            (s - 1) * self.stride - 2 * self.padding + k + self.output_padding
            if self.transposed
            else (s + 2 * self.padding - k) // self.stride + 1
            for s, k in zip(x.shape[2:], weight.shape[2:], strict=True)
        )
        return x.shape[0], weight.shape[1 if self.transposed else 0], height, width

    @property
    def zeros(self) -> int:
        """Padding that the convolution itself adds."""
        return self.padding if self.padding_mode == "zeros" else 0


def in_channels_last(x: Tensor) -> bool:
    """Whether it can be read so; a single channel or pixel can be read either way."""
    return x.is_contiguous(memory_format=torch.channels_last)
