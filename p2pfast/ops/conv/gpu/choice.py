"""Which kernel and which tiles a convolution takes: by measurement on its first use, remembered on disk.

``P2PFAST_TUNE`` and ``P2PFAST_CACHE_DIR`` are those of ``p2pfast.ops.measured``. Without a GPU, or where
measuring is switched off, the model of ``configs.py`` decides.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from p2pfast.ops.conv.gpu.configs import Config, describable, described, machine, parts, ranked
from p2pfast.ops.conv.gpu.launch import launches, padding_of
from p2pfast.ops.conv.gpu.library import library_conv, library_refuses
from p2pfast.ops.conv.gpu.pack import Packed, pack, refuses
from p2pfast.ops.conv.gpu.source import Source
from p2pfast.ops.gpu import Launch, allows_tf32, compile_together
from p2pfast.ops.gpu.capture import graph_seconds, in_capture
from p2pfast.ops.measured import cache_folder, tuning

# An estimate that is this far behind needs no measurement to lose.
_WORTH_MEASURING = 1.5
_MOST_MEASURED = 4  # compiling takes seconds
_MOST_DESCRIBED = 2  # of these, also with their weights through a tensor descriptor

_META = torch.device("meta")


@dataclass(frozen=True)
class Problem:
    """What the time of a convolution depends on.

    Attributes:
        size, out_size: height and width of the sources and of the output.
        channels: of each source.
        pending: the sources have a normalisation or an activation to be done on load.
        statistics: of the output are wanted.
        precision: of float32 products, as for ``conv``; None: what ``torch.backends.cudnn.allow_tf32`` says.
    """

    images: int
    size: tuple[int, int]
    out_size: tuple[int, int]
    channels: tuple[int, ...]
    out_channels: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    pad_mode: str = "zeros"
    transposed: bool = False
    dtype: torch.dtype = torch.bfloat16
    pending: bool = True
    statistics: bool = True
    precision: str | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to do it; ``layout`` for ``pack`` and ``config`` for ``conv``, both None for the library."""

    layout: str | None
    config: Config | None
    seconds: float
    measured: bool = False

    @property
    def name(self) -> str:
        return "library" if self.layout is None else f"{self.layout} {self.config}"


