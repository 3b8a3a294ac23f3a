"""Houses along the street and the hazy ones behind it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pfast.data.canvas import Color, Polygon, Shape, Stencil, box
from p2pfast.data.shades import GLASS, mix
from p2pfast.data.view import View


@dataclass(frozen=True)
class Building:
    """A box beside the street; ``near`` and ``far`` are metres from the middle of the road."""

    side: int
    near: float
    far: float
    z: float
    depth: float
    height: float
    tint: float
    pitched: bool


def building(view: View, b: Building) -> None:
    identity = view.number("building")
    canvas, z1 = view.canvas, b.z + b.depth
    near, far = b.side * b.near, b.side * b.far
    # Low houses are warm plaster, towers cool concrete; the tint varies within each.
    wall = mix((206.0, 158.0, 116.0), (158.0, 164.0, 172.0), min(1.0, max(0.0, (b.height - 9) / 12)))
    wall = mix(wall, (226.0, 206.0, 168.0) if b.tint > 0 else (168.0, 104.0, 84.0), abs(b.tint) * 0.4)
    front = box(*view.point(near, b.height, b.z), *view.point(far, 0, b.z))
    lane = [
        view.point(near, 0, b.z),
        view.point(near, b.height, b.z),
        view.point(near, b.height, z1),
        view.point(near, 0, z1),
    ]
    # The sun stands on the left: faces that look left are lit, those that look right lie in shade.
    facing = 1.06 if b.side > 0 else 0.66
    flank = view.solid([Polygon(lane)], identity, view.hazed(wall, b.z + b.depth / 2, facing))
    if flank is not None:
        _flank_windows(view, b, facing)
    if b.pitched:
        rise = b.height * 0.22
        ridge = [
            view.point(near, b.height, b.z),
            view.point(near + b.side * 2.4, b.height + rise, b.z + 3),
            view.point(far - b.side * 2.4, b.height + rise, b.z + 3),
            view.point(far, b.height, b.z),
        ]
        view.solid([Polygon(ridge)], identity, view.hazed((142.0, 74.0, 58.0), b.z, 1.0))
    stencil = view.solid([front], identity, view.hazed(wall, b.z, 0.94))
    if stencil is None or canvas.photo is None:
        return
    y, x = stencil.grid()
    meter = view.scale(b.z)
    top, base = view.point(near, b.height, b.z)[1], view.point(near, 0, b.z)[1]
    # Windows sit on a fixed pixel lattice, coarse for near blocks: large storeys read as nearness.
    cell = canvas.width / 2048 * (64 if b.z < 62 else 32)
    u, v = x / cell % 1, y / cell % 1
    upper = (y > top + 0.55 * cell) & (y < base - 3.4 * meter)
    frame = upper & (u > 0.24) & (u < 0.76) & (v > 0.16) & (v < 0.80)
    pane = upper & (u > 0.30) & (u < 0.70) & (v > 0.22) & (v < 0.74)
    sill = upper & (v > 0.80) & (v < 0.87) & (u > 0.20) & (u < 0.80)

    def put(mask: NDArray[np.bool_], color: Color, opacity: float = 1.0, shade: float = 1.0) -> None:
        canvas.paint(
            Stencil(stencil.y0, stencil.x0, stencil.mask & mask), view.hazed(color, b.z, shade), opacity
        )

    plaster = canvas.noise(stencil.mask.shape[0], stencil.mask.shape[1], max(3.0, meter * 1.5))
    canvas.paint(stencil, np.full((1, 1, 3), 60, np.float32), (0.05 * (1 - plaster)).astype(np.float32))
    put(frame, mix(wall, (250.0, 246.0, 238.0), 0.7))
    put(pane, GLASS)
    put(pane & (v < 0.40), (118.0, 146.0, 172.0), 0.7)
    put(pane & (np.abs(u - 0.5) < 0.02), (214.0, 210.0, 202.0))
    put(sill, wall, 1.0, 0.72)
    put((y < top + 0.16 * cell) & np.ones_like(x, np.bool_), mix(wall, (240.0, 236.0, 228.0), 0.6))
    put((y > top + 0.16 * cell) & (y < top + 0.24 * cell) & np.ones_like(x, np.bool_), wall, 1.0, 0.6)
    shop = (y > base - 3.1 * meter) & (y < base - 0.5 * meter)
    put((y > base - 3.4 * meter) & np.ones_like(x, np.bool_), wall, 1.0, 0.70)
    put(shop & (u > 0.10) & (u < 0.90), (60.0, 70.0, 80.0))
    put(shop & (u > 0.10) & (u < 0.90) & (y < base - 2.2 * meter), (122.0, 138.0, 150.0), 0.6)


def _flank_windows(view: View, b: Building, facing: float) -> None:
    """Windows of the face along the street, in perspective."""
    x, storeys, bays = b.side * b.near, int((b.height - 3.2) / 3.1), int(b.depth / 3.2)
    panes: list[Shape] = []
    for storey in range(storeys):
        low, high = 3.9 + storey * 3.1, 5.5 + storey * 3.1
        for bay in range(bays):
            z0, z1 = b.z + 0.9 + bay * 3.2, b.z + 2.4 + bay * 3.2
            panes.append(
                Polygon(
                    [
                        view.point(x, low, z0),
                        view.point(x, high, z0),
                        view.point(x, high, z1),
                        view.point(x, low, z1),
                    ]
                )
            )
    if panes:
        view.canvas.add(panes, view.hazed(GLASS, b.z + b.depth / 2, 0.6 + facing / 2), 0.85)
    floor = Polygon(
        [
            view.point(x, 0, b.z),
            view.point(x, 3.1, b.z),
            view.point(x, 3.1, b.z + b.depth),
            view.point(x, 0, b.z + b.depth),
        ]
    )
    view.canvas.add([floor], view.hazed((70.0, 68.0, 68.0), b.z), 0.45)


def skyline(view: View, x: float, z: float, width: float, height: float) -> None:
    left, top = view.point(x - width / 2, height, z)
    right, bottom = view.point(x + width / 2, 0, z)
    view.solid([box(left, top, right, bottom)], view.number("building"), view.hazed((138.0, 146.0, 158.0), z))
