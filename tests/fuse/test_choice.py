"""Choosing algorithms by measurement, and the cache of choices."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import INSTANCE, relative
from torch import nn

import p2pfast
from p2pfast import _C, models
from p2pfast.ops import measured
from p2pfast.runtime import choice


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    return tmp_path


def first_wins(ways: tuple[Callable[[], object], ...], seconds: float) -> list[float]:
    for way in ways:
        way()
    return [float(i) for i in range(len(ways))]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    )


def test_measured_once_and_remembered(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    original = choice._measure
    monkeypatch.setattr(choice, "_measure", lambda *a: measured.append(1) or original(*a))
    net, x = network(), torch.randn(1, 8, 24, 24)
    first = p2pfast.optimize(net)(x)
    assert measured and (cache_dir / "choices.json").exists()
    count = len(measured)
    choice.cache.loaded = None  # as a new process finds it
    assert torch.equal(p2pfast.optimize(net)(x), first)
    assert len(measured) == count
    monkeypatch.setenv("P2PFAST_TUNE", "force")
    p2pfast.optimize(net)(x)
    assert len(measured) > count


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": 3}', '{"a": ["x"]}'])
def test_a_broken_cache_is_made_anew(cache_dir: Path, content: str) -> None:
    (cache_dir / "choices.json").write_text(content)
    choice.cache.loaded = None
    p2pfast.optimize(network())(torch.randn(1, 8, 26, 24))
    assert isinstance(json.loads((cache_dir / "choices.json").read_text()), dict)


def test_an_unwritable_cache_is_no_error(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache_dir / "file").write_text("")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(cache_dir / "file"))
    p2pfast.optimize(network())(torch.randn(1, 8, 28, 24))


def test_what_pytorch_runs_faster_stays_with_it(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison leaves no mark, and the next process knows its result."""
    monkeypatch.setattr(measured, "_chosen", {})
    monkeypatch.setattr(measured, "_settled", {})
    monkeypatch.setattr(measured, "_seconds", first_wins)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Dropout(0.5), nn.Conv2d(16, 8, 3))
    twin, x = copy.deepcopy(net), torch.randn(1, 8, 24, 24)
    for fast in (p2pfast.optimize(net), p2pfast.optimize(net)):
        answers = []
        for module in (fast, twin):
            torch.manual_seed(4)
            answers.append(module(x).detach())
        assert torch.equal(*answers)
        assert all(torch.equal(a, b) for a, b in zip(fast.buffers(), twin.buffers(), strict=True))
        assert "measured faster" in p2pfast.explain(fast).note
        monkeypatch.setattr(measured, "_chosen", {})
        monkeypatch.setattr(measured, "_settled", {})
        monkeypatch.setattr(measured, "_seconds", lambda *a: pytest.fail("measured again"))
    planned = p2pfast.optimize(net, backend="cpu")
    planned(x)
    assert p2pfast.explain(planned).rows


def test_off_measures_nothing(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    monkeypatch.setattr(choice, "_measure", None)
    p2pfast.optimize(network())(torch.randn(1, 8, 30, 24))


def test_an_unknown_mode_is_named(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "maybe")
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    with pytest.raises(ValueError, match="P2PFAST_TUNE is 'maybe'"):
        p2pfast.optimize(network())(torch.randn(1, 8, 30, 24))


def test_fast_accuracy_rounds_the_weights_of_large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.InstanceNorm2d(64), nn.ReLU()).eval()
    x = torch.randn(1, 64, 32, 32)
    expected = net(x)
    errors = {}
    for accuracy in ("default", "fast"):
        y = p2pfast.optimize(net, dtype=torch.bfloat16, accuracy=accuracy)(x).float()
        errors[accuracy] = ((y - expected).norm() / expected.norm()).item()
    assert errors["default"] < errors["fast"] < 2e-2


