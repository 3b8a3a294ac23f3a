"""Operators and modules under torch.compile: one graph each, and Inductor's answer is eager's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import p2pfast.nn as fused
from p2pfast import functional

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def x(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 8, 10, 12))


FEATURES = [[torch.randn(2, 4, 6, 6), torch.randn(2, 1, 3, 3)]]
LABELS = torch.randint(0, 5, (2, 9, 11))
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "ConvNormAct2d": (fused.ConvNormAct2d(8, 8, 3, padding=1, padding_mode="reflect"), (x(),)),
    "UpConvNormAct2d": (fused.UpConvNormAct2d(8, 4, 4, 2, 1, norm="batch"), (x(),)),
    "InstanceNormAct2d": (fused.InstanceNormAct2d(8, activation="leaky_relu"), (x(),)),
    "FusedSequential": (fused.FusedSequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.GELU()), (x(),)),
    "ResidualBlock": (fused.ResidualBlock(8, dropout=0.5), (x(),)),
    "PatchDiscriminator": (fused.PatchDiscriminator(8, 4, 2, features=True), (x(2, 8, 32, 32),)),
    "GANLoss": (fused.GANLoss("lsgan"), (FEATURES, True)),
    "FeatureMatchingLoss": (fused.FeatureMatchingLoss(), (FEATURES, tree_map(torch.randn_like, FEATURES))),
    "L1Loss": (fused.L1Loss(), (x(), x())),
    "L2Loss": (fused.L2Loss(), (x(), x())),
    "CycleLoss": (fused.CycleLoss(), (x(), x())),
    "IdentityLoss": (fused.IdentityLoss(), (x(), x())),
    "TotalVariationLoss": (fused.TotalVariationLoss(), (x(),)),
    "conv_norm_act": (functional.conv_norm_act, (x(), x(4, 8, 3, 3), x(4))),
    "up_conv_norm_act": (functional.up_conv_norm_act, (x(), x(8, 4, 3, 3), x(4), 2)),
    "instance_norm_act": (functional.instance_norm_act, (x(),)),
    "image_to_uint8": (functional.image_to_uint8, (x(1, 3, 4, 6),)),
    "instance_pool": (functional.instance_pool, (x(2, 3, 9, 11), LABELS[:, None])),
    "instance_edges": (functional.instance_edges, (LABELS,)),
}
# Takes weights of a torchvision network, or runs autograd itself.
NOT_HERE = {"PerceptualLoss", "gradient_penalty"}


def learning(values: Any) -> Any:
    def leaf(t: Any) -> Any:
        real = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().clone().requires_grad_() if real else t

    return tree_map(leaf, values)


def test_everything_public_is_here() -> None:
    assert set(fused.__all__) | set(functional.__all__) == set(CASES) | NOT_HERE


@pytest.mark.parametrize("name", list(CASES))
def test_no_graph_breaks(name: str) -> None:
    call, arguments = CASES[name]
    found = torch._dynamo.explain(call)(*learning(arguments))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def test_operators_have_no_graph_breaks() -> None:
    ops = torch.ops.p2pfast
    weight, vector = x(4, 8, 3, 3), torch.rand(8)
    calls: dict[str, Callable[[], Any]] = {
        "conv": lambda: ops.conv([IMAGE], weight, None, 1, 1),
        "instance_norm_act": lambda: ops.instance_norm_act(IMAGE),
        "norm_act": lambda: ops.norm_act(IMAGE, vector, vector, None, None, True, 1e-5, "relu", 0.0, None),
    }
    labels, first = torch.randint(0, 3, (1, 8, 9)), x(4, 3, 3, 3)
    calls["label_conv"] = lambda: ops.label_conv(labels, None, first, None, 3)
    for name, call in calls.items():
        found = torch._dynamo.explain(call)()
        assert (found.graph_count, found.graph_break_count) == (1, 0), (name, found.break_reasons)


IMAGE = x()


def test_inductor_gives_eagers_answer_and_gradients() -> None:
    net = fused.ConvNormAct2d(3, 8, 3, padding=1, norm="batch")
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True)
    image = x(2, 3, 8, 8)
    for module, call in ((net, compiled), (twin, twin)):
        call(image).square().mean().backward()
        assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(compiled(image), twin(image), rtol=1e-3, atol=1e-4)
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), twin(image), rtol=1e-3, atol=1e-4)


def test_every_operator_is_checked() -> None:
    """A test with torch.library.opcheck names each registered operator."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("p2pfast::")}
    tests = [p.read_text() for p in Path(__file__).parents[1].glob("*/test_*.py")]
    checked = "\n".join(text for text in tests if "opcheck(" in text)
    assert not [name for name in names if name not in checked]
