"""The arena: buffers alive together never overlap, and memory is reused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pfast.runtime.memory import Buffer, place_buffers


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 20)), max_size=40))
def test_no_overlap(spans: list[tuple[int, int, int]]) -> None:
    buffers = [Buffer(size, 0, min(a, b), max(a, b)) for size, a, b in spans]
    total = place_buffers(buffers)
    for i, x in enumerate(buffers):
        assert x.offset % 64 == 0 and x.offset + x.bytes <= total
        for y in buffers[:i]:
            together = x.first <= y.last and y.first <= x.last
            assert not together or x.offset + x.bytes <= y.offset or y.offset + y.bytes <= x.offset


def test_a_chain_needs_two_buffers() -> None:
    chain = [Buffer(6400, 0, i, i + 1) for i in range(10)]
    assert place_buffers(chain) == 12800
