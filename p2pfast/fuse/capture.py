"""From a traced module to a fused graph: match conv-norm-activation chains.

Matching walks the traced nodes in order and keeps, for every node, a value whose normalisation,
activation and padding are still pending; a convolution takes the pending work of its inputs with it.
What cannot be taken is stored first, and what is not understood runs as it did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from p2pfast.fuse.graph import (
    Act,
    AddOp,
    ApplyOp,
    Concat,
    ConvOp,
    Derived,
    ForeignOp,
    Graph,
    ImportOp,
    LabelConvOp,
    Labels,
    Norm,
    Opaque,
    Padding,
    PoolOp,
    View,
    map_views,
)
from p2pfast.fuse.layers import ConvLayer, NormLayer, attribute, computed_weight
from p2pfast.fuse.operators import (
    Call,
    changes_in_place,
    describe_function,
    describe_module,
    makes_new,
    pair,
)
from p2pfast.fuse.shapes import is_channels_last
from p2pfast.fuse.trace import Traced, has_hooks
from p2pfast.labelmap import LabelMap

ON_LOAD = ("relu", "leaky_relu")  # activations that a kernel applies while it reads its input
LABEL_KERNEL_LIMIT = 7
LABEL_CLASS_LIMIT = 256
NOT_AN_IMAGE = "the input is not a float image on the CPU"
NOT_PLAIN = "the input is padded, concatenated or not a float image on the CPU"

# Functions of parameters alone that give a weight: they are computed when a parameter changes.
_PURE = {
    *("_weight_norm", "abs", "add", "alias", "clone", "contiguous", "detach", "div", "dot", "exp", "expand"),
    *(
        "flatten",
        "flip",
        "float",
        "getattr",
        "linalg_vector_norm",
        "matmul",
        "mean",
        "mm",
        "mul",
        "mv",
        "neg",
    ),
    *("neg", "norm", "normalize", "permute", "pow", "reciprocal", "repeat", "reshape", "rot90", "rsqrt"),
    *(
        "softplus",
        "sqrt",
        "square",
        "squeeze",
        "std",
        "sub",
        "sum",
        "t",
        "to",
        "transpose",
        "true_divide",
        "truediv",
    ),
    *("type_as", "unsqueeze", "var", "vdot", "vector_norm", "view"),
}


class Matcher:
    """Builds a :class:`Graph` from a traced module whose nodes carry meta tensors.

    ``inputs`` are the values of placeholders by name; placeholders in ``state`` are parameters and buffers.
    """

    def __init__(
        self,
        traced: Traced,
        inputs: dict[str, Any],
        state: dict[str, Derived],
    ) -> None:
        self.traced, self.root = traced, traced.root
        self.inputs, self.state, self.whole = inputs, state, traced.opaque
        self.graph = Graph()
        self.values: dict[fx.Node, Any] = {}
        self.imported: dict[fx.Node, View] = {}
        self.copies: dict[View, Opaque] = {}  # of stored views, in PyTorch's layout
        self.fresh: set[str] = set()  # values outside the graph that nothing else is a view of
        self.calls = Counter(str(n.target) for n in traced.graph.nodes if n.op == "call_module")
        self.writes = any(self._writes(n) for n in traced.graph.nodes)
        self.changed = {
            source for n in traced.graph.nodes if changes_in_place(n) for source in n.all_input_nodes
        }

    def _module(self, node: fx.Node) -> nn.Module:
        return self.traced.fetch(str(node.target))

    def _writes(self, node: fx.Node) -> bool:
        """Whether an operation may write to its arguments."""
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        return changes_in_place(node)

    def run(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "output":
                self.graph.result = fx.node.map_arg(node.args[0], self._returned)
            elif node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._attribute(node)
            elif not self._expression(node):
                self._operation(node)
        return self.graph

    # --- values ------------------------------------------------------------------------------------

    def _resolve(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self.values[n])

    def _shape(self, node: fx.Node) -> torch.Size | None:
        value = node.meta.get("val")
        return value.shape if isinstance(value, torch.Tensor) else None

    def _is_image(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return (
            isinstance(value, torch.Tensor)
            and value.dim() == 4
            and value.is_floating_point()
            and value.numel() > 0
        )

    def _placeholder(self, node: fx.Node) -> None:
        if node.name in self.state:
            self.values[node] = self.state[node.name]
            return
        self.graph.inputs.append(node.name)
        value = self.inputs.get(node.name)
        fits = (
            isinstance(value, LabelMap) and value.features is None and value.num_classes <= LABEL_CLASS_LIMIT
        )
        self.values[node] = Labels(node.name, 0) if fits else Opaque(node.name)

    def _attribute(self, node: fx.Node) -> None:
        path = str(node.target)
        if isinstance(self.traced.fetch(path), torch.Tensor):
            self.values[node] = attribute(self.traced, path)
            return
        name = f"attribute_{node.name}"
        fetch = self.traced.fetch
        self.graph.ops.append(ForeignOp(name, -1, fetch, (path,), {}, "an attribute used directly"))
        self.values[node] = Opaque(name)

    def _expression(self, node: fx.Node) -> bool:
        """Keeps what depends on parameters alone as an expression of them."""
        sources = node.all_input_nodes
        name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
        if not sources or node.op == "call_module" or name not in _PURE or changes_in_place(node):
            return False
        if not all(isinstance(self.values[s], Derived) and s not in self.changed for s in sources):
            return False
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return False
        operands: list[Derived] = [self.values[s] for s in sources]
        target: Any = _Method(node.target) if node.op == "call_method" else node.target
        args, kwargs = self._resolve(node.args), self._resolve(node.kwargs)

        def fetch() -> Any:
            filled = map_views((args, kwargs), lambda v: v.fetch() if isinstance(v, Derived) else v)
            return target(*filled[0], **filled[1])

        text = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n].name)
        self.values[node] = Derived(
            f"{name}{text}", fetch, lambda: [root for operand in operands for root in operand.roots()]
        )
        return True

    def _view(self, value: Any, node: fx.Node) -> View | None:
        """``value`` of argument ``node`` as a single view of the graph, imported if need be."""
        if isinstance(value, View):
            return value
        if isinstance(value, (Concat, Derived)) or not self._is_image(node):
            return None
        known = self.imported.get(node)
        if known is None:
            outside = self._densify(value, node) if isinstance(value, Labels) else value
            shape = node.meta["val"].shape
            pad = value.pad if isinstance(value, Labels) else None
            if pad is not None:
                n, c, h, w = shape
                shape = torch.Size((n, c, h - pad.top - pad.bottom, w - pad.left - pad.right))
            base = self.graph.new_base(shape)
            self.graph.ops.append(ImportOp(f"import_{outside.node}", base, outside.node))
            known = self.imported[node] = View(base, pad=pad)
        return known

    def _store(self, view: View, dropout: float = 0.0, name: str = "apply") -> View:
        """A view with nothing pending but padding."""
        if view.norm is None and view.act is None and dropout == 0.0:
            return view
        base = self.graph.new_base(self.graph.bases[view.base].shape)
        self.graph.ops.append(ApplyOp(f"{name}_{base}", base, replace(view, pad=None), dropout))
        return View(base, pad=view.pad)

    def _plain(self, value: Any) -> Any:
        """A value as an unfused operation takes it: a stored view, or something outside the graph."""
        if isinstance(value, Labels):
            plain: Any = self._densify(value, next(iter(self.values)))
            return self._padded(plain, value.pad) if value.pad else plain
        if isinstance(value, Concat):
            parts = [self._plain(part) for part in value.parts]
            name = f"concat_{len(self.graph.ops)}"
            self.graph.ops.append(ForeignOp(name, -1, torch.cat, (parts, 1), {}, "concatenation"))
            return Opaque(name)
        if isinstance(value, Derived):
            name = f"parameter_{len(self.graph.ops)}"
            self.graph.ops.append(ForeignOp(name, -1, value.fetch, (), {}, "a parameter used directly"))
            return Opaque(name)
        if isinstance(value, View):
            stored = self._store(value)
            if stored is not value:
                self._rebind(value, stored)
            copied = self._copy(stored)
            return self._padded(copied, value.pad) if value.pad else copied
        return value

    def _copy(self, view: View) -> Opaque:
        """A stored view as a tensor of its own, in the layout that PyTorch would give it."""
        if view not in self.copies:
            meta: Any = next((n.meta["val"] for n, v in self.values.items() if v is view), None)
            shape = self.graph.bases[view.base].shape
            fits = meta is not None and tuple(meta.shape) == shape
            strides = meta.stride() if fits else torch.empty(shape, device="meta").stride()
            name = f"copy_{len(self.graph.ops)}"
            bare = View(view.base)
            call = _Relayout(strides)
            self.graph.ops.append(ForeignOp(name, -1, call, (bare,), {}, "to PyTorch's layout", copies=True))
            self.copies[view] = Opaque(name)
        return self.copies[view]

    def _padded(self, value: Any, pad: Padding) -> Opaque:
        name = f"pad_{len(self.graph.ops)}"
        mode = {"zeros": "constant"}.get(pad.mode, pad.mode)
        amounts = [pad.left, pad.right, pad.top, pad.bottom]
        self.graph.ops.append(ForeignOp(name, -1, F.pad, (value, amounts, mode), {}, "padding"))
        return Opaque(name)

    def _returned(self, node: fx.Node) -> Any:
        """A result: the last pass over a view with pending work writes straight into it."""
        value = self.values[node]
        if not isinstance(value, View) or value.pad is not None:
            return self._plain(value)
        value = replace(value)
        if is_channels_last(node.meta["val"]):
            self.graph.channels_last.add(value)
        return value

    def _rebind(self, old: Any, new: Any) -> None:
        """After an in-place operation every alias of the old value sees the new one."""
        for node, value in self.values.items():
            if value is old:
                self.values[node] = new

    def _before_writing(self) -> None:
        """Makes what is still to be computed from memory that an unfused operation is about to change."""
        bases = {view.base for view in self.imported.values()}
        for node, value in list(self.values.items()):
            parts = value.parts if isinstance(value, Concat) else (value,)
            waits = any(user not in self.values for user in node.users)
            if waits and any(isinstance(p, View) and p.base in bases for p in parts):
                self._rebind(self.values[node], self._plain(self.values[node]))

    # --- operations --------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> None:
        call: Call | None = None
        reason: str | None = None
        if node.op == "call_module":
            module = self._module(node)
            if id(module) in self.whole:
                reason = self.whole[id(module)]
            elif has_hooks(module):
                reason = "the module has hooks"
            elif not isinstance(node.meta.get("val"), torch.Tensor):
                reason = "its result is no tensor, or its shape depends on data"
            elif len(node.args) == 1 and not node.kwargs:
                call = describe_module(module, node.args[0])
            if call is None and reason is None:
                reason = f"{type(module).__name__} has no fused kernel"
        else:
            call = describe_function(node)
            if not isinstance(node.meta.get("val"), torch.Tensor):
                call, reason = None, "its result is no tensor, or its shape depends on data"
            elif call is None:
                reason = f"{getattr(node.target, '__name__', node.target)} has no fused kernel"
        if call is not None:
            reason = self._call(node, call)
        if reason is not None:
            self._foreign(node, reason)

    def _call(self, node: fx.Node, call: Call) -> str | None:
        if call.kind == "cat":
            return self._cat(node, call)
        if not isinstance(call.x, fx.Node):
            return "its input is a constant"
        if isinstance(self.values[call.x], Derived):
            return "its input is a parameter"
        handler: Callable[[fx.Node, Call], str | None] = getattr(self, f"_{call.kind}")
        if call.inplace:
            value = self.values[call.x]
            if isinstance(value, Opaque) and value.node not in self.fresh:
                return "changes in place what may be read elsewhere"
        return handler(node, call)

    def _argument(self, call: Call) -> tuple[fx.Node, Any]:
        return call.x, self.values[call.x]

    def _same(self, node: fx.Node, call: Call) -> str | None:
        self.values[node] = self._argument(call)[1]
        return None

    def _tensor(self, value: Any) -> Derived | None:
        """An argument that has to be a parameter; raises LookupError for anything else."""
        if value is None:
            return None
        derived = self.values[value] if isinstance(value, fx.Node) else None
        if not isinstance(derived, Derived):
            raise LookupError
        return derived

    def _conv_layer(self, node: fx.Node, call: Call) -> tuple[Any, str, str | None]:
        """The layer of a convolution, the name of its weights, or the reason why it cannot be fused."""
        o: Any = call.layer if call.layer is not None else _Options(call.options)
        if o.groups != 1:
            return o, "", f"groups={o.groups}: grouped convolutions are left to the library"
        if pair(o.dilation) != (1, 1):
            return o, "", f"dilation={o.dilation}: dilated convolutions are left to the library"
        stride = pair(o.stride)
        if stride[0] != stride[1]:
            return o, "", f"stride={stride}: different strides are left to the library"
        if isinstance(o.padding, str):
            return o, "", f"padding={o.padding!r}: named paddings are left to the library"
        if call.options["transposed"] and stride[0] > 4:
            return o, "", f"stride={stride}: transposed strides above 4 are left to the library"
        o_mode = getattr(o, "padding_mode", "zeros")
        if o_mode == "circular":
            return o, "", "circular padding is left to the library"
        bias: Derived | None
        if call.layer is not None:
            path = str(node.target)
            if max(pair(o.kernel_size)) > 16:
                return o, "", f"kernel_size={o.kernel_size}: kernels above 16 are left to the library"
            if "weight" in o._parameters and "parametrizations" not in o._modules:
                return o, path, None
            if "bias" not in o._parameters:
                return o, "", "the bias is no parameter"
            weight, before, reason = computed_weight(o, path, self.calls[path])
            if weight is None:
                return o, "", reason
            if before is not None:
                self.graph.before.append(before)
            bias = None if o.bias is None else attribute(self.traced, f"{path}.bias")
        else:
            try:
                weight, bias = self._tensor(call.options["weight"]), self._tensor(call.options["bias"])
            except LookupError:
                return o, "", "its weight depends on data"
            assert weight is not None
            if max(call.options["weight"].meta["val"].shape[2:]) > 16:
                return o, "", "kernels above 16 are left to the library"
        kind = f"{'transposed ' if call.options['transposed'] else ''}s{stride[0]}"
        name = f"{weight.name} {kind}"
        layer = ConvLayer(weight, bias, {"transposed": call.options["transposed"], "stride": stride})
        key = f"{name} {'' if bias is None else bias.name}"
        self.graph.layers.setdefault(key, layer)
        return o, key, None

    def _conv(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        layer, path, reason = self._conv_layer(node, call)
        if reason is not None:
            return reason
        transposed = bool(call.options["transposed"])
        own, mode = pair(layer.padding), getattr(layer, "padding_mode", "zeros")
        if isinstance(value, Labels):
            reason = self._label_conv(node, call, layer, path, value)
            if reason is None:
                return None
            self.graph.notes.append((path, f"{reason}; it takes the dense tensor"))
        parts = value.parts if isinstance(value, Concat) else None
        if parts is None:
            view = self._view(value, source)
            if view is None:
                return NOT_AN_IMAGE
            parts = (view,)
        if len(parts) > 2:
            return "more than two concatenated inputs"
        pad = parts[0].pad
        if pad is not None and (transposed or (own != (0, 0) and mode != pad.mode)):
            return "padding of two kinds before one convolution"
        if pad is not None and own != (0, 0) and pad.mode != "zeros":
            return "reflection or replication twice before one convolution"
        parts = tuple(replace(self._loadable(p), pad=None) for p in parts)
        used_mode = pad.mode if pad is not None else ("zeros" if own == (0, 0) else mode)
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(
            ConvOp(
                node.name,
                base,
                parts,
                path,
                used_mode,
                own[0] + (pad.top if pad else 0),
                own[1] + (pad.left if pad else 0),
            )
        )
        self.values[node] = View(base)
        return None

    def _label_conv(self, node: fx.Node, call: Call, layer: Any, path: str, labels: Labels) -> str | None:
        module = self.graph.layers.get(path, layer)
        kernel, own = pair(module.kernel_size), pair(layer.padding)
        if call.options["transposed"] or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
            return "labels need an ordinary convolution with an odd square kernel"
        if kernel[0] > LABEL_KERNEL_LIMIT or pair(layer.stride) != (1, 1):
            return f"labels need a kernel of at most {LABEL_KERNEL_LIMIT} and stride 1"
        half = (kernel[0] - 1) // 2
        if labels.pad is None:
            mode, amounts = getattr(layer, "padding_mode", "zeros"), {own[0], own[1]}
        else:
            pad = labels.pad
            mode, amounts = pad.mode, {pad.left, pad.right, pad.top, pad.bottom}
            if own != (0, 0):
                amounts = {-1}
        if amounts != {half} or mode not in ("reflect", "zeros"):
            return "labels need reflection or zero padding of half the kernel"
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(LabelConvOp(node.name, base, labels, path, mode == "reflect"))
        self.values[node] = View(base)
        return None

    def _densify(self, labels: Labels, node: fx.Node) -> Any:
        """The dense tensor of a label map that no kernel reads as labels."""
        value: Any = Opaque(labels.node)
        for level in range(labels.level):
            name = f"{labels.node}_pooled_{level + 1}_{len(self.graph.ops)}"
            pool = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)
            self.graph.ops.append(ForeignOp(name, -1, pool, (value,), {}, "labels as a dense tensor"))
            value = Opaque(name)
        return value

    def _loadable(self, view: View) -> View:
        """A view whose pending work a kernel can do on load."""
        if view.act is not None and view.act.kind not in ON_LOAD:
            return self._store(view)
        return view

    def _norm(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        statistics, channels = call.options["statistics"], node.meta["val"].shape[1]
        if statistics == "group" and call.options["num_groups"] != channels:
            groups = call.options["num_groups"]
            return f"GroupNorm with {groups} group{'s' * (groups > 1)} of several channels"
        training = bool(call.options.get("training", True))
        path = str(node.target)
        if call.layer is None:
            names = ("weight", "bias", "running_mean", "running_var")
            try:
                tensors = {name: self._tensor(call.options.get(name)) for name in names}
            except LookupError:
                return "its scale or statistics depend on data"
            if any(call.options.get(n) in self.changed for n in names if call.options.get(n) is not None):
                return "its scale or statistics are changed elsewhere"
            numbers = [call.options[name] for name in ("momentum", "eps") if name in call.options]
            if not all(isinstance(number, (int, float)) for number in numbers):
                return "its eps or momentum depends on data"
            path = f"norm_{node.name}"
            self.graph.layers[path] = NormLayer(tensors, {**call.options, "training": training})
        kind = statistics
        if statistics == "group":
            kind = "instance"
        elif not training:
            kind = "frozen"
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return NOT_PLAIN
        if view.norm is not None or view.act is not None:
            view = self._store(view)
        self.values[node] = replace(view, norm=Norm(path, kind))
        return None

    def _act(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        act: Act = call.options["act"]
        if isinstance(value, Concat):
            parts = []
            for part in value.parts:
                new = self._with_act(part, act)
                if new is None:
                    return "an activation that cannot be deferred, on concatenated inputs"
                parts.append(new)
            result: Any = Concat(tuple(parts))
        else:
            view = self._view(value, source)
            if view is None:
                return NOT_AN_IMAGE
            if view.pad is not None and view.pad.mode == "zeros" and act.kind == "sigmoid":
                return "an activation that changes zero padding"
            new_view = self._with_act(view, act)
            result = new_view if new_view is not None else replace(self._store(view), act=act)
        self.values[node] = result
        if call.inplace:
            self._rebind(value, result)
        return None

    def _with_act(self, view: View, act: Act) -> View | None:
        """The view with ``act`` pending too, if one deferred activation can express both."""
        if view.act is None:
            return replace(view, act=act)
        if act.kind == "relu" and view.act.kind in ON_LOAD and view.act.slope >= 0:
            return replace(view, act=act)
        return None

    def _pad(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        pad = Padding(call.options["mode"], *call.options["pad"])
        if min(pad.left, pad.right, pad.top, pad.bottom) < 0:
            return "negative padding"
        if isinstance(value, Labels) and value.pad is None:
            self.values[node] = replace(value, pad=pad)
            return None
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return NOT_PLAIN
        self.values[node] = replace(self._loadable(view), pad=pad)
        return None

    def _pool(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        kernel, pad = pair(call.options["kernel_size"]), pair(call.options["padding"])
        stride = pair(call.options["stride"]) if call.options["stride"] else kernel
        if kernel[0] != kernel[1] or stride[0] != stride[1] or pad[0] != pad[1]:
            return "average pooling with different sizes along height and width"
        if call.options["ceil_mode"] or call.options["divisor_override"]:
            return "average pooling with ceil_mode or divisor_override"
        counts = bool(call.options["count_include_pad"])
        if isinstance(value, Labels):
            published = (kernel[0], stride[0], pad[0], counts) == (3, 2, 1, False)
            if published and value.pad is None:
                self.values[node] = Labels(value.node, value.level + 1)
                return None
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return NOT_PLAIN
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(
            PoolOp(node.name, base, self._loadable(view), kernel[0], stride[0], pad[0], counts)
        )
        self.values[node] = View(base)
        return None

    def _dropout(self, node: fx.Node, call: Call) -> str | None:
        source, value = self._argument(call)
        rate = call.options["p"]
        if not call.options["training"] or rate == 0.0:
            self.values[node] = value
            return None
        if not 0.0 < rate < 1.0:
            return "dropout of everything"
        view = self._view(value, source)
        if view is None or view.pad is not None or (view.act is not None and view.act.kind not in ON_LOAD):
            return NOT_PLAIN
        self.values[node] = self._store(view, rate, "dropout")
        if call.inplace:
            self._rebind(value, self.values[node])
        return None

    def _add(self, node: fx.Node, call: Call) -> str | None:
        a, b = call.x, call.options["other"]
        if not isinstance(b, fx.Node):
            return "addition of a constant"
        if self._shape(a) != self._shape(b):
            return "addition with broadcasting"
        left, right = self._view(self.values[a], a), self._view(self.values[b], b)
        if left is None or right is None or left.pad is not None or right.pad is not None:
            return NOT_PLAIN
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(AddOp(node.name, base, self._loadable(left), self._loadable(right)))
        old, self.values[node] = self.values[a], View(base)
        if call.inplace:
            self._rebind(old, self.values[node])
        return None

    def _cat(self, node: fx.Node, call: Call) -> str | None:
        tensors, dim = call.x, call.options["dim"]
        if dim not in (1, -3) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
            return "concatenation of other than two tensors along the channels"
        parts = []
        for tensor in tensors:
            if not isinstance(tensor, fx.Node):
                return "concatenation of a constant"
            view = self._view(self.values[tensor], tensor)
            if view is None or view.pad is not None:
                return NOT_PLAIN
            parts.append(self._loadable(view))
        # The concatenation is a copy: a later in-place operation on a part must not reach it.
        self.values[node] = Concat(tuple(replace(p) for p in parts))
        return None

    def _foreign(self, node: fx.Node, reason: str) -> None:
        writes, target = self._writes(node), node.target
        if writes:
            self._before_writing()
        resolved = self._resolve((node.args, node.kwargs))
        args, kwargs = map_views(resolved, self._plain)
        if node.op == "call_module":
            call: Any = self._module(node)
        elif node.op == "call_method":
            call = _Method(target)
        else:
            call = target
        self.graph.ops.append(ForeignOp(node.name, -1, call, args, kwargs, reason))
        self.graph.notes.append((str(getattr(target, "__name__", target)), reason))
        result = Opaque(node.name)
        self.values[node] = result
        if not writes and self._makes_new(node):
            self.fresh.add(node.name)
            return
        if writes and node.args and isinstance(node.args[0], fx.Node):
            # The copy was written to: it takes the place of what it was made from.
            old = self.values[node.args[0]]
            if isinstance(old, (View, Concat)):
                self._rebind(old, result)
        for source in node.all_input_nodes:
            value = self.values[source]
            if self.writes and isinstance(value, View) and value in self.copies:
                self._rebind(value, self.copies[value])
            if isinstance(value, Opaque):
                self.fresh.discard(value.node)
        if writes:
            self.imported.clear()
            self.copies.clear()

    def _makes_new(self, node: fx.Node) -> bool:
        module = self._module(node) if node.op == "call_module" else None
        followed = module is not None and id(module) not in self.whole and not has_hooks(module)
        return makes_new(node, module if followed else None)


class _Relayout:
    """Copies a tensor to memory with the given strides."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        self.strides = strides

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(
            tensor.shape, self.strides, dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)


class _Options:
    """Options of a functional form as attributes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.__dict__.update({"output_padding": 0, "padding_mode": "zeros", **options})


class _Method:
    """Calls a method by name on its first argument."""

    def __init__(self, name: Any) -> None:
        self.name = str(name)

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


def capture(traced: Traced, inputs: dict[str, Any], state: dict[str, Derived] | None = None) -> Graph:
    """The fused graph of ``traced``, whose nodes carry meta tensors.

    Args:
        inputs: values by placeholder name. state: placeholders that are parameters or buffers.
    """
    return Matcher(traced, inputs, state or {}).run()
