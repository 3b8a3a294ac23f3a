"""The modules against the plain sequences they are made of: values, gradients, state, conversion."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm

import p2pfast
from p2pfast import functional, models
from p2pfast.nn import (
    ConvNormAct2d,
    FusedSequential,
    InstanceNormAct2d,
    PatchDiscriminator,
    ResidualBlock,
    UpConvNormAct2d,
)
from p2pfast.ops.conv.activation import ACTIVATIONS

X = (2, 5, 8, 9)


def plain_of(block: nn.Module) -> nn.Module:
    """A copy of the same modules without fused forwards."""
    twin = copy.deepcopy(block)
    if isinstance(twin, FusedSequential):
        return twin.to_sequential()
    for name, child in list(twin.named_children()):
        if isinstance(child, FusedSequential):
            setattr(twin, name, child.to_sequential())
    return twin


def values_and_gradients(net: nn.Module, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    result = net(x)
    leaves = result if isinstance(result, list) else [result]
    generator = torch.Generator().manual_seed(3)
    weighted = [(y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum() for y in leaves]
    torch.stack(weighted).sum().backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return [y.detach() for y in leaves], {"input": x.grad, **found}


def check_equal(block: nn.Module, x: Tensor, reference: Callable[[nn.Module], nn.Module] = plain_of) -> None:
    """Twice through both, in float32 against float64; the buffers too."""
    plain = reference(block).double()
    assert list(plain.state_dict()) == list(block.state_dict())
    for _ in range(2):
        block.zero_grad()
        plain.zero_grad()
        values, gradients = values_and_gradients(block, x)
        expected, expected_gradients = values_and_gradients(plain, x.double())
        for f, e in zip(values, expected, strict=True):
            assert f.shape == e.shape and f.dtype == x.dtype
            assert float((f.double() - e).norm()) <= 1e-5 * float(e.norm().clamp_min(1e-2))
        assert gradients.keys() == expected_gradients.keys()
        largest = max(float(g.norm()) for g in expected_gradients.values())
        for key, g in gradients.items():
            assert float((g.double() - expected_gradients[key]).norm()) <= 2e-5 * largest, key
    for (key, a), (_, b) in zip(block.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-6), key


NORMS: list[dict[str, Any]] = [
    {"norm": None},
    {"norm": "instance"},
    {"norm": "instance", "affine": True, "track_running_stats": True, "momentum": None},
    {"norm": "instance", "track_running_stats": True},
    {"norm": "batch", "eps": 1e-3},
    {"norm": "batch", "affine": False, "momentum": None},
    {"norm": "batch", "track_running_stats": False},
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: "-".join(map(str, n.values())))
def test_conv_norms(norm: dict[str, Any], training: bool) -> None:
    block = ConvNormAct2d(5, 6, 3, 2, 1, padding_mode="reflect", activation="leaky_relu", **norm)
    check_equal(block.train(training), torch.randn(X) + 1)
    up = UpConvNormAct2d(5, 4, 3, 2, 1, 1, bias=False, **norm)
    check_equal(up.train(training), torch.randn(X) + 1)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS[1:]])
def test_activations(activation: str | None) -> None:
    options = {"activation": activation, "negative_slope": 0.2}
    check_equal(ConvNormAct2d(5, 3, 3, **options), torch.randn(X))
    check_equal(ConvNormAct2d(5, 3, 1, norm=None, **options), torch.randn(X))
    check_equal(InstanceNormAct2d(5, affine=True, **options), torch.randn(X) - 2)


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 5, "out_channels": 10},
        {"dilation": 2},
        {"padding": (1, 2)},
        {"stride": (2, 1)},
        {"padding_mode": "circular", "padding": 1},
        {"padding_mode": "replicate", "padding": 2, "kernel_size": 5},
        {"padding": "same"},
        {"kernel_size": (1, 3), "padding": (0, 1), "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_geometry_with_and_without_kernels(options: dict[str, Any]) -> None:
    given: dict[str, Any] = {"in_channels": 5, "out_channels": 4, "kernel_size": 3, **options}
    check_equal(ConvNormAct2d(**given), torch.randn(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    block = ConvNormAct2d(5, 6, 3, padding=1, dtype=dtype)
    x = torch.randn(X, dtype=dtype)
    expected = plain_of(block).double()(x.double())
    found = block(x)
    assert found.dtype == dtype
    assert float((found.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 0.01
    found.sum().backward()
    assert block[0].weight.grad is not None and block[0].weight.grad.dtype == dtype


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "zeros"])
@pytest.mark.parametrize("norm", ["instance", "batch", None])
def test_residual_block(norm: str | None, mode: str, dropout: float) -> None:
    block = ResidualBlock(5, padding_mode=mode, norm=norm, dropout=dropout).eval()
    published = models.layers.ResnetBlock(
        5,
        "zero" if mode == "zeros" else mode,
        models.norm_layer_of(norm) if norm else lambda c: nn.Identity(),
        dropout > 0,
        True,
    )
    if norm is not None:
        published.load_state_dict(block.state_dict())
    check_equal(block, torch.randn(X))
    check_equal(block.train(dropout == 0), torch.randn(X))
    if dropout > 0:
        torch.manual_seed(1)
        found = block.train()(torch.ones(X))
        torch.manual_seed(1)
        # Dropout draws in memory order, and native results are channels_last.
        half, inner = 3 + (mode != "zeros") - (norm is None), torch.ones(X)
        inner = block.conv_block[half](FusedSequential(*block.conv_block[:half])(inner))
        rest = nn.Sequential(*block.conv_block[half + 1 :])
        torch.testing.assert_close(found, rest(inner) + 1, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_patch_discriminator(norm: str, features: bool) -> None:
    net = PatchDiscriminator(3, 4, 2, norm=norm, features=features)
    published = models.NLayerDiscriminator(3, 4, 2, models.norm_layer_of(norm))
    published.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 32, 33)
    with torch.no_grad():
        found = net.eval()(x)
        last = found[-1] if isinstance(found, list) else found
        torch.testing.assert_close(last, published.eval()(x))
    if features:
        assert isinstance(found, list) and [f.shape[1] for f in found] == [4, 8, 16, 1]


def test_conversions_keep_the_modules_and_the_state() -> None:
    plain = nn.Sequential(
        nn.ReflectionPad2d(3), nn.Conv2d(3, 4, 7), nn.Identity(), nn.BatchNorm2d(4), nn.ReLU(True)
    ).eval()
    block = ConvNormAct2d.from_sequential(plain)
    assert list(block.state_dict()) == list(plain.state_dict()) and not block.training
    assert all(a is b for a, b in zip(block, plain, strict=True))
    back = block.to_sequential()
    assert type(back) is nn.Sequential and all(a is b for a, b in zip(back, plain, strict=True))
    check_equal(block, torch.randn(2, 3, 9, 10), lambda b: copy.deepcopy(plain))
    with pytest.raises(ValueError, match="UpConvNormAct2d is made of ConvTranspose2d"):
        UpConvNormAct2d.from_sequential(plain)
    with pytest.raises(ValueError, match="sequence has no modules"):
        InstanceNormAct2d.from_sequential(nn.Sequential())
    with pytest.raises(TypeError, match="sequence is Conv2d"):
        FusedSequential.from_sequential(plain[1])  # type: ignore[arg-type]
    InstanceNormAct2d.from_sequential(nn.Sequential(nn.InstanceNorm2d(3), nn.Tanh()))
    ResidualBlock.from_sequential(
        models.layers.ResnetBlock(3, "reflect", nn.InstanceNorm2d, False, True).conv_block
    )
    with pytest.raises(ValueError, match="ends in no convolution"):
        ResidualBlock.from_sequential(plain)


def test_whole_generators_as_sequences() -> None:
    generator = models.GlobalGenerator(3, 3, 4, 2, 1, models.norm_layer_of("instance"))
    fused = FusedSequential.from_sequential(generator.model)
    x = torch.randn(1, 3, 16, 20)
    torch.testing.assert_close(fused(x), generator(x), atol=2e-5, rtol=1e-4)
    odd = FusedSequential(
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Conv2d(3, 4, 3),
        nn.Tanh(),
        nn.InstanceNorm2d(4),
        nn.Dropout(0.0),
        nn.ReflectionPad2d((1, 0, 1, 0)),
        nn.ConstantPad2d(1, 2.0),
        nn.ReplicationPad2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Sequential(nn.ConvTranspose2d(4, 2, 2, 2), nn.BatchNorm2d(2)),
        nn.Hardtanh(),
    )
    check_equal(odd, torch.randn(2, 3, 9, 8))


@pytest.mark.parametrize("wrap", [spectral_norm, weight_norm], ids=["hooked", "parametrised"])
def test_normalised_weights(wrap: Callable[[nn.Module], nn.Module]) -> None:
    block = FusedSequential(wrap(nn.Conv2d(5, 4, 3)), nn.InstanceNorm2d(4), nn.ReLU())
    check_equal(block.eval(), torch.randn(X))


def test_hooks_run() -> None:
    block = ConvNormAct2d(5, 4, 3)
    seen: list[torch.Size] = []
    x = torch.randn(X)
    before = block(x)
    handle = block[1].register_forward_hook(lambda m, i, o: seen.append(o.shape))
    torch.testing.assert_close(block(x), before)
    assert len(seen) == 1
    handle.remove()
    block(x)
    assert len(seen) == 1


def test_changed_children_are_seen() -> None:
    block = FusedSequential(nn.Conv2d(5, 4, 3), nn.ReLU())
    x = torch.randn(X)
    block(x)
    block[1] = nn.Tanh()
    torch.testing.assert_close(block(x), torch.tanh(block[0](x)))
    block.append(nn.Conv2d(4, 2, 1))
    assert block(x).shape[1] == 2


def test_inside_optimize_and_compile() -> None:
    net = nn.Sequential(
        ConvNormAct2d(5, 16, 3, padding=1), ResidualBlock(16), UpConvNormAct2d(16, 3, 4, 2, 1)
    )
    x = torch.randn(X)
    expected = net(x)
    fast = p2pfast.optimize(net)
    torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-4)
    assert not p2pfast.explain(fast).unfused
    judge = PatchDiscriminator(3, 16, 1, features=True)
    judged = p2pfast.optimize(judge)
    for a, b in zip(judged(expected), judge(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not p2pfast.explain(judged).unfused
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_autocast_lowers_images_and_keeps_statistics() -> None:
    block = ConvNormAct2d(5, 6, 3, norm="batch")
    x = torch.randn(X) + 4
    wide = copy.deepcopy(block)
    wide(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = block(x)
    assert found.dtype == torch.bfloat16 and block[1].running_var.dtype == torch.float32
    torch.testing.assert_close(block[1].running_var, wide[1].running_var, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert block[0].weight.grad is not None and block[0].weight.grad.dtype == torch.float32


def test_gradient_penalty() -> None:
    net = PatchDiscriminator(3, 4, 1, norm="instance")
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    plain = plain_of(net)
    penalties = []
    for run in (net, plain):
        (gradient,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        run.zero_grad()
        penalty.backward()
        penalties.append([penalty.detach(), *[p.grad for p in run.parameters() if p.grad is not None]])
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_what_pytorch_refuses_raises_as_there() -> None:
    block = ConvNormAct2d(5, 4, 3)
    for bad in (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 2, 2), torch.randn(5), torch.randn(1, 5, 3, 3)):
        with pytest.raises(Exception) as theirs:
            block.to_sequential()(bad)
        with pytest.raises(type(theirs.value)):
            block(bad)
    assert block(torch.randn(0, 5, 8, 8)).shape == (0, 4, 6, 6)
    assert block(torch.randn(5, 8, 8)).shape == (4, 6, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNormAct2d(3, 3, 3, norm="layer"), "norm is 'layer'"),
        (lambda: ConvNormAct2d(3, 3, 3, activation="mish"), "activation is 'mish'"),
        (lambda: ResidualBlock(3, 4), "kernel_size is 4"),
        (lambda: ResidualBlock(3, padding_mode="zero"), "padding_mode is 'zero'"),
        (lambda: PatchDiscriminator(3, layers=0), "layers is 0"),
    ],
)
def test_bad_arguments(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_functional_forms() -> None:
    x, other = torch.randn(X), torch.randn(2, 3, 8, 9)
    weight, bias = torch.randn(4, 8, 3, 3), torch.randn(4)
    skip = functional.conv_norm_act([x, other], weight, bias, padding=1, norm="batch", activation="elu")
    joined = torch.nn.functional.conv2d(torch.cat([x, other], 1), weight, bias, padding=1)
    expected = torch.nn.functional.elu(torch.nn.functional.batch_norm(joined, None, None, training=True))
    torch.testing.assert_close(skip, expected, atol=1e-5, rtol=1e-4)
    for norm, residual in itertools.product(("instance", None), (None, torch.randn(2, 4, 16, 18))):
        up = functional.up_conv_norm_act(
            x, torch.randn(5, 4, 4, 4), bias, 2, 1, norm=norm, activation="relu", residual=residual
        )
        assert up.shape == (2, 4, 16, 18) and float(up.min()) >= 0
    for bad, message in (
        ({"norm": "group"}, "norm is 'group'"),
        ({"activation": "mish"}, "activation is 'mish'"),
        ({"padding_mode": "wrap"}, "padding_mode is 'wrap'"),
    ):
        with pytest.raises(ValueError, match=message):
            functional.conv_norm_act(x, torch.randn(4, 5, 3, 3), **bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm is None"):
        functional.instance_norm_act(x, norm=None)  # type: ignore[arg-type]
