"""``torch.compile(backend="p2pfast")``: whole graphs, the eager answer, and fused kernels in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from networks import SMALL, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from p2pfast.fuse import dynamo

pytestmark = pytest.mark.usefixtures("strict", "fresh_dynamo")

NETWORKS = [
    *("unet-batch", "resnet-batch", "resnet-dropout", "global", "local", "encoder-batch"),
    *("patchgan", "pixel", "multiscale-features"),
]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[dynamo.CompiledGraph]:
    """The graphs that are compiled while a test runs."""
    made: list[dynamo.CompiledGraph] = []
    original = dynamo.CompiledGraph.__init__

    def keep(self: Any, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(dynamo.CompiledGraph, "__init__", keep)
    return made


def close(found: Any, expected: Any) -> bool:
    return all(
        f.shape == e.shape and f.dtype == e.dtype and torch.allclose(f, e, rtol=1e-3, atol=2e-4)
        for f, e in zip(tree_leaves(found), tree_leaves(expected), strict=True)
    )


def kernels(graph: dynamo.CompiledGraph) -> list[str]:
    (engine,) = graph.engines.values()
    assert engine.last is not None
    return [report.kernel for report in engine.last[0].reports]


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_are_one_graph(name: str, graphs: list[dynamo.CompiledGraph]) -> None:
    net, inputs = make(name)
    reference = copy.deepcopy(net)
    fast = torch.compile(net, backend=dynamo.backend, fullgraph=True, dynamic=False)
    for training in (True, False):
        net.train(training)
        reference.train(training)
        with torch.no_grad():
            for _ in range(2):
                torch.manual_seed(4)
                expected = reference(*inputs)
                torch.manual_seed(4)
                assert close(fast(*inputs), expected)
        for (key, a), (_, b) in zip(net.named_buffers(), reference.named_buffers(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), key
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in net.modules())
    assert all(graph.reason is None for graph in graphs)
    assert all(sum(k not in ("pytorch", "apply") for k in kernels(g)) >= convolutions for g in graphs)


@pytest.mark.parametrize("name", ["resnet", "unet-batch", "local", "encoder", "pixel", "multiscale"])
def test_sizes_change_without_compiling_again(name: str, graphs: list[dynamo.CompiledGraph]) -> None:
    net, inputs = make(name)
    net.eval()
    fast = torch.compile(net, backend=dynamo.backend, fullgraph=True, dynamic=True)
    sizes = [inputs, tuple(torch.cat([x, x], -1) for x in inputs), inputs]
    with torch.no_grad():
        for given in sizes:
            assert close(fast(*given), net(*given))
    # PyTorch compiles a size of one, which a U-Net has inside, on its own.
    assert len(graphs) == (2 if name.startswith("unet") else 1)
    assert all(graph.reason is None for graph in graphs)
    with torch.no_grad():
        next(net.parameters()).mul_(2.0)
        assert close(fast(*inputs), net(*inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_train_on_fused_steps(name: str, graphs: list[dynamo.CompiledGraph]) -> None:
    net, inputs = make(name)
    twin = copy.deepcopy(net)
    fast = torch.compile(net, backend=dynamo.backend, fullgraph=True, dynamic=False)
    for run in (fast, twin):
        torch.manual_seed(4)
        sum(leaf.square().mean() for leaf in tree_leaves(run(*inputs))).backward()
    largest = max(float(p.grad.norm()) for p in twin.parameters() if p.grad is not None)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-2 * theirs.grad.norm() + 1e-5 * largest
    convolutions = sum(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in net.modules())
    (graph,) = graphs
    assert graph.reason is None
    assert sum(chain.conv is not None for chain in graph.engine.last.chains) >= convolutions


def test_training_and_inference_take_turns(graphs: list[dynamo.CompiledGraph]) -> None:
    """Steps of an optimiser, frozen layers, gradients of the input alone, and sizes."""
    net, twin = SMALL["patchgan"].make(), SMALL["patchgan"].make()
    twin.load_state_dict(net.state_dict())
    fast = torch.compile(net, backend=dynamo.backend, dynamic=True)
    optimisers = [torch.optim.SGD(m.parameters(), 1e-3) for m in (net, twin)]
    generator = torch.Generator().manual_seed(1)
    for i, size in enumerate((48, 32, 48)):
        x = torch.randn(2, 6, 32, size, generator=generator)
        inputs = [x.clone().requires_grad_(i == 2) for _ in range(2)]
        for module, run, optimiser, given in zip((net, twin), (fast, twin), optimisers, inputs, strict=True):
            module.requires_grad_(i != 2)
            next(module.parameters()).requires_grad_(i != 1 and i != 2)
            optimiser.zero_grad()
            run(given).square().mean().backward()
            optimiser.step()
        for ours, theirs in zip((*net.parameters(), inputs[0]), (*twin.parameters(), inputs[1]), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), i
            if ours.grad is not None and theirs.grad is not None:
                assert torch.allclose(ours.grad, theirs.grad, rtol=2e-3, atol=1e-5), i
        with torch.no_grad():
            assert close(fast(x), twin(x)), i
    assert all(graph.reason is None for graph in graphs)


def test_autocast_trains_in_lower_precision(graphs: list[dynamo.CompiledGraph]) -> None:
    net = SMALL["patchgan"].make()
    twin = copy.deepcopy(net)
    x = torch.randn(1, 6, 32, 48)
    fast = torch.compile(net, backend=dynamo.backend)
    with torch.autocast("cpu", torch.bfloat16):
        results = [run(x) for run in (fast, twin)]
    assert results[0].dtype == results[1].dtype == torch.bfloat16
    for result in results:
        result.float().square().mean().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() <= 0.1 * theirs.grad.norm() + 1e-3
    assert graphs[0].reason is None


class Switches(nn.Module):
    """Half of it learns."""

    def __init__(self, low: bool) -> None:
        super().__init__()
        self.low = low
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.a[0](x)
        with torch.autocast("cpu", torch.bfloat16) if self.low else torch.enable_grad():
            return self.b(self.a[1](x))


@pytest.mark.parametrize("low", [False, True])
def test_what_a_graph_switches_stays_switched(low: bool, graphs: list[dynamo.CompiledGraph]) -> None:
    net = Switches(low)
    twin = copy.deepcopy(net)
    x = torch.randn(1, 3, 12, 12)
    fast = torch.compile(net, backend=dynamo.backend)
    for module, run in ((net, fast), (twin, twin)):
        run(x).sum().backward()
        assert module.a[0].weight.grad is None and torch.is_grad_enabled()
    assert close(net.b[0].weight.grad, twin.b[0].weight.grad)
    with torch.no_grad():
        assert close(fast(x), twin(x))
    reasons = [graph.reason for graph in graphs]
    assert all("autocast" in str(reason) for reason in reasons) if low else reasons == [None] * len(graphs)


def test_a_function_that_switches_gradients_off_or_on(graphs: list[dynamo.CompiledGraph]) -> None:
    net, x = SMALL["patchgan"].make(), torch.randn(1, 6, 32, 48)

    def off(x: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x)

    @torch.enable_grad()
    def on(x: Tensor) -> Tensor:
        return net(x)

    found = torch.compile(off, backend=dynamo.backend)(x)
    assert close(found, net(x)) and not found.requires_grad
    assert graphs[0].reason is None
    with torch.no_grad():
        assert torch.compile(on, backend=dynamo.backend)(x).requires_grad


class OnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(x)
        return self.net(x) if x.mean() > 100 else x - 1


def test_graph_breaks_and_two_networks_of_one_class(graphs: list[dynamo.CompiledGraph]) -> None:
    first, second = OnData(), OnData()
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        for net in (first, second, first):
            assert close(torch.compile(net, backend=dynamo.backend)(x), net(x))
    assert graphs and all(graph.reason is None for graph in graphs)


def test_names_and_options() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'p2pfast = "{dynamo.backend.__module__}:{dynamo.backend.__name__}"' in project
    if "p2pfast" not in torch._dynamo.list_backends():  # installed before it had the entry point
        torch._dynamo.register_backend(dynamo.backend, name="p2pfast")
    net, x = nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        fast = torch.compile(net, backend="p2pfast", options={"memory_limit": "1MB"})
        assert close(fast(x), net(x))
    with pytest.raises(Exception, match="only memory_limit is known"):
        torch.compile(net, backend=dynamo.backend, options={"speed": 1})(x)
