"""The first layer of a label-to-image network, from the integer label map."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import LabelConvOp
from p2pfast.runtime.bands import Part
from p2pfast.runtime.builder import Address
from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.plan import LabelInput, Report, Stored
from p2pfast.runtime.tensors import Gathering, Tensors, Work


def label_shape(op: LabelConvOp, module: Any, labels: Any, images: int, band_rows: int) -> dict[str, Any]:
    """The fields of the kernel's shape."""
    assert op.labels is not None
    return {
        "batch": images,
        "height": labels.labels.shape[2],
        "width": labels.labels.shape[3],
        "classes": labels.num_classes,
        "has_edges": labels.has_edges,
        "cout": module.out_channels,
        "kernel": module.kernel_size[0],
        "pool_levels": op.labels.level,
        "reflect": op.reflect,
        "band_rows": band_rows,
    }


class LabelConvolutions(Tensors):
    """Lowers convolutions of label maps."""

    def _label_conv(self, op: LabelConvOp, part: Part, out: Stored, gathering: Gathering | None) -> Work:
        assert op.labels is not None
        module: Any = self.modules[op.path]
        labels = self.inputs[op.labels.node]
        n, c, h, w = self._shape(op.out)
        _, _, height, width = labels.labels.shape
        entry = self._label_input(op.labels.node, labels)
        edges = self._edges(op.labels.node, labels, entry)
        shape = label_shape(op, module, labels, n if part.image is None else 1, 16 if gathering else 0)
        native_shape = _C.LabelConvShape(**shape)
        layout = _C.LabelConvLayout(native_shape)
        if op.out not in self.tables:
            self.tables[op.out] = self._table(module, native_shape, layout.packed_floats)
        if op.out not in self.scratch:
            self.scratch[op.out] = self._buffer(0)
        scratch = self.scratch[op.out]
        scratch.bytes = max(scratch.bytes, layout.scratch_bytes)
        map_skip = part.first_image * height * width
        output = self._output(out, part.first_image, part.begin)
        addresses: dict[str, Address] = {
            "labels": lambda: _C.slot_address(entry.labels, map_skip),
            "packed": self.tables[op.out],
            "out": lambda: output()["data"],
            "scratch": self._at(scratch),
        }
        if edges is not None:
            start = self._at(edges)
            addresses["edges"] = lambda: start() + map_skip
        rows = part.end - part.begin
        if gathering is not None:
            parts = -(-rows // 16)
            addresses["partials"], _ = gathering.take(part, parts)
            if part.first_image == 0:
                gathering.known += [16.0 * w] * (parts - 1) + [float(w * (rows - 16 * (parts - 1)))]
        if part.image is None and labels.num_classes < 256:
            self._offer_uniform(op.out, out, addresses, "uniform")
        fixed = {
            **shape,
            "out_bf16": out.dtype == torch.bfloat16,
            "row_begin": part.begin,
            "row_end": part.end,
        }
        self._add(lambda p: p.label_conv({**fixed, **{k: v() for k, v in addresses.items()}}))
        size = f"{module.kernel_size[0]}×{module.kernel_size[1]}"
        return Work("label_conv", f"{labels.num_channels}→{c} {size} from labels @{h}×{w}")

    def _table(self, module: Any, shape: Any, floats: int) -> Address:
        """Sums of weights that the kernel looks up."""

        def tensors() -> list[torch.Tensor]:
            return [t for t in (module.weight, module.bias) if t is not None]

        def fill(packed: torch.Tensor) -> None:
            weight = module.weight.detach().float().contiguous()
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            _C.label_conv_pack(
                shape,
                weight=weight.data_ptr(),
                bias=0 if bias is None else bias.data_ptr(),
                packed=packed.data_ptr(),
            )

        return self._constant(floats, tensors, fill)

    def _label_input(self, node: str, labels: Any) -> LabelInput:
        for entry in self.plan.label_inputs:
            if entry.node == node:
                return entry
        n, _, h, w = labels.labels.shape
        instances = self._slot() if labels.has_edges else None
        entry = LabelInput(node, self._slot(), instances, (n, h, w))
        self.plan.label_inputs.append(entry)
        return entry

    def _edges(self, node: str, labels: Any, entry: LabelInput) -> Buffer | None:
        if entry.instances is None:
            return None
        if node not in self.edge_maps:
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
            self.edge_maps[node] = edges
        return self.edge_maps[node]
