"""Writes docs/networks.md: every network of the zoo, what of it is fused, and how fast it is on this machine.

    python benchmarks/networks_page.py            about 4 minutes on 2 cores; on an idle machine

torch.compile takes 10 to 60 s a network to compile, so only as many are compared with it as fit into
--seconds, those of the pix2pix family first; a later run finds their code in PyTorch's cache.
"""

from __future__ import annotations

import argparse
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

COMPARED_FIRST = (
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
that was done to it. Fused is how many of its convolutions ran in native kernels. Times are the least of
interleaved calls in float32, evaluation mode; a number above 1 means that p2pfast is faster. – means not
measured: torch.compile takes long to compile.

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
    parser.add_argument("--seconds", type=float, default=240.0, help="stop comparing with torch.compile then")
    parser.add_argument("--only", nargs="*", default=list(ZOO), metavar="NETWORK", help="these alone")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "networks.md")
    options = parser.parse_args()
    begin = time.perf_counter()
    one: dict[str, Timing] = {}
    four: dict[str, Timing] = {}
    for name in options.only:
        one[name] = measure(*realistic(name, 1), seconds=0.5)
        four[name] = measure(*realistic(name, 4), seconds=0.5)
        print(row(name, one[name], four[name]), end="", flush=True)
    for name in [n for n in COMPARED_FIRST if n in one]:
        if time.perf_counter() - begin > options.seconds:
            break
        one[name] = measure(*realistic(name, 1), seconds=1.0, with_compile=True)
        print(row(name, one[name], four[name]), end="", flush=True)
    machine = (
        f"{_C.processor_name()} ({_C.active_level()}, {torch.get_num_threads()} threads), "
        f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    text = HEAD.format(machine=machine) + "".join(row(name, one[name], four[name]) for name in one) + TAIL
    options.out.write_text(text + "".join(f"- {name}: {ZOO[name].paper}\n" for name in one), encoding="utf-8")


if __name__ == "__main__":
    main()
