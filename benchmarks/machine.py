"""What a result file says of the machine it was made on."""

from __future__ import annotations

import importlib
import os
import platform
from typing import Any


def hardware(*packages: str) -> dict[str, Any]:
    """The processor, its memory, and the versions (None: absent) of p2pfast, torch, Python and others."""
    from p2pfast import _C

    def version(package: str) -> str | None:
        try:
            return str(importlib.import_module(package).__version__)
        except ImportError:
            return None

    names = ("p2pfast", "torch", *packages)
    return {
        "processor": _C.processor_name() or platform.processor(),
        "level": _C.active_level(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "versions": {name: version(name) for name in names} | {"python": platform.python_version()},
    }
