"""Modules for training and for hand-written networks."""

from __future__ import annotations

from p2pfast.nn.losses import (
    CycleLoss,
    FeatureMatchingLoss,
    GANLoss,
    IdentityLoss,
    L1Loss,
    L2Loss,
    PerceptualLoss,
    TotalVariationLoss,
    gradient_penalty,
)

__all__ = [
    "CycleLoss",
    "FeatureMatchingLoss",
    "GANLoss",
    "IdentityLoss",
    "L1Loss",
    "L2Loss",
    "PerceptualLoss",
    "TotalVariationLoss",
    "gradient_penalty",
]
