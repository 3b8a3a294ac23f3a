"""What the losses over lists of tensors share: the native call, and their backward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from p2pfast import _C
from p2pfast.ops.cuda import has_kernel, launch, native, require_kernel
from p2pfast.ops.pages import empty_like
from p2pfast.ops.threads import use_torch_threads
from p2pfast.ops.twice import differentiable_gradients

# In the order of the native enumeration (csrc/cpu/pointwise_loss.h).
LOSSES = ("logistic", "square", "hinge", "linear", "absolute_difference", "squared_difference")
_HALF = 2
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: _HALF}

_LARGE = (
    1 << 20
)  # values: such memory would be new at every call, and half of the time go into its page faults


def has_native(tensors: Sequence[Tensor]) -> bool:
    """Whether the native pass takes them, in this build."""
    return all(x.dtype in TYPES and native(x.device, "pointwise_loss") for x in tensors)


def check_devices(tensors: Sequence[Tensor], name: str) -> None:
    """Raises a ValueError unless all are on one device."""
    for x in tensors:
        if x.device != tensors[0].device:
            raise ValueError(
                f"{name} has tensors on {tensors[0].device} and on {x.device}; move them to one device"
            )


def dense(x: Tensor) -> Tensor:
    """``x`` itself if its values lie side by side, in any of the two memory formats; else a copy."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def dense_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with its values in the order of those of ``other``, a result of ``dense``."""
    if x.stride() == other.stride():
        return x
    channels_last = not other.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def gradient_weights(values: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
    """What the stored gradients still lack: float16 has no room for 1 / (number of values)."""
    return [w if x.dtype is torch.float16 else 1.0 for x, w in zip(values, weights, strict=True)]


class Call(NamedTuple):
    """What the native pass is given. ``kept`` are copies that must live until it has run."""

    arguments: dict[str, Any]
    out: Tensor
    gradients: list[Tensor]
    kept: list[Tensor]


def _call(
    loss: str,
    target: float,
    a: Sequence[Tensor],
    b: Sequence[Tensor] | None,
    weights: Sequence[float],
    gradient: bool,
) -> Call:
    # By operations on whole lists: of a small loss, statements of Python take longest.
    x = [t if t.is_contiguous() else dense(t) for t in a]
    y = x if b is None else list(map(dense_like, b, x))
    kinds = [TYPES[t.dtype] for t in x]
    kinds_of_b = kinds if b is None else [TYPES[t.dtype] for t in y]
    counts = list(map(Tensor.numel, x))
    like = empty_like if max(counts) >= _LARGE and x[0].is_cpu else torch.empty_like
    gradients = list(map(like, x)) if gradient else []
    places = map(Tensor.data_ptr, gradients) if gradient else [0] * len(x)
    stored = [1.0 if kind == _HALF else w for kind, w in zip(kinds, weights, strict=True)]
    addresses = map(Tensor.data_ptr, x), map(Tensor.data_ptr, y), places
    parts = list(zip(*addresses, counts, kinds, kinds_of_b, weights, stored, strict=True))
    out = torch.empty((), dtype=torch.float32, device=a[0].device)
    arguments = {"loss": LOSSES.index(loss), "target": target, "parts": parts, "out": out.data_ptr()}
    return Call(arguments, out, gradients, [*x, *y])


def run_pointwise(
    loss: str,
    target: float,
    a: Sequence[Tensor],
    b: Sequence[Tensor] | None,
    weights: Sequence[float],
    gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum, a float32 scalar, and the gradients with respect to ``a`` (none unless wanted), which
    are to be multiplied by ``gradient_weights``. All tensors are on the CPU."""
    call = _call(loss, target, a, b, weights, gradient)
    use_torch_threads()
    _C.pointwise_loss(**call.arguments)
    return call.out, call.gradients


def run_pointwise_on_cuda(
    operator: str,
    loss: str,
    target: float,
    a: Sequence[Tensor],
    b: Sequence[Tensor] | None,
    weights: Sequence[float],
    gradient: bool,
) -> tuple[Tensor, list[Tensor]]:
    """``run_pointwise`` of tensors on one GPU; a RuntimeError with the reason if the build has no kernel."""
    require_kernel("pointwise_loss", operator, "the tensors")
    call = _call(loss, target, a, b, weights, gradient)
    count = _C.cuda_pointwise_loss_sums(parts=call.arguments["parts"])
    sums = torch.empty(count, dtype=torch.float64, device=call.out.device)
    launch("pointwise_loss", call.out.device, **call.arguments, workspace=sums.data_ptr())
    return call.out, call.gradients


_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPE = operator.attrgetter("dtype")
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # what outlives a transform is, too


def is_direct(tensors: Sequence[Tensor]) -> bool:
    """Whether a native call does without the dispatcher: plain CPU tensors of its dtypes that nobody traces
    or transforms. Autocast is the caller's affair."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu or x.dtype not in TYPES or _is_wrapped(x):
            return False
    return True


class Sum(NamedTuple):
    """A loss as ``run_pointwise`` takes it, but for ``a``; ``reference(a)`` is the same by operators that can
    be differentiated."""

    loss: str
    target: float
    b: Sequence[Tensor] | None
    weights: Sequence[float]
    reference: Callable[[Sequence[Tensor]], Tensor]


def direct_loss(given: Sum, a: Sequence[Tensor]) -> Tensor:
    """The loss without a registered operator, which takes ten times as long to call as the losses of a small
    discriminator take to compute. Needs ``is_direct`` of all tensors."""
    if torch.is_grad_enabled():
        result: Tensor = _apply(given, *a)
        return result
    return run_pointwise(given.loss, given.target, a, given.b, given.weights, False)[0]


class DirectLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Sum, *a: Tensor) -> Tensor:
        wanted = True in ctx.needs_input_grad
        out, gradients = run_pointwise(given.loss, given.target, a, given.b, given.weights, wanted)
        ctx.given = given
        ctx.save_for_backward(*a, *gradients)
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        given, saved = ctx.given, ctx.saved_tensors
        count = len(given.weights)
        if torch.is_grad_enabled():
            return None, *differentiable_gradients(lambda *x: given.reference(x), saved[:count], upstream)
        gradients = saved[count:]
        plain = type(upstream) is Tensor and upstream.is_cpu
        if plain and upstream.item() == 1.0 and torch.float16 not in map(_DTYPE, gradients):
            return None, *gradients  # what scaled() comes to; the end of a small loss on its own
        return None, *scaled(gradients, gradient_weights(gradients, given.weights), upstream)


# Without what Function.apply does for transformed and wrapped tensors: is_direct() lets none through.
_apply = super(torch.autograd.Function, DirectLoss).apply


def fake_pointwise(a: Sequence[Tensor], gradient: bool) -> tuple[Tensor, list[Tensor]]:
    out = torch.empty((), dtype=torch.float32, device=a[0].device)
    return out, [torch.empty_like(dense(x)) for x in a] if gradient else []


def scaled(gradients: Sequence[Tensor], missing: Sequence[float], upstream: Tensor) -> list[Tensor]:
    """The stored gradients times the gradient of what follows; themselves where that is 1."""
    plain = type(upstream) is Tensor
    if plain and upstream.is_cuda and has_kernel("pointwise_scale"):
        return _scaled_on_cuda(gradients, missing, upstream)
    if not plain or not upstream.is_cpu:  # traced: its value is not known
        return [(g.float() * (upstream * m)).to(g.dtype) for g, m in zip(gradients, missing, strict=True)]
    factor = float(upstream)
    return [g if factor * m == 1.0 else g * (factor * m) for g, m in zip(gradients, missing, strict=True)]


def _scaled_on_cuda(gradients: Sequence[Tensor], missing: Sequence[float], upstream: Tensor) -> list[Tensor]:
    """In one launch, which reads the factor on the device: asking for its value would wait."""
    upstream = upstream.float()
    results = [torch.empty_like(g) for g in gradients]
    parts = [
        (g.data_ptr(), r.data_ptr(), g.numel(), TYPES[g.dtype], m)
        for g, r, m in zip(gradients, results, missing, strict=True)
    ]
    launch("pointwise_scale", upstream.device, parts=parts, factor=upstream.data_ptr())
    return results
