"""Which convolution algorithm a layer uses: by measurement, remembered on disk.

``P2PFAST_TUNE=on`` (default) measures a shape on its first use, ``off`` takes the estimate, ``force``
measures again. The cache lives in ``$P2PFAST_CACHE_DIR`` or ``~/.cache/p2pfast``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from p2pfast import _C
from p2pfast.ops.measured import cache_folder, tuning
from p2pfast.ops.pages import in_large_pages
from p2pfast.runtime.memory import available

ALGORITHMS = ("direct", "winograd", "winograd2", "streamed", "streamed2", "thin", "winograd6")
DIRECT, WINOGRAD, WINOGRAD2, STREAMED, STREAMED2, THIN, WINOGRAD6 = range(7)
_PAIRS = 2  # in the order of the native enumeration of packed types

# Share of the processor's peak that each algorithm typically reaches, for the estimate.
_EFFICIENCY = (0.85, 0.7, 0.8, 0.6, 0.7, 0.5, 0.6)

# Products of bfloat16 pairs against those of float32, where the processor has instructions for them.
_PAIRS_SPEEDUP = 1.8

_TRIALS = 3  # one more whenever trials, candidates or what they pack change: older choices no longer hold
_TUNING_MULTIPLICATIONS = 0.6e9  # of one timed run, as a convolution is defined
_TUNING_CHANNELS = 128  # outputs that a run keeps at least: enough panels for every thread
_TUNING_SECONDS = 0.1  # for repeating what is close
_SHORT = 0.01  # seconds of a timed run whose first time says little
# For estimates of unmeasured choices: multiplications a second, and bytes of weights that come from memory.
_ESTIMATED_RATE = 1e11
_ESTIMATED_BANDWIDTH = 1.5e10


@dataclass(frozen=True)
class Choice:
    """An algorithm with its parameters.

    ``seconds`` is what a measurement gave, or an estimate; ``packed`` the bytes of its copy of the weights.
    ``pairs``: both factors are rounded to bfloat16 and multiplied in pairs.
    """

    algorithm: int
    block: int
    group: int
    seconds: float = 0.0
    packed: int = 0
    pairs: bool = False

    @property
    def name(self) -> str:
        return ALGORITHMS[self.algorithm] + (", bfloat16 pairs" if self.pairs else "")


_PARAMETERS = {
    DIRECT: ((0, 0),),
    WINOGRAD: ((24, 64), (48, 64), (0, 128)),
    WINOGRAD2: ((48, 64), (0, 64)),
    STREAMED: ((144, 0),),
    STREAMED2: ((144, 0),),
    THIN: ((0, 0),),
    WINOGRAD6: ((24, 64), (36, 64)),
}
_STREAMED = (STREAMED, STREAMED2)


def narrow(dtype: torch.dtype, accuracy: str) -> tuple[int, ...]:
    """Algorithms that keep packed weights in bfloat16 in a network stored in ``dtype``.

    Rounded weights of large tiles cost a network 4 to 8 dB more than rounded activations do, so these stay in
    float32 unless ``accuracy`` is "fast". Streamed weights are rounded before they are transformed, as direct
    convolution's are.
    """
    if dtype != torch.bfloat16:
        return ()
    return (DIRECT, *([WINOGRAD] if accuracy == "fast" else []), WINOGRAD2, STREAMED, STREAMED2)


def multiplies_pairs() -> bool:
    """Whether products of bfloat16 pairs are worth a trial: where they are emulated they are slower."""
    return bool(_C.multiplies_pairs())


def _in_pairs(narrow: tuple[int, ...], args: dict[str, Any]) -> tuple[int, ...]:
    """Algorithms that may multiply pairs: those that round weights anyway, with kept weights or streamed.

    Rounding what a tile is transformed to adds about as much error as rounding its weights does. Networks
    stay within 1 dB of PyTorch's bfloat16, but for the 4x4 kernels of a U-Net, whose tiles are two filters:
    they would lose 2 dB. Those with stride 1 are of higher order and lose more, and so do large tiles of
    strided and transposed layers.
    """
    if not narrow or not multiplies_pairs():
        return ()
    fast, stride = WINOGRAD in narrow, args.get("stride", 1)
    if args["kernel_h"] == 4 and (stride == 1 or not fast):
        return (DIRECT,)
    if stride != 1 or not fast:
        return (DIRECT, WINOGRAD2, STREAMED2)
    return (DIRECT, WINOGRAD, WINOGRAD2, STREAMED, STREAMED2)


def default_budget(parameter_bytes: int) -> int:
    """Bytes that packed weights of a network take when the user sets no limit.

    Minimal filtering of 3x3 weights needs up to four times their own size, and most weights of these
    networks are such. Half of the memory that is free bounds it.
    """
    free = available()
    wanted = max(512 << 20, int(4.1 * parameter_bytes))
    return wanted if free is None else min(wanted, free // 2)


# Outputs of a tile and dimension, before a transposed convolution doubles them.
_TILE = {WINOGRAD: 4, WINOGRAD2: 2, STREAMED: 4, STREAMED2: 2, WINOGRAD6: 6}
# Tiles: the points of more do not stay in a cache, and blocks of tiles are always quicker.
_MOST_AT_ONCE = 600
_ROWS = 6  # tiles that the matrix kernel takes at a time; 4 or 5 left over are nearly as good


def _tiles(algorithm: int, args: dict[str, Any]) -> int:
    """Of the whole batch."""
    side = _TILE[algorithm] * (2 if args.get("transposed") else 1)
    per_image = -(-args["out_height"] // side) * -(-args["out_width"] // side)
    return int(args["images"]) * per_image


def _at_once(algorithm: int, block: int) -> bool:
    """Whether all tiles are transformed before the products."""
    return algorithm in _STREAMED or (algorithm in _TILE and block == 0)


def _balanced(algorithm: int, block: int, args: dict[str, Any]) -> int:
    """About ``block`` tiles, such that every thread gets as many blocks as the others.

    Statistics are merged block by block. Without measurements ``block`` stays as it is, and results do not
    depend on the number of threads.
    """
    if algorithm not in _TILE or _at_once(algorithm, block) or tuning() == "off":
        return block
    tiles, threads = _tiles(algorithm, args), _C.num_threads()
    rounds = -(-tiles // (block * threads))
    even = max(1, -(-tiles // (rounds * threads)))
    while even > _ROWS and 0 < even % _ROWS < _ROWS - 2:
        even += 1
    return even


def parameters_of(choice: Choice, narrow: tuple[int, ...]) -> dict[str, int]:
    """The part of ``_C.conv_info``'s dictionary that a choice decides."""
    packed_dtype = _PAIRS if choice.pairs else int(choice.algorithm in narrow)
    return {"block": choice.block, "group": choice.group, "packed_dtype": packed_dtype}


