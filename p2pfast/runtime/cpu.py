"""Runs plans on the CPU: captures a module, keeps a plan for each kind of input, binds and runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from p2pfast import _C
from p2pfast.fuse.graph import ForeignOp, Graph
from p2pfast.fuse.source import Captured, GraphSource, ModuleSource
from p2pfast.labelmap import LabelMap
from p2pfast.runtime.liveness import result_views
from p2pfast.runtime.memory import OutOfMemory, allocate, readable
from p2pfast.runtime.plan import Constant, Pack, Plan
from p2pfast.runtime.planning import make_plan
from p2pfast.runtime.versions import Seen

STORED = (torch.float32, torch.bfloat16)
_MOST_PLANS = 64  # kinds of input and states of the module that are remembered


class _Prepared:
    """A plan with what it was made from."""

    def __init__(self, plan: Plan, graph: Graph, captured: Captured) -> None:
        self.plan, self.graph, self.captured = plan, graph, captured


class CpuEngine:
    """Fused execution of ``source`` (never modified) with tensors stored in ``dtype``.

    ``native`` is the dtype of the network's parameters, ``on_piece(path, module, reason)`` is called for
    each submodule that runs whole.
    """

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
        self.accuracy = accuracy
        self.memory_limit = memory_limit
        self.source, self.dtype, self.native, self.packed_limit = source, dtype, native, packed_limit
        self.on_piece = on_piece
        self.lock = threading.RLock()
        self.plans: dict[Any, _Prepared] = {}
        self.packs: dict[Any, Pack] = {}
        self.arenas: list[torch.Tensor] = []
        self.last: tuple[Plan, Graph, list[float]] | None = None

    # --- planning ----------------------------------------------------------------------------------

    def _remember(self, key: Any, prepared: _Prepared) -> None:
        self.plans[key] = prepared
        while len(self.plans) > _MOST_PLANS:
            self.plans.pop(next(iter(self.plans)))

    def _prepare(self, captured: Captured, tensors: list[Any]) -> _Prepared:
        inputs = self._inputs(captured, tensors)
        graph = captured.fuse(inputs)
        if self.dtype != self.native:
            for op in graph.ops:
                if isinstance(op, ForeignOp) and op.call is not None:
                    op.call = _InDtype(op.call, self.dtype, self.native)
        modules = {**dict(captured.root.named_modules()), **graph.layers}
        taken = self._taken(captured, graph, inputs)
        limit = self.memory_limit
        if limit is not None and taken >= limit:
            raise OutOfMemory(
                f"memory_limit is {readable(limit)}, and parameters, inputs and results alone take "
                f"{readable(taken)}; raise the limit or take a smaller image"
            )
        memory = None if limit is None else limit - taken
        plan = make_plan(
            graph, modules, inputs, self.dtype, self.packs, self.packed_limit, memory, self.accuracy
        )
        plan.outside_bytes = taken
        return _Prepared(plan, graph, captured)

    def _taken(self, captured: Captured, graph: Graph, inputs: dict[str, Any]) -> int:
        """Bytes of parameters, inputs and results."""
        taken = sum(t.nbytes for t in (*captured.root.parameters(), *captured.root.buffers()))
        for value in inputs.values():
            if isinstance(value, LabelMap):
                # The caller's maps, and labels as the kernel reads them.
                maps = (value.labels, value.instances, value.features)
                taken += sum(t.nbytes for t in maps if t is not None) + value.labels.numel()
            elif isinstance(value, torch.Tensor):
                taken += value.nbytes
        for view in result_views(graph):
            taken += prod(graph.bases[view.base].shape) * self.dtype.itemsize
        return taken

    def _inputs(self, captured: Captured, tensors: list[Any]) -> dict[str, Any]:
        values = (self._usable(value) for value in tensors)
        return dict(zip(captured.names, values, strict=True))

    def _usable(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        if value.is_floating_point() and value.dtype not in STORED:
            value = value.float()
        return value

    # --- running -----------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network returns for these arguments, without gradients.

        Raises CannotRun, with the reason, for what is left to PyTorch.
        """
        if isinstance(self.source, GraphSource):
            with self.lock:  # the parameters of this call are bound to the source
                return self._run(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _C.set_num_threads(torch.get_num_threads())
        key, tensors, arguments = self.source.bind(args, kwargs)
        key = (key, _C.active_level(), torch.get_num_threads(), torch.is_autocast_enabled("cpu"))
        prepared = self.plans.get(key)
        with torch.no_grad():
            if prepared is None:
                with self.lock:
                    prepared = self.plans.get(key)
                    if prepared is None:
                        result = self._first(key, tensors, arguments)
                        if result is not None:
                            return result[0]
                        prepared = self.plans[key]
            for action in prepared.graph.before:
                action()
            for constant in prepared.plan.constants:
                self._refresh(constant)
            arena = self._take_arena(prepared.plan.arena_bytes)
            try:
                return self._execute(prepared, tensors, arena)
            finally:
                with self.lock:
                    self.arenas.append(arena)

    def _first(self, key: Any, tensors: list[Any], arguments: Any) -> tuple[Any] | None:
        """Plans for inputs like these. Where only running tells the shapes, returns what PyTorch made of
        this first call."""
        captured = self.source.capture(arguments, tensors, self.native)
        for path, module, reason in self.source.pieces(captured):
            if self.on_piece is not None:
                self.on_piece(path, module, reason)
        result = None
        if not captured.complete:
            dense = [value.dense(self.native) if isinstance(value, LabelMap) else value for value in tensors]
            result = (self._finished(captured, captured.learn(dense)),)
        prepared = self._prepare(captured, tensors)
        self._remember(key, prepared)
        if result is not None:
            self.last = (prepared.plan, prepared.graph, [0.0] * len(prepared.plan.program))
        return result

    def _finished(self, captured: Captured, leaves: Any) -> Any:
        """Results in the dtype that was asked for, in the structure that the network returns."""
        if self.dtype != self.native:
            leaves = pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(self.dtype) if t.dtype == self.native else t, leaves
            )
        return leaves if captured.spec is None else pytree.tree_unflatten(list(leaves), captured.spec)

    def _refresh(self, constant: Constant) -> None:
        tensors = constant.parameters()
        if constant.seen is None or not constant.seen.matches(tensors):
            with self.lock:
                seen = Seen(tensors)
                constant.refresh()
                constant.seen = seen

    def _take_arena(self, size: int) -> torch.Tensor:
        """Memory for one run: kept between runs, one for each that runs at the same time."""
        with self.lock:
            for i, arena in enumerate(self.arenas):
                if arena.numel() >= size:
                    return self.arenas.pop(i)
            self.arenas.clear()
        return allocate(size, "memory for intermediate tensors")

    def _execute(self, prepared: _Prepared, tensors: list[Any], arena: torch.Tensor) -> Any:
        plan, inputs = prepared.plan, self._inputs(prepared.captured, tensors)
        values: dict[str, Any] = {"arena": arena}
        slots = [0] * plan.slots
        slots[0] = arena.data_ptr()
        keep: list[torch.Tensor] = []
        for name, value in inputs.items():
            values[name] = _Dense(value) if isinstance(value, LabelMap) else value
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
            if isinstance(value, _Dense):
                values[node] = value.tensor(self.dtype) if value.needed(plan, node) else None
        for slot, fetch in plan.parameters:
            tensor = fetch()
            keep.append(tensor)
            slots[slot] = tensor.data_ptr()
        results = []
        for result in plan.results:
            layout = torch.channels_last if result.channels_last else torch.contiguous_format
            tensor = torch.empty(result.shape, dtype=self.dtype, memory_format=layout)
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

            mean, variance = read(r.mean), read(r.variance)
            mean, variance = (mean.mean(0), variance.mean(0)) if r.per_image else (mean[0], variance[0])
            module: Any = r.module
            momentum = module.momentum
            if not r.per_image and module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
                if momentum is None:
                    momentum = 1.0 / float(module.num_batches_tracked)
            momentum = momentum or 0.0  # as instance normalisation takes None
            unbiased = variance * (r.count / max(1, r.count - 1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)


class _InDtype:
    """An unfused operation of a network whose tensors are stored in another dtype than its parameters'."""

    def __init__(self, call: Callable[..., Any], stored: torch.dtype, native: torch.dtype) -> None:
        self.call, self.stored, self.native = call, stored, native

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(self.native) if t.dtype == self.stored else t, (args, kwargs)
        )
        return self.call(*args, **kwargs)


class _Dense:
    """A label map as an input: its dense tensor is only made where something needs it."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels

    def needed(self, plan: Plan, node: str) -> bool:
        return node in plan.dense_inputs

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.labels.dense(dtype)
