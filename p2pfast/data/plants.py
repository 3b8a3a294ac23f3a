"""Trees, bushes, hedges: blobs with leafy outlines."""

from __future__ import annotations

import math

import numpy as np

from p2pfast.data.canvas import Color, Point, Polygon
from p2pfast.data.shades import mix, shadow
from p2pfast.data.view import View


def _blob(x: float, y: float, rx: float, ry: float, rng: np.random.Generator, ragged: float) -> Polygon:
    """An ellipse with a leafy outline."""
    count = max(14, min(120, int(1.3 * rx)))
    turn = np.linspace(0, 2 * math.pi, count, endpoint=False)
    reach = 1 + ragged * rng.uniform(-1, 1, count)
    points: list[Point] = [
        (float(x + rx * r * math.cos(t)), float(y + ry * r * math.sin(t)))
        for t, r in zip(turn, reach, strict=True)
    ]
    return Polygon(points)


def foliage(view: View, blobs: list[Polygon], z: float, green: Color) -> None:
    stencil = view.solid(list(blobs), view.number("vegetation"), view.hazed(green, z))
    canvas = view.canvas
    if stencil is None or canvas.photo is None:
        return
    height, width = stencil.mask.shape
    meter = view.scale(z)
    leaves = canvas.noise(height, width, max(2.0, meter * 0.16)) + 0.7 * canvas.noise(
        height, width, max(3.0, meter * 0.5)
    )
    y, x = stencil.grid()
    light = 0.9 - (y - stencil.y0) / max(height, 1) - 0.35 * (x - stencil.x0) / max(width, 1) + 0.32 * leaves
    tone = np.clip(1.0 + 0.62 * light, 0.4, 1.75)[..., None]
    keep = 2.718281828 ** (-z / 330)
    base = np.array(view.hazed(green, z), np.float32)
    canvas.paint(stencil, base * (1 + (tone - 1) * keep))


def tree(view: View, x: float, z: float, height: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    meter = view.scale(z)
    foot, top = view.point(x, 0, z), view.point(x, height, z)
    crown, trunk = height * 0.62, 0.16 + height * 0.012
    shadow(view, x, z, 1.6)
    stem = Polygon(
        [
            (foot[0] - trunk * meter, foot[1]),
            (foot[0] - trunk * 0.6 * meter, foot[1] - height * 0.6 * meter),
            (foot[0] + trunk * 0.6 * meter, foot[1] - height * 0.6 * meter),
            (foot[0] + trunk * meter, foot[1]),
        ]
    )
    view.solid([stem], view.number("vegetation"), view.hazed((84.0, 66.0, 52.0), z))
    view.canvas.add(
        [Polygon([(p[0] + trunk * 0.7 * meter, p[1]) for p in stem.points[:2]] + list(stem.points[2:]))],
        view.hazed((58.0, 46.0, 38.0), z),
    )
    middle = top[1] + crown * meter / 2
    blobs = [_blob(foot[0], middle, crown * 0.40 * meter, crown * 0.46 * meter, rng, 0.10)]
    for _ in range(9):
        turn, reach = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 0.34)
        size = rng.uniform(0.15, 0.27) * crown * meter
        blobs.append(
            _blob(
                foot[0] + reach * crown * meter * math.cos(turn),
                middle + reach * 1.15 * crown * meter * math.sin(turn),
                size,
                size,
                rng,
                0.17,
            )
        )
    for turn in rng.uniform(0, 2 * math.pi, 60).tolist():  # loose twigs along the rim
        reach, size = rng.uniform(0.40, 0.56), rng.uniform(0.018, 0.05) * crown * meter
        blobs.append(
            _blob(
                foot[0] + reach * crown * meter * math.cos(turn),
                middle + reach * 1.12 * crown * meter * math.sin(turn),
                size * 1.3,
                size,
                rng,
                0.3,
            )
        )
    foliage(view, blobs, z, mix((70.0, 108.0, 44.0), (104.0, 124.0, 52.0), rng.random()))


def bush(view: View, x: float, z: float, height: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    meter, foot = view.scale(z), view.point(x, 0, z)
    blobs = []
    for _ in range(7):
        size = height * rng.uniform(0.3, 0.5) * meter
        blobs.append(
            _blob(
                foot[0] + rng.uniform(-1.1, 1.1) * height * meter,
                foot[1] - size * rng.uniform(0.7, 1.0),
                size * 1.2,
                size,
                rng,
                0.15,
            )
        )
    foliage(view, blobs, z, (66.0, 98.0, 48.0))
