"""``optimize``: any module, faster, behind the same interface."""

from __future__ import annotations

import contextlib
import copy
import os
import types
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import _StopRecomputationError

from p2pfast.fuse.guarded import Guarded
from p2pfast.fuse.source import CannotFollow, CannotRun, GraphSource, ModuleSource, RunsAsWell
from p2pfast.fuse.training import TrainingEngine
from p2pfast.labelmap import LabelMap
from p2pfast.runtime.cpu import STORED, CpuEngine
from p2pfast.runtime.gpu import engine as gpu
from p2pfast.runtime.gpu import require
from p2pfast.runtime.memory import OutOfMemory

_TRACKER = "please report it with the network to p2pfast's issue tracker"
_MODES = ("inference", "train")
_BACKENDS = ("auto", "cpu", "cuda", "reference")
_ACCURACIES = ("default", "fast")

_MOST_QUICK = 64  # kinds of inputs that PyTorch is known to be faster at

AnyEngine = CpuEngine | gpu.CudaEngine | TrainingEngine


def _clone(module: nn.Module, memo: dict[int, nn.Module]) -> nn.Module:
    """A tree of new module objects over the same parameters and buffers, without earlier optimisation."""
    known = memo.get(id(module))
    if known is not None:
        return known
    kind = _original_of(module)
    twin = kind.__new__(kind)
    memo[id(module)] = twin
    state = {k: v for k, v in module.__dict__.items() if k not in ("_p2pfast", "p2pfast_options")}
    for name, value in state.items():
        # Hook tables and plain containers are copied, so that changing one tree leaves the other alone;
        # the tables of parameters and buffers stay shared, so that replacing an entry reaches both.
        if isinstance(value, (dict, list, set)) and name not in ("_parameters", "_buffers", "_modules"):
            state[name] = value.copy()
        elif isinstance(value, types.MethodType) and value.__self__ is module:
            state[name] = types.MethodType(value.__func__, twin)
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
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return type(self).__original_forward__(self, *args, **kwargs)
        state: _State = self.__dict__["_p2pfast"]
        if state.quick and not kwargs:
            # A small network is done in less time than all that a plan depends on can be looked at. Its own
            # code is right whatever has changed since PyTorch was faster.
            reason = state.quick.get(_kind(self, args))
            if reason is not None:
                state.reason = reason
                if torch.is_grad_enabled() and state.options["mode"] == "inference":
                    with torch.no_grad():
                        return type(self).__original_forward__(state.plain, *args)
                return type(self).__original_forward__(state.plain, *args)
        return state.run(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        plain = _clone(self, {})  # type: ignore[arg-type]
        copied = optimize(copy.deepcopy(plain, memo), **self.p2pfast_options)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_clone(self, {}), self.p2pfast_options)  # type: ignore[arg-type]

    def _replicate_for_data_parallel(self) -> nn.Module:
        # A replica has parameters of its own that live for one call: it runs as the module was.
        replica: nn.Module = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__class__ = type(self).__original_class__  # type: ignore[attr-defined]
        replica.__dict__.pop("_p2pfast")
        return replica


def _rebuild(module: nn.Module, options: dict[str, Any]) -> nn.Module:
    return optimize(module, **options)


def _install(module: nn.Module, options: dict[str, Any]) -> None:
    """Makes ``module`` itself run fused where it can."""
    kind = type(module)
    module.__class__ = type(
        f"Optimized{kind.__name__}",
        (Optimized, kind),
        {"__original_class__": kind, "__original_forward__": kind.forward, "__module__": kind.__module__},
    )
    module.__dict__["p2pfast_options"] = options
    module.__dict__["_p2pfast"] = _State(module, options)


def _worth_fusing(module: nn.Module) -> bool:
    """Whether a submodule has a convolution with something around it."""
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return not isinstance(module, kinds) and any(isinstance(m, kinds) for m in module.modules())


def _original_of(module: nn.Module) -> Any:
    return getattr(type(module), "__original_class__", type(module))


def _densified(value: Any, dtype: torch.dtype | None) -> Any:
    return value.dense(dtype or torch.float32) if isinstance(value, LabelMap) else value


