"""Every shipped configuration of the Triton kernels compiles for every target, without a GPU.

In a process of its own: in this one kernels may be interpreted. Triton keeps what it compiled on disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p2pfast.ops.gpu import Shipped
from p2pfast.ops.gpu.compile import TARGETS, Compiled, compile_one, main, modules, table

PAGE = Path(__file__).parents[2] / "docs" / "gpu_kernels.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "p2pfast.ops.gpu.compile", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def cases() -> list[Any]:
    """Matrix products take a second or two to compile, and have many configurations."""
    found: list[Any] = []
    for operator in modules():
        if operator in ("norm", "norm_act"):
            found.append(pytest.param(operator, TARGETS, id=operator))
        else:
            found.append(pytest.param(operator, (90,), id=f"{operator}, sm_90"))
            found.append(pytest.param(operator, (80, 100), id=f"{operator}, others", marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("operator", "targets"), cases())
def test_compiles_without_spills(operator: str, targets: tuple[int, ...]) -> None:
    result = run(operator, "--json", "--targets", *map(str, targets))
    assert result.returncode == 0, result.stderr
    found = [Compiled(**r) for r in json.loads(result.stdout)]
    assert {r.target for r in found} == set(targets)
    assert all(r.registers <= 255 and not r.problems for r in found)
    if operator in ("norm", "norm_act"):
        # Loads of 16 bytes a thread, but for images whose rows are not aligned to them.
        odd = ("255x255", "511x511", "127x127", "frozen statistics")
        assert all(r.load == 128 for r in found if not r.name.endswith(odd))
        page = PAGE.read_text()
        assert not [r.name for r in found if f"| {r.name} |" not in page], "write docs/gpu_kernels.md again"
    print(table(found))


def test_a_missing_parameter_is_named() -> None:
    kernel = SimpleNamespace(arg_names=["x", "pixels"])
    with pytest.raises(ValueError, match="norm: statistics lacks pixels of its kernel's parameters"):
        compile_one("norm", Shipped("statistics", kernel, {"x": "*fp32"}, {}), 90)


def test_unknown_operators_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mish"])
    assert "mish: no Triton kernels; choose of" in capsys.readouterr().err


def test_table() -> None:
    spilled = ("8 bytes of a thread are spilled",)
    results = [
        Compiled("conv", "3x3", 80, 4, 3, 100, 0, 4096, "mma.sync", 128),
        Compiled("conv", "3x3", 90, 4, 3, 255, 8, 4096, "", 128, spilled),
    ]
    assert table(results).splitlines()[2] == (
        "| 3x3 | 4 | 3 | 128 | 100 / 4096 | 8 bytes of a thread are spilled | mma.sync (sm_80) |"
    )
