"""Commands and their options. Nothing heavy is imported here: each command loads what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2pfast.cli.errors import reported
from p2pfast.cli.train import train_app

app = typer.Typer(
    name="p2pfast",
    help="Run pix2pix, pix2pixHD and CycleGAN generators fast, on the machine you have.",
    epilog="Start with `p2pfast demo`; use your own network with `p2pfast translate`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

DTYPE_HELP = (
    "float32, or bfloat16: half the memory, quicker where the processor has it, errors of about 1 %; "
    "float16 on GPUs."
)
DEVICE_HELP = "auto takes a GPU if PyTorch finds one."
MEMORY_HELP = (
    "Memory for the network, such as 8GB; larger pictures are computed in bands, with the same result. "
    "Default: most of the memory that is free."
)
THREADS_HELP = "Processor threads for the network; 0 takes all cores."

Dtype = Annotated[str, typer.Option("--dtype", metavar="float32|bfloat16|float16", help=DTYPE_HELP)]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help=DEVICE_HELP)]
Threads = Annotated[int, typer.Option("--threads", min=0, max=1024, help=THREADS_HELP)]


app.add_typer(train_app)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"p2pfast {version('p2pfast')}")
        except PackageNotFoundError:
            typer.echo("p2pfast (not installed: run from its source folder)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run pix2pix, pix2pixHD and CycleGAN generators fast, on the machine you have."""


@app.command()
@reported
def translate(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Trained generator (.pth or .safetensors); its layout is read off the weights."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if missing.")],
    labels: Annotated[
        Path | None, typer.Option(help="Label maps, a folder or a file: one channel of class ids.")
    ] = None,
    instances: Annotated[
        Path | None,
        typer.Option(help="Instance maps of the same names, for networks trained with instance edges."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Pictures, a folder or a file, for image-to-image networks.")
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    format: Annotated[
        str, typer.Option("--format", metavar="png|jpg", help="Format of the results.")
    ] = "png",
    size: Annotated[
        str,
        typer.Option(
            "--size",
            metavar="original|multiple|WxH",
            help="original keeps the size (padded for the network, cropped after); multiple resizes to the "
            "nearest size the network takes, as the published test scripts do; WxH resizes to that.",
        ),
    ] = "original",
    num_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of classes. Default: the network's input channels, less the edge with --instances.",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--eval",
            help="Use running statistics in BatchNorm and switch dropout off. Without it both stay live, as "
            "the published pix2pix test script has them.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Redo results that exist. Without it they are skipped.")
    ] = False,
    gallery: Annotated[
        bool, typer.Option("--gallery", help="Write OUTPUT/index.html that shows inputs beside results.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Pictures of one size run together.")] = 1,
    threads: Threads = 0,
    memory_limit: Annotated[str | None, typer.Option(help=MEMORY_HELP)] = None,
) -> None:
    """Translate label maps or pictures with a trained network.

    Label and instance maps are matched by name; Cityscapes' `*_gtFine_labelIds` and `*_gtFine_instanceIds`
    are understood, in subfolders too. Files are written whole or not at all and existing ones are skipped, so
    a job that was interrupted goes on where it stopped when it is started again.

    Exit code: 0 all done, 1 some inputs could not be used (they are named, the others are done), 2 the job
    could not start, 130 interrupted.

    Example: `p2pfast translate latest_net_G.pth --labels test_label --instances test_inst -o results`
    """
    from p2pfast.cli.translate import TranslateOptions, run_translate

    run_translate(
        TranslateOptions(
            checkpoint=checkpoint,
            output=output,
            labels=labels,
            instances=instances,
            images=images,
            dtype=dtype,
            device=device,
            format=format,
            size=size,
            num_classes=num_classes,
            evaluate=evaluate,
            overwrite=overwrite,
            gallery=gallery,
            batch_size=batch_size,
            threads=threads,
            memory_limit=memory_limit,
        )
    )


@app.command()
@reported
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for pictures and page.")] = Path(
        "p2pfast-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Which street to draw.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and a small network: seconds instead of minutes.")
    ] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Draw a street, turn it into a picture, and time p2pfast against PyTorch.

    Writes the label picture, the result and an HTML page, and prints seconds, images per second, peak memory
    and largest difference for the published 2048x1024 network and for the small one that made the picture.
    """
    from p2pfast.cli.demo import run_demo

    run_demo(output, seed, quick, device, threads)


@app.command()
@reported
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, processor level, GPU and kernels, with the reason for each that is not available."""
    from p2pfast.cli.info import run_info

    run_info(as_json)


@app.command()
@reported
def bench(
    network: Annotated[
        str,
        typer.Argument(help="Name of a published network (such as pix2pixhd-local) or a checkpoint file."),
    ] = "pix2pixhd-local",
    size: Annotated[str, typer.Option("--size", metavar="WxH", help="Size of the input.")] = "2048x1024",
    dtype: Dtype = "float32",
    device: Device = "auto",
    engines: Annotated[
        str,
        typer.Option(help="Comma-separated: reference (PyTorch eager), p2pfast, compile (torch.compile)."),
    ] = "reference,p2pfast,compile",
    runs: Annotated[int, typer.Option(min=1, max=1000, help="Timed runs of each engine.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, max=100, help="Runs before the clock starts.")] = 1,
    threads: Threads = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the measurements to this file; - prints them.")
    ] = None,
) -> None:
    """Time a network: PyTorch, p2pfast and torch.compile, each in a process of its own.

    Prints the median and the interquartile range of the timed runs, the peak of memory and the largest
    difference from PyTorch in the same dtype. Weights of a named network are seeded; the input is a street
    that p2pfast draws.
    """
    from p2pfast.cli.bench import run_bench

    run_bench(network, size, dtype, device, engines, runs, warmup, threads, json_file)


def main() -> None:
    """Entry point of the ``p2pfast`` command."""
    app()
