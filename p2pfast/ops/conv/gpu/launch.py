"""One convolution on a GPU: checks, and the launch that the kernels' arguments describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.conv.gpu.configs import Config, default_config, parts, phase_sizes
from p2pfast.ops.conv.gpu.conv_kernel import conv_kernel
from p2pfast.ops.conv.gpu.pack import Packed, power_of_two
from p2pfast.ops.conv.gpu.source import Source, check_source, check_view, norm_stride
from p2pfast.ops.conv.gpu.thin_kernel import thin_kernel
from p2pfast.ops.gpu import Launch, allows_tf32, check_tensor, on_device

PADDING_MODES = ("zeros", "reflect", "replicate")
PRECISIONS = ("tf32", "tf32x3", "ieee")
_LARGEST = 2**31 - 1024  # pixels of an image: row numbers of the last tile must fit as well


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


def build(
    sources: Sequence[Source],
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    *,
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
) -> Launch:
    """The launch of a convolution whose arguments are right; tensors may be on the meta device."""
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
    grid = tiles, len(sizes), out.shape[0]
    return Launch(conv_kernel, grid, arguments, constants, config.warps, config.stages)


def _check(
    sources: Sequence[Source],
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    stride: int,
    padding: tuple[int, int],
    pad_mode: str,
    residual: Source | None,
    partial: Tensor | None,
    count: Tensor | None,
) -> None:
    if len(sources) not in (1, 2):
        raise ValueError(f"there are {len(sources)} sources; 1 or 2 are supported")
    first = sources[0].tensor
    for i, source in enumerate(sources):
        check_source(f"sources[{i}]", source)
        t = source.tensor
        if t.shape[:3] != first.shape[:3] or t.dtype != first.dtype:
            raise ValueError(
                f"sources are {tuple(first.shape)} {first.dtype} and {tuple(t.shape)} {t.dtype}; only their "
                "channels may differ"
            )
    channels = tuple(s.tensor.shape[3] for s in sources)
    if channels != packed.channels:
        raise ValueError(f"sources have {channels} channels; the weights were packed for {packed.channels}")
    if packed.data.dtype != first.dtype:
        raise TypeError(
            f"the weights were packed as {packed.data.dtype}, sources are {first.dtype}: pack them again"
        )
    check_view("out", out)
    if out.shape[0] != first.shape[0] or out.shape[3] != packed.out_channels:
        raise ValueError(
            f"out has shape {tuple(out.shape)}; ({first.shape[0]}, height, width, {packed.out_channels}) is "
            "expected"
        )
    if max(first.shape[1] * first.shape[2], out.shape[1] * out.shape[2]) > _LARGEST:
        raise ValueError(
            f"out has shape {tuple(out.shape)}: images of more than {_LARGEST} pixels: cut them in tiles"
        )
    if out.shape[0] > 65535:
        raise ValueError(
            f"out has shape {tuple(out.shape)}; at most 65535 images are supported: split the batch"
        )
    if pad_mode not in PADDING_MODES:
        raise ValueError(f"pad_mode is {pad_mode!r}; choose one of {', '.join(PADDING_MODES)}")
    if min(*padding, stride - 1) < 0:
        raise ValueError(f"stride is {stride} and padding {padding}; at least 1 and 0 are expected")
    if packed.transposed:
        if stride != packed.stride:
            raise ValueError(f"stride is {stride}; the weights were packed for {packed.stride}")
        if pad_mode != "zeros":
            raise ValueError(f"pad_mode is {pad_mode!r}; a transposed convolution has only 'zeros'")
    if residual is not None:
        check_source("residual", residual)
        if residual.tensor.shape != out.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.tensor.shape)}, out {tuple(out.shape)}; they must be "
                "equal"
            )
    if bias is not None and bias.shape != (packed.out_channels,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; ({packed.out_channels},) is expected")
    if (partial is None) != (count is None):
        raise ValueError("partial and count go together; one of them is None")
    if packed.layout == "rows":
        if stride != 1:
            raise ValueError(f"stride is {stride}; the weights' layout 'rows' takes 1: pack them as 'plain'")
        if -(-out.shape[1] // packed.rows) > 65535:
            raise ValueError(f"out has shape {tuple(out.shape)}: too high for the weights' layout 'rows'")
    others: dict[str, Tensor | None] = {
        "bias": bias,
        "weights": packed.data,
        "out": out,
        "partial": partial,
        "count": count,
    }
    others["residual"] = None if residual is None else residual.tensor
    others.update((f"sources[{i}]", s.tensor) for i, s in enumerate(sources))
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(
                f"{name} is on {other.device}, sources[0] on {first.device}; they must be on one device"
            )


def conv(
    sources: Sequence[Source],
    packed: Packed,
    bias: Tensor | None,
    out: Tensor,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    pad_mode: str = "zeros",
    act: str = "none",
    slope: float = 0.0,
    residual: Source | None = None,
    partial: Tensor | None = None,
    count: Tensor | None = None,
    config: Config | None = None,
    precision: str | None = None,
) -> None:
    """A convolution with everything around it, written into ``out`` on the current stream.

    ``out = act(conv(pad(cat(sources))) + bias + residual)``; sums are float32 whatever the stored dtype.

    Args:
        sources: one, or two that stand for their concatenation along the channels; each does its own deferred
            normalisation. All float32, bfloat16 or float16, (N, H, W, C).
        packed: from ``pack``, for the sources' dtype and channels.
        bias: (Cout,), floating point, or None.
        out: (N, H', W', Cout) view of any of the three dtypes, channel stride 1; its height and width say how
            far the padding at the bottom and at the right goes, and the output padding if transposed.
        stride, padding: padding at the top and at the left; transposed, both as given to ``pack``.
        pad_mode: ``"zeros"``, ``"reflect"`` or ``"replicate"``; padding follows the sources' activations.
        act, slope: as for ``p2pfast.ops.conv.conv``.
        residual: (N, H', W', Cout), added before the activation.
        partial: (N, parts, 2, Cout) float32, contiguous: is given mean and M2 about it of each part's float32
            values, bias included, before residual, activation and rounding; parts from ``parts``.
        count: (parts,) float32: is given the pixels of each part.
        config: None: that of ``default_config``.
        precision: of float32 products: ``"tf32"``, ``"tf32x3"`` or ``"ieee"``; None: as
            ``torch.backends.cudnn.allow_tf32`` says.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: a device of compute capability below 8.0.
    """
    _check(sources, packed, bias, out, stride, padding, pad_mode, residual, partial, count)
    pad = padding_of(sources, packed, out, stride, padding, pad_mode)
    if config is None:
        config = default_config(packed, sources[0].tensor, out)
    if partial is not None and count is not None:
        expected = parts(packed, out.shape[1], out.shape[2], config)
        shape = out.shape[0], expected, 2, packed.out_channels
        for name, t, wanted in (("partial", partial, shape), ("count", count, (expected,))):
            check_tensor(name, t, (torch.float32,))
            if t.shape != wanted or not t.is_contiguous():
                raise ValueError(
                    f"{name} has shape {tuple(t.shape)} and strides {t.stride()}; {wanted}, contiguous, is "
                    "expected"
                )
    if precision is None:
        precision = "tf32" if allows_tf32() else "ieee"
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if sources[0].tensor.dtype != torch.float32:
        precision = "tf32"  # means nothing: one kernel for all
    launch = build(
        sources,
        packed,
        bias,
        out,
        stride=stride,
        padding=padding,
        pad=pad,
        act=act,
        slope=slope,
        residual=residual,
        partial=partial,
        count=count,
        config=config,
        precision=precision,
    )
    with on_device(out):
        launch.run()
