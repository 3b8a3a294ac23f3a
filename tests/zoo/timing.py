"""Times of the zoo's networks at realistic sizes: PyTorch eager, torch.compile and ``p2pfast.optimize``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo.counting import convolutions, fused_convolutions
from zoo.registry import ZOO

import p2pfast


@dataclass(frozen=True)
class Timing:
    """Seconds of one call; ``compiled`` is None where it was not asked for."""

    eager: float
    fast: float
    compiled: float | None
    fused: int
    convolutions: int
    explanation: str

    @property
    def speedup(self) -> float:
        """How many times faster than eager."""
        return self.eager / self.fast


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 30
) -> dict[str, float]:
    """The least time of each call over rounds that take them in turn, so that disturbances reach all.

    The second of two calls in a row is timed, as a network in use is called: the threads of the other way may
    still be spinning in the first.
    At least three rounds are made, then more until ``seconds`` or ``rounds`` are used up.
    """
    best = dict.fromkeys(calls, float("inf"))
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def realistic(name: str, batch: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network of the zoo as large as it is used, in evaluation mode, and its arguments."""
    torch.manual_seed(0)
    width, size = ZOO[name].real
    return ZOO[name].make(width, size).eval(), ZOO[name].inputs(batch, size, width)


@torch.no_grad()
def measure(
    net: nn.Module, inputs: tuple[Tensor, ...], seconds: float = 1.0, with_compile: bool = False
) -> Timing:
    """Times a network three ways; the first calls, which plan and compile, are not counted."""
    fast = p2pfast.optimize(net)
    calls: dict[str, Any] = {"eager": lambda: net(*inputs), "fast": lambda: fast(*inputs)}
    if with_compile:
        torch.compiler.reset()
        compiled = torch.compile(net, dynamic=False)
        calls["compiled"] = lambda: compiled(*inputs)
    for call in calls.values():
        call()
    best = interleaved(calls, seconds)
    return Timing(
        best["eager"],
        best["fast"],
        best.get("compiled"),
        fused_convolutions(fast),
        convolutions(net, inputs),
        str(p2pfast.explain(fast)),
    )
