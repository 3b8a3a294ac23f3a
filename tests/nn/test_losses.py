"""Loss modules against the published formulas written out in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from p2pfast import _C, models
from p2pfast.nn import (
    CycleLoss,
    FeatureMatchingLoss,
    GANLoss,
    IdentityLoss,
    L1Loss,
    L2Loss,
    PerceptualLoss,
    TotalVariationLoss,
    gradient_penalty,
)

SCALES = ((2, 1, 6, 8), (2, 1, 3, 4))


def outputs() -> list[list[Tensor]]:
    """Features and prediction of each of two scales."""
    return [[torch.randn(2, 4, 5, 5), torch.randn(2, 8, 3, 3), torch.randn(s)] for s in SCALES]


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("over_scales", ["sum", "mean"])
def test_gan_modes(real: bool, over_scales: str) -> None:
    features = outputs()
    predictions = [f[-1] for f in features]
    target = 0.9 if real else 0.1
    sign = 1.0 if real else -1.0
    formulas = {
        "vanilla": lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, target)),
        "lsgan": lambda x: F.mse_loss(x, torch.full_like(x, target)),
        "hinge": lambda x: F.relu(1 - sign * x).mean(),
        "wgangp": lambda x: -sign * x.mean(),
    }
    for mode, formula in formulas.items():
        loss = GANLoss(mode, target_real=0.9, target_fake=0.1, over_scales=over_scales)
        values = torch.stack([formula(x) for x in predictions])
        expected = values.sum() if over_scales == "sum" else values.mean()
        torch.testing.assert_close(loss(predictions, real), expected)
        torch.testing.assert_close(loss(features, real), expected)
        torch.testing.assert_close(loss(tuple(features), real), expected)
        torch.testing.assert_close(loss(predictions[0], real), values[0])
    if real:
        hinge = GANLoss("hinge")(predictions[0], True, for_discriminator=False)
        torch.testing.assert_close(hinge, -predictions[0].mean())
    else:
        with pytest.raises(ValueError, match="target_is_real is False"):
            GANLoss("hinge")(predictions[0], False, for_discriminator=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gan_mode": "original"}, "gan_mode is 'original'"),
        ({"over_scales": "max"}, "over_scales is 'max'"),
        ({"gan_mode": "vanilla", "target_real": 1.1}, "target_real is 1.1"),
    ],
)
def test_gan_loss_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GANLoss(**arguments)


def test_gan_loss_refuses_empty_lists() -> None:
    for prediction in ([], [[]]):
        with pytest.raises(ValueError, match="prediction"):
            GANLoss()(prediction, True)


def test_scales_and_features_are_one_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """That makes the gradients along with the loss: the backward pass makes no call."""
    calls: list[int] = []
    native = _C.pointwise_loss

    def counted(**arguments: Any) -> None:
        calls.append(len(arguments["parts"]))
        native(**arguments)

    monkeypatch.setattr(_C, "pointwise_loss", counted)
    fake = [[f.requires_grad_() for f in scale] for scale in outputs()]
    GANLoss("vanilla")(fake, True).backward()
    FeatureMatchingLoss()(fake, outputs()).backward()
    assert calls == [len(SCALES), 2 * len(SCALES)]
    assert all(f.grad is not None for scale in fake for f in scale)


def test_feature_matching() -> None:
    fake, real = outputs(), outputs()
    for scale in fake:
        for f in scale:
            f.requires_grad_()
    loss = FeatureMatchingLoss(weight=10.0, n_layers=1)(fake, real)
    expected = sum(
        10.0 * 4.0 / (1 + 1) / 2 * F.l1_loss(f, r)
        for scale, other in zip(fake, real, strict=True)
        for f, r in zip(scale[:-1], other[:-1], strict=True)
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(f.grad is not None for scale in fake for f in scale[:-1])
    assert all(scale[-1].grad is None for scale in fake)


def test_feature_matching_refuses() -> None:
    loss, fake = FeatureMatchingLoss(), outputs()
    with pytest.raises(ValueError, match="2 scales, real_features 1"):
        loss(fake, fake[:1])
    with pytest.raises(ValueError, match="scale 0 has 3 fake and 2 real"):
        loss(fake, [fake[0][:2], fake[1]])
    with pytest.raises(ValueError, match="at least 2"):
        loss([fake[0][:1]], [fake[0][:1]])
    with pytest.raises(TypeError, match="getIntermFeat"):
        loss([f[-1] for f in fake], [f[-1] for f in fake])
    with pytest.raises(ValueError, match="n_layers is 0"):
        FeatureMatchingLoss(n_layers=0)


def test_differences() -> None:
    x, y = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)
    torch.testing.assert_close(L1Loss(100.0)(x, y), 100 * F.l1_loss(x, y))
    torch.testing.assert_close(L2Loss(3.0)(x, y), 3 * F.mse_loss(x, y))
    torch.testing.assert_close(CycleLoss()(x, y), 10 * F.l1_loss(x, y))
    torch.testing.assert_close(IdentityLoss()(x, y), 5 * F.l1_loss(x, y))
    mixed = L1Loss()(x.bfloat16(), y)
    torch.testing.assert_close(mixed, F.l1_loss(x.bfloat16().float(), y))


def test_total_variation() -> None:
    x = torch.randn(2, 3, 5, 7, requires_grad=True)
    rows, columns = (x[:, :, 1:] - x[:, :, :-1]).abs(), (x[..., 1:] - x[..., :-1]).abs()
    torch.testing.assert_close(TotalVariationLoss(2.0)(x), 2 * (rows.mean() + columns.mean()))
    assert TotalVariationLoss()(torch.randn(1, 3, 1, 1)) == 0
    with pytest.raises(ValueError, match="image has shape"):
        TotalVariationLoss()(torch.randn(3, 5, 5))


def test_gradient_penalty() -> None:
    real, fake = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    weights = torch.randn(2, 4, 4, requires_grad=True)

    def linear(x: Tensor) -> Tensor:
        return (x * weights).sum((1, 2, 3))

    for mix in ("mixed", "real", "fake"):
        penalty = gradient_penalty(linear, real, fake, weight=7.0, constant=2.0, mix=mix)
        torch.testing.assert_close(penalty, 7 * (weights.norm() - 2) ** 2)
        expected = 14 * (weights.norm() - 2) / weights.norm() * weights
        torch.testing.assert_close(torch.autograd.grad(penalty, weights)[0], expected)
    with pytest.raises(ValueError, match="mix is 'both'"):
        gradient_penalty(linear, real, fake, mix="both")
    with pytest.raises(ValueError, match="they must be equal"):
        gradient_penalty(linear, real, fake[:1])


def test_gradient_penalty_of_a_multiscale_discriminator() -> None:
    torch.manual_seed(0)
    norm = lambda c: nn.InstanceNorm2d(c, affine=False)  # noqa: E731
    net = models.MultiscaleDiscriminator(3, 4, 2, norm, False, 2, True)
    penalty = gradient_penalty(net, torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))
    penalty.backward()
    assert penalty > 0 and all(p.grad is not None for n, p in net.named_parameters() if n.endswith("weight"))


@pytest.fixture(scope="module")
def vgg() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128)}
    shapes |= (
        {n: (256, 256) for n in (12, 14, 16)} | {19: (512, 256)} | {n: (512, 512) for n in (21, 23, 25, 28)}
    )
    state = {}
    for number, (outputs, inputs) in shapes.items():
        scale = (2 / (9 * inputs)) ** 0.5
        state[f"features.{number}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        state[f"features.{number}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    return state | {"classifier.0.bias": torch.zeros(4)}


def published_vgg(state: dict[str, Tensor]) -> tuple[nn.Sequential, list[int]]:
    """torchvision's layout written out, and the slices' ends."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512):
        if width == 0:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    features = nn.Sequential(*layers)
    missing = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    features.load_state_dict(missing)
    return features, [1, 6, 11, 20, 29]


