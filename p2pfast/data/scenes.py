"""Procedural street scenes: a label map, an instance map and a matching rendering, all from one seed.

The world is metric: x to the right, y up, z away from a camera 1.35 m above the road that looks along the
street. Objects are painted from far to near, so that nearer ones hide what is behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from p2pfast.data.canvas import Canvas, Floats
from p2pfast.data.classes import INSTANCE_CLASSES
from p2pfast.data.street import Street


@dataclass(frozen=True)
class Scene:
    """A street: ``labels`` (H, W) uint8 below 35, ``instances`` (H, W) uint16, ``photo`` (H, W, 3) uint8.

    Instance ids follow Cityscapes: the class id for things that are not counted, ``class * 1000 + index``
    for those that are, so bicycles reach 33000 and need all 16 bits. ``photo`` is None if not asked for.
    """

    labels: NDArray[np.uint8]
    instances: NDArray[np.uint16]
    photo: NDArray[np.uint8] | None


def draw_scene(seed: int, width: int = 2048, height: int = 1024, photo: bool = True) -> Scene:
    """Draw the street of ``seed``. The same arguments give the same arrays.

    The arrangement depends on the seed alone, so smaller sizes show the same street with less detail; a
    street is composed for pictures twice as wide as high. Skipping the ``photo`` makes it quicker.
    Raises ValueError for sizes below 32.
    """
    if min(width, height) < 32:
        raise ValueError(f"width and height must be at least 32, not {width}x{height}")
    arrangement = np.random.default_rng([seed, 0])
    canvas = Canvas(width, height, np.random.default_rng([seed, 1]), photo)
    Street(canvas, arrangement).draw()
    _check_instances(canvas)
    picture = None if canvas.photo is None else _develop(canvas.photo, canvas.rng)
    return Scene(canvas.labels, canvas.instances, picture)


def _check_instances(canvas: Canvas) -> None:
    """Uncounted things carry their class as instance id, as in Cityscapes."""
    counted = np.isin(canvas.labels, list(INSTANCE_CLASSES))
    np.copyto(canvas.instances, canvas.labels, where=~counted)


def _develop(photo: Floats, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Soften the hard polygon borders, darken the corners a little, add sensor noise."""
    height, width = photo.shape[:2]
    image = Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8))
    soft = np.asarray(image.filter(ImageFilter.GaussianBlur(0.35 + width / 4096)), np.float32)
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    vignette = 1 - 0.10 * (x * x + y * y) / 2
    grain = rng.normal(0, 2.0, (height, width, 1)).astype(np.float32)
    return np.clip(soft * vignette[..., None] + grain, 0, 255).astype(np.uint8)
