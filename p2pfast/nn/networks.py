"""Larger pieces of image-to-image networks: residual blocks and patch discriminators."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, fx, nn

from p2pfast.nn.sequence import FusedSequential, chains, has_hooks, make_activation, make_norm

_PADS: dict[str, type[nn.Module]] = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d}
Block = TypeVar("Block", bound="ResidualBlock")


def _padded_conv(channels: int, kernel_size: int, padding_mode: str, bias: bool) -> list[nn.Module]:
    half = kernel_size // 2
    if padding_mode == "zeros":
        return [nn.Conv2d(channels, channels, kernel_size, padding=half, bias=bias)]
    if padding_mode not in _PADS:
        raise ValueError(f"padding_mode is {padding_mode!r}; choose one of zeros, {', '.join(_PADS)}")
    return [_PADS[padding_mode](half), nn.Conv2d(channels, channels, kernel_size, bias=bias)]


class ResidualBlock(nn.Module):
    """``x + norm(conv(act(norm(conv(x)))))``, the block of CycleGAN's and pix2pixHD's generators.

    Its modules lie in ``conv_block`` in the published order, padding modules included, so published weights
    load: "conv_block.1.weight" and "conv_block.5.weight", one later with dropout, and "conv_block.0.weight"
    and "conv_block.3.weight" with zero padding. The addition is done as the last norm is applied.

    Args:
        channels: C.
        kernel_size: an odd number.
        padding_mode: ``"reflect"``, ``"replicate"`` or ``"zeros"``, half the kernel on every side.
        norm: ``"instance"``, ``"batch"`` or None. affine, track_running_stats, eps, momentum: of the norm.
        activation, negative_slope: between the convolutions, as for ``ConvNormAct2d``.
        dropout: rate between the two halves; 0 leaves the module out.
        bias: of the convolutions.

    Shapes:
        (N, C, H, W) to the same, same dtype.

    Raises:
        ValueError: an even ``kernel_size``, an unknown ``padding_mode``, ``norm`` or ``activation``.

    Source: He et al. 2015 (arXiv:1512.03385) without the last activation, as Johnson et al. 2016
    (arXiv:1603.08155) and Zhu et al. 2017 (arXiv:1703.10593).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        padding_mode: str = "reflect",
        *,
        norm: str | None = "instance",
        affine: bool | None = None,
        track_running_stats: bool | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; a residual block needs an odd one")

        def half() -> list[nn.Module]:
            norms = make_norm(norm, channels, affine, track_running_stats, eps, momentum)
            return [*_padded_conv(channels, kernel_size, padding_mode, bias), *norms]

        layers = [*half(), *make_activation(activation, negative_slope)]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        self.conv_block = FusedSequential(*layers, *half())

    @classmethod
    def from_sequential(cls: type[Block], branch: nn.Sequential) -> Block:
        """A block around the same modules (not copies): ``x + branch(x)``. Keys gain "conv_block.".

        Raises:
            TypeError: ``branch`` is not an ``nn.Sequential``.
            ValueError: it does not end in a convolution, or a convolution and its norm.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.conv_block = FusedSequential.from_sequential(branch)
        last = chains(list(branch))[-1:]
        if not last or last[0].conv is None or last[0].act is not None:
            raise ValueError(
                "branch ends in no convolution; a residual block adds after a convolution and its norm, so "
                "use FusedSequential and add yourself"
            )
        made.training = branch.training
        return made

    def to_sequential(self) -> nn.Sequential:
        """The branch as a plain sequence of the same modules (not copies), without the addition."""
        return self.conv_block.to_sequential()

    def forward(self, x: Tensor) -> Tensor:
        branch: nn.Module = self.conv_block
        if not isinstance(branch, FusedSequential) or isinstance(x, fx.Proxy) or has_hooks(branch):
            return x + branch(x)
        *first, last = branch.chains()
        y = x
        for chain in first:
            y = chain(y)
        return last(y, x)


class PatchDiscriminator(nn.Module):
    """PatchGAN: a convolution with an activation, then convolutions with norm and activation, then logits.

    Its modules lie in ``model`` in the published order, so weights of pix2pix's "basic" discriminator load
    ("model.0.weight", "model.2.weight", …).

    Args:
        in_channels: channels of the input; of the condition and the image together for a conditional one.
        channels: of the first layer; each further one doubles them up to ``max_channels``.
        layers: convolutions of stride 2; one of stride 1 and the logits follow.
        norm: ``"batch"``, ``"instance"`` or None; the first and the last convolution have none.
        kernel_size, padding: of every convolution; pix2pix pads by 1, pix2pixHD by 2.
        max_channels: None is ``8 * channels``, as in pix2pix; pix2pixHD has 512.
        bias: of the convolutions before a norm; None is as published, only where the norm is not batch norm.
        negative_slope: of the leaky ReLUs.
        features: return every stage's result in a list, the logits last.

    Shapes:
        (N, in_channels, H, W) to logits (N, 1, h, w), or the list of ``layers + 2`` stages, same dtype.

    Raises:
        ValueError: ``layers`` below 1, an unknown ``norm``.

    Source: Isola et al. 2017 (arXiv:1611.07004); features as in Wang et al. 2018 (arXiv:1711.11585).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int = 64,
        layers: int = 3,
        *,
        norm: str | None = "batch",
        kernel_size: int = 4,
        padding: int = 1,
        max_channels: int | None = None,
        bias: bool | None = None,
        negative_slope: float = 0.2,
        features: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}; at least 1 is expected")
        widest = 8 * channels if max_channels is None else max_channels
        with_bias = norm != "batch" if bias is None else bias
        self.features = features
        modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, kernel_size, 2, padding)]
        modules += make_activation("leaky_relu", negative_slope)
        width = channels
        for stride in [2] * (layers - 1) + [1]:
            wider = min(2 * width, widest)
            modules.append(nn.Conv2d(width, wider, kernel_size, stride, padding, bias=with_bias))
            modules += [*make_norm(norm, wider), *make_activation("leaky_relu", negative_slope)]
            width = wider
        modules.append(nn.Conv2d(width, 1, kernel_size, 1, padding))
        self.model = FusedSequential(*modules)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return list(self.model.stages(x)) if self.features else self.model(x)