def test_perceptual(vgg: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(vgg, tmp_path / "vgg.pth")
    save_file(vgg, tmp_path / "vgg.safetensors")
    fake, real = torch.rand(1, 3, 32, 16).requires_grad_(), torch.rand(1, 3, 32, 16)
    features, ends = published_vgg(vgg)
    expected, x, y = torch.zeros(()), fake, real
    weights = iter((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1))
    for i, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if i in ends:
            expected = expected + 10 * next(weights) * F.l1_loss(x, y.detach())
    (want,) = torch.autograd.grad(expected, fake)
    for weights_of in (vgg, tmp_path / "vgg.pth", str(tmp_path / "vgg.safetensors")):
        loss = PerceptualLoss(weights_of)
        assert not any(p.requires_grad for p in loss.parameters())
        result = loss(fake, real)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(result, fake)[0], want, rtol=1e-4, atol=1e-6)
    normalized = PerceptualLoss(vgg, imagenet_normalization=True)(fake, real)
    assert not torch.isclose(normalized, expected)


def test_perceptual_refuses(vgg: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"torchvision.models.vgg19"):
        PerceptualLoss(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="no 'features.28.weight'"):
        PerceptualLoss({k: v for k, v in vgg.items() if k != "features.28.weight"})
    with pytest.raises(ValueError, match=r"features.28.bias'\] has shape \(3,\)"):
        PerceptualLoss(vgg | {"features.28.bias": torch.zeros(3)})
    loss = PerceptualLoss(vgg)
    with pytest.raises(ValueError, match="fake has shape"):
        loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
