"""Convolutions on NVIDIA GPUs, in place on NHWC views. Importing this imports triton.

``pack`` lays out the weights once, ``conv`` runs; see this operator's README for the kernels.
"""

from __future__ import annotations

from p2pfast.ops.conv.gpu.configs import Config, default_config
from p2pfast.ops.conv.gpu.launch import conv, parts
from p2pfast.ops.conv.gpu.pack import Packed, pack
from p2pfast.ops.conv.gpu.source import Source

__all__ = ["Config", "Packed", "Source", "conv", "default_config", "pack", "parts"]
