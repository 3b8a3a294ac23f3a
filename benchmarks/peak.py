"""What this machine can do at most: the speed of light that benchmarks are compared with."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from p2pfast.runtime.peak import peak_gigaflops


@dataclass(frozen=True)
class Peak:
    """gflops: float32 operations (two a multiplication) of the matrix kernel on operands in the caches,
    pairs_gflops: of bfloat16 pairs;
    gb_per_s: of a copy, bytes read and written, far larger than the caches."""

    gflops: float
    pairs_gflops: float
    gb_per_s: float


def best(function: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the quickest of some calls, after one to warm up."""
    return min(seconds(function, repeats))


def median(function: Callable[[], object], repeats: int = 3) -> float:
    return statistics.median(seconds(function, repeats))


def seconds(function: Callable[[], object], repeats: int) -> list[float]:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


@functools.cache
def measure() -> Peak:
    """Measured once a process, with the threads that PyTorch has."""
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    return Peak(
        gflops=peak_gigaflops(),
        pairs_gflops=peak_gigaflops(pairs=True),
        gb_per_s=2e-9 * source.nbytes / best(lambda: target.copy_(source)),
    )
