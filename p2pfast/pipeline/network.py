"""A network ready for use: loaded, optimised, and knowing what it wants for input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from p2pfast.errors import UsageError, first_line
from p2pfast.functional import image_to_uint8
from p2pfast.labelmap import LabelMap
from p2pfast.pipeline.sizes import Fit, network_fit
from p2pfast.pipeline.transfers import Pictures, pinned, transfers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Network:
    """``run`` takes a LabelMap or a float tensor (N, C, H, W) and gives (N, 1 or 3, H, W) in [-1, 1]."""

    run: nn.Module
    channels: int
    fit: Fit
    device: torch.device
    dtype: torch.dtype
    alone: bool
    """Pictures influence each other within a batch (batch statistics), so batches are of one."""


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device. Raises UsageError if there is no such device."""
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {name}: use auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UsageError(
            "--device cuda: PyTorch finds no usable NVIDIA GPU (see `p2pfast info`); use --device cpu"
        )
    return torch.device("cuda" if name != "cpu" and available else "cpu")


def choose_dtype(name: str) -> torch.dtype:
    """``float32``, ``bfloat16`` or, on a GPU, ``float16`` as a dtype. Raises UsageError."""
    if name not in DTYPES:
        raise UsageError(f"--dtype {name}: use {', '.join(DTYPES)}")
    return DTYPES[name]


def accelerate(
    model: nn.Module, dtype: torch.dtype, device: torch.device, memory_limit: str | None = None
) -> nn.Module:
    """p2pfast's version of a network, on ``device``; it takes LabelMap as well as tensors.

    Raises UsageError for a ``memory_limit`` that is no size, and for float16 on the CPU.
    """
    import p2pfast

    if dtype == torch.float16 and device.type == "cpu":
        raise UsageError("--dtype float16: only GPUs have kernels for it; use float32 or bfloat16")
    try:
        return p2pfast.optimize(model.to(device), dtype=dtype, memory_limit=memory_limit)
    except ValueError as error:
        raise UsageError(f"--memory-limit: {first_line(error)}") from error


def input_channels(model: nn.Module) -> int:
    """Channels of the input: what the first convolution takes. Raises UsageError if there is none."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            return part.in_channels
    raise UsageError("the network has no convolution, so it is not an image-to-image network")


def load_checkpoint(path: Path) -> nn.Module:
    """The network in a checkpoint file, its configuration read off the weights. Raises UsageError."""
    from p2pfast import models

    if not path.is_file():
        raise UsageError(f"checkpoint {path}: no such file")
    try:
        return models.from_checkpoint(path)
    except models.CheckpointError as error:
        raise UsageError(f"checkpoint {first_line(error)}") from error


def prepare(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    evaluate: bool = False,
    memory_limit: str | None = None,
) -> Network:
    """Optimise a network for translation.

    A loaded network comes in the mode of the published test scripts: BatchNorm uses the statistics of the
    picture at hand and dropout is live. ``evaluate`` switches both off.
    """
    if evaluate:
        model.eval()
    lively = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    alone = any(isinstance(part, lively) and part.training for part in model.modules())
    channels = input_channels(model)
    try:
        fit = network_fit(model, channels)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"not an image-to-image network: {first_line(error)}") from error
    return Network(accelerate(model, dtype, device, memory_limit), channels, fit, device, dtype, alone)


def count_classes(channels: int, with_instances: bool, given: int | None) -> int:
    """The number of classes of a label network, inferred from its input or checked against it."""
    edge = int(with_instances)
    classes = channels - edge if given is None else given
    if classes < 1 or classes + edge != channels:
        parts = f"{classes} classes" + (" and an instance edge" if edge else " without instances")
        raise UsageError(
            f"the network takes {channels} input channels, but {parts} make {classes + edge}; "
            f"{'leave out' if edge else 'give'} --instances or correct --num-classes"
        )
    return classes


def run(network: Network, given: LabelMap | Tensor) -> Tensor:
    """Run a batch and give (N, H, W, 1 or 3) uint8. Raises UsageError if the output is no picture."""
    return start(network, given).result()


def start(
    network: Network, given: LabelMap | Tensor, prepare: Callable[[Tensor], Tensor] | None = None
) -> Pictures:
    """Start a batch. On a GPU this returns before it is done, so that decoding, copying, computing and
    encoding of neighbouring batches overlap: inputs and results are copied from and to pinned memory on
    streams of their own (:mod:`p2pfast.pipeline.transfers`), and pixels are made on the device.

    ``prepare`` makes the network's input of a tensor, where the network runs.
    Raises UsageError if the output is no picture.
    """

    def compute(moved: LabelMap | Tensor) -> Tensor:
        if prepare is not None and isinstance(moved, Tensor):
            moved = prepare(moved)
        return _pixels(network, moved)

    with torch.inference_mode():
        if network.device.type != "cuda":
            return Pictures(compute(given))
        return transfers(network.device).run(pinned(given), compute)


def _pixels(network: Network, given: LabelMap | Tensor) -> Tensor:
    output = network.run(given)
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[1] not in (1, 3):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the network gives {found}, not pictures of 1 or 3 channels; is it a generator?")
    return image_to_uint8(output)
