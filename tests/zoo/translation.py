"""Networks from image to image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from zoo.entry import Entry
from zoo.parts import Residual, down, images, levels, sampled

LABELS = 5


class UNet(nn.Module):
    """Encoder and decoder of 4×4 convolutions, with or without a concatenation at each size."""

    def __init__(self, width: int, size: int, skips: bool = True, dropout: float = 0.5) -> None:
        super().__init__()
        depth = levels(size, 2)
        widths = [min(width * 2**i, width * 8) for i in range(depth)]
        self.skips = skips
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i in range(depth):
            inner = 0 < i < depth - 1
            layers: list[nn.Module] = [
                nn.Conv2d(widths[i - 1] if i else 3, widths[i], 4, 2, 1, bias=not inner)
            ]
            self.down.append(nn.Sequential(*layers, *([nn.BatchNorm2d(widths[i])] if inner else [])))
        for i in range(depth - 1, 0, -1):
            doubled = 2 if skips and i < depth - 1 else 1
            self.up.append(
                nn.Sequential(
                    nn.ReLU(),
                    nn.ConvTranspose2d(widths[i] * doubled, widths[i - 1], 4, 2, 1, bias=False),
                    nn.BatchNorm2d(widths[i - 1]),
                    nn.Dropout(dropout if i > depth - 3 else 0.0),
                )
            )
        self.last = nn.ConvTranspose2d(width * (2 if skips else 1), 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, layer in enumerate(self.down):
            x = layer(F.leaky_relu(x, 0.2) if i else x)
            kept.append(x)
        kept.pop()
        for layer in self.up:
            x = layer(x)
            skip = kept.pop()
            x = torch.cat([skip, x], 1) if self.skips else x
        return torch.tanh(self.last(F.relu(x)))


class EncoderDecoder(UNet):
    """The U-Net without its skip connections."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, size, skips=False)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a pair of images."""

    def __init__(
        self, width: int, size: int, channels: int = 6, norm: type[nn.Module] = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        layers = [
            *down(channels, width, None),
            *down(width, 2 * width, norm),
            *down(2 * width, 4 * width, norm),
        ]
        layers += [nn.Conv2d(4 * width, 8 * width, 4, 1, 1), norm(8 * width), nn.LeakyReLU(0.2, True)]
        self.main = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))

    def forward(self, *given: Tensor) -> Tensor:
        return self.main(torch.cat(given, 1))


