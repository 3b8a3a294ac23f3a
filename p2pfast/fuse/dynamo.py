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
        self.engines: dict[torch.dtype, CpuEngine] = {}
        self.reason: str | None = "it has not run yet"
        self.said: set[str] = set()

    def _engine(self, args: tuple[Any, ...]) -> CpuEngine:
        if torch.is_autocast_enabled("cpu"):
            raise CannotRun("autocast is on")
        held = [
            a
            for a, is_parameter in zip(args, self.source.held, strict=True)
            if is_parameter and isinstance(a, torch.Tensor) and a.is_floating_point()
        ]
        dtype = held[0].dtype if held else torch.float32
        if dtype not in STORED:
            raise CannotRun(f"dtype {dtype} has no native kernels")
        for value, is_held in zip(args, self.source.held, strict=True):
            if not is_held and isinstance(value, torch.Tensor) and value.is_floating_point():
                if value.dtype != dtype and value.dim() > 0:
                    raise CannotRun(f"the input is {value.dtype}, the parameters are {dtype}")
        if dtype not in self.engines:
            limit = self.memory_limit
            if limit is None:
                limit = choice.default_budget(dtype.itemsize * sum(p.numel() for p in held))
            self.engines[dtype] = CpuEngine(self.source, dtype, dtype, limit)
        return self.engines[dtype]

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
    """A TorchDynamo backend: convolution chains run fused on the CPU, everything else as it did.

    Inputs that require gradients, other devices and other dtypes than float32 and bfloat16 run the graph in
    PyTorch, and the logger ``p2pfast`` says so.

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
    return CompiledGraph(graph, example_inputs, None if limit is None else parse_bytes(limit) // 2)
