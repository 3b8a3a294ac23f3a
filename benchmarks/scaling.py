"""Time and peak resident memory of a generator over image sizes and threads.

    python benchmarks/scaling.py results.json --sizes 256x256 2048x1024 8192x4096 --threads 1 2

Every measurement is a process of its own, because the peak of a process never falls. Written are a JSON file
with the hardware, the versions and one row a measurement, and beside it the rows as CSV.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import hardware

SIZES = "256x256 512x256 512x512 1024x512 1024x1024 2048x1024 4096x2048 8192x4096".split()


def child(options: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    import resource

    import numpy as np
    import torch

    import p2pfast
    from p2pfast.data.scenes import draw_scene

    def peak() -> float:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    torch.set_num_threads(options["threads"])
    torch.manual_seed(0)
    width, height = (int(side) for side in options["size"].split("x"))
    dtype = getattr(torch, options["dtype"])
    model = p2pfast.models.build(options["network"]).eval()
    channels = next(m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    x: Any = torch.rand(1, channels, height, width) * 2 - 1 if channels <= 3 else None
    if x is None:
        # A scene of moderate size, enlarged: drawing a large one takes longer than translating it.
        scene = draw_scene(1, width=min(width, 1024), height=min(height, 512), photo=False)
        rows = np.arange(height) * scene.labels.shape[0] // height
        columns = np.arange(width) * scene.labels.shape[1] // width
        labels, ids = (
            torch.from_numpy(np.ascontiguousarray(m[rows[:, None], columns])).to(kind)
            for m, kind in ((scene.labels, torch.uint8), (scene.instances, torch.int32))
        )
        x = p2pfast.LabelMap(labels, ids, num_classes=channels - 1)
    before = peak()
    fast: Any = model
    if options["engine"] == "p2pfast":
        fast = p2pfast.optimize(model, dtype=dtype, memory_limit=options["memory_limit"])
    else:
        x = (x.dense() if isinstance(x, p2pfast.LabelMap) else x).to(dtype)
        fast = model.to(dtype)
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + options["runs"]):
            start = time.perf_counter()
            fast(x)
            seconds.append(time.perf_counter() - start)
    row = {
        **options,
        "first_s": round(seconds[0], 4),
        "min_s": round(min(seconds[1:] or seconds), 4),
        "peak_gb": round(peak(), 3),
        "before_gb": round(before, 3),
        "bands": 0,
        "planned_gb": 0.0,
    }
    if options["engine"] == "p2pfast":
        plan = fast.__dict__["_p2pfast"].engine.last[0]
        row["bands"] = plan.bands
        row["planned_gb"] = round((plan.arena_bytes + plan.packed_bytes) / 1e9, 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file; the CSV gets the same name")
    parser.add_argument("--networks", nargs="+", default=["pix2pixhd-local"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WIDTHxHEIGHT")
    parser.add_argument("--threads", nargs="+", type=int, default=[os.cpu_count() or 1])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", default=["p2pfast"], choices=["p2pfast", "eager"])
    parser.add_argument("--memory-limit", default=None, help="for p2pfast, such as 8GB")
    parser.add_argument("--runs", type=int, default=2, help="timed runs after the first")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a measurement may take")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in (
        {"network": n, "size": s, "threads": t, "dtype": d, "engine": e}
        for n in options.networks
        for s in options.sizes
        for t in options.threads
        for d in options.dtypes
        for e in options.engines
    ):
        case |= {"memory_limit": options.memory_limit, "runs": options.runs}
        with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
            command = [sys.executable, __file__, "--child", json.dumps(case), answer.name]
            try:
                done = subprocess.run(command, timeout=options.timeout, capture_output=True, text=True)
                text = answer.read()
                last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            except subprocess.TimeoutExpired:
                text, last = "", f"longer than {options.timeout:.0f} s"
            rows.append(json.loads(text) if text else {**case, "error": last})
        print(rows[-1], flush=True)
        # After every measurement, so that an interrupted series is not lost.
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**hardware(), "rows": rows}, indent=1) + "\n")
        with options.output.with_suffix(".csv").open("w", newline="") as file:
            names = list(dict.fromkeys(name for row in rows for name in row))
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()
