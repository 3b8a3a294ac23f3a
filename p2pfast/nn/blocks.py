"""Convolution, norm and activation as one module, constructed like their ``torch.nn`` counterparts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from p2pfast.nn.sequence import FusedSequential, chains, make_activation, make_norm

Size = int | tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _SingleChain(FusedSequential):
    """A sequence that is one chain."""

    _pieces = ""

    @classmethod
    def _fits(cls, conv: nn.Module | None, norm: nn.Module | None) -> bool:
        raise NotImplementedError

    @classmethod
    def _check_modules(cls, modules: list[nn.Module]) -> None:
        found = chains(modules)
        if len(found) != 1 or not cls._fits(found[0].conv, found[0].norm):
            names = ", ".join(type(m).__name__ for m in modules)
            raise ValueError(
                f"sequence has {names or 'no modules'}; {cls.__name__} is made of {cls._pieces}, and "
                "FusedSequential of any modules"
            )


class ConvNormAct2d(_SingleChain):
    """A convolution, its norm and its activation: ``act(norm(conv(x)))``, forward and backward.

    A ``torch.nn.Sequential`` of ``nn.Conv2d``, the norm and the activation with a fused forward, so
    ``state_dict`` has the keys of that sequence ("0.weight", "0.bias", "1.weight", …), and PyTorch's
    initialisation.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as for
            ``nn.Conv2d``.
        norm: ``"instance"`` (``nn.InstanceNorm2d``), ``"batch"`` (``nn.BatchNorm2d``) or None.
        affine, track_running_stats: of the norm; None is its own default (batch norm has both, instance norm
            neither).
        eps, momentum: of the norm.
        activation: ``"relu"``, ``"leaky_relu"``, ``"tanh"``, ``"sigmoid"``, ``"elu"``, ``"silu"``, ``"gelu"``
            or None.
        negative_slope: of ``"leaky_relu"``.
        device, dtype: of the parameters.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, H', W') as for ``nn.Conv2d``, same dtype. Float32 and
        bfloat16 on the CPU run natively and give channels_last results; anything else goes through PyTorch.

    Raises:
        ValueError: an unknown ``norm``, ``activation`` or ``padding_mode``.

    Source: Isola et al. 2017 (arXiv:1611.07004), appendix: "Convolution-BatchNorm-ReLU".
    """

    _pieces = "an optional padding module, Conv2d, an optional norm and an optional activation"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        norm: str | None = "instance",
        affine: bool | None = None,
        track_running_stats: bool | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups,
                bias,
                padding_mode,
                device=device,
                dtype=dtype,
            ),
            *make_norm(norm, out_channels, affine, track_running_stats, eps, momentum, device, dtype),
            *make_activation(activation, negative_slope),
        )

    @classmethod
    def _fits(cls, conv: nn.Module | None, norm: nn.Module | None) -> bool:
        return isinstance(conv, nn.Conv2d)


class UpConvNormAct2d(_SingleChain):
    """A transposed convolution, its norm and its activation, forward and backward.

    A ``torch.nn.Sequential`` of ``nn.ConvTranspose2d``, the norm and the activation with a fused forward and
    the keys of that sequence.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode: as for ``nn.ConvTranspose2d``.
        norm and the rest: as for :class:`ConvNormAct2d`.

    Shapes:
        (N, in_channels, H, W) to (N, out_channels, H', W') as for ``nn.ConvTranspose2d``, same dtype.

    Raises:
        ValueError: an unknown ``norm``, ``activation`` or ``padding_mode``.

    Source: Radford et al. 2016 (arXiv:1511.06434).
    """

    _pieces = "ConvTranspose2d, an optional norm and an optional activation"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int = 1,
        padding_mode: PaddingMode = "zeros",
        *,
        norm: str | None = "instance",
        affine: bool | None = None,
        track_running_stats: bool | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.ConvTranspose2d(
                in_channels,
                out_channels,
                kernel_size,
                stride,
                padding,
                output_padding,
                groups,
                bias,
                dilation,
                padding_mode,
                device=device,
                dtype=dtype,
            ),
            *make_norm(norm, out_channels, affine, track_running_stats, eps, momentum, device, dtype),
            *make_activation(activation, negative_slope),
        )

    @classmethod
    def _fits(cls, conv: nn.Module | None, norm: nn.Module | None) -> bool:
        return isinstance(conv, nn.ConvTranspose2d)


class InstanceNormAct2d(_SingleChain):
    """Instance normalisation and an activation in two reads and one write, forward and backward.

    A ``torch.nn.Sequential`` of ``nn.InstanceNorm2d`` and the activation with a fused forward and the keys of
    that sequence.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as for ``nn.InstanceNorm2d``.
        activation, negative_slope, device, dtype: as for :class:`ConvNormAct2d`.

    Shapes:
        (N, num_features, H, W) to the same, same dtype. Statistics are float32 whatever the dtype.

    Raises:
        ValueError: an unknown ``activation``; when called, an image of one pixel, whose deviation is zero.

    Source: Ulyanov et al. 2016 (arXiv:1607.08022).
    """

    _pieces = "InstanceNorm2d and an optional activation"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            *make_norm("instance", num_features, affine, track_running_stats, eps, momentum, device, dtype),
            *make_activation(activation, negative_slope),
        )

    @classmethod
    def _fits(cls, conv: nn.Module | None, norm: nn.Module | None) -> bool:
        return conv is None and isinstance(norm, nn.InstanceNorm2d)
