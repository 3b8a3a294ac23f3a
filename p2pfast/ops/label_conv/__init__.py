from __future__ import annotations

from p2pfast.ops.label_conv.op import label_conv
from p2pfast.ops.label_conv.reference import label_conv_reference

__all__ = ["label_conv", "label_conv_reference"]
