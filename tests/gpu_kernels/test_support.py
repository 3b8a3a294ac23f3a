"""Functions called inside kernels, checks of tensors, and the harness that compiles ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from p2pfast.ops.conv.activation import ACTIVATIONS, activate
from p2pfast.ops.gpu import (
    Launch,
    allows_tf32,
    channels_last,
    check_tensor,
    interpreted,
    pixel_stride,
    triton_reason,
)

if triton_reason() is None:
    import triton
    import triton.language as tl

    from p2pfast.ops.gpu import device as functions

    @triton.jit
    def _activate(x, y, of_x, values, slope, ACT: tl.constexpr, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        v = tl.load(x + i, mask=i < values, other=0.0).to(tl.float32)
        functions.store(y + i, functions.activate(v, ACT, slope), i < values)
        functions.store(
            of_x + i,
            functions.activation_gradient(v, tl.full((SIZE,), 1.0, tl.float32), ACT, slope),
            i < values,
        )

    @triton.jit
    def _combine(a, b, out):
        count, mean, m2 = functions.chan(
            tl.load(a), tl.load(a + 1), tl.load(a + 2), tl.load(b), tl.load(b + 1), tl.load(b + 2)
        )
        tl.store(out, count)
        tl.store(out + 1, mean)
        tl.store(out + 2, m2)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_and_their_derivatives(device: str, act: str) -> None:
    special = torch.tensor([0.0, -0.0, 100.0, -100.0, float("nan"), float("inf")])
    x = torch.cat([torch.randn(60) * 3, torch.randn(40) * 1e-3, special]).to(device)
    exact_x = x.double().requires_grad_()
    exact = activate(exact_x, act, 0.3)
    (gradient,) = torch.autograd.grad(exact.sum(), exact_x)
    exact = exact.detach()
    floor = 1.0 if act == "gelu" else 1e-3  # 1 + erf cancels far below zero, as in PyTorch
    finite = exact.isfinite() & gradient.isfinite()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)):
        y, of_x = (x.new_full(x.shape, torch.nan, dtype=d) for d in (dtype, torch.float32))
        _activate[(1,)](x, y, of_x, x.numel(), 0.3, ACTIVATIONS.index(act), 128)
        assert torch.equal(y.isnan(), exact.isnan())
        error = (y.double() - exact).abs()[finite] / exact.abs()[finite].clamp(min=floor)
        assert error.max() <= tolerance, float(error.max())
        torch.testing.assert_close(of_x[finite].double(), gradient[finite], rtol=1e-6, atol=1e-6)


def test_chan(device: str) -> None:
    x = torch.randn(50, dtype=torch.float64) + 5
    empty = [0.0, 0.0, 0.0]

    def group(v: torch.Tensor) -> list[float]:
        return [len(v), v.mean(), v.var(correction=0) * len(v)] if len(v) else empty

    for split in (0, 10, 50):
        a, b = (torch.tensor(group(v), dtype=torch.float64, device=device) for v in (x[:split], x[split:]))
        out = torch.full_like(a, torch.nan)
        _combine[(1,)](a, b, out)
        torch.testing.assert_close(out.cpu(), torch.tensor(group(x), dtype=torch.float64))


def test_channels_last_views() -> None:
    x = torch.randn(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    every_second = x[..., ::2]  # evenly spaced, as the width is even
    kept = ((x, 8), (x[:, 2:5], 8), (x[:1].expand(3, -1, -1, -1), 8), (x[..., :1], 48), (every_second, 16))
    for view, stride in kept:
        assert channels_last(view).data_ptr() == view.data_ptr()
        assert pixel_stride(channels_last(view)) == stride
    for other in (x[..., 1:], x.contiguous(), x.contiguous()[:, :1, :, :3]):
        copy = channels_last(other)
        assert torch.equal(copy, other) and copy.data_ptr() != other.data_ptr()
        assert pixel_stride(copy) == other.shape[1]


def test_checks() -> None:
    with pytest.raises(TypeError, match=r"x has dtype torch.float64; the GPU kernels take torch.float32"):
        check_tensor("x", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is on meta; the GPU kernels take CUDA tensors: move it"):
        check_tensor("x", torch.zeros(1, device="meta"))
    if interpreted():
        check_tensor("x", torch.zeros(1))


def test_an_old_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from p2pfast.ops.gpu import support

    class Old:
        dtype = torch.float32
        device = torch.device("cuda", 3)

    monkeypatch.setattr(support, "_capability", lambda _index: (7, 5))
    old: Any = Old()
    with pytest.raises(RuntimeError, match=r"x is on cuda:3, of compute capability 7\.5; .* 8\.0 or later"):
        check_tensor("x", old)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120
    )


def test_without_triton_the_message_has_the_remedy() -> None:
    code = """
import sys
sys.modules["triton"] = None
import p2pfast
from p2pfast.ops.gpu import require_triton
print([m for m in sys.modules if m.startswith("p2pfast") and "triton" in m])
try:
    require_triton()
except RuntimeError as error:
    print(error)
"""
    result = run(code)
    assert result.stdout.strip().splitlines() == [
        "[]",
        "Triton is not installed: `pip install p2pfast[gpu]`; or move the tensors to the CPU",
    ], result.stderr


def test_a_launch_describes_itself() -> None:
    x = torch.empty(4, device="meta", dtype=torch.bfloat16)
    launch = Launch("kernel", (1,), {"x": x, "residual": None, "pixels": 48, "rows": 1, "eps": 1e-5, "n": 7})
    found = launch.shipped("name")
    assert found.signature == {"x": "*bf16", "pixels": "i32", "eps": "fp32", "n": "i32"}
    assert found.constexprs == {"residual": None, "rows": 1}
    assert found.aligned == ("x", "pixels")


def test_tf32_by_either_interface() -> None:
    """PyTorch's older flag raises where the newer one was used."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            conv.fp32_precision = precision
            assert allows_tf32() == (precision == "tf32")
    finally:
        conv.fp32_precision = before
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert not allows_tf32()
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert allows_tf32()


def test_grids_that_cuda_refuses() -> None:
    """Before the launch, whose own error says only that an argument is invalid."""
    with pytest.raises(ValueError, match=r"a grid of \(1, 65536\) blocks.*split the batch"):
        Launch(SimpleNamespace(__name__="k"), (1, 65536), {}).run()
