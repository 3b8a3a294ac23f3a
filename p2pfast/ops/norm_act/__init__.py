from __future__ import annotations

from p2pfast.ops.norm_act.op import norm_act, norm_act_backward
from p2pfast.ops.norm_act.reference import norm_act_reference

__all__ = ["norm_act", "norm_act_backward", "norm_act_reference"]
