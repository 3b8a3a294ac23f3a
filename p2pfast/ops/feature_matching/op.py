from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.feature_matching.reference import feature_matching_reference
from p2pfast.ops.pointwise import (
    Sum,
    check_devices,
    direct_loss,
    fake_pointwise,
    gradient_weights,
    has_native,
    is_direct,
    run_pointwise,
    run_pointwise_on_cuda,
    scaled,
)
from p2pfast.ops.twice import differentiable_gradients


def _check(fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float]) -> None:
    if not len(fake) == len(real) == len(weights):
        raise ValueError(
            f"fake has {len(fake)} tensors, real {len(real)}, weights {len(weights)}; they must be as many"
        )
    if not fake:
        raise ValueError("fake is empty; at least one tensor is expected")
    for x, y in zip(fake, real, strict=True):
        for name, t in (("fake", x), ("real", y)):
            if not t.is_floating_point():
                raise TypeError(f"a tensor of {name} has dtype {t.dtype}; a floating-point dtype is expected")
        if x.shape != y.shape:
            raise ValueError(
                f"a tensor of fake has shape {tuple(x.shape)}, of real {tuple(y.shape)}; they must be equal"
            )
        if x.numel() == 0:
            raise ValueError(
                f"a tensor of fake has shape {tuple(x.shape)}; the mean of no values is not defined"
            )
        if x.device != y.device:
            raise ValueError(f"a tensor of fake is on {x.device}, of real on {y.device}; move one of them")
    check_devices(fake, "fake")


def feature_matching(
    fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float], squared: bool = False
) -> Tensor:
    """Σ weights[i] · mean(|fake[i] - real[i]|): all tensors in one native call, on the CPU and NVIDIA GPUs.

    The gradient, for ``fake`` only, is computed along with the loss: two reads and one write of memory for
    forward and backward together. Sums have a fixed order: the same bits at any number of threads. Other
    devices (NVIDIA's too in a build without CUDA kernels; ``p2pfast info`` tells) and float64 run
    ``feature_matching_reference``.

    Args:
        fake, real: pairs of tensors of equal shapes; float32, bfloat16 or float16.
        weights: one a pair.
        squared: mean((fake - real)²) instead.

    Returns:
        A float32 scalar (float64 for float64 tensors).

    Raises:
        TypeError: a tensor that is not floating point.
        ValueError: lists of different lengths, shapes that differ, an empty tensor, different devices.
    """
    fake, real, weights = list(fake), [y.detach() for y in real], [float(w) for w in weights]
    _check(fake, real, weights)
    if not has_native((*fake, *real)):
        return feature_matching_reference(fake, real, weights, squared)
    real = [y if y.dtype == x.dtype else y.float() for x, y in zip(fake, real, strict=True)]
    # A 16-bit real side of a float32 fake one was widened; the other way round the kernel does it on load.
    if is_direct((*fake, *real)):
        matched = real

        def reference(x: Sequence[Tensor]) -> Tensor:
            return feature_matching_reference(x, matched, weights, squared)

        given = Sum(_kind(squared), 0.0, matched, _mean_weights(fake, weights), reference)
        return direct_loss(given, fake)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in fake)
    return _feature_matching(fake, real, weights, squared, gradient)[0]


def _mean_weights(fake: Sequence[Tensor], weights: Sequence[float]) -> list[float]:
    return [w / x.numel() for x, w in zip(fake, weights, strict=True)]


def _kind(squared: bool) -> str:
    return "squared_difference" if squared else "absolute_difference"


@torch.library.custom_op("p2pfast::feature_matching", mutates_args=(), device_types="cpu")
def _feature_matching(
    fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float], squared: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return run_pointwise(_kind(squared), 0.0, fake, real, _mean_weights(fake, weights), gradient)


@_feature_matching.register_kernel("cuda")
def _on_cuda(
    fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float], squared: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    means = _mean_weights(fake, weights)
    return run_pointwise_on_cuda("feature_matching", _kind(squared), 0.0, fake, real, means, gradient)


@_feature_matching.register_fake
def _(
    fake: Sequence[Tensor], real: Sequence[Tensor], weights: Sequence[float], squared: bool, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return fake_pointwise(fake, gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    fake, real, ctx.weights, ctx.squared, gradient = inputs
    ctx.pairs = len(fake)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*fake, *real, *output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: object) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 5
    n = ctx.pairs
    fake, real, gradients = (ctx.saved_tensors[i : i + n] for i in (0, n, 2 * n))
    nothing = [None] * n
    if torch.is_grad_enabled():

        def reference(*x: Tensor) -> Tensor:
            return feature_matching_reference(x, real, ctx.weights, ctx.squared)

        return differentiable_gradients(reference, fake, upstream), nothing, *(None,) * 3
    missing = gradient_weights(fake, _mean_weights(fake, ctx.weights))
    return scaled(gradients, missing, upstream), nothing, *(None,) * 3


torch.library.register_autograd("p2pfast::feature_matching", _backward, setup_context=_setup)
