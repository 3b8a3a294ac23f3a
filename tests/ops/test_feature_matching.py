"""Differences of many pairs of tensors in one call: kernels against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from p2pfast import _C
from p2pfast.ops.feature_matching import feature_matching, feature_matching_reference
from p2pfast.ops.feature_matching.op import _feature_matching

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 3, 7, 9), (1, 1, 1, 1), (1, 16, 40, 33), (5,)]
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def pairs(dtype: torch.dtype, real_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    fake = [(torch.randn(s) + 20).to(dtype).requires_grad_() for s in SHAPES]
    return fake, [(torch.randn(s) + 20).to(real_dtype) for s in SHAPES]


@pytest.mark.parametrize(("dtype", "real_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_value_and_gradient(
    cpu_level: str, squared: bool, dtype: torch.dtype, real_dtype: torch.dtype
) -> None:
    fake, real = pairs(dtype, real_dtype)
    real[2].view(-1)[:100] = fake[2].detach().reshape(-1)[:100]  # equal values have no gradient
    doubles = [x.detach().double().requires_grad_() for x in fake]
    expected = feature_matching_reference(doubles, [y.double() for y in real], WEIGHTS, squared)
    result = feature_matching(fake, real, WEIGHTS, squared)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=0.0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    got, want = torch.autograd.grad(result, fake), torch.autograd.grad(expected, doubles)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(
            g.double(), w, rtol=tolerance, atol=6e-8 if dtype == torch.float16 else 0.0
        )


def test_gradients_larger_than_a_cache(cpu_level: str) -> None:
    """They are written past the caches, at their ends and where they are not aligned as usual."""
    count = (2 << 20) + 8192 + 5
    fake, real = torch.randn(1, count), torch.randn(1, count)
    fake.requires_grad_()
    loss = feature_matching([fake], [real], [2.0])
    torch.testing.assert_close(loss, 2.0 * (fake.detach() - real).abs().mean(), rtol=1e-5, atol=0.0)
    (got,) = torch.autograd.grad(loss, fake)
    assert torch.equal(got, (fake.detach() - real).sign() * torch.tensor(2.0 / count))
    flat, out = torch.full((count + 1,), float("nan")), torch.empty(())
    parts = [(fake.data_ptr(), real.data_ptr(), flat.data_ptr() + 4, count, 0, 0, 1.0, 2.0 / count)]
    _C.pointwise_loss(loss=4, target=0.0, parts=parts, out=out.data_ptr())
    assert torch.equal(flat[1:], got[0]) and flat[0].isnan()


def test_the_real_side_has_no_gradient() -> None:
    fake, real = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    for dtype in (torch.float32, torch.float64):
        x, y = fake.to(dtype), real.to(dtype)
        assert torch.autograd.grad(feature_matching([x], [y], [1.0]), real, allow_unused=True) == (None,)
    assert not feature_matching([fake.detach()], [real], [1.0]).requires_grad


def test_memory_formats_that_differ() -> None:
    base, other = torch.randn(2, 6, 5, 8), torch.randn(2, 6, 5, 8)
    last = torch.channels_last
    variants = [
        (base, other.contiguous(memory_format=last)),
        (base.contiguous(memory_format=last), other),
        (base[:, ::2], other.contiguous(memory_format=last)[:, ::2]),
        (base[:, :1].expand(2, 6, 5, 8), other),
    ]
    for x, y in variants:
        x = x.detach().requires_grad_()
        result = feature_matching([x], [y], [2.0])
        torch.testing.assert_close(result, 2 * (x - y).abs().mean())
        torch.testing.assert_close(torch.autograd.grad(result, x)[0], 2 * (x - y).sign() / x.numel())


def test_nan_propagates(cpu_level: str) -> None:
    x, y = torch.zeros(70, requires_grad=True), torch.zeros(70)
    y[[3, 69]] = float("nan")
    result = feature_matching([x], [y], [1.0])
    assert result.isnan() and torch.autograd.grad(result, x)[0].isnan().sum() == 2


def test_same_bits_with_any_number_of_threads() -> None:
    fake, real = [torch.randn(2, 64, 33, 65)], [torch.randn(2, 64, 33, 65)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(feature_matching(fake, real, [1.0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_gradcheck_of_the_reference() -> None:
    fake = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4,))]
    real = [torch.randn_like(x) for x in fake]
    for squared in (False, True):
        torch.autograd.gradcheck(lambda *v, s=squared: feature_matching(v, real, [1.0, 2.0], s), fake)


def test_double_backward() -> None:
    fake, real = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    (first,) = torch.autograd.grad(feature_matching([fake], [real], [1.0], True), fake, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), fake)
    torch.testing.assert_close(second, torch.full_like(fake, 2 / 12))


def test_double_backward_where_one_input_comes_from_another() -> None:
    found = []
    real = [torch.zeros(3, 4)] * 2
    for function in (feature_matching, feature_matching_reference):
        x = torch.linspace(-2, 2, 12).view(3, 4).requires_grad_()
        (first,) = torch.autograd.grad(function([x, x.sin()], real, [1.0, 2.0], True), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1])


def test_opcheck() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(_feature_matching, (*pairs(dtype, dtype), WEIGHTS, False, True))


def test_under_a_compiler() -> None:
    fake, real = pairs(torch.bfloat16, torch.bfloat16)
    compiled = torch.compile(feature_matching, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(fake, real, WEIGHTS), fake)
    torch.testing.assert_close(got, torch.autograd.grad(feature_matching(fake, real, WEIGHTS), fake))


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"fake": [], "real": [], "weights": []}, ValueError, "fake is empty"),
    ({"weights": [1.0, 2.0]}, ValueError, "fake has 1 tensors, real 1, weights 2"),
    ({"real": [torch.zeros(3)]}, ValueError, r"of real \(3,\)"),
    ({"fake": [torch.zeros(0)], "real": [torch.zeros(0)]}, ValueError, "mean of no values"),
    ({"real": [torch.zeros(2, dtype=torch.int64)]}, TypeError, "real has dtype torch.int64"),
    ({"real": [torch.zeros(2, device="meta")]}, ValueError, "real on meta"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        feature_matching(**{"fake": [torch.zeros(2)], "real": [torch.zeros(2)], "weights": [1.0], **change})


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        fake = [torch.empty(s, dtype=torch.float16, device="cuda") for s in SHAPES]
        loss, gradients = _feature_matching(fake, fake, WEIGHTS, False, True)
        assert loss.device.type == "cuda" and loss.dtype == torch.float32
        assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in fake]
        assert feature_matching(fake, fake, WEIGHTS).device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "real_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("squared", [False, True])
def test_on_cuda(squared: bool, dtype: torch.dtype, real_dtype: torch.dtype) -> None:
    fake, real = pairs(dtype, real_dtype)
    fake = [x.detach().cuda().requires_grad_() for x in fake]
    real = [y.cuda() for y in real]
    doubles = [x.detach().double().requires_grad_() for x in fake]
    expected = feature_matching_reference(doubles, [y.double() for y in real], WEIGHTS, squared)
    result = feature_matching(fake, real, WEIGHTS, squared)
    torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=0.0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    got, want = torch.autograd.grad(result, fake), torch.autograd.grad(expected, doubles)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=1e-7)
