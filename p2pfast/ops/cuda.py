"""Calls of the native CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch

from p2pfast import _C


def has_kernel(name: str) -> bool:
    """Whether this build of the native module has the CUDA kernel ``name``."""
    return hasattr(_C, f"cuda_{name}")


def native(device: torch.device, name: str) -> bool:
    """Whether a tensor there is one for the native kernel ``name``, which the CPU has."""
    return device.type == "cpu" or (device.type == "cuda" and has_kernel(name))


def require_kernel(name: str, operator: str, what: str) -> None:
    """Raises a RuntimeError with the reason if this build has no such kernel.

    Args:
        name: of the kernel.
        operator: the name of the operator that wants it.
        what: its tensors, to be moved to the CPU instead.
    """
    if not has_kernel(name):
        raise RuntimeError(
            f"p2pfast::{operator} has no CUDA kernel in this build ({_C.build_info()['cuda_reason']}); "
            f"move {what} to the CPU or rebuild with P2PFAST_CUDA=1"
        )


def launch(name: str, device: torch.device, **arguments: Any) -> Any:
    """Starts the kernel on the device's current stream; returns before it is done."""
    stream = torch.cuda.current_stream(device)
    return getattr(_C, f"cuda_{name}")(**arguments, device=stream.device_index, stream=stream.cuda_stream)
