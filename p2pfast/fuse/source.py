"""What an engine runs: a module called as it is, or a graph that TorchDynamo made."""

from __future__ import annotations

import argparse
import enum
import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from p2pfast.fuse.capture import capture
from p2pfast.fuse.graph import Derived, Graph
from p2pfast.fuse.operators import describe_function
from p2pfast.fuse.shapes import UNKNOWN, Evaluator
from p2pfast.fuse.trace import Traced, Untraceable, example, has_hooks, trace
from p2pfast.labelmap import LabelMap

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, slice, type(Ellipsis))
_CPU = torch.device("cpu")
_MOST_FAILURES = 64  # kinds of input that are remembered not to be traced


_CONV = ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")
_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_NORM = ("eps", "momentum", "track_running_stats", "num_groups")
#: Attributes of PyTorch's modules that a plan or a chain has read.
_NUMBERS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: _CONV,
    nn.ConvTranspose2d: _CONV,
    nn.AvgPool2d: _POOL,
    **dict.fromkeys((nn.InstanceNorm2d, nn.BatchNorm2d, nn.GroupNorm), _NORM),
    **dict.fromkeys((nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d), ("padding",)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), ("p",)),
    nn.LeakyReLU: ("negative_slope",),
    nn.ELU: ("alpha",),
    nn.GELU: ("approximate",),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
}
_OWN = frozenset(nn.Module().__dict__) | {"p2pfast_options", "_p2pfast"}
_SIMPLE = (bool, int, float, str, complex, type(None), torch.dtype, torch.device)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)
_SPACES = (types.SimpleNamespace, argparse.Namespace)
_LONGEST = 64  # items of a list of settings
_DEEPEST = 4  # settings within settings
_NONE = object()  # what is no setting


def settings(held: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The attributes that a network's code may depend on, to be compared with what they were; not what it may
    change in every call."""
    found = ((k, _setting(v)) for k, v in held.items() if k not in _OWN)
    return [(k, v) for k, v in found if v is not _NONE]


def _setting(value: Any, depth: int = 0) -> Any:
    kind = type(value)
    if kind in _SIMPLE or isinstance(value, (np.generic, enum.Enum)):
        return value
    if kind in _FUNCTIONS:
        return id(value)
    if depth == _DEEPEST:
        return _NONE
    if kind in (tuple, list) and len(value) <= _LONGEST:
        items = tuple(_setting(v, depth + 1) for v in value)
        return _NONE if any(item is _NONE for item in items) else items
    if kind in _SPACES or (kind is dict and len(value) <= _LONGEST):
        named = vars(value) if kind in _SPACES else value
        found = ((k, _setting(v, depth + 1)) for k, v in named.items() if isinstance(k, _SIMPLE))
        return tuple((k, v) for k, v in found if v is not _NONE)
    return _NONE


class CannotRun(Exception):
    """Why a network or an input is left to PyTorch."""


def _refuse(value: torch.Tensor, device: torch.device) -> str | None:
    if type(value) is not torch.Tensor and type(value) is not nn.Parameter:
        return f"the input is a {type(value).__name__}"
    if value.device != device:
        return f"the input is on {value.device}"
    if value.layout != torch.strided:
        return f"the input's layout is {value.layout}"
    return None


def leaf_key(value: Any) -> Any:
    """What a plan depends on of one argument."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0 and value.dtype == torch.float64:  # a number, as TorchDynamo passes them
            return value.dtype, value.item()
        return value.shape, value.dtype, value.stride()
    if isinstance(value, LabelMap):
        ids = None if value.instances is None else value.instances.dtype
        features = None if value.features is None else value.features.shape
        return "labels", value.shape, value.num_classes, ids, value.edges, features
    return type(value), value


class Captured:
    """A graph of PyTorch's operations and what its placeholders are.

    ``names`` are the placeholders of the inputs in order, ``state`` those that are parameters.
    """

    def __init__(self, traced: Traced, names: list[str], state: dict[str, Derived]) -> None:
        self.traced, self.names, self.state = traced, names, state
        self.root, self.spec = traced.root, traced.spec

    @property
    def complete(self) -> bool:
        """Whether every value's shape is known without running."""
        return all("val" in n.meta or n.op == "output" for n in self.traced.graph.nodes)

    def learn(self, arguments: list[Any]) -> Any:
        """Runs the network in PyTorch once and notes the shapes of all values; returns its results."""
        given = dict(zip(self.names, arguments, strict=True))
        nodes = [n for n in self.traced.graph.nodes if n.op == "placeholder"]
        values = [given[n.name] if n.name in given else self.state[n.name].fetch() for n in nodes]
        return _Learner(self.traced).run(*values)

    def fuse(self, inputs: dict[str, Any]) -> Graph:
        return capture(self.traced, inputs, self.state)


class _Learner(fx.Interpreter):
    def __init__(self, traced: Traced) -> None:
        super().__init__(traced.root, graph=traced.graph, garbage_collect_values=False)
        self.traced = traced

    def fetch_attr(self, target: str) -> Any:
        return self.traced.fetch(target)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, (bool, int, float)):
            return result  # it may be another one the next time
        n.meta["val"] = pytree.tree_map_only(
            torch.Tensor,
            lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"),
            result,
        )
        return result


