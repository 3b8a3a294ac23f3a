"""A 2048x1024 generator output to 8-bit pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from p2pfast.ops.image_uint8.op import image_uint8
from p2pfast.ops.image_uint8.reference import image_uint8_reference


@pytest.mark.parametrize("tanh", [False, True], ids=["plain", "tanh"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_image_uint8(
    compare: Callable[..., None], dtype: torch.dtype, layout: torch.memory_format, tanh: bool
) -> None:
    x = torch.randn(1, 3, 1024, 2048).clamp(-1, 1).to(dtype, memory_format=layout)
    pixels = image_uint8(x, tanh)
    steps = (pixels.int() - image_uint8_reference(x, tanh).int()).abs()
    assert steps.max() <= int(tanh) and (steps > 0).float().mean() < 1e-4
    compare(
        lambda: image_uint8(x, tanh),
        lambda: image_uint8_reference(x, tanh),
        bytes_moved=x.nbytes + pixels.nbytes,
    )
