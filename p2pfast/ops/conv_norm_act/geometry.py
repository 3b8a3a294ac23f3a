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

    @property
    def zeros(self) -> int:
        """Padding that the convolution itself adds."""
        return self.padding if self.padding_mode == "zeros" else 0


def in_channels_last(x: Tensor) -> bool:
    """Whether it can be read so; a single channel or pixel can be read either way."""
    return x.is_contiguous(memory_format=torch.channels_last)
