"""What engines share: a module is captured, and a plan is kept for each kind of input."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import prod
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from p2pfast.fuse.graph import ForeignOp, Graph
from p2pfast.fuse.source import Captured, GraphSource, ModuleSource, RunsAsWell
from p2pfast.fuse.trial import plan_loses
from p2pfast.labelmap import LabelMap
from p2pfast.runtime.liveness import result_views
from p2pfast.runtime.plan import Constant
from p2pfast.runtime.versions import Seen

_MOST_MULTIPLICATIONS = 1e10  # of a network that is compared with PyTorch
_MOST_PLANS = 64  # kinds of input and states of the module that are remembered


class AnyPlan(Protocol):
    """What every plan has."""

    constants: list[Constant]
    outside_bytes: int


class Prepared:
    """A plan with what it was made from."""

    def __init__(self, plan: Any, graph: Graph, captured: Captured) -> None:
        self.plan, self.graph, self.captured = plan, graph, captured
        self.loses = False  # to PyTorch


class Engine:
    """Fused execution of ``source`` (never modified) with tensors stored in ``dtype``.

    ``native`` is the dtype of the network's parameters, ``device`` where they are, and
    ``on_piece(path, module, reason)`` is called for each submodule that runs whole.
    """

    stored: tuple[torch.dtype, ...] = ()  # dtypes that tensors can be stored in
    may_lose = False  # whether PyTorch may run what it is faster at

    def __init__(
        self,
        source: ModuleSource | GraphSource,
        dtype: torch.dtype,
        native: torch.dtype,
        device: torch.device,
        on_piece: Callable[[str, nn.Module, str], None] | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.source, self.dtype, self.native, self.device = source, dtype, native, device
        self.on_piece = on_piece
        self.memory_limit = memory_limit
        self.lock = threading.RLock()
        self.plans: dict[Any, Prepared] = {}
        self.packs: dict[Any, Any] = {}
        self.last: Any = None

    # --- what an engine adds -----------------------------------------------------------------------

    def _conditions(self) -> tuple[Any, ...]:
        """What a plan depends on besides the arguments."""
        raise NotImplementedError

    def _plan(self, graph: Graph, modules: dict[str, Any], inputs: dict[str, Any], taken: int) -> AnyPlan:
        """A plan of ``graph``; ``taken`` are the bytes of parameters, inputs and results."""
        raise NotImplementedError

    def _execute(self, prepared: Prepared, tensors: list[Any]) -> Any:
        """What the network returns for inputs like those that ``prepared`` was made for."""
        raise NotImplementedError

    def _note_first(self, prepared: Prepared) -> None:
        """Sets what ``explain`` tells after a first call that ran in PyTorch."""
        raise NotImplementedError

    # --- planning ----------------------------------------------------------------------------------

    def _remember(self, key: Any, prepared: Prepared) -> None:
        self.plans[key] = prepared
        while len(self.plans) > _MOST_PLANS:
            self.plans.pop(next(iter(self.plans)))

    def _prepare(self, captured: Captured, tensors: list[Any]) -> Prepared:
        inputs = self._inputs(captured, tensors)
        graph = captured.fuse(inputs)
        if self.dtype != self.native:
            for op in graph.ops:
                if isinstance(op, ForeignOp) and op.call is not None:
                    op.call = _InDtype(op.call, self.dtype, self.native)
        modules = {**dict(captured.root.named_modules()), **graph.layers}
        taken = self._taken(captured, graph, inputs)
        plan = self._plan(graph, modules, inputs, taken)
        plan.outside_bytes = taken
        return Prepared(plan, graph, captured)

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
        if value.is_floating_point() and value.dtype not in self.stored:
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
        conditions = self._conditions()
        key, tensors, arguments = self.source.bind(args, kwargs, self.device)
        key = (key, *conditions, torch.is_autocast_enabled(self.device.type))
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
                        prepared.loses = self._loses(prepared, tensors, arguments)
            if prepared.loses:
                raise RunsAsWell("its own modules measured faster than a plan")
            return self._go(prepared, tensors)

    def _loses(self, prepared: Prepared, tensors: list[Any], arguments: Any) -> bool:
        """Whether PyTorch is faster; large networks of convolutions are not worth the time to ask."""
        work = sum(report.multiplications for report in prepared.plan.reports)
        if not self.may_lose or work > _MOST_MULTIPLICATIONS or self.dtype != self.native:
            return False
        module, source = self.source.module, self.source
        args, kwargs = (arguments, {}) if isinstance(source, GraphSource) else arguments

        def plan() -> None:
            self._conditions()
            source.bind(args, kwargs, self.device)  # a call with a plan finds it first
            self._go(prepared, tensors)

        return plan_loses(prepared.captured, tensors, (args, kwargs), plan, module.forward)

    def _go(self, prepared: Prepared, tensors: list[Any]) -> Any:
        for action in prepared.graph.before:
            action()
        for constant in prepared.plan.constants:
            self._refresh(constant)
        return self._execute(prepared, tensors)

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
            self._note_first(prepared)
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


def update_running(
    module: Any, mean: torch.Tensor, variance: torch.Tensor, count: int, per_image: bool
) -> None:
    """Updates a norm's running statistics as the module's own forward would have.

    Args:
        mean, variance: (N, C) of the images, variances biased; with ``per_image`` their average counts,
            otherwise they are the batch's and equal for all images.
        count: values of one channel that the statistics are of.
    """
    mean, variance = (mean.mean(0), variance.mean(0)) if per_image else (mean[0], variance[0])
    momentum = module.momentum
    if not per_image and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
    momentum = momentum or 0.0  # as instance normalisation takes None
    unbiased = variance * (count / max(1, count - 1))
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


class Dense:
    """A label map as an input: its dense tensor is only made where something needs it."""

    def __init__(self, labels: LabelMap) -> None:
        self.labels = labels

    def needed(self, dense_inputs: set[str], node: str) -> bool:
        return node in dense_inputs

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.labels.dense(dtype)
