"""Pieces that several networks of the zoo are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def levels(size: int, smallest: int = 4) -> int:
    """Halvings between two sizes that are powers of two apart."""
    count = (size // smallest).bit_length() - 1
    if smallest * 2**count != size:
        raise ValueError(f"size is {size}; {smallest} times a power of two is expected")
    return count


def down(inputs: int, outputs: int, norm: type[nn.Module] | None = nn.BatchNorm2d) -> list[nn.Module]:
    """4×4 convolution that halves the image, norm, leaky ReLU of 0.2."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=norm is None)]
    if norm is not None:
        layers.append(norm(outputs))
    return [*layers, nn.LeakyReLU(0.2, inplace=True)]


def up(inputs: int, outputs: int, norm: type[nn.Module] = nn.BatchNorm2d) -> list[nn.Module]:
    """4×4 transposed convolution that doubles the image, norm, ReLU."""
    return [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), norm(outputs), nn.ReLU(True)]


def encoder(
    channels: int, width: int, halvings: int, norm: type[nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Halvings with doubling width, the first without norm."""
    layers = down(channels, width, None)
    for i in range(halvings - 1):
        layers += down(width * 2**i, width * 2 ** (i + 1), norm)
    return nn.Sequential(*layers)


def decoder(width: int, doublings: int, channels: int = 3) -> nn.Sequential:
    """Doublings from ``width * 2**(doublings - 1)`` channels to an image in [-1, 1]."""
    layers: list[nn.Module] = []
    for i in range(doublings - 1, 0, -1):
        layers += up(width * 2**i, width * 2 ** (i - 1))
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh())


class Residual(nn.Module):
    """x + norm(conv(act(norm(conv(x))))) with reflection or zero padding inside the convolutions."""

    def __init__(self, width: int, norm: type[nn.Module], act: nn.Module, mode: str = "zeros") -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, padding_mode=mode),
            norm(width),
            act,
            nn.Conv2d(width, width, 3, padding=1, padding_mode=mode),
            norm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def replicated(vector: Tensor, image: Tensor) -> Tensor:
    """(N, C) as (N, C, H, W), the same vector at every pixel of an image of that size."""
    return vector[:, :, None, None].expand(-1, -1, image.size(2), image.size(3))


def sampled(mean: Tensor, log_variance: Tensor) -> Tensor:
    """A draw of the normal distribution, differentiable in its parameters."""
    return mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)


def images(channels: int = 3, count: int = 1) -> Callable[[int, int, int], tuple[Tensor, ...]]:
    """Arguments: ``count`` images in [-1, 1]."""
    return lambda batch, size, width: tuple(
        torch.rand(batch, channels, size, size) * 2 - 1 for _ in range(count)
    )
