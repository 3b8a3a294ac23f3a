"""The 35 street-scene classes (the label ids of Cityscapes, licence plate as id 34) and their colours."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray

_CLASSES: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("unlabeled", (0, 0, 0)),
    ("ego vehicle", (24, 24, 32)),
    ("rectification border", (16, 16, 16)),
    ("out of roi", (8, 8, 8)),
    ("static", (92, 84, 76)),
    ("dynamic", (111, 74, 0)),
    ("ground", (81, 0, 81)),
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("parking", (250, 170, 160)),
    ("rail track", (230, 150, 140)),
    ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)),
    ("fence", (190, 153, 153)),
    ("guard rail", (180, 165, 180)),
    ("bridge", (150, 100, 100)),
    ("tunnel", (150, 120, 90)),
    ("pole", (153, 153, 153)),
    ("polegroup", (143, 143, 163)),
    ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)),
    ("truck", (0, 0, 70)),
    ("bus", (0, 60, 100)),
    ("caravan", (0, 0, 90)),
    ("trailer", (0, 0, 110)),
    ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
    ("license plate", (30, 30, 142)),
)

CLASS_NAMES: tuple[str, ...] = tuple(name for name, _ in _CLASSES)
NUM_CLASSES: int = len(_CLASSES)
ID: dict[str, int] = {name: index for index, name in enumerate(CLASS_NAMES)}
#: Classes whose objects are counted one by one; their instance id is ``class * 1000 + index``.
INSTANCE_CLASSES: frozenset[int] = frozenset(range(ID["person"], ID["bicycle"] + 1))


def palette(num_classes: int = NUM_CLASSES) -> NDArray[np.uint8]:
    """Colours for drawing label maps, (num_classes, 3) uint8.

    The street-scene colours are used for up to 35 classes; larger sets continue with evenly spread hues.
    """
    colors = [color for _, color in _CLASSES[:num_classes]]
    for index in range(len(colors), num_classes):
        # Steps of the golden ratio never repeat and keep neighbouring ids far apart in hue.
        red, green, blue = colorsys.hsv_to_rgb(index * 0.61803398875 % 1, 0.65, 0.9)
        colors.append((round(red * 255), round(green * 255), round(blue * 255)))
    return np.array(colors, dtype=np.uint8)


def colorize(labels: NDArray[np.integer], num_classes: int = NUM_CLASSES) -> NDArray[np.uint8]:
    """A label map (H, W) as a picture (H, W, 3) uint8. Labels must be below ``num_classes``."""
    return palette(num_classes)[labels]
