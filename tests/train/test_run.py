"""Whole runs: what they write, and that they go on as if they had never stopped."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from p2pfast.cli import app
from p2pfast.errors import InputError, UsageError
from p2pfast.train import storage, trainer
from p2pfast.train.config import Config
from p2pfast.train.pix2pix import Pix2Pix
from p2pfast.train.trainer import Diverged, Quiet, train
from tests.train.conftest import arguments, assert_identical, networks, start

Tiny = Callable[..., Config]


def command(*line: object) -> Result:
    return CliRunner().invoke(app, [str(part) for part in line])


class At(Quiet):
    """Does something after a step."""

    def __init__(self, step: int, act: Callable[[], Any]) -> None:
        self.step, self.act, self.notes = step, act, []  # type: ignore[var-annotated]

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float) -> None:
        if step == self.step:
            self.act()

    def noted(self, message: str) -> None:
        self.notes.append(message)


def assert_same_run(first: Config, second: Config) -> None:
    """Same networks, state and log, to the last bit."""
    assert_identical(networks(first.run_folder), networks(second.run_folder))
    states = [storage.read_state(config.run_folder / storage.STATE_FILE) for config in (first, second)]
    assert_identical(*states)
    logs = [(config.run_folder / "loss_log.txt").read_text().splitlines() for config in (first, second)]
    assert [line.split(")")[1] for line in logs[0]] == [line.split(")")[1] for line in logs[1]]


def test_what_a_run_writes(tiny: Tiny) -> None:
    config = tiny("pix2pix", print_freq=2, display_freq=4, save_epoch_freq=1, ema=0.9)
    outcome = train(config)
    assert (outcome.step, outcome.steps, outcome.interrupted) == (8, 8, False)
    folder = config.run_folder
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    nets = {f"{label}_net_{net}.pth" for label in ("latest", "1", "2") for net in ("G", "D", "G_ema")}
    pictures = {
        f"web/images/epoch00{step // 4}_step0000000{step}_{name}.png"
        for step in (4, 8)
        for name in ("real_A", "fake_B", "real_B")
    }
    others = {".lock", "config.json", "latest_state.pth", "loss_log.txt", "web/index.html"}
    assert written == nets | pictures | others
    log = (folder / "loss_log.txt").read_text().splitlines()
    assert len(log) == 4 and log[0].startswith("(epoch: 1, step: 2, ") and "G_L1: " in log[0]
    assert json.loads((folder / "config.json").read_text())["netG"] == "unet_32"
    page = (folder / "web" / "index.html").read_text()
    assert page.index("step 8") < page.index("step 4") and "images/epoch001_step00000004_fake_B.png" in page
    with Image.open(folder / "web/images/epoch001_step00000004_fake_B.png") as picture:
        assert picture.size == (32, 32)


def terminate_all() -> None:
    """As `timeout` does: every process of the group, and the first one once more."""
    for process in [child.pid for child in multiprocessing.active_children()] + 2 * [os.getpid()]:
        assert process is not None
        os.kill(process, signal.SIGTERM)


def test_a_stopped_run_ends_like_an_unbroken_one(tiny: Tiny) -> None:
    """Dropout, image pool, moving average, loss scaling, accumulation and worker processes included."""
    options: dict[str, Any] = {
        "pool_size": 3,
        "ema": 0.9,
        "amp": "float16",
        "accumulate": 2,
        "print_freq": 2,
        "n_epochs": 3,
        "display_freq": 4,
        "num_threads": 1,
    }
    whole, broken = tiny("pix2pix", **options), tiny("pix2pix", **options)
    train(whole)
    outcome = train(broken, At(3, terminate_all))
    assert outcome.interrupted and outcome.step in (3, 4) and outcome.steps == 8
    assert train(dataclasses.replace(broken, continue_train=True)).step == 8
    assert_same_run(whole, broken)


@pytest.mark.parametrize("tune", ["off", "on"])
def test_a_killed_run_ends_like_an_unbroken_one(
    tiny: Tiny, tune: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at any moment; the state then is some steps old and the networks may be newer.

    Tuned, a layer's algorithms are those that the first process measured as fastest.
    """
    monkeypatch.setenv("P2PFAST_TUNE", tune)
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    options: dict[str, Any] = {"n_epochs": 8, "save_latest_freq": 3, "print_freq": 1, "display_freq": 50}
    if tune == "on":  # layers wide enough for algorithms to choose from
        options |= {"ngf": 16, "ndf": 16}
    whole, broken = tiny("pix2pix", **options), tiny("pix2pix", **options)
    process = start(arguments(broken))
    state = broken.run_folder / storage.STATE_FILE
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert 0 < storage.read_state(state)["step"] < 36
    (broken.run_folder / ".p2pfast-left.tmp").write_bytes(b"half")
    train(whole)
    outcome = train(dataclasses.replace(broken, continue_train=True))
    assert outcome.step == 36 and not list(broken.run_folder.glob(".p2pfast*"))
    assert_same_run(whole, broken)


