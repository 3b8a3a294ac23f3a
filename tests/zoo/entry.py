"""What the conformance zoo knows of each network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        make: builds it from a width (channels of the widest image) and an image size.
        inputs: makes its arguments from a number of images, an image size and the width.
        paper: where its architecture comes from.
        small: width and image size for the tests.
        real: width and image size for timing, as published where that is at most 256².
        native: convolutions of the small network that must run in fused kernels, at least.
        random: it draws random numbers whose values depend on the precision (sampling, dropout in training).
    """

    make: Callable[[int, int], nn.Module]
    inputs: Callable[[int, int, int], tuple[Tensor, ...]]
    paper: str
    native: int
    small: tuple[int, int] = (4, 32)
    real: tuple[int, int] = (64, 64)
    random: bool = False
