"""Choosing algorithms by measurement, and the cache of choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import p2pfast
from p2pfast import _C
from p2pfast.runtime import choice


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    return tmp_path


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
def test_blocks_are_shared_evenly(threads: int, height: int, width: int) -> None:
    """Every thread gets as many blocks as the others, and a block is whole groups of rows, nearly."""
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
