"""Networks that also find the code of an image, or share weights between two kinds of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.parts import decoder, down, encoder, images, levels, sampled, up

LATENT = 64


class BiGANEncoder(nn.Module):
    """An image's code, drawn from a normal distribution that the convolutions describe (ALI)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        self.main = encoder(3, width, n)
        self.last = nn.Conv2d(width * 2 ** (n - 1), 2 * LATENT, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_variance = self.last(self.main(x)).chunk(2, 1)
        return sampled(mean, log_variance)


class BiGANGenerator(nn.Module):
    """An image from a code of shape (N, LATENT, 1, 1)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        deepest = width * 2 ** (n - 1)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(LATENT, deepest, 4, bias=False),
            nn.BatchNorm2d(deepest),
            nn.LeakyReLU(0.1),
            decoder(width, n),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class BiGANDiscriminator(nn.Module):
    """Judges an image and a code together, with 1×1 convolutions after they meet."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        self.image = nn.Sequential(
            encoder(3, width, n), nn.Conv2d(width * 2 ** (n - 1), 8 * width, 4), nn.LeakyReLU(0.1)
        )
        self.code = nn.Sequential(
            nn.Conv2d(LATENT, 8 * width, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(8 * width, 8 * width, 1),
            nn.LeakyReLU(0.1),
        )
        self.joint = nn.Sequential(
            nn.Dropout2d(0.2),
            nn.Conv2d(16 * width, 16 * width, 1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(16 * width, 1, 1),
        )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.joint(torch.cat([self.image(x), self.code(z)], 1)).squeeze()


class VAEGAN(nn.Module):
    """Variational autoencoder of 5×5 convolutions; returns the image, the mean and the log variance."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.side = size // 8
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(inputs, outputs, 5, 2, 2), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.encoder = nn.Sequential(*layers)
        self.flat = nn.Sequential(nn.Linear(4 * width * self.side**2, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(128, LATENT), nn.Linear(128, LATENT)
        self.project = nn.Sequential(
            nn.Linear(LATENT, 4 * width * self.side**2), nn.BatchNorm1d(4 * width * self.side**2), nn.ReLU()
        )
        layers = []
        for inputs, outputs in ((4 * width, 4 * width), (4 * width, 2 * width), (2 * width, width)):
            layers += [nn.ConvTranspose2d(inputs, outputs, 5, 2, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(width, 3, 5, padding=2), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = self.flat(self.encoder(x).flatten(1))
        mean, log_variance = self.mean(flat), self.log_variance(flat)
        z = self.project(sampled(mean, log_variance))
        return self.decoder(z.view(x.shape[0], -1, self.side, self.side)), mean, log_variance


class VAEGANDiscriminator(nn.Module):
    """Returns its probability and the features in which reconstructions are compared."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 5, padding=2), nn.ReLU())
        self.features = nn.Sequential(
            nn.Conv2d(width, 4 * width, 5, 2, 2),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.Conv2d(4 * width, 8 * width, 5, 2, 2),
            nn.BatchNorm2d(8 * width),
            nn.ReLU(),
            nn.Conv2d(8 * width, 8 * width, 5, 2, 2),
        )
        self.last = nn.Sequential(nn.BatchNorm2d(8 * width), nn.ReLU(), nn.Flatten())
        self.linear = nn.Linear(8 * width * (size // 8) ** 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(self.first(x))
        return torch.sigmoid(self.linear(self.last(features))), features


class CoGANGenerator(nn.Module):
    """A pair of images of two kinds from one noise: common first layers, two last ones."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        layers: list[nn.Module] = [nn.ConvTranspose2d(100, width * 2**n, 4)]
        for i in range(n, 1, -1):
            layers += [
                nn.BatchNorm2d(width * 2**i),
                nn.PReLU(),
                nn.ConvTranspose2d(width * 2**i, width * 2 ** (i - 1), 3, 2, 1, 1),
            ]
        self.common = nn.Sequential(*layers, nn.BatchNorm2d(2 * width), nn.PReLU())
        self.first = nn.ConvTranspose2d(2 * width, 3, 6, 2, 2)
        self.second = nn.ConvTranspose2d(2 * width, 3, 6, 2, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.common(z.view(z.size(0), z.size(1), 1, 1))
        return self.first(shared).sigmoid(), self.second(shared).sigmoid()


class CoGANDiscriminator(nn.Module):
    """Two first layers, common last ones."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 5, padding=2)
        self.second = nn.Conv2d(3, width, 5, padding=2)
        self.common = nn.Sequential(
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 5, padding=2),
            nn.MaxPool2d(2),
            nn.PReLU(),
            nn.Conv2d(2 * width, 4 * width, 5, padding=2),
            nn.MaxPool2d(2),
            nn.PReLU(),
            nn.Flatten(),
            nn.Linear(4 * width * (size // 8) ** 2, 1),
        )

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        return [self.common(self.first(first)), self.common(self.second(second))]


class DomainTransfer(nn.Module):
    """g(f(x)): max-pooled features, one code, transposed convolutions; returns the image and the code."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        layers: list[nn.Module] = []
        inputs = 3
        for i in range(n):
            layers += [nn.Conv2d(inputs, width * 2**i, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            inputs = width * 2**i
        self.features = nn.Sequential(*layers, nn.Conv2d(inputs, LATENT, 4))
        self.generator = BiGANGenerator(width, size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.features(x)
        return self.generator(code), code


class TernaryDiscriminator(nn.Module):
    """Three classes: made from the source, made from the target, a true target."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = encoder(3, width, levels(size))
        self.last = nn.Conv2d(width * 2 ** (levels(size) - 1), 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(torch.flatten(self.last(self.main(x)), 1), dim=1)


class PixelDomainConverter(nn.Module):
    """Encoder and decoder around a bottleneck of one pixel."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        deepest = width * 2 ** (n - 1)
        self.encoder = encoder(3, width, n)
        self.narrow = nn.Sequential(nn.Conv2d(deepest, LATENT, 4), nn.BatchNorm2d(LATENT), nn.LeakyReLU(0.2))
        self.widen = nn.Sequential(nn.ConvTranspose2d(LATENT, deepest, 4), nn.BatchNorm2d(deepest), nn.ReLU())
        layers: list[nn.Module] = []
        for i in range(n - 1, 0, -1):
            layers += up(width * 2**i, width * 2 ** (i - 1))
        self.decoder = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.decoder(self.widen(self.narrow(self.encoder(x)))))


class PairDiscriminator(nn.Module):
    """Is the second image the first one's counterpart?"""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        layers: list[nn.Module] = down(6, width, None)
        for i in range(n - 1):
            layers += down(width * 2**i, width * 2 ** (i + 1))
        self.main = nn.Sequential(*layers, nn.Conv2d(width * 2 ** (n - 1), 1, 4), nn.Sigmoid())

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.main(torch.cat([source, target], dim=1)).reshape(-1)


def _codes(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, LATENT, 1, 1),)


def _image_code(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size, width), *_codes(batch, size, width)


def _noise(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 100),)


_ALI = "Donahue et al. 2017, arXiv:1605.09782; Dumoulin et al. 2017, arXiv:1606.00704"
_VAE = "Larsen, Sønderby, Larochelle, Winther 2016, arXiv:1512.09300"
_COGAN = "Liu, Tuzel 2016, arXiv:1606.07536"
_DTN = "Taigman, Polyak, Wolf 2017, arXiv:1611.02200"
_PLDT = "Yoo et al. 2016, arXiv:1603.07442"

ENTRIES = {
    "bigan-encoder": Entry(BiGANEncoder, images(), _ALI, 4, random=True),
    "bigan-generator": Entry(BiGANGenerator, _codes, _ALI, 4),
    "bigan-discriminator": Entry(BiGANDiscriminator, _image_code, _ALI, 8, random=True),
    "vae-gan": Entry(VAEGAN, images(), _VAE, 7, random=True),
    "vae-gan-discriminator": Entry(VAEGANDiscriminator, images(), _VAE, 4, real=(32, 64)),
    "cogan-generator": Entry(CoGANGenerator, _noise, _COGAN, 5, real=(64, 32)),
    "cogan-discriminator": Entry(CoGANDiscriminator, images(count=2), _COGAN, 6, real=(32, 32)),
    "dtn-generator": Entry(DomainTransfer, images(), _DTN, 8, real=(64, 32)),
    "dtn-discriminator": Entry(TernaryDiscriminator, images(), _DTN, 4, real=(64, 32)),
    "pldt-converter": Entry(PixelDomainConverter, images(), _PLDT, 8),
    "pldt-pair-discriminator": Entry(PairDiscriminator, images(count=2), _PLDT, 4),
}
