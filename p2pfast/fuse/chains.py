"""The conv-norm-activation chains of a traced network, for training: which nodes run as one step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from p2pfast.fuse.graph import Act
from p2pfast.fuse.layers import weight_hooks
from p2pfast.fuse.operators import Call, changes_in_place, describe_function, describe_module, pair
from p2pfast.fuse.trace import Traced, has_hooks


@dataclass
class Chain:
    """``act(norm(conv(pad(x))) + residual)`` by the nodes it is made of; any part may be missing."""

    x: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    pad: Call | None = None
    conv: Call | None = None
    norm: Call | None = None
    residual: fx.Node | None = None
    act: Act | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


@dataclass
class Join:
    """``act(torch.cat(parts, 1))``."""

    parts: list[fx.Node]
    nodes: list[fx.Node]
    act: Act | None = None

    @property
    def last(self) -> fx.Node:
        return self.nodes[-1]


class ChainFinder:
    """Finds the chains of a traced graph, which it simplifies where that changes nothing.

    ``notes`` are the operations that no chain takes although they are of a kind that could be, by name and
    with the reason.
    """

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.opaque = traced.opaque
        self.autocast = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        self.order: dict[fx.Node, int] = {}
        self.writers: list[fx.Node] = []
        self.taken: set[fx.Node] = set()
        self.notes: list[tuple[str, str]] = []

    def find(self) -> list[Chain]:
        graph = self.traced.graph
        self._forget_identities()
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self._use_results_of_activations()
        self.writers = [node for node in graph.nodes if self._writes(node)]
        found: list[Chain] = []
        for node in list(graph.nodes):
            chain = None if node in self.taken else self._chain(node)
            if chain is not None:
                found.append(chain)
                self.taken.update(chain.nodes)
        return found

    def joins(self) -> list[Join]:
        """The concatenations of images along their channels, with the activation that is their only reader;
        to be asked after ``find``."""
        found = []
        for node in self.traced.graph.nodes:
            call = None if node in self.taken else self.call(node)
            if call is None or call.kind != "cat" or call.options["dim"] not in (1, -3):
                continue
            parts = call.x if isinstance(call.x, (list, tuple)) else []
            if len(parts) < 2 or not all(self._is_image(part) for part in parts):
                continue
            join = Join(list(parts), [node])
            reader = self._only_user(node)
            act = None if reader is None or reader in self.taken else self.call(reader)
            if reader is not None and act is not None and act.kind == "act" and act.x is node:
                span = range(self.order[node], self.order[reader])
                if not any(self.order[w] in span for w in self.writers):
                    join.act = act.options["act"]
                    join.nodes.append(reader)
            self.taken.update(join.nodes)
            found.append(join)
        return found

    def call(self, node: fx.Node) -> Call | None:
        """What a node computes, where a chain may take it."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node.op != "call_module":
            return describe_function(node) if node.op in ("call_function", "call_method") else None
        module = self.module(node)
        whole = id(module) in self.traced.opaque or has_hooks(module)
        if whole or len(node.args) != 1 or node.kwargs:
            return None
        return describe_module(module, node.args[0])

    def module(self, node: fx.Node) -> nn.Module:
        found: nn.Module = self.traced.fetch(str(node.target))
        return found

    # --- simplifications ---------------------------------------------------------------------------

    def _forget_identities(self) -> None:
        """Takes out what returns its argument itself."""
        for node in list(self.traced.graph.nodes):
            call = self.call(node)
            if call is None or not isinstance(call.x, fx.Node):
                continue
            idle = call.kind == "dropout" and not (call.options["training"] and call.options["p"])
            # A method such as contiguous may return another tensor.
            same = call.kind == "same" and call.layer is not None
            if (idle or same) and self._shape(call.x) == self._shape(node):
                node.replace_all_uses_with(call.x)
                self.traced.graph.erase_node(node)

    def _use_results_of_activations(self) -> None:
        """After an activation in place, what is read is its result, under whichever name."""
        for node in list(self.traced.graph.nodes):
            call = self.call(node)
            if call is None or call.kind != "act" or not call.inplace or not isinstance(call.x, fx.Node):
                continue
            others = [user for user in call.x.users if user is not node]
            if all(self.order[user] > self.order[node] for user in others):
                for user in others:
                    user.replace_input_with(call.x, node)

    # --- matching ----------------------------------------------------------------------------------

    def _shape(self, node: fx.Node) -> torch.Size | None:
        value = node.meta.get("val")
        return value.shape if isinstance(value, torch.Tensor) else None

    def _is_image(self, node: Any) -> bool:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _chain(self, node: fx.Node) -> Chain | None:
        call = self.call(node)
        if call is None or not self._is_image(node) or not self._is_image(call.x):
            return None
        if call.kind == "pad":
            chain = self._padded(node, call)
        elif call.kind == "conv" and self._refusal(call) is None:
            chain = Chain(call.x, [node], conv=call)
        elif call.kind == "norm" and self._norm_refusal(node, call) is None:
            chain = Chain(call.x, [node], norm=call)
        else:
            reason = {"conv": self._refusal, "norm": lambda c: self._norm_refusal(node, c)}.get(call.kind)
            if reason is not None:
                self.notes.append((str(getattr(node.target, "__name__", node.target)), str(reason(call))))
            return None
        if chain is None:
            return None
        self._extend(chain)
        return chain

    def _padded(self, node: fx.Node, call: Call) -> Chain | None:
        """A padding of equal amounts that its only reader, a convolution without its own, can do."""
        amounts = set(call.options["pad"])
        conv = self._only_user(node)
        if conv is None or len(amounts) != 1 or min(amounts) < 0:
            return None
        reader = self.call(conv)
        if reader is None or reader.kind != "conv" or reader.x is not node or reader.options["transposed"]:
            return None
        if self._refusal(reader) is not None or pair(_padding(reader)) != (0, 0):
            return None
        if self._written_between(Chain(call.x, [node]), conv):
            return None
        return Chain(call.x, [node, conv], pad=call, conv=reader)

    def _refusal(self, call: Call) -> str | None:
        padding = _padding(call)
        if isinstance(padding, str):
            return f"padding={padding!r}"
        numbers = [call.options.get(name) for name in ("stride", "dilation", "groups", "output_padding")]
        if call.layer is None and any(isinstance(n, fx.Node) for n in (padding, *numbers)):
            return "its numbers depend on data"
        if call.layer is not None and len(weight_hooks(call.layer)) > 1:
            return "two hooks compute the weight"
        return None

    def _norm_refusal(self, node: fx.Node, call: Call) -> str | None:
        if call.options["statistics"] == "group":
            groups, channels = call.options["num_groups"], node.meta["val"].shape[1]
            if groups != channels:
                return f"GroupNorm with {groups} group{'s' * (groups > 1)} of several channels"
        if call.layer is None:
            numbers = [call.options[name] for name in ("momentum", "eps") if name in call.options]
            if not all(isinstance(number, (int, float)) for number in numbers):
                return "its eps or momentum depends on data"
            if not isinstance(call.options.get("training", True), bool):
                return "its training flag depends on data"
        return None

    def _extend(self, chain: Chain) -> None:
        """Takes what follows as long as nothing else reads what lies between."""
        while True:
            node = self._only_user(chain.last)
            call = self.call(node) if node is not None else None
            if node is None or call is None or not self._is_image(node) or chain.act is not None:
                return
            if node in self.taken or self._written_between(chain, node):
                return
            if call.kind == "norm":
                free = chain.norm is None and chain.residual is None and call.x is chain.last
                if not free or self._norm_refusal(node, call) is not None:
                    return
                chain.norm = call
            elif call.kind == "add":
                if chain.residual is not None or not self._residual(chain, call):
                    return
            elif call.kind == "act":
                if chain.norm is None and not call.inplace and any(map(self._writes, node.users)):
                    return  # PyTorch's backward pass reads what the activation is given, ours its result
                chain.act = call.options["act"]
            else:
                return
            chain.nodes.append(node)

    def _residual(self, chain: Chain, call: Call) -> bool:
        other = call.options["other"] if call.x is chain.last else call.x
        if not isinstance(other, fx.Node) or other is chain.last:
            return False
        if call.inplace and call.x is not chain.last:
            return False  # it writes to the other one
        a, b = other.meta.get("val"), chain.last.meta["val"]
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if self.autocast and self._is_lowered(other) != self._is_lowered(chain.last):
            return False  # the sum has the wider dtype, the chain its convolution's
        chain.residual = other
        return True

    def _is_lowered(self, node: Any) -> bool:
        """Whether autocast has lowered a value: a convolution's result, and what comes of such alone."""
        while isinstance(node, fx.Node):
            call = self.call(node)
            if call is None or call.kind == "conv":
                return call is not None
            if call.kind in ("add", "cat"):
                parts = [call.x, call.options["other"]] if call.kind == "add" else call.x
                return all(self._is_lowered(part) for part in parts if isinstance(part, fx.Node))
            node = call.x
        return False

    def _written_between(self, chain: Chain, node: fx.Node) -> bool:
        """Whether something is changed in place, or gradients switched, before the chain's step, which runs
        in the place of its last node, and after its first node."""
        span = range(self.order[chain.nodes[0]], self.order[node])
        return any(self.order[w] in span and w not in chain.nodes for w in self.writers)

    def _writes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return bool(getattr(self.module(node), "inplace", False)) or id(self.module(node)) in self.opaque
        return changes_in_place(node) or node.target is torch._C._set_grad_enabled


def _padding(call: Call) -> Any:
    layer: Any = call.layer
    return layer.padding if layer is not None else call.options["padding"]
