"""The way to the CUDA kernels: what the operators hand over passes the native checks, only the launch fails.

Tensors of the CPU stand in for a GPU's; nothing reads them. With a GPU the operators' own tests run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from p2pfast import _C
from p2pfast.ops import cuda, pointwise
from p2pfast.ops.feature_matching import op as feature_matching
from p2pfast.ops.gan_loss import op as gan_loss
from p2pfast.ops.image_uint8 import op as image_uint8
from p2pfast.ops.instance_edges import op as instance_edges
from p2pfast.ops.instance_pool import op as instance_pool
from p2pfast.ops.label_conv import cuda as label_conv_cuda
from p2pfast.ops.label_conv import op as label_conv
from p2pfast.ops.label_conv.cuda import LabelConvGeometry, convolve_labels, pack_tables

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
    pytest.mark.skipif(not cuda.has_kernel("label_conv"), reason="built without CUDA kernels"),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were called, up to the driver that is not there."""
    names: list[str] = []

    def launch(name: str, _device: torch.device, **arguments: Any) -> None:
        with pytest.raises(RuntimeError, match="need an NVIDIA GPU and a driver"):
            getattr(_C, f"cuda_{name}")(**arguments, device=0, stream=0)
        names.append(name)

    for module in (pointwise, image_uint8, instance_edges, instance_pool, label_conv_cuda):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_images(launched: list[str], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, 7).to(dtype)
    for view in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2, 1:]):
        assert image_uint8._on_cuda(view, True).shape == (2, *view.shape[2:], 3)
    assert launched == ["image_uint8"] * 3


def test_edges(launched: list[str]) -> None:
    for dtype in (torch.uint8, torch.int16, torch.uint32, torch.int64):
        assert instance_edges._on_cuda(torch.zeros(2, 1, 5, 7).to(dtype)).shape == (2, 1, 5, 7)
    assert launched == ["instance_edges"] * 4


@pytest.mark.parametrize("gradient", [False, True])
def test_losses(launched: list[str], gradient: bool) -> None:
    values = [torch.randn(2, 1, n, n).to(d) for n, d in ((5, torch.float32), (3, torch.bfloat16))]
    loss, gradients = gan_loss._on_cuda(values, "hinge", 1.0, 1.0, gradient)
    assert loss.shape == () and [g.shape for g in gradients] == [x.shape for x in values if gradient]
    real = [y.float() for y in values]
    feature_matching._on_cuda(values, real, [1.0, 2.0], False, gradient)
    pointwise._scaled_on_cuda(values, [1.0, 0.5], torch.ones(()))
    assert launched == ["pointwise_loss", "pointwise_loss", "pointwise_scale"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_over_instances(launched: list[str], channels_last: bool) -> None:
    features = torch.randn(2, 3, 50, 70).half()
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    pooled = instance_pool._on_cuda(features, torch.randint(0, 4, (2, 50, 70), dtype=torch.int16))
    assert pooled.stride() == features.stride() and pooled.dtype == features.dtype
    assert launched == ["instance_pool"]


@pytest.mark.parametrize("pool_levels", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_convolution_from_labels(
    launched: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, pool_levels: int
) -> None:
    monkeypatch.setitem(label_conv._OUTPUTS, "cpu", label_conv._OUTPUTS["cuda"])
    labels = torch.randint(0, 5, (2, 40, 36))
    edges = torch.zeros(2, 40, 36, dtype=torch.bool)
    weight, bias = torch.randn(20, 6, 7, 7).half(), torch.randn(20)
    y = label_conv._on_cuda(labels, edges, weight, bias, 5, pool_levels, "reflect", dtype)
    assert y.shape == (2, 20, 40 >> pool_levels, 36 >> pool_levels) and y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert label_conv._on_cuda(labels, None, weight[:, :5], None, 5).shape == (2, 20, 40, 36)
    with pytest.raises(ValueError, match="labels has values from 0 to 9"):
        label_conv._on_cuda(labels.clamp(max=0) + torch.eye(40, 36).long() * 9, edges, weight, bias, 5)
    assert launched == ["label_conv_pack", "label_conv"] * 2


def test_convolution_from_labels_into_a_slice(launched: list[str]) -> None:
    geometry = LabelConvGeometry(num_classes=200, cout=20, kernel=3, padding_mode="zeros")
    tables = pack_tables(torch.randn(20, 201, 3, 3), None, geometry, True)
    labels, ids = torch.zeros(2, 9, 70, dtype=torch.int8), torch.zeros(2, 9, 70, dtype=torch.int64)
    whole = torch.zeros(2, 32, 9, 70).to(memory_format=torch.channels_last)
    result = convolve_labels(labels, None, ids, tables, geometry, out=whole[:, 8:28], statistics=True)
    assert result.partials is not None and result.counts is not None
    assert result.partials.shape == (2, 4, 2, 20) and result.counts.shape == (4,)
    with pytest.raises(ValueError, match="out has shape"):
        convolve_labels(labels, None, ids, tables, geometry, out=torch.zeros(2, 20, 9, 70))
    with pytest.raises(ValueError, match="tables has .* values, .* are expected"):
        convolve_labels(labels, None, None, tables, geometry)
    assert launched == ["label_conv_pack", "label_conv"]


def test_a_build_without_the_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in dir(_C) if n.startswith("cuda_")]:
        monkeypatch.delattr(_C, name)
    x, ids = torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int32)
    for call, name in (
        (lambda: image_uint8._on_cuda(x), "image_uint8"),
        (lambda: instance_edges._on_cuda(ids), "instance_edges"),
        (lambda: gan_loss._on_cuda([x], "square", 1.0, 1.0, True), "gan_loss"),
        (lambda: feature_matching._on_cuda([x], [x], [1.0], False, True), "feature_matching"),
        (lambda: instance_pool._on_cuda(x, ids), "instance_pool"),
        (lambda: label_conv._on_cuda(ids, None, torch.zeros(2, 5, 3, 3), None, 5), "label_conv"),
    ):
        with pytest.raises(
            RuntimeError, match=f"p2pfast::{name} has no CUDA kernel in this build .*rebuild with"
        ):
            call()
