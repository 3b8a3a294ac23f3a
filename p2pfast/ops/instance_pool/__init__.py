from __future__ import annotations

from p2pfast.ops.instance_pool.op import instance_pool
from p2pfast.ops.instance_pool.reference import instance_pool_reference

__all__ = ["instance_pool", "instance_pool_reference"]
