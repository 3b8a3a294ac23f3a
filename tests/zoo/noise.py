"""Networks from noise to an image, with and without a class, and their critics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrised_spectral_norm
from zoo.entry import Entry
from zoo.parts import decoder, encoder, images, levels, replicated

LATENT = 100
CLASSES = 10


class DCGANGenerator(nn.Module):
    """All-convolutional generator with batch norm."""

    def __init__(self, width: int, size: int, latent: int = LATENT) -> None:
        super().__init__()
        n = levels(size)
        deepest = width * 2 ** (n - 1)
        self.project = nn.ConvTranspose2d(latent, deepest, 4, bias=False)
        self.norm = nn.BatchNorm2d(deepest)
        self.main = decoder(width, n)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(F.relu(self.norm(self.project(z[:, :, None, None]))))


class DCGANDiscriminator(nn.Module):
    """The mirror image of the generator, strided convolutions and one logit an image."""

    def __init__(self, width: int, size: int, channels: int = 3) -> None:
        super().__init__()
        n = levels(size)
        self.main = encoder(channels, width, n)
        self.last = nn.Conv2d(width * 2 ** (n - 1), 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.main(x)).view(-1)


class ConditionalGenerator(nn.Module):
    """The class is embedded and joins the noise."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 20)
        self.main = DCGANGenerator(width, size, LATENT + 20)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        return self.main(torch.cat([z, self.embed(label)], dim=1))


class ConditionalDiscriminator(nn.Module):
    """The class joins the image as constant maps."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 4)
        self.main = DCGANDiscriminator(width, size, 3 + 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return torch.sigmoid(self.main(torch.cat([x, replicated(self.embed(label), x)], 1)))


class ACGANGenerator(nn.Module):
    """The class scales the noise; 5×5 transposed convolutions."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        self.embed = nn.Embedding(CLASSES, LATENT)
        self.width = width * 2 ** (n - 1)
        self.project = nn.Linear(LATENT, self.width * 16)
        layers: list[nn.Module] = []
        for i in range(n - 1, 0, -1):
            layers += [
                nn.ConvTranspose2d(width * 2**i, width * 2 ** (i - 1), 5, 2, 2, 1),
                nn.BatchNorm2d(width * 2 ** (i - 1)),
                nn.ReLU(),
            ]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 5, 2, 2, 1))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = F.relu(self.project(z * self.embed(label))).view(-1, self.width, 4, 4)
        return torch.tanh(self.main(x))


class ACGANDiscriminator(nn.Module):
    """3×3 convolutions with strides 2 and 1 in turn, dropout, and two heads: real or not, and the class."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for i, stride in enumerate((2, 1, 2, 1, 2, 1)):
            outputs = width * 2**i
            layers.append(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=i == 0))
            if i > 0:
                layers.append(nn.BatchNorm2d(outputs))
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.Dropout(0.5)]
            inputs = outputs
        self.main = nn.Sequential(*layers)
        self.real = nn.Linear(inputs * (size // 8) ** 2, 1)
        self.kind = nn.Linear(inputs * (size // 8) ** 2, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.main(x).flatten(1)
        return torch.sigmoid(self.real(flat)).squeeze(1), F.log_softmax(self.kind(flat), dim=1)


class InfoGANGenerator(nn.Module):
    """Two linear layers before the transposed convolutions."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size = size // 4
        self.width = 2 * width
        self.project = nn.Sequential(
            nn.Linear(LATENT, 16 * width),
            nn.BatchNorm1d(16 * width),
            nn.ReLU(),
            nn.Linear(16 * width, self.width * self.size**2),
            nn.BatchNorm1d(self.width * self.size**2),
            nn.ReLU(),
        )
        self.main = decoder(width, 2)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.project(z).view(-1, self.width, self.size, self.size))


class InfoGANDiscriminator(nn.Module):
    """One trunk for the discriminator and for the recognition network of the codes."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.trunk = encoder(3, width, 2)
        self.shared = nn.Sequential(
            nn.Linear(2 * width * (size // 4) ** 2, 16 * width), nn.BatchNorm1d(16 * width), nn.LeakyReLU(0.1)
        )
        self.real = nn.Linear(16 * width, 1)
        self.codes = nn.Sequential(nn.Linear(16 * width, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.1))
        self.discrete, self.continuous = nn.Linear(32, CLASSES), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = self.shared(self.trunk(x).flatten(1))
        codes = self.codes(flat)
        return {
            "real": self.real(flat),
            "discrete": self.discrete(codes).softmax(1),
            "continuous": self.continuous(codes),
        }


class CriticBlock(nn.Module):
    """Residual block that halves the image with average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.second = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        body = self.second(F.relu(self.first(F.relu(x))))
        return F.avg_pool2d(body, 2) + self.shortcut(F.avg_pool2d(x, 2))


