"""Capturing CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch

# PyTorch takes one capture at a time in a process.
_one = threading.Lock()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Records what runs inside into ``graph``, on a stream of ``device``; other threads may go on.

    PyTorch's own stream for captures is on the device that was current when it first needed one, and it stays
    the current stream where a capture fails.
    """
    with _one, torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            stream = _stream(torch.cuda.current_device())
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                yield
        finally:
            torch.cuda.set_stream(before)
