"""Losses of the pix2pix family; each is one native pass for value and gradient on CPUs and NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2pfast.ops.feature_matching import feature_matching
from p2pfast.ops.gan_loss import gan_loss

Prediction = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]

_MODES = ("vanilla", "lsgan", "hinge", "wgangp")


def _scales(prediction: Prediction, name: str) -> list[Tensor]:
    """The prediction of each scale; of a scale that is a list of features, the last."""
    scales: Sequence[Tensor | Sequence[Tensor]]
    scales = [prediction] if isinstance(prediction, Tensor) else prediction
    found = []
    for scale in scales:
        if isinstance(scale, Tensor):
            found.append(scale)
        elif scale:
            found.append(scale[-1])
        else:
            raise ValueError(f"{name} has a scale without features; its prediction is the last feature")
    if not found:
        raise ValueError(f"{name} is empty; a tensor or a list of scales is expected")
    return found


class GANLoss(nn.Module):
    """The adversarial loss of patch-wise discriminators, over one scale or several.

    | gan_mode | real, for the discriminator | fake, for the discriminator | for the generator |
    |---|---|---|---|
    | vanilla | BCE(x, target_real) | BCE(x, target_fake) | BCE(x, target_real) |
    | lsgan | (x - target_real)² | (x - target_fake)² | (x - target_real)² |
    | hinge | max(0, 1 - x) | max(0, 1 + x) | -x |
    | wgangp | -x | x | -x |

    each averaged over a scale's values; BCE is of logits. Vanilla and lsgan as in pix2pix and pix2pixHD
    (which adds up the scales), hinge as in SPADE (Park et al. 2019, arXiv:1903.07291, which averages them),
    wgangp as in Gulrajani et al. 2017 (arXiv:1704.00028), to be used with ``gradient_penalty``.

    Args:
        gan_mode: ``"vanilla"``, ``"lsgan"``, ``"hinge"`` or ``"wgangp"``.
        target_real, target_fake: of vanilla and lsgan; 0.9 for real is one-sided label smoothing.
        over_scales: ``"sum"`` or ``"mean"``.

    Raises:
        ValueError: another mode or way over scales, or a target of vanilla outside of [0, 1].
    """

    def __init__(
        self,
        gan_mode: str = "lsgan",
        target_real: float = 1.0,
        target_fake: float = 0.0,
        over_scales: str = "sum",
    ) -> None:
        super().__init__()
        if gan_mode not in _MODES:
            raise ValueError(f"gan_mode is {gan_mode!r}; choose one of {', '.join(_MODES)}")
        if over_scales not in ("sum", "mean"):
            raise ValueError(f"over_scales is {over_scales!r}; choose 'sum' or 'mean'")
        for name, target in (("target_real", target_real), ("target_fake", target_fake)):
            if gan_mode == "vanilla" and not 0 <= target <= 1:
                raise ValueError(f"{name} is {target}; with gan_mode='vanilla' it is a probability")
        self.gan_mode = gan_mode
        self.target_real = target_real
        self.target_fake = target_fake
        self.over_scales = over_scales

    def extra_repr(self) -> str:
        return f"gan_mode={self.gan_mode!r}, over_scales={self.over_scales!r}"

    def forward(self, prediction: Prediction, target_is_real: bool, for_discriminator: bool = True) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            prediction: raw outputs of a discriminator (no sigmoid): a tensor of any shape, a list of scales,
                or a list of lists of features whose last is the prediction.
            target_is_real: what the discriminator is to say.
            for_discriminator: False in the generator's step; only hinge's loss depends on it.

        Raises:
            ValueError: an empty list, or hinge's generator loss with ``target_is_real=False``.
        """
        scales = _scales(prediction, "prediction")
        match self.gan_mode:
            case "vanilla" | "lsgan":
                loss = "logistic" if self.gan_mode == "vanilla" else "square"
                target = self.target_real if target_is_real else self.target_fake
            case "hinge" if for_discriminator:
                loss, target = "hinge", 1.0 if target_is_real else -1.0
            case mode:
                if mode == "hinge" and not target_is_real:
                    raise ValueError(
                        "target_is_real is False; the generator's hinge loss wants its images judged real"
                    )
                loss, target = "linear", -1.0 if target_is_real else 1.0
        weight = 1.0 / len(scales) if self.over_scales == "mean" else 1.0
        return gan_loss(scales, loss, target, weight)


