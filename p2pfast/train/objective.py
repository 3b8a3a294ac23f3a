"""What the objectives share: networks, optimisers, mixed precision, moving averages, and their state."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from p2pfast.data.datasets import Sample
from p2pfast.train.config import Config
from p2pfast.train.networks import Running
from p2pfast.train.parallel import Place
from p2pfast.train.pool import ImagePool

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Terms(dict[str, Tensor]):
    """Loss terms by name, each the mean over the batches of a step."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.share = 1 / batches

    def note(self, **terms: Tensor) -> None:
        for name, value in terms.items():
            value = value.detach().float() * self.share
            self[name] = self[name] + value if name in self else value


class Average:
    """The exponential moving average of a network's weights; buffers and integers are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {key: value.detach().clone() for key, value in network.state_dict().items()}
        self.learned = {key for key, _ in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        for key, value in network.state_dict().items():
            if key in self.learned:
                self.weights[key].lerp_(value, 1 - self.decay)
            else:
                self.weights[key].copy_(value)


class Objective(ABC):
    """A GAN: its networks by published name, and how one step changes them.

    Subclasses make ``networks``, ``optimizers`` and ``pools`` and say which networks are ``averaged``.
    """

    networks: dict[str, Running]
    averaged: tuple[str, ...]
    multiple: int
    """Sizes of pictures are multiples of this."""
    least: int = 1
    """What sides of pictures are at least, for every network to have a result."""

    def __init__(self, config: Config, place: Place) -> None:
        self.config, self.place = config, place
        self.networks = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.pools: dict[str, ImagePool] = {}
        self.averages: dict[str, Average] = {}
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=config.amp == "float16")

    @abstractmethod
    def step(self, batches: Sequence[Sample]) -> Terms:
        """One update of all networks from the batches together. Returns the loss terms."""

    @abstractmethod
    def pictures(self) -> dict[str, NDArray[np.uint8]]:
        """Pictures (H, W, C) of the last step by their published names, to look at."""

    def start_epoch(self, epoch: int) -> None:
        """Set the learning rate of epoch 1, 2, …"""
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate(epoch)
                group["betas"] = self._betas  # a state that was loaded has those of its run

    def notes(self) -> list[str]:
        """What a user is to know before the run begins."""
        return []

    def add(self, name: str, network: nn.Module) -> Running:
        """Take a network whose weights are drawn."""
        self.networks[name] = Running(network.to(self.place.device).train(), self.config, self.place)
        return self.networks[name]

    def adam(self, name: str, networks: Iterable[Running]) -> None:
        parameters = [p for run in networks for p in run.network.parameters()]
        self.optimizers[name] = torch.optim.Adam(parameters, lr=self.config.lr, betas=self._betas)

    @property
    def _betas(self) -> tuple[float, float]:
        return self.config.beta1, 0.999

    def finish_setup(self) -> None:
        """To be called when all networks have their first weights."""
        if self.config.ema:
            self.averages = {
                name: Average(self.networks[name].network, self.config.ema)
                for name in self.averaged
                if name in self.networks
            }

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Mixed precision, for calls of networks; losses belong outside, in float32."""
        dtype = AMP.get(self.config.amp)
        with torch.autocast(self.place.device.type, dtype=dtype, enabled=dtype is not None):
            yield

    def image(self, batch: Sample, key: str) -> Tensor:
        """A batch of pictures as the networks take them, (N, C, H, W) in [-1, 1]."""
        return batch[key].to(self.place.device, non_blocking=True).float() / 127.5 - 1

    def backward(self, loss: Tensor, terms: Terms) -> None:
        self.scaler.scale(loss * terms.share).backward()

    def update(self, name: str) -> None:
        self.scaler.step(self.optimizers[name])
        self.optimizers[name].zero_grad(set_to_none=True)

    def finish_step(self) -> None:
        self.scaler.update()
        for name, average in self.averages.items():
            average.update(self.networks[name].network)

    def random_state(self) -> list[Tensor]:
        """State of the generators that dropout draws from."""
        states = [torch.get_rng_state()]
        if self.place.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.place.device))
        return states

    def set_random_state(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.place.device.type == "cuda" and len(states) > 1:
            torch.cuda.set_rng_state(states[1], self.place.device)

    def weights(self) -> dict[str, Mapping[str, Tensor]]:
        """What is saved as ``net_NAME``: every network under the published keys, and the averages."""
        networks = {name: run.network.state_dict() for name, run in self.networks.items()}
        return {**networks, **{f"{name}_ema": average.weights for name, average in self.averages.items()}}

    def broken(self) -> str | None:
        """The name of a network with a NaN or an infinity in its parameters."""
        for name, run in self.networks.items():
            largest = [p.detach().abs().max() for p in run.network.parameters() if p.numel()]
            if largest and not math.isfinite(float(torch.stack(largest).max())):
                return name
        return None

    def state(self) -> dict[str, Any]:
        """All that a later run needs to go on, the same in every process."""
        return {
            "networks": {name: run.network.state_dict() for name, run in self.networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "averages": {name: average.weights for name, average in self.averages.items()},
            "scaler": self.scaler.state_dict(),
        }

    def own_state(self) -> dict[str, Any]:
        """What is each process's own."""
        pools = {name: pool.state() for name, pool in self.pools.items()}
        return {"random": self.random_state(), "pools": pools}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave. Raises RuntimeError, KeyError or ValueError if it is of other networks."""
        for name, run in self.networks.items():
            run.network.load_state_dict(state["networks"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state["optimizers"][name]))
        for name, average in self.averages.items():
            # A run that starts to average now begins with the weights it has.
            found = state["averages"].get(name, state["networks"][name])
            for key, value in found.items():
                average.weights[key].copy_(value)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        self.set_random_state(state["random"])
        for name, pool in self.pools.items():
            if name in state["pools"]:
                pool.load(state["pools"][name], self.place.device)


def picture(image: Tensor) -> NDArray[np.uint8]:
    """The first of a batch (N, C, H, W) in [-1, 1] as (H, W, C) uint8."""
    first = ((image[0].detach().float() + 1) * 127.5).round().clamp(0, 255)
    return first.byte().permute(1, 2, 0).cpu().numpy()
