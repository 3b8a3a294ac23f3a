"""Writes docs/networks.md: every network of the zoo, what of it is fused, and how fast it is on this machine.

    python benchmarks/networks_page.py            about 5 minutes on 2 cores; on an idle machine

torch.compile takes 10 to 60 s a network to compile, so only some are compared with it. What is measured is
kept in --rows until that file is removed, so that the page can be made in parts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("P2PFAST_TUNE", "on")

import torch  # noqa: E402
from zoo.registry import ZOO  # noqa: E402
from zoo.timing import Timing, measure, realistic  # noqa: E402

from p2pfast import _C  # noqa: E402

COMPARED = (
    "cyclegan-generator",
    "pix2pix-unet",
    "pix2pix-discriminator",
    "dcgan-generator",
    "stargan-generator",
    "discogan-generator",
    "pix2pixhd-generator",
    "pix2pixhd-discriminator",
)
HEAD = """# Networks of other people, optimised

Made by `python benchmarks/networks_page.py` on {machine}.

Each network is a plain PyTorch one written from its paper (`tests/zoo/`); `p2pfast.optimize(network)` is all
that was done to it. Fused is how many of its convolutions ran in native kernels at batch 1; with 0, its own
modules measured faster than a plan and PyTorch runs them. Times are the least of
interleaved calls in float32, evaluation mode; a number above 1 means that p2pfast is faster, below 1 that it
is slower; small networks vary by a tenth from run to run. – means not measured: torch.compile takes long to
compile.

| network | width, size | fused | eager | p2pfast | over eager | at batch 4 | over torch.compile |
|---|---|---|---|---|---|---|---|
"""
TAIL = """
## Where they come from

"""


def row(name: str, one: Timing, four: Timing | None) -> str:
    width, size = ZOO[name].real
    batch = "–" if four is None else f"{four.speedup:.2f}"
    compiled = "–" if one.compiled is None else f"{one.compiled / one.fast:.2f}"
    times = f"{one.eager * 1e3:.1f} ms | {one.fast * 1e3:.1f} ms | {one.speedup:.2f} | {batch} | {compiled}"
    return f"| {name} | {width}, {size}² | {one.fused}/{one.convolutions} | {times} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="stop then; a later run goes on")
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "build" / "networks.json", help="what is measured"
    )
    parser.add_argument("--only", nargs="*", default=list(ZOO), metavar="NETWORK", help="these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "networks.md")
    options = parser.parse_args()
    begin = time.perf_counter()
    rows: dict[str, str] = {}
    if options.rows.exists():
        rows = json.loads(options.rows.read_text())
    for name in [n for n in options.only if n not in rows]:
        if time.perf_counter() - begin > options.seconds:
            print(f"stopped before {name}: run it again, it goes on from {options.rows}")
            break
        with_compile = name in COMPARED
        one = measure(*realistic(name, 1), seconds=0.5, with_compile=with_compile)
        rows[name] = row(name, one, measure(*realistic(name, 4), seconds=0.5))
        options.rows.write_text(json.dumps(rows))
        print(rows[name], end="", flush=True)
    machine = (
        f"{_C.processor_name()} ({_C.active_level()}, {torch.get_num_threads()} threads), "
        f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    text = HEAD.format(machine=machine) + "".join(rows[name] for name in ZOO if name in rows) + TAIL
    options.out.write_text(
        text + "".join(f"- {name}: {ZOO[name].paper}\n" for name in rows), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
