"""Pieces that the published networks share: the choice of norm, reflection padding, residual blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]

NORMS = ("instance", "batch", "none")
PADDINGS = ("reflect", "replicate", "zero")


def no_norm(channels: int) -> nn.Module:
    """Norm layer of networks without one. It keeps its place, so the indices in the keys do not move."""
    return nn.Identity()


def norm_layer_of(norm: str) -> NormLayer:
    """Norm layer by its published name.

    Args:
        norm: "instance" (no affine, no running statistics), "batch" (both), or "none".

    Raises:
        ValueError: another name.
    """
    if norm == "instance":
        return functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
    if norm == "batch":
        return functools.partial(nn.BatchNorm2d, affine=True, track_running_stats=True)
    if norm == "none":
        return no_norm
    raise ValueError(f"norm={norm!r} is not known; give one of {', '.join(NORMS)}")


def is_instance_norm(norm_layer: NormLayer) -> bool:
    """True for `nn.InstanceNorm2d` and partials of it.

    pix2pix and CycleGAN give the convolution before a norm a bias in this case only: BatchNorm's own shift
    replaces it.
    """
    layer: object = norm_layer
    while isinstance(layer, functools.partial):
        layer = layer.func
    return layer is nn.InstanceNorm2d


def check_count(name: str, value: int, least: int) -> None:
    """Raises ValueError when a constructor argument is not an integer of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")


def stem(input_nc: int, ngf: int, norm_layer: NormLayer, bias: bool) -> list[nn.Module]:
    """Reflection-padded 7×7 convolution, norm, ReLU: (N, input_nc, H, W) to (N, ngf, H, W)."""
    return [
        nn.ReflectionPad2d(3),
        nn.Conv2d(input_nc, ngf, kernel_size=7, bias=bias),
        norm_layer(ngf),
        nn.ReLU(inplace=True),
    ]


def down(channels: int, norm_layer: NormLayer, bias: bool) -> list[nn.Module]:
    """Stride-2 3×3 convolution, norm, ReLU: (N, C, H, W) to (N, 2C, ceil(H/2), ceil(W/2))."""
    return [
        nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=bias),
        norm_layer(2 * channels),
        nn.ReLU(inplace=True),
    ]


def up(channels: int, norm_layer: NormLayer, bias: bool) -> list[nn.Module]:
    """Stride-2 3×3 transposed convolution, norm, ReLU: (N, C, H, W) to (N, C/2, 2H, 2W)."""
    return [
        nn.ConvTranspose2d(
            channels, channels // 2, kernel_size=3, stride=2, padding=1, output_padding=1, bias=bias
        ),
        norm_layer(channels // 2),
        nn.ReLU(inplace=True),
    ]


def head(ngf: int, output_nc: int) -> list[nn.Module]:
    """Reflection-padded 7×7 convolution and tanh: (N, ngf, H, W) to (N, output_nc, H, W) in [-1, 1]."""
    return [nn.ReflectionPad2d(3), nn.Conv2d(ngf, output_nc, kernel_size=7), nn.Tanh()]


def _padded_conv(dim: int, padding_type: str, bias: bool) -> list[nn.Module]:
    if padding_type == "zero":
        return [nn.Conv2d(dim, dim, kernel_size=3, padding=1, bias=bias)]
    pad = nn.ReflectionPad2d(1) if padding_type == "reflect" else nn.ReplicationPad2d(1)
    return [pad, nn.Conv2d(dim, dim, kernel_size=3, bias=bias)]


class ResnetBlock(nn.Module):
    """Residual block x + norm(conv(relu(norm(conv(x))))) with two 3×3 convolutions.

    Source: He et al. 2015, "Deep Residual Learning", without the last ReLU as in Johnson et al. 2016;
        argument
    order as in pytorch-CycleGAN-and-pix2pix.

    Args:
        dim: channels C of the input and the output, both (N, C, H, W).
        padding_type: "reflect", "replicate" or "zero". With "zero" the convolutions pad by themselves and the
            keys are `conv_block.0` and `conv_block.3` instead of 1 and 5.
        norm_layer: makes the norm of a number of channels.
        use_dropout: dropout of 0.5 between the two halves; moves the second convolution's key by one.
        use_bias: biases in the convolutions.

    Raises:
        ValueError: unknown `padding_type`.
    """

    def __init__(
        self, dim: int, padding_type: str, norm_layer: NormLayer, use_dropout: bool, use_bias: bool
    ) -> None:
        super().__init__()
        if padding_type not in PADDINGS:
            raise ValueError(f"padding_type={padding_type!r} is not known; give one of {', '.join(PADDINGS)}")
        layers = [*_padded_conv(dim, padding_type, use_bias), norm_layer(dim), nn.ReLU(inplace=True)]
        if use_dropout:
            layers.append(nn.Dropout(0.5))
        layers += [*_padded_conv(dim, padding_type, use_bias), norm_layer(dim)]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)
