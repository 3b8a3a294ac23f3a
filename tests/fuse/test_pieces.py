"""Networks that are not one graph: what is captured all the same, and what becomes pieces."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import p2pfast

pytestmark = pytest.mark.usefixtures("strict")


def close(a: Any, b: Any) -> bool:
    return torch.allclose(a, b.detach(), rtol=1e-4, atol=1e-5) and a.stride() == b.stride()


def block(channels: int = 8, inside: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside or channels, channels, 3, padding=1), nn.InstanceNorm2d(channels), nn.ReLU(True)
    )


def kernels(fast: nn.Module) -> list[str]:
    return [row.kernel for row in p2pfast.explain(fast).rows if row.kernel != "pytorch"]


class OnData(nn.Module):
    """Which branch it takes depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(8, 3), block()
        self.blocks = nn.ModuleList([block(), nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x) if x.mean() > 10 else self.blocks[0](x)
        return self.blocks[1](x)


X = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(1))


def test_control_flow_on_values_becomes_pieces() -> None:
    net = OnData()
    fast = p2pfast.optimize(net)
    assert all(close(fast(X), net(X)) for _ in range(3))
    found = p2pfast.explain(fast)
    assert {name for name, _ in found.pieces} == {"first", "second", "blocks.0"}
    assert "pieces" in found.note and "control flow" in found.note
    assert any(row.name.startswith("first.") and row.kernel != "pytorch" for row in found.rows)
    with torch.no_grad():
        next(net.first.parameters()).mul_(3)
    assert close(fast(X), net(X))


def test_a_submodule_that_cannot_be_followed_is_a_piece_of_the_whole_graph() -> None:
    net = nn.Sequential(block(8, 3), OnDataBlock(), block())
    fast = p2pfast.optimize(net)
    assert all(close(fast(X), net(X)) for _ in range(3))
    found = p2pfast.explain(fast)
    assert [name for name, _ in found.pieces] == ["1", "1.inner"]
    names = [row.name for row in found.rows if row.kernel != "pytorch"]
    assert any(n.startswith("_0_0") for n in names) and any(n.startswith("1.inner") for n in names)
    assert close(fast(-X), net(-X)) and close(fast(X[:1]), net(X[:1]))


class OnDataBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.mean().item() > 0.1 else -self.inner(x)


class ByShape(nn.Module):
    """Varargs, control flow on shapes and types, asserts, random numbers, names that torch.fx uses."""

    def __init__(self) -> None:
        super().__init__()
        self.code = block(8, 6)
        self.graph = nn.Conv2d(8, 3, 3)

    def forward(self, *images: Tensor, extra: dict[str, Any] | None = None) -> Any:
        assert all(isinstance(image, Tensor) and image.shape[1] == 3 for image in images)
        b, _, h, w = images[0].size()
        x = torch.cat(images, 1)
        if h % 4 or w % 4:
            x = F.pad(x, (0, -w % 4, 0, -h % 4), mode="reflect")
        x = self.graph(self.code(x))[:, :, :h, :w]
        for part in (extra or {}).get("add", []):
            x = x + part
        return [x + 0.1 * torch.randn(b, 1, 1, 1), (x.view(b, -1), None)]


def test_varargs_nested_inputs_and_control_flow_on_shapes() -> None:
    net = ByShape()
    fast = p2pfast.optimize(net)
    extra = {"add": [torch.ones(2, 3, 1, 1), 2.0]}
    for images, more in (((X, -X), {}), ((X, -X), {"extra": extra}), ((X[..., :12], X[..., 1:13]), {})):
        torch.manual_seed(1)
        expected = net(*images, **more)
        torch.manual_seed(1)
        found = fast(*images, **more)
        assert type(found) is list and found[1][1] is None
        assert close(found[0], expected[0]) and close(found[1][0], expected[1][0])
    assert len(kernels(fast)) == 2 and not p2pfast.explain(fast).pieces
    with pytest.raises(AssertionError):
        fast(torch.randn(2, 4, 8, 8))


