"""``optimize(mode="train")``: chains with gradients, and everything that training does around a network."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import make
from torch import Tensor, nn

import p2pfast
from p2pfast.fuse import training
from p2pfast.fuse.steps import JoinStep
from p2pfast.fuse.trial import Trial
from p2pfast.ops import measured


@pytest.fixture(autouse=True, params=["as given", "channels_last"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, strict: None) -> None:
    monkeypatch.setattr(training, "_suits_channels_last", lambda program: request.param == "channels_last")


def steps(fast: nn.Module) -> list[str]:
    return [row.detail.split()[0] for row in p2pfast.explain(fast).rows if row.kernel.startswith("training")]


def loss_of(net: nn.Module, x: Tensor, seed: int = 3) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The result, the gradients of parameters by name and of the input."""
    x = x.detach().clone().requires_grad_()
    net.zero_grad()
    torch.manual_seed(seed)
    y = net(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    assert x.grad is not None
    return y.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}, x.grad


def check(fast: nn.Module, plain: nn.Module, x: Tensor, tolerance: float = 1e-3) -> None:
    """Same result, layout, gradients and buffers; ``fast`` may share ``plain``'s parameters."""
    twin = copy.deepcopy(plain)
    found, expected = loss_of(fast, x), loss_of(twin, x)
    meaning = [i for i, size in enumerate(found[0].shape) if size > 1]
    assert [found[0].stride(i) for i in meaning] == [expected[0].stride(i) for i in meaning]
    assert found[1].keys() == expected[1].keys()
    largest = max(float(g.abs().max()) for g in expected[1].values())
    pairs = [(found[0], expected[0]), (found[2], expected[2])]
    for a, b in [*pairs, *((found[1][name], expected[1][name]) for name in found[1])]:
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 3e-2 * largest)
    for (name, a), (_, b) in zip(fast.named_buffers(), twin.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def block(inputs: int, outputs: int, norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(inputs, outputs, 3), norm(outputs), nn.LeakyReLU(0.2, True)
    )


X = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["unet-batch", "resnet-batch", "resnet-dropout", "local", "patchgan"])
def test_published_networks(name: str) -> None:
    torch.manual_seed(1)  # with some seeds a value within rounding of zero falls to ReLU's other side
    net, (x, *_) = make(name)
    fast = p2pfast.optimize(net, mode="train")
    assert list(fast.state_dict()) == list(net.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), fast.parameters(), strict=True))
    for mode in (True, False, True):
        fast.train(mode)
        net.train(mode)
        check(fast, net, x)
        found = p2pfast.explain(fast)
        convolutions = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in net.modules())
        assert sum(row.kernel == "training" for row in found.rows) == convolutions
    torch.manual_seed(3)
    kept = fast(x)
    with torch.no_grad():
        torch.manual_seed(3)
        assert torch.equal(fast(x), kept)  # batch norm's answer does not depend on its running statistics
    fast.eval()
    net.eval()
    with torch.no_grad():  # the inference engine
        torch.testing.assert_close(fast(x), net.eval()(x), rtol=1e-3, atol=1e-4)
    assert all(row.kernel != "training" for row in p2pfast.explain(fast).rows)


