from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

GUARD = 256


class Buffers:
    """Memory for kernels to write: filled with NaN, and with guard bytes around each buffer."""

    def __init__(self) -> None:
        self.whole: list[Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        # Bytes of 255 are a NaN in every floating-point dtype.
        whole = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8)
        self.whole.append(whole)
        return whole[GUARD : GUARD + size].view(dtype).view(shape)

    def check(self) -> None:
        for whole in self.whole:
            assert (whole[:GUARD] == 255).all(), "written before the buffer"
            assert (whole[-GUARD:] == 255).all(), "written past the buffer"


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    """Allocates guarded buffers, and checks the guards after the test."""
    made = Buffers()
    yield made
    made.check()
