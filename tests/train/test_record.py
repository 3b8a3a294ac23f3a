from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from p2pfast.cli import app
from p2pfast.train import trainer
from p2pfast.train.config import Config
from p2pfast.train.trainer import Diverged, Outcome, train
from tests.train.conftest import arguments
from tests.train.test_run import At

Tiny = Callable[..., Config]


class Board:
    """Stands for TensorBoard's SummaryWriter."""

    made: list[Board] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = Path(folder), purge_step, False
        self.scalars: list[tuple[str, int]] = []
        self.images: list[tuple[int, tuple[int, ...]]] = []
        Board.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, float)
        self.scalars.append((name, step))

    def add_image(self, name: str, pixels: Any, step: int, dataformats: str) -> None:
        assert dataformats == "HWC"
        self.images.append((step, pixels.shape))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_curves_and_grids(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Board, "made", [])
    config = tiny("pix2pix", no_tensorboard=False, print_freq=4, display_freq=4)
    observer = At(0, lambda: None)
    train(config, observer)
    board = Board.made[0]
    assert board.folder == config.run_folder / "tensorboard" and board.closed and not observer.notes
    assert {step for _, step in board.scalars} == {4, 8}
    terms = {"loss/D_fake", "loss/D_real", "loss/G_GAN", "loss/G_L1"}
    assert {name for name, _ in board.scalars} == terms | {"lr", "seconds"}
    assert board.images == [(4, (32, 96, 3)), (8, (32, 96, 3))]


def test_the_reason_is_given_where_tensorboard_is_not(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    observer = At(0, lambda: None)
    train(tiny("pix2pix", no_tensorboard=False, max_steps=1), observer)
    assert len(observer.notes) == 1 and "pip install tensorboard" in observer.notes[0]


def test_what_an_interrupted_run_logged_too_much_is_dropped(tiny: Tiny) -> None:
    config = tiny("pix2pix", max_steps=2, print_freq=1)
    train(config)
    log = config.run_folder / "loss_log.txt"
    text = log.read_text()
    log.write_text(text + "(epoch: 1, step: 3, time: 1, lr: 1) lost: 1\n(epoch: 1, st")
    assert trainer.Recorder(config, 2).log.read_text() == text


@pytest.mark.parametrize(
    ("result", "code", "message"),
    [
        (Diverged("training diverged: loss G_L1 is nan"), 1, "error: training diverged"),
        (KeyboardInterrupt(), 130, "interrupted; go on with: p2pfast train pix2pix --name"),
        (Outcome(Path("x"), 3, 8, True, {}), 130, "interrupted after step 3 of 8, saved; go on with"),
    ],
)
def test_exit_codes(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, result: Any, code: int, message: str
) -> None:
    def ended(*_: object) -> Outcome:
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, Outcome)
        return result

    monkeypatch.setattr(trainer, "train", ended)
    done = CliRunner().invoke(app, arguments(tiny("pix2pix")))
    assert done.exit_code == code and message in done.output, done.output
    if code == 130:
        assert "--continue-train" in done.output
