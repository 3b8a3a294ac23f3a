"""The arrangement of one street: sky, ground, buildings, trees, vehicles and people, far to near."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pfast.data import buildings, people, plants, roadside, vehicles
from p2pfast.data.canvas import Canvas, Floats, Stencil
from p2pfast.data.classes import ID
from p2pfast.data.view import View

SKY_TOP = (92.0, 142.0, 205.0)
SKY_LOW = (206.0, 222.0, 234.0)


class Street:
    """Draws itself on a canvas; ``rng`` decides the arrangement and nothing else."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.view = View(canvas, center=rng.uniform(0.44, 0.56), horizon=rng.uniform(0.42, 0.46))
        self.half_road = rng.uniform(5.6, 7.2)
        self.walk = rng.uniform(2.6, 4.2)
        self.crossing = rng.uniform(13, 22) if rng.random() < 0.4 else None
        self.queue: list[tuple[float, Callable[[], None]]] = []

    def draw(self) -> None:
        self._sky()
        self._ground()
        for side in (-1, 1):
            self._buildings(side)
            self._trees(side)
            self._poles(side)
            self._parked(side)
            self._pedestrians(side)
        self._traffic()
        self.queue.sort(key=lambda item: -item[0])
        for _, paint in self.queue:
            paint()
        if self.rng.random() < 0.6:
            vehicles.bonnet(self.view)

    def _put(self, z: float, paint: Callable[..., None], *what: Any) -> None:
        """Have ``paint(view, *what)`` called when everything further away than ``z`` is drawn."""
        self.queue.append((z, functools.partial(paint, self.view, *what)))

    def _sky(self) -> None:
        canvas, view = self.canvas, self.view
        stencil = Stencil(0, 0, np.ones((canvas.height, canvas.width), np.bool_))
        canvas.claim(stencil, ID["sky"], ID["sky"])
        if canvas.photo is None:
            return
        y, _ = stencil.grid()
        t = np.clip(y / view.horizon_y, 0, 1)[..., None]
        sky = (1 - t) * np.array(SKY_TOP, np.float32) + t * np.array(SKY_LOW, np.float32)
        cell = canvas.width / 9
        clouds = canvas.noise(canvas.height, canvas.width, cell, 2.2) * 0.6
        clouds += canvas.noise(canvas.height, canvas.width, cell / 3, 2.0) * 0.3
        cover = np.clip(clouds * 1.1, 0, 0.6)[..., None]
        canvas.paint(stencil, sky + (np.float32(246) - sky) * cover)

    def _ground(self) -> None:
        """Label and shade everything below the horizon by where its ray meets the road plane."""
        canvas, view, rng = self.canvas, self.view, self.rng
        top = int(np.ceil(view.horizon_y)) + 1
        stencil = Stencil(top, 0, np.ones((canvas.height - top, canvas.width), np.bool_))
        y, x = stencil.grid()
        z = (view.focal * view.eye / (y - view.horizon_y)).astype(np.float32)
        across = ((x - view.center_x) * z / view.focal).astype(np.float32)
        near, beside = np.abs(across), self.half_road + self.walk
        labels = np.full(near.shape, ID["terrain"], np.uint8)
        verge = {-1: rng.random() < 0.45, 1: rng.random() < 0.45}
        for side in (-1, 1):
            if not verge[side]:
                labels[(across * side > 0)] = ID["sidewalk"]
        labels[near < beside] = ID["sidewalk"]
        labels[near < self.half_road] = ID["road"]
        if rng.random() < 0.3:  # a parking bay in paving stones along one side
            side = rng.choice((-1, 1))
            labels[(across * side < self.half_road) & (across * side > self.half_road - 2.1)] = ID["parking"]
        canvas.labels[stencil.window] = labels
        canvas.instances[stencil.window] = labels
        if canvas.photo is not None:
            self._paint_ground(stencil, labels, z, across)

    def _paint_ground(self, stencil: Stencil, labels: NDArray[np.uint8], z: Floats, across: Floats) -> None:
        canvas, view = self.canvas, self.view
        height, width = labels.shape
        fade = np.exp(-z / 45).astype(np.float32)  # fine structure disappears with distance
        rough = canvas.noise(height, width, max(2.0, width / 900)) * fade
        broad = canvas.noise(height, width, width / 14, 3.0)
        depth = np.clip((z - 4) / 90, 0, 1)

        def surface(name: str, color: tuple[float, float, float], grain: float) -> NDArray[np.bool_]:
            mask = labels == ID[name]
            tone = (grain * rough + 5 * broad + 26 * depth).astype(np.float32)
            shaded = np.array(color, np.float32) + tone[..., None]
            canvas.paint(Stencil(stencil.y0, stencil.x0, mask), shaded)
            return mask

        def mark(mask: NDArray[np.bool_], color: tuple[float, float, float], opacity: float = 1.0) -> None:
            visible = (opacity * np.broadcast_to(fade, mask.shape)).astype(np.float32)
            canvas.paint(Stencil(stencil.y0, stencil.x0, mask), color, visible)

        road = surface("road", (88, 88, 92), 9)
        walk = surface("sidewalk", (164, 152, 146), 8)
        surface("terrain", (96, 132, 62), 24)
        bay = surface("parking", (132, 118, 112), 9)
        pixel = z / view.focal  # metres that one pixel covers: lines thinner than it are widened to it
        line = np.maximum(0.14, pixel)
        dashes = (np.abs(across) < line / 2) & (z % 9 < 4)
        border = np.abs(np.abs(across) - self.half_road + 2.15) < line / 2
        mark(road & (dashes | border), (226, 226, 218), 0.9)
        if self.crossing is not None:
            stripes = (z > self.crossing) & (z < self.crossing + 3.2) & (across % 1.1 < 0.55)
            mark(road & stripes, (228, 228, 222), 1.0)
        kerb = walk & (np.abs(across) < self.half_road + 0.22)
        mark(kerb, (198, 192, 184))
        gutter = (road | bay) & (np.abs(across) > self.half_road - 0.18)
        mark(gutter, (62, 62, 64))
        joint = np.maximum(0.05, pixel)
        slabs = (z % 1.5 < joint) | (across % 1.0 < joint)
        mark(walk & ~kerb & slabs, (128, 118, 112), 0.8)
        mark(bay & ((z % 0.5 < joint) | (across % 0.5 < joint)), (100, 90, 86), 0.6)

    def _buildings(self, side: int) -> None:
        """A row of blocks along the street and, behind it, a hazy skyline that closes the view."""
        rng, front = self.rng, self.half_road + self.walk
        z = rng.uniform(24, 40)
        while z < 150:
            depth = rng.uniform(14, 30)
            setback = front + rng.uniform(1.5, 7)
            block = buildings.Building(
                side=side,
                near=setback,
                far=setback + rng.uniform(22, 45),
                z=z,
                depth=depth,
                height=rng.uniform(7, 19) * (1 + z / 160),
                tint=rng.uniform(-1, 1),
                pitched=bool(rng.random() < 0.5),
            )
            # Sorted by the far end: what stands between the block and the street belongs in front of it.
            self._put(z + depth, buildings.building, block)
            z += depth + rng.uniform(2, 16)
        for _ in range(4):
            z, x = rng.uniform(165, 240), side * rng.uniform(0, 60)
            width, height = rng.uniform(18, 40), rng.uniform(12, 34)
            self._put(z, buildings.skyline, x, z, width, height)
        if rng.random() < 0.5:
            x, z = side * (front + rng.uniform(0.4, 1.4)), rng.uniform(14, 26)
            kind, length = rng.choice(("hedge", "fence", "wall")), rng.uniform(8, 18)
            self._put(z + length, roadside.barrier, str(kind), x, z, length)

    def _trees(self, side: int) -> None:
        rng = self.rng
        spacing, z = rng.uniform(8, 17), rng.uniform(13, 30)
        while z < 130:
            x = side * (self.half_road + rng.uniform(1.0, self.walk + 2.5))
            height = rng.uniform(5.0, 9.0)
            seed = int(rng.integers(1 << 30))
            self._put(z, plants.tree, x, z, height, seed)
            z += spacing * rng.uniform(0.7, 1.8)
        for _ in range(int(rng.integers(3, 7))):  # undergrowth between the blocks
            x, z = side * (self.half_road + self.walk + rng.uniform(2, 25)), rng.uniform(40, 130)
            height, seed = rng.uniform(2, 6), int(rng.integers(1 << 30))
            self._put(z, plants.bush, x, z, height, seed)

    def _poles(self, side: int) -> None:
        rng = self.rng
        z = rng.uniform(9, 24)
        while z < 90:
            x = side * (self.half_road + rng.uniform(0.35, 0.8))
            kind = str(rng.choice(("lamp", "lamp", "sign", "sign", "light")))
            style = int(rng.integers(3))
            self._put(z, roadside.pole, kind, x, z, style)
            z += rng.uniform(8, 20)
        if rng.random() < 0.6:
            for z in np.arange(rng.uniform(7, 12), rng.uniform(25, 60), rng.uniform(1.6, 2.6)).tolist():
                self._put(z, roadside.bollard, side * (self.half_road + 0.3), z)
        for _ in range(int(rng.integers(2, 9))):
            x, z = side * (self.half_road + rng.uniform(0.5, self.walk)), rng.uniform(10, 40)
            self._put(z, roadside.bin_, x, z)

    def _parked(self, side: int) -> None:
        rng = self.rng
        z, density = rng.uniform(6.5, 16), rng.uniform(0.35, 0.95)
        while z < 110:
            if rng.random() < density and not (self.crossing and abs(z - self.crossing) < 5):
                car = vehicles.Vehicle.random_car(rng, x=side * (self.half_road - 1.05), z=z, away=side > 0)
                self._put(z, vehicles.vehicle, car)
            z += rng.uniform(5.3, 7.5)

    def _traffic(self) -> None:
        rng = self.rng
        for side, lane in ((1, self.half_road / 2 - 0.9), (-1, -self.half_road / 2 + 0.9)):
            z = rng.uniform(13, 40)
            while z < 140:
                x = lane + rng.uniform(-0.2, 0.2)
                if rng.random() < 0.16:
                    other = vehicles.Vehicle.random_large(rng, x=x, z=max(z, 24), away=side > 0)
                    self._put(other.z, vehicles.vehicle, other)
                    z += 14
                elif rng.random() < 0.75:
                    car = vehicles.Vehicle.random_car(rng, x=x, z=z, away=side > 0)
                    self._put(z, vehicles.vehicle, car)
                z += rng.uniform(10, 30)
        for _ in range(int(rng.integers(1, 4))):
            x = rng.choice((-1, 1)) * (self.half_road - rng.uniform(2.3, 2.8))
            z, motor, seed = rng.uniform(9, 40), bool(rng.random() < 0.3), int(rng.integers(1 << 30))
            self._put(z, people.cyclist, x, z, motor, seed)
        if self.crossing is not None:
            for _ in range(int(rng.integers(1, 5))):
                x, z = rng.uniform(-self.half_road, self.half_road), self.crossing + rng.uniform(0.4, 2.8)
                seed = int(rng.integers(1 << 30))
                self._put(z, people.person, x, z, seed)

    def _pedestrians(self, side: int) -> None:
        rng = self.rng
        for _ in range(int(rng.integers(4, 14))):
            x = side * (self.half_road + rng.uniform(0.6, self.walk - 0.3))
            z, seed = rng.uniform(9, 55), int(rng.integers(1 << 30))
            self._put(z, people.person, x, z, seed)
