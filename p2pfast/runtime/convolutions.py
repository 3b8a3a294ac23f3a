"""Convolutions: which algorithm, its packed weights, its workspace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from p2pfast import _C
from p2pfast.fuse.graph import ConvOp
from p2pfast.ops.pages import in_large_pages
from p2pfast.runtime import choice as choices
from p2pfast.runtime.bands import Part, Window, window_of
from p2pfast.runtime.builder import DTYPES, PADS, Address, act_fields
from p2pfast.runtime.plan import Constant, Pack, Stored
from p2pfast.runtime.tensors import Gathering, Tensors, Work


class Convolutions(Tensors):
    """Lowers convolutions of stored tensors."""

    def _conv(self, op: ConvOp, part: Part, out: Stored, gathering: Gathering | None) -> Work:
        module: Any = self.modules[op.path]
        transposed = bool(module.transposed)
        base = self._shape(op.inputs[0].base)
        n, c, h, w = self._shape(op.out)
        kernel_h, kernel_w = module.kernel_size
        in_channels = sum(self._shape(v.base)[1] for v in op.inputs)
        taps = kernel_h * kernel_w
        window = Window(0, base[2], op.pad_top)
        if part.image is not None:
            window = window_of(op, self.modules, part.begin, part.end, base[2])
        fixed: dict[str, Any] = {
            "images": n if part.image is None else 1,
            "height": window.end - window.begin,
            "width": base[3],
            "out_height": part.end - part.begin,
            "out_width": w,
            "out_channels": c,
            "kernel_h": kernel_h,
            "kernel_w": kernel_w,
            "stride": module.stride[0],
            "pad_top": window.pad_top,
            "pad_left": op.pad_left,
            "transposed": transposed,
            "pad": PADS[op.pad_mode],
            "weight_out_stride": taps if transposed else in_channels * taps,
            "weight_in_stride": c * taps if transposed else taps,
            **act_fields(op.act),
        }
        raw_dtype = module.weight.dtype if module.weight.dtype in DTYPES else torch.float32
        fixed["weight_dtype"] = DTYPES[raw_dtype]
        sources = [self._source(v, part.first_image, window.begin) for v in op.inputs]
        output = self._output(out, part.first_image, part.begin)
        pretend = {**fixed, "sources": [s() for s in sources], "out": output(), "bias": 1}
        if gathering is not None:
            pretend.update(partial=1, count=1)
        chosen, info = self._choice(op, pretend)
        picked = choices.parameters_of(chosen, self.narrow)
        fixed.update(picked)
        pretend.update(picked)
        addresses: dict[str, Address] = {"workspace": self._at(self.workspace)}
        skips = part.image is None and self._skip_labels(op, chosen, pretend, addresses, out)
        if skips:
            info = self._info(chosen, pretend)
        self.workspace.bytes = max(self.workspace.bytes, info["workspace_bytes"])
        addresses.update(self._weights(op, module, chosen, pretend, info["packed_floats"]))
        if gathering is not None:
            addresses["partial"], addresses["count"] = gathering.take(part, info["partials"])
        algorithm = chosen.algorithm

        def build(program: Any) -> int:
            fields = {**fixed, "sources": [s() for s in sources], "out": output()}
            return program.conv(algorithm, {**fields, **{k: v() for k, v in addresses.items()}})

        self._add(build)
        detail = f"{in_channels}→{c} {kernel_h}×{kernel_w} s{module.stride[0]} @{h}×{w}"
        if skips:
            detail += ", one-label tiles copied"
        return Work(chosen.name, detail, info["multiplications"])

    def _skip_labels(
        self,
        op: ConvOp,
        chosen: choices.Choice,
        args: dict[str, Any],
        addresses: dict[str, Address],
        out: Stored,
    ) -> bool:
        """Whether regions of one label are computed once: where the input has a map of them and the algorithm
        uses it. The output has such regions in turn."""
        ask = self.stored[op.inputs[0].base].uniform
        planar = args["out"]["channel_stride"] != 1
        if ask is None or len(op.inputs) > 1 or not self._copies(chosen) or planar:
            return False
        addresses["uniform"] = self._at(ask())
        args["uniform"] = 1
        self._offer_uniform(op.out, out, addresses, "out_uniform")
        return True

    def _choice(self, op: ConvOp, pretend: dict[str, Any]) -> tuple[choices.Choice, dict[str, Any]]:
        """The algorithm of a convolution: the same for all its bands, unless it refuses one."""
        found = self.options.get(op.name)
        if found is None:
            found = choices.options(pretend, self.narrow)
            if self.stored[op.inputs[0].base].uniform is not None:
                # Measured without labels: one that copies regions of a label does less than was measured.
                best = found[0].seconds
                found = sorted(found, key=lambda c: not (self._copies(c) and c.seconds < 2.5 * best))
            found = [
                replace(c, packed=0) if self._pack_key(op.path, c, pretend) in self.packs else c
                for c in found
            ]
            self.options[op.name] = found
        # The estimate's order, for a band that none of the options takes: there are always some that do.
        for chosen in (self.chosen.get(op.name, found[0]), *found, *self.others.get(op.name, ())):
            info = self._info(chosen, pretend)
            if info["refuses"] is None:
                return chosen, info
        self.others[op.name] = choices.options(pretend, self.narrow)
        chosen = self.others[op.name][0]
        return chosen, self._info(chosen, pretend)

    def _info(self, chosen: choices.Choice, pretend: dict[str, Any]) -> dict[str, Any]:
        return _C.conv_info(chosen.algorithm, {**pretend, **choices.parameters_of(chosen, self.narrow)})

    @staticmethod
    def _copies(chosen: choices.Choice) -> bool:
        """Whether an algorithm can copy regions of one label."""
        return (
            chosen.algorithm in (choices.WINOGRAD, choices.WINOGRAD2, choices.WINOGRAD6) and chosen.block > 0
        )

    def _weights(
        self, op: ConvOp, module: Any, chosen: choices.Choice, args: dict[str, Any], floats: int
    ) -> dict[str, Address]:
        """Addresses of the weights, packed where the algorithm packs them, and of the bias."""
        known = self.weights.get((op.out, chosen))
        if known is not None:
            return known
        addresses: dict[str, Address] = {}
        if floats:
            addresses["packed"] = self._packed(op.path, module, chosen, args, floats)
        else:
            dtype = module.weight.dtype if module.weight.dtype in DTYPES else torch.float32
            addresses["weight"] = self._raw_weight(module, dtype)
        bias = self._affine(module, "bias", self._shape(op.out)[1])
        if bias is not None:
            addresses["bias"] = bias
        self.weights[(op.out, chosen)] = addresses
        return addresses

    def _pack_key(self, path: str, chosen: choices.Choice, args: dict[str, Any]) -> Any:
        # A module that was replaced by another one at the same path has weights of its own.
        module = self.modules[path]
        owner = id(module) if isinstance(module, torch.nn.Module) else 0
        channels = tuple(s["channels"] for s in args["sources"])
        return path, owner, chosen.algorithm, chosen.pairs, _C.active_level(), channels

    def _packed(
        self, path: str, module: Any, chosen: choices.Choice, args: dict[str, Any], floats: int
    ) -> Address:
        """Packed weights, one copy for all plans of the network."""
        self.packed_sizes[path, chosen.algorithm, chosen.pairs] = 4 * floats
        key = self._pack_key(path, chosen, args)
        entry = self.packs.get(key)
        if entry is None:
            tensor = in_large_pages(torch.empty(floats + 16, device="cpu"))
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
