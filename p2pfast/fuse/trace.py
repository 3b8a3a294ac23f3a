"""Tracing a module with torch.fx for one kind of input, and refusing what a trace would not repeat.

The values that flow through the trace know their shapes, so control flow on shapes is followed. A module
whose code cannot be followed stays whole, and so does one with hooks, so that they run.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import operator
import random
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from p2pfast.fuse.layers import weight_hooks
from p2pfast.fuse.operators import changes_in_place, makes_new
from p2pfast.fuse.shapes import UNKNOWN, Evaluator
from p2pfast.labelmap import LabelMap

_MOST_OPAQUE = 16  # submodules that cannot be followed before the whole module counts as such

# Recorded although no argument is a traced value: what they make would else be one constant for all runs.
_FACTORIES = {
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
}


class Untraceable(Exception):
    """Why a module cannot be captured as one graph.

    ``guardable``: TorchDynamo, which watches more than a trace does, may make one of it all the same.
    """

    def __init__(self, reason: str, guardable: bool = True) -> None:
        super().__init__(reason)
        self.guardable = guardable


class _SideEffect(Exception):
    """``module`` changes its attribute ``name`` when it runs; ``kept`` is what it holds then.

    A tensor that is put there at every call can be put there again. A number or a list that grows is
    another one at every call, and a guard on it would fail at every call.
    """

    def __init__(self, module: nn.Module, name: str, kept: Any) -> None:
        super().__init__(f"running it changes its attribute {name!r}")
        self.module = module
        leaves = pytree.tree_leaves(kept)
        self.guardable = bool(leaves) and all(isinstance(v, (fx.Proxy, torch.Tensor)) for v in leaves)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward; hooks that compute a weight do not count."""
    return bool(
        module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or len(module._forward_pre_hooks) > len(weight_hooks(module))
    )


_tracing = threading.RLock()  # torch.fx and _values_pass_for_tensors replace what all threads use


@contextlib.contextmanager
def _values_pass_for_tensors() -> Iterator[None]:
    """``isinstance`` finds traced tensors to be what they stand for.

    Only Python's tests do: native code, which would read the memory of a tensor, has to refuse them.
    """
    original = builtins.isinstance

    def check(value: Any, kinds: Any) -> bool:
        if original(value, kinds):
            return True
        if type(value) is fx.proxy.Attribute and value.attr == "data":
            value = value.root
        if type(value) is not _Value or value._val is None:
            return False
        tracer: Any = value.tracer
        kind, device = value._val.dtype, tracer.device
        return original(_of_kind(kind, device), kinds)

    builtins.isinstance = check
    try:
        yield
    finally:
        builtins.isinstance = original


