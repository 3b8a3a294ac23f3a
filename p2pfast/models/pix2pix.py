"""Generators of pix2pix (Isola et al. 2017) and CycleGAN (Zhu et al. 2017), in plain PyTorch, with the
published argument order, defaults and keys.

A convolution that a norm follows has a bias only when that norm is an InstanceNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from p2pfast.models.layers import (
    NormLayer,
    ResnetBlock,
    check_count,
    down,
    head,
    is_instance_norm,
    stem,
    up,
)


class ResnetGenerator(nn.Module):
    """CycleGAN's generator: 7×7 stem, two downsamplings, residual blocks, two upsamplings, 7×7 head with
    tanh.

    Source: Johnson et al. 2016, "Perceptual Losses for Real-Time Style Transfer", as used by CycleGAN.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        output_nc: channels of the output (N, output_nc, H, W), in [-1, 1].
        ngf: channels after the stem.
        norm_layer: makes the norm of a number of channels.
        use_dropout: dropout of 0.5 in every residual block.
        n_blocks: number of residual blocks.
        padding_type: padding inside the residual blocks: "reflect", "replicate" or "zero".

    Sizes that are multiples of `size_multiple` come back unchanged; others come back rounded up.

    Raises:
        ValueError: a negative `n_blocks`, an unknown `padding_type`.
    """

    size_multiple = 4

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
        n_blocks: int = 6,
        padding_type: str = "reflect",
    ) -> None:
        super().__init__()
        check_count("n_blocks", n_blocks, 0)
        self.input_nc = input_nc
        self.output_nc = output_nc
        bias = is_instance_norm(norm_layer)
        layers = stem(input_nc, ngf, norm_layer, bias)
        layers += [*down(ngf, norm_layer, bias), *down(2 * ngf, norm_layer, bias)]
        for _ in range(n_blocks):
            layers.append(ResnetBlock(4 * ngf, padding_type, norm_layer, use_dropout, bias))
        layers += [*up(4 * ngf, norm_layer, bias), *up(2 * ngf, norm_layer, bias)]
        self.model = nn.Sequential(*layers, *head(ngf, output_nc))

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class UnetSkipConnectionBlock(nn.Module):
    """One level of the U-Net: down, the levels below, up; the input is concatenated in front of the result.

    Args:
        outer_nc: channels of the result of the way up.
        inner_nc: channels between the way down and the level below.
        input_nc: channels of the input; `outer_nc` when None.
        submodule: the level below; None for the innermost.
        outermost: no norm and no skip; tanh at the end.
        innermost: nothing below, no norm on the way down.
        norm_layer: makes the norm of a number of channels.
        use_dropout: dropout of 0.5 at the end of the way up.

    The LeakyReLU works in place as published, so the skip carries the activated input. The ReLU that reads
    the concatenation makes both the same: relu(leaky_relu(x)) = relu(x).
    """

    def __init__(
        self,
        outer_nc: int,
        inner_nc: int,
        input_nc: int | None = None,
        submodule: nn.Module | None = None,
        outermost: bool = False,
        innermost: bool = False,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
    ) -> None:
        super().__init__()
        self.outermost = outermost
        bias = is_instance_norm(norm_layer)
        below: list[nn.Module] = [] if submodule is None else [submodule]
        enter: list[nn.Module] = [] if outermost else [nn.LeakyReLU(0.2, inplace=True)]
        enter.append(
            nn.Conv2d(outer_nc if input_nc is None else input_nc, inner_nc, 4, stride=2, padding=1, bias=bias)
        )
        if not (outermost or innermost):
            enter.append(norm_layer(inner_nc))
        leave: list[nn.Module] = [
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(
                inner_nc if innermost else 2 * inner_nc,
                outer_nc,
                4,
                stride=2,
                padding=1,
                bias=bias or outermost,
            ),
            nn.Tanh() if outermost else norm_layer(outer_nc),
        ]
        if use_dropout:
            leave.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*enter, *below, *leave)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    """pix2pix's U-Net: `num_downs` stride-2 4×4 convolutions, as many transposed ones, a skip at every level.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        output_nc: channels of the output (N, output_nc, H, W), in [-1, 1].
        num_downs: number of downsamplings, at least 5; 8 brings 256×256 down to 1×1.
        ngf: channels of the first level; at most 8 times as many further down.
        norm_layer: makes the norm of a number of channels.
        use_dropout: dropout of 0.5 in the `num_downs - 5` levels of full width that have a level below. It
            leaves no trace in the keys.

    The height and the width have to be multiples of `size_multiple`.

    Raises:
        ValueError: `num_downs` below 5.
    """

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        num_downs: int,
        ngf: int = 64,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_dropout: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_downs", num_downs, 5)
        self.input_nc = input_nc
        self.output_nc = output_nc
        self.size_multiple = 2**num_downs
        wide = 8 * ngf
        block = UnetSkipConnectionBlock(wide, wide, innermost=True, norm_layer=norm_layer)
        for _ in range(num_downs - 5):
            block = UnetSkipConnectionBlock(
                wide, wide, submodule=block, norm_layer=norm_layer, use_dropout=use_dropout
            )
        for width in (4 * ngf, 2 * ngf, ngf):
            block = UnetSkipConnectionBlock(width, 2 * width, submodule=block, norm_layer=norm_layer)
        self.model = UnetSkipConnectionBlock(
            output_nc, ngf, input_nc=input_nc, submodule=block, outermost=True, norm_layer=norm_layer
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)
