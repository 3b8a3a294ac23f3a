"""Convolutions in a plan for a GPU: their form, their packed weights, the steps they take."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.fuse.graph import AddOp, ApplyOp, ConvOp, ImportOp, Op, PoolOp, View
from p2pfast.runtime.gpu import forms
from p2pfast.runtime.gpu.forms import APPLIED, LIBRARY, PROLOGUE, Form, Layer
from p2pfast.runtime.gpu.frame import Frame
from p2pfast.runtime.gpu.kernels import Operand, Sizes, Tiles, Window
from p2pfast.runtime.gpu.measure import stopwatch
from p2pfast.runtime.gpu.plan import Place, Report, Weights
from p2pfast.runtime.gpu.tensors import NO_PAD, Fetch, Pad, Stored, Tensors, frozen_factors, key_of
from p2pfast.runtime.plan import Constant
from p2pfast.runtime.versions import Seen


class Convolutions(Tensors):
    """Lowers convolutions of stored tensors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.forms: dict[str, Form] = {}
        self.producers: dict[int, Op] = {}

    def _settled(self) -> None:
        """To be called when the operations are the final ones: reserves the concatenations whose parts are
        written where they belong."""
        self.producers = {op.out: op for op in self.graph.ops if op.out >= 0}
        for op in self.graph.ops:
            if isinstance(op, ConvOp) and len(op.inputs) == 2 and self._form(op).kind != PROLOGUE:
                self._reserve(op)

    def _reserve(self, op: ConvOp) -> None:
        ready = [v for v in op.inputs if self._sliceable(v) and v.base not in self.slices]
        if self._border(op) != NO_PAD or not ready or op.inputs[0].base == op.inputs[1].base:
            return
        n, h, w, _ = self._nhwc(op.inputs[0].base)
        channels = [self._shape(v.base)[1] for v in op.inputs]
        key = key_of(op.inputs, NO_PAD, op.pad_mode)
        if key in self.wide:
            return
        place = self.wide[key] = self._place((n, h, w, sum(channels)), f"concat_{op.inputs[0].base}")
        first = 0
        for view, count in zip(op.inputs, channels, strict=True):
            if view in ready:
                self.slices[view.base] = place.channels(first, count)
            first += count

    def _sliceable(self, view: View) -> bool:
        """Whether what makes a view can write it into a slice of a wider tensor."""
        maker = self.producers.get(view.base)
        if view.norm is not None or view.act is not None or maker is None:
            return False
        if isinstance(maker, ConvOp):
            # The library makes a tensor of its own, which only a pass after it moves.
            return self._form(maker).kind != LIBRARY or _ends(maker)
        if isinstance(maker, (AddOp, ApplyOp)):
            return not getattr(maker, "dropout", 0.0) and self._border_wanted(view.base)[0] == NO_PAD
        return isinstance(maker, (ImportOp, PoolOp))

    # --- which form --------------------------------------------------------------------------------

    def _form(self, op: ConvOp) -> Form:
        if op.name not in self.forms:
            layer = self._layer(op)
            forced = self.forced
            if forced == LIBRARY and layer.strange is not None:
                forced = APPLIED
            measure = None
            if self.measured and forced is None:
                measure = stopwatch(layer, self._window(op), self._gathers(op), self)
            self.forms[op.name] = forms.choose(layer, measure, forced)
        return self.forms[op.name]

    def _layer(self, op: ConvOp) -> Layer:
        window = self._window(op)
        n, c, h, w = self._shape(op.inputs[0].base)
        _, cout, out_height, out_width = self._shape(op.out)
        border = self._border(op)
        pending = any(v.norm is not None or v.act is not None for v in op.inputs)
        maker = self.producers.get(op.inputs[0].base)
        written = isinstance(maker, (AddOp, ApplyOp)) and len(op.inputs) == 1 and not pending
        apart = len(op.inputs) > 1 and not all(self._sliceable(v) for v in op.inputs)
        return Layer(
            images=n,
            channels=sum(self._shape(v.base)[1] for v in op.inputs),
            height=h,
            width=w,
            out_channels=cout,
            out_height=out_height,
            out_width=out_width,
            taps=window.kernel[0] * window.kernel[1],
            itemsize=self.dtype.itemsize,
            transposed=window.transposed,
            stride=window.stride,
            pending=pending,
            apart=apart,
            border=border != NO_PAD,
            ready=written,
            statistics=self._gathers(op),
            strange=self._strange(op, border),
        )

    def _gathers(self, op: ConvOp) -> bool:
        """Whether the convolution itself can gather the statistics that are wanted of its result."""
        return op.residual is None and self._needs_statistics(op.out)

    def _window(self, op: ConvOp) -> Window:
        module = self.modules[op.path]
        return Window(
            tuple(module.kernel_size),
            int(module.stride[0]),
            (op.pad_top, op.pad_left),
            op.pad_mode,
            bool(module.transposed),
        )

    def _edges_of(self, op: ConvOp) -> Pad:
        """Padding on all sides: what the output's size leaves for the bottom and the right."""
        window = self._window(op)
        _, _, h, w = self._shape(op.inputs[0].base)
        _, _, oh, ow = self._shape(op.out)
        bottom = (oh - 1) * window.stride + window.kernel[0] - op.pad_top - h
        right = (ow - 1) * window.stride + window.kernel[1] - op.pad_left - w
        return op.pad_top, max(0, bottom), op.pad_left, max(0, right)

    def _border(self, op: ConvOp) -> Pad:
        """The border that a pass would write for this convolution."""
        window = self._window(op)
        pad = self._edges_of(op)
        if window.transposed:
            return NO_PAD
        uneven = pad[1] > pad[0] or pad[3] > pad[2]  # zeros that the library has no argument for
        return pad if op.pad_mode != "zeros" or uneven else NO_PAD

    def _strange(self, op: ConvOp, border: Pad) -> str | None:
        """Why the library cannot be asked for this convolution."""
        window = self._window(op)
        if window.transposed:
            _, _, h, w = self._shape(op.inputs[0].base)
            _, _, oh, ow = self._shape(op.out)
            for size, out, k, pad in zip((h, w), (oh, ow), window.kernel, window.padding, strict=True):
                extra = out - ((size - 1) * window.stride - 2 * pad + k)
                if not 0 <= extra < window.stride:
                    return "the output's padding is larger than the stride"
        return None

    # --- steps -------------------------------------------------------------------------------------

    def _conv(self, op: ConvOp) -> None:
        module = self.modules[op.path]
        form, window, layer = self._form(op), self._window(op), self._layer(op)
        kind = {PROLOGUE: "conv", APPLIED: "conv, applied", LIBRARY: "library"}[form.kind]
        size = f"{window.kernel[0]}×{window.kernel[1]} s{window.stride}"
        up = " up" if window.transposed else ""
        detail = f"{layer.channels}→{layer.out_channels} {size}{up} @{layer.out_height}×{layer.out_width}"
        detail += (" +norm" if op.norm else "") + (" +residual" if op.residual else "")
        detail += " in a slice" if op.out in self.slices else ""
        moved = layer.in_bytes + layer.out_bytes * (2.0 if op.residual else 1.0)
        self._report(Report(op.name, kind, detail, form.reason, layer.multiplications, moved))
        if form.kind == PROLOGUE:
            sources = [self._operand(v) for v in op.inputs]
            size_in = layer.height, layer.width
        else:
            border = self._border(op)
            ready = self._bordered(op.inputs, border, op.pad_mode)
            sources = [self._plain(ready)]
            size_in = ready.shape[1], ready.shape[2]
            if border != NO_PAD:
                window = Window(window.kernel, window.stride, (0, 0), "zeros", window.transposed)
            if form.kind == LIBRARY:
                self._library(op, module, window, ready)
                return
        pending = any(v.norm is not None or v.act is not None for v in op.inputs)
        self._own(op, module, window, sources, size_in, pending and form.kind == PROLOGUE)

    def _own(
        self,
        op: ConvOp,
        module: Any,
        window: Window,
        sources: list[Any],
        size: tuple[int, int],
        pending: bool,
    ) -> None:
        """The Triton kernel, which gathers its statistics itself; ``size`` is its input's in memory."""
        out = self._out(op)
        self.stored[op.out] = Stored(out)
        kernels = self.kernels
        channels = tuple(self._shape(v.base)[1] for v in op.inputs)
        if len(sources) == 1:
            channels = (sum(channels),)
        n, height, width, c = out.shape
        statistics = self._gathers(op)
        sizes = Sizes(n, size, (height, width), channels, c, pending, statistics)
        tiles = kernels.tiles(window, sizes, self.dtype, self.device)
        self.plan.reports[-1].reason += f"; {tiles.name}"
        packed = self._packed(op.path, module, window, sizes, tiles).packed
        factor, bias = self._on_the_way_out(op, module)
        added = None if op.residual is None else self._operand(op.residual)
        kind, slope = ("none", 0.0) if op.act is None else (op.act.kind, op.act.slope)
        reads = tuple(m for s in (*sources, *([] if added is None else [added])) for m in s.reads)
        writes: tuple[Any, ...] = (out.memory,)
        partial = count = None
        if statistics:
            parts = kernels.parts(packed, (height, width), tiles)
            partial = self._place((n, parts, 2, c), "partial", torch.float32)
            count = self._place((parts,), "count", torch.float32)
            writes += (partial.memory, count.memory)

        def run(frame: Frame) -> None:
            kernels.conv(
                [s.fetch(frame) for s in sources],
                packed,
                tiles,
                None if bias is None else bias(frame),
                frame.at(out),
                window,
                kind,
                slope,
                None if partial is None else frame.at(partial),
                None if count is None else frame.at(count),
                None if factor is None else factor(frame),
                None if added is None else added.fetch(frame),
            )

        self._step(op.name, run, reads, writes)
        if partial is not None and count is not None:
            where = partial, count
            self._merge(
                op.out,
                lambda f: f.at(where[0]),
                lambda f: f.at(where[1]),
                (partial.memory, count.memory),
            )
        elif self._needs_statistics(op.out):
            self._survey(op.out)

    def _on_the_way_out(self, op: ConvOp, module: Any) -> tuple[Fetch | None, Fetch | None]:
        """Factor and shift of the convolution's sums: its bias, and a norm by stored statistics after it."""
        if op.norm is None:
            return None, self._parameter(module, "bias")
        norm = self.modules[op.norm.path]
        factors = self._frozen(norm)
        if module.bias is None:
            return factors.scale, factors.shift

        def tensors() -> list[Tensor]:
            named = (module.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            return [t for t in named if t is not None]

        def shift() -> Tensor:
            factor, moved = frozen_factors(norm)
            return (moved + factor * module.bias.detach().double()).float()

        return factors.scale, self._constant(tensors, shift)

    def _library(self, op: ConvOp, module: Any, window: Window, ready: Place) -> None:
        """The library's convolution, which makes its own tensor, and passes for what follows it and for the
        statistics."""
        out = self.slices.get(op.out) or self._made(self._nhwc(op.out), op.name)
        self.stored[op.out] = Stored(out)
        dtype = self.dtype

        def weights() -> Tensor:
            return module.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)

        weight = self._constant(lambda: [module.weight], weights)
        bias = None
        if module.bias is not None and op.norm is None:
            bias = self._constant(lambda: [module.bias], lambda: module.bias.detach().to(dtype).clone())
        factor, moved = self._on_the_way_out(op, module) if op.norm is not None else (None, None)
        added = None if op.residual is None else self._operand(op.residual)
        shape = self._shape(op.out)
        kind, slope = ("none", 0.0) if op.act is None else (op.act.kind, op.act.slope)
        apply, ends = self.kernels.apply, _ends(op)

        def run(frame: Frame) -> None:
            made = library_conv(
                frame.image(ready), weight(frame), None if bias is None else bias(frame), window, shape
            )
            nhwc = made.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
            target = frame.at(out) if out.memory.bytes else nhwc
            if ends:
                value = Operand(nhwc)
                if factor is not None and moved is not None:
                    value = Operand(nhwc, factor(frame), moved(frame))
                apply(
                    value, target, None if added is None else added.fetch(frame), kind, slope, NO_PAD, "zeros"
                )
            if not out.memory.bytes:
                frame.made[out.memory] = nhwc

        self._step(op.name, run, (ready.memory, *(() if added is None else added.reads)), (out.memory,))
        if self._needs_statistics(op.out):
            self._survey(op.out)

    def _packed(self, path: str, module: Any, window: Window, sizes: Sizes, tiles: Tiles) -> Weights:
        """Packed weights, one copy for all plans of the network."""
        # A module that was replaced by another one at the same path has weights of its own.
        owner = id(module) if isinstance(module, torch.nn.Module) else 0
        padding = window.padding if window.transposed else None
        key = (path, owner, self.dtype, sizes.channels, padding, tiles.layout)
        known = self.packs.get(key)
        if known is None:

            def tensors() -> list[Tensor]:
                return [module.weight]

            def pack() -> Any:
                return self.kernels.pack(module.weight.detach(), self.dtype, window, sizes, tiles)

            seen = Seen(tensors())
            packed = pack()
            constant = Constant(tensors, lambda: packed.data.copy_(pack().data), seen)
            known = self.packs[key] = Weights(packed, constant)
        self.plan.constants.append(known.constant)
        self.plan.packed_bytes += known.bytes
        return known

    # --- for those who write what a convolution reads -----------------------------------------------

    def _border_wanted(self, base: int) -> tuple[Pad, str]:
        """The border that readers of a base would have around it, where they all want the same."""
        wanted: set[tuple[Pad, str]] = set()
        for op in self.graph.ops:
            if isinstance(op, ConvOp) and any(v.base == base for v in op.inputs):
                view: View = op.inputs[0]
                border = self._border(op)
                plain = len(op.inputs) == 1 and view.norm is None and view.act is None
                if plain and border != NO_PAD and self._form(op).kind != PROLOGUE:
                    wanted.add((border, op.pad_mode))
        return wanted.pop() if len(wanted) == 1 else (NO_PAD, "zeros")


def _ends(op: ConvOp) -> bool:
    """Whether something follows the convolution that a library leaves to a pass."""
    return op.norm is not None or op.residual is not None or op.act is not None


_flag = threading.Lock()


@contextlib.contextmanager
def _measuring() -> Iterator[None]:
    """cuDNN chooses by measurement inside. ``torch.backends.cudnn.flags`` would ask for ``allow_tf32``, which
    raises once anybody has used the newer interface for it; the flag is one for all threads."""
    with _flag:
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def library_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, shape: tuple[int, ...]
) -> Tensor:
    """PyTorch's convolution with cuDNN's own choice by measurement; ``shape`` is the output's."""
    with _measuring():
        if not window.transposed:
            return F.conv2d(x, weight, bias, window.stride, window.padding)
        extra = tuple(
            out - ((size - 1) * window.stride - 2 * pad + k)
            for size, out, k, pad in zip(x.shape[2:], shape[2:], window.kernel, window.padding, strict=True)
        )
        return F.conv_transpose2d(x, weight, bias, window.stride, window.padding, extra)
