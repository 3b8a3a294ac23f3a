"""The speed rule: an optimised network is never slower than eager, and chains of covered layers are faster.

``python -m pytest benchmarks/test_zoo.py`` on an idle machine; the times of each network are in
``docs/networks.md``. Chains are compared with torch.compile too, which takes a while to compile them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo.registry import ZOO
from zoo.timing import Timing, measure, realistic

NOISE = 1.1  # what a machine without other load may still vary by
CHAINS_FASTER = 1.3


def report(benchmark: object, timing: Timing) -> None:
    info = benchmark.extra_info  # type: ignore[attr-defined]
    info |= {"eager_ms": timing.eager * 1e3, "p2pfast_ms": timing.fast * 1e3, "times_eager": timing.speedup}
    info["fused"] = f"{timing.fused}/{timing.convolutions}"
    if timing.compiled is not None:
        info["compile_ms"] = timing.compiled * 1e3


@pytest.fixture(autouse=True)
def _measured_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "on")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", list(ZOO))
def test_never_slower_than_eager(benchmark: object, name: str, batch: int) -> None:
    net, inputs = realistic(name, batch)
    timing = benchmark.pedantic(measure, args=(net, inputs), rounds=1)  # type: ignore[attr-defined]
    if timing.fast > NOISE * timing.eager:  # once more, before a disturbance is taken for a result
        timing = measure(net, inputs, seconds=3.0)
    report(benchmark, timing)
    assert timing.fast <= NOISE * timing.eager, f"{timing.speedup:.2f} times eager\n{timing.explanation}"


def conv(inputs: int, outputs: int, kernel: int, stride: int, norm: type[nn.Module]) -> list[nn.Module]:
    half = (kernel - 1) // 2
    return [nn.Conv2d(inputs, outputs, kernel, stride, half), norm(outputs), nn.ReLU(True)]


def up(inputs: int, outputs: int, norm: type[nn.Module]) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), norm(outputs), nn.ReLU(True)]


def residual_trunk() -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.ReflectionPad2d(1), nn.Conv2d(256, 256, 3), nn.InstanceNorm2d(256), nn.ReLU(True)]
    return nn.Sequential(*layers), torch.randn(1, 256, 64, 64)


def encoder() -> tuple[nn.Module, Tensor]:
    layers = [
        *conv(64, 128, 4, 2, nn.BatchNorm2d),
        *conv(128, 256, 4, 2, nn.BatchNorm2d),
        *conv(256, 512, 4, 2, nn.BatchNorm2d),
    ]
    return nn.Sequential(*layers), torch.randn(1, 64, 128, 128)


def decoder() -> tuple[nn.Module, Tensor]:
    layers = [*up(512, 256, nn.BatchNorm2d), *up(256, 128, nn.BatchNorm2d), *up(128, 64, nn.BatchNorm2d)]
    return nn.Sequential(*layers), torch.randn(1, 512, 16, 16)


def fine_layers() -> tuple[nn.Module, Tensor]:
    norm = nn.InstanceNorm2d
    layers = [*conv(3, 64, 7, 1, norm), *conv(64, 128, 3, 2, norm), *conv(128, 128, 3, 1, norm)]
    return nn.Sequential(*layers), torch.randn(1, 3, 128, 128)


CHAINS = {f.__name__: f for f in (residual_trunk, encoder, decoder, fine_layers)}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("chain", list(CHAINS))
def test_chains_of_covered_layers(benchmark: object, chain: str, training: bool) -> None:
    """Training mode keeps batch statistics at inference, as pix2pix does; eval folds batch norm."""
    net, x = CHAINS[chain]()
    net.train(training)
    timing = benchmark.pedantic(  # type: ignore[attr-defined]
        measure, args=(net, (x,)), kwargs={"seconds": 3.0, "with_compile": True}, rounds=1
    )
    report(benchmark, timing)
    assert timing.compiled is not None and timing.fused == timing.convolutions
    fastest = min(timing.eager, timing.compiled)
    assert fastest >= CHAINS_FASTER * timing.fast, (
        f"{fastest / timing.fast:.2f} times the faster of eager ({timing.eager * 1e3:.1f} ms) and "
        f"torch.compile ({timing.compiled * 1e3:.1f} ms)\n{timing.explanation}"
    )
