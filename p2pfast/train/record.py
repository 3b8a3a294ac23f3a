"""What a run writes for people: a log of losses, TensorBoard files, a page of example pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfast.data.images import write_image, write_text
from p2pfast.data.page import figure, page
from p2pfast.train.config import Config


def tensorboard_missing() -> str | None:
    """Why TensorBoard's files cannot be written, or None."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except ImportError as error:
        return f"no TensorBoard files ({error}); pip install tensorboard"
    return None


class Recorder:
    """Writes ``loss_log.txt``, ``web/index.html`` and ``tensorboard/`` below the run's folder.

    Args:
        first_step: the step the run goes on from; what an interrupted run wrote after it is left out. None
            keeps all: steps have other sizes now, and so other numbers.
    """

    def __init__(self, config: Config, first_step: int | None) -> None:
        self.config, self.folder = config, config.run_folder
        self.log = self.folder / "loss_log.txt"
        self.pictures = self.folder / "web" / "images"
        self.board: Any = None
        if not config.no_tensorboard and tensorboard_missing() is None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)
        if first_step is not None:
            self._drop_after(first_step)

    def _drop_after(self, step: int) -> None:
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if (m := re.search(r"step: (\d+)", line)) and int(m[1]) <= step]
            write_text(self.log, "".join(kept))

    def losses(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float, rate: float) -> None:
        """A line of the log and a point of every curve."""
        values = " ".join(f"{name}: {value:.4f}" for name, value in losses.items())
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"(epoch: {epoch}, step: {step}, time: {seconds:.4f}, lr: {rate:.3g}) {values}\n")
        if self.board is not None:
            for name, value in losses.items():
                self.board.add_scalar(f"loss/{name}", value, step)
            self.board.add_scalar("lr", rate, step)
            self.board.add_scalar("seconds", seconds, step)

    def examples(self, epoch: int, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Pictures of one step, on the page and as a grid in TensorBoard."""
        if not self.config.no_html:
            for name, pixels in pictures.items():
                write_image(self.pictures / f"epoch{epoch:03d}_step{step:08d}_{name}.png", pixels)
            self._write_page()
        if self.board is not None:
            self.board.add_image("pictures", _side_by_side(pictures), step, dataformats="HWC")

    def _write_page(self) -> None:
        groups: dict[tuple[int, int], list[tuple[str, str]]] = {}
        for path in sorted(self.pictures.glob("*.png")):
            if match := re.fullmatch(r"epoch(\d+)_step(\d+)_(\w+)", path.stem):
                key = int(match[2]), int(match[1])
                groups.setdefault(key, []).append((match[3], f"images/{path.name}"))
        order = ("input", "real_A", "fake_B", "rec_A", "idt_B", "real_B", "fake_A", "rec_B", "idt_A", "real")
        figures = []
        for step, epoch in sorted(groups, reverse=True):
            shown = sorted(groups[step, epoch], key=lambda p: order.index(p[0]) if p[0] in order else 99)
            figures.append(figure(f"epoch {epoch}, step {step}", shown))
        title = f"{self.config.name}: {self.config.kind}"
        write_text(self.folder / "web" / "index.html", page(title, "\n".join(figures)))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _side_by_side(pictures: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """In colour, (H, W, 3); what is less high than the highest is black below."""
    height = max(pixels.shape[0] for pixels in pictures.values())
    columns = []
    for pixels in pictures.values():
        column = np.zeros((height, pixels.shape[1], 3), np.uint8)
        column[: pixels.shape[0]] = pixels
        columns.append(column)
    return np.concatenate(columns, 1)
