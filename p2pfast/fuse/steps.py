"""A traced network, for training: every conv-norm-activation chain is one step of autograd.

What no chain takes runs as it did, in the same order. Parameters are fetched anew in every call, so gradients
flow to the network's own, and hooks of PyTorch and of wrappers like DistributedDataParallel see them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from p2pfast import functional
from p2pfast.fuse.chains import Chain, ChainFinder, Join
from p2pfast.fuse.operators import Call, pair
from p2pfast.fuse.source import Captured
from p2pfast.fuse.trace import Traced
from p2pfast.nn.sequence import norm_statistics
from p2pfast.ops.channels_last import channels_last
from p2pfast.ops.conv_norm_act import join

MODULES, CHAINS, CHANNELS_LAST = "modules", "chains", "channels_last"

# Operations whose values do not depend on how their arguments lie in memory, and that keep it.
_ANY_LAYOUT = ("act", "add", "cat", "conv", "norm", "pad", "pool")


@dataclass
class Report:
    """What ran of one chain: its name, its parts, its result's shape and the seconds of its last forward."""

    name: str
    kernel: str
    detail: str
    seconds: float = 0.0


def _lies_as(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a tensor has these strides, where they mean something."""
    own = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size <= 1 or a == b for size, a, b in own)


def _placed(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` as PyTorch would have laid it out, which ``like`` tells."""
    if tensor.shape != like.shape or _lies_as(tensor, like.stride()):
        return tensor
    if any(stride == 0 and size > 1 for size, stride in zip(like.shape, like.stride(), strict=True)):
        return tensor  # an expanded tensor's values share memory, in which nothing can be written
    if like.is_contiguous():
        return tensor.contiguous()
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    made = torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)


@dataclass
class _Step:
    """One node as it runs; ``placed`` are arguments that it takes in PyTorch's layout, ``dead`` those that
    nothing needs any more."""

    name: str
    call: Callable[[dict[str, Any]], Any]
    placed: list[tuple[str, Tensor]] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)


