"""Colours and shading that several kinds of objects share."""

from __future__ import annotations

from p2pfast.data.canvas import Color, Ellipse
from p2pfast.data.view import View

GLASS: Color = (52.0, 66.0, 82.0)
RUBBER: Color = (30.0, 30.0, 32.0)
STEEL: Color = (120.0, 124.0, 128.0)


def mix(first: Color, second: Color, t: float) -> Color:
    """Linear blend: ``first`` at t = 0, ``second`` at t = 1."""
    a, b, c = (p + (q - p) * t for p, q in zip(first, second, strict=True))
    return a, b, c


def shadow(view: View, x: float, z: float, radius: float, opacity: float = 0.42) -> None:
    foot = view.point(x + radius * 0.3, 0, z)
    meter = view.scale(z)
    view.canvas.add(
        [Ellipse(foot[0], foot[1], radius * meter, max(1.5, radius * meter * view.eye / z * 1.1))],
        (34.0, 34.0, 40.0),
        opacity,
    )
