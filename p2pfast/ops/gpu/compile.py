"""Compiles every shipped configuration of the Triton kernels ahead of time; needs Triton but no GPU.

    python -m p2pfast.ops.gpu.compile                      a table of registers and shared memory
    python -m p2pfast.ops.gpu.compile norm --targets 90    one operator, one architecture
    python -m p2pfast.ops.gpu.compile --json               the same for programs
    python -m p2pfast.ops.gpu.compile --page > docs/gpu_kernels.md

The exit status is 1 where a configuration spills registers, needs more shared memory than its target has, or
lacks the tensor-core instructions it should have.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import p2pfast.ops
from p2pfast.ops.gpu.launch import Shipped
from p2pfast.ops.gpu.support import require_triton

TARGETS = (80, 90, 100)
# The most a block can ask for, of the data-centre part of each generation (A100, H100, B200).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_DESCRIPTORS_FROM = 90
_MATRIX = re.compile(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma")
_LOADS = re.compile(r"\b(?:ld\.global|cp\.async\.c[ag])[^;]*;")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a configuration.

    Attributes:
        target: 80 for sm_80 and so on.
        registers: of a thread.
        stack: bytes of a thread in local memory; not zero where registers are spilled.
        shared: bytes of a block.
        matrix: the kind of tensor-core instruction, or "".
        load: bits of the widest load of a thread.
        problems: what should not be so.
    """

    operator: str
    name: str
    target: int
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    matrix: str
    load: int
    problems: tuple[str, ...] = ()


def modules() -> list[str]:
    """The operators that have Triton kernels."""
    return sorted(path.parent.name for path in Path(p2pfast.ops.__path__[0]).glob("*/triton.py"))


@functools.cache
def shipped(operator: str) -> list[Shipped]:
    """What ``shipped()`` of ``p2pfast.ops.<operator>.triton`` lists."""
    module = importlib.import_module(f"p2pfast.ops.{operator}.triton")
    found: list[Shipped] = getattr(module, "shipped", list)()
    return found


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as the toolkit's own tool reads them."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if match is None:
        raise RuntimeError(f"{tool} reports no resource usage: {text!r}")
    registers, stack, local = (int(number) for number in match.groups())
    return registers, stack + local


def _load_bits(ptx: str) -> int:
    """Of the widest load from global memory."""
    widest = 0
    for load in _LOADS.findall(ptx):
        copied = re.search(r"\],\s*(0x[0-9a-f]+|\d+)\s*[,;]", load)
        if load.startswith("cp.async"):
            widest = max(widest, 8 * int(copied[1], 0) if copied else 0)
        elif width := re.search(r"(?:\.v(\d))?\.[bufs](\d+)\b", load):
            widest = max(widest, int(width[2]) * int(width[1] or 1))
    return widest


def _source(operator: str, config: Shipped) -> Any:
    """What Triton compiles. Raises ValueError for a configuration that lacks parameters."""
    from triton.compiler import ASTSource

    names = config.kernel.arg_names
    missing = [n for n in names if n not in config.signature and n not in config.constexprs]
    if missing:
        raise ValueError(f"{operator}: {config.name} lacks {', '.join(missing)} of its kernel's parameters")
    signature = {n: "constexpr" if n in config.constexprs else config.signature[n] for n in names}
    aligned = config.aligned
    if aligned is None:
        aligned = tuple(n for n, kind in signature.items() if kind.startswith("*") or kind == "i32")
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if signature[n] != "constexpr"}
    return ASTSource(config.kernel, signature, constexprs=dict(config.constexprs), attrs=hints)


def front_end(config: Shipped, target: int) -> str:
    """Triton's intermediate code of a configuration, before anything is made of it: takes a tenth of the time
    of compiling, and finds what the interpreter does not mind."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    goal = GPUTarget("cuda", target, 32)
    backend, context = make_backend(goal), ir.context()
    options = backend.parse_options({"num_warps": config.num_warps, "num_stages": config.num_stages})
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(_source(config.name, config).make_ir(goal, options, functions, modules, context))


def compile_one(operator: str, config: Shipped, target: int) -> Compiled:
    """Compiles a configuration for a target (80, 90, 100)."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = _source(operator, config)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    registers, stack = _resources(kernel.asm["cubin"])
    ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
    kinds = sorted(set(_MATRIX.findall(ptx)))
    problems = []
    if stack:
        problems.append(f"{stack} bytes of a thread are spilled")
    if shared > SHARED_LIMIT[target]:
        problems.append(f"{shared} bytes of shared memory; sm_{target} has {SHARED_LIMIT[target]}")
    if config.descriptor and "cp.async.bulk.tensor" not in ptx:
        problems.append("weights are not copied by hardware")
    if config.matmul and not kinds:
        problems.append("no tensor-core instructions")
    return Compiled(
        operator=operator,
        name=config.name,
        target=target,
        warps=config.num_warps,
        stages=config.num_stages,
        registers=registers,
        stack=stack,
        shared=shared,
        matrix=", ".join(kinds),
        load=_load_bits(ptx),
        problems=tuple(problems),
    )


