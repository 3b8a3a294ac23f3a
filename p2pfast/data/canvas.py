"""A surface that is labelled and painted at once: every shape claims its pixels in three aligned arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Point: TypeAlias = tuple[float, float]
Color: TypeAlias = tuple[float, float, float]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Polygon:
    """A filled polygon; points are (x, y) in pixels."""

    points: Sequence[Point]

    def bounds(self) -> tuple[float, float, float, float]:
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def fill(self, draw: ImageDraw.ImageDraw, x0: int, y0: int) -> None:
        draw.polygon([(x - x0, y - y0) for x, y in self.points], fill=1)


@dataclass(frozen=True)
class Ellipse:
    """A filled ellipse given by its centre and its two radii in pixels."""

    x: float
    y: float
    rx: float
    ry: float

    def bounds(self) -> tuple[float, float, float, float]:
        return self.x - self.rx, self.y - self.ry, self.x + self.rx, self.y + self.ry

    def fill(self, draw: ImageDraw.ImageDraw, x0: int, y0: int) -> None:
        left, top, right, bottom = self.bounds()
        draw.ellipse((left - x0, top - y0, right - x0, bottom - y0), fill=1)


Shape: TypeAlias = Polygon | Ellipse


def box(left: float, top: float, right: float, bottom: float) -> Polygon:
    """An axis-aligned rectangle; the sides may be given in either order."""
    return Polygon([(left, top), (right, top), (right, bottom), (left, bottom)])


@dataclass(frozen=True)
class Stencil:
    """The pixels of some shapes, clipped to the canvas: a boolean mask at (y0, x0)."""

    y0: int
    x0: int
    mask: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.mask.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)

    def grid(self) -> tuple[Floats, Floats]:
        """The y and x pixel coordinates of the window, (h, 1) and (1, w)."""
        height, width = self.mask.shape
        y = np.arange(self.y0, self.y0 + height, dtype=np.float32)[:, None]
        x = np.arange(self.x0, self.x0 + width, dtype=np.float32)[None, :]
        return y, x


class Canvas:
    """Labels (H, W) uint8, instances (H, W) uint16 and, if ``photo`` is on, colours (H, W, 3) float32."""

    def __init__(self, width: int, height: int, rng: np.random.Generator, photo: bool = True) -> None:
        self.width = width
        self.height = height
        self.rng = rng
        self.labels = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.photo: Floats | None = np.zeros((height, width, 3), np.float32) if photo else None

    def stencil(self, shapes: Sequence[Shape]) -> Stencil | None:
        """The union of ``shapes``, or None where nothing of it lies on the canvas."""
        bounds = np.array([shape.bounds() for shape in shapes])
        x0, y0 = np.maximum(np.floor(bounds[:, :2].min(0)), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(bounds[:, 2:].max(0)) + 1, (self.width, self.height)).astype(int)
        if x1 <= x0 or y1 <= y0:
            return None
        image = Image.new("L", (int(x1 - x0), int(y1 - y0)))
        draw = ImageDraw.Draw(image)
        for shape in shapes:
            shape.fill(draw, int(x0), int(y0))
        mask = np.asarray(image) != 0
        return Stencil(int(y0), int(x0), mask) if mask.any() else None

    def claim(self, stencil: Stencil, label: int, instance: int) -> None:
        """Give the pixels a label and an instance id."""
        self.labels[stencil.window][stencil.mask] = label
        self.instances[stencil.window][stencil.mask] = instance

    def paint(self, stencil: Stencil, color: Color | Floats, opacity: float | Floats = 1.0) -> None:
        """Colour the pixels: one colour, or an array that broadcasts to the stencil's window."""
        if self.photo is None:
            return
        window = self.photo[stencil.window]
        alpha = np.asarray(opacity, np.float32) * stencil.mask
        window += (np.asarray(color, np.float32) - window) * alpha[..., None]

    def add(self, shapes: Sequence[Shape], color: Color | Floats, opacity: float = 1.0) -> None:
        """Colour shapes without changing labels (details and shadows)."""
        if self.photo is None:
            return
        stencil = self.stencil(shapes)
        if stencil is not None:
            self.paint(stencil, color, opacity)

    def noise(self, height: int, width: int, cell: float, aspect: float = 1.0) -> Floats:
        """Smooth noise in about [-1, 1], (height, width); ``cell`` is its wavelength in pixels."""
        rows = max(2, int(height / cell) + 2)
        columns = max(2, int(width / (cell * aspect)) + 2)
        coarse = self.rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, np.float32)
