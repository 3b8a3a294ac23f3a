"""Two processes train as one with the doubled batch."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from p2pfast.train.config import Config
from p2pfast.train.trainer import train
from tests.train.conftest import arguments, networks, start

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)


def losses(folder: Path) -> list[dict[str, float]]:
    """The terms of every line of the log."""
    lines = (folder / "loss_log.txt").read_text().splitlines()
    found = [re.findall(r"(\w+): (\S+)", line.split(") ")[1]) for line in lines]
    return [{name: float(value) for name, value in terms} for terms in found]


def together(config: Config, processes: int = 2) -> list[str]:
    """What the processes of a run print, started with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        start(arguments(config), RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(processes)
    ]
    output = []
    for process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        output.append(out + err)
    return output


def test_two_processes_are_one_with_the_doubled_batch(tiny: Callable[..., Config]) -> None:
    """Enhancer alone, then all of it, so that the exchange is set up anew in between; two batches a step."""
    options = {"netG": "local", "niter_fix_global": 1, "n_epochs": 2, "print_freq": 1, "scenes": 8}
    two = tiny("pix2pixhd", **options, accumulate=2)
    one = tiny("pix2pixhd", **options, batch_size=4)
    output = together(two)
    train(one)
    found, wanted = losses(two.run_folder), losses(one.run_folder)
    assert len(found) == len(wanted) == 6
    for step, (first, second) in enumerate(zip(found, wanted, strict=True)):
        assert first == pytest.approx(second, rel=2e-3, abs=2e-4), step
    for name, network in networks(one.run_folder).items():
        other = networks(two.run_folder)[name]
        assert list(other) == list(network)
        for key, value in network.items():
            # Not the biases before norms: their gradient is rounding, and Adam makes steps of that.
            if value.dim() > 1:
                assert ((other[key] - value).abs() > 1e-4).float().mean() < 0.02, (name, key)
    assert "pix2pixhd" in output[0] and output[1] == ""