Job = tuple[str, Shipped, int]  # operator, configuration, target
_jobs: list[Job] = []  # of the processes that are forked: kernels cannot be sent to others


def _job(number: int) -> Compiled:
    operator, config, target = _jobs[number]
    try:
        return compile_one(operator, config, target)
    except Exception as error:  # one that does not compile is a line of the table
        text = f"does not compile: {type(error).__name__}: {error}"
        return Compiled(
            operator, config.name, target, config.num_warps, config.num_stages, 0, 0, 0, "", 0, (text,)
        )


def compile_each(jobs: list[Job], workers: int | None = None) -> list[Compiled]:
    """Configurations for targets, on ``workers`` processes (as many as there are processors); those with
    descriptors not for targets that have none."""
    if workers is None:
        workers = len(os.sched_getaffinity(0))
    _jobs[:] = [job for job in jobs if job[2] >= _DESCRIPTORS_FROM or not job[1].descriptor]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(max(1, min(workers, len(_jobs))), mp_context=context) as pool:
        return list(pool.map(_job, range(len(_jobs))))


def compile_all(
    operators: list[str], targets: tuple[int, ...] = TARGETS, workers: int | None = None
) -> list[Compiled]:
    """Every configuration for every target."""
    return compile_each([(o, c, t) for o in operators for c in shipped(o) for t in targets], workers)


def table(results: list[Compiled]) -> str:
    """Markdown: a line a configuration, "registers / shared memory in bytes" for each target."""
    targets = sorted({r.target for r in results})
    operators = len({r.operator for r in results}) > 1
    matrix = any(r.matrix for r in results)
    columns = ["operator"] * operators + ["configuration", "warps", "stages", "load bits"]
    columns += [f"sm_{target}" for target in targets] + ["tensor cores"] * matrix
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    by_config: dict[tuple[str, str], list[Compiled]] = {}
    for result in results:
        by_config.setdefault((result.operator, result.name), []).append(result)
    for (operator, name), found in by_config.items():
        of = {r.target: r for r in found}
        load = max(r.load for r in found)
        cells = [operator] * operators + [name, str(found[0].warps), str(found[0].stages), str(load)]
        for target in targets:
            cells.append(_cell(of.get(target)))
        if matrix:
            cells.append(", ".join(f"{of[t].matrix} (sm_{t})" for t in targets if t in of and of[t].matrix))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(result: Compiled | None) -> str:
    if result is None:
        return "not for it"
    return "; ".join(result.problems) if result.problems else f"{result.registers} / {result.shared}"


def page(results: list[Compiled]) -> str:
    """docs/gpu_kernels.md: the table, an operator at a time, and what it says."""
    import triton

    introduction = f"""# What the Triton kernels compile to

Written by `python -m p2pfast.ops.gpu.compile --page > docs/gpu_kernels.md`, which needs no GPU, with
Triton {triton.__version__}. These kernels have been compiled, and run in Triton's interpreter against the
references in float64; **they have not run on hardware**, and nothing here is a time.

For each target: registers of a thread / bytes of shared memory of a block. *Load bits* is the widest load of
a thread from global memory (128 is the most there is; odd sizes have less). Where a configuration spills
registers, its cell says so; with the Triton of the tests none does (`tests/gpu_kernels/test_compile.py`)."""
    lines = [introduction]
    for operator in sorted({r.operator for r in results}):
        lines += ["", f"## {operator}", "", table([r for r in results if r.operator == operator])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m p2pfast.ops.gpu.compile", description=__doc__)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(modules())}; all")
    parser.add_argument("--targets", nargs="+", type=int, choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--workers", type=int, help="processes")
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")
    parser.add_argument("--page", action="store_true", help="the documentation's page")
    options = parser.parse_args(arguments)
    unknown = set(options.operators) - set(modules())
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: no Triton kernels; choose of {', '.join(modules())}")
    os.environ.pop("TRITON_INTERPRET", None)  # asked for when the kernels are defined, below
    require_triton()
    results = compile_all(options.operators or modules(), tuple(options.targets), options.workers)
    if options.json:
        print(json.dumps([dataclasses.asdict(r) for r in results]))
    else:
        print(page(results) if options.page else table(results))
    failed = [r for r in results if r.problems]
    for r in failed:
        print(f"{r.operator}: {r.name} for sm_{r.target}: {'; '.join(r.problems)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
