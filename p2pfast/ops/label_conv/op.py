from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.cuda import require_kernel
from p2pfast.ops.label_conv.cuda import LabelConvGeometry, convolve_labels, pack_tables
from p2pfast.ops.threads import use_torch_threads

_INTEGERS = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)
_PADDING_MODES = ("reflect", "zeros")
_OUTPUTS = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
_MAX_KERNEL = 7


def _check(
    labels: Tensor,
    edges: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    pool_levels: int,
    padding_mode: str,
    dtype: torch.dtype,
) -> tuple[int, int, int, int]:
    """Checks everything but the values; returns the output's shape (N, Cout, H', W')."""
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels has dtype {labels.dtype}; labels are integers, best uint8")
    if labels.dim() != 3:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; (images, height, width) is expected")
    if edges is not None:
        if edges.dtype not in (torch.uint8, torch.bool):
            raise TypeError(f"edges has dtype {edges.dtype}; uint8 is expected, as instance_edges returns it")
        if edges.shape != labels.shape:
            raise ValueError(
                f"edges has shape {tuple(edges.shape)}, labels {tuple(labels.shape)}; they must be equal"
            )
    if not 1 <= num_classes <= 256:
        raise ValueError(f"num_classes is {num_classes}; it must be from 1 to 256")
    if not 0 <= pool_levels <= 8:
        raise ValueError(f"pool_levels is {pool_levels}; it must be from 0 to 8")
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode is {padding_mode!r}; choose one of {', '.join(_PADDING_MODES)}")
    outputs = _OUTPUTS.get(labels.device.type, _OUTPUTS["cuda"])
    if dtype not in outputs:
        raise TypeError(f"dtype is {dtype}; choose {' or '.join(map(str, outputs))}")
    for name, t in (("edges", edges), ("weight", weight), ("bias", bias)):
        if t is not None and t.device != labels.device:
            raise ValueError(f"{name} is on {t.device}, labels on {labels.device}; move one of them")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; a floating-point dtype is expected")
    channels = num_classes + (edges is not None)
    kernel = weight.shape[-1] if weight.dim() == 4 else 0
    if weight.dim() != 4 or weight.shape[1] != channels or weight.shape[2] != kernel:
        parts = f"num_classes ({num_classes})" + ("" if edges is None else " + 1 for the edges")
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; (out_channels, {channels}, kernel, kernel) is "
            f"expected: {channels} is {parts}"
        )
    if kernel % 2 == 0 or kernel > _MAX_KERNEL:
        raise ValueError(f"weight has a kernel of {kernel}; it must be odd and at most {_MAX_KERNEL}")
    cout = weight.shape[0]
    if cout == 0:
        raise ValueError("weight has no output channels; at least one is expected")
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(f"bias has dtype {bias.dtype}; a floating-point dtype is expected")
        if bias.shape != (cout,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; ({cout},) is expected")
    height, width = labels.shape[1:]
    if height == 0 or width == 0:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; height and width must be at least 1")
    for _ in range(pool_levels):
        height, width = (height + 1) // 2, (width + 1) // 2
    padding = kernel // 2
    if padding_mode == "reflect" and min(height, width) <= padding:
        raise ValueError(
            f"the {'pooled ' if pool_levels else ''}map of {height}x{width} is too small for reflection "
            f"padding of {padding}: both sides must be larger; use padding_mode='zeros' or a larger map"
        )
    return labels.shape[0], cout, height, width


def _range(labels: Tensor) -> tuple[int, int]:
    if labels.numel() == 0:
        return 0, 0
    if labels.dtype == torch.uint8 and labels.device.type == "cpu":
        return 0, _C.label_conv_max_label(labels=labels.data_ptr(), count=labels.numel())
    if labels.dtype in (torch.uint32, torch.uint64):  # PyTorch has no minimum for these
        labels = labels.to(torch.int64)
    elif labels.dtype == torch.uint16:
        labels = labels.to(torch.int32)
    low, high = torch.stack(labels.aminmax()).tolist()
    return low, high


def _check_range(labels: Tensor, num_classes: int) -> None:
    low, high = _range(labels)
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels has values from {low} to {high}; with num_classes={num_classes} they must be from 0 to "
            f"{num_classes - 1}: map other labels to a class first, or raise num_classes"
        )


