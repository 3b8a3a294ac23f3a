"""Files that p2pfast ships."""

from __future__ import annotations

from pathlib import Path

#: The small street generator of ``p2pfast demo``; its metadata says how it was trained.
DEMO_GENERATOR = Path(__file__).with_name("demo_generator.safetensors")
