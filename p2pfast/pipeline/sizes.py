"""Sizes: what a network can take, and how an input of another size is made to fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfast.errors import UsageError

_PROBE = 1024


@dataclass(frozen=True)
class Fit:
    """What a network asks of a size: a multiple of ``multiple``, at least ``minimum`` (pixels, each side)."""

    multiple: int
    minimum: int

    def up(self, size: int) -> int:
        """The smallest size that fits and is not below ``size``."""
        return max(self.minimum, -(-size // self.multiple) * self.multiple)

    def nearest(self, size: int) -> int:
        """The size that fits and is closest, as pix2pixHD's data loader rounds."""
        return max(self.minimum, round(size / self.multiple) * self.multiple)


def network_fit(model: nn.Module, channels: int) -> Fit:
    """Read the multiple off the network: the ratio of its input to its smallest feature map.

    The network is run on shapes alone (PyTorch's meta device), so this costs nothing. LocalEnhancer: 32,
    GlobalGenerator: 16, UnetGenerator with 8 levels: 256, ResnetGenerator: 4.
    """
    smallest = _PROBE

    def watch(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal smallest
        smallest = min(smallest, output.shape[-1])

    windows = (nn.Conv2d, nn.ConvTranspose2d, nn.AvgPool2d, nn.MaxPool2d)
    hooks = [part.register_forward_hook(watch) for part in model.modules() if isinstance(part, windows)]
    try:
        state = {key: torch.empty_like(value, device="meta") for key, value in _state(model).items()}
        with torch.no_grad():
            torch.func.functional_call(
                model, state, (torch.empty(1, channels, _PROBE, _PROBE, device="meta"),)
            )
    finally:
        for hook in hooks:
            hook.remove()
    multiple = 1 << (_PROBE // smallest - 1).bit_length()
    # Reflection needs two pixels to reflect at: such a network's smallest map may not shrink to one.
    reflects = any(
        isinstance(part, nn.ReflectionPad2d) or getattr(part, "padding_mode", "") == "reflect"
        for part in model.modules()
    )
    return Fit(multiple, 2 * multiple if reflects else multiple)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@dataclass(frozen=True)
class SizePolicy:
    """``kind`` is original, multiple or exact; ``width`` and ``height`` are those of exact."""

    kind: str
    width: int = 0
    height: int = 0

    @staticmethod
    def parse(text: str) -> SizePolicy:
        """Understand ``original``, ``multiple`` and ``WxH``. Raises UsageError."""
        if text in ("original", "multiple"):
            return SizePolicy(text)
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if match is None:
            raise UsageError(f"--size {text}: use original, multiple or WIDTHxHEIGHT such as 1024x512")
        return SizePolicy("exact", int(match[1]), int(match[2]))

    def target(self, height: int, width: int, fit: Fit) -> tuple[int, int]:
        """The size (height, width) of the result for an input of the given size."""
        if self.kind == "multiple":
            return fit.nearest(height), fit.nearest(width)
        if self.kind == "exact":
            return self.height, self.width
        return height, width


def pad(array: NDArray, fit: Fit) -> NDArray:
    """Continue the lower and right borders of (H, W[, C]) until the size fits; cropping undoes it.

    Continued ids add no instance edge.
    """
    height, width = array.shape[:2]
    extra = [(0, fit.up(height) - height), (0, fit.up(width) - width)] + [(0, 0)] * (array.ndim - 2)
    return array if extra[0][1] == extra[1][1] == 0 else np.pad(array, extra, mode="edge")
