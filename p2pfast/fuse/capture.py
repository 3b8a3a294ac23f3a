"""From a module to a fused graph: trace with torch.fx, then match conv-norm-activation chains.

Matching walks the traced nodes in order and keeps, for every node, a value whose normalisation,
activation and padding are still pending; a convolution takes the pending work of its inputs with it.
What cannot be taken is stored first, and what is not understood runs as it did.
"""

from __future__ import annotations

import operator
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
from p2pfast.labelmap import LabelMap

ON_LOAD = ("relu", "leaky_relu")  # activations that a kernel applies while it reads its input
LABEL_KERNEL_LIMIT = 7
LABEL_CLASS_LIMIT = 256


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Tracer(fx.Tracer):
    """Keeps modules with hooks whole, so that the hooks run."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _has_hooks(m) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.GraphModule:
    """The module as a torch.fx graph. Raises what torch.fx raises for control flow it cannot follow."""
    tracer = _Tracer()
    return fx.GraphModule(module, tracer.trace(module))


class _Unknown:
    """The shape of a value that only running can tell."""


_UNKNOWN = _Unknown()


def _is_channels_last(tensor: torch.Tensor) -> bool:
    n, c, h, w = tensor.shape
    return tensor.stride() == (c * h * w, 1, c * w, c) and tensor.stride() != (c * h * w, h * w, w, 1)


def _like(tensor: torch.Tensor, height: int, width: int, channels: int | None = None) -> torch.Tensor:
    layout = torch.channels_last if _is_channels_last(tensor) else torch.contiguous_format
    n, c = tensor.shape[:2]
    return torch.empty((n, channels or c, height, width), dtype=tensor.dtype, memory_format=layout)


def _module_shape(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The result of the commonest modules; None where PyTorch itself is asked, or has an error to raise.

    PyTorch's own shape rules for these import its compiler, which takes seconds.
    """
    if _activation(module) is not None:
        return x
    if x.dim() != 4:
        return None
    n, c, h, w = x.shape
    if type(module) is nn.InstanceNorm2d and h * w > 1:
        return torch.empty(x.shape, dtype=x.dtype)
    if type(module) is nn.BatchNorm2d and n * h * w > 1 and module.num_features == c:
        return x
    if type(module) in _PAD_MODULES:
        left, right, top, bottom = (int(p) for p in module.padding)  # type: ignore[union-attr]
        reflects = type(module) is nn.ReflectionPad2d
        if min(left, right, top, bottom) < 0 or (
            reflects and (max(left, right) >= w or max(top, bottom) >= h)
        ):
            return None
        return _like(x, h + top + bottom, w + left + right)
    if type(module) in (nn.Conv2d, nn.ConvTranspose2d) and not isinstance(module.padding, str):
        return _conv_shape(module, x)
    if type(module) is nn.AvgPool2d and not module.ceil_mode:
        kernel, stride, pad = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        size = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip((h, w), pad, kernel, stride, strict=True)]
        return _like(x, size[0], size[1]) if min(size) > 0 else None
    return None


