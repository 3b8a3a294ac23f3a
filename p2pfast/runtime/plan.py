"""What a plan is: a native program, and what has to be bound, refreshed and assembled around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.versions import Seen


@dataclass
class Stored:
    """Where a base lives: a buffer, or a tensor from outside, bound at each run."""

    dtype: torch.dtype
    strides: tuple[int, int, int, int]  # of image, channel, row and pixel, in elements
    buffer: Buffer
    origin: str = ""  # the outside tensor's name
    # Asks the step that makes it for a map of the pixels that are one vector for each label; None if there is
    # no such map. See ``uniform`` in csrc/cpu/conv.h.
    uniform: Callable[[], Buffer] | None = None
    image: int = 0  # the first image and row that it holds: memory of a band holds some rows of one image
    row: int = 0


@dataclass
class Report:
    """One row of ``explain``."""

    name: str
    kernel: str
    detail: str = ""
    multiplications: float = 0.0
    bytes: float = 0.0
    step: int = -1


@dataclass
class Foreign:
    """Python between native steps."""

    run: Callable[[dict[str, Any]], None]
    step: int  # native steps before it


@dataclass
class Outside:
    """A tensor the caller or an unfused operation provides: checked and bound at each run."""

    name: str
    slot: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]


@dataclass
class Constant:
    """Memory derived from parameters, made again when one of them changes."""

    parameters: Callable[[], list[torch.Tensor]]
    refresh: Callable[[], None]
    seen: Seen | None = None


@dataclass
class Pack:
    """Packed weights of a convolution, one copy for all plans of a network."""

    memory: torch.Tensor
    address: int
    constant: Constant

    @property
    def bytes(self) -> int:
        return self.memory.numel() * self.memory.element_size()


@dataclass
class Plan:
    """A program and what has to be bound to run it."""

    program: Any = None
    arena_bytes: int = 0
    packed_bytes: int = 0  # of the packed weights and tables it uses
    memory: int | None = None  # what both together may take
    outside_bytes: int = 0  # of parameters, inputs and results
    bands: int = 0  # the most bands an operation runs in; 0: every tensor is kept
    slots: int = 1
    foreign: list[Foreign] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    parameters: list[tuple[int, Callable[[], torch.Tensor]]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    label_inputs: list[LabelInput] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    structure: Any = None
    running: list[RunningStatistics] = field(default_factory=list)
    dense_inputs: set[str] = field(default_factory=set)  # label maps that something reads as a tensor
    reports: list[Report] = field(default_factory=list)
    keep: list[torch.Tensor] = field(default_factory=list)


@dataclass
class LabelInput:
    """A label map's slots."""

    node: str
    labels: int
    instances: int | None
    size: tuple[int, int, int]


@dataclass
class Result:
    """A tensor the program writes for the caller."""

    slot: int
    shape: tuple[int, int, int, int]
    channels_last: bool


@dataclass
class RunningStatistics:
    """A BatchNorm (or tracking InstanceNorm) whose running statistics a run updates."""

    module: nn.Module
    mean: Buffer
    variance: Buffer
    images: int
    channels: int
    count: int
    per_image: bool
