"""Arguments and results with tensors in place of graph values."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast.fuse.graph import Opaque
from p2pfast.runtime.plan import Stored


class Pinned:
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
    if isinstance(value, Pinned):
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
