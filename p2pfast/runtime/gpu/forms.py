"""How a convolution gets its input: three forms, and which of them a layer takes.

- ``prologue``: the kernel normalises, activates and pads while it loads. Nothing is written in between, but
  every input value is transformed as often as it is loaded.
- ``applied``: a pass writes the normalised input, with its reflected border around it; the kernel only loads.
  The pass is cheap where the tensor stays in the second-level cache.
- ``library``: the same pass, then the library's convolution (cuDNN) and a pass for the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

PROLOGUE, APPLIED, LIBRARY = "prologue", "applied", "library"


@dataclass(frozen=True)
class Machine:
    """Rates of a device: multiply-adds a second on tensor cores, bytes a second of memory and of the
    second-level cache, that cache's bytes, and seconds of a launch inside a CUDA graph."""

    multiplications: float
    memory: float
    cache: float
    cache_bytes: float
    launch: float = 2e-6


# An H100's: measured with PyTorch (798 TFLOP/s in bfloat16, a copy at 3.0 TB/s); the cache's rate is assumed.
H100 = Machine(multiplications=399e12, memory=3.0e12, cache=7.0e12, cache_bytes=50e6)


@dataclass(frozen=True)
class Layer:
    """What an estimate needs to know of a convolution.

    Attributes:
        pending: something has to be done to the input: a normalisation, an activation.
        apart: the input is two tensors that nobody has written side by side.
        border: the padding is a reflection or replication.
        ready: the input as the kernel wants it exists anyway (an addition writes it, say).
        statistics: of the output are wanted.
        strange: why the library cannot run it as it stands, or None.
    """

    images: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    taps: int
    itemsize: int
    transposed: bool
    stride: int
    pending: bool
    border: bool
    ready: bool
    statistics: bool
    strange: str | None = None
    apart: bool = False

    @property
    def in_bytes(self) -> float:
        return float(self.images * self.channels * self.height * self.width * self.itemsize)

    @property
    def out_bytes(self) -> float:
        return float(self.images * self.out_channels * self.out_height * self.out_width * self.itemsize)

    @property
    def multiplications(self) -> float:
        """Of the convolution's definition."""
        pixels = self.height * self.width if self.transposed else self.out_height * self.out_width
        return float(self.images * pixels * self.taps * self.channels * self.out_channels)


@dataclass(frozen=True)
class Form:
    """A choice with its reason; ``seconds`` are estimated or measured for each form that can run."""

    kind: str
    reason: str
    seconds: dict[str, float]


def estimate(layer: Layer, machine: Machine = H100) -> dict[str, float]:
    """Seconds of each form; of how they compare more than of what a clock would say."""
    half = 1.0 if layer.itemsize == 2 else 0.5  # tf32 runs at half the rate
    tile_out = 128 if layer.out_channels > 64 else 64

    def pass_over(read: float, write: float) -> float:
        fits = read + write < 0.8 * machine.cache_bytes
        return machine.launch + (read + write) / (machine.cache if fits else machine.memory)

    # Every output column block loads the input's window again: from the cache, rarely from memory.
    loads = layer.in_bytes * layer.taps / (layer.stride**2 if not layer.transposed else 1)
    loads *= -(-layer.out_channels // tile_out)
    traffic = (layer.in_bytes + layer.out_bytes) / machine.memory + loads / machine.cache
    # Few channels leave most of a tile's depth and width empty.
    fill = min(1.0, layer.channels / 32) * min(1.0, layer.out_channels / tile_out)
    product = layer.multiplications / (machine.multiplications * half * 0.75 * max(fill, 0.05))
    core = machine.launch + max(product, traffic)
    # The transform of a prologue takes issue slots, about twice the instructions of a loop without it; to
    # reflect by index costs a fifth more.
    slower = 1.6 if layer.pending else 1.15 if layer.border else 1.0
    busy = machine.launch + max(slower * product, traffic)
    prepared = 0.0
    if (layer.pending or layer.border or layer.apart) and not layer.ready:
        prepared = pass_over(layer.in_bytes, layer.in_bytes)
    found = {PROLOGUE: busy, APPLIED: core + prepared}
    if layer.strange is None:
        surveyed = pass_over(layer.out_bytes, 0.0) if layer.statistics else 0.0
        found[LIBRARY] = core + prepared + surveyed
    return found


def _microseconds(value: float) -> str:
    return f"{value * 1e6:.0f} µs" if value >= 1e-6 else f"{value * 1e9:.0f} ns"


def _compared(best: str, seconds: dict[str, float], how: str) -> str:
    others = ", ".join(f"{k} {_microseconds(s)}" for k, s in seconds.items() if k != best)
    return f"{how} {_microseconds(seconds[best])}" + (f" (others: {others})" if others else "")


def choose(layer: Layer, measure: Callable[[str], float] | None, forced: str | None = None) -> Form:
    """The quickest form: by ``measure`` where there is one, else by the estimate. ``forced`` overrules both.

    An estimate never chooses the library: that is left to a clock.
    """
    seconds = estimate(layer)
    if forced is not None:
        if forced not in seconds:
            raise ValueError(f"form {forced} cannot run here: {layer.strange}")
        return Form(forced, "asked for", seconds)
    if measure is not None:
        close = min(seconds.values())
        timed = {kind: measure(kind) for kind, guess in seconds.items() if guess < 4 * close}
        best = min(timed, key=lambda kind: timed[kind])
        return Form(best, _compared(best, timed, "measured"), timed)
    own = [kind for kind in (PROLOGUE, APPLIED) if kind in seconds]
    best = min(own, key=lambda kind: seconds[kind])
    return Form(best, _compared(best, seconds, "estimated"), seconds)


def rates(device: torch.device) -> Any:
    """Name and capability of a device, what a stored choice depends on."""
    return torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
