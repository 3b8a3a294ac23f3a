"""Tile configurations that are in use, and a model of their time.

The model ranks configurations and says which are worth a measurement; its seconds are no measurement. Its
rates are an H100's: arithmetic and memory measured with PyTorch, the second-level cache's assumed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from p2pfast.ops.conv.gpu.pack import FLAT_BELOW, Geometry, round_up


@dataclass(frozen=True)
class Config:
    """Sizes of a tile (pixels, columns, depth of a step), warps of a program and stages of its pipeline.

    ``bn`` is 0 for the layout ``"rows"``, which has all columns in a tile. ``splits`` programs share the
    depth of a tile; a second launch adds their sums in order. With ``descriptor``, hardware (TMA) copies
    weights to shared memory, a tile at a time, and no thread computes their addresses.
    """

    bm: int
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3
    splits: int = 1
    descriptor: bool = False

    def __str__(self) -> str:
        text = f"{self.bm}x{self.bn or 'all'}x{self.bk}, {self.warps} warps, {self.stages} stages"
        text += f", {self.splits} splits" if self.splits > 1 else ""
        return f"{text}, descriptor" if self.descriptor else text


# For 16-bit storage; with 32 bits the depth of a step is half. Each compiles for sm_80, sm_90 and sm_100
# without spilled registers (shipped.py).
TILES = (
    Config(128, 128, 64, 8, 4),
    Config(128, 128, 64, 8, 3),
    Config(64, 128, 64, 4, 4),
    Config(128, 64, 64, 8, 3),
    Config(128, 64, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(32, 64, 64, 4, 4),
    Config(16, 64, 64, 4, 4),
    Config(128, 32, 64, 4, 3),
    Config(128, 16, 64, 8, 3),
    # Few input channels.
    Config(128, 128, 32, 8, 4),
    Config(128, 64, 32, 8, 4),
    Config(128, 32, 32, 4, 4),
    Config(128, 16, 32, 4, 4),
)
# Columns and pixels of the tiles that also read weights through descriptors, 128 bytes deep.
DESCRIBED = ((128, 128), (64, 128), (128, 64), (64, 64))
# Few output channels (layout "rows", whose columns are all in one tile).
THIN_TILES = (Config(128, 0, 32, 8, 3), Config(64, 0, 64, 4, 3), Config(32, 0, 64, 4, 3))
_SPLITS = (2, 4, 8, 16)
_LEAST_STEPS = 4  # of a split, for a pipeline to be worth filling
# Values of a thread, where every one has an address and a mask of its own: with more they spill registers.
_MOST_SCATTERED = 32
# float32 without tensor cores.
PLAIN_TILES = (Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2))


@dataclass(frozen=True)
class Machine:
    """A GPU, for the model: rates of one multiprocessor in operations or bytes a second."""

    processors: int = 132
    matrix: float = 798e12 / 132  # bfloat16, both operations of a multiply-add
    cache: float = 7e12 / 132
    memory: float = 3e12  # of all
    issue: float = 4 * 1.7e9  # instructions of warps
    shared: int = 227 * 1024
    threads: int = 2048
    registers: int = 65536
    descriptors: bool = False


@functools.cache
def machine(device: torch.device) -> Machine:
    """The model's device: an H100 with as many multiprocessors and as much shared memory as this one has."""
    if device.type != "cuda":
        return Machine()
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return Machine(
        processors=properties.multi_processor_count, shared=shared, descriptors=properties.major >= 9
    )


def describable(packed: Geometry, config: Config) -> bool:
    """Whether a descriptor can say where the weights of each step are: whole tiles of one tap's channels."""
    return packed.layout != "rows" and all(c >= FLAT_BELOW and c % config.bk == 0 for c in packed.channels)


def described(config: Config, itemsize: int) -> bool:
    """Whether tiles of this shape are compiled with descriptors (shipped.py)."""
    return (config.bm, config.bn) in DESCRIBED and config.bk * itemsize == 128


