"""What goes wrong around a run: odd files, lost states, two runs in one place, values that make no sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from p2pfast.cli import app
from p2pfast.data.augment import Preprocess
from p2pfast.data.datasets import LabelFolders, LabelledPhotos
from p2pfast.data.images import read_image
from p2pfast.data.loading import Order, load
from p2pfast.errors import InputError, UsageError
from p2pfast.nn import TotalVariationLoss
from p2pfast.train import storage
from p2pfast.train.config import Config, Pix2PixConfig, read_config, save_config
from p2pfast.train.lock import locked
from p2pfast.train.parallel import Place
from p2pfast.train.pool import ImagePool
from p2pfast.train.trainer import Quiet, objective_of, train

Tiny = Callable[..., Config]


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def of_two_sizes(tmp_path: Path) -> str:
    """CycleGAN's folders, with pictures of different sizes."""
    for side, sizes in (("A", [(40, 32), (40, 32)]), ("B", [(48, 40), (36, 44)])):
        for i, size in enumerate(sizes):
            picture(tmp_path / f"train{side}" / f"{i}.png", size, i)
    return str(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_instance_maps_of_8_and_16_bits_share_a_batch(workers: int, tmp_path: Path) -> None:
    for i, numbers in enumerate(([1, 2], [26001, 26257])):
        ids = np.repeat(np.array([numbers]), 4, 0)
        picture(tmp_path / "train_img" / f"{i}.png", (2, 4))
        for kind, values in (("label", ids % 30), ("inst", ids)):
            (tmp_path / f"train_{kind}").mkdir(exist_ok=True)
            mode = np.uint8 if values.max() < 256 else np.uint16
            Image.fromarray(values.astype(mode)).save(tmp_path / f"train_{kind}" / f"{i}.png")
    source = LabelFolders(tmp_path, "train", instances=True)
    data = LabelledPhotos(source, Preprocess("none", 4, 4, False, 1), 0, 35)
    (batch,) = load(data, Order(2, batch_size=2, serial=True), 0, 1, workers=workers)
    assert batch["instances"].dtype == torch.int32 and batch["labels"].dtype == torch.uint8
    assert batch["instances"][:, 0, 0].tolist() == [[1, 2], [26001, 26257]]


def test_a_moved_run_goes_on_where_it_is(tiny: Tiny, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny("pix2pix", max_steps=2), checkpoints_dir=str(tmp_path / "old"))
    train(config)
    (tmp_path / "new place").mkdir()
    (tmp_path / "old" / config.name).rename(tmp_path / "new place" / "renamed")
    line = ["train", "pix2pix", "--name", "renamed", "--checkpoints-dir", str(tmp_path / "new place")]
    done = CliRunner().invoke(app, [*line, "--continue-train", "--max-steps", "3"])
    assert done.exit_code == 0 and "steps 2 to 3" in done.output, done.output
    assert not (tmp_path / "old" / config.name).exists()
    assert read_config(tmp_path / "new place" / "renamed" / "config.json").name == "renamed"


def test_pictures_of_different_sizes(tiny: Tiny, of_two_sizes: str) -> None:
    pytest.importorskip("tensorboard")
    options = {"data": of_two_sizes, "preprocess": "none", "display_freq": 1, "no_tensorboard": False}
    outcome = train(tiny("cyclegan", **options, pool_size=1))
    assert outcome.step == 4
    with pytest.raises(InputError, match=r"cannot share a batch; use --batch-size 1, or a --preprocess that"):
        train(tiny("cyclegan", **options, batch_size=2, serial_batches=True))
    with pytest.raises(UsageError, match="--gan-mode wgangp mixes .* --preprocess none; use one that crops"):
        train(tiny("cyclegan", **options, gan_mode="wgangp"))


def test_an_older_image_of_another_size_joins_no_batch() -> None:
    pool = ImagePool(2, 0)
    pool.query(torch.zeros(2, 1, 4, 4))
    for _ in range(8):
        assert pool.query(torch.ones(3, 1, 6, 5)).shape == (3, 1, 6, 5)
    assert {tuple(image.shape) for image in pool.images} == {(1, 6, 5)}
    pool.query(torch.zeros(1, 1, 4, 4))
    assert pool.query(torch.zeros(1, 1, 3, 3)).shape[0] == 1


def test_networks_without_a_state_are_not_overwritten(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=1)
    train(config)
    (config.run_folder / storage.STATE_FILE).unlink()
    kept = (config.run_folder / "latest_net_G.pth").read_bytes()
    for again in (False, True):
        with pytest.raises(UsageError, match=r"latest_state.pth, is not there: start another --name, with"):
            train(dataclasses.replace(config, continue_train=again))
    assert (config.run_folder / "latest_net_G.pth").read_bytes() == kept


def test_a_run_killed_in_its_first_save_goes_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = (tiny("pix2pix", max_steps=2, print_freq=1) for _ in range(2))
    train(dataclasses.replace(whole))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(storage, "save_networks", killed)
        train(config)
    assert not list(config.run_folder.glob("*_net_*"))
    train(dataclasses.replace(config, continue_train=True))  # nothing is left to do but the networks
    for name in ("latest_net_G.pth", "latest_net_D.pth"):
        first, second = (torch.load(run.run_folder / name, weights_only=True) for run in (config, whole))
        assert all(torch.equal(first[key], second[key]) for key in second)


def test_two_processes_do_not_share_a_folder(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=2)
    config.run_folder.mkdir()
    with locked(config.run_folder), pytest.raises(UsageError, match="another process trains there"):
        train(config)

    class Meanwhile(Quiet):
        """Another run of the name, finished between this one's look at the folder and its start."""

        def noted(self, message: str) -> None:
            if "nothing saved yet" in message:
                train(config)

    with pytest.raises(UsageError, match="another process has trained there meanwhile"):
        train(dataclasses.replace(config, continue_train=True), Meanwhile())
    assert train(dataclasses.replace(config, continue_train=True, max_steps=3)).step == 3


def test_beta1_changes_with_the_options(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=1)
    train(config)
    train(dataclasses.replace(config, max_steps=2, beta1=0.9, continue_train=True))
    state = storage.read_state(config.run_folder / storage.STATE_FILE)
    assert [o["param_groups"][0]["betas"] for o in state["optimizers"].values()] == [(0.9, 0.999)] * 2


def test_pictures_of_16_bits_keep_their_range(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 257, 32768, 65535]], np.uint16)).save(path)
    assert read_image(path, 1)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert read_image(path, 3).shape == (1, 4, 3)
    Image.fromarray(np.array([[0.0, 0.5]], np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match="a picture in F, whose range is not known"):
        read_image(tmp_path / "float.tiff", 3)
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "int.tiff")
    with pytest.raises(InputError, match="grey levels from 0 to 70000"):
        read_image(tmp_path / "int.tiff", 3)