def _candidates(args: dict[str, Any], narrow: tuple[int, ...], thin_only: bool) -> list[Choice]:
    """Candidates with their estimated time, quickest first."""
    found = []
    for algorithm, parameters in _PARAMETERS.items():
        if thin_only and algorithm != THIN:
            continue
        for (block, group), pairs in itertools.product(parameters, (True, False)):
            if _at_once(algorithm, block) and _tiles(algorithm, args) > _MOST_AT_ONCE:
                continue
            if pairs and algorithm not in _in_pairs(narrow, args):
                continue
            choice = Choice(algorithm, _balanced(algorithm, block, args), group, pairs=pairs)
            info = _C.conv_info(algorithm, {**args, **parameters_of(choice, narrow)})
            if info["refuses"] is None:
                rate = _EFFICIENCY[algorithm] * _ESTIMATED_RATE * (_PAIRS_SPEEDUP if pairs else 1)
                packed = info["packed_floats"] * 4
                seconds = info["multiplications"] / rate + packed / _ESTIMATED_BANDWIDTH
                found.append(replace(choice, seconds=seconds, packed=packed))
    return sorted(found, key=lambda c: c.seconds)


def _signature(args: dict[str, Any], narrow: tuple[int, ...]) -> str:
    """What a choice depends on: the shape, the processor, its level, the threads and this version."""
    from p2pfast import __version__

    # Padding and activations hardly change the time; layers that differ in them share a measurement.
    skip = {"weight", "bias", "sources", "out", "packed", "workspace", "partial", "count"}
    skip |= {"pad", "act", "slope", "packed_dtype"}
    shape = {k: v for k, v in args.items() if k not in skip}
    shape["sources"] = [
        (s["channels"], s.get("dtype", 0), s.get("channel_stride", 1) == 1) for s in args["sources"]
    ]
    shape["out_dtype"] = args["out"].get("dtype", 0)
    shape["out_planar"] = args["out"].get("channel_stride", 1) != 1
    machine = (_C.processor_name(), _C.active_level(), _C.num_threads(), __version__, _TRIALS)
    return json.dumps([shape, narrow, machine, *_in_pairs(narrow, args)], sort_keys=True)