def _kind(module: Any, args: tuple[Any, ...]) -> Any:
    """What decides which is faster, as far as it can be told at once; None where an argument is no tensor."""
    kind: list[Any] = [module.training, torch.is_grad_enabled()]
    for value in args:
        if type(value) is not torch.Tensor:
            return None
        kind += (value.shape, value.dtype, value.device, value.requires_grad)
    return tuple(kind)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """An argument as PyTorch takes it; those in another precision than the parameters' are theirs."""
    value = _densified(value, dtype)
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != dtype:
        return value.to(dtype)
    return value


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
        self.engines: dict[tuple[torch.dtype, torch.dtype, torch.device], AnyEngine] = {}
        self.trainers: dict[tuple[torch.dtype, torch.device], TrainingEngine] = {}
        self.guarded: dict[Any, Guarded] = {}
        self.quick: dict[Any, str] = {}  # why PyTorch runs kinds of inputs
        self.engine: AnyEngine | None = None  # of the last call
        self.pieces: dict[str, tuple[nn.Module, str]] = {}
        self.source: ModuleSource | None = None
        self.never: str | None = None
        if options["backend"] == "reference":
            self.never = "backend='reference'"
        self.reason = self.never
        limit = options["memory_limit"]
        self.memory_limit = None if limit is None else parse_bytes(limit)
        self.packed_limit = None if self.memory_limit is None else self.memory_limit // 2

    def _parameter(self) -> torch.Tensor | None:
        for module in self.plain.modules():  # quicker than parameters(): it stops at the first
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    return parameter
        return None

    def _engine(self) -> AnyEngine:
        """The engine for the parameters' present dtype and device.

        Raises CannotRun, and CannotUseGpu where a GPU is asked for that cannot be used.
        """
        if self.never is not None:
            raise CannotRun(self.never)
        parameter = self._parameter()
        device = torch.device("cpu") if parameter is None else parameter.device
        self._check_device(device)
        native = torch.float32 if parameter is None else parameter.dtype
        dtype = self.options["dtype"] or native
        if torch.is_autocast_enabled(device.type) and self.options["dtype"] is None:
            dtype = torch.get_autocast_dtype(device.type)
        on_gpu = self._on_gpu(device)
        stored = gpu.STORED if on_gpu else STORED
        if dtype not in stored or native not in stored:
            wrong = native if native not in stored else dtype
            known = " or ".join(str(d) for d in stored)
            raise CannotRun(f"dtype {wrong} has no native kernels; choose {known}")
        if self.source is None:
            self.source = ModuleSource(self.plain)
        if self._trains():
            if (native, device) not in self.trainers:
                self.trainers[native, device] = TrainingEngine(self.source, native, device, self._add_piece)
            return self.trainers[native, device]
        key = (dtype, native, device)
        if key not in self.engines:
            self.engines[key] = self._infers(self.source, *key)
        return self.engines[key]

    def _infers(
        self,
        source: ModuleSource | GraphSource,
        dtype: torch.dtype,
        native: torch.dtype,
        device: torch.device,
    ) -> CpuEngine | gpu.CudaEngine:
        """An engine without gradients."""
        if self._on_gpu(device):
            tests = gpu.on_cpu if device.type == "cpu" else None
            return gpu.CudaEngine(
                source, dtype, native, device, self._add_piece, self.memory_limit, **(tests or {})
            )
        engine = CpuEngine(
            source,
            dtype,
            native,
            self.packed_limit,
            self._add_piece,
            self.memory_limit,
            self.options["accuracy"],
        )
        engine.may_lose &= self.options["backend"] == "auto"
        return engine

    def _on_gpu(self, device: torch.device) -> bool:
        asked = self.options["backend"] == "cuda" and gpu.on_cpu is not None
        return device.type == "cuda" or asked

    def _check_device(self, device: torch.device) -> None:
        """Whether the backend that was asked for can run a network on ``device``."""
        backend = self.options["backend"]
        if backend == "cuda" and not self._on_gpu(device):
            missing = require.device_reason()
            where = f"the network is on {device}: move it and its inputs with .cuda()"
            raise require.CannotUseGpu(f"backend='cuda': {missing or where}")
        if device.type == "cpu":
            return
        if device.type != "cuda" or backend == "cpu":
            remedy = "move it to the CPU or a CUDA device" if device.type != "cuda" else "move it with .cpu()"
            raise CannotRun(f"the network is on {device} and backend is {backend!r}; {remedy}")
        missing = require.kernels_reason(device)
        if missing is None:
            return
        if backend == "cuda":
            raise require.CannotUseGpu(f"backend='cuda': {missing}")
        if missing not in self.failed:
            self.failed.add(missing)
            warnings.warn(
                f"p2pfast leaves {type(self.plain).__name__} to PyTorch: {missing}",
                RuntimeWarning,
                stacklevel=5,
            )
        raise CannotRun(missing)

    def _trains(self) -> bool:
        """Whether a call keeps what gradients need; one in eval mode without gradients infers."""
        return self.options["mode"] == "train" and (torch.is_grad_enabled() or self.plain.training)

    def _add_piece(self, path: str, module: nn.Module, reason: str) -> None:
        """A submodule that runs whole gets an engine of its own, and calls it where it is called."""
        if path in self.pieces or not _worth_fusing(module):
            return
        if not isinstance(module, Optimized):
            _install(module, self.options)
        self.pieces[path] = (module, reason)

    def _split(self, reason: str) -> None:
        """This module cannot be one graph: its children get engines of their own."""

        def visit(module: nn.Module, prefix: str) -> None:
            for name, child in module.named_children():
                if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                    visit(child, f"{prefix}{name}.")
                else:
                    self._add_piece(f"{prefix}{name}", child, reason)

        visit(self.plain, "")

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            engine = self._engine()
            self._check_dtypes(args, kwargs)
            with self._precision():
                result = engine.run(args, kwargs)
            self.engine, self.reason = engine, None
            return result
        except CannotFollow as why:
            return self._follow_otherwise(why, args, kwargs)
        except CannotRun as why:
            self.reason = str(why)
            if isinstance(why, RunsAsWell) and self.options["dtype"] is None and not kwargs:
                self._remember_quick(args)
            return self._original(args, kwargs)
        except (OutOfMemory, require.CannotUseGpu):
            raise  # PyTorch would need more memory; and what was asked for is not there
        except _StopRecomputationError:
            raise  # a checkpoint has all that it wanted
        except Exception as error:
            return self._recover(error, args, kwargs)

    def _remember_quick(self, args: tuple[Any, ...]) -> None:
        kind = _kind(self.plain, args)
        if kind is None or torch.is_autocast_enabled("cpu") or self.reason is None:
            return
        self.quick[kind] = self.reason
        while len(self.quick) > _MOST_QUICK:
            self.quick.pop(next(iter(self.quick)))

    def _follow_otherwise(self, why: CannotFollow, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Through TorchDynamo where that helps, or else piecewise."""
        guarded = self._guard() if why.guardable else None
        if guarded is None or guarded.refused is not None:
            self._split(str(why))
            self.reason = str(why)
            return self._original(args, kwargs)
        try:
            native = getattr(self._parameter(), "dtype", torch.float32)
            given, named = pytree.tree_map(lambda value: _cast(value, native), (args, kwargs))
            with contextlib.nullcontext() if self._trains() else torch.no_grad(), self._precision():
                result = guarded.run(given, named, lambda: self._original(args, kwargs))
        except Exception as error:
            return self._recover(error, args, kwargs)
        if guarded.last is not None:
            self.engine, self.reason = guarded.last.engine, guarded.last.reason
        return result

    def _guard(self) -> Guarded:
        """The graphs for the present modes, dtypes and hooks; TorchDynamo does not guard hooks."""
        assert self.source is not None
        parameter = self._parameter()
        device = torch.device("cpu") if parameter is None else parameter.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        trains, dtype = self._trains(), self.options["dtype"]
        native = torch.float32 if parameter is None else parameter.dtype
        key = (trains, autocast, native, device, self.plain.training, self.source.hooks())
        if key not in self.guarded:

            def engine(source: GraphSource, held: torch.dtype, where: torch.device, *_: Any) -> AnyEngine:
                if trains:
                    return TrainingEngine(source, held, where, self._add_piece)
                return self._infers(source, dtype or autocast or held, held, where)

            forward = _original_of(self.plain).forward
            self.guarded[key] = Guarded(self.plain, forward, engine)
        return self.guarded[key]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """What ``dtype`` means in training: autocast; parameters and their gradients stay as they are."""
        dtype = self.options["dtype"]
        if dtype is None or not self._trains() or dtype == getattr(self._parameter(), "dtype", dtype):
            return contextlib.nullcontext()
        parameter = self._parameter()
        return torch.autocast("cpu" if parameter is None else parameter.device.type, dtype)

    def _check_dtypes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parameter = self._parameter()
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and parameter is not None:
                if value.dtype not in (parameter.dtype, self.options["dtype"]):
                    raise CannotRun(f"the input is {value.dtype}, the parameters are {parameter.dtype}")

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
        parameter, dtype = self._parameter(), self.options["dtype"]
        native = torch.float32 if parameter is None else parameter.dtype
        args = tuple(_densified(a, native) for a in args)
        kwargs = {k: _densified(v, native) for k, v in kwargs.items()}
        forward = _original_of(self.plain).forward
        if self._trains():
            with self._precision():
                return forward(self.plain, *args, **kwargs)
        with torch.no_grad():
            result = forward(self.plain, *args, **kwargs)
            if dtype is None or dtype == native:
                return result
            return pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(dtype) if t.dtype == native else t, result
            )


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
        dtype: precision of stored intermediate tensors and of the result, ``torch.float32``,
            ``torch.bfloat16`` or, on CUDA devices, ``torch.float16``; None keeps the parameters' own.
            Accumulation is always in float32. In training the network runs as under ``torch.autocast`` with
            this dtype.
        mode: ``"inference"`` runs without gradients; ``"train"`` keeps them: each convolution with its norm,
            residual addition and activation is one step, forward and backward. In eval mode without
            gradients a network in ``"train"`` runs as one in ``"inference"`` does.
        backend: ``"auto"`` runs where the parameters are, and in PyTorch, with a warning, on a GPU that
            cannot be used; ``"cpu"`` and ``"cuda"`` insist; ``"reference"`` is the module itself, to compare
            with.
        accuracy: ``"fast"`` lets a bfloat16 network keep the weights of large Winograd tiles in bfloat16 too:
            less memory and traffic, about 4 dB less exact than the default.
        memory_limit: bytes (or ``"4GB"``, ``"512MB"``) for everything a call needs: parameters, inputs,
            results, packed copies of weights and intermediate tensors. Where tensors do not fit, they are
            computed again in horizontal bands instead of being kept: the same answer within rounding, in
            more time. None: most of the memory that is free.

    Returns:
        A module of a subclass of ``type(model)``: same call signature, same ``state_dict``. Layouts,
        shapes and dtypes of inputs may change from call to call; each kind is planned once.

    Raises:
        TypeError: ``model`` is not a module. ValueError: an option has an unknown value.
        Calls raise :class:`p2pfast.runtime.memory.OutOfMemory`, a MemoryError, where there is not enough
        memory (on a CPU: even in bands), and :class:`p2pfast.runtime.gpu.require.CannotUseGpu`, a
        RuntimeError, where ``backend="cuda"`` cannot be had or an input is on another device than a network
        on a GPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; optimize takes a torch.nn.Module")
    for name, value, known in (
        ("mode", mode, _MODES),
        ("backend", backend, _BACKENDS),
        ("accuracy", accuracy, _ACCURACIES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
    if dtype is not None and dtype not in gpu.STORED:
        raise ValueError(f"dtype is {dtype}; choose torch.float32, torch.bfloat16, torch.float16 or None")
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if dtype == torch.float16 and on_cpu and backend != "cuda":
        raise ValueError(
            "dtype is torch.float16 and the network on the CPU: move it to a CUDA device first, or choose "
            "torch.float32 or torch.bfloat16"
        )
    options = {
        "dtype": dtype,
        "mode": mode,
        "backend": backend,
        "accuracy": accuracy,
        "memory_limit": memory_limit,
    }
    if memory_limit is not None:
        parse_bytes(memory_limit)
    fast = _clone(model, {})
    _install(fast, options)
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
