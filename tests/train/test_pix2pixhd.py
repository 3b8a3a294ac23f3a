from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import FIXTURES, seed_weights
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from p2pfast.cli import app
from p2pfast.data import draw_scene
from p2pfast.errors import UsageError
from p2pfast.train.config import Config, Pix2PixHDConfig
from p2pfast.train.parallel import Place
from p2pfast.train.pix2pixhd import Pix2PixHD
from p2pfast.train.trainer import train
from tests.train.conftest import golden_input, gradients, networks

CPU = Place(torch.device("cpu"))


def make(config: Config) -> Pix2PixHD:
    torch.manual_seed(config.seed)
    assert isinstance(config, Pix2PixHDConfig)
    return Pix2PixHD(config, CPU)


def batch(size: int = 1) -> dict[str, Tensor]:
    scenes = [draw_scene(seed, 64, 32) for seed in range(size)]
    return {
        "labels": torch.from_numpy(np.stack([scene.labels for scene in scenes]))[:, None],
        "instances": torch.from_numpy(np.stack([scene.instances for scene in scenes]).astype(int))[:, None],
        "image": torch.from_numpy(np.stack([scene.photo for scene in scenes])).permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_the_published_one(fused: bool) -> None:
    facts = json.loads((FIXTURES / "train_step_pix2pixhd.json").read_text())
    config = Pix2PixHDConfig(
        name="x", ngf=8, n_downsample_global=2, n_blocks_global=3, ndf=8, fused=fused, lr=0.0
    )
    objective = make(config)
    for run in objective.networks.values():
        seed_weights(run.network)
    taken = gradients(objective)
    label = golden_input("train_step_pix2pixhd", "label", (1, 36, 64, 128))
    image = golden_input("train_step_pix2pixhd", "image", (1, 3, 64, 128)).tanh()
    objective._inputs = lambda batch: (label, image, image[:, :1])  # type: ignore[method-assign]
    terms = objective.step([batch()])
    for name, value in terms.items():
        assert float(value) == pytest.approx(facts[f"loss_{name}"], rel=2e-5), name
    for net in "GD":
        for key, norm in facts[f"grad_norm_{net}"].items():
            # Biases before a norm have no gradient but rounding.
            assert float(taken[f"{net}.{key}"].norm()) == pytest.approx(norm, rel=1e-3, abs=1e-5), key


def test_input_channels(tiny: Callable[..., Config]) -> None:
    for options, generator, discriminator in (
        ({}, 36, 39),
        ({"no_instance": True}, 35, 38),
        ({"instance_feat": True, "n_downsample_E": 2, "nef": 2}, 39, 39),
        ({"label_nc": 0}, 3, 6),
    ):
        objective = make(tiny("pix2pixhd", **options))
        assert objective.generator.network.input_nc == generator
        first = objective.discriminator.network.state_dict()["scale0_layer0.0.weight"]
        assert first.shape[1] == discriminator


@pytest.mark.parametrize("feature", ["instance_feat", "label_feat"])
def test_the_encoder_learns_with_the_generator(tiny: Callable[..., Config], feature: str) -> None:
    objective = make(tiny("pix2pixhd", n_downsample_E=2, nef=2, **{feature: True}))
    taken = gradients(objective)
    objective.step([batch()])
    assert any(float(value.abs().max()) > 0 for key, value in taken.items() if key.startswith("E."))


def test_the_global_network_really_unfreezes(tiny: Callable[..., Config]) -> None:
    """The published script makes a new optimiser but leaves it without effect."""
    objective = make(tiny("pix2pixhd", netG="local", niter_fix_global=2, n_epochs=9))
    network = objective.generator.network

    def changed(epoch: int) -> dict[str, bool]:
        before = {key: value.detach().clone() for key, value in network.named_parameters()}
        objective.start_epoch(epoch)
        objective.step([batch()])
        return {key: not torch.equal(before[key], value) for key, value in network.named_parameters()}

    for epoch in (1, 2):
        moved = changed(epoch)
        assert {key.split(".")[0] for key, value in moved.items() if value} == {"model1_1", "model1_2"}
    assert all(value for key, value in changed(3).items() if key.endswith("weight"))
    # A run that goes on in the middle freezes and unfreezes by the epoch too.
    later = make(tiny("pix2pixhd", netG="local", niter_fix_global=2, n_epochs=9))
    later.start_epoch(3)
    assert all(parameter.requires_grad for parameter in later.generator.network.parameters())


def vgg(path: Path) -> Path:
    widths = [64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512]
    numbers = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28]
    state, before = {}, 3
    for number, width in zip(numbers, widths, strict=True):
        state[f"features.{number}.weight"] = torch.full((width, before, 3, 3), 0.2 / before)
        state[f"features.{number}.bias"] = torch.zeros(width)
        before = width
    torch.save(state, path)
    return path


