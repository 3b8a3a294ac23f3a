"""Capturing CUDA graphs, and timing what is in them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

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


def in_capture(device: torch.device) -> bool:
    """Whether the caller is capturing a CUDA graph of its own there: nothing can be timed meanwhile."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_SAMPLES = 5
_SAMPLE = 1e-3  # seconds: what starting a graph takes is little of it
_MOST_REPLAYS = 50


def graph_seconds(run: Callable[[], None], device: torch.device, repeats: int = 4) -> float:
    """Seconds of one ``run`` on ``device``, the least of a few samples.

    In a CUDA graph of ``repeats`` runs, which has no pauses between launches, replayed as often as makes the
    time of starting it small: an event before one replay of a short kernel would count microseconds of that.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles kernels, and lets libraries choose theirs
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, device):
            for _ in range(repeats):
                run()

        def sample(replays: int) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) * 1e-3 / replays

        once = min(sample(1) for _ in range(2))
        replays = max(1, min(_MOST_REPLAYS, round(_SAMPLE / max(once, 1e-6))))
        return min(sample(replays) for _ in range(_SAMPLES)) / repeats
