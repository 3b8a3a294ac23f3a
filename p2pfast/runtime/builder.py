"""What every part of the planner builds on: memory, addresses, facts of the graph, the list of steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from p2pfast import _C
from p2pfast.fuse.graph import (
    Act,
    Graph,
    Norm,
    View,
)
from p2pfast.runtime.choice import Choice, Options
from p2pfast.runtime.liveness import Liveness, count_uses, needs_statistics
from p2pfast.runtime.memory import Buffer
from p2pfast.runtime.plan import Constant, Pack, Plan, Report, Result, Stored

ACTS = {"relu": 1, "leaky_relu": 2, "tanh": 3, "sigmoid": 4, "elu": 5, "silu": 6, "gelu": 7}
PADS = {"zeros": 0, "reflect": 1, "replicate": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

Address = Callable[[], int]


def channel_stride(channels: int) -> int:
    """Elements between pixels of a tensor inside a plan."""
    return -(-channels // 16) * 16


def act_fields(act: Act | None) -> dict[str, Any]:
    return {} if act is None else {"act": ACTS[act.kind], "slope": act.slope}


class Builder:
    """State of lowering one graph. ``modules`` maps paths to modules; ``dtype`` is that of stored tensors.

    ``options`` collects what could run each convolution; ``chosen`` says what does, where it is not the
    quickest. Bases in ``virtual`` are not kept but computed in bands of about ``band_bytes`` where they are
    needed. Algorithms in ``narrow`` pack their weights in bfloat16.
    """

    def __init__(
        self,
        graph: Graph,
        modules: dict[str, nn.Module],
        inputs: dict[str, Any],
        dtype: torch.dtype,
        packs: dict[Any, Pack],
        chosen: dict[str, Choice],
        direct: dict[int, View],
        virtual: frozenset[int] = frozenset(),
        band_bytes: int = 0,
        narrow: tuple[int, ...] = (),
    ) -> None:
        self.graph, self.modules, self.inputs, self.dtype = graph, modules, inputs, dtype
        self.packs, self.chosen, self.narrow = packs, chosen, narrow
        self.options: dict[str, Options] = {}
        self.others: dict[str, Options] = {}  # for bands that refuse all of these
        self.plan = Plan()
        self.buffers: list[Buffer] = []
        self.steps: list[Callable[[Any], int]] = []
        self.stored: dict[int, Stored] = {}
        self.norms: dict[tuple[int, Norm], tuple[Buffer | Address, Buffer | Address, int]] = {}
        self.workspace = self._buffer(64)
        self.uses = count_uses(graph)
        self.direct, self.virtual, self.band_bytes = direct, virtual, band_bytes
        self.live = Liveness(graph, virtual)
        self.results: dict[int, Result] = {}
        self.weights: dict[tuple[int, Choice], dict[str, Address]] = {}
        self.packed_sizes: dict[tuple[str, int, bool], int] = {}
        self.tables: dict[int, Address] = {}
        self.edge_maps: dict[str, Buffer] = {}
        self.scratch: dict[int, Buffer] = {}
        self.outside: dict[int, Stored] = {}

    # --- memory ------------------------------------------------------------------------------------

    def _buffer(self, size: int) -> Buffer:
        buffer = Buffer(max(64, int(size)), 0)
        self.buffers.append(buffer)
        return buffer

    def _slot(self) -> int:
        self.plan.slots += 1
        return self.plan.slots - 1

    @property
    def step(self) -> int:
        return len(self.steps)

    def _at(self, buffer: Buffer) -> Address:
        """The buffer's address; it must live while the step being built runs."""
        buffer.touch(self.step)
        return lambda: _C.slot_address(buffer.slot, buffer.offset)

    def _parameter(self, fetch: Callable[[], torch.Tensor]) -> Address:
        slot = self._slot()
        self.plan.parameters.append((slot, fetch))
        return lambda: _C.slot_address(slot, 0)

    def _constant(
        self, size: int, parameters: Callable[[], list[torch.Tensor]], fill: Callable[[torch.Tensor], Any]
    ) -> Address:
        """``size`` floats derived from parameters, kept outside the arena."""
        tensor = torch.zeros(size + 16, device="cpu")
        start = (-tensor.data_ptr() // 4) % 16
        view = tensor[start : start + size]
        self.plan.keep.append(tensor)
        self.plan.constants.append(Constant(parameters, lambda: fill(view)))
        address = view.data_ptr()
        return lambda: address

    # --- graph facts -------------------------------------------------------------------------------

    def _needs_statistics(self, base: int) -> bool:
        return needs_statistics(self.uses, base)

    def _shape(self, base: int) -> tuple[int, int, int, int]:
        return self.graph.bases[base].shape

    # --- steps -------------------------------------------------------------------------------------

    def _add(self, build: Callable[[Any], int]) -> None:
        self.steps.append(build)

    def _report(self, report: Report) -> None:
        report.step = self.step
        self.plan.reports.append(report)
