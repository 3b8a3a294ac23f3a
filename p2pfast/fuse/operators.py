"""One description for the many ways to write an operation: modules, functions, methods, ATen overloads.

A :class:`Call` names what is computed (``conv``, ``norm``, ``act``, ...) and its arguments by name; values
of the traced graph stay ``fx.Node``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from p2pfast.fuse.graph import Act

_REQUIRED = object()


@dataclass
class Call:
    """``kind`` of ``x`` with ``options``; ``layer`` is the module, where a module does it."""

    kind: str
    x: Any
    options: dict[str, Any] = field(default_factory=dict)
    layer: nn.Module | None = None
    inplace: bool = False


def _signature(text: str) -> list[tuple[str, Any]]:
    """``"input weight bias=None"`` as names and defaults."""
    found: list[tuple[str, Any]] = []
    for word in text.split():
        name, given, default = word.partition("=")
        found.append((name, _value(default) if given else _REQUIRED))
    return found


def _value(text: str) -> Any:
    constants = {"None": None, "True": True, "False": False}
    if text in constants:
        return constants[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_NORM = "weight bias running_mean running_var training momentum eps cudnn_enabled=True"
_POOL = "input kernel_size stride=None padding=0 ceil_mode=False count_include_pad=True divisor_override=None"
_CONV = "input weight bias=None stride=1 padding=0 dilation=1 groups=1"
_DECONV = "input weight bias=None stride=1 padding=0 output_padding=0 groups=1 dilation=1"
_FUNCTIONAL_NORM = "running_mean=None running_var=None weight=None bias=None"
_GROUP = "input num_groups weight=None bias=None eps=1e-5 cudnn_enabled=True"

# ATen overloads by name, so that this file imports none of them.
_SIGNATURES: list[tuple[str, str, tuple[Any, ...], dict[str, Any]]] = [
    ("conv", _CONV, (torch.conv2d, "aten.conv2d.default", "aten.conv2d.padding"), {"transposed": False}),
    (
        "conv",
        _DECONV,
        (torch.conv_transpose2d, "aten.conv_transpose2d.input"),
        {"transposed": True},
    ),
    (
        "norm",
        f"input {_FUNCTIONAL_NORM} training=False momentum=0.1 eps=1e-5",
        (F.batch_norm,),
        {"statistics": "batch"},
    ),
    (
        "norm",
        f"input {_FUNCTIONAL_NORM} training=True momentum=0.1 eps=1e-5",
        (F.instance_norm,),
        {"statistics": "instance"},
    ),
    ("norm", f"input {_NORM}", (torch.batch_norm, "aten.batch_norm.default"), {"statistics": "batch"}),
    (
        "norm",
        f"input {_NORM}",
        (torch.instance_norm, "aten.instance_norm.default"),
        {"statistics": "instance"},
    ),
    (
        "norm",
        _GROUP,
        (F.group_norm, torch.group_norm, "aten.group_norm.default"),
        {"statistics": "group"},
    ),
    (
        "pad",
        "input pad mode=constant value=None",
        (F.pad, getattr(torch._C._nn, "pad", None), "aten.pad.default"),
        {},
    ),
    ("pad", "input pad", ("aten.reflection_pad2d.default",), {"mode": "reflect"}),
    ("pad", "input pad", ("aten.replication_pad2d.default",), {"mode": "replicate"}),
    ("pad", "input pad value=0", ("aten.constant_pad_nd.default",), {"mode": "constant"}),
    ("pool", _POOL, (F.avg_pool2d, "aten.avg_pool2d.default"), {}),
    ("dropout", "input p=0.5 training=True inplace=False", (F.dropout,), {}),
    ("dropout", "input p training", (torch.dropout, "aten.dropout.default"), {}),
    ("dropout", "input p training", (torch.dropout_, "aten.dropout_.default"), {"inplace": True}),
    ("add", "input other alpha=1", (torch.add, operator.add, "add", "aten.add.Tensor"), {}),
    ("add", "input other alpha=1", (operator.iadd, "add_", "aten.add_.Tensor"), {"inplace": True}),
    ("cat", "input dim=0", (torch.cat, torch.concat, torch.concatenate, "aten.cat.default"), {}),
    ("same", "input memory_format=None", ("contiguous", "aten.contiguous.default", "aten.alias.default"), {}),
    ("act", "input negative_slope=0.01 inplace=False", (F.leaky_relu,), {"act": "leaky_relu"}),
    ("act", "input negative_slope=0.01", ("aten.leaky_relu.default",), {"act": "leaky_relu"}),
    (
        "act",
        "input negative_slope=0.01",
        (F.leaky_relu_, "aten.leaky_relu_.default"),
        {"act": "leaky_relu", "inplace": True},
    ),
    ("act", "input alpha=1.0 inplace=False", (F.elu,), {"act": "elu"}),
    ("act", "input alpha=1.0 scale=1 input_scale=1", ("aten.elu.default",), {"act": "elu"}),
    (
        "act",
        "input alpha=1.0 scale=1 input_scale=1",
        (F.elu_, "aten.elu_.default"),
        {"act": "elu", "inplace": True},
    ),
    ("act", "input approximate=none", (F.gelu, "aten.gelu.default"), {"act": "gelu"}),
]

for _name in ("relu", "silu", "tanh", "sigmoid"):
    _plain = (getattr(torch, _name, None), _name, f"aten.{_name}.default")
    _changing = (
        getattr(torch, f"{_name}_", None),
        getattr(F, f"{_name}_", None),
        f"{_name}_",
        f"aten.{_name}_.default",
    )
    _SIGNATURES.append(("act", "input inplace=False", (getattr(F, _name),), {"act": _name}))
    _SIGNATURES.append(("act", "input", _plain, {"act": _name}))
    _SIGNATURES.append(("act", "input", _changing, {"act": _name, "inplace": True}))

_TABLE: dict[Any, tuple[str, list[tuple[str, Any]], dict[str, Any]]] = {}
for _kind, _text, _targets, _fixed in _SIGNATURES:
    for _target in _targets:
        if _target is not None:
            _TABLE.setdefault(_target, (_kind, _signature(_text), _fixed))

_METHODS = {t for t in _TABLE if isinstance(t, str) and "." not in t}


def pair(value: Any) -> tuple[int, int]:
    """One number for both directions, or two."""
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def target_key(node: fx.Node) -> Any:
    """What an operation is called in the tables: the function itself, or a method's or overload's name."""
    if node.op == "call_method":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return node.target


def changes_in_place(node: fx.Node) -> bool:
    """Whether an operation may write to one of its arguments."""
    if node.op == "call_module" or node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    known = _TABLE.get(target_key(node))
    if known is not None:
        call = describe_function(node)
        return call is not None and call.inplace
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place_operator = getattr(operator, name, None) is node.target and name.startswith("i")
    return (
        (
            in_place_operator
            and name not in ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")
        )
        or name == "setitem"
        or (name.endswith("_") and not name.endswith("__"))
    )


def _act(kind: str, options: dict[str, Any]) -> Act | None:
    if kind == "leaky_relu":
        slope = options["negative_slope"]
        return Act(kind, float(slope)) if isinstance(slope, (int, float)) else None
    if kind == "elu":
        plain = options.get("scale", 1) == 1 and options.get("input_scale", 1) == 1
        return Act(kind, float(options["alpha"])) if plain else None
    if kind == "gelu":
        return Act(kind) if options["approximate"] == "none" else None
    return Act(kind)


def _known(value: Any) -> Any:
    """A number that the graph computes from what a plan is made for, as the number."""
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return found if isinstance(found, (bool, int, float)) else value
    if type(value) in (tuple, list, fx.immutable_collections.immutable_list):
        return [_known(v) for v in value]
    return value


def describe_function(node: fx.Node) -> Call | None:
    """What a function or method does, or None for one that no kernel of ours knows."""
    if node.op == "call_function" and isinstance(node.target, str):
        return None
    key = target_key(node)
    known = _TABLE.get(key)
    if known is None or (node.op == "call_method") != (isinstance(key, str) and key in _METHODS):
        return None
    kind, signature, fixed = known
    if len(node.args) > len(signature):
        return None
    options = {name: default for name, default in signature if default is not _REQUIRED}
    options.update(zip((name for name, _ in signature), node.args, strict=False))
    names = {name for name, _ in signature}
    for name, value in node.kwargs.items():
        # Spellings that differ between a function and the table.
        name = {"use_input_stats": "training", "self": "input", "tensors": "input", "train": "training"}.get(
            name, name
        )
        if name not in names:
            return None
        options[name] = value
    if any(default is _REQUIRED and name not in options for name, default in signature):
        return None
    options.update(fixed)
    x = options.pop("input")
    options = {name: _known(value) for name, value in options.items()}
    inplace = options.pop("inplace", False) is True
    if kind == "act":
        act = _act(options.pop("act"), options)
        return Call("act", x, {"act": act}, inplace=inplace) if act is not None else None
    if kind == "add" and options["alpha"] != 1:
        return None
    if kind == "pad":
        mode, value = options["mode"], options.get("value")
        amounts = options["pad"]
        four = isinstance(amounts, (list, tuple)) and len(amounts) == 4
        if not four or not all(isinstance(a, int) for a in amounts) or value not in (0, None):
            return None
        if mode not in ("constant", "reflect", "replicate"):
            return None
        options = {"pad": tuple(amounts), "mode": "zeros" if mode == "constant" else mode}
    return Call(kind, x, options, inplace=inplace)


_PAD_MODULES: dict[type[nn.Module], str] = {
    nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate",
    nn.ZeroPad2d: "zeros",
}
_ACT_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
}


def module_act(module: nn.Module) -> Act | None:
    """The activation that a module is."""
    kind = type(module)
    if kind in _ACT_MODULES:
        return Act(_ACT_MODULES[kind])
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return Act("leaky_relu", float(module.negative_slope))
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return Act("elu", float(module.alpha))
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return Act("gelu")
    return None


def base_kind(module: nn.Module) -> type[nn.Module]:
    """The module's class; for one with parametrised weights the class that it had before."""
    kind = type(module)
    if hasattr(module, "parametrizations") and kind.__name__.startswith("Parametrized"):
        return kind.__bases__[0]
    return kind


