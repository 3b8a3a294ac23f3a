"""The operators under ``torch.autocast``: images and weights in the lower precision, all else as it is.

Sums, statistics, scales, shifts and affine parameters stay float32, unlike under
``torch.library.register_autocast``, which would lower every argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from p2pfast.ops.conv.op import _conv
from p2pfast.ops.label_conv.op import label_conv
from p2pfast.ops.norm.op import instance_norm_act
from p2pfast.ops.norm_act.op import _norm_act

_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# What the kernels of a device store; autocast to another dtype leaves arguments as they are.
_STORED = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
Cast = Callable[[tuple[Any, ...], str, torch.dtype], tuple[Any, ...]]
_library = torch.library.Library("p2pfast", "FRAGMENT")


def lowered(value: Any, device: str, dtype: torch.dtype) -> Any:
    """A tensor, or a list of them, in ``dtype`` where autocast's own operators would cast it."""
    if isinstance(value, (list, tuple)):
        return [lowered(v, device, dtype) for v in value]
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.device.type == device
    return value.to(dtype) if eligible and value.dtype != torch.float64 else value


def _conv_arguments(args: tuple[Any, ...], device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return lowered(args[0], device, dtype), lowered(args[1], device, dtype), *args[2:]


def _norm_arguments(args: tuple[Any, ...], device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    residual = 9
    rest = (*args[1:residual], *(lowered(r, device, dtype) for r in args[residual:]))
    return lowered(args[0], device, dtype), *rest


def _label_conv_arguments(args: tuple[Any, ...], device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Labels have no precision: the result is asked for in the lower one."""
    defaults = (0, "reflect", torch.float32)
    filled = (*args, *defaults[len(args) - 5 :])
    return *filled[:7], dtype if filled[7] == torch.float32 else filled[7]


def _add_rule(operator: Any, name: str, device: str, cast: Cast) -> None:
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _DEVICES[device]))

    def run(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*(cast(args, device, dtype) if dtype in _STORED[device] else args))

    _library.impl(name, run, _DEVICES[device])


def register() -> None:
    """Adds the rules; called once when the package is imported."""
    for device in _DEVICES:
        _add_rule(_conv._opoverload, "conv", device, _conv_arguments)
        _add_rule(instance_norm_act._opoverload, "instance_norm_act", device, _norm_arguments)
        _add_rule(_norm_act._opoverload, "norm_act", device, _norm_arguments)
        _add_rule(label_conv._opoverload, "label_conv", device, _label_conv_arguments)
