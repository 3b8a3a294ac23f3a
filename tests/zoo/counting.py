"""How many convolutions of a network run in fused kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import p2pfast

KERNELS = ("label_conv", "direct", "winograd", "winograd2", "streamed", "streamed2", "thin", "library")

_FORMS = (torch.ops.aten.convolution, torch.ops.aten.conv2d, torch.ops.aten.conv_transpose2d)


class _Convolutions(TorchDispatchMode):
    """Counts the two-dimensional convolutions that PyTorch runs, whichever form they were written in."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In inference mode nothing takes the two forms apart before they come here.
        if func.overloadpacket in _FORMS and args[1].dim() == 4:
            self.count += 1
        return func(*args, **(kwargs or {}))


def convolutions(net: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Two-dimensional convolutions of one call; a shared one counts each time it runs."""
    counter = _Convolutions()
    with torch.no_grad(), counter:
        copy.deepcopy(net)(*inputs)
    return counter.count


def fused_convolutions(fast: nn.Module) -> int:
    """Convolutions that ran in a native kernel in the last call of an optimised network."""
    return sum(row.kernel.split()[0] in KERNELS for row in p2pfast.explain(fast).rows)
