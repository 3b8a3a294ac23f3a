"""Runs plans on the CPU: captures a module, keeps a plan for each kind of input, binds and runs it."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import nn

from p2pfast import _C
from p2pfast.fuse.capture import capture, trace
from p2pfast.fuse.graph import Graph
from p2pfast.labelmap import LabelMap
from p2pfast.runtime.plan import Constant, Pack, Plan
from p2pfast.runtime.planner import make_plan

STORED = (torch.float32, torch.bfloat16)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    # Inference tensors have no version counter; their address has to do.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class CannotRun(Exception):
    """Why a network or an input is left to PyTorch."""


class CpuEngine:
    """Fused execution of ``module`` (never modified) with tensors stored in ``dtype``."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, packed_limit: int | None) -> None:
        self.module, self.dtype, self.packed_limit = module, dtype, packed_limit
        self.signature = inspect.signature(type(module).forward)
        self.lock = threading.RLock()
        self.traces: dict[Any, Any] = {}
        self.plans: dict[Any, Plan] = {}
        self.graphs: dict[Any, Graph] = {}
        self.packs: dict[Any, Pack] = {}
        self.arenas: list[torch.Tensor] = []
        self.last: tuple[Plan, Graph, list[float]] | None = None
        self.modal = [
            m
            for m in module.modules()
            if isinstance(m, (nn.modules.batchnorm._NormBase, nn.Dropout, nn.Dropout2d))
        ]

    # --- inputs ------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name; raises TypeError as the call itself would."""
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        values = dict(list(bound.arguments.items())[1:])
        for parameter in list(self.signature.parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise CannotRun(f"forward takes {parameter}: a variable number of arguments")
        return {name: self._prepared(value) for name, value in values.items()}

    def _prepared(self, value: Any) -> Any:
        if isinstance(value, LabelMap):
            if value.device.type != "cpu":
                raise CannotRun(f"the labels are on {value.device}")
            return value
        if isinstance(value, torch.Tensor):
            if value.device.type != "cpu":
                raise CannotRun(f"the input is on {value.device}")
            value = value.detach()
            if value.is_floating_point() and value.dtype not in STORED:
                value = value.float()
        return value

    def _mode(self) -> tuple[bool, ...]:
        return tuple(m.training for m in self.modal)

    def _key(self, inputs: dict[str, Any]) -> tuple[Any, ...]:
        parts: list[Any] = [self._mode(), _C.active_level(), torch.get_num_threads()]
        for name, value in inputs.items():
            if isinstance(value, LabelMap):
                ids = None if value.instances is None else value.instances.dtype
                features = None if value.features is None else value.features.shape
                parts.append((name, "labels", value.shape, value.num_classes, ids, value.edges, features))
            elif isinstance(value, torch.Tensor):
                parts.append((name, value.shape, value.dtype, value.stride()))
            else:
                parts.append((name, repr(value)))
        return tuple(parts)

    # --- planning ----------------------------------------------------------------------------------

    def plan(self, inputs: dict[str, Any]) -> tuple[Plan, Graph]:
        """The plan for inputs like these; made on first use."""
        key = self._key(inputs)
        with self.lock:
            if key not in self.plans:
                mode = self._mode()
                if mode not in self.traces:
                    self.traces[mode] = self._trace()
                traced = self.traces[mode]
                names = {n.target: n.name for n in traced.graph.nodes if n.op == "placeholder"}
                by_node = {names[k]: v for k, v in inputs.items() if k in names}
                parameter = next((p for p in self.module.parameters() if p.is_floating_point()), None)
                graph = capture(traced, by_node, None if parameter is None else parameter.dtype)
                self.graphs[key] = graph
                modules = dict(self.module.named_modules())
                plan = make_plan(graph, modules, by_node, self.dtype, self.packs, self.packed_limit)
                plan.names = names
                self.plans[key] = plan
            return self.plans[key], self.graphs[key]

    def _trace(self) -> Any:
        try:
            return trace(self.module)
        except torch.fx.proxy.TraceError as error:
            raise CannotRun(f"its control flow depends on data: {error}".splitlines()[0]) from error

    # --- running -----------------------------------------------------------------------------------

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns for these arguments, without gradients."""
        _C.set_num_threads(torch.get_num_threads())
        inputs = self.bind(args, kwargs)
        plan, graph = self.plan(inputs)
        with torch.no_grad():
            for constant in plan.constants:
                self._refresh(constant)
            arena = self._take_arena(plan.arena_bytes)
            try:
                return self._execute(plan, graph, inputs, arena)
            finally:
                with self.lock:
                    self.arenas.append(arena)

    def _refresh(self, constant: Constant) -> None:
        seen = tuple(_version(p) for p in constant.parameters())
        if seen != constant.seen:
            with self.lock:
                if seen != constant.seen:
                    constant.refresh()
                    constant.seen = seen

    def _take_arena(self, size: int) -> torch.Tensor:
        """Memory for one run: kept between runs, one for each that runs at the same time."""
        with self.lock:
            for i, arena in enumerate(self.arenas):
                if arena.numel() >= size:
                    return self.arenas.pop(i)
            self.arenas.clear()
        return torch.empty(size, dtype=torch.uint8)

    def _execute(self, plan: Plan, graph: Graph, inputs: dict[str, Any], arena: torch.Tensor) -> Any:
        values: dict[str, Any] = {"arena": arena}
        slots = [0] * plan.slots
        slots[0] = arena.data_ptr()
        keep: list[torch.Tensor] = []
        for name, value in inputs.items():
            node = plan.names.get(name)
            if node is not None:
                values[node] = _Dense(value) if isinstance(value, LabelMap) else value
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
            slots[slot] = fetch().data_ptr()
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
        self.last = (plan, graph, seconds)
        base = arena.untyped_storage().data_ptr()
        for name, value in values.items():
            if (
                isinstance(value, torch.Tensor)
                and name != "arena"
                and value.untyped_storage().data_ptr() == base
            ):
                values[name] = value.clone()
        return plan.structure.assemble(results, values)

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
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
            momentum = module.momentum
            if momentum is None:
                momentum = 1.0 / float(module.num_batches_tracked)
            unbiased = variance * (r.count / max(1, r.count - 1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)


class _Dense:
    """A label map as an input: its dense tensor is only made where something needs it."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels

    def needed(self, plan: Plan, node: str) -> bool:
        return node in plan.dense_inputs

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.labels.dense(dtype)
