"""The host's side of the CUDA convolution from labels: what it refuses, and sizes beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from p2pfast import _C
from p2pfast.ops.label_conv import label_conv
from p2pfast.ops.label_conv.cuda import LabelConvGeometry

needs_cuda_build = pytest.mark.skipif(not hasattr(_C, "cuda_label_conv"), reason="built without CUDA kernels")
GOOD: dict[str, Any] = {
    "labels": 4096,
    "label_bytes": 1,
    "edges": 4096,
    "packed": 4096,
    "out": 4096,
    "type": 0,
    "out_stride": 32,
    "scratch": 4096,
    "device": 0,
    "stream": 0,
}
BAD: list[tuple[dict[str, int], str]] = [
    ({"labels": 0}, "labels is null"),
    ({"label_bytes": 3}, "labels has elements of 3 bytes; they must have 1, 2, 4 or 8"),
    ({"labels": 4098, "label_bytes": 4}, "labels is not aligned to its element size of 4"),
    ({"edges": 0}, "edges or ids are to be given exactly when the shape has_edges"),
    ({"ids": 4096, "id_bytes": 4}, "edges and ids are both given"),
    ({"edges": 0, "ids": 4096, "id_bytes": 5}, "ids has elements of 5 bytes"),
    ({"packed": 0}, "packed is null"),
    ({"packed": 4100}, "packed is not aligned to its element size of 16"),
    ({"out": 0}, "out is null"),
    ({"out": 4098}, "out is not aligned"),
    ({"type": 3}, "type is 3; it must be 0"),
    ({"out_stride": 31}, "out_stride is 31; it must be at least cout"),
    ({"scratch": 0}, "scratch is null"),
    ({"scratch": 4100}, "scratch is not aligned"),
    ({"row_begin": 9, "row_end": 9}, "row_begin is 9; it must be below row_end"),
    ({"row_begin": -1}, "row_begin is -1"),
    ({"row_end": 17}, "row_end is 17; it must not be above the output's height"),
    ({"device": -1}, "device is -1"),
]


def shape(**changes: int) -> Any:
    size = {"batch": 1, "height": 32, "width": 64, "classes": 35, "cout": 32, "kernel": 7, "pool_levels": 1}
    return _C.LabelConvShape(**{**size, "has_edges": True, **changes})


@needs_cuda_build
@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_arguments(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.cuda_label_conv(shape(), **(GOOD | change))


@needs_cuda_build
def test_arguments_of_the_shape() -> None:
    with pytest.raises(ValueError, match="band_rows is 4; it must be 0"):
        _C.cuda_label_conv(shape(band_rows=4), **GOOD)
    with pytest.raises(ValueError, match="classes is 256; uniform marks"):
        _C.cuda_label_conv(shape(classes=256), **GOOD, uniform=4096)
    with pytest.raises(ValueError, match="64 bits; split the batch"):
        _C.cuda_label_conv_sizes(shape(batch=1 << 31, height=1 << 20, width=1 << 20))
    with pytest.raises(ValueError, match="more than CUDA starts at a time; split the batch"):
        _C.cuda_label_conv(shape(batch=1 << 16, height=8192, width=8192), **GOOD)
    for name in ("weight", "packed"):
        with pytest.raises(ValueError, match=f"{name} is null"):
            numbers = {"weight": 4096, "bias": 0, "packed": 4096, name: 0}
            _C.cuda_label_conv_pack(shape(), **numbers, device=0, stream=0)


@needs_cuda_build
def test_sizes_beyond_32_bits() -> None:
    large = shape(batch=64, height=4096, width=8192)
    sizes = _C.cuda_label_conv_sizes(large)
    pixels = 64 * 2048 * 4096
    assert (sizes["out_height"], sizes["out_width"]) == (2048, 4096)
    assert sizes["parts"] == 256 * 64 == _C.cuda_label_conv_parts(rows=2048, width=4096)
    assert sizes["scratch_bytes"] == pixels * (2 + 2 + 10 * 8) > 1 << 32
    assert sizes["packed_floats"] == _C.LabelConvLayout(large).packed_floats
    assert _C.cuda_label_conv_parts(rows=9, width=65) == 4


@needs_cuda_build
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_a_gpu_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"label_conv: .*\(cudaError.*NVIDIA GPU and a driver"):
        _C.cuda_label_conv(shape(), **GOOD)
    with pytest.raises(RuntimeError, match=r"label_conv: .*\(cudaError.*NVIDIA GPU and a driver"):
        _C.cuda_label_conv_pack(shape(), weight=4096, bias=0, packed=4096, device=0, stream=0)


@needs_cuda_build
def test_an_empty_batch_needs_no_gpu() -> None:
    _C.cuda_label_conv(shape(batch=0), **(GOOD | {"labels": 0, "out": 0}))


def test_tables_do_not_depend_on_the_size_of_the_map() -> None:
    geometry = LabelConvGeometry(num_classes=35, cout=32, kernel=7, pool_levels=2)
    small, large = (_C.LabelConvLayout(geometry.shape(n, 28 * n, 64 * n, True)).packed_floats for n in (1, 9))
    assert small == large


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        labels = torch.empty(2, 32, 64, dtype=torch.int64, device="cuda")
        edges = torch.empty(2, 32, 64, dtype=torch.uint8, device="cuda")
        weight = torch.empty(20, 36, 7, 7, device="cuda")
        y = label_conv(labels, edges, weight, None, 35, 1, dtype=torch.float16)
        assert y.shape == (2, 20, 16, 32) and y.dtype == torch.float16 and y.device.type == "cuda"
        assert y.is_contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="weight is on cpu, labels on cuda"):
            label_conv(labels, edges, weight.cpu(), None, 35)
