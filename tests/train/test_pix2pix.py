from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from networks import FIXTURES, seed_weights
from torch import Tensor

from p2pfast.train.config import Config, Pix2PixConfig
from p2pfast.train.objective import Objective
from p2pfast.train.parallel import Place
from p2pfast.train.pix2pix import Pix2Pix
from p2pfast.train.pool import ImagePool
from tests.train.conftest import assert_identical, golden_input, gradients

CPU = Place(torch.device("cpu"))


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_published_one(fused: bool) -> None:
    facts = json.loads((FIXTURES / "train_step_pix2pix.json").read_text())
    config = Pix2PixConfig(
        name="x", netG="unet_128", ngf=8, ndf=8, no_dropout=True, lr=0.0, fused=fused, device="cpu"
    )
    objective = Pix2Pix(config, CPU)
    for run in objective.networks.values():
        seed_weights(run.network)
    taken = gradients(objective)
    objective.image = lambda batch, key: batch[key]  # type: ignore[method-assign]
    batch = {key: golden_input("train_step_pix2pix", key, (2, 3, 128, 128)).tanh() for key in "AB"}
    terms = objective.step([batch])
    for name, value in terms.items():
        named = f"loss_{name}"
        assert float(value) == pytest.approx(facts[named], rel=2e-5), name
    for net in "GD":
        assert [f"{net}.{key}" for key in facts[f"grad_norm_{net}"]] == [k for k in taken if k[0] == net]
        for key, norm in facts[f"grad_norm_{net}"].items():
            assert float(taken[f"{net}.{key}"].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-6), key


def step(config: Config, batches: list[dict[str, Tensor]], steps: int = 2) -> Objective:
    torch.manual_seed(config.seed)
    assert isinstance(config, Pix2PixConfig)
    objective = Pix2Pix(config, CPU)
    objective.finish_setup()
    for _ in range(steps):
        objective.step(batches)
    return objective


def batch(size: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {key: torch.randint(0, 256, (size, 3, 32, 32), generator=random).byte() for key in "AB"}


def test_accumulated_batches_are_one_large_batch(tiny: Callable[..., Config]) -> None:
    config = tiny("pix2pix", norm="instance", no_dropout=True)
    parts = [batch(1, 0), batch(1, 1)]
    whole = {key: torch.cat([part[key] for part in parts]) for key in "AB"}
    taken = []
    for batches in ([whole], parts):
        objective = step(config, [], 0)
        taken.append(gradients(objective))
        objective.step(batches)
    assert list(taken[0]) == list(taken[1])
    for key, value in taken[0].items():
        torch.testing.assert_close(taken[1][key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_accumulation_repeats_dropout(tiny: Callable[..., Config]) -> None:
    """G's second pass over a batch must be the first again, or D and G would see different images."""
    config = tiny("pix2pix", lr=0.0)
    seen: list[Tensor] = []
    objective = step(config, [batch(1, 0)], 0)
    inner = objective.networks["G"].fast
    objective.networks["G"].fast = lambda x: seen.append(inner(x)) or seen[-1]  # type: ignore
    objective.step([batch(1, 0), batch(1, 1)])
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], inner(seen[0]))


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_mixed_precision_follows_float32(tiny: Callable[..., Config], amp: str) -> None:
    exact = step(tiny("pix2pix", no_dropout=True), [batch(2, 0)], 1)
    mixed = step(tiny("pix2pix", no_dropout=True, amp=amp), [], 0)
    if amp == "float16":
        assert mixed.scaler.is_enabled()
        # The scale that a run starts with overflows at first, on purpose, and those steps are left out.
        mixed.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mixed.step([batch(2, 0)])
    for name, run in exact.networks.items():
        other = dict(mixed.networks[name].network.named_parameters())
        for key, value in run.network.named_parameters():
            assert other[key].dtype == torch.float32
            # Adam's first step moves every weight by the learning rate, in the sign of its gradient.
            differ = ((other[key] - value).abs() >= 1e-4).sum()
            assert differ <= max(1, 0.2 * value.numel()), (name, key, int(differ))


def test_a_float16_step_that_overflows_is_left_out(tiny: Callable[..., Config]) -> None:
    objective = step(tiny("pix2pix", no_dropout=True, amp="float16"), [], 0)
    objective.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {key: value.clone() for key, value in objective.networks["G"].network.named_parameters()}
    terms = objective.step([batch(1, 0)])
    assert all(torch.isfinite(value) for value in terms.values())
    assert objective.scaler.get_scale() < 2.0**60
    assert_identical(before, dict(objective.networks["G"].network.named_parameters()))


@pytest.mark.parametrize("gan_mode", ["lsgan", "hinge", "wgangp"])
def test_other_adversarial_losses(tiny: Callable[..., Config], gan_mode: str) -> None:
    objective = step(tiny("pix2pix", gan_mode=gan_mode), [batch(1, 0)], 0)
    terms = objective.step([batch(1, 0)])
    assert all(torch.isfinite(value) for value in terms.values())
    assert ("D_GP" in terms) == (gan_mode == "wgangp")
    assert objective.broken() is None


def test_moving_average(tiny: Callable[..., Config]) -> None:
    objective = step(tiny("pix2pix", ema=0.75), [batch(1, 0)], 0)
    before = {key: value.clone() for key, value in objective.networks["G"].network.state_dict().items()}
    objective.step([batch(1, 0)])
    after = objective.networks["G"].network.state_dict()
    averages = objective.weights()["G_ema"]
    key = "model.model.0.weight"
    torch.testing.assert_close(averages[key], 0.75 * before[key] + 0.25 * after[key])
    buffer = "model.model.1.model.2.running_mean"
    assert torch.equal(averages[buffer], after[buffer])
    assert list(averages) == list(after)


def test_dropout_is_live_and_weights_are_drawn_as_published(tiny: Callable[..., Config]) -> None:
    objective = step(tiny("pix2pix", netG="unet_64", ngf=32, crop_size=64), [batch(1, 0)], 0)
    generator = objective.networks["G"].network
    assert any(isinstance(part, torch.nn.Dropout) for part in generator.modules())
    for key, value in generator.state_dict().items():
        if value.dim() > 1:
            assert abs(float(value.std()) - 0.02) < 2e-3 and abs(float(value.mean())) < 2e-3, key
        elif key.endswith("bias"):
            assert float(value.abs().max()) == 0
        elif key.endswith("weight"):
            assert abs(float(value.mean()) - 1) < 0.02, key


def test_pool_returns_old_images_half_of_the_time() -> None:
    pool = ImagePool(5, seed=0)
    images = [torch.full((1, 1, 2, 2), float(i)) for i in range(400)]
    shown = [int(pool.query(image)[0, 0, 0, 0]) for image in images]
    assert shown[:5] == [0, 1, 2, 3, 4]
    new = sum(value == i for i, value in enumerate(shown))
    assert 150 < new < 250 and len(pool.images) == 5
    again = ImagePool(5, seed=9)
    again.load(pool.state(), torch.device("cpu"))
    assert_identical([again.query(i) for i in images], [pool.query(i) for i in images])
    assert_identical(ImagePool(0, 0).query(images[3]), images[3])
