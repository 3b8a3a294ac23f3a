"""Small networks of every kind, with the seeded weights of the golden files."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import p2pfast
from p2pfast import models
from p2pfast.data.scenes import draw_scene
from p2pfast.models import norm_layer_of

FIXTURES = Path(__file__).parent / "fixtures" / "golden"
INSTANCE = norm_layer_of("instance")
BATCH = norm_layer_of("batch")
NONE = norm_layer_of("none")


@dataclass(frozen=True)
class Small:
    """A small network, and an input size that it takes."""

    make: Callable[[], nn.Module]
    channels: int
    size: tuple[int, int]


def _small(network: type[nn.Module], *args: Any, size: tuple[int, int] = (32, 48), **options: Any) -> Small:
    return Small(functools.partial(network, *args, **options), args[0], size)


SMALL = {
    "global": _small(models.GlobalGenerator, 5, 2, 4, 3, 2, INSTANCE),
    "global-batch": _small(models.GlobalGenerator, 3, 3, 4, 2, 1, BATCH),
    "global-zero": _small(models.GlobalGenerator, 3, 3, 4, 1, 2, INSTANCE, "zero"),
    "global-affine": _small(
        models.GlobalGenerator, 3, 3, 4, 3, 1, functools.partial(nn.InstanceNorm2d, affine=True)
    ),
    "local": _small(models.LocalEnhancer, 7, 3, 4, 2, 2, 1, 2, INSTANCE),
    "local-two-enhancers": _small(models.LocalEnhancer, 3, 1, 2, 1, 1, 2, 1, INSTANCE),
    "local-three-batch": _small(models.LocalEnhancer, 3, 3, 2, 1, 2, 3, 2, BATCH),
    "local-zero": _small(models.LocalEnhancer, 3, 3, 4, 2, 1, 1, 1, INSTANCE, "zero"),
    "encoder": _small(models.Encoder, 3, 4, 4, 2, INSTANCE),
    "encoder-batch": _small(models.Encoder, 3, 3, 4, 1, BATCH),
    "unet-batch": _small(models.UnetGenerator, 3, 2, 6, 4, BATCH, size=(64, 64)),
    "unet-instance": _small(models.UnetGenerator, 4, 3, 5, 4, INSTANCE, size=(64, 64)),
    "unet-none": _small(models.UnetGenerator, 1, 3, 7, 2, NONE, size=(128, 128)),
    "resnet": _small(models.ResnetGenerator, 3, 3, 4, INSTANCE, False, 3),
    "resnet-batch": _small(models.ResnetGenerator, 1, 3, 4, BATCH, False, 2),
    "resnet-none": _small(models.ResnetGenerator, 3, 3, 4, NONE, False, 2),
    "resnet-dropout": _small(models.ResnetGenerator, 3, 3, 4, INSTANCE, True, 2),
    "resnet-zero": _small(models.ResnetGenerator, 3, 3, 4, INSTANCE, False, 2, "zero"),
    "resnet-zero-dropout": _small(models.ResnetGenerator, 3, 3, 4, BATCH, True, 2, "zero"),
    "patchgan": _small(models.NLayerDiscriminator, 6, 4, 3, BATCH),
    "patchgan-instance": _small(models.NLayerDiscriminator, 3, 4, 5, INSTANCE, size=(128, 128)),
    "patchgan-0": _small(models.NLayerDiscriminator, 3, 4, 0, BATCH),
    "patchgan-1": _small(models.NLayerDiscriminator, 3, 4, 1, NONE),
    "pixel": _small(models.PixelDiscriminator, 6, 4, BATCH),
    "pixel-instance": _small(models.PixelDiscriminator, 3, 4, INSTANCE),
    "patch-hd": _small(models.PatchDiscriminatorHD, 6, 4, 3, BATCH),
    "patch-hd-wide": _small(models.PatchDiscriminatorHD, 3, 4, 5, INSTANCE),
    "patch-hd-features": _small(models.PatchDiscriminatorHD, 6, 4, 2, INSTANCE, False, True),
    "multiscale": _small(models.MultiscaleDiscriminator, 6, 4, 2, BATCH, False, 2, False),
    "multiscale-features": _small(models.MultiscaleDiscriminator, 6, 4, 3, INSTANCE, False, 3, True),
    "multiscale-features-batch": _small(models.MultiscaleDiscriminator, 6, 4, 1, BATCH, False, 1, True),
}


def values(key: str, shape: torch.Size) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    v = generator.standard_normal(tuple(shape), dtype=np.float32)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(v)
    if key.endswith("running_mean"):
        return 0.1 * v
    if v.ndim > 1:
        return v / np.sqrt(np.prod(v.shape[1:]))
    return 1 + 0.1 * v if key.endswith("weight") else 0.1 * v


def seed_weights(model: nn.Module) -> nn.Module:
    """Gives a network the weights of the golden files."""
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = torch.from_numpy(np.asarray(values(key, value.shape), np.float32))
    model.load_state_dict(state)
    return model


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 error; the size of a where b is zero, as the constant output of a 1x1 norm is."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3))


def make(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    small = SMALL[name]
    net = small.make()
    inputs: tuple[torch.Tensor, ...] = (torch.randn(2, small.channels, *small.size),)
    if name.startswith("encoder"):
        inputs += (torch.randint(0, 3, (2, 1, *small.size)),)
    return net, inputs


def drops(net: nn.Module) -> bool:
    return any(isinstance(m, nn.Dropout) for m in net.modules())


def street(seed: int, height: int = 64, width: int = 128) -> p2pfast.LabelMap:
    scene = draw_scene(seed, width=width, height=height, photo=False)
    labels = torch.from_numpy(np.asarray(scene.labels).astype(np.int64))[None, None]
    instances = torch.from_numpy(np.asarray(scene.instances).astype(np.int32))[None, None]
    return p2pfast.LabelMap(labels, instances, num_classes=35)
