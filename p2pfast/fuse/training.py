"""Training: which way a traced network runs, by measurement, and running it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from p2pfast.fuse.source import CannotRun, Captured, GraphSource, ModuleSource, RunsAsWell
from p2pfast.fuse.steps import CHAINS, CHANNELS_LAST, MODULES, Program, convolution_size
from p2pfast.fuse.trial import Trial, apart, unmarked, would_be_seen
from p2pfast.labelmap import LabelMap
from p2pfast.ops.conv_norm_act.convolution import library_has_bfloat16

_MOST_PROGRAMS = 64  # kinds of input and states of the module that are remembered
_NATIVE = ((3, 1), (3, 2), (4, 2))  # kernels and strides
_HOPELESS = 1e8  # multiplications: a tenth of a second where the library has no convolution for a dtype


class TrainingEngine:
    """Runs ``source`` with gradients; ``native`` is the dtype of its parameters, ``device`` where they are,
    and ``on_piece(path, module, reason)`` is called for each submodule that runs whole.

    A network's first call tries the ways to run it: as it is, and with its chains as steps, on images in the
    given layout or in channels_last. What is fastest forward and backward is remembered on disk.
    """

    def __init__(
        self,
        source: ModuleSource | GraphSource,
        native: torch.dtype,
        device: torch.device,
        on_piece: Callable[[str, nn.Module, str], None],
    ) -> None:
        self.source, self.native, self.device, self.on_piece = source, native, device, on_piece
        self.lock = threading.RLock()
        self.programs: dict[Any, Program] = {}
        self.ways: dict[Any, str] = {}
        self.last: Program | None = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network returns for these arguments.

        Raises CannotRun, with the reason, for what is left to PyTorch.
        """
        if isinstance(self.source, GraphSource):
            with self.lock:  # the parameters of this call are bound to the source
                return self._run(args, kwargs)
        return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch_module._has_any_global_hook():
            raise CannotRun("there are hooks on all modules")
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise CannotRun("torch.func transforms it")
        if torch.autograd.forward_ad._current_level >= 0:
            raise CannotRun("forward-mode derivatives are taken")
        key, tensors, arguments = self.source.bind(args, kwargs, self.device)
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # Without gradients a network runs in the same way, and computes the same numbers.
        state = (autocast, torch.get_num_threads(), kind)
        tensors = [value.dense(self.native) if isinstance(value, LabelMap) else value for value in tensors]
        program_key = (key, state, torch.is_grad_enabled())
        program = self.programs.get(program_key)
        if program is None:
            with self.lock:
                program = self.programs.get(program_key)
                if program is None:
                    # A graph of TorchDynamo may switch gradients; following it does not.
                    with torch.set_grad_enabled(torch.is_grad_enabled()):
                        program, result = self._prepare(arguments, tensors, (key[0], state))
                    self._remember(program_key, program)
                    if result is not None:
                        self.last = program
                        return result[0]
        self.last = program
        if program.way == MODULES:
            raise RunsAsWell("its modules are as fast as their chains in one step")
        return program.run(tensors)

    def _prepare(self, arguments: Any, tensors: list[Any], kind: Any) -> tuple[Program, tuple[Any] | None]:
        """The program for inputs like these, and what the network returns where it had to run for it."""
        captured = self.source.capture(arguments, tensors, self.native)
        for path, module, reason in self.source.pieces(captured):
            self.on_piece(path, module, reason)
        result = None
        if not captured.complete and not would_be_seen(captured):
            with unmarked(captured), torch.no_grad():
                captured.learn([apart(value) for value in tensors])
        elif not captured.complete:
            leaves = list(captured.learn(tensors))
            result = (leaves if captured.spec is None else pytree.tree_unflatten(leaves, captured.spec),)
        numbers = sum(t.numel() for t in tensors if isinstance(t, torch.Tensor))
        size = round(math.log2(max(1, numbers)))
        return self._best(captured, tensors, (*kind, size)), result

    def _remember(self, key: Any, program: Program) -> None:
        self.programs[key] = program
        while len(self.programs) > _MOST_PROGRAMS:
            self.programs.pop(next(iter(self.programs)))

    def _best(self, captured: Captured, tensors: list[Any], kind: Any) -> Program:
        """The fastest program; networks of a kind differ in sizes only, by less than a factor of two."""
        chains = Program(captured, CHAINS)
        if not chains.chains:
            return Program(captured, MODULES)
        if kind not in self.ways:
            likely = [CHAINS, CHANNELS_LAST]
            if self.device.type == "cpu" and not _suits_channels_last(chains):
                likely.reverse()
            modules = [] if self._modules_are_hopeless(chains) else [MODULES]
            self.ways[kind] = Trial(captured, tensors).fastest([*modules, *likely])
        way = self.ways[kind]
        return chains if way == CHAINS else Program(captured, way)

    def _modules_are_hopeless(self, program: Program) -> bool:
        """Whether a run of the modules would take seconds or minutes, and lose: in bfloat16, on a processor
        for which PyTorch has no such convolution."""
        if self.device.type != "cpu" or library_has_bfloat16():
            return False
        lowered = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.native
        return lowered == torch.bfloat16 and _multiplications(program)[0] > _HOPELESS


def _suits_channels_last(program: Program) -> bool:
    """Whether the native kernels, which take no other layout, save most of the multiplications: a guess where
    nothing is measured."""
    total, native = _multiplications(program)
    return 2 * native > total


def _multiplications(program: Program) -> tuple[int, int]:
    """Of all the chains' convolutions, and of those that the native kernels do with fewer."""
    total = native = 0
    for chain in program.chains:
        if chain.conv is None:
            continue
        kernel, stride, done = convolution_size(chain)
        total += done
        native += done if (kernel, stride) in _NATIVE else 0
    return total, native