def test_a_second_interrupt_stops_at_once_and_leaves_whole_files(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_AGAIN", 0.0)
    config = tiny("pix2pix", save_latest_freq=1, n_epochs=100)
    handler = signal.getsignal(signal.SIGINT)  # ignored in a background job of a shell

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, At(3, twice))
    assert storage.read_state(config.run_folder / storage.STATE_FILE)["step"] == 2
    assert not list(config.run_folder.glob(".p2pfast*"))
    assert signal.getsignal(signal.SIGINT) is handler


def test_divergence_names_step_term_and_checkpoint(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("pix2pix", save_latest_freq=2, n_epochs=5)
    step, calls = Pix2Pix.step, 0

    def broken(self: Pix2Pix, batches: Any) -> Any:
        nonlocal calls
        terms = step(self, batches)
        calls += 1
        if calls == 6:
            terms["G_L1"] = torch.tensor(float("nan"))
        return terms

    monkeypatch.setattr(Pix2Pix, "step", broken)
    with pytest.raises(Diverged) as raised:
        train(config)
    text = str(raised.value)
    assert "loss G_L1 is nan in step 6 (epoch 2)" in text and "latest_state.pth of step 4" in text
    assert storage.read_state(config.run_folder / storage.STATE_FILE)["step"] == 4


def test_weights_that_are_not_finite_are_never_saved(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("pix2pix", save_latest_freq=2)
    monkeypatch.setattr(Pix2Pix, "broken", lambda self: "D")
    with pytest.raises(Diverged, match="net_D has values that are not finite after step 2; no checkpoint"):
        train(config)
    assert not list(config.run_folder.glob("*.pth"))


def test_a_run_is_not_overwritten(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=1)
    train(config)
    with pytest.raises(UsageError, match="holds a run already: --continue-train goes on with it"):
        train(config)
    with pytest.raises(UsageError, match="of other networks than these options make"):
        train(dataclasses.replace(config, ngf=5, continue_train=True))
    state = config.run_folder / storage.STATE_FILE
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(UsageError, match="not a training state, or damaged"):
        train(dataclasses.replace(config, continue_train=True))


def test_changed_data_goes_on_with_the_next_epoch(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=2)
    train(config)
    observer = At(0, lambda: None)
    changed = dataclasses.replace(config, scenes=3, max_steps=0, continue_train=True)
    assert train(changed, observer).step == 6
    assert "4 pictures in steps of 1 then, 3 in steps of 1 now" in observer.notes[0]
    assert "goes on with epoch 2" in observer.notes[0]


def test_pretrained_networks_are_taken(tiny: Tiny) -> None:
    first = tiny("pix2pix", max_steps=1)
    train(first)
    folder = str(first.run_folder)
    second = tiny("pix2pix", load_pretrain=folder, lr=0.0, max_steps=1, seed=5)
    train(second)
    keys = ("model.model.0.weight", "model.model.3.bias")
    saved = [networks(config.run_folder)["latest_net_G.pth"] for config in (first, second)]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in keys)
    for path, message in (("nowhere", "no such folder"), (str(first.run_folder / "web"), "no latest_net_G")):
        with pytest.raises(UsageError, match=message):
            train(tiny("pix2pix", load_pretrain=path))


def test_the_learning_rate_follows_the_epochs(tiny: Tiny) -> None:
    config = tiny("pix2pix", n_epochs=1, n_epochs_decay=2, print_freq=4, lr=0.3)
    train(config)
    log = (config.run_folder / "loss_log.txt").read_text()
    assert [line.split("lr: ")[1].split(")")[0] for line in log.splitlines()] == ["0.3", "0.2", "0.1"]


def test_a_damaged_picture_stops_the_run_and_is_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (32, 64, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:300])
    config = tiny("pix2pix", data=str(tmp_path / "data"))
    with pytest.raises(InputError, match="2.png: damaged or truncated"):
        train(config)
    done = command(*arguments(dataclasses.replace(config, name="damaged")))
    assert done.exit_code == 1 and "2.png: damaged or truncated" in done.output


