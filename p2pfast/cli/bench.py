"""``p2pfast bench``: one network on several engines."""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from p2pfast import models
from p2pfast.cli import tables
from p2pfast.data import images
from p2pfast.errors import UsageError
from p2pfast.pipeline import measure
from p2pfast.pipeline.network import choose_device, choose_dtype
from p2pfast.pipeline.sizes import SizePolicy

#: Beginnings of the names of networks that make pictures; the others judge or encode them.
GENERATORS = ("pix2pixhd-local", "pix2pixhd-global", "unet", "resnet")


def run_bench(
    network: str,
    size: str,
    dtype: str,
    device: str,
    engines: str,
    runs: int,
    warmup: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Carry out the command. Raises UsageError, and typer.Exit(1) if no engine could run."""
    policy = SizePolicy.parse(size)
    if policy.kind != "exact":
        raise UsageError(f"--size {size}: bench needs WIDTHxHEIGHT such as 2048x1024")
    names = [name.strip() for name in engines.split(",") if name.strip()]
    unknown = [name for name in names if name not in measure.ENGINES]
    if unknown or not names:
        raise UsageError(f"--engines {engines}: choose from {', '.join(measure.ENGINES)}")
    known = [name for name in models.available() if name.startswith(GENERATORS)]
    if network not in known and not Path(network).is_file():
        raise UsageError(f"{network}: neither a checkpoint file nor one of {', '.join(known)}")
    choose_dtype(dtype)
    chosen = choose_device(device).type
    console = Console(stderr=True, highlight=False)
    results: dict[str, measure.Result] = {}
    differences: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="p2pfast-bench-") as folder:
        for name in names:
            task = measure.Task(
                name,
                network,
                policy.width,
                policy.height,
                dtype,
                chosen,
                warmup,
                runs,
                threads,
                output=str(Path(folder) / f"{name}.npy"),
            )
            with console.status(f"{name}: {warmup} + {runs} runs"):
                results[name] = measure.measure(task)
            if name != "reference" and not results[name].error and _worked(results, "reference"):
                reference = str(Path(folder) / "reference.npy")
                differences[name], _ = measure.difference(reference, task.output)
    document = _document(network, policy, dtype, chosen, warmup, threads, results, differences)
    text = json.dumps(document, indent=2)
    if json_file is not None and str(json_file) != "-":
        try:
            images.write_text(json_file, text + "\n")
        except OSError as error:
            raise UsageError(f"--json {json_file}: {error.strerror}") from error
    if str(json_file) == "-":
        typer.echo(text)
    else:
        Console(highlight=False).print(_table(f"{network}, {size}, {dtype}, {chosen}", results, differences))
    if all(result.error for result in results.values()):
        raise typer.Exit(1)


def _worked(results: dict[str, measure.Result], name: str) -> bool:
    return name in results and not results[name].error


def _table(title: str, results: dict[str, measure.Result], differences: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("engine", "median ± IQR", "images/s", "speed", "peak memory", "largest difference"):
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for name, result in results.items():
        if result.error:
            table.add_row(name, f"not measured: {result.error}", *[""] * 4)
            continue
        speed = (
            f"{results['reference'].median / result.median:.2f} x" if _worked(results, "reference") else ""
        )
        gap = f"{differences[name]:.1e}" if name in differences else ""
        table.add_row(
            name,
            tables.timing(result),
            tables.rate(result.median),
            speed,
            tables.memory(result.peak_bytes),
            gap,
        )
    return table


def _document(
    network: str,
    size: SizePolicy,
    dtype: str,
    device: str,
    warmup: int,
    threads: int,
    results: dict[str, measure.Result],
    differences: dict[str, float],
) -> dict[str, Any]:
    import torch

    entries = {
        name: dataclasses.asdict(result)
        | (
            {"error": result.error}
            if result.error
            else {
                "median_seconds": result.median,
                "iqr_seconds": result.spread,
                "largest_difference": differences.get(name),
            }
        )
        for name, result in results.items()
    }
    return {
        "network": network,
        "width": size.width,
        "height": size.height,
        "dtype": dtype,
        "device": device,
        "warmup": warmup,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "engines": entries,
    }
