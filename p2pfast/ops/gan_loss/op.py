from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.gan_loss.reference import gan_loss_reference
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

_LOSSES = ("logistic", "square", "hinge", "linear")


def _check(predictions: Sequence[Tensor], loss: str) -> None:
    if loss not in _LOSSES:
        raise ValueError(f"loss is {loss!r}; choose one of {', '.join(_LOSSES)}")
    if not predictions:
        raise ValueError("predictions is empty; at least one tensor is expected")
    for x in predictions:
        if not x.is_floating_point():
            raise TypeError(f"a prediction has dtype {x.dtype}; a floating-point dtype is expected")
        if x.numel() == 0:
            raise ValueError(f"a prediction has shape {tuple(x.shape)}; the mean of no values is not defined")
    check_devices(predictions, "predictions")


def gan_loss(predictions: Sequence[Tensor], loss: str, target: float, weight: float = 1.0) -> Tensor:
    """The mean loss of each scale's predictions against one target, summed over the scales.

    One native call for all scales, on the CPU and on NVIDIA GPUs: no tensor of targets is made, and the
    gradient is computed along with the loss. Sums have a fixed order: the same bits at any number of threads.
    Other devices (NVIDIA's too in a build without CUDA kernels; ``p2pfast info`` tells) and float64 run
    ``gan_loss_reference``.

    Args:
        predictions: a discriminator's outputs, any shapes; float32, bfloat16 or float16.
        loss: ``"logistic"`` (binary cross-entropy of logits, target in [0, 1]), ``"square"``
            ((x - target)²), ``"hinge"`` (max(0, 1 - target x), target ±1) or ``"linear"`` (target x).
        target: see there.
        weight: of the sum.

    Returns:
        A float32 scalar (float64 for float64 predictions).

    Raises:
        TypeError: a prediction that is not floating point.
        ValueError: no predictions, an empty one, predictions on different devices, or another loss.
    """
    predictions = list(predictions)
    if loss in _LOSSES and predictions and is_direct(predictions) and 0 not in map(Tensor.numel, predictions):

        def reference(x: Sequence[Tensor]) -> Tensor:
            return gan_loss_reference(x, loss, target, weight)

        given = Sum(loss, float(target), None, _weights(predictions, weight), reference)
        return direct_loss(given, predictions)
    _check(predictions, loss)
    if not has_native(predictions):
        return gan_loss_reference(predictions, loss, target, weight)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in predictions)
    return _gan_loss(predictions, loss, float(target), float(weight), gradient)[0]


def _weights(predictions: Sequence[Tensor], weight: float) -> list[float]:
    return [weight / x.numel() for x in predictions]


@torch.library.custom_op("p2pfast::gan_loss", mutates_args=(), device_types="cpu")
def _gan_loss(
    predictions: Sequence[Tensor], loss: str, target: float, weight: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return run_pointwise(loss, target, predictions, None, _weights(predictions, weight), gradient)


@_gan_loss.register_kernel("cuda")
def _on_cuda(
    predictions: Sequence[Tensor], loss: str, target: float, weight: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    weights = _weights(predictions, weight)
    return run_pointwise_on_cuda("gan_loss", loss, target, predictions, None, weights, gradient)


@_gan_loss.register_fake
def _(
    predictions: Sequence[Tensor], loss: str, target: float, weight: float, gradient: bool
) -> tuple[Tensor, list[Tensor]]:
    return fake_pointwise(predictions, gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    predictions, *ctx.arguments, gradient = inputs
    ctx.scales = len(predictions)
    ctx.mark_non_differentiable(*output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*predictions, *output[1])


def _backward(ctx: Any, upstream: Tensor | None, _: object) -> tuple[Any, ...]:
    if upstream is None:
        return (None,) * 5
    predictions, gradients = ctx.saved_tensors[: ctx.scales], ctx.saved_tensors[ctx.scales :]
    if torch.is_grad_enabled():

        def reference(*x: Tensor) -> Tensor:
            return gan_loss_reference(x, *ctx.arguments)

        return differentiable_gradients(reference, predictions, upstream), *(None,) * 4
    missing = gradient_weights(predictions, _weights(predictions, ctx.arguments[-1]))
    return scaled(gradients, missing, upstream), *(None,) * 4


torch.library.register_autograd("p2pfast::gan_loss", _backward, setup_context=_setup)
