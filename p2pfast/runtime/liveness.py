"""Who reads what in a fused graph, until when, and what can be computed again instead of being kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from p2pfast.fuse.graph import (
    AddOp,
    ApplyOp,
    ConvOp,
    ForeignOp,
    Graph,
    ImportOp,
    Op,
    PoolOp,
    View,
    map_views,
)


def views_of(op: Op) -> list[View]:
    """The views an operation reads."""
    if isinstance(op, ConvOp):
        return [*op.inputs, *([] if op.residual is None else [op.residual])]
    if isinstance(op, AddOp):
        return [v for v in (op.left, op.right) if v is not None]
    if isinstance(op, (ApplyOp, PoolOp)):
        return [op.view] if op.view is not None else []
    found: list[View] = []
    if isinstance(op, ForeignOp):
        map_views((op.args, op.kwargs), lambda v: found.append(v) if isinstance(v, View) else None)
    return found


def result_views(graph: Graph) -> list[View]:
    """The views that are returned."""
    views: list[View] = []
    map_views(graph.result, lambda v: views.append(v) if isinstance(v, View) else None)
    return views


def count_uses(graph: Graph) -> dict[int, list[View]]:
    """Every view of each base."""
    uses: dict[int, list[View]] = {}
    for op in graph.ops:
        for view in views_of(op):
            uses.setdefault(view.base, []).append(view)
    for view in result_views(graph):
        uses.setdefault(view.base, []).append(view)
    return uses


def needs_statistics(uses: dict[int, list[View]], base: int) -> bool:
    """Whether someone normalises the base by its own statistics."""
    return any(v.norm is not None and v.norm.kind != "frozen" for v in uses.get(base, []))


def settle(graph: Graph) -> dict[int, View]:
    """Moves activations into the convolutions that can do them on the way out; to be called once a graph.

    Returns the bases that are results as they stand, which are written straight into the caller's tensor.
    """
    uses = count_uses(graph)
    producers = {op.out: op for op in graph.ops}
    direct: dict[int, View] = {}
    for view in result_views(graph):
        producer = producers.get(view.base)
        alone = len(uses[view.base]) == 1 and view.norm is None
        channels = graph.bases[view.base].shape[1]
        if alone and isinstance(producer, ConvOp) and producer.act is None and channels <= 8:
            producer.act = view.act
            direct[view.base] = view
    for op in graph.ops:
        if not isinstance(op, ConvOp) or op.act is not None or op.out in direct:
            continue
        # An activation that every reader wants, with no normalisation before it.
        acts = {v.act for v in uses.get(op.out, [])}
        if len(acts) == 1 and None not in acts and all(v.norm is None for v in uses[op.out]):
            op.act = acts.pop()
            for view in uses[op.out]:
                object.__setattr__(view, "act", None)
    return direct


@dataclass
class Liveness:
    """Lifetimes when the bases in ``virtual`` are not kept, but computed again in bands by their readers."""

    graph: Graph
    virtual: frozenset[int] = frozenset()
    last: dict[int, int] = field(default_factory=dict)  # index of the last operation that needs a kept base

    def __post_init__(self) -> None:
        ops = self.graph.ops
        self.index = {op.out: i for i, op in enumerate(ops) if op.out >= 0}
        self.chains = [self._chain(op) for op in ops]
        self.pinned = {v.base for v in result_views(self.graph)}
        for i, op in enumerate(ops):
            if isinstance(op, ForeignOp):
                self.pinned.update(v.base for v in views_of(op))
            for link in (*self.chains[i], op):
                for view in views_of(link):
                    if view.base not in self.virtual:
                        self.last[view.base] = i
        for base in self.pinned:
            self.last[base] = len(ops)

    def _chain(self, op: Op) -> list[Op]:
        """The operations whose results ``op`` needs and that are not kept, in order."""
        if not self.virtual:
            return []
        wanted: set[int] = set()
        pending = [v.base for v in views_of(op)]
        while pending:
            base = pending.pop()
            if base in self.virtual and base not in wanted:
                wanted.add(base)
                pending += [v.base for v in views_of(self.graph.ops[self.index[base]])]
        return [self.graph.ops[i] for i in sorted(self.index[base] for base in wanted)]

    def chain(self, op: Op) -> list[Op]:
        return self.chains[self.index[op.out]] if op.out >= 0 else []

    def reusable(self, op: Op) -> int | None:
        """A base that ends with ``op``, an elementwise operation, and whose memory can take its result."""
        if not isinstance(op, (AddOp, ApplyOp)) or op.out in self.virtual or op.out in self.pinned:
            return None
        i = self.index[op.out]
        others = {v.base for link in self.chains[i] for v in views_of(link)}
        for view in views_of(op):
            kept = view.base not in self.virtual and view.base not in self.pinned
            if kept and view.base not in others and self.last[view.base] == i:
                if not isinstance(self.graph.ops[self.index[view.base]], ImportOp):
                    return view.base
        return None
