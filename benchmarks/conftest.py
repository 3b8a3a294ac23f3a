from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p2pfast import _C


def _load_peak() -> Any:
    """peak.py beside this file, wherever pytest was started."""
    spec = importlib.util.spec_from_file_location("benchmarks_peak", Path(__file__).with_name("peak.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PEAK = _load_peak()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the sizes of a 2048x1024 image instead of small ones"
    )


def pytest_report_header() -> list[str]:
    return [
        f"processor: {_C.processor_name()}, level {_C.active_level()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    ]


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    _C.set_num_threads(torch.get_num_threads())
    with torch.inference_mode():
        yield


@pytest.fixture
def compare(benchmark: Any) -> Callable[..., None]:
    """Times a function and records it against PyTorch and the machine's peaks.

    ``compare(function, torch_function, bytes_moved, multiplications=0, dense=0)``: multiplications are those
    that are really done, dense those of the plain algorithm. Validate before calling it.
    """

    def run(
        function: Callable[[], object],
        torch_function: Callable[[], object],
        bytes_moved: int,
        multiplications: float = 0.0,
        dense: float = 0.0,
        rounds: int = 5,
    ) -> None:
        info = benchmark.extra_info
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
        info["threads"] = torch.get_num_threads()
        info["level"] = _C.active_level()
        info["bytes"] = bytes_moved
        info["multiplications"] = multiplications
        if benchmark.stats is None:  # with --benchmark-disable
            return
        seconds = benchmark.stats.stats.median
        machine = PEAK.measure()
        info["gb_per_s"] = bytes_moved / seconds * 1e-9
        info["share_of_copy_peak"] = info["gb_per_s"] / machine.gb_per_s
        if multiplications:
            info["gflop_per_s"] = 2e-9 * multiplications / seconds
            info["share_of_peak"] = info["gflop_per_s"] / machine.gflops
            info["dense_gflop_per_s"] = 2e-9 * dense / seconds
        info["times_faster_than_torch"] = PEAK.median(torch_function) / seconds

    return run
