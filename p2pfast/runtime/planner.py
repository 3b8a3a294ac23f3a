"""From a fused graph to a program: which kernel runs each operation, where every tensor lives.

A plan is made once for input shapes, layouts and dtypes. Tensors inside it are NHWC with the channels
rounded up to 16; the convolution that makes one also gathers its statistics, and whoever reads it
normalises on load.
"""

from __future__ import annotations

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
    Op,
    Opaque,
    PoolOp,
    View,
    map_views,
)
from p2pfast.runtime import choice as choices
from p2pfast.runtime.builder import DTYPES, Address, act_fields
from p2pfast.runtime.convolutions import Convolutions
from p2pfast.runtime.label_convolutions import LabelConvolutions
from p2pfast.runtime.memory import Buffer, place
from p2pfast.runtime.plan import Foreign, Outside, Pack, Plan, Report, Result, Stored
from p2pfast.runtime.structure import Pinned, Structure, fill


class Planner(Convolutions, LabelConvolutions):
    """Lowers one graph."""

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
                self._set(producer, "act", view.act)
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

        self.plan.structure = Structure(map_views(self.graph.result, finish))

    def _apply(self, name: str, view: View, out: Stored, noise: Address | None = None) -> None:
        n, c, h, w = self._shape(view.base)
        final: Act | None = None
        if view.act is not None and view.act.kind not in ("relu", "leaky_relu"):
            view, final = View(view.base, view.norm), view.act
        source, output = self._source(view), self._output(out)
        fixed = {"images": n, "height": h, "width": w, **act_fields(final)}
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

    def _addition(self, op: AddOp) -> None:
        assert op.left is not None and op.right is not None
        n, c, h, w = self._shape(op.out)
        first, second = self._source(op.left), self._source(op.right)
        out = self._make(op.out)
        output = self._output(out)
        fixed = {"images": n, "height": h, "width": w, **act_fields(op.act)}
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
        if isinstance(given, torch.Tensor) and given.dtype in DTYPES:
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
                if not op.copies:
                    stored.buffer.last = 1 << 60  # what it returns may be a view of it
                taken.append((value.base, stored))
                return Pinned(stored, self._shape(value.base))
            return value

        args, kwargs = map_views(op.args, pin), map_views(op.kwargs, pin)
        call, name = op.call, op.name
        assert call is not None

        def run(values: dict[str, Any]) -> None:
            ready = fill(args, values), fill(kwargs, values)
            values[name] = call(*ready[0], **ready[1])

        self.plan.foreign.append(Foreign(run, self.step))
        self._report(Report(name, "pytorch", op.reason))


def make_plan(
    graph: Graph,
    modules: dict[str, nn.Module],
    inputs: dict[str, Any],
    dtype: torch.dtype,
    packs: dict[Any, Pack],
    packed_limit: int | None = None,
) -> Plan:
    """Lowers ``graph`` for ``inputs`` (by placeholder name) with tensors stored in ``dtype``.

    ``packs`` holds the packed weights of all plans of the network, at most ``packed_limit`` bytes of them
    (by default :func:`choices.default_budget`).
    """
    if packed_limit is None:
        size = 4 if dtype == torch.float32 else 2
        packed_limit = choices.default_budget(size * sum(p.numel() for p in modules[""].parameters()))
    known = set(packs)
    planner = Planner(graph, modules, inputs, dtype, packs, {})
    plan = planner.build()
    budget = packed_limit - sum(packs[key].bytes for key in known)
    chosen = choices.fit(planner.options, budget)
    if any(choice is not planner.options[name][0] for name, choice in chosen.items()):
        planner.undo()
        for key in set(packs) - known:
            del packs[key]
        plan = Planner(graph, modules, inputs, dtype, packs, chosen).build()
    choices.finish_measuring()
    return plan
