"""A convolution as a launch of one of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.conv.gpu.configs import Config, describable, phase_sizes
from p2pfast.ops.conv.gpu.conv_kernel import conv_kernel
from p2pfast.ops.conv.gpu.pack import Packed, power_of_two
from p2pfast.ops.conv.gpu.source import Source, norm_stride
from p2pfast.ops.conv.gpu.thin_kernel import thin_kernel
from p2pfast.ops.gpu import Launch


def _source(index: int, source: Source | None, like: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of one source; those of one that is not there are never used."""
    i = str(index)
    t = None if source is None else source.tensor
    arguments = {
        f"x{i}": t,
        f"scale{i}": None if source is None else source.scale,
        f"shift{i}": None if source is None else source.shift,
        f"x{i}_image": 0 if t is None else t.stride(0),
        f"x{i}_row": 0 if t is None else t.stride(1),
        f"norm{i}_image": 0 if source is None else norm_stride(source),
    }
    constants = {
        f"X{i}_PIXEL": 0 if t is None else t.stride(2),
        f"C{i}": 0 if t is None else t.shape[3],
        f"ACT{i}": 0 if source is None else activation_code(source.act),
        f"SLOPE{i}": 0.0 if source is None else source.slope,
    }
    return arguments, constants


def _span(t: Tensor) -> int:
    """Elements that the addresses within one image of an NHWC view span."""
    return sum(abs(stride) * (size - 1) for stride, size in zip(t.stride()[1:], t.shape[1:], strict=True))


def padding_of(
    sources: Sequence[Source],
    packed: Packed,
    out: Tensor,
    stride: int,
    padding: tuple[int, int],
    pad_mode: str,
) -> str:
    """The padding that the kernel has to do: ``"none"`` where no window leaves the image.

    Raises:
        ValueError: a reflection as large as the image.
    """
    if packed.transposed:
        return "zeros"
    needed = False
    for side, size, length, pad, k in (
        ("height", sources[0].tensor.shape[1], out.shape[1], padding[0], packed.kernel[0]),
        ("width", sources[0].tensor.shape[2], out.shape[2], padding[1], packed.kernel[1]),
    ):
        after = (length - 1) * stride + k - pad - size
        needed |= pad > 0 or after > 0
        if pad_mode == "reflect" and max(pad, after) >= size:
            raise ValueError(
                f"padding is {padding} with an out of {tuple(out.shape)}: reflection needs it below the "
                f"input's {side}, here {size}"
            )
    return pad_mode if needed else "none"


