"""Where a process of a run computes, and what the processes of one run tell each other.

`torchrun` starts one process per GPU and says so in the environment; without it a run is one process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from p2pfast.errors import UsageError


@dataclass(frozen=True)
class Place:
    """This process among ``world`` processes, and its device."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all processes."""
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so in one of the processes."""
        if self.world == 1:
            return here
        told = torch.tensor(float(here), device=self.device)
        return bool(self.mean(told) > 0)

    def gather(self, item: Any) -> list[Any]:
        """What every process gives, in order of ranks; an empty list except on the first."""
        if self.world == 1:
            return [item]
        items = [None] * self.world if self.first else None
        dist.gather_object(item, items)
        return items or []

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def join(device: str) -> Place:
    """Find this process's place and join the others of a `torchrun`. Raises UsageError without the device."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise UsageError(
            "--device cuda: PyTorch finds no usable NVIDIA GPU (see `p2pfast info`); use --device cpu"
        )
    kind = "cuda" if device != "cpu" and found else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Place(torch.device(kind))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"{local + 1} processes on a machine with {torch.cuda.device_count()} GPUs; "
                "give torchrun a smaller --nproc-per-node"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return Place(torch.device(kind, local) if kind == "cuda" else torch.device(kind), dist.get_rank(), world)


def leave() -> None:
    """End the group that `join` made, if it made one."""
    if dist.is_initialized():
        dist.destroy_process_group()
