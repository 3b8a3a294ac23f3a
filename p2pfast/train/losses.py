"""The losses in plain PyTorch, for ``--no-fused``; arguments and results are those of `p2pfast.nn`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import p2pfast.nn as fused

Prediction = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]


class GANLoss:
    """Adversarial loss of a tensor, of a list of scales, or of a list of lists of features; summed."""

    def __init__(self, gan_mode: str) -> None:
        self.gan_mode = gan_mode

    def __call__(
        self, prediction: Prediction, target_is_real: bool, for_discriminator: bool = True
    ) -> Tensor:
        scales = [prediction] if isinstance(prediction, Tensor) else prediction
        last = [scale if isinstance(scale, Tensor) else scale[-1] for scale in scales]
        return torch.stack([self._one(x.float(), target_is_real, for_discriminator) for x in last]).sum()

    def _one(self, x: Tensor, real: bool, for_discriminator: bool) -> Tensor:
        if self.gan_mode == "vanilla":
            return F.binary_cross_entropy_with_logits(x, torch.full_like(x, float(real)))
        if self.gan_mode == "lsgan":
            return F.mse_loss(x, torch.full_like(x, float(real)))
        if self.gan_mode == "hinge" and for_discriminator:
            return F.relu(1 - x if real else 1 + x).mean()
        return -x.mean() if real else x.mean()


class FeatureMatchingLoss:
    """pix2pixHD's feature matching."""

    def __init__(self, weight: float, n_layers: int) -> None:
        self.weight, self.n_layers = weight, n_layers

    def __call__(self, fake: Sequence[Sequence[Tensor]], real: Sequence[Sequence[Tensor]]) -> Tensor:
        share = self.weight * 4 / (self.n_layers + 1) / len(fake)
        terms = [
            F.l1_loss(a.float(), b.detach().float())
            for f, r in zip(fake, real, strict=True)
            for a, b in zip(f[:-1], r[:-1], strict=True)
        ]
        return share * torch.stack(terms).sum()


class L1Loss:
    """``weight * mean(|prediction - target|)``."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.weight * F.l1_loss(prediction.float(), target.float())


class Losses:
    """Makers of the losses of a run, ``fused`` ones of `p2pfast.nn` or plain ones."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused

    def gan(self, gan_mode: str) -> Callable[..., Tensor]:
        if self.fused:
            return fused.GANLoss(gan_mode)
        return GANLoss(gan_mode)

    def features(self, weight: float, n_layers: int) -> Callable[..., Tensor]:
        if self.fused:
            return fused.FeatureMatchingLoss(weight, n_layers)
        return FeatureMatchingLoss(weight, n_layers)

    def l1(self, weight: float) -> Callable[..., Tensor]:
        if self.fused:
            return fused.L1Loss(weight)
        return L1Loss(weight)
