"""Memory of many megabytes without a page fault for every 4 KB of it."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Callable

import torch


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks the system for 2 MB pages of a new tensor, which then needs 512 times fewer page faults."""
    advise, page, large = _madvise(), 4096, 14  # MADV_HUGEPAGE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if advise is not None and size >= 4 << 20:
        advise(start, size, large)  # a wish: what the system answers changes nothing
    return tensor


_KEPT = 64 << 20  # bytes of scratch that a thread keeps for its next call
_scratch = threading.local()


def scratch(size: int, place: int = 0) -> torch.Tensor:
    """``size`` uninitialised bytes for the duration of one native call.

    The same memory at every call of a thread: fresh memory costs more than what is computed in it. ``place``
    tells apart what one call needs at the same time.
    """
    held = _scratch.__dict__.setdefault("held", {})
    found: torch.Tensor | None = held.get(place)
    if found is None or found.nbytes < size:
        found = in_large_pages(torch.empty(max(size, 1), dtype=torch.uint8))
        if size <= _KEPT:
            held[place] = found
    return found
