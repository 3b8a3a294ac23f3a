"""Normalisation for training: forward and the fused backward pass against the reference in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.norm_act import norm_act, norm_act_reference
from p2pfast.ops.norm_act.op import _norm_act, _norm_act_backward

SIZES = [(2, 3, 5, 7), (1, 20, 17, 40), (3, 33, 4, 1), (2, 130, 3, 33), (1, 64, 35, 9)]
FORMATS = [torch.contiguous_format, torch.channels_last]
ACTS = [
    ("none", 0.0),
    ("relu", 0.0),
    ("leaky_relu", 0.2),
    ("tanh", 0.0),
    ("sigmoid", 0.0),
    ("elu", 0.7),
    ("silu", 0.0),
    ("gelu", 0.0),
]


def variants(channels: int) -> list[dict[str, Any]]:
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    return [
        {},
        {"weight": weight, "bias": bias},
        {"weight": weight, "bias": bias, "over_batch": True},
        {"mean": torch.randn(channels), "variance": torch.rand(channels) + 0.1, "weight": weight},
        {"mean": torch.randn(2, channels), "variance": torch.rand(2, channels) + 0.1, "eps": 1e-3},
    ]


def gradients(
    function: Any, x: Tensor, call: dict[str, Any], grad: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = {
        "x": x,
        **{k: v for k, v in call.items() if k in ("weight", "bias", "residual") and v is not None},
    }
    inputs = {
        k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in inputs.items()
    }
    y = function(**{**call, **inputs})
    y = y if isinstance(y, Tensor) else y[0]
    return y, dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad.to(y.dtype)), strict=True))


def check(x: Tensor, call: dict[str, Any], tolerance: float, scale: float) -> None:
    grad = torch.randn_like(x)
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
    exact_y, exact = gradients(norm_act_reference, x.double(), double, grad.double())
    y, got = gradients(norm_act, x, call, grad)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    assert (y.double() - exact_y).abs().max() <= tolerance * scale * exact_y.abs().max()
    for name, expected in exact.items():
        assert got[name].shape == expected.shape
        # Sums of many terms that cancel: relative to the size of what is added up.
        size = expected.abs().max() + (grad.abs().sum() / x.shape[1] * 1e-2 if expected.dim() == 1 else 0)
        error = (got[name].double() - expected).abs().max()
        assert error <= tolerance * scale * size, (name, float(error), float(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_forward_and_backward(
    cpu_level: str, offset: float, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    tolerance = 5e-6 if dtype == torch.float32 else 2**-7
    acts = itertools.cycle([a for a in ACTS if a[0] != "gelu"])
    for size in ((2, 5, 11, 13), (2, 24, 6, 50)):
        for kwargs, with_residual in itertools.product(variants(size[1]), (False, True)):
            if offset and "mean" in kwargs:
                continue
            x = (torch.randn(size) + offset).to(dtype, memory_format=memory_format)
            residual = torch.randn(size).to(dtype, memory_format=memory_format) if with_residual else None
            act, slope = next(acts)
            check(x, {**kwargs, "act": act, "slope": slope, "residual": residual}, tolerance, 1 + offset / 2)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(cpu_level: str, size: tuple[int, ...], memory_format: torch.memory_format) -> None:
    for over_batch in (False, True):
        x = (torch.randn(size) + 3).contiguous(memory_format=memory_format)
        check(x, {"over_batch": over_batch, "act": "leaky_relu", "slope": 0.2}, 1e-5, 4.0)


@pytest.mark.parametrize(("act", "slope"), ACTS)
def test_activations(cpu_level: str, act: str, slope: float) -> None:
    for memory_format in FORMATS:
        x = (torch.randn(2, 9, 8, 12) * 4).contiguous(memory_format=memory_format)
        check(x, {"act": act, "slope": slope, "weight": torch.full((9,), 5.0)}, 5e-6, 2.0)


def test_formats_that_differ() -> None:
    x, last = torch.randn(2, 6, 8, 10), torch.channels_last
    residual, grad = torch.randn_like(x), torch.randn_like(x)
    call = {"act": "relu", "residual": residual}
    expected = gradients(norm_act, x, call, grad)
    other = gradients(norm_act, x, {**call, "residual": residual.contiguous(memory_format=last)}, grad)
    torch.testing.assert_close(other, expected, rtol=0.0, atol=0.0)
    other = gradients(norm_act, x, call, grad.contiguous(memory_format=last))
    torch.testing.assert_close(other, expected, rtol=0.0, atol=0.0)
    other = gradients(norm_act, x.contiguous(memory_format=last), call, grad)
    torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-5)


def test_expanded_and_sliced() -> None:
    big = torch.randn(2, 12, 9, 10)
    for x in (big[:, 3:8], big[..., ::2], big[:1].expand(3, -1, -1, -1)):
        x = x.detach().requires_grad_()
        y = norm_act(x, act="relu")[0]
        torch.testing.assert_close(y, norm_act_reference(x, act="relu"), rtol=1e-5, atol=1e-5)
        grad = torch.ones(()).expand(y.shape)
        got = torch.autograd.grad(y, x, grad)
        want = torch.autograd.grad(norm_act_reference(x, act="relu"), x, grad)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_frozen_statistics_of_any_strides() -> None:
    x, mean, variance = torch.randn(2, 6, 4, 5), torch.randn(6, 2).t(), torch.rand(6, 2).t() + 0.5
    for memory_format in FORMATS:
        with torch.no_grad():  # not by the registered operator
            y, used, _ = norm_act(x.contiguous(memory_format=memory_format), None, None, mean, variance)
        torch.testing.assert_close(y, norm_act_reference(x, None, None, mean, variance), rtol=1e-5, atol=1e-5)
        assert torch.equal(used, mean)


def test_statistics_returned() -> None:
    x = torch.randn(2, 6, 8, 10) + 5
    for memory_format, over_batch in itertools.product(FORMATS, (False, True)):
        y, mean, variance = norm_act(x.contiguous(memory_format=memory_format), over_batch=over_batch)
        dims = (0, 2, 3) if over_batch else (2, 3)
        torch.testing.assert_close(mean, x.mean(dims))
        torch.testing.assert_close(variance, x.var(dims, correction=0))
        assert not mean.requires_grad and not variance.requires_grad


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_same_bits_with_any_number_of_threads(memory_format: torch.memory_format) -> None:
    x = (torch.randn(2, 70, 20, 50) + 10).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    before = torch.get_num_threads()
    results = []
    try:
        for threads, over_batch in itertools.product((1, 2, 3), (False, True)):
            torch.set_num_threads(threads)
            call = {"over_batch": over_batch, "act": "relu", "weight": torch.ones(70), "bias": torch.ones(70)}
            y, found = gradients(norm_act, x, call, grad)
            results.append([y, *found.values()])
    finally:
        torch.set_num_threads(before)
    for i, result in enumerate(results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(result, results[i % 2], strict=True))


def test_nothing_is_written_outside(cpu_level: str, buffers: Any) -> None:
    for planes, (images, channels, pixels) in itertools.product((True, False), ((2, 5, 77), (1, 131, 300))):
        x, dy, residual, dx, dresidual = (buffers(images, channels, pixels) for _ in range(5))
        for t in (x, dy, residual):
            t.normal_()
        mean, variance = buffers(images, channels), buffers(images, channels)
        dweight, dbias = buffers(channels), buffers(channels)
        common = {"residual": residual, "mean": mean, "variance": variance}
        sizes = {"images": images, "channels": channels, "pixels": pixels}
        sizes |= {"planes": planes, "dtype": 0, "over_batch": False, "frozen": False, "act": 1}
        for backward, tensors in (
            (False, {"x": x, "out": dx}),
            (True, {"x": x, "out": dx, "dy": dy, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}),
        ):
            dx.fill_(float("nan"))
            addresses = {k: t.data_ptr() for k, t in (tensors | common).items()}
            _C.norm_act(backward=backward, **sizes, **addresses)
            assert not dx.isnan().any()
        assert not any(t.isnan().any() for t in (mean, variance, dresidual, dweight, dbias))


@pytest.mark.parametrize("kind", range(5))
def test_gradcheck_of_the_reference(kind: int) -> None:
    kwargs = {k: v.double() if isinstance(v, Tensor) else v for k, v in variants(3)[kind].items()}
    x, residual = (torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for act in ("none", "tanh"):
        call = {**kwargs, "act": act}
        torch.autograd.gradcheck(lambda a, r, c=call: norm_act(a, residual=r, **c)[0], (x, residual))


def test_double_backward() -> None:
    x, residual = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5, requires_grad=True)
    weight = torch.rand(3, requires_grad=True)
    for act, r in itertools.product(("none", "tanh"), (None, residual)):
        found = []
        for function in (lambda *a, **k: norm_act(*a, **k)[0], norm_act_reference):
            y = function(x, weight, act=act, residual=r)
            inputs = [x, weight] if r is None else [x, weight, r]
            first = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(sum((g**2).sum() for g in first), inputs))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_gradients_through_the_residual_can_be_differentiated() -> None:
    found = []
    for function in (lambda *a, **k: norm_act(*a, **k)[0], norm_act_reference):
        residual = torch.linspace(-1, 1, 120).view(2, 3, 4, 5).requires_grad_()
        y = function(residual.sin() + residual.flip(3), act="tanh", residual=residual)
        (first,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), residual)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("act", ["none", "relu", "tanh"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_frozen_statistics_keep_infinities_where_they_are(
    cpu_level: str, memory_format: torch.memory_format, act: str
) -> None:
    """Every gradient is that of one value; sizes of one task, and of several."""
    for size in ((2, 20, 5, 7), (1, 3, 130, 130)):
        values = torch.randn(size).contiguous(memory_format=memory_format)
        values[0, 1, 2, 3] = math.inf
        x, grad = values.requires_grad_(), torch.randn(size)
        grad[0, 0, 1, 1], grad[0, 2, 1, 1] = math.inf, math.nan
        given = None, None, torch.randn(size[1]), torch.rand(size[1]) + 0.5
        (got,) = torch.autograd.grad(norm_act(x, *given, act=act)[0], x, grad)
        (want,) = torch.autograd.grad(norm_act_reference(x, *given, act=act), x, grad)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_value_that_is_no_number_passes_its_gradient_as_in_pytorch(cpu_level: str) -> None:
    x = torch.tensor([math.nan, -1.0, 0.0, 3.0]).view(1, 1, 2, 2).requires_grad_()
    frozen = None, None, torch.zeros(1), torch.ones(1)
    grad = torch.autograd.grad(norm_act(x, *frozen, eps=0.0, act="relu")[0].sum(), x)[0]
    assert torch.equal(grad, torch.autograd.grad(x.relu().sum(), x)[0])


@pytest.mark.parametrize("grown", [False, True])
def test_autocast_lowers_with_and_without_gradients(grown: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grown):
        assert norm_act(torch.randn(1, 3, 4, 5))[0].dtype == torch.bfloat16


def test_float16() -> None:
    x = torch.randn(2, 3, 4, 5).half().requires_grad_()
    y = norm_act(x, act="relu")[0]
    assert y.dtype == torch.float16
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float16


def test_opcheck() -> None:
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    for memory_format, kwargs in itertools.product(FORMATS, variants(5)):
        call = {**{k: kwargs.get(k) for k in ("weight", "bias", "mean", "variance")}}
        args = (x.contiguous(memory_format=memory_format), *call.values(), kwargs.get("over_batch", False))
        torch.library.opcheck(_norm_act, (*args, 1e-5, "relu", 0.0, torch.randn_like(args[0])))
        mean = torch.zeros(5)
        torch.library.opcheck(
            _norm_act_backward,
            (x.detach(), x.detach(), None, None, mean, mean + 1, False, 1e-5, "relu", 0.0, None, True),
        )


def test_under_a_compiler() -> None:
    x, weight = torch.randn(2, 5, 6, 7, requires_grad=True), torch.rand(5, requires_grad=True)
    compiled = torch.compile(lambda a, w: norm_act(a, w, act="relu")[0], backend="aot_eager", fullgraph=True)
    grad = torch.randn_like(x)
    got = torch.autograd.grad(compiled(x, weight), (x, weight), grad)
    want = torch.autograd.grad(norm_act(x, weight, act="relu")[0], (x, weight), grad)
    torch.testing.assert_close(got, want)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.int32)}, TypeError, "x has dtype torch.int32"),
    ({"x": torch.zeros(4, 5, 5)}, ValueError, r"x has shape \(4, 5, 5\)"),
    ({"x": torch.zeros(0, 4, 5, 5)}, ValueError, "an empty batch"),
    ({"x": torch.zeros(2, 4, 1, 1)}, ValueError, "one value a channel"),
    ({"weight": torch.zeros(3)}, ValueError, "weight has shape"),
    ({"bias": torch.zeros(4, dtype=torch.int32)}, TypeError, "bias has dtype"),
    ({"mean": torch.zeros(4)}, ValueError, "mean and variance go together"),
    ({"mean": torch.zeros(1, 4), "variance": torch.zeros(4)}, ValueError, "variance"),
    ({"residual": torch.zeros(1, 4, 5, 4)}, ValueError, "residual has shape"),
    ({"residual": torch.zeros(1, 4, 5, 5, dtype=torch.bfloat16)}, TypeError, "residual has dtype"),
    ({"weight": torch.zeros(4, device="meta")}, ValueError, "weight is on meta"),
    ({"eps": -1.0}, ValueError, "eps is -1"),
    ({"act": "mish"}, ValueError, "act is 'mish'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm_act(**{"x": torch.zeros(1, 4, 5, 5), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images is 0"),
        ({"channels": -1}, "channels is -1"),
        ({"act": 7}, "act is 7"),
        ({"x": 0}, "x is null"),
        ({"dtype": 2}, "dtype is 2"),
    ],
)
def test_bad_native_arguments(change: dict[str, Any], message: str) -> None:
    t = torch.zeros(16)
    call = dict.fromkeys(("x", "out", "mean", "variance", "dy", "dweight", "dbias"), t.data_ptr())
    call |= {"images": 1, "channels": 1, "pixels": 16, "dtype": 0, "act": 0}
    with pytest.raises(ValueError, match=message):
        _C.norm_act(
            **{**call, "backward": True, "planes": True, "over_batch": False, "frozen": False, **change}
        )
