"""Convolutions: which algorithm, its packed weights, its workspace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import ConvOp
from p2pfast.runtime import choice as choices
from p2pfast.runtime.builder import DTYPES, PADS, Address, act_fields, channel_stride
from p2pfast.runtime.plan import Constant, Pack, Report
from p2pfast.runtime.tensors import Tensors


class Convolutions(Tensors):
    """Lowers convolutions of stored tensors."""

    def _conv(self, op: ConvOp) -> None:
        module: Any = self.modules[op.path]
        transposed = bool(module.transposed)
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
            "pad": PADS[op.pad_mode],
            "weight_out_stride": taps if transposed else in_channels * taps,
            "weight_in_stride": c * taps if transposed else taps,
            **act_fields(op.act),
        }
        raw_dtype = module.weight.dtype if module.weight.dtype in DTYPES else torch.float32
        fixed["weight_dtype"] = DTYPES[raw_dtype]
        fixed["packed_dtype"] = DTYPES[self.dtype]
        sources = [self._source(v) for v in op.inputs]
        output = self._output(out)
        pretend = {**fixed, "sources": [s() for s in sources], "out": output(), "bias": 1}
        if statistics:
            pretend.update(partial=1, count=1)
        found = choices.options(pretend)
        self.options[op.name] = [
            replace(c, packed=0) if self._pack_key(op.path, c, pretend) in self.packs else c for c in found
        ]
        chosen = self.chosen.get(op.name, found[0])
        fixed.update(block=chosen.block, group=chosen.group)
        pretend.update(block=chosen.block, group=chosen.group)
        addresses: dict[str, Address] = {"workspace": self._at(self.workspace)}
        skips = self._skip_labels(op, chosen, pretend, addresses)
        info = _C.conv_info(chosen.algorithm, pretend)
        self.workspace.bytes = max(self.workspace.bytes, info["workspace_bytes"])

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
        if skips:
            detail += ", one-label tiles copied"
        self._report(Report(op.name, chosen.name, detail, info["multiplications"], moved))
        algorithm = chosen.algorithm

        def build(program: Any) -> int:
            fields = {**fixed, "sources": [s() for s in sources], "out": output()}
            return program.conv(algorithm, {**fields, **{k: v() for k, v in addresses.items()}})

        self._add(build)
        if statistics:
            self._merge(op.out, partial, self._at(count), parts)

    def _skip_labels(
        self, op: ConvOp, chosen: choices.Choice, args: dict[str, Any], addresses: dict[str, Address]
    ) -> bool:
        """Whether regions of one label are computed once: where the input has a map of them and the algorithm
        uses it. The output has such regions in turn."""
        ask = self.stored[op.inputs[0].base].uniform
        packed = chosen.algorithm in (choices.WINOGRAD, choices.WINOGRAD2) and chosen.block > 0
        planar = args["out"]["channel_stride"] != 1
        if ask is None or len(op.inputs) > 1 or not packed or planar:
            return False
        addresses["uniform"] = self._at(ask())
        args["uniform"] = 1
        self._offer_uniform(op.out, addresses, "out_uniform")
        return True

    def _fold_activation(self, op: ConvOp) -> None:
        """An activation that every reader wants, with no normalisation before it, is done on the way out."""
        if op.act is not None or op.out in self.results:
            return
        uses = self.uses.get(op.out, [])
        acts = {v.act for v in uses}
        if len(acts) != 1 or None in acts or any(v.norm is not None for v in uses):
            return
        self._set(op, "act", acts.pop())
        for view in uses:
            self._set(view, "act", None)

    def _pack_key(self, path: str, chosen: choices.Choice, args: dict[str, Any]) -> Any:
        # A module that was replaced by another one at the same path has weights of its own.
        module = self.modules[path]
        owner = id(module) if isinstance(module, torch.nn.Module) else 0
        return path, owner, chosen.algorithm, _C.active_level(), tuple(s["channels"] for s in args["sources"])

    def _packed(
        self, path: str, module: Any, chosen: choices.Choice, args: dict[str, Any], floats: int
    ) -> Address:
        """Packed weights, one copy for all plans of the network."""
        key = self._pack_key(path, chosen, args)
        entry = self.packs.get(key)
        if entry is None:
            tensor = torch.empty(floats + 16)
            start = (-tensor.data_ptr() // 4) % 16
            view = tensor[start : start + floats]
            template = {**args, "bias": 0, "partial": 0, "count": 0}

            def refresh() -> None:
                weight = module.weight.detach()
                if weight.dtype not in DTYPES:
                    weight = weight.float()
                weight = weight.contiguous()
                _C.conv_pack(
                    chosen.algorithm,
                    {**template, "weight": weight.data_ptr(), "weight_dtype": DTYPES[weight.dtype]},
                    view.data_ptr(),
                )

            entry = Pack(tensor, view.data_ptr(), Constant(lambda: [module.weight], refresh))
            self.packs[key] = entry
        address = entry.address
        self.plan.constants.append(entry.constant)
        return lambda: address

    def _raw_weight(self, module: Any, dtype: torch.dtype) -> Address:
        weight = module.weight
        if weight.dtype == dtype and weight.is_contiguous():
            return self._parameter(lambda: module.weight.detach().contiguous())
        return self._constant(
            weight.numel(), lambda: [module.weight], lambda out: out.copy_(module.weight.detach().reshape(-1))
        )
