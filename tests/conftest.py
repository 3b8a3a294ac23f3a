from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator

# Before torch is imported: two threads exercise the parallel code without fighting over small machines.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Estimates instead of measurements: the same kernels on every machine, and no cache outside the tests.
os.environ.setdefault("P2PFAST_TUNE", "off")
# Triton's kernels run in its interpreter where there is no GPU; the choice is made when they are defined.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Another build of the native module, such as the one with 16 lanes made of AVX2 instructions.
if os.environ.get("P2PFAST_TEST_MODULE"):
    _spec = importlib.util.spec_from_file_location("p2pfast._C", os.environ["P2PFAST_TEST_MODULE"])
    assert _spec is not None and _spec.loader is not None
    sys.modules["p2pfast._C"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["p2pfast._C"])

import pytest  # noqa: E402
import torch  # noqa: E402
from levels import RUNNABLE_LEVELS, TESTED_LEVELS  # noqa: E402

from p2pfast import _C  # noqa: E402


def pytest_report_header() -> list[str]:
    lacking = [f"not {level} ({_C.missing_for(level)})" for level in _C.levels() if _C.missing_for(level)]
    emulated = " (16 lanes emulated with AVX2)" if _C.build_info()["emulate_wide"] else ""
    return [f"instruction-set levels: {', '.join(RUNNABLE_LEVELS + lacking)}{emulated}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU here (torch.cuda.is_available() is false)")
    for item in items:
        if item.get_closest_marker("gpu") is not None:  # keywords have the names of folders, too
            item.add_marker(skip)


@pytest.fixture(params=TESTED_LEVELS)
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at every instruction-set level that this build is tested for and the machine has."""
    before = _C.active_level()
    _C.set_active_level(request.param)
    yield request.param
    _C.set_active_level(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure of ours is an error instead of a warning and PyTorch's answer."""
    monkeypatch.setenv("P2PFAST_STRICT", "1")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """TorchDynamo forgets what it compiled for other tests, and afterwards what it compiled for this one."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
