"""Networks that make an image in several steps: pyramids, structure and style, text to image, growing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.parts import Residual, encoder, images, levels, replicated, sampled, up

TEXT = 32
WORDS = 7


class LapganGenerator(nn.Module):
    """One level of the pyramid: the detail that is missing from an enlarged image."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 2 * width, 7, padding=3)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 7, padding=3)
        self.conv3 = nn.Conv2d(2 * width, 3, 5, padding=2)

    def forward(self, coarse: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        enlarged = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        detail = F.relu(self.conv1(torch.cat([enlarged, noise], 1)))
        detail = self.conv3(F.relu(self.conv2(detail)))
        return enlarged + detail, detail


class LapganDiscriminator(nn.Module):
    """Judges the detail and the enlarged image added."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2), nn.ReLU(), nn.Conv2d(width, width, 5, 2, 2), nn.ReLU(), nn.Dropout()
        )
        self.last = nn.Linear(width * (size // 4) ** 2, 1)

    def forward(self, detail: Tensor, enlarged: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.flatten(self.main(detail + enlarged), 1)))


class StructureGenerator(nn.Module):
    """Surface normals from noise: a linear layer, 5×5 convolutions and transposed ones."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size, 8)
        self.shape = (width * 2**n, 8, 8)
        self.project = nn.Linear(100, self.shape[0] * 64)
        layers: list[nn.Module] = [nn.BatchNorm2d(self.shape[0]), nn.ReLU(True)]
        for i in range(n, 0, -1):
            layers += up(width * 2**i, width * 2 ** (i - 1))
        self.main = nn.Sequential(
            *layers,
            nn.Conv2d(width, width, 5, padding=2),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.Conv2d(width, 3, 5, padding=2),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(self.main(self.project(z).view(-1, *self.shape)), dim=1)


class StyleGenerator(nn.Module):
    """An image from surface normals and noise: two branches that meet in a concatenation."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.side = size // 4
        self.width = width
        self.project = nn.Linear(100, width * self.side**2)
        self.noise = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(True))
        self.normals = nn.Sequential(
            nn.Conv2d(3, width, 5, 2, 2),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(width, 2 * width, 5, 2, 2),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, True),
        )
        self.main = nn.Sequential(
            nn.Conv2d(3 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(True),
            *up(4 * width, 2 * width),
            *up(2 * width, width),
            nn.Conv2d(width, 3, 5, padding=2),
            nn.Tanh(),
        )

    def forward(self, normals: Tensor, z: Tensor) -> Tensor:
        noise = self.noise(self.project(z).view(-1, self.width, self.side, self.side))
        return self.main(torch.cat([self.normals(normals), noise], dim=1))


class StyleDiscriminator(nn.Module):
    """Judges an image together with its surface normals."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.main = encoder(6, width, levels(size))
        self.last = nn.Linear(width * 2 ** (levels(size) - 1) * 16, 1)

    def forward(self, image: Tensor, normals: Tensor) -> Tensor:
        return torch.sigmoid(self.last(self.main(torch.cat((image, normals), 1)).flatten(1)))


def _enlarge(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(True),
    ]


class ConditioningAugmentation(nn.Module):
    """A condition drawn around the text embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(TEXT, 2 * width)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = F.relu(self.linear(text)).chunk(2, dim=1)
        return sampled(mean, log_variance), mean, log_variance


class StackGANFirst(nn.Module):
    """Stage I: a small image from text and noise."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        self.augment = ConditioningAugmentation(width)
        self.width = width * 2**n
        self.project = nn.Sequential(
            nn.Linear(width + 100, self.width * 16, bias=False),
            nn.BatchNorm1d(self.width * 16),
            nn.ReLU(True),
        )
        layers: list[nn.Module] = []
        for i in range(n, 0, -1):
            layers += _enlarge(width * 2**i, width * 2 ** (i - 1))
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())

    def forward(self, text: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition, mean, log_variance = self.augment(text)
        x = self.project(torch.cat((z, condition), 1))
        return self.main(x.view(-1, self.width, 4, 4)), mean, log_variance


class StackGANSecond(nn.Module):
    """Stage II: an image four times as large from the first one and the text."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.augment = ConditioningAugmentation(width)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1),
            nn.ReLU(True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(True),
        )
        self.joint = nn.Sequential(
            nn.Conv2d(5 * width, 4 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU(True)
        )
        self.blocks = nn.ModuleList(Residual(4 * width, nn.BatchNorm2d, nn.ReLU(True)) for _ in range(2))
        layers: list[nn.Module] = []
        for i in range(4):
            layers += _enlarge(4 * width // min(2**i, 4), 4 * width // min(2 ** (i + 1), 4))
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition, mean, log_variance = self.augment(text)
        x = self.encoder(image)
        x = self.joint(torch.cat([replicated(condition, x), x], 1))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.main(x), mean, log_variance


class StackGANDiscriminator(nn.Module):
    """The text joins the encoded image."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        n = levels(size)
        deepest = width * 2 ** (n - 1)
        self.encoder = encoder(3, width, n)
        self.joint = nn.Sequential(
            nn.Conv2d(deepest + TEXT, deepest, 3, 1, 1, bias=False),
            nn.BatchNorm2d(deepest),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(deepest, 1, 4, 4),
            nn.Sigmoid(),
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        x = self.encoder(image)
        return self.joint(torch.cat((x, text.view(-1, TEXT, 1, 1).repeat(1, 1, 4, 4)), 1)).view(-1)


class GatedResidual(nn.Module):
    """Residual block whose activation is a gated linear unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.GLU(dim=1),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x


class AttnGANStage(nn.Module):
    """A later stage: hidden pixels attend to words, are refined and doubled, and drawn as an image."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.words = nn.Conv1d(TEXT, width, 1, bias=False)
        self.blocks = nn.Sequential(GatedResidual(2 * width), GatedResidual(2 * width))
        self.enlarge = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.GLU(1),
        )
        self.draw = nn.Sequential(nn.Conv2d(width, 3, 3, padding=1, bias=False), nn.Tanh())

    def forward(self, hidden: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = self.words(words)
        attention = torch.softmax(torch.bmm(hidden.flatten(2).transpose(1, 2), keys), dim=2)
        context = torch.bmm(keys, attention.transpose(1, 2)).view_as(hidden)
        hidden = self.enlarge(self.blocks(torch.cat((hidden, context), 1)))
        return hidden, self.draw(hidden), attention


class EqualisedConv(nn.Conv2d):
    """Weights of unit variance, scaled at run time so that all layers learn at one rate."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.normal_(self.weight)
        self.gain = (2.0 / (inputs * kernel**2)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, padding=self.padding)


class PixelNorm(nn.Module):
    """Each pixel's features to unit mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class ProgressiveGeneratorBlock(nn.Module):
    """Doubles the image; while it fades in, its image is blended with the enlarged one from before."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            EqualisedConv(2 * width, width, 3),
            nn.LeakyReLU(0.2),
            PixelNorm(),
            EqualisedConv(width, width, 3),
            nn.LeakyReLU(0.2),
            PixelNorm(),
        )
        self.before = EqualisedConv(2 * width, 3, 1)
        self.after = EqualisedConv(width, 3, 1)

    def forward(self, x: Tensor, *, fade: float = 0.3) -> Tensor:
        enlarged = F.interpolate(x, scale_factor=2, mode="nearest")
        return torch.lerp(self.before(enlarged), self.after(self.body(enlarged)), fade)


class ProgressiveDiscriminatorBlock(nn.Module):
    """The mirror image, with the deviation over the batch as one more channel."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.fresh = EqualisedConv(3, width, 1)
        self.known = EqualisedConv(3, 2 * width, 1)
        self.body = nn.Sequential(
            EqualisedConv(width, width, 3),
            nn.LeakyReLU(0.2),
            EqualisedConv(width, 2 * width, 3),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(2),
        )
        self.joint = EqualisedConv(2 * width + 1, 2 * width, 3)

    def forward(self, x: Tensor, *, fade: float = 0.3) -> Tensor:
        fresh = self.body(F.leaky_relu(self.fresh(x), 0.2))
        known = F.leaky_relu(self.known(F.avg_pool2d(x, 2)), 0.2)
        y = known + fade * (fresh - known)
        deviation = (y.var(0, correction=0) + 1e-8).sqrt().mean().expand(y.size(0), 1, y.size(2), y.size(3))
        return F.leaky_relu(self.joint(torch.cat([y, deviation], 1)), 0.2)


def noise(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 100),)


def _lapgan(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size // 2, width), torch.randn(batch, 1, size, size)


def _style(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size, width), *noise(batch, size, width)


def _text_noise(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, TEXT), torch.randn(batch, 100)


def _image_text(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return *images()(batch, size, width), torch.randn(batch, TEXT)


def _second_stage(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return _image_text(batch, size // 4, width)


def _attention(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, width, size, size), torch.randn(batch, TEXT, WORDS)


def _progressive(batch: int, size: int, width: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 2 * width, size // 2, size // 2),)


_LAPGAN = "Denton, Chintala, Szlam, Fergus 2015, arXiv:1506.05751"
_SSGAN = "Wang, Gupta 2016 (style and structure), arXiv:1603.05631"
_STACK = "Zhang et al. 2017, arXiv:1612.03242"
_PROGRESSIVE = "Karras, Aila, Laine, Lehtinen 2018, arXiv:1710.10196"

ENTRIES = {
    "lapgan-generator": Entry(LapganGenerator, _lapgan, _LAPGAN, 3, small=(4, 16)),
    "lapgan-discriminator": Entry(
        LapganDiscriminator, images(count=2), _LAPGAN, 2, small=(4, 16), random=True
    ),
    "ssgan-structure": Entry(StructureGenerator, noise, _SSGAN, 4, real=(64, 64)),
    "ssgan-style": Entry(StyleGenerator, _style, _SSGAN, 6, small=(4, 16), real=(64, 128)),
    "ssgan-discriminator": Entry(StyleDiscriminator, images(count=2), _SSGAN, 3, real=(64, 128)),
    "stackgan-stage1": Entry(StackGANFirst, _text_noise, _STACK, 4, random=True),
    "stackgan-stage2": Entry(
        StackGANSecond, _second_stage, _STACK, 13, small=(4, 64), real=(32, 256), random=True
    ),
    "stackgan-discriminator": Entry(StackGANDiscriminator, _image_text, _STACK, 5),
    "attngan-stage": Entry(
        AttnGANStage, _attention, "Xu et al. 2018, arXiv:1711.10485", 6, small=(4, 8), real=(32, 64)
    ),
    "progressive-generator": Entry(
        ProgressiveGeneratorBlock, _progressive, _PROGRESSIVE, 4, small=(4, 16), real=(64, 128)
    ),
    "progressive-discriminator": Entry(
        ProgressiveDiscriminatorBlock, images(), _PROGRESSIVE, 5, small=(4, 16), real=(64, 128)
    ),
}
