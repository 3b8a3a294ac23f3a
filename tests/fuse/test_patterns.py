"""The ways in which people write a layer: each is found, fused, and gives PyTorch's answer and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import p2pfast

pytestmark = pytest.mark.usefixtures("strict")

X = torch.randn(2, 8, 9, 10, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and torch.allclose(a, b, rtol=1e-3, atol=2e-4)


def check(make: Callable[[], nn.Module], fused: int) -> None:
    """The same answers, buffers and gradients in both modes, and as many fused convolutions."""
    net, twin = make(), make()
    twin.load_state_dict(net.state_dict())
    fast = p2pfast.optimize(net)
    for training in (True, False, True):
        for module in (fast, twin):
            module.train(training)
        with torch.no_grad():
            assert close(fast(X), twin(X)), training
        rows = p2pfast.explain(fast).rows
        assert sum(row.gigaflops > 0 for row in rows) == fused, str(p2pfast.explain(fast))
    net.load_state_dict(twin.state_dict())
    fast = p2pfast.optimize(net, mode="train")
    for module in (fast, twin):
        module.zero_grad()
        y = module(X)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert sum(row.kernel == "training" for row in p2pfast.explain(fast).rows) == fused
    largest = max(float(p.grad.norm()) for p in twin.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        error = float((ours.grad - theirs.grad).norm())
        assert error <= 5e-3 * float(theirs.grad.norm()) + 1e-4 * largest, name
    for (name, ours), theirs in zip(net.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), name


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU,
    lambda: nn.LeakyReLU(0.2, inplace=True),
    lambda: nn.ELU(0.7),
    nn.SiLU,
    nn.GELU,
    nn.Tanh,
    nn.Sigmoid,
    lambda: nn.SiLU(inplace=True),
    nn.Identity,
)
NORMS: tuple[Callable[[], nn.Module], ...] = (
    lambda: nn.GroupNorm(8, 8),
    lambda: nn.InstanceNorm2d(8),
    lambda: nn.BatchNorm2d(8, affine=False),
    lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
    lambda: nn.GroupNorm(8, 8, affine=False),
    lambda: nn.BatchNorm2d(8, track_running_stats=False),
    nn.Identity,
)
CONVOLUTIONS: tuple[Callable[[], list[nn.Module]], ...] = (
    lambda: [nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3)],
    lambda: [nn.ReplicationPad2d(1), nn.Conv2d(8, 8, 3, bias=False)],
    lambda: [nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3, 2)],
    lambda: [nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")],
    lambda: [nn.ConvTranspose2d(8, 8, 4, 2, 1)],
)


@pytest.mark.parametrize("order", ["conv norm act", "norm act conv", "act conv norm"])
@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
def test_orders(order: str, number: int) -> None:
    """Each activation in each order; kinds of norms and paddings change along."""

    def make() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(8, 8, 1)]
        for i in (number, number + 4):
            made = {
                "conv": CONVOLUTIONS[i % len(CONVOLUTIONS)](),
                "norm": [NORMS[i % len(NORMS)]()],
                "act": [ACTIVATIONS[number]()],
            }
            layers += [layer for kind in order.split() for layer in made[kind]]
        return nn.Sequential(*layers)

    check(make, fused=3)


@pytest.mark.parametrize(
    "normed",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["weight, hook", "spectral, hook", "weight, parametrised", "spectral, parametrised"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights(normed: Callable[[nn.Module], nn.Module]) -> None:
    def make() -> nn.Module:
        layers = [normed(nn.Conv2d(8, 8, 3, padding=1)), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2)]
        return nn.Sequential(*layers, normed(nn.ConvTranspose2d(8, 4, 4, 2, 1)))

    check(make, fused=2)


class Shared(nn.Module):
    """A layer that is used twice, a weight of two layers, and pooling between branches."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.tied = nn.Conv2d(8, 8, 3, padding=1)
        self.tied.weight = self.twice[0].weight  # type: ignore[assignment]
        self.pool = nn.AvgPool2d(3, 2, 1, count_include_pad=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.twice(x), self.twice(self.pool(x))
        coarse = self.up(F.gelu(self.tied(coarse)))[:, :, : x.shape[2], : x.shape[3]]
        return torch.cat([fine + coarse, F.avg_pool2d(fine, 3, 1, 1)], 1)


def test_shared_weights_and_pooling_between_branches() -> None:
    check(Shared, fused=4)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.up = (nn.Parameter(torch.randn(8, 8, 3, 3) / 9) for _ in range(2))
        self.gain, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, stride=2)
        y = F.silu(F.instance_norm(y, weight=self.gain, bias=self.shift))
        y = F.conv_transpose2d(y, self.up, stride=2, padding=1)
        return F.elu(F.group_norm(y, 8, self.shift, self.gain), inplace=True)


def test_functional_forms() -> None:
    check(Functional, fused=2)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU())


