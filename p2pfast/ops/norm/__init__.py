from __future__ import annotations

from p2pfast.ops.norm.op import instance_norm_act
from p2pfast.ops.norm.reference import instance_norm_act_reference

__all__ = ["instance_norm_act", "instance_norm_act_reference"]
