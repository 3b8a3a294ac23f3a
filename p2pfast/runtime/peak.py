"""The arithmetic speed of this processor, which that of a layer is a share of."""

from __future__ import annotations

import functools
import time

import torch

from p2pfast import _C
from p2pfast.ops.threads import use_torch_threads

_SECONDS = 0.01  # of a run that is timed
_RUNS = 5


def peak_gigaflops(pairs: bool = False) -> float:
    """GFLOP/s of the matrix kernel on operands that stay in the L1 cache, with PyTorch's present number of
    threads: in float32, or of bfloat16 pairs. Measured once for each number and instruction-set level."""
    return _measured(pairs, torch.get_num_threads(), _C.active_level())


@functools.cache
def _measured(pairs: bool, threads: int, level: str) -> float:
    use_torch_threads()
    rounds, best = 64, 0.0
    while _run(pairs, rounds)[0] < _SECONDS:  # the first ones also wake the processor up
        rounds *= 2
    for _ in range(_RUNS):
        seconds, multiplications = _run(pairs, rounds)
        best = max(best, 2e-9 * multiplications / seconds)
    return best


def _run(pairs: bool, rounds: int) -> tuple[float, float]:
    start = time.perf_counter()
    multiplications = _C.run_peak(pairs, rounds)
    return time.perf_counter() - start, multiplications
