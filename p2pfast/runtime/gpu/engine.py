"""Runs networks on a CUDA device: keeps plans, and frames for the calls that run at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from p2pfast.fuse.graph import Graph
from p2pfast.fuse.source import GraphSource, ModuleSource
from p2pfast.labelmap import LabelMap
from p2pfast.ops.gpu import allows_tf32
from p2pfast.ops.gpu.capture import in_capture
from p2pfast.runtime.engine import Dense, Engine, Prepared, update_running
from p2pfast.runtime.gpu.frame import Frame, graphs_wanted, out_of_memory
from p2pfast.runtime.gpu.kernels import Kernels, fused_kernels
from p2pfast.runtime.gpu.lower import Lowering
from p2pfast.runtime.gpu.plan import GpuPlan
from p2pfast.runtime.gpu.require import WrongDevice
from p2pfast.runtime.memory import OutOfMemory, readable
from p2pfast.runtime.versions import Seen

STORED = (torch.float32, torch.bfloat16, torch.float16)
STREAMS = "P2PFAST_STREAMS"

# Set by tests: arguments of CudaEngine for networks on the CPU, which then take backend="cuda".
on_cpu: dict[str, Any] | None = None
_DEFAULT_STREAMS = 2


def streams_wanted() -> int:
    """How many streams a plan may use, ``P2PFAST_STREAMS`` or 2. Raises ValueError."""
    value = os.environ.get(STREAMS, str(_DEFAULT_STREAMS))
    if not value.isdecimal() or not 1 <= int(value) <= 16:
        raise ValueError(f"{STREAMS} is {value!r}; choose a number from 1 to 16")
    return int(value)


class CudaEngine(Engine):
    """Fused execution of ``source`` on ``device``; see :class:`p2pfast.runtime.engine.Engine`.

    ``kernels`` (by default Triton's and the native ones), ``frame`` and ``form`` are for tests, which run
    plans on CPU tensors in Triton's interpreter or in plain PyTorch, in other orders, and with one form for
    all convolutions.
    """

    stored = STORED
    last: tuple[GpuPlan, Graph, Frame | None] | None

    def __init__(
        self,
        source: ModuleSource | GraphSource,
        dtype: torch.dtype,
        native: torch.dtype,
        device: torch.device,
        on_piece: Callable[[str, nn.Module, str], None] | None = None,
        memory_limit: int | None = None,
        kernels: Kernels | None = None,
        frame: type[Frame] = Frame,
        form: str | None = None,
    ) -> None:
        super().__init__(source, dtype, native, device, on_piece, memory_limit)
        self.kernels = kernels if kernels is not None else fused_kernels(device)
        self.frame_type, self.form = frame, form
        self.idle: dict[int, list[Frame]] = {}  # by plan
        self.refreshed: Any = None  # the event of the last change of packed weights

    def _conditions(self) -> tuple[Any, ...]:
        # Where products of float32 are rounded to tf32 decides what is quickest.
        return streams_wanted(), allows_tf32()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for index, value in enumerate((*args, *kwargs.values())):
            if isinstance(value, (Tensor, LabelMap)) and value.device != self.device:
                if isinstance(value, Tensor) and value.dim() == 0:
                    continue  # PyTorch takes numbers from everywhere
                raise WrongDevice(
                    f"argument {index} is on {value.device} and the network on {self.device}: move it with "
                    f".to({str(self.device)!r})"
                )
        # What a plan keeps is written to again, which tensors made in inference mode would not allow.
        with torch.inference_mode(False):
            return super()._run(args, kwargs)

    def _plan(self, graph: Graph, modules: dict[str, Any], inputs: dict[str, Any], taken: int) -> GpuPlan:
        lowering = Lowering(
            graph,
            modules,
            inputs,
            self.dtype,
            self.device,
            self.kernels,
            self.packs,
            self.form,
            self.device.type == "cuda",
        )
        try:
            plan = lowering.build(streams_wanted())
        except torch.OutOfMemoryError as error:
            raise out_of_memory("memory for packed weights", self.device) from error
        self._note_change()
        needed = taken + plan.arena_bytes + plan.packed_bytes
        if self.memory_limit is not None and needed > self.memory_limit:
            raise OutOfMemory(
                f"memory_limit is {readable(self.memory_limit)} and this input needs {readable(needed)} on "
                f"{self.device} ({readable(taken)} for parameters, inputs and results, "
                f"{readable(plan.packed_bytes)} for packed weights, {readable(plan.arena_bytes)} for "
                "intermediate tensors); raise the limit, take a smaller image or batch, "
                "dtype=torch.bfloat16, or the CPU, where tensors can be computed in bands"
            )
        return plan

    def _note_first(self, prepared: Prepared) -> None:
        self.last = (prepared.plan, prepared.graph, None)

    # --- running -----------------------------------------------------------------------------------

    def _take_frame(self, plan: GpuPlan) -> Frame:
        with self.lock:
            idle = self.idle.setdefault(id(plan), [])
            if idle:
                return idle.pop()
            # Frames of forgotten plans hold arenas.
            known = {id(p.plan) for p in self.plans.values()}
            for key in [k for k in self.idle if k not in known and k != id(plan)]:
                del self.idle[key]
            return self.frame_type(plan, self.device)

    def _execute(self, prepared: Prepared, tensors: list[Any]) -> Any:
        plan: GpuPlan = prepared.plan
        if in_capture(self.device):
            # Memory of the caller's CUDA graph, at addresses that nobody else may use afterwards.
            try:
                return self._run_frame(prepared, self.frame_type(plan, self.device), tensors)
            finally:
                self.last = (plan, prepared.graph, None)
        frame = self._take_frame(plan)
        try:
            return self._run_frame(prepared, frame, tensors)
        except torch.OutOfMemoryError as error:
            raise out_of_memory("memory for a run", self.device) from error
        finally:
            frame.release()
            with self.lock:
                self.idle.setdefault(id(plan), []).append(frame)

    def _run_frame(self, prepared: Prepared, frame: Frame, tensors: list[Any]) -> Any:
        plan: GpuPlan = prepared.plan
        frame.values = {}
        for node, value in self._inputs(prepared.captured, tensors).items():
            if not isinstance(value, LabelMap):
                frame.values[node] = value
            elif node in plan.dense_inputs:
                frame.values[node] = value.dense(self.dtype)
            else:
                frame.values[node] = Dense(value)
        # What was captured cannot wait for what was not; the caller has run the network before.
        if self.refreshed is not None and not in_capture(self.device):
            torch.cuda.current_stream(self.device).wait_event(self.refreshed)
        capturable = self.device.type == "cuda" and not plan.obstacles and graphs_wanted()
        if frame.graph is None and capturable and frame.runs:
            with self.lock:  # one capture at a time
                frame.run()
        else:
            frame.run()
        for r in plan.running:
            update_running(r.module, frame.made[r.mean], frame.made[r.variance], r.count, r.per_image)
        self.last = (plan, prepared.graph, frame)
        values = dict(frame.values)
        base = frame.arena.untyped_storage().data_ptr()
        for name, value in values.items():
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() == base:
                values[name] = value.clone()
        return self._finished(prepared.captured, plan.structure.assemble(frame.results, values))

    def _refresh(self, constant: Any) -> None:
        tensors = constant.parameters()
        if constant.seen is not None and constant.seen.matches(tensors):
            return
        with self.lock:
            seen = Seen(tensors)
            constant.refresh()
            constant.seen = seen
            self._note_change()

    def _note_change(self) -> None:
        """Calls on other streams wait for the packed weights that this one has written."""
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
            self.refreshed = event

    # --- explain -----------------------------------------------------------------------------------

    def seconds(self) -> list[float]:
        """Seconds of every row of the last plan, measured step by step now; zeros where there is no clock."""
        if self.last is None or self.last[2] is None:
            return [0.0] * (len(self.last[0].reports) if self.last else 0)
        plan, _, last = self.last
        with self.lock:
            idle = self.idle.get(id(plan), [])
            if last not in idle:
                return [0.0] * len(plan.reports)  # another call is using it
            frame = idle.pop(idle.index(last))
        try:
            return frame.seconds()
        finally:
            with self.lock:
                self.idle[id(plan)].append(frame)

    def how(self) -> str:
        """Whether the last plan runs as a CUDA graph, on how many streams, and why not."""
        if self.last is None:
            return ""
        plan = self.last[0]
        count = plan.schedule.count
        text = f"{count} stream{'s' * (count > 1)}"
        if self.device.type != "cuda":
            return f"{text}; no CUDA graph: the tensors are on the CPU (interpreted, for tests)"
        if plan.obstacles:
            return f"{text}; no CUDA graph: {plan.obstacles[0]}"
        if not graphs_wanted():
            return f"{text}; no CUDA graph: P2PFAST_CUDA_GRAPHS=off"
        return f"{text}; a CUDA graph from the second call on"
