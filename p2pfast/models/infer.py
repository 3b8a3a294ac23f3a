"""From the keys and shapes of a checkpoint to the network that it belongs to."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from p2pfast.models.checkpoint import canonical, fitted, read_state_dict
from p2pfast.models.checkpoint_file import CheckpointError
from p2pfast.models.discriminators import (
    MultiscaleDiscriminator,
    NLayerDiscriminator,
    PatchDiscriminatorHD,
    PixelDiscriminator,
)
from p2pfast.models.layers import NormLayer, norm_layer_of
from p2pfast.models.pix2pix import ResnetGenerator, UnetGenerator
from p2pfast.models.pix2pixhd import Encoder, GlobalGenerator, LocalEnhancer
from p2pfast.models.registry import check_options

Shapes = Mapping[str, tuple[int, ...]]
Options = dict[str, Any]


def _norm(shapes: Shapes, conv: str, norm: str, always_bias: bool) -> NormLayer:
    """The norm after the convolution `conv`, from which of its tensors exist.

    Running statistics without an affine are InstanceNorm's, from PyTorch before 0.4. In pix2pix's networks
    a bias before the norm says InstanceNorm.
    """
    bias = f"{conv}.bias" in shapes
    if f"{norm}.weight" in shapes:
        if f"{norm}.running_mean" in shapes and (always_bias or not bias):
            return norm_layer_of("batch")
        return functools.partial(nn.InstanceNorm2d, affine=True)
    return norm_layer_of("instance" if always_bias or bias else "none")


def _below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def _convolutions(shapes: Shapes) -> list[tuple[int, tuple[int, ...]]]:
    """(index, weight shape) of the convolutions of one Sequential, in order."""
    found = []
    for key, shape in shapes.items():
        match = re.fullmatch(r"(\d+)\.weight", key)
        if match and len(shape) == 4:
            found.append((int(match.group(1)), shape))
    return sorted(found)


def _blocks(shapes: Shapes) -> tuple[int, Options]:
    """Number of residual blocks, and what the places of their two convolutions say."""
    blocks: dict[str, set[int]] = {}
    for key, shape in shapes.items():
        match = re.fullmatch(r"(\d+)\.conv_block\.(\d+)\.weight", key)
        if match and len(shape) == 4:
            blocks.setdefault(match.group(1), set()).add(int(match.group(2)))
    if not blocks:
        return 0, {}
    places = {tuple(sorted(indices)) for indices in blocks.values()}
    known: dict[tuple[int, ...], Options] = {
        (1, 5): {},
        (1, 6): {"use_dropout": True},
        (0, 3): {"padding_type": "zero"},
        (0, 4): {"padding_type": "zero", "use_dropout": True},
    }
    if len(places) > 1 or (first := places.pop()) not in known:
        raise LookupError("residual blocks of an unknown layout")
    return len(blocks), known[first]


def _trunk(shapes: Shapes) -> tuple[int, int, int]:
    """(input_nc, ngf, number of downsamplings) of a 7×7 stem with 3×3 convolutions after it."""
    ngf, input_nc = shapes["1.weight"][:2]
    return input_nc, ngf, sum(shape[2:] == (3, 3) for _, shape in _convolutions(shapes)) // 2


def _global(shapes: Shapes) -> Options:
    model = _below(shapes, "model.")
    input_nc, ngf, downs = _trunk(model)
    n_blocks, found = _blocks(model)
    return {
        "input_nc": input_nc,
        "output_nc": _convolutions(model)[-1][1][0],
        "ngf": ngf,
        "n_downsampling": downs,
        "n_blocks": n_blocks,
        "norm_layer": _norm(model, "1", "2", always_bias=True),
        **found,
    }


def _encoder(shapes: Shapes) -> Options:
    found = _global(shapes)
    del found["n_blocks"]
    return found


def _resnet(shapes: Shapes) -> Options:
    found = _global(shapes)
    del found["n_downsampling"]
    return {**found, "norm_layer": _norm(shapes, "model.1", "model.2", always_bias=False)}


def _local(shapes: Shapes) -> Options:
    model = _below(shapes, "model.")
    input_nc, _, downs = _trunk(model)
    enhancers = len({match.group() for key in shapes if (match := re.match(r"model\d+_1\.", key))})
    enter = _below(shapes, f"model{enhancers}_1.")
    leave = _below(shapes, f"model{enhancers}_2.")
    n_blocks_local, found = _blocks(leave)
    return {
        "input_nc": input_nc,
        "output_nc": _convolutions(leave)[-1][1][0],
        "ngf": enter["1.weight"][0],
        "n_downsample_global": downs,
        "n_blocks_global": _blocks(model)[0],
        "n_local_enhancers": enhancers,
        "n_blocks_local": n_blocks_local,
        "norm_layer": _norm(model, "1", "2", always_bias=True),
        **found,
    }


def _unet(shapes: Shapes) -> Options:
    ngf, input_nc = shapes["model.model.0.weight"][:2]
    num_downs, prefix = 1, "model.model.1."
    while f"{prefix}model.1.weight" in shapes:
        num_downs, prefix = num_downs + 1, f"{prefix}model.3."
    return {
        "input_nc": input_nc,
        "output_nc": shapes["model.model.3.weight"][1],
        "num_downs": num_downs,
        "ngf": ngf,
        "norm_layer": _norm(shapes, "model.model.1.model.1", "model.model.1.model.2", always_bias=False),
    }


def _patchgan(shapes: Shapes) -> Options:
    model = _below(shapes, "model.")
    convolutions = _convolutions(model)
    ndf, input_nc = convolutions[0][1][:2]
    n_layers = len(convolutions) - 2
    if n_layers == 1 and convolutions[1][1][0] == ndf:
        n_layers = 0
    return {
        "input_nc": input_nc,
        "ndf": ndf,
        "n_layers": n_layers,
        "norm_layer": _norm(model, "2", "3", always_bias=False),
    }


def _pixel(shapes: Shapes) -> Options:
    ndf, input_nc = shapes["net.0.weight"][:2]
    return {
        "input_nc": input_nc,
        "ndf": ndf,
        "norm_layer": _norm(shapes, "net.2", "net.3", always_bias=False),
    }


def _stages(shapes: Shapes, stage: Callable[[int], str]) -> Options:
    """Options of pix2pixHD's PatchGAN whose stages lie below `stage(0)`, `stage(1)`, …"""
    n_stages = 0
    while f"{stage(n_stages)}0.weight" in shapes:
        n_stages += 1
    ndf, input_nc = shapes[f"{stage(0)}0.weight"][:2]
    return {
        "input_nc": input_nc,
        "ndf": ndf,
        "n_layers": n_stages - 2,
        "norm_layer": _norm(shapes, f"{stage(1)}0", f"{stage(1)}1", always_bias=True),
        "getIntermFeat": True,
    }


