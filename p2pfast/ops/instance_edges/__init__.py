from __future__ import annotations

from p2pfast.ops.instance_edges.op import instance_edges
from p2pfast.ops.instance_edges.reference import instance_edges_reference

__all__ = ["instance_edges", "instance_edges_reference"]
