"""Statistics, their merge, normalisation and pooling: the kernels and the operator."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.norm import instance_norm_act, instance_norm_act_reference

Alloc = Callable[..., Tensor]
SIZES = [(2, 3, 5, 7), (1, 20, 17, 40), (3, 33, 4, 1), (1, 130, 3, 33), (1, 64, 35, 9)]


def padded(channels: int) -> int:
    return -(-channels // 16) * 16


def view(
    alloc: Alloc, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    """An (N, C, H, W) view of guarded memory and the fields that describe it; padding lanes stay NaN."""
    images, channels, height, width = shape
    if layout == "nchw":
        t = alloc(*shape, dtype=dtype)
        strides = (channels * height * width, width, 1, height * width)
    else:
        room = padded(channels) if layout == "padded" else channels
        t = alloc(images, height, width, room, dtype=dtype)[..., :channels].permute(0, 3, 1, 2)
        strides = (height * width * room, width * room, room, 1)
    names = ("image_stride", "row_stride", "pixel_stride", "channel_stride")
    fields = {"data": t.data_ptr(), "dtype": int(dtype == torch.bfloat16)}
    return t, fields | dict(zip(names, strides, strict=True))


def make(
    alloc: Alloc, shape: tuple[int, ...], layout: str, dtype: torch.dtype, offset: float = 0.0
) -> tuple[Tensor, dict[str, Any]]:
    x, fields = view(alloc, shape, layout, dtype)
    x.copy_(torch.randn(shape) + offset)
    return x, fields | {"channels": shape[1]}


def statistics(alloc: Alloc, x: Tensor, source: dict[str, Any]) -> tuple[Tensor, Tensor]:
    images, channels, height, width = x.shape
    call = {"source": source, "images": images, "height": height, "width": width}
    parts = _C.statistics_parts(call)
    partial, count = alloc(images, parts, 2, padded(channels)), alloc(images, parts)
    _C.run_statistics(call | {"partial": partial.data_ptr(), "count": count.data_ptr()})
    return partial, count


def merge(alloc: Alloc, partial: Tensor, count: Tensor, channels: int, **more: Any) -> list[Tensor]:
    """scale, shift, mean and variance."""
    images, parts = count.shape
    results = [alloc(images, padded(channels)) for _ in range(4)]
    names = ("scale", "shift", "mean", "variance")
    call = {"partial": partial.data_ptr(), "count": count.data_ptr(), "images": images, "channels": channels}
    call |= {"parts": parts, "eps": 1e-5}
    call |= {name: t.data_ptr() for name, t in zip(names, results, strict=True)}
    _C.run_merge(call | more)
    assert all((t[:, channels:] == 0).all() for t in results[:2])
    return [t[:, :channels] for t in results]


@pytest.mark.parametrize("layout", ["padded", "dense", "nchw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_statistics(cpu_level: str, buffers: Alloc, shape: Any, dtype: torch.dtype, layout: str) -> None:
    for offset in (0.0, 100.0, 1e4):
        x, source = make(buffers, shape, layout, dtype, offset)
        _, _, mean, variance = merge(buffers, *statistics(buffers, x, source), shape[1])
        exact = x.double()
        torch.testing.assert_close(mean.double(), exact.mean((2, 3)), rtol=1e-6, atol=5e-6)
        expected = exact.var((2, 3), correction=0)
        # The parts' means are float32: far from zero, that bounds how well their differences are known.
        torch.testing.assert_close(variance.double(), expected, rtol=2e-5 + 2e-8 * offset, atol=1e-12)


def test_statistics_of_what_is_used(cpu_level: str, buffers: Alloc) -> None:
    """Of act(scale * x + shift), as a consumer would load it."""
    shape = (2, 20, 9, 11)
    x, source = make(buffers, shape, "padded", torch.float32)
    scale, shift = buffers(2, 32), buffers(2, 32)
    for t in (scale, shift):
        t.copy_(torch.randn(2, 32))
    source |= {
        "scale": scale.data_ptr(),
        "shift": shift.data_ptr(),
        "norm_stride": 32,
        "act": 2,
        "slope": 0.2,
    }
    _, _, mean, variance = merge(buffers, *statistics(buffers, x, source), 20)
    used = x.double() * scale.double()[:, :20, None, None] + shift.double()[:, :20, None, None]
    used = F.leaky_relu(used, 0.2)
    torch.testing.assert_close(mean.double(), used.mean((2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance.double(), used.var((2, 3), correction=0), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("width", [40, 300, 2048])
def test_statistics_of_a_flat_image_with_another_first_pixel(
    cpu_level: str, buffers: Alloc, width: int
) -> None:
    """A zero-padded convolution of a flat image: what is seen first is not what follows."""
    x, source = make(buffers, (1, 16, 32, width), "padded", torch.float32)
    x.fill_(0.3)
    x[:, :, 0, 0] = torch.linspace(-1, 1e3, 16)
    x[:, 8:, :, 1:] += 1e-3 * torch.randn(8, 32, width - 1)
    _, _, mean, variance = merge(buffers, *statistics(buffers, x, source), 16)
    torch.testing.assert_close(mean.double(), x.double().mean((2, 3)), rtol=1e-5, atol=1e-6)
    expected = x.double().var((2, 3), correction=0)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("over_batch", [False, True])
def test_merge(cpu_level: str, buffers: Alloc, over_batch: bool) -> None:
    """Parts of different sizes, empty ones among them, with means far from zero and from each other."""
    images, channels, sizes = 3, 20, [5, 0, 1, 300, 17]
    values = [
        [torch.randn(channels, n, dtype=torch.float64) + 50 * p for p, n in enumerate(sizes)]
        for _ in range(3)
    ]
    partial, count = buffers(images, len(sizes), 2, 32), buffers(images, len(sizes))
    for i, p in itertools.product(range(images), range(len(sizes))):
        count[i, p] = sizes[p]
        if sizes[p]:
            mean = values[i][p].mean(1)
            partial[i, p, 0, :channels] = mean
            partial[i, p, 1, :channels] = ((values[i][p] - mean[:, None]) ** 2).sum(1)
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    more = {"weight": weight.data_ptr(), "bias": bias.data_ptr(), "over_batch": over_batch}
    scale, shift, mean, variance = merge(buffers, partial, count, channels, **more)
    whole = torch.stack([torch.cat(v, 1) for v in values])
    dims = (0, 2) if over_batch else (2,)
    exact_mean, exact = whole.mean(dims), whole.var(dims, correction=0)
    exact_scale = weight.double() / (exact + 1e-5).sqrt()
    close = {"rtol": 1e-5, "atol": 1e-5}
    for got, expected in (
        (mean, exact_mean),
        (variance, exact),
        (scale, exact_scale),
        (shift, bias.double() - exact_mean * exact_scale),
    ):
        torch.testing.assert_close(got.double(), expected.expand(images, channels), **close)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_apply(cpu_level: str, buffers: Alloc, shape: Any) -> None:
    layouts, dtypes = ("padded", "dense", "nchw"), (torch.float32, torch.bfloat16)
    acts = itertools.cycle(
        enumerate((None, F.relu, lambda v: F.leaky_relu(v, 0.3), torch.tanh, torch.sigmoid))
    )
    for layout, out_layout, dtype in itertools.product(layouts, layouts, dtypes):
        code, act = next(acts)
        x, first = make(buffers, shape, layout, dtype, 1.0)
        y, second = make(buffers, shape, layout, dtype)
        images, channels, height, width = shape
        scale, shift = buffers(images, padded(channels)), buffers(images, padded(channels))
        for t in (scale, shift):
            t.copy_(torch.randn(t.shape))
        first |= {"scale": scale.data_ptr(), "shift": shift.data_ptr(), "norm_stride": scale.stride(0)}
        noise = buffers(*shape)
        noise.copy_((torch.rand(shape) > 0.5) * 2.0)
        out, fields = view(buffers, shape, out_layout, dtype)
        call = {"first": first, "second": second | {"act": 1}, "noise": noise.data_ptr(), "images": images}
        call |= {"height": height, "width": width, "out": fields, "act": code, "slope": 0.3}
        _C.run_apply(call)
        wide = x.double() * scale[:, :channels, None, None] + shift[:, :channels, None, None]
        expected = wide * noise + y.double().relu()
        expected = expected if act is None else act(expected)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_apply_in_place(cpu_level: str, buffers: Alloc) -> None:
    x, fields = make(buffers, (2, 70, 5, 50), "padded", torch.float32)
    expected = F.relu(x.clone())
    out = {key: value for key, value in fields.items() if key != "channels"}
    _C.run_apply({"first": fields, "images": 2, "height": 5, "width": 50, "out": out, "act": 1})
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_avg_pool(cpu_level: str, buffers: Alloc, shape: Any) -> None:
    images, channels, height, width = shape
    for (kernel, stride, pad), include, layout, dtype in itertools.product(
        ((3, 2, 1), (2, 2, 0), (3, 1, 1)), (False, True), ("padded", "nchw"), (torch.float32, torch.bfloat16)
    ):
        if min(height, width) + 2 * pad < kernel:
            continue
        x, source = make(buffers, shape, layout, dtype, 1.0)
        expected = F.avg_pool2d(x.double(), kernel, stride, pad, count_include_pad=include)
        out, fields = view(buffers, tuple(expected.shape), layout, dtype)
        call = {"source": source, "images": images, "height": height, "width": width, "out": fields}
        call |= {"out_height": out.shape[2], "out_width": out.shape[3], "kernel": kernel, "stride": stride}
        _C.run_avg_pool(call | {"pad": pad, "count_include_pad": include})
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_same_bits_with_any_number_of_threads(buffers: Alloc) -> None:
    x, source = make(buffers, (2, 70, 40, 50), "padded", torch.float32, 10.0)
    before = _C.num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            _C.set_num_threads(threads)
            results.append(merge(buffers, *statistics(buffers, x, source), 70))
    finally:
        _C.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def variants(channels: int) -> list[dict[str, Any]]:
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    mean, variance = torch.randn(channels), torch.rand(channels) + 0.1
    return [
        {},
        {"weight": weight, "bias": bias, "act": "relu"},
        {"weight": weight, "bias": bias, "over_batch": True, "act": "leaky_relu", "slope": 0.2},
        {"mean": mean, "variance": variance, "weight": weight, "bias": bias, "act": "tanh"},
        {"mean": torch.randn(2, channels), "variance": torch.rand(2, channels) + 0.1, "eps": 1e-3},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_operator(
    cpu_level: str, offset: float, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    for channels in (5, 32):
        x = (torch.randn(2, channels, 11, 13) + offset).to(dtype, memory_format=memory_format)
        for kwargs in variants(channels):
            for residual in (None, torch.randn_like(x)):
                call = kwargs | {"residual": residual}
                double = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
                exact = instance_norm_act_reference(x.double(), **double)
                y = instance_norm_act(x, **call)
                assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
                # Rounding of x * scale and of the shift, each as large as the offset is in deviations.
                bound = (x.double().abs().max() / x.double().std() + 4) * 2**-22
                bound = bound if dtype == torch.float32 else bound + exact.abs().max() * 2**-8
                assert (y.double() - exact).abs().max() <= 16 * bound


def test_operator_reads_any_strides() -> None:
    big = torch.randn(2, 64, 9, 10).contiguous(memory_format=torch.channels_last)
    for x in (big[:, 41:], big[:, 63:], big[:, :5, ::2, 3:4], big[..., ::3], big[:1].expand(3, -1, -1, -1)):
        expected = instance_norm_act_reference(x.double())
        torch.testing.assert_close(instance_norm_act(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_opcheck() -> None:
    x = torch.randn(2, 5, 6, 7)
    for kwargs in variants(5):
        torch.library.opcheck(instance_norm_act, (x,), kwargs | {"residual": torch.randn_like(x)})


BAD = [
    ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.float64)}, TypeError, "x has dtype torch.float64"),
    ({"x": torch.zeros(4, 5, 5)}, ValueError, r"x has shape \(4, 5, 5\)"),
    ({"x": torch.zeros(0, 4, 5, 5)}, ValueError, "an empty batch"),
    ({"x": torch.zeros(1, 4, 0, 5)}, ValueError, "an empty tensor"),
    ({"x": torch.zeros(2, 4, 1, 1)}, ValueError, "one value a channel"),
    ({"weight": torch.zeros(3)}, ValueError, "weight has shape"),
    ({"bias": torch.zeros(4, dtype=torch.int32)}, TypeError, "bias has dtype"),
    ({"mean": torch.zeros(4)}, ValueError, "mean and variance go together"),
    ({"mean": torch.zeros(5), "variance": torch.zeros(5)}, ValueError, "mean has shape"),
    ({"residual": torch.zeros(1, 4, 5, 4)}, ValueError, "residual has shape"),
    ({"residual": torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16)}, TypeError, "residual has dtype"),
    ({"weight": torch.zeros(4, device="meta")}, ValueError, "weight is on meta"),
    ({"eps": -1.0}, ValueError, "eps is -1"),
    ({"act": "mish"}, ValueError, "act is 'mish'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        instance_norm_act(**{"x": torch.zeros(1, 4, 5, 5), **change})


def test_one_value_with_given_statistics_or_over_a_batch() -> None:
    x = torch.randn(2, 4, 1, 1)
    for kwargs in ({"over_batch": True}, {"mean": torch.zeros(4), "variance": torch.ones(4)}):
        expected = instance_norm_act_reference(x.double(), **kwargs)
        torch.testing.assert_close(instance_norm_act(x, **kwargs).double(), expected, rtol=1e-5, atol=1e-5)
