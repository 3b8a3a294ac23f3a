"""``torch.compile(model, backend="p2pfast")``: TorchDynamo's graphs on the fused kernels."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from p2pfast.fuse.optimize import parse_bytes
from p2pfast.fuse.source import CannotRun, GraphSource
from p2pfast.runtime import choice
from p2pfast.runtime.cpu import STORED, CpuEngine
from p2pfast.runtime.engine import Engine
from p2pfast.runtime.gpu import engine as gpu
from p2pfast.runtime.gpu import require
from p2pfast.runtime.memory import OutOfMemory

_log = logging.getLogger("p2pfast")


class CompiledGraph:
    """One graph of TorchDynamo as a function of its inputs; parameters are inputs too.

    ``reason`` says why the last call ran in PyTorch, and is None where it ran fused.
    """

    def __init__(self, graph: fx.GraphModule, example_inputs: list[Any], memory_limit: int | None) -> None:
        self.graph = graph
        self.parameters = [isinstance(value, nn.Parameter) for value in example_inputs]
        self.source = GraphSource(graph, self.parameters)
        self.memory_limit = memory_limit
        self.engines: dict[tuple[torch.dtype, torch.device], Engine] = {}
        self.reason: str | None = "it has not run yet"
        self.said: set[str] = set()

    def _engine(self, args: tuple[Any, ...]) -> Engine:
        held = [
            a
            for a, is_parameter in zip(args, self.source.held, strict=True)
            if is_parameter and isinstance(a, torch.Tensor) and a.is_floating_point()
        ]
        given = [*held, *(a for a in args if isinstance(a, torch.Tensor))]
        dtype = held[0].dtype if held else torch.float32
        device = given[0].device if given else torch.device("cpu")
        if torch.is_autocast_enabled(device.type):
            raise CannotRun("autocast is on")
        on_gpu = device.type == "cuda" or gpu.on_cpu is not None
        if device.type == "cuda":
            missing = require.kernels_reason(device)
            if missing is not None:
                raise CannotRun(missing)
        elif device.type != "cpu":
            raise CannotRun(f"the parameters are on {device}")
        if dtype not in (gpu.STORED if on_gpu else STORED):
            raise CannotRun(f"dtype {dtype} has no native kernels")
        for value, is_held in zip(args, self.source.held, strict=True):
            if not is_held and isinstance(value, torch.Tensor) and value.is_floating_point():
                if value.dtype != dtype and value.dim() > 0:
                    raise CannotRun(f"the input is {value.dtype}, the parameters are {dtype}")
        key = dtype, device
        if key not in self.engines:
            if on_gpu:
                tests = gpu.on_cpu if device.type == "cpu" else None
                self.engines[key] = gpu.CudaEngine(
                    self.source, dtype, dtype, device, None, self.memory_limit, **(tests or {})
                )
            else:
                limit = None if self.memory_limit is None else self.memory_limit // 2
                if limit is None:
                    limit = choice.default_budget(dtype.itemsize * sum(p.numel() for p in held))
                self.engines[key] = CpuEngine(self.source, dtype, dtype, limit)
        return self.engines[key]

    def __call__(self, *args: Any) -> Any:
        try:
            if torch.is_grad_enabled():
                if any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                    raise CannotRun("gradients are required; training runs in PyTorch")
            result = tuple(self._engine(args).run(args, {}))
            self.reason = None
            return result
        except CannotRun as why:
            self._say(str(why), logging.INFO)
        except OutOfMemory:
            raise  # PyTorch would need more
        except require.CannotUseGpu as why:
            self._say(str(why), logging.WARNING)
        except Exception as error:
            if os.environ.get("P2PFAST_STRICT") == "1":
                self.graph(*args)  # raises what PyTorch raises
                raise
            self._say(f"{type(error).__name__}: {error}; please report it", logging.WARNING)
        finally:
            self.source.bound = ()
        return self.graph(*args)

    def _say(self, reason: str, level: int) -> None:
        self.reason = reason
        if reason not in self.said:
            self.said.add(reason)
            _log.log(level, "a compiled graph runs in PyTorch: %s", reason)


def backend(
    graph: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """A TorchDynamo backend: convolution chains run fused where the parameters are, all else as it did.

    Inputs that require gradients, devices without kernels and dtypes other than float32, bfloat16 and, on a
    GPU, float16 run the graph in PyTorch, and the logger ``p2pfast`` says so.

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
    return CompiledGraph(graph, example_inputs, None if limit is None else parse_bytes(limit))
