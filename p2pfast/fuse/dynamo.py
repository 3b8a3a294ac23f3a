"""``torch.compile(model, backend="p2pfast")``: TorchDynamo's graphs on the fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from p2pfast.fuse.compiled import CompiledGraph
from p2pfast.fuse.optimize import parse_bytes
from p2pfast.fuse.source import CannotRun, GraphSource
from p2pfast.fuse.training import TrainingEngine
from p2pfast.runtime import choice
from p2pfast.runtime.cpu import STORED, CpuEngine
from p2pfast.runtime.engine import Engine
from p2pfast.runtime.gpu import engine as gpu
from p2pfast.runtime.gpu import require


def backend(
    graph: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A TorchDynamo backend: convolution chains run fused where the parameters are, all else as it did.

    Where an input or a parameter requires gradients, the graph runs as a network in
    ``optimize(mode="train")`` does: chains are steps of autograd with fused forward and backward passes.
    Devices without kernels, dtypes other than float32, bfloat16 and, on a GPU, float16, and graphs that
    switch autocast on their way run in PyTorch, and the logger ``p2pfast`` says so.

    Args:
        graph: TorchDynamo's graph. example_inputs: its inputs, parameters included.
        options: ``memory_limit``, as :func:`p2pfast.optimize` takes it.

    Raises:
        ValueError: an unknown option.
    """
    options = dict(options or {})
    limit = options.pop("memory_limit", None)
    if options:
        raise ValueError(f"options has {', '.join(options)}; only memory_limit is known")
    memory = None if limit is None else parse_bytes(limit)

    def engine(
        source: GraphSource,
        dtype: torch.dtype,
        device: torch.device,
        parameters: list[torch.Tensor],
        trains: bool,
    ) -> Engine | TrainingEngine:
        on_gpu = device.type == "cuda" or gpu.on_cpu is not None
        if device.type == "cuda":
            missing = require.kernels_reason(device)
            if missing is not None:
                raise CannotRun(missing)
        elif device.type != "cpu":
            raise CannotRun(f"the parameters are on {device}")
        if dtype not in (gpu.STORED if on_gpu else STORED):
            raise CannotRun(f"dtype {dtype} has no native kernels")
        if trains:
            return TrainingEngine(source, dtype, device, lambda path, module, reason: None)
        if torch.is_autocast_enabled(device.type):
            raise CannotRun("autocast is on")
        if on_gpu:
            tests = gpu.on_cpu if device.type == "cpu" else None
            return gpu.CudaEngine(source, dtype, dtype, device, None, memory, **(tests or {}))
        packed = None if memory is None else memory // 2
        if packed is None:
            packed = choice.default_budget(dtype.itemsize * sum(p.numel() for p in parameters))
        return CpuEngine(source, dtype, dtype, packed)

    return CompiledGraph(graph, example_inputs, engine)
