from __future__ import annotations

from p2pfast.ops.conv_norm_act.join import join
from p2pfast.ops.conv_norm_act.op import conv_norm_act
from p2pfast.ops.conv_norm_act.reference import conv_norm_act_reference

__all__ = ["conv_norm_act", "conv_norm_act_reference", "join"]
