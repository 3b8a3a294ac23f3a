"""Time and memory of one network on one engine, each in a process of its own.

A process of its own is the only honest way to a peak of memory: allocators keep what earlier runs freed.
``python -m p2pfast.pipeline.measure`` is that process; it reads a Task as JSON and prints a Result as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pfast.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from p2pfast.labelmap import LabelMap

ENGINES = ("reference", "p2pfast", "compile")


@dataclass(frozen=True)
class Task:
    """What to measure: ``network`` is a name of p2pfast.models.build or a checkpoint file.

    ``engine`` is reference (PyTorch eager), p2pfast or compile (torch.compile). ``output`` receives the
    float32 result as .npy. ``threads`` 0 leaves the choice to the libraries. If the first run takes longer
    than ``patience`` seconds it stays the only one and is reported as it is, without a warm-up.
    """

    engine: str
    network: str
    width: int
    height: int
    dtype: str = "float32"
    device: str = "cpu"
    warmup: int = 1
    runs: int = 5
    threads: int = 0
    scene: int = 0
    output: str = ""
    patience: float = math.inf
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Seconds of every timed run, the peak of memory in bytes, or the ``error`` that prevented both.

    Memory counts everything the network brings: weights, packed copies, its input and its activations. On the
    CPU it is the peak resident set minus the resident set before the network was built, on a GPU the peak of
    PyTorch's allocator.
    """

    seconds: list[float]
    first_seconds: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    warm: bool = True

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range in seconds; 0 for fewer than two runs."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low


def measure(task: Task, timeout: float | None = None) -> Result:
    """Run a task in a fresh process. A failure there is a Result with ``error`` set."""
    command = [sys.executable, "-m", "p2pfast.pipeline.measure"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(dataclasses.asdict(task)),
            text=True,
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return Result([], error=f"no result after {timeout:.0f} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        killed = "; the system killed it, probably for memory" if done.returncode == -9 else ""
        return Result([], error=reason[0] + killed)
    return Result(**json.loads(lines[-1]))


def spread_output(model: nn.Module) -> None:
    """Scale the last convolution so that untrained weights give a picture with contrast.

    Behind normalisation and ReLU a channel's mean square is about 1/2; the gain brings tanh's argument to a
    deviation of 0.9, as trained weights do. Differences between engines would vanish in a grey picture.
    """
    import torch
    from torch import nn

    last = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d))][-1]
    with torch.no_grad():
        per_output = last.weight.square().sum() / 3
        last.weight.mul_(0.9 / (0.5 * per_output).sqrt())


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes; the peak of getrusage where there is no /proc."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _build(task: Task) -> nn.Module:
    import torch

    from p2pfast import models
    from p2pfast.pipeline.network import load_checkpoint

    if Path(task.network).is_file():
        return load_checkpoint(Path(task.network)).eval()
    torch.manual_seed(0)
    model = models.build(task.network, **task.options).eval()
    spread_output(model)
    return model


def scene_input(channels: int, width: int, height: int, scene: int) -> LabelMap | Tensor:
    """A procedural street as a network of ``channels`` inputs wants it: label map with edges, or picture."""
    import numpy as np
    import torch

    from p2pfast.data import NUM_CLASSES, draw_scene
    from p2pfast.labelmap import LabelMap

    drawn = draw_scene(scene, width, height, photo=channels in (1, 3))
    if drawn.photo is not None:
        picture = torch.from_numpy(drawn.photo).permute(2, 0, 1)[None].float() / 127.5 - 1
        return picture[:, :channels].contiguous()
    instances = torch.from_numpy(drawn.instances.astype(np.int32))
    labels = torch.from_numpy(drawn.labels) % (channels - 1)
    if channels - 1 < NUM_CLASSES:
        instances = instances % 1000 + labels.to(torch.int32) * 1000
    return LabelMap(labels, instances, num_classes=channels - 1)


def run_task(task: Task) -> Result:
    """Carry out a task in this process."""
    import torch

    from p2pfast.labelmap import LabelMap
    from p2pfast.pipeline.network import accelerate, choose_device, choose_dtype, input_channels

    if task.threads:
        set_threads(task.threads)
    device, dtype = choose_device(task.device), choose_dtype(task.dtype)
    before = _resident("VmRSS")
    model = _build(task)
    given = scene_input(input_channels(model), task.width, task.height, task.scene).to(device)
    engine: Callable[..., Tensor]
    if task.engine == "p2pfast":
        engine = accelerate(model, dtype, device)
    else:
        dense = given.dense() if isinstance(given, LabelMap) else given
        layout = torch.contiguous_format
        if task.engine == "compile":
            layout = torch.channels_last  # its better layout, by measurement
        given = dense.to(dtype=dtype, memory_format=layout)
        # Module.to has no overload that takes everything at once, though it accepts that.
        engine = model.to(device=device, dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
        if task.engine == "compile":
            engine = torch.compile(engine)
        del dense
    _reset_peak(device)
    seconds = []
    with torch.inference_mode():
        for _ in range(task.warmup + task.runs):
            start = time.perf_counter()
            output = engine(given)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if seconds[0] > task.patience:
                break
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _resident("VmHWM") - before
    if task.output:
        import numpy as np

        np.save(task.output, output.float().cpu().numpy())
    if seconds[0] > task.patience:
        return Result(seconds, seconds[0], peak, warm=False)
    return Result(seconds[task.warmup :], seconds[0], peak, warm=task.warmup > 0)


def _reset_peak(device: torch.device) -> None:
    """Forget peaks of building the network, which are not those of running it."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # the peak then includes building, for every engine alike


def set_threads(count: int) -> None:
    """Use ``count`` threads for PyTorch's and for p2pfast's own operators."""
    import torch

    from p2pfast import _C

    torch.set_num_threads(count)
    _C.set_num_threads(count)


def difference(first: str, second: str) -> tuple[float, float]:
    """Largest difference of two saved outputs, and the share of uint8 values more than one step apart."""
    import numpy as np
    import torch

    from p2pfast.functional import image_to_uint8

    a, b = (torch.from_numpy(np.load(path)) for path in (first, second))
    steps = (image_to_uint8(a).int() - image_to_uint8(b).int()).abs()
    return float((a - b).abs().max()), float((steps > 1).float().mean())


def main() -> None:
    """Read a Task from standard input and print its Result."""
    # Whatever libraries print goes to standard error; standard output carries the result alone.
    channel = os.dup(1)
    os.dup2(2, 1)
    task = Task(**json.load(sys.stdin))
    try:
        result = run_task(task)
    except UsageError as error:
        result = Result([], error=str(error))
    except Exception as error:  # the parent reports it; torch.compile alone raises a dozen types
        result = Result([], error=f"{type(error).__name__}: {first_line(error)}")
    with os.fdopen(channel, "w") as stream:
        stream.write(json.dumps(dataclasses.asdict(result)) + "\n")


if __name__ == "__main__":
    main()
