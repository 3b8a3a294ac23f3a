"""Losses and their backward pass at the sizes of 2048x1024 training against PyTorch eager and torch.compile:
features of pix2pixHD's three discriminators (ndf 64, n_layers 3). ``extra_info`` has the ratios.

    pytest benchmarks/test_losses.py --full --benchmark-json=losses.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast import _C
from p2pfast.nn import FeatureMatchingLoss, GANLoss


def features(full: bool, dtype: torch.dtype) -> list[list[Tensor]]:
    """The outputs of a discriminator's five stages at three scales."""
    found = []
    for scale in range(3):
        height, width = (side // (1 if full else 4) // 2**scale for side in (1024, 2048))
        stages = []
        for channels, stride in ((64, 2), (128, 2), (256, 2), (512, 1), (1, 1)):
            height, width = (side // stride + 1 for side in (height, width))
            stages.append(torch.randn(1, channels, height, width).to(dtype))
        found.append(stages)
    return found


def eager_matching(fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
    """As pix2pixHD's training script adds it up."""
    loss = torch.zeros(())
    for f, r in zip(fake, real, strict=True):
        for a, b in zip(f[:-1], r[:-1], strict=True):
            loss = loss + 4.0 / 4 * 1.0 / 3 * 10.0 * F.l1_loss(a, b.detach())
    return loss


def eager_gan(predictions: Sequence[Sequence[Tensor]]) -> Tensor:
    loss = torch.zeros(())
    for p in predictions:
        target = torch.ones(1).to(p[-1].dtype).expand_as(p[-1])
        loss = loss + F.mse_loss(p[-1], target)
    return loss


def eager_vanilla(predictions: Sequence[Sequence[Tensor]]) -> Tensor:
    loss = torch.zeros(())
    for p in predictions:
        target = torch.ones(1).to(p[-1].dtype).expand_as(p[-1])
        loss = loss + F.binary_cross_entropy_with_logits(p[-1], target)
    return loss


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, repeat: int) -> dict[str, float]:
    """Medians, measured in turn, so that a change of the machine's load meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            if i > 0:
                times[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(t) for name, t in times.items()}


def compare(benchmark: Any, functions: dict[str, Callable[[], object]], rounds: int, repeat: int = 1) -> None:
    benchmark.pedantic(functions["p2pfast"], rounds=rounds, iterations=repeat, warmup_rounds=1)
    info = benchmark.extra_info
    info |= {"threads": torch.get_num_threads(), "level": _C.active_level()}
    if benchmark.stats is None:  # with --benchmark-disable
        return
    seconds = interleaved(functions, rounds, repeat)
    for name, value in seconds.items():
        info[f"{name}_ms"] = 1e3 * value
        info[f"times_faster_than_{name}"] = value / seconds["p2pfast"]


def step(function: Callable[..., Tensor], inputs: Sequence[Tensor], *args: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*args), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_feature_matching(benchmark: Any, full: bool, dtype: torch.dtype) -> None:
    with torch.inference_mode(False):
        fake, real = features(full, dtype), features(full, dtype)
        inputs = [f.requires_grad_() for scale in fake for f in scale[:-1]]
        loss = FeatureMatchingLoss()
        compiled = torch.compile(eager_matching)
        functions: dict[str, Callable[[], Any]] = {
            "p2pfast": lambda: step(loss, inputs, fake, real),
            "eager": lambda: step(eager_matching, inputs, fake, real),
            "torch.compile": lambda: step(compiled, inputs, fake, real),
        }
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(functions["p2pfast"](), functions["eager"](), rtol=tolerance, atol=0.0)
        compare(benchmark, functions, 7 if full else 20)


@pytest.mark.parametrize("mode", ["lsgan", "vanilla"])
def test_gan_loss(benchmark: Any, full: bool, mode: str) -> None:
    with torch.inference_mode(False):
        predictions = [[scale[-1].requires_grad_()] for scale in features(full, torch.float32)]
        inputs = [p[-1] for p in predictions]
        loss, eager = GANLoss(mode), eager_gan if mode == "lsgan" else eager_vanilla
        compiled = torch.compile(eager)
        functions: dict[str, Callable[[], Any]] = {
            "p2pfast": lambda: step(loss, inputs, predictions, True),
            "eager": lambda: step(eager, inputs, predictions),
            "torch.compile": lambda: step(compiled, inputs, predictions),
        }
        torch.testing.assert_close(functions["p2pfast"](), functions["eager"]())
        compare(benchmark, functions, 30, 10)


def test_generator_objective(benchmark: Any, full: bool) -> None:
    """LSGAN and feature matching of the generator's step together."""
    with torch.inference_mode(False):
        fake, real = features(full, torch.float32), features(full, torch.float32)
        inputs = [f.requires_grad_() for scale in fake for f in scale]
        gan, matching = GANLoss(), FeatureMatchingLoss()

        def eager() -> Tensor:
            return eager_gan(fake) + eager_matching(fake, real)

        compiled = torch.compile(eager)
        functions: dict[str, Callable[[], Any]] = {
            "p2pfast": lambda: step(lambda: gan(fake, True, False) + matching(fake, real), inputs),
            "eager": lambda: step(eager, inputs),
            "torch.compile": lambda: step(compiled, inputs),
        }
        torch.testing.assert_close(functions["p2pfast"](), functions["eager"](), rtol=1e-5, atol=1e-9)
        compare(benchmark, functions, 7 if full else 20)
