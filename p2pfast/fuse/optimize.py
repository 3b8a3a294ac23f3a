"""``optimize``: any module, faster, behind the same interface."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import nn

from p2pfast.labelmap import LabelMap
from p2pfast.runtime.cpu import STORED, CannotRun, CpuEngine

_TRACKER = "please report it with the network to p2pfast's issue tracker"
_MODES = ("inference", "train")
_BACKENDS = ("auto", "cpu", "cuda", "reference")
_ACCURACIES = ("default", "fast")


def _clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A tree of new module objects over the same parameters and buffers."""
    known = memo.get(id(module))
    if known is not None:
        return known
    twin = module.__class__.__new__(module.__class__)
    memo[id(module)] = twin
    state = dict(module.__dict__)
    for name, value in state.items():
        # Hook tables and plain containers are copied, so that changing one tree leaves the other alone;
        # the tables of parameters and buffers stay shared, so that replacing an entry reaches both.
        if isinstance(value, dict) and name not in ("_parameters", "_buffers", "_modules"):
            state[name] = value.copy()
    twin.__dict__ = state
    twin.__dict__["_modules"] = {
        name: None if child is None else _clone(child, memo) for name, child in module._modules.items()
    }
    return twin


class Optimized:
    """Mixed into the class of an optimised module: ``forward`` runs fused, everything else stays.

    ``p2pfast_options`` are the arguments of :func:`optimize`.
    """

    __original_forward__: Any
    p2pfast_options: dict[str, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: _State = self.__dict__["_p2pfast"]
        return state.run(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = _plain(self)  # type: ignore[arg-type]
        copied = optimize(copy.deepcopy(plain, memo), **self.p2pfast_options)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        return _rebuild, (_plain(self), self.p2pfast_options)  # type: ignore[arg-type]


def _rebuild(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    return optimize(module, **options)


def _plain(module: nn.Module) -> nn.Module:
    """The module without its optimisation, over the same parameters."""
    twin = _clone(module, {})
    twin.__class__ = type(module).__original_class__  # type: ignore[attr-defined]
    for name in ("_p2pfast", "p2pfast_options"):
        twin.__dict__.pop(name, None)
    return twin


def _densified(value: Any, dtype: torch.dtype | None) -> Any:
    return value.dense(dtype or torch.float32) if isinstance(value, LabelMap) else value


class _State:
    """What an optimised module keeps beside its parameters."""

    def __init__(self, module: nn.Module, options: dict[str, Any]) -> None:
        self.options = options
        # The same object state under the original class: what runs when PyTorch does.
        original: Any = type(module).__original_class__  # type: ignore[attr-defined]
        self.plain: nn.Module = original.__new__(original)
        self.plain.__dict__ = module.__dict__
        self.reason: str | None = None
        self.failed: set[str] = set()
        self.engine: CpuEngine | None = None
        dtype = options["dtype"] or self._parameter_dtype()
        self.dtype = dtype
        if options["backend"] == "reference":
            self.reason = "backend='reference'"
        elif options["backend"] == "cuda":
            self.reason = "backend='cuda': there are no fused GPU kernels yet"
        elif options["mode"] == "train":
            self.reason = "mode='train': the fused backward pass is not there yet, training runs in PyTorch"
        elif dtype not in STORED:
            self.reason = f"dtype {dtype} has no native kernels; choose torch.float32 or torch.bfloat16"
        else:
            self.engine = CpuEngine(self.plain, dtype, options["packed_limit"])

    def _parameter_dtype(self) -> torch.dtype:
        for parameter in self.plain.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return torch.float32

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.engine is None or next(iter(self.plain.parameters()), torch.empty(0)).device.type != "cpu":
            if self.engine is not None:
                self.reason = "the network is not on the CPU, and only the CPU has fused kernels yet"
            return self._original(args, kwargs)
        try:
            result = self.engine.run(args, kwargs)
            self.reason = None
            return result
        except CannotRun as why:
            self.reason = str(why)
            return self._original(args, kwargs)
        except Exception as error:
            return self._recover(error, args, kwargs)

    def _recover(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises what PyTorch raises; where PyTorch succeeds, the failure is ours and is said once."""
        if os.environ.get("P2PFAST_STRICT") == "1":
            self._original(args, kwargs)
            raise error
        result = self._original(args, kwargs)
        self.reason = f"{type(error).__name__}: {error}"
        if self.reason not in self.failed:
            self.failed.add(self.reason)
            warnings.warn(
                f"p2pfast could not run {type(self.plain).__name__} fused and left it to PyTorch "
                f"({self.reason}); {_TRACKER}",
                RuntimeWarning,
                stacklevel=4,
            )
        return result

    def _original(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        dtype = self.options["dtype"]
        args = tuple(_densified(a, self._parameter_dtype()) for a in args)
        kwargs = {k: _densified(v, self._parameter_dtype()) for k, v in kwargs.items()}
        if self.options["mode"] == "train":
            return self.plain(*args, **kwargs)
        with torch.no_grad():
            result = self.plain(*args, **kwargs)
            if dtype is not None and isinstance(result, torch.Tensor) and result.is_floating_point():
                result = result.to(dtype)
            return result


def optimize(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    mode: str = "inference",
    backend: str = "auto",
    accuracy: str = "default",
    memory_limit: str | int | None = None,
) -> nn.Module:
    """A faster module with the same interface, over the same parameters and buffers.

    Args:
        model: any module; it is not modified. Inputs are what it takes, and a label-map input may be a
            :class:`p2pfast.LabelMap` instead of the dense tensor.
        dtype: precision of stored intermediate tensors and of the result, ``torch.float32`` or
            ``torch.bfloat16``; None keeps the parameters' own. Accumulation is always in float32.
        mode: ``"inference"`` runs without gradients; ``"train"`` keeps them.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"reference"`` (the module itself, to compare with).
        accuracy: ``"default"``, or ``"fast"`` for a looser error where a kernel offers one; none does yet.
        memory_limit: bytes (or ``"4GB"``, ``"512MB"``) that packed copies of weights may take; fewer make
            layers transform their weights while they run.

    Returns:
        A module of a subclass of ``type(model)``: same call signature, same ``state_dict``. Layouts,
        shapes and dtypes of inputs may change from call to call; each kind is planned once.

    Raises:
        TypeError: ``model`` is not a module. ValueError: an option has an unknown value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; optimize takes a torch.nn.Module")
    if isinstance(model, Optimized):
        model = _plain(model)
    for name, value, known in (
        ("mode", mode, _MODES),
        ("backend", backend, _BACKENDS),
        ("accuracy", accuracy, _ACCURACIES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    if dtype is not None and dtype not in STORED:
        raise ValueError(f"dtype is {dtype}; choose torch.float32, torch.bfloat16 or None")
    options = {
        "dtype": dtype,
        "mode": mode,
        "backend": backend,
        "accuracy": accuracy,
        "memory_limit": memory_limit,
    }
    limit = None if memory_limit is None else parse_bytes(memory_limit) // 2
    kind = type(model)
    fast = _clone(model, {})
    fast.__class__ = type(
        f"Optimized{kind.__name__}",
        (Optimized, kind),
        {"__original_class__": kind, "__original_forward__": kind.forward, "__module__": kind.__module__},
    )
    fast.__dict__["p2pfast_options"] = options
    fast.__dict__["_p2pfast"] = _State(fast, {**options, "packed_limit": limit})
    return fast


def parse_bytes(size: str | int) -> int:
    """Bytes of 4_000_000_000, "4GB", "512 MB" or "2GiB"; ValueError for anything else."""
    if isinstance(size, int) and not isinstance(size, bool):
        value = size
    else:
        units = {
            "": 1,
            "B": 1,
            "KB": 10**3,
            "MB": 10**6,
            "GB": 10**9,
            "KIB": 2**10,
            "MIB": 2**20,
            "GIB": 2**30,
        }
        text = str(size).strip().upper()
        number = text.rstrip("BKMGI ")
        unit = text[len(number) :].strip()
        try:
            value = int(float(number) * units[unit])
        except (KeyError, ValueError):
            raise ValueError(f"memory_limit is {size!r}; write bytes as a number or like '4GB'") from None
    if value <= 0:
        raise ValueError(f"memory_limit is {size!r}; it must be positive")
    return value