def gradient_penalty(
    discriminator: Callable[[Tensor], Prediction],
    real: Tensor,
    fake: Tensor,
    weight: float = 10.0,
    constant: float = 1.0,
    mix: str = "mixed",
) -> Tensor:
    """WGAN-GP's penalty: ``weight * mean((|∇D(x)| - constant)²)``
    (Gulrajani et al. 2017, arXiv:1704.00028).

    The norm is over one sample. Differentiable with respect to the discriminator's parameters, so it runs
    the discriminator's double backward pass. Of several scales, the outputs are added up.

    Args:
        discriminator: called with x; wrap it to give it more inputs.
        real, fake: (N, ...) of equal shapes and one floating-point dtype.
        constant: the norm aimed at.
        mix: x is a point between ``real`` and ``fake``, drawn for each sample (``"mixed"``), or ``"real"`` or
            ``"fake"`` themselves.

    Raises:
        ValueError: shapes that differ, or another ``mix``.
    """
    if real.shape != fake.shape:
        raise ValueError(f"real has shape {tuple(real.shape)}, fake {tuple(fake.shape)}; they must be equal")
    real, fake = real.detach(), fake.detach()
    match mix:
        case "mixed":
            share = torch.rand(real.shape[0], *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
            x = torch.lerp(fake, real, share)
        case "real" | "fake":
            x = (real if mix == "real" else fake).clone()
        case _:
            raise ValueError(f"mix is {mix!r}; choose one of mixed, real, fake")
    with torch.enable_grad():
        x.requires_grad_()
        outputs = torch.stack([s.float().sum() for s in _scales(discriminator(x), "the output")]).sum()
        (gradient,) = torch.autograd.grad(outputs, x, create_graph=True)
        # As published: away from zero, where the norm has no gradient.
        norm = (gradient.flatten(1).float() + 1e-16).norm(2, dim=1)
        return weight * ((norm - constant) ** 2).mean()


class FeatureMatchingLoss(nn.Module):
    """pix2pixHD's feature matching: the mean absolute difference of a discriminator's features.

    ``weight · Σ over scales and layers of 4 / (n_layers + 1) / (number of scales) · mean(|fake - real|)``,
    all layers but the last, which is the prediction. The gradient goes to the fake side only. All features
    are one native call.

    Args:
        weight: the published lambda_feat.
        n_layers: the discriminator's ``n_layers_D``.
    """

    def __init__(self, weight: float = 10.0, n_layers: int = 3) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers is {n_layers}; a discriminator has at least 1")
        self.weight = weight
        self.n_layers = n_layers

    def extra_repr(self) -> str:
        return f"weight={self.weight}, n_layers={self.n_layers}"

    def forward(
        self, fake_features: Sequence[Sequence[Tensor]], real_features: Sequence[Sequence[Tensor]]
    ) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            fake_features, real_features: a list of features for each scale, as a discriminator with
                ``getIntermFeat=True`` returns them.

        Raises:
            TypeError: scales that are tensors.
            ValueError: numbers of scales or features that differ, or a scale of the prediction alone.
        """
        if len(fake_features) != len(real_features):
            raise ValueError(
                f"fake_features has {len(fake_features)} scales, real_features {len(real_features)}; "
                "they must be as many"
            )
        fake: list[Tensor] = []
        real: list[Tensor] = []
        for i, (f, r) in enumerate(zip(fake_features, real_features, strict=True)):
            if isinstance(f, Tensor) or isinstance(r, Tensor):
                raise TypeError(f"scale {i} is a tensor; a list of features is expected (getIntermFeat=True)")
            if len(f) != len(r) or len(f) < 2:
                raise ValueError(
                    f"scale {i} has {len(f)} fake and {len(r)} real features; they must be as many, and at "
                    "least 2 (the last is the prediction)"
                )
            fake += f[:-1]
            real += r[:-1]
        weight = self.weight * 4.0 / (self.n_layers + 1) / len(fake_features)
        return feature_matching(fake, real, [weight] * len(fake))


class L1Loss(nn.Module):
    """``weight * mean(|prediction - target|)``, gradient for the prediction only; pix2pix's weight is 100.

    Called with two tensors of one shape, any number of dimensions; either may be float32, bfloat16 or
    float16, and the loss is a float32 scalar.

    Raises:
        ValueError: shapes that differ.

    Source: Isola et al. 2017 (arXiv:1611.07004), equation 3.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"weight={self.weight}"

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return feature_matching([prediction], [target], [self.weight])


class L2Loss(L1Loss):
    """``weight * mean((prediction - target)²)``, gradient for the prediction only; see :class:`L1Loss`."""

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return feature_matching([prediction], [target], [self.weight], squared=True)


class CycleLoss(L1Loss):
    """CycleGAN's ``weight * mean(|F(G(x)) - x|)``, called as ``loss(reconstructed, original)``; see
    :class:`L1Loss`.

    Source: Zhu et al. 2017 (arXiv:1703.10593), equation 2.
    """

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__(weight)


class IdentityLoss(L1Loss):
    """CycleGAN's ``weight * cycle_weight * mean(|G(y) - y|)``, called as ``loss(G(y), y)``.

    Args:
        weight: the published lambda_identity, relative to ``cycle_weight``.

    Source: Zhu et al. 2017 (arXiv:1703.10593), section 5.2. See :class:`L1Loss`.
    """

    def __init__(self, weight: float = 0.5, cycle_weight: float = 10.0) -> None:
        super().__init__(weight * cycle_weight)


class TotalVariationLoss(nn.Module):
    """``weight * (mean |x[h + 1] - x[h]| + mean |x[w + 1] - x[w]|)`` of images (N, C, H, W), a float32
    scalar, or float64 of float64. A side of length 1 has none.

    Raises:
        ValueError: no four dimensions.

    Source: anisotropic total variation a value (Rudin, Osher, Fatemi 1992).
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"weight={self.weight}"

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() != 4:
            raise ValueError(
                f"image has shape {tuple(image.shape)}; (images, channels, height, width) is expected"
            )
        x = image if image.dtype == torch.float64 else image.float()
        total = x.new_zeros(()) if x.shape[2:].numel() > 1 else 0 * x.sum()  # which has a gradient, too
        for dim in (2, 3):
            if x.shape[dim] > 1:
                total = total + x.diff(dim=dim).abs().mean()
        return self.weight * total


# VGG19's convolutions up to relu5_1 by their number in torchvision's `features`; a pooling follows where the
# numbers jump by three. The slices end at relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1.
_VGG_CONVOLUTIONS = {
    0: (3, 64),
    2: (64, 64),
    5: (64, 128),
    7: (128, 128),
    10: (128, 256),
    12: (256, 256),
    14: (256, 256),
    16: (256, 256),
    19: (256, 512),
    21: (512, 512),
    23: (512, 512),
    25: (512, 512),
    28: (512, 512),
}
_VGG_SLICE_ENDS = (0, 5, 10, 19, 28)
_VGG_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
_VGG_HELP = (
    "save one with torch.save(torchvision.models.vgg19(weights='IMAGENET1K_V1').state_dict(), 'vgg19.pth'), "
    "or download https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
)


def _read_vgg(weights: str | Path) -> dict[str, Tensor]:
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights is {str(path)!r}, which is no file; {_VGG_HELP}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return cast("dict[str, Tensor]", torch.load(path, map_location="cpu", weights_only=True))


class PerceptualLoss(nn.Module):
    """pix2pixHD's VGG loss: absolute differences of VGG19's features after relu1_1, …, relu5_1.

    ``weight · Σ w_i · mean(|VGG_i(fake) - VGG_i(real)|)`` with w = 1/32, 1/16, 1/8, 1/4, 1. As published
    (Wang et al. 2018, arXiv:1711.11585), images (N, 3, H, W) go in as they are, in [-1, 1]. The network is
    frozen; the loss is a float32 scalar.

    Args:
        weights: VGG19's parameters under torchvision's keys (``features.0.weight``, …): a file (.pth or
            .safetensors) or a dictionary. None are shipped and none are downloaded.
        weight: the published lambda_feat, 10 in a pix2pixHD run.
        imagenet_normalization: bring [-1, 1] to ImageNet's mean and deviation first, which the published
            script does not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys that are missing, or tensors of other shapes.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        weights: str | Path | dict[str, Tensor],
        weight: float = 10.0,
        imagenet_normalization: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.imagenet_normalization = imagenet_normalization
        state = weights if isinstance(weights, dict) else _read_vgg(weights)
        self.features = nn.ModuleDict()
        for number, (inputs, outputs) in _VGG_CONVOLUTIONS.items():
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            for name, parameter in layer.named_parameters():
                key = f"features.{number}.{name}"
                if key not in state:
                    raise ValueError(
                        f"weights has no {key!r}, so it is not VGG19 of torchvision; {_VGG_HELP}"
                    )
                if state[key].shape != parameter.shape:
                    raise ValueError(
                        f"weights[{key!r}] has shape {tuple(state[key].shape)}; {tuple(parameter.shape)} is "
                        f"expected of VGG19; {_VGG_HELP}"
                    )
                parameter.data.copy_(state[key])
            self.features[str(number)] = layer
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def slices(self, image: Tensor) -> list[Tensor]:
        """The five features of images (N, 3, H, W), H and W at least 16."""
        x = image
        if self.imagenet_normalization:
            x = ((x + 1) / 2 - self.mean) / self.deviation
        found, before = [], 0
        for number in _VGG_CONVOLUTIONS:
            if number - before == 3:
                x = F.max_pool2d(x, 2, 2)
            x = F.relu(self.features[str(number)](x))
            before = number
            if number in _VGG_SLICE_ENDS:
                found.append(x)
        return found

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """The loss, a float32 scalar, of images (N, 3, H, W); gradient for ``fake`` only."""
        for name, image in (("fake", fake), ("real", real)):
            if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < 16:
                raise ValueError(
                    f"{name} has shape {tuple(image.shape)}; (images, 3, height, width) of at least 16x16 is "
                    "expected"
                )
        with torch.no_grad():
            target = self.slices(real)
        return feature_matching(self.slices(fake), target, [self.weight * w for w in _VGG_WEIGHTS])
