"""The weight gradient's kernel: every padding, stride and layout of columns, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from p2pfast.ops.gpu import interpreted, triton_reason
from p2pfast.ops.weight_gradient import weight_gradient_reference

if triton_reason() is None:
    from p2pfast.ops.conv.gpu.configs import Config, Machine
    from p2pfast.ops.weight_gradient import triton as kernels

# images, inputs, outputs, height, width, kernel, stride, padding, mode
CASES = [
    (2, 20, 18, 9, 11, (3, 3), 1, 1, "reflect"),
    (1, 40, 5, 8, 13, (3, 3), 1, 1, "zeros"),
    (2, 3, 17, 6, 5, (7, 7), 1, 3, "reflect"),
    (1, 16, 33, 12, 10, (4, 4), 2, 1, "zeros"),
    (1, 1, 1, 9, 8, (4, 4), 1, 2, "zeros"),
    (2, 5, 3, 7, 9, (5, 3), 3, 2, "replicate"),
    (3, 33, 2, 6, 6, (1, 1), 1, 0, "zeros"),
    (1, 70, 6, 2, 3, (2, 2), 1, 0, "reflect"),
]


def images_of(shape: tuple[int, ...], dtype: torch.dtype, device: str, mean: float = 0.0) -> Tensor:
    return (torch.randn(shape) + mean).to(dtype).to(device).contiguous(memory_format=torch.channels_last)


def problem(case: int, dtype: torch.dtype, device: str, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    """The output's gradient, and an input that is far from zero."""
    images, inputs, outputs, height, width, kernel, stride, padding, _ = CASES[case]
    size = [(s + 2 * padding - k) // stride + 1 for s, k in zip((height, width), kernel, strict=True)]
    grad = images_of((images, outputs, *size), dtype, device)
    return grad, images_of((images, inputs, height, width), dtype, device, mean)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.cpu()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tile", [(16, 128, 32, 1), (64, 16, 16, 3)], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_against_the_reference(device: str, case: int, tile: tuple[int, int, int, int]) -> None:
    """Columns that span taps and columns that do not; more splits than there are steps, too."""
    grad, x = problem(case, torch.float32, device)
    numbers = CASES[case][5:]
    config = Config(*tile[:3], 4, 2, tile[3])
    found = kernels.weight_gradient(grad, x, *numbers, config=config, precision="ieee")
    assert found.is_contiguous() and found.dtype == torch.float32
    assert relative(found, weight_gradient_reference(grad, x, *numbers)) < 2e-6
    again = kernels.weight_gradient(grad, x, *numbers, config=config, precision="ieee")
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [0, 2, 3])
def test_lower_precision(device: str, case: int, dtype: torch.dtype) -> None:
    """Operands are exact, sums float32; the result is rounded once, or not at all."""
    grad, x = problem(case, dtype, device, 1.0)
    numbers = CASES[case][5:]
    expected = weight_gradient_reference(grad, x, *numbers)
    exact = kernels.weight_gradient(grad, x, *numbers, dtype=torch.float32)
    assert exact.dtype == torch.float32 and relative(exact, expected) < 1e-5
    rounded = kernels.weight_gradient(grad, x, *numbers)
    assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype))


def test_of_a_transposed_convolution(device: str) -> None:
    """Input and gradient have exchanged their parts."""
    x = images_of((2, 6, 5, 7), torch.float32, device)
    weight = torch.zeros(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = torch.conv_transpose2d(x.double().cpu(), weight, None, 2, 1, 1)
    grad = images_of(tuple(y.shape), torch.float32, device)
    (expected,) = torch.autograd.grad(y, weight, grad.double().cpu())
    found = kernels.weight_gradient(x, grad, (3, 3), 2, 1, "zeros", precision="ieee")
    assert relative(found, expected) < 2e-6


def test_views_and_planes(device: str) -> None:
    """A slice of the channels of a wider tensor, an expanded batch and contiguous images."""
    wide = images_of((2, 24, 6, 9), torch.float32, device)
    grad, x = wide[:, 3:8], images_of((1, 10, 6, 9), torch.float32, device).expand(2, -1, -1, -1)
    numbers = (3, 3), 1, 1, "replicate"
    expected = weight_gradient_reference(grad, x, *numbers)
    for g, given in ((grad, x), (grad.contiguous(), x.contiguous())):
        found = kernels.weight_gradient(g, given, *numbers, precision="ieee")
        assert relative(found, expected) < 2e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_finite_hides_what_is_not(device: str, value: float) -> None:
    grad, x = problem(0, torch.float32, device)
    x[0, 7, 4, 4] = value
    found = kernels.weight_gradient(grad, x, *CASES[0][5:], precision="ieee")
    assert bool(torch.isfinite(found[:, :7]).all()) and not bool(torch.isfinite(found[:, 7]).any())


def test_what_is_worth_a_measurement() -> None:
    on = Machine()
    wide = kernels.contenders(1024, 1024, (3, 3), 32 * 64, 2, on)
    assert (wide[0].bm, wide[0].bn, wide[0].splits) == (128, 128, 1)
    first = kernels.contenders(64, 36, (7, 7), 512 * 1024, 2, on)
    assert 1 <= len(first) <= kernels.MOST_CONTENDERS and all(c.splits > 1 for c in first)
    thin = kernels.contenders(3, 64, (7, 7), 512 * 1024, 2, on)
    assert thin[0].bm == 16
    deepest = kernels.contenders(512, 512, (4, 4), 1, 2, on)
    assert all(c.splits == 1 for c in deepest)
    assert all(c.bk in (16, 32) for c in kernels.contenders(64, 64, (3, 3), 4096, 4, on))
    small = dataclasses.replace(on, shared=90 * 1024)
    assert all(c.bm * c.bn < 128 * 128 for c in kernels.contenders(1024, 1024, (3, 3), 2048, 2, small))


def test_errors(device: str) -> None:
    grad, x = problem(0, torch.float32, device)
    run = kernels.weight_gradient
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        run(grad, x.double(), (3, 3), 1, 1, "zeros")
    with pytest.raises(ValueError, match="they must be alike"):
        run(grad, x.half(), (3, 3), 1, 1, "zeros")
    with pytest.raises(ValueError, match="grad has shape .* filled"):
        run(grad[:0], x[:0], (3, 3), 1, 1, "zeros")
    with pytest.raises(ValueError, match="no convolution of .* stride 2 and padding 1 has such an output"):
        run(grad, x, (3, 3), 2, 1, "zeros")
    with pytest.raises(ValueError, match="no convolution"):
        run(grad[:1], x, (3, 3), 1, 1, "zeros")
    with pytest.raises(ValueError, match="padding_mode is 'circular'; choose one of"):
        run(grad, x, (3, 3), 1, 1, "circular")
    with pytest.raises(ValueError, match="reflection needs it below"):
        run(grad, x, (3, 3), 1, 9, "reflect")
    with pytest.raises(ValueError, match="stride is 0"):
        run(grad, x, (3, 3), 0, 1, "zeros")
    if not interpreted():
        with pytest.raises(ValueError, match="CUDA tensors"):
            run(grad.cpu(), x.cpu(), (3, 3), 1, 1, "zeros")


def test_too_large_a_batch() -> None:
    """Refused by its shape: a tensor on the meta device has no memory."""
    grad = torch.empty(2, 1, 2**15, 2**15, device="meta")
    assert "pixels" in kernels.refuses(grad, grad, (1, 1))
    many = torch.empty(1, 2**14, 1, 1, device="meta")
    assert "weights" in kernels.refuses(many, many, (3, 3)) and not kernels.refuses(many, many, (1, 1))
