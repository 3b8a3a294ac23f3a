from __future__ import annotations

from p2pfast.ops.feature_matching.op import feature_matching
from p2pfast.ops.feature_matching.reference import feature_matching_reference

__all__ = ["feature_matching", "feature_matching_reference"]