class ModuleSource:
    """A module, traced anew for each kind of input and each state of its attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.signature = inspect.signature(type(module).forward)
        self.fitting: set[Any] = set()  # structures of arguments that forward takes
        self.modules: list[nn.Module] = list(module.modules())
        self.state: tuple[Any, ...] | None = None
        self.epochs: dict[tuple[Any, ...], int] = {}
        self.epoch = -1
        self.failures: dict[Any, Untraceable] = {}

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device = _CPU
    ) -> tuple[Any, list[Any], Any]:
        """A key, the tensors and label maps in order, and the arguments as they will be traced.

        ``device`` is where they have to be. Raises TypeError as the call itself would, CannotRun for
        arguments that are no tensors or constants.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec not in self.fitting:
            self.signature.bind(self.module, *args, **kwargs)
            self.fitting.add(spec)
        tensors: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                reason = _refuse(leaf, device)
                if reason is not None:
                    raise CannotRun(reason)
                tensors.append(leaf)
            elif isinstance(leaf, LabelMap):
                if leaf.device != device:
                    raise CannotRun(f"the labels are on {leaf.device}")
                tensors.append(leaf)
            elif not isinstance(leaf, _CONSTANTS):
                raise CannotRun(f"an argument is a {type(leaf).__name__}")
        key = (self._epoch(), spec, *[leaf_key(leaf) for leaf in leaves])
        return key, tensors, (args, kwargs)

    def _epoch(self) -> int:
        """A number for the state of all modules: modes, plain attributes, children and hooks."""
        state = self._state()
        if state != self.state:
            self.modules = list(self.module.modules())
            self.state = self._state()
            try:
                self.epoch = self.epochs.setdefault(self.state, len(self.epochs))
            except TypeError:  # a list in the place of a tuple
                self.epoch = self.epochs.setdefault((repr(self.state),), len(self.epochs))
        return self.epoch

    def hooks(self) -> tuple[Any, ...]:
        """The hooks of all modules, by module and number."""
        tables = (getattr(m, name) for m in self.modules for name in _HOOKS)
        return tuple((id(table), *table) for table in tables if table)

    def _state(self) -> tuple[Any, ...]:
        parts: list[Any] = []
        for module in self.modules:
            held = module.__dict__
            parts.append(held["training"])
            if held["_modules"]:
                parts += map(id, held["_modules"].values())
            tables = [held[name] for name in _HOOKS]
            if any(tables):
                parts.append(tuple(tuple(table) for table in tables))
            kind = type(module)
            if kind.__module__.startswith("torch.nn.modules."):
                # The number of attributes tells of a method that was replaced.
                parts.append((len(held), *map(held.get, _NUMBERS.get(kind, ()))))
                continue
            parts += settings(held)
        return tuple(parts)

    def capture(self, arguments: Any, tensors: list[Any], dtype: torch.dtype | None) -> Captured:
        """Raises CannotRun, with the reason, for a module that cannot be one graph."""
        if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
            raise CannotRun("there are hooks on all modules")
        leaves, spec = pytree.tree_flatten(arguments)
        kind = (self._epoch(), spec, *[leaf_key(leaf) for leaf in leaves], dtype, torch.is_grad_enabled())
        if kind in self.failures:
            raise CannotFollow(self.failures[kind])
        try:
            traced = trace(self.module, arguments, dtype)
        except Untraceable as why:
            if len(self.failures) >= _MOST_FAILURES:
                self.failures.clear()
            self.failures[kind] = why
            raise CannotFollow(why) from why
        names = [n.name for n in traced.graph.nodes if n.op == "placeholder"]
        return Captured(traced, names, {})

    def pieces(self, captured: Captured) -> list[tuple[str, nn.Module, str]]:
        """The submodules that run whole: those that cannot be followed, and those with hooks."""
        found = []
        opaque = captured.traced.opaque
        for node in captured.traced.graph.nodes:
            if node.op == "call_module":
                module = self.module.get_submodule(str(node.target))
                if id(module) in opaque:
                    found.append((str(node.target), module, opaque[id(module)]))
                elif has_hooks(module):
                    found.append((str(node.target), module, "the module has hooks"))
        return found


