"""What can run here, and the checks that every Triton kernel makes of its tensors."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

STORED = (torch.float32, torch.bfloat16, torch.float16)
MINIMUM_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (on CPU tensors too): ``TRITON_INTERPRET=1`` in the
    environment, set before anything imports triton."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def triton_reason() -> str | None:
    """Why Triton's kernels cannot be used, with the remedy; None where they can."""
    # Says that a multiplication and an addition may become one instruction, as they always did: without it
    # Triton 3.9 warns that the default will change.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        importlib.import_module("triton.language")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "triton":
            return "Triton is not installed: `pip install p2pfast[gpu]`"
        return f"Triton cannot be imported ({error}): reinstall it with `pip install p2pfast[gpu]`"
    except Exception as error:  # it looks for drivers and compilers while it is imported
        return f"Triton cannot be imported ({error}): reinstall it with `pip install p2pfast[gpu]`"
    return None


def require_triton() -> None:
    """Raises RuntimeError with the remedy where Triton cannot be imported."""
    reason = triton_reason()
    if reason is not None:
        raise RuntimeError(f"{reason}; or move the tensors to the CPU")


def allows_tf32() -> bool:
    """Whether convolutions of float32 may round their operands to tf32, as PyTorch's settings say."""
    # ``allow_tf32`` raises once anybody has used the newer of the two interfaces, which older versions lack.
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def gpu_reason(index: int) -> str | None:
    """Why the Triton kernels cannot run on a CUDA device, with the remedy; None where they can."""
    capability = _capability(index)
    if capability < MINIMUM_CAPABILITY:
        return (
            f"cuda:{index} has compute capability {capability[0]}.{capability[1]}; the GPU kernels need 8.0 "
            "or later (Ampere): use another device"
        )
    return triton_reason()


def _usable(index: int) -> bool:
    reason = gpu_reason(index)
    if reason is not None:
        warnings.warn(
            f"p2pfast's layers run in PyTorch on cuda:{index}: {reason}", RuntimeWarning, stacklevel=3
        )
    return reason is None


# What torch.compiler.assume_constant_result does, without importing TorchDynamo, and Triton with it.
_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def on_kernels(x: Tensor) -> bool:
    """Whether a tensor is on a CUDA device that runs the Triton kernels, of a dtype that they take; warns
    where the device is the reason why not."""
    return x.device.type == "cuda" and x.dtype in STORED and _usable(x.device.index or 0)


def check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = STORED) -> None:
    """Whether the Triton kernels take this tensor.

    Raises:
        TypeError: a dtype that is not in ``dtypes``.
        ValueError: not on a CUDA device (CPU tensors are fine where the interpreter runs the kernels).
        RuntimeError: a device older than compute capability 8.0.
    """
    if x.dtype not in dtypes:
        known = ", ".join(str(d) for d in dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; the GPU kernels take {known}: convert it")
    kind = x.device.type
    if kind == "cuda":
        capability = _capability(x.device.index)
        if capability < MINIMUM_CAPABILITY:
            raise RuntimeError(
                f"{name} is on {x.device}, of compute capability {capability[0]}.{capability[1]}; the GPU "
                "kernels need 8.0 or later (Ampere): use another device, or p2pfast.optimize(..., "
                'backend="reference")'
            )
    elif kind != "cpu" or not interpreted():
        raise ValueError(
            f"{name} is on {x.device}; the GPU kernels take CUDA tensors: move it with .cuda(), or set "
            "TRITON_INTERPRET=1 before Python starts to run them on the CPU in Triton's interpreter (slow)"
        )


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def adjacent(x: Tensor) -> bool:
    """Whether the channels of ``x`` (N, C, H, W) are next to each other."""
    return x.stride(1) == 1 or x.shape[1] == 1


def evenly_spaced(x: Tensor) -> bool:
    """Whether a row's first pixel follows the row before as a pixel follows another."""
    _, _, height, width = x.shape
    return height == 1 or width == 1 or x.stride(2) == width * x.stride(3)


def channels_last(x: Tensor, any_rows: bool = False) -> Tensor:
    """``x`` (N, C, H, W) itself where its channels are adjacent and its pixels evenly spaced, else a copy.

    A slice of the channels of such a tensor, or an expanded batch, is read as it is. With ``any_rows`` rows
    may begin anywhere: the inside of a tensor with a border.
    """
    if adjacent(x) and (any_rows or evenly_spaced(x)):
        return x
    # .contiguous() would return a tensor of one channel as it is, whatever its strides.
    copy = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return copy.copy_(x)


def pixel_stride(x: Tensor) -> int:
    """Elements from a pixel to the next of a tensor that ``channels_last`` returns as it is."""
    _, channels, height, width = x.shape
    if width > 1:
        return x.stride(3)
    return x.stride(2) if height > 1 else channels
