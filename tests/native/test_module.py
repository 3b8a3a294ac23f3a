"""The built module: what it links to, and which instructions may run before a level is chosen."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from p2pfast import _C

MODULE = Path(_C.__file__)


def output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_links_neither_torch_nor_cuda() -> None:
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", str(MODULE)))
    assert needed
    for library in needed:
        assert not re.match(r"lib(torch|c10|cuda|nv|python)", library), needed


def test_exports_only_the_module() -> None:
    symbols = output("nm", "-D", "--defined-only", str(MODULE))
    exported = [line.split()[-1] for line in symbols.splitlines()]
    own = [name for name in exported if "p2pfast" in name]
    assert "PyInit__C" in exported and own == []


@functools.cache
def disassembly() -> list[tuple[str, str]]:
    """Every instruction with the function that it belongs to."""
    if not (MODULE.stat().st_size < 200e6 and "avx2" in _C.levels()):
        pytest.skip("not an x86-64 build")
    found, function = [], ""
    for line in output("objdump", "-d", "--no-show-raw-insn", "-C", str(MODULE)).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        else:
            found.append((function, line))
    return found


def test_code_outside_the_levels_is_baseline() -> None:
    """A processor without AVX must be able to load the module and be told which level it has.

    Everything the linker could have taken from a kernel file by mistake (an inline function of a
    header, compiled with AVX) would show up outside the levels' namespaces.
    """
    wrong: dict[str, str] = {}
    for function, line in disassembly():
        if re.search(r"\t(v[a-z0-9]+)\s.*%[xyz]mm", line) and not re.search(
            r"p2pfast::(avx2|avx512|avx512_bf16)::", function
        ):
            wrong.setdefault(function, line.strip())
    assert wrong == {}


def test_pairs_use_the_instruction_where_there_is_one() -> None:
    using = {function for function, line in disassembly() if "\tvdpbf16ps" in line}
    assert all("p2pfast::avx512_bf16::" in function for function in using)
    assert bool(using) != _C.build_info()["emulate_wide"]