def test_the_vgg_loss_takes_weights_that_are_given(tiny: Callable[..., Config], tmp_path: Path) -> None:
    without = make(tiny("pix2pixhd"))
    assert "--vgg-weights" in without.notes()[0] and "G_VGG" not in without.step([batch()])
    assert make(tiny("pix2pixhd", no_vgg_loss=True)).notes() == []
    objective = make(tiny("pix2pixhd", vgg_weights=str(vgg(tmp_path / "vgg19.pth"))))
    assert float(objective.step([batch()])["G_VGG"]) > 0 and objective.notes() == []
    for path in (tmp_path / "none.pth", FIXTURES / "README.md"):
        with pytest.raises(UsageError, match="--vgg-weights"):
            make(tiny("pix2pixhd", vgg_weights=str(path)))


def test_an_l1_loss_joins_the_generators(tiny: Callable[..., Config]) -> None:
    """Its share of the gradient is what more of it adds."""
    gradients = []
    for weight in (0.0, 1.0, 3.0):
        objective = make(tiny("pix2pixhd", lambda_L1=weight, lr=0.0))
        taken: list[Tensor] = []
        for parameter in objective.generator.network.parameters():
            parameter.register_hook(lambda g, taken=taken: taken.append(g.clone()))
        terms = objective.step([batch()])
        assert ("G_L1" in terms) == (weight > 0)
        gradients.append(torch.cat([g.flatten() for g in taken]))
    none, once, thrice = gradients
    assert (thrice - none - 3 * (once - none)).norm() < 1e-3 * (thrice - none).norm()


def test_other_losses(tiny: Callable[..., Config]) -> None:
    options: dict[str, Any] = {"no_lsgan": True, "no_ganFeat_loss": True, "pool_size": 1, "amp": "bfloat16"}
    terms = make(tiny("pix2pixhd", **options)).step([batch(), batch()])
    assert list(terms) == ["G_GAN", "D_real", "D_fake"]
    assert all(torch.isfinite(value) for value in terms.values())


def test_accumulated_batches_are_one_large_batch(tiny: Callable[..., Config]) -> None:
    taken = []
    whole = batch(2)
    parts = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(2)]
    for batches in ([whole], parts):
        objective = make(tiny("pix2pixhd", lr=0.0))
        taken.append(gradients(objective))
        objective.step(batches)
    for key, value in taken[0].items():
        torch.testing.assert_close(taken[1][key], value, rtol=1e-3, atol=2e-5, msg=key)


def test_coarse_then_fine_then_translate(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """The published schedule in small: a global network, the enhancer on top of it, results from it."""
    coarse = tiny("pix2pixhd", ngf=8, max_steps=2)
    train(coarse)
    fine = tiny("pix2pixhd", netG="local", niter_fix_global=1, load_pretrain=str(coarse.run_folder))
    outcome = train(fine)
    assert outcome.step == 8
    trained = networks(coarse.run_folder)["latest_net_G.pth"], networks(fine.run_folder)["latest_net_G.pth"]
    shared = [key for key in trained[0] if key in trained[1]]
    assert len(shared) == len(trained[0]) - 2
    assert not torch.equal(trained[0]["model.1.weight"], trained[1]["model.1.weight"])
    scene = draw_scene(9, 64, 32)
    for name, ids in (("label", scene.labels), ("instance", scene.instances)):
        Image.fromarray(ids).save(tmp_path / f"{name}.png")
    line = ["translate", fine.run_folder / "latest_net_G.pth", "--labels", tmp_path / "label.png"]
    line += ["--instances", tmp_path / "instance.png", "-o", tmp_path / "out", "--device", "cpu"]
    done = CliRunner().invoke(app, [str(part) for part in line])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out" / "label.png") as picture:
        assert picture.size == (64, 32)


def test_pictures_to_pictures(tiny: Callable[..., Config]) -> None:
    config = tiny("pix2pixhd", label_nc=0, max_steps=2, display_freq=2)
    train(config)
    names = {path.stem.split("_", 2)[2] for path in (config.run_folder / "web/images").iterdir()}
    assert names == {"input", "fake_B", "real"}
