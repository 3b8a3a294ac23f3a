"""The threads of operators and plans, which run between PyTorch's own operations."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from p2pfast import _C


def use_torch_threads() -> None:
    """Lets the native kernels that this thread calls run on PyTorch's OpenMP threads, as many as it uses.

    These wait for their next work spinning, for some milliseconds: threads of our own beside them would get
    only a share of the processor. Where PyTorch's OpenMP library is not found, kernels run on our own.
    """
    _find_openmp()
    _C.set_num_threads(torch.get_num_threads(), borrowed=True)


@functools.cache
def _find_openmp() -> None:
    """Tells the kernels where the library is that PyTorch has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and "r-xp" in line}
    found = [path for path in sorted(paths) if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))]
    found.sort(key=lambda path: "torch" not in path)
    if not found or (len(found) > 1 and "torch" not in found[0]):
        return
    try:
        function = ctypes.CDLL(found[0]).GOMP_parallel
    except (OSError, AttributeError):
        return
    _C.set_parallel_region(ctypes.cast(function, ctypes.c_void_p).value or 0)
