"""What the first call with a new shape costs: once with nothing remembered, once with choices from disk.

    python benchmarks/startup.py pix2pixhd-local:2048x1024 --repeats 2

A start-up is the first call's time less that of a later call. Large blocks of memory are filled with pages as
they are made, so that the time in which the system hands them out is known by itself: a virtual machine may
take seconds for what others do in a tenth of one. Both parts are printed, in seconds; each measurement is a
process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from engines import network
from machine import hardware

import p2pfast
from p2pfast.ops import pages

_HUGE, _POPULATE = 14, 23  # advice of madvise: huge pages; fill with pages for writing (Linux 5.14)


class Populated:
    """Fills blocks as they are made, in place of the mere wish for large pages."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._advise = ctypes.CDLL(None, use_errno=True).madvise
        self._advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def __call__(self, start: int, size: int, _: int) -> int:
        self._advise(start, size, _HUGE)
        begin = time.perf_counter()
        if self._advise(start, size, _POPULATE):
            raise OSError(ctypes.get_errno(), "madvise(MADV_POPULATE_WRITE) needs Linux 5.14")
        self.seconds += time.perf_counter() - begin
        self.bytes += size
        return 0


def child(case: str, dtype: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    name, size = case.split(":")
    width, height = (int(side) for side in size.split("x"))
    model, _, given = network(name, width, height)
    populated = Populated()
    pages._madvise = lambda: populated  # type: ignore[assignment]
    fast = p2pfast.optimize(model, dtype=getattr(torch, dtype))
    seconds = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            fast(given)
            seconds.append(time.perf_counter() - start)
    later = statistics.median(seconds[1:])
    return {
        "first_s": seconds[0],
        "later_s": later,
        "memory_s": populated.seconds,
        "memory_gb": populated.bytes / 1e9,
        "startup_s": seconds[0] - later,
        "without_memory_s": seconds[0] - later - populated.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("case", help="NETWORK:WIDTHxHEIGHT")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps(hardware()))
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("nothing remembered", "choices from disk"):
                arguments = [options.case, options.dtype, str(options.threads)]
                done = subprocess.run(
                    [sys.executable, __file__, "--child", *arguments],
                    env={**os.environ, "P2PFAST_CACHE_DIR": folder},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                row = json.loads(done.stdout.splitlines()[-1])
                print(f"{kind}: " + " ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        main()