@functools.cache
def _of_kind(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return torch.empty(0, dtype=dtype, device=device)


class _Value(fx.Proxy):
    """A traced tensor that knows its shape."""

    @property
    def _val(self) -> torch.Tensor | None:
        value = self.node.meta.get("val")
        return value if isinstance(value, torch.Tensor) else None

    def __getattr__(self, name: str) -> Any:
        value = self._val
        if value is not None:
            if name in ("shape", "dtype", "ndim", "itemsize", "layout", "is_sparse", "is_quantized"):
                return getattr(value, name)
            if name in ("device", "is_cuda"):
                device: torch.device = self.tracer.device  # type: ignore[attr-defined]
                return device if name == "device" else device.type == "cuda"
            if name == "requires_grad" and self.tracer.gradients:  # type: ignore[attr-defined]
                raise Untraceable("its forward asks whether gradients are required")
            if name in ("_is_param", "_is_buffer", "requires_grad", "is_mps", "is_meta"):
                return False
            if not hasattr(torch.Tensor, name):
                raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        if self._val is not None:
            return self._val.size() if dim is None else self._val.size(dim)
        return super().__getattr__("size")(*(() if dim is None else (dim,)))

    def _number(self, name: str, *args: Any) -> Any:
        if self._val is not None:
            return getattr(self._val, name)(*args)
        return super().__getattr__(name)(*args)

    def dim(self) -> Any:
        return self._number("dim")

    def numel(self) -> Any:
        return self._number("numel")

    def nelement(self) -> Any:
        return self._number("nelement")

    def is_floating_point(self) -> Any:
        return self._number("is_floating_point")

    def stride(self, *args: Any) -> Any:
        return self._number("stride", *args)

    def is_contiguous(self, *args: Any, **kwargs: Any) -> Any:
        # Layouts inside are the runtime's own; making a tensor contiguous again costs nothing.
        return False if self._val is not None else super().__getattr__("is_contiguous")(*args, **kwargs)

    def __len__(self) -> int:
        if self._val is not None:
            return len(self._val)
        value = self.node.meta.get("val")
        return len(value) if isinstance(value, (list, tuple)) else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        value = self.node.meta.get("val")
        if isinstance(value, (torch.Tensor, list, tuple)):
            own: Any = self
            return iter([own[i] for i in range(len(value))])
        return super().__iter__()


#: What Python does for ``a += b`` and the like, and what computes the same in new memory.
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _Value, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _IN_PLACE:
    setattr(_Value, f"__{_function.__name__}__", _recorded(_function))


class _Factories(TorchFunctionMode):
    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and self.tracer.following() and not kwargs.get("requires_grad"):
            return self.tracer.create_proxy("call_function", func, args, kwargs)
        return func(*args, **kwargs)


class _Tracer(fx.Tracer):
    """Follows a module's forward on values with shapes."""

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, opaque: set[int], device: torch.device) -> None:
        super().__init__()
        self.opaque, self.device = opaque, device
        self.evaluator = Evaluator(root)
        self.thread = threading.get_ident()
        self.evaluating = False
        self.failed: nn.Module | None = None
        self.autocast = torch.is_autocast_enabled(device.type)
        self.gradients = torch.is_grad_enabled()
        self.spec: Any = None

    def following(self) -> bool:
        """torch.fx replaces methods of all modules while it traces; what else calls them is let through."""
        return not self.evaluating and threading.get_ident() == self.thread

    def call_with(self, arguments: Callable[[Callable[..., Any]], tuple[Any, Any]]) -> None:
        """Sets how ``forward`` is called: ``arguments`` gets a maker of placeholders."""
        self._arguments = arguments

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        def placeholder(name: str, example: torch.Tensor) -> Any:
            proxy = self.create_proxy("placeholder", name, (), {})
            proxy.node.meta["val"] = example
            return proxy

        args, kwargs = self._arguments(placeholder)

        def run() -> Any:
            with _Factories(self):
                leaves, self.spec = pytree.tree_flatten(root_fn(self.root, *args, **kwargs))
            return leaves

        return run, []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self.opaque or has_hooks(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if not self.following():
            return forward(*args, **kwargs)
        original = getattr(type(m), "__original_forward__", None)
        if original is not None:

            def forward(*a: Any, **k: Any) -> Any:
                return original(m, *a, **k)

        try:
            if asks_for_types(type(m)) and not self.is_leaf_module(m, self.path_of_module(m)):
                raise Untraceable(_TYPES)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = m
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if not self.following():
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is _Value else super().create_arg(a)  # whose tests of type it misleads

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        if torch.is_autocast_enabled(self.device.type) != self.autocast:
            raise Untraceable("its forward switches autocast")
        if self.gradients and not torch.is_grad_enabled():
            raise Untraceable("its forward switches gradients off")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if kind not in ("placeholder", "output"):
            whole = kind == "call_module" and stays_whole(self.root.get_submodule(target), self.opaque)
            self.evaluating = True
            try:
                value = self.evaluator.evaluate(proxy.node, whole)
            finally:
                self.evaluating = False
            if value is not UNKNOWN:
                proxy.node.meta["val"] = value
        return proxy


def stays_whole(module: nn.Module, opaque: set[int]) -> bool:
    """Whether what a module returns is only known by calling it."""
    return id(module) in opaque or has_hooks(module)


class _Watch:
    """The attributes of all modules before a trace, to find and undo what the trace changed."""

    def __init__(self, root: nn.Module) -> None:
        self.before = [(m, dict(m.__dict__), self._inside(m)) for m in root.modules()]
        # A generator that is imported while tracing has drawn nothing for the network.
        numpy = sys.modules.get("numpy.random")
        self.numpy = None if numpy is None else numpy.get_state()
        self.torch = torch.get_rng_state()
        self.random = self._generators()

    @staticmethod
    def _inside(module: nn.Module) -> dict[str, Any]:
        held: dict[str, Any] = {}
        for name, value in module.__dict__.items():
            if name.startswith(("_forward_", "_backward_", "_p2pfast")):
                continue
            if type(value) in (dict, set, list):
                held[name] = value.copy()
        return held

    def _generators(self) -> tuple[Any, ...]:
        drawn = None if self.numpy is None else sys.modules["numpy.random"].get_state()
        position = None if drawn is None else (drawn[1].tobytes(), drawn[2])
        return random.getstate(), position, torch.get_rng_state().numpy().tobytes()

    def check(self) -> None:
        """Puts back what was changed, and raises for it."""
        drew = self._generators() != self.random
        if drew:
            random.setstate(self.random[0])
            torch.set_rng_state(self.torch)
            if self.numpy is not None:
                sys.modules["numpy.random"].set_state(self.numpy)
        changed: tuple[nn.Module, str, Any] | None = None
        for module, attributes, inside in self.before:
            now = module.__dict__
            for name in [*attributes, *(n for n in now if n not in attributes)]:
                kept: Any = None
                if name not in attributes:
                    kept = now.pop(name)
                elif name in now and now[name] is attributes[name]:
                    if name not in inside or _same(now[name], inside[name]):
                        continue
                    if name == "_buffers":
                        kept = dict(now[name])
                    if isinstance(now[name], list):
                        now[name][:] = inside[name]
                    else:
                        now[name].clear()
                        now[name].update(inside[name])
                else:
                    kept = now.get(name)
                    now[name] = attributes[name]
                changed = changed or (module, name, kept)
        if changed is not None:
            raise _SideEffect(*changed)
        if drew:
            raise Untraceable(
                "it draws random numbers in a way that a trace does not repeat", guardable=False
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


class Traced:
    """A module's graph for one kind of input.

    ``root`` is the module, ``constants`` are tensors that the trace met; ``opaque`` has the reason of each
    submodule that stays whole, by id; ``spec`` rebuilds what forward returns.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        constants: dict[str, torch.Tensor],
        opaque: dict[int, str],
        spec: Any,
    ) -> None:
        self.root, self.graph, self.constants = root, graph, constants
        self.opaque, self.spec = opaque, spec

    def fetch(self, path: str) -> Any:
        """A submodule, parameter, buffer or constant by its path."""
        if path in self.constants:
            return self.constants[path]
        value: Any = self.root
        for name in path.split("."):
            value = getattr(value, name)
        return value


_TYPES = "its code asks for the type of a value, which is another one while it is followed"


_ask_for_types: dict[type, bool] = {}


def asks_for_types(kind: type) -> bool:
    """Whether the code of a class of modules calls ``type`` on something else than ``self``.

    Functions of its own that it calls by name are looked at too.
    """
    if kind not in _ask_for_types:
        _ask_for_types[kind] = not kind.__module__.startswith("torch.") and _code_asks_for_types(kind)
    return _ask_for_types[kind]


def _code_asks_for_types(kind: type) -> bool:
    seen: set[types.CodeType] = set()
    waiting = [
        (f.__code__, f.__globals__)
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "p2pfast.")) and base is not object
        for f in vars(base).values()
        if type(f) is types.FunctionType
    ]
    while waiting:
        code, known = waiting.pop()
        if code in seen:
            continue
        seen.add(code)
        steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL")]
        for step, after in zip(steps, steps[1:], strict=False):
            if step.opname != "LOAD_GLOBAL":
                continue
            if step.argval == "type" and "type" not in known and after.argval != "self":
                return True
            helper = known.get(step.argval)
            if type(helper) is types.FunctionType and not helper.__module__.startswith("torch"):
                waiting.append((helper.__code__, helper.__globals__))
        waiting += [(c, known) for c in code.co_consts if type(c) is types.CodeType]
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def example(value: Any, dtype: torch.dtype | None) -> torch.Tensor:
    """A meta tensor like an input; floating-point inputs take the parameters' dtype, as shapes do not
    depend on the precision."""
    if isinstance(value, LabelMap):
        return torch.empty(value.shape, dtype=dtype or torch.float32, device="meta")
    kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
    return torch.empty_like(value, device="meta", dtype=kind)


def trace(module: nn.Module, arguments: Any, dtype: torch.dtype | None) -> Traced:
    """``module`` called with ``arguments``: (args, kwargs) in which tensors and label maps are inputs and
    everything else is constant.

    Raises:
        Untraceable: it cannot be one graph; the message says why.
    """
    if asks_for_types(getattr(type(module), "__original_class__", type(module))):
        raise Untraceable(_TYPES)
    with _tracing:
        return _trace(module, arguments, dtype)


def _trace(module: nn.Module, arguments: Any, dtype: torch.dtype | None) -> Traced:
    opaque: dict[int, str] = {}
    given = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, (torch.Tensor, LabelMap))]
    device = given[0].device if given else torch.device("cpu")
    while True:
        watch = _Watch(module)
        tracer = _Tracer(module, set(opaque), device)
        tracer.call_with(lambda placeholder: _placeholders(arguments, placeholder, dtype))
        failure: Exception | None = None
        graph: Any = None
        constants: dict[str, torch.Tensor] = {}
        try:
            with _values_pass_for_tensors():
                graph = tracer.trace(module)
        except Exception as error:
            failure = error
        culprit = tracer.failed
        for name in [n for n in module.__dict__ if n.startswith("_tensor_constant")]:
            if name not in watch.before[0][1]:
                constants[name] = module.__dict__.pop(name)
        try:
            watch.check()
        except _SideEffect as effect:
            failure, culprit = effect, effect.module
        except Untraceable as why:
            failure = failure or why
        if failure is None:
            _refuse_changed_constants(graph, constants)
            if not tracer.autocast:  # under which dtypes are not those that the trace knows
                _leave_what_nobody_sees(graph, module, opaque)
            return Traced(module, graph, constants, opaque, tracer.spec)
        # What depends on values does so for TorchDynamo too.
        reason, guardable = _first_line(failure), not isinstance(failure, fx.proxy.TraceError)
        if isinstance(failure, (Untraceable, _SideEffect)):
            reason, guardable = str(failure), failure.guardable
        if culprit is None or culprit is module or id(culprit) in opaque or len(opaque) >= _MOST_OPAQUE:
            raise Untraceable(reason, guardable) from failure
        opaque[id(culprit)] = reason


def _placeholders(arguments: Any, placeholder: Callable[..., Any], dtype: torch.dtype | None) -> Any:
    leaves, spec = pytree.tree_flatten(arguments)
    made: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, (torch.Tensor, LabelMap)):
            made.append(placeholder(f"input_{len(made)}", example(leaf, dtype)))
        else:
            made.append(leaf)
    return pytree.tree_unflatten(made, spec)


def _leave_what_nobody_sees(graph: fx.Graph, root: nn.Module, opaque: dict[int, str]) -> None:
    """Makes ``a += b`` ``a + b`` where nothing reads a later, nor anything that shares its memory.

    So a block's sum is fused, and may follow a layer that keeps a for its backward pass.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target not in _IN_PLACE or not isinstance(node.args[0], fx.Node):
            continue
        left, right = node.args
        if not _is_new(left, root, opaque) or not _fits_in(right, left):
            continue
        others = [user for user in left.users if user is not node]
        if all(order[user] < order[node] and _is_new(user, root, opaque) for user in others):
            node.target = _IN_PLACE[node.target]


def _is_new(node: fx.Node, root: nn.Module, opaque: dict[int, str]) -> bool:
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    followed = module is not None and not stays_whole(module, set(opaque))
    return makes_new(node, module if followed else None)


def _fits_in(right: Any, left: fx.Node) -> bool:
    """Whether an operation on both has the left one's shape and dtype anyway."""
    if not isinstance(right, fx.Node):
        return isinstance(right, (int, float)) and not isinstance(right, bool)
    a, b = left.meta.get("val"), right.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


def _refuse_changed_constants(graph: fx.Graph, constants: dict[str, torch.Tensor]) -> None:
    for node in graph.nodes:
        if changes_in_place(node) and node.args and isinstance(node.args[0], fx.Node):
            if node.args[0].op == "get_attr" and str(node.args[0].target) in constants:
                raise Untraceable("it changes a tensor that it makes itself in a way a trace does not repeat")