# What users replace on a module itself, for seamless tiles say.
_PATCHES = frozenset(("forward", "_conv_forward", "_output_padding", "_check_input_dim"))


def describe_module(module: nn.Module, x: Any) -> Call | None:
    """What a module does to ``x``, or None for one that no kernel of ours knows."""
    kind = base_kind(module)
    m: Any = module
    if not _PATCHES.isdisjoint(module.__dict__):
        return None
    if kind in (nn.Conv2d, nn.ConvTranspose2d):
        return Call("conv", x, {"transposed": kind is nn.ConvTranspose2d}, layer=module)
    if kind in (nn.InstanceNorm2d, nn.BatchNorm2d, nn.GroupNorm) and kind is type(module):
        statistics = {"InstanceNorm2d": "instance", "BatchNorm2d": "batch"}.get(kind.__name__, "group")
        if statistics == "group":
            return Call("norm", x, {"statistics": "group", "num_groups": m.num_groups}, layer=module)
        # As the modules' own forward decides.
        live = m.training or m.running_mean is None
        return Call("norm", x, {"statistics": statistics, "training": live}, layer=module)
    if kind in _PAD_MODULES:
        amounts = tuple(int(p) for p in m.padding)
        return Call("pad", x, {"pad": amounts, "mode": _PAD_MODULES[kind]}, layer=module)
    if kind is nn.AvgPool2d:
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        return Call("pool", x, {name: getattr(m, name) for name in names}, layer=module)
    if kind is nn.Dropout:
        return Call("dropout", x, {"p": m.p, "training": m.training}, layer=module, inplace=bool(m.inplace))
    if kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout) and not m.training:
        return Call("same", x, layer=module)
    if kind is nn.Identity:
        return Call("same", x, layer=module)
    act = module_act(module)
    if act is not None:
        return Call("act", x, {"act": act}, layer=module, inplace=bool(getattr(module, "inplace", False)))
    return None


_NEW_KINDS = ("act", "add", "cat", "conv", "norm", "pool")
_NEW_MODULES = tuple(
    f"torch.nn.modules.{name}"
    for name in ("conv", "batchnorm", "instancenorm", "normalization", "linear", "pooling", "upsampling")
)
_NEW_FUNCTIONS = "mul truediv div sub pow exp log matmul linear randn_like".split()


def makes_new(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an operation returns memory of its own, which it shares with no argument.

    ``module`` is the one that a node calls; None if what that does cannot be told.
    """
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_module":
        if module is None or getattr(module, "inplace", False):
            return False
        call = describe_module(module, node)
    else:
        call = describe_function(node)
    if call is not None:
        new = any(call.options["pad"]) if call.kind == "pad" else call.kind in _NEW_KINDS
        return new and not call.inplace
    if module is not None:
        return _PATCHES.isdisjoint(module.__dict__) and type(module).__module__.startswith(_NEW_MODULES)
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", str(node.target))
    return name in _NEW_FUNCTIONS
