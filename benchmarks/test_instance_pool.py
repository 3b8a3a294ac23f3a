"""The encoder's pooling of a 2048x1024 image with three features and a hundred instances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from p2pfast.models.pix2pixhd import instance_mean
from p2pfast.ops.instance_pool.op import instance_pool


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_instance_pool(compare: Callable[..., None], layout: torch.memory_format) -> None:
    x = torch.randn(1, 3, 1024, 2048).contiguous(memory_format=layout)
    blocks = torch.randint(0, 100, (1, 1, 16, 32))
    ids = blocks.repeat_interleave(64, 2).repeat_interleave(64, 3).to(torch.int32)
    torch.testing.assert_close(instance_pool(x, ids), instance_mean(x, ids))
    compare(
        lambda: instance_pool(x, ids),
        lambda: instance_mean(x, ids),
        bytes_moved=2 * x.nbytes + ids.nbytes,
    )
