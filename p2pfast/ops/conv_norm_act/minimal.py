"""The weight gradient of 3×3 layers with stride 1 by minimal filtering (Winograd 1980; Lavin, Gray 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The three outputs of a correlation of six values with four, at the points 0, ±1, ±2 and infinity.
_INPUT = torch.tensor(
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_FILTER = torch.tensor(
    [
        [1 / 4, 0, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6, 1 / 6],
        [1 / 24, 2 / 24, 4 / 24, 8 / 24],
        [1 / 24, -2 / 24, 4 / 24, -8 / 24],
        [0, 0, 0, 1],
    ]
)
_OUTPUT = torch.tensor([[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 1]])
_TILE = 4
_CHUNK = 32  # output channels whose products stay in the cache until they are transformed


def _two_dimensional(matrix: Tensor) -> Tensor:
    return torch.kron(matrix, matrix)


def weight_gradient(grad: Tensor, source: Tensor) -> Tensor:
    """Σ over pixels of ``grad[o, y, x] * source[i, y + u, x + v]`` with 36 multiplications for 144.

    4×4 tiles of the gradient act as filters on 6×6 tiles of the input, and the sum over tiles is 36 matrix
    products. In float32 whatever the dtypes.

    Args:
        grad: (N, Cout, H, W).
        source: (N, C, H + 2, W + 2), the padded input.

    Returns:
        (Cout, C, 3, 3) float32, contiguous.
    """
    images, outputs, height, width = grad.shape
    inputs = source.shape[1]
    rows, columns = -(-height // _TILE), -(-width // _TILE)
    below, right = rows * _TILE - height, columns * _TILE - width
    tiles = images * rows * columns

    g = F.pad(grad.float(), (0, right, 0, below)).permute(0, 2, 3, 1)
    g = g.reshape(images, rows, _TILE, columns, _TILE, outputs).permute(2, 4, 0, 1, 3, 5)
    x = F.pad(source.float(), (0, right, 0, below)).permute(0, 2, 3, 1).contiguous()
    image, row, pixel, _ = x.stride()
    windows = x.as_strided(
        (6, 6, images, rows, columns, inputs), (row, pixel, image, _TILE * row, _TILE * pixel, 1)
    )
    filters = torch.mm(_two_dimensional(_FILTER), g.reshape(16, -1)).view(36, tiles, outputs)
    values = torch.mm(_two_dimensional(_INPUT), windows.reshape(36, -1)).view(36, tiles, inputs)
    filters = filters.transpose(1, 2)

    last = _two_dimensional(_OUTPUT)
    result = torch.empty(outputs, inputs, 3, 3)
    for first in range(0, outputs, _CHUNK):
        part = torch.bmm(filters[:, first : first + _CHUNK], values)
        taps = torch.mm(last, part.view(36, -1))
        result[first : first + _CHUNK].view(-1, 9).copy_(taps.t())
    return result
