"""Trying the ways to train a network on a call's own inputs, without leaving a mark on it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from p2pfast.fuse.source import Captured
from p2pfast.fuse.steps import Program
from p2pfast.fuse.trace import has_hooks
from p2pfast.ops import measured

_SECONDS = 0.2  # for each way; quick networks run several times
_LEAD = 0.1  # by which a plan has to be faster than the network's own code: a tie is the user's code


def parameters(captured: Captured) -> list[Tensor]:
    """The parameters of a network, those that are inputs of its graph too."""
    given = [derived.fetch() for derived in captured.state.values()]
    return [*captured.root.parameters(), *(p for p in given if isinstance(p, torch.nn.Parameter))]


def would_be_seen(captured: Captured) -> bool:
    """Whether code of the user's would run along with a trial: hooks, modules that cannot be followed."""
    root = captured.root
    if captured.traced.opaque or any(has_hooks(m) for m in root.modules() if m is not root):
        return True
    if any(p._backward_hooks for p in parameters(captured)):
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _gpu(captured: Captured, tensors: list[Any]) -> torch.device | None:
    """The CUDA device that a network runs on, if it does."""
    for value in (*parameters(captured), *tensors):
        if isinstance(value, Tensor) and value.is_cuda:
            return value.device
    return None


def signature(captured: Captured, tensors: list[Any]) -> str:
    """A network, its shapes and what is differentiated, as another process would name them too."""
    words: list[str] = []
    kind = "cpu" if _gpu(captured, tensors) is None else "cuda"
    if torch.is_autocast_enabled(kind):
        words.append(str(torch.get_autocast_dtype(kind)))
    for node in captured.traced.graph.nodes:
        value = node.meta.get("val")
        shape = (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else None
        target = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module":
            target = repr(captured.traced.fetch(str(node.target)))
        words.append(f"{node.op} {target} {shape} {[n.name for n in node.all_input_nodes]}")
    words += [str(value.requires_grad) for value in tensors if isinstance(value, Tensor)]
    words.append(str([p.requires_grad for p in parameters(captured)]))
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


@contextmanager
def unmarked(captured: Captured) -> Iterator[None]:
    """Puts back buffers and the state of the random generator."""
    held = [*captured.root.buffers(), *(derived.fetch() for derived in captured.state.values())]
    buffers = [b for b in held if isinstance(b, Tensor) and not b.requires_grad]
    kept = [(buffer, buffer.clone()) for buffer in buffers]
    state, gpu = torch.get_rng_state(), _gpu(captured, [])
    of_gpu = None if gpu is None else torch.cuda.get_rng_state(gpu)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if gpu is not None and of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, gpu)
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):
                    buffer.data.copy_(before)  # no change, to a backward pass that is still to come


def plan_loses(
    captured: Captured, tensors: list[Any], arguments: Any, plan: Callable[[], Any], run: Callable[..., Any]
) -> bool:
    """Whether a network's own code, ``run(*args, **kwargs)``, is faster than its plan for inference.

    Small networks of many operations that no kernel takes may be. As for a trial of training, this is
    measured once and remembered on disk, and not where somebody would see it.
    """
    if measured.fixed() or would_be_seen(captured) or not all(isinstance(t, Tensor) for t in tensors):
        return False
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)

    def modules() -> None:
        run(*args, **kwargs)

    def bound_plan() -> None:
        plan()

    words, gpu = signature(captured, tensors), _gpu(captured, tensors)
    with unmarked(captured):
        return (
            measured.pick(("inference", words), modules, bound_plan, seconds=_SECONDS, lead=_LEAD, device=gpu)
            == "modules"
        )


class Trial:
    """The ways of ``captured`` on ``tensors``."""

    def __init__(self, captured: Captured, tensors: list[Any]) -> None:
        self.captured, self.tensors = captured, tensors

    def fastest(self, ways: list[str]) -> str:
        """The fastest way; the last where a trial would be seen or measuring is switched off."""
        if would_be_seen(self.captured):
            return ways[-1]
        runs = [self._run(way) for way in ways]
        words, gpu = signature(self.captured, self.tensors), _gpu(self.captured, self.tensors)
        with torch.inference_mode(False), unmarked(self.captured), torch.enable_grad():
            try:
                return measured.pick(("training", words), *runs, seconds=_SECONDS, device=gpu)
            except torch.OutOfMemoryError:  # one of the ways needs more than there is
                return ways[-1]

    def _run(self, way: str) -> Callable[[], None]:
        learned = [p for p in parameters(self.captured) if p.requires_grad]
        made: list[Program] = []

        def run() -> None:
            if not made:
                made.append(Program(self.captured, way))
            inputs = [apart(value) for value in self.tensors]
            leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
            with torch.enable_grad():  # a graph of TorchDynamo may leave gradients switched off
                results = pytree.tree_leaves(made[0].run(inputs))
            outputs = [t for t in results if isinstance(t, Tensor) and t.requires_grad]
            if outputs:
                ones = [torch.ones_like(t) for t in outputs]
                torch.autograd.grad(outputs, [*learned, *leaves], ones, allow_unused=True)

        run.__name__ = way
        return run


def apart(value: Any) -> Any:
    """A tensor that is changed and differentiated without a trace on ``value``; what is no tensor itself."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
