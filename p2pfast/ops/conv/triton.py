"""Convolutions on NVIDIA GPUs, in place on NHWC views. Importing this imports triton.

``pack`` lays out the weights once, ``conv`` runs; see this operator's README for the kernels.
"""

from __future__ import annotations

from p2pfast.ops.conv.gpu.call import conv
from p2pfast.ops.conv.gpu.choice import Candidate, Choice, Problem, choose, default_config, estimated
from p2pfast.ops.conv.gpu.configs import Config, machine, parts
from p2pfast.ops.conv.gpu.library import library_conv
from p2pfast.ops.conv.gpu.pack import Packed, pack
from p2pfast.ops.conv.gpu.shipped import shipped
from p2pfast.ops.conv.gpu.source import Source

__all__ = [
    "Candidate",
    "Choice",
    "Config",
    "Packed",
    "Problem",
    "Source",
    "choose",
    "conv",
    "default_config",
    "estimated",
    "library_conv",
    "machine",
    "pack",
    "parts",
    "shipped",
]
