"""A graph of TorchDynamo, run by an engine of ours or, where that cannot be, as it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from p2pfast.fuse.source import CannotRun, GraphSource
from p2pfast.runtime.gpu import require
from p2pfast.runtime.memory import OutOfMemory

_log = logging.getLogger("p2pfast")
_MOST_NUMBERS = 8  # values of the numbers that a graph takes, for inputs of one shape


def number(value: Any) -> Any:
    """A number that a graph takes, which may come as a tensor; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype == torch.float64:
        return value.item()
    return None


NewEngine = Callable[[GraphSource, torch.dtype, torch.device, list[torch.Tensor], bool], Any]
_AUTOCAST = ("_enter_autocast", "_exit_autocast")
_SWITCHES = ("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode", *_AUTOCAST)


def switches(graph: fx.GraphModule) -> set[str]:
    """What a graph switches on its way, of gradients and autocast."""
    names = (getattr(node.target, "__name__", "") for node in graph.graph.nodes)
    return {name for name in names if name in _SWITCHES}


def _learns(graph: fx.GraphModule, enabled: bool) -> bool:
    """Whether something is computed while gradients are on, in a call that begins with them on or off."""
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and node.op.startswith("call_"):
            return True
    return False


class CompiledGraph:
    """One graph of TorchDynamo as a function of its inputs; parameters are inputs too.

    ``reason`` says why the last call ran in PyTorch, and is None where it ran fused. ``new_engine(source,
    dtype, device, parameters, trains)`` makes what runs it for a dtype of its parameters, where ``trains``
    with gradients, or raises CannotRun.
    """

    def __init__(self, graph: fx.GraphModule, example_inputs: list[Any], new_engine: NewEngine) -> None:
        self.graph = graph
        self.switches = switches(graph)
        self.learns = {enabled: _learns(graph, enabled) for enabled in (False, True)}
        self.parameters = [isinstance(value, nn.Parameter) for value in example_inputs]
        self.source = GraphSource(graph, self.parameters)
        self.new_engine = new_engine
        self.engines: dict[Any, Any] = {}
        self.engine: Any = None  # of the last call
        self.reason: str | None = "it has not run yet"
        self.said: set[str] = set()
        self.numbers: dict[Any, set[Any]] = {}

    def _engine(self, args: tuple[Any, ...]) -> Any:
        held = [
            a
            for a, is_parameter in zip(args, self.source.held, strict=True)
            if is_parameter and isinstance(a, torch.Tensor) and a.is_floating_point()
        ]
        given = [*held, *(a for a in args if isinstance(a, torch.Tensor))]
        dtype = held[0].dtype if held else torch.float32
        device = given[0].device if given else torch.device("cpu")
        for value, is_held in zip(args, self.source.held, strict=True):
            if not is_held and isinstance(value, torch.Tensor) and value.is_floating_point():
                if value.dtype != dtype and value.dim() > 0:
                    raise CannotRun(f"the input is {value.dtype}, the parameters are {dtype}")
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        trains = self.learns[torch.is_grad_enabled()]
        trains = trains and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        key = (dtype, device, autocast, trains)
        if self.switches - {"_set_grad_enabled"}:
            raise CannotRun("it switches autocast or inference mode on its way")
        if key not in self.engines:
            self.engines[key] = self.new_engine(self.source, dtype, device, held, trains)
        self._watch_numbers(args)
        return self.engines[key]

    def _watch_numbers(self, args: tuple[Any, ...]) -> None:
        """A plan is made for the numbers that the graph takes: not one at every call."""
        free = [a for a, is_held in zip(args, self.source.held, strict=True) if not is_held]
        found = tuple(number(a) for a in free if number(a) is not None)
        if found:
            shapes = tuple(a.shape for a in free if isinstance(a, torch.Tensor))
            known = self.numbers.setdefault(shapes, set())
            known.add(found)
            if len(known) > _MOST_NUMBERS:
                raise CannotRun("a number that it takes is another one at every call")

    def __call__(self, *args: Any) -> Any:
        gradients = torch.is_grad_enabled()
        try:
            self.engine = self._engine(args)
            result = tuple(self.engine.run(args, {}))
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
        torch.set_grad_enabled(gradients)  # which it may have switched until it failed
        return self.graph(*args)

    def _say(self, reason: str, level: int) -> None:
        self.reason = reason
        if reason not in self.said:
            self.said.add(reason)
            _log.log(level, "a compiled graph runs in PyTorch: %s", reason)
