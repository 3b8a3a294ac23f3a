"""The published configurations by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from p2pfast.models.discriminators import MultiscaleDiscriminator, NLayerDiscriminator, PixelDiscriminator
from p2pfast.models.layers import norm_layer_of
from p2pfast.models.pix2pix import ResnetGenerator, UnetGenerator
from p2pfast.models.pix2pixhd import Encoder, GlobalGenerator, LocalEnhancer


@dataclass(frozen=True)
class Configuration:
    """A network class, the arguments that make the published network of it, and the published norm."""

    network: type[nn.Module]
    norm: str
    options: Mapping[str, Any]


def _configuration(network: type[nn.Module], norm: str, **options: Any) -> Configuration:
    return Configuration(network, norm, MappingProxyType(options))


def _patchgan(norm: str, input_nc: int, n_layers: int) -> Configuration:
    return _configuration(NLayerDiscriminator, norm, input_nc=input_nc, ndf=64, n_layers=n_layers)


# pix2pixHD: 35 Cityscapes labels and the instance edge in, discriminators see the image as well.
# pix2pix: batch norm, discriminators see input and output. CycleGAN: instance norm, output alone.
CONFIGURATIONS: Mapping[str, Configuration] = MappingProxyType(
    {
        "pix2pixhd-local": _configuration(
            LocalEnhancer,
            "instance",
            input_nc=36,
            output_nc=3,
            ngf=32,
            n_downsample_global=4,
            n_blocks_global=9,
            n_local_enhancers=1,
            n_blocks_local=3,
        ),
        "pix2pixhd-global": _configuration(
            GlobalGenerator, "instance", input_nc=36, output_nc=3, ngf=64, n_downsampling=4, n_blocks=9
        ),
        "pix2pixhd-encoder": _configuration(
            Encoder, "instance", input_nc=3, output_nc=3, ngf=16, n_downsampling=4
        ),
        "pix2pixhd-multiscale-d": _configuration(
            MultiscaleDiscriminator,
            "instance",
            input_nc=39,
            ndf=64,
            n_layers=3,
            use_sigmoid=False,
            num_D=3,
            getIntermFeat=True,
        ),
        "unet_256": _configuration(UnetGenerator, "batch", input_nc=3, output_nc=3, num_downs=8, ngf=64),
        "unet_128": _configuration(UnetGenerator, "batch", input_nc=3, output_nc=3, num_downs=7, ngf=64),
        "resnet_9blocks": _configuration(
            ResnetGenerator, "instance", input_nc=3, output_nc=3, ngf=64, n_blocks=9
        ),
        "resnet_6blocks": _configuration(
            ResnetGenerator, "instance", input_nc=3, output_nc=3, ngf=64, n_blocks=6
        ),
        "basic": _patchgan("batch", 6, 3),
        "n_layers": _patchgan("batch", 6, 3),
        "pixel": _configuration(PixelDiscriminator, "batch", input_nc=6, ndf=64),
        "patchgan_1": _configuration(PixelDiscriminator, "batch", input_nc=6, ndf=64),
        "patchgan_16": _patchgan("batch", 6, 1),
        "patchgan_70": _patchgan("batch", 6, 3),
        "patchgan_286": _patchgan("batch", 6, 5),
        "patchgan_cyclegan": _patchgan("instance", 3, 3),
    }
)


def available() -> tuple[str, ...]:
    """Names that `build` knows."""
    return tuple(CONFIGURATIONS)


def check_options(network: type[nn.Module], options: Mapping[str, Any]) -> None:
    """Raises TypeError for an option that the constructor of `network` does not take."""
    known = list(inspect.signature(network).parameters)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"{network.__name__} has no option {', '.join(unknown)}; it takes {', '.join(known)}, "
            "and norm='instance'|'batch'|'none' for norm_layer"
        )


def build(name: str, *, norm: str | None = None, **options: Any) -> nn.Module:
    """Builds a published network with PyTorch's default initialisation, in train mode.

    Args:
        name: one of `available()`. `patchgan_N` is the PatchGAN that sees N×N pixels; "basic" and "pixel" are
            pix2pix's names, "n_layers" is the same as "basic", for use with `n_layers=`.
        norm: "instance", "batch" or "none" in place of the published norm.
        options: arguments of the network's constructor in place of the published values, e.g. `input_nc=39`,
            `use_dropout=True`.

    Raises:
        ValueError: unknown name or norm, or a value that the network refuses.
        TypeError: an option that the network does not have, or both `norm` and `norm_layer`.
    """
    configuration = CONFIGURATIONS.get(name)
    if configuration is None:
        near = difflib.get_close_matches(str(name), CONFIGURATIONS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no network is called {name!r}{hint}; known names: {', '.join(CONFIGURATIONS)}")
    check_options(configuration.network, options)
    if "norm_layer" in options:
        if norm is not None:
            raise TypeError("norm and norm_layer say the same thing; give one of them")
    else:
        options["norm_layer"] = norm_layer_of(configuration.norm if norm is None else norm)
    return configuration.network(**{**configuration.options, **options})
