from __future__ import annotations

from p2pfast.ops.weight_gradient.op import ALGORITHMS, weight_gradient
from p2pfast.ops.weight_gradient.reference import weight_gradient_reference

__all__ = ["ALGORITHMS", "weight_gradient", "weight_gradient_reference"]
