"""Stored tensors of a plan: where they are, their normalisation, and passes that write them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from p2pfast.fuse.graph import Act, Graph, Norm, Op, View
from p2pfast.runtime.gpu.frame import Frame
from p2pfast.runtime.gpu.kernels import Kernels, Operand
from p2pfast.runtime.gpu.plan import DURING, GpuPlan, Memory, Place, Report, Running, Step
from p2pfast.runtime.liveness import count_uses, needs_statistics
from p2pfast.runtime.plan import Constant

Fetch = Callable[[Frame], Any]
Pad = tuple[int, int, int, int]  # top, bottom, left, right

NO_PAD: Pad = (0, 0, 0, 0)


@dataclass
class Loaded:
    """An operand of a step: how a frame gets it, and the memory that it is in."""

    fetch: Callable[[Frame], Operand]
    reads: tuple[Memory, ...]


@dataclass
class Factors:
    """Scale and shift of a normalisation."""

    scale: Fetch
    shift: Fetch
    reads: tuple[Memory, ...] = ()


@dataclass
class Stored:
    """A base: its place, and what of a border around it has been written."""

    place: Place
    border: Pad = NO_PAD
    border_mode: str = ""
    whole: Place | None = None  # with the border


@dataclass
class Tensors:
    """State of lowering one graph for a device.

    ``modules`` maps paths to modules, ``inputs`` placeholders to example values, and ``packs`` holds packed
    weights of all plans of the network. ``forced`` is the form that every convolution takes, for tests;
    ``measured`` says that forms are timed on the device.
    """

    graph: Graph
    modules: dict[str, Any]
    inputs: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    kernels: Kernels
    packs: dict[Any, Any]
    forced: str | None = None
    measured: bool = False
    plan: GpuPlan = field(default_factory=GpuPlan)
    stored: dict[int, Stored] = field(default_factory=dict)
    factors: dict[tuple[int, Norm], Factors] = field(default_factory=dict)
    applied: dict[Any, Place] = field(default_factory=dict)
    outside: dict[str, Memory] = field(default_factory=dict)
    wide: dict[Any, Place] = field(default_factory=dict)  # concatenations that are written piece by piece
    slices: dict[int, Place] = field(default_factory=dict)  # a base's part of one of them

    def __post_init__(self) -> None:
        self.uses = count_uses(self.graph)

    # --- memory ------------------------------------------------------------------------------------

    def _memory(self, size: int, name: str) -> Memory:
        memory = Memory(size, name)
        self.plan.memories.append(memory)
        return memory

    def _place(self, shape: tuple[int, ...], name: str, dtype: torch.dtype | None = None) -> Place:
        """A contiguous tensor in the arena."""
        dtype = dtype or self.dtype
        strides = torch.empty(shape, device="meta").stride()
        size = max(1, torch.Size(shape).numel()) * dtype.itemsize
        return Place(self._memory(size, name), dtype, tuple(shape), strides)

    def _out(self, op: Op) -> Place:
        """Where an operation's result goes: a slice of a concatenation, or a tensor of its own."""
        return self.slices.get(op.out) or self._place(self._nhwc(op.out), op.name)

    def _made(self, shape: tuple[int, ...], name: str) -> Place:
        """A tensor that a step makes itself."""
        strides = torch.empty(shape, device="meta").stride()
        return Place(self._memory(0, name), self.dtype, tuple(shape), strides)

    def _shape(self, base: int) -> tuple[int, int, int, int]:
        return self.graph.bases[base].shape

    def _nhwc(self, base: int) -> tuple[int, int, int, int]:
        n, c, h, w = self._shape(base)
        return n, h, w, c

    def _outside(self, name: str) -> Memory:
        """Stands for a value outside the arena, to keep the order of what makes and uses it."""
        if name not in self.outside:
            self.outside[name] = self._memory(0, name)
        return self.outside[name]

    def _constant(
        self, tensors: Callable[[], list[Tensor]], make: Callable[[], Tensor]
    ) -> Callable[[Frame], Tensor]:
        """A tensor derived from parameters; its address stays, as CUDA graphs need."""
        held: list[Tensor] = []

        def refresh() -> None:
            made = make().to(self.device)
            if held:
                held[0].copy_(made)
            else:
                held.append(made)

        self.plan.constants.append(Constant(tensors, refresh))
        return lambda frame: held[0]

    def _parameter(self, module: Any, name: str) -> Callable[[Frame], Tensor] | None:
        """A vector of a module in float32."""
        if getattr(module, name, None) is None:
            return None
        return self._constant(
            lambda: [getattr(module, name)], lambda: getattr(module, name).detach().float().clone()
        )

    # --- steps -------------------------------------------------------------------------------------

    def _report(self, report: Report) -> Report:
        self.plan.reports.append(report)
        return report

    def _step(
        self,
        name: str,
        run: Callable[[Frame], None],
        reads: tuple[Memory, ...] = (),
        writes: tuple[Memory, ...] = (),
        phase: int = DURING,
        obstacle: str | None = None,
    ) -> None:
        """Adds a step; what it takes counts for the latest row of ``explain``."""
        row = len(self.plan.reports) - 1
        self.plan.steps.append(Step(name, run, reads, writes, phase, row, obstacle))

    # --- normalisation -----------------------------------------------------------------------------

    def _needs_statistics(self, base: int) -> bool:
        return needs_statistics(self.uses, base)

    def _survey(self, base: int) -> None:
        """A pass for the statistics of a base, and what follows from them."""
        place = self.stored[base].place
        partial, count = self._memory(0, "partial"), self._memory(0, "count")

        def run(frame: Frame) -> None:
            frame.made[partial], frame.made[count] = self.kernels.statistics(frame.at(place))

        self._step(f"statistics_{base}", run, (place.memory,), (partial, count))
        self._merge(base, lambda f: f.made[partial], lambda f: f.made[count], (partial, count))

    def _merge(self, base: int, partial: Fetch, count: Fetch, reads: tuple[Memory, ...]) -> None:
        """Statistics of a base into the scale and shift of every normalisation that reads it."""
        n, _, h, w = self._shape(base)
        wanted = {v.norm for v in self.uses.get(base, []) if v.norm is not None and v.norm.kind != "frozen"}
        for norm in sorted(wanted, key=lambda x: x.path):
            module = self.modules[norm.path]
            weight, bias = self._parameter(module, "weight"), self._parameter(module, "bias")
            over_batch, eps = norm.kind == "batch", float(module.eps)
            scale, shift = self._memory(0, "scale"), self._memory(0, "shift")
            writes = [scale, shift]
            if getattr(module, "running_mean", None) is not None and module.training:
                mean, variance = self._memory(0, "mean"), self._memory(0, "variance")
                writes += [mean, variance]
                values = h * w * (n if over_batch else 1)
                self.plan.running.append(Running(module, mean, variance, values, not over_batch))

            self._step(
                f"merge_{norm.path}",
                _merging(self.kernels, partial, count, over_batch, eps, weight, bias, writes),
                reads,
                tuple(writes),
            )
            self.factors[base, norm] = Factors(_made(scale), _made(shift), (scale, shift))

    def _normalisation(self, base: int, norm: Norm) -> Factors:
        known = self.factors.get((base, norm))
        if known is None:
            if norm.kind != "frozen":
                raise AssertionError("statistics are merged where the base is made")
            known = self.factors[base, norm] = self._frozen(self.modules[norm.path])
        return known

    def _frozen(self, module: Any) -> Factors:
        """Scale and shift of stored statistics, in float64 and rounded once."""

        def tensors() -> list[Tensor]:
            named = (module.running_mean, module.running_var, module.weight, module.bias)
            return [t for t in named if t is not None]

        return Factors(
            self._constant(tensors, lambda: frozen_factors(module)[0].float()),
            self._constant(tensors, lambda: frozen_factors(module)[1].float()),
        )

    # --- operands ----------------------------------------------------------------------------------

    def _operand(self, view: View) -> Loaded:
        """A view as a kernel reads it, its normalisation and activation still to be done."""
        place = self.stored[view.base].place
        act, slope = ("none", 0.0) if view.act is None else (view.act.kind, view.act.slope)
        if view.norm is None:
            return Loaded(lambda f: Operand(f.at(place), None, None, act, slope), (place.memory,))
        factors = self._normalisation(view.base, view.norm)
        scale, shift = factors.scale, factors.shift
        return Loaded(
            lambda f: Operand(f.at(place), scale(f), shift(f), act, slope), (place.memory, *factors.reads)
        )

    def _plain(self, place: Place) -> Loaded:
        return Loaded(lambda f: Operand(f.at(place)), (place.memory,))

    def _write(
        self,
        name: str,
        x: Loaded,
        out: Place,
        pad: Pad = NO_PAD,
        pad_mode: str = "zeros",
        residual: Loaded | None = None,
        act: Act | None = None,
    ) -> None:
        """The pass out = pad(act(x + residual))."""
        kernels = self.kernels
        kind, slope = ("none", 0.0) if act is None else (act.kind, act.slope)

        def run(frame: Frame) -> None:
            added = None if residual is None else residual.fetch(frame)
            kernels.apply(x.fetch(frame), frame.at(out), added, kind, slope, pad, pad_mode)

        reads = x.reads + (() if residual is None else residual.reads)
        self._step(name, run, reads, (out.memory,))

    def _stored_view(self, view: View) -> Place:
        """A place with nothing pending; written once for all readers."""
        if view.norm is None and view.act is None:
            return self.stored[view.base].place
        key = (view.base, view.norm, view.act)
        if key not in self.applied:
            place = self._place(self._nhwc(view.base), f"applied_{view.base}")
            self._write(f"apply_{view.base}", self._operand(view), place)
            self.applied[key] = place
        return self.applied[key]

    def _bordered(self, views: tuple[View, ...], pad: Pad, mode: str) -> Place:
        """Views side by side along the channels, with nothing pending and a border around them; those that
        were written into their slices are there already."""
        if pad == NO_PAD and len(views) == 1:
            return self._stored_view(views[0])
        only = views[0] if len(views) == 1 else None
        if only is not None and only.norm is None and only.act is None:
            known = self.stored[only.base]
            if known.whole is not None and known.border == pad and known.border_mode == mode:
                return known.whole
        key = key_of(views, pad, mode)
        if key not in self.applied:
            n, h, w, _ = self._nhwc(views[0].base)
            channels = [self._shape(v.base)[1] for v in views]
            place = self.wide.get(key)
            if place is None:
                shape = (n, h + pad[0] + pad[1], w + pad[2] + pad[3], sum(channels))
                place = self._place(shape, f"bordered_{views[0].base}")
            first = 0
            for view, count in zip(views, channels, strict=True):
                if self.stored[view.base].place.memory is not place.memory:
                    name = f"apply_{view.base}"
                    self._write(name, self._operand(view), place.channels(first, count), pad, mode)
                first += count
            self.applied[key] = place
        return self.applied[key]


def frozen_factors(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a norm's stored statistics, in float64."""
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def key_of(views: tuple[View, ...], pad: Pad, mode: str) -> Any:
    return tuple((v.base, v.norm, v.act) for v in views), pad, mode


def _made(memory: Memory) -> Fetch:
    return lambda frame: frame.made[memory]


def _merging(
    kernels: Kernels,
    partial: Fetch,
    count: Fetch,
    over_batch: bool,
    eps: float,
    weight: Fetch | None,
    bias: Fetch | None,
    writes: list[Memory],
) -> Callable[[Frame], None]:
    def run(frame: Frame) -> None:
        found = kernels.merge(
            partial(frame),
            count(frame),
            over_batch,
            eps,
            None if weight is None else weight(frame),
            None if bias is None else bias(frame),
        )
        for memory, tensor in zip(writes, found, strict=False):
            frame.made[memory] = tensor

    return run
