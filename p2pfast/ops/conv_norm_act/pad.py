"""Padding and its gradient."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, padding: int, mode: str) -> Tensor:
    """``x`` (N, C, H, W) with a border that is reflected or replicated; itself for zeros, which convolutions
    add as they go."""
    if mode == "zeros" or padding == 0:
        return x
    return F.pad(x, [padding] * 4, mode=mode)


def _fold(grad: Tensor, dim: int, padding: int, mode: str) -> Tensor:
    """Adds the border's gradient to the values it was copied from, and returns what is inside of it."""
    size = grad.shape[dim] - 2 * padding
    inner = grad.narrow(dim, padding, size)
    before, after = grad.narrow(dim, 0, padding), grad.narrow(dim, padding + size, padding)
    if mode == "reflect":
        inner.narrow(dim, 1, padding).add_(before.flip(dim))
        inner.narrow(dim, size - 1 - padding, padding).add_(after.flip(dim))
    else:
        inner.narrow(dim, 0, 1).add_(before.sum(dim, keepdim=True))
        inner.narrow(dim, size - 1, 1).add_(after.sum(dim, keepdim=True))
    return inner


def unpadded(grad: Tensor, padding: int, mode: str) -> Tensor:
    """The gradient of ``padded`` from that of its result, which is overwritten.

    Every value gathers what was copied from it: rows first, then columns, so that corners arrive too. Only
    the border is touched; nothing is scattered, and the order of additions is fixed.
    """
    if mode == "zeros" or padding == 0:
        return grad
    return _fold(_fold(grad, 2, padding, mode), 3, padding, mode)
