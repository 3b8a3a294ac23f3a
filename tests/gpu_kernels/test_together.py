"""Candidates are compiled at the same time, as a GPU's driver would ask for; in a process without the
interpreter, with a driver that only names a device."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import threading, triton
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())

import torch
from p2pfast.ops.conv.gpu import choice
from p2pfast.ops.conv.gpu.configs import Config
from p2pfast.ops.gpu import compile_together

problem = choice.Problem(1, (8, 8), (8, 8), (64,), 64, (1, 1), pending=False)
plain = Config(64, 64, 64, 4, 2)
tiles = [replace(plain, descriptor=True), plain, replace(plain, splits=2)]
launches = [
    launch
    for tile in tiles
    for launch in choice._kernels(problem, choice.Candidate("plain", tile, 0.0), torch.device("meta"))
]
kernel, threads = launches[0].kernel, []
kernel.device_caches[0]  # sets what compiles
compiled = kernel.compile

def compile(*args, **kwargs):
    threads.append(threading.current_thread().name)
    return compiled(*args, **kwargs)

kernel.compile = compile
broken = choice._kernels(problem, choice.Candidate("plain", tiles[1], 0.0), torch.device("meta"))
broken[0].constants["PRECISION"] = "wrong"
compile_together([*launches, *broken])
assert len(threads) == 5 and all(name.startswith("compile") for name in threads), threads
del threads[:]
for launch in launches:
    kernel.warmup(grid=launch.grid, **launch.options)
assert not threads, "compiled again"
try:
    kernel.warmup(grid=broken[0].grid, **broken[0].options)
except Exception as error:
    print("refused:", type(error).__name__)
"""


def test_candidates_compile_together() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused:")
