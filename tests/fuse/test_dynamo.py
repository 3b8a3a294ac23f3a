"""``torch.compile(backend="p2pfast")``: whole graphs, the eager answer, and fused kernels in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from networks import SMALL, make
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from p2pfast.fuse import dynamo

NETWORKS = [
    *("unet-batch", "resnet-batch", "resnet-dropout", "global", "local", "encoder-batch"),
    *("patchgan", "pixel", "multiscale-features"),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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


@pytest.mark.parametrize(
    "name", ["resnet", "unet-batch", "global", "local", "encoder", "pixel", "multiscale"]
)
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


def test_gradients_are_pytorchs(graphs: list[dynamo.CompiledGraph]) -> None:
    net = SMALL["patchgan"].make()
    twin = copy.deepcopy(net)
    x = torch.randn(1, 6, 32, 48)
    torch.compile(net, backend=dynamo.backend)(x).sum().backward()
    twin(x).sum().backward()
    assert all(close(a.grad, b.grad) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert "gradients" in str(graphs[0].reason)


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
