"""What nvcc made of the CUDA kernels: registers, shared memory, and no spilling to local memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from p2pfast import _C

pytestmark = pytest.mark.skipif(not _C.build_info()["cuda"], reason=_C.build_info()["cuda_reason"] or "CUDA")

# Registers a thread, of the kernels whose mangled names contain the word. 64 leave room for 1024 threads on a
# multiprocessor, 40 for 1536.
REGISTERS = {
    "InstanceEdgesKernel": 40,
    "ImageUint8Kernel": 40,
    "LabelConvKernelIfLb0": 64,
    "LabelConvKernelINS0_8BFloat16ELb0": 64,
    "LabelConvKernelINS0_7Float16ELb0": 64,
    "LabelConvKernelIfLb1": 80,
    "LabelConvKernelINS0_8BFloat16ELb1": 80,
    "LabelConvKernelINS0_7Float16ELb1": 80,
    "LabelPoolKernel": 64,
    "LabelSameKernel": 40,
    "LabelPackKernel": 64,
    "LossKernel": 64,
    "LossSumKernel": 64,
    "ScaleKernel": 40,
    "PoolSumKernel": 64,
    "PoolMeanKernel": 64,
    "PoolWriteKernel": 40,
}


def cuobjdump() -> str:
    """The disassembler of the toolkit, or the one that Triton brings along."""
    candidates = [shutil.which("cuobjdump")]
    candidates += [
        f"{os.environ[name]}/bin/cuobjdump" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    spec = find_spec("triton")
    if spec is not None and spec.origin is not None:
        candidates.append(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for path in candidates:
        if path is not None and os.access(path, os.X_OK):
            return path
    pytest.skip("cuobjdump is neither in PATH nor in CUDA_HOME nor in Triton")


def usage() -> dict[tuple[str, str], dict[str, int]]:
    """Of every kernel in the module: (architecture, mangled name) to what it uses."""
    output = subprocess.run(
        [cuobjdump(), "-res-usage", _C.__file__], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = name = ""
    for line in output.splitlines():
        if line.startswith("arch ="):
            architecture = line.split()[-1]
        elif match := re.match(r" Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            found[architecture, name] = {
                k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            }
    return found


def test_registers_and_no_spills() -> None:
    kernels = usage()
    assert {architecture for architecture, _ in kernels} == {"sm_80", "sm_90a"}
    unknown = {name for _, name in kernels if not any(word in name for word in REGISTERS)}
    assert not unknown, "give the new kernel a bound in REGISTERS"
    for word, bound in REGISTERS.items():
        assert any(word in name for _, name in kernels), word
        for key, used in kernels.items():
            if word in key[1]:
                assert used["REG"] <= bound and used["STACK"] == used["LOCAL"] == 0, (key, used)
                assert used["SHARED"] <= 48 * 1024, (key, used)


# Kernels by words of their mangled names, and the loads and stores of 8 or 16 bytes they must have.
VECTORS = {
    "LossKernelILNS_4LossE0": ("LDG.E.128", "STG.E.128"),
    "LossKernelILNS_4LossE4": ("LDG.E.128", "STG.E.128"),
    "LabelConvKernelINS0_8BFloat16ELb0": ("LDG.E.128", "LDS.128", "STG.E.64"),
    "ImageUint8KernelIfLi3": ("LDG.E.128",),
}


@pytest.mark.parametrize("word", VECTORS)
def test_vector_loads_and_stores(word: str) -> None:
    (name,) = {name for _, name in usage() if word in name}
    command = [cuobjdump(), "-sass", "-arch", "sm_90a", "-fun", name, _C.__file__]
    code = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    for instruction in VECTORS[word]:
        assert instruction in code, f"{name} has no {instruction}"
