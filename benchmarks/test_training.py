"""A training step (forward, loss, backward) under ``optimize(mode="train")`` against PyTorch eager and
torch.compile, and the activation memory that lies between forward and backward pass.

    pytest benchmarks/test_training.py --full --benchmark-json=training.json

Small networks without ``--full``. All are given the same tensors. Eager is measured in channels_last too, and
is the one whose memory is compared; ``times_faster`` is against the faster of the two. What takes longer than
PATIENCE seconds runs once, without a run to warm up (torch.compile: after its first call), and in one layout:
in bfloat16 a step of eager's may take minutes on processors that have no instructions for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from p2pfast import _C, models, optimize
from p2pfast.models import norm_layer_of
from p2pfast.nn import GANLoss, L1Loss

PATIENCE = 10.0


class _Allocations(TorchDispatchMode):
    """Everything that operators make within it; ``bytes_alive`` of them at any later time."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes_alive(self, known: set[int]) -> int:
        """Without the storages ``known``."""
        made = self.made.items()
        return sum(size for key, (ref, size) in made if key not in known and not ref.expired())


def activation_bytes(forward: Callable[[], object], known: Iterable[Tensor]) -> int:
    """What lives after ``forward()`` and is not one of the tensors ``known``."""
    with _Allocations() as allocations:
        kept = forward()
    alive = allocations.bytes_alive({t.untyped_storage()._cdata for t in known})
    del kept
    return alive


def network_of(name: str, full: bool) -> tuple[nn.Module, nn.Module | None, Tensor]:
    """Generator, discriminator and input."""
    if name == "pix2pixhd-global":
        ngf, size = (32, (256, 512)) if full else (8, (64, 128))
        generator = models.GlobalGenerator(36, 3, ngf, 4, 9, norm_layer_of("instance"))
        return generator, None, torch.randn(1, 36, *size)
    ngf = 64 if full else 8
    generator = models.UnetGenerator(3, 3, 8, ngf, norm_layer_of("batch"))
    return generator, models.NLayerDiscriminator(6, ngf), torch.randn(1, 3, 256, 256)


def medians(functions: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Seconds of each, measured in turn after a run to warm up; of slow ones the first run's. The step
    that is timed follows another of the same engine, as in training: caches and memory are its own."""
    times: dict[str, list[float]] = {}
    slow: set[str] = set()
    for i in range(rounds + 1):
        for name, function in functions.items():
            if name in slow or (name == "eager_channels_last" and "eager" in slow):
                continue
            if i > 0:
                function()
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            if i == 0 and name == "torch.compile":  # most of it was the compiler
                start = time.perf_counter()
                function()
                seconds = time.perf_counter() - start
            if i == 0 and seconds < PATIENCE:
                continue
            if seconds >= PATIENCE:
                slow.add(name)
            times.setdefault(name, []).append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


@pytest.mark.parametrize("rival", ["eager", "torch.compile"])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pix2pixhd-global", "pix2pix"])
def test_step(benchmark: Any, full: bool, name: str, amp: bool, rival: str) -> None:
    with torch.inference_mode(False):
        generator, discriminator, x = network_of(name, full)
        target = torch.randn(x.shape[0], 3, *x.shape[2:]).tanh()
        last = x.contiguous(memory_format=torch.channels_last)
        gan, l1 = GANLoss("vanilla"), L1Loss(100.0)

        def forward(g: Callable[..., Tensor], d: Callable[..., Tensor] | None, given: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                y = g(given)
                loss = l1(y, target)
                if d is not None:
                    loss = loss + gan(d(torch.cat([given, y], 1)), True)
            return loss

        losses: dict[str, Tensor] = {}

        def step(key: str, g: Any, d: Any, given: Tensor) -> Tensor:
            for module in (g, d):
                if module is not None:
                    module.zero_grad()
            loss = forward(g, d, given)
            loss.backward()
            return losses.setdefault(key, loss.detach())

        plain = generator, discriminator
        fast = [None if network is None else optimize(network, mode="train") for network in plain]
        functions: dict[str, Callable[[], Tensor]] = {"p2pfast": lambda: step("p2pfast", *fast, x)}
        if rival == "eager":
            functions["eager"] = lambda: step("eager", *plain, x)
            functions["eager_channels_last"] = lambda: step("eager_channels_last", *plain, last)
        else:
            compiled = [None if network is None else torch.compile(network) for network in plain]
            functions[rival] = lambda: step(rival, *compiled, x)
        rounds = 5
        benchmark.pedantic(functions["p2pfast"], rounds=rounds, warmup_rounds=1)
        info = benchmark.extra_info
        info |= {"threads": torch.get_num_threads(), "level": _C.active_level()}
        if rival == "eager":
            networks = [network for network in plain if network is not None]
            given = [x, target, *(t for n in networks for t in (*n.parameters(), *n.buffers()))]
            info["activation_mb"] = activation_bytes(lambda: forward(*fast, x), given) * 1e-6
            info["eager_activation_mb"] = activation_bytes(lambda: forward(*plain, x), given) * 1e-6
            info["share_of_eager_memory"] = info["activation_mb"] / info["eager_activation_mb"]
        if benchmark.stats is None:  # with --benchmark-disable
            functions[rival]()
        else:
            seconds = medians(functions, rounds)
            info |= {f"{key}_ms": 1e3 * value for key, value in seconds.items()}
            ours = seconds.pop("p2pfast")
            info |= {f"times_faster_than_{key}": value / ours for key, value in seconds.items()}
            info["times_faster"] = min(seconds.values()) / ours
        # Dropout draws its masks in another order: the U-Net's losses are compared in the tests.
        if name == "pix2pixhd-global":
            tolerance = 5e-2 if amp else 1e-4
            torch.testing.assert_close(losses["p2pfast"], losses[rival], rtol=tolerance, atol=0.0)
