"""One arena for all intermediate tensors of a plan, with reuse; and how much memory there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from p2pfast.ops.pages import in_large_pages

ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """Bytes that live from step ``first`` to step ``last``, at ``offset`` of slot ``slot``."""

    bytes: int
    slot: int
    first: int = 1 << 60
    last: int = -1
    offset: int = 0

    def touch(self, step: int) -> None:
        self.first = min(self.first, step)
        self.last = max(self.last, step)


class Block(Protocol):
    """Something of a size that gets a place."""

    bytes: int
    offset: int


AnyBlock = TypeVar("AnyBlock", bound=Block)


def place(blocks: Sequence[AnyBlock], together: Callable[[AnyBlock, AnyBlock], bool], alignment: int) -> int:
    """Sets every block's offset so that blocks in use ``together`` do not overlap; returns the size in bytes.

    Largest first, those of one size in the order given, each at the lowest gap that fits: within a few
    percent of the lower bound (the most bytes in use at once) for these networks.
    """
    placed: list[AnyBlock] = []
    size = 0

    def rounded(block: AnyBlock) -> int:
        return -(-block.bytes // alignment) * alignment

    for block in sorted(blocks, key=lambda b: -b.bytes):
        offset = 0
        for other in placed:
            if offset >= other.offset + rounded(other) or not together(block, other):
                continue
            if offset + rounded(block) <= other.offset:
                break
            offset = other.offset + rounded(other)
        block.offset = offset
        placed.append(block)
        placed.sort(key=lambda b: b.offset)
        size = max(size, offset + rounded(block))
    return size


def place_buffers(buffers: list[Buffer]) -> int:
    """:func:`place` for buffers that live from one step to another."""
    used = sorted((b for b in buffers if b.last >= b.first), key=lambda b: b.first)
    return place(used, lambda a, b: a.last >= b.first and b.last >= a.first, ALIGNMENT)


class OutOfMemory(MemoryError):
    """There is not enough memory; the message names the limit, what is needed, and the remedy."""


def readable(size: int) -> str:
    """Bytes as a short text: "1.50 GB", "320.0 MB", "12.1 KB"."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def allocate(size: int, what: str) -> torch.Tensor:
    """``size`` uninitialised bytes; raises OutOfMemory where there are none."""
    try:
        return in_large_pages(torch.empty(size, dtype=torch.uint8, device="cpu"))
    except RuntimeError as error:
        raise OutOfMemory(
            f"{what} of {readable(size)} cannot be allocated; give optimize a memory_limit below the memory "
            "that is free, or take a smaller image"
        ) from error


def available() -> int | None:
    """Bytes that this process can still take: what the system or the container has free. None: unknown."""
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such version of control groups, or no limit ("max")
            continue
    return max(0, min(found)) if found else None