class _ChainStep:
    """A chain as one call of ``p2pfast.functional``."""

    def __init__(self, chain: Chain, traced: Traced, channels_last: bool) -> None:
        self.chain, self.channels_last = chain, channels_last
        self.x, self.residual = chain.x.name, None if chain.residual is None else chain.residual.name
        self.options: dict[str, Any] = {"activation": None}
        if chain.act is not None:
            name = {"leaky_relu": "negative_slope", "elu": "alpha"}.get(chain.act.kind)
            self.options |= {"activation": chain.act.kind, **({name: chain.act.slope} if name else {})}
        if chain.conv is not None:
            self.geometry = _geometry(chain.conv, chain.pad)
            self.transposed = bool(chain.conv.options["transposed"])
        parts = [
            name for name in ("pad", "conv", "norm", "residual", "act") if getattr(chain, name) is not None
        ]
        shape = "x".join(str(s) for s in chain.last.meta["val"].shape)
        kernel = "training" if chain.conv is not None else "training norm"
        self.report = Report(str(chain.last.name), kernel, f"{'+'.join(parts)} {shape}")

    def __call__(self, values: dict[str, Any]) -> Tensor:
        start = time.perf_counter()
        if torch.is_grad_enabled() or self._in_inference_mode(values):
            result = self._run(values)
        else:
            # The same kernels as with gradients: a pass that is repeated gives the same to the last bit.
            with torch.enable_grad():
                result = self._run(values).detach()
        if result.device.type == "cpu":  # a GPU has only been told what to do
            self.report.seconds = time.perf_counter() - start
        return result

    def _in_inference_mode(self, values: dict[str, Any]) -> bool:
        """Whether nothing can be kept for a backward pass."""
        read = [values[name] for name in (self.x, self.residual) if name is not None]
        return torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in read)

    def _run(self, values: dict[str, Any]) -> Tensor:
        x = values[self.x]
        if self.channels_last and self.chain.conv is None:  # a convolution takes it so itself
            x = channels_last(x, x.dtype)
        options = {**self.options, "residual": None if self.residual is None else values[self.residual]}
        conv, norm = self.chain.conv, self.chain.norm
        weight = bias = None
        if norm is not None:
            weight, bias = self._norm(norm, values, options)
        if conv is None:
            return functional.instance_norm_act(x, weight, bias, **options)
        if norm is None:
            options["norm"] = None
        options |= {"norm_weight": weight, "norm_bias": bias}
        layer: Any = conv.layer
        if layer is None:
            own = _taken(conv.options["weight"], values), _taken(conv.options.get("bias"), values)
        else:
            for hook in layer._forward_pre_hooks.values():  # those that compute a weight
                hook(layer, (x,))
            own = layer.weight, layer.bias
        options |= {"weight": own[0], "bias": own[1], **self.geometry}
        step = functional.up_conv_norm_act if self.transposed else functional.conv_norm_act
        return step(x, **options)

    def _norm(
        self, norm: Call, values: dict[str, Any], options: dict[str, Any]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Its weight and bias; the rest goes into ``options``."""
        layer: Any = norm.layer
        options["norm"] = "batch" if norm.options["statistics"] == "batch" else "instance"
        if norm.options["statistics"] == "group":
            options["eps"] = layer.eps if layer is not None else norm.options["eps"]
        elif layer is not None:
            options |= {"eps": layer.eps, **norm_statistics(layer)}
        else:
            given = norm.options
            options |= {"eps": given["eps"], "momentum": given["momentum"]}
            options |= {name: _taken(given[name], values) for name in ("running_mean", "running_var")}
            options["use_input_stats"] = given["training"]
        if layer is not None:
            return layer.weight, layer.bias
        return _taken(norm.options.get("weight"), values), _taken(norm.options.get("bias"), values)


def _taken(value: Any, values: dict[str, Any]) -> Any:
    return values[value.name] if isinstance(value, fx.Node) else value


def _geometry(conv: Call, pad: Call | None) -> dict[str, Any]:
    layer: Any = conv.layer
    given = conv.options if layer is None else vars(layer)
    found = {name: pair(given[name]) for name in ("stride", "padding", "dilation")}
    numbers: dict[str, Any] = {**found, "groups": given["groups"]}
    if conv.options["transposed"]:
        return {**numbers, "output_padding": pair(given["output_padding"])}
    numbers["padding_mode"] = given.get("padding_mode", "zeros")
    if pad is not None:
        numbers |= {"padding": pair(pad.options["pad"][0]), "padding_mode": pad.options["mode"]}
    return numbers


def convolution_size(chain: Chain) -> tuple[int, int, int]:
    """Height of the kernel, stride, and multiplications of a chain's convolution."""
    assert chain.conv is not None
    layer: Any = chain.conv.layer
    before, after = chain.x.meta["val"], chain.nodes[chain.pad is not None].meta["val"]
    if layer is not None:
        kernel, stride = pair(layer.kernel_size), pair(layer.stride)
    else:
        kernel = pair(chain.conv.options["weight"].meta["val"].shape[2:])
        stride = pair(chain.conv.options["stride"])
    pixels = (before if chain.conv.options["transposed"] else after).shape[2:].numel()
    multiplications = after.shape[0] * after.shape[1] * before.shape[1] * kernel[0] * kernel[1] * pixels
    return kernel[0], stride[0], multiplications


class JoinStep:
    """A concatenation and its activation as one call of ``p2pfast.ops.conv_norm_act.join``."""

    def __init__(self, found: Join) -> None:
        self.parts = [part.name for part in found.parts]
        self.act = ("none", 0.0) if found.act is None else (found.act.kind, found.act.slope)

    def __call__(self, values: dict[str, Any]) -> Tensor:
        return join([values[name] for name in self.parts], *self.act)


class Program:
    """A traced network as steps in order: as it was (``MODULES``), or with its chains as one step each, on
    images as they are given (``CHAINS``) or ``CHANNELS_LAST``. Several threads may run it at once.
    """

    def __init__(self, captured: Captured, way: str) -> None:
        traced = captured.traced
        self.traced, self.names, self.spec, self.way = traced, captured.names, captured.spec, way
        self.state = captured.state
        finder = ChainFinder(traced)
        chains = {chain.last: chain for chain in finder.find()} if way != MODULES else {}
        joins = {found.last: found for found in finder.joins()} if way != MODULES else {}
        inside = {node for chain in chains.values() for node in chain.nodes}
        inside |= {node for found in joins.values() for node in found.nodes}
        self.notes = list(finder.notes)
        self.steps: list[_Step] = []
        self.chains = list(chains.values())
        self.reports: list[Report] = []
        self.result: Any = None
        needed: list[list[fx.Node]] = []
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                self.result = node.args[0]
                break
            if node in chains:
                step = _ChainStep(chains[node], traced, way == CHANNELS_LAST)
                self.reports.append(step.report)
                self.steps.append(_Step(node.name, step))
                needed.append([n for part in chains[node].nodes for n in part.all_input_nodes])
            elif node in joins:
                self.steps.append(_Step(node.name, JoinStep(joins[node])))
                needed.append(joins[node].parts)
            elif node not in inside:
                self.steps.append(self._foreign(node, finder))
                needed.append(node.all_input_nodes)
        kept = {n.name for n in _nodes(self.result)}
        ends = {*chains, *joins}
        for step_, nodes in zip(reversed(self.steps), reversed(needed), strict=True):
            read = {n.name for n in nodes if n not in inside or n in ends}
            step_.dead = list(read - kept)
            kept.update(step_.dead)
            if step_.name not in kept:  # nothing reads it
                step_.dead.append(step_.name)

    def _foreign(self, node: fx.Node, finder: ChainFinder) -> _Step:
        args, kwargs = node.args, node.kwargs
        call: Callable[..., Any]
        target: Any = node.target
        if node.op == "get_attr":
            fetch = self.traced.fetch
            return _Step(node.name, lambda values: fetch(target))
        if node.op == "call_module":
            call = self.traced.fetch(target)
        elif node.op == "call_method":

            def call(owner: Any, *rest: Any, **named: Any) -> Any:
                return getattr(owner, target)(*rest, **named)

        else:
            call = target

        def run(values: dict[str, Any]) -> Any:
            taken = fx.node.map_arg((args, kwargs), lambda n: values[n.name])
            return call(*taken[0], **taken[1])

        described = finder.call(node)
        free = described is not None and described.kind in _ANY_LAYOUT
        if described is not None and described.inplace:
            free = isinstance(described.x, fx.Node) and len(described.x.users) == 1
        if free:
            return _Step(node.name, run)
        sources = [
            (n.name, n.meta["val"]) for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)
        ]
        return _Step(node.name, run, [(name, value) for name, value in sources if value.dim() == 4])

    def run(self, tensors: list[Any]) -> Any:
        values: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        values.update((name, derived.fetch()) for name, derived in self.state.items())
        for step in self.steps:
            for name, like in step.placed:
                values[name] = _placed(values[name], like)
            values[step.name] = step.call(values)
            for name in step.dead:
                del values[name]

        def returned(node: fx.Node) -> Any:
            like = node.meta.get("val")
            value = values[node.name]
            return _placed(value, like) if isinstance(like, Tensor) and isinstance(value, Tensor) else value

        leaves = fx.node.map_arg(self.result, returned)
        return leaves if self.spec is None else pytree.tree_unflatten(list(leaves), self.spec)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found
