"""``p2pfast demo``: a street of our own, its picture, and a timing table."""

from __future__ import annotations

import html
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from p2pfast.assets import DEMO_GENERATOR
from p2pfast.cli import tables
from p2pfast.data import NUM_CLASSES, Scene, colorize, draw_scene
from p2pfast.data.images import write_image, write_text
from p2pfast.data.page import figure, page
from p2pfast.errors import UsageError
from p2pfast.labelmap import LabelMap
from p2pfast.pipeline import measure, network

HEADINGS = ("engine", "time a picture", "runs", "images/s", "peak memory", "largest difference")


#: A first run that takes longer than so many seconds is not repeated, so that the demo ends within minutes.
PATIENCE = 20.0


@dataclass(frozen=True)
class _Plan:
    """What is drawn and timed; the generator was trained on streets 1024 pixels wide."""

    width: int
    height: int
    generator_width: int
    generator_height: int
    flagship_options: dict[str, int]
    title: str
    runs: int


FULL = _Plan(2048, 1024, 1024, 512, {}, "pix2pixHD LocalEnhancer", 3)
SMALL = {"ngf": 8, "n_downsample_global": 2, "n_blocks_global": 1, "n_blocks_local": 1}
QUICK = _Plan(256, 128, 256, 128, SMALL, "pix2pixHD LocalEnhancer, ngf 8", 1)


@dataclass(frozen=True)
class _Row:
    network: str
    engine: str
    result: measure.Result
    difference: str


def run_demo(output: Path, seed: int, quick: bool, device_name: str, threads: int) -> None:
    """Carry out the command. Raises UsageError, and typer.Exit(1) if p2pfast itself could not be timed."""
    plan = QUICK if quick else FULL
    device = network.choose_device(device_name)
    if threads:
        measure.set_threads(threads)
    console = Console(stderr=True, highlight=False)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with console.status(f"drawing and translating a street of {plan.width}x{plan.height}"):
            scene = draw_scene(seed, plan.width, plan.height, photo=False)
            _translate(scene, plan, device, output)
        rows = _timings(plan, seed, device, threads, console)
        write_text(output / "index.html", _page(rows, device, quick))
    except OSError as error:
        raise UsageError(f"--output {output}: {error.strerror or error}") from error
    for title, group in _networks(rows).items():
        Console(highlight=False).print(_table(title, group))
    typer.echo(f"pictures and page: {output / 'index.html'}")
    broken = [row for row in rows if row.result.error]
    for row in broken:
        typer.echo(f"not timed: {row.network}, {row.engine}: {row.result.error}", err=True)
    if broken:
        raise typer.Exit(1)


def _translate(scene: Scene, plan: _Plan, device: torch.device, output: Path) -> None:
    step = plan.width // plan.generator_width
    labels = torch.from_numpy(scene.labels[::step, ::step].copy())
    instances = torch.from_numpy(scene.instances[::step, ::step].astype(np.int32))
    ready = network.prepare(network.load_checkpoint(DEMO_GENERATOR), torch.float32, device)
    picture = network.run(ready, LabelMap(labels, instances, num_classes=NUM_CLASSES))[0].numpy()
    write_image(output / "labels.png", colorize(scene.labels))
    write_image(output / "result.png", picture)


def _timings(plan: _Plan, seed: int, device: torch.device, threads: int, console: Console) -> list[_Row]:
    flagship = ("pix2pixhd-local", plan.width, plan.height, plan.title, plan.flagship_options)
    nothing: dict[str, int] = {}
    small = (str(DEMO_GENERATOR), plan.generator_width, plan.generator_height, "demo generator", nothing)
    rows: list[_Row] = []
    with tempfile.TemporaryDirectory(prefix="p2pfast-demo-") as folder:
        for name, width, height, title, options in (flagship, small):
            heading = f"{title}, {width}x{height}, float32"
            outputs: dict[str, str] = {}
            for engine in ("reference", "p2pfast"):
                outputs[engine] = str(Path(folder) / f"{engine}.npy")
                task = measure.Task(
                    engine,
                    name,
                    width,
                    height,
                    device=device.type,
                    warmup=1,
                    runs=plan.runs,
                    threads=threads,
                    scene=seed,
                    output=outputs[engine],
                    patience=PATIENCE,
                    options=options,
                )
                with console.status(f"timing {title} {width}x{height}: {engine}"):
                    result = measure.measure(task)
                gap = ""
                if engine == "p2pfast" and not result.error and not rows[-1].result.error:
                    largest, _ = measure.difference(outputs["reference"], outputs["p2pfast"])
                    gap = f"{largest:.1e}"
                rows.append(_Row(heading, engine, result, gap))
    return rows


def _cells(row: _Row) -> tuple[str, ...]:
    engine = "PyTorch eager" if row.engine == "reference" else row.engine
    if row.result.error:
        return engine, "not timed", "", "", "", ""
    median = row.result.median
    peak = tables.memory(row.result.peak_bytes)
    runs = str(len(row.result.seconds)) if row.result.warm else "1, cold"
    return engine, tables.timing(row.result), runs, tables.rate(median), peak, row.difference


def _table(title: str, rows: list[_Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "engine" else "right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _networks(rows: list[_Row]) -> dict[str, list[_Row]]:
    """The rows by network, in order."""
    grouped: dict[str, list[_Row]] = {}
    for row in rows:
        grouped.setdefault(row.network, []).append(row)
    return grouped


def _html_table(title: str, rows: list[_Row]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in rows
    )
    return f"<h2>{html.escape(title)}</h2>\n<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _page(rows: list[_Row], device: torch.device, quick: bool) -> str:
    where = f"the processor, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    note = " Sizes of a quick run; times of so small networks say little." if quick else ""
    text = (
        "<p>A street that p2pfast drew itself, and the picture that the small generator shipped with p2pfast "
        f"makes of it. The tables time float32 networks on {html.escape(where)}, each engine in a process of "
        "its own; weights of the published network are random (seeded), which changes no timing. Runs are "
        "warmed up unless they are called cold. The largest difference is that of any value of the picture; "
        f"values span 2. Peak memory counts weights, input and all that lies between.{note}</p>"
    )
    picture = figure("street", [("labels", "labels.png"), ("result", "result.png")])
    measured = "\n".join(_html_table(title, group) for title, group in _networks(rows).items())
    return page("p2pfast demo", f"{text}\n{picture}\n{measured}")
