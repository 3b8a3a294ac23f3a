from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from p2pfast import _C
from p2pfast.ops.image_uint8 import image_uint8, image_uint8_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 64


def assert_same(y: Tensor, x: Tensor, tanh: bool) -> None:
    """Equal to the reference; after tanh, off by one is allowed where tanh(x) is within 1e-6 of a step."""
    expected = image_uint8_reference(x, tanh)
    assert y.dtype == torch.uint8 and y.shape == expected.shape and y.is_contiguous()
    if not tanh:
        assert torch.equal(y, expected)
        return
    value = (torch.tanh(x.double()).permute(0, 2, 3, 1) + 1) / 2 * 255
    near = (value - value.round()).abs() <= 1e-6 * 127.5
    different = y != expected
    assert not (different & ~near).any()
    assert ((y.int() - expected.int()).abs() <= 1).all()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in every memory layout that the kernel treats differently."""
    images, channels, height, width = x.shape
    lanes = x.new_full((images, height, width, 16), torch.nan)
    lanes[..., :channels] = x.permute(0, 2, 3, 1)
    wide = x.new_full((images, channels, height + 1, width + 3), torch.nan)
    wide[:, :, :height, :width] = x
    return {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "padded lanes": lanes[..., :channels].permute(0, 3, 1, 2),
        "crop": wide[:, :, :height, :width],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "batch inside": x.transpose(0, 3).contiguous().transpose(0, 3),
    }


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_matches_the_reference(cpu_level: str, channels: int, dtype: torch.dtype, tanh: bool) -> None:
    for size in ((1, 1), (1, 5), (7, 1), (3, 17), (5, 300), (70, 259)):
        x = (torch.randn(2, channels, *size) * 0.8).to(dtype)
        for name, view in layouts(x).items():
            assert torch.equal(view, x), name
            assert_same(image_uint8(view, tanh), x, tanh)


def test_every_value_of_the_small_dtypes(cpu_level: str) -> None:
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).view(1, 1, 256, 256)
        for tanh in (False, True):
            assert_same(image_uint8(x, tanh), x, tanh)


def test_values_around_every_step(cpu_level: str) -> None:
    steps = torch.arange(-2, 259, dtype=torch.float64) / 255 * 2 - 1
    bits = steps.float().view(torch.int32)[:, None] + torch.arange(-8, 9, dtype=torch.int32)
    x = bits.view(torch.float32)[None, None].contiguous()
    assert_same(image_uint8(x), x, False)


def test_tanh_everywhere(cpu_level: str) -> None:
    x = torch.cat([torch.linspace(-20, 20, 200_001), torch.linspace(-1e-3, 1e-3, 20_001)])[None, None, None]
    assert_same(image_uint8(x, True), x, True)


@pytest.mark.parametrize("tanh", [False, True])
def test_special_values(cpu_level: str, tanh: bool) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -1, 1, 0, -0.0, 3e38, -3e38, 1e-45])
    expected = torch.tensor([0, 255, 0, 0, 255, 127, 127, 255, 0, 127], dtype=torch.uint8)
    if tanh:
        expected[3:5] = image_uint8_reference(x[None, None, None], True).flatten()[3:5]
    for dtype in DTYPES:
        y = image_uint8(x.to(dtype)[None, None, None], tanh)
        assert torch.equal(y.flatten(), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 600)),
    st.sampled_from(DTYPES),
    st.permutations([0, 1, 2, 3]),
    st.booleans(),
)
def test_any_shape_and_strides(
    shape: tuple[int, ...], dtype: torch.dtype, order: list[int], tanh: bool
) -> None:
    back = [order.index(i) for i in range(4)]
    x = (torch.rand(shape) * 2.4 - 1.2).to(dtype).permute(order).contiguous().permute(back)
    assert_same(image_uint8(x, tanh), x, tanh)


def test_guards(cpu_level: str) -> None:
    for channels in (1, 3, 4):
        for width in (1, 5, 255, 256, 257):
            x = torch.randn(1, channels, 2, width)
            size = 2 * width * channels
            whole = torch.full((size + 2 * GUARD,), 77, dtype=torch.uint8)
            _C.image_uint8(
                data=x.data_ptr(),
                type=0,
                images=1,
                channels=channels,
                height=2,
                width=width,
                image_stride=x.stride(0),
                channel_stride=x.stride(1),
                row_stride=x.stride(2),
                pixel_stride=x.stride(3),
                tanh=False,
                out=whole.data_ptr() + GUARD,
            )
            assert (whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all()
            assert torch.equal(whole[GUARD:-GUARD], image_uint8_reference(x).flatten())


def test_no_pixels() -> None:
    assert image_uint8(torch.empty(0, 3, 4, 5)).shape == (0, 4, 5, 3)
    assert image_uint8(torch.empty(2, 3, 0, 5)).shape == (2, 0, 5, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 5).to(dtype)
    for view in (x, x.to(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.p2pfast.image_uint8.default, (view, True))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), TypeError, "x has dtype torch.float64"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, "x has dtype torch.uint8"),
        (torch.zeros(3, 4, 4), ValueError, r"x has shape \(3, 4, 4\)"),
        (torch.zeros(1, 5, 4, 4), ValueError, "1 to 4 channels"),
        (torch.zeros(1, 0, 4, 4), ValueError, "1 to 4 channels"),
    ],
)
def test_bad_arguments(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        image_uint8(x)


# The native entry points check what they are given before they touch memory.
GOOD: dict[str, Any] = {
    "data": 64,
    "type": 0,
    "images": 1,
    "channels": 3,
    "height": 2,
    "width": 2,
    "image_stride": 12,
    "channel_stride": 4,
    "row_stride": 2,
    "pixel_stride": 1,
    "tanh": False,
    "out": 64,
}
BAD_NUMBERS = [
    ("type", 3, "type is 3; it must be"),
    ("channels", 5, "channels is 5; it must be"),
    ("images", -1, "images is -1; it must not"),
    ("height", -1, "height is -1; it must not"),
    ("width", -1, "width is -1; it must not"),
    ("out", 0, "null"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_NUMBERS)
def test_native_checks(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.image_uint8(**{**GOOD, field: value})


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        y = image_uint8(torch.empty(2, 3, 5, 7, dtype=torch.bfloat16, device="cuda"))
    assert y.shape == (2, 5, 7, 3) and y.dtype == torch.uint8 and y.device.type == "cuda"


@pytest.mark.skipif(not hasattr(_C, "cuda_image_uint8"), reason="built without CUDA kernels")
class TestCuda:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            *BAD_NUMBERS,
            ("data", 66, "data is not aligned to its element size of 4"),
            ("device", -1, "device is -1"),
            ("height", 1 << 50, "more than CUDA starts at a time; split the batch"),
        ],
    )
    def test_arguments(self, field: str, value: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _C.cuda_image_uint8(**{**GOOD, "device": 0, "stream": 0, field: value})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_launch_without_a_gpu_is_a_clear_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"image_uint8: .*\(cudaError.*NVIDIA GPU and a driver"):
            _C.cuda_image_uint8(**GOOD, device=0, stream=0)

    def test_nothing_to_do_needs_no_gpu(self) -> None:
        _C.cuda_image_uint8(**{**GOOD, "height": 0, "data": 0, "out": 0}, device=0, stream=0)

    @pytest.mark.gpu
    @pytest.mark.parametrize("tanh", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_matches_the_reference(self, channels: int, dtype: torch.dtype, tanh: bool) -> None:
        for size in ((1, 1), (1, 5), (7, 1), (3, 17), (70, 260)):
            x = (torch.randn(2, channels, *size) * 0.8).to(dtype)
            for view in layouts(x.cuda()).values():
                assert_same(image_uint8(view, tanh).cpu(), x, tanh)

    @pytest.mark.gpu
    def test_every_value_of_the_small_dtypes(self) -> None:
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
        for dtype in (torch.bfloat16, torch.float16):
            x = bits.view(dtype).view(1, 1, 256, 256)
            assert_same(image_uint8(x.cuda()).cpu(), x, False)
