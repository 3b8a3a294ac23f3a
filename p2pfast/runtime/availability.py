"""What can run here, and the reason for each thing that cannot. Behind ``p2pfast info``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import p2pfast.ops

Report = dict[str, Any]


def report() -> Report:
    """Versions, processor, native module, GPU and kernels of this machine and installation.

    Never raises and never creates a CUDA context: a part that cannot be found out is replaced by
    ``{"reason": ...}``.

    Returns:
        A dictionary of plain values (JSON can hold it):

        - ``versions``: ``p2pfast``, ``torch``, ``python`` and ``triton``, each a version or None, with
          ``triton_reason`` when it is None.
        - ``processor``: ``name``, ``cores``, ``supported_level``, ``active_level``, ``levels`` (name → what
          the machine lacks for it, "" if nothing), ``reason`` (None, or why the active level is not the
          highest or cannot be used).
        - ``native``: ``available``, ``compiler``, ``levels``, ``emulate_wide``, ``cuda`` (toolkit version or
          None), ``cuda_architectures``, ``reason`` (why the module, or its CUDA part, is missing).
        - ``gpu``: ``available``, ``devices`` (name, compute capability, memory, driver), ``reason``.
        - ``kernels``: a list of ``{"name", "cpu": {"available", "reason"}, "cuda": {...}}``, one an operator.
    """
    native = _guarded(_native)
    gpu = _guarded(_gpu)
    return {
        "versions": _guarded(_versions),
        "processor": _guarded(_processor),
        "native": native,
        "gpu": gpu,
        "kernels": _kernels(native, gpu),
    }


def _guarded(part: Callable[[], Report]) -> Report:
    try:
        return part()
    except Exception as error:  # a report about a broken installation is the point
        return {"available": False, "reason": f"{type(error).__name__}: {error}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Report:
    versions: Report = {
        "p2pfast": _version("p2pfast"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "triton": None,
        "triton_reason": None,
    }
    try:
        versions["triton"] = importlib.import_module("triton").__version__
    except Exception as error:  # triton may also fail while it looks for a driver
        installed = _version("triton")
        versions["triton_reason"] = (
            f"triton {installed} is installed but cannot be imported: {error}"
            if installed
            else "not installed: `pip install p2pfast[gpu]`"
        )
    return versions


def _processor() -> Report:
    from p2pfast import _C

    processor: Report = {
        "name": _C.processor_name() or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "supported_level": _C.supported_level(),
        "active_level": None,
        "levels": {level: _C.missing_for(level) for level in _C.levels()},
        "reason": None,
    }
    try:
        processor["active_level"] = _C.active_level()
    except RuntimeError as error:
        processor["reason"] = str(error)
        return processor
    if processor["active_level"] != processor["supported_level"]:
        forced = os.environ.get("P2PFAST_CPU")
        processor["reason"] = f"forced by P2PFAST_CPU={forced}" if forced else "chosen by set_active_level()"
    return processor


def _native() -> Report:
    try:
        from p2pfast import _C
    except ImportError as error:
        return {"available": False, "reason": f"the native module cannot be loaded: {error}"}
    build = _C.build_info()
    return {
        "available": True,
        "compiler": build["compiler"],
        "build_type": build["build_type"],
        "levels": build["levels"],
        "emulate_wide": build["emulate_wide"],
        "cuda": build["cuda"] or None,
        "cuda_architectures": build["cuda_architectures"].split(),
        "reason": build["cuda_reason"] or None,
    }


def _gpu() -> Report:
    if torch.version.cuda is None:
        kind = "ROCm" if torch.version.hip else "the CPU"
        return {"available": False, "devices": [], "reason": f"torch {torch.__version__} is built for {kind}"}
    # device_count() asks NVML, which creates no context; is_available() would initialise the driver.
    if torch.cuda.device_count() == 0:
        reason = "the driver reports no NVIDIA GPU (CUDA_VISIBLE_DEVICES, nvidia-smi)"
        return {"available": False, "devices": [], "reason": reason}
    return {"available": True, "devices": _devices(), "reason": None}


def _devices() -> list[Report]:
    """The machine's GPUs as nvidia-smi lists them: asking torch for a name would initialise CUDA."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return [{"name": f"device {index}"} for index in range(torch.cuda.device_count())]
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    try:
        result = subprocess.run(
            [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return [{"name": f"device {i}", "reason": str(error)} for i in range(torch.cuda.device_count())]
    keys = ("name", "compute_capability", "memory", "driver")
    lines = [line.split(", ") for line in result.stdout.strip().splitlines()]
    return [dict(zip(keys, line, strict=False)) for line in lines]


def _kernels(native: Report, gpu: Report) -> list[Report]:
    names = sorted(path.parent.name for path in Path(p2pfast.ops.__path__[0]).glob("*/op.py"))
    return [
        {
            "name": name,
            "cpu": _verdict(_cpu_reason, name, native, gpu),
            "cuda": _verdict(_cuda_reason, name, native, gpu),
        }
        for name in names
    ]


def _verdict(find_reason: Callable[[str, Report, Report], str | None], *about: Any) -> Report:
    try:
        reason = find_reason(*about)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    return {"available": reason is None, "reason": reason}


def _registered(name: str, key: str) -> bool:
    """Whether the operator p2pfast::<name> has a kernel of its own for a dispatch key."""
    importlib.import_module(f"p2pfast.ops.{name}")
    packet = getattr(torch.ops.p2pfast, name, None)
    return packet is not None and any(
        getattr(packet, overload).has_kernel_for_dispatch_key(torch._C.DispatchKey.__members__[key])
        for overload in packet.overloads()
    )


def _cpu_reason(name: str, native: Report, _gpu: Report) -> str | None:
    if not native["available"]:
        return str(native["reason"])
    from p2pfast import _C

    importlib.import_module(f"p2pfast.ops.{name}")
    if hasattr(_C, name) or _registered(name, "CPU"):
        return None
    return "no CPU kernel: the library's operators are used"


# Operators that share a native kernel of another name.
_NATIVE_NAMES = {"gan_loss": "pointwise_loss", "feature_matching": "pointwise_loss"}


def _cuda_reason(name: str, native: Report, gpu: Report) -> str | None:
    from p2pfast import _C

    folder = Path(p2pfast.ops.__path__[0]) / name
    in_triton = (folder / "triton.py").exists()
    in_cuda = hasattr(_C, f"cuda_{_NATIVE_NAMES.get(name, name)}")
    if not in_triton and not in_cuda:
        registered = native["available"] and _registered(name, "CUDA")
        return f"no CUDA kernel in this build: {native['reason']}" if registered else "no CUDA kernel"
    if not gpu["available"]:
        return str(gpu["reason"])
    if not in_cuda:
        try:
            importlib.import_module("triton")
        except Exception as error:
            return f"needs triton, which cannot be imported: {error}"
    return None
