"""Generators and encoder of pix2pixHD (Wang et al. 2018, "High-Resolution Image Synthesis and Semantic
Manipulation with Conditional GANs"), in plain PyTorch, with the published argument order, defaults and keys.

Every convolution here has a bias, whatever the norm.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.fx
from torch import Tensor, nn

from p2pfast.models.layers import NormLayer, ResnetBlock, check_count, down, head, stem, up


def _trunk(
    input_nc: int, ngf: int, n_downsampling: int, n_blocks: int, norm_layer: NormLayer, padding_type: str
) -> list[nn.Module]:
    check_count("n_downsampling", n_downsampling, 0)
    check_count("n_blocks", n_blocks, 0)
    layers = stem(input_nc, ngf, norm_layer, bias=True)
    for i in range(n_downsampling):
        layers += down(ngf * 2**i, norm_layer, bias=True)
    for _ in range(n_blocks):
        layers.append(ResnetBlock(ngf * 2**n_downsampling, padding_type, norm_layer, False, True))
    for i in range(n_downsampling, 0, -1):
        layers += up(ngf * 2**i, norm_layer, bias=True)
    return layers


class GlobalGenerator(nn.Module):
    """The coarse generator G1: 7×7 stem, downsamplings, residual blocks, upsamplings, 7×7 head with tanh.

    Args:
        input_nc: channels of the input (N, input_nc, H, W): one-hot labels, and one more for instance edges.
        output_nc: channels of the output (N, output_nc, H, W), in [-1, 1].
        ngf: channels after the stem; each downsampling doubles them.
        n_downsampling: number of stride-2 convolutions, and of transposed ones.
        n_blocks: number of residual blocks.
        norm_layer: makes the norm of a number of channels.
        padding_type: padding inside the residual blocks: "reflect", "replicate" or "zero".

    Sizes that are multiples of `size_multiple` come back unchanged; others come back rounded up.

    Raises:
        ValueError: a negative count, an unknown `padding_type`.
    """

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int = 64,
        n_downsampling: int = 3,
        n_blocks: int = 9,
        norm_layer: NormLayer = nn.BatchNorm2d,
        padding_type: str = "reflect",
    ) -> None:
        super().__init__()
        self.input_nc = input_nc
        self.output_nc = output_nc
        self.size_multiple = 2**n_downsampling
        trunk = _trunk(input_nc, ngf, n_downsampling, n_blocks, norm_layer, padding_type)
        self.model = nn.Sequential(*trunk, *head(ngf, output_nc))

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class LocalEnhancer(nn.Module):
    """The coarse-to-fine generator: a global network at low resolution, refined by one enhancer per doubling.

    The input is average-pooled once per enhancer. Enhancer n downsamples its own resolution once, adds the
    features that came from below, and upsamples again; the last one draws the image.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        output_nc: channels of the output (N, output_nc, H, W), in [-1, 1].
        ngf: channels of the finest stem; the global network has `ngf * 2**n_local_enhancers`.
        n_downsample_global: downsamplings of the global network.
        n_blocks_global: residual blocks of the global network.
        n_local_enhancers: number of enhancers.
        n_blocks_local: residual blocks of each enhancer.
        norm_layer: makes the norm of a number of channels.
        padding_type: padding in the enhancers' residual blocks; the global network's always reflect, as
            published.

    The height and the width have to be multiples of `size_multiple`.

    Raises:
        ValueError: a negative count, no enhancer, an unknown `padding_type`.
    """

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int = 32,
        n_downsample_global: int = 3,
        n_blocks_global: int = 9,
        n_local_enhancers: int = 1,
        n_blocks_local: int = 3,
        norm_layer: NormLayer = nn.BatchNorm2d,
        padding_type: str = "reflect",
    ) -> None:
        super().__init__()
        check_count("n_local_enhancers", n_local_enhancers, 1)
        check_count("n_blocks_local", n_blocks_local, 0)
        self.input_nc = input_nc
        self.output_nc = output_nc
        self.n_local_enhancers = n_local_enhancers
        self.size_multiple = 2 ** (n_downsample_global + n_local_enhancers)
        ngf_global = ngf * 2**n_local_enhancers
        self.model = nn.Sequential(
            *_trunk(input_nc, ngf_global, n_downsample_global, n_blocks_global, norm_layer, "reflect")
        )
        for n in range(1, n_local_enhancers + 1):
            width = ngf * 2 ** (n_local_enhancers - n)
            enter = [*stem(input_nc, width, norm_layer, bias=True), *down(width, norm_layer, bias=True)]
            leave: list[nn.Module] = [
                ResnetBlock(2 * width, padding_type, norm_layer, False, True) for _ in range(n_blocks_local)
            ]
            leave += up(2 * width, norm_layer, bias=True)
            if n == n_local_enhancers:
                leave += head(ngf, output_nc)
            self.add_module(f"model{n}_1", nn.Sequential(*enter))
            self.add_module(f"model{n}_2", nn.Sequential(*leave))
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    def forward(self, input: Tensor) -> Tensor:
        pyramid = [input]
        for _ in range(self.n_local_enhancers):
            pyramid.append(self.downsample(pyramid[-1]))
        features = self.model(pyramid.pop())
        for n in range(1, self.n_local_enhancers + 1):
            enter = cast(nn.Module, getattr(self, f"model{n}_1"))
            leave = cast(nn.Module, getattr(self, f"model{n}_2"))
            features = leave(enter(pyramid.pop()) + features)
        return features


# A leaf of traced graphs: it looks at shapes and finds the instances that are there.
@torch.fx.wrap
def instance_mean(features: Tensor, instances: Tensor) -> Tensor:
    """Replaces every feature by its mean over the pixels of the same instance in the same image.

    Source: the instance-wise average pooling of pix2pixHD (Wang et al. 2018, section 3.4). All instances of
        all
    images are summed in one pass, in float64 so that a region of millions of pixels loses nothing.

    Args:
        features: (N, C, H, W), floating point.
        instances: (N, 1, H, W), any integer type or whole-valued floats; every value is an instance of its
            own, negative and large ones too.

    Returns:
        (N, C, H, W), dtype of `features`; differentiable with respect to `features`.

    Raises:
        ValueError: `instances` has another shape.
    """
    n, c, h, w = features.shape
    if instances.shape != (n, 1, h, w):
        raise ValueError(
            f"instances has shape {tuple(instances.shape)}; features of shape {tuple(features.shape)} "
            f"need {(n, 1, h, w)}"
        )
    ids, index = torch.unique(instances.to(torch.int64), return_inverse=True)
    image = torch.arange(n, device=features.device).view(n, 1)
    region = (index.view(n, h * w) + image * ids.numel()).view(-1)
    regions = n * ids.numel()
    pixels = features.permute(0, 2, 3, 1).reshape(-1, c).double()
    total = pixels.new_zeros(regions, c).index_add(0, region, pixels)
    count = torch.bincount(region, minlength=regions).clamp(min=1)
    mean = (total / count[:, None]).to(features.dtype)
    return mean[region].view(n, h, w, c).permute(0, 3, 1, 2).contiguous()


class Encoder(nn.Module):
    """Feature encoder E: an image becomes a low-dimensional feature map that is constant on every instance.

    Args:
        input_nc: channels of the image (N, input_nc, H, W).
        output_nc: channels of the features (N, output_nc, H, W), in [-1, 1].
        ngf: channels after the stem.
        n_downsampling: number of stride-2 convolutions, and of transposed ones.
        norm_layer: makes the norm of a number of channels.

    The height and the width have to be multiples of `size_multiple`: the features meet the instance map.

    Raises:
        ValueError: a negative `n_downsampling`; in `forward`, an instance map of another size than the
            features.
    """

    def __init__(
        self,
        input_nc: int,
        output_nc: int,
        ngf: int = 32,
        n_downsampling: int = 4,
        norm_layer: NormLayer = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.input_nc = input_nc
        self.output_nc = output_nc
        self.size_multiple = 2**n_downsampling
        trunk = _trunk(input_nc, ngf, n_downsampling, 0, norm_layer, "reflect")
        self.model = nn.Sequential(*trunk, *head(ngf, output_nc))

    def forward(self, input: Tensor, inst: Tensor) -> Tensor:
        """`inst`: instance ids (N, 1, H, W), any integer type, any values."""
        return instance_mean(self.model(input), inst)
