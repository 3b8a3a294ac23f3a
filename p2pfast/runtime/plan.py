"""From a fused graph to a program: which kernel runs each operation, where every tensor lives.

A plan is made once for input shapes, layouts and dtypes. Tensors inside it are NHWC with the channels
rounded up to 16; the convolution that makes one also gathers its statistics, and whoever reads it
normalises on load.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from p2pfast import _C
from p2pfast.fuse.graph import (
    Act,
    AddOp,
    ApplyOp,
    ConvOp,
    ForeignOp,
    Graph,
    ImportOp,
    LabelConvOp,
    Norm,
    Op,
    Opaque,
    PoolOp,
    View,
    map_views,
)
from p2pfast.runtime import choice as choices
from p2pfast.runtime.memory import Buffer, place

_ACTS = {"relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4, "elu": 5, "silu": 6, "gelu": 7}
_PADS = {"zeros": 0, "reflect": 1, "replicate": 2}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}

Address = Callable[[], int]


def channel_stride(channels: int) -> int:
    """Elements between pixels of a tensor inside a plan."""
    return -(-channels // 16) * 16


def _act_fields(act: Act | None) -> dict[str, Any]:
    return {} if act is None else {"act": _ACTS[act.kind], "slope": act.slope}


@dataclass
class Stored:
    """Where a base lives: a buffer, or a tensor from outside, bound at each run."""

    dtype: torch.dtype
    strides: tuple[int, int, int, int]  # of image, channel, row and pixel, in elements
    buffer: Buffer
    origin: str = ""  # the outside tensor's name


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
    seen: tuple[Any, ...] = ()


@dataclass
class Plan:
    """A program and what has to be bound to run it."""

    program: Any = None
    arena_bytes: int = 0
    slots: int = 1
    foreign: list[Foreign] = field(default_factory=list)
    outside: list[Outside] = field(default_factory=list)
    parameters: list[tuple[int, Callable[[], torch.Tensor]]] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    label_inputs: list[LabelInput] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    structure: Any = None
    running: list[RunningStatistics] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # the traced name of each parameter of forward
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


class Planner:
    """Lowers one graph. ``modules`` maps paths to modules; ``dtype`` is that of stored tensors."""

    def __init__(
        self,
        graph: Graph,
        modules: dict[str, nn.Module],
        inputs: dict[str, Any],
        dtype: torch.dtype,
        packs: dict[Any, Any],
        packed_limit: int,
    ) -> None:
        self.graph, self.modules, self.inputs, self.dtype = graph, modules, inputs, dtype
        self.packs, self.packed_limit = packs, packed_limit
        self.plan = Plan()
        self.buffers: list[Buffer] = []
        self.steps: list[Callable[[Any], int]] = []
        self.stored: dict[int, Stored] = {}
        self.norms: dict[tuple[int, Norm], tuple[Buffer | Address, Buffer | Address, int]] = {}
        self.slot_of: dict[int, int] = {}
        self.workspace = self._buffer(64)
        self.uses = self._count_uses()
        self.results: dict[int, Result] = {}

    # --- memory ------------------------------------------------------------------------------------

    def _buffer(self, size: int) -> Buffer:
        buffer = Buffer(max(64, int(size)), 0)
        self.buffers.append(buffer)
        return buffer

    def _slot(self) -> int:
        self.plan.slots += 1
        return self.plan.slots - 1

    @property
    def step(self) -> int:
        return len(self.steps)

    def _at(self, buffer: Buffer) -> Address:
        """The buffer's address; it must live while the step being built runs."""
        buffer.touch(self.step)
        return lambda: _C.slot_address(buffer.slot, buffer.offset)

    def _parameter(self, fetch: Callable[[], torch.Tensor]) -> Address:
        slot = self._slot()
        self.plan.parameters.append((slot, fetch))
        return lambda: _C.slot_address(slot, 0)

    def _constant(
        self, size: int, parameters: Callable[[], list[torch.Tensor]], fill: Callable[[torch.Tensor], Any]
    ) -> Address:
        """``size`` floats derived from parameters, kept outside the arena."""
        tensor = torch.zeros(size + 16)
        start = (-tensor.data_ptr() // 4) % 16
        view = tensor[start : start + size]
        self.plan.keep.append(tensor)
        self.plan.constants.append(Constant(parameters, lambda: fill(view)))
        address = view.data_ptr()
        return lambda: address

    # --- graph facts -------------------------------------------------------------------------------

    def _views(self, op: Op) -> list[View]:
        if isinstance(op, ConvOp):
            return list(op.inputs)
        if isinstance(op, AddOp):
            return [v for v in (op.left, op.right) if v is not None]
        if isinstance(op, (ApplyOp, PoolOp)):
            return [op.view] if op.view is not None else []
        found: list[View] = []
        if isinstance(op, ForeignOp):
            map_views((op.args, op.kwargs), lambda v: found.append(v) if isinstance(v, View) else None)
        return found

    def _count_uses(self) -> dict[int, list[View]]:
        uses: dict[int, list[View]] = {}
        for op in self.graph.ops:
            for view in self._views(op):
                uses.setdefault(view.base, []).append(view)
        map_views(
            self.graph.result,
            lambda v: uses.setdefault(v.base, []).append(v) if isinstance(v, View) else None,
        )
        return uses

    def _needs_statistics(self, base: int) -> bool:
        return any(v.norm is not None and v.norm.kind != "frozen" for v in self.uses.get(base, []))

    def _shape(self, base: int) -> tuple[int, int, int, int]:
        return self.graph.bases[base].shape

    # --- tensors -----------------------------------------------------------------------------------

    def _make(self, base: int, dtype: torch.dtype | None = None) -> Stored:
        """Memory for a base: the caller's result where the base is one as it stands, else the arena."""
        n, c, h, w = self._shape(base)
        if base in self.results:
            result = self.results[base]
            strides = (c * h * w, 1, w * c, c) if result.channels_last else (c * h * w, h * w, w, 1)
            stored = Stored(self.dtype, strides, Buffer(0, result.slot))
        else:
            pixel = channel_stride(c)
            dtype = dtype or self.dtype
            size = n * h * w * pixel * (4 if dtype == torch.float32 else 2)
            stored = Stored(dtype, (h * w * pixel, 1, w * pixel, pixel), self._buffer(size))
        self.stored[base] = stored
        return stored

    def _layout(self, stored: Stored) -> dict[str, Any]:
        image, channel, row, pixel = stored.strides
        return {
            "image_stride": image,
            "row_stride": row,
            "pixel_stride": pixel,
            "channel_stride": channel,
            "dtype": _DTYPES[stored.dtype],
        }

    def _source(self, view: View) -> Callable[[], dict[str, Any]]:
        """The dictionary of a view as a kernel's source."""
        stored = self.stored[view.base]
        data = self._at(stored.buffer)
        fixed = {**self._layout(stored), "channels": self._shape(view.base)[1], **_act_fields(view.act)}
        if view.norm is None:
            return lambda: {**fixed, "data": data()}
        scale, shift, stride = self._normalisation(view.base, view.norm)
        return lambda: {**fixed, "data": data(), "scale": scale(), "shift": shift(), "norm_stride": stride}

    def _output(self, stored: Stored) -> Callable[[], dict[str, Any]]:
        data = self._at(stored.buffer)
        fixed = self._layout(stored)
        return lambda: {**fixed, "data": data()}

    # --- normalisation -----------------------------------------------------------------------------

    def _normalisation(self, base: int, norm: Norm) -> tuple[Address, Address, int]:
        scale, shift, stride = self._norm_buffers(base, norm)
        return self._live(scale), self._live(shift), stride

    def _live(self, where: Buffer | Address) -> Address:
        return self._at(where) if isinstance(where, Buffer) else where

    def _norm_buffers(self, base: int, norm: Norm) -> tuple[Any, Any, int]:
        known = self.norms.get((base, norm))
        if known is not None:
            return known
        n, c, _, _ = self._shape(base)
        if norm.kind != "frozen":
            raise AssertionError("statistics are merged where the base is made")
        module: Any = self.modules[norm.path]
        size = n * channel_stride(c)

        def tensors() -> list[torch.Tensor]:
            return [
                t
                for t in (module.running_mean, module.running_var, module.weight, module.bias)
                if t is not None
            ]

        def factors() -> tuple[torch.Tensor, torch.Tensor]:
            scale = torch.rsqrt(module.running_var.double() + module.eps)
            if module.weight is not None:
                scale = scale * module.weight.detach().double()
            shift = -module.running_mean.double() * scale
            if module.bias is not None:
                shift = shift + module.bias.detach().double()
            return scale, shift

        def fill(index: int) -> Callable[[torch.Tensor], Any]:
            return lambda out: out.view(n, -1)[:, :c].copy_(factors()[index])

        entry = (
            self._constant(size, tensors, fill(0)),
            self._constant(size, tensors, fill(1)),
            channel_stride(c),
        )
        self.norms[(base, norm)] = entry
        return entry

    def _affine(self, module: Any, name: str, channels: int) -> Address | None:
        if getattr(module, name, None) is None:
            return None
        return self._constant(
            channels,
            lambda: [getattr(module, name)],
            lambda out: out.copy_(getattr(module, name).detach().reshape(-1)),
        )

    def _merge(self, base: int, partial: Buffer, count: Address, parts: int) -> None:
        """Statistics of a base into the scale and shift of every normalisation that reads it."""
        n, c, h, w = self._shape(base)
        wanted = {v.norm for v in self.uses.get(base, []) if v.norm is not None and v.norm.kind != "frozen"}
        for norm in sorted(wanted, key=lambda x: x.path):
            module: Any = self.modules[norm.path]
            size = 4 * n * channel_stride(c)
            scale, shift = self._buffer(size), self._buffer(size)
            weight, bias = self._affine(module, "weight", c), self._affine(module, "bias", c)
            over_batch = norm.kind == "batch"
            fixed = {"images": n, "channels": c, "parts": parts, "eps": module.eps, "over_batch": over_batch}
            addresses = {
                "partial": self._at(partial),
                "count": count,
                "scale": self._at(scale),
                "shift": self._at(shift),
            }
            if weight:
                addresses["weight"] = weight
            if bias:
                addresses["bias"] = bias
            if getattr(module, "running_mean", None) is not None and module.training:
                mean, variance = self._buffer(size), self._buffer(size)
                mean.last = variance.last = 1 << 60  # read after the run
                addresses["mean"], addresses["variance"] = self._at(mean), self._at(variance)
                values = h * w * (n if over_batch else 1)
                self.plan.running.append(
                    RunningStatistics(module, mean, variance, n, c, values, not over_batch)
                )
            self._add(_merge_step(fixed, addresses))
            self.norms[(base, norm)] = (scale, shift, channel_stride(c))

    def _statistics(self, base: int) -> None:
        """A pass for the statistics of a base that no convolution of ours made."""
        if not self._needs_statistics(base):
            return
        n, c, h, w = self._shape(base)
        source = self._source(View(base))
        fixed = {"images": n, "height": h, "width": w}
        parts = -(-h // 16)
        partial = self._buffer(4 * n * parts * 2 * channel_stride(c))
        count = self._buffer(4 * n * parts)
        at, at_count = self._at(partial), self._at(count)
        self._report(Report(f"statistics_{base}", "statistics", bytes=4.0 * n * c * h * w))
        self._add(lambda p: p.statistics({**fixed, "source": source(), "partial": at(), "count": at_count()}))
        self._merge(base, partial, self._at(count), parts)

    # --- steps -------------------------------------------------------------------------------------

    def _add(self, build: Callable[[Any], int]) -> None:
        self.steps.append(build)

    def _report(self, report: Report) -> None:
        report.step = self.step
        self.plan.reports.append(report)

    def build(self) -> Plan:
        self._plan_results()
        for op in self.graph.ops:
            self._lower(op)
        self._finish_results()
        self._note_dense_inputs()
        self.workspace.first, self.workspace.last = 0, self.step
        self.plan.arena_bytes = place(self.buffers) + 64
        program = _C.Program()
        for build in self.steps:
            build(program)
        self.plan.program = program
        return self.plan

    def _note_dense_inputs(self) -> None:
        def note(value: Any) -> None:
            if isinstance(value, Opaque):
                self.plan.dense_inputs.add(value.node)

        for op in self.graph.ops:
            if isinstance(op, ImportOp):
                self.plan.dense_inputs.add(op.node)
            if isinstance(op, ForeignOp):
                map_views((op.args, op.kwargs), note)
        map_views(self.graph.result, note)

    def _plan_results(self) -> None:
        """Bases that are results as they stand are written straight into the caller's tensor."""
        views: list[View] = []
        map_views(self.graph.result, lambda v: views.append(v) if isinstance(v, View) else None)
        producers = {op.out: op for op in self.graph.ops}
        for view in views:
            producer = producers.get(view.base)
            alone = len(self.uses[view.base]) == 1 and view.norm is None
            n, c, h, w = self._shape(view.base)
            takes = isinstance(producer, ConvOp) and producer.act is None and c <= 8
            if alone and takes and isinstance(producer, ConvOp) and view.base not in self.results:
                producer.act = view.act
                self.results[view.base] = Result(self._slot(), (n, c, h, w), view in self.graph.channels_last)

    def _finish_results(self) -> None:
        written: dict[int, int] = {}

        def finish(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            if id(value) not in written:
                if value.base in self.results:
                    result = self.results[value.base]
                else:
                    shape = self._shape(value.base)
                    result = Result(self._slot(), shape, value in self.graph.channels_last)
                    n, c, h, w = shape
                    strides = (c * h * w, 1, w * c, c) if result.channels_last else (c * h * w, h * w, w, 1)
                    self._apply(
                        f"result_{value.base}", value, Stored(self.dtype, strides, Buffer(0, result.slot))
                    )
                written[id(value)] = len(self.plan.results)
                self.plan.results.append(result)
            return ("result", written[id(value)])

        self.plan.structure = _Structure(map_views(self.graph.result, finish))

    def _apply(self, name: str, view: View, out: Stored, noise: Address | None = None) -> None:
        n, c, h, w = self._shape(view.base)
        final: Act | None = None
        if view.act is not None and view.act.kind not in ("relu", "leaky_relu"):
            view, final = View(view.base, view.norm), view.act
        source, output = self._source(view), self._output(out)
        fixed = {"images": n, "height": h, "width": w, **_act_fields(final)}
        self._report(Report(name, "apply", bytes=n * c * h * w * 8.0))

        def build(program: Any) -> int:
            extra = {} if noise is None else {"noise": noise()}
            return program.apply({**fixed, **extra, "first": source(), "out": output()})

        self._add(build)

    def _lower(self, op: Op) -> None:
        if isinstance(op, ConvOp):
            self._conv(op)
        elif isinstance(op, LabelConvOp):
            self._label_conv(op)
        elif isinstance(op, AddOp):
            self._addition(op)
        elif isinstance(op, ApplyOp):
            self._store(op)
        elif isinstance(op, PoolOp):
            self._pool(op)
        elif isinstance(op, ImportOp):
            self._import(op)
        elif isinstance(op, ForeignOp):
            self._foreign(op)

    def _conv(self, op: ConvOp) -> None:
        module: Any = self.modules[op.path]
        transposed = isinstance(module, nn.ConvTranspose2d)
        base = self._shape(op.inputs[0].base)
        n, c, h, w = self._shape(op.out)
        self._fold_activation(op)
        out = self._make(op.out)
        kernel_h, kernel_w = module.kernel_size
        in_channels = sum(self._shape(v.base)[1] for v in op.inputs)
        taps = kernel_h * kernel_w
        statistics = self._needs_statistics(op.out)
        fixed: dict[str, Any] = {
            "images": n,
            "height": base[2],
            "width": base[3],
            "out_height": h,
            "out_width": w,
            "out_channels": c,
            "kernel_h": kernel_h,
            "kernel_w": kernel_w,
            "stride": module.stride[0],
            "pad_top": op.pad_top,
            "pad_left": op.pad_left,
            "transposed": transposed,
            "pad": _PADS[op.pad_mode],
            "weight_out_stride": taps if transposed else in_channels * taps,
            "weight_in_stride": c * taps if transposed else taps,
            **_act_fields(op.act),
        }
        raw_dtype = module.weight.dtype if module.weight.dtype in _DTYPES else torch.float32
        fixed["weight_dtype"] = _DTYPES[raw_dtype]
        sources = [self._source(v) for v in op.inputs]
        output = self._output(out)
        pretend = {**fixed, "sources": [s() for s in sources], "out": output(), "bias": 1}
        if statistics:
            pretend.update(partial=1, count=1)
        chosen = choices.choose(pretend, self.packed_limit)
        fixed.update(block=chosen.block, group=chosen.group)
        pretend.update(block=chosen.block, group=chosen.group)
        info = _C.conv_info(chosen.algorithm, pretend)
        self.workspace.bytes = max(self.workspace.bytes, info["workspace_bytes"])

        addresses: dict[str, Address] = {"workspace": self._at(self.workspace)}
        if info["packed_floats"]:
            addresses["packed"] = self._packed(op.path, module, chosen, pretend, info["packed_floats"])
        else:
            addresses["weight"] = self._raw_weight(module, raw_dtype)
        if module.bias is not None:
            bias = self._affine(module, "bias", c)
            if bias:
                addresses["bias"] = bias
        parts = info["partials"]
        if statistics:
            partial, count = self._buffer(4 * n * parts * 2 * channel_stride(c)), self._buffer(4 * n * parts)
            addresses["partial"], addresses["count"] = self._at(partial), self._at(count)
        moved = (
            sum(4.0 * n * self._shape(v.base)[1] * base[2] * base[3] for v in op.inputs) + 4.0 * n * c * h * w
        )
        detail = f"{in_channels}→{c} {kernel_h}×{kernel_w} s{module.stride[0]} @{h}×{w}"
        self._report(Report(op.name, chosen.name, detail, info["multiplications"], moved))
        algorithm = chosen.algorithm

        def build(program: Any) -> int:
            fields = {**fixed, "sources": [s() for s in sources], "out": output()}
            return program.conv(algorithm, {**fields, **{k: v() for k, v in addresses.items()}})

        self._add(build)
        if statistics:
            self._merge(op.out, partial, self._at(count), parts)

    def _fold_activation(self, op: ConvOp) -> None:
        """An activation that every reader wants, with no normalisation before it, is done on the way out."""
        if op.act is not None or op.out in self.results:
            return
        uses = self.uses.get(op.out, [])
        acts = {v.act for v in uses}
        if len(acts) != 1 or None in acts or any(v.norm is not None for v in uses):
            return
        op.act = acts.pop()
        for view in uses:
            object.__setattr__(view, "act", None)

    def _packed(
        self, path: str, module: Any, chosen: choices.Choice, args: dict[str, Any], floats: int
    ) -> Address:
        """Packed weights, one copy for all plans of the network."""
        key = (path, chosen.algorithm, _C.active_level(), tuple(s["channels"] for s in args["sources"]))
        entry = self.packs.get(key)
        if entry is None:
            tensor = torch.empty(floats + 16)
            start = (-tensor.data_ptr() // 4) % 16
            view = tensor[start : start + floats]
            template = {**args, "bias": 0, "partial": 0, "count": 0}

            def refresh() -> None:
                weight = module.weight.detach()
                if weight.dtype not in _DTYPES:
                    weight = weight.float()
                weight = weight.contiguous()
                _C.conv_pack(
                    chosen.algorithm,
                    {**template, "weight": weight.data_ptr(), "weight_dtype": _DTYPES[weight.dtype]},
                    view.data_ptr(),
                )

            entry = (tensor, view.data_ptr(), Constant(lambda: [module.weight], refresh))
            self.packs[key] = entry
        _, address, constant = entry
        self.plan.constants.append(constant)
        return lambda: address

    def _raw_weight(self, module: Any, dtype: torch.dtype) -> Address:
        weight = module.weight
        if weight.dtype == dtype and weight.is_contiguous():
            return self._parameter(lambda: module.weight)
        return self._constant(
            weight.numel(), lambda: [module.weight], lambda out: out.copy_(module.weight.detach().reshape(-1))
        )

    def _label_conv(self, op: LabelConvOp) -> None:
        assert op.labels is not None
        module: Any = self.modules[op.path]
        labels = self.inputs[op.labels.node]
        n, c, h, w = self._shape(op.out)
        images, _, height, width = labels.labels.shape
        entry = self._label_input(op.labels.node, labels)
        edges = self._edges(op.labels.node, labels, entry)
        out = self._make(op.out)
        statistics = self._needs_statistics(op.out)
        shape = {
            "batch": images,
            "height": height,
            "width": width,
            "classes": labels.num_classes,
            "has_edges": labels.has_edges,
            "cout": c,
            "kernel": module.kernel_size[0],
            "pool_levels": op.labels.level,
            "reflect": op.reflect,
            "band_rows": 16 if statistics else 0,
        }
        native_shape = _C.LabelConvShape(**shape)
        layout = _C.LabelConvLayout(native_shape)

        def tensors() -> list[torch.Tensor]:
            return [t for t in (module.weight, module.bias) if t is not None]

        def fill(packed: torch.Tensor) -> None:
            weight = module.weight.detach().float().contiguous()
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            _C.label_conv_pack(
                native_shape,
                weight=weight.data_ptr(),
                bias=0 if bias is None else bias.data_ptr(),
                packed=packed.data_ptr(),
            )

        packed = self._constant(layout.packed_floats, tensors, fill)
        scratch = self._buffer(layout.scratch_bytes)
        addresses = {
            "labels": lambda: _C.slot_address(entry.labels, 0),
            "packed": packed,
            "out": self._at(out.buffer),
            "scratch": self._at(scratch),
        }
        if edges is not None:
            addresses["edges"] = self._at(edges)
        bands = -(-h // 16)
        if statistics:
            partial = self._buffer(4 * n * bands * 2 * channel_stride(c))
            addresses["partials"] = self._at(partial)
        fixed = {**shape, "out_bf16": out.dtype == torch.bfloat16}
        detail = (
            f"{labels.num_channels}→{c} {module.kernel_size[0]}×{module.kernel_size[1]} from labels @{h}×{w}"
        )
        self._report(Report(op.name, "label_conv", detail, 0.0, 4.0 * n * c * h * w))
        self._add(lambda p: p.label_conv({**fixed, **{k: v() for k, v in addresses.items()}}))
        if statistics:
            rows = torch.full((n, bands), 16.0)
            rows[:, -1] = h - 16 * (bands - 1)
            rows *= w
            self.plan.keep.append(rows)
            count = rows.data_ptr()
            self._merge(op.out, partial, lambda: count, bands)

    def _label_input(self, node: str, labels: Any) -> LabelInput:
        for entry in self.plan.label_inputs:
            if entry.node == node:
                return entry
        n, _, h, w = labels.labels.shape
        instances = self._slot() if labels.has_edges else None
        entry = LabelInput(node, self._slot(), instances, (n, h, w))
        self.plan.label_inputs.append(entry)
        self._edge_maps: dict[str, Buffer] = getattr(self, "_edge_maps", {})
        return entry

    def _edges(self, node: str, labels: Any, entry: LabelInput) -> Buffer | None:
        if entry.instances is None:
            return None
        if node not in self._edge_maps:
            n, h, w = entry.size
            edges = self._buffer(n * h * w)
            at = self._at(edges)
            slot = entry.instances
            fixed = {
                "element_size": labels.instances.element_size(),
                "images": n,
                "height": h,
                "width": w,
                "image_stride": h * w,
                "row_stride": w,
            }
            self._report(Report(f"{node}_edges", "instance_edges", bytes=5.0 * n * h * w))
            self._add(lambda p: p.instance_edges({**fixed, "ids": _C.slot_address(slot, 0), "edges": at()}))
            self._edge_maps[node] = edges
        return self._edge_maps[node]

    def _addition(self, op: AddOp) -> None:
        assert op.left is not None and op.right is not None
        n, c, h, w = self._shape(op.out)
        first, second = self._source(op.left), self._source(op.right)
        out = self._make(op.out)
        output = self._output(out)
        fixed = {"images": n, "height": h, "width": w, **_act_fields(op.act)}
        self._report(Report(op.name, "add", bytes=n * c * h * w * 12.0))
        self._add(lambda p: p.apply({**fixed, "first": first(), "second": second(), "out": output()}))
        self._statistics(op.out)

    def _store(self, op: ApplyOp) -> None:
        assert op.view is not None
        noise: Address | None = None
        if op.dropout:
            shape, keep = self._shape(op.out), 1.0 - op.dropout
            slot = self._slot()
            name = f"noise_{op.out}"
            dtype = self.dtype

            def draw(values: dict[str, Any]) -> None:
                # As PyTorch's dropout does, so that the same seed gives the same mask.
                values[name] = torch.empty(shape, dtype=dtype).bernoulli_(keep).div_(keep).float()

            self.plan.foreign.append(Foreign(draw, self.step))
            n, c, h, w = shape
            self.plan.outside.append(Outside(name, slot, shape, torch.float32, (c * h * w, h * w, w, 1)))
            noise = lambda: _C.slot_address(slot, 0)  # noqa: E731
        self._apply(op.name, op.view, self._make(op.out), noise)
        self._statistics(op.out)

    def _pool(self, op: PoolOp) -> None:
        assert op.view is not None
        n, c, h, w = self._shape(op.view.base)
        _, _, oh, ow = self._shape(op.out)
        source = self._source(op.view)
        output = self._output(self._make(op.out))
        fixed = {
            "images": n,
            "height": h,
            "width": w,
            "out_height": oh,
            "out_width": ow,
            "kernel": op.kernel,
            "stride": op.stride,
            "pad": op.pad,
            "count_include_pad": op.count_include_pad,
        }
        self._report(Report(op.name, "avg_pool", bytes=4.0 * n * c * (h * w + oh * ow)))
        self._add(lambda p: p.avg_pool({**fixed, "source": source(), "out": output()}))
        self._statistics(op.out)

    def _import(self, op: ImportOp) -> None:
        """An outside tensor: read where it lies if its channels are few or innermost, else copied to NHWC."""
        n, c, h, w = self._shape(op.out)
        given = self.inputs.get(op.node)
        if isinstance(given, torch.Tensor) and given.dtype in _DTYPES:
            dtype, strides = given.dtype, tuple(given.stride())
        else:
            # What an unfused operation returns is brought to this layout when it arrives.
            dtype, strides = torch.float32, (c * h * w, h * w, w, 1)
        slot = self._slot()
        self.plan.outside.append(Outside(op.node, slot, (n, c, h, w), dtype, strides))
        image, channel, row, pixel = strides
        here = Stored(dtype, (image, channel, row, pixel), Buffer(0, slot), op.node)
        self.stored[op.out] = here
        if c > 8 and channel != 1:
            self.stored[op.out] = here
            source = self._source(View(op.out))
            output = self._output(self._make(op.out))
            fixed = {"images": n, "height": h, "width": w}
            self._report(Report(op.name, "layout", bytes=8.0 * n * c * h * w))
            self._add(lambda p: p.apply({**fixed, "first": source(), "out": output()}))
        self._statistics(op.out)

    def _foreign(self, op: ForeignOp) -> None:
        taken: list[tuple[int, Stored]] = []

        def pin(value: Any) -> Any:
            if isinstance(value, View):
                stored = self.stored[value.base]
                stored.buffer.touch(max(0, self.step - 1))
                stored.buffer.last = 1 << 60  # what it returns may be a view of it
                taken.append((value.base, stored))
                return _Pinned(stored, self._shape(value.base))
            return value

        args, kwargs = map_views(op.args, pin), map_views(op.kwargs, pin)
        call, name = op.call, op.name
        assert call is not None

        def run(values: dict[str, Any]) -> None:
            ready = _fill(args, values), _fill(kwargs, values)
            values[name] = call(*ready[0], **ready[1])

        self.plan.foreign.append(Foreign(run, self.step))
        self._report(Report(name, "pytorch", op.reason))


def _merge_step(fixed: dict[str, Any], addresses: dict[str, Address]) -> Callable[[Any], int]:
    return lambda program: program.merge({**fixed, **{name: at() for name, at in addresses.items()}})


class _Pinned:
    """An argument of an unfused operation that lives in the arena."""

    def __init__(self, stored: Stored, shape: tuple[int, int, int, int]) -> None:
        self.stored, self.shape = stored, shape

    def tensor(self, values: dict[str, Any]) -> torch.Tensor:
        stored = self.stored
        if stored.origin:
            return values[stored.origin]
        image, channel, row, pixel = stored.strides
        arena: torch.Tensor = values["arena"]
        flat = arena.view(stored.dtype)
        return flat.as_strided(
            self.shape, (image, channel, row, pixel), stored.buffer.offset // stored.dtype.itemsize
        )


class _Structure:
    """The nesting of what a network returns, with results and outside values at the leaves."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def assemble(self, results: list[torch.Tensor], values: dict[str, Any]) -> Any:
        def walk(node: Any) -> Any:
            if isinstance(node, tuple) and len(node) == 2 and node[0] == "result":
                return results[node[1]]
            if isinstance(node, Opaque):
                return values[node.node]
            if isinstance(node, (list, tuple)):
                items = [walk(x) for x in node]
                if hasattr(node, "_fields"):
                    return type(node)(*items)
                return tuple(items) if isinstance(node, tuple) else items
            if isinstance(node, dict):
                return {k: walk(v) for k, v in node.items()}
            return node

        return walk(self.tree)


def _fill(value: Any, values: dict[str, Any]) -> Any:
    """Arguments with their tensors in place."""
    if isinstance(value, _Pinned):
        return value.tensor(values)
    if isinstance(value, Opaque):
        return values[value.node]
    if isinstance(value, (list, tuple)):
        items = [_fill(v, values) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {k: _fill(v, values) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(_fill(value.start, values), _fill(value.stop, values), _fill(value.step, values))
    return value


def make_plan(
    graph: Graph,
    modules: dict[str, nn.Module],
    inputs: dict[str, Any],
    dtype: torch.dtype,
    packs: dict[Any, Any],
    packed_limit: int = choices.PACKED_LIMIT,
) -> Plan:
    """Lowers ``graph`` for ``inputs`` (by placeholder name) with tensors stored in ``dtype``."""
    plan = Planner(graph, modules, inputs, dtype, packs, packed_limit).build()
    choices.cache.save()
    return plan
