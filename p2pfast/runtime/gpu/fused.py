"""The fused kernels: Triton's for convolutions and normalisation, CUDA C++ for label maps.

On CPU tensors (Triton's interpreter, for tests) label maps take the CPU's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv import triton as convolutions
from p2pfast.ops.cuda import launch, require_kernel
from p2pfast.ops.instance_edges.op import instance_edges
from p2pfast.ops.label_conv.op import label_conv
from p2pfast.ops.norm import triton as norms
from p2pfast.runtime.gpu.kernels import Operand, Sizes, Tiles, Window

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _image(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _source(x: Operand) -> convolutions.Source:
    return convolutions.Source(x.tensor, x.scale, x.shift, x.act, x.slope)


class FusedKernels:
    """See :class:`p2pfast.runtime.gpu.kernels.Kernels`; ``device`` is where the tensors are."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return norms.statistics(_image(x))

    def merge(
        self,
        partial: Tensor,
        count: Tensor,
        over_batch: bool,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale, shift, mean, variance = norms.merge(partial, count, over_batch, eps, weight, bias)
        return (scale, shift, mean[None], variance[None]) if over_batch else (scale, shift, mean, variance)

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
        r = Operand(x.tensor) if residual is None else residual
        norms.apply(
            _image(x.tensor),
            x.scale,
            x.shift,
            act,
            slope,
            None if residual is None else _image(r.tensor),
            r.scale,
            r.shift,
            _image(out),
            pad,
            pad_mode,
            x.act,
            x.slope,
            r.act,
            r.slope,
        )

    def tiles(self, window: Window, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tiles:
        problem = convolutions.Problem(
            sizes.images,
            sizes.size,
            sizes.out_size,
            sizes.channels,
            sizes.out_channels,
            window.kernel,
            window.stride,
            window.padding,
            window.pad_mode,
            window.transposed,
            dtype,
            sizes.pending,
            sizes.statistics,
        )
        return convolutions.choose(problem, device, library=False).best

    def pack(self, weight: Tensor, dtype: torch.dtype, window: Window, sizes: Sizes, tiles: Any) -> Any:
        return convolutions.pack(
            weight,
            window.transposed,
            dtype,
            stride=window.stride,
            padding=window.padding,
            channels=sizes.channels,
            layout=tiles.layout,
        )

    def parts(self, packed: Any, out_size: tuple[int, int], tiles: Any) -> int:
        return convolutions.parts(packed, *out_size, tiles.config)

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
        convolutions.conv(
            [_source(s) for s in sources],
            packed,
            bias,
            out,
            stride=window.stride,
            padding=window.padding,
            pad_mode=window.pad_mode,
            act=act,
            slope=slope,
            factor=factor,
            residual=None if residual is None else _source(residual),
            partial=partial,
            count=count,
            config=tiles.config,
        )

    # --- label maps --------------------------------------------------------------------------------

    def _sizes(self, shape: dict[str, Any]) -> dict[str, int]:
        require_kernel("label_conv", "label_conv", "the label map and the network")
        sizes: dict[str, int] = _C.cuda_label_conv_sizes(_C.LabelConvShape(**shape))
        return sizes

    def label_parts(self, shape: dict[str, Any]) -> int:
        return self._sizes(shape)["parts"] if self.on_gpu else 0

    def label_scratch(self, shape: dict[str, Any]) -> int:
        return self._sizes(shape)["scratch_bytes"] if self.on_gpu else 0

    def label_pack(self, shape: dict[str, Any], weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.on_gpu:
            return torch.cat([weight.reshape(-1), weight.new_zeros(shape["cout"]) if bias is None else bias])
        packed = torch.empty(self._sizes(shape)["packed_floats"], device=weight.device)
        launch(
            "label_conv_pack",
            weight.device,
            shape=_C.LabelConvShape(**shape),
            weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            packed=packed.data_ptr(),
        )
        return packed

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
        if self.on_gpu:
            launch(
                "label_conv",
                out.device,
                shape=_C.LabelConvShape(**shape),
                labels=labels.data_ptr(),
                label_bytes=1,
                edges=0 if edges is None else edges.data_ptr(),
                ids=0,
                id_bytes=0,
                packed=packed.data_ptr(),
                out=out.data_ptr(),
                type=_TYPES[out.dtype],
                out_stride=out.stride(2),
                scratch=0 if scratch is None else scratch.data_ptr(),
                partials=0 if partial is None else partial.data_ptr(),
                counts=0 if count is None else count.data_ptr(),
            )
            return
        cout, kernel = shape["cout"], shape["kernel"]
        made = label_conv(
            labels,
            edges,
            packed[:-cout].reshape(cout, -1, kernel, kernel),
            packed[-cout:],
            shape["classes"],
            shape["pool_levels"],
            "reflect" if shape["reflect"] else "zeros",
            torch.float32,
        )
        _image(out).copy_(made)

    def edges(self, instances: Tensor, out: Tensor) -> None:
        out.copy_(instance_edges(instances))
