"""The operator on (N, C, H, W) tensors, and the errors of the Triton convolution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast.ops.conv import conv as conv_op
from p2pfast.ops.conv import conv_reference

pytest.importorskip("triton")

from p2pfast.ops.conv.gpu.op import run  # noqa: E402
from p2pfast.ops.conv.triton import Config, Source, conv, pack, parts  # noqa: E402


def test_layouts_of_memory(device: str) -> None:
    """Contiguous, channels_last, a slice of channels, an expanded batch, one channel."""
    weight = torch.randn(3, 5, 3, 3, device=device)
    wide = torch.randn(2, 8, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.rand(2, 5, device=device) + 0.5, torch.randn(2, 5, device=device)
    for x in (
        torch.randn(2, 5, 4, 5, device=device),
        wide[:, 1:6],
        torch.randn(1, 5, 4, 5, device=device).expand(2, 5, 4, 5),
        torch.randn(2, 1, 4, 5, device=device).expand(2, 5, 4, 5),
    ):
        y = run(
            [x], weight, None, (2, 3, 4, 5), 1, 1, False, "reflect", scale, shift, "relu", 0.0, "tanh", 0.0
        )
        truth = conv_reference(x, weight, None, 1, 1, 0, False, "reflect", scale, shift, "relu", 0.0, "tanh")
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, truth, rtol=1e-3, atol=2e-2 if device == "cuda" else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_registered_for_cuda(dtype: torch.dtype) -> None:
    x = [torch.randn(2, c, 33, 31, device="cuda", dtype=dtype) for c in (40, 24)]
    weight = torch.randn(48, 64, 4, 4, device="cuda", dtype=dtype) / 32
    y = conv_op(x, weight, None, 2, 1, padding_mode="replicate", act="relu")
    truth = conv_reference(
        [t.double() for t in x], weight.double(), None, 2, 1, 0, False, "replicate", act="relu"
    )
    assert (y - truth).norm() / truth.norm() < 1e-2
    torch.library.opcheck(torch.ops.p2pfast.conv, (x, weight, None, 2, 1))


@pytest.mark.gpu
def test_gradients_on_cuda() -> None:
    x = torch.randn(1, 16, 9, 9, device="cuda", requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, device="cuda", requires_grad=True)
    conv_op(x, weight, None, 1, 1, act="tanh").sum().backward()
    assert x.grad is not None and weight.grad is not None


def test_dtype_and_algorithm_of_other_devices() -> None:
    x, weight = torch.zeros(1, 16, 4, 4, dtype=torch.float16), torch.zeros(16, 16, 3, 3, dtype=torch.float16)
    with pytest.raises(TypeError, match="torch.float16; torch.float32 or torch.bfloat16 is expected"):
        conv_op(x, weight)
    with torch.device("meta"):
        with pytest.raises(TypeError, match="torch.float16"):
            conv_op(torch.empty(1, 16, 4, 4, dtype=torch.float16), torch.empty(16, 16, 3, 3))


GOOD: dict[str, Any] = {"stride": 1, "padding": (1, 1), "config": Config(16, 16, 16)}


def arguments() -> dict[str, Any]:
    return {
        "sources": [Source(torch.zeros(1, 4, 4, 16))],
        "packed": pack(torch.zeros(16, 16, 3, 3), False, torch.float32),
        "bias": None,
        "out": torch.zeros(1, 4, 4, 16),
        **GOOD,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"sources": []}, ValueError, "there are 0 sources"),
        (
            {"sources": [Source(torch.zeros(1, 4, 4, 8))]},
            ValueError,
            r"\(8,\) channels; .* packed for \(16,\)",
        ),
        ({"sources": [Source(torch.zeros(1, 16, 4, 4).permute(0, 2, 3, 1))]}, ValueError, "must be adjacent"),
        ({"sources": [Source(torch.zeros(1, 4, 4, 16).double())]}, TypeError, "float64"),
        ({"sources": [Source(torch.zeros(1, 4, 4, 16).half())]}, TypeError, "packed as torch.float32"),
        ({"sources": [Source(torch.zeros(1, 4, 4, 16, device="meta"))]}, ValueError, "is on meta"),
        ({"sources": [Source(torch.zeros(1, 4, 4, 16), torch.zeros(16))]}, ValueError, "go together"),
        ({"sources": [Source(torch.zeros(1, 4, 4, 16), act="swish")]}, ValueError, "'swish'; choose one of"),
        ({"out": torch.zeros(1, 4, 4, 8)}, ValueError, "out has shape"),
        ({"out": torch.zeros(1, 0, 4, 16)}, ValueError, "empty"),
        ({"bias": torch.zeros(3)}, ValueError, "bias has shape"),
        ({"pad_mode": "circular"}, ValueError, "'circular'; choose one of zeros, reflect, replicate"),
        (
            {"pad_mode": "reflect", "padding": (4, 4)},
            ValueError,
            "reflection needs it below the input's height",
        ),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"residual": Source(torch.zeros(1, 4, 4, 8))}, ValueError, "residual has shape"),
        ({"partial": torch.zeros(1, 1, 2, 16)}, ValueError, "partial and count go together"),
        ({"partial": torch.zeros(1, 2, 2, 16), "count": torch.zeros(1)}, ValueError, r"\(1, 1, 2, 16\)"),
        ({"precision": "half"}, ValueError, "'half'; choose one of tf32, tf32x3, ieee"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        conv(**{**arguments(), **wrong})


def test_pack_refuses() -> None:
    weight = torch.zeros(8, 8, 3, 3)
    for options, message in (
        ({"channels": (3, 4)}, "sum to the weight's 8"),
        ({"layout": "phases"}, "not for ordinary"),
        ({"layout": "rows"}, "columns; 16 to 128 fit"),
        ({"layout": "fast"}, "choose one of plain"),
        ({"layout": "rows", "stride": 2}, "takes stride 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(weight if "stride" in options else torch.zeros(64, 8, 3, 3), False, torch.float32, **options)
    with pytest.raises(ValueError, match="below the transposed kernel's size"):
        pack(weight, True, torch.float32, stride=2, padding=(3, 3))


def test_part_sizes_are_those_of_the_phases() -> None:
    weight: Tensor = torch.zeros(16, 16, 3, 3)
    packed = pack(weight, True, torch.float32, stride=2, padding=(1, 1), layout="phases")
    assert parts(packed, 5, 7, Config(16, 16, 16)) == 4
    assert parts(packed, 9, 9, Config(16, 16, 16)) == 2 + 2 + 2 + 1
    packed = pack(weight, True, torch.float32, stride=2, padding=(1, 1), layout="columns")
    assert parts(packed, 9, 9, Config(16, 16, 16)) == 8