def with_depth(config: Config, itemsize: int) -> Config:
    """Configurations are for 16 bits; with 32 the depth of a step is half."""
    return config if itemsize == 2 else replace(config, bk=config.bk // 2)


def shared_bytes(config: Config, columns: int, itemsize: int) -> int:
    """Shared memory of the pipeline, which is most of what a program needs."""
    return config.stages * (config.bm + (config.bn or columns)) * config.bk * itemsize


def candidates(
    packed: Geometry, itemsize: int, device: Machine, tensor_cores: bool = True
) -> tuple[Config, ...]:
    """The configurations that fit a layout, a dtype and a device."""
    tiles: tuple[Config, ...]
    if packed.layout == "rows":
        tiles = THIN_TILES
    elif not tensor_cores:
        tiles = PLAIN_TILES
    else:
        narrow = max(packed.channels) <= 32
        tiles = tuple(t for t in TILES if narrow == (t.bk == 32))
        widest = max(16, min(128, round_up(packed.columns, 16)))
        # Half-empty tiles of columns lose to the next smaller ones.
        tiles = tuple(t for t in tiles if t.bn < 2 * widest)
    found = [with_depth(t, itemsize) if tensor_cores else t for t in tiles]
    fitting = [t for t in found if shared_bytes(t, packed.columns, itemsize) <= device.shared]
    return tuple(fitting or found[-1:])


def estimate(
    packed: Geometry,
    config: Config,
    sizes: tuple[int, ...],
    images: int,
    itemsize: int,
    pending: bool,
    device: Machine,
    tensor_cores: bool = True,
) -> float:
    """Seconds by the model: waves of tiles, each step of a tile bound by arithmetic, cache, issue or latency.

    Args:
        sizes: rows of the product of each phase.
        pending: sources have a normalisation or an activation to be done.
    """
    bn = config.bn or packed.columns
    bm = config.bm - packed.kernel[1] + 1 if packed.layout == "rows" else config.bm
    # Weights, from which the depth of all phases follows: each tile of a phase runs over its own share.
    depth = 0.0
    for c in packed.channels:
        share = 1.0 if c < FLAT_BELOW else round_up(c, config.bk) / round_up(c, 16)
        depth += packed.depth * c / sum(packed.channels) * share
    steps = math.ceil(depth / config.bk / len(sizes) / config.splits)
    rows_of_tile = packed.rows if packed.layout == "rows" else 1
    tiles = images * sum(-(-size // (bm * rows_of_tile)) for size in sizes) * -(-packed.columns // bn)
    resident = min(
        device.shared // max(1, shared_bytes(config, packed.columns, itemsize)),
        device.threads // (32 * config.warps),
        device.registers // (32 * config.warps * min(255, 64 + bn * config.bm // (32 * config.warps))),
    )
    resident = max(1, resident)
    whole, tiles = tiles, tiles * config.splits
    here = min(resident, -(-tiles // device.processors))
    rate = device.matrix * (1.0 if itemsize == 2 else 0.5) * (1.0 if tensor_cores else 0.06)
    arithmetic = 2.0 * config.bm * bn * config.bk / rate
    cache = (config.bm + bn) * config.bk * itemsize / device.cache
    transforms = 6.5 if pending else 1.0
    if min(packed.channels) < FLAT_BELOW:
        transforms += 16.0
    issue = (120 * config.warps + transforms * config.bm * config.bk / 32) / device.issue
    latency = 0.8e-6 / max(1, config.stages - 1)
    step = max(arithmetic * here, cache * here, issue * here, latency)
    waves = -(-tiles // (device.processors * here))
    seconds = waves * (steps * step + 3e-6)
    if config.splits > 1:
        # Every split is written and read once, through the second-level cache, in a launch of its own.
        moved = 2.0 * 4 * whole * config.splits * config.bm * bn
        seconds += 4e-6 + moved / (device.cache * device.processors)
    return seconds


def split(config: Config, packed: Geometry, sizes: tuple[int, ...], images: int, on: Machine) -> list[Config]:
    """A configuration, and for a layer of so few tiles that a device would idle, ways to split its depth."""
    if packed.layout == "rows" or packed.depth // len(sizes) < _LEAST_STEPS * 2 * config.bk:
        return [config]
    tiles = images * sum(-(-size // config.bm) for size in sizes) * -(-packed.columns // config.bn)
    steps = packed.depth // len(sizes) // config.bk
    fitting = [s for s in _SPLITS if tiles * s <= 2 * on.processors and steps // s >= _LEAST_STEPS]
    return [config, *(replace(config, splits=s) for s in fitting if tiles < on.processors)]


@functools.lru_cache(4096)
def ranked(
    packed: Geometry,
    images: int,
    out_height: int,
    out_width: int,
    itemsize: int,
    pending: bool,
    tf32: bool,
    on: Machine,
) -> tuple[tuple[float, Config], ...]:
    """Configurations with the model's seconds, quickest first."""
    cores = itemsize == 2 or tf32
    sizes = tuple(phase_sizes(packed, out_height, out_width))
    tiles = candidates(packed, itemsize, on, cores)
    if _scattered(packed, out_height, out_width):
        tiles = tuple(t for t in tiles if t.bm * t.bn <= 32 * t.warps * _MOST_SCATTERED)
    timed = [
        (estimate(packed, c, sizes, images, itemsize, pending, on, cores), c)
        for tile in tiles
        for c in (split(tile, packed, sizes, images, on) if cores else [tile])
    ]
    return tuple(sorted(timed, key=lambda pair: pair[0]))


def _scattered(packed: Geometry, out_height: int, out_width: int) -> bool:
    """Whether neighbouring columns are outputs of several pixels that are stored value by value: those of the
    layout "columns", but where all tiles are full and a pixel's channels make whole vectors."""
    rows = -(-out_height // packed.stride) * -(-out_width // packed.stride)
    full = rows % 128 == 0 and out_height % packed.stride == 0 and out_width % packed.stride == 0
    return packed.layout == "columns" and not (full and packed.out_channels % 16 == 0)


def phase_sizes(packed: Geometry, out_height: int, out_width: int) -> list[int]:
    """Rows of the product of each phase of a transposed convolution, in the order of the grid."""
    if packed.layout in ("plain", "rows"):
        return [out_height * out_width]
    s = packed.stride
    if packed.layout == "columns":
        return [-(-out_height // s) * -(-out_width // s)]
    sizes = []
    for y in range(s):
        for x in range(s):
            at_y, at_x = (y - packed.padding[0]) % s, (x - packed.padding[1]) % s
            sizes.append(max(0, -(-(out_height - at_y) // s)) * max(0, -(-(out_width - at_x) // s)))
    return sizes


def parts(packed: Geometry, out_height: int, out_width: int, config: Config) -> int:
    """How many parts the statistics of one image have: the size of ``partial`` and ``count`` of ``conv``."""
    if packed.layout == "rows":
        return -(-out_width // (config.bm - packed.kernel[1] + 1)) * -(-out_height // packed.rows)
    tiles = sum(-(-size // config.bm) for size in phase_sizes(packed, out_height, out_width))
    return tiles * packed.stride**2 if packed.layout == "columns" else tiles
