"""``p2pfast translate``: options to a job, a progress bar, a summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from p2pfast.cli.errors import BAD_INPUTS, INTERRUPTED
from p2pfast.data.images import read_ids, read_image, write_image
from p2pfast.errors import InputError, UsageError
from p2pfast.pipeline import gallery, network
from p2pfast.pipeline.files import Failure, Item, find_items
from p2pfast.pipeline.measure import set_threads
from p2pfast.pipeline.sizes import SizePolicy
from p2pfast.pipeline.translate import Job, translate


@dataclass(frozen=True)
class TranslateOptions:
    """The options of the command, as given."""

    checkpoint: Path
    output: Path
    labels: Path | None
    instances: Path | None
    images: Path | None
    dtype: str
    device: str
    format: str
    size: str
    num_classes: int | None
    evaluate: bool
    overwrite: bool
    gallery: bool
    batch_size: int
    threads: int
    memory_limit: str | None


class _Rate(TextColumn):
    """Images a second since the start of the bar."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        rate = task.completed / task.elapsed if task.elapsed else 0.0
        return Text(f"{rate:.2f} images/s" if rate else "- images/s")


def _inputs(options: TranslateOptions) -> tuple[list[Item], list[Failure]]:
    if (options.labels is None) == (options.images is None):
        raise UsageError(
            "give either --labels (label-to-image networks) or --images (image-to-image networks)"
        )
    if options.images is not None and (options.instances is not None or options.num_classes is not None):
        raise UsageError("--instances and --num-classes belong to --labels, not to --images")
    if options.format not in ("png", "jpg"):
        raise UsageError(f"--format {options.format}: use png or jpg")
    source = options.labels or options.images
    assert source is not None
    return find_items(
        source, options.instances, options.output, options.format, labels=options.labels is not None
    )


def _job(options: TranslateOptions) -> Job:
    size = SizePolicy.parse(options.size)
    dtype, device = network.choose_dtype(options.dtype), network.choose_device(options.device)
    if options.threads:
        set_threads(options.threads)
    model = network.load_checkpoint(options.checkpoint)
    channels, classes = network.input_channels(model), None
    if options.labels is not None:
        classes = network.count_classes(channels, options.instances is not None, options.num_classes)
        if options.instances is None and options.num_classes is None:
            typer.echo(
                f"{classes} classes, no instance edges; add --instances if the network was trained with them",
                err=True,
            )
    elif channels not in (1, 3):
        raise UsageError(f"the network takes {channels} channels, not a picture; use --labels for label maps")
    ready = network.prepare(model, dtype, device, options.evaluate, options.memory_limit)
    if ready.alone and options.batch_size > 1:
        typer.echo(
            "batches of 1: the network's BatchNorm or dropout is live, so pictures would mix (see --eval)",
            err=True,
        )
    return Job(ready, classes, size, options.batch_size, options.output if options.gallery else None)


def run_translate(options: TranslateOptions) -> None:
    """Carry out the command. Raises UsageError, and typer.Exit for a job that did not end well."""
    console = Console(stderr=True, highlight=False)
    items, failures = _inputs(options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {options.output}: cannot make the folder: {error.strerror}") from error
    wanted = items if options.overwrite else [item for item in items if not item.output.exists()]
    job = _job(options)
    # stderr may be a file or a pipe: there the bar would be noise.
    bar = Progress(
        TextColumn("translating"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("translate", total=len(wanted))
            report = translate(job, wanted, lambda: bar.advance(task))
        failures += report.failures
        if options.gallery:
            _write_gallery(job, options, items)
    except KeyboardInterrupt:
        done = sum(item.output.exists() for item in items)
        remedy = " if you leave out --overwrite" if options.overwrite else ""
        typer.echo(
            f"interrupted: {done} of {len(items)} results are complete in {options.output}; "
            f"the same command goes on from there{remedy}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    skipped = len(items) - len(wanted)
    rate = f" in {report.seconds:.1f} s ({report.done / report.seconds:.2f} images/s)" if report.done else ""
    parts = [f"{report.done} translated{rate}"]
    parts += [f"{skipped} existed and were skipped"] if skipped else []
    parts += [f"{len(failures)} failed"] if failures else []
    typer.echo(", ".join(parts) + f"; results in {options.output}")
    for failure in failures:
        typer.echo(f"failed: {failure.name}: {failure.reason}", err=True)
    if failures:
        raise typer.Exit(BAD_INPUTS)


def _write_gallery(job: Job, options: TranslateOptions, items: list[Item]) -> None:
    """Make the page over all results, also those of earlier runs that had no gallery."""
    from p2pfast.data.classes import colorize

    finished = [item for item in items if item.output.exists()]
    for item in finished:
        picture = gallery.input_picture(options.output, item.name)
        if picture.exists():
            continue
        try:
            if job.num_classes is None:
                write_image(picture, read_image(item.source, job.network.channels))
            else:
                labels = read_ids(item.source, "label map")
                write_image(picture, colorize(labels % job.num_classes, job.num_classes))
        except InputError:
            continue  # a result of an earlier run whose input has since been damaged is shown alone
    title = f"{options.checkpoint.name}: {len(finished)} pictures"
    gallery.write_gallery(options.output, title, [(item.name, item.output) for item in finished])
