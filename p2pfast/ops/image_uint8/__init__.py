from __future__ import annotations

from p2pfast.ops.image_uint8.op import image_uint8
from p2pfast.ops.image_uint8.reference import image_uint8_reference

__all__ = ["image_uint8", "image_uint8_reference"]