@dataclass(frozen=True)
class Choice:
    """The best of some candidates; the others, quickest first; and for those that cannot run, why."""

    best: Candidate
    others: tuple[Candidate, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def explain(self) -> str:
        """One line: what was chosen, and why the others were not."""
        how = "measured" if self.best.measured else "estimated"
        text = f"{self.best.name}: {how} {self.best.seconds * 1e6:.0f} µs"
        if self.others:
            text += "; slower: " + ", ".join(f"{c.name} {c.seconds * 1e6:.0f} µs" for c in self.others)
        return text + "".join(f"; not {name}: {reason}" for name, reason in self.refused)


def estimated(
    problem: Problem, device: torch.device, layouts: tuple[str, ...] | None = None
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The kernels' candidates by the model, quickest first; the layouts that cannot run, with the reason."""
    found: list[Candidate] = []
    refused: list[tuple[str, str]] = []
    tf32 = allows_tf32() if problem.precision is None else problem.precision != "ieee"
    possible = ("phases", "columns") if problem.transposed else ("plain", "rows")
    for layout in possible if layouts is None else layouts:
        reason = refuses(layout, problem.transposed, problem.stride, problem.kernel, problem.out_channels)
        if reason:
            refused.append((layout, reason))
            continue
        geometry = _packed(problem, layout, _META).geometry
        itemsize = problem.dtype.itemsize
        order = ranked(
            geometry, problem.images, *problem.out_size, itemsize, problem.pending, tf32, machine(device)
        )
        found += [Candidate(layout, config, seconds) for seconds, config in order]
    return sorted(found, key=lambda c: c.seconds), refused


def _packed(problem: Problem, layout: str, device: torch.device) -> Packed:
    return pack(
        _weight(problem, device),
        problem.transposed,
        problem.dtype,
        stride=problem.stride,
        padding=problem.padding,
        channels=problem.channels,
        layout=layout,
    )


def _generator(device: torch.device) -> torch.Generator | None:
    """Not PyTorch's own, whose numbers are the caller's."""
    return None if device.type == "meta" else torch.Generator(device)


def _weight(problem: Problem, device: torch.device) -> torch.Tensor:
    ends = sum(problem.channels), problem.out_channels
    shape = *(ends if problem.transposed else ends[::-1]), *problem.kernel
    # Not all zeros: multiplying by zero takes less power, so that clocks stay higher.
    w = torch.randn(shape, dtype=problem.dtype, device=device, generator=_generator(device)) * 0.05
    return w.contiguous(memory_format=torch.channels_last)


def choose(
    problem: Problem, device: torch.device, library: bool = True, layouts: tuple[str, ...] | None = None
) -> Choice:
    """The quickest way to do a convolution on a device.

    Args:
        device: where it will run; of a CPU (Triton's interpreter), only the model is asked, and so while the
            caller captures a CUDA graph.
        layouts: of packed weights, where not all shall be candidates.
        library: whether the library's convolution between passes is a candidate; an estimate never picks it.

    Raises:
        ValueError: ``P2PFAST_TUNE`` has an unknown value.
    """
    mode = tuning()
    found, refused = estimated(problem, device, layouts)
    if device.type != "cuda" or mode == "off" or in_capture(device):
        return Choice(found[0], tuple(found[1:]), tuple(refused))
    window = problem.kernel, problem.stride, problem.padding, problem.transposed
    reason = library_refuses(problem.size, problem.out_size, *window) if library else "not asked for"
    if reason:
        refused.append(("library", reason))
    signature = _signature(problem, device, reason is None, layouts)
    known = None if mode == "force" else _known(signature)
    if known is None:
        timed = []
        worth = contenders(problem, found, device)
        _compile(problem, worth, device)
        for c in worth:
            try:
                seconds = graph_seconds(runner(problem, c, device), device)
            except (TritonError, RuntimeError) as error:  # no room for it, or it does not compile
                if not isinstance(error, (TritonError, torch.OutOfMemoryError)) and not _described(c):
                    raise
                refused.append((c.name, str(error)))
                continue
            timed.append(dataclasses.replace(c, seconds=seconds, measured=True))
        if reason is None:
            guess = Candidate(None, None, 0.0, True)
            try:
                seconds = graph_seconds(runner(problem, guess, device), device)
            except RuntimeError as error:  # no memory, or no way to do this one
                refused.append(("library", str(error)))
            else:
                timed.append(dataclasses.replace(guess, seconds=seconds))
        if not timed:
            return Choice(found[0], tuple(found[1:]), tuple(refused))
        known = sorted(timed, key=lambda c: c.seconds)
        _remember(signature, known)
    return Choice(known[0], tuple(known[1:]), tuple(refused))


def contenders(problem: Problem, found: list[Candidate], device: torch.device) -> list[Candidate]:
    """What of the kernels' candidates, quickest first, is worth a measurement. The model knows no difference
    between weights through pointers and through a tensor descriptor, which only a clock chooses."""
    close = [c for c in found if c.seconds < _WORTH_MEASURING * found[0].seconds][:_MOST_MEASURED]
    also = []
    for c in close[:_MOST_DESCRIBED] if machine(device).descriptors else []:
        assert c.layout is not None and c.config is not None  # only the library has none
        shaped = described(c.config, problem.dtype.itemsize)
        if shaped and describable(_packed(problem, c.layout, _META).geometry, c.config):
            also.append(dataclasses.replace(c, config=dataclasses.replace(c.config, descriptor=True)))
    return close + also


def _described(candidate: Candidate) -> bool:
    return candidate.config is not None and candidate.config.descriptor


def _compile(problem: Problem, worth: list[Candidate], device: torch.device) -> None:
    """All at once: one after the other they would take seconds each."""
    with torch.cuda.device(device):
        compile_together([launch for c in worth for launch in _kernels(problem, c, _META)])


_decided: dict[object, Config] = {}


def default_config(packed: Packed, x: Tensor, out: Tensor) -> Config:
    """What ``conv`` takes for x (N, H, W, C) and out (N, H', W', Cout) where it is given no configuration.

    Measured on the first use of a shape on a GPU, with a normalisation on load and statistics; by the model
    elsewhere, where measuring is switched off, in PyTorch's deterministic mode, and while a CUDA graph is
    captured. The same for as long as the process lives. x and out may be on the meta device.
    """
    # Not x's: a plan asks with tensors on the meta device, and has to be told what a run will be.
    device = packed.data.device
    key = packed.geometry, tuple(x.shape), tuple(out.shape), x.dtype, allows_tf32(), device, tuning()
    if key not in _decided:
        _decided[key] = _decide(packed, x, out, device)
    return _decided[key]


def _decide(packed: Packed, x: Tensor, out: Tensor, device: torch.device) -> Config:
    size, out_size = (x.shape[1], x.shape[2]), (out.shape[1], out.shape[2])
    padding = packed.given
    if not packed.transposed:
        # That of the same sizes with both sides alike; which padding it is hardly changes the time.
        spans = [(o - 1) * packed.stride + k for o, k in zip(out_size, packed.kernel, strict=True)]
        padding = max(0, spans[0] - size[0]) // 2, max(0, spans[1] - size[1]) // 2
    problem = Problem(
        out.shape[0],
        size,
        out_size,
        packed.channels,
        packed.out_channels,
        packed.kernel,
        packed.stride,
        padding,
        "zeros",
        packed.transposed,
        x.dtype,
    )
    quiet = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda" and not quiet and not torch.cuda.is_current_stream_capturing():
        found = choose(problem, device, False, (packed.layout,)).best
    else:
        found = estimated(problem, device, (packed.layout,))[0][0]
    assert found.config is not None  # only the library has none
    return found.config


def _data(problem: Problem, device: torch.device) -> tuple[list[Source], Tensor]:
    """Random sources, and the output."""
    n, dtype = problem.images, problem.dtype
    sources, generator = [], _generator(device)
    for c in problem.channels:
        x = torch.randn(n, *problem.size, c, dtype=dtype, device=device, generator=generator)
        norm = torch.rand(2, n, c, device=device, generator=generator) + 0.5 if problem.pending else None
        sources.append(Source(x) if norm is None else Source(x, norm[0], norm[1], "relu"))
    return sources, torch.empty(n, *problem.out_size, problem.out_channels, dtype=dtype, device=device)


def _kernels(problem: Problem, candidate: Candidate, device: torch.device) -> list[Launch]:
    """A candidate's launches, on random data of their own."""
    assert candidate.layout is not None and candidate.config is not None
    sources, out = _data(problem, device)
    packed = _packed(problem, candidate.layout, device)
    partial = count = None
    if problem.statistics:
        number = parts(packed, *problem.out_size, candidate.config)
        partial = torch.empty(problem.images, number, 2, problem.out_channels, device=device)
        count = torch.empty(number, device=device)
    how: dict[str, Any] = {"stride": problem.stride, "padding": problem.padding}
    precision = problem.precision or ("tf32" if allows_tf32() else "ieee")
    return launches(
        sources,
        packed,
        None,
        out,
        **how,
        pad=padding_of(sources, packed, out, **how, pad_mode=problem.pad_mode),
        act="none",
        slope=0.0,
        residual=None,
        partial=partial,
        count=count,
        config=candidate.config,
        precision=precision if problem.dtype == torch.float32 else "tf32",
    )


def runner(problem: Problem, candidate: Candidate, device: torch.device) -> Callable[[], None]:
    """Runs a candidate on random data of its own."""
    if candidate.layout is not None:
        steps = _kernels(problem, candidate, device)

        def by_kernels() -> None:
            for launch in steps:
                launch.run()

        return by_kernels
    sources, out = _data(problem, device)
    weight = _weight(problem, device)

    def by_library() -> None:
        library_conv(
            sources,
            weight,
            None,
            out,
            stride=problem.stride,
            padding=problem.padding,
            pad_mode=problem.pad_mode,
            transposed=problem.transposed,
            statistics=problem.statistics,
        )

    return by_library


def _signature(problem: Problem, device: torch.device, library: bool, layouts: tuple[str, ...] | None) -> str:
    """What a choice depends on: the problem, the device and the versions of what runs there."""
    import triton

    from p2pfast import __version__

    about = (
        dataclasses.astuple(problem),
        torch.cuda.get_device_name(device),
        torch.version.cuda,
        torch.backends.cudnn.version(),
        allows_tf32(),
        torch.backends.cudnn.benchmark,
        triton.__version__,
        __version__,
        library,
        layouts,
    )
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]


def _path() -> Path:
    return cache_folder() / "gpu-tiles.json"


def _read() -> dict[str, Any]:
    try:
        stored = json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _known(signature: str) -> list[Candidate] | None:
    """Candidates in the cache, quickest first; None if there are none, or if the file is not such a file."""
    try:
        rows = _read()[signature]
        found = [
            Candidate(layout, None if tile is None else _config(tile), float(seconds), True)
            for layout, tile, seconds in rows
        ]
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return found or None


def _config(tile: list[Any]) -> Config:
    bm, bn, bk, warps, stages, splits = map(int, tile[:6])
    return Config(bm, bn, bk, warps, stages, splits, bool(tile[6]))


def _remember(signature: str, found: list[Candidate]) -> None:
    """Adds candidates to the cache, beside what another process added; an unwritable folder is no error."""
    rows = [
        [c.layout, None if c.config is None else list(dataclasses.astuple(c.config)), c.seconds]
        for c in found
    ]
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), signature: rows}, file)
        os.replace(file.name, path)
    except OSError:
        return
