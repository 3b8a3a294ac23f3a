"""Instance edges of a drawn 2048x1024 street."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from p2pfast.data.scenes import draw_scene
from p2pfast.ops.instance_edges.op import instance_edges
from p2pfast.ops.instance_edges.reference import instance_edges_reference


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_instance_edges(compare: Callable[..., None], dtype: torch.dtype) -> None:
    scene = draw_scene(0, photo=False)
    ids = torch.from_numpy(np.asarray(scene.instances).astype(np.int64))[None].to(dtype)
    edges = instance_edges(ids)
    assert torch.equal(edges, instance_edges_reference(ids))
    compare(
        lambda: instance_edges(ids),
        lambda: instance_edges_reference(ids),
        bytes_moved=ids.nbytes + edges.nbytes,
    )
