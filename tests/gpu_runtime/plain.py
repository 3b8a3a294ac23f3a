"""The kernels of a plan in plain PyTorch, and frames that look for mistakes of order and memory."""

from __future__ import annotations

import random
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.instance_edges.reference import instance_edges_reference
from p2pfast.ops.label_conv.reference import label_conv_reference
from p2pfast.runtime.gpu.frame import Frame
from p2pfast.runtime.gpu.kernels import Operand, Sizes, Window
from p2pfast.runtime.gpu.plan import BEFORE, DURING, GpuPlan

PARTS = 3


def value_of(x: Operand) -> Tensor:
    """(N, H, W, C) float32 of an operand."""
    value = x.tensor.float()
    if x.scale is not None and x.shift is not None:
        scale, shift = x.scale, x.shift
        if scale.dim() == 2:
            scale, shift = scale[:, None, None], shift[:, None, None]
        value = value * scale + shift
    return activate(value, x.act, x.slope)


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and M2 of PARTS parts of the rows, empty ones among them."""
    n, h, w, c = x.shape
    found, counts = [], []
    for rows in x.double().tensor_split(PARTS, 1):
        values = rows.reshape(n, -1, c)
        counts.append(float(values.shape[1]))
        mean = values.mean(1) if values.shape[1] else values.new_zeros(n, c)
        found.append(torch.stack([mean, ((values - mean[:, None]) ** 2).sum(1)], 1))
    return torch.stack(found, 1).float(), torch.tensor(counts)


class PlainKernels:
    """See :class:`p2pfast.runtime.gpu.kernels.Kernels`."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return statistics_of(x)

    def merge(
        self,
        partial: Tensor,
        count: Tensor,
        over_batch: bool,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        means, m2, k = partial[:, :, 0].double(), partial[:, :, 1].double(), count.double()[None, :, None]
        dims = (0, 1) if over_batch else (1,)
        total = k.sum() * (partial.shape[0] if over_batch else 1)
        mean = (means * k).sum(dims, keepdim=True) / total
        variance = ((m2 + k * (means - mean) ** 2).sum(dims, keepdim=True) / total)[:, 0]
        mean = mean[:, 0].expand(partial.shape[0], -1)
        variance = variance.expand(partial.shape[0], -1)
        scale = torch.rsqrt(variance + eps)
        if weight is not None:
            scale = scale * weight
        shift = -mean * scale + (0 if bias is None else bias)
        return scale.float(), shift.float(), mean.float(), variance.float()

    def apply(
        self,
        x: Operand,
        out: Tensor,
        residual: Operand | None,
        act: str,
        slope: float,
        pad: tuple[int, int, int, int],
        pad_mode: str,
    ) -> None:
        value = value_of(x)
        if residual is not None:
            value = value + value_of(residual)
        image = activate(value, act, slope).permute(0, 3, 1, 2)
        if pad != (0, 0, 0, 0):
            image = F.pad(
                image, (pad[2], pad[3], pad[0], pad[1]), "constant" if pad_mode == "zeros" else pad_mode
            )
        out.copy_(image.permute(0, 2, 3, 1))

    def tiles(self, window: Window, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Any:
        return SimpleNamespace(layout="plain", name="plain")

    def pack(self, weight: Tensor, dtype: torch.dtype, window: Window, sizes: Sizes, tiles: Any) -> Any:
        return SimpleNamespace(data=weight.to(dtype).clone())

    def parts(self, packed: Any, out_size: tuple[int, int], tiles: Any) -> int:
        return PARTS

    def conv(
        self,
        sources: list[Operand],
        packed: Any,
        tiles: Any,
        bias: Tensor | None,
        out: Tensor,
        window: Window,
        act: str,
        slope: float,
        partial: Tensor | None,
        count: Tensor | None,
        factor: Tensor | None = None,
        residual: Operand | None = None,
    ) -> None:
        rounded = [value_of(s).to(s.tensor.dtype).float() for s in sources]
        x, weight = torch.cat(rounded, 3).permute(0, 3, 1, 2), packed.data.float()
        (kh, kw), s, (top, left) = window.kernel, window.stride, window.padding
        _, oh, ow, _ = out.shape
        if window.transposed:
            extra = [
                o - ((i - 1) * s - 2 * p + k)
                for o, i, p, k in zip((oh, ow), x.shape[2:], (top, left), (kh, kw), strict=True)
            ]
            value = F.conv_transpose2d(x, weight, None, s, (top, left), extra)
        else:
            bottom = max(0, (oh - 1) * s + kh - top - x.shape[2])
            right = max(0, (ow - 1) * s + kw - left - x.shape[3])
            mode = "constant" if window.pad_mode == "zeros" else window.pad_mode
            value = F.conv2d(F.pad(x, (left, right, top, bottom), mode), weight, None, s)
        value = value.permute(0, 2, 3, 1) * (1.0 if factor is None else factor)
        value = value + (0.0 if bias is None else bias.float())
        assert value.shape == out.shape
        if partial is not None and count is not None:
            parts, counts = statistics_of(value)
            partial.copy_(parts)
            count.copy_(counts)
        if residual is not None:
            value = value + value_of(residual)
        out.copy_(activate(value, act, slope))

    def label_parts(self, shape: dict[str, Any]) -> int:
        return PARTS

    def label_scratch(self, shape: dict[str, Any]) -> int:
        return 64

    def label_pack(self, shape: dict[str, Any], weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.cat([weight.reshape(-1), weight.new_zeros(shape["cout"]) if bias is None else bias])

    def label_conv(
        self,
        shape: dict[str, Any],
        labels: Tensor,
        edges: Tensor | None,
        packed: Tensor,
        scratch: Tensor | None,
        out: Tensor,
        partial: Tensor | None,
        count: Tensor | None,
    ) -> None:
        channels, k = shape["classes"] + shape["has_edges"], shape["kernel"]
        weight = packed[: -shape["cout"]].reshape(shape["cout"], channels, k, k)
        value = label_conv_reference(
            labels,
            edges,
            weight,
            packed[-shape["cout"] :],
            shape["classes"],
            shape["pool_levels"],
            "reflect" if shape["reflect"] else "zeros",
        ).permute(0, 2, 3, 1)
        assert scratch is not None
        scratch.fill_(1)
        if partial is not None and count is not None:
            parts, counts = statistics_of(value)
            partial.copy_(parts)
            count.copy_(counts)
        out.copy_(value)

    def edges(self, instances: Tensor, out: Tensor) -> None:
        out.copy_(instance_edges_reference(instances))


class ShuffledFrame(Frame):
    """Runs steps in any order that the streams and their waiting allow, and destroys what is dead."""

    draw = random.Random(1)

    def __init__(self, plan: GpuPlan, device: torch.device) -> None:
        super().__init__(plan, device)
        self.arena.fill_(255)  # NaN in every floating dtype
        self.left: dict[Any, set[int]] = {}

    def run(self) -> None:
        self.arena.fill_(255)
        self.left = {m: set(m.uses) for m in self.plan.memories if m.bytes}
        super().run()

    def in_order(self, indices: Iterable[int]) -> Iterable[int]:
        waiting, schedule = list(indices), self.plan.schedule
        phases = {self.plan.steps[i].phase for i in waiting}
        done: set[int] = {i for i, s in enumerate(self.plan.steps) if s.phase < min(phases, default=BEFORE)}
        by_stream: dict[int, list[int]] = {}
        for index in waiting:
            by_stream.setdefault(schedule.streams[index], []).append(index)
        while by_stream:
            ready = [s for s, queue in by_stream.items() if set(schedule.waits[queue[0]]) <= done]
            stream = self.draw.choice(ready)
            index = by_stream[stream].pop(0)
            if not by_stream[stream]:
                del by_stream[stream]
            done.add(index)
            yield index

    def launch(self, index: int) -> None:
        step = self.plan.steps[index]
        step.run(self)
        for memory in (*step.reads, *step.writes):
            if memory in self.left:
                self.left[memory].discard(index)
                if not self.left[memory]:
                    self.arena[memory.offset : memory.offset + memory.bytes].fill_(255)
        if step.phase == DURING and self.plan.schedule.count == 1:
            for memory in self.plan.schedule.frees[index]:
                self.made.pop(memory, None)
