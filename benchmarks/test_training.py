"""A training step (forward, loss, backward) of the fused layers against PyTorch eager and torch.compile, and
the activation memory that lies between forward and backward pass.

    pytest benchmarks/test_training.py --full --benchmark-json=training.json

Small networks without ``--full``. The fused networks get channels_last inputs; eager is measured with both
memory formats, and ``times_faster_than_eager`` is against the faster one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from p2pfast import _C, models
from p2pfast.models import norm_layer_of
from p2pfast.nn import FusedSequential, GANLoss, L1Loss


def fused(network: nn.Module) -> nn.Module:
    """A copy whose sequences run their chains as one step each."""

    def replace(module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            replace(child)
            if type(child) is nn.Sequential:
                setattr(module, name, FusedSequential.from_sequential(child))

    network = copy.deepcopy(network)
    replace(network)
    return network


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

    def bytes_alive(self) -> int:
        return sum(size for ref, size in self.made.values() if not ref.expired())


def activation_bytes(forward: Callable[[], object]) -> int:
    with _Allocations() as allocations:
        kept = forward()
    alive = allocations.bytes_alive()
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


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["pix2pixhd-global", "pix2pix"])
def test_step(benchmark: Any, full: bool, name: str, amp: bool) -> None:
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

        def step(g: Any, d: Any, given: Tensor) -> Tensor:
            for module in (g, d):
                if module is not None:
                    module.zero_grad()
            loss = forward(g, d, given)
            loss.backward()
            return loss.detach()

        fast = fused(generator), None if discriminator is None else fused(discriminator)
        plain = generator, discriminator
        compiled = torch.compile(generator), None if discriminator is None else torch.compile(discriminator)
        functions: dict[str, Callable[[], Tensor]] = {
            "p2pfast": lambda: step(*fast, last),
            "eager_nchw": lambda: step(*plain, x),
            "eager_channels_last": lambda: step(*plain, last),
            "torch.compile": lambda: step(*compiled, x),
        }
        # Dropout draws its masks in another order: the U-Net's losses are compared in the tests.
        if name == "pix2pixhd-global":
            tolerance = 5e-2 if amp else 1e-4
            torch.testing.assert_close(
                functions["p2pfast"](), functions["eager_nchw"](), rtol=tolerance, atol=0.0
            )
        rounds = 3 if full else 5
        benchmark.pedantic(functions["p2pfast"], rounds=rounds, warmup_rounds=1)
        info = benchmark.extra_info
        info |= {"threads": torch.get_num_threads(), "level": _C.active_level()}
        info["activation_mb"] = activation_bytes(lambda: forward(*fast, last)) * 1e-6
        info["eager_activation_mb"] = activation_bytes(lambda: forward(*plain, x)) * 1e-6
        info["share_of_eager_memory"] = info["activation_mb"] / info["eager_activation_mb"]
        if benchmark.stats is None:  # with --benchmark-disable
            return
        times: dict[str, list[float]] = {key: [] for key in functions}
        for i in range(rounds + 1):
            for key, function in functions.items():
                start = time.perf_counter()
                function()
                if i > 0:
                    times[key].append(time.perf_counter() - start)
        seconds = {key: statistics.median(t) for key, t in times.items()}
        info |= {f"{key}_ms": 1e3 * value for key, value in seconds.items()}
        eager = min(seconds["eager_nchw"], seconds["eager_channels_last"])
        info["times_faster_than_eager"] = eager / seconds["p2pfast"]
        info["times_faster_than_torch.compile"] = seconds["torch.compile"] / seconds["p2pfast"]
