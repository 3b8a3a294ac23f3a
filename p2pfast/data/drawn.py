"""Drawn streets as training pictures: made once each, kept on disk, read like any other data."""

from __future__ import annotations

import contextlib
import zipfile
from pathlib import Path

import numpy as np

from p2pfast.data.atomic import whole
from p2pfast.data.scenes import Scene, draw_scene

#: Seeds of training streets start here, away from the ones that demo, tests and pictures of docs draw.
FIRST_SEED = 1000


class DrawnStreets:
    """``count`` streets of ``width`` by ``width // 2`` pixels, drawn on first use and kept in ``folder``.

    Several processes may share the folder: a file appears when it is complete, and all draw the same.
    """

    def __init__(self, folder: Path, count: int, width: int) -> None:
        self.folder, self.count, self.width = folder, count, width

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"street {index}"

    def scene(self, index: int) -> Scene:
        """Street ``index``; an unreadable file is drawn again."""
        path = self.folder / f"street_{self.width}_{index:05d}.npz"
        # Not there yet, or damaged: drawn below.
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with np.load(path) as kept:
                return Scene(kept["labels"], kept["instances"], kept["photo"])
        scene = draw_scene(FIRST_SEED + index, self.width, self.width // 2)
        assert scene.photo is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as stream:
            np.savez(stream, labels=scene.labels, instances=scene.instances, photo=scene.photo)
        return scene
