"""What stands on a pavement: barriers, poles with signs and lights, bollards, bins."""

from __future__ import annotations

from p2pfast.data.canvas import Color, Ellipse, Polygon, Shape, box
from p2pfast.data.plants import foliage
from p2pfast.data.shades import STEEL, shadow
from p2pfast.data.view import View


def barrier(view: View, kind: str, x: float, z: float, length: float) -> None:
    """A hedge, a fence or a low wall along the pavement from ``z`` to ``z + length``."""
    height = {"hedge": 1.3, "fence": 1.5, "wall": 1.1}[kind]
    points = [
        view.point(x, 0, z),
        view.point(x, height, z),
        view.point(x, height, z + length),
        view.point(x, 0, z + length),
    ]
    if kind == "hedge":
        foliage(view, [Polygon(points)], z + length / 2, (62.0, 92.0, 44.0))
        return
    color: Color = (150.0, 120.0, 92.0) if kind == "fence" else (172.0, 162.0, 150.0)
    view.solid([Polygon(points)], view.number(kind), view.hazed(color, z))
    step = 0.45 if kind == "fence" else 2.5
    for k in range(1, int(length / step)):
        at, wide = z + k * step, step * (0.4 if kind == "fence" else 0.03)
        bar = [
            view.point(x, 0, at),
            view.point(x, height, at),
            view.point(x, height, at + wide),
            view.point(x, 0, at + wide),
        ]
        view.canvas.add([Polygon(bar)], view.hazed(color, z, 0.62))


def pole(view: View, kind: str, x: float, z: float, style: int) -> None:
    """A street lamp, a traffic sign or a traffic light on its pole."""
    meter, foot = view.scale(z), view.point(x, 0, z)
    height = {"lamp": 7.5, "sign": 2.9, "light": 3.3}[kind]
    half = max(0.6, (0.09 if kind == "lamp" else 0.055) * meter)
    top = foot[1] - height * meter
    shapes: list[Shape] = [box(foot[0] - half, top, foot[0] + half, foot[1])]
    inward = -1 if x > 0 else 1
    if kind == "lamp":
        arm = 1.5 * meter * inward
        shapes.append(
            Polygon(
                [
                    (foot[0], top),
                    (foot[0] + arm, top - 0.25 * meter),
                    (foot[0] + arm, top - 0.02 * meter),
                    (foot[0], top + 0.3 * meter),
                ]
            )
        )
        shapes.append(Ellipse(foot[0] + arm, top - 0.1 * meter, 0.42 * meter, 0.13 * meter))
    view.solid(shapes, view.number("pole"), view.hazed(STEEL, z))
    view.canvas.add([box(foot[0], top, foot[0] + half, foot[1])], view.hazed(STEEL, z, 0.62))
    if kind == "sign":
        _sign(view, foot[0], top, meter, z, style)
    if kind == "light":
        label = view.number("traffic light")
        view.solid(
            [box(foot[0] - 0.19 * meter, top - 0.5 * meter, foot[0] + 0.19 * meter, top + 0.5 * meter)],
            label,
            view.hazed((34.0, 38.0, 36.0), z),
        )
        for k, color in enumerate(((226.0, 52.0, 40.0), (92.0, 78.0, 30.0), (30.0, 84.0, 54.0))):
            view.canvas.add(
                [Ellipse(foot[0], top + (k - 1) * 0.31 * meter, 0.11 * meter, 0.11 * meter)], color
            )


def _sign(view: View, x: float, y: float, meter: float, z: float, style: int) -> None:
    red, white, blue = (206.0, 44.0, 40.0), (240.0, 240.0, 236.0), (36.0, 84.0, 168.0)
    label, size = view.number("traffic sign"), 0.38 * meter

    def triangle(s: float) -> Polygon:
        return Polygon([(x, y - s), (x + s, y + s * 0.72), (x - s, y + s * 0.72)])

    if style == 0:
        view.solid([triangle(size * 1.15)], label, red)
        view.canvas.add([triangle(size * 0.72)], white)
    elif style == 1:
        view.solid([Ellipse(x, y, size, size)], label, red)
        view.canvas.add([Ellipse(x, y, size * 0.7, size * 0.7)], white)
    else:
        view.solid([box(x - size, y - size, x + size, y + size)], label, blue)
        view.canvas.add([box(x - size * 0.5, y - size * 0.6, x + size * 0.5, y + size * 0.6)], white)


def bin_(view: View, x: float, z: float) -> None:
    meter, foot = view.scale(z), view.point(x, 0, z)
    shadow(view, x, z, 0.4)
    view.solid(
        [box(foot[0] - 0.26 * meter, foot[1] - 0.95 * meter, foot[0] + 0.26 * meter, foot[1])],
        view.number("static"),
        view.hazed((62.0, 74.0, 66.0), z),
    )
    view.canvas.add(
        [box(foot[0] - 0.29 * meter, foot[1] - 0.95 * meter, foot[0] + 0.29 * meter, foot[1] - 0.8 * meter)],
        view.hazed((44.0, 52.0, 48.0), z),
    )


def bollard(view: View, x: float, z: float) -> None:
    meter, foot = view.scale(z), view.point(x, 0, z)
    half = max(0.6, 0.05 * meter)
    view.solid(
        [box(foot[0] - half, foot[1] - 0.9 * meter, foot[0] + half, foot[1])],
        view.number("pole"),
        view.hazed((196.0, 70.0, 58.0), z),
    )
    view.canvas.add(
        [box(foot[0] - half, foot[1] - 0.72 * meter, foot[0] + half, foot[1] - 0.5 * meter)],
        view.hazed((232.0, 230.0, 224.0), z),
    )
