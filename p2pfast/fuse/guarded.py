"""A module whose own code defeats a trace, as TorchDynamo captures it.

TorchDynamo reads bytecode: it follows what a trace of values does not (tests of types, attributes that are
set, functions with gradients of their own), and guards all that the graph depends on, so that other shapes,
modes and attributes get a graph of their own.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from p2pfast.fuse.compiled import CompiledGraph, NewEngine, switches
from p2pfast.fuse.source import CannotRun

# Graphs of one module before it counts as one that is another at every call.
_MOST_GRAPHS = 6


class CannotGuard(CannotRun):
    """Why TorchDynamo does not help with a module."""


class Guarded:
    """``forward(module, *args, **kwargs)`` as whole graphs of TorchDynamo, run by ``new_engine``'s engines.

    ``refused`` says why not, and is None as long as it works.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any], new_engine: NewEngine) -> None:
        self.new_engine = new_engine
        self.graphs: list[CompiledGraph] = []
        self.last: CompiledGraph | None = None
        self.refused: str | None = None

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(module, *args, **kwargs)

        # TorchDynamo keeps graphs by code, and networks of one class have theirs.
        own = types.FunctionType(call.__code__.replace(), call.__globals__, "call", None, call.__closure__)
        self.compiled = torch.compile(own, backend=self._backend, fullgraph=True)

    def _backend(self, graph: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if switches(graph):
            raise CannotGuard("its forward switches gradients or autocast")
        if len(self.graphs) >= _MOST_GRAPHS:
            self.refused = f"more than {_MOST_GRAPHS} graphs for one kind of call"
        made = CompiledGraph(graph, example_inputs, self.new_engine)
        self.graphs.append(made)

        def run(*args: Any) -> Any:
            self.last = made
            return made(*args)

        return run

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], plainly: Callable[[], Any]) -> Any:
        """What the module returns; ``plainly`` runs it in PyTorch, for what TorchDynamo cannot capture."""
        self.last = None
        before = len(self.graphs)
        try:
            with warnings.catch_warnings():
                if not self.graphs:  # while it captures, it warns of what it cannot
                    warnings.simplefilter("ignore")
                result = self.compiled(*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith("torch._dynamo"):
                raise
            result = plainly()  # raises what PyTorch raises
            self.refused = _first_line(error)
            return result
        if self.last is None:
            self.refused = "TorchDynamo made no graph of it"
        elif len(self.graphs) == before and len(self.last.numbers) and self.last.reason is not None:
            self.refused = self.last.reason
        return result


def _first_line(error: BaseException) -> str:
    inner = error.__cause__ if isinstance(error.__cause__, CannotGuard) else error
    lines = str(inner).strip().splitlines()
    return lines[0] if lines else type(error).__name__