@torch.library.custom_op("p2pfast::label_conv", mutates_args=(), device_types="cpu")
def label_conv(
    labels: Tensor,
    edges: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    pool_levels: int = 0,
    padding_mode: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The first convolution of a label-to-image generator, straight from the label map.

    Equal to ``conv2d(pad(x), weight, bias)`` with ``x = cat([one_hot(labels), edges], 1)``, halved
    ``pool_levels`` times by ``AvgPool2d(3, stride=2, padding=1, count_include_pad=False)``; see
    ``label_conv_reference`` and this folder's README. The one-hot tensor is never built, and weights of
    labels that do not occur are never looked at (not even if they are NaN).

    For inference: the result has no gradient, and a backward pass through it raises. On NVIDIA GPUs the check
    of the labels' range waits for the device; while a CUDA graph is captured it is left out, and a window
    that sees a label outside the range becomes NaN.

    Args:
        labels: (N, H, W) of any integer dtype, uint8 being the quickest; values in [0, num_classes).
        edges: (N, H, W) uint8 or bool, nonzero on an edge (``instance_edges``), or None.
        weight: (Cout, num_classes, K, K), or num_classes + 1 channels with edges; K is 1, 3, 5 or 7;
            floating point, used as float32.
        bias: (Cout,) or None.
        num_classes: at most 256.
        pool_levels: how often the input is halved before the convolution.
        padding_mode: ``"reflect"`` or ``"zeros"``, of K // 2 pixels.
        dtype: of the result, float32 or bfloat16, on CUDA also float16 (rounded from float32 sums).

    Returns:
        (N, Cout, H', W') in channels_last memory format, H' = ceil(H / 2 ** pool_levels), W' alike.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape that does not fit, labels outside [0, num_classes), a (pooled) map that is
            not larger than the reflection padding, or tensors on different devices.
    """
    shape = _check(labels, edges, weight, bias, num_classes, pool_levels, padding_mode, dtype)
    batch, cout, height, width = shape
    use_torch_threads()
    labels = labels.contiguous()
    _check_range(labels, num_classes)
    labels = labels.to(torch.uint8)
    if batch == 0:
        return torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    edges = None if edges is None else edges.contiguous()
    weight = weight.detach().to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()

    call: Any = _C.LabelConvShape(
        batch=batch,
        height=labels.shape[1],
        width=labels.shape[2],
        classes=num_classes,
        has_edges=edges is not None,
        cout=cout,
        kernel=weight.shape[-1],
        pool_levels=pool_levels,
        reflect=padding_mode == "reflect",
    )
    layout = _C.LabelConvLayout(call)
    packed = torch.empty(layout.packed_floats, dtype=torch.float32, device="cpu")
    _C.label_conv_pack(
        call,
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        packed=packed.data_ptr(),
    )
    # PyTorch aligns CPU memory to 64 bytes, all that the kernel asks for.
    scratch = torch.empty(layout.scratch_bytes, dtype=torch.uint8, device="cpu")
    out = torch.empty((batch, height, width, layout.stride), dtype=dtype, device="cpu")
    _C.label_conv(
        call,
        labels=labels.data_ptr(),
        edges=0 if edges is None else edges.data_ptr(),
        packed=packed.data_ptr(),
        out=out.data_ptr(),
        out_bf16=dtype == torch.bfloat16,
        scratch=scratch.data_ptr(),
    )
    if cout == layout.stride:
        return out.permute(0, 3, 1, 2)
    result = torch.empty(shape, dtype=dtype, device="cpu", memory_format=torch.channels_last)
    return result.copy_(out[..., :cout].permute(0, 3, 1, 2))


@label_conv.register_kernel("cuda")
def _on_cuda(
    labels: Tensor,
    edges: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    pool_levels: int = 0,
    padding_mode: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    require_kernel("label_conv", "label_conv", "the labels")
    _check(labels, edges, weight, bias, num_classes, pool_levels, padding_mode, dtype)
    labels = labels.contiguous()
    if not torch.cuda.is_current_stream_capturing():
        _check_range(labels, num_classes)
    geometry = LabelConvGeometry(num_classes, weight.shape[0], weight.shape[-1], pool_levels, padding_mode)
    tables = pack_tables(weight, bias, geometry, edges is not None)
    return convolve_labels(labels, edges, None, tables, geometry, dtype=dtype).image


@label_conv.register_fake
def _(
    labels: Tensor,
    edges: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    num_classes: int,
    pool_levels: int = 0,
    padding_mode: str = "reflect",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    shape = _check(labels, edges, weight, bias, num_classes, pool_levels, padding_mode, dtype)
    return torch.empty(shape, dtype=dtype, device=labels.device, memory_format=torch.channels_last)
