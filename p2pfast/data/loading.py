"""Batches in an order that depends on the seed alone, from any position on, shared among processes."""

from __future__ import annotations

import math
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from p2pfast.data.datasets import Position, Sample
from p2pfast.errors import InputError, first_line


@dataclass(frozen=True)
class Order:
    """Which samples make up which step.

    A step consists of ``accumulate`` batches of ``batch_size`` samples in each of ``world`` processes. Every
    epoch takes all samples in a new order (as they come if ``serial``); where the last step of an epoch is
    short, samples from the start of the epoch's order fill it, so that all processes have as many.
    """

    samples: int
    batch_size: int = 1
    accumulate: int = 1
    world: int = 1
    seed: int = 0
    serial: bool = False

    @property
    def step_size(self) -> int:
        """Samples in a step, of all processes."""
        return self.batch_size * self.accumulate * self.world

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return math.ceil(self.samples / self.step_size)

    def epoch(self, epoch: int) -> list[int]:
        """Indices in the order of this epoch, filled up to whole steps."""
        if self.serial:
            order = np.arange(self.samples)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.samples)
        return np.resize(order, self.steps * self.step_size).tolist()

    def batches(self, first_step: int, epochs: int, rank: int = 0) -> Iterator[list[Position]]:
        """The batches of one process, from step ``first_step`` of the run to the end of the last epoch.

        Epochs count from 1. The processes' batches together are the batch of one process with ``world`` times
        the batch size.
        """
        together = self.batch_size * self.world
        for epoch in range(first_step // self.steps + 1, epochs + 1):
            order = self.epoch(epoch)
            skip = max(0, first_step - (epoch - 1) * self.steps) * self.step_size
            for start in range(skip, len(order), together):
                mine = order[start + rank * self.batch_size : start + (rank + 1) * self.batch_size]
                yield [(epoch, index) for index in mine]


class _Rest(Sampler[list[Position]]):
    def __init__(self, order: Order, first_step: int, epochs: int, rank: int) -> None:
        self.order, self.first_step, self.epochs, self.rank = order, first_step, epochs, rank

    def __iter__(self) -> Iterator[list[Position]]:
        return self.order.batches(self.first_step, self.epochs, self.rank)

    def __len__(self) -> int:
        left = max(0, self.epochs * self.order.steps - self.first_step)
        return left * self.order.accumulate


def _collate(samples: Sequence[Sample | InputError]) -> Sample | InputError:
    for sample in samples:
        if isinstance(sample, InputError):
            return sample
    good = [sample for sample in samples if isinstance(sample, dict)]
    for key in good[0]:
        sizes = {tuple(sample[key].shape[1:]) for sample in good}
        if len(sizes) > 1:
            shown = " and ".join(f"{width}x{height}" for height, width in sorted(sizes)[:2])
            return InputError(
                f"pictures of {shown} pixels cannot share a batch; use --batch-size 1, or a --preprocess "
                "that crops"
            )
    return default_collate(good)


def _quiet(_worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach every process; the main one finishes its step and ends these.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def load(
    dataset: Dataset[Sample],
    order: Order,
    first_step: int,
    epochs: int,
    *,
    rank: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Sample, None, None]:
    """Collated batches for the rest of a run, loaded ahead by ``workers`` processes (0: in this one).

    Raises InputError, with the file's name, when a batch with an unreadable file is due.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_Rest(order, first_step, epochs, rank),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_quiet,
        # Its own generator: otherwise making an iterator would advance the run's random numbers.
        generator=torch.Generator(),
    )
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise InputError(
                f"a process that loads pictures was killed ({first_line(error)}), which the system does when "
                "memory runs out; use fewer --num-threads"
            ) from error
        if isinstance(batch, InputError):
            raise batch
        yield batch