def _sequence(shapes: Shapes) -> Options:
    """Options of pix2pixHD's PatchGAN in one Sequential."""
    convolutions = _convolutions(shapes)
    ndf, input_nc = convolutions[0][1][:2]
    return {
        "input_nc": input_nc,
        "ndf": ndf,
        "n_layers": len(convolutions) - 2,
        "norm_layer": _norm(shapes, "2", "3", always_bias=True),
        "getIntermFeat": False,
    }


def _patch_hd(shapes: Shapes) -> Options:
    if "model0.0.weight" in shapes:
        return _stages(shapes, lambda i: f"model{i}.")
    return _sequence(_below(shapes, "model."))


def _multiscale(shapes: Shapes) -> Options:
    num_d = len({match.group() for key in shapes if (match := re.match(r"(scale|layer)\d+", key))})
    if "scale0_layer0.0.weight" in shapes:
        return {**_stages(shapes, lambda i: f"scale0_layer{i}."), "num_D": num_d}
    return {**_sequence(_below(shapes, "layer0.")), "num_D": num_d}


_READERS: dict[type[nn.Module], Callable[[Shapes], Options]] = {
    GlobalGenerator: _global,
    LocalEnhancer: _local,
    Encoder: _encoder,
    ResnetGenerator: _resnet,
    UnetGenerator: _unet,
    NLayerDiscriminator: _patchgan,
    PixelDiscriminator: _pixel,
    PatchDiscriminatorHD: _patch_hd,
    MultiscaleDiscriminator: _multiscale,
}
ARCHITECTURES: dict[str, type[nn.Module]] = {network.__name__: network for network in _READERS}


def _recognise(shapes: Shapes) -> type[nn.Module]:
    if any(re.match(r"scale\d+_layer\d+\.|layer\d+\.", key) for key in shapes):
        return MultiscaleDiscriminator
    if any(re.match(r"model\d+_1\.", key) for key in shapes):
        return LocalEnhancer
    if "net.0.weight" in shapes:
        return PixelDiscriminator
    if "model0.0.weight" in shapes:
        return PatchDiscriminatorHD
    if "model.model.0.weight" in shapes:
        return UnetGenerator
    if shapes.get("model.0.weight", ())[2:] == (4, 4):
        return _which_patchgan(shapes)
    if shapes.get("model.1.weight", ())[2:] == (7, 7):
        return _which_trunk(shapes)
    raise LookupError("keys of none of the known networks")


