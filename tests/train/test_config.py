from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from p2pfast.errors import UsageError
from p2pfast.train.config import (
    CONFIGS,
    CycleGANConfig,
    Pix2PixConfig,
    Pix2PixHDConfig,
    read_config,
    save_config,
)


def test_defaults_are_the_published_recipes() -> None:
    for kind in CONFIGS.values():
        config = kind(name="x")
        config.check()
        assert (config.lr, config.beta1, config.batch_size) == (2e-4, 0.5, 1)
        assert (config.n_epochs, config.n_epochs_decay) == (100, 100)
    pix = Pix2PixConfig(name="x")
    assert (pix.netG, pix.netD, pix.norm, pix.gan_mode, pix.lambda_L1) == (
        "unet_256",
        "basic",
        "batch",
        "vanilla",
        100,
    )
    assert not pix.no_dropout and pix.pool_size == 0 and (pix.load_size, pix.crop_size) == (286, 256)
    cycle = CycleGANConfig(name="x")
    assert (cycle.netG, cycle.norm, cycle.gan_mode, cycle.pool_size) == (
        "resnet_9blocks",
        "instance",
        "lsgan",
        50,
    )
    assert (cycle.lambda_A, cycle.lambda_B, cycle.lambda_identity, cycle.no_dropout) == (10, 10, 0.5, True)
    hd = Pix2PixHDConfig(name="x")
    assert (hd.label_nc, hd.num_D, hd.n_layers_D, hd.ndf, hd.lambda_feat) == (35, 2, 3, 64, 10)
    assert (hd.load_size, hd.preprocess, hd.n_downsample_global, hd.n_blocks_global) == (
        1024,
        "scale_width",
        4,
        9,
    )


def test_learning_rate_is_constant_then_falls_to_zero() -> None:
    config = Pix2PixConfig(name="x", n_epochs=2, n_epochs_decay=3, lr=1.0)
    assert [config.learning_rate(e) for e in range(1, 7)] == pytest.approx([1, 1, 0.75, 0.5, 0.25, 0])
    hd = Pix2PixHDConfig(name="x", n_epochs=2, n_epochs_decay=4, lr=1.0)
    assert [hd.learning_rate(e) for e in range(1, 7)] == pytest.approx([1, 1, 1, 0.75, 0.5, 0.25])


def test_saved_and_read_back(tmp_path: Path) -> None:
    config = CycleGANConfig(name="x", lr=0.1, no_flip=True, direction="BtoA")
    save_config(config, tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config
    for text, message in (
        ("{", "not a configuration"),
        ('{"kind": "stylegan"}', "not a configuration"),
        ('{"kind": "cyclegan", "lambda_C": 1}', r"no option lambda_C \(did you mean lambda_"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            read_config(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Pix2PixConfig(), "--name ''"),
        (Pix2PixConfig(name="../x"), "plain name"),
        (Pix2PixConfig(name="x", gan_mode="rms"), "--gan-mode rms: use vanilla, lsgan, hinge, wgangp"),
        (Pix2PixConfig(name="x", batch_size=0), "--batch-size 0: must be at least 1"),
        (Pix2PixConfig(name="x", ema=1.0), "--ema 1.0: must be below 1"),
        (Pix2PixConfig(name="x", n_epochs=0, n_epochs_decay=0), "nothing to train"),
        (Pix2PixHDConfig(name="x", niter_fix_global=3), "--niter-fix-global belongs to --netG local"),
        (Pix2PixHDConfig(name="x", instance_feat=True, no_instance=True), "needs instance maps"),
        (Pix2PixHDConfig(name="x", label_feat=True, label_nc=0), "need label maps"),
    ],
)
def test_mistakes_name_the_option(config: Pix2PixConfig, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config.check()


def test_every_option_is_explained() -> None:
    for kind in CONFIGS.values():
        for entry in dataclasses.fields(kind):
            assert entry.metadata["option"].help.endswith("."), entry.name