def cache_file() -> Path:
    return cache_folder() / "choices.json"


Options = list[Choice]  # of one convolution, quickest first


def _read(path: Path) -> dict[str, Options]:
    """The options in a file; none if it is missing or not such a file."""
    try:
        stored = json.loads(path.read_text())
        found = {
            str(key): [
                Choice(int(a), int(b), int(g), float(t), int(p), pairs == [1])
                for a, b, g, t, p, *pairs in rows
            ]
            for key, rows in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    known = range(len(ALGORITHMS))
    return {key: rows for key, rows in found.items() if rows and all(c.algorithm in known for c in rows)}


class _Cache:
    """Choices by signature, in memory and on disk; an unreadable or unwritable file is no error."""

    def __init__(self) -> None:
        self.entries: dict[str, Options] = {}
        self.loaded: Path | None = None
        self.changed = False

    def _key(self, signature: str) -> str:
        return hashlib.sha256(signature.encode()).hexdigest()[:32]

    def get(self, signature: str) -> Options | None:
        path = cache_file()
        if self.loaded != path:
            self.loaded, self.entries = path, _read(path)
        return self.entries.get(self._key(signature))

    def put(self, signature: str, options: Options) -> None:
        self.entries[self._key(signature)] = options
        self.changed = True

    def save(self) -> None:
        """Writes new choices, beside those that another process may have added since."""
        if not self.changed:
            return
        self.changed = False
        path = cache_file()
        merged = {**_read(path), **self.entries}
        rows = {
            key: [[c.algorithm, c.block, c.group, c.seconds, c.packed, *[1] * c.pairs] for c in options]
            for key, options in merged.items()
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(rows, file)
            os.replace(file.name, path)
        except OSError:
            return


cache = _Cache()


def _shortened(args: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The same convolution over fewer rows and output channels, if it is too long for a timed run, and the
    share of it that is left.

    Rows go first, down to enough tiles for weights to be used as often as in the whole.
    """
    stride, transposed = args.get("stride", 1), args.get("transposed", False)
    pixels = args["height"] * args["width"] if transposed else args["out_height"] * args["out_width"]
    inputs = sum(source["channels"] for source in args["sources"])
    taps = args["kernel_h"] * args["kernel_w"]
    share = _TUNING_MULTIPLICATIONS / (args["images"] * pixels * inputs * args["out_channels"] * taps)
    short, kept = dict(args), 1.0
    height = max(args["kernel_h"] + 32, int(args["height"] * share) // 16 * 16)
    if height < args["height"]:
        short["height"] = height
        if transposed:
            short["out_height"] = args["out_height"] - (args["height"] - height) * stride
        else:
            short["out_height"] = (height + 2 * args.get("pad_top", 0) - args["kernel_h"]) // stride + 1
        kept = height / args["height"]
    least = max(_TUNING_CHANNELS, 32 * _C.num_threads())
    channels = max(least, int(args["out_channels"] * share / kept) // least * least)
    if channels < args["out_channels"]:
        short["out_channels"] = channels
        kept *= channels / args["out_channels"]
    return short, kept


def _pass_over(block: torch.Tensor) -> None:
    """Reads it all, by this thread: PyTorch's others would go on spinning beside the run that is timed."""
    block.view(torch.uint8).numpy().max()


class _Memory:
    """Memory of timed runs, made once for all candidates. Ones: denormals and NaN would distort the time."""

    def __init__(self) -> None:
        self.blocks: dict[str, torch.Tensor] = {}

    def at(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> int:
        name = f"{name}-{dtype}"
        block = self.blocks.get(name)
        if block is None or block.numel() < count + 32:
            block = in_large_pages(torch.empty(count + 32, dtype=dtype, device="cpu")).fill_(1)
            self.blocks[name] = block
        return -(-block.data_ptr() // 64) * 64

    def evict(self) -> None:
        """Empties the caches of weights, which a network's other layers would have pushed out."""
        if "cold" not in self.blocks:
            self.blocks["cold"] = torch.ones(12 << 20, device="cpu")
        _pass_over(self.blocks["cold"])

    def touch(self, name: str) -> None:
        """Brings into the caches what the layer before would have left there."""
        for key, block in self.blocks.items():
            if key.startswith(name) and block.numel() < 4 << 20:
                _pass_over(block)

    def release(self) -> None:
        self.blocks.clear()


_memory = _Memory()


def _measure(args: dict[str, Any], choice: Choice, best: float = float("inf"), warm: bool = False) -> float:
    """Seconds of one run with arbitrary data: inputs in the cache, weights in memory, as in a network.

    Unless it is ``warm``, a run comes before; if that is far behind the ``best`` so far, it is enough.
    """
    trial, share = _shortened(args)
    trial = {**trial, "block": choice.block, "group": choice.group}
    info = _C.conv_info(choice.algorithm, trial)
    sources = []
    for index, source in enumerate(trial["sources"]):
        source = dict(source)
        dtype = torch.bfloat16 if source.get("dtype") else torch.float32
        spans = [
            (source["image_stride"], trial["images"]),
            (source["row_stride"], trial["height"]),
            (source["pixel_stride"], args["width"]),
            (source.get("channel_stride", 1), source["channels"]),
        ]
        source["data"] = _memory.at(f"source{index}", sum(abs(s) * (n - 1) for s, n in spans) + 16, dtype)
        if source.get("scale"):
            source["scale"] = _memory.at("scale", trial["images"] * source["norm_stride"])
            source["shift"] = _memory.at("shift", trial["images"] * source["norm_stride"])
        sources.append(source)
    out = dict(trial["out"])
    spans = [
        (out["image_stride"], trial["images"]),
        (out["row_stride"], trial["out_height"]),
        (out["pixel_stride"], args["out_width"]),
        (out.get("channel_stride", 1), -(-trial["out_channels"] // 16) * 16),
    ]
    dtype = torch.bfloat16 if out.get("dtype") else torch.float32
    out["data"] = _memory.at("out", sum(s * (n - 1) for s, n in spans) + 16, dtype)
    taps = trial["kernel_h"] * trial["kernel_w"]
    inputs = sum(s["channels"] for s in sources)
    weights = (trial["out_channels"] - 1) * trial["weight_out_stride"]
    weights += (inputs - 1) * trial["weight_in_stride"] + taps
    trial.update(sources=sources, out=out)
    dtype = torch.bfloat16 if trial.get("weight_dtype") else torch.float32
    trial["weight"] = _memory.at("weight", weights, dtype)
    trial["packed"] = _memory.at("packed", max(1, info["packed_floats"]))
    trial["workspace"] = _memory.at("workspace", info["workspace_bytes"] // 4 + 16)
    if trial.get("partial"):
        stride = -(-trial["out_channels"] // 16) * 16
        trial["partial"] = _memory.at("partial", trial["images"] * info["partials"] * 2 * stride)
        trial["count"] = _memory.at("count", trial["images"] * info["partials"])
    if trial.get("bias"):
        trial["bias"] = _memory.at("bias", trial["out_channels"])

    def run() -> float:
        start = time.perf_counter()
        _C.run_conv(choice.algorithm, trial)
        return (time.perf_counter() - start) / share

    if not warm and (seconds := run()) > max(1.5 * best, _SHORT / share):
        return seconds
    _memory.evict()
    _memory.touch("source")
    return run()


def _repeated(timed: Options, measure: Callable[[Choice], float]) -> Options:
    """The candidates with the least times of more runs, in turns, of those that may be the quickest.

    Another program's burst must not decide for months.
    """
    end = time.perf_counter() + _TUNING_SECONDS
    for _ in range(5):
        best = min(c.seconds for c in timed)
        close = [c.seconds < 1.3 * best for c in timed]
        if sum(close) == 1:
            break
        timed = [
            replace(c, seconds=min(c.seconds, measure(c))) if near else c
            for c, near in zip(timed, close, strict=True)
        ]
        if time.perf_counter() > end:
            break
    return timed


def options(args: dict[str, Any], narrow: tuple[int, ...] = ()) -> Options:
    """What can run a convolution, quickest first: measured, or estimated where measuring is switched off.

    ``args`` is the dictionary of ``_C.conv_info`` with addresses that only tell what is wanted: a
    nonzero ``partial``, ``bias`` or ``scale``. Algorithms in ``narrow`` pack their weights in bfloat16, and
    some multiply in pairs where the processor has instructions for it.
    """
    planar = args["out"].get("channel_stride", 1) != 1
    thin = planar and args["out_channels"] <= 4
    found = (_candidates(args, narrow, True) if thin else []) or _candidates(args, narrow, False)
    mode = tuning()
    if len(found) == 1 or mode == "off":
        return found
    signature = _signature(args, narrow)
    known = cache.get(signature) if mode == "on" else None
    if known is None:
        # An estimate that is far behind needs no measurement to lose.
        close = [c for c in found if c.seconds < 2.0 * found[0].seconds]

        def measure(c: Choice, best: float = float("inf"), warm: bool = True) -> float:
            return _measure({**args, **parameters_of(c, narrow)}, c, best, warm)

        timed: Options = []
        for candidate in close:
            best = min((c.seconds for c in timed), default=float("inf"))
            timed.append(replace(candidate, seconds=measure(candidate, best, warm=False)))
        timed = _repeated(timed, measure)
        # What needs least memory has to be among the options, if only by its estimate.
        least = min(found, key=lambda c: (c.packed, c.seconds))
        if all(c.packed > least.packed for c in timed):
            pace = min(
                c.seconds / e.seconds
                for c in timed
                for e in close
                if (c.algorithm, c.block, c.pairs) == (e.algorithm, e.block, e.pairs)
            )
            timed.append(replace(least, seconds=pace * least.seconds))
        known = sorted(timed, key=lambda c: c.seconds)
        cache.put(signature, known)
    return known


def finish_measuring() -> None:
    """Saves what was measured and gives the memory of it back."""
    cache.save()
    _memory.release()


def fit(layers: dict[str, Options], budget: int) -> dict[str, Choice]:
    """A choice for each layer, the quickest whose packed weights together stay within ``budget`` bytes.

    Starting from the quickest of each, layers give way one after the other, that with the least time lost
    for a byte first. Over budget only if nothing smaller is left.
    """
    chosen = {name: found[0] for name, found in layers.items()}
    excess = sum(c.packed for c in chosen.values()) - budget
    while excess > 0:
        best: tuple[float, str, Choice] | None = None
        for name, now in chosen.items():
            for other in layers[name]:
                if other.packed < now.packed:
                    loss = (other.seconds - now.seconds) / (now.packed - other.packed)
                    if best is None or loss < best[0]:
                        best = loss, name, other
        if best is None:
            break
        _, name, other = best
        excess -= chosen[name].packed - other.packed
        chosen[name] = other
    return chosen
