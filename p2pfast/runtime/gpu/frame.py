"""Runs a plan: binds its places to an arena, launches its steps on their streams, or replays a CUDA graph.

A frame serves one call at a time; calls that overlap get frames of their own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.gpu.capture import capture
from p2pfast.runtime.gpu.plan import AFTER, BEFORE, DURING, GpuPlan, Memory, Place
from p2pfast.runtime.memory import OutOfMemory, readable

GRAPHS = "P2PFAST_CUDA_GRAPHS"


def graphs_wanted() -> bool:
    """Whether plans become CUDA graphs; ``P2PFAST_CUDA_GRAPHS=off`` switches them off. Raises ValueError."""
    value = os.environ.get(GRAPHS, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{GRAPHS} is {value!r}; choose on or off")
    return value == "on"


def allocate(size: int, device: torch.device, what: str) -> Tensor:
    """``size`` uninitialised bytes on ``device``; raises OutOfMemory with what is free."""
    try:
        return torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"{what} of {readable(size)}", device) from error


def out_of_memory(what: str, device: torch.device) -> OutOfMemory:
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return OutOfMemory(
        f"{what} cannot be allocated on {device}: {readable(free)} of {readable(total)} are free and PyTorch "
        f"keeps {readable(held)} unused; take a smaller image or batch, dtype=torch.bfloat16, or free memory "
        "with torch.cuda.empty_cache()"
    )


class Frame:
    """The tensors of one plan in one arena on ``device``."""

    def __init__(self, plan: GpuPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.arena = allocate(plan.arena_bytes, device, "memory for intermediate tensors")
        self.made: dict[Memory, Tensor] = {}  # what steps made themselves
        self.values: dict[str, Any] = {}  # inputs, and what unfused operations return
        self.results: list[Tensor] = []
        self.places: dict[Place, Tensor] = {}
        self.graph: Any = None
        self.runs = 0
        self.warm: int | None = None  # the thread of the last run that was no graph's
        self.done: Any = None  # the event of the last use, on whatever stream that was
        self.home: Any = None  # the stream that the arena's memory goes back to
        self.side: list[Any] = []
        if device.type == "cuda":
            self.side = [torch.cuda.Stream(device) for _ in range(plan.schedule.count - 1)]
            self.done = torch.cuda.Event()
            self.home = torch.cuda.current_stream(device)

    # --- tensors -----------------------------------------------------------------------------------

    def at(self, place: Place) -> Tensor:
        """The NHWC tensor of a place."""
        if not place.memory.bytes:
            made = self.made[place.memory]
            return made.as_strided(place.shape, place.strides, made.storage_offset() + place.start)
        known = self.places.get(place)
        if known is None:
            flat = self.arena.view(place.dtype)
            start = place.memory.offset // place.dtype.itemsize + place.start
            known = self.places[place] = flat.as_strided(place.shape, place.strides, start)
        return known

    def image(self, place: Place) -> Tensor:
        """The same as PyTorch sees it, (N, C, H, W)."""
        return self.at(place).permute(0, 3, 1, 2)

    # --- running -----------------------------------------------------------------------------------

    def run(self) -> None:
        """One run on the current stream; ``values`` holds the inputs, ``results`` is filled."""
        self.results = []
        if self.device.type != "cuda":
            self._phase(BEFORE)
            self._phase(DURING)
            self._phase(AFTER)
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.runs:
                stream.wait_event(self.done)
            self._phase(BEFORE)
            self._during(stream)
            self._phase(AFTER)
        self.runs += 1

    def release(self) -> None:
        """Marks the end of a call on the current stream; the next one, on whatever stream, waits for it."""
        self.values, self.results = {}, []
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            self.done.record(stream)
            if stream != self.home:  # a frame that is dropped must not give its memory away too early
                self.arena.record_stream(stream)

    def _during(self, stream: Any) -> None:
        # A run before it compiles kernels and lets libraries choose theirs, which a capture must not see;
        # cuDNN does so once in every thread.
        thread = threading.get_ident()
        if not self.plan.obstacles and graphs_wanted():
            if self.graph is None and self.warm == thread:
                self._capture()
            if self.graph is not None:
                self.graph.replay()
                return
        self._on_streams(stream)
        self.warm = thread

    def _capture(self) -> None:
        """Records the steps as a CUDA graph, which also owns the tensors that steps make."""
        self.made.clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with capture(graph, self.device):
                self._on_streams(torch.cuda.current_stream())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # nothing has run yet: it runs without a graph
            self.made.clear()
            self.plan.failed = f"its capture failed ({error})"
            warnings.warn(
                f"p2pfast runs without a CUDA graph: {self.plan.failed}", RuntimeWarning, stacklevel=2
            )
        else:
            self.graph = graph

    def _on_streams(self, main: Any) -> None:
        plan, order = self.plan, self.plan.schedule
        streams = [main, *self.side]
        for side in self.side:
            side.wait_stream(main)
        awaited = {i for waits in order.waits for i in waits}
        events: dict[int, Any] = {}
        for index, step in enumerate(plan.steps):
            if step.phase != DURING:
                continue
            stream = streams[order.streams[index]]
            for other in order.waits[index]:
                stream.wait_event(events[other])
            with torch.cuda.stream(stream):
                self.launch(index)
            if index in awaited:
                events[index] = torch.cuda.Event()
                events[index].record(stream)
        for side in self.side:
            main.wait_stream(side)

    def _phase(self, phase: int) -> None:
        for index in self.in_order(i for i, s in enumerate(self.plan.steps) if s.phase == phase):
            self.launch(index)

    def in_order(self, indices: Iterable[int]) -> Iterable[int]:
        """The order in which one stream runs steps."""
        return indices

    def launch(self, index: int) -> None:
        """Runs a step on the current stream and gives back what nobody needs after it."""
        self.plan.steps[index].run(self)
        for memory in self.plan.schedule.frees[index]:
            self.made.pop(memory, None)

    # --- measuring ---------------------------------------------------------------------------------

    def seconds(self) -> list[float]:
        """Seconds of every row of ``explain``, one step after the other on whatever the arena holds.
        Zeros for a plan with unfused operations, which could not run again."""
        plan = self.plan
        spent = [0.0] * len(plan.reports)
        if self.device.type != "cuda" or plan.obstacles:
            return spent
        kept, self.made = self.made, dict(self.made)  # a CUDA graph writes to its own
        with torch.no_grad(), torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self.done)
            for index, step in enumerate(plan.steps):
                if step.phase != DURING:
                    continue
                found = min(self._timed(step.run) for _ in range(3))
                if step.report >= 0:
                    spent[step.report] += found
                for memory in plan.schedule.frees[index]:
                    self.made.pop(memory, None)
        self.made = kept
        return spent

    def _timed(self, run: Callable[[Frame], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(self)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3
