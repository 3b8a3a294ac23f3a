"""What published networks launch at full size, and steps of training would time, compiles for an H100: the
very kernels, with their sizes and strides, in a process without the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The other precisions have few kernels that differ in more than the type of what they load: of them what has
# spilled registers before. `launches.py` without arguments takes minutes.
CASES = ["bfloat16", "train pix2pixhd-multiscale-d float32"]


@pytest.mark.slow
def test_launches_of_published_networks_compile() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    program = str(Path(__file__).with_name("launches.py"))
    result = subprocess.run(
        [sys.executable, program, *CASES], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    *cases, last = result.stdout.strip().splitlines()
    assert len(cases) == 11 and last.endswith(" 0 wrong")
    for case in cases:
        kernels = ["conv_kernel", *(["_products_kernel"] if case.startswith("train") else [])]
        assert all(kernel in case for kernel in kernels), case
    assert "1 thin_kernel" in cases[0]
