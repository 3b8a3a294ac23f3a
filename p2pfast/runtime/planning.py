"""A plan within a limit of memory: whole where it fits, in bands where it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from p2pfast import _C
from p2pfast.fuse.graph import Graph, ImportOp, LabelConvOp
from p2pfast.runtime import choice as choices
from p2pfast.runtime.builder import channel_stride
from p2pfast.runtime.label_convolutions import label_shape
from p2pfast.runtime.liveness import settle
from p2pfast.runtime.memory import OutOfMemory, available, readable
from p2pfast.runtime.plan import Pack, Plan
from p2pfast.runtime.planner import Planner, copies
from p2pfast.runtime.tiling import Chooser, recomputable

_FREE_SHARE = 0.85  # of the free memory, without a limit from the caller
_BAND_SHARE = 16  # bands may take this part of the memory for intermediate tensors
_ATTEMPTS = 8


def make_plan(
    graph: Graph,
    modules: dict[str, nn.Module],
    inputs: dict[str, Any],
    dtype: torch.dtype,
    packs: dict[Any, Pack],
    packed_limit: int | None = None,
    memory: int | None = None,
    accuracy: str = "default",
) -> Plan:
    """Lowers ``graph`` for ``inputs`` (by placeholder name) with tensors stored in ``dtype``.

    ``packs`` holds the packed weights of all plans of the network, at most ``packed_limit`` bytes of them
    (by default :func:`choices.default_budget`), and no more than tensors leave of ``memory``.
    ``memory``: bytes that intermediate tensors and packed weights may take; None: most of what is free.

    Raises OutOfMemory where even bands need more.
    """
    direct = settle(graph)
    narrow = choices.narrow(dtype, accuracy)

    if packed_limit is None:
        parameters = sum(p.numel() for p in modules[""].parameters())
        packed_limit = choices.default_budget(dtype.itemsize * parameters)

    def plan(virtual: frozenset[int] = frozenset(), band_bytes: int = 0) -> Plan:
        known = set(packs)
        planner = Planner(graph, modules, inputs, dtype, packs, {}, direct, virtual, band_bytes, narrow)
        found = planner.build()
        budget = packed_limit - sum(packs[key].bytes for key in known)
        if memory is not None:
            budget = min(budget, memory - found.arena_bytes)
        chosen = choices.fit(planner.options, budget)
        if any(choice is not planner.options[name][0] for name, choice in chosen.items()):
            for key in set(packs) - known:
                del packs[key]
            planner = Planner(
                graph, modules, inputs, dtype, packs, chosen, direct, virtual, band_bytes, narrow
            )
            found = planner.build()
        return found

    try:
        if memory is None:
            found, free = plan(), available()
            free = None if free is None else int(free * _FREE_SHARE)
            if free is None or found.arena_bytes + found.packed_bytes <= free:
                return found
            memory = free
        sizes = _sizes(graph, inputs, dtype, direct)
        chooser = Chooser(graph, modules, sizes, _scratch(graph, modules, inputs))
        candidates = recomputable(graph, modules, direct)
        budget, band, least = memory, memory // _BAND_SHARE, 1 << 62
        before: frozenset[int] | None = None
        for _ in range(_ATTEMPTS):
            virtual, tensors = chooser.choose(candidates, budget - band)
            if tensors > memory:
                least = min(least, tensors)
                break
            if virtual == before:
                band //= 2
            before = virtual
            found = plan(virtual, max(1, band))
            found.memory = memory
            needed = found.arena_bytes + found.packed_bytes
            if needed <= memory:
                return found
            # The estimate knows tensors only: workspaces, packed weights and gaps come on top.
            least = min(least, needed)
            budget -= max(needed - memory, memory // 16)
        raise OutOfMemory(
            f"intermediate tensors need {readable(least)} even in bands, and the memory limit leaves "
            f"{readable(memory)} for them; raise memory_limit by {readable(least - memory)} or take a "
            "smaller image"
        )
    finally:
        choices.finish_measuring()


def _sizes(graph: Graph, inputs: dict[str, Any], dtype: torch.dtype, direct: Any) -> dict[int, int]:
    """Bytes of every base in the arena."""
    sizes = {}
    for op in graph.ops:
        outside = isinstance(op, ImportOp) and not copies(op, graph, inputs)
        if op.out >= 0 and op.out not in direct and not outside:
            n, c, h, w = graph.bases[op.out].shape
            sizes[op.out] = n * h * w * channel_stride(c) * dtype.itemsize
    return sizes


def _scratch(graph: Graph, modules: dict[str, nn.Module], inputs: dict[str, Any]) -> dict[int, int]:
    """Bytes that convolutions of label maps work in."""
    found = {}
    for op in graph.ops:
        if isinstance(op, LabelConvOp) and op.labels is not None:
            shape = label_shape(op, modules[op.path], inputs[op.labels.node], 1, 16)
            found[op.out] = _C.LabelConvLayout(_C.LabelConvShape(**shape)).scratch_bytes
    return found
