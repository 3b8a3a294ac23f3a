"""Pedestrians and riders."""

from __future__ import annotations

import numpy as np

from p2pfast.data.canvas import Color, Ellipse, Polygon, Shape
from p2pfast.data.shades import RUBBER, shadow
from p2pfast.data.view import View


def person(view: View, x: float, z: float, seed: int) -> None:
    """A standing or walking pedestrian."""
    rng = np.random.default_rng(seed)
    size = float(rng.uniform(1.55, 1.85))
    shadow(view, x, z, 0.45)
    _figure(view, view.number("person"), x, 0.0, z, size, float(rng.uniform(0.05, 0.22)), rng)


def _figure(
    view: View,
    identity: tuple[int, int],
    x: float,
    lift: float,
    z: float,
    size: float,
    stride: float,
    rng: np.random.Generator,
) -> None:
    m = view.scale(z) * size / 1.75
    fx, fy = view.point(x, lift, z)
    coats: list[Color] = [
        (176.0, 58.0, 52.0),
        (48.0, 76.0, 124.0),
        (66.0, 66.0, 70.0),
        (206.0, 176.0, 92.0),
        (92.0, 118.0, 84.0),
    ]
    coat = view.hazed(coats[int(rng.integers(len(coats)))], z)
    trousers = view.hazed((46.0, 50.0, 66.0), z)
    skin, hair = view.hazed((214.0, 168.0, 140.0), z), view.hazed((66.0, 50.0, 40.0), z)
    leg = [
        Polygon(
            [
                (fx - 0.17 * m, fy - 0.9 * m),
                (fx + 0.02 * m, fy - 0.9 * m),
                (fx - (stride - 0.06) * m, fy),
                (fx - (stride + 0.1) * m, fy),
            ]
        ),
        Polygon(
            [
                (fx - 0.02 * m, fy - 0.9 * m),
                (fx + 0.17 * m, fy - 0.9 * m),
                (fx + (stride + 0.1) * m, fy),
                (fx + (stride - 0.06) * m, fy),
            ]
        ),
    ]
    torso = Polygon(
        [
            (fx - 0.22 * m, fy - 1.46 * m),
            (fx + 0.22 * m, fy - 1.46 * m),
            (fx + 0.2 * m, fy - 0.82 * m),
            (fx - 0.2 * m, fy - 0.82 * m),
        ]
    )
    arms = [
        Polygon(
            [
                (fx + s * 0.2 * m, fy - 1.45 * m),
                (fx + s * 0.29 * m, fy - 1.38 * m),
                (fx + s * 0.33 * m, fy - 0.8 * m),
                (fx + s * 0.24 * m, fy - 0.8 * m),
            ]
        )
        for s in (-1, 1)
    ]
    head = Ellipse(fx, fy - 1.61 * m, 0.115 * m, 0.145 * m)
    view.solid([*leg, torso, *arms, head], identity, coat)
    view.canvas.add(list(leg), trousers)
    view.canvas.add(
        [
            Polygon(
                [
                    (fx, fy - 1.46 * m),
                    (fx + 0.22 * m, fy - 1.46 * m),
                    (fx + 0.2 * m, fy - 0.82 * m),
                    (fx, fy - 0.82 * m),
                ]
            ),
            arms[1],
        ],
        (20.0, 20.0, 26.0),
        0.22,
    )
    view.canvas.add([head], skin)
    view.canvas.add([Ellipse(fx, fy - 1.68 * m, 0.12 * m, 0.085 * m)], hair)


def cyclist(view: View, x: float, z: float, motor: bool, seed: int) -> None:
    """A rider on a bicycle or a motorcycle, seen from behind and a little from the side."""
    rng = np.random.default_rng(seed)
    m = view.scale(z)
    fx, fy = view.point(x, 0, z)
    shadow(view, x, z, 0.6)
    radius, gap = (0.32, 0.62) if motor else (0.36, 0.52)
    wheels: list[Shape] = [
        Ellipse(fx + s * gap * m, fy - radius * m, radius * 0.82 * m, radius * m) for s in (-1, 1)
    ]
    body: Shape = Polygon(
        [
            (fx - gap * m, fy - 0.45 * m),
            (fx - 0.25 * m, fy - 0.95 * m),
            (fx + 0.45 * m, fy - 1.02 * m),
            (fx + gap * m, fy - 0.4 * m),
        ]
    )
    view.solid([*wheels, body], view.number("motorcycle" if motor else "bicycle"), view.hazed(RUBBER, z))
    if not motor:
        hollow = [
            Ellipse(fx + s * gap * m, fy - radius * m, radius * 0.66 * m, radius * 0.82 * m) for s in (-1, 1)
        ]
        view.canvas.add(list(hollow), view.hazed((112.0, 110.0, 108.0), z))
    view.canvas.add([body], view.hazed((150.0, 40.0, 44.0) if motor else (52.0, 108.0, 120.0), z), 0.85)
    _figure(view, view.number("rider"), x, 0.45, z, 1.6, 0.12, rng)