class PairPatchDiscriminator(nn.Module):
    """A patch discriminator of (source, target)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = PatchDiscriminator(width, size).main

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.main(torch.cat([source, target], 1))


class InstancePatchDiscriminator(nn.Module):
    """A patch discriminator of one image with instance norm."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = PatchDiscriminator(width, size, 3, nn.InstanceNorm2d).main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class ResnetGenerator(nn.Module):
    """7×7 stem, two halvings, residual blocks, two doublings, 7×7 head; reflection padding, instance norm."""

    def __init__(self, width: int, size: int, blocks: int = 3) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d
        layers: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width), nn.ReLU(True)]
        for i in (1, 2):
            layers += [nn.Conv2d(width * i, 2 * width * i, 3, 2, 1), norm(2 * width * i), nn.ReLU(True)]
        layers += [Residual(4 * width, norm, nn.ReLU(True), "reflect") for _ in range(blocks)]
        for i in (4, 2):
            layers += [
                nn.ConvTranspose2d(width * i, width * i // 2, 3, 2, 1, 1),
                norm(width * i // 2),
                nn.ReLU(True),
            ]
        self.main = nn.Sequential(*layers, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class DualGenerator(UNet):
    """The U-Net whose noise is dropout in more layers."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__(width, size, dropout=0.3)


class DualDiscriminator(nn.Module):
    """A patch critic of one image with batch norm and no sigmoid."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = PatchDiscriminator(width, size, 3).main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).mean(dim=(1, 2, 3))


class DiscoGenerator(nn.Module):
    """Four halvings and four doublings, no skips; leaky ReLU down, ReLU up, sigmoid."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        w = width
        layers = [*down(3, w, None), *down(w, 2 * w), *down(2 * w, 4 * w), *down(4 * w, 8 * w)]
        for inputs in (8 * w, 4 * w, 2 * w):
            layers += [
                nn.ConvTranspose2d(inputs, inputs // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(inputs // 2),
                nn.ReLU(True),
            ]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(w, 3, 4, 2, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)


class DiscoDiscriminator(nn.Module):
    """Returns its probability and the features of its inner layers."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        w = width
        self.stages = nn.ModuleList(
            nn.Sequential(*down(inputs, outputs, nn.BatchNorm2d if inputs > 3 else None))
            for inputs, outputs in ((3, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w))
        )
        self.last = nn.Conv2d(8 * w, 1, size // 16)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return torch.sigmoid(self.last(x)), features[1:]


class DistanceMapping(nn.Module):
    """Maps two images by one generator, and how far apart they are before and after."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.generator = DiscoGenerator(width, size)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, object]:
        made = self.generator(first), self.generator(second)
        apart = (first - second).abs().mean((1, 2, 3)), (made[0] - made[1]).abs().mean((1, 2, 3))
        return {"images": made, "distances": apart}


class UnitGenerator(nn.Module):
    """Two autoencoders with a common latent space: shared last blocks of the encoders, first of the decoders.

    Returns both reconstructions and both translations.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(self._encoder(width) for _ in range(2))
        self.decoders = nn.ModuleList(self._decoder(width) for _ in range(2))
        self.shared_encoder = Residual(4 * width, nn.InstanceNorm2d, nn.LeakyReLU())
        self.shared_decoder = Residual(4 * width, nn.InstanceNorm2d, nn.LeakyReLU())

    def _encoder(self, width: int) -> nn.Sequential:
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, padding=3, padding_mode="replicate"),
            nn.LeakyReLU(),
        ]
        for i in (1, 2):
            layers += [
                nn.Conv2d(width * i, 2 * width * i, 3, 2, 1),
                nn.InstanceNorm2d(2 * width * i, affine=True),
                nn.LeakyReLU(),
            ]
        return nn.Sequential(*layers, Residual(4 * width, nn.InstanceNorm2d, nn.LeakyReLU()))

    def _decoder(self, width: int) -> nn.Sequential:
        layers: list[nn.Module] = [Residual(4 * width, nn.InstanceNorm2d, nn.LeakyReLU())]
        for i in (4, 2):
            layers += [
                nn.ConvTranspose2d(width * i, width * i // 2, 3, 2, 1, 1),
                nn.InstanceNorm2d(width * i // 2),
                nn.LeakyReLU(),
            ]
        return nn.Sequential(*layers, nn.Conv2d(width, 3, 1), nn.Tanh())

    def forward(self, first: Tensor, second: Tensor) -> list[list[Tensor]]:
        results = []
        for encoder, image in zip(self.encoders, (first, second), strict=True):
            mean = self.shared_encoder(encoder(image))
            code = self.shared_decoder(sampled(mean, torch.zeros_like(mean)))
            results.append([decoder(code) for decoder in self.decoders])
        return results


class StarGenerator(nn.Module):
    """One generator for all domains: the wanted one joins the image as constant maps."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()

        def norm(channels: int) -> nn.Module:
            return nn.InstanceNorm2d(channels, affine=True, track_running_stats=True)

        w = width
        layers: list[nn.Module] = [
            nn.Conv2d(3 + LABELS, w, 7, 1, 3, bias=False),
            norm(w),
            nn.ReLU(inplace=True),
        ]
        for i in (1, 2):
            layers += [
                nn.Conv2d(w * i, 2 * w * i, 4, 2, 1, bias=False),
                norm(2 * w * i),
                nn.ReLU(inplace=True),
            ]
        layers += [Residual(4 * w, norm, nn.ReLU(inplace=True)) for _ in range(2)]  # type: ignore[arg-type]
        for i in (4, 2):
            layers += [
                nn.ConvTranspose2d(w * i, w * i // 2, 4, 2, 1, bias=False),
                norm(w * i // 2),
                nn.ReLU(True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(w, 3, 7, 1, 3, bias=False), nn.Tanh())

    def forward(self, x: Tensor, domain: Tensor) -> Tensor:
        domain = domain.view(domain.size(0), domain.size(1), 1, 1).repeat(1, 1, x.size(2), x.size(3))
        return self.main(torch.cat([x, domain], dim=1))


class StarDiscriminator(nn.Module):
    """Real or not for each patch, and the image's domains."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size, 2)
        layers: list[nn.Module] = []
        inputs = 3
        for i in range(n):
            layers += [nn.Conv2d(inputs, width * 2**i, 4, stride=2, padding=1), nn.LeakyReLU(0.01)]
            inputs = width * 2**i
        self.main = nn.Sequential(*layers)
        self.real = nn.Conv2d(inputs, 1, 3, padding=1, bias=False)
        self.domain = nn.Conv2d(inputs, LABELS, 2, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.main(x)
        domains = self.domain(features)
        return self.real(features), domains.view(domains.size(0), domains.size(1))


class CoarseToFine(nn.Module):
    """Two scales: features of the half-sized image are added to the full-sized one's, then refined."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        norm = nn.InstanceNorm2d
        self.halve = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        coarse = ResnetGenerator(2 * width, size // 2, 3)
        coarse.main[1] = nn.Conv2d(LABELS + 1, 2 * width, 7)
        self.coarse = coarse.main[:-3]
        self.enter = nn.Sequential(
            nn.ReflectionPad2d(3),
            nn.Conv2d(LABELS + 1, width, 7),
            norm(width),
            nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            norm(2 * width),
            nn.ReLU(True),
        )
        self.leave = nn.Sequential(
            *[Residual(2 * width, norm, nn.ReLU(True), "reflect") for _ in range(2)],
            nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1),
            norm(width),
            nn.ReLU(True),
            nn.ReflectionPad2d(3),
            nn.Conv2d(width, 3, 7),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.enter(x) + self.coarse(self.halve(x)))


class MultiscaleDiscriminator(nn.Module):
    """Patch discriminators of the image and of its half, with the features of every layer."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.halve = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.scales = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(*down(LABELS + 4, width, None)),
                    nn.Sequential(*down(width, 2 * width, nn.InstanceNorm2d)),
                    nn.Sequential(*down(2 * width, 4 * width, nn.InstanceNorm2d)),
                    nn.Conv2d(4 * width, 1, 4, 1, 2),
                ]
            )
            for _ in range(2)
        )

    def forward(self, condition: Tensor, image: Tensor) -> list[list[Tensor]]:
        x = torch.cat((condition, image), dim=1)
        results = []
        for scale in self.scales:
            features = [x]
            for layer in scale:  # type: ignore[attr-defined]
                features.append(layer(features[-1]))
            results.append(features[1:])
            x = self.halve(x)
        return results


class Spade(nn.Module):
    """Batch norm whose gain and bias are convolutions of the label map."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.shared = nn.Sequential(nn.Conv2d(LABELS, hidden, 3, padding=1), nn.ReLU())
        self.gain = nn.Conv2d(hidden, width, 3, padding=1)
        self.bias = nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.shared(F.interpolate(labels, size=x.shape[2:], mode="nearest"))
        return self.norm(x) * (1 + self.gain(hidden)) + self.bias(hidden)


class SpadeBlock(nn.Module):
    """Residual block of spectrally normalised convolutions around SPADE layers."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        super().__init__()
        self.spade1, self.spade2 = Spade(inputs, hidden), Spade(inputs, hidden)
        self.conv1 = spectral_norm(nn.Conv2d(inputs, inputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.spade3 = Spade(inputs, hidden)
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.conv1(F.leaky_relu(self.spade1(x, labels), 0.2))
        y = self.conv2(F.leaky_relu(self.spade2(y, labels), 0.2))
        return self.shortcut(self.spade3(x, labels)) + y


class SpadeGenerator(nn.Module):
    """A label map alone, from its smallest size up."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(LABELS, 4 * width, 3, padding=1)
        self.block1 = SpadeBlock(4 * width, 2 * width, 2 * width)
        self.block2 = SpadeBlock(2 * width, width, 2 * width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, labels: Tensor) -> Tensor:
        x = self.first(F.interpolate(labels, scale_factor=0.25))
        x = F.interpolate(self.block1(x, labels), scale_factor=2)
        x = F.interpolate(self.block2(x, labels), scale_factor=2)
        return torch.tanh(self.last(F.leaky_relu(x, 0.2)))


def _domains(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size, width), torch.eye(LABELS)[torch.arange(batch) % LABELS]


def _one_hot(batch: int, size: int, extra: int = 0) -> Tensor:
    labels = torch.randint(0, LABELS, (batch, 1, size // 4, size // 4))
    labels = labels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    maps = torch.zeros(batch, LABELS + extra, size, size)
    return maps.scatter_(1, labels, 1.0)


def _labels(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (_one_hot(batch, size),)


def _labels_and_edges(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (_one_hot(batch, size, 1),)


def _labels_and_image(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return _one_hot(batch, size, 1), *images()(batch, size, width)


_PIX = "Isola, Zhu, Zhou, Efros 2017, arXiv:1611.07004"
_CYCLE = "Zhu, Park, Isola, Efros 2017, arXiv:1703.10593"
_DUAL = "Yi, Zhang, Tan, Gong 2017, arXiv:1704.02510"
_DISCO = "Kim et al. 2017, arXiv:1703.05192"
_STAR = "Choi et al. 2018, arXiv:1711.09020"
_HD = "Wang et al. 2018, arXiv:1711.11585"
_SPADE = "Park, Liu, Wang, Zhu 2019, arXiv:1903.07291"

ENTRIES = {
    "pix2pix-unet": Entry(UNet, images(), _PIX, 8, real=(64, 256), random=True),
    "pix2pix-no-skips": Entry(EncoderDecoder, images(), _PIX, 8, real=(64, 256), random=True),
    "pix2pix-discriminator": Entry(PairPatchDiscriminator, images(count=2), _PIX, 5, real=(64, 256)),
    "cyclegan-generator": Entry(ResnetGenerator, images(), _CYCLE, 12, real=(64, 128)),
    "cyclegan-discriminator": Entry(InstancePatchDiscriminator, images(), _CYCLE, 5, real=(64, 128)),
    "dualgan-generator": Entry(DualGenerator, images(), _DUAL, 8, real=(64, 128), random=True),
    "dualgan-discriminator": Entry(DualDiscriminator, images(), _DUAL, 5, real=(64, 128)),
    "discogan-generator": Entry(DiscoGenerator, images(), _DISCO, 8),
    "discogan-discriminator": Entry(DiscoDiscriminator, images(), _DISCO, 5),
    "distancegan": Entry(DistanceMapping, images(count=2), "Benaim, Wolf 2017, arXiv:1706.00826", 16),
    "unit": Entry(
        UnitGenerator,
        images(count=2),
        "Liu, Breuel, Kautz 2017, arXiv:1703.00848",
        38,
        small=(4, 16),
        real=(32, 128),
        random=True,
    ),
    "stargan-generator": Entry(StarGenerator, _domains, _STAR, 10, small=(4, 16), real=(64, 128)),
    "stargan-discriminator": Entry(StarDiscriminator, images(), _STAR, 6, real=(64, 128)),
    "pix2pixhd-generator": Entry(CoarseToFine, _labels_and_edges, _HD, 19, real=(32, 256)),
    "pix2pixhd-discriminator": Entry(MultiscaleDiscriminator, _labels_and_image, _HD, 8, real=(64, 256)),
    "spade-generator": Entry(SpadeGenerator, _labels, _SPADE, 26, real=(32, 128)),
}
