from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.conv.source import describe_output, describe_source, readable
from p2pfast.ops.gpu import require_triton
from p2pfast.ops.threads import use_torch_threads

_DTYPES = (torch.float32, torch.bfloat16)


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    residual: Tensor | None,
) -> None:
    """What every normalisation asks of its arguments but x's dtype; raises TypeError and ValueError."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; (images, channels, height, width) is expected")
    if x.numel() == 0:
        what = "an empty batch" if x.shape[0] == 0 else "an empty tensor"
        raise ValueError(f"x has shape {tuple(x.shape)}: {what} has no statistics")
    images, channels = x.shape[:2]
    if (mean is None) != (variance is None):
        raise ValueError("mean and variance go together; one of them is None")
    for name, t in (("weight", weight), ("bias", bias), ("mean", mean), ("variance", variance)):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"{name} has dtype {t.dtype}; a floating-point dtype is expected")
        batched = name in ("mean", "variance") and t.shape == (images, channels)
        if t.shape != (channels,) and not batched:
            also = f" or ({images}, {channels})" if name in ("mean", "variance") else ""
            raise ValueError(f"{name} has shape {tuple(t.shape)}; ({channels},){also} is expected")
    if mean is not None and variance is not None and mean.shape != variance.shape:
        raise ValueError(f"mean has shape {tuple(mean.shape)}, variance {tuple(variance.shape)}")
    if residual is not None:
        if residual.dtype != x.dtype:
            raise TypeError(f"residual has dtype {residual.dtype}, x {x.dtype}; they must be equal")
        if residual.shape != x.shape:
            raise ValueError(
                f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}; they must be equal"
            )
    tensors = {"weight": weight, "bias": bias, "mean": mean, "variance": variance, "residual": residual}
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}; they must be on one device")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    values = x.shape[2:].numel() * (images if over_batch else 1)
    if mean is None and values == 1:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: the deviation of one value a channel is zero; give mean and "
            "variance, or a larger x"
        )
    activation_code(act)


def _check(x: Tensor, *rest: Any) -> None:
    if x.dtype not in _DTYPES and not (x.dtype == torch.float16 and x.is_cuda):
        expected = ("torch.float16, " if x.is_cuda else "") + "torch.float32 or torch.bfloat16"
        raise TypeError(f"x has dtype {x.dtype}; {expected} is expected")
    check_arguments(x, *rest)


def _statistics(
    x: Tensor, over_batch: bool, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """(2, N, C) scale and shift, lanes past C included, from x's own statistics."""
    images, channels, height, width = x.shape
    stride = -(-channels // 16) * 16
    call = {"source": describe_source(x), "images": images, "height": height, "width": width}
    parts = _C.statistics_parts(call)
    partial = torch.empty((images, parts, 2, stride), dtype=torch.float32, device="cpu")
    count = torch.empty((images, parts), dtype=torch.float32, device="cpu")
    _C.run_statistics({**call, "partial": partial.data_ptr(), "count": count.data_ptr()})
    merged = torch.empty((2, images, stride), dtype=torch.float32, device="cpu")
    _C.run_merge(
        {
            "partial": partial.data_ptr(),
            "count": count.data_ptr(),
            "images": images,
            "channels": channels,
            "parts": parts,
            "over_batch": over_batch,
            "eps": eps,
            "weight": 0 if weight is None else weight.data_ptr(),
            "bias": 0 if bias is None else bias.data_ptr(),
            "scale": merged[0].data_ptr(),
            "shift": merged[1].data_ptr(),
        }
    )
    return merged


def _frozen(mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift, (2, C) or (2, N, C), of given statistics; in float64, rounded once."""
    mean, variance = torch.broadcast_tensors(mean.detach().double(), variance.detach().double())
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.double()
    return torch.stack([scale, shift]).to(torch.float32)


@torch.library.custom_op("p2pfast::instance_norm_act", mutates_args=(), device_types="cpu")
def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    over_batch: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalisation, affine, residual addition and activation: two reads and one write.

    ``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)``, in float32 whatever x's dtype.
    Without ``mean`` and ``variance`` it is InstanceNorm, or BatchNorm on the batch's own statistics with
    ``over_batch``; with them it is either with frozen statistics. Running statistics are not updated.
    Differentiable, also twice (``p2pfast.ops.gradients``).

    Args:
        x: (N, C, H, W), float32 or bfloat16, read in place as contiguous or channels_last. On a GPU float16
            too; read in place as channels_last, with Triton kernels.
        weight, bias: (C,), floating point, or None.
        mean, variance: (C,) or (N, C), floating point; the variance biased, as it is used.
        over_batch: one mean for the whole batch instead of one an image.
        eps: added to the variance.
        act, slope: as for ``p2pfast.ops.conv.conv``.
        residual: like x, added before the activation; or None.

    Returns:
        (N, C, H, W) of x's dtype, in channels_last memory format.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit, an empty batch, tensors on different devices, or statistics of a
            single value.
        RuntimeError: on a GPU without Triton, or older than compute capability 8.0.
    """
    _check(x, weight, bias, mean, variance, over_batch, eps, act, residual)
    images, channels, height, width = x.shape
    source = readable(x)
    weight = None if weight is None else weight.detach().to(torch.float32).contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    use_torch_threads()
    if mean is not None and variance is not None:
        merged = _frozen(mean, variance, eps, weight, bias)
    else:
        merged = _statistics(source, over_batch, eps, weight, bias)
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu", memory_format=torch.channels_last)
    call: dict[str, Any] = {
        "first": describe_source(source, merged[0], merged[1]),
        "images": images,
        "height": height,
        "width": width,
        "out": describe_output(out),
        "act": activation_code(act),
        "slope": slope,
    }
    if residual is not None:
        residual = readable(residual)
        call["second"] = describe_source(residual)
    _C.run_apply(call)
    return out


@instance_norm_act.register_kernel("cuda")
def _(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    over_batch: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    require_triton()
    from p2pfast.ops.norm import triton as kernels

    _check(x, weight, bias, mean, variance, over_batch, eps, act, residual)
    return kernels.instance_norm_act(x, weight, bias, mean, variance, over_batch, eps, act, slope, residual)


@instance_norm_act.register_fake
def _(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    over_batch: bool = False,
    eps: float = 1e-5,
    act: str = "none",
    slope: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    _check(x, weight, bias, mean, variance, over_batch, eps, act, residual)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
