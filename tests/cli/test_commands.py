from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from typer.testing import Result

from p2pfast import models
from p2pfast.assets import DEMO_GENERATOR
from p2pfast.data import draw_scene
from p2pfast.labelmap import LabelMap
from tests.cli.conftest import read

Run = Callable[..., Result]


def test_help_and_version(run: Run) -> None:
    top = run("--help")
    assert top.exit_code == 0 and all(name in top.output for name in ("translate", "demo", "info", "bench"))
    for command in ("translate", "demo", "info", "bench"):
        assert run(command, "--help").exit_code == 0
    version = run("--version")
    assert version.exit_code == 0 and version.output.startswith("p2pfast")
    assert run("no-such-command").exit_code == 2


def test_commands_load_torch_when_they_need_it() -> None:
    """Option parsing and --help wait for nothing heavy."""
    command = [sys.executable, "-X", "importtime", "-c", "import p2pfast.cli.app"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert not {name for name in names if name.startswith("p2pfast.pipeline.") and name != "p2pfast.errors"}


def test_info(run: Run) -> None:
    report = json.loads(run("info", "--json").output)
    assert {"versions", "processor", "gpu", "kernels"} <= set(report)
    shown = run("info")
    assert shown.exit_code == 0 and "versions" in shown.output and "kernels" in shown.output


def test_bench_writes_json(run: Run, tmp_path: Path, label_checkpoint: Path) -> None:
    target = tmp_path / "bench.json"
    done = run(
        "bench",
        label_checkpoint,
        "--size",
        "128x64",
        "--engines",
        "reference,p2pfast",
        "--runs",
        3,
        "--device",
        "cpu",
        "--threads",
        1,
        "--json",
        target,
    )
    assert done.exit_code == 0, done.output
    document = json.loads(target.read_text())
    assert document["width"] == 128 and document["threads"] == 1
    for name in ("reference", "p2pfast"):
        engine = document["engines"][name]
        assert len(engine["seconds"]) == 3 and engine["median_seconds"] > 0 and engine["iqr_seconds"] >= 0
        assert engine["peak_bytes"] > 0 and not engine["error"]
    assert document["engines"]["p2pfast"]["largest_difference"] < 1e-3


def test_bench_mistakes(run: Run) -> None:
    for arguments, message in (
        (("no-such-network",), "neither a checkpoint file nor one of"),
        (("--size", "original"), "WIDTHxHEIGHT"),
        (("--engines", "tensorrt"), "choose from reference, p2pfast, compile"),
    ):
        done = run("bench", *arguments)
        assert done.exit_code == 2 and message in done.output


def test_demo(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = run("demo", "--quick", "--output", output, "--device", "cpu", "--threads", 1)
    assert done.exit_code == 0, done.output
    assert read(output / "labels.png").shape == read(output / "result.png").shape == (128, 256, 3)
    page = (output / "index.html").read_text()
    assert "labels.png" in page and "PyTorch eager" in page
    assert done.output.count("p2pfast") >= 2 and "not timed" not in done.output


def test_the_shipped_generator_draws_streets() -> None:
    """It is small, says how it was made, and resembles the rendering of a street it was not trained on."""
    assert DEMO_GENERATOR.stat().st_size <= 8_000_000
    with safe_open(DEMO_GENERATOR, "pt") as file:
        assert "train_demo_generator.py" in file.metadata()["made_by"]
    scene = draw_scene(7, 1024, 512)
    assert scene.photo is not None
    instances = torch.from_numpy(scene.instances.astype(np.int32))
    given = LabelMap(torch.from_numpy(scene.labels), instances, num_classes=35)
    with torch.inference_mode():
        picture = models.from_checkpoint(DEMO_GENERATOR)(given.dense())[0].permute(1, 2, 0).numpy()
    wanted = scene.photo.astype(np.float32) / 127.5 - 1
    assert np.abs(picture - wanted).mean() < 0.55 * np.abs(wanted - wanted.mean((0, 1))).mean()
