"""A run's folder: networks under the published names, and the state to go on from."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2pfast.data.atomic import whole
from p2pfast.errors import UsageError, first_line

STATE_FILE = "latest_state.pth"


def save(content: Any, path: Path, durable: bool = False) -> None:
    """`torch.save`, whole or not at all. Raises UsageError if the disk does not take it."""
    try:
        with whole(path, durable) as stream:
            torch.save(content, stream)
    except (OSError, RuntimeError) as error:
        # PyTorch's writer tells that a write failed, not why.
        why = getattr(error, "strerror", None) or f"is the disk full? ({first_line(error)})"
        raise UsageError(f"{path}: cannot be written: {why}; what was saved before is still whole") from error


def read_state(path: Path) -> dict[str, Any]:
    """The state that `save` wrote. Raises UsageError if it cannot be read."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{path}: not a training state, or damaged ({first_line(error)}); start another --name, with "
            f"--load-pretrain {path.parent} to begin with the networks saved there"
        ) from error
    if not isinstance(state, dict) or "step" not in state:
        raise UsageError(f"{path}: not a training state of p2pfast")
    return state


def network_file(folder: Path, label: str, name: str) -> Path:
    """``latest_net_G.pth``, ``40_net_D.pth``: where the published tools keep network ``name``."""
    return folder / f"{label}_net_{name}.pth"


def save_networks(folder: Path, label: str, networks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write every network's weights, on the CPU and under the published keys."""
    for name, weights in networks.items():
        plain = {key: value.detach().cpu() for key, value in weights.items()}
        save(plain, network_file(folder, label, name))
