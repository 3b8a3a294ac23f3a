"""Moving batches to a device and back beside its computing: a stream for each direction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfast.labelmap import LabelMap


class Streams(Protocol):
    """Streams and events of a device; :class:`CudaStreams`, and a pretended one in tests."""

    def new(self) -> Any:
        """A stream that waits for no other."""

    def current(self) -> Any:
        """The stream that the caller's work goes to."""

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Work inside goes to ``stream``."""

    def mark(self, stream: Any) -> Any:
        """An event behind all work that ``stream`` has now; ``synchronize()`` lets the host wait for it."""

    def wait(self, stream: Any, event: Any) -> None:
        """Later work of ``stream`` starts after ``event``."""

    def keep(self, tensor: Tensor, stream: Any) -> None:
        """Memory of ``tensor``, made on another stream, is not reused before ``stream`` is done with it."""

    def upload(self, tensor: Tensor) -> Tensor:
        """Starts a copy of pinned memory to the device on the current stream."""

    def download(self, tensor: Tensor) -> Tensor:
        """Starts a copy from the device to new pinned memory on the current stream."""


class CudaStreams:
    """Those of PyTorch on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new(self) -> Any:
        return torch.cuda.Stream(self.device)

    def current(self) -> Any:
        return torch.cuda.current_stream(self.device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def mark(self, stream: Any) -> Any:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_event(event)

    def keep(self, tensor: Tensor, stream: Any) -> None:
        tensor.record_stream(stream)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


class Pictures:
    """A batch on its way: the device may still be computing and copying it."""

    def __init__(self, pixels: Tensor, ready: Any = None, taken: Any = None) -> None:
        self._pixels, self._ready, self._taken = pixels, ready, taken

    def result(self) -> Tensor:
        """Waits for the (N, H, W, 1 or 3) uint8 pixels."""
        if self._ready is not None:
            self._ready.synchronize()
        self._taken = None
        return self._pixels


class Transfers:
    """Runs batches on a device so that one is copied in and another out while a third is computed.

    The device copies in both directions and computes at the same time where each is on a stream of its own.
    A batch is ordered by two events, "is there" and "is made"; batches are in the order of the streams.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._in, self._out = streams.new(), streams.new()

    def run(self, given: Any, compute: Callable[[Any], Tensor]) -> Pictures:
        """Starts ``compute`` on the device's copy of ``given`` (pinned), on the current stream."""
        streams = self._streams
        here = streams.current()
        with streams.on(self._in):
            moved = changed(given, streams.upload)
        streams.wait(here, streams.mark(self._in))
        # Its memory belongs to the stream that copied it: the next batch's copy could take it too early.
        changed(moved, lambda tensor: self._kept(tensor, here))
        pixels = compute(moved)
        streams.wait(self._out, streams.mark(here))
        with streams.on(self._out):
            host = streams.download(pixels)
        streams.keep(pixels, self._out)
        # Pinned memory must not be used again before the device has read it.
        return Pictures(host, streams.mark(self._out), given)

    def _kept(self, tensor: Tensor, stream: Any) -> Tensor:
        self._streams.keep(tensor, stream)
        return tensor


@functools.cache
def transfers(device: torch.device) -> Transfers:
    """The one of a CUDA device."""
    return Transfers(CudaStreams(device))


def changed(given: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A tensor or a LabelMap with ``move`` done to each of its tensors."""
    return move(given) if isinstance(given, Tensor) else given.changed(move)


def stacked(arrays: list[NDArray], device: torch.device) -> Tensor:
    """Arrays of one shape as a batch in memory that ``device`` can copy from while the host goes on."""
    if device.type != "cuda":
        return torch.from_numpy(np.stack(arrays))
    first = torch.from_numpy(arrays[0])
    batch = torch.empty(len(arrays), *first.shape, dtype=first.dtype, device="cpu", pin_memory=True)
    for place, array in zip(batch, arrays, strict=True):
        place.copy_(torch.from_numpy(array))
    return batch


def pinned(given: LabelMap | Tensor) -> LabelMap | Tensor:
    """The same in pinned memory; what is there already stays where it is."""
    return changed(given, lambda tensor: tensor.pin_memory())
