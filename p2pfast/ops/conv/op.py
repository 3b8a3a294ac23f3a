from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.conv.prepared import Prepared, prepared, slot
from p2pfast.ops.conv.source import (
    PADDING_MODES,
    address,
    describe_geometry,
    describe_output,
    describe_source,
    readable,
)
from p2pfast.ops.gpu import require_triton
from p2pfast.ops.pages import empty

# In the order of the native enumerations (csrc/cpu/conv.h).
ALGORITHMS = ("direct", "winograd", "winograd2", "streamed", "streamed2", "thin", "winograd6")
_DTYPES = (torch.float32, torch.bfloat16)
_CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 2**31 - 1

# Tiles of a block, large enough for the products to run at full speed with their operands in the L2 cache.
_BLOCK = {"winograd": 48, "winograd6": 36, "winograd2": 96, "streamed": 256, "streamed2": 256}


def _check_numbers(
    stride: int, padding: int, output_padding: int, transposed: bool, dilation: int, groups: int
) -> None:
    if groups != 1:
        raise ValueError(f"groups is {groups}; grouped convolutions are not supported, only groups=1")
    if dilation != 1:
        raise ValueError(f"dilation is {dilation}; dilated convolutions are not supported, only dilation=1")
    if not 1 <= stride <= _LARGEST:
        raise ValueError(f"stride is {stride}; it must be at least 1")
    if not 0 <= padding <= _LARGEST:
        raise ValueError(f"padding is {padding}; it must not be negative")
    if not 0 <= output_padding < (stride if transposed else 1):
        raise ValueError(
            f"output_padding is {output_padding}; it must be 0, or below the stride ({stride}) of a "
            "transposed convolution"
        )


def _check_inputs(x: Sequence[Tensor], weight: Tensor, bias: Tensor | None, transposed: bool) -> int:
    """Checks dtypes, devices and shapes; returns the number of input channels."""
    if len(x) not in (1, 2):
        raise ValueError(f"x has {len(x)} tensors; 1 or 2 are supported")
    first = x[0]
    dtypes = _CUDA_DTYPES if first.is_cuda else _DTYPES
    expected = f"{', '.join(str(d) for d in dtypes[:-1])} or {dtypes[-1]} is expected"
    for t in x:
        if t.dtype not in dtypes:
            raise TypeError(f"x has dtype {t.dtype}; {expected}")
        if t.dtype != first.dtype:
            raise TypeError(f"x has dtypes {first.dtype} and {t.dtype}; they must be equal")
        if t.dim() != 4:
            raise ValueError(f"x has shape {tuple(t.shape)}; (images, channels, height, width) is expected")
        if t.shape[0] != first.shape[0] or t.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"x has shapes {tuple(first.shape)} and {tuple(t.shape)}; only their channels may differ"
            )
        if t.numel() == 0:
            what = "an empty batch" if t.shape[0] == 0 else "an empty tensor"
            raise ValueError(f"x has shape {tuple(t.shape)}: {what} has no convolution")
    if weight.dtype not in dtypes:
        raise TypeError(f"weight has dtype {weight.dtype}; {expected}")
    channels = sum(t.shape[1] for t in x)
    if weight.dim() != 4 or weight.numel() == 0 or weight.shape[0 if transposed else 1] != channels:
        layout = f"({channels}, out_channels" if transposed else f"(out_channels, {channels}"
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; {layout}, kernel_h, kernel_w) is expected for "
            f"{channels} input channels"
        )
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}; a floating-point dtype is expected")
        out_channels = weight.shape[1 if transposed else 0]
        if bias.shape != (out_channels,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; ({out_channels},) is expected")
    for name, other in (("x", x[-1]), ("weight", weight), ("bias", bias)):
        if other is not None and other.device != first.device:
            raise ValueError(f"{name} is on {other.device}, x on {first.device}; they must be on one device")
    return channels


def _check_norm(x: Tensor, scale: Tensor | None, shift: Tensor | None, channels: int) -> None:
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift go together; one of them is None")
    for name, t in (("scale", scale), ("shift", shift)):
        if t is None:
            continue
        if t.dtype != torch.float32:
            raise TypeError(f"{name} has dtype {t.dtype}; torch.float32 is expected")
        if t.shape not in ((channels,), (x.shape[0], channels)):
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; ({channels},) or ({x.shape[0]}, {channels}) is expected"
            )
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; they must be on one device")
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}, shift {tuple(shift.shape)}; they must be equal"
        )


