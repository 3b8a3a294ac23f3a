"""Times the forms of a convolution on the device, once for each shape, remembered on disk.

``P2PFAST_TUNE`` and ``P2PFAST_CACHE_DIR`` are those of :mod:`p2pfast.ops.measured`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from p2pfast.ops.gpu import allows_tf32
from p2pfast.ops.gpu.capture import graph_seconds, in_capture
from p2pfast.ops.measured import cache_folder, tuning
from p2pfast.runtime.gpu.forms import APPLIED, LIBRARY, PROLOGUE, Layer
from p2pfast.runtime.gpu.kernels import Operand, Sizes, Window

if TYPE_CHECKING:
    from p2pfast.runtime.gpu.tensors import Tensors


def _path() -> Any:
    return cache_folder() / "choices-gpu.json"


def _read() -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(_path().read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(entries: dict[str, float]) -> None:
    path = _path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), **entries}, file)
        os.replace(file.name, path)
    except OSError:
        return  # measured again by the next process


def stopwatch(layer: Layer, window: Window, statistics: bool, of: Tensors) -> Callable[[str], float] | None:
    """Seconds of a form of a layer on the device of ``of``; None where measuring is switched off,
    and while the caller captures a CUDA graph."""
    mode = tuning()
    if mode == "off" or of.device.type != "cuda" or in_capture(of.device):
        return None
    from p2pfast import __version__

    about = (
        torch.cuda.get_device_name(of.device),
        torch.version.cuda,
        torch.backends.cudnn.version(),
        allows_tf32(),
        __version__,
        str(of.dtype),
        dataclasses.astuple(layer),
        dataclasses.astuple(window),
    )

    def measure(kind: str) -> float:
        key = hashlib.sha256(json.dumps([about, kind]).encode()).hexdigest()[:32]
        known = _read().get(key) if mode == "on" else None
        if known is None:
            try:
                known = _measure(kind, layer, window, statistics, of)
            except torch.OutOfMemoryError:
                return float("inf")  # of memory that a plan shares better; not remembered
            except RuntimeError:
                if kind != LIBRARY:
                    raise
                return float("inf")  # it has no way to do this one
            _write({key: known})
        return known

    return measure


def _measure(kind: str, layer: Layer, window: Window, statistics: bool, of: Tensors) -> float:
    from p2pfast.runtime.gpu.convolutions import library_conv

    kernels, device, dtype = of.kernels, of.device, of.dtype
    n, c, h, w = layer.images, layer.channels, layer.height, layer.width
    shape = (n, layer.out_channels, layer.out_height, layer.out_width)
    made: dict[str, Any] = {"dtype": dtype, "device": device}
    generator = torch.Generator(device)  # PyTorch's own numbers are the caller's
    x = torch.randn(n, h, w, c, **made, generator=generator)
    factors: Any = torch.ones(2, n, c, device=device) if layer.pending else [None, None]
    act = "relu" if layer.pending else "none"
    pending = Operand(x, factors[0], factors[1], act)
    out = torch.empty(n, layer.out_height, layer.out_width, layer.out_channels, **made)
    size = (c, shape[1]) if layer.transposed else (shape[1], c)
    weight = torch.randn(*size, *window.kernel, **made, generator=generator) * 0.02
    bare, prepared, pad = window, x, (0, 0, 0, 0)
    if layer.border and kind != PROLOGUE:
        bottom = (layer.out_height - 1) * window.stride + window.kernel[0] - window.padding[0] - h
        right = (layer.out_width - 1) * window.stride + window.kernel[1] - window.padding[1] - w
        pad = (window.padding[0], max(0, bottom), window.padding[1], max(0, right))
        bare = Window(window.kernel, window.stride, (0, 0), "zeros", window.transposed)
        prepared = torch.empty(n, h + pad[0] + pad[1], w + pad[2] + pad[3], c, **made)
    elif (layer.pending or layer.apart) and kind != PROLOGUE:
        prepared = torch.empty_like(x)

    def prepare() -> Operand:
        if prepared is not x and not layer.ready:
            kernels.apply(pending, prepared, None, "none", 0.0, pad, window.pad_mode)
        return Operand(prepared)

    if kind == LIBRARY:
        image = prepared.permute(0, 3, 1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)

        def run() -> None:
            prepare()
            result = library_conv(image, weight, None, bare, shape)
            if statistics:
                kernels.statistics(result.permute(0, 2, 3, 1))
    else:
        used = window if kind == PROLOGUE else bare
        source_size = (h, w) if kind == PROLOGUE else (prepared.shape[1], prepared.shape[2])
        waiting = layer.pending and kind == PROLOGUE
        sizes = Sizes(n, source_size, shape[2:], (c,), shape[1], waiting, statistics)
        tiles = kernels.tiles(used, sizes, dtype, device)
        packed = kernels.pack(weight, dtype, used, sizes, tiles)
        partial = count = None
        if statistics:
            parts = kernels.parts(packed, shape[2:], tiles)
            partial = torch.empty(n, parts, 2, shape[1], device=device)
            count = torch.empty(parts, device=device)

        def run() -> None:
            source = pending if kind == PROLOGUE else prepare()
            kernels.conv([source], packed, tiles, None, out, used, "none", 0.0, partial, count)

    assert kind in (PROLOGUE, APPLIED, LIBRARY)
    return graph_seconds(run, device)
