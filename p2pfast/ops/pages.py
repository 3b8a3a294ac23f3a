"""Memory of many megabytes without a page fault for every 4 KB of it."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

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
        found = in_large_pages(torch.empty(max(size, 1), dtype=torch.uint8, device="cpu"))
        if size <= _KEPT:
            held[place] = found
    return found


_WORTH = 4 << 20  # bytes; of less the C library's own memory is used again
_SLACK = 1.25  # times what is asked for: the largest block that is taken for it


def _kept_bytes() -> int:
    """``P2PFAST_KEEP_MB``, in bytes.

    Raises:
        ValueError: it is no number of megabytes.
    """
    text = os.environ.get("P2PFAST_KEEP_MB", "1024")
    if not text.isdecimal():
        raise ValueError(f"P2PFAST_KEEP_MB is {text!r}; give a number of megabytes, 0 to keep none")
    return int(text) * 10**6


class _Pool:
    """Blocks of memory, each of which is idle when no tensor's storage holds it any more."""

    def __init__(self) -> None:
        self.blocks = [self._new(mmap.PAGESIZE)]  # the least recently taken first
        self._lock = threading.Lock()
        self._idle_references = sys.getrefcount(self.blocks[0])
        self.blocks.clear()

    def _new(self, size: int) -> mmap.mmap:
        # Private: processes that are forked must not see each other's gradients.
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def idle(self) -> list[int]:
        """Indices of the blocks that nothing uses."""
        count = sys.getrefcount
        return [i for i in range(len(self.blocks)) if count(self.blocks[i]) == self._idle_references]

    def take(self, size: int, limit: int) -> torch.Tensor | None:
        """``size`` bytes, or None where the system has none; ``limit`` of idle blocks remain beside them."""
        with self._lock:
            fitting = [i for i in self.idle() if size <= len(self.blocks[i]) <= _SLACK * size]
            block = self.blocks.pop(min(fitting, key=lambda i: len(self.blocks[i]))) if fitting else None
            self._let_go(limit)
            if block is None:
                try:
                    block = self._new(size)
                except OSError:
                    self._let_go(0)
                    return None
            self.blocks.append(block)
            # Holds the block for as long as its storage lives.
            found = torch.frombuffer(block, dtype=torch.uint8, count=size)
        return found if fitting else in_large_pages(found)

    def _let_go(self, limit: int) -> None:
        """Of the idle blocks, the oldest, until no more than ``limit`` bytes of them are left.

        Their last reference unmaps them: an interruption then finds the list as it was or as it will be.
        """
        idle = self.idle()
        dropped: set[int] = set()
        lying = sum(len(self.blocks[i]) for i in idle)
        for i in idle:
            if lying <= limit:
                break
            lying -= len(self.blocks[i])
            dropped.add(i)
        if dropped:
            self.blocks = [self.blocks[i] for i in range(len(self.blocks)) if i not in dropped]


_pool = functools.cache(_Pool)
if hasattr(os, "register_at_fork"):
    # Another thread may have held the lock, and the blocks are the parent's to take again.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _limit(size: int) -> int:
    """Bytes that may lie idle; 0 where a result of ``size`` bytes is PyTorch's to allocate."""
    if size < _WORTH or not sys.platform.startswith("linux"):
        return 0
    limit = _kept_bytes()
    return 0 if torch.are_deterministic_algorithms_enabled() else limit  # PyTorch fills new memory there


def empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """``torch.empty`` on the CPU for the results of training steps, in memory that earlier ones have left.

    Gradients and activations are new tensors in every step, and large ones are memory that the system has to
    find and to clear first, which takes longer than computing many of them. When the next large result is
    asked for, what lies idle is cut to ``P2PFAST_KEEP_MB`` (1024; 0 for none). Such a result's storage cannot
    be resized.

    Raises:
        ValueError: ``P2PFAST_KEEP_MB`` is no number of megabytes.
    """
    if not _limit(math.prod(shape) * dtype.itemsize):
        return in_large_pages(torch.empty(shape, dtype=dtype, device="cpu", memory_format=memory_format))
    return empty_like(torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format))


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """As ``empty``, of the size, the strides and the dtype of ``x``, whose values lie side by side."""
    limit = _limit(x.nbytes)
    memory = _pool().take(x.nbytes, limit) if limit else None
    if memory is None:
        return in_large_pages(torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu"))
    # No view, which could not be changed in place as the result of an autograd function.
    found = torch.empty(0, dtype=x.dtype, device="cpu")
    return found.set_(memory.untyped_storage(), 0, x.size(), x.stride())
