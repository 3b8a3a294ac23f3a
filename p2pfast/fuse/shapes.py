"""Shapes, dtypes and layouts of every value of a traced network, on meta tensors.

The commonest operations have rules of their own: PyTorch's shape rules for them import its compiler, which
takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from p2pfast.fuse.operators import Call, describe_function, describe_module, pair


class Unknown:
    """The shape of a value that only running can tell."""

    def __repr__(self) -> str:
        return "unknown"


UNKNOWN = Unknown()

_CREATES = {
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.arange,
    torch.linspace,
    torch.eye,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
}


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether an image lies in memory as (N, H, W, C), and only so."""
    n, c, h, w = tensor.shape
    return tensor.stride() == (c * h * w, 1, c * w, c) and tensor.stride() != (c * h * w, h * w, w, 1)


def suggests_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch takes an image or a weight for channels_last, which it tells by the strides alone."""
    least = 0
    for dim in (1, 3, 2, 0):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if (
            stride == 0
            and dim == 1
            or size == 0
            or stride < least
            or (dim == 0 and least == tensor.stride(1))
        ):
            return False
        least = stride * max(size, 1)
    return True


def _like(tensor: torch.Tensor, height: int, width: int, channels: int | None = None) -> torch.Tensor:
    layout = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
    n, c = tensor.shape[:2]
    size = (n, channels or c, height, width)
    return torch.empty(size, dtype=tensor.dtype, memory_format=layout, device="meta")


def _conv(call: Call, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor | None:
    m: Any = call.layer if call.layer is not None else _Numbers(call.options)
    transposed = call.options["transposed"]
    if isinstance(m.padding, str):
        return None
    if call.layer is not None:
        kernel, inside, outside = pair(m.kernel_size), m.in_channels, m.out_channels
        weight = next((p for p in m.parameters() if p.dim() == 4), None)
        dtype = x.dtype if weight is None else weight.dtype
    elif isinstance(weight, torch.Tensor) and weight.dim() == 4:
        kernel, dtype = (weight.shape[2], weight.shape[3]), weight.dtype
        inside, outside = weight.shape[1] * int(m.groups), weight.shape[0]
        if transposed:
            inside, outside = weight.shape[0], weight.shape[1] * int(m.groups)
    else:
        return None
    stride, pad, dilation = pair(m.stride), pair(m.padding), pair(m.dilation)
    size = []
    for i in range(2):
        reach = dilation[i] * (kernel[i] - 1) + 1
        if transposed:
            extra = pair(m.output_padding)[i]
            size.append((x.shape[2 + i] - 1) * stride[i] - 2 * pad[i] + reach + extra)
        else:
            size.append((x.shape[2 + i] + 2 * pad[i] - reach) // stride[i] + 1)
    if x.shape[1] != inside or x.dtype != dtype or min(size) <= 0:
        return None
    if getattr(m, "padding_mode", "zeros") == "reflect" and (pad[0] >= x.shape[2] or pad[1] >= x.shape[3]):
        return None
    either = suggests_channels_last(x) or (weight is not None and suggests_channels_last(weight))
    layout = torch.channels_last if either else torch.contiguous_format
    shape = (x.shape[0], outside, *size)
    return torch.empty(shape, dtype=x.dtype, memory_format=layout, device="meta")


class _Numbers:
    """Options of a functional form as attributes."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.__dict__.update({"output_padding": 0, **options})


def _norm(call: Call, x: torch.Tensor) -> torch.Tensor | None:
    n, c, h, w = x.shape
    m: Any = call.layer
    statistics = call.options["statistics"]
    if m is None:
        return None
    if statistics == "instance":
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if h * w > 1 else None
    if statistics == "batch":
        # An image of one pixel is contiguous in either way, and batch normalisation then forgets which.
        fits = n * h * w > 1 and m.num_features == c
        return (x.new_empty(x.shape) if x.is_contiguous() else x) if fits else None
    return torch.empty(x.shape, dtype=x.dtype, device="meta") if m.num_channels == c else None


def _pad(call: Call, x: torch.Tensor) -> torch.Tensor | None:
    h, w = x.shape[2:]
    left, right, top, bottom = call.options["pad"]
    reflects = call.options["mode"] == "reflect"
    if min(left, right, top, bottom) < 0 or (reflects and (max(left, right) >= w or max(top, bottom) >= h)):
        return None
    return _like(x, h + top + bottom, w + left + right)


