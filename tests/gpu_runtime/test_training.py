"""Training on a GPU: layers and networks with the Triton kernels' norms, here on CPU tensors, and what they
would call for CUDA tensors."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from networks import make, relative
from torch import Tensor, nn

import p2pfast
from p2pfast import functional
from p2pfast.fuse import dynamo
from p2pfast.fuse.training import TrainingEngine
from p2pfast.ops.conv_norm_act import convolution
from p2pfast.ops.conv_norm_act import op as layer
from p2pfast.ops.gpu import interpreted, support
from p2pfast.ops.norm_act.op import _norm_act, _norm_act_backward
from p2pfast.runtime.gpu import engine

LAYERS = [
    ({"padding": 1, "padding_mode": "reflect"}, 3, {"norm": "instance", "act": "relu"}),
    ({"padding": 1, "stride": 2}, 4, {"norm": "batch", "act": "leaky_relu", "slope": 0.2}),
    ({"padding": 1, "stride": 2, "output_padding": 1, "transposed": True}, 3, {"norm": "instance"}),
    ({"padding": 3, "padding_mode": "reflect"}, 7, {"norm": "none", "act": "tanh"}),
    ({"padding": 1}, 3, {"norm": "instance", "act": "gelu"}),
]


def options_of(given: dict[str, Any], last: dict[str, Any]) -> layer._Options:
    numbers = {"stride": 1, "output_padding": 0, "transposed": False, "padding_mode": "zeros", **given}
    geometry = convolution.Geometry(**numbers)
    return layer._Options(
        geometry, last["norm"], 1e-5, False, last.get("act", "none"), last.get("slope", 0.0)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_other_devices_take_no_native_kernel(number: int, dtype: torch.dtype) -> None:
    """Forward and backward on the meta device, whose tensors no native kernel could read: operators and the
    library alone, in channels_last. (PyTorch without CUDA does this with no fake CUDA tensors.)"""
    given, kernel, last = LAYERS[number]
    options = options_of(given, last)
    meta: dict[str, Any] = {"device": "meta", "dtype": dtype}
    x = torch.empty(2, 8, 16, 20, **meta).contiguous(memory_format=torch.channels_last)
    ends = (8, 6) if options.geometry.transposed else (6, 8)
    inputs = [x, torch.empty(*ends, kernel, kernel, **meta), torch.empty(6, **meta)]
    inputs += [torch.empty(6, device="meta") for _ in range(2)]
    for t in inputs:
        t.requires_grad_()
    norm = inputs[3:] if last["norm"] != "none" else (None, None)
    y, *_ = layer._ConvNormAct.apply(*inputs[:3], *norm, None, None, None, options)
    residual = torch.empty_like(y).requires_grad_()
    y, *_ = layer._ConvNormAct.apply(*inputs[:3], *norm, residual, None, None, options)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    wanted = [t for t in (*inputs[:3], *norm, residual) if t is not None]
    for gradient, of in zip(torch.autograd.grad(y, wanted, torch.empty_like(y)), wanted, strict=True):
        assert gradient.shape == of.shape and gradient.dtype == of.dtype and gradient.is_meta


def test_which_tensors_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "_capability", lambda index: (7, 5))
    support.gpu_reason.cache_clear()
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(1, 4, 8, 8, device="cuda", dtype=torch.float16)
        with pytest.warns(RuntimeWarning, match=r"run in PyTorch on cuda:0: .*7\.5; .*need 8\.0"):
            assert not functional._is_image(x)
        monkeypatch.setattr(support, "_capability", lambda index: (9, 0))
        support.gpu_reason.cache_clear()
        assert functional._is_image(x) and not functional._is_image(x.double())
    support.gpu_reason.cache_clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors take the Triton kernels, interpreted."""
    if not interpreted():
        pytest.skip("TRITON_INTERPRET is not set")
    monkeypatch.setenv("P2PFAST_TUNE", "off")  # where that takes the own kernels on a CPU
    forward, backward = (o._backend_fns["cuda"] for o in (_norm_act, _norm_act_backward))
    monkeypatch.setitem(_norm_act._backend_fns, "cpu", forward)
    monkeypatch.setattr(layer, "norm_act", forward_with(forward))
    monkeypatch.setattr(layer, "norm_act_backward", backward_with(backward))
    yield


def on_gpu() -> ModuleType:
    return importlib.import_module("p2pfast.ops.conv_norm_act.on_gpu")  # imports triton


@pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not set")
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_convolutions_and_gradients(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be measured, against float64: forward, data and weight."""
    monkeypatch.setenv("P2PFAST_TUNE", "off")  # where that takes the own kernels on a CPU
    given, kernel, last = LAYERS[number]
    geometry = options_of(given, last).geometry
    x = (torch.randn(2, 8, 6, 8) + 1).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(*((8, 6) if geometry.transposed else (6, 8)), kernel, kernel)
    bias = torch.randn(6)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    monkeypatch.setattr(convolution, "_own", lambda _: None)
    y = convolution.forward(*exact, geometry)
    grad = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    of_x, of_weight, _ = torch.autograd.grad(y, exact, grad.double())

    monkeypatch.setattr(convolution, "_own", lambda _: on_gpu())
    with torch.no_grad():
        assert relative(convolution.forward(x, weight, bias, geometry), y) < 1e-5
        assert relative(convolution.data_gradient(grad, x.shape, weight, geometry), of_x) < 1e-5
        data = convolution.data_gradient_ways(grad, x.shape, weight, geometry)
        own = convolution.weight_gradient_ways(grad, x, weight, geometry)
        assert all(relative(way(), of_weight) < 1e-5 for way in own)
        assert all(relative(way(), of_x) < 1e-5 for way in data)
    tiles = [way.__name__ for way in (*data, *own) if "warps" in way.__name__]
    assert len(tiles) >= 2 and "library" in [way.__name__ for way in own]


def test_a_weight_in_float32_is_no_other_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast: it is lowered first, so that nothing of the data gradient is measured again."""
    keys: list[Any] = []
    monkeypatch.setattr(convolution, "fastest", lambda key, *ways, device: keys.append(key) or ways[0]())
    geometry = convolution.Geometry(1, 1, 0, False, "zeros")
    for dtype in (torch.float32, torch.float16):
        grad = torch.empty(1, 6, 8, 8, dtype=torch.float16, device="meta")
        weight = torch.empty(6, 4, 3, 3, dtype=dtype, device="meta")
        convolution.data_gradient(grad, torch.Size((1, 4, 8, 8)), weight, geometry)
    assert keys[0] == keys[1]


def forward_with(kernel: Any) -> Any:
    def run(x: Tensor, weight: Any = None, bias: Any = None, *rest: Any) -> Any:
        numbers = [None, None, False, 1e-5, "none", 0.0, None]
        numbers[: len(rest)] = rest
        return kernel(x, weight, bias, *numbers)

    return run


def backward_with(kernel: Any) -> Any:
    def run(*args: Any) -> Any:
        *rest, of_residual = args
        act = rest[8]
        dx, dw, db, dr = kernel(*rest, of_residual and act != "none")
        return dx, dw, db, (rest[0] if act == "none" else dr) if of_residual else None

    return run


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    assert x.grad is not None
    found = [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]
    net.zero_grad()
    return found


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("resnet", "library"),
        ("patchgan", "triton"),
        pytest.param("resnet", "triton", marks=pytest.mark.slow),
        pytest.param("patchgan", "library", marks=pytest.mark.slow),
    ],
)
def test_networks_train_with_the_triton_kernels(
    name: str, convolutions: str, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(convolution, "_own", lambda _: on_gpu() if convolutions == "triton" else None)
    monkeypatch.setattr(convolution, "settled", lambda *_: None)  # of which others are the CPU's
    net, (x,) = make(name)
    net, x = net.train(), x[:, :, :16, :24] if name == "resnet" else x
    expected = gradients(copy.deepcopy(net), x)
    fast = p2pfast.optimize(net, mode="train")
    found = gradients(fast, x)
    state = fast.__dict__["_p2pfast"]
    assert isinstance(state.engine, TrainingEngine) and state.engine.device.type == "cpu"
    assert all(row.kernel.startswith("training") for row in p2pfast.explain(fast).rows)
    largest = max(float(e.abs().max()) for e in expected)
    for f, e in zip(found, expected, strict=True):
        # A bias before a norm has no gradient but rounding, and the kernels know.
        assert float((f - e).abs().max()) < 2e-3 * float(e.abs().max()) + 1e-5 * largest


def test_a_network_on_a_device_gets_an_engine_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters pretend to be on a device."""
    net, _ = make("resnet")
    fast: Any = p2pfast.optimize(net.train(), mode="train")
    state = fast.__dict__["_p2pfast"]
    pretended = type("Parameter", (), {"device": torch.device("cuda:0"), "dtype": torch.float32})()
    monkeypatch.setattr(state, "_parameter", lambda: pretended)
    monkeypatch.setattr(state, "_check_device", lambda device: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
    found = state._engine()
    assert isinstance(found, TrainingEngine) and found.device == torch.device("cuda:0")
    state.options["dtype"] = torch.float16
    asked: list[Any] = []
    monkeypatch.setattr(torch, "autocast", lambda *given: asked.append(given))
    state._precision()
    assert asked == [("cuda", torch.float16)]


def test_the_compile_backend_plans_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_runtime.plain import PlainKernels, ShuffledFrame

    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels(), "frame": ShuffledFrame})
    made: list[dynamo.CompiledGraph] = []

    def keep(graph: Any, inputs: list[Any]) -> Any:
        made.append(dynamo.backend(graph, inputs))  # type: ignore[arg-type]
        return made[-1]

    net = nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    )
    x = torch.randn(1, 3, 9, 12)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend=keep)
    with torch.no_grad():
        for _ in range(2):
            assert relative(compiled(x), net(x)) < 3e-5
        for parameter in net.parameters():
            parameter.mul_(0.5)
        assert relative(compiled(x), net(x)) < 3e-5
    assert [graph.reason for graph in made] == [None]
    assert all(isinstance(e, engine.CudaEngine) for e in made[0].engines.values())
