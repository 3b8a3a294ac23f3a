from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from p2pfast import models
from p2pfast.cli import app
from p2pfast.data import draw_scene

CLASSES = 35


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def label_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pix2pixHD generator of 35 classes and an edge, small enough to run in milliseconds; multiple 4."""
    torch.manual_seed(0)
    model = models.build("pix2pixhd-global", input_nc=CLASSES + 1, ngf=4, n_downsampling=2, n_blocks=1)
    path = tmp_path_factory.mktemp("checkpoint") / "latest_net_G.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def image_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CycleGAN generator."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "latest_net_G_A.pth"
    torch.save(models.build("resnet_6blocks", ngf=4).state_dict(), path)
    return path


class Street:
    """A folder of label and instance maps, as Cityscapes names them if ``cityscapes``."""

    def __init__(
        self, root: Path, count: int = 3, width: int = 128, height: int = 64, cityscapes: bool = False
    ) -> None:
        self.labels, self.instances, self.output = root / "labels", root / "instances", root / "out"
        self.labels.mkdir()
        self.instances.mkdir()
        ends = ("_gtFine_labelIds", "_gtFine_instanceIds") if cityscapes else ("", "")
        for seed in range(count):
            scene = draw_scene(seed, width, height, photo=False)
            Image.fromarray(scene.labels).save(self.labels / f"s{seed}{ends[0]}.png")
            Image.fromarray(scene.instances).save(self.instances / f"s{seed}{ends[1]}.png")

    def arguments(self, checkpoint: Path, *more: str) -> list[str]:
        return [
            "translate",
            str(checkpoint),
            "--labels",
            str(self.labels),
            "--instances",
            str(self.instances),
            "--output",
            str(self.output),
            "--device",
            "cpu",
            *more,
        ]

    def results(self) -> dict[str, tuple[int, int]]:
        """Name and size (width, height) of every result."""
        found = {}
        for path in sorted(self.output.iterdir()):
            if path.is_file() and path.suffix in (".png", ".jpg"):
                with Image.open(path) as image:
                    image.load()
                    assert image.mode == "RGB"
                    found[path.name] = image.size
        return found


@pytest.fixture
def street(tmp_path: Path) -> Street:
    return Street(tmp_path)


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def leftovers(folder: Path) -> list[Path]:
    """Files under ``folder`` that are neither results nor the page."""
    return [
        path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".png", ".jpg", ".html")
    ]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)
