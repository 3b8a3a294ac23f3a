"""Reference networks in plain PyTorch, with the published arguments and keys, and their checkpoints."""

from __future__ import annotations

from p2pfast.models.checkpoint import load_checkpoint, read_state_dict
from p2pfast.models.checkpoint_file import CheckpointError
from p2pfast.models.discriminators import (
    MultiscaleDiscriminator,
    NLayerDiscriminator,
    PatchDiscriminatorHD,
    PixelDiscriminator,
)
from p2pfast.models.infer import from_checkpoint, infer
from p2pfast.models.layers import ResnetBlock, norm_layer_of
from p2pfast.models.pix2pix import ResnetGenerator, UnetGenerator, UnetSkipConnectionBlock
from p2pfast.models.pix2pixhd import Encoder, GlobalGenerator, LocalEnhancer, instance_mean
from p2pfast.models.registry import available, build

__all__ = [
    "CheckpointError",
    "Encoder",
    "GlobalGenerator",
    "LocalEnhancer",
    "MultiscaleDiscriminator",
    "NLayerDiscriminator",
    "PatchDiscriminatorHD",
    "PixelDiscriminator",
    "ResnetBlock",
    "ResnetGenerator",
    "UnetGenerator",
    "UnetSkipConnectionBlock",
    "available",
    "build",
    "from_checkpoint",
    "infer",
    "instance_mean",
    "load_checkpoint",
    "norm_layer_of",
    "read_state_dict",
]