class Custom(nn.Module):
    """Functional forms, attributes, residuals in place, shared layers, computed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 9)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.mean, self.var = nn.Buffer(torch.zeros(8)), nn.Buffer(torch.ones(8))
        self.spectral = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.normed = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(8, 8, 4, 2, 1))
        self.group = nn.GroupNorm(8, 8)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), self.weight * self.scale)
        y = F.batch_norm(y, self.mean, self.var, training=self.training)
        y += x
        y = torch.tanh(y)
        y = self.spectral(y) + y
        y = F.elu(self.group(self.normed(y)), 0.5)
        flat = self.last(y).view(y.shape[0], 4, -1)
        return flat.softmax(-1).view(y.shape[0], 4, *y.shape[2:]) * 100


def test_any_way_to_write_it() -> None:
    net = Custom()
    fast = p2pfast.optimize(net, mode="train")
    for _ in range(2):
        check(fast, net, X)
        net.load_state_dict(fast.state_dict())
    assert steps(fast) == [
        "conv+norm+act",
        "pad+conv+norm+residual+act",
        "conv+residual",
        "conv+norm+act",
        "conv",
    ]


class OnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 8), block(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if x.mean() > 1e6 else self.b(self.b(x))


class NoGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = block(3, 8), block(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            kept = self.b(x)
        return self.a(x) + kept


@pytest.mark.parametrize("kind", [OnData, NoGradient])
def test_what_a_trace_would_lose_is_done_in_pieces(kind: type[nn.Module]) -> None:
    net = kind()
    fast = p2pfast.optimize(net, mode="train")
    check(fast, net, X)
    net.load_state_dict(fast.state_dict())
    check(fast, net, X)
    found = p2pfast.explain(fast)
    assert {name for name, _ in found.pieces} == {"a", "b"}
    assert steps(fast) == ["pad+conv+norm+act"] * 2


def test_hooks_see_their_modules_and_gradients() -> None:
    net = nn.Sequential(block(3, 8), block(8, 8), nn.Conv2d(8, 3, 1))
    fast = p2pfast.optimize(net, mode="train")
    seen: list[str] = []
    conv, tail = fast[0][1], fast[1]
    conv.register_forward_hook(lambda *a: seen.append("forward"))
    tail.register_full_backward_hook(lambda *a: seen.append("backward"))
    conv.weight.register_hook(lambda g: seen.append("weight"))
    check(fast, copy.deepcopy(net), X)
    assert sorted(seen) == ["backward", "forward", "weight"]
    assert steps(fast) == ["norm+act", "conv", "pad+conv+norm+act"]


def test_gradients_of_gradients() -> None:
    net = nn.Sequential(block(3, 8, nn.InstanceNorm2d), nn.Conv2d(8, 1, 1), nn.Tanh())
    results = []
    for module in (p2pfast.optimize(net, mode="train"), net):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), list(net.parameters())[0]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_precision() -> None:
    net = nn.Sequential(block(3, 8), block(8, 16), nn.Conv2d(16, 3, 1))
    fast, low = p2pfast.optimize(net, mode="train"), p2pfast.optimize(net, mode="train", dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = loss_of(fast, X), loss_of(copy.deepcopy(net), X)
    by_option, exact = loss_of(low, X), loss_of(copy.deepcopy(net).double(), X.double())
    assert ours[0].dtype == plain[0].dtype == by_option[0].dtype == torch.bfloat16
    torch.testing.assert_close(ours[0], plain[0], rtol=5e-2, atol=5e-2)
    for name, expected in exact[1].items():
        assert ours[1][name].dtype == by_option[1][name].dtype == torch.float32
        if not name.endswith("1.bias"):  # nothing but rounding, before a norm
            # Beside each other they may be a fifth apart: in a sum over few pixels each is as far from exact.
            of_ours, of_option, of_plain = (
                float((found[1][name] - expected).norm() / expected.norm())
                for found in (ours, by_option, plain)
            )
            assert max(of_ours, of_option) < 2 * of_plain + 0.05, name
    assert steps(fast) == steps(low) and len(steps(fast)) == 3


def test_training_with_loss_scaling_goes_the_same_way() -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(block(3, 8), block(8, 8), nn.Dropout(0.3), nn.Conv2d(8, 3, 1))
    networks = plain, p2pfast.optimize(copy.deepcopy(plain), mode="train")
    losses: list[list[float]] = []
    for net in networks:
        torch.manual_seed(2)
        optimiser = torch.optim.SGD(net.parameters(), 0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        losses.append([])
        for _ in range(6):
            loss = (net(X) - X).square().mean()
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("inplace", [False, True])
def test_skip_connections_are_joined_with_the_activation_behind_them(inplace: bool) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = block(3, 8), block(8, 8), block(16, 8)
            self.last = nn.Conv2d(11, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            y = self.c(F.relu(torch.cat([a, self.b(a)], 1), inplace=inplace))
            return self.last(torch.cat((x, y), dim=-3))

    net = Skip()
    fast = p2pfast.optimize(net, mode="train")
    check(fast, net, X)
    engine: Any = next(iter(fast.__dict__["_p2pfast"].trainers.values()))
    joins = [step.call for step in engine.last.steps if isinstance(step.call, JoinStep)]
    assert [join.act[0] for join in joins] == ["relu", "none"]


def test_copies_train_on_their_own() -> None:
    net = nn.Sequential(block(3, 8), nn.Conv2d(8, 3, 1))
    fast = p2pfast.optimize(net, mode="train")
    twin = copy.deepcopy(fast)
    check(twin, net, X)
    assert all(p.grad is None for p in fast.parameters()) and len(steps(twin)) == 2


def test_torch_func_and_checkpointing() -> None:
    net = nn.Sequential(block(3, 8, nn.InstanceNorm2d), nn.Conv2d(8, 3, 1))
    fast = p2pfast.optimize(net, mode="train")
    of_fast, of_net = (torch.func.grad(lambda x, f=f: f(x).square().sum())(X) for f in (fast, net))
    torch.testing.assert_close(of_fast, of_net)
    x = X.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False).square().sum().backward()
    torch.testing.assert_close(x.grad, of_net, rtol=1e-3, atol=1e-4)
    assert len(steps(fast)) == 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(measured, "_chosen", {})
    monkeypatch.setattr(measured, "_settled", {})
    yield tmp_path


def test_a_trial_leaves_no_mark(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call tries all ways and is as it would have been; the next process takes the same way."""
    tried: list[list[str]] = []
    original = Trial.fastest
    monkeypatch.setattr(Trial, "fastest", lambda self, ways: tried.append(ways) or original(self, ways))
    net = nn.Sequential(block(3, 8), nn.Dropout(0.5), block(8, 8), nn.Conv2d(8, 3, 1))
    fast = p2pfast.optimize(net, mode="train")
    check(fast, net, X)
    check(fast, copy.deepcopy(net), X[..., :13])
    assert len(tried) == 1 and set(tried[0]) == {"modules", "chains", "channels_last"}
    engine: Any = next(iter(fast.__dict__["_p2pfast"].trainers.values()))
    (way,) = engine.ways.values()
    monkeypatch.setattr(measured, "_chosen", {})
    monkeypatch.setattr(measured, "_settled", {})
    monkeypatch.setattr(measured, "_seconds", lambda *a: pytest.fail("measured again"))
    again = p2pfast.optimize(net, mode="train")
    again(X.clone().requires_grad_())
    assert list(next(iter(again.__dict__["_p2pfast"].trainers.values())).ways.values()) == [way]


def test_modules_that_would_take_minutes_are_not_tried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 on a processor for which PyTorch has no such convolution; small ones are tried."""
    tried: list[list[str]] = []
    monkeypatch.setattr(Trial, "fastest", lambda self, ways: tried.append(ways) or ways[-1])
    net = nn.Sequential(block(3, 8), block(8, 8))
    for lowered, has, hopeless in (
        (torch.bfloat16, False, 0.0),
        (torch.bfloat16, False, 1e8),
        (torch.bfloat16, True, 0.0),
        (torch.float32, False, 0.0),
    ):
        monkeypatch.setattr(training, "library_has_bfloat16", lambda has=has: has)
        monkeypatch.setattr(training, "_HOPELESS", hopeless)
        fast = p2pfast.optimize(net, mode="train")
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered == torch.bfloat16):
            fast(X).float().sum().backward()
    assert ["modules" in ways for ways in tried] == [False, True, True, True]
    assert all({"chains", "channels_last"} <= set(ways) for ways in tried)
