"""Which convolution algorithm a layer uses: by measurement, remembered on disk.

``P2PFAST_TUNE=on`` (default) measures a shape on its first use, ``off`` takes the estimate, ``force``
measures again. The cache lives in ``$P2PFAST_CACHE_DIR`` or ``~/.cache/p2pfast``.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from p2pfast import _C

ALGORITHMS = ("direct", "winograd", "winograd2", "streamed", "streamed2", "thin")
DIRECT, WINOGRAD, WINOGRAD2, STREAMED, STREAMED2, THIN = range(6)

# Share of the processor's peak that each algorithm typically reaches, for the estimate.
_EFFICIENCY = (0.8, 0.6, 0.7, 0.5, 0.6, 0.5)

# Packed copies of a layer's weights above this are not kept by default: the streamed algorithms
# transform the weights while they run instead.
PACKED_LIMIT = 64 << 20

_TUNING_MULTIPLICATIONS = 4e8  # of one timed run


@dataclass(frozen=True)
class Choice:
    """An algorithm with its parameters; ``seconds`` is what a measurement gave, 0 for an estimate."""

    algorithm: int
    block: int
    group: int
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return ALGORITHMS[self.algorithm]


def _candidates(args: dict[str, Any], packed_limit: int, thin_only: bool) -> list[tuple[float, Choice]]:
    """Candidates with their estimated cost, cheapest first."""
    blocks = {
        DIRECT: ((0, 0),),
        WINOGRAD: ((24, 64), (48, 64)),
        WINOGRAD2: ((24, 64), (48, 64)),
        STREAMED: ((144, 0), (384, 0)),
        STREAMED2: ((144, 0), (384, 0)),
        THIN: ((0, 0),),
    }
    found = []
    for algorithm, parameters in blocks.items():
        for block, group in parameters:
            trial = {**args, "block": block, "group": group}
            info = _C.conv_info(algorithm, trial)
            if info["refuses"] is not None or info["packed_floats"] * 4 > packed_limit:
                continue
            if algorithm != THIN and thin_only:
                continue
            found.append((info["multiplications"] / _EFFICIENCY[algorithm], Choice(algorithm, block, group)))
    found.sort(key=lambda c: c[0])
    return found


def _signature(args: dict[str, Any], packed_limit: int) -> str:
    """What a choice depends on: the shape, the processor, its level, the threads and this version."""
    from p2pfast import __version__

    skip = {"weight", "bias", "sources", "out", "packed", "workspace", "partial", "count"}
    shape = {k: v for k, v in args.items() if k not in skip}
    shape["sources"] = [
        (
            s["channels"],
            s.get("dtype", 0),
            s.get("channel_stride", 1) == 1,
            bool(s.get("scale")),
            s.get("act", 0),
        )
        for s in args["sources"]
    ]
    shape["out_dtype"] = args["out"].get("dtype", 0)
    shape["out_planar"] = args["out"].get("channel_stride", 1) != 1
    machine = (_C.processor_name(), _C.active_level(), _C.num_threads(), __version__, packed_limit)
    return json.dumps([shape, machine], sort_keys=True)


def cache_file() -> Path:
    root = (
        os.environ.get("P2PFAST_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "p2pfast"
    )
    return Path(root).expanduser() / "choices.json"


def _read(path: Path) -> dict[str, Choice]:
    """The choices in a file; none if it is missing or not such a file."""
    try:
        stored = json.loads(path.read_text())
        found = {str(key): Choice(int(a), int(b), int(g), float(t)) for key, (a, b, g, t) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {key: c for key, c in found.items() if 0 <= c.algorithm < len(ALGORITHMS)}


class _Cache:
    """Choices by signature, in memory and on disk; an unreadable or unwritable file is no error."""

    def __init__(self) -> None:
        self.entries: dict[str, Choice] = {}
        self.loaded: Path | None = None
        self.changed = False

    def _key(self, signature: str) -> str:
        return hashlib.sha256(signature.encode()).hexdigest()[:32]

    def get(self, signature: str) -> Choice | None:
        path = cache_file()
        if self.loaded != path:
            self.loaded, self.entries = path, _read(path)
        return self.entries.get(self._key(signature))

    def put(self, signature: str, choice: Choice) -> None:
        self.entries[self._key(signature)] = choice
        self.changed = True

    def save(self) -> None:
        """Writes new choices, beside those that another process may have added since."""
        if not self.changed:
            return
        self.changed = False
        path = cache_file()
        merged = {**_read(path), **self.entries}
        rows = {key: [c.algorithm, c.block, c.group, c.seconds] for key, c in merged.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
                json.dump(rows, file)
            os.replace(file.name, path)
        except OSError:
            return


cache = _Cache()


def _shortened(args: dict[str, Any], multiplications: float) -> tuple[dict[str, Any], float]:
    """The same convolution over fewer rows, if it is too long for a timed run, and the share kept."""
    share = _TUNING_MULTIPLICATIONS / multiplications
    stride, transposed = args.get("stride", 1), args.get("transposed", False)
    span = args["kernel_h"] + 16
    height = max(span, int(args["height"] * share) // 16 * 16)
    if height >= args["height"]:
        return args, 1.0
    short = dict(args)
    short["height"] = height
    if transposed:
        cut = args["height"] - height
        short["out_height"] = args["out_height"] - cut * stride
    else:
        short["out_height"] = (height + 2 * args.get("pad_top", 0) - args["kernel_h"]) // stride + 1
    return short, height / args["height"]


def _measure(args: dict[str, Any], choice: Choice) -> float:
    """Seconds of one run with arbitrary data; the second of two runs, after caches are warm."""
    info = _C.conv_info(choice.algorithm, {**args, "block": choice.block, "group": choice.group})
    trial, share = _shortened(args, info["multiplications"])
    trial = {**trial, "block": choice.block, "group": choice.group}
    info = _C.conv_info(choice.algorithm, trial)
    keep: list[torch.Tensor] = []

    def memory(count: int, dtype: torch.dtype = torch.float32) -> int:
        # Ones, not whatever was there: denormals and NaN would distort the time.
        tensor = torch.ones(count + 32, dtype=dtype)
        keep.append(tensor)
        return -(-tensor.data_ptr() // 64) * 64

    sources = []
    for source in trial["sources"]:
        source = dict(source)
        dtype = torch.bfloat16 if source.get("dtype") else torch.float32
        spans = [
            (source["image_stride"], trial["images"]),
            (source["row_stride"], args["height"]),
            (source["pixel_stride"], args["width"]),
            (source.get("channel_stride", 1), source["channels"]),
        ]
        source["data"] = memory(sum(abs(s) * (n - 1) for s, n in spans) + 16, dtype)
        if source.get("scale"):
            source["scale"] = memory(trial["images"] * source["norm_stride"])
            source["shift"] = memory(trial["images"] * source["norm_stride"])
        sources.append(source)
    out = dict(trial["out"])
    spans = [
        (out["image_stride"], trial["images"]),
        (out["row_stride"], args["out_height"]),
        (out["pixel_stride"], args["out_width"]),
        (out.get("channel_stride", 1), -(-trial["out_channels"] // 16) * 16),
    ]
    out["data"] = memory(
        sum(s * (n - 1) for s, n in spans) + 16, torch.bfloat16 if out.get("dtype") else torch.float32
    )
    taps = trial["kernel_h"] * trial["kernel_w"]
    weights = trial["out_channels"] * sum(s["channels"] for s in sources) * taps
    trial.update(sources=sources, out=out)
    trial["weight"] = memory(weights, torch.bfloat16 if trial.get("weight_dtype") else torch.float32)
    trial["packed"] = memory(max(1, info["packed_floats"]))
    trial["workspace"] = memory(info["workspace_bytes"] // 4 + 16)
    if trial.get("partial"):
        stride = -(-trial["out_channels"] // 16) * 16
        trial["partial"] = memory(trial["images"] * info["partials"] * 2 * stride)
        trial["count"] = memory(trial["images"] * info["partials"])
    if trial.get("bias"):
        trial["bias"] = memory(trial["out_channels"])
    _C.run_conv(choice.algorithm, trial)
    start = time.perf_counter()
    _C.run_conv(choice.algorithm, trial)
    return (time.perf_counter() - start) / share


def choose(args: dict[str, Any], packed_limit: int = PACKED_LIMIT) -> Choice:
    """The fastest algorithm for a convolution that at least one algorithm accepts.

    ``args`` is the dictionary of ``_C.conv_info`` with addresses that only tell what is wanted: a
    nonzero ``partial``, ``bias`` or ``scale``.
    """
    planar = args["out"].get("channel_stride", 1) != 1
    found = _candidates(args, packed_limit, thin_only=planar and args["out_channels"] <= 4)
    if not found:
        found = _candidates(args, 1 << 62, thin_only=False)
    mode = os.environ.get("P2PFAST_TUNE", "on")
    if mode not in ("on", "off", "force"):
        raise ValueError(f"P2PFAST_TUNE is {mode!r}; choose on, off or force")
    # An estimate that is far behind needs no measurement to lose.
    close = [choice for cost, choice in found if cost < 2.0 * found[0][0]]
    if len(close) == 1 or mode == "off":
        return found[0][1]
    signature = _signature(args, packed_limit)
    known = cache.get(signature) if mode == "on" else None
    if known is None:
        timed = [(_measure(args, choice), choice) for choice in close]
        seconds, best = min(timed, key=lambda t: t[0])
        known = Choice(best.algorithm, best.block, best.group, seconds)
        cache.put(signature, known)
    return known
