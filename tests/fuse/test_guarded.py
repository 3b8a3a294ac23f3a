"""Networks whose own code defeats a trace: TorchDynamo captures them, with guards, and they run fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import p2pfast

pytestmark = pytest.mark.usefixtures("strict", "fresh_dynamo")


def block(inside: int, outside: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.InstanceNorm2d(outside), nn.ReLU(True))


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = block(3), block(8), 1.0


class AsksTypes(TwoBlocks):
    """Its path depends on the type of a value and on shapes, its answer on a list of keyword arguments."""

    def forward(self, x: Tensor, **more: Any) -> dict[str, Any]:
        y = self.a(x)
        if type(y) is not Tensor:
            raise TypeError(f"{type(y).__name__} is no tensor")
        if y.shape[-1] % 2 == 0 and y.size(0) * y.size(2) > 12:
            y = nn.functional.avg_pool2d(y, 2)
        for name in sorted(more):
            y = y + more[name] if name.startswith("add") else y * more[name]
        return {"image": self.b(y) * self.gain, "features": [y]}


class Swish(torch.autograd.Function):
    """A function with a gradient of its own; C code reads its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradients[0] * (s + x * s * (1 - s))


class OwnGradient(TwoBlocks):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(Swish.apply(self.a(x)))


class KeepsFeatures(TwoBlocks):
    """It leaves what it computed in its attributes, and moves an average in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.features = [self.a(x)]
        self.average = 0.5 * self.average + 0.5 * self.features[0].mean((0, 2, 3)).detach()
        return self.b(self.features[0])


NETWORKS = (AsksTypes, OwnGradient, KeepsFeatures)
X = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(1))


def close(found: Any, expected: Any) -> bool:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    return all(f.stride() == e.stride() and torch.allclose(f, e, rtol=1e-3, atol=1e-4) for f, e in pairs)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons why modules were not followed."""
    from p2pfast.fuse import source

    reasons: list[str] = []
    original = source.trace

    def note(*args: Any) -> Any:
        try:
            return original(*args)
        except source.Untraceable as why:
            reasons.append(str(why))
            raise

    monkeypatch.setattr(source, "trace", note)
    return reasons


@pytest.mark.parametrize("make", NETWORKS)
def test_inference_is_one_fused_graph_and_follows_shapes(
    make: Callable[[], nn.Module], traced: list[str]
) -> None:
    net = make().eval()
    twin = copy.deepcopy(net)
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        for x in (X, X[..., :13], X, X[:1, :, :8, :10], X[..., :13]):
            assert close(fast(x), twin(x))
    found = p2pfast.explain(fast)
    assert not found.pieces and not found.note
    assert sum(row.gigaflops > 0 for row in found.rows) == 2, str(found)
    assert len(traced) == 3, "a kind of input is traced once, and not followed"


@pytest.mark.parametrize("make", NETWORKS)
def test_training_is_fused_too(make: Callable[[], nn.Module]) -> None:
    net = make()
    twin = copy.deepcopy(net)
    fast = p2pfast.optimize(net, mode="train")
    for x in (X, X[..., :13]):
        for module in (fast, twin):
            module.zero_grad()
            sum(leaf.square().sum() for leaf in tree_leaves(module(x))).backward()
        for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=2e-3)
    found = p2pfast.explain(fast)
    assert [row.kernel for row in found.rows] == ["training", "training"] and not found.pieces


def test_keyword_arguments_attributes_and_modes_are_guarded() -> None:
    net = AsksTypes().eval()
    twin = copy.deepcopy(net)
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        for more in ({}, {"add": 1.5}, {"add": 1.5, "times": 3.0}, {"add": torch.ones(1, 8, 1, 1)}, {}):
            assert close(fast(X, **more), twin(X, **more))
        fast.gain = twin.gain = 3.0
        assert close(fast(X), twin(X))
        next(net.parameters()).mul_(2.0)
        next(twin.parameters()).mul_(2.0)
        assert close(fast(X), twin(X))
        seen: list[int] = []
        handle = fast.a[0].register_forward_hook(lambda m, i, o: o + 1)
        twin.a[0].register_forward_hook(lambda m, i, o: seen.append(1) or o + 1)
        assert close(fast(X), twin(X)) and seen
        handle.remove()
    with pytest.raises(RuntimeError, match="expected input|channels"):
        fast(X[:, :2])
    fast(X)
    assert not p2pfast.explain(fast).pieces, "a wrong input is the caller's error, not a reason"


def test_what_it_keeps_is_kept() -> None:
    net = KeepsFeatures().eval()
    twin = copy.deepcopy(net)
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        for x in (X, 2 * X, X):
            assert close(fast(x), twin(x)) and close(fast.features, twin.features)
            assert torch.allclose(fast.average, twin.average, atol=1e-5)
    assert torch.allclose(fast.state_dict()["average"], twin.average, atol=1e-5)


def test_many_instances_of_one_class_and_a_part_of_another_network() -> None:
    nets = [OwnGradient().eval() for _ in range(3)]
    fasts = [p2pfast.optimize(net) for net in nets]
    with torch.no_grad():
        for _ in range(2):
            for net, fast in zip(nets, fasts, strict=True):
                assert close(fast(X), net(X))
        whole = nn.Sequential(block(3, 3), nets[0], nn.Conv2d(8, 3, 1))
        fast = p2pfast.optimize(whole)
        for _ in range(2):
            assert close(fast(X), whole(X))
    found = p2pfast.explain(fast)
    assert [name for name, _ in found.pieces] == ["1"]
    assert sum(row.gigaflops > 0 for row in found.rows) == 4


class Legacy(TwoBlocks):
    """Tests of types as networks of 2017 made them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if isinstance(y.data, torch.FloatTensor) and not hasattr(y, "sample"):
            y = self.b(y)
        return y if isinstance(y, torch.DoubleTensor) else -y


def test_tests_of_types_find_what_a_value_stands_for() -> None:
    net = Legacy()
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        assert close(fast(X), net(X))
    assert sum(row.gigaflops > 0 for row in p2pfast.explain(fast).rows) == 2


def test_without_torchdynamo_it_is_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch._dynamo.exc.Unsupported("not this")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fails)
    net = OwnGradient().eval()
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        assert all(close(fast(X), net(X)) for _ in range(3))
    assert [name for name, _ in p2pfast.explain(fast).pieces] == ["a", "b"]
