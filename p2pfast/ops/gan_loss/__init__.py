from __future__ import annotations

from p2pfast.ops.gan_loss.op import gan_loss
from p2pfast.ops.gan_loss.reference import gan_loss_reference

__all__ = ["gan_loss", "gan_loss_reference"]
