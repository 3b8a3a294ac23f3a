"""Every algorithm on the layers of the flagship and of pix2pix's U-Net, planned as a network runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv import conv_reference
from p2pfast.ops.conv.op import ALGORITHMS, PADDING_MODES


@dataclass(frozen=True)
class Layer:
    """Sizes of the flagship's input at 2048x1024; ``small`` divides them (channels by ``fewer``)."""

    height: int
    width: int
    channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 1
    transposed: bool = False
    output_padding: int = 0
    padding_mode: str = "zeros"
    small: int = 4
    fewer: int = 1

    def scaled(self, full: bool) -> tuple[int, int, int, int]:
        if full:
            return self.height, self.width, self.channels, self.out_channels
        small, fewer = self.small, self.fewer
        return self.height // small, self.width // small, self.channels // fewer, self.out_channels // fewer


LAYERS = {
    "bottleneck 3x3": Layer(32, 64, 1024, 1024, 3, padding_mode="reflect", small=1, fewer=4),
    "local 3x3": Layer(512, 1024, 64, 64, 3, padding_mode="reflect"),
    "global 7x7": Layer(512, 1024, 36, 64, 7, padding=3, padding_mode="reflect"),
    "down 3x3": Layer(512, 1024, 64, 128, 3, stride=2),
    "up 3x3": Layer(256, 512, 128, 64, 3, stride=2, transposed=True, output_padding=1),
    "head 7x7": Layer(1024, 2048, 32, 3, 7, padding=3, padding_mode="reflect"),
    "unet down 4x4": Layer(128, 128, 64, 128, 4, stride=2, small=1),
    "unet inner 4x4": Layer(4, 4, 512, 512, 4, stride=2, small=1),
    "unet up 4x4": Layer(64, 64, 256, 64, 4, stride=2, transposed=True, small=1),
}
BLOCKS = {"winograd": 48, "winograd2": 96, "streamed": 256, "streamed2": 256}


class Planned:
    """A layer as a plan calls it: weights packed, memory made once, statistics of the output gathered."""

    def __init__(self, layer: Layer, full: bool, dtype: torch.dtype) -> None:
        self.layer = layer
        self.height, self.width, channels, out_channels = layer.scaled(full)
        k = layer.kernel
        self.x = torch.randn(1, self.height, self.width, channels).to(dtype)
        outer = (channels, out_channels) if layer.transposed else (out_channels, channels)
        self.weight = torch.randn(*outer, k, k) / (channels * k * k) ** 0.5
        self.bias = torch.randn(out_channels)
        self.scale, self.shift = torch.rand(1, channels) + 0.5, torch.randn(1, channels)
        self.channels, self.out_channels, self.dtype = channels, out_channels, dtype

    def reference(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        layer = self.layer
        x = self.x.permute(0, 3, 1, 2).to(dtype).contiguous()
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        scale, shift = self.scale.to(dtype), self.shift.to(dtype)
        return lambda: conv_reference(
            x,
            weight,
            bias,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.transposed,
            layer.padding_mode,
            scale=scale,
            shift=shift,
            input_act="relu",
        )

    def prepare(self, algorithm: str, out_height: int, out_width: int, pairs: bool = False) -> str | None:
        """Packs for an algorithm, in bfloat16 pairs if asked; the reason where it cannot run."""
        layer, room = self.layer, -(-self.out_channels // 16) * 16
        taps = layer.kernel**2
        self.out = torch.full((1, out_height, out_width, room), float("nan"), dtype=self.dtype)
        kind = int(self.dtype == torch.bfloat16)
        self.call: dict[str, Any] = {
            "sources": [
                {
                    "data": self.x.data_ptr(),
                    "image_stride": self.x.stride(0),
                    "row_stride": self.x.stride(1),
                    "pixel_stride": self.x.stride(2),
                    "channels": self.channels,
                    "dtype": kind,
                    "scale": self.scale.data_ptr(),
                    "shift": self.shift.data_ptr(),
                    "norm_stride": self.channels,
                    "act": 1,
                }
            ],
            "images": 1,
            "height": self.height,
            "width": self.width,
            "out_height": out_height,
            "out_width": out_width,
            "out_channels": self.out_channels,
            "kernel_h": layer.kernel,
            "kernel_w": layer.kernel,
            "stride": layer.stride,
            "pad_top": layer.padding,
            "pad_left": layer.padding,
            "transposed": layer.transposed,
            "pad": PADDING_MODES.index(layer.padding_mode),
            "weight": self.weight.data_ptr(),
            "weight_out_stride": taps if layer.transposed else taps * self.channels,
            "weight_in_stride": taps * self.out_channels if layer.transposed else taps,
            "bias": self.bias.data_ptr(),
            "out": {
                "data": self.out.data_ptr(),
                "image_stride": self.out.stride(0),
                "row_stride": self.out.stride(1),
                "pixel_stride": room,
                "dtype": kind,
            },
            "block": BLOCKS.get(algorithm, 0),
            "packed_dtype": 2 if pairs else 0,
        }
        self.number = ALGORITHMS.index(algorithm)
        self.info = _C.conv_info(self.number, self.call)
        if self.info["refuses"]:
            return str(self.info["refuses"])
        self.packed = torch.empty(max(1, self.info["packed_floats"]))
        self.workspace = torch.empty(self.info["workspace_bytes"], dtype=torch.uint8)
        if self.info["packed_floats"]:
            _C.conv_pack(self.number, self.call, self.packed.data_ptr())
        self.call |= {"packed": self.packed.data_ptr(), "workspace": self.workspace.data_ptr()}
        if algorithm != "thin":
            self.partial = torch.empty(self.info["partials"], 2, room)
            self.count = torch.empty(self.info["partials"])
            self.call |= {"partial": self.partial.data_ptr(), "count": self.count.data_ptr()}
        return None

    def __call__(self) -> None:
        _C.run_conv(self.number, self.call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_conv(
    compare: Callable[..., None], full: bool, layer: str, algorithm: str, dtype: torch.dtype
) -> None:
    _compare(compare, Planned(LAYERS[layer], full, dtype), algorithm)


@pytest.mark.skipif(not _C.multiplies_pairs(), reason="no instructions for products of bfloat16 pairs")
@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a not in ("thin", "winograd6")])
@pytest.mark.parametrize("layer", LAYERS)
def test_conv_in_pairs(compare: Callable[..., None], full: bool, layer: str, algorithm: str) -> None:
    _compare(compare, Planned(LAYERS[layer], full, torch.bfloat16), algorithm, pairs=True)


def _compare(compare: Callable[..., None], planned: Planned, algorithm: str, pairs: bool = False) -> None:
    layer, dtype = planned.layer, planned.dtype
    expected = planned.reference(torch.float32)()
    out_height, out_width = expected.shape[2:]
    reason = planned.prepare(algorithm, out_height, out_width, pairs)
    if reason:
        pytest.skip(f"{algorithm} cannot do {layer}: {reason}")
    planned()
    got = planned.out[..., : planned.out_channels].permute(0, 3, 1, 2).float()
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < (1e-2 if pairs else 5e-3 if dtype == torch.bfloat16 else 6e-6)
    weights = planned.weight.nbytes + (planned.packed.nbytes if planned.info["packed_floats"] else 0)
    shape = planned.weight.shape
    dense = shape.numel() * (planned.x.shape[1:3] if layer.transposed else expected.shape[2:]).numel()
    compare(
        planned,
        planned.reference(dtype),
        bytes_moved=planned.x.nbytes + planned.out.nbytes + weights,
        multiplications=planned.info["multiplications"],
        dense=dense,
    )
