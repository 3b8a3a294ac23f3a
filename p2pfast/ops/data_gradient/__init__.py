from __future__ import annotations

from p2pfast.ops.data_gradient.op import data_gradient
from p2pfast.ops.data_gradient.reference import data_gradient_reference

__all__ = ["data_gradient", "data_gradient_reference"]
