"""What the flagship launches at full size compiles for an H100: the very kernels that its plan asks for, with
their sizes and strides, in a process without the interpreter. Nothing runs; launches are only noted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
import p2pfast.ops.gpu.device  # defines kernels while nothing is interpreted
from p2pfast.ops.gpu import Launch, support
from p2pfast.ops.gpu.compile import compile_one, front_end
from p2pfast.runtime.gpu import engine

support.interpreted = lambda: True  # takes CPU tensors
engine.on_cpu = {}
wanted = {}

def note(launch):
    found = launch.shipped(launch.kernel.__name__)
    wanted[repr(found)] = found

Launch.run = note

import p2pfast

with torch.device("meta"):
    net = p2pfast.models.build("pix2pixhd-local").eval()
net = net.to_empty(device="cpu")
labels = torch.randint(35, (1, 1, 1024, 2048), dtype=torch.uint8)
given = p2pfast.LabelMap(labels, labels.int(), num_classes=35)
image = p2pfast.optimize(net, dtype=torch.bfloat16, backend="cuda")(given)
assert image.shape == (1, 3, 1024, 2048)
names = [config.name for config in wanted.values()]
for config in wanted.values():
    if config.name not in ("conv_kernel", "thin_kernel"):  # test_compile.py compiles such
        front_end(config, 90)
        continue
    found = compile_one("flagship", config, 90)
    if found.problems or not found.matrix:
        print(config.name, config.constexprs, found)
print(sum("conv_kernel" in name for name in names), names.count("thin_kernel"), "fine")
"""


@pytest.mark.slow
def test_the_flagships_launches_compile() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"P2PFAST_STRICT": "1", "P2PFAST_TUNE": "off"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    *wrong, last = result.stdout.strip().splitlines()
    count, thin, fine = last.split()
    assert not wrong, "\n".join(wrong)
    assert fine == "fine" and int(count) >= 8 and int(thin) == 1
