"""From a fused graph to a program: which kernel runs each operation, where every tensor lives.

A plan is made once for input shapes, layouts and dtypes. Tensors inside it are NHWC with the channels
rounded up to 16; the convolution that makes one also gathers its statistics, and whoever reads it
normalises on load.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

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
    PoolOp,
    View,
    map_views,
)
from p2pfast.runtime.bands import Part, step_of, window_of
from p2pfast.runtime.builder import DTYPES, Address, act_fields, channel_stride
from p2pfast.runtime.convolutions import Convolutions
from p2pfast.runtime.label_convolutions import LabelConvolutions
from p2pfast.runtime.liveness import views_of
from p2pfast.runtime.memory import Buffer, place_buffers
from p2pfast.runtime.plan import Foreign, Outside, Plan, Report, Result, Stored
from p2pfast.runtime.structure import Pinned, Structure, dense_inputs, fill
from p2pfast.runtime.tensors import Gathering, Work


class Planner(Convolutions, LabelConvolutions):
    """Lowers one graph."""

    def build(self) -> Plan:
        for base, view in self.direct.items():
            shape = self._shape(base)
            self.results[base] = Result(self._slot(), shape, view in self.graph.channels_last)
        for op in self.graph.ops:
            self._lower(op)
        self._finish_results()
        self.plan.dense_inputs = dense_inputs(self.graph)
        self.workspace.first, self.workspace.last = 0, self.step
        self.plan.arena_bytes = place_buffers(self.buffers) + 64
        self.plan.packed_bytes = sum(self.packed_sizes.values()) + sum(t.nbytes for t in self.plan.keep)
        program = _C.Program()
        for build in self.steps:
            build(program)
        self.plan.program = program
        return self.plan

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
                    moved = 2.0 * self._bytes(value.base)
                    self._report(Report(f"result_{value.base}", "apply", bytes=moved))
                    out = Stored(self.dtype, strides, Buffer(0, result.slot))
                    self._apply(value, Part(None, 0, h), out, None)
                written[id(value)] = len(self.plan.results)
                self.plan.results.append(result)
            return ("result", written[id(value)])

        self.plan.structure = Structure(map_views(self.graph.result, finish))

    # --- operations --------------------------------------------------------------------------------

    def _lower(self, op: Op) -> None:
        if isinstance(op, ForeignOp):
            self._foreign(op)
            return
        if isinstance(op, ImportOp):
            self._bind_outside(op)
            if not copies(op, self.graph, self.inputs):
                if self._needs_statistics(op.out):
                    self._survey(op)
                return
        if isinstance(op, LabelConvOp) and op.labels is not None:
            labels = self.inputs[op.labels.node]
            self._edges(op.labels.node, labels, self._label_input(op.labels.node, labels))
        virtual = op.out in self.virtual
        if virtual and not self._needs_statistics(op.out):
            return
        gathering = Gathering(self, op.out) if self._needs_statistics(op.out) else None
        chain = self.live.chain(op)
        if virtual or chain:
            self._banded(op, chain, None if virtual else self._make(op.out), gathering)
        else:
            self._whole(op, gathering)
        if gathering is not None:
            self._merge(gathering)

    def _whole(self, op: Op, gathering: Gathering | None) -> None:
        n, _, h, _ = self._shape(op.out)
        report = self._report_of(op)
        reused = self.live.reusable(op)
        out = self._make(op.out) if reused is None else replace(self.stored[reused], uniform=None)
        self._note(report, self._emit(op, Part(None, 0, h), out, gathering))
        self.stored[op.out] = out

    def _survey(self, op: ImportOp) -> None:
        """Statistics of an outside tensor that is read where it lies."""
        gathering = Gathering(self, op.out)
        report = self._report_of(op)
        report.kernel = "statistics"
        self._gather(op.out, Part(None, 0, self._shape(op.out)[2]), self.stored[op.out], gathering)
        self._merge(gathering)

    def _banded(self, op: Op, chain: list[Op], out: Stored | None, gathering: Gathering | None) -> None:
        """Runs an operation band by band, each after what it needs of ``chain``; without ``out`` only for
        its statistics."""
        n, _, h, _ = self._shape(op.out)
        links = [*chain, op]
        bands = self._bands(links)
        rows = {link.out: max(b - a for a, b in (band[link.out] for band in bands)) for link in links}
        memory = {link.out: self._rows(link.out, 1, rows[link.out]) for link in chain}
        if out is None:
            memory[op.out] = self._rows(op.out, 1, rows[op.out])
        report = self._report_of(op)
        self.scratch = {}
        for image in range(n):
            for band in bands:
                for link in links:
                    part = Part(image, *band[link.out])
                    if link.out in memory:
                        place = replace(memory[link.out], image=image, row=part.begin)
                    else:
                        assert out is not None
                        place = out
                    work = self._emit(link, part, place, gathering if link is op else None)
                    if link is not op:
                        self.stored[link.out] = place
                    self._note(report, work, link is op)
        if out is not None:
            self.stored[op.out] = out
        again = ", ".join(link.name for link in chain)
        report.detail += f", {len(bands)} bands" + (f", each after {again}" if again else "")
        self.plan.bands = max(self.plan.bands, len(bands))

    def _bands(self, links: list[Op]) -> list[dict[int, tuple[int, int]]]:
        """The rows of every link that each band of the last link needs."""
        height, step = self._shape(links[-1].out)[2], step_of(links[-1], self.modules)
        count = 1
        while True:
            rows = (height + count * step - 1) // (count * step) * step
            bands = [self._demands(links, y, min(height, y + rows)) for y in range(0, height, rows)]
            size = 0
            for link in links:
                n, c, h, w = self._shape(link.out)
                most = max(b - a for a, b in (band[link.out] for band in bands))
                size += most * w * channel_stride(c) * self.dtype.itemsize
            if size <= self.band_bytes or rows == step:
                return bands
            count = max(count + 1, min(2 * count, -(-height // step)))

    def _demands(self, links: list[Op], begin: int, end: int) -> dict[int, tuple[int, int]]:
        wanted = {links[-1].out: (begin, end)}
        for link in reversed(links):
            low, high = wanted[link.out]
            low -= low % step_of(link, self.modules)
            wanted[link.out] = (low, high)
            for view in views_of(link):
                if view.base not in self.virtual:
                    continue
                window = window_of(link, self.modules, low, high, self._shape(view.base)[2])
                before = wanted.get(view.base, (window.begin, window.end))
                wanted[view.base] = (min(before[0], window.begin), max(before[1], window.end))
        return wanted

    def _report_of(self, op: Op) -> Report:
        moved = self._bytes(op.out)
        if isinstance(op, ConvOp):
            moved += sum(self._bytes(v.base) for v in op.inputs)
        elif not isinstance(op, LabelConvOp):
            moved += sum(self._bytes(v.base) for v in views_of(op)) or moved
        report = Report(op.name, "", bytes=moved)
        self._report(report)
        return report

    def _bytes(self, base: int) -> float:
        """Of a tensor as a plan stores it; of what the caller gives, if it is of the plan's dtype."""
        n, c, h, w = self._shape(base)
        return float(n * c * h * w * self.dtype.itemsize)

    def _note(self, report: Report, work: Work, own: bool = True) -> None:
        report.multiplications += work.multiplications
        if own:
            report.kernel, report.detail = work.kernel, work.detail

    def _emit(self, op: Op, part: Part, out: Stored, gathering: Gathering | None) -> Work:
        """The steps that compute a part of an operation's result into ``out``."""
        if isinstance(op, ConvOp):
            return self._conv(op, part, out, gathering)
        if isinstance(op, LabelConvOp):
            return self._label_conv(op, part, out, gathering)
        if isinstance(op, AddOp):
            work = self._addition(op, part, out)
        elif isinstance(op, ApplyOp):
            assert op.view is not None
            work = self._apply(op.view, part, out, self._noise(op) if op.dropout else None)
        elif isinstance(op, PoolOp):
            work = self._pool(op, part, out)
        else:
            assert isinstance(op, ImportOp)
            kept, self.stored[op.out] = self.stored.get(op.out), self.outside[op.out]
            work = self._apply(View(op.out), part, out, None)
            work.kernel = "layout"
            if kept is not None:
                self.stored[op.out] = kept
        if gathering is not None:
            self._gather(op.out, part, out, gathering)
        return work

    def _images(self, part: Part, base: int) -> int:
        return self._shape(base)[0] if part.image is None else 1

    def _apply(self, view: View, part: Part, out: Stored, noise: Address | None) -> Work:
        final: Act | None = None
        if view.act is not None and view.act.kind not in ("relu", "leaky_relu"):
            view, final = View(view.base, view.norm), view.act
        source = self._source(view, part.first_image, part.begin)
        output = self._output(out, part.first_image, part.begin)
        fixed = {
            "images": self._images(part, view.base),
            "height": part.end - part.begin,
            "width": self._shape(view.base)[3],
            **act_fields(final),
        }

        def build(program: Any) -> int:
            extra = {} if noise is None else {"noise": noise()}
            return program.apply({**fixed, **extra, "first": source(), "out": output()})

        self._add(build)
        return Work("apply")

    def _addition(self, op: AddOp, part: Part, out: Stored) -> Work:
        assert op.left is not None and op.right is not None
        first = self._source(op.left, part.first_image, part.begin)
        second = self._source(op.right, part.first_image, part.begin)
        output = self._output(out, part.first_image, part.begin)
        fixed = {
            "images": self._images(part, op.out),
            "height": part.end - part.begin,
            "width": self._shape(op.out)[3],
            **act_fields(op.act),
        }
        self._add(lambda p: p.apply({**fixed, "first": first(), "second": second(), "out": output()}))
        return Work("add")

    def _noise(self, op: ApplyOp) -> Address:
        """Dropout's factors, drawn at each run."""
        shape, keep = self._shape(op.out), 1.0 - op.dropout
        slot = self._slot()
        name = f"noise_{op.out}"
        dtype = self.dtype

        def draw(values: dict[str, Any]) -> None:
            # As PyTorch's dropout does, so that the same seed gives the same mask.
            values[name] = torch.empty(shape, dtype=dtype, device="cpu").bernoulli_(keep).div_(keep).float()

        self.plan.foreign.append(Foreign(draw, self.step))
        n, c, h, w = shape
        self.plan.outside.append(Outside(name, slot, shape, torch.float32, (c * h * w, h * w, w, 1)))
        return lambda: _C.slot_address(slot, 0)

    def _pool(self, op: PoolOp, part: Part, out: Stored) -> Work:
        assert op.view is not None
        _, _, h, w = self._shape(op.view.base)
        window = window_of(op, self.modules, part.begin, part.end, h)
        source = self._source(op.view, part.first_image, window.begin)
        output = self._output(out, part.first_image, part.begin)
        fixed = {
            "images": self._images(part, op.out),
            "height": window.end - window.begin,
            "width": w,
            "out_height": part.end - part.begin,
            "out_width": self._shape(op.out)[3],
            "kernel": op.kernel,
            "stride": op.stride,
            "pad": op.pad,
            "pad_top": window.pad_top,
            "count_include_pad": op.count_include_pad,
        }
        self._add(lambda p: p.avg_pool({**fixed, "source": source(), "out": output()}))
        return Work("avg_pool")

    def _bind_outside(self, op: ImportOp) -> None:
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
        self.stored[op.out] = Stored(dtype, (image, channel, row, pixel), Buffer(0, slot), op.node)
        self.outside[op.out] = self.stored[op.out]

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


def copies(op: ImportOp, graph: Graph, inputs: dict[str, Any]) -> bool:
    """Whether an outside tensor is copied to NHWC: its channels are many and not innermost."""
    c = graph.bases[op.out].shape[1]
    given = inputs.get(op.node)
    if isinstance(given, torch.Tensor) and given.dtype in DTYPES and given.stride(1) == 1:
        return False
    return c > 8