def _conv_shape(module: Any, x: torch.Tensor) -> torch.Tensor | None:
    size = []
    for i in range(2):
        kernel, stride, pad = module.kernel_size[i], module.stride[i], module.padding[i]
        reach = module.dilation[i] * (kernel - 1) + 1
        if isinstance(module, nn.ConvTranspose2d):
            size.append((x.shape[2 + i] - 1) * stride - 2 * pad + reach + module.output_padding[i])
        else:
            size.append((x.shape[2 + i] + 2 * pad - reach) // stride + 1)
    if x.shape[1] != module.in_channels or x.dtype != module.weight.dtype or min(size) <= 0:
        return None
    if module.padding_mode == "reflect" and (
        module.padding[0] >= x.shape[2] or module.padding[1] >= x.shape[3]
    ):
        return None
    return _like(x, size[0], size[1], module.out_channels)


class _Shapes(fx.Interpreter):
    """Runs a traced module on meta tensors. An operation that cannot run there has no known shape: it
    is left to PyTorch, which also raises what it has to say about it."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.twins: dict[int, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result: Any = _UNKNOWN
        if not any(self.env.get(source) is _UNKNOWN for source in n.all_input_nodes):
            try:
                result = super().run_node(n)
            except Exception:
                result = _UNKNOWN
        if isinstance(result, torch.Tensor):
            n.meta["val"] = result
        return result

    def _meta(self, value: Any) -> Any:
        if id(value) not in self.twins:
            self.twins[id(value)] = torch.empty_like(value, device="meta")
        return self.twins[id(value)]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not kwargs and len(args) == 1 and isinstance(args[0], torch.Tensor):
            known = _module_shape(module, args[0])
            if known is not None:
                return known
        state = {name: self._meta(p) for name, p in [*module.named_parameters(), *module.named_buffers()]}
        return torch.func.functional_call(module, state, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if (
            target in _ADDITIONS
            and len(args) == 2
            and not kwargs
            and all(isinstance(a, torch.Tensor) for a in args)
        ):
            if args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
                return args[0]
        if target in _FUNCTIONAL_ACTS and isinstance(args[0], torch.Tensor):
            return args[0]
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = self.fetch_attr(target)
        return self._meta(value) if isinstance(value, torch.Tensor) else value


def propagate_shapes(traced: fx.GraphModule, inputs: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Notes every tensor's shape and layout as a meta tensor in ``node.meta["val"]``.

    Shapes do not depend on the precision, so floating-point inputs take the parameters' dtype.
    """

    def example(value: Any) -> Any:
        if isinstance(value, LabelMap):
            return torch.empty(value.shape, dtype=dtype or torch.float32, device="meta")
        if isinstance(value, torch.Tensor):
            kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
            return torch.empty_like(value, device="meta", dtype=kind)
        return value

    for node in traced.graph.nodes:
        node.meta.pop("val", None)
    examples = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            examples.append(example(inputs[node.name] if node.name in inputs else node.args[0]))
    with torch.no_grad(), torch.device("meta"):
        _Shapes(traced).run(*examples)


def _activation(module: nn.Module) -> Act | None:
    if isinstance(module, nn.LeakyReLU):
        return Act("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU):
        return Act("elu", float(module.alpha))
    if isinstance(module, nn.GELU):
        return Act("gelu") if module.approximate == "none" else None
    kinds: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.Tanh: "tanh",
        nn.Sigmoid: "sigmoid",
        nn.SiLU: "silu",
    }
    kind = kinds.get(type(module))
    return Act(kind) if kind else None


_ADDITIONS = (operator.add, operator.iadd, torch.add)

_FUNCTIONAL_ACTS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    "relu": "relu",
    "relu_": "relu",
    "tanh": "tanh",
    "tanh_": "tanh",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}

_PAD_MODULES: dict[type[nn.Module], str] = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.ZeroPad2d: "zeros",
}
_PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate"}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


