"""One arena for all intermediate tensors of a plan, with reuse."""

from __future__ import annotations

from dataclasses import dataclass

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


def place(buffers: list[Buffer]) -> int:
    """Sets every buffer's offset so that buffers alive together do not overlap; returns the size in bytes.

    Largest first, each at the lowest gap that fits: within a few percent of the lower bound (the most
    bytes alive at one step) for these networks.
    """
    placed: list[Buffer] = []
    size = 0
    for buffer in sorted(buffers, key=lambda b: (-b.bytes, b.first)):
        if buffer.last < buffer.first:
            continue
        needed = -(-buffer.bytes // ALIGNMENT) * ALIGNMENT
        offset = 0
        for other in placed:
            if other.last < buffer.first or other.first > buffer.last:
                continue
            if offset + needed <= other.offset:
                break
            offset = max(offset, other.offset + -(-other.bytes // ALIGNMENT) * ALIGNMENT)
        buffer.offset = offset
        placed.append(buffer)
        placed.sort(key=lambda b: b.offset)
        size = max(size, offset + needed)
    return size
