"""Means over instances: kernels against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from p2pfast import _C, functional
from p2pfast.models.pix2pixhd import instance_mean
from p2pfast.ops.instance_pool import instance_pool, instance_pool_reference
from p2pfast.ops.instance_pool.op import sorted_regions

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ID_DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 9), (3, 35, 5, 4), (1, 2, 64, 70)]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, instances: int = 5
) -> tuple[Tensor, Tensor]:
    """Features around 20 and ids, negative and beyond 32 bits among them."""
    features = (torch.randn(shape) + 20).to(dtype)
    ids = torch.randint(0, instances, (shape[0], 1, *shape[2:])) * 6_000_000_007 - 9
    return features, ids


def assert_close(y: Tensor, features: Tensor, ids: Tensor) -> None:
    expected = instance_pool_reference(features.double(), ids)
    assert y.dtype == features.dtype and y.shape == features.shape
    torch.testing.assert_close(y.double(), expected, rtol=ROUNDING[y.dtype], atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    features, ids = make(shape, dtype)
    assert_close(instance_pool(features, ids), features, ids)
    last = features.contiguous(memory_format=torch.channels_last)
    y = instance_pool(last, ids[:, 0])
    assert y.stride() == last.stride()
    assert_close(y, features, ids)


def test_is_what_the_encoder_does() -> None:
    features, ids = make((2, 3, 16, 20))
    torch.testing.assert_close(functional.instance_pool(features, ids), instance_mean(features, ids))


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_ids_of_every_integer_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(2, 2, 6, 8)
    ids = torch.randint(0, 4, (2, 6, 8)).to(dtype)
    expected = instance_pool_reference(features, ids.to(torch.int64))
    torch.testing.assert_close(instance_pool(features, ids), expected)
    torch.testing.assert_close(instance_pool_reference(features, ids), expected)


def test_an_instance_a_pixel_and_views() -> None:
    features = torch.randn(2, 3, 40, 50)
    each = torch.arange(4000).view(2, 40, 50)
    assert torch.equal(instance_pool(features, each), features)
    turned, ids = features.transpose(2, 3), each.transpose(1, 2) // 7
    torch.testing.assert_close(instance_pool(turned, ids), instance_pool_reference(turned, ids))


def test_same_bits_with_any_number_of_threads() -> None:
    features, ids = make((2, 33, 40, 41))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(instance_pool(features, ids))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_nan_stays_within_its_instance() -> None:
    features, ids = torch.ones(1, 1, 4, 4), torch.arange(16).view(1, 4, 4) // 4
    features[0, 0, 1, 2] = torch.nan
    assert torch.equal(
        instance_pool(features, ids).isnan()[0, 0].all(1), torch.tensor([False, True, False, False])
    )


def test_gradients() -> None:
    features, ids = make((2, 2, 5, 6))
    x = features.requires_grad_()
    weight = torch.randn(x.shape)
    found = []
    for function in (instance_pool, instance_pool_reference):
        y = function(x, ids)
        (first,) = torch.autograd.grad((y.square() * weight).sum(), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    features, ids = make((2, 3, 4, 5), dtype)
    op = torch.ops.p2pfast.instance_pool.default
    torch.library.opcheck(op, (features.requires_grad_(), ids))
    torch.library.opcheck(op, (features.detach().to(memory_format=torch.channels_last), ids[:, 0]))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    ids = torch.zeros(shape[0], *shape[2:], dtype=torch.int32)
    assert instance_pool(torch.empty(shape), ids).shape == shape
    assert instance_pool_reference(torch.empty(shape), ids).shape == shape


BAD = [
    ({"features": torch.zeros(2, 3, 4, 5).double()}, TypeError, "features has dtype torch.float64"),
    ({"features": torch.zeros(3, 4, 5)}, ValueError, r"features has shape \(3, 4, 5\)"),
    ({"ids": torch.zeros(2, 4, 5)}, TypeError, "ids has dtype torch.float32"),
    (
        {"ids": torch.zeros(2, 4, 6, dtype=torch.int32)},
        ValueError,
        r"ids has shape \(2, 4, 6\).*\(2, 4, 5\) or",
    ),
    ({"ids": torch.zeros(2, 4, 5, dtype=torch.int32, device="meta")}, ValueError, "ids is on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m for _, _, m in BAD])
def test_bad_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {"features": torch.zeros(2, 3, 4, 5), "ids": torch.zeros(2, 4, 5, dtype=torch.int32)}
    with pytest.raises(error, match=message):
        instance_pool(**(good | change))


def test_sorted_regions() -> None:
    """What the CUDA kernels are given: every pixel once, a region a run, chunks counted up."""
    ids = torch.tensor([[[7, -2, 7], [7, 7, 3]], [[7, 7, 7], [7, 7, 7]]], dtype=torch.int16)
    found = sorted_regions(ids, 2, 3)
    assert found.order.tolist() == [1, 5, 0, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert found.region.tolist() == [2, 0, 2, 2, 2, 1, 3, 3, 3, 3, 3, 3]
    assert found.start.tolist() == [0, 1, 2, 6, 12]
    assert found.first_chunk.tolist() == [0, 1, 2, 4, 6]
    assert sorted_regions(torch.tensor([[[65535, 1]]]).to(torch.uint16), 1, 8).start.tolist() == [0, 1, 2]


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        features = torch.empty(2, 3, 5, 7, dtype=torch.bfloat16, device="cuda")
        y = instance_pool(features, torch.empty(2, 5, 7, dtype=torch.int32, device="cuda"))
        assert y.shape == features.shape and y.dtype == features.dtype and y.device.type == "cuda"


@pytest.mark.skipif(not hasattr(_C, "cuda_instance_pool"), reason="built without CUDA kernels")
class TestCuda:
    GOOD: dict[str, Any] = {
        **dict.fromkeys(("features", "out", "region", "order", "start", "first_chunk"), 4096),
        **{"partials": 4096, "means": 4096, "type": 0, "images": 2, "channels": 3, "pixels": 20},
        **{"image_stride": 60, "channel_stride": 20, "pixel_stride": 1, "regions": 4, "chunks": 4},
        **{"device": 0, "stream": 0},
    }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"type": 3}, "type is 3; it must be"),
            ({"images": -1}, "images is -1"),
            ({"channels": -1}, "channels is -1"),
            ({"pixels": -1}, "pixels is -1"),
            ({"pixels": 1 << 61}, "64 bits"),
            ({"regions": 0}, "regions is 0; it must be from 1 to"),
            ({"regions": 41}, "regions is 41; it must be from 1 to"),
            ({"chunks": 0}, "chunks is 0; it must be from 1 to"),
            *(
                ({n: 0}, f"{n} is null")
                for n in ("features", "out", "region", "order", "start", "first_chunk", "partials", "means")
            ),
            ({"order": 4100}, "order is not aligned to its element size of 8"),
            ({"out": 4097}, "out is not aligned"),
            ({"device": -1}, "device is -1"),
            ({"pixels": 1 << 45}, "more than CUDA starts at a time; split the batch"),
        ],
    )
    def test_arguments(self, change: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _C.cuda_instance_pool(**(self.GOOD | change))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_launch_without_a_gpu_is_a_clear_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"instance_pool: .*\(cudaError.*NVIDIA GPU and a driver"):
            _C.cuda_instance_pool(**self.GOOD)

    def test_nothing_to_do_needs_no_gpu(self) -> None:
        _C.cuda_instance_pool(**(self.GOOD | {"channels": 0, "features": 0, "out": 0}))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [*SHAPES, (2, 3, 130, 140)])
    def test_matches_the_reference(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        features, ids = make(shape, dtype)
        for x in (features, features.contiguous(memory_format=torch.channels_last)):
            y = instance_pool(x.cuda(), ids.cuda())
            assert y.stride() == x.stride()
            assert_close(y.cpu(), features, ids)
            assert torch.equal(y, instance_pool(x.cuda(), ids.cuda()))

    @pytest.mark.gpu
    def test_gradients(self) -> None:
        features, ids = make((2, 2, 65, 66))
        x = features.cuda().requires_grad_()
        weight = torch.randn(x.shape).cuda()
        (got,) = torch.autograd.grad((instance_pool(x, ids.cuda()) * weight).sum(), x)
        assert_close(got.cpu() + 20, weight.cpu() + 20, ids)
