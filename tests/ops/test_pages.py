"""Memory for results: whose it is, when it is taken again, and how much of it lies idle."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from p2pfast.ops import pages
from p2pfast.ops.conv_norm_act import conv_norm_act
from p2pfast.ops.pages import empty, empty_like

MB = 1 << 20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch.empty elsewhere")


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[pages._Pool]:
    """One of its own for each test."""
    own = pages._Pool()
    monkeypatch.setattr(pages, "_pool", lambda: own)
    monkeypatch.setenv("P2PFAST_KEEP_MB", "1024")
    yield own


def floats(megabytes: float) -> Tensor:
    return empty((int(megabytes * MB) // 4,), torch.float32)


def test_taken_again_when_nothing_uses_it(pool: pages._Pool) -> None:
    first = floats(8)
    place = first.data_ptr()
    assert floats(8).data_ptr() != place
    alias = first[3:].view(torch.int32).detach()
    del first
    assert place not in {floats(8).data_ptr() for _ in range(3)}
    alias.fill_(7)
    shared = alias.numpy()
    del alias
    assert floats(8).data_ptr() != place and shared[0] == 7
    del shared
    assert place in {t.data_ptr() for t in [floats(8), floats(8)]}
    assert len(pool.blocks) == len(pool.idle()) == 2


def test_little_is_left_to_pytorch(pool: pages._Pool) -> None:
    assert floats(1).numel() == MB // 4 and not pool.blocks


def test_a_block_serves_what_is_not_much_smaller(pool: pages._Pool) -> None:
    floats(10)
    # Files hold whole storages: it has no more than was asked for.
    assert floats(8.5).untyped_storage().nbytes() == 8.5 * MB and len(pool.blocks) == 1
    floats(5)
    assert sorted(map(len, pool.blocks)) == [5 * MB, 10 * MB]


def test_no_more_lies_idle_than_asked_for(pool: pages._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_KEEP_MB", "30")
    for size in (8, 12, 16, 24):
        floats(size)
    kept = floats(40)
    # The oldest went first, and what is in use counts for nothing.
    assert sorted(map(len, pool.blocks)) == [24 * MB, 40 * MB]
    monkeypatch.setenv("P2PFAST_KEEP_MB", "0")
    assert floats(24).untyped_storage().nbytes() == 24 * MB and len(pool.blocks) == 2
    del kept


def test_without_memory_pytorch_says_so(pool: pages._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    floats(8)
    with pytest.raises(RuntimeError, match="can't allocate memory|not enough memory"):
        empty((1 << 50,), torch.float32)
    assert not pool.blocks  # given back, as it may be what is missing
    assert floats(8).numel() == 2 * MB


def test_a_fitting_block_does_not_keep_the_others(pool: pages._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    held = [floats(8) for _ in range(6)]
    del held
    monkeypatch.setenv("P2PFAST_KEEP_MB", "17")
    floats(8)
    assert len(pool.blocks) == 3


def test_another_default_device(pool: pages._Pool) -> None:
    torch.set_default_device("meta")
    try:
        assert floats(8).is_cpu and floats(1).is_cpu and empty_like(torch.empty(4, device="cpu")).is_cpu
    finally:
        torch.set_default_device(None)


def test_inference_mode(pool: pages._Pool) -> None:
    with torch.inference_mode():
        t = floats(8).add_(1)
        assert t.is_inference() and len(pool.blocks) == 1


@pytest.mark.parametrize("value", ["", "-1", "much", "1.5"])
def test_a_wrong_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_KEEP_MB", value)
    with pytest.raises(ValueError, match=f"P2PFAST_KEEP_MB is '{value}'; give a number of megabytes"):
        floats(8)
    assert floats(1) is not None


def test_layouts(pool: pages._Pool) -> None:
    last = empty((2, 3, 800, 900), torch.bfloat16, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last) and last.dtype == torch.bfloat16
    assert empty_like(last).stride() == last.stride() and not last._is_view()
    assert last.data_ptr() % 64 == 0 and len(pool.blocks) == 2


def test_deterministic_mode_fills_it(pool: pages._Pool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(floats(8).isnan().all()) and not pool.blocks
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_get_memory_of_their_own(pool: pages._Pool) -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(50):
            t = floats(4)
            t.fill_(value)
            if not bool((t == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(pool.blocks) <= 6  # two of each: the next is taken before the last is let go


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_copy() -> None:
    t = floats(4)
    t.numpy()[0] = 1
    child = os.fork()
    if child == 0:
        t.numpy()[0] = 2
        os._exit(0)
    os.waitpid(child, 0)
    assert t.numpy()[0] == 1


def test_training_steps(pool: pages._Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as in new memory, results that can be changed in place, and no more memory a step."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 256, 264).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(16, 16, 3, 3, requires_grad=True) for _ in range(2)]

    def step() -> list[Tensor]:
        y = x
        for weight in weights:
            y = conv_norm_act(y, weight, padding=1, norm="instance", act="relu")
        loss = y.mul_(2).square().mean()
        return [loss.detach(), *torch.autograd.grad(loss, weights)]

    kept = step()
    count = len(pool.blocks)
    assert count > 0 and all(torch.equal(a, b) for a, b in zip(kept, step(), strict=True))
    for _ in range(3):
        step()
    assert len(pool.blocks) <= count + 2
    monkeypatch.setenv("P2PFAST_KEEP_MB", "0")
    assert all(torch.equal(a, b) for a, b in zip(kept, step(), strict=True))
