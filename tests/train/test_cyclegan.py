from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from p2pfast.errors import UsageError
from p2pfast.train.config import Config, CycleGANConfig
from p2pfast.train.cyclegan import CycleGAN
from p2pfast.train.parallel import Place
from p2pfast.train.trainer import train
from tests.train.conftest import gradients, networks

CPU = Place(torch.device("cpu"))


def make(config: Config) -> CycleGAN:
    torch.manual_seed(config.seed)
    assert isinstance(config, CycleGANConfig)
    return CycleGAN(config, CPU)


def batch(size: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randint(0, 256, (size, 3, 32, 32), generator=random).byte() for key in "AB"}


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_published_one(tiny: Callable[..., Config], fused: bool) -> None:
    """Losses and gradients written out: both generators first, then discriminators on the same fakes."""
    objective = make(tiny("cyclegan", fused=fused, lr=0.0, lambda_A=7.0, lambda_B=9.0))
    nets = {name: run.network for name, run in objective.networks.items()}
    given = batch(2, 1)  # nothing within rounding of an edge of ReLU or L1
    a, b = (given[key].float() / 127.5 - 1 for key in "AB")
    fake_b, fake_a = nets["G_A"](a), nets["G_B"](b)
    losses = {
        "G_A": F.mse_loss(x := nets["D_A"](fake_b), torch.ones_like(x)),
        "G_B": F.mse_loss(x := nets["D_B"](fake_a), torch.ones_like(x)),
        "cycle_A": 7 * F.l1_loss(nets["G_B"](fake_b), a),
        "cycle_B": 9 * F.l1_loss(nets["G_A"](fake_a), b),
        "idt_A": 9 * 0.5 * F.l1_loss(nets["G_A"](b), b),
        "idt_B": 7 * 0.5 * F.l1_loss(nets["G_B"](a), a),
    }
    for name, real, fake in (("D_A", b, fake_b), ("D_B", a, fake_a)):
        of_real, of_fake = nets[name](real), nets[name](fake.detach())
        losses[name] = 0.5 * ((of_real - 1) ** 2).mean() + 0.5 * (of_fake**2).mean()
    wanted: dict[str, Tensor] = {}
    for group in ("G", "D"):
        parameters = {
            f"{name}.{key}": p
            for name, net in nets.items()
            if name.startswith(group)
            for key, p in net.named_parameters()
        }
        total = torch.stack([v for k, v in losses.items() if k.startswith("D") == (group == "D")]).sum()
        values = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
        wanted |= dict(zip(parameters, values, strict=True))
    taken = gradients(objective)
    terms = objective.step([given])
    assert list(terms) == list(losses)
    for name, value in losses.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-5, atol=1e-6, msg=name)
    assert set(taken) == set(wanted)
    for key, value in wanted.items():
        # Minimal filtering rounds relative to the largest values, of several units here.
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(taken[key], value, rtol=1e-3, atol=2e-5 * size, msg=key)


def test_discriminators_are_shown_the_pool(tiny: Callable[..., Config]) -> None:
    objective = make(tiny("cyclegan", pool_size=2))
    for seed in range(4):
        objective.step([batch(1, seed)])
    assert [len(pool.images) for pool in objective.pools.values()] == [2, 2]
    assert set(objective.pictures()) == {
        *("real_A", "fake_B", "rec_A", "idt_A"),
        *("real_B", "fake_A", "rec_B", "idt_B"),
    }


def test_accumulated_batches_are_one_large_batch(tiny: Callable[..., Config]) -> None:
    parts = [batch(1, 0), batch(1, 1)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in "AB"}
    taken = []
    for batches in ([whole], parts):
        objective = make(tiny("cyclegan", lr=0.0))
        taken.append(gradients(objective))
        objective.step(batches)
    for key, value in taken[0].items():
        torch.testing.assert_close(taken[1][key], value, rtol=1e-3, atol=2e-5, msg=key)


def test_a_run(tiny: Callable[..., Config]) -> None:
    config = tiny("cyclegan", ema=0.5, amp="bfloat16", display_freq=8)
    assert train(config).step == 8
    nets = {f"latest_net_{name}.pth" for name in ("G_A", "G_B", "D_A", "D_B", "G_A_ema", "G_B_ema")}
    assert nets <= set(networks(config.run_folder))


def test_identity_needs_equal_channels(tiny: Callable[..., Config]) -> None:
    with pytest.raises(UsageError, match="--input-nc 1 and --output-nc 3 give --lambda-identity 0"):
        make(tiny("cyclegan", input_nc=1))
    terms = make(tiny("cyclegan", lambda_identity=0.0)).step([batch(1, 0)])
    assert "idt_A" not in terms
