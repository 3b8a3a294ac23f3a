"""From a fused graph to a plan for a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from p2pfast.fuse.graph import (
    AddOp,
    ApplyOp,
    ConvOp,
    ForeignOp,
    ImportOp,
    LabelConvOp,
    Op,
    Opaque,
    PoolOp,
    View,
    map_views,
)
from p2pfast.runtime.gpu.epilogue import fold
from p2pfast.runtime.gpu.frame import Frame
from p2pfast.runtime.gpu.labels import LabelConvolutions
from p2pfast.runtime.gpu.plan import AFTER, BEFORE, DURING, GpuPlan, Memory, Place, Report, Result
from p2pfast.runtime.gpu.schedule import finish
from p2pfast.runtime.gpu.tensors import NO_PAD, Stored
from p2pfast.runtime.liveness import settle
from p2pfast.runtime.structure import Held, Structure, dense_inputs, fill


class Lowering(LabelConvolutions):
    """Lowers one graph; see :class:`p2pfast.runtime.gpu.tensors.Tensors`."""

    def build(self, streams: int = 1) -> GpuPlan:
        """The plan, its steps spread over at most ``streams`` streams."""
        self.direct = settle(self.graph)
        fold(self.graph)
        self._settled()
        for op in self.graph.ops:
            self._lower(op)
        self._finish_results()
        self.plan.dense_inputs = dense_inputs(self.graph)
        # Inputs arrive before what a CUDA graph holds, and results leave after it.
        self.plan.steps.sort(key=lambda step: step.phase)
        finish(self.plan, streams)
        return self.plan

    def _lower(self, op: Op) -> None:
        if isinstance(op, ConvOp):
            self._conv(op)
        elif isinstance(op, LabelConvOp):
            self._label_conv(op)
        elif isinstance(op, ForeignOp):
            self._foreign(op)
        else:
            if isinstance(op, ImportOp):
                self._import(op)
            elif isinstance(op, PoolOp):
                self._pool(op)
            elif isinstance(op, AddOp):
                self._addition(op)
            elif isinstance(op, ApplyOp):
                self._application(op)
            if self._needs_statistics(op.out):
                self._survey(op.out)

    def _bytes(self, *views: View | None) -> float:
        return float(sum(self.stored[v.base].place.bytes for v in views if v is not None))

    # --- outside -----------------------------------------------------------------------------------

    def _import(self, op: ImportOp) -> None:
        """An outside tensor into NHWC and the stored dtype."""
        place = self._out(op)
        self.stored[op.out] = Stored(place)
        node, shape = op.node, self._shape(op.out)
        # An input that an unfused operation may have written to arrives in its turn.
        given = node in self.inputs and _ORDER not in self.outside
        reads = () if given else (self._outside(node), self._outside(_ORDER))
        self._report(Report(op.name, "layout", bytes=2.0 * place.bytes))

        def run(frame: Frame) -> None:
            value = frame.values[node]
            if tuple(value.shape) != shape:
                raise RuntimeError(
                    f"the shape of {node} depends on data: it was {shape} and is {tuple(value.shape)}"
                )
            frame.image(place).copy_(value)

        self._step(op.name, run, reads, (place.memory,), BEFORE if given else DURING)

    def _foreign(self, op: ForeignOp) -> None:
        reads: list[Memory] = []

        def pin(value: Any) -> Any:
            if isinstance(value, View):
                place = self.stored[value.base].place
                reads.append(place.memory)
                if not op.copies:
                    self.kept.append(place.memory)  # what it returns may be a view of it
                return _Pinned(place)
            if isinstance(value, Opaque) and value.node not in self.inputs:
                reads.append(self._outside(value.node))
            return value

        args, kwargs = map_views(op.args, pin), map_views(op.kwargs, pin)
        call, name = op.call, op.name
        assert call is not None

        def run(frame: Frame) -> None:
            values = {**frame.values, _FRAME: frame}
            frame.values[name] = call(*fill(args, values), **fill(kwargs, values))

        self._report(Report(name, "pytorch", reason=op.reason))
        # It may write to what it is given: one after the other, as they were.
        order = self._outside(_ORDER)
        self._step(
            name,
            run,
            tuple(reads),
            (self._outside(name), order),
            obstacle=f"{name} runs in PyTorch ({op.reason})",
        )

    def _finish_results(self) -> None:
        written: dict[int, int] = {}

        def finish_view(value: Any) -> Any:
            if not isinstance(value, View):
                return value
            if id(value) not in written:
                bare = View(value.base) if value.base in self.direct else replace(value, pad=None)
                if bare.norm is not None or bare.act is not None:
                    self._report(Report(f"result_{value.base}", "apply", bytes=2.0 * self._bytes(value)))
                place = self._stored_view(bare)
                written[id(value)] = len(self.plan.results)
                self.plan.results.append(Result(place, value in self.graph.channels_last))
            return ("result", written[id(value)])

        self.plan.structure = Structure(map_views(self.graph.result, finish_view))
        for result in self.plan.results:
            self._leave(result)
        for memory in self.kept:
            # Used to the end, by the results that may share it.
            self._step("kept", _nothing, (memory,), phase=AFTER)

    def _leave(self, result: Result) -> None:
        """A result into a tensor of the caller's own."""
        n, h, w, c = result.place.shape
        layout = torch.channels_last if result.channels_last else torch.contiguous_format

        def run(frame: Frame) -> None:
            made = torch.empty((n, c, h, w), dtype=self.dtype, device=self.device, memory_format=layout)
            frame.results.append(made.copy_(frame.image(result.place)))

        self._step("result", run, (result.place.memory,), phase=AFTER)

    # --- elementwise and pooling -------------------------------------------------------------------

    def _new(self, op: Op) -> tuple[Stored, Place]:
        """A base's place, and the place with the border that its readers want, which is the same without."""
        n, h, w, c = self._nhwc(op.out)
        border, mode = self._border_wanted(op.out)
        if border == NO_PAD:
            place = self._out(op)
            self.stored[op.out] = Stored(place)
            return self.stored[op.out], place
        top, bottom, left, right = border
        whole = self._place((n, h + top + bottom, w + left + right, c), op.name)
        self.stored[op.out] = Stored(whole.inside(top, left, h, w), border, mode, whole)
        return self.stored[op.out], whole

    def _addition(self, op: AddOp) -> None:
        left, right = op.left, op.right
        assert left is not None and right is not None
        if left.norm is None and left.act is None:
            left, right = right, left  # what has work pending is read as the first operand
        stored, whole = self._new(op)
        moved = self._bytes(left, right) + whole.bytes
        self._report(Report(op.name, "add", _around(stored), bytes=moved))
        x, residual = self._operand(left), self._operand(right)
        self._write(op.name, x, whole, stored.border, stored.border_mode or "zeros", residual, op.act)

    def _application(self, op: ApplyOp) -> None:
        assert op.view is not None
        if op.dropout:
            self._dropout(op)
            return
        stored, whole = self._new(op)
        self._report(Report(op.name, "apply", _around(stored), bytes=self._bytes(op.view) + whole.bytes))
        self._write(op.name, self._operand(op.view), whole, stored.border, stored.border_mode or "zeros")

    def _dropout(self, op: ApplyOp) -> None:
        """PyTorch's own, on memory in its order: the same seed drops the same elements as before."""
        assert op.view is not None
        view, rate = op.view, op.dropout
        source = self._stored_view(view)
        place = self._place(self._nhwc(op.out), op.name)
        self.stored[op.out] = Stored(place)
        self._report(Report(op.name, "dropout", bytes=2.0 * place.bytes))

        def run(frame: Frame) -> None:
            frame.image(place).copy_(F.dropout(frame.image(source).contiguous(), rate, True))

        self._step(
            op.name,
            run,
            (source.memory,),
            (place.memory,),
            obstacle="dropout draws random numbers in each run",
        )

    def _pool(self, op: PoolOp) -> None:
        assert op.view is not None
        source = self._stored_view(op.view)
        place = self._out(op)
        self.stored[op.out] = Stored(place)
        detail = f"{op.kernel}×{op.kernel} s{op.stride}"
        self._report(Report(op.name, "avg_pool", detail, "PyTorch's", bytes=source.bytes + place.bytes))
        size, stride, pad, counted = op.kernel, op.stride, op.pad, op.count_include_pad

        def run(frame: Frame) -> None:
            torch.ops.aten.avg_pool2d.out(
                frame.image(source),
                [size, size],
                [stride, stride],
                [pad, pad],
                False,
                counted,
                None,
                out=frame.image(place),
            )

        self._step(op.name, run, (source.memory,), (place.memory,))


_FRAME, _ORDER = " frame", " order of unfused operations"  # no names of nodes


class _Pinned(Held):
    """An argument of an unfused operation that lives in the arena."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def tensor(self, values: dict[str, Any]) -> torch.Tensor:
        frame: Frame = values[_FRAME]
        return frame.image(self.place)


def _around(stored: Stored) -> str:
    return "" if stored.border == NO_PAD else f"with a {stored.border_mode} border of {stored.border[0]}"


def _nothing(frame: Frame) -> None:
    """Only marks the use of memory."""
