"""The first layer of a label-to-image network in a plan for a GPU, from the integer label map."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast.fuse.graph import LabelConvOp
from p2pfast.runtime.gpu.convolutions import Convolutions
from p2pfast.runtime.gpu.frame import Frame
from p2pfast.runtime.gpu.plan import BEFORE, Memory, Place, Report
from p2pfast.runtime.gpu.tensors import Stored
from p2pfast.runtime.label_convolutions import label_shape


class LabelConvolutions(Convolutions):
    """Lowers convolutions of label maps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.maps: dict[str, tuple[Place, Place | None]] = {}
        self.kept: list[Any] = []

    def _label_conv(self, op: LabelConvOp) -> None:
        assert op.labels is not None
        module, labels = self.modules[op.path], self.inputs[op.labels.node]
        n, h, w, c = self._nhwc(op.out)
        ids, edges = self._map(op.labels.node, labels)
        statistics = self._needs_statistics(op.out)
        shape = label_shape(op, module, labels, n, 0)
        out = self._place((n, h, w, c), op.name)
        self.stored[op.out] = Stored(out)
        kernels = self.kernels
        taps = module.kernel_size[0] * module.kernel_size[1]
        size = f"{module.kernel_size[0]}×{module.kernel_size[1]}"
        self._report(
            Report(
                op.name,
                "label_conv",
                f"{labels.num_channels}→{c} {size} from labels @{h}×{w}",
                "the one-hot tensor is never made",
                float(n * h * w * taps * c),
                float(out.bytes + ids.bytes),
            )
        )

        def tensors() -> list[torch.Tensor]:
            return [t for t in (module.weight, module.bias) if t is not None]

        def pack() -> torch.Tensor:
            weight = module.weight.detach().float().contiguous()
            bias = None if module.bias is None else module.bias.detach().float().contiguous()
            return kernels.label_pack(shape, weight, bias)

        table = self._constant(tensors, pack)
        parts = kernels.label_parts(shape) if statistics else 0
        partial = count = None
        reads = (ids.memory,) if edges is None else (ids.memory, edges.memory)
        writes: tuple[Memory, ...] = (out.memory,)
        if parts:
            partial = self._place((n, parts, 2, c), "partial", torch.float32)
            count = self._place((parts,), "count", torch.float32)
            writes += (partial.memory, count.memory)
        work = kernels.label_scratch(shape)
        scratch = None
        if work:
            scratch = self._place((work,), "scratch", torch.uint8)
            writes += (scratch.memory,)

        def run(frame: Frame) -> None:
            kernels.label_conv(
                shape,
                frame.at(ids)[..., 0],
                None if edges is None else frame.at(edges)[..., 0],
                table(frame),
                None if scratch is None else frame.at(scratch),
                frame.at(out),
                None if partial is None else frame.at(partial),
                None if count is None else frame.at(count),
            )

        self._step(op.name, run, reads, writes)
        if partial is not None and count is not None:
            where = partial, count
            self._merge(
                op.out, lambda f: f.at(where[0]), lambda f: f.at(where[1]), (partial.memory, count.memory)
            )
        elif statistics:
            self._survey(op.out)

    def _map(self, node: str, labels: Any) -> tuple[Place, Place | None]:
        """Labels as bytes and instance edges, (N, H, W, 1): they arrive before a CUDA graph starts."""
        if node in self.maps:
            return self.maps[node]
        n, _, h, w = labels.labels.shape
        ids = self._place((n, h, w, 1), f"{node}_labels", torch.uint8)
        self._report(Report(f"{node}_labels", "layout", bytes=2.0 * ids.bytes))

        def take(frame: Frame) -> None:
            frame.at(ids)[..., 0].copy_(frame.values[node].labels.labels[:, 0])

        self._step(f"{node}_labels", take, (), (ids.memory,), BEFORE)
        edges = None
        if labels.has_edges:
            edges = self._place((n, h, w, 1), f"{node}_edges", torch.uint8)
            self._report(Report(f"{node}_edges", "instance_edges", bytes=5.0 * n * h * w))
            self._step(f"{node}_edges", self._edge_step(node, edges), (), (edges.memory,), BEFORE)
        self.maps[node] = ids, edges
        return self.maps[node]

    def _edge_step(self, node: str, edges: Place) -> Any:
        kernels = self.kernels

        def run(frame: Frame) -> None:
            kernels.edges(frame.values[node].labels.instances[:, 0], frame.at(edges)[..., 0])

        return run
