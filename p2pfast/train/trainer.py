"""The loop of a run: batches, steps, losses, checkpoints, and stopping at any moment without losing much."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from p2pfast.data.atomic import remove_leftovers
from p2pfast.data.datasets import Sample
from p2pfast.data.loading import Order, load
from p2pfast.errors import InputError, UsageError, first_line
from p2pfast.train import parallel, storage
from p2pfast.train.config import CONFIG_FILE, Config, reaches, save_config
from p2pfast.train.lock import locked
from p2pfast.train.networks import take_pretrained
from p2pfast.train.objective import Objective
from p2pfast.train.parallel import Place
from p2pfast.train.record import Recorder, tensorboard_missing
from p2pfast.train.sets import training_set


class Diverged(Exception):
    """A loss or a weight is NaN or infinite; the message names the step, the term and the last checkpoint."""


class Observer(Protocol):
    """Who watches a run; called in the first process only."""

    def started(self, first_step: int, steps: int, epoch_steps: int) -> None: ...
    def stepped(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float) -> None: ...
    def noted(self, message: str) -> None: ...


class Quiet:
    """An observer that says nothing."""

    def started(self, first_step: int, steps: int, epoch_steps: int) -> None:
        return

    def stepped(self, epoch: int, step: int, losses: Mapping[str, float], seconds: float) -> None:
        return

    def noted(self, message: str) -> None:
        return


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after ``step`` of ``steps``, ``interrupted`` or of itself; ``losses`` of that step."""

    folder: Path
    step: int
    steps: int
    interrupted: bool
    losses: Mapping[str, float]


