"""The discriminator loss of several scales: kernels against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from p2pfast import _C
from p2pfast.ops.gan_loss import gan_loss, gan_loss_reference, op
from p2pfast.ops.gan_loss.op import _gan_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSSES = [
    ("logistic", 0.9),
    ("logistic", 0.0),
    ("square", 1.0),
    ("hinge", 1.0),
    ("hinge", -1.0),
    ("linear", -1.0),
]
SHAPES = [(2, 1, 7, 9), (1, 1, 1, 1), (1, 3, 101, 97), (3, 8)]


def scales(dtype: torch.dtype, offset: float = 0.0, spread: float = 3.0) -> list[Tensor]:
    return [(torch.randn(s) * spread + offset).to(dtype).requires_grad_() for s in SHAPES]


def exact(values: list[Tensor], *args: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    doubles = [x.detach().double().requires_grad_() for x in values]
    loss = gan_loss_reference(doubles, *args)
    return loss, torch.autograd.grad(loss, doubles)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("loss", "target"), LOSSES)
def test_value_and_gradient(cpu_level: str, loss: str, target: float, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    for offset, spread in ((0.0, 3.0), (50.0, 1.0), (-90.0, 30.0)):
        values = scales(dtype, offset, spread)
        expected, gradients = exact(values, loss, target, 0.5)
        result = gan_loss(values, loss, target, 0.5)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=1e-7)
        for got, want in zip(torch.autograd.grad(result, values), gradients, strict=True):
            assert got.dtype == dtype
            # float16 has steps of 6e-8 near zero, whatever PyTorch's own kernels do.
            absolute = 6e-8 if dtype == torch.float16 else 1e-7 * float(want.abs().max()) + 1e-37
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=absolute)


@pytest.mark.parametrize("memory", ["channels_last", "slice", "expanded"])
def test_any_strides(memory: str) -> None:
    x = torch.randn(2, 6, 8, 10)
    if memory == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = {"channels_last": x, "slice": x[:, 1:4, ::2], "expanded": x[:1].expand(3, -1, -1, -1)}[memory]
    x = x.detach().requires_grad_()
    expected, (want,) = exact([x], "logistic", 0.9)
    result = gan_loss([x], "logistic", 0.9)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(torch.autograd.grad(result, x)[0].double(), want, rtol=1e-5, atol=1e-9)


def test_a_loss_scale_reaches_float16_gradients() -> None:
    """1 / 4e6 is below float16's smallest step: what a GradScaler multiplies must not have been rounded."""
    x = torch.randn(4, 1, 1000, 1000).half().requires_grad_()
    (got,) = torch.autograd.grad(gan_loss([x], "square", 0.0) * 65536.0, x)
    torch.testing.assert_close(got.float(), 2 * 65536 / x.numel() * x.detach().float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("loss", "target"), LOSSES)
def test_nan_and_infinity_propagate(cpu_level: str, loss: str, target: float) -> None:
    x = torch.tensor([1.0, float("nan"), *[0.0] * 40]).requires_grad_()
    result = gan_loss([x], loss, target)
    assert result.isnan()
    if loss != "linear":
        assert torch.autograd.grad(result, x)[0][1].isnan()
    x = torch.tensor([1e30, -1e30, 0.0])
    expected = gan_loss_reference([x], loss, target)
    torch.testing.assert_close(gan_loss([x], loss, target), expected, rtol=1e-6, atol=0.0)


def test_same_bits_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    results = []
    values = [torch.randn(3, 1, 131, 259), torch.randn(3, 1, 66, 130)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gan_loss(values, "logistic", 0.9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


def test_the_registered_operator_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain tensors take a shorter way than the operator that tracers see."""
    results = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(op, "is_direct", lambda tensors: False)
        torch.manual_seed(0)
        scales = [torch.randn(2, 1, 9, 13, requires_grad=True), torch.randn(2, 1, 4, 6, requires_grad=True)]
        value = gan_loss(scales, "logistic", 0.9, 0.5)
        assert ("DirectLoss" in str(value.grad_fn)) == direct
        results.append([value, *torch.autograd.grad(value * 3.0, scales)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_of_some_scales_and_of_none() -> None:
    a, b = torch.randn(1, 1, 5, 5, requires_grad=True), torch.randn(1, 1, 3, 3)
    gan_loss([a, b], "square", 1.0).backward()
    torch.testing.assert_close(a.grad, 2 * (a.detach() - 1) / 25)
    assert b.grad is None
    assert not gan_loss([b], "square", 1.0).requires_grad
    with torch.no_grad():
        assert not gan_loss([a], "square", 1.0).requires_grad


def test_backward_twice_gives_the_same() -> None:
    x = torch.randn(1, 1, 9, 9, requires_grad=True)
    loss = gan_loss([x], "square", 0.0)
    for factor in (1.0, 3.0, 1.0):
        (got,) = torch.autograd.grad(loss, x, torch.tensor(factor), retain_graph=True)
        torch.testing.assert_close(got, factor * 2 * x.detach() / 81)


@pytest.mark.parametrize(("loss", "target"), LOSSES)
def test_gradcheck_of_the_reference(loss: str, target: float) -> None:
    values = [torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    torch.autograd.gradcheck(lambda *v: gan_loss(v, loss, target, 0.5), values)


def test_double_backward() -> None:
    """A penalty on the loss's own gradient, as the reference has it."""
    x = torch.randn(2, 1, 3, 4, requires_grad=True)
    found = []
    for function in (gan_loss, gan_loss_reference):
        (first,) = torch.autograd.grad(function([x], "logistic", 0.9), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1])


def test_double_backward_where_one_input_comes_from_another() -> None:
    found = []
    for function in (gan_loss, gan_loss_reference):
        x = torch.linspace(-2, 2, 12).view(3, 4).requires_grad_()
        (first,) = torch.autograd.grad(function([x, x.sin()], "logistic", 0.9), x, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), x)))
    torch.testing.assert_close(found[0], found[1])


