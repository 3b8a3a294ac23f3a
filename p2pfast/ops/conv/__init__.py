from __future__ import annotations

from p2pfast.ops.conv.op import conv
from p2pfast.ops.conv.reference import conv_reference

__all__ = ["conv", "conv_reference"]
