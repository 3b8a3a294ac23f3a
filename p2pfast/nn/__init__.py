"""Modules for training and for hand-written networks."""

from __future__ import annotations

from p2pfast.nn.blocks import ConvNormAct2d, InstanceNormAct2d, UpConvNormAct2d
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
from p2pfast.nn.networks import PatchDiscriminator, ResidualBlock
from p2pfast.nn.sequence import FusedSequential

__all__ = [
    "ConvNormAct2d",
    "CycleLoss",
    "FeatureMatchingLoss",
    "FusedSequential",
    "GANLoss",
    "IdentityLoss",
    "InstanceNormAct2d",
    "L1Loss",
    "L2Loss",
    "PatchDiscriminator",
    "PerceptualLoss",
    "ResidualBlock",
    "TotalVariationLoss",
    "UpConvNormAct2d",
    "gradient_penalty",
]
