"""Data that p2pfast makes itself: procedural street scenes with labels, instances and a rendering."""

from __future__ import annotations

from p2pfast.data.classes import CLASS_NAMES, INSTANCE_CLASSES, NUM_CLASSES, colorize
from p2pfast.data.scenes import Scene, draw_scene

__all__ = ["CLASS_NAMES", "INSTANCE_CLASSES", "NUM_CLASSES", "Scene", "colorize", "draw_scene"]
