"""Which stream runs each step, what it waits for, and which tensors may share memory.

Steps that touch the same memory keep their order; others may run at the same time. Two tensors share memory
only if every use of one has ended before any use of the other starts, whatever the streams do.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pfast.runtime.gpu.plan import AFTER, BEFORE, DURING, GpuPlan, Memory, Schedule, Step
from p2pfast.runtime.memory import place

ALIGNMENT = 256  # bytes; what cudaMalloc promises, enough for every vector load and tensor map


def needs(steps: Sequence[Step]) -> list[set[int]]:
    """For every step those that it must follow directly: the writers of what it reads, and the writers and
    readers of what it writes."""
    writer: dict[Memory, int] = {}
    readers: dict[Memory, list[int]] = {}
    found: list[set[int]] = []
    for index, step in enumerate(steps):
        wanted = {writer[m] for m in (*step.reads, *step.writes) if m in writer}
        for memory in step.writes:
            wanted.update(readers.get(memory, ()))
        wanted.discard(index)
        found.append(wanted)
        for memory in step.writes:
            writer[memory], readers[memory] = index, []
        for memory in step.reads:
            readers.setdefault(memory, []).append(index)
    return found


def schedule(steps: Sequence[Step], most: int) -> Schedule:
    """Spreads steps over at most ``most`` streams.

    A step goes where the last thing it needs has just run; one that needs nothing so recent opens a stream
    (independent branches, such as the scales of a discriminator). Steps before and after a CUDA graph, and
    those that cannot be in one, stay on the first.
    """
    wanted = needs(steps)
    tails: list[int] = [-1]  # the last step of every stream
    streams: list[int] = []
    for index, step in enumerate(steps):
        chosen = 0
        if step.phase == DURING and step.obstacle is None and most > 1:
            during = [i for i in wanted[index] if steps[i].phase == DURING]
            here = [s for s, tail in enumerate(tails) if tail in during]
            idle = [s for s, tail in enumerate(tails) if tail < 0 or steps[tail].phase == BEFORE]
            if here:
                chosen = max(here, key=lambda s: tails[s])
            elif idle:
                chosen = idle[0]
            elif len(tails) < most:
                tails.append(-1)
                chosen = len(tails) - 1
            else:
                # The stream whose last step is oldest, the best guess of which is free first.
                chosen = min(range(len(tails)), key=lambda s: tails[s])
        tails[chosen] = index
        streams.append(chosen)
    return _ordered(steps, wanted, streams, len(tails))


def _ordered(steps: Sequence[Step], wanted: list[set[int]], streams: list[int], count: int) -> Schedule:
    before: list[int] = []
    waits: list[tuple[int, ...]] = []
    tails = [-1] * count
    for index, step in enumerate(steps):
        direct = set(wanted[index])
        # What arrives before and what leaves after are barriers: all streams start and end there.
        direct.update(
            i
            for i in range(index)
            if (steps[i].phase == BEFORE) != (step.phase == BEFORE)
            or (steps[i].phase == AFTER) != (step.phase == AFTER)
        )
        mask = 0
        tail = tails[streams[index]]
        if tail >= 0:
            mask |= before[tail] | 1 << tail
        waiting = []
        for other in sorted(direct, reverse=True):
            if not mask >> other & 1:
                mask |= before[other] | 1 << other
                waiting.append(other)
        # The streams part where DURING begins and meet where it ends: no waiting across phases.
        waits.append(
            tuple(i for i in waiting if streams[i] != streams[index] and steps[i].phase == step.phase)
        )
        before.append(mask)
        tails[streams[index]] = index
    return Schedule(streams, waits, before, count)


def together(before: list[int], a: Memory, b: Memory) -> bool:
    """Whether two tensors may be in use at the same time."""

    def ends_before(first: Memory, second: Memory) -> bool:
        mask = sum(1 << i for i in first.uses)
        return all(before[i] & mask == mask for i in second.uses)

    return not (ends_before(a, b) or ends_before(b, a))


def finish(plan: GpuPlan, streams: int) -> None:
    """Orders the steps of a plan and places its memory."""
    for index, step in enumerate(plan.steps):
        for memory in (*step.reads, *step.writes):
            memory.uses.add(index)
    plan.schedule = schedule(plan.steps, streams)
    before = plan.schedule.before
    used = [m for m in plan.memories if m.uses]
    placed = [m for m in used if m.bytes]
    plan.arena_bytes = place(placed, lambda a, b: together(before, a, b), ALIGNMENT)
    plan.schedule.frees = _frees(plan, [m for m in used if not m.bytes])


def _frees(plan: GpuPlan, made: list[Memory]) -> list[tuple[Memory, ...]]:
    """After which step each tensor that a step made itself can be given back: one that several streams use is
    kept to the end, because PyTorch would hand its memory on in the order of one of them."""
    found: list[list[Memory]] = [[] for _ in plan.steps]
    kept = {id(m) for r in plan.running for m in (r.mean, r.variance)}
    for memory in made:
        streams = {plan.schedule.streams[i] for i in memory.uses}
        inside = all(plan.steps[i].phase == DURING for i in memory.uses)
        if inside and len(streams) == 1 and id(memory) not in kept:
            found[max(memory.uses)].append(memory)
    return [tuple(memories) for memories in found]
