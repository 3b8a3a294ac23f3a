"""The operators that a plan launches, behind one interface.

All tensors are NHWC views, channels adjacent. ``TritonKernels`` is what runs; tests put plain PyTorch in its
place to try plans without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operand:
    """``act(scale * tensor + shift)``: (N, H, W, C), and (C,) or (N, C) float32 or None."""

    tensor: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = "none"
    slope: float = 0.0


@dataclass(frozen=True)
class Window:
    """A convolution's numbers; ``pad_mode`` is "zeros", "reflect" or "replicate"."""

    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]  # at the top and on the left
    pad_mode: str
    transposed: bool


@dataclass(frozen=True)
class Sizes:
    """What, besides its window, decides how a convolution is run."""

    images: int
    size: tuple[int, int]  # of the input as it lies in memory, with a border that was written
    out_size: tuple[int, int]
    channels: tuple[int, ...]  # of each input
    out_channels: int
    pending: bool  # the inputs have a normalisation or an activation to be done
    statistics: bool


class Tiles(Protocol):
    """A choice among the ways to run a convolution: the layout of its weights, and what to call it."""

    @property
    def layout(self) -> str | None: ...

    @property
    def name(self) -> str: ...


class Kernels(Protocol):
    """What a plan needs of a device."""

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P, 2, C) means and M2 of the parts of each image, and (P,) values of a part."""

    def merge(
        self,
        partial: Tensor,
        count: Tensor,
        over_batch: bool,
        eps: float,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(N, C) scale, shift, mean and biased variance."""

    def apply(
        self,
        x: Operand,
        out: Tensor,
        residual: Operand | None,
        act: str,
        slope: float,
        pad: tuple[int, int, int, int],
        pad_mode: str,
    ) -> None:
        """out = pad(act(x + residual)); ``pad`` is (top, bottom, left, right)."""

    def tiles(self, window: Window, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Tiles:
        """The quickest way to run a convolution, measured or estimated."""

    def pack(self, weight: Tensor, dtype: torch.dtype, window: Window, sizes: Sizes, tiles: Any) -> Any:
        """Weights as :meth:`conv` reads them, in an attribute ``data``."""

    def parts(self, packed: Any, out_size: tuple[int, int], tiles: Any) -> int:
        """Parts of the statistics that :meth:`conv` gathers."""

    def conv(
        self,
        sources: list[Operand],
        packed: Any,
        tiles: Any,
        bias: Tensor | None,
        out: Tensor,
        window: Window,
        act: str,
        slope: float,
        partial: Tensor | None,
        count: Tensor | None,
        factor: Tensor | None = None,
        residual: Operand | None = None,
    ) -> None:
        """out = act(conv * factor + bias + residual) of one or two inputs side by side, with statistics of
        its float32 result before the residual."""

    def label_parts(self, shape: dict[str, Any]) -> int:
        """Parts of the statistics that :meth:`label_conv` gathers; 0: none, they need a pass."""

    def label_scratch(self, shape: dict[str, Any]) -> int:
        """Bytes that :meth:`label_conv` works in."""

    def label_pack(self, shape: dict[str, Any], weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tables as :meth:`label_conv` reads them."""

    def label_conv(
        self,
        shape: dict[str, Any],
        labels: Tensor,
        edges: Tensor | None,
        packed: Tensor,
        scratch: Tensor | None,
        out: Tensor,
        partial: Tensor | None,
        count: Tensor | None,
    ) -> None:
        """The first layer from (N, H, W) uint8 labels and edges."""

    def edges(self, instances: Tensor, out: Tensor) -> None:
        """(N, H, W) ids to uint8 borders."""


def fused_kernels(device: torch.device) -> Kernels:
    """The fused kernels for tensors there. Raises RuntimeError with the remedy where Triton is missing."""
    from p2pfast.runtime.gpu.fused import FusedKernels

    return FusedKernels(device)
