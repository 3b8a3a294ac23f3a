"""Derivatives of ``conv`` and ``instance_norm_act`` against those of their references in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast.ops.conv.activation import ACTIVATIONS
from p2pfast.ops.conv.op import conv
from p2pfast.ops.conv.reference import conv_reference
from p2pfast.ops.norm.op import instance_norm_act
from p2pfast.ops.norm.reference import instance_norm_act_reference

Function = Callable[..., Tensor]


def derivatives(function: Function, tensors: list[Tensor], twice: bool) -> list[Tensor]:
    """First derivatives of a weighted sum of the result; and those of their sum of squares, if ``twice``."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    result = function(*leaves)
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(4)).to(result.dtype)
    first = torch.autograd.grad((result * weights).sum(), leaves, create_graph=twice)
    if not twice:
        return [result.detach(), *first]
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves, materialize_grads=True)  # type: ignore[arg-type]
    return [g.detach() for g in (*first, *second)]


def check(function: Function, reference: Function, tensors: list[Tensor], twice: bool = False) -> None:
    found = derivatives(function, tensors, twice)
    expected = derivatives(reference, [t.double() for t in tensors], twice)
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == torch.float32
        assert float((f.double() - e).norm()) <= 3e-6 * float(e.norm()) + 1e-9


def both(op: Function, reference: Function, **options: Any) -> tuple[Function, Function]:
    return lambda *a: op(*a, **options), lambda *a: reference(*a, **options)


@pytest.mark.parametrize("twice", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("slope", [0.3, -0.5])
def test_conv_activations(act: str, slope: float, twice: bool) -> None:
    tensors = [torch.randn(2, 5, 6, 7), 0.2 * torch.randn(4, 5, 3, 3), torch.randn(4)]
    check(*both(conv, conv_reference, padding=1, act=act, slope=slope), tensors, twice)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
@pytest.mark.parametrize("per_image", [True, False])
def test_conv_with_a_deferred_norm(mode: str, act: str, per_image: bool) -> None:
    options = {"stride": 2, "padding": 2, "padding_mode": mode, "input_act": act, "input_slope": 0.2}
    shape = (2, 5) if per_image else (5,)

    def bound(op: Function) -> Function:
        return lambda x, w, b, scale, shift: op(x, w, b, scale=scale, shift=shift, **options)

    tensors = [torch.randn(2, 5, 7, 6), torch.randn(4, 5, 4, 4), torch.randn(4)]
    tensors += [torch.randn(shape), torch.randn(shape)]
    check(bound(conv), bound(conv_reference), tensors)


@pytest.mark.parametrize("twice", [False, True], ids=["first", "second"])
def test_transposed_conv_of_two_sources(twice: bool) -> None:
    def bound(op: Function) -> Function:
        return lambda a, b, w: op([a, b], w, None, 2, 1, 1, True, act="tanh")

    tensors = [torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5), torch.randn(5, 4, 3, 3)]
    check(bound(conv), bound(conv_reference), tensors, twice)


@pytest.mark.parametrize("twice", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_norm(act: str, over_batch: bool, twice: bool) -> None:
    def bound(op: Function) -> Function:
        return lambda x, w, b, r: op(x, w, b, None, None, over_batch, 1e-3, act, 0.2, r)

    tensors = [torch.randn(2, 5, 6, 7) + 3, torch.randn(5), torch.randn(5), torch.randn(2, 5, 6, 7)]
    check(bound(instance_norm_act), bound(instance_norm_act_reference), tensors, twice)


@pytest.mark.parametrize("per_image", [True, False])
def test_norm_with_given_statistics(per_image: bool) -> None:
    shape = (2, 5) if per_image else (5,)
    tensors = [
        torch.randn(2, 5, 6, 7),
        torch.randn(5),
        torch.randn(5),
        torch.randn(shape),
        torch.rand(shape) + 1,
    ]
    check(*both(instance_norm_act, instance_norm_act_reference, act="elu", slope=0.5), tensors)
    check(*both(instance_norm_act, instance_norm_act_reference, act="silu"), tensors[:1])


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with torch.no_grad():
        assert not conv(x.requires_grad_(), weight).requires_grad
        assert not instance_norm_act(x).requires_grad
    conv(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    conv(x.detach(), weight.requires_grad_()).sum().backward()
    assert weight.grad is not None


def test_bfloat16_gradients_are_bfloat16() -> None:
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(4, 4, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    instance_norm_act(conv(x, weight, bias), act="relu").sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_opcheck_with_gradients() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    arguments = ([leaf(1, 3, 5, 6), leaf(1, 2, 5, 6)], leaf(4, 5, 3, 3), leaf(4), 1, 1, 0, False, "reflect")
    torch.library.opcheck(torch.ops.p2pfast.conv.default, (*arguments, leaf(5), leaf(5), "relu"))
    norm = torch.ops.p2pfast.instance_norm_act.default
    torch.library.opcheck(norm, (leaf(2, 3, 5, 6), leaf(3), leaf(3), leaf(3), leaf(3).abs().detach()))