def objective_of(config: Config, place: Place) -> Objective:
    """The networks and the step of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    match config.kind:
        case "pix2pix":
            from p2pfast.train.pix2pix import Pix2Pix

            return Pix2Pix(config, place)  # type: ignore[arg-type]
        case "pix2pixhd":
            from p2pfast.train.pix2pixhd import Pix2PixHD

            return Pix2PixHD(config, place)  # type: ignore[arg-type]
        case "cyclegan":
            from p2pfast.train.cyclegan import CycleGAN

            return CycleGAN(config, place)  # type: ignore[arg-type]
        case _:
            raise TypeError(f"no objective is known for {config.kind}")


def train(config: Config, observer: Observer | None = None) -> Outcome:
    """Carry out a run, from its beginning or from where it was.

    The run's folder gets the configuration, the networks under the published names (``latest_net_G.pth``,
    ``5_net_G.pth``), ``latest_state.pth`` to go on from, and what `Recorder` writes.

    Raises:
        UsageError: the run cannot start or go on; the message has the remedy.
        InputError: a training file cannot be used; the message names it.
        Diverged: a loss is NaN or infinite.
    """
    config.check()
    place = parallel.join(config.device)
    try:
        return _Run(config, place, observer if observer is not None and place.first else Quiet()).go()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"out of memory ({first_line(error)}); use a smaller --batch-size with --accumulate, a smaller "
            "--crop-size, or --amp bfloat16"
        ) from error
    finally:
        parallel.leave()


class _Run:
    def __init__(self, config: Config, place: Place, observer: Observer) -> None:
        self.config, self.place, self.observer = config, place, observer
        self.folder = config.run_folder
        self.state_file = self.folder / storage.STATE_FILE
        _set_up_torch(config)
        state = self._found_state()
        self.objective = objective_of(config, place)
        self.data = training_set(config, self.objective.multiple)
        self.order = Order(
            len(self.data),  # type: ignore[arg-type]
            config.batch_size,
            config.accumulate,
            place.world,
            config.seed,
            config.serial_batches,
        )
        _check_crop(config, self.objective.least)
        self.steps = config.epochs * self.order.steps
        if config.max_steps:
            self.steps = min(self.steps, config.max_steps)
        self.step = self.epoch = 0
        self.saved: int | None = None  # the step of the last state
        self.renumbered = False  # steps have had another size before
        # Each process has its own dropout.
        torch.manual_seed(config.seed * 1009 + place.rank + 1)
        if state is not None:
            self.objective.finish_setup()
            self._take(state)
        else:
            self._take_pretrained()
            self.objective.finish_setup()

    def _found_state(self) -> dict[str, Any] | None:
        config = self.config
        self.found = _version(self.state_file)
        if self.found is not None:
            if not config.continue_train:
                raise UsageError(
                    f"{self.folder} holds a run already: --continue-train goes on with it, another --name "
                    "starts a new one"
                )
            return storage.read_state(self.state_file)
        if any(self.folder.glob("*_net_*.pth")):
            raise UsageError(
                f"{self.folder} holds networks, but the state to go on from, {storage.STATE_FILE}, is not "
                f"there: start another --name, with --load-pretrain {self.folder} to begin with these"
            )
        if config.continue_train:
            self.observer.noted(f"{self.state_file}: nothing saved yet, so this run begins at its start")
        return None

    def _take(self, state: Mapping[str, Any]) -> None:
        if state["kind"] != self.config.kind:
            raise UsageError(f"{self.folder} holds a run of {state['kind']}, not of {self.config.kind}")
        try:
            self.objective.load_state(state)
        except (RuntimeError, KeyError, ValueError) as error:
            raise UsageError(
                f"{self.state_file}: of other networks than these options make ({first_line(error)}); leave "
                "out options of networks, or start another --name with --load-pretrain"
            ) from error
        owned = state["processes"]
        if len(owned) == self.place.world:
            self.objective.load_own_state(owned[self.place.rank])
        else:
            self.observer.noted(
                f"the run had {len(owned)} processes and has {self.place.world} now; dropout and image pools "
                "begin anew"
            )
        shape = [self.order.samples, self.order.step_size]
        self.step = state["step"]
        if state["order"] != shape:
            epoch = math.ceil(state["step"] / state["epoch_steps"])
            self.step, self.renumbered = epoch * self.order.steps, True
            self.observer.noted(
                f"data or step size have changed ({state['order'][0]} pictures in steps of "
                f"{state['order'][1]} then, {shape[0]} in steps of {shape[1]} now); goes on with epoch "
                f"{epoch + 1}"
            )
        # Of a run that was killed in its first save, the networks are not there.
        networks = (storage.network_file(self.folder, "latest", name) for name in self.objective.weights())
        self.saved = self.step if all(path.exists() for path in networks) else None

    def _take_pretrained(self) -> None:
        if not self.config.load_pretrain:
            return
        folder = Path(self.config.load_pretrain)
        if not folder.is_dir():
            raise UsageError(f"--load-pretrain {folder}: no such folder")
        for name, run in self.objective.networks.items():
            path = storage.network_file(folder, "latest", name)
            if path.exists():
                self.observer.noted(f"net_{name}: {take_pretrained(run.network, path)}")
            elif name.startswith("G"):
                raise UsageError(f"--load-pretrain {folder}: no {path.name} in it")

    def go(self) -> Outcome:
        with ExitStack() as held:
            if self.place.first:
                self._open_folder(held)
            self.place.wait()
            return self._go()

    def _go(self) -> Outcome:
        first_step = None if self.renumbered else self.step
        with _writing(self.folder):
            recorder = Recorder(self.config, first_step) if self.place.first else None
        self.observer.started(self.step, self.steps, self.order.steps)
        losses: Mapping[str, float] = {}
        with _signals() as stop:
            batches = load(
                self.data,
                self.order,
                self.step,
                self.config.epochs,
                rank=self.place.rank,
                workers=self.config.num_threads,
                pin_memory=self.place.device.type == "cuda",
            )
            interrupted = False
            try:  # the loading processes end here, not when Python collects them
                while self.step < self.steps and not interrupted:
                    given = self._next_batches(batches)
                    losses, interrupted = self._one_step(given, recorder, stop.is_set())
                self._save("latest")
            finally:
                batches.close()
                if recorder is not None:
                    recorder.close()
        return Outcome(self.folder, self.step, self.steps, interrupted, losses)

    def _open_folder(self, held: ExitStack) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(self.folder))
            if _version(self.state_file) != self.found:
                raise UsageError(f"{self.folder}: another process has trained there meanwhile; start again")
            for folder in (self.folder, self.folder / "web", self.folder / "web" / "images"):
                remove_leftovers(folder)
            save_config(dataclasses.replace(self.config, continue_train=False), self.folder / CONFIG_FILE)
        except OSError as error:
            raise UsageError(f"{self.folder}: cannot be written: {error.strerror}") from error
        for note in self.objective.notes():
            self.observer.noted(note)
        if not self.config.no_tensorboard and (missing := tensorboard_missing()):
            self.observer.noted(missing)

    def _next_batches(self, batches: Iterator[Sample]) -> list[Sample]:
        """Those of a step. Where a file cannot be used all processes save what they have and end."""
        found: list[Sample] = []
        failure: InputError | None = None
        try:
            for _ in range(self.config.accumulate):
                found.append(next(batches))
                self._check_size(found[-1])
        except InputError as error:
            failure = error
        if self.place.any(failure is not None):
            if self.step:
                self._save("latest")
            raise failure or InputError("another process of this run names a file that cannot be used")
        return found

    def _check_size(self, batch: Sample) -> None:
        least = self.objective.least
        for picture in batch.values():
            height, width = picture.shape[2:]
            if min(height, width) < least:
                raise InputError(
                    f"pictures of {width}x{height} pixels after --preprocess {self.config.preprocess}; these "
                    f"networks need sides of at least {least}"
                )

    def _one_step(
        self, batches: Sequence[Sample], recorder: Recorder | None, stop: bool
    ) -> tuple[Mapping[str, float], bool]:
        began = time.perf_counter()
        config, epoch = self.config, self.step // self.order.steps + 1
        if epoch != self.epoch:
            self.objective.start_epoch(epoch)
            self.epoch = epoch
        terms = self.objective.step(batches)
        # One exchange: losses as all processes have them, and whether any of them was told to stop.
        told = torch.stack([*terms.values(), torch.tensor(float(stop), device=self.place.device)])
        *values, stopping = self.place.mean(told).tolist()
        losses = dict(zip(terms, values, strict=True))
        self.step += 1
        self._check_losses(losses, epoch)
        seconds = time.perf_counter() - began
        self.observer.stepped(epoch, self.step, losses, seconds)
        if recorder is not None:
            with _writing(self.folder):
                if self._due(config.print_freq):
                    recorder.losses(epoch, self.step, losses, seconds, config.learning_rate(epoch))
                if self._due(config.display_freq) or self.step == self.steps:
                    recorder.examples(epoch, self.step, self.objective.pictures())
        end_of_epoch = self.step % self.order.steps == 0
        if end_of_epoch and (epoch % config.save_epoch_freq == 0 or epoch == config.epochs):
            self._save(str(epoch), "latest")
        elif self._due(config.save_latest_freq) or end_of_epoch:
            self._save("latest")
        return losses, stopping > 0

    def _due(self, pictures: int) -> bool:
        """Whether this step brought the run past a multiple of so many pictures."""
        return reaches(pictures, self.step, self.order.step_size)

    def _check_losses(self, losses: Mapping[str, float], epoch: int) -> None:
        for name, value in losses.items():
            if not math.isfinite(value):
                raise Diverged(self._why(f"loss {name} is {value} in step {self.step} (epoch {epoch})"))

    def _why(self, what: str) -> str:
        last = f"the last good checkpoint is {self.state_file} of step {self.saved}"
        remedy = "go on from it with --continue-train and a lower --lr"
        if self.saved is None:
            last, remedy = "no checkpoint was saved before", "use a lower --lr"
        amp = ", or with --amp bfloat16" if self.config.amp == "float16" else ""
        return f"training diverged: {what}; {last}; {remedy}{amp}"

    def _save(self, *labels: str) -> None:
        """The networks as others read them, then the state to go on from: what it covers is all there.

        The first time the other way round, so that networks without a state are never a run that was killed.
        """
        if self.saved == self.step:
            return
        if broken := self.objective.broken():
            raise Diverged(self._why(f"net_{broken} has values that are not finite after step {self.step}"))
        processes = self.place.gather(self.objective.own_state())
        if self.place.first:
            state = {
                "kind": self.config.kind,
                "step": self.step,
                "epoch_steps": self.order.steps,
                "order": [self.order.samples, self.order.step_size],
                "processes": processes,
                **self.objective.state(),
            }
            if self.saved is None:
                storage.save(state, self.state_file, durable=True)
            for label in labels:
                storage.save_networks(self.folder, label, self.objective.weights())
            if self.saved is not None:
                storage.save(state, self.state_file, durable=True)
        self.saved = self.step


def _version(path: Path) -> tuple[int, int] | None:
    """Tells apart what has been in a file's place; None if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Raises UsageError where a disk does not take a file."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: cannot be written: {error.strerror or error}; what was saved "
            "before is still whole"
        ) from error


def _check_crop(config: Config, least: int) -> None:
    if "crop" in config.preprocess and config.crop_size < least:
        raise UsageError(f"--crop-size {config.crop_size}: these networks need sides of at least {least}")


def _set_up_torch(config: Config) -> None:
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True


#: Seconds after which a second signal means more than the first. `timeout`, torchrun and terminals send one
#: wish twice, to the process and to its group.
_AGAIN = 1.0


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the step is finished and saved; later ones end it."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = math.inf

    def ask(number: int, frame: Any) -> None:
        nonlocal first
        now = time.monotonic()
        if now - first >= _AGAIN:
            raise KeyboardInterrupt
        first = min(first, now)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