def test_hooks_on_blocks_fire_and_the_blocks_are_fused() -> None:
    net = nn.Sequential(block(8, 3), block(), nn.Conv2d(8, 3, 1))
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda m, i, o: seen.append(i[0]))
    net[2].register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    fast = p2pfast.optimize(net)
    expected = net(X)
    kept = seen.pop().clone()
    for _ in range(3):
        assert close(fast(X), expected)
    fast(2 * X)
    assert len(seen) == 4 and all(close(i, kept) for i in seen[:3]), "what a hook kept has changed"
    assert [name for name, _ in p2pfast.explain(fast).pieces] == ["1"]
    assert any(row.name.startswith("1.") for row in p2pfast.explain(fast).rows)

    handle = fast[0].register_forward_hook(lambda m, i, o: o + 1)  # after the first call
    plus = nn.Sequential(net[0], nn.Identity(), net[1], net[2])
    plus[1].register_forward_hook(lambda m, i, o: o + 1)
    assert close(fast(X), plus(X)) and close(fast(X), plus(X))
    handle.remove()
    assert close(fast(X), expected)
    calls: list[int] = []
    fast.register_forward_hook(lambda m, i, o: calls.append(1))
    fast(X)
    assert len(calls) == 1


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls, self.alpha = block(8, 3), 0, 0.5
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.alpha


class Counting(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = super().forward(x)
        self.kept.append(self.last)
        return self.last


class Drawing(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * random.random()


def test_plain_attributes_that_change_are_seen() -> None:
    net = Stateful()
    fast = p2pfast.optimize(net)
    assert close(fast(X), net(X))
    for alpha in (2.0, 0.5, -1.0):
        fast.alpha = net.alpha = alpha
        assert close(fast(X), net(X))
    fast.body[0] = net.body[0] = nn.Conv2d(3, 8, 3, padding=1)
    assert close(fast(X), net(X))


def test_what_forward_changes_is_changed_at_every_call() -> None:
    net = Counting()
    fast = p2pfast.optimize(net)
    expected = net(X)
    for i in range(3):
        assert close(fast(X), expected) and close(fast.last, expected)
        assert fast.calls == i + 1 and len(fast.kept) == i + 1
    assert net.calls == 1 and len(net.kept) == 1
    assert "'calls'" in p2pfast.explain(fast).note and kernels(fast)


def test_python_random_numbers_are_drawn_at_every_call() -> None:
    net = Drawing()
    fast = p2pfast.optimize(net)
    for _ in range(2):
        random.seed(3)
        expected = net(X)
        random.seed(3)
        assert close(fast(X), expected)
    assert "random numbers" in p2pfast.explain(fast).note and kernels(fast)


class Writing(nn.Module):
    """Writes to parts of tensors whose normalisation and activation are still pending in a fused graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.InstanceNorm2d(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.a(x)
        before = F.leaky_relu(self.n(y), 0.2)
        part = y[:, :2]
        part.mul_(3.0)
        after = F.relu(self.n(y))
        F.relu(y, inplace=True)
        z = torch.relu(x)
        x.add_(1.0)
        return before, after, part, y, self.b(z.repeat(1, 3, 1, 1)[:, :8]), self.b(y), self.a(x), z


def test_writes_to_parts_are_seen_where_pytorch_shows_them() -> None:
    net = Writing()
    fast = p2pfast.optimize(net)
    with torch.no_grad():
        for _ in range(2):
            x, y = X.clone(), X.clone()
            assert all(close(f, e) for f, e in zip(fast(x), net(y), strict=True)) and torch.equal(x, y)


def test_writes_through_data_are_seen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval()
    fast = p2pfast.optimize(net)
    fast(X)
    for p in net.parameters():
        p.data.clamp_(-0.01, 0.01)
    net[1].running_mean.data.normal_()
    assert close(fast(X), net(X))


def test_failures_are_pytorchs_own_or_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a failure of ours")

    monkeypatch.setattr("p2pfast.runtime.cpu.make_plan", fail)
    net = OnData()
    fast = p2pfast.optimize(net)
    with pytest.raises(RuntimeError, match="of ours"):
        fast(X)
    monkeypatch.delenv("P2PFAST_STRICT")
    fast = p2pfast.optimize(net)
    with pytest.warns(RuntimeWarning, match="left it to PyTorch .*of ours.*issue tracker"):
        assert close(fast(X), net(X))
