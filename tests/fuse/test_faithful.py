"""What a network's code does in unusual ways is what its optimised form does."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import p2pfast
from p2pfast.fuse import training
from p2pfast.fuse.shapes import suggests_channels_last
from p2pfast.fuse.trial import unmarked

X = torch.randn(2, 4, 12, 14, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, params=["as given", "channels_last"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, strict: None) -> None:
    monkeypatch.setattr(training, "_suits_channels_last", lambda program: request.param == "channels_last")


class Net(nn.Module):
    """A forward of the test's own on modules by name."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self.code = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def conv(inputs: int = 4, outputs: int = 8) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def normed(inputs: int = 4, outputs: int = 8) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs))


def same(net: nn.Module, fast: nn.Module, grown: bool = True) -> None:
    """Results, the input afterwards, and gradients if they are ``grown``."""
    found: list[list[Tensor]] = []
    for run in (fast, copy.deepcopy(net)):
        given = X.clone().requires_grad_()
        run.zero_grad()
        inner = given.detach().clone() if not grown else given * 1
        if not grown:
            with torch.no_grad():
                found.append([*torch.utils._pytree.tree_leaves(run(inner)), inner])
            continue
        leaves = torch.utils._pytree.tree_leaves(run(inner))
        sum((leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum() for leaf in leaves).backward()
        gradients = [p.grad.clone() for p in run.parameters() if p.grad is not None]
        found.append([*leaves, inner, given.grad, *gradients])  # type: ignore[list-item]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-3, atol=2e-4)


def doubled_slice(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    part = y[:, :2]
    part *= 2
    return y


def kept_then_changed(net: Any, x: Tensor) -> Any:
    kept = []
    y = net.a(x)
    kept.append(y)
    y += 1
    y -= 0.25
    return net.b(y), kept


def changes_its_input(net: Any, x: Tensor) -> Any:
    x -= 0.5
    x /= 2
    return net.a(x)


def changed_after_an_activation(net: Any, x: Tensor) -> Any:
    y = F.leaky_relu(net.a(x), 0.2)
    y += net.c(x)
    z = F.elu(net.a(x)).mul_(3)
    return y, z


def residual(net: Any, x: Tensor) -> Any:
    y = net.a(x)
    y += net.c(x)
    return F.relu(y)


CODES = [doubled_slice, kept_then_changed, changes_its_input, residual]
CODES += [changed_after_an_activation]


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("code", CODES)
def test_assignments_in_place(code: Callable[..., Any], mode: str) -> None:
    a = conv() if code is changed_after_an_activation else normed()
    net = Net(code, a=a, b=conv(8, 8), c=conv())
    same(net, p2pfast.optimize(net, mode=mode), mode == "train")


def test_a_sum_may_replace_what_a_layer_has_read() -> None:
    """Nothing sees the difference: PyTorch itself would not go back through it."""

    def sums(net: Any, x: Tensor) -> Any:
        x = net.b(net.a(x))
        x += net.d(x)
        x += net.d(x)
        return x

    def plain(net: Any, x: Tensor) -> Any:
        x = net.b(net.a(x))
        x = x + net.d(x)
        return x + net.d(x)

    layers = {"a": normed(), "b": conv(8, 8), "d": nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3))}
    same(Net(plain, **layers), p2pfast.optimize(Net(sums, **layers), mode="train"))


def test_an_addition_that_nobody_else_sees_is_fused() -> None:
    net = Net(residual, a=normed(), c=conv())
    fast = p2pfast.optimize(net, mode="train")
    same(net, fast)
    assert any("norm+residual+act" in row.detail for row in p2pfast.explain(fast).rows)


def scaled(net: Any, x: Tensor) -> Any:
    y = net.act(net.a(x)) * float(net.alpha) * net.options.gain * net.table["gain"][0]
    return torch.sigmoid(y) if net.function is F.relu else y.tanh()


