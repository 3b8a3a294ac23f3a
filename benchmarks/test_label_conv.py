from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.data.scenes import draw_scene
from p2pfast.ops.instance_edges import instance_edges
from p2pfast.ops.label_conv import label_conv_reference

CLASSES = 35
HEIGHT, WIDTH = 1024, 2048
# The first layers of the LocalEnhancer: 36 -> 32 at full and 36 -> 64 at half resolution.
LAYERS = {"local": (32, 0), "global": (64, 1)}


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor]:
    drawn = draw_scene(0, WIDTH, HEIGHT, photo=False)
    labels = torch.from_numpy(drawn.labels).to(torch.uint8)[None]
    return labels, instance_edges(torch.from_numpy(drawn.instances)[None])


class Planned:
    """The kernel as a plan calls it: tables and memory made once, statistics in bands of 16 rows."""

    def __init__(
        self, labels: Tensor, edges: Tensor, weight: Tensor, pool_levels: int, dtype: torch.dtype
    ) -> None:
        self.labels, self.edges, self.dtype = labels, edges, dtype
        self.shape: Any = _C.LabelConvShape(
            batch=1,
            height=HEIGHT,
            width=WIDTH,
            classes=CLASSES,
            has_edges=True,
            cout=weight.shape[0],
            kernel=7,
            pool_levels=pool_levels,
            band_rows=16,
        )
        layout = _C.LabelConvLayout(self.shape)
        self.packed = torch.empty(layout.packed_floats)
        _C.label_conv_pack(self.shape, weight=weight.data_ptr(), bias=0, packed=self.packed.data_ptr())
        self.out = torch.zeros(1, layout.out_height, layout.out_width, layout.stride, dtype=dtype)
        self.partials = torch.zeros(layout.partial_floats)
        self.uniform = torch.zeros(layout.uniform_bytes, dtype=torch.uint8)
        self.scratch = torch.empty(layout.scratch_bytes, dtype=torch.uint8)

    def __call__(self) -> Tensor:
        _C.label_conv(
            self.shape,
            labels=self.labels.data_ptr(),
            edges=self.edges.data_ptr(),
            packed=self.packed.data_ptr(),
            out=self.out.data_ptr(),
            out_bf16=self.dtype == torch.bfloat16,
            scratch=self.scratch.data_ptr(),
            partials=self.partials.data_ptr(),
            uniform=self.uniform.data_ptr(),
        )
        return self.out.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_label_conv(
    benchmark: Any, compare: Callable[..., None], scene: tuple[Tensor, Tensor], layer: str, dtype: torch.dtype
) -> None:
    labels, edges = scene
    cout, pool_levels = LAYERS[layer]
    weight = torch.randn(cout, CLASSES + 1, 7, 7, generator=torch.Generator().manual_seed(0)) * 0.03
    planned = Planned(labels, edges, weight, pool_levels, dtype)

    def dense() -> Tensor:
        return label_conv_reference(labels, edges, weight, None, CLASSES, pool_levels)

    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(planned().float(), dense(), rtol=tolerance, atol=tolerance)
    compare(planned, dense, bytes_moved=labels.nbytes + edges.nbytes + planned.out.nbytes, rounds=20)
    benchmark.extra_info["uniform_windows"] = (planned.uniform != 255).float().mean().item()
