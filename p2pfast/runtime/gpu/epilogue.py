"""What follows a convolution and can be done by it on the way out."""

from __future__ import annotations

from p2pfast.fuse.graph import AddOp, ConvOp, Graph, View
from p2pfast.runtime.liveness import count_uses, result_views


def _bare(view: View) -> bool:
    return view.norm is None and view.act is None


def fold(graph: Graph) -> None:
    """Moves stored statistics, additions and activations into the convolutions before them.

    A normalisation by stored statistics is a factor and a shift for each channel, known before the
    convolution; an addition needs its other operand to be there already, and the convolution's own result
    nowhere else. Normalisations by an image's own statistics stay with those who read. To be called once a
    graph, after :func:`p2pfast.runtime.liveness.settle`.
    """
    _fold_norms(graph)
    _fold_additions(graph)


def _fold_norms(graph: Graph) -> None:
    uses = count_uses(graph)
    for op in graph.ops:
        views = uses.get(op.out, [])
        norms = {v.norm for v in views}
        if not isinstance(op, ConvOp) or op.act is not None or len(norms) != 1:
            continue
        norm = norms.pop()
        if norm is not None and norm.kind == "frozen":
            op.norm = norm
            for view in views:
                object.__setattr__(view, "norm", None)
            _take_activation(op, views)


def _take_activation(op: ConvOp, views: list[View]) -> None:
    """The activation that all readers want."""
    acts = {v.act for v in views}
    if len(acts) == 1 and all(v.norm is None for v in views):
        op.act = acts.pop()
        for view in views:
            object.__setattr__(view, "act", None)


def _fold_additions(graph: Graph) -> None:
    uses = count_uses(graph)
    returned = {v.base for v in result_views(graph)}
    order = {op.out: index for index, op in enumerate(graph.ops) if op.out >= 0}
    makers = {op.out: op for op in graph.ops if op.out >= 0}
    gone: set[int] = set()
    for op in graph.ops:
        if not isinstance(op, AddOp) or op.left is None or op.right is None:
            continue
        for own, other in ((op.left, op.right), (op.right, op.left)):
            maker = makers.get(own.base)
            ends = isinstance(maker, ConvOp) and maker.act is None and maker.residual is None
            if not ends or not _bare(own) or len(uses[own.base]) != 1 or own.base in returned:
                continue
            if order[other.base] >= order[own.base]:
                continue  # it does not exist yet
            assert isinstance(maker, ConvOp)
            maker.residual, maker.act = other, op.act
            order[op.out] = order[own.base]
            makers[op.out] = maker
            maker.out = op.out
            gone.add(id(op))
            if maker.act is None:
                _take_activation(maker, uses.get(op.out, []))
            break
    graph.ops = [op for op in graph.ops if id(op) not in gone]
