"""Names of the activations that kernels fuse, and what they are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# In the order of the native enumeration (csrc/cpu/conv.h); the first three can also be applied on load.
ACTIVATIONS = ("none", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu", "gelu")
INPUT_ACTIVATIONS = ACTIVATIONS[:3]


def activation_code(act: str, name: str = "act") -> int:
    """The native number of an activation.

    Raises:
        ValueError: there is none of that name.
    """
    choices = INPUT_ACTIVATIONS if name == "input_act" else ACTIVATIONS
    if act not in choices:
        raise ValueError(f"{name} is {act!r}; choose one of {', '.join(choices)}")
    return choices.index(act)


def activate(x: Tensor, act: str, slope: float = 0.0) -> Tensor:
    """An activation by name, in plain PyTorch; ``slope`` is leaky_relu's negative slope or elu's alpha.

    Raises:
        ValueError: there is none of that name.
    """
    match act:
        case "relu":
            return F.relu(x)
        case "leaky_relu":
            return F.leaky_relu(x, slope)
        case "tanh":
            return torch.tanh(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "elu":
            return F.elu(x, slope)
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case _:
            activation_code(act)
            return x