def _out_shape(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
    padding_mode: str,
) -> tuple[int, int, int, int]:
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode is {padding_mode!r}; choose one of {', '.join(PADDING_MODES)}")
    height, width = x.shape[2:]
    kernel = weight.shape[2:]
    if transposed:
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode is {padding_mode!r}; a transposed convolution has only 'zeros'")
        if padding >= min(kernel):
            raise ValueError(
                f"padding is {padding}; it must be below the transposed kernel's size {min(kernel)}"
            )
        sizes = [
            (s - 1) * stride - 2 * padding + k + output_padding
            for s, k in zip((height, width), kernel, strict=True)
        ]
    else:
        if padding_mode == "reflect" and padding >= min(height, width):
            raise ValueError(
                f"padding is {padding}; reflection needs it below the input's height and width, "
                f"here {height}x{width}"
            )
        sizes = [(s + 2 * padding - k) // stride + 1 for s, k in zip((height, width), kernel, strict=True)]
    if min(sizes) < 1:
        raise ValueError(
            f"x of {height}x{width} with padding {padding} and a kernel of {kernel[0]}x{kernel[1]} would "
            f"give an output of {sizes[0]}x{sizes[1]}; use a larger input or another padding"
        )
    if max(sizes) > _LARGEST:
        raise ValueError(f"the output of {sizes[0]}x{sizes[1]} is too large; reduce padding ({padding})")
    return x.shape[0], weight.shape[1 if transposed else 0], sizes[0], sizes[1]


def _choose(algorithm: str, call: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The algorithm's number and what ``conv_info`` says of it; sets the block size in ``call``."""

    def info(name: str) -> dict[str, Any]:
        call["block"] = _BLOCK.get(name, 0)
        result: dict[str, Any] = _C.conv_info(ALGORITHMS.index(name), call)
        return result

    if algorithm != "auto":
        found = info(algorithm)
        if found["refuses"]:
            raise ValueError(
                f"algorithm is {algorithm!r}, which cannot do this convolution: {found['refuses']}; "
                "use 'auto' or 'direct'"
            )
        return ALGORITHMS.index(algorithm), found
    channels = sum(source["channels"] for source in call["sources"])
    outputs = call["out_height"] * call["out_width"]
    candidates = ["thin"] if call["out_channels"] <= 4 else []
    if min(channels, call["out_channels"]) >= 16:
        # Few tiles do not repay a pass over the transformed weights, 2.25 to 4 times the weights' size.
        candidates.append("winograd" if call["images"] * outputs >= 2048 else "streamed")
    for name in [*candidates, "direct"]:
        found = info(name)
        if not found["refuses"]:
            return ALGORITHMS.index(name), found
    raise ValueError(f"no algorithm can do this convolution: {found['refuses']}")


def conv(
    x: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
    algorithm: str = "auto",
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution with the deferred normalisation of its input, its padding and its activation in one pass.

    ``act(conv(pad(input_act(scale * cat(x) + shift)), weight) + bias)``; see ``conv_reference`` and this
    folder's README. Sums, normalisation and activations are float32. Weights are packed at every call; a
    plan (``p2pfast.optimize``) packs them once. Differentiable, also twice (``p2pfast.ops.gradients``).
    On CPUs, and through Triton on NVIDIA GPUs of compute capability 8.0 and later; there float32 operands are
    rounded to TensorFloat-32 where ``torch.backends.cudnn.allow_tf32`` is set, as in PyTorch's convolutions.

    Args:
        x: (N, C, H, W), float32 or bfloat16 (on GPUs also float16), read in place as contiguous (on GPUs
            copied) or channels_last; or two of them that are used as if concatenated along the channels.
        weight: (Cout, C, Kh, Kw), (C, Cout, Kh, Kw) if transposed; of a dtype that x may have; on CPUs sides
            of at most 16.
        bias: (Cout,), floating point, or None.
        stride, padding, output_padding, transposed: as for ``torch.nn.functional.conv2d`` and
            ``conv_transpose2d``, the same in both directions.
        padding_mode: ``"zeros"``, ``"reflect"`` or ``"replicate"``. Padding happens after ``input_act``.
        scale, shift: (C,) or (N, C) float32, applied to the input; or None.
        input_act: ``"none"``, ``"relu"`` or ``"leaky_relu"`` with ``input_slope``.
        act: ``"none"``, ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"``, ``"elu"``, ``"silu"`` or
            ``"gelu"``; ``slope`` is leaky_relu's negative slope and elu's alpha.
        algorithm: ``"auto"``, ``"direct"``, ``"winograd"``, ``"winograd2"``, ``"streamed"``, ``"streamed2"``,
            ``"winograd6"`` or ``"thin"``; on GPUs only ``"auto"``.
        dilation, groups: only 1.

    Returns:
        (N, Cout, H', W') of x's dtype, in channels_last memory format.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit, an empty batch, a reflection as large as the image, tensors on
            different devices, or an algorithm that cannot do this convolution.
        RuntimeError: on a GPU, no Triton, or a compute capability below 8.0.
    """
    sources = [x] if isinstance(x, Tensor) else list(x)
    result: Tensor = _conv(
        sources,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        transposed,
        padding_mode,
        scale,
        shift,
        input_act,
        input_slope,
        act,
        slope,
        algorithm,
        dilation,
        groups,
    )
    return result


def _check(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    output_padding: int,
    transposed: bool,
    padding_mode: str,
    scale: Tensor | None,
    shift: Tensor | None,
    input_act: str,
    act: str,
    algorithm: str,
    dilation: int,
    groups: int,
) -> tuple[int, int, int, int]:
    """Checks all that can be checked without the values; returns the output's shape."""
    _check_numbers(stride, padding, output_padding, transposed, dilation, groups)
    channels = _check_inputs(x, weight, bias, transposed)
    _check_norm(x[0], scale, shift, channels)
    activation_code(input_act, "input_act")
    activation_code(act)
    if algorithm != "auto" and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm is {algorithm!r}; choose one of auto, {', '.join(ALGORITHMS)}")
    if algorithm != "auto" and x[0].is_cuda:
        raise ValueError(f"algorithm is {algorithm!r}, one of the CPU's; on a GPU choose 'auto'")
    return _out_shape(x[0], weight, stride, padding, output_padding, transposed, padding_mode)


def run_conv(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int, int, int],
    stride: int,
    padding: int,
    transposed: bool = False,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
    algorithm: str = "auto",
    turned: bool = False,
    pairs: bool = False,
) -> Tensor:
    """``conv`` without checks and derivatives, into a new tensor of ``shape``.

    Args:
        turned: the weight's first two axes are exchanged, and its kernel is turned by 180°.
        pairs: products are of bfloat16 pairs; factors are rounded to bfloat16.
    """
    # Named, so that copies live until the kernel has run.
    inputs = [readable(t) for t in x]
    weight = weight.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    scale = None if scale is None else scale.contiguous()
    shift = None if shift is None else shift.contiguous()
    out = empty(shape, x[0].dtype, torch.channels_last)
    common = (
        *(shape, stride, padding, transposed, padding_mode),
        *(input_act, input_slope, act, slope, algorithm, turned, pairs),
    )
    layout = tuple((t.shape, t.stride(), t.dtype) for t in inputs)
    deferred = None if scale is None else scale.shape
    key = ("conv", layout, weight.shape, weight.dtype, bias is None, deferred, *common)
    addresses = (
        *(inputs[0].data_ptr(), inputs[-1].data_ptr(), address(scale), address(shift)),
        *(weight.data_ptr(), address(bias), out.data_ptr()),
    )
    prepared(key, lambda: _prepare(inputs, weight, bias, scale, shift, out, *common)).run(addresses)
    return out


def _prepare(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
    shape: tuple[int, int, int, int],
    stride: int,
    padding: int,
    transposed: bool,
    padding_mode: str,
    input_act: str,
    input_slope: float,
    act: str,
    slope: float,
    algorithm: str,
    turned: bool,
    pairs: bool,
) -> Prepared:
    """``run_conv``'s call, of which the tensors' addresses are the slots."""
    kernel_h, kernel_w = weight.shape[2:]
    taps = kernel_h * kernel_w
    inputs_first = transposed != turned
    act_in, first, sources = activation_code(input_act, "input_act"), 0, []
    for i, t in enumerate(inputs):
        source = describe_source(t, scale, shift, first, act_in, input_slope) | {"data": slot(i)}
        if "scale" in source:
            source |= {"scale": slot(2, 4 * first), "shift": slot(3, 4 * first)}
        sources.append(source)
        first += t.shape[1]
    call: dict[str, Any] = {
        "sources": sources,
        **describe_geometry(inputs[0], shape, (kernel_h, kernel_w), stride, padding, padding_mode),
        "transposed": transposed,
        "weight": slot(4),
        "weight_dtype": int(weight.dtype == torch.bfloat16),
        "weight_out_stride": taps if inputs_first else taps * weight.shape[1],
        "weight_in_stride": taps * weight.shape[1] if inputs_first else taps,
        "weight_turned": turned,
        "packed_dtype": 2 if pairs else 0,
        "bias": 0 if bias is None else slot(5),
        "out": describe_output(out) | {"data": slot(6)},
        "act": activation_code(act),
        "slope": slope,
    }
    number, info = _choose(algorithm, call)
    program, needs = _C.Program(), [info["workspace_bytes"]]
    # Weights that are only sorted beforehand are better sorted on the way, if they are used once.
    if info["packed_floats"] and not ALGORITHMS[number].startswith("streamed"):
        program.pack(number, call, slot(8))
        call["packed"] = slot(8)
        needs.append(4 * info["packed_floats"])
    program.conv(number, call | {"workspace": slot(7)})
    return Prepared(program, tuple(needs))


@torch.library.custom_op("p2pfast::conv", mutates_args=(), device_types=("cpu", "cuda"))
def _conv(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
    algorithm: str = "auto",
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    shape = _check(
        x,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        transposed,
        padding_mode,
        scale,
        shift,
        input_act,
        act,
        algorithm,
        dilation,
        groups,
    )
    common = (
        *(x, weight, bias, shape, stride, padding, transposed, padding_mode),
        *(scale, shift, input_act, input_slope, act, slope),
    )
    if x[0].device.type == "cuda":
        require_triton()
        from p2pfast.ops.conv.gpu.op import run  # imports triton, which a machine without a GPU need not have

        return run(*common)
    return run_conv(*common, algorithm)


@_conv.register_fake
def _(
    x: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    transposed: bool = False,
    padding_mode: str = "zeros",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    input_act: str = "none",
    input_slope: float = 0.0,
    act: str = "none",
    slope: float = 0.0,
    algorithm: str = "auto",
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    shape = _check(
        x,
        weight,
        bias,
        stride,
        padding,
        output_padding,
        transposed,
        padding_mode,
        scale,
        shift,
        input_act,
        act,
        algorithm,
        dilation,
        groups,
    )
    return torch.empty(shape, dtype=x[0].dtype, device=x[0].device, memory_format=torch.channels_last)