class Matcher:
    """Builds a :class:`Graph` from a traced module whose nodes carry meta tensors."""

    def __init__(self, traced: fx.GraphModule, inputs: dict[str, Any]) -> None:
        self.traced = traced
        self.inputs = inputs
        self.graph = Graph()
        self.values: dict[fx.Node, Any] = {}
        self.modules = dict(traced.named_modules())
        self.imported: dict[fx.Node, View] = {}

    def run(self) -> Graph:
        for node in self.traced.graph.nodes:
            if node.op == "output":
                self.graph.result = fx.node.map_arg(node.args[0], self._returned)
            elif node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "get_attr":
                self._foreign(node, "a parameter or buffer used directly")
            else:
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
        self.graph.inputs.append(node.name)
        value = self.inputs.get(node.name)
        fits = (
            isinstance(value, LabelMap) and value.features is None and value.num_classes <= LABEL_CLASS_LIMIT
        )
        self.values[node] = Labels(node.name, 0) if fits else Opaque(node.name)

    def _view(self, value: Any, node: fx.Node) -> View | None:
        """``value`` of argument ``node`` as a single view of the graph, imported if need be."""
        if isinstance(value, View):
            return value
        if isinstance(value, Concat) or not self._is_image(node):
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
        if isinstance(value, View):
            stored = self._store(value)
            if stored is not value:
                self._rebind(value, stored)
            return self._padded(replace(stored, pad=None), value.pad) if value.pad else stored
        return value

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
        if _is_channels_last(node.meta["val"]):
            self.graph.channels_last.add(value)
        return value

    def _rebind(self, old: Any, new: Any) -> None:
        """After an in-place operation every alias of the old value sees the new one."""
        for node, value in self.values.items():
            if value is old:
                self.values[node] = new

    # --- operations --------------------------------------------------------------------------------

    def _operation(self, node: fx.Node) -> None:
        if "val" not in node.meta:
            return self._foreign(node, "its result is no tensor, or its shape depends on data")
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if _has_hooks(module):
                return self._foreign(node, "the module has hooks")
            handler = self._module_handler(module)
            if handler is not None and len(node.args) == 1 and not node.kwargs:
                reason = handler(node, module)
            else:
                reason = f"{type(module).__name__} has no fused kernel"
        else:
            reason = self._function(node)
        if reason is not None:
            self._foreign(node, reason)

    def _module_handler(self, module: nn.Module) -> Callable[[fx.Node, Any], str | None] | None:
        kind = type(module)
        if kind in (nn.Conv2d, nn.ConvTranspose2d):
            return self._conv
        if kind in (nn.InstanceNorm2d, nn.BatchNorm2d, nn.GroupNorm):
            return self._norm
        if kind in _PAD_MODULES:
            return self._pad_module
        if kind is nn.AvgPool2d:
            return self._pool
        if kind in (nn.Dropout, nn.Dropout2d):
            return self._dropout
        if kind is nn.Identity:
            return self._identity
        if _activation(module) is not None:
            return self._act_module
        return None

    def _argument(self, node: fx.Node) -> tuple[fx.Node, Any]:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            raise AssertionError(f"{node} has a constant argument")
        return source, self.values[source]

    def _identity(self, node: fx.Node, module: nn.Module) -> str | None:
        self.values[node] = self._argument(node)[1]
        return None

    def _conv(self, node: fx.Node, module: nn.Conv2d | nn.ConvTranspose2d) -> str | None:
        source, value = self._argument(node)
        transposed = isinstance(module, nn.ConvTranspose2d)
        if module.groups != 1:
            return f"groups={module.groups}: grouped convolutions are left to the library"
        if _pair(module.dilation) != (1, 1):
            return f"dilation={module.dilation}: dilated convolutions are left to the library"
        stride = _pair(module.stride)
        if stride[0] != stride[1]:
            return f"stride={stride}: different strides are left to the library"
        if isinstance(module.padding, str):
            return f"padding={module.padding!r}: named paddings are left to the library"
        if "weight" not in module._parameters:
            return "the weight is computed (weight_norm, spectral_norm, parametrisation)"
        if max(_pair(module.kernel_size)) > 16:
            return f"kernel_size={module.kernel_size}: kernels above 16 are left to the library"
        own = _pair(module.padding)
        mode = module.padding_mode
        if mode == "circular":
            return "circular padding is left to the library"
        if transposed and stride[0] > 4:
            return f"stride={stride}: transposed strides above 4 are left to the library"
        if isinstance(value, Labels):
            reason = self._label_conv(node, module, value)
            if reason is None:
                return None
            self.graph.notes.append((str(node.target), f"{reason}; it takes the dense tensor"))
        parts = value.parts if isinstance(value, Concat) else None
        if parts is None:
            view = self._view(value, source)
            if view is None:
                return "the input is not a float image on the CPU"
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
                str(node.target),
                used_mode,
                own[0] + (pad.top if pad else 0),
                own[1] + (pad.left if pad else 0),
            )
        )
        self.values[node] = View(base)
        return None

    def _label_conv(self, node: fx.Node, module: Any, labels: Labels) -> str | None:
        kernel, own = _pair(module.kernel_size), _pair(module.padding)
        if isinstance(module, nn.ConvTranspose2d) or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
            return "labels need an ordinary convolution with an odd square kernel"
        if kernel[0] > LABEL_KERNEL_LIMIT or _pair(module.stride) != (1, 1):
            return f"labels need a kernel of at most {LABEL_KERNEL_LIMIT} and stride 1"
        half = (kernel[0] - 1) // 2
        if labels.pad is None:
            mode, amounts = module.padding_mode, {own[0], own[1]}
        else:
            pad = labels.pad
            mode, amounts = pad.mode, {pad.left, pad.right, pad.top, pad.bottom}
            if own != (0, 0):
                amounts = {-1}
        if amounts != {half} or mode not in ("reflect", "zeros"):
            return "labels need reflection or zero padding of half the kernel"
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(LabelConvOp(node.name, base, labels, str(node.target), mode == "reflect"))
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

    def _norm(self, node: fx.Node, module: Any) -> str | None:
        source, value = self._argument(node)
        if isinstance(module, nn.GroupNorm):
            if module.num_groups != module.num_channels:
                return f"GroupNorm with {module.num_groups} groups of several channels"
            kind = "instance"
        else:
            frozen = not module.training and module.running_mean is not None
            kind = "frozen" if frozen else "instance" if isinstance(module, nn.InstanceNorm2d) else "batch"
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return "the input is padded, concatenated or not a float image on the CPU"
        if view.norm is not None or view.act is not None:
            view = self._store(view)
        self.values[node] = replace(view, norm=Norm(str(node.target), kind))
        return None

    def _act_module(self, node: fx.Node, module: nn.Module) -> str | None:
        act = _activation(module)
        return (
            self._act(node, act, bool(getattr(module, "inplace", False))) if act else "an unknown activation"
        )

    def _act(self, node: fx.Node, act: Act, inplace: bool) -> str | None:
        source, value = self._argument(node)
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
                return "the input is not a float image on the CPU"
            if inplace and isinstance(value, Opaque):
                return "changes an input in place"
            if view.pad is not None and view.pad.mode == "zeros" and act.kind == "sigmoid":
                return "an activation that changes zero padding"
            new_view = self._with_act(view, act)
            result = new_view if new_view is not None else replace(self._store(view), act=act)
        self.values[node] = result
        if inplace:
            self._rebind(value, result)
        return None

    def _with_act(self, view: View, act: Act) -> View | None:
        """The view with ``act`` pending too, if one deferred activation can express both."""
        if view.act is None:
            return replace(view, act=act)
        if act.kind == "relu" and view.act.kind in ON_LOAD and view.act.slope >= 0:
            return replace(view, act=act)
        return None

    def _pad_module(self, node: fx.Node, module: Any) -> str | None:
        left, right, top, bottom = (int(p) for p in module.padding)
        return self._pad(node, Padding(_PAD_MODULES[type(module)], left, right, top, bottom))

    def _pad(self, node: fx.Node, pad: Padding) -> str | None:
        source, value = self._argument(node)
        if min(pad.left, pad.right, pad.top, pad.bottom) < 0:
            return "negative padding"
        if isinstance(value, Labels) and value.pad is None:
            self.values[node] = replace(value, pad=pad)
            return None
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return "the input is concatenated, padded twice or not a float image on the CPU"
        self.values[node] = replace(self._loadable(view), pad=pad)
        return None

    def _pool(self, node: fx.Node, module: nn.AvgPool2d) -> str | None:
        source, value = self._argument(node)
        kernel, stride, pad = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
        if kernel[0] != kernel[1] or stride[0] != stride[1] or pad[0] != pad[1]:
            return "average pooling with different sizes along height and width"
        if module.ceil_mode or module.divisor_override:
            return "average pooling with ceil_mode or divisor_override"
        if isinstance(value, Labels):
            published = (kernel[0], stride[0], pad[0], module.count_include_pad) == (3, 2, 1, False)
            if published and value.pad is None:
                self.values[node] = Labels(value.node, value.level + 1)
                return None
        view = self._view(value, source)
        if view is None or view.pad is not None:
            return "the input is concatenated, padded or not a float image on the CPU"
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(
            PoolOp(
                node.name, base, self._loadable(view), kernel[0], stride[0], pad[0], module.count_include_pad
            )
        )
        self.values[node] = View(base)
        return None

    def _dropout(self, node: fx.Node, module: nn.Dropout) -> str | None:
        source, value = self._argument(node)
        if not module.training or module.p == 0.0:
            self.values[node] = value
            return None
        if isinstance(module, nn.Dropout2d) or not 0.0 < module.p < 1.0:
            return "dropout of whole channels, or of everything"
        view = self._view(value, source)
        if view is None or view.pad is not None or (view.act is not None and view.act.kind not in ON_LOAD):
            return "the input is concatenated, padded or not a float image on the CPU"
        self.values[node] = self._store(view, module.p, "dropout")
        if module.inplace:
            self._rebind(value, self.values[node])
        return None

    def _function(self, node: fx.Node) -> str | None:
        target = node.target
        if target in (*_ADDITIONS, "add", "add_") and len(node.args) == 2 and not node.kwargs:
            return self._add(node, inplace=target in (operator.iadd, "add_"))
        if target in (torch.cat, torch.concat) or target == "cat":
            return self._cat(node)
        if target in _FUNCTIONAL_ACTS and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
            inplace = bool(node.kwargs.get("inplace", False)) or str(
                getattr(target, "__name__", target)
            ).endswith("_")
            return self._act(node, Act(_FUNCTIONAL_ACTS[target]), inplace)
        if target is F.leaky_relu:
            slope = node.kwargs.get("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
            in_place = node.kwargs.get("inplace", node.args[2] if len(node.args) > 2 else False)
            return self._act(node, Act("leaky_relu", float(slope)), bool(in_place))  # type: ignore[arg-type]
        if target is F.pad and len(node.args) >= 2:
            amounts, value = node.args[1], node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 0)
            mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
            if (
                isinstance(amounts, (list, tuple))
                and len(amounts) == 4
                and mode in _PAD_MODES
                and value in (0, None)
            ):
                if all(isinstance(a, int) for a in amounts):
                    left, right, top, bottom = amounts
                    return self._pad(node, Padding(_PAD_MODES[str(mode)], left, right, top, bottom))  # type: ignore[arg-type]
        return f"{getattr(target, '__name__', target)} has no fused kernel"

    def _add(self, node: fx.Node, inplace: bool) -> str | None:
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return "addition of a constant"
        if self._shape(a) != self._shape(b):
            return "addition with broadcasting"
        left, right = self._view(self.values[a], a), self._view(self.values[b], b)
        if left is None or right is None or left.pad is not None or right.pad is not None:
            return "addition of something concatenated, padded or not a float image on the CPU"
        if inplace and isinstance(self.values[a], Opaque):
            return "changes an input in place"
        base = self.graph.new_base(node.meta["val"].shape)
        self.graph.ops.append(AddOp(node.name, base, self._loadable(left), self._loadable(right)))
        old, self.values[node] = self.values[a], View(base)
        if inplace:
            self._rebind(old, self.values[node])
        return None

    def _cat(self, node: fx.Node) -> str | None:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if dim not in (1, -3) or not isinstance(tensors, (list, tuple)) or len(tensors) != 2:
            return "concatenation of other than two tensors along the channels"
        parts = []
        for tensor in tensors:
            if not isinstance(tensor, fx.Node):
                return "concatenation of a constant"
            view = self._view(self.values[tensor], tensor)
            if view is None or view.pad is not None:
                return "concatenation of something concatenated, padded or not a float image on the CPU"
            parts.append(self._loadable(view))
        # The concatenation is a copy: a later in-place operation on a part must not reach it.
        self.values[node] = Concat(tuple(replace(p) for p in parts))
        return None

    def _foreign(self, node: fx.Node, reason: str) -> None:
        args = map_views(self._resolve(node.args), self._plain)
        kwargs = map_views(self._resolve(node.kwargs), self._plain)
        target: Any = node.target
        if node.op == "call_module":
            call: Any = self.modules[target]
        elif node.op == "call_method":
            call = _Method(target)
        elif node.op == "get_attr":
            call = _Attribute(self.traced, target)
        else:
            call = target
        self.graph.ops.append(ForeignOp(node.name, -1, call, args, kwargs, reason))
        if node.op != "get_attr":
            self.graph.notes.append((str(getattr(target, "__name__", target)), reason))
        self.values[node] = Opaque(node.name)


class _Method:
    """Calls a method by name on its first argument."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(owner, self.name)(*args, **kwargs)


class _Attribute:
    """Fetches a parameter or buffer by its path at each call, so that a replaced one is seen."""

    def __init__(self, root: nn.Module, path: str) -> None:
        self.root, self.path = root, path

    def __call__(self) -> Any:
        return operator.attrgetter(self.path)(self.root)


def capture(traced: fx.GraphModule, inputs: dict[str, Any], dtype: torch.dtype | None) -> Graph:
    """The fused graph of ``traced`` for inputs like these (by placeholder name).

    Raises what the network itself would raise for inputs that do not fit it.
    """
    propagate_shapes(traced, inputs, dtype)
    return Matcher(traced, inputs).run()
