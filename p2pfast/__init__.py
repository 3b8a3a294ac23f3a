"""Fused kernels for image-to-image networks of the pix2pix family."""

from __future__ import annotations

from p2pfast import functional, models, nn
from p2pfast.fuse.explain import Explanation, explain
from p2pfast.fuse.optimize import optimize
from p2pfast.labelmap import LabelMap

__version__ = "0.1.0"

__all__ = ["Explanation", "LabelMap", "__version__", "explain", "functional", "models", "nn", "optimize"]
