"""Small networks trained for 200 steps with and without the fused path, from the same weights on the same
pairs; and that the bands would catch a kernel that is a little wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p2pfast import models, optimize
from p2pfast.models import norm_layer_of
from p2pfast.nn import GANLoss, L1Loss
from p2pfast.ops.conv_norm_act import convolution
from p2pfast.ops.conv_norm_act import op as layer_op

STEPS = 200
FIRST = 10
# Rounding differs, so curves part. Relative to the losses without the fused path: the largest difference in
# the first ten steps, and that of the means of the last fifty. Adam divides by a gradient's size, so what
# rounding leaves of a gradient that is nearly zero moves a weight as far as any other. In bfloat16 PyTorch's
# own curve ends up to 6 % from its float32 one, depending on the number of threads: two may be twice apart.
BANDS = {
    ("descent", torch.float32): (1e-4, 0.03),
    ("descent", torch.bfloat16): (1e-2, 0.12),
    ("adam", torch.float32): (2e-3, 0.03),
    ("adam", torch.bfloat16): (3e-2, 0.12),
}


def pairs(count: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """Discs and stripes: three masks as input, their colours as the picture."""
    generator = torch.Generator().manual_seed(0)
    side = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(side, side, indexing="ij")
    colours = torch.tensor([[0.8, -0.5, 0.1], [-0.6, 0.7, 0.3], [0.2, 0.1, -0.9]])
    found = []
    for _ in range(count):
        a, b, r, f = torch.rand(4, generator=generator)
        disc = (x - a).square() + (y - b).square() < 0.2 + 0.5 * r
        stripes = ((x + y) * (2 + 4 * f)).sin() > 0
        label = torch.where(disc, 0, torch.where(stripes, 1, 2))
        mask = nn.functional.one_hot(label, 3).permute(2, 0, 1)[None].float()
        found.append((mask, torch.einsum("ncij,ck->nkij", mask, colours)))
    return found


def adam(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), 1e-3, betas=(0.5, 0.999))


def descent(network: nn.Module) -> torch.optim.Optimizer:
    """Unlike Adam, this minds how large a gradient is."""
    return torch.optim.SGD(network.parameters(), 2e-3, momentum=0.5)


def curve(
    networks: list[nn.Module],
    fused: bool,
    dtype: torch.dtype,
    steps: int,
    size: int,
    optimiser: Callable[[nn.Module], torch.optim.Optimizer] = adam,
) -> Tensor:
    """The generator's losses, of copies of a generator and, if there is one, a discriminator."""
    own = [copy.deepcopy(network) for network in networks]
    run: list[Any] = [optimize(network, mode="train") for network in own] if fused else list(own)
    optimisers = [optimiser(network) for network in own]
    data, gan, l1, losses = pairs(8, size), GANLoss("vanilla"), L1Loss(10.0), []

    def judged(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            result: Tensor = run[1](torch.cat([x, y], 1))
        return result

    def descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    for i in range(steps):
        x, target = data[i % len(data)]
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            y = run[0](x)
        loss = l1(y, target)
        if len(run) > 1:
            of_fake, of_real = judged(x, y.detach()), judged(x, target)
            descend(optimisers[1], 0.5 * (gan(of_fake, False) + gan(of_real, True)))
            loss = loss + gan(judged(x, y), True, False)
        descend(optimisers[0], loss)
        losses.append(loss.detach())
    return torch.stack(losses)


def parted(quick: Tensor, plain: Tensor) -> tuple[float, float]:
    """What the bands bound."""
    first = ((quick - plain).abs() / plain)[:FIRST].max()
    ends = quick[-50:].mean(), plain[-50:].mean()
    return float(first), float(abs(ends[0] - ends[1]) / ends[1])


def resnet() -> tuple[list[nn.Module], int]:
    return [models.GlobalGenerator(3, 3, 16, 1, 1, norm_layer_of("instance"))], 24


def unet() -> tuple[list[nn.Module], int]:
    norm = norm_layer_of("batch")
    return [models.UnetGenerator(3, 3, 5, 8, norm), models.NLayerDiscriminator(6, 8, 2, norm)], 32


CASES = {"descent": (resnet, descent), "adam": (unet, adam)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_loss_curves(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network, optimiser = CASES[case]
    networks, size = network()
    quick, plain = (curve(networks, fused, dtype, STEPS, size, optimiser) for fused in (True, False))
    assert quick.isfinite().all() and quick[-50:].mean() < 0.7 * quick[:8].mean()
    first, last = parted(quick, plain)
    assert first <= BANDS[case, dtype][0] and last <= BANDS[case, dtype][1], (first, last)


def wrong(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """``function`` with its first result too large."""

    def scaled(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        return result * factor if isinstance(result, Tensor) else (result[0] * factor, *result[1:])

    return scaled


MUTANTS = {
    "weight gradient": (convolution, "weight_gradient", 1.05),
    "data gradient": (convolution, "data_gradient", 1.05),
    "norm's backward pass": (layer_op, "norm_act_backward", 1.05),
    "norm": (layer_op, "norm_act", 1.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_is_a_little_wrong_leaves_the_band(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    networks, size = resnet()
    plain = curve(networks, False, dtype, FIRST, size, descent)
    for name, (place, function, factor) in MUTANTS.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, function, wrong(getattr(place, function), factor))
            mutant = curve(networks, True, dtype, FIRST, size, descent)
        assert parted(mutant, plain)[0] > BANDS["descent", dtype][0], name