def test_opcheck() -> None:
    for dtype in DTYPES:
        torch.library.opcheck(_gan_loss, (scales(dtype), "square", 1.0, 1.0, True))
    torch.library.opcheck(_gan_loss, ([x.detach() for x in scales(torch.float32)], "hinge", 1.0, 1.0, False))


def test_under_a_compiler() -> None:
    """AOTAutograd traces forward and backward; the numbers are those of eager mode."""
    values = scales(torch.float32)
    compiled = torch.compile(
        lambda v: 2.0 * gan_loss(v, "logistic", 0.9), backend="aot_eager", fullgraph=True
    )
    got = torch.autograd.grad(compiled(values), values)
    want = torch.autograd.grad(2.0 * gan_loss(values, "logistic", 0.9), values)
    torch.testing.assert_close(got, want)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"predictions": []}, ValueError, "predictions is empty"),
    ({"predictions": [torch.zeros(1, 0)]}, ValueError, "mean of no values"),
    ({"predictions": [torch.zeros(3, dtype=torch.int32)]}, TypeError, "dtype torch.int32"),
    ({"loss": "huber"}, ValueError, "loss is 'huber'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gan_loss(**{"predictions": [torch.zeros(2)], "loss": "square", "target": 1.0, **change})


BAD_NUMBERS: list[tuple[dict[str, Any], str]] = [
    ({"loss": 6}, "loss is 6; it must be"),
    ({"out": 0}, "out is null"),
    ({"parts": [(0, 0, 0, 4, 0, 0, 1.0, 1.0)]}, "a or b is null"),
    ({"parts": [(4, 0, 0, -1, 0, 0, 1.0, 1.0)]}, "count is -1; it must not be negative"),
    ({"parts": [(4, 0, 0, 1, 3, 0, 1.0, 1.0)]}, "type is 3; it must be"),
    ({"parts": [(4, 4, 0, 1, 0, 1, 1.0, 1.0)], "loss": 4}, "b_type is 1; it must be"),
]


@pytest.mark.parametrize(("change", "message"), BAD_NUMBERS, ids=[m for _, m in BAD_NUMBERS])
def test_bad_native_arguments(change: dict[str, Any], message: str) -> None:
    out = torch.empty(())
    with pytest.raises(ValueError, match=message):
        _C.pointwise_loss(**{"loss": 0, "target": 0.0, "parts": [], "out": out.data_ptr(), **change})


def test_fake_cuda_tensors() -> None:
    """Without gradients: autograd asks the device for a stream, which PyTorch without CUDA does not have."""
    with FakeTensorMode():
        values = [torch.empty(s, dtype=torch.bfloat16, device="cuda") for s in SHAPES]
        loss, gradients = _gan_loss(values, "square", 1.0, 1.0, True)
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device.type == "cuda"
        assert [(g.shape, g.dtype, g.device) for g in gradients] == [
            (x.shape, x.dtype, x.device) for x in values
        ]
        assert gan_loss(values, "square", 1.0).device.type == "cuda"
        with pytest.raises(ValueError, match="tensors on cuda:0 and on cpu; move them to one device"):
            gan_loss([values[0], torch.zeros(3)], "square", 1.0)


@pytest.mark.skipif(not hasattr(_C, "cuda_pointwise_loss"), reason="built without CUDA kernels")
class TestCuda:
    GOOD = {
        "loss": 0,
        "target": 0.0,
        "parts": [(4096, 0, 0, 4, 0, 0, 1.0, 1.0)],
        "workspace": 4096,
        "out": 4096,
        "device": 0,
        "stream": 0,
    }

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *BAD_NUMBERS,
            ({"workspace": 0}, "workspace is null"),
            ({"workspace": 4100}, "workspace is not aligned to its element size of 8"),
            ({"out": 4098}, "out is not aligned"),
            ({"device": -1}, "device is -1; it must not be negative"),
            ({"parts": [(4098, 0, 0, 4, 0, 0, 1.0, 1.0)]}, "a is not aligned to its element size of 4"),
            ({"parts": [(4096, 0, 4097, 4, 1, 1, 1.0, 1.0)]}, "gradient is not aligned"),
            ({"parts": [(4096, 4097, 0, 4, 1, 1, 1.0, 1.0)], "loss": 5}, "b is not aligned"),
            ({"parts": [(4096, 0, 0, 1 << 60, 0, 0, 1.0, 1.0)]}, "split the tensor"),
        ],
    )
    def test_arguments(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            _C.cuda_pointwise_loss(**{**self.GOOD, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"factor": 0}, "factor is null"),
            ({"factor": 4098}, "factor is not aligned"),
            ({"device": -1}, "device is -1"),
            ({"parts": [(4096, 4096, 4, 3, 1.0)]}, "type is 3; it must be"),
            ({"parts": [(4096, 4096, -4, 0, 1.0)]}, "count is -4; it must not"),
            ({"parts": [(4096, 0, 4, 0, 1.0)]}, "from or to is null"),
            ({"parts": [(4098, 4096, 4, 0, 1.0)]}, "from is not aligned to its element size of 4"),
            ({"parts": [(4096, 4097, 4, 1, 1.0)]}, "to is not aligned to its element size of 2"),
            ({"parts": [(4096, 4096, 1 << 60, 1, 1.0)]}, "split the tensor"),
        ],
    )
    def test_arguments_of_the_backward_pass(self, change: dict[str, Any], message: str) -> None:
        good = {"parts": [(4096, 4096, 4, 0, 1.0)], "factor": 4096, "device": 0, "stream": 0}
        with pytest.raises(ValueError, match=message):
            _C.cuda_pointwise_scale(**{**good, **change})

    def test_workspace_beyond_32_bits(self) -> None:
        parts = [(4096, 0, 0, 64 * 4096 * 8192 * 64, 0, 0, 1.0, 1.0), (4096, 0, 0, 1, 0, 0, 1.0, 1.0)]
        assert _C.cuda_pointwise_loss_sums(parts=parts) == 64 * 4096 * 64 + 1

    @pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
    def test_a_launch_without_a_gpu_is_a_clear_error(self) -> None:
        with pytest.raises(RuntimeError, match=r"pointwise_loss: .*\(cudaError.*NVIDIA GPU and a driver"):
            _C.cuda_pointwise_loss(**self.GOOD)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("loss", "target"), LOSSES)
    def test_value_and_gradient(self, loss: str, target: float, dtype: torch.dtype) -> None:
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
        for offset, spread in ((0.0, 3.0), (50.0, 1.0), (-90.0, 30.0)):
            values = [x.detach().cuda().requires_grad_() for x in scales(dtype, offset, spread)]
            expected, gradients = exact(values, loss, target, 0.5)
            result = gan_loss(values, loss, target, 0.5)
            assert torch.equal(result, gan_loss(values, loss, target, 0.5))
            torch.testing.assert_close(result.double(), expected, rtol=5e-7, atol=1e-7)
            for got, want in zip(torch.autograd.grad(result, values), gradients, strict=True):
                absolute = 6e-8 if dtype == torch.float16 else 1e-7 * float(want.abs().max()) + 1e-37
                torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=absolute)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_what_follows_scales_the_gradients(self, dtype: torch.dtype) -> None:
        values = [x.detach().cuda().requires_grad_() for x in scales(dtype)]
        loss = gan_loss(values, "square", 1.0)
        once = torch.autograd.grad(loss, values, retain_graph=True)
        upstream = torch.tensor(4.0, device="cuda")
        for _ in range(2):
            again = torch.autograd.grad(loss, values, upstream, retain_graph=True)
            torch.testing.assert_close(again, [g * 4 for g in once], rtol=1e-2, atol=1e-6)

    @pytest.mark.gpu
    def test_many_scales_and_unaligned_slices(self) -> None:
        flat = torch.randn(100_000).cuda()
        values = [flat[i : i + 1000 * (i % 7) + 1].detach().requires_grad_() for i in range(150)]
        expected, gradients = exact(values, "logistic", 0.9)
        result = gan_loss(values, "logistic", 0.9)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(
            [g.double() for g in torch.autograd.grad(result, values)], list(gradients), rtol=1e-5, atol=1e-9
        )

    @pytest.mark.gpu
    def test_in_a_graph(self) -> None:
        values = [x.detach().cuda() for x in scales(torch.float32)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = gan_loss(values, "hinge", 1.0)
        values[2].copy_(torch.randn_like(values[2]))
        graph.replay()
        torch.testing.assert_close(result, gan_loss_reference(values, "hinge", 1.0))