class WGANGPCritic(nn.Module):
    """Residual critic without batch norm, so that the gradient penalty is one image's."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[CriticBlock(width * 2**i, width * 2 ** (i + 1)) for i in range(n)])
        self.last = nn.Linear(width * 2**n * 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)).flatten(1))


class SelfAttention(nn.Module):
    """Every pixel attends to every other one; begins as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 8)
        self.query = spectral_norm(nn.Conv2d(width, inner, 1))
        self.key = spectral_norm(nn.Conv2d(width, inner, 1))
        self.value = spectral_norm(nn.Conv2d(width, width, 1))
        self.gain = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        weights = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        return x + self.gain * torch.bmm(value, weights.transpose(1, 2)).view_as(x)


class SAGANDiscriminator(nn.Module):
    """Spectrally normalised convolutions around self-attention."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(3, width, 4, 2, 1))
        self.second = parametrised_spectral_norm(nn.Conv2d(width, 2 * width, 4, 2, 1))
        self.attention = SelfAttention(2 * width)
        self.third = spectral_norm(nn.Conv2d(2 * width, 4 * width, 4, 2, 1))
        self.last = spectral_norm(nn.Conv2d(4 * width, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.1)
        x = F.leaky_relu(self.second(x), 0.1)
        x = F.leaky_relu(self.third(self.attention(x)), 0.1)
        return self.last(x).flatten(1)


class ConditionalBatchNorm(nn.Module):
    """Batch norm whose gain and bias belong to the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False)
        self.affine = nn.Embedding(CLASSES, 2 * width)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gain, bias = self.affine(label)[:, :, None, None].chunk(2, 1)
        return (1 + gain) * self.norm(x) + bias


class SAGANBlock(nn.Module):
    """Residual block that doubles the image by nearest neighbours."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(inputs), ConditionalBatchNorm(outputs)
        self.conv1 = spectral_norm(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.norm1(x, label)), scale_factor=2)
        y = self.conv2(F.relu(self.norm2(self.conv1(y), label)))
        return y + self.shortcut(F.interpolate(x, scale_factor=2))


class SAGANGenerator(nn.Module):
    """Conditional batch norm, spectral norm and self-attention."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.project = nn.Linear(LATENT, 4 * width * (size // 4) ** 2)
        self.shape = (4 * width, size // 4, size // 4)
        self.block1, self.block2 = SAGANBlock(4 * width, 2 * width), SAGANBlock(2 * width, width)
        self.attention = SelfAttention(2 * width)
        self.norm = nn.BatchNorm2d(width)
        self.last = spectral_norm(nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.block1(self.project(z).view(-1, *self.shape), label)
        x = self.block2(self.attention(x), label)
        return torch.tanh(self.last(F.relu(self.norm(x))))


def noise(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, LATENT),)


def noise_and_class(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, LATENT), torch.arange(batch) % CLASSES


def image_and_class(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size, width), torch.arange(batch) % CLASSES


_DCGAN = "Radford, Metz, Chintala 2016, arXiv:1511.06434"
_CGAN = "Mirza, Osindero 2014, arXiv:1411.1784"
_ACGAN = "Odena, Olah, Shlens 2017, arXiv:1610.09585"
_INFO = "Chen et al. 2016, arXiv:1606.03657"
_SAGAN = "Zhang, Goodfellow, Metaxas, Odena 2019, arXiv:1805.08318"

ENTRIES = {
    "dcgan-generator": Entry(DCGANGenerator, noise, _DCGAN, 4),
    "dcgan-discriminator": Entry(DCGANDiscriminator, images(), _DCGAN, 4),
    "cgan-generator": Entry(ConditionalGenerator, noise_and_class, _CGAN, 4),
    "cgan-discriminator": Entry(ConditionalDiscriminator, image_and_class, _CGAN, 4),
    "acgan-generator": Entry(ACGANGenerator, noise_and_class, _ACGAN, 3, real=(48, 64)),
    "acgan-discriminator": Entry(ACGANDiscriminator, images(), _ACGAN, 6, real=(16, 128), random=True),
    "infogan-generator": Entry(InfoGANGenerator, noise, _INFO, 2, small=(4, 16), real=(64, 32)),
    "infogan-discriminator": Entry(InfoGANDiscriminator, images(), _INFO, 2, small=(4, 16), real=(64, 32)),
    "wgan-gp-critic": Entry(
        WGANGPCritic, images(), "Gulrajani et al. 2017, arXiv:1704.00028", 10, small=(3, 32)
    ),
    "sagan-discriminator": Entry(SAGANDiscriminator, images(), _SAGAN, 7),
    "sagan-generator": Entry(SAGANGenerator, noise_and_class, _SAGAN, 10),
}
