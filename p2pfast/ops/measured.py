"""Which of several ways to compute the same is fastest: by measurement, remembered on disk.

``P2PFAST_TUNE=on`` (default) measures a key on its first use, ``off`` takes the last way without measuring,
and so does PyTorch's deterministic mode; ``force`` measures again. Choices lie beside those of the inference
plans, in ``$P2PFAST_CACHE_DIR`` or ``~/.cache/p2pfast``.

The ways round differently, so the first choice that reaches the disk holds for every process: a run that is
stopped and goes on in another process computes the same numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from p2pfast import _C
from p2pfast.ops.gpu import allows_tf32
from p2pfast.ops.gpu.capture import in_capture

T = TypeVar("T")

_REPEATS = 3  # timed runs of each way after one to warm up; the least counts
_SPINNING = 0.02  # seconds of a run that threads left spinning before it can delay noticeably
_LONG = 1.0  # seconds of a run beside which what only a first run does is small
_MOST_REPEATS = 20
_ON_DEVICE = 0.02  # seconds for each way on a GPU, where a run takes little and waits for the device
_FAR_BEHIND = 2.0  # times the best: more than what others on the machine do to one run
_MOST_SETTLED = 4096
_chosen: dict[tuple[object, ...], str] = {}
_settled: dict[tuple[object, ...], str] = {}


def cache_folder() -> Path:
    """Where choices are kept."""
    root = os.environ.get("P2PFAST_CACHE_DIR")
    return Path(root or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "p2pfast").expanduser()


def tuning() -> str:
    """``P2PFAST_TUNE``: "on", "off" or "force".

    Raises:
        ValueError: it has another value.
    """
    mode = os.environ.get("P2PFAST_TUNE", "on")
    if mode not in ("on", "off", "force"):
        raise ValueError(f"P2PFAST_TUNE is {mode!r}; choose on, off or force")
    return mode


def fixed() -> bool:
    """Whether nothing is measured."""
    return torch.are_deterministic_algorithms_enabled() or tuning() == "off"


def fastest(key: tuple[object, ...], *ways: Callable[[], T], device: torch.device | None = None) -> T:
    """The result of the fastest of ``ways``, which compute the same and are known by their names.

    ``key`` says what the time depends on besides the processor, the threads and the versions of PyTorch and
    this library; its parts must have a telling and lasting ``repr``. ``device`` is for ways that run on a
    GPU: the time is until it has finished, after a run that compiles kernels; nothing is measured while the
    caller captures a CUDA graph there. A way that fails there is left out, with a warning.
    """
    name = pick(key, *ways, device=device)
    if device is None or not in_capture(device):
        if len(_settled) >= _MOST_SETTLED:
            _settled.clear()
        _settled[key, _state(device)] = name
    return next(way for way in ways if way.__name__ == name)()


def settled(key: tuple[object, ...], device: torch.device | None = None) -> str | None:
    """The name that ``fastest`` took for ``key`` the last time; None if it has to be asked.

    To ask takes the names of all ways, which may take longer to tell than a small layer to run.
    """
    return _settled.get((key, _state(device)))


def _state(device: torch.device | None) -> tuple[object, ...]:
    """What else choices depend on."""
    here = (
        *(torch.get_num_threads(), _C.active_level(), torch.are_deterministic_algorithms_enabled()),
        *(os.environ.get("P2PFAST_TUNE"), os.environ.get("P2PFAST_CACHE_DIR")),
    )
    return here if device is None else (*here, device, allows_tf32(), torch.backends.cudnn.benchmark)


def pick(
    key: tuple[object, ...],
    *ways: Callable[[], object],
    seconds: float = 0.0,
    lead: float = 0.0,
    device: torch.device | None = None,
) -> str:
    """The name of the fastest of ``ways``, as :func:`fastest` takes it; each is timed for ``seconds``.

    The first is kept unless another is faster by a share ``lead`` of its time.
    """
    if len(ways) == 1 or fixed():
        return ways[-1].__name__
    key = (*key, *(way.__name__ for way in ways), torch.get_num_threads())
    if device is not None:
        key = (*key, allows_tf32(), torch.backends.cudnn.benchmark)
    here = (*key, os.environ.get("P2PFAST_CACHE_DIR"), device)
    if here not in _chosen:
        if device is not None and in_capture(device):
            return ways[-1].__name__
        _chosen[here] = _choose(key, ways, seconds, lead, device)
    return _chosen[here]


def _choose(
    key: tuple[object, ...],
    ways: tuple[Callable[[], object], ...],
    seconds: float,
    lead: float,
    device: torch.device | None,
) -> str:
    from p2pfast import __version__

    machine = [_C.processor_name(), _C.active_level(), __version__, torch.__version__]
    if device is not None:
        machine += [torch.cuda.get_device_name(device), str(torch.backends.cudnn.version())]
        machine += [str(torch.version.cuda), _version("triton")]
    signature = hashlib.sha256(repr((key, tuple(machine))).encode()).hexdigest()[:32]
    path, again = cache_folder() / "ways.json", tuning() == "force"
    names = [way.__name__ for way in ways]
    known = None if again else _read(path).get(signature)
    if known in names:
        return known
    if device is not None:
        ways, seconds = _ready(ways, device), max(seconds, _ON_DEVICE)
    times = _seconds(ways, seconds)
    times[0] *= 1 - lead if ways[0].__name__ == names[0] else 1
    return _settle(path, signature, ways[times.index(min(times))].__name__, names, again)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ready(ways: tuple[Callable[[], object], ...], device: torch.device) -> tuple[Callable[[], object], ...]:
    """The ways that run on a GPU, compiled, each with waiting for the end; the last has no substitute."""

    def waiting(way: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            way()
            torch.cuda.synchronize(device)

        run.__name__ = way.__name__
        return run

    found = []
    for way in map(waiting, ways):
        try:
            way()
        except Exception as error:  # no room for it, or it does not compile there
            if way.__name__ == ways[-1].__name__:
                raise
            text = f"{way.__name__} cannot run on {device} and is not used: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        else:
            found.append(way)
    return tuple(found)


def _seconds(ways: tuple[Callable[[], object], ...], seconds: float) -> list[float]:
    """The least time of each way, over rounds that take them in turn: other programs disturb all alike. Those
    far behind take no part in the next; of short ways after two rounds, as one may have met a busy moment.

    Of short ways the second of two runs is timed, as they are called in use: threads of the way before may
    still be spinning in the first. Of long ways the first counts: it says enough of those that are many times
    slower (bfloat16 without instructions for it).
    """
    best, begin, done = [float("inf")] * len(ways), time.perf_counter(), 0
    while done < _REPEATS or (time.perf_counter() - begin < seconds * len(ways) and done < _MOST_REPEATS):
        for i, way in enumerate(ways):
            settled = done > 1 or (done > 0 and best[i] >= _SPINNING)
            if settled and best[i] > _FAR_BEHIND * min(best):
                continue
            start = time.perf_counter()
            way()
            taken = time.perf_counter() - start
            if best[i] < _SPINNING or (not done and taken < _LONG):
                start = time.perf_counter()
                way()
                taken = time.perf_counter() - start
            best[i] = min(best[i], taken)
        done += 1
    return best


def _read(path: Path) -> dict[str, str]:
    """The choices in a file; none if it is missing or not such a file."""
    try:
        stored = json.loads(path.read_text())
        return {str(key): str(name) for key, name in stored.items()}
    except (OSError, ValueError, AttributeError):
        return {}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _settle(path: Path, signature: str, name: str, names: list[str], again: bool) -> str:
    """Writes a choice; where another process was first, its choice. An unwritable folder is no error."""
    try:
        with _locked(path):
            stored = _read(path)
            first = stored.get(signature)
            if first in names and not again:
                return first
            stored[signature] = name
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(stored, file)
            os.replace(file.name, path)
    except OSError:
        return name
    return name
