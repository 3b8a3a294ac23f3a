"""Runs plans on the CPU: binds tensors to a native program and runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from p2pfast import _C
from p2pfast.fuse.graph import Graph
from p2pfast.fuse.source import GraphSource, ModuleSource
from p2pfast.labelmap import LabelMap
from p2pfast.ops.threads import use_torch_threads
from p2pfast.runtime.engine import Dense, Engine, Prepared, update_running
from p2pfast.runtime.memory import OutOfMemory, allocate, readable
from p2pfast.runtime.plan import Plan
from p2pfast.runtime.planning import make_plan

STORED = (torch.float32, torch.bfloat16)


class CpuEngine(Engine):
    """Fused execution of ``source`` on the CPU; see :class:`Engine`.

    ``packed_limit`` and ``memory_limit`` are bytes, of packed weights and of everything a call needs.
    """

    stored = STORED
    last: tuple[Plan, Graph, list[float]] | None

    def __init__(
        self,
        source: ModuleSource | GraphSource,
        dtype: torch.dtype,
        native: torch.dtype,
        packed_limit: int | None,
        on_piece: Callable[[str, nn.Module, str], None] | None = None,
        memory_limit: int | None = None,
        accuracy: str = "default",
    ) -> None:
        super().__init__(source, dtype, native, torch.device("cpu"), on_piece, memory_limit)
        self.accuracy, self.packed_limit = accuracy, packed_limit
        self.arenas: list[torch.Tensor] = []
        self.may_lose = memory_limit is None  # PyTorch has none

    def _conditions(self) -> tuple[Any, ...]:
        use_torch_threads()
        return _C.active_level(), torch.get_num_threads()

    def _plan(self, graph: Graph, modules: dict[str, Any], inputs: dict[str, Any], taken: int) -> Plan:
        limit = self.memory_limit
        if limit is not None and taken >= limit:
            raise OutOfMemory(
                f"memory_limit is {readable(limit)}, and parameters, inputs and results alone take "
                f"{readable(taken)}; raise the limit or take a smaller image"
            )
        memory = None if limit is None else limit - taken
        return make_plan(
            graph, modules, inputs, self.dtype, self.packs, self.packed_limit, memory, self.accuracy
        )

    def _note_first(self, prepared: Prepared) -> None:
        self.last = (prepared.plan, prepared.graph, [0.0] * len(prepared.plan.program))

    def _take_arena(self, size: int) -> torch.Tensor:
        """Memory for one run: kept between runs, one for each that runs at the same time."""
        with self.lock:
            for i, arena in enumerate(self.arenas):
                if arena.numel() >= size:
                    return self.arenas.pop(i)
            self.arenas.clear()
        return allocate(size, "memory for intermediate tensors")

    def _execute(self, prepared: Prepared, tensors: list[Any]) -> Any:
        arena = self._take_arena(prepared.plan.arena_bytes)
        try:
            return self._run_program(prepared, tensors, arena)
        finally:
            with self.lock:
                self.arenas.append(arena)

    def _run_program(self, prepared: Prepared, tensors: list[Any], arena: torch.Tensor) -> Any:
        plan, inputs = prepared.plan, self._inputs(prepared.captured, tensors)
        values: dict[str, Any] = {"arena": arena}
        slots = [0] * plan.slots
        slots[0] = arena.data_ptr()
        keep: list[torch.Tensor] = []
        for name, value in inputs.items():
            values[name] = Dense(value) if isinstance(value, LabelMap) else value
        for entry in plan.label_inputs:
            labels: LabelMap = values[entry.node].labels
            flat = labels.labels.to(torch.uint8).contiguous()
            keep.append(flat)
            slots[entry.labels] = flat.data_ptr()
            if entry.instances is not None and labels.instances is not None:
                ids = labels.instances.contiguous()
                keep.append(ids)
                slots[entry.instances] = ids.data_ptr()
        for node, value in list(values.items()):
            if isinstance(value, Dense):
                values[node] = value.tensor(self.dtype) if value.needed(plan.dense_inputs, node) else None
        for slot, fetch in plan.parameters:
            tensor = fetch()
            keep.append(tensor)
            slots[slot] = tensor.data_ptr()
        results = []
        for result in plan.results:
            layout = torch.channels_last if result.channels_last else torch.contiguous_format
            tensor = torch.empty(result.shape, dtype=self.dtype, device="cpu", memory_format=layout)
            slots[result.slot] = tensor.data_ptr()
            results.append(tensor)

        pending = list(plan.outside)

        def bind_outside() -> None:
            for outside in list(pending):
                if outside.name not in values:
                    continue
                tensor = values[outside.name]
                if tensor.shape != outside.shape:
                    raise RuntimeError(
                        f"the shape of {outside.name} depends on data: it was {tuple(outside.shape)} and is "
                        f"{tuple(tensor.shape)}"
                    )
                if tensor.dtype != outside.dtype or tensor.stride() != outside.strides:
                    placed = torch.empty_strided(outside.shape, outside.strides, dtype=outside.dtype)
                    tensor = placed.copy_(tensor)
                keep.append(tensor)
                slots[outside.slot] = tensor.data_ptr()
                pending.remove(outside)

        seconds: list[float] = []
        position = 0
        for foreign in plan.foreign:
            if foreign.step > position:
                bind_outside()
                seconds += plan.program.run(slots, position, foreign.step, True)
                position = foreign.step
            foreign.run(values)
        bind_outside()
        seconds += plan.program.run(slots, position, len(plan.program), True)
        self._update_running(plan, arena)
        self.last = (plan, prepared.graph, seconds)
        base = arena.untyped_storage().data_ptr()
        for name, value in values.items():
            if (
                isinstance(value, torch.Tensor)
                and name != "arena"
                and value.untyped_storage().data_ptr() == base
            ):
                values[name] = value.clone()
        return self._finished(prepared.captured, plan.structure.assemble(results, values))

    def _update_running(self, plan: Plan, arena: torch.Tensor) -> None:
        """Running statistics, as the module's own forward would have left them."""
        floats = arena[: arena.numel() // 4 * 4].view(torch.float32)
        for r in plan.running:
            stride = -(-r.channels // 16) * 16

            def read(buffer: Any, r: Any = r, stride: int = stride) -> torch.Tensor:
                start = buffer.offset // 4
                return floats[start : start + r.images * stride].view(r.images, stride)[:, : r.channels]

            update_running(r.module, read(r.mean), read(r.variance), r.count, r.per_image)
