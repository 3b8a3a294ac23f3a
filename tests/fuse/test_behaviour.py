"""What a user does with a module besides calling it: wrappers, moves between dtypes and devices, sizes."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import make, relative
from torch import nn

import p2pfast

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def network() -> tuple[nn.Module, torch.Tensor]:
    net, (x,) = make("resnet-batch")
    return net.eval(), x


def native(fast: nn.Module) -> int:
    """Native convolutions of the last call."""
    return sum(row.gigaflops > 0 for row in p2pfast.explain(fast).rows)


def test_data_parallel_wrappers(one_process: None) -> None:
    net, x = network()
    expected = net(x).detach()
    fast = p2pfast.optimize(net)
    for wrapped in (nn.DataParallel(fast), nn.parallel.DistributedDataParallel(fast)):
        assert relative(wrapped(x), expected) < 1e-5
        assert {k.removeprefix("module.") for k in wrapped.state_dict()} == set(net.state_dict())
    assert native(fast)


def test_distributed_training_through_an_optimised_network(one_process: None) -> None:
    net, x = network()
    twin = copy.deepcopy(net)
    fast = nn.parallel.DistributedDataParallel(p2pfast.optimize(net, mode="train"))
    for module in (fast, twin):
        module(x).square().mean().backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_saved_state_loads_into_either() -> None:
    net, x = network()
    fast = p2pfast.optimize(net)
    fast(x)
    other, _ = network()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fast.load_state_dict(state)
    assert relative(fast(x), other(x).detach()) < 1e-5
    assert relative(net(x).detach(), other(x).detach()) < 1e-6  # one set of parameters
    other.load_state_dict(fast.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_moves_between_dtypes(dtype: torch.dtype) -> None:
    net, x = network()
    fast = p2pfast.optimize(copy.deepcopy(net))
    fast(x)
    moved = copy.deepcopy(net).to(dtype)
    found = fast.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert relative(found, moved(x.to(dtype)).detach()) < (5e-2 if dtype == torch.bfloat16 else 1e-10)
    back = fast.to(torch.float32)
    assert back(x).dtype == torch.float32 and native(fast)


def test_half_runs_as_pytorch_runs_it() -> None:
    net, x = network()
    fast = p2pfast.optimize(copy.deepcopy(net)).half()
    assert torch.equal(fast(x.half()), net.half()(x.half()).detach())
    assert "float16" in str(p2pfast.explain(fast))


def test_on_the_meta_device() -> None:
    net, x = network()
    fast = p2pfast.optimize(net).to("meta")
    found = fast(x.to("meta"))
    assert found.device.type == "meta" and found.shape == net(x.to("meta")).shape


def test_autocast_is_followed() -> None:
    net, x = network()
    fast = p2pfast.optimize(net)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = fast(x), net(x)
    assert found.dtype == expected.dtype
    assert relative(found.float(), net(x).detach()) < 5e-2


def test_alternating_sizes_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2pfast.runtime import cpu

    planned: list[int] = []
    original = cpu.make_plan
    monkeypatch.setattr(cpu, "make_plan", lambda *a, **k: planned.append(1) or original(*a, **k))
    net, x = network()
    fast = p2pfast.optimize(net)
    inputs = [x, x[..., : x.shape[-1] // 2].contiguous(), torch.cat([x, x])]
    for _ in range(3):
        for given in inputs:
            assert relative(fast(given), net(given).detach()) < 1e-5
    assert len(planned) == len(inputs)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_layouts_are_pytorchs(given: torch.memory_format) -> None:
    net, x = network()
    x = x.contiguous(memory_format=given)
    assert p2pfast.optimize(net)(x).stride() == net(x).stride()


def test_inference_returns_no_graph_and_leaves_gradients_alone() -> None:
    net, x = network()
    x.requires_grad_()
    found = p2pfast.optimize(net)(x)
    assert not found.requires_grad and x.grad is None
    trained = p2pfast.optimize(net, mode="train")(x)
    trained.sum().backward()
    assert x.grad is not None


def test_training_updates_reach_inference() -> None:
    net, x = network()
    fast = p2pfast.optimize(net)
    before = fast(x)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    net(x).square().mean().backward()
    optimiser.step()
    after = fast(x)
    assert not torch.equal(before, after)
    assert relative(after, net(x).detach()) < 1e-5


def test_environment_is_left_alone() -> None:
    net, x = network()
    before = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    p2pfast.optimize(net)(x)
    now = dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    assert now == before