class Padding(nn.Module):
    """What is padded changes before the padded image is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = block()[:2], nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        padded = F.pad(x, (1, 1, 1, 1))
        x.mul_(2.0)
        return torch.tanh(self.conv(padded)) + x


def test_a_write_between_a_padding_and_its_convolution() -> None:
    check(Padding, fused=2)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "slice": lambda: torch.randn(4, 16, 20, 20)[::2, 3:11, ::2, 1:13],
    "transposed": lambda: torch.randn(2, 8, 10, 9).transpose(2, 3),
    "expanded": lambda: torch.randn(1, 8, 1, 9).expand(3, 8, 7, 9),
    "flipped channels_last": lambda: X.flip(3).contiguous(memory_format=torch.channels_last),
    "one channel of many": lambda: torch.randn(2, 9, 10, 8).permute(0, 3, 1, 2),
    "no images": lambda: torch.randn(0, 8, 9, 10),
    "an offset": lambda: torch.randn(2 * 8 * 90 + 3)[3:].view(2, 8, 9, 10),
    "requires gradients": lambda: torch.randn(2, 8, 9, 10, requires_grad=True),
}


@pytest.mark.parametrize("kind", list(INPUTS))
@pytest.mark.parametrize("mode", ["inference", "train"])
def test_inputs_of_any_making(mode: str, kind: str) -> None:
    x = INPUTS[kind]()
    first = block() if len(x) else nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())  # a norm raises without any
    net = nn.Sequential(first, nn.Conv2d(8, 3, 1))
    fast = p2pfast.optimize(net, mode=mode)
    before = x.detach().clone()
    expected = net(x)
    for _ in range(2):
        found = fast(x)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        assert len(x) == 0 or close(found, expected)
        assert found.requires_grad == (mode == "train")
        with torch.no_grad():
            found.zero_()  # a result is the caller's own
    assert torch.equal(x, before)


class Loose(nn.Module):
    """Keyword arguments with defaults, nested lists, one module called in a loop, a number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = block(), nn.ModuleList(nn.Conv2d(8, 2, 1) for _ in range(2))

    def forward(self, images: list[Any], *, times: int = 1, gain: Tensor | None = None) -> dict[str, Any]:
        x, (y, *_) = images[0], images[1]
        for _ in range(times):
            x = self.body(x)
        x = x if gain is None else x * gain
        x[:, 0] += 1
        return {"heads": [[head(x), x[:, :2]] for head in self.heads], "other": (y, None, times)}


class Derived(Loose):
    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = super().forward(*args, **kwargs)
        return {**found, "count": len(found["heads"])}


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_loose_signature(mode: str) -> None:
    net = Derived()
    fast = p2pfast.optimize(net, mode=mode)
    for kwargs in ({}, {"times": 3}, {"gain": torch.tensor(0.5)}, {"times": 2, "gain": torch.rand(8, 1, 1)}):
        found, expected = fast([X, (X + 1, 3)], **kwargs), net([X, (X + 1, 3)], **kwargs)
        assert found.keys() == expected.keys() and found["count"] == 2
        assert found["other"][1:] == expected["other"][1:]
        assert torch.equal(found["other"][0], expected["other"][0])
        for ours, theirs in zip(found["heads"], expected["heads"], strict=True):
            assert type(ours) is list and all(close(a, b) for a, b in zip(ours, theirs, strict=True))
    with pytest.raises(TypeError):
        fast([X, (X,)], unknown=1)
    with pytest.raises(IndexError):
        fast([X])


def test_modes_of_gradients_take_turns() -> None:
    """no_grad, inference_mode and gradients, frozen and thawed layers, in any order on one network."""
    net = nn.Sequential(block(), block(), nn.Conv2d(8, 3, 1))
    twin = copy.deepcopy(net)
    fast = p2pfast.optimize(net, mode="train")
    for i, mode in enumerate((torch.inference_mode, torch.enable_grad, torch.no_grad, torch.enable_grad)):
        for module in (net, twin):
            module[0].requires_grad_(i < 2)
            module.zero_grad()
        with mode():
            found, expected = fast(X), twin(X)
        assert close(found, expected) and found.requires_grad == expected.requires_grad
        assert found.is_inference() == expected.is_inference()
        if not found.requires_grad:
            continue
        for y in (found, expected):
            y.square().mean().backward()
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None and theirs.grad is not None:
                assert torch.allclose(ours.grad, theirs.grad, rtol=5e-3, atol=1e-5)
    inference = p2pfast.optimize(net)
    with torch.inference_mode():
        inside = inference(X.clone())
    assert close(inside, inference(X)) and inside.is_inference() and not inference(X).is_inference()


def test_layers_that_are_replaced_or_taken_out() -> None:
    net = nn.Sequential(block(), block())
    layer, weight = nn.Conv2d(8, 8, 1), torch.randn(8, 8, 3, 3)
    for mode in ("inference", "train"):
        fast = p2pfast.optimize(net, mode=mode)
        twin = copy.deepcopy(net)
        steps: tuple[Callable[[Any], Any], ...] = (
            lambda m: None,
            lambda m: m[0].append(nn.Conv2d(8, 8, 1)),
            lambda m: m[0][-1].load_state_dict(copy.deepcopy(layer.state_dict())),
            lambda m: setattr(m[1][0], "weight", nn.Parameter(weight.clone())),
            lambda m: m[1].pop(1),
            lambda m: nn.init.ones_(m[1][0].bias),
        )
        for step in steps:
            for module in (fast, twin):
                torch.manual_seed(1)
                step(module)
            assert close(fast(X), twin(X)), mode
