"""Where the time of a network goes: its layers in groups of one shape, with the floor of each.

    python benchmarks/layers.py pix2pixhd-local:2048x1024 [--dtype bfloat16] [--runs 5]

The floor of a group is the longer of two times: its arithmetic, as really done, at the speed of the matrix
kernel on operands in the caches, and the bytes it reads and writes at the speed of a copy; both measured
here. Layers whose regions of one label are copied do less arithmetic than counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import p2pfast


def beside(name: str) -> ModuleType:
    """A script of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Group:
    layers: int = 0
    seconds: float = 0.0
    operations: float = 0.0
    bytes: float = 0.0


def groups(case: str, dtype: torch.dtype, runs: int) -> dict[tuple[str, str], Group]:
    """The quickest of some runs of each layer, summed over layers of one kernel and shape."""
    name, _, size = case.partition(":")
    width, height = (int(side) for side in size.split("x"))
    model, _, given = beside("engines").network(name, width, height)
    fast = p2pfast.optimize(model, dtype=dtype)
    fast(given)
    found = []
    for _ in range(runs):
        fast(given)
        found.append(p2pfast.explain(fast).rows)
    result: dict[tuple[str, str], Group] = {}
    for rows in zip(*found, strict=True):
        best = min(rows, key=lambda row: row.seconds)
        group = result.setdefault((best.detail or best.kernel, best.kernel), Group())
        group.layers += 1
        group.seconds += best.seconds
        group.operations += best.gigaflops * 1e9 * best.seconds
        group.bytes += best.megabytes * 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", metavar="NETWORK:WIDTHxHEIGHT")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    peak = beside("peak").measure()
    print(f"{options.case} {options.dtype}, {torch.get_num_threads()} threads: ", end="")
    print(f"{peak.gflops:.0f} GFLOP/s of the matrix kernel, {peak.gb_per_s:.1f} GB/s of a copy\n")
    print("| layers | kernel | ms | floor, ms | share |\n|---|---|---|---|---|")
    total = Group()
    floors = 0.0
    for (detail, kernel), group in groups(options.case, getattr(torch, options.dtype), options.runs).items():
        gflops = peak.pairs_gflops if "pairs" in kernel else peak.gflops
        floor = max(group.operations / (gflops * 1e9), group.bytes / (peak.gb_per_s * 1e9))
        times = f"{group.layers} × " if group.layers > 1 else ""
        cells = (f"{group.seconds * 1e3:.1f}", f"{floor * 1e3:.1f}", f"{floor / group.seconds:.0%}")
        print(f"| {times}{detail} | {kernel} | " + " | ".join(cells) + " |")
        total.seconds += group.seconds
        floors += floor
    share = floors / total.seconds
    print(f"| all | | {total.seconds * 1e3:.0f} | {floors * 1e3:.0f} | {share:.0%} |")


if __name__ == "__main__":
    main()