def workspace(packed: Packed, out: Tensor, config: Config) -> int:
    """Float32 values that a convolution which is split keeps between its launches."""
    if config.splits == 1:
        return 0
    sizes = phase_sizes(packed, out.shape[1], out.shape[2])
    tiles = -(-max(sizes) // config.bm) * -(-packed.columns // config.bn)
    return int(out.shape[0] * len(sizes) * tiles * config.splits * config.bm * config.bn)


def launches(
    sources: Sequence[Source],
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    config: Config,
    **options: Any,
) -> list[Launch]:
    """As ``build``, all launches of a convolution with the memory between them."""
    if config.splits == 1:
        return [build(sources, packed, bias, out, config=config, **options)]
    work = torch.empty(workspace(packed, out, config), dtype=torch.float32, device=out.device)
    return [
        build(sources, packed, bias, out, config=config, **options, work=work, merge=merge)
        for merge in (False, True)
    ]


def build(
    sources: Sequence[Source],
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    *,
    factor: Tensor | None = None,
    stride: int,
    padding: tuple[int, int],
    pad: str,
    act: str,
    slope: float,
    residual: Source | None,
    partial: Tensor | None,
    count: Tensor | None,
    config: Config,
    precision: str,
    work: Tensor | None = None,
    merge: bool = False,
) -> Launch:
    """The launch of a convolution whose arguments are right; tensors may be on the meta device. Of one that
    is split, ``work`` is from ``workspace``, and ``merge`` says which of its two launches."""
    first = sources[0].tensor
    second = sources[1] if len(sources) == 2 else None
    out_height, out_width = out.shape[1:3]
    arguments0, constants0 = _source(0, sources[0], first)
    arguments1, constants1 = _source(1, second, first)
    tensors = [s.tensor for s in sources] + [out] + ([residual.tensor] if residual else [])
    arguments = {
        **arguments0,
        **arguments1,
        "w": packed.data,
        "factor": factor,
        "bias": bias,
        "residual": None if residual is None else residual.tensor,
        "residual_scale": None if residual is None else residual.scale,
        "residual_shift": None if residual is None else residual.shift,
        "out": out,
        "height": first.shape[1],
        "width": first.shape[2],
        "out_height": out_height,
        "out_width": out_width,
        "residual_image": 0 if residual is None else residual.tensor.stride(0),
        "residual_row": 0 if residual is None else residual.tensor.stride(1),
        "residual_norm_image": 0 if residual is None else norm_stride(residual),
        "out_image": out.stride(0),
        "out_row": out.stride(1),
        "partial": partial,
        "count": count,
        "parts": 0 if count is None else count.shape[0],
    }
    constants = {
        **constants0,
        **constants1,
        "FLAT0": packed.flat[0],
        "FLAT1": packed.flat[-1],
        "RESIDUAL_PIXEL": 0 if residual is None else residual.tensor.stride(2),
        "RESIDUAL_ACT": 0 if residual is None else activation_code(residual.act),
        "RESIDUAL_SLOPE": 0.0 if residual is None else residual.slope,
        "OUT_PIXEL": out.stride(2),
        "COUT": packed.out_channels,
        "DEPTH": packed.depth,
        "PAD_TOP": packed.padding[0] if packed.transposed else padding[0],
        "PAD_LEFT": packed.padding[1] if packed.transposed else padding[1],
        "ACT": activation_code(act),
        "SLOPE": slope,
        "WIDE": any(_span(t) >= 2**31 for t in tensors),
        "PRECISION": precision,
        "BM": config.bm,
        "BK": config.bk,
    }
    if packed.layout == "rows":
        constants |= {
            "WINDOW": packed.window[0],
            "ROWS": packed.rows,
            "KW": packed.kernel[1],
            "KWP": power_of_two(packed.kernel[1]),
            "CP": power_of_two(packed.out_channels),
            # Tiles at the ends reach past the image also where no window does.
            "PAD": "replicate" if pad == "none" else pad,
        }
        across = config.bm - packed.kernel[1] + 1
        grid = -(-out_width // across), -(-out_height // packed.rows), out.shape[0]
        return Launch(thin_kernel, grid, arguments, constants, config.warps, config.stages)
    sizes = phase_sizes(packed, out_height, out_width)
    s = packed.stride
    whole = packed.layout != "columns" or (out_height % s == 0 and out_width % s == 0)
    constants |= {
        "KH": packed.window[0],
        "KW": packed.window[1],
        "STRIDE": stride,
        "PAD": pad,
        "PHASES": {"plain": "none", "phases": "grid", "columns": "columns"}[packed.layout],
        "FULL": whole and all(size % config.bm == 0 for size in sizes),
        "BN": config.bn,
    }
    tiles = -(-max(sizes) // config.bm) * -(-packed.columns // config.bn)
    constants |= {"SPLITS": config.splits, "PASS": "whole", "DESCRIPTOR": config.descriptor and not merge}
    arguments["work"] = work
    if config.descriptor and not describable(packed, config):
        raise ValueError(
            f"config is {config}: a descriptor needs channels that its depth divides, here {packed.channels}"
        )
    if constants["DESCRIPTOR"]:
        arguments["w"] = TensorDescriptor.from_tensor(packed.data, [config.bn, config.bk])
    if config.splits > 1:
        constants["PASS"] = "merge" if merge else "split"
    grid = tiles, len(sizes) * (1 if merge else config.splits), out.shape[0]
    return Launch(conv_kernel, grid, arguments, constants, config.warps, config.stages)
