"""The weight gradient's native kernels against float64; those of GPUs: tests/gpu_kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from p2pfast.ops.weight_gradient import ALGORITHMS, weight_gradient, weight_gradient_reference

WEIGHTS = [  # images, inputs, outputs, height, width, kernel, stride, padding, mode
    (1, 3, 40, 4, 4, 3, 1, 1, "zeros"),
    (2, 33, 5, 7, 10, 3, 1, 1, "reflect"),
    (1, 16, 50, 3, 5, 3, 1, 2, "replicate"),
    (2, 40, 7, 9, 12, 3, 2, 1, "zeros"),
    (1, 35, 31, 8, 6, 4, 2, 1, "zeros"),
    (1, 17, 9, 2, 2, 4, 2, 1, "zeros"),
    (1, 9, 64, 11, 7, 4, 1, 2, "zeros"),
    (1, 6, 100, 30, 70, 4, 1, 1, "reflect"),
    (2, 5, 3, 20, 70, 7, 1, 3, "reflect"),
    (1, 3, 20, 40, 40, 5, 3, 0, "zeros"),
    (3, 2, 8, 96, 96, 3, 1, 1, "zeros"),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_reference(dtype: torch.dtype, algorithm: str, cpu_level: str) -> None:
    """Against float64, far from zero, at any number of threads with the same bits."""
    if algorithm == "pairs" and dtype == torch.float32:
        x = torch.randn(1, 3, 4, 4).contiguous(memory_format=torch.channels_last)
        with pytest.raises(ValueError, match="bfloat16"):
            weight_gradient(x, x, (3, 3), 1, 1, "zeros", algorithm)
        return
    for images, inputs, outputs, height, width, kernel, stride, padding, mode in WEIGHTS:
        if algorithm == "minimal" and (kernel not in (3, 4) or stride > 2):
            continue
        x = (torch.randn(images, inputs, height, width) + 3).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        size = [(s + 2 * padding - kernel) // stride + 1 for s in (height, width)]
        grad = torch.randn(images, outputs, *size).to(dtype).contiguous(memory_format=torch.channels_last)
        numbers = (kernel, kernel), stride, padding, mode
        expected = weight_gradient_reference(grad, x, *numbers)
        found = []
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                found.append(weight_gradient(grad, x, *numbers, algorithm))
            finally:
                torch.set_num_threads(before)
        got = found[0]
        assert got.is_contiguous() and got.dtype == dtype and torch.equal(got, found[1])
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()
        if dtype == torch.bfloat16:  # the float32 sums themselves, under autocast
            exact = weight_gradient(grad, x, *numbers, algorithm, torch.float32)
            assert exact.dtype == torch.float32 and torch.equal(exact.bfloat16(), got)
            assert (exact.double() - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("algorithm", ["taps", "rows", "pairs"])
@pytest.mark.parametrize("width", [1, 8, 9, 129])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_reaches_what_it_is_in(algorithm: str, width: int, stride: int, cpu_level: str) -> None:
    """The taps that see it, and no others, wherever it is: at ends of blocks, too."""
    for at in {0, width // 2, width - 1}:
        x = torch.randn(1, 3, 5, width).bfloat16().contiguous(memory_format=torch.channels_last)
        x[0, 1, 2, at] = torch.nan
        out = (5 - 1) // stride + 1, (width - 1) // stride + 1
        grad = torch.randn(1, 4, *out).bfloat16().contiguous(memory_format=torch.channels_last)
        numbers = (3, 3), stride, 1, "zeros"
        expected = weight_gradient_reference(grad, x, *numbers)
        got = weight_gradient(grad, x, *numbers, algorithm)
        assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_the_reference_is_autograds(mode: str) -> None:
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    weight = torch.zeros(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, [1] * 4, mode="constant" if mode == "zeros" else mode)
    y = torch.conv2d(padded, weight, stride=2)
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, grad)
    torch.testing.assert_close(weight_gradient_reference(grad, x, (3, 3), 2, 1, mode), expected)
