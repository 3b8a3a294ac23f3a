"""Operators, one folder each: schema and registration in ``op.py``, the definition in ``reference.py``."""

from __future__ import annotations
