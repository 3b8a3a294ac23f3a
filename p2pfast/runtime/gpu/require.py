"""What a network needs to run fused on a GPU, and what is said where it is missing."""

from __future__ import annotations

import torch

from p2pfast.ops.gpu.support import MINIMUM_CAPABILITY, triton_reason


class CannotUseGpu(RuntimeError):
    """Why the GPU cannot be used, with the remedy."""


class WrongDevice(CannotUseGpu):
    """A tensor is on another device than the network."""


def device_reason() -> str | None:
    """Why there is no usable CUDA device; None where there is one."""
    if torch.version.cuda is None:
        kind = "ROCm" if torch.version.hip else "the CPU"
        return (
            f"torch {torch.__version__} is built for {kind}: install a CUDA build of PyTorch "
            "(https://pytorch.org/get-started), or use backend='cpu'"
        )
    if not torch.cuda.is_available():
        return (
            "PyTorch finds no NVIDIA GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES, or use "
            "backend='cpu'"
        )
    return None


def kernels_reason(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on a CUDA device; None where they can."""
    missing = device_reason()
    if missing is not None:
        return missing
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return (
            f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {capability[0]}."
            f"{capability[1]}; the fused kernels need 8.0 or later (Ampere): use another GPU or "
            "backend='reference'"
        )
    return triton_reason()
