"""The camera of a scene, and the counters that give every object its instance id."""

from __future__ import annotations

from p2pfast.data.canvas import Canvas, Color, Point, Shape, Stencil
from p2pfast.data.classes import ID, INSTANCE_CLASSES

HAZE: Color = (200.0, 214.0, 226.0)


class View:
    """A pinhole camera ``eye`` metres above the road, and painting in metres through it."""

    eye = 1.35

    def __init__(self, canvas: Canvas, center: float, horizon: float) -> None:
        self.canvas = canvas
        self.focal = 0.98 * canvas.width
        self.center_x = center * canvas.width
        self.horizon_y = horizon * canvas.height
        self._counts: dict[int, int] = {}

    def point(self, x: float, y: float, z: float) -> Point:
        """Pixel position (x, y) of a point in metres."""
        return self.center_x + self.focal * x / z, self.horizon_y + self.focal * (self.eye - y) / z

    def scale(self, z: float) -> float:
        """Pixels a metre at distance ``z``."""
        return self.focal / z

    def hazed(self, color: Color, z: float, shade: float = 1.0) -> Color:
        """``color`` times ``shade``, seen through ``z`` metres of air."""
        keep = 2.718281828 ** (-z / 330)
        red, green, blue = (
            keep * part * shade + (1 - keep) * haze for part, haze in zip(color, HAZE, strict=True)
        )
        return red, green, blue

    def number(self, name: str) -> tuple[int, int]:
        """The label of class ``name`` and a fresh instance id for one object of it."""
        label = ID[name]
        if label not in INSTANCE_CLASSES:
            return label, label
        count = self._counts.get(label, 0)
        self._counts[label] = count + 1
        return label, label * 1000 + count

    def solid(self, shapes: list[Shape], identity: tuple[int, int], color: Color) -> Stencil | None:
        """Claim the shapes for an object and give them a base colour; None where all is off the canvas."""
        stencil = self.canvas.stencil(shapes)
        if stencil is not None:
            self.canvas.claim(stencil, *identity)
            self.canvas.paint(stencil, color)
        return stencil