def test_a_budget_is_kept_where_it_costs_least() -> None:
    def options(*pairs: tuple[float, int]) -> choice.Options:
        return [choice.Choice(0, 0, 0, seconds, packed) for seconds, packed in pairs]

    layers = {"a": options((1.0, 100), (3.0, 0)), "b": options((1.0, 100), (1.5, 50), (1.6, 0))}
    assert [c.packed for c in choice.fit(layers, 200).values()] == [100, 100]
    assert [c.packed for c in choice.fit(layers, 199).values()] == [100, 0]
    assert [c.packed for c in choice.fit(layers, 0).values()] == [0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (9, 200), (1, 1), (512, 1024)])
def test_blocks_are_shared_evenly(
    threads: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every thread gets as many blocks as the others, and a block is whole groups of rows, nearly."""
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    before = _C.num_threads()
    _C.set_num_threads(threads)
    try:
        block = choice._balanced(choice.WINOGRAD, 24, {"out_height": height, "out_width": width, "images": 1})
    finally:
        _C.set_num_threads(before)
    tiles = -(-height // 4) * -(-width // 4)
    blocks = -(-tiles // block)
    assert block <= 28 and (block <= 6 or block % 6 in (0, 4, 5))
    rounds = -(-blocks // threads)
    assert rounds <= -(-tiles // (24 * threads))


def test_a_shortened_trial_stays_inside_its_memory(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw weights keep the strides of the whole layer, also where a trial has fewer output channels."""
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setattr(choice, "_TUNING_MULTIPLICATIONS", 1e6)
    reads: list[tuple[int, int]] = []
    original = _C.run_conv

    def run(algorithm: int, call: dict[str, Any]) -> None:
        inputs = sum(s["channels"] for s in call["sources"])
        last = (call["out_channels"] - 1) * call["weight_out_stride"]
        last += (inputs - 1) * call["weight_in_stride"] + call["kernel_h"] * call["kernel_w"]
        sizes = [b.numel() for name, b in choice._memory.blocks.items() if name.startswith("weight-")]
        reads.append((last, max(sizes)))
        original(algorithm, call)

    monkeypatch.setattr(choice._C, "run_conv", run)
    layer = nn.ConvTranspose2d(32, 512, 3, 2, 1, 1)
    p2pfast.optimize(nn.Sequential(layer, nn.InstanceNorm2d(512)))(torch.randn(1, 32, 8, 64))
    assert reads and all(last <= size for last, size in reads)


def layer(kernel: int, stride: int = 1) -> dict[str, Any]:
    """A layer as the planner asks for it: 64 channels in bfloat16."""
    strides = {"image_stride": 32 * 32 * 64, "row_stride": 32 * 64, "pixel_stride": 64, "dtype": 1}
    side = (32 + 2 - kernel) // stride + 1
    return {
        "images": 1,
        "height": 32,
        "width": 32,
        "out_height": side,
        "out_width": side,
        "out_channels": 64,
        "kernel_h": kernel,
        "kernel_w": kernel,
        "stride": stride,
        "pad_top": 1,
        "pad_left": 1,
        "weight_out_stride": 64 * kernel**2,
        "weight_in_stride": kernel**2,
        "sources": [{**strides, "channels": 64}],
        "out": strides,
    }


@pytest.mark.parametrize(
    ("args", "accuracy", "expected"),
    [
        (layer(3), "default", {"direct", "winograd2", "streamed2"}),
        (layer(3), "fast", {"direct", "winograd", "winograd2", "streamed", "streamed2"}),
        (layer(4, 2), "default", {"direct"}),  # see choice._in_pairs
        (layer(4, 2), "fast", {"direct", "winograd2", "streamed2"}),
        (layer(3, 2), "fast", {"direct", "winograd2", "streamed2"}),
        (layer(4), "fast", {"direct"}),
        (layer(7), "default", {"direct"}),
    ],
)
def test_pairs_where_the_processor_multiplies_them(
    args: dict[str, Any], accuracy: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    for native in (False, True):
        monkeypatch.setattr(choice, "multiplies_pairs", lambda native=native: native)
        found = choice.options(args, choice.narrow(torch.bfloat16, accuracy))
        pairs = {choice.ALGORITHMS[c.algorithm] for c in found if c.pairs}
        assert pairs == (expected if native else set())
        assert all(c.name.endswith("bfloat16 pairs") for c in found if c.pairs)
        assert not any(c.pairs for c in choice.options(args, choice.narrow(torch.float32, accuracy)))
        half = {c.packed for c in found if c.algorithm == choice.DIRECT}
        assert half == {64 * 64 * args["kernel_h"] ** 2 * 2}


def test_pairs_are_measured_and_remembered(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args, narrow = layer(3), choice.narrow(torch.bfloat16, "default")
    monkeypatch.setattr(choice, "multiplies_pairs", lambda: False)
    without = choice.options(args, narrow)
    monkeypatch.setattr(choice, "multiplies_pairs", lambda: True)
    measured = choice.options(args, narrow)
    assert any(c.pairs for c in measured) and not any(c.pairs for c in without)
    choice.finish_measuring()
    choice.cache.loaded = None  # as a new process finds it
    monkeypatch.setattr(choice, "_measure", None)
    assert choice.options(args, narrow) == measured
    monkeypatch.setattr(choice, "multiplies_pairs", lambda: False)
    assert choice.options(args, narrow) == without


@pytest.mark.parametrize("name", ["resnet", "unet-instance", "global"])
def test_pairs_keep_the_quality_of_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1 dB of PyTorch in bfloat16 (a mean), with every layer in pairs that may be."""
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    monkeypatch.setattr(choice, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(choice, "_PAIRS_SPEEDUP", 100.0)
    networks = {
        "resnet": lambda: models.ResnetGenerator(3, 3, 16, INSTANCE, False, 3),
        "unet-instance": lambda: models.UnetGenerator(3, 3, 5, 16, INSTANCE),
        "global": lambda: models.GlobalGenerator(5, 3, 16, 2, 2, INSTANCE),
    }
    shares = []
    for seed in range(4):
        torch.manual_seed(seed)
        net = networks[name]().eval()
        for p in net.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p, nonlinearity="relu")
        x = torch.randn(1, 5 if name == "global" else 3, 64, 64)
        with torch.no_grad():
            exact = net(x)
            eager = copy.deepcopy(net).bfloat16()(x.bfloat16())
        fast = p2pfast.optimize(net, dtype=torch.bfloat16)
        found = fast(x)
        assert any("pairs" in row.kernel for row in p2pfast.explain(fast).rows)
        shares.append(relative(found, exact) / relative(eager, exact))
    assert sum(shares) / len(shares) < 1.122, shares


def test_what_pytorch_is_faster_at_is_given_to_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first call of a kind nothing is looked up, and whatever changes is still seen."""
    from p2pfast.fuse.source import ModuleSource
    from p2pfast.runtime import engine

    monkeypatch.setattr(engine.Engine, "_loses", lambda *args: True)
    bound: list[int] = []
    original = ModuleSource.bind
    monkeypatch.setattr(ModuleSource, "bind", lambda self, *a: bound.append(1) or original(self, *a))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    fast = p2pfast.optimize(net)
    x, other = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 9, 8)
    for given in (x, other, x, other, x):
        found = fast(given)
        assert torch.equal(found, net(given)) and not found.requires_grad
    assert len(bound) == 2 and "faster" in p2pfast.explain(fast).note
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    net[1] = fast[1] = nn.BatchNorm2d(8).eval()
    handle = fast[0].register_forward_hook(lambda m, i, o: o + 1)
    assert torch.equal(fast(x), net[2](net[1](net[0](x) + 1)))
    handle.remove()
    assert torch.equal(fast.train()(x), net.train()(x)) and len(bound) == 3
    assert fast.double()(x.double()).dtype == torch.float64
