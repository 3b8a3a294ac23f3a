"""Whole networks on every CPU engine of this machine, side by side in one process.

    python benchmarks/engines.py results.json --cases pix2pixhd-local:2048x1024 resnet_9blocks:256x256

Engines take turns, so that a busy moment of the machine meets them all. Peers get the dense tensor, made
before the clock starts; p2pfast gets what a user has, label maps for the networks that read them. A row an
engine: seconds, and against float32 eager the relative L2 error and the PSNR (peak 2, the range of tanh).
Written are a JSON file with hardware and versions, and its rows as CSV beside it. Of a file from the same
hardware and versions, the cases that are not run again stay.

Needs the extra "bench": onnxruntime, openvino, onnx, onnxscript. An engine that is not installed is left out.
"""

from __future__ import annotations

import argparse
import copy
import csv
import importlib
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import hardware
from torch import nn

import p2pfast
from p2pfast.data.scenes import draw_scene

CASES = (
    "pix2pixhd-local:2048x1024",
    "pix2pixhd-global:1024x512",
    "resnet_9blocks:512x512",
    "resnet_9blocks:256x256",
    "unet_256:256x256",
    "unet_256:1024x1024",
)
ENGINES = (
    "eager",
    "compile",
    "onnxruntime",
    "openvino",
    "p2pfast",
    "eager_bfloat16",
    "compile_bfloat16",
    "openvino_bfloat16",
    "p2pfast_bfloat16",
    "p2pfast_fast_bfloat16",
)
Run = Callable[[], torch.Tensor]


def network(name: str, width: int, height: int) -> tuple[nn.Module, torch.Tensor, Any]:
    """A seeded network, its dense input, and the input p2pfast gets."""
    torch.manual_seed(0)
    model = p2pfast.models.build(name).eval()
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    images = [m for m in convolutions if 3 in (m.out_channels,)]
    with torch.no_grad():  # an image with contrast, as trained weights give
        images[-1].weight.mul_(2)
    if convolutions[0].in_channels <= 3:
        x = torch.randn(1, convolutions[0].in_channels, height, width)
        return model, x, x
    scene = draw_scene(1, width=width, height=height, photo=False)
    labels = torch.from_numpy(scene.labels).to(torch.uint8)
    given = p2pfast.LabelMap(labels, torch.from_numpy(scene.instances).int(), num_classes=35)
    return model, given.dense(), given


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def torch_engine(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Run:
    twin: Any = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)
    given = x.to(dtype=dtype, memory_format=torch.channels_last)
    if compiled:
        importlib.import_module("torch._inductor.config").freezing = True
        twin = torch.compile(twin)
    return lambda: twin(given)


def exported(model: nn.Module, x: torch.Tensor, folder: str) -> str:
    path = os.path.join(folder, "network.onnx")
    if not os.path.exists(path):
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(model, (x,), path, dynamo=True, opset_version=18, verbose=False, **names)
    return path


def onnxruntime_engine(path: str, x: torch.Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino_engine(path: str, x: torch.Tensor, precision: str) -> Run:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()
    given = x.numpy()
    return lambda: torch.from_numpy(next(iter(request.infer({0: given}).values())))


def p2pfast_engine(model: nn.Module, given: Any, dtype: torch.dtype, accuracy: str = "default") -> Run:
    fast = p2pfast.optimize(model, dtype=dtype, accuracy=accuracy)
    return lambda: fast(given)


def engines(model: nn.Module, x: torch.Tensor, given: Any, wanted: list[str], folder: str) -> dict[str, Run]:
    """The wanted engines that are installed."""
    runs: dict[str, Run] = {}
    for name in wanted:
        dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
        if name == "eager":
            runs[name] = lambda: model(x)
        elif name.startswith(("eager", "compile")):
            runs[name] = torch_engine(model, x, dtype, name.startswith("compile"))
        elif name == "onnxruntime" and installed("onnxruntime", "onnxscript"):
            runs[name] = onnxruntime_engine(exported(model, x, folder), x)
        elif name.startswith("openvino") and installed("openvino", "onnxscript"):
            precision = "bf16" if dtype == torch.bfloat16 else "f32"
            runs[name] = openvino_engine(exported(model, x, folder), x, precision)
        elif name.startswith("p2pfast"):
            runs[name] = p2pfast_engine(model, given, dtype, "fast" if "fast_" in name[7:] else "default")
    return runs


def measure(case: str, wanted: list[str], rounds: int) -> list[dict[str, Any]]:
    name, _, size = case.partition(":")
    width, height = (int(side) for side in size.split("x"))
    model, x, given = network(name, width, height)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        runs = engines(model, x, given, wanted, folder)
        expected = model(x).double()
        rows: dict[str, dict[str, Any]] = {}
        for engine, run in runs.items():
            start = time.perf_counter()
            error = (run().double() - expected).square().mean().item()
            rows[engine] = {
                "network": name,
                "size": size,
                "engine": engine,
                "threads": torch.get_num_threads(),
                "first_s": time.perf_counter() - start,
                "relative_l2": math.sqrt(error / expected.square().mean().item()),
                "psnr_db": 10 * math.log10(4 / error) if error else None,
            }
        times: dict[str, list[float]] = {engine: [] for engine in runs}
        for _ in range(rounds):
            for engine, run in runs.items():
                start = time.perf_counter()
                run()
                times[engine].append(time.perf_counter() - start)
    for engine, row in rows.items():
        row |= {"median_s": statistics.median(times[engine]), "min_s": min(times[engine]), "rounds": rounds}
    return list(rows.values())


def others(path: Path, machine: dict[str, Any], cases: list[str]) -> list[dict[str, Any]]:
    """Rows of a file's other cases, if it was made on this machine with these versions."""
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    if {k: v for k, v in found.items() if k != "rows"} != machine:
        raise SystemExit(f"{path} is of another machine or other versions: name a new file")
    return [row for row in found["rows"] if f"{row['network']}:{row['size']}" not in cases]


def write(path: Path, machine: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file; the CSV gets the same name")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="NETWORK:WIDTHxHEIGHT")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="ENGINE")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    machine = hardware("openvino", "onnxruntime", "numpy")
    rows = others(options.output, machine, options.cases)
    for case in options.cases:
        found = measure(case, options.engines, options.rounds)
        for row in found:
            psnr = "" if row["psnr_db"] is None else f"  {row['psnr_db']:.1f} dB"
            print(f"{case:28} {row['engine']:22} {row['median_s'] * 1e3:9.1f} ms{psnr}", flush=True)
        rows += found
        write(options.output, machine, rows)  # after each case: an interrupted series is not lost
    sys.exit(0 if rows else 1)


if __name__ == "__main__":
    main()
