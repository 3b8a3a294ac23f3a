"""The operator: what it accepts and refuses, its registration, and its use from several threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import TESTED_LEVELS
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv import conv, conv_reference
from p2pfast.ops.conv.op import ALGORITHMS


def doubled(kwargs: dict[str, Any]) -> dict[str, Any]:
    def double(v: Any) -> Any:
        if isinstance(v, list):
            return [t.double() for t in v]
        return v.double() if isinstance(v, Tensor) else v

    reference = {k: double(v) for k, v in kwargs.items()}
    reference.pop("algorithm", None)
    return reference


def assert_close(y: Tensor, kwargs: dict[str, Any]) -> None:
    exact = conv_reference(**doubled(kwargs))
    assert y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
    # What a sum loses is relative to its largest terms, not to its value.
    largest = exact.abs().max() + 1
    tolerance = 2**-7 if y.dtype == torch.bfloat16 else 3e-5
    assert (y.double() - exact).abs().max() <= tolerance * largest


def example(**change: Any) -> dict[str, Any]:
    channels = 20
    return {
        "x": torch.randn(2, channels, 9, 10) + 1,
        "weight": torch.randn(24, channels, 3, 3) * 0.1,
        "bias": torch.randn(24),
        "padding": 1,
        "padding_mode": "reflect",
        "scale": torch.rand(2, channels) + 0.5,
        "shift": torch.randn(2, channels),
        "input_act": "leaky_relu",
        "input_slope": 0.2,
        "act": "tanh",
    } | change


@pytest.mark.parametrize("algorithm", ["auto", *ALGORITHMS])
def test_every_algorithm_by_name(cpu_level: str, algorithm: str) -> None:
    kwargs = example(weight=torch.randn(3, 20, 3, 3) * 0.1, bias=None, algorithm=algorithm)
    assert_close(conv(**kwargs), kwargs)


def test_two_inputs_are_a_concatenation() -> None:
    whole = example()
    parts = [whole["x"][:, :7], whole["x"][:, 7:].contiguous(memory_format=torch.channels_last)]
    for algorithm in (a for a in ALGORITHMS if a != "thin"):
        one, two = conv(**whole, algorithm=algorithm), conv(**whole | {"x": parts}, algorithm=algorithm)
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-6)


def test_one_normalisation_for_all_images() -> None:
    kwargs = example(scale=torch.rand(20), shift=torch.randn(20))
    assert_close(conv(**kwargs), kwargs)


def test_reads_any_strides() -> None:
    big = torch.randn(2, 64, 9, 12).contiguous(memory_format=torch.channels_last)
    views = [big[:, 44:], big[:, :20, ::2, ::2], big[:, 5:25, :, 3:4], big[:1].expand(3, -1, -1, -1)[:, :20]]
    views += [big[..., ::5][:, ::3][:, :20], torch.randn(2, 20, 1, 1), big[:, 10:30].contiguous()]
    for x in views:
        kwargs = {"x": x, "weight": torch.randn(8, x.shape[1], 3, 3) * 0.1, "padding": 1}
        assert_close(conv(**kwargs), kwargs)
    kwargs = example(weight=torch.randn(3, 3, 20, 24).permute(3, 2, 0, 1) * 0.1)
    assert_close(conv(**kwargs), kwargs)


def test_rectangular_kernel() -> None:
    kwargs = {
        "x": torch.randn(1, 5, 9, 10),
        "weight": torch.randn(4, 5, 2, 5) * 0.1,
        "padding": 1,
        "stride": 2,
    }
    assert_close(conv(**kwargs), kwargs)


sizes = st.integers(0, 12)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_arguments(data: st.DataObject) -> None:
    """Right, or refused with an exception: whenever PyTorch refuses, and for what is documented."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 9)))
    transposed = draw(st.booleans())
    sources = draw(st.integers(1, 2))
    height, width = draw(sizes), draw(sizes)
    images = draw(st.integers(0, 2)) or draw(st.integers(0, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    x = []
    for _ in range(sources):
        t = torch.randn(images, draw(st.integers(1, 20)), height, width).to(dtype)
        x.append(t.contiguous(memory_format=torch.channels_last) if draw(st.booleans()) else t)
    channels = sum(t.shape[1] for t in x)
    out_channels = draw(st.integers(1, 20))
    kernel = draw(st.sampled_from([1, 2, 3, 3, 3, 4, 4, 5, 7, 17]))
    outer = (channels, out_channels) if transposed else (out_channels, channels)
    kwargs: dict[str, Any] = {
        "x": x,
        "weight": torch.randn(*outer, kernel, kernel) / (channels * kernel**2) ** 0.5,
        "bias": draw(st.sampled_from([None, torch.randn(out_channels)])),
        "stride": draw(st.sampled_from([-1, 0, 1, 1, 1, 2, 2, 3, 5])),
        "padding": draw(st.sampled_from([-1, 0, 1, 1, 2, 3, 30])),
        "output_padding": draw(st.sampled_from([0, 0, 0, 1, 2])),
        "transposed": transposed,
        "padding_mode": draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
        "input_act": draw(st.sampled_from(["none", "relu", "leaky_relu", "tanh"])),
        "algorithm": draw(st.sampled_from(["auto", "auto", *ALGORITHMS])),
    }
    if draw(st.booleans()):
        kwargs["scale"], kwargs["shift"] = torch.rand(channels), torch.randn(channels)
    before = _C.active_level()
    _C.set_active_level(draw(st.sampled_from(TESTED_LEVELS)))
    try:
        y = conv(**kwargs)
    except ValueError as error:
        assert str(error)
        return
    finally:
        _C.set_active_level(before)
    assert_close(y, kwargs)


def test_nothing_valid_is_refused() -> None:
    for kernel, stride, padding, transposed in [
        (1, 1, 0, False),
        (7, 3, 3, False),
        (4, 2, 1, True),
        (5, 4, 0, True),
    ]:
        for padding_mode in ("zeros",) if transposed else ("zeros", "reflect", "replicate"):
            kwargs = {"x": torch.randn(1, 4, 5, 7), "weight": torch.randn(4, 4, kernel, kernel) * 0.1}
            kwargs |= {"stride": stride, "padding": padding, "transposed": transposed}
            kwargs |= {"padding_mode": padding_mode}
            assert_close(conv(**kwargs), kwargs)


def test_opcheck() -> None:
    kwargs = example()
    x, weight, bias = (kwargs.pop(k) for k in ("x", "weight", "bias"))
    operator = torch.ops.p2pfast.conv.default
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(operator, ([x.to(dtype)], weight, bias), kwargs)
    torch.library.opcheck(
        operator, ([x, x], torch.randn(40, 3, 4, 4), None), {"stride": 2, "transposed": True}
    )


def test_compiles_to_one_graph() -> None:
    kwargs = example()
    compiled = torch.compile(
        lambda v: conv(v, **{k: a for k, a in kwargs.items() if k != "x"}) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(compiled(kwargs["x"]), conv(**kwargs) + 1)


def test_two_threads_at_once() -> None:
    jobs = [example() for _ in range(2)] + [example(algorithm="streamed"), example(algorithm="direct")]
    expected = [conv(**job) for job in jobs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(conv(**jobs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


X, W = torch.zeros(1, 4, 5, 6), torch.zeros(8, 4, 3, 3)
BAD = [
    ({"x": X.double()}, TypeError, "x has dtype torch.float64"),
    ({"x": X.half()}, TypeError, "x has dtype torch.float16"),
    ({"x": [X, X.bfloat16()]}, TypeError, "x has dtypes torch.float32 and torch.bfloat16"),
    ({"x": X[0]}, ValueError, r"x has shape \(4, 5, 6\)"),
    ({"x": X[:0]}, ValueError, "an empty batch"),
    ({"x": X[:, :, :0]}, ValueError, "an empty tensor"),
    ({"x": []}, ValueError, "x has 0 tensors"),
    ({"x": [X, X, X]}, ValueError, "x has 3 tensors"),
    ({"x": [X, X[..., 1:]]}, ValueError, "only their channels may differ"),
    ({"x": torch.zeros(1, 5, 5, 6)}, ValueError, r"\(out_channels, 5, kernel_h, kernel_w\)"),
    ({"transposed": True}, ValueError, r"\(4, out_channels, kernel_h, kernel_w\)"),
    ({"weight": W.double()}, TypeError, "weight has dtype"),
    ({"weight": W[0]}, ValueError, "weight has shape"),
    ({"weight": W[:0]}, ValueError, "weight has shape"),
    ({"weight": W.to("meta")}, ValueError, "weight is on meta"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias has shape \(7,\)"),
    ({"bias": torch.zeros(8, dtype=torch.int64)}, TypeError, "bias has dtype"),
    ({"stride": 0}, ValueError, "stride is 0"),
    ({"stride": 1 << 40}, ValueError, "stride is 1099511627776"),
    ({"padding": -1}, ValueError, "padding is -1"),
    ({"padding": 5, "padding_mode": "reflect"}, ValueError, "reflection needs it below .* here 5x6"),
    ({"padding": 1 << 30}, ValueError, "too large"),
    ({"padding_mode": "circular"}, ValueError, "padding_mode is 'circular'"),
    ({"output_padding": 1}, ValueError, "output_padding is 1"),
    (
        {"weight": torch.zeros(4, 8, 3, 3), "transposed": True, "stride": 2, "output_padding": 2},
        ValueError,
        "output_padding is 2",
    ),
    (
        {"weight": torch.zeros(4, 8, 3, 3), "transposed": True, "padding_mode": "reflect"},
        ValueError,
        "only 'zeros'",
    ),
    ({"weight": torch.zeros(4, 8, 3, 3), "transposed": True, "padding": 3}, ValueError, "padding is 3"),
    ({"weight": torch.zeros(8, 4, 6, 6)}, ValueError, "an output of 0x1"),
    ({"weight": torch.zeros(8, 4, 17, 17), "padding": 8}, ValueError, "16x16"),
    ({"scale": torch.zeros(4)}, ValueError, "scale and shift go together"),
    ({"scale": torch.zeros(4), "shift": torch.zeros(1, 4)}, ValueError, "they must be equal"),
    ({"scale": torch.zeros(5), "shift": torch.zeros(5)}, ValueError, "scale has shape"),
    ({"scale": torch.zeros(4).double(), "shift": torch.zeros(4)}, TypeError, "scale has dtype"),
    ({"input_act": "tanh"}, ValueError, "input_act is 'tanh'"),
    ({"act": "mish"}, ValueError, "act is 'mish'"),
    ({"algorithm": "fft"}, ValueError, "algorithm is 'fft'"),
    ({"algorithm": "winograd", "stride": 3}, ValueError, "algorithm is 'winograd', which cannot"),
    ({"algorithm": "thin", "weight": torch.zeros(9, 4, 3, 3)}, ValueError, "more than 8 output channels"),
    ({"dilation": 2}, ValueError, "dilation is 2"),
    ({"groups": 4}, ValueError, "groups is 4"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv(**{"x": X, "weight": W, **change})
