"""Cars, buses and trucks, and the front of the one that carries the camera."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from p2pfast.data.canvas import Color, Ellipse, Point, Polygon, Shape, box
from p2pfast.data.shades import GLASS, RUBBER, mix
from p2pfast.data.view import View


@dataclass(frozen=True)
class Vehicle:
    """A car, bus or truck; (x, z) is the middle of the face towards the camera, sizes in metres."""

    kind: str
    x: float
    z: float
    width: float
    height: float
    length: float
    waist: float
    color: Color
    away: bool

    @staticmethod
    def random_car(rng: np.random.Generator, x: float, z: float, away: bool) -> Vehicle:
        # The colour goes with the place, as shape does: it can then be learnt from a label map.
        if x < -3:
            color = mix((186.0, 48.0, 42.0), (148.0, 60.0, 50.0), rng.random())
        elif x > 3:
            color = mix((48.0, 92.0, 158.0), (72.0, 112.0, 150.0), rng.random())
        else:
            color = (
                mix((222.0, 222.0, 220.0), (176.0, 180.0, 184.0), rng.random())
                if away
                else mix((62.0, 66.0, 72.0), (88.0, 92.0, 96.0), rng.random())
            )
        height = float(rng.uniform(1.40, 1.62))
        return Vehicle(
            "car",
            x,
            z,
            float(rng.uniform(1.72, 1.88)),
            height,
            float(rng.uniform(3.8, 4.6)),
            0.60 * height,
            color,
            away,
        )

    @staticmethod
    def random_large(rng: np.random.Generator, x: float, z: float, away: bool) -> Vehicle:
        if rng.random() < 0.55:
            return Vehicle("bus", x, z, 2.5, 3.1, 11.0, 1.25, (212.0, 164.0, 46.0), away)
        return Vehicle("truck", x, z, 2.45, 3.3, 7.5, 1.2, (206.0, 206.0, 200.0), away)


def vehicle(view: View, car: Vehicle) -> None:
    identity, canvas = view.number(car.kind), view.canvas
    z0, z1, half, waist = car.z, car.z + car.length, car.width / 2, car.waist
    boxy = car.kind != "car"
    inner = -1 if car.x > 0 else 1  # the side that the camera sees
    flank = car.x + inner * half

    def side(
        y0: float,
        y1: float,
        a: float,
        b: float,
        inset: float = 0.0,
        a_top: float | None = None,
        b_top: float | None = None,
    ) -> Polygon:
        x = flank - inner * inset
        return Polygon(
            [
                view.point(flank, y0, a),
                view.point(x, y1, a if a_top is None else a_top),
                view.point(x, y1, b if b_top is None else b_top),
                view.point(flank, y0, b),
            ]
        )

    def face(y0: float, y1: float, low: float, high: float) -> Polygon:
        return Polygon(
            [
                view.point(car.x - low, y0, z0),
                view.point(car.x - high, y1, z0),
                view.point(car.x + high, y1, z0),
                view.point(car.x + low, y0, z0),
            ]
        )

    m = view.scale(z0)
    ground = [
        view.point(car.x - half * 1.08, 0, z0 - 0.25),
        view.point(car.x + half * 1.2, 0, z0 - 0.25),
        view.point(car.x + half * 1.2, 0, z1),
        view.point(car.x - half * 1.08, 0, z1),
    ]
    canvas.add([Polygon(ground)], (26.0, 26.0, 30.0), 0.62)

    length, tuck = car.length, 0.0 if boxy else 0.22
    body_side = side(0.26, waist, z0, z1)
    cabin_side = side(
        waist,
        car.height,
        z0 + 0.02 * length,
        z1 - (0 if boxy else 0.30) * length,
        tuck,
        z0 + (0 if boxy else 0.13) * length,
        z1 - (0 if boxy else 0.44) * length,
    )
    wheels: list[Shape] = []
    for at in (0.2, 0.8):
        z = z0 + at * length
        cx, cy = view.point(flank, 0.33, z)
        wide = abs(view.point(flank, 0.33, z - 0.33)[0] - view.point(flank, 0.33, z + 0.33)[0]) / 2
        wheels.append(Ellipse(cx, cy, max(wide, 0.05 * m), 0.33 * view.scale(z)))
    tyres: list[Shape] = [
        box(*view.point(car.x + s * half, 0, z0), *view.point(car.x + s * (half - 0.24), 0.4, z0))
        for s in (-1, 1)
    ]
    body, cabin = (
        face(0.24, waist, half, half),
        face(waist, car.height, half * 0.97, half * (0.97 if boxy else 0.72)),
    )
    shapes: list[Shape] = [body_side, cabin_side, *wheels, *tyres, body, cabin]
    if view.solid(shapes, identity, view.hazed(RUBBER, z0)) is None or canvas.photo is None:
        return

    def put(parts: list[Shape], color: Color, shade: float = 1.0, opacity: float = 1.0) -> None:
        canvas.add(parts, view.hazed(color, z0, shade), opacity)

    lit = 1.02 if inner < 0 else 0.66
    put([body_side], car.color, lit)
    put([side(0.26, 0.26 + 0.3 * (waist - 0.26), z0, z1)], car.color, lit * 0.7)
    put([cabin_side], car.color, lit * 0.9)
    low, high = (waist + 0.08, car.height - 0.12) if not boxy else (waist, car.height * 0.72)
    if car.kind != "truck":
        a, b = (0.05, 0.34) if not boxy else (0.03, 0.03)
        put(
            [
                side(
                    low,
                    high,
                    z0 + a * length,
                    z1 - b * length,
                    tuck * 0.9,
                    z0 + (a + (0 if boxy else 0.09)) * length,
                    z1 - (b + (0 if boxy else 0.1)) * length,
                )
            ],
            GLASS,
            0.9,
        )
    put(wheels, RUBBER)
    put(
        [Ellipse(w.x, w.y, w.rx * 0.55, w.ry * 0.55) for w in wheels if isinstance(w, Ellipse)],
        (150.0, 152.0, 156.0),
    )
    put([body], car.color, 0.96)
    put([face(waist - 0.10, waist, half, half)], car.color, 1.18)
    put([cabin], car.color, 1.04)
    if car.kind == "truck" and car.away:
        put([face(waist, car.height, half * 0.03, half * 0.03)], car.color, 0.6)
    else:
        put([face(low, high, half * 0.86, half * (0.86 if boxy else 0.68))], GLASS)
        put(
            [face((low + high) / 2, high, half * (0.86 if boxy else 0.77), half * (0.86 if boxy else 0.68))],
            (124.0, 148.0, 168.0),
            1.0,
            0.55,
        )
    put([face(0.24, 0.24 + 0.22 * (waist - 0.24), half, half)], (44.0, 44.0, 48.0))
    lamp_y = 0.24 + 0.58 * (waist - 0.24)
    lamp: Color = (214.0, 34.0, 30.0) if car.away else (252.0, 248.0, 224.0)
    for s in (-1, 1):
        outer = view.point(car.x + s * half * 0.97, lamp_y + 0.13, z0)
        within = view.point(car.x + s * half * 0.68, lamp_y - 0.07, z0)
        put([box(*outer, *within)], lamp, 1.05)
    put(
        [box(*view.point(car.x - 0.26, 0.56, z0), *view.point(car.x + 0.26, 0.45, z0))], (232.0, 232.0, 226.0)
    )
    if not car.away:
        put(
            [
                box(
                    *view.point(car.x - half * 0.5, lamp_y + 0.04, z0),
                    *view.point(car.x + half * 0.5, lamp_y - 0.07, z0),
                )
            ],
            (36.0, 38.0, 42.0),
        )


def bonnet(view: View) -> None:
    """The front of the car that carries the camera, along the lower border."""
    canvas = view.canvas
    width, height = canvas.width, canvas.height
    points: list[Point] = [(0, height), (0, height * 0.985)]
    points += [
        (width * t, height * (0.985 - 0.075 * math.sin(math.pi * t) ** 0.7))
        for t in np.linspace(0.02, 0.98, 33).tolist()
    ]
    points += [(width, height * 0.985), (width, height)]
    stencil = view.solid([Polygon(points)], view.number("ego vehicle"), (38.0, 42.0, 50.0))
    if stencil is not None:
        y, _ = stencil.grid()
        t = np.clip((y - 0.905 * height) / (0.095 * height), 0, 1)[..., None]
        shine = (1 - t) * np.array((104.0, 116.0, 130.0), np.float32) + t * np.array(
            (30.0, 34.0, 42.0), np.float32
        )
        canvas.paint(stencil, shine)
