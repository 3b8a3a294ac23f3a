"""Triton kernels: on the GPU where there is one, else in Triton's interpreter on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from p2pfast.ops.gpu import interpreted, triton_reason

# NumPy's warnings about what IEEE arithmetic defines.
INTERPRETER_WARNINGS = "ignore::RuntimeWarning:triton"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = triton_reason()
    if reason is None and not interpreted() and not torch.cuda.is_available():
        reason = "no NVIDIA GPU, and TRITON_INTERPRET=1 was not set before triton was imported"
    for item in items:
        if item.path.parent.name == "gpu_kernels":
            item.add_marker(pytest.mark.filterwarnings(INTERPRETER_WARNINGS))
            if not interpreted() and "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device() -> str:
    """Where the kernels run."""
    return "cpu" if interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New tensors hold NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
