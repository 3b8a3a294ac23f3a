"""The CUDA kernel of ``label_conv`` with all it can do: statistics, edges from instance ids, slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.cuda import launch

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class LabelConvGeometry:
    """What the tables and the convolution depend on besides the map; fields as of ``label_conv``."""

    num_classes: int
    cout: int
    kernel: int
    pool_levels: int = 0
    padding_mode: str = "reflect"

    def shape(self, batch: int, height: int, width: int, has_edges: bool) -> Any:
        """The native description of a call; the sizes are those of the map of labels."""
        return _C.LabelConvShape(
            batch=batch,
            height=height,
            width=width,
            classes=self.num_classes,
            has_edges=has_edges,
            cout=self.cout,
            kernel=self.kernel,
            pool_levels=self.pool_levels,
            reflect=self.padding_mode == "reflect",
        )


@dataclass
class LabelConvResult:
    """The image (N, Cout, H', W'), channels_last; ``partials`` (N, parts, 2, Cout), float32: mean and sum of
    squared deviations from it of each part of the image before rounding; ``counts`` (parts,), float32: how
    many pixels the parts have."""

    image: Tensor
    partials: Tensor | None
    counts: Tensor | None


def pack_tables(weight: Tensor, bias: Tensor | None, geometry: LabelConvGeometry, has_edges: bool) -> Tensor:
    """The tables that ``convolve_labels`` reads, to be made again when the weights change.

    Args:
        weight: (Cout, num_classes + has_edges, K, K), on CUDA. bias: (Cout,) or None.
    """
    side = geometry.kernel << geometry.pool_levels  # the tables are the same for maps of any size
    call = geometry.shape(1, side, side, has_edges)
    sizes = _C.cuda_label_conv_sizes(call)
    packed = torch.empty(sizes["packed_floats"], dtype=torch.float32, device=weight.device)
    weight = weight.detach().to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    launch(
        "label_conv_pack",
        weight.device,
        shape=call,
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        packed=packed.data_ptr(),
    )
    return packed


def convolve_labels(
    labels: Tensor,
    edges: Tensor | None,
    instances: Tensor | None,
    tables: Tensor,
    geometry: LabelConvGeometry,
    *,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    statistics: bool = False,
) -> LabelConvResult:
    """Launches the convolution; checks shapes and numbers, not the labels: those outside [0, num_classes)
    make every window that sees them NaN.

    Args:
        labels: (N, H, W), any integer dtype.
        edges: (N, H, W) uint8 or bool, or None. instances: (N, H, W) ids of any integer dtype instead, whose
            edges the kernel finds itself.
        tables: of ``pack_tables``, with has_edges if one of these is given.
        dtype: float32, bfloat16 or float16. Ignored where ``out`` is given.
        out: (N, Cout, H', W') to write, with unit stride along the channels and pixels side by side: a
            channels_last tensor or channels of one (a concatenation's slice).
        statistics: whether to return them too.

    Raises:
        ValueError: what does not fit, by the native checks.
    """
    batch, height, width = labels.shape
    has_edges = edges is not None or instances is not None
    call = geometry.shape(batch, height, width, has_edges)
    sizes = _C.cuda_label_conv_sizes(call)
    device = labels.device
    size = (batch, geometry.cout, sizes["out_height"], sizes["out_width"])
    if out is None:
        out = torch.empty(size, dtype=dtype, device=device, memory_format=torch.channels_last)
        pixel = geometry.cout
    else:
        pixel = out.stride(3)
        dense = (size[2] * size[3] * pixel, 1, size[3] * pixel, pixel)
        if out.shape != size or out.stride() != dense:
            raise ValueError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; {size} with pixels side by "
                "side and unit stride along the channels is expected"
            )
    if tables.numel() != sizes["packed_floats"]:
        raise ValueError(
            f"tables has {tables.numel()} values, {sizes['packed_floats']} are expected: pack_tables with "
            f"the same geometry and has_edges={has_edges}"
        )
    labels = labels.contiguous()
    if labels.dtype == torch.int8:  # -1 would be class 255
        labels = labels.to(torch.int16)
    edges = None if edges is None else edges.contiguous()
    instances = None if instances is None else instances.contiguous()
    scratch = torch.empty(sizes["scratch_bytes"], dtype=torch.uint8, device=device)
    partials = counts = None
    if statistics:
        partials = torch.empty((batch, sizes["parts"], 2, geometry.cout), dtype=torch.float32, device=device)
        counts = torch.empty(sizes["parts"], dtype=torch.float32, device=device)
    launch(
        "label_conv",
        device,
        shape=call,
        labels=labels.data_ptr(),
        label_bytes=labels.element_size(),
        edges=0 if edges is None else edges.data_ptr(),
        ids=0 if instances is None else instances.data_ptr(),
        id_bytes=0 if instances is None else instances.element_size(),
        packed=tables.data_ptr(),
        out=out.data_ptr(),
        type=_TYPES[out.dtype],
        out_stride=pixel,
        scratch=scratch.data_ptr(),
        partials=0 if partials is None else partials.data_ptr(),
        counts=0 if counts is None else counts.data_ptr(),
    )
    return LabelConvResult(out, partials, counts)
