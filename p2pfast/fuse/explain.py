"""``explain``: which kernel runs each layer of an optimised network, how long it takes, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from p2pfast.fuse.optimize import Optimized
from p2pfast.fuse.training import TrainingEngine
from p2pfast.runtime.cpu import CpuEngine
from p2pfast.runtime.gpu.engine import CudaEngine
from p2pfast.runtime.gpu.plan import GpuPlan
from p2pfast.runtime.memory import readable
from p2pfast.runtime.peak import peak_gigaflops
from p2pfast.runtime.plan import Plan


@dataclass
class Row:
    """One operation: its name in the network, its kernel, and what the last run took."""

    name: str
    kernel: str
    detail: str
    seconds: float
    gigaflops: float
    megabytes: float
    share: float = 0.0  # of the processor's measured peak
    reason: str = ""  # why this kernel, where there was a choice


@dataclass
class Explanation:
    """What :func:`explain` returns; ``str()`` makes a table of it.

    ``unfused`` are operations that run in PyTorch, ``pieces`` submodules with a plan of their own, each by
    name and with the reason.
    """

    rows: list[Row] = field(default_factory=list)
    unfused: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""
    pieces: list[tuple[str, str]] = field(default_factory=list)
    memory: str = ""

    @property
    def seconds(self) -> float:
        """Time of the native steps of the last run."""
        return sum(row.seconds for row in self.rows)

    def __str__(self) -> str:
        lines = [self.note] if self.note else []
        if self.rows:
            width = max(len("layer"), *(len(r.name) for r in self.rows))
            kernel = max(len("kernel"), *(len(r.kernel) for r in self.rows))
            detail = max(len("shape"), *(len(r.detail) for r in self.rows))
            columns = f"{'ms':>8}  {'GFLOP/s':>8}  {'peak':>5}  {'MB':>7}"
            lines.append(f"{'layer':{width}}  {'kernel':{kernel}}  {'shape':{detail}}  {columns}")
            for r in self.rows:
                speed = f"{r.gigaflops:8.0f}  {r.share:5.0%}" if r.gigaflops else " " * 15
                lines.append(
                    f"{r.name:{width}}  {r.kernel:{kernel}}  {r.detail:{detail}}  "
                    f"{r.seconds * 1e3:8.2f}  {speed}  {r.megabytes:7.1f}{'  ' if r.reason else ''}{r.reason}"
                )
            lines.append(f"native steps: {self.seconds * 1e3:.1f} ms")
        if self.memory:
            lines.append(self.memory)
        for name, reason in self.pieces:
            lines.append(f"a piece of its own: {name}: {reason}")
        for name, reason in self.unfused:
            lines.append(f"left to PyTorch: {name}: {reason}")
        return "\n".join(lines)


def explain(model: nn.Module) -> Explanation:
    """What ran in the last call of an optimised network.

    On a GPU the steps are timed now, one after the other, on whatever the last call left in memory.

    GFLOP/s counts the operations really done (minimal filtering needs fewer than the convolution's
    definition), and peak is their share of what the matrix kernel reaches on this processor while its
    operands are in the caches, in float32 or, for layers that multiply bfloat16 pairs, of those; MB is what
    the layer reads and writes at least.

    Raises TypeError for a module that :func:`p2pfast.optimize` did not return.
    """
    if not isinstance(model, Optimized):
        raise TypeError(f"model is {type(model).__name__}; explain takes what p2pfast.optimize returns")
    return _explain(model, "")


def _explain(model: nn.Module, prefix: str) -> Explanation:
    state = model.__dict__["_p2pfast"]
    found = Explanation()
    if state.reason is not None:
        found.note = f"runs in PyTorch: {state.reason}"
    elif state.engine is None or state.engine.last is None:
        found.note = "not run yet: call the network once, then explain it"
    elif isinstance(state.engine, CudaEngine):
        plan, graph, _ = state.engine.last
        for report, spent in zip(plan.reports, state.engine.seconds(), strict=True):
            speed = 2e-9 * report.multiplications / spent if spent and report.multiplications else 0.0
            found.rows.append(
                Row(
                    prefix + report.name,
                    report.kernel,
                    report.detail,
                    spent,
                    speed,
                    report.bytes / 1e6,
                    reason=report.reason,
                )
            )
        found.unfused += [(prefix + name, reason) for name, reason in graph.notes]
        found.memory = f"{_memory(state.engine, plan)}; {state.engine.how()}"
    elif isinstance(state.engine, TrainingEngine):
        program = state.engine.last
        for part in program.reports:
            found.rows.append(Row(prefix + part.name, part.kernel, part.detail, part.seconds, 0.0, 0.0))
        found.unfused += [(prefix + name, reason) for name, reason in program.notes]
    else:
        plan, graph, seconds = state.engine.last
        for index, report in enumerate(plan.reports):
            last = plan.reports[index + 1].step if index + 1 < len(plan.reports) else len(seconds)
            spent = sum(seconds[report.step : last])
            speed = 2e-9 * report.multiplications / spent if spent and report.multiplications else 0.0
            share = speed / peak_gigaflops("pairs" in report.kernel) if speed else 0.0
            row = Row(
                prefix + report.name, report.kernel, report.detail, spent, speed, report.bytes / 1e6, share
            )
            found.rows.append(row)
        found.unfused += [(prefix + name, reason) for name, reason in graph.notes]
        found.memory = _memory(state.engine, plan)
    for path, (module, reason) in state.pieces.items():
        piece = _explain(module, f"{prefix}{path}.")
        found.pieces.append((prefix + path, f"{reason}; {piece.note}" if piece.note else reason))
        found.pieces += piece.pieces
        found.rows += piece.rows
        found.unfused += piece.unfused
    if state.pieces and state.reason is not None:
        found.note = f"optimised in {len(state.pieces)} pieces, not as one: {state.reason}"
    return found


def _memory(engine: CpuEngine | CudaEngine, plan: Plan | GpuPlan) -> str:
    peak = plan.arena_bytes + plan.packed_bytes + plan.outside_bytes
    parts = [
        f"intermediate tensors {readable(plan.arena_bytes)}",
        f"packed weights {readable(plan.packed_bytes)}",
        f"parameters, inputs and results {readable(plan.outside_bytes)}",
    ]
    limit = "no limit" if engine.memory_limit is None else f"limit {readable(engine.memory_limit)}"
    if isinstance(plan, Plan):
        limit += f", up to {plan.bands} bands" if plan.bands else ", no bands"
    return f"memory: {', '.join(parts)}: at most {readable(peak)} ({limit})"
