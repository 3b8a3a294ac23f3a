"""Stored tensors as kernels see them, and the statistics and factors of their normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import Norm, View
from p2pfast.runtime.bands import Part
from p2pfast.runtime.builder import DTYPES, Address, Builder, act_fields, channel_stride
from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.plan import RunningStatistics, Stored


@dataclass
class Work:
    """What one step of an operation does, for ``explain``."""

    kernel: str
    detail: str = ""
    multiplications: float = 0.0


class Tensors(Builder):
    """Places bases and describes views of them."""

    def _make(self, base: int) -> Stored:
        """Memory for a base: the caller's result where the base is one as it stands, else the arena."""
        n, c, h, w = self._shape(base)
        if base in self.results:
            result = self.results[base]
            strides = (c * h * w, 1, w * c, c) if result.channels_last else (c * h * w, h * w, w, 1)
            return Stored(self.dtype, strides, Buffer(0, result.slot))
        return self._rows(base, n, h)

    def _rows(self, base: int, images: int, rows: int) -> Stored:
        """Memory in the arena for some rows of a base."""
        _, c, _, w = self._shape(base)
        pixel = channel_stride(c)
        size = images * rows * w * pixel * self.dtype.itemsize
        return Stored(self.dtype, (rows * w * pixel, 1, w * pixel, pixel), self._buffer(size))

    def _layout(self, stored: Stored) -> dict[str, Any]:
        image, channel, row, pixel = stored.strides
        return {
            "image_stride": image,
            "row_stride": row,
            "pixel_stride": pixel,
            "channel_stride": channel,
            "dtype": DTYPES[stored.dtype],
        }

    def _skip(self, stored: Stored, image: int, row: int) -> int:
        """Bytes from the start of the memory to a row of an image."""
        images, _, rows, _ = stored.strides
        return ((image - stored.image) * images + (row - stored.row) * rows) * stored.dtype.itemsize

    def _source(self, view: View, image: int = 0, row: int = 0) -> Callable[[], dict[str, Any]]:
        """The dictionary of a view as a kernel's source, from a row of an image on."""
        stored = self.stored[view.base]
        start, skip = self._at(stored.buffer), self._skip(stored, image, row)
        fixed = {**self._layout(stored), "channels": self._shape(view.base)[1], **act_fields(view.act)}
        if view.norm is None:
            return lambda: {**fixed, "data": start() + skip}
        scale, shift, stride = self._normalisation(view.base, view.norm)
        of_image = 4 * image * stride
        return lambda: {
            **fixed,
            "data": start() + skip,
            "scale": scale() + of_image,
            "shift": shift() + of_image,
            "norm_stride": stride,
        }

    def _output(self, stored: Stored, image: int = 0, row: int = 0) -> Callable[[], dict[str, Any]]:
        start, skip = self._at(stored.buffer), self._skip(stored, image, row)
        fixed = self._layout(stored)
        return lambda: {**fixed, "data": start() + skip}

    def _offer_uniform(self, base: int, out: Stored, addresses: dict[str, Address], name: str) -> None:
        """Lets readers of ``base``, made by the step that is being lowered, ask it for its map of labels."""
        step = self.step
        n, _, h, w = self._shape(base)
        made: list[Buffer] = []

        def ask() -> Buffer:
            if not made:
                made.append(self._buffer(n * h * w))
                made[0].touch(step)
                buffer = made[0]
                addresses[name] = lambda: _C.slot_address(buffer.slot, buffer.offset)
            return made[0]

        out.uniform = ask

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

    def _merge(self, gathering: Gathering) -> None:
        """Statistics of a base into the scale and shift of every normalisation that reads it."""
        base, parts = gathering.base, gathering.parts
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
                "partial": self._at(gathering.partial),
                "count": gathering.counts(),
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

    def _gather(self, base: int, part: Part, stored: Stored, gathering: Gathering) -> None:
        """A pass for the statistics of rows of a base that no convolution of ours makes."""
        _, _, h, w = self._shape(base)
        images = self._shape(base)[0] if part.image is None else 1
        here, self.stored[base] = self.stored.get(base), stored
        source = self._source(View(base), part.first_image, part.begin)
        if here is not None:
            self.stored[base] = here
        rows = part.end - part.begin
        fixed = {"images": images, "height": rows, "width": w}
        partial, count = gathering.take(part, -(-rows // 16))
        self._add(
            lambda p: p.statistics({**fixed, "source": source(), "partial": partial(), "count": count()})
        )


class Gathering:
    """Statistics of a base: a mean, a sum of squared deviations and a count for each image and part."""

    def __init__(self, planner: Tensors, base: int) -> None:
        self.images, channels = planner._shape(base)[:2]
        self.planner, self.base, self.stride = planner, base, channel_stride(channels)
        self.partial, self.count = planner._buffer(0), planner._buffer(0)
        self.taken: dict[int, int] = {}
        self.known: list[float] = []  # counts that are known beforehand, the same for each image

    @property
    def parts(self) -> int:
        return self.taken[0]

    def take(self, part: Part, parts: int) -> tuple[Address, Address]:
        """Where a kernel writes the statistics of the next ``parts`` parts of a band."""
        first = self.taken.get(part.first_image, 0)
        self.taken[part.first_image] = first + parts
        partial, count = self.planner._at(self.partial), self.planner._at(self.count)
        self.partial.bytes = 4 * self.images * self.parts * 2 * self.stride
        self.count.bytes = 4 * self.images * self.parts
        # The parts of an image follow each other, so where they lie depends on how many there will be.
        at = lambda: part.first_image * self.parts + first  # noqa: E731
        return lambda: partial() + 8 * self.stride * at(), lambda: count() + 4 * at()

    def counts(self) -> Address:
        """The address of the counts; of memory outside the arena where they are known."""
        if not self.known:
            return self.planner._at(self.count)
        counts = torch.tensor(self.known[: self.parts] * self.images, device="cpu")
        self.planner.plan.keep.append(counts)
        address = counts.data_ptr()
        return lambda: address


def _merge_step(fixed: dict[str, Any], addresses: dict[str, Address]) -> Callable[[Any], int]:
    return lambda program: program.merge({**fixed, **{name: at() for name, at in addresses.items()}})
