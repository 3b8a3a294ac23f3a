"""DistributedDataParallel in two processes around an optimised network: the gradients of plain DDP."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from networks import make
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

import p2pfast

PROCESSES = 2


def step(net: nn.Module, x: Tensor, optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """One step of two backward passes, the first without synchronisation; returns the gradients."""
    optimiser.zero_grad()
    with net.no_sync():  # type: ignore[operator]
        net(x).square().mean().backward()
    net(x.flip(0)).square().mean().backward()
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimiser.step()
    return found


def run(rank: int, store: str) -> None:
    """What one process does; an assertion that fails ends the test."""
    os.environ["P2PFAST_STRICT"], os.environ["P2PFAST_TUNE"] = "1", "off"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(7)
    net, (x,) = make("resnet-batch")
    plain = nn.parallel.DistributedDataParallel(copy.deepcopy(net.train()))
    fast = nn.parallel.DistributedDataParallel(p2pfast.optimize(net, mode="train"))
    alone = copy.deepcopy(net)
    optimisers = [torch.optim.SGD(n.parameters(), 0.01) for n in (fast, plain)]
    for number in range(2):
        torch.manual_seed(10 * number + rank)  # each process has images of its own
        image = torch.randn_like(x)
        ours, theirs = (step(n, image, o) for n, o in zip((fast, plain), optimisers, strict=True))
        assert len(ours) == len(theirs) == len(list(net.parameters()))
        largest = max(float(g.abs().max()) for g in theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4 * largest)
        if number == 0:  # both processes' images count, not only this one's
            (alone(image).square().mean() + alone(image.flip(0)).square().mean()).backward()
            mine = [p.grad for p in alone.parameters() if p.grad is not None]
            assert any((a - b).abs().max() > 0.05 * largest for a, b in zip(ours, mine, strict=True))
    for (key, a), (_, b) in zip(fast.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4), key
    rows = p2pfast.explain(fast.module).rows
    assert sum(row.kernel == "training" for row in rows) > 3, "nothing was fused"
    distributed.destroy_process_group()


def test_gradients_of_two_processes_are_plain_ones(tmp_path: Path) -> None:
    spawn(run, (str(tmp_path / "store"),), nprocs=PROCESSES)
