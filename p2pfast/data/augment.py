"""One random window of a picture, applied alike to every map that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfast.data.images import resize_ids, resize_image
from p2pfast.errors import InputError

MODES = ("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "none")


@dataclass(frozen=True)
class Window:
    """What becomes of a picture: resized to (``height``, ``width``), cut to ``rows`` and ``columns``, and
    mirrored left to right if ``flip``."""

    height: int
    width: int
    rows: slice
    columns: slice
    flip: bool

    def _cut(self, array: NDArray) -> NDArray:
        cut = array[self.rows, self.columns]
        return np.ascontiguousarray(cut[:, ::-1] if self.flip else cut)

    def image(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The window of (H, W, C) uint8, resized bicubically, as (C, h, w)."""
        cut = self._cut(resize_image(pixels, self.height, self.width))
        return np.ascontiguousarray(cut.transpose(2, 0, 1))

    def ids(self, ids: NDArray[np.integer]) -> NDArray[np.integer]:
        """The window of ids (H, W), resized to nearest neighbours, as (1, h, w)."""
        return self._cut(resize_ids(ids, self.height, self.width))[None]


@dataclass(frozen=True)
class Preprocess:
    """How training pictures are resized and cut, with the published tools' names and meanings.

    ``mode``: ``resize_and_crop`` resizes to a square of ``load_size`` and cuts a random square of
    ``crop_size``; ``crop`` only cuts; ``scale_width`` resizes to ``load_size`` wide, keeping the ratio;
    ``scale_width_and_crop`` cuts after that; ``none`` keeps the size. Modes that do not crop round sizes to
    ``multiple``, what the network takes. ``flip`` mirrors half of the pictures.
    """

    mode: str = "resize_and_crop"
    load_size: int = 286
    crop_size: int = 256
    flip: bool = True
    multiple: int = 4

    def window(self, shape: Sequence[int], rng: np.random.Generator, name: str = "picture") -> Window:
        """A random window of an array of ``shape`` (H, W, ...); ``name`` is for messages.

        Raises InputError if the crop does not fit in.
        """
        height, width = shape[:2]
        if "resize" in self.mode:
            height = width = self.load_size
        elif "scale_width" in self.mode:
            height, width = max(1, round(self.load_size * height / width)), self.load_size
            if "crop" in self.mode:
                height = max(height, self.crop_size)
        top, left, flip = rng.random(3)
        if "crop" not in self.mode:
            height, width = (max(1, round(size / self.multiple)) * self.multiple for size in (height, width))
            return Window(height, width, slice(0, height), slice(0, width), self.flip and flip < 0.5)
        size = self.crop_size
        if min(height, width) < size:
            raise InputError(
                f"{name}: {width}x{height} pixels are less than the crop of {size}x{size}; use a smaller "
                "--crop-size or --preprocess resize_and_crop"
            )
        y, x = int(top * (height - size + 1)), int(left * (width - size + 1))
        return Window(height, width, slice(y, y + size), slice(x, x + size), self.flip and flip < 0.5)
