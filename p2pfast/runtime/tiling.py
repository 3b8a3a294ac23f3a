"""Which tensors a network does without when memory is short: what is not kept is computed again, in bands.

A tensor that is not kept costs a pass for its statistics and one for every operation that reads it, each
from the nearest kept tensors. The choice is greedy: as long as some operation needs more than the limit, the
tensor goes that takes the most off the excess for each multiplication done again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from p2pfast.fuse.graph import AddOp, ApplyOp, ConvOp, Graph, ImportOp, LabelConvOp, Op, PoolOp, View
from p2pfast.runtime.bands import splittable
from p2pfast.runtime.liveness import Liveness, count_uses, needs_statistics, views_of


def recomputable(graph: Graph, modules: dict[str, nn.Module], direct: dict[int, View]) -> set[int]:
    """Bases that bands of their readers can compute again: what PyTorch neither makes nor reads."""
    pinned = Liveness(graph).pinned
    found: set[int] = set()
    needed: set[int] = set()
    for op in graph.ops:
        known = isinstance(op, (ConvOp, LabelConvOp, AddOp, PoolOp, ImportOp, ApplyOp))
        whole = isinstance(op, ApplyOp) and op.dropout > 0.0
        out_height = graph.bases[op.out].shape[2] if op.out >= 0 else 0
        for view in views_of(op):
            height = graph.bases[view.base].shape[2]
            whole = whole or not splittable(op, modules, height, out_height)
        if whole:
            needed.update(v.base for v in views_of(op))
        if known and not whole and op.out >= 0 and op.out not in pinned and op.out not in direct:
            found.add(op.out)
    return found - needed


def cost(graph: Graph, modules: dict[str, nn.Module], op: Op) -> float:
    """About the multiplications of an operation; moving a value counts as a few."""
    n, c, h, w = graph.bases[op.out].shape
    if not isinstance(op, ConvOp):
        return 16.0 * n * c * h * w
    module: Any = modules[op.path]
    taps = (
        module.kernel_size[0] * module.kernel_size[1] * sum(graph.bases[v.base].shape[1] for v in op.inputs)
    )
    if module.transposed:
        taps /= module.stride[0] ** 2
    return float(taps) * n * c * h * w


class Chooser:
    """``sizes``: bytes of each base, if it is kept; ``scratch``: what computing one takes besides."""

    def __init__(
        self, graph: Graph, modules: dict[str, nn.Module], sizes: dict[int, int], scratch: dict[int, int]
    ) -> None:
        self.graph, self.sizes, self.scratch = graph, sizes, scratch
        self.uses = count_uses(graph)
        self.costs = {op.out: cost(graph, modules, op) for op in graph.ops if op.out >= 0}

    def profile(self, virtual: frozenset[int]) -> tuple[list[int], float]:
        """Bytes alive at each operation, and the multiplications done again."""
        live = Liveness(self.graph, virtual)
        alive, again = [0] * len(self.graph.ops), 0.0
        for i, op in enumerate(self.graph.ops):
            if op.out < 0:
                continue
            if op.out not in virtual:
                for j in range(i, min(live.last.get(op.out, i), len(alive) - 1) + 1):
                    alive[j] += self.sizes.get(op.out, 0)
                reused = live.reusable(op)
                if reused is not None:
                    alive[i] -= self.sizes.get(reused, 0)
            if op.out not in virtual or needs_statistics(self.uses, op.out):
                alive[i] += sum(self.scratch.get(link.out, 0) for link in (*live.chains[i], op))
                again += sum(self.costs[link.out] for link in live.chains[i])
        return alive, again

    def choose(self, candidates: set[int], budget: int) -> tuple[frozenset[int], int]:
        """The bases to do without so that ``budget`` bytes suffice, and what is needed then, which is more
        than the budget where nothing helps any further."""
        virtual: frozenset[int] = frozenset()
        alive, again = self.profile(virtual)
        while max(alive) > budget:
            excess = sum(max(0, a - budget) for a in alive)
            best: tuple[float, frozenset[int], list[int], float] | None = None
            over = [i for i, a in enumerate(alive) if a > budget]
            live = Liveness(self.graph, virtual)
            for base in candidates - virtual:
                index = live.index[base]
                if not any(index <= i <= live.last.get(base, index) for i in over):
                    continue
                trial = virtual | {base}
                trial_alive, trial_again = self.profile(trial)
                gain = excess - sum(max(0, a - budget) for a in trial_alive)
                score = gain / (max(0.0, trial_again - again) + 1e6)
                if gain > 0 and (best is None or score > best[0]):
                    best = (score, trial, trial_alive, trial_again)
            if best is None:
                break
            _, virtual, alive, again = best
        return virtual, max(alive)
