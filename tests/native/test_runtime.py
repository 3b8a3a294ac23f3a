from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from p2pfast import _C
from p2pfast.ops import threads
from p2pfast.ops.conv.op import conv


def test_levels() -> None:
    levels = _C.levels()
    assert levels[0] == "baseline" and _C.active_level() in levels and _C.supported_level() in levels
    assert _C.missing_for(_C.supported_level()) == ""


def test_set_active_level(cpu_level: str) -> None:
    assert _C.active_level() == cpu_level


def test_pairs_are_multiplied_where_there_are_instructions(cpu_level: str) -> None:
    emulated = _C.build_info()["emulate_wide"]
    assert _C.multiplies_pairs() == (cpu_level == "avx512_bf16" and not emulated)


def test_wrong_level_keeps_the_active_one() -> None:
    before = _C.active_level()
    with pytest.raises(RuntimeError, match=r'set_active_level\("sse9"\): unknown instruction-set level'):
        _C.set_active_level("sse9")
    for level in _C.levels():
        missing = _C.missing_for(level)
        if missing:
            with pytest.raises(RuntimeError, match=f"lacks {missing.split(',')[0]}"):
                _C.set_active_level(level)
    assert _C.active_level() == before


def test_missing_for_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="sse9"):
        _C.missing_for("sse9")


def test_threads_belong_to_the_calling_thread() -> None:
    before = _C.num_threads()
    seen: list[int] = []

    def other() -> None:
        _C.set_num_threads(3)
        seen.append(_C.num_threads())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [3] and _C.num_threads() == before


@pytest.mark.parametrize("threads", [0, -1])
def test_needs_a_thread(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads is {threads}"):
        _C.set_num_threads(threads)


def test_build_info() -> None:
    info = _C.build_info()
    assert info["compiler"] and info["levels"] == _C.levels()
    assert bool(info["cuda"]) == bool(info["cuda_architectures"]) == (not info["cuda_reason"])
    if info["cuda"]:
        assert info["cuda_architectures"].split() == ["sm_80", "sm_90a", "compute_90"]
        assert hasattr(_C, "cuda_instance_edges")


def test_kernels_run_on_borrowed_threads() -> None:
    """The same bits on PyTorch's threads as on our own."""
    x = torch.randn(2, 20, 33, 40)
    weight = torch.randn(24, 20, 3, 3)
    borrowed = conv(x, weight)
    _C.set_parallel_region(0)
    try:
        assert torch.equal(conv(x, weight), borrowed)
    finally:
        threads._find_openmp.cache_clear()
    assert torch.equal(conv(x, weight), borrowed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    x, weight = torch.randn(1, 16, 30, 30), torch.randn(16, 16, 3, 3)
    expected = conv(x, weight)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(conv(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
