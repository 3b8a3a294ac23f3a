"""Stored tensors as kernels see them, and the statistics and factors of their normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import Norm, View
from p2pfast.runtime.builder import DTYPES, Address, Builder, act_fields, channel_stride
from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.plan import Report, RunningStatistics, Stored


class Tensors(Builder):
    """Places bases and describes views of them."""

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
            "dtype": DTYPES[stored.dtype],
        }

    def _source(self, view: View) -> Callable[[], dict[str, Any]]:
        """The dictionary of a view as a kernel's source."""
        stored = self.stored[view.base]
        data = self._at(stored.buffer)
        fixed = {**self._layout(stored), "channels": self._shape(view.base)[1], **act_fields(view.act)}
        if view.norm is None:
            return lambda: {**fixed, "data": data()}
        scale, shift, stride = self._normalisation(view.base, view.norm)
        return lambda: {**fixed, "data": data(), "scale": scale(), "shift": shift(), "norm_stride": stride}

    def _output(self, stored: Stored) -> Callable[[], dict[str, Any]]:
        data = self._at(stored.buffer)
        fixed = self._layout(stored)
        return lambda: {**fixed, "data": data()}

    def _offer_uniform(self, base: int, addresses: dict[str, Address], name: str) -> None:
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

        self.stored[base].uniform = ask

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


def _merge_step(fixed: dict[str, Any], addresses: dict[str, Address]) -> Callable[[Any], int]:
    return lambda program: program.merge({**fixed, **{name: at() for name, at in addresses.items()}})
