"""The operators' own autocast rules: images and weights in the lower precision, statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from p2pfast.ops.conv.op import conv
from p2pfast.ops.label_conv.op import label_conv
from p2pfast.ops.norm.op import instance_norm_act


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(2, 6, 9, 11, requires_grad=True),
        torch.randn(5, 6, 3, 3, requires_grad=True),
        torch.randn(5, requires_grad=True),
    )


def test_results_are_lower_and_gradients_as_the_parameters() -> None:
    x, weight, bias = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, weight, bias, padding=1, act="relu")
        z = instance_norm_act(y, bias, bias, act="relu", residual=torch.randn(y.shape))
    assert y.dtype == z.dtype == torch.bfloat16
    z.float().square().sum().backward()
    for t in (x, weight, bias):
        assert t.grad is not None and t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0
    assert torch.equal(y, conv(x.bfloat16(), weight.bfloat16(), bias, padding=1, act="relu"))


def test_scales_shifts_and_statistics_stay_float32() -> None:
    x, weight, bias = inputs()
    # 1 + 2^-12 is 1 in bfloat16: scales that were lowered would hide the difference of nearly equal inputs.
    scale, shift = torch.full((6,), 1 + 2.0**-12), torch.full((6,), -1.0)
    ones, eye = torch.ones(1, 6, 4, 4), torch.eye(6)[:, :, None, None]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.all(conv(ones, eye, scale=scale, shift=shift) == 2.0**-12)
        shifted = instance_norm_act(ones, mean=scale, variance=torch.ones(6), eps=0.0)
        assert torch.all(shifted == -(2.0**-12))
        two = conv([x, x], torch.cat([weight, weight], 1))
        assert two.dtype == torch.bfloat16


def test_label_conv_stores_its_result_lower() -> None:
    labels, weight = torch.randint(0, 4, (1, 16, 16)), torch.randn(3, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert label_conv(labels, None, weight, None, 4).dtype == torch.bfloat16
        assert label_conv(labels, None, weight, None, 4, 0, "zeros").dtype == torch.bfloat16


def test_a_dtype_without_kernels_changes_nothing() -> None:
    x, weight, bias = inputs()
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(conv(x, weight, bias), conv(x.detach(), weight, bias))
        assert instance_norm_act(x).dtype == torch.float32


def test_float64_is_never_lowered() -> None:
    bias = torch.randn(5, dtype=torch.float64)
    x, weight, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(x, weight, bias).dtype == torch.bfloat16


def test_traced_without_a_graph_break() -> None:
    x, weight, bias = inputs()

    def chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm_act(conv(x, weight, bias, 1, 1), act="relu")

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x, weight, bias), chain(x, weight, bias)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    found.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
