"""``p2pfast train``: options from the configurations, a progress bar, a summary."""

from __future__ import annotations

import dataclasses
import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from p2pfast.cli.errors import BAD_INPUTS, INTERRUPTED, reported
from p2pfast.errors import InputError, UsageError
from p2pfast.train.config import (
    CONFIG_FILE,
    CONFIGS,
    Config,
    CycleGANConfig,
    Meta,
    Pix2PixConfig,
    Pix2PixHDConfig,
    reaches,
    read_config,
)

train_app = typer.Typer(
    name="train",
    help="Train pix2pix, pix2pixHD or CycleGAN with the published recipes.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

_COMMON = """Losses, pictures and networks go to CHECKPOINTS_DIR/NAME, under the published names; `p2pfast
translate` takes `latest_net_G.pth`. A run that was stopped or killed goes on with `--continue-train` and ends
as if it had never been stopped. `torchrun --nproc-per-node N -m p2pfast train …` shares it among N GPUs.

Exit code: 0 finished, 1 stopped by a file that cannot be used or by divergence (the message names it), 2
could not start or not write, 130 interrupted (Ctrl-C finishes the step and saves; twice stops at once)."""

_HELP = {
    "pix2pix": """Pairs of pictures: A and B side by side in DATA/train (Isola et al. 2017).

Example: `p2pfast train pix2pix --data facades --name facades --direction BtoA`""",
    "pix2pixhd": """Label maps to photographs of high resolution (Wang et al. 2018).

Reads DATA/train_label, train_inst and train_img. Coarse first, then the enhancer on top of it:

`p2pfast train pix2pixhd --data cityscapes --name 512p`

`p2pfast train pix2pixhd --data cityscapes --name 1024p --netG local --ngf 32 --load-size 2048 --n-epochs 50
--n-epochs-decay 50 --niter-fix-global 10 --load-pretrain checkpoints/512p`""",
    "cyclegan": """Two sets of pictures without pairs: DATA/trainA and DATA/trainB (Zhu et al. 2017).

Example: `p2pfast train cyclegan --data horse2zebra --name horses`""",
}


def _parameter(entry: dataclasses.Field[Any], hint: type) -> inspect.Parameter:
    meta: Meta = entry.metadata["option"]
    flags = meta.flags or ("--" + entry.name.replace("_", "-"),)
    # Typer would add a --no-no-flip.
    least = meta.least if hint is not float or meta.least is None else float(meta.least)
    limits: dict[str, Any] = {} if hint is bool or meta.least is None else {"min": least}
    option = typer.Option(
        *flags,
        help=meta.help,
        rich_help_panel=meta.group,
        metavar="|".join(meta.choices) or meta.metavar,
        show_default=entry.default != "",
        **limits,
    )
    return inspect.Parameter(
        entry.name, inspect.Parameter.KEYWORD_ONLY, default=entry.default, annotation=Annotated[hint, option]
    )


def _command(kind: str) -> Callable[..., None]:
    """The command of an objective. Its options are the fields of the objective's configuration."""
    config = CONFIGS[kind]
    hints = get_type_hints(config)
    parameters = [_parameter(entry, hints[entry.name]) for entry in dataclasses.fields(config)]

    @reported
    def command(context: typer.Context, **options: Any) -> None:
        given = {
            name: value
            for name, value in options.items()
            if (source := context.get_parameter_source(name)) is not None and source.name != "DEFAULT"
        }
        run_train(kind, given)

    first = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    command.__name__, command.__doc__ = kind, f"{_HELP[kind]}\n\n{_COMMON}"
    command.__signature__ = inspect.Signature([first, *parameters])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in (first, *parameters)}
    return command


for _config in (Pix2PixConfig, Pix2PixHDConfig, CycleGANConfig):
    train_app.command(_config.kind)(_command(_config.kind))


