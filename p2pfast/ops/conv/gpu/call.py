"""One convolution on a GPU: checks of the arguments, and the launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2pfast.ops.conv.gpu.choice import default_config
from p2pfast.ops.conv.gpu.configs import Config, parts
from p2pfast.ops.conv.gpu.launch import launches, padding_of
from p2pfast.ops.conv.gpu.pack import Packed
from p2pfast.ops.conv.gpu.source import Source, check_source, check_view
from p2pfast.ops.gpu import allows_tf32, check_tensor, on_device

PADDING_MODES = ("zeros", "reflect", "replicate")
PRECISIONS = ("tf32", "tf32x3", "ieee")
_LARGEST = 2**31 - 1024  # pixels of an image: row numbers of the last tile must fit as well


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
    factor: Tensor | None,
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
    if stride != packed.stride:
        raise ValueError(f"stride is {stride}; the weights were packed for {packed.stride}")
    if packed.transposed:
        if tuple(padding) != packed.given:
            raise ValueError(f"padding is {padding}; the weights were packed for {packed.given}")
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
    if factor is not None:
        check_tensor("factor", factor, (torch.float32,))
        if factor.shape != (packed.out_channels,) or not factor.is_contiguous():
            raise ValueError(
                f"factor has shape {tuple(factor.shape)} and strides {factor.stride()}; "
                f"({packed.out_channels},), contiguous, is expected"
            )
    if (partial is None) != (count is None):
        raise ValueError("partial and count go together; one of them is None")
    if packed.layout == "rows":
        if -(-out.shape[1] // packed.rows) > 65535:
            raise ValueError(f"out has shape {tuple(out.shape)}: too high for the weights' layout 'rows'")
    others: dict[str, Tensor | None] = {
        "factor": factor,
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
    factor: Tensor | None = None,
    residual: Source | None = None,
    partial: Tensor | None = None,
    count: Tensor | None = None,
    config: Config | None = None,
    precision: str | None = None,
) -> None:
    """A convolution with everything around it, written into ``out`` on the current stream.

    ``out = act(conv(pad(cat(sources))) * factor + bias + residual)``; sums are float32 whatever the stored
    dtype.

    Args:
        sources: one, or two that stand for their concatenation along the channels; each does its own deferred
            normalisation. All float32, bfloat16 or float16, (N, H, W, C).
        packed: from ``pack``, for the sources' dtype and channels.
        bias: (Cout,), floating point, or None.
        out: (N, H', W', Cout) view of any of the three dtypes, channel stride 1; its height and width say how
            far the padding at the bottom and at the right goes, and the output padding if transposed.
        stride: as given to ``pack``.
        padding: at the top and at the left; transposed, as given to ``pack``.
        pad_mode: ``"zeros"``, ``"reflect"`` or ``"replicate"``; padding follows the sources' activations.
        act, slope: as for ``p2pfast.ops.conv.conv``.
        factor: (Cout,) float32, or None: with ``bias``, a normalisation by stored statistics.
        residual: (N, H', W', Cout), added before the activation.
        partial: (N, parts, 2, Cout) float32, contiguous: is given mean and M2 about it of each part's float32
            values, factor and bias included, before residual, activation and rounding; parts from ``parts``.
        count: (parts,) float32: is given the pixels of each part.
        config: None: that of ``default_config``.
        precision: of float32 products: ``"tf32"``, ``"tf32x3"`` or ``"ieee"``; None: as
            ``torch.backends.cudnn.allow_tf32`` says.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
        RuntimeError: a device of compute capability below 8.0.
    """
    _check(sources, packed, bias, out, stride, padding, pad_mode, residual, partial, count, factor)
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
    steps = launches(
        sources,
        packed,
        bias,
        out,
        factor=factor,
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
        for launch in steps:
            launch.run()