class RunsAsWell(CannotRun):
    """PyTorch measured faster for inputs like these, and may run them without asking again."""


class CannotFollow(CannotRun):
    """Why a module's own code cannot be traced; TorchDynamo may capture it where ``guardable``, and its
    submodules can be tried."""

    def __init__(self, why: Untraceable) -> None:
        super().__init__(str(why))
        self.guardable = why.guardable


class GraphSource:
    """A graph that takes its parameters as inputs, as TorchDynamo makes them."""

    def __init__(self, module: fx.GraphModule, parameters: list[bool]) -> None:
        self.module = module
        self.bound: tuple[Any, ...] = ()
        nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
        self.names = [n.name for n in nodes]
        used = _used_as_parameters(module)
        # What nothing reads is no input that a plan depends on.
        self.held = [
            given or node in used or not node.users for node, given in zip(nodes, parameters, strict=True)
        ]

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device = _CPU
    ) -> tuple[Any, list[Any], Any]:
        self.bound = args
        free = []
        for value, held in zip(args, self.held, strict=True):
            if isinstance(value, torch.Tensor):
                reason = None if type(value) in (torch.Tensor, nn.Parameter) else "a tensor of another class"
                if value.device != device:
                    reason = f"a tensor is on {value.device}"
                if reason is not None:
                    raise CannotRun(reason)
            if not held:
                free.append(value)
        return tuple(leaf_key(value) for value in free), free, args

    def capture(self, arguments: Any, tensors: list[Any], dtype: torch.dtype | None) -> Captured:
        evaluator = Evaluator(self.module)
        graph = _copied(self.module.graph)  # plans of several kinds of inputs keep theirs
        state: dict[str, Derived] = {}
        free = []
        position = -1
        for node in graph.nodes:
            node.meta.pop("val", None)
            if node.op == "placeholder":
                position += 1
                value = arguments[position]
                if self.held[position]:
                    node.meta["val"] = evaluator.twin(value) if isinstance(value, torch.Tensor) else value
                    state[node.name] = self._parameter(node.name, position)
                else:
                    free.append(node.name)
                    number = not isinstance(value, torch.Tensor) or (
                        value.dim() == 0 and value.dtype == torch.float64
                    )
                    node.meta["val"] = value if number else example(value, dtype)
            elif node.op != "output":
                found = evaluator.evaluate(node)
                if found is not UNKNOWN:
                    node.meta["val"] = found
        return Captured(Traced(self.module, graph, {}, {}, None), free, state)

    def _parameter(self, name: str, position: int) -> Derived:
        return Derived(name, lambda: self.bound[position], lambda: [self.bound[position]])

    def pieces(self, captured: Captured) -> list[tuple[str, nn.Module, str]]:
        return []


def _copied(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph(graph.owning_module)
    copied.output(copied.graph_copy(graph, {}))
    return copied


def _used_as_parameters(module: fx.GraphModule) -> set[fx.Node]:
    """Placeholders in the place of a weight, bias or statistic."""
    used: set[fx.Node] = set()
    for node in module.graph.nodes:
        call = describe_function(node) if node.op in ("call_function", "call_method") else None
        if call is not None and call.kind in ("conv", "norm"):
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = call.options.get(name)
                if isinstance(value, fx.Node) and value.op == "placeholder":
                    used.add(value)
    return used