def configuration(kind: str, given: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The configuration of a command line, and what differs from the run it goes on with.

    Raises UsageError if the run's own configuration cannot be read or is of another objective.
    """
    config = CONFIGS[kind](**given)
    saved_file = config.run_folder / CONFIG_FILE
    if not (config.continue_train and config.name and saved_file.exists()):
        return config, []
    saved = read_config(saved_file)
    if saved.kind != kind:
        raise UsageError(
            f"{config.run_folder} holds a run of {saved.kind}: go on with p2pfast train {saved.kind}"
        )
    # The run is where it was found, wherever it was when it began.
    here = {"name": config.name, "checkpoints_dir": config.checkpoints_dir}
    merged = dataclasses.replace(saved, **{**given, **here})
    changed = [
        f"{name} {getattr(saved, name)} is now {value}"
        for name, value in given.items()
        if value != getattr(saved, name) and name not in ("continue_train", "checkpoints_dir", "name")
    ]
    return merged, changed


class _Bar:
    """Shows a run's progress on a terminal, and every so often a line where there is none."""

    def __init__(self, console: Console, config: Config) -> None:
        self.console, self.config = console, config
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task: TaskID | None = None
        self.smooth, self.steps = 0.0, 0
        self.step_size = config.batch_size * config.accumulate * int(os.environ.get("WORLD_SIZE", "1"))

    def started(self, first_step: int, steps: int, epoch_steps: int) -> None:
        self.console.print(
            f"{self.config.kind} {self.config.name}: steps {first_step} to {steps}, {epoch_steps} an epoch"
        )
        self.task = self.progress.add_task(
            "train", total=steps, completed=first_step, epoch=1, rate="", losses=""
        )

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float) -> None:
        # The first step warms up and tells nothing about the others.
        self.smooth = 0.95 * self.smooth + 0.05 * seconds if self.steps > 1 else seconds
        self.steps += 1
        shown = " ".join(f"{name} {value:.3g}" for name, value in losses.items())
        rate = f"{self.smooth:.2f} s/step" if self.smooth >= 0.1 else f"{1000 * self.smooth:.0f} ms/step"
        if self.task is not None:
            self.progress.update(self.task, completed=step, epoch=epoch, rate=rate, losses=shown)
        if not self.console.is_terminal and reaches(self.config.print_freq, step, self.step_size):
            self.console.print(f"epoch {epoch} step {step}: {rate} {shown}", soft_wrap=True)

    def noted(self, message: str) -> None:
        self.console.print(message, soft_wrap=True)


def run_train(kind: str, given: Mapping[str, Any]) -> None:
    """Carry out the command. Raises UsageError, and typer.Exit for a run that did not finish."""
    from p2pfast.train.trainer import Diverged, train

    config, changed = configuration(kind, given)
    first = int(os.environ.get("RANK", "0")) == 0
    bar = _Bar(Console(stderr=True, highlight=False), config)
    if first:
        for change in changed:
            bar.noted(f"changed: {change}")
    try:
        with bar.progress:
            outcome = train(config, bar)
    except (Diverged, InputError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUTS) from error
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {_how_to_go_on(kind, config)}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if not first:
        return
    if outcome.interrupted:
        typer.echo(
            f"interrupted after step {outcome.step} of {outcome.steps}, saved; {_how_to_go_on(kind, config)}",
            err=True,
        )
        raise typer.Exit(INTERRUPTED)
    network = "latest_net_G_A.pth" if kind == "cyclegan" else "latest_net_G.pth"
    typer.echo(f"{outcome.step} steps done; the generator is {outcome.folder / network}")
    page = outcome.folder / "web" / "index.html"
    if page.exists():
        typer.echo(f"pictures: {page}")


def _how_to_go_on(kind: str, config: Config) -> str:
    line = ["p2pfast", "train", kind, "--name", config.name]
    if config.checkpoints_dir != "checkpoints":
        line += ["--checkpoints-dir", config.checkpoints_dir]
    return f"go on with: {shlex.join([*line, '--continue-train'])}"
