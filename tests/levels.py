"""Instruction-set levels."""

from __future__ import annotations

from p2pfast import _C

RUNNABLE_LEVELS = [level for level in _C.levels() if not _C.missing_for(level)]

# Of a build that emulates 16 lanes, the other levels are those of the usual build, tested by itself.
_EMULATES = _C.build_info()["emulate_wide"]
TESTED_LEVELS = [level for level in RUNNABLE_LEVELS if level.startswith("avx512") or not _EMULATES]
