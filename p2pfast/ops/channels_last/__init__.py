from __future__ import annotations

from p2pfast.ops.channels_last.op import channels_last

__all__ = ["channels_last"]