def _which_patchgan(shapes: Shapes) -> type[nn.Module]:
    """pix2pix's, unless the biases or the widths can only be pix2pixHD's."""
    biased_batch_norm = "model.3.running_mean" in shapes and "model.3.weight" in shapes
    if biased_batch_norm and "model.2.bias" in shapes:
        return PatchDiscriminatorHD
    widths = [shape[0] for _, shape in _convolutions(_below(shapes, "model."))][:-1]
    doubled = [widths[0] * min(2**i, 8) for i in range(len(widths))]
    capped = [min(widths[0] * 2**i, max(512, widths[0])) for i in range(len(widths))]
    return PatchDiscriminatorHD if widths == capped != doubled else NLayerDiscriminator


def _which_trunk(shapes: Shapes) -> type[nn.Module]:
    """With two downsamplings and InstanceNorm, ResnetGenerator and GlobalGenerator are the same network."""
    model = _below(shapes, "model.")
    n_blocks, found = _blocks(model)
    if not n_blocks:
        return Encoder
    biased_batch_norm = "2.running_mean" in model and "2.weight" in model and "1.bias" in model
    if found.get("use_dropout") or (_trunk(model)[2] == 2 and not biased_batch_norm):
        return ResnetGenerator
    return GlobalGenerator


def infer(
    shapes: Mapping[str, tuple[int, ...]], architecture: str | None = None
) -> tuple[type[nn.Module], dict[str, Any]]:
    """The network class and its constructor's arguments, from a state dict's keys and shapes.

    Args:
        shapes: shape of every tensor by its key; wrapper prefixes do no harm.
        architecture: a class name, to skip recognising it.

    Raises:
        LookupError: not one of the known networks.
        ValueError: unknown `architecture`.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture={architecture!r} is not known; give one of {', '.join(ARCHITECTURES)}"
        )
    plain = {canonical(key): tuple(shape) for key, shape in shapes.items()}
    try:
        network = ARCHITECTURES[architecture] if architecture else _recognise(plain)
        return network, _READERS[network](plain)
    except (KeyError, IndexError, ValueError) as error:
        raise LookupError(f"keys of none of the known networks (no {error})") from error


def _depends_on_mode(model: nn.Module) -> bool:
    return any(isinstance(module, (nn.BatchNorm2d, nn.Dropout)) for module in model.modules())


def from_checkpoint(
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    key: str | None = None,
    norm: str | None = None,
    **options: Any,
) -> nn.Module:
    """Builds the network that a checkpoint belongs to and loads it.

    Read from the keys and shapes: the class, input and output channels, widths, numbers of downsamplings,
    blocks, enhancers, layers and scales, the norm, zero padding and dropout in residual blocks,
    `getIntermFeat`. Where the file does not tell, the published default holds, and the keyword arguments say
    otherwise:

    - reflection or replication padding in residual blocks: `padding_type="reflect"`;
    - dropout of a U-Net, which has no trace in the keys: `use_dropout=False`. pix2pix's own scripts train and
      test with it unless told `--no_dropout`: give `use_dropout=True` to have that;
    - a sigmoid at a discriminator's end: `use_sigmoid=False`;
    - no norm at all in a network of pix2pixHD: taken for InstanceNorm, give `norm="none"`;
    - the same keys belong to two networks: two downsamplings with InstanceNorm are a `ResnetGenerator` (the
      same computation as `GlobalGenerator`); no residual blocks are an `Encoder`, not a `GlobalGenerator`; a
      PatchGAN is pix2pix's `NLayerDiscriminator`, not `PatchDiscriminatorHD`: give `architecture=`.

    The network comes in the published test-time mode. The published test scripts do not call `eval()`:
    BatchNorm uses the statistics of the image at hand and dropout is live. So a network with BatchNorm or
    dropout comes in train mode (`eval()` on it is the user's choice, `--eval` in pix2pix), any other in eval
    mode.

    Args:
        path: a .pth or .safetensors file; see `load_checkpoint` for what is accepted.
        architecture: class name of the network, when the keys belong to several.
        key: which dictionary of tensors to take when the file holds several.
        norm: "instance", "batch" or "none" in place of what the file says.
        options: arguments of the network's constructor in place of what the file says.

    Returns:
        The network in PyTorch's default dtype on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is of an unknown network, or does not fit what was asked
            for.
        ValueError: unknown `architecture` or `norm`.
        TypeError: an option that the network does not have, or both `norm` and `norm_layer`.
    """
    state = read_state_dict(path, key=key)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    try:
        network, found = infer(shapes, architecture)
    except LookupError as error:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{path}: {error}. Known: {known}. For another network, build it and call load_checkpoint."
        ) from error
    check_options(network, options)
    if norm is not None:
        if "norm_layer" in options:
            raise TypeError("norm and norm_layer say the same thing; give one of them")
        options["norm_layer"] = norm_layer_of(norm)
    try:
        with torch.device("meta"):
            model = network(**{**found, **options})
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: no {network.__name__} can be built for it ({error})") from error
    tensors = fitted(model, state, path)
    model.to_empty(device="cpu").load_state_dict(tensors)
    return model.train(_depends_on_mode(model))
