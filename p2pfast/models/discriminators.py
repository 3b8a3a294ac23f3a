"""Discriminators of pix2pix / CycleGAN and of pix2pixHD, in plain PyTorch, with the published argument order,
defaults and keys.

Both projects call their PatchGAN `NLayerDiscriminator`. Here that name is pix2pix's (padding 1, biases by
norm, width up to `8 * ndf`); pix2pixHD's (padding 2, always biases, width up to 512) is
`PatchDiscriminatorHD`.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from p2pfast.models.layers import NormLayer, check_count, is_instance_norm


class NLayerDiscriminator(nn.Module):
    """pix2pix's PatchGAN: one logit per patch. `n_layers` 1, 3, 5 see patches of 16, 70, 286 pixels.

    Args:
        input_nc: channels of the input (N, input_nc, H, W); input and image together when conditional.
        ndf: channels of the first layer.
        n_layers: layers with stride 2, the first included.
        norm_layer: makes the norm of a number of channels.

    Returns from `forward`: logits (N, 1, h, w).

    Raises:
        ValueError: a negative `n_layers`.
    """

    def __init__(
        self, input_nc: int, ndf: int = 64, n_layers: int = 3, norm_layer: NormLayer = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        check_count("n_layers", n_layers, 0)
        bias = is_instance_norm(norm_layer)
        layers: list[nn.Module] = [
            nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
        ]
        strides = [2] * (n_layers - 1) + [1]
        width = ndf
        for stride, doublings in zip(strides, [*range(1, n_layers), n_layers], strict=True):
            wider = ndf * min(2**doublings, 8)
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=bias),
                norm_layer(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.model = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class PixelDiscriminator(nn.Module):
    """pix2pix's 1×1 PatchGAN: judges every pixel by itself.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        ndf: channels of the first layer.
        norm_layer: makes the norm of a number of channels.

    Returns from `forward`: logits (N, 1, H, W).
    """

    def __init__(self, input_nc: int, ndf: int = 64, norm_layer: NormLayer = nn.BatchNorm2d) -> None:
        super().__init__()
        bias = is_instance_norm(norm_layer)
        self.net = nn.Sequential(
            nn.Conv2d(input_nc, ndf, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=bias),
            norm_layer(2 * ndf),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * ndf, 1, 1, bias=bias),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.net(input)


def _hd_stages(
    input_nc: int, ndf: int, n_layers: int, norm_layer: NormLayer, use_sigmoid: bool
) -> list[list[nn.Module]]:
    check_count("n_layers", n_layers, 1)
    stages: list[list[nn.Module]] = [
        [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=2), nn.LeakyReLU(0.2, inplace=True)]
    ]
    width = ndf
    for stride in [2] * (n_layers - 1) + [1]:
        wider = min(2 * width, 512)
        stages.append(
            [
                nn.Conv2d(width, wider, 4, stride=stride, padding=2),
                norm_layer(wider),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        )
        width = wider
    stages.append([nn.Conv2d(width, 1, 4, stride=1, padding=2)])
    if use_sigmoid:
        stages.append([nn.Sigmoid()])
    return stages


class PatchDiscriminatorHD(nn.Module):
    """pix2pixHD's PatchGAN, published there as `NLayerDiscriminator`.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        ndf: channels of the first layer; each further one doubles them up to 512.
        n_layers: layers with stride 2, the first included.
        norm_layer: makes the norm of a number of channels.
        use_sigmoid: ends in a sigmoid. As published, it has no effect together with `getIntermFeat`.
        getIntermFeat: return the features of all `n_layers + 2` stages, the logits last, and name the stages
            `model0`, `model1`, … in the keys.

    Returns from `forward`: logits (N, 1, h, w), or the list of features.

    Raises:
        ValueError: `n_layers` below 1.
    """

    def __init__(
        self,
        input_nc: int,
        ndf: int = 64,
        n_layers: int = 3,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_sigmoid: bool = False,
        getIntermFeat: bool = False,
    ) -> None:
        super().__init__()
        self.getIntermFeat = getIntermFeat
        self.n_layers = n_layers
        stages = _hd_stages(input_nc, ndf, n_layers, norm_layer, use_sigmoid)
        if getIntermFeat:
            for i, stage in enumerate(stages):
                self.add_module(f"model{i}", nn.Sequential(*stage))
        else:
            self.model = nn.Sequential(*(layer for stage in stages for layer in stage))

    def forward(self, input: Tensor) -> Tensor | list[Tensor]:
        if not self.getIntermFeat:
            return self.model(input)
        features = []
        for i in range(self.n_layers + 2):
            input = cast(nn.Module, getattr(self, f"model{i}"))(input)
            features.append(input)
        return features


class MultiscaleDiscriminator(nn.Module):
    """pix2pixHD's discriminator: one PatchGAN per scale, each scale half the one before.

    Args:
        input_nc: channels of the input (N, input_nc, H, W).
        ndf: channels of the first layer of every scale.
        n_layers: layers with stride 2 at every scale, the first included.
        norm_layer: makes the norm of a number of channels.
        use_sigmoid: as in `PatchDiscriminatorHD`.
        num_D: number of scales. The last in the keys (`scale{num_D-1}` or `layer{num_D-1}`) sees full size.
        getIntermFeat: return every stage's features instead of the logits alone.

    Returns from `forward`: a list with one entry a scale, full size first; each a list of features (N, C, h,
    w) with the logits last, or of the logits alone.

    Raises:
        ValueError: `num_D` or `n_layers` below 1.
    """

    def __init__(
        self,
        input_nc: int,
        ndf: int = 64,
        n_layers: int = 3,
        norm_layer: NormLayer = nn.BatchNorm2d,
        use_sigmoid: bool = False,
        num_D: int = 3,
        getIntermFeat: bool = False,
    ) -> None:
        super().__init__()
        check_count("num_D", num_D, 1)
        self.num_D = num_D
        self.n_layers = n_layers
        self.getIntermFeat = getIntermFeat
        for scale in range(num_D):
            stages = _hd_stages(input_nc, ndf, n_layers, norm_layer, use_sigmoid)
            if getIntermFeat:
                for i, stage in enumerate(stages[: n_layers + 2]):
                    self.add_module(f"scale{scale}_layer{i}", nn.Sequential(*stage))
            else:
                self.add_module(f"layer{scale}", nn.Sequential(*(m for stage in stages for m in stage)))
        self.downsample = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)

    def _judge(self, scale: int, x: Tensor) -> list[Tensor]:
        if not self.getIntermFeat:
            return [cast(nn.Module, getattr(self, f"layer{scale}"))(x)]
        features = []
        for i in range(self.n_layers + 2):
            x = cast(nn.Module, getattr(self, f"scale{scale}_layer{i}"))(x)
            features.append(x)
        return features

    def forward(self, input: Tensor) -> list[list[Tensor]]:
        judged = [self._judge(self.num_D - 1, input)]
        for scale in range(self.num_D - 2, -1, -1):
            input = self.downsample(input)
            judged.append(self._judge(scale, input))
        return judged
