"""The first layer of a label-to-image network, from the integer label map."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import LabelConvOp
from p2pfast.runtime.builder import Address, channel_stride
from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.plan import LabelInput, Report
from p2pfast.runtime.tensors import Tensors


class LabelConvolutions(Tensors):
    """Lowers convolutions of label maps."""

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
        addresses: dict[str, Address] = {
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
        if labels.num_classes < 256:
            self._offer_uniform(op.out, addresses, "uniform")
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
