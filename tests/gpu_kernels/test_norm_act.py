"""Normalisation for training on the GPU: forward and backward against the reference in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast.ops.gpu import triton_reason
from p2pfast.ops.norm import instance_norm_act
from p2pfast.ops.norm_act import norm_act, norm_act_backward, norm_act_reference
from p2pfast.ops.norm_act.op import _norm_act, _norm_act_backward

if triton_reason() is None:
    from p2pfast.ops.norm import triton as norm_kernels
    from p2pfast.ops.norm_act import triton as kernels

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small images have several parts, several tiles a part, and sums that are added up twice."""
    for module in (norm_kernels, kernels):
        monkeypatch.setattr(module, "TILE", 32)
        monkeypatch.setattr(module, "GROUP", 2)
        monkeypatch.setattr(module, "RESIDENT", 0)
    monkeypatch.setattr(norm_kernels, "PROGRAMS", 1)


def fused(x: Tensor, call: dict[str, Any], grad: Tensor) -> dict[str, Tensor]:
    """Results and gradients of the kernels, called as the operators call them."""
    frozen = call.get("mean") is not None
    names = ("weight", "bias", "mean", "variance", "over_batch", "eps", "act", "slope", "residual")
    full = {"over_batch": False, "eps": 1e-5, "act": "none", "slope": 0.0} | call
    y, mean, variance = kernels.forward(x, *(full.get(n) for n in names))
    numbers = full["eps"], full["act"], full["slope"], full.get("residual"), "residual" in full
    affine = full.get("weight"), full.get("bias")
    dx, dweight, dbias, dresidual = kernels.backward(grad, x, *affine, mean, variance, frozen, *numbers)
    assert y.stride() == x.stride() and dx.stride() == x.stride()
    # PyTorch refuses results of an operator that share memory with its arguments or with each other.
    given = [t for t in (x, grad, *call.values()) if isinstance(t, Tensor)]
    for results in ([y, mean, variance], [dx, dweight, dbias, dresidual]):
        own = [t.untyped_storage().data_ptr() for t in results if t.numel()]
        assert len({*own}) == len(own) and not {*own} & {t.untyped_storage().data_ptr() for t in given}
    found = {"y": y, "x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}
    wanted = {"y", "x"} | {n for n in ("weight", "bias", "residual") if full.get(n) is not None}
    return {name: t for name, t in found.items() if name in wanted}


def of_autograd(x: Tensor, call: dict[str, Any], grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) else t

    inputs = {"x": x, **{n: call[n] for n in ("weight", "bias", "residual") if call.get(n) is not None}}
    inputs = {n: cast(t).detach().clone().requires_grad_() for n, t in inputs.items()}
    y = norm_act_reference(**({n: cast(v) for n, v in call.items()} | inputs))
    gradients = torch.autograd.grad(y, list(inputs.values()), cast(grad))
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


def check(x: Tensor, call: dict[str, Any]) -> None:
    """At most twice the error of PyTorch's derivatives in the same dtype."""
    grad = torch.randn_like(x)
    got = fused(x, call, grad)
    exact = of_autograd(x, call, grad, torch.float64)
    eager = of_autograd(x, call, grad, x.dtype)
    for name, expected in exact.items():
        assert got[name].shape == expected.shape
        error = (got[name].double() - expected).abs().max()
        allowed = (eager[name].double() - expected).abs().max()
        # Sums of many terms that cancel: relative to the size of what is added up.
        size = expected.abs().max() + (grad.abs().sum() / x.shape[1] if expected.dim() == 1 else 0)
        assert error <= max(2 * allowed, 8 * EPSILON[x.dtype] * size), (name, float(error), float(allowed))


def variants(channels: int, device: str) -> list[dict[str, Any]]:
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    per_image = torch.randn(2, channels, device=device)
    return [
        {"weight": weight, "bias": bias},
        {"weight": weight, "bias": bias, "over_batch": True},
        {"mean": bias, "variance": weight, "weight": weight},
        {"mean": per_image, "variance": per_image.abs() + 0.1, "eps": 1e-3},
        {},
    ]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole map", "in parts"])
def test_forward_and_backward(
    request: pytest.FixtureRequest, device: str, whole: bool, memory_format: str
) -> None:
    if not whole:
        request.getfixturevalue("small_tiles")
    shape = (2, 3, 4, 5) if memory_format == "NHWC" else (2, 1, 5, 15)
    acts = itertools.cycle([("relu", 0.0), ("leaky_relu", 0.2), ("none", 0.0), ("silu", 0.0)])
    residuals = itertools.cycle([True, False, True])
    for i, kwargs in enumerate(variants(shape[1], device)):
        offset = 0.0 if "mean" in kwargs else 1e3 if kwargs else 10.0
        act, slope = next(acts)
        call = {**kwargs, "act": act, "slope": slope}
        residual = torch.randn(shape, device=device) if next(residuals) else None
        for dtype in (torch.float32, [torch.bfloat16, torch.float16][i % 2]):
            x = (torch.randn(shape, device=device) + offset).to(dtype, memory_format=FORMATS[memory_format])
            check(x, call if residual is None else {**call, "residual": residual.to(dtype)})


@pytest.mark.parametrize(("act", "slope"), [("tanh", 0.0), ("sigmoid", 0.0), ("elu", 0.7), ("gelu", 0.0)])
def test_activations(device: str, act: str, slope: float) -> None:
    x = torch.randn(1, 2, 6, 7, device=device) * 4
    check(x, {"act": act, "slope": slope, "weight": torch.full((2,), 5.0, device=device)})


@pytest.mark.parametrize("size", [(1, 1, 1, 2), (3, 17, 2, 1), (1, 40, 3, 3)], ids=str)
def test_sizes(device: str, size: tuple[int, ...]) -> None:
    for memory_format in FORMATS.values():
        x = (torch.randn(size, device=device) + 3).contiguous(memory_format=memory_format)
        check(x, {"act": "leaky_relu", "slope": 0.2, "over_batch": size[0] > 1})


def test_statistics_returned(device: str) -> None:
    x = torch.randn(2, 3, 4, 5, device=device) + 5
    for over_batch, dims in ((False, (2, 3)), (True, (0, 2, 3))):
        _, mean, variance = kernels.forward(x, None, None, None, None, over_batch, 1e-5, "none", 0.0, None)
        torch.testing.assert_close(mean, x.mean(dims))
        torch.testing.assert_close(variance, x.var(dims, correction=0))


def test_formats_that_differ_and_slices(device: str) -> None:
    big = torch.randn(2, 6, 4, 5, device=device)
    grad = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    residual = torch.randn_like(grad)
    x = big[:, 2:5]
    variance, mean = torch.var_mean(x, (2, 3), correction=0)
    numbers = False, 1e-5, "relu", 0.0
    got = kernels.backward(grad, x, None, None, mean, variance, *numbers, residual, True)
    expected = of_autograd(x, {"act": "relu", "residual": residual}, grad, torch.float64)
    torch.testing.assert_close(got[0].double(), expected["x"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[3].double(), expected["residual"], rtol=1e-5, atol=1e-5)


def test_the_operators_have_cuda_kernels() -> None:
    for operator in (_norm_act, _norm_act_backward):
        assert operator._opoverload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
    with torch._subclasses.FakeTensorMode():
        for dtype in EPSILON:
            x = torch.empty(2, 3, 4, 5, dtype=dtype, device="cuda")
            y, mean, variance = norm_act(x, act="gelu")
            dx, *_ = norm_act_backward(
                y, x, None, None, mean, variance, False, 1e-5, "gelu", 0.0, None, False
            )
            assert y.device == dx.device == x.device and dx.dtype == dtype and mean.shape == (2, 3)


def test_the_operators_call_the_kernels(device: str) -> None:
    """What the dispatcher calls for CUDA tensors, on tensors that the interpreter takes."""
    x, grad = torch.randn(2, 2, 1, 2, 3, device=device)
    forward, backward = (o._backend_fns["cuda"] for o in (_norm_act, _norm_act_backward))
    y, mean, variance = forward(x, None, None, None, None, False, 1e-5, "relu", 0.0, None)
    dx, *_ = backward(grad, x, None, None, mean, variance, False, 1e-5, "relu", 0.0, None, False)
    exact = of_autograd(x, {"act": "relu"}, grad, torch.float64)
    torch.testing.assert_close(y.double(), exact["y"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.double(), exact["x"], rtol=1e-4, atol=1e-5)
    y = instance_norm_act._backend_fns["cuda"](x, act="relu")
    torch.testing.assert_close(y.double(), exact["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_opcheck_on_the_gpu() -> None:
    x = torch.randn(2, 5, 6, 7, device="cuda", requires_grad=True)
    weight = torch.rand(5, device="cuda")
    for memory_format, over_batch in itertools.product(FORMATS.values(), (False, True)):
        args = (x.contiguous(memory_format=memory_format), weight, weight, None, None, over_batch)
        torch.library.opcheck(_norm_act, (*args, 1e-5, "relu", 0.0, torch.randn_like(args[0])))
    mean = weight.detach()
    given = (x.detach(), x.detach(), None, None, mean, mean + 1, False, 1e-5, "relu", 0.0, None, True)
    torch.library.opcheck(_norm_act_backward, given)
    torch.library.opcheck(instance_norm_act, (x, weight, weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(EPSILON), ids=str)
def test_large_images_on_the_gpu(dtype: torch.dtype) -> None:
    for size, memory_format in itertools.product(((1, 64, 256, 512), (2, 256, 33, 65)), FORMATS.values()):
        x = (torch.randn(size, device="cuda") + 5).to(dtype, memory_format=memory_format)
        call = {"act": "relu", "residual": torch.randn_like(x), "weight": torch.rand(size[1], device="cuda")}
        check(x, call)
        x.requires_grad_()
        grad = torch.randn_like(x)
        runs = [torch.autograd.grad(norm_act(x, **call)[0], x, grad)[0] for _ in range(2)]
        assert torch.equal(*runs)
        exact = of_autograd(x.detach(), call, grad, torch.float64)["x"]
        torch.testing.assert_close(runs[0].double(), exact, rtol=2e-2, atol=2e-2)