def test_a_damaged_header_is_an_error_of_the_file(tmp_path: Path) -> None:
    for content in (
        b"P6\n4 x\n255\n" + bytes(48),
        b"P6\n-4 4\n255\n" + bytes(48),
        b"II*\0\x08\0\0\0\xff\xff",
    ):
        (tmp_path / "x.ppm").write_bytes(content)
        with pytest.raises(InputError, match="damaged|not an image"):
            read_image(tmp_path / "x.ppm", 3)


def test_a_bad_file_costs_no_finished_step(tiny: Tiny, tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "train" / f"{i}.png", (64, 32), i)
    (tmp_path / "train" / "3.png").write_bytes(b"nothing")
    config = tiny("pix2pix", data=str(tmp_path), serial_batches=True)
    with pytest.raises(InputError, match="3.png: not an image"):
        train(config)
    assert storage.read_state(config.run_folder / storage.STATE_FILE)["step"] == 3
    picture(tmp_path / "train" / "3.png", (64, 32), 3)
    assert train(dataclasses.replace(config, continue_train=True)).step == 8


def test_a_disk_that_takes_no_log(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("p2pfast.train.record.Recorder.losses", full)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        train(tiny("pix2pix", print_freq=1))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("pix2pix", {"ema": float("nan")}, "--ema nan: must be a finite number"),
    ("pix2pix", {"lr": float("inf")}, "--lr inf: must be a finite number"),
    ("pix2pix", {"batch_size": "2"}, "--batch-size '2': a whole number is expected"),
    ("pix2pix", {"no_flip": 1}, "--no-flip 1: True or False is expected"),
    ("pix2pix", {"input_nc": 2}, "--input-nc 2: pictures are read in colour, 3, or in grey, 1"),
    ("pix2pix", {"seed": 2**40}, "--seed .*: must be at most 4294967295"),
    ("pix2pix", {"threads": 99999999}, "--threads 99999999: must be at most 1024"),
    ("pix2pix", {"name": "ä" * 150}, "--name of 150 characters: 200 bytes are the most"),
    ("cyclegan", {"crop_size": 8, "load_size": 8}, "--crop-size 8: these networks need sides of at least 24"),
    ("cyclegan", {"crop_size": 4, "load_size": 4, "netD": "pixel"}, "need sides of at least 8"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=[b[2] for b in BAD])
def test_values_that_make_no_run(tiny: Tiny, kind: str, options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(tiny(kind, **options))


@pytest.mark.parametrize("netD", ["basic", "n_layers", "pixel"])
@pytest.mark.parametrize("kind", ["pix2pix", "cyclegan", "pix2pixhd"])
def test_the_least_pictures_that_networks_take(tiny: Tiny, kind: str, netD: str) -> None:
    options: dict[str, Any] = {} if kind == "pix2pixhd" else {"netD": netD, "n_layers_D": 2}
    if kind == "pix2pix":
        options |= {"netG": "resnet_1blocks", "norm": "instance"}
    config = tiny(kind, **options)
    least = objective_of(config, Place(torch.device("cpu"))).least
    crop = {"preprocess": "resize_and_crop", "crop_size": least, "load_size": least}
    assert train(dataclasses.replace(config, **crop, max_steps=1)).step == 1


def test_small_pictures_are_named_where_nothing_is_cut(tiny: Tiny, tmp_path: Path) -> None:
    for side in "AB":
        picture(tmp_path / f"train{side}" / "0.png", (40, 16))
    with pytest.raises(InputError, match="pictures of 40x16 pixels after --preprocess none; .* at least 24"):
        train(tiny("cyclegan", data=str(tmp_path), preprocess="none"))


def test_steps_of_another_size_keep_the_log(tiny: Tiny) -> None:
    config = tiny("pix2pix", print_freq=1, max_steps=4)
    train(config)
    log = config.run_folder / "loss_log.txt"
    log.write_bytes(b"\xff\xfe\n" + log.read_bytes())
    train(dataclasses.replace(config, batch_size=4, max_steps=0, continue_train=True))
    assert len(log.read_text(errors="replace").splitlines()) == 1 + 4 + 1


def test_accumulated_batches_count_once_in_running_statistics(tiny: Tiny) -> None:
    found = []
    for accumulate, batch_size in ((2, 1), (1, 1)):
        config = tiny("pix2pix", accumulate=accumulate, batch_size=batch_size, no_flip=True, lr=0.0)
        train(config)
        state = torch.load(config.run_folder / "latest_net_G.pth", weights_only=True)
        found.append({key: value for key, value in state.items() if "num_batches" in key})
    assert found[0] and found[0] == found[1]


def test_no_html_writes_no_pictures(tiny: Tiny) -> None:
    config = tiny("pix2pix", no_html=True, display_freq=1)
    train(config)
    assert not (config.run_folder / "web").exists()


def test_total_variation_of_a_pixel_has_a_gradient() -> None:
    x = torch.ones(2, 3, 1, 1, requires_grad=True)
    loss = TotalVariationLoss()(x)
    loss.backward()
    assert loss == 0 and x.grad is not None and not x.grad.any()


def test_what_killed_processes_left_is_removed(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=1, display_freq=1)
    train(config)
    left = [config.run_folder / place / ".p2pfast-x.tmp" for place in ("", "web", "web/images")]
    for path in left:
        path.touch()
    train(dataclasses.replace(config, max_steps=2, continue_train=True))
    assert not any(path.exists() for path in left)


def test_the_way_to_go_on_can_be_pasted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny("pix2pix"), name="my run", checkpoints_dir=str(tmp_path / "a b"))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("p2pfast.train.trainer.train", interrupted)
    line = ["train", "pix2pix", "--name", config.name, "--checkpoints-dir", config.checkpoints_dir]
    done = CliRunner().invoke(app, line)
    assert f"--name 'my run' --checkpoints-dir '{tmp_path / 'a b'}' --continue-train" in done.output


def test_a_configuration_from_a_file_is_checked_as_one_from_options(tmp_path: Path) -> None:
    save_config(Pix2PixConfig(name="x", ema=float("nan")), tmp_path / "config.json")
    with pytest.raises(UsageError, match="--ema nan"):
        read_config(tmp_path / "config.json").check()
