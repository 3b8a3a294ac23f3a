"""A pretended device: streams run what they were given in any order that events allow, and freed memory is
filled with garbage as soon as an allocator like PyTorch's could hand it on."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

GARBAGE = 251


class Event:
    def __init__(self, device: PretendedStreams) -> None:
        self.device, self.passed = device, False

    def synchronize(self) -> None:
        self.device.work(lambda: self.passed)


class Stream:
    """Work in order: an event to wait for, or something to do."""

    def __init__(self) -> None:
        self.queue: list[Event | Callable[[], None]] = []


class PretendedStreams:
    """For :class:`p2pfast.pipeline.transfers.Transfers`. ``seed`` decides which stream goes on when several
    could; ``leave_out`` names a method that does nothing, to see a test fail without it."""

    def __init__(self, seed: int, leave_out: str = "") -> None:
        self.random, self.leave_out = random.Random(seed), leave_out
        self.streams: list[Stream] = []
        self.here = self.new()
        self.kept: dict[int, list[Stream]] = {}
        self.order: list[str] = []

    def new(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    def current(self) -> Stream:
        return self.here

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.here = self.here, stream
        yield
        self.here = before

    def mark(self, stream: Stream) -> Event:
        event = Event(self)

        def passes() -> None:
            event.passed = True

        stream.queue.append(passes)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        if self.leave_out != "wait":
            stream.queue.append(event)

    def keep(self, tensor: Tensor, stream: Stream) -> None:
        if self.leave_out != "keep":
            self.kept.setdefault(id(tensor), []).append(stream)

    def upload(self, tensor: Tensor) -> Tensor:
        return self.copy("in", tensor)

    def download(self, tensor: Tensor) -> Tensor:
        return self.copy("out", tensor)

    def copy(self, name: str, source: Tensor) -> Tensor:
        return self.does(name, source, lambda x: x)

    def does(self, name: str, source: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A launch on the current stream that reads ``source`` and makes what is returned."""
        made = torch.full_like(source, GARBAGE)
        # Not views, which would keep what they are views of.
        own, read, stream = made.data, source.data, self.here

        def launch() -> None:
            self.order.append(name)
            own.copy_(function(read))

        stream.queue.append(launch)
        number = id(made)
        weakref.finalize(made, self._freed, number, own, stream)
        return made

    def _freed(self, number: int, memory: Tensor, stream: Stream) -> None:
        """The next owner may write when the stream that made it, and those that it was kept for, have done
        what they were given up to now."""
        events = [self.mark(s) for s in (stream, *self.kept.pop(number, []))]
        self.new().queue += [*events, lambda: memory.fill_(GARBAGE)]

    def work(self, until: Callable[[], bool]) -> None:
        """Goes on with streams, taken by chance, until ``until`` or nothing is left."""
        while not until():
            ready = [s for s in self.streams if s.queue and getattr(s.queue[0], "passed", True)]
            if not ready:
                assert not any(s.queue for s in self.streams), "streams wait for each other"
                return
            step = self.random.choice(ready).queue.pop(0)
            if not isinstance(step, Event):
                step()
