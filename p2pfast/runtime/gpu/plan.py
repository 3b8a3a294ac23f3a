"""What a plan for a GPU is: steps over memory whose places are known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from p2pfast.runtime.plan import Constant

if TYPE_CHECKING:
    from p2pfast.runtime.gpu.frame import Frame

BEFORE, DURING, AFTER = range(3)


@dataclass(eq=False)
class Memory:
    """``bytes`` of the arena at ``offset``; of no size where a step makes the tensor itself.

    ``uses`` are the numbers of the steps that read or write it.
    """

    bytes: int
    name: str = ""
    offset: int = 0
    uses: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False)
class Place:
    """An NHWC tensor in memory: ``shape`` (N, H, W, C), strides and the start in elements."""

    memory: Memory
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of the values, without gaps."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def channels(self, first: int, count: int) -> Place:
        """A slice of the channels."""
        shape = (*self.shape[:3], count)
        return Place(self.memory, self.dtype, shape, self.strides, self.start + first * self.strides[3])

    def inside(self, top: int, left: int, height: int, width: int) -> Place:
        """A rectangle of the pixels."""
        n, _, _, c = self.shape
        start = self.start + top * self.strides[1] + left * self.strides[2]
        return Place(self.memory, self.dtype, (n, height, width, c), self.strides, start)


@dataclass
class Step:
    """One launch, or a few that belong together.

    Attributes:
        name: the operation's name in the network.
        run: launches on the current stream.
        reads, writes: what decides the order.
        phase: BEFORE what a CUDA graph can hold (inputs arrive), DURING, or AFTER (results leave).
        report: index of the row of ``explain``.
        obstacle: why no CUDA graph can hold it.
    """

    name: str
    run: Callable[[Frame], None]
    reads: tuple[Memory, ...] = ()
    writes: tuple[Memory, ...] = ()
    phase: int = DURING
    report: int = -1
    obstacle: str | None = None


@dataclass
class Report:
    """One row of ``explain``; ``reason`` is why this kernel."""

    name: str
    kernel: str
    detail: str = ""
    reason: str = ""
    multiplications: float = 0.0
    bytes: float = 0.0


@dataclass
class Running:
    """A norm whose running statistics a run updates, and the (N, C) statistics it takes."""

    module: nn.Module
    mean: Memory
    variance: Memory
    count: int
    per_image: bool


@dataclass
class Result:
    """A tensor that the plan makes for the caller."""

    place: Place
    channels_last: bool


@dataclass
class Schedule:
    """Which stream each step runs on, and the steps it waits for on others."""

    streams: list[int]
    waits: list[tuple[int, ...]]
    before: list[int]  # bit i of before[j]: step i has ended when step j starts
    count: int = 1  # of streams
    frees: list[tuple[Memory, ...]] = field(default_factory=list)  # tensors that nobody needs after a step


@dataclass
class GpuPlan:
    """Steps in order, and what has to be bound, refreshed and assembled around them."""

    steps: list[Step] = field(default_factory=list)
    memories: list[Memory] = field(default_factory=list)
    schedule: Schedule = field(default_factory=lambda: Schedule([], [], []))
    arena_bytes: int = 0
    packed_bytes: int = 0
    outside_bytes: int = 0
    constants: list[Constant] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    structure: Any = None
    running: list[Running] = field(default_factory=list)
    dense_inputs: set[str] = field(default_factory=set)
    reports: list[Report] = field(default_factory=list)
    failed: str | None = None  # why a capture failed

    @property
    def obstacles(self) -> list[str]:
        """Why the plan is not captured as a CUDA graph; empty where it can be."""
        found = (s.obstacle for s in self.steps if s.phase == DURING and s.obstacle is not None)
        return [*dict.fromkeys(found), *([] if self.failed is None else [self.failed])]


@dataclass
class Weights:
    """Packed weights of a convolution, for all plans of a network; ``packed.data`` keeps its place."""

    packed: Any
    constant: Constant

    @property
    def bytes(self) -> int:
        return int(self.packed.data.numel() * self.packed.data.element_size())
