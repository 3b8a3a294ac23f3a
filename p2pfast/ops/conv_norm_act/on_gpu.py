"""A training convolution and its gradients by the Triton kernels: what is worth a measurement, and runs.

As ``on_cpu``. A way's name is its tile, and of a convolution the layout of the weights, too. Weights change
with every step and are packed in every call, which the time of a way includes. This imports triton.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from p2pfast.ops.conv.gpu.op import run
from p2pfast.ops.conv.triton import Candidate, Config, Problem, estimated, machine
from p2pfast.ops.conv_norm_act.geometry import Geometry
from p2pfast.ops.gpu import STORED
from p2pfast.ops.weight_gradient.triton import contenders, refuses, weight_gradient

# How many are tried. Of convolutions every layer has a kernel of its own, which takes seconds to compile.
_CONVOLUTIONS, _TILES = 1, 2


@functools.lru_cache(4096)
def _candidates(problem: Problem, device: torch.device) -> dict[str, Candidate]:
    return {c.name: c for c in estimated(problem, device)[0][:_CONVOLUTIONS]}


def _ways(
    x: Tensor, weight: Tensor, shape: tuple[int, int, int, int], geometry: Geometry
) -> dict[str, Candidate]:
    problem = Problem(
        images=x.shape[0],
        size=(x.shape[2], x.shape[3]),
        out_size=(shape[2], shape[3]),
        channels=(x.shape[1],),
        out_channels=shape[1],
        kernel=(weight.shape[2], weight.shape[3]),
        stride=geometry.stride,
        padding=(geometry.padding, geometry.padding),
        pad_mode=geometry.padding_mode,
        transposed=geometry.transposed,
        dtype=x.dtype,
        pending=False,
        statistics=False,
        precision="tf32",
    )
    return _candidates(problem, x.device)


def convolutions(
    x: Tensor, weight: Tensor, shape: tuple[int, int, int, int], geometry: Geometry
) -> list[str]:
    """Names for ``convolve``, the likeliest first."""
    if geometry.transposed and geometry.padding >= min(weight.shape[2:]):
        return []
    return list(_ways(x, weight, shape, geometry))


def convolve(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    geometry: Geometry,
    turned: bool,
) -> Tensor:
    """The convolution by the way of that name, in channels_last."""
    way = _ways(x, weight, shape, geometry)[name]
    numbers = geometry.stride, geometry.padding, geometry.transposed, geometry.padding_mode
    given = weight.flip((2, 3)).transpose(0, 1) if turned else weight
    return run([x], given, bias, shape, *numbers, layout=way.layout, config=way.config)


@functools.lru_cache(4096)
def _likeliest(
    rows: int, channels: int, kernel: tuple[int, int], pixels: int, itemsize: int, device: torch.device
) -> dict[str, Config]:
    found = contenders(rows, channels, kernel, pixels, itemsize, machine(device))[:_TILES]
    return {str(config): config for config in found}


def _tiles(still: Tensor, windows: Tensor, kernel: tuple[int, int]) -> dict[str, Config]:
    pixels = still.shape[0] * still.shape[2] * still.shape[3]
    ends = still.shape[1], windows.shape[1]
    return _likeliest(*ends, kernel, pixels, still.dtype.itemsize, still.device)


def weight_gradients(still: Tensor, windows: Tensor, weight: Tensor, geometry: Geometry) -> list[str]:
    """Names for ``gradient_of_weight``, the likeliest first."""
    kernel = weight.shape[2], weight.shape[3]
    return [] if refuses(still, windows, kernel) else list(_tiles(still, windows, kernel))


def gradient_of_weight(
    name: str,
    still: Tensor,
    windows: Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    dtype: torch.dtype,
) -> Tensor:
    """The weight gradient by the way of that name, in ``dtype`` where the kernel can write that."""
    written = dtype if dtype in STORED else None
    numbers = kernel, geometry.stride, geometry.padding, geometry.padding_mode
    return weight_gradient(still, windows, *numbers, written, _tiles(still, windows, kernel)[name])
