"""What ``ops.gpu.compile`` compiles: every tile configuration with what is heaviest for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from p2pfast.ops.conv.gpu.configs import PLAIN_TILES, THIN_TILES, TILES, Config, described, parts, with_depth
from p2pfast.ops.conv.gpu.launch import build
from p2pfast.ops.conv.gpu.pack import pack
from p2pfast.ops.conv.gpu.source import Source
from p2pfast.ops.gpu import Launch, Shipped

BF16, F32 = torch.bfloat16, torch.float32


def _launch(
    config: Config,
    dtype: torch.dtype,
    channels: tuple[int, ...],
    out_channels: int,
    size: tuple[int, int],
    *,
    kernel: int = 3,
    stride: int = 1,
    padding: int = 1,
    output_padding: int = 0,
    pad: str = "reflect",
    transposed: bool = False,
    layout: str | None = None,
    pending: bool = True,
    statistics: bool = True,
    act: str = "none",
    precision: str = "tf32",
    last: bool = False,
    merge: bool = False,
) -> Launch:
    """A layer's launch on the meta device; ``size`` is the input's height and width. With ``last`` stored
    statistics and a residual are done on the way out."""
    meta: dict[str, Any] = {"device": "meta"}
    total = sum(channels)
    ends = (total, out_channels) if transposed else (out_channels, total)
    packed = pack(
        torch.empty(*ends, kernel, kernel, **meta),
        transposed,
        dtype,
        stride=stride,
        padding=(padding, padding),
        channels=channels,
        layout=layout,
    )
    if transposed:
        height, width = ((s - 1) * stride - 2 * padding + kernel + output_padding for s in size)
    else:
        height, width = ((s + 2 * padding - kernel) // stride + 1 for s in size)
    norms = [torch.empty(1, c, **meta) if pending else None for c in channels]
    sources = [
        Source(torch.empty(1, *size, c, dtype=dtype, **meta), norm, norm, "relu" if pending else "none")
        for c, norm in zip(channels, norms, strict=True)
    ]
    number = parts(packed, height, width, config)
    out = torch.empty(1, height, width, out_channels, dtype=dtype, **meta)
    return build(
        sources,
        packed,
        torch.empty(out_channels, **meta),
        out,
        factor=torch.empty(out_channels, **meta) if last else None,
        stride=stride,
        padding=(padding, padding),
        pad="zeros" if transposed else pad,
        act=act,
        slope=0.0,
        residual=Source(torch.empty_like(out)) if last else None,
        partial=torch.empty(1, number, 2, out_channels, **meta) if statistics else None,
        count=torch.empty(number, **meta) if statistics else None,
        config=config,
        precision=precision,
        work=torch.empty(1, **meta) if config.splits > 1 else None,
        merge=merge,
    )


def _multiplies(options: dict[str, Any]) -> bool:
    """Whether tensor cores have something to do."""
    return options.get("precision") != "ieee" and not options.get("merge")


def _channels(tile: Config) -> int:
    """Input channels that such a tile is for."""
    return 32 if tile.bk == 32 else 16 * tile.bm if tile.bm < 64 else max(64, tile.bn)


def shipped() -> list[Shipped]:
    found: list[Shipped] = []

    def add(what: str, config: Config, dtype: torch.dtype, *layer: Any, **options: Any) -> None:
        launch = _launch(config, dtype, *layer, **options)
        found.append(launch.shipped(f"{what}, {str(dtype)[6:]} {config}", _multiplies(options)))

    for tile in TILES:
        add("3x3", tile, BF16, (_channels(tile),), tile.bn, (64, 128))
        if tile.stages < 4 or tile.bk == 32:
            add("3x3", with_depth(tile, 4), F32, (_channels(tile),), tile.bn, (64, 128))
    for tile in (replace(t, descriptor=True) for t in TILES if described(t, 2)):
        add("3x3", tile, BF16, (_channels(tile),), tile.bn, (64, 128))
        if tile.stages < 4:
            add("3x3", with_depth(tile, 4), F32, (_channels(tile),), tile.bn, (64, 128))
    wide, thin = TILES[1], THIN_TILES[0]
    add(
        "3x3 of a padded input", TILES[0], BF16, (1024,), 1024, (34, 66), padding=0, pad="none", pending=False
    )
    add(
        "3x3, stored statistics and residual",
        TILES[0],
        BF16,
        (256,),
        256,
        (64, 64),
        pending=False,
        statistics=False,
        act="relu",
        last=True,
    )
    add(
        "3x3 of a padded input",
        replace(TILES[0], descriptor=True),
        BF16,
        (1024,),
        1024,
        (34, 66),
        padding=0,
        pad="none",
        pending=False,
    )
    for merge in (False, True):
        add(
            "3x3, merging splits" if merge else "3x3, split",
            replace(TILES[5], splits=8),
            BF16,
            (512,),
            512,
            (8, 8),
            pad="zeros",
            merge=merge,
        )
    add("4x4, stride 2", wide, BF16, (128,), 256, (64, 64), kernel=4, stride=2, pad="zeros")
    up: dict[str, Any] = {"stride": 2, "transposed": True}
    add("3x3 transposed", wide, BF16, (1024,), 512, (32, 64), output_padding=1, layout="phases", **up)
    add(
        "3x3 transposed",
        replace(wide, descriptor=True),
        BF16,
        (1024,),
        512,
        (32, 64),
        output_padding=1,
        layout="phases",
        **up,
    )
    add(
        "3x3 transposed, columns",
        wide,
        BF16,
        (64,),
        32,
        (512, 1024),
        output_padding=1,
        layout="columns",
        **up,
    )
    add("4x4 transposed, two sources", wide, torch.float16, (512, 512), 256, (16, 16), kernel=4, **up)
    add("7x7, few channels in", TILES[11], BF16, (3,), 64, (512, 1024), kernel=7, padding=3, pending=False)
    for tile in THIN_TILES:
        channels = (32,) if tile.bk == 32 else (512,)
        add("7x7, few channels out", tile, BF16, channels, 3, (256, 512), **_head(thin is tile))
    single = with_depth(thin, 4)
    add("7x7, few channels out", single, F32, (32,), 3, (256, 512), **_head(True))
    for tile in PLAIN_TILES:
        add("3x3, ieee", tile, F32, (64,), 64, (64, 128), precision="ieee")
    return found


def _head(large: bool) -> dict[str, Any]:
    kernel = 7 if large else 4
    return {"kernel": kernel, "padding": kernel // 2, "act": "tanh", "layout": "rows"}
