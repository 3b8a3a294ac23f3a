"""Sizes and strides that are 1: Triton's compiler makes Python integers of them, which have no methods, and
its interpreter does not. So the compiler's front end reads the kernels here, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = """
import torch
from p2pfast.ops.gpu.compile import front_end
from p2pfast.ops.conv.gpu.choice import Candidate, Problem, _kernels
from p2pfast.ops.conv.gpu.configs import Config
from p2pfast.ops.norm import triton as norms
from p2pfast.ops.norm_act import triton as training
from p2pfast.ops.weight_gradient import triton as weights

meta = torch.device("meta")

def some(*shape):
    return torch.empty(shape, device=meta)

launches = []
for planes in (False, True):
    x, row = some(1, 1, 1, 1), some(1, 1)
    partial, count = norms.partial_buffers(x, planes)
    launches.append(norms.statistics_launch(x, partial, count, planes))
    given = (False, 1e-5, "relu", 0.0, x, x, row, row, planes)
    launches.append(norms.map_launch(x, some(1), some(1), *given))
    launches.append(norms.map_launch(some(1, 3, 1, 1), some(3), some(3), *given))
    launches.append(norms.apply_launch(x, row, row, "relu", 0.0, x, row, row, x, planes=planes))
    for mean in (some(1), row):
        back = training.backward_launches(
            x, x, some(1), some(1), mean, mean, False, 1e-5, "relu", 0.0, x, x, x, planes
        )
        launches += back[0]
    frozen = training._arguments(x, x, x, row, row, some(1), some(1), 1e-5, 0.0, planes)
    for kernel, more in (
        (training._sums_kernel, {"partial": partial, "parts": 1, "dx": x, "dresidual": x}),
        (training._finish_kernel, {"sums": partial, "values": 1, "dx": x}),
    ):
        constants = {"ACT": 1, "BP": 16, "CB": 1, "PLANES": planes, "EVEN": False}
        if kernel is training._sums_kernel:
            constants["ITERATIONS"] = 1
        launches.append(norms.Launch(kernel, (1,), {**frozen, **more, "norm_stride": 1}, constants))
around = some(1, 1, 3, 3), (1, 1, 1, 1), "replicate"
launches.append(norms.apply_launch(x, row, row, "relu", 0.0, None, None, None, *around))
launches += norms.merge_launches(some(1, 1, 2, 1), some(1), False, 1e-5, some(1), some(1))[0]
launches += norms.merge_launches(some(1, 130, 2, 1), some(130), True, 1e-5, None, None)[0]
launches.append(norms.fold_launch(some(1, 1), some(1, 1), 1e-5, some(1), some(1))[0])
launches += training.add_launches(some(1, 1, 1), some(1, 1))

down = Problem(1, (2, 2), (1, 1), (32,), 1, (4, 4), 2, (1, 1))
point = Problem(1, (1, 1), (1, 1), (3, 3), 1, (3, 3), 1, (1, 1), "replicate", dtype=torch.float32)
up = Problem(1, (1, 1), (1, 1), (32,), 1, (1, 1), 1, (0, 0), "zeros", True)
tile = Config(16, 16, 32)
for problem, layout, config in (
    (down, "plain", tile), (down, "plain", Config(16, 16, 32, splits=2)), (point, "plain", tile),
    (point, "rows", tile), (up, "phases", tile), (up, "columns", tile),
):
    launches += _kernels(problem, Candidate(layout, config, 0.0), meta)
for channels in (1, 16):  # columns that span taps, and that do not
    given = some(1, 1, 1, 1), some(1, channels, 1, 1), some(1, channels, 1, 1), 1, 0, "zeros"
    for splits in (1, 2):
        launches += weights.launches(*given, Config(16, 16, 16, splits=splits), "tf32")
wrong = []
for launch in launches:
    config = launch.shipped(launch.kernel.__name__)
    try:
        front_end(config, 90)
    except Exception as error:
        wrong.append(f"{config.name} {sorted(config.constexprs)}: {error}")
print(len(launches), *wrong, sep="\\n")
"""


def test_kernels_take_sizes_of_one() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    count, *wrong = result.stdout.splitlines()
    assert int(count) > 25 and not wrong, "\n".join(wrong)