def test_command_trains_and_translates(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("pix2pix", print_freq=4)
    done = command(*arguments(config))
    assert done.exit_code == 0, done.output
    assert re.search(r"epoch 2 step 8: \d+(\.\d+ s| ms)/step D_fake \S+ D_real ", done.output), done.output
    assert "8 steps done; the generator is" in done.output and "index.html" in done.output
    network = config.run_folder / "latest_net_G.pth"
    for state in networks(config.run_folder).values():
        assert not [key for key in state if "module" in key or "_orig" in key]
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "in.png")
    given, results = tmp_path / "in.png", tmp_path / "out"
    done = command("translate", network, "--images", given, "-o", results, "--device", "cpu")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out" / "in.png") as picture:
        assert picture.size == (50, 40)


def test_command_goes_on_with_the_options_of_the_run(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=3)
    assert command(*arguments(config)).exit_code == 0
    where = ("--name", config.name, "--checkpoints-dir", config.checkpoints_dir)
    done = command("train", "pix2pix", *where, "--continue-train", "--max-steps", 5, "--lr", 1e-4)
    assert done.exit_code == 0, done.output
    assert "changed: lr 0.0002 is now 0.0001" in done.output and "5 steps done" in done.output
    saved = json.loads((config.run_folder / "config.json").read_text())
    assert saved["netG"] == "unet_32" and saved["lr"] == 1e-4 and not saved["continue_train"]
    done = command("train", "cyclegan", *where, "--continue-train")
    assert done.exit_code == 2 and "holds a run of pix2pix" in done.output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("--gan-mode", "x"), "--gan-mode x: use vanilla, lsgan, hinge, wgangp"),
        (("--data", "/nowhere"), "--data /nowhere: no such folder; --data synthetic draws streets"),
        (("--netG", "unet_99"), "--netG unet_99: use unet_32"),
        (("--crop-size", "40"), "--crop-size 40: the generator takes multiples of 256"),
        (("--load-pretrain", "/nowhere"), "no such folder"),
    ],
)
def test_mistakes_end_with_code_2(line: tuple[str, ...], message: str, tmp_path: Path) -> None:
    tiny = ("--ngf", "1", "--ndf", "1", "--device", "cpu")
    done = command("train", "pix2pix", "--name", "x", "--checkpoints-dir", tmp_path, *tiny, *line)
    assert done.exit_code == 2 and message in done.output, done.output


def test_help_shows_published_names() -> None:
    result = CliRunner().invoke(app, ["train", "pix2pix", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for flag in (
        "--lambda-L1",
        "--n-epochs",
        "--niter-decay",
        "--gan-mode",
        "--netG",
        "--load-size",
        "--no-flip",
    ):
        assert flag in result.output, flag


def test_a_full_disk_keeps_the_last_state(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("pix2pix", max_steps=2, save_latest_freq=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def fill() -> None:
        monkeypatch.setattr("p2pfast.train.storage.torch.save", full)

    with pytest.raises(UsageError, match="No space left on device; what was saved before is still whole"):
        train(config, At(2, fill))
    monkeypatch.undo()
    assert storage.read_state(config.run_folder / storage.STATE_FILE)["step"] == 1
    assert not list(config.run_folder.glob(".p2pfast*"))


def test_deterministic_mode_and_compile_flag_reach_torch(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    config = tiny("pix2pix", max_steps=1, deterministic=True, compile=True)
    try:
        train(config)
        assert torch.are_deterministic_algorithms_enabled() and len(compiled) == 2
    finally:
        torch.use_deterministic_algorithms(False)
    first: Tensor = next(iter(networks(config.run_folder)["latest_net_G.pth"].values()))
    assert torch.isfinite(first).all()
