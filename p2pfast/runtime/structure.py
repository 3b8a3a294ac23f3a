"""Arguments and results with tensors in place of graph values."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast.fuse.graph import ForeignOp, Graph, ImportOp, Opaque, map_views
from p2pfast.runtime.plan import Stored


class Held:
    """An argument of an unfused operation that a plan holds."""

    def tensor(self, values: dict[str, Any]) -> torch.Tensor:
        """The tensor, found with the ``values`` of this run."""
        raise NotImplementedError


class Pinned(Held):
    """An argument of an unfused operation that lives in the arena."""

    def __init__(self, stored: Stored, shape: tuple[int, int, int, int]) -> None:
        self.stored, self.shape = stored, shape

    def tensor(self, values: dict[str, Any]) -> torch.Tensor:
        stored = self.stored
        if stored.origin:
            return values[stored.origin]
        image, channel, row, pixel = stored.strides
        arena: torch.Tensor = values["arena"]
        flat = arena.view(stored.dtype)
        return flat.as_strided(
            self.shape, (image, channel, row, pixel), stored.buffer.offset // stored.dtype.itemsize
        )


class Structure:
    """The nesting of what a network returns, with results and outside values at the leaves."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def assemble(self, results: list[torch.Tensor], values: dict[str, Any]) -> Any:
        def walk(node: Any) -> Any:
            if isinstance(node, tuple) and len(node) == 2 and node[0] == "result":
                return results[node[1]]
            if isinstance(node, Opaque):
                return values[node.node]
            if isinstance(node, (list, tuple)):
                items = [walk(x) for x in node]
                if hasattr(node, "_fields"):
                    return type(node)(*items)
                return tuple(items) if isinstance(node, tuple) else items
            if isinstance(node, dict):
                return {k: walk(v) for k, v in node.items()}
            return node

        return walk(self.tree)


def fill(value: Any, values: dict[str, Any]) -> Any:
    """Arguments with their tensors in place."""
    if isinstance(value, Held):
        return value.tensor(values)
    if isinstance(value, Opaque):
        return values[value.node]
    if isinstance(value, (list, tuple)):
        items = [fill(v, values) for v in value]
        if hasattr(value, "_fields"):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {k: fill(v, values) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(fill(value.start, values), fill(value.stop, values), fill(value.step, values))
    return value


def dense_inputs(graph: Graph) -> set[str]:
    """The inputs and other outside values that something reads as tensors."""
    found: set[str] = set()

    def note(value: Any) -> None:
        if isinstance(value, Opaque):
            found.add(value.node)

    for op in graph.ops:
        if isinstance(op, ImportOp):
            found.add(op.node)
        if isinstance(op, ForeignOp):
            map_views((op.args, op.kwargs), note)
    map_views(graph.result, note)
    return found
