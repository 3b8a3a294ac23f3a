from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfast import _C
from p2pfast.ops.instance_edges import instance_edges, instance_edges_reference

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
]
SHAPES = [
    (1, 1, 1),
    (1, 1, 7),
    (1, 7, 1),
    (2, 2, 2),
    (1, 3, 17),
    (3, 5, 33),
    (2, 16, 64),
    (1, 70, 1030),
    (2, 3, 4, 129),
]


def naive(ids: np.ndarray) -> np.ndarray:
    """A loop over pixels and neighbours, independent of the vectorised reference."""
    out = np.zeros(ids.shape, np.uint8)
    height, width = ids.shape[-2:]
    for *image, y, x in np.ndindex(ids.shape):
        for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            v, u = y + dy, x + dx
            if 0 <= v < height and 0 <= u < width and ids[(*image, v, u)] != ids[(*image, y, x)]:
                out[(*image, y, x)] = 1
    return out


def blocks(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Rectangles of equal ids, as instance maps have them."""
    *batch, height, width = shape
    small = torch.randint(0, 100, (*batch, -(-height // 3), -(-width // 5)))
    large = small.repeat_interleave(3, -2).repeat_interleave(5, -1)[..., :height, :width]
    return large.to(dtype)


@pytest.mark.parametrize("shape", [s for s in SHAPES if np.prod(s) < 5000])
def test_reference_matches_the_loop(shape: tuple[int, ...]) -> None:
    ids = blocks(shape)
    assert np.array_equal(instance_edges_reference(ids).numpy(), naive(ids.numpy()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cpu_level: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids = blocks(shape, dtype)
    edges = instance_edges(ids)
    assert edges.dtype == torch.uint8 and edges.shape == ids.shape and edges.is_contiguous()
    assert torch.equal(edges, instance_edges_reference(ids))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_ids(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]))
    info = np.iinfo(dtype)
    values = st.sampled_from([info.min, info.max, 0, 1])
    flat = data.draw(st.lists(values, min_size=height * width, max_size=height * width))
    ids = np.array(flat, dtype).reshape(1, height, width)
    assert np.array_equal(instance_edges(torch.from_numpy(ids)).numpy(), naive(ids))


def test_writes_every_pixel(cpu_level: str) -> None:
    ids = blocks((2, 13, 77))
    out = torch.full((2, 13, 77 + 3), 255, dtype=torch.uint8).flatten()
    _C.instance_edges(
        ids=ids.data_ptr(),
        element_size=4,
        edges=out.data_ptr(),
        images=2,
        height=13,
        width=77,
        image_stride=ids.stride(0),
        row_stride=ids.stride(1),
    )
    used = 2 * 13 * 77
    assert torch.equal(out[:used].view(2, 13, 77), instance_edges_reference(ids))
    assert (out[used:] == 255).all()


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        (torch.int64, 26001 + (1 << 32), 26001),
        (torch.uint16, 40000, 40001),
        (torch.int32, 2**24, 2**24 + 1),
        (torch.uint64, 2**63 - 1, 2**62),
        (torch.int16, -32768, 32767),
    ],
    ids=str,
)
def test_ids_that_narrower_or_floating_types_merge(dtype: torch.dtype, a: int, b: int) -> None:
    ids = torch.tensor([[[a, a, b, b]]], dtype=dtype)
    assert instance_edges(ids).tolist() == [[[0, 1, 1, 0]]]


VIEWS = {
    "crop": lambda t: t[:, 2:9, 3:20],
    "transposed": lambda t: t.transpose(1, 2),
    "every second column": lambda t: t[:, :, ::2],
    "every second row": lambda t: t[:, ::2],
    "expanded batch": lambda t: t[:1].expand(4, -1, -1),
    "one column": lambda t: t[:, :, 3:4],
    "batch of a channel": lambda t: t.unsqueeze(1),
    "channels last": lambda t: (
        t.unsqueeze(1).expand(-1, 2, -1, -1).contiguous(memory_format=torch.channels_last)
    ),
    "odd offset": lambda t: t.flatten()[1 : 1 + 2 * 5 * 7].view(2, 5, 7),
    "two dimensions": lambda t: t[0],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    ids = VIEWS[view](blocks((2, 12, 31)))
    assert torch.equal(instance_edges(ids), instance_edges_reference(ids))


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert instance_edges(torch.zeros(shape, dtype=torch.int32)).shape == shape


def test_is_the_same_with_any_number_of_threads() -> None:
    ids = blocks((2, 300, 700))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(instance_edges(ids), instance_edges_reference(ids))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64], ids=str)
def test_refuses_other_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="ids has dtype"):
        instance_edges(torch.zeros(1, 4, 4, dtype=dtype))


def test_refuses_a_vector() -> None:
    with pytest.raises(ValueError, match=r"ids has shape \(4,\)"):
        instance_edges(torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint16, torch.int64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.p2pfast.instance_edges.default
    torch.library.opcheck(op, (blocks((2, 5, 9), dtype),))
    torch.library.opcheck(op, (blocks((2, 5, 9), dtype)[:, ::2, ::2],))


def test_compiles_without_a_graph_break() -> None:
    ids = blocks((1, 1, 8, 12))
    compiled = torch.compile(lambda t: instance_edges(t).float() * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), instance_edges_reference(ids).float() * 2)


def test_fake_and_meta() -> None:
    edges = torch.ops.p2pfast.instance_edges(torch.empty(2, 1, 8, 9, dtype=torch.int32, device="meta"))
    assert edges.shape == (2, 1, 8, 9) and edges.dtype == torch.uint8


# The native entry points check what they are given before they touch memory.
GOOD = {
    "ids": 4096,
    "element_size": 4,
    "edges": 4096,
    "images": 1,
    "height": 2,
    "width": 2,
    "image_stride": 4,
    "row_stride": 2,
}
BAD = [
    ({"images": -1}, "images is -1"),
    ({"height": -2}, "height is -2"),
    ({"width": -3}, "width is -3"),
    ({"element_size": 3}, "element_size is 3"),
    ({"ids": 0}, "ids is a null pointer"),
    ({"edges": 0}, "edges is a null pointer"),
    ({"ids": 4097}, "not aligned"),
    ({"images": 1 << 40, "height": 1 << 40}, "64 bits"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_native_arguments(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.instance_edges(**(GOOD | wrong))


@pytest.mark.skipif(not hasattr(_C, "cuda_instance_edges"), reason="built without CUDA kernels")
class TestCuda:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            *BAD,
            ({"device": -1}, "device is -1"),
            ({"images": 1 << 20, "height": 1 << 20}, "more than CUDA starts at a time; split the batch"),
        ],
    )
    def test_arguments(self, wrong: dict[str, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _C.cuda_instance_edges(**(GOOD | {"device": 0, "stream": 0} | wrong))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_launch_without_a_gpu_is_a_clear_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"instance_edges: .*\(cudaError.*NVIDIA GPU and a driver"):
            _C.cuda_instance_edges(**GOOD, device=0, stream=0)

    def test_nothing_to_do_needs_no_gpu(self) -> None:
        _C.cuda_instance_edges(**(GOOD | {"height": 0, "ids": 0, "edges": 0}), device=0, stream=0)

    @pytest.mark.gpu
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_the_reference(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        ids = blocks(shape, dtype)
        assert torch.equal(instance_edges(ids.cuda()).cpu(), instance_edges_reference(ids))

    @pytest.mark.gpu
    @pytest.mark.parametrize("view", VIEWS)
    def test_views(self, view: str) -> None:
        ids = VIEWS[view](blocks((2, 12, 31)).cuda())
        assert torch.equal(instance_edges(ids).cpu(), instance_edges_reference(ids.cpu()))

    @pytest.mark.gpu
    def test_other_streams(self) -> None:
        ids = blocks((1, 512, 1024)).cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            edges = instance_edges(ids)
        stream.synchronize()
        assert torch.equal(edges.cpu(), instance_edges_reference(ids.cpu()))
