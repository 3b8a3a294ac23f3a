"""Translate files: reading, running and writing overlap, with bounded queues between them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from p2pfast.data.classes import colorize
from p2pfast.data.images import read_ids, read_image, resize_ids, resize_image, write_image
from p2pfast.errors import InputError, UsageError, first_line
from p2pfast.labelmap import LabelMap
from p2pfast.pipeline import sizes
from p2pfast.pipeline.files import Failure, Item
from p2pfast.pipeline.gallery import input_picture
from p2pfast.pipeline.network import Network, start
from p2pfast.pipeline.transfers import Pictures, stacked


@dataclass(frozen=True)
class Job:
    """What to do with every item. ``num_classes`` is None for image-to-image networks."""

    network: Network
    num_classes: int | None
    size: sizes.SizePolicy
    batch_size: int = 1
    gallery: Path | None = None


@dataclass
class Report:
    """How a job went: results written, bad inputs, and the wall time in seconds."""

    done: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Input:
    """A decoded input that fits the network; ``height`` and ``width`` are the size of the result."""

    item: Item
    pixels: NDArray
    instances: NDArray | None
    height: int
    width: int


def translate(job: Job, items: list[Item], advance: Callable[[], None] = lambda: None) -> Report:
    """Translate ``items`` in order and write each result; ``advance`` is called once an item, good or bad.

    An input that cannot be used becomes a Failure and the others go on. Results are complete files or absent,
    also when this is interrupted: KeyboardInterrupt waits for the files being written and passes on. Raises
    UsageError if results cannot be written or the network gives no pictures.
    """
    report, start = Report(), time.perf_counter()
    # A GPU makes pictures faster than four threads encode them.
    most = 16 if job.network.device.type == "cuda" else 4
    workers = max(1, min(most, (os.cpu_count() or 2) - 1))
    readers, writers = ThreadPoolExecutor(workers, "read"), ThreadPoolExecutor(workers, "write")
    pending: deque[tuple[Item, Future[None]]] = deque()

    def settle(limit: int) -> None:
        while len(pending) > limit:
            item, future = pending.popleft()
            try:
                future.result()
            except OSError as error:
                raise UsageError(
                    f"cannot write {item.output}: {error.strerror or first_line(error)}"
                ) from error
            report.done += 1
            advance()

    def fail(item: Item, reason: str) -> None:
        report.failures.append(Failure(str(item.source), reason))
        advance()

    try:
        inputs = _read_ahead(readers, job, items, 2 * workers + job.batch_size, fail)
        for batch, started in _started(job, _batches(inputs, 1 if job.network.alone else job.batch_size)):
            try:
                pictures = started().result().numpy()
            except (RuntimeError, ValueError, MemoryError) as error:
                for given in batch:
                    fail(
                        given.item, f"the network failed on {given.width}x{given.height}: {first_line(error)}"
                    )
                continue
            for given, picture in zip(batch, pictures, strict=True):
                cut = picture[: given.height, : given.width]
                pending.append((given.item, writers.submit(_write, job, given, cut)))
            settle(2 * workers + job.batch_size)
        settle(0)
    finally:
        readers.shutdown(wait=False, cancel_futures=True)
        writers.shutdown(wait=True, cancel_futures=True)
        report.seconds = time.perf_counter() - start
    return report


def _read_ahead(
    pool: ThreadPoolExecutor, job: Job, items: list[Item], ahead: int, fail: Callable[[Item, str], None]
) -> Iterator[_Input]:
    """Decoded inputs in order, ``ahead`` of them in flight at most."""
    waiting: deque[tuple[Item, Future[_Input]]] = deque()
    rest = iter(items)
    while True:
        while len(waiting) < ahead and (item := next(rest, None)) is not None:
            waiting.append((item, pool.submit(_read, job, item)))
        if not waiting:
            return
        item, future = waiting.popleft()
        try:
            given = future.result()
        except InputError as error:
            fail(item, str(error))
        else:
            yield given


def _batches(inputs: Iterator[_Input], size: int) -> Iterator[list[_Input]]:
    """Neighbours of one padded size, at most ``size`` together."""
    batch: list[_Input] = []
    for given in inputs:
        if batch and (len(batch) == size or batch[0].pixels.shape != given.pixels.shape):
            yield batch
            batch = []
        batch.append(given)
    if batch:
        yield batch


def _read(job: Job, item: Item) -> _Input:
    fit = job.network.fit
    if job.num_classes is None:
        pixels = read_image(item.source, job.network.channels)
        height, width = job.size.target(pixels.shape[0], pixels.shape[1], fit)
        return _Input(item, sizes.pad(resize_image(pixels, height, width), fit), None, height, width)
    labels = read_ids(item.source, "label map")
    wrong = (labels < 0) | (labels >= job.num_classes)
    if wrong.any():
        row, column = (int(index[0]) for index in np.nonzero(wrong))
        raise InputError(
            f"label {labels[row, column]} at row {row}, column {column}; the network knows 0 to "
            f"{job.num_classes - 1}"
        )
    instances = None
    height, width = job.size.target(labels.shape[0], labels.shape[1], fit)
    if item.instances is not None:
        try:
            instances = read_ids(item.instances, "instance map")
        except InputError as error:
            raise InputError(f"instance map {item.instances}: {error}") from None
        if int(instances.min()) < 0:
            raise InputError(f"instance map {item.instances}: negative id {int(instances.min())}")
        if instances.shape != labels.shape:
            raise InputError(
                f"{labels.shape[1]}x{labels.shape[0]} pixels, but its instance map {item.instances} has "
                f"{instances.shape[1]}x{instances.shape[0]}"
            )
        instances = sizes.pad(resize_ids(instances, height, width), fit)
    return _Input(item, sizes.pad(resize_ids(labels, height, width), fit), instances, height, width)


def _started(
    job: Job, batches: Iterator[list[_Input]]
) -> Iterator[tuple[list[_Input], Callable[[], Pictures]]]:
    """Batches with what gives their pictures. On a GPU one batch is computed while the next is started, so
    that the device never waits for the host; elsewhere their own order is as good."""
    ahead = 1 if job.network.device.type == "cuda" else 0
    waiting: deque[tuple[list[_Input], Callable[[], Pictures]]] = deque()
    for batch in batches:
        waiting.append((batch, _attempt(job, batch)))
        while len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _attempt(job: Job, batch: list[_Input]) -> Callable[[], Pictures]:
    """Starts a batch; an error is kept for when its pictures are asked for."""
    try:
        started = _start_batch(job, batch)
    except (RuntimeError, ValueError, MemoryError) as error:
        reason = error

        def failed() -> Pictures:
            raise reason

        return failed
    return lambda: started


def _start_batch(job: Job, batch: list[_Input]) -> Pictures:
    device = job.network.device
    pixels = stacked([given.pixels for given in batch], device)
    if job.num_classes is None:
        return start(job.network, pixels, _network_range)
    ids = [given.instances for given in batch if given.instances is not None]
    instances = stacked(ids, device) if ids else None
    return start(job.network, LabelMap(pixels, instances, num_classes=job.num_classes))


def _network_range(pixels: Tensor) -> Tensor:
    """(N, H, W, C) uint8 as (N, C, H, W) float32 in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _write(job: Job, given: _Input, picture: NDArray[np.uint8]) -> None:
    if job.gallery is not None:
        shown = given.pixels[: given.height, : given.width]
        write_image(
            input_picture(job.gallery, given.item.name),
            shown if job.num_classes is None else colorize(shown, job.num_classes),
        )
    write_image(given.item.output, picture)