def _pool(call: Call, x: torch.Tensor) -> torch.Tensor | None:
    if call.options["ceil_mode"]:
        return None
    kernel, pad = pair(call.options["kernel_size"]), pair(call.options["padding"])
    stride = pair(call.options["stride"]) if call.options["stride"] else kernel
    sizes = zip(x.shape[2:], pad, kernel, stride, strict=True)
    size = [(s + 2 * p - k) // t + 1 for s, p, k, t in sizes]
    fits = min(size) > 0 and pad[0] <= kernel[0] // 2 and pad[1] <= kernel[1] // 2
    return _like(x, size[0], size[1]) if fits else None


def _cat(parts: Any, dim: Any) -> torch.Tensor | None:
    if dim not in (1, -3) or not parts:
        return None
    first = parts[0]
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.dim() != 4 or part.dtype != first.dtype:
            return None
        if part.shape[0] != first.shape[0] or part.shape[2:] != first.shape[2:]:
            return None
        if is_channels_last(part) != is_channels_last(first):
            return None
    return _like(first, first.shape[2], first.shape[3], sum(part.shape[1] for part in parts))


def known_shape(call: Call, x: Any, weight: Any = None) -> torch.Tensor | None:
    """The result of a call on a meta tensor; None where PyTorch itself is asked, or has an error to raise."""
    if not isinstance(x, torch.Tensor):
        return None
    if call.kind == "act":
        return x if x.is_floating_point() else None
    if call.kind == "same" and call.layer is not None:
        return x
    if x.dim() != 4:
        return None
    if call.kind == "conv":
        return _conv(call, x, weight)
    if call.kind == "norm":
        return _norm(call, x)
    if call.kind == "pad":
        return _pad(call, x)
    if call.kind == "pool":
        return _pool(call, x)
    return None


class Evaluator:
    """Evaluates nodes of a traced network on meta tensors. A node that cannot be has an unknown value: it is
    left to PyTorch, which also raises what it has to say about it."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor like a parameter; the same one each time, as in-place operations need."""
        if id(tensor) not in self.twins:
            self.twins[id(tensor)] = (tensor, torch.empty_like(tensor, device="meta"))
        return self.twins[id(tensor)][1]

    def evaluate(self, node: fx.Node, opaque: bool = False) -> Any:
        """The value of ``node`` from the values of its arguments; ``opaque`` modules are never called."""
        if any("val" not in source.meta for source in node.all_input_nodes) or opaque:
            return UNKNOWN
        args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
        try:
            with torch.no_grad():
                return self._evaluate(node, args, kwargs)
        except Exception:
            return UNKNOWN

    def _evaluate(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            value: Any = self.root
            for part in target.split("."):
                value = getattr(value, part)
            return self.twin(value) if isinstance(value, torch.Tensor) else value
        if node.op == "call_module":
            module = self.root.get_submodule(target)
            call = describe_module(module, args[0]) if len(args) == 1 and not kwargs else None
            known = known_shape(call, args[0]) if call is not None else None
            if known is not None:
                return known
            state = [*module.named_parameters(), *module.named_buffers()]
            twins = {name: self.twin(p) for name, p in state}
            with torch.device("meta"):
                return torch.func.functional_call(module, twins, args, kwargs)
        call = describe_function(node)
        if call is not None and isinstance(call.x, fx.Node):
            weight = call.options.get("weight")
            known = known_shape(
                call, call.x.meta["val"], weight.meta["val"] if isinstance(weight, fx.Node) else None
            )
            if known is not None:
                return known
            if call.kind == "add" and isinstance(call.options["other"], fx.Node):
                a, b = call.x.meta["val"], call.options["other"].meta["val"]
                if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
                    if a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride():
                        return a
        if call is not None and call.kind == "cat" and isinstance(args[0] if args else None, (list, tuple)):
            known = _cat(args[0], call.options["dim"])
            if known is not None:
                return known
        if target in _CREATES:
            kwargs = {**kwargs, "device": "meta"}
        with torch.device("meta"):
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
