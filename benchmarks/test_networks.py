"""Whole generators: PyTorch eager against ``p2pfast.optimize``; with --full at their published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import p2pfast
from p2pfast import models

# Name, arguments that make it small, input channels, full and small (height, width).
NETWORKS: dict[str, tuple[str, dict[str, Any], int, tuple[int, int], tuple[int, int]]] = {
    "pix2pixhd-local": ("pix2pixhd-local", {"ngf": 8}, 36, (1024, 2048), (128, 256)),
    "pix2pixhd-global": ("pix2pixhd-global", {"ngf": 16}, 36, (512, 1024), (128, 256)),
    "unet_256": ("unet_256", {"ngf": 16}, 3, (256, 256), (256, 256)),
    "resnet_9blocks": ("resnet_9blocks", {"ngf": 16}, 3, (256, 256), (128, 128)),
}


def build(name: str, full: bool) -> tuple[nn.Module, torch.Tensor]:
    network, smaller, channels, large, small = NETWORKS[name]
    model = models.build(network, **({} if full else smaller)).eval()
    if channels == 36:  # a label map: one-hot channels in blocks, and edges
        height, width = large if full else small
        labels = torch.randint(0, 35, (1, height // 16, width // 16)).repeat_interleave(16, 1)
        one_hot = nn.functional.one_hot(labels.repeat_interleave(16, 2), 35).permute(0, 3, 1, 2).float()
        return model, torch.cat([one_hot, torch.zeros(1, 1, height, width)], 1)
    return model, torch.rand(1, channels, *(large if full else small)) * 2 - 1


@pytest.mark.parametrize("implementation", ["eager", "p2pfast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_network(benchmark: Any, full: bool, name: str, dtype: torch.dtype, implementation: str) -> None:
    model, x = build(name, full)
    expected = model(x)
    run: Any = model
    if implementation == "p2pfast":
        run = p2pfast.optimize(model, dtype=dtype)
    elif dtype != torch.float32:
        run, x = model.to(dtype), x.to(dtype)
    error = (run(x).float() - expected).abs().mean().item()
    # bfloat16 makes differences of a few steps of 8 bits in every deep network, PyTorch's as well.
    assert error < (0.1 if dtype == torch.bfloat16 else 1e-3)
    rounds = 3 if full else 5
    benchmark.pedantic(run, args=(x,), rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["mean_error"] = error
    benchmark.extra_info["pixels"] = x.shape[2] * x.shape[3]
    benchmark.extra_info["threads"] = torch.get_num_threads()
    if benchmark.stats is not None:
        benchmark.extra_info["images_per_s"] = 1 / benchmark.stats.stats.median
