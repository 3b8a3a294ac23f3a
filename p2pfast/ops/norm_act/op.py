from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.activation import activation_code
from p2pfast.ops.conv.source import address
from p2pfast.ops.gpu import require_triton
from p2pfast.ops.norm.op import check_arguments
from p2pfast.ops.norm_act.reference import norm_act_reference
from p2pfast.ops.pages import empty_like
from p2pfast.ops.pointwise import is_direct
from p2pfast.ops.threads import use_torch_threads
from p2pfast.ops.twice import differentiable_gradients

_DTYPES = (torch.float32, torch.bfloat16)
_NATIVE_ACTS = ("none", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu")


def is_native(x: Tensor, act: str) -> bool:
    """Whether the native kernels take this tensor and activation."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and act in _NATIVE_ACTS


def is_fused(x: Tensor, act: str) -> bool:
    """Whether ``norm_act`` runs kernels of this package: native ones, or Triton's on a GPU."""
    return is_native(x, act) or (x.is_cuda and x.dtype in (*_DTYPES, torch.float16))


def dense(x: Tensor) -> Tensor:
    """``x`` (N, C, H, W) itself if it is contiguous in either memory format, else a contiguous copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def is_planes(x: Tensor) -> bool:
    """Whether a dense tensor is read plane by plane; of one that is contiguous both ways, either is right."""
    return x.is_contiguous()


def like(t: Tensor, x: Tensor) -> Tensor:
    """``t`` in the memory format of the dense ``x``."""
    return t.contiguous(memory_format=torch.contiguous_format if is_planes(x) else torch.channels_last)


def _check(x: Tensor, *rest: Any) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; a floating-point dtype is expected")
    check_arguments(x, *rest)


def norm_act(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalisation, affine, residual addition and activation for training.

    ``act((x - mean) / sqrt(variance + eps) * weight + bias + residual)`` in float32 whatever x's dtype. The
    backward pass keeps x and the statistics (and the residual where an activation follows it), reads x and
    the incoming gradient, and writes x's gradient; the output is not kept. Sums have a fixed order. On the
    CPU float16 and gelu, and everywhere float64, run ``norm_act_reference``, and so does a backward pass that
    is to be differentiated again.

    Args:
        x: (N, C, H, W), floating point; contiguous and channels_last are read as they are.
        weight, bias: (C,), floating point, or None.
        mean, variance: frozen statistics, (C,) or (N, C), the variance biased; they get no gradient. None:
            x's own.
        over_batch: one mean for the whole batch (BatchNorm) instead of one an image.
        eps: added to the variance.
        act, slope: as for ``p2pfast.ops.conv.conv``.
        residual: like x, added before the activation; or None.

    Returns:
        y (N, C, H, W) in x's dtype and memory format; the mean and the biased variance that were used,
        float32, (C,) or (N, C), without gradients.

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: shapes that do not fit, an empty batch, tensors on different devices, or statistics of a
            single value.
        RuntimeError: on a GPU without Triton, or older than compute capability 8.0.
    """
    _check(x, weight, bias, mean, variance, over_batch, eps, act, residual)
    if is_fused(x, act):
        # A registered operator takes longer to call than a small map takes to normalise.
        given = [t for t in (x, weight, bias, mean, variance, residual) if t is not None]
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        run = run_norm_act if plain and is_direct(given) else _norm_act
        y, used_mean, used_variance = run(
            x, weight, bias, mean, variance, over_batch, eps, act, slope, residual
        )
        return y, used_mean, used_variance
    y = norm_act_reference(x, weight, bias, mean, variance, over_batch, eps, act, slope, residual)
    if mean is None or variance is None:
        variance, mean = torch.var_mean(x.detach().float(), (0, 2, 3) if over_batch else (2, 3), correction=0)
    return y, mean.detach().float(), variance.detach().float()


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def _triton() -> ModuleType:
    require_triton()
    from p2pfast.ops.norm_act import triton as kernels

    return kernels


def _statistics_shape(x: Tensor, mean: Tensor | None, over_batch: bool) -> tuple[int, ...]:
    if mean is not None:
        return tuple(mean.shape)
    return (x.shape[1],) if over_batch else (x.shape[0], x.shape[1])


def run_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``norm_act`` without checks and derivatives, of what ``is_fused`` takes, at the least cost a call."""
    if x.device.type != "cpu":
        return _triton().forward(x, weight, bias, mean, variance, over_batch, eps, act, slope, residual)
    x = dense(x)
    frozen = mean is not None and variance is not None
    y = empty_like(x)
    if mean is not None and variance is not None:
        mean, variance = (
            torch.empty(t.shape, dtype=torch.float32, device="cpu").copy_(t.detach())
            for t in (mean, variance)
        )
    else:
        shape = _statistics_shape(x, None, over_batch)
        mean, variance = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    _run(False, x, weight, bias, mean, variance, frozen, eps, act, slope, residual, out=y.data_ptr())
    return y, mean, variance


def _run(
    backward: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    **addresses: int,
) -> None:
    planes = is_planes(x)
    # Named, so that copies live until the kernel has run.
    residual = None if residual is None else like(residual, x)
    weight, bias = _float(weight), _float(bias)
    images, channels, height, width = x.shape
    use_torch_threads()
    _C.norm_act(
        backward=backward,
        x=x.data_ptr(),
        residual=address(residual),
        dtype=int(x.dtype == torch.bfloat16),
        planes=planes,
        images=images,
        channels=channels,
        pixels=height * width,
        over_batch=mean.dim() == 1,
        frozen=frozen,
        eps=eps,
        weight=address(weight),
        bias=address(bias),
        mean=mean.data_ptr(),
        variance=variance.data_ptr(),
        act=activation_code(act),
        slope=slope,
        **addresses,
    )


_norm_act = torch.library.custom_op(
    "p2pfast::norm_act", run_norm_act, mutates_args=(), device_types=("cpu", "cuda")
)


@_norm_act.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    over_batch: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = _statistics_shape(x, mean, over_batch)
    used_mean, used_variance = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), used_mean, used_variance


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    of_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of ``norm_act`` for x, weight, bias (both (C,) float32) and residual, in one fused pass.

    Args:
        grad: of the output.
        x: what was normalised; float32 or bfloat16, on a GPU float16 too.
        mean, variance: what ``norm_act`` returned.
        frozen: they were given to it.
        residual: may be None where act is ``"none"``.
        of_residual: whether its gradient is wanted where an activation follows it; where none does, it is
            ``grad``.
    """
    wanted = of_residual and act != "none"
    given = [t for t in (grad, x, weight, bias, mean, variance, residual) if t is not None]
    backward = _run_backward if is_direct(given) else _norm_act_backward
    dx, dweight, dbias, dresidual = backward(
        grad, x, weight, bias, mean, variance, frozen, eps, act, slope, residual, wanted
    )
    if of_residual and act == "none":
        return dx, dweight, dbias, grad
    return dx, dweight, dbias, dresidual if of_residual else None


def _run_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    of_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.device.type != "cpu":
        return _triton().backward(
            grad, x, weight, bias, mean, variance, frozen, eps, act, slope, residual, of_residual
        )
    x = dense(x)
    grad = like(grad.to(x.dtype), x)
    residual = None if act == "none" else residual
    dx = empty_like(x)
    dresidual = empty_like(x) if of_residual else x.new_empty(0)
    dweight, dbias = (torch.empty(x.shape[1], dtype=torch.float32, device="cpu") for _ in range(2))
    _run(
        True,
        *(x, weight, bias, mean.contiguous(), variance.contiguous(), frozen, eps, act, slope, residual),
        dy=grad.data_ptr(),
        out=dx.data_ptr(),
        dresidual=dresidual.data_ptr() if of_residual else 0,
        dweight=dweight.data_ptr(),
        dbias=dbias.data_ptr(),
    )
    return dx, dweight, dbias, dresidual


_norm_act_backward = torch.library.custom_op(
    "p2pfast::norm_act_backward", _run_backward, mutates_args=(), device_types=("cpu", "cuda")
)


@_norm_act_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    frozen: bool,
    eps: float,
    act: str,
    slope: float,
    residual: Tensor | None,
    of_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense(x)
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), dweight, dbias, torch.empty_like(x) if of_residual else x.new_empty(0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mean, variance, *ctx.numbers, residual = inputs
    _, used_mean, used_variance = output
    ctx.frozen = mean is not None
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(used_mean, used_variance)
    ctx.set_materialize_grads(False)
    kept = residual if ctx.numbers[2] != "none" else None
    ctx.save_for_backward(x, weight, bias, used_mean, used_variance, kept)


def _backward(ctx: Any, grad: Tensor | None, *_: object) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 10
    x, weight, bias, mean, variance, residual = ctx.saved_tensors
    over_batch, eps, act, slope = ctx.numbers
    of_residual = ctx.has_residual and ctx.needs_input_grad[9]
    if torch.is_grad_enabled():
        frozen_mean, frozen_variance = (mean, variance) if ctx.frozen else (None, None)

        def reference(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            statistics = frozen_mean, frozen_variance
            return norm_act_reference(x, weight, bias, *statistics, over_batch, eps, act, slope, residual)

        *given, given_residual = differentiable_gradients(reference, [x, weight, bias, residual], grad)
        return *given, *(None,) * 6, grad if of_residual and residual is None else given_residual
    dx, dweight, dbias, dresidual = norm_act_backward(
        grad, x, weight, bias, mean, variance, ctx.frozen, eps, act, slope, residual, of_residual
    )
    of_weight = None if weight is None else dweight.to(weight.dtype)
    of_bias = None if bias is None else dbias.to(bias.dtype)
    return dx, of_weight, of_bias, *(None,) * 6, dresidual


torch.library.register_autograd("p2pfast::norm_act", _backward, setup_context=_setup)