CHANGES: list[Callable[[Any], None]] = [
    lambda net: setattr(net, "alpha", type(net.alpha)(0.75)),
    lambda net: setattr(net.options, "gain", 3.0),
    lambda net: net.table["gain"].__setitem__(0, 0.5),
    lambda net: setattr(net, "function", torch.tanh),
    lambda net: setattr(net.act, "negative_slope", 0.7),
    lambda net: (
        setattr(net.a, "padding_mode", "circular")
        or setattr(net.a, "_reversed_padding_repeated_twice", [1] * 4)
    ),
    lambda net: setattr(net.a, "forward", lambda x: F.conv2d(x, net.a.weight.flip(3), None, padding=1)),
]


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("change", CHANGES)
def test_settings_that_change_between_calls(change: Callable[[Any], None], mode: str) -> None:
    import numpy as np

    net = Net(scaled, a=conv(), act=nn.LeakyReLU(0.1))
    net.alpha, net.options, net.table, net.function = (
        np.float64(0.25),
        types.SimpleNamespace(gain=2.0),
        {"gain": [1.5]},
        F.relu,
    )
    net.options.itself = net.options
    fast = p2pfast.optimize(net, mode=mode)
    with torch.no_grad():
        first = fast(X)
        torch.testing.assert_close(first, net(X), rtol=1e-4, atol=1e-5)
        change(net)
        change(fast)
        torch.testing.assert_close(fast(X), net(X), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(fast(X), first, atol=1e-3)


def test_autocast_adds_in_the_wider_dtype() -> None:
    def code(net: Any, x: Tensor) -> Any:
        inner = net.a(x)
        return x + net.b(inner), inner + net.c(inner)

    net = Net(code, a=normed(4, 4), b=conv(4, 4), c=normed(4, 4))
    fast = p2pfast.optimize(net, mode="train")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(X), copy.deepcopy(net)(X)
    assert [t.dtype for t in found] == [t.dtype for t in expected] == [torch.float32, torch.bfloat16]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)
    details = [row.detail.split()[0] for row in p2pfast.explain(fast).rows if row.kernel == "training"]
    assert details == ["conv+norm", "conv", "conv+norm+residual"]


def test_a_gradient_lies_as_its_input() -> None:
    """CycleGAN's gradient penalty takes it for a view of rows."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 1, 1))
    fast = p2pfast.optimize(net, mode="train")
    for again in (False, True):
        x = X[:, :3].contiguous().requires_grad_()
        found = []
        for run in (fast, net):
            (grad,) = torch.autograd.grad(run(x).sum(), x, create_graph=again)
            assert grad.is_contiguous()
            found.append((grad.view(2, -1) + 1e-16).norm(2, dim=1))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_a_trial_leaves_pending_backward_passes_alone() -> None:
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(3))
    net(X)
    net[3] = nn.Linear(8 * 12 * 14, 3)
    net.register_buffer("expanded", torch.ones(1).expand(5))
    fast = p2pfast.optimize(net, mode="train")
    loss = fast(X).square().sum()
    captured = types.SimpleNamespace(root=net, state={})
    before = [buffer.clone() for buffer in net.buffers()]
    with unmarked(captured), torch.no_grad():  # type: ignore[arg-type]
        net(X)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    loss.backward()


def test_running_statistics_that_another_pass_saw_may_move() -> None:
    net = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    fast = p2pfast.optimize(net, mode="train")
    (net(X) + fast(X)).sum().backward()
    assert int(net[1].num_batches_tracked) == 2


def test_a_result_that_is_an_expanded_tensor() -> None:
    net = Net(
        lambda net, x: torch.sigmoid(net.a(x).mean((2, 3), keepdim=True).expand(-1, -1, 5, 5)), a=normed()
    )
    same(net, p2pfast.optimize(net, mode="train"))


def test_a_first_call_in_inference_mode(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    net = nn.Sequential(normed(), nn.ReLU())
    fast = p2pfast.optimize(net, mode="train")
    with torch.inference_mode():
        torch.testing.assert_close(fast(X.clone()), copy.deepcopy(net)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_weights_in_channels_last_decide_how_results_lie(mode: str) -> None:
    # Inference draws a dropout's numbers in the order of contiguous images.
    net = nn.Sequential(normed(), nn.ReLU(), nn.Dropout(0.5 * (mode == "train")), conv(8, 8))
    net = net.to(memory_format=torch.channels_last)
    fast = p2pfast.optimize(net, mode=mode)
    found = []
    for run in (fast, copy.deepcopy(net)):
        torch.manual_seed(3)
        with torch.set_grad_enabled(mode == "train"):
            found.append(run(X))
    assert found[0].stride() == found[1].stride()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_how_pytorch_tells_the_memory_format() -> None:
    from torch._prims_common import suggest_memory_format

    for t in (X, X[:, :2], X[:, :1], X[:, :, :1, :1], X[:1], X.transpose(1, 2), X.expand(2, 4, 12, 14)):
        for given in (t, t.contiguous(memory_format=torch.channels_last), t.permute(0, 3, 1, 2)):
            for part in (given, given[:, :2], given[..., :3]):
                expected = suggest_memory_format(part) == torch.channels_last
                assert suggests_channels_last(part) == expected, (part.shape, part.stride())
