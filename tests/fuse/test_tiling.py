"""Bands: the same answer as with every tensor kept, and less memory."""

from __future__ import annotations

import copy
from math import ceil
from typing import Any

import pytest
import torch
from networks import drops, leaves, make, relative, street
from torch import nn

import p2pfast
from p2pfast import models
from p2pfast.runtime import planning
from p2pfast.runtime.memory import OutOfMemory
from p2pfast.runtime.tiling import Chooser

INSTANCE = models.norm_layer_of("instance")


@pytest.fixture(autouse=True)
def _untuned(monkeypatch: pytest.MonkeyPatch, strict: None) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "off")


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes networks with a memory limit do without a share of their tensors, in bands of some bytes."""

    def forced(share: float, band_bytes: int) -> None:
        def choose(self: Chooser, candidates: set[int], budget: int) -> tuple[frozenset[int], int]:
            there = sorted(b for b in candidates if self.sizes.get(b, 0) > 0)
            chosen = (b for i, b in enumerate(there) if ceil((i + 1) * share) > ceil(i * share))
            return frozenset(chosen), 0

        class Banded(planning.Planner):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                self.band_bytes = band_bytes

        monkeypatch.setattr(Chooser, "choose", choose)
        monkeypatch.setattr(planning, "Planner", Banded)

    return forced


def plan_of(fast: nn.Module) -> Any:
    return fast.__dict__["_p2pfast"].engine.last[0]


def compare(net: nn.Module, inputs: tuple[Any, ...], dense: tuple[Any, ...] | None = None) -> Any:
    """Runs the network in bands and in float64; the plan of the bands."""
    net.train()
    fast = p2pfast.optimize(copy.deepcopy(net), memory_limit="900GB")
    torch.manual_seed(3)
    found = fast(*inputs)
    reference = copy.deepcopy(net)
    given = dense or inputs
    if not drops(net):  # masks of float64 and float32 differ
        reference, given = (
            reference.double(),
            tuple(x.double() if x.is_floating_point() else x for x in given),
        )
    torch.manual_seed(3)
    with torch.no_grad():
        expected = reference(*given)
    for e, f in zip(leaves(expected), leaves(found), strict=True):
        assert relative(f, e) < 1e-5
    for (key, a), (_, b) in zip(fast.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5), key
    return plan_of(fast)


SOME = (
    "global-affine local local-three-batch encoder-batch unet-batch unet-instance resnet-dropout resnet-none "
    "patchgan-instance pixel multiscale"
)


@pytest.mark.parametrize("name", SOME.split())
def test_answer(name: str, force: Any) -> None:
    force(0.5, 3000)
    net, inputs = make(name)
    assert compare(net, inputs).bands > 1


@pytest.mark.parametrize("name", ["global", "local-zero", "resnet-batch", "unet-none"])
def test_nothing_kept_and_single_rows(name: str, force: Any) -> None:
    force(1.0, 1 if name == "resnet-batch" else 20_000)
    net, inputs = make(name)
    assert compare(net, inputs).bands > 1


@pytest.mark.parametrize("size", [(37, 41), (50, 34)])
@pytest.mark.parametrize("padding", ["reflect", "zero", "replicate"])
def test_odd_sizes(size: tuple[int, int], padding: str, force: Any) -> None:
    force(0.7, 5000)
    compare(models.GlobalGenerator(3, 3, 4, 2, 1, INSTANCE, padding), (torch.randn(1, 3, *size),))


def test_many_channels_are_brought_to_nhwc_in_bands(force: Any) -> None:
    force(1.0, 30_000)
    compare(models.GlobalGenerator(19, 3, 4, 1, 1, INSTANCE), (torch.randn(2, 19, 24, 32),))


@pytest.mark.parametrize("enhancers", [0, 1])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_label_maps(enhancers: int, share: float, force: Any) -> None:
    force(share, 100_000)
    one, two = street(1), street(2)
    labels = p2pfast.LabelMap(
        torch.cat([one.labels, two.labels]), torch.cat([one.instances, two.instances]), num_classes=35
    )
    net: nn.Module = models.GlobalGenerator(36, 3, 4, 1, 1, INSTANCE)
    if enhancers:
        net = models.LocalEnhancer(36, 3, 4, 1, 1, 1, 1, INSTANCE)
    compare(net, (labels,), (labels.dense(),))


def test_the_number_of_threads_changes_nothing(force: Any) -> None:
    force(0.5, 10_000)
    net, inputs = make("local")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(p2pfast.optimize(net, memory_limit="1GB")(*inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_limit_is_kept() -> None:
    net = models.LocalEnhancer(36, 3, 8, 2, 2, 1, 2, INSTANCE)
    labels = street(3, 512, 1024)
    whole = p2pfast.optimize(net)
    expected = whole(labels)
    needed = plan_of(whole).arena_bytes + plan_of(whole).packed_bytes
    fixed = 900 * labels.labels.numel() // 32  # parameters, maps and the result
    for share in (0.9, 0.7):
        banded = p2pfast.optimize(net, memory_limit=fixed + int(share * needed))
        assert relative(banded(labels), expected) < 1e-5
        plan = plan_of(banded)
        assert plan.bands > 1 and plan.arena_bytes + plan.packed_bytes <= plan.memory < needed


@pytest.mark.parametrize("limit", ["1KB", "200KB"])
def test_an_impossible_limit_is_an_error_that_says_what_to_do(limit: str) -> None:
    net = models.GlobalGenerator(3, 3, 4, 2, 1, INSTANCE)
    with pytest.raises(OutOfMemory, match="(?s)(memory|limit).*(raise|smaller)"):
        p2pfast.optimize(net, memory_limit=limit)(torch.randn(1, 3, 32, 48))
