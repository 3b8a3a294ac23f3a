"""Arguments at random, fitting or not: the reference's answer or an error that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfast.ops.conv import conv, conv_reference
from p2pfast.ops.image_uint8 import image_uint8, image_uint8_reference
from p2pfast.ops.label_conv import label_conv, label_conv_reference
from p2pfast.ops.norm import instance_norm_act, instance_norm_act_reference

fuzz = settings(max_examples=60, deadline=None, derandomize=True)


def tensor(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of a shape and any layout; now and then a value that is not finite."""
    t = torch.randn(shape).clamp(-3, 3).to(dtype)
    if t.dim() == 4 and data.draw(st.booleans()):
        t = t.contiguous(memory_format=torch.channels_last)
    elif t.dim() == 4 and data.draw(st.integers(0, 3)) == 0:
        t = torch.cat([t, t], 3)[..., : shape[3]]
    if t.numel() and t.is_floating_point() and data.draw(st.integers(0, 9)) == 0:
        t[tuple(s // 2 for s in shape)] = float("nan")
    return t


def answers_or_explains(
    run: Callable[[], Tensor], reference: Callable[[], Tensor], tolerance: float, spreads: bool = False
) -> None:
    try:
        found = run()
    except (ValueError, TypeError) as error:
        assert len(str(error)) > 15, "an error names the argument, its value and the remedy"
        return
    expected = reference()
    assert found.shape == expected.shape
    lost = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
    if spreads:  # minimal filtering: a NaN also reaches other outputs of its tiles
        assert (found.isnan() | ~lost).all()
        lost = found.isnan()
    else:
        assert torch.equal(found.isnan() if found.is_floating_point() else lost, lost)
    a, b = found.double()[~lost], expected.double()[~lost]
    if a.numel():
        assert float((a - b).norm()) <= tolerance * float(b.norm()) + 1e-4 * a.numel() ** 0.5


class Draw:
    """Draws that fit, or, in a third of the cases, also such that do not."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.flawed = data.draw(st.integers(0, 2)) == 2

    def size(self, low: int, high: int, below: int = 1) -> int:
        return self.data.draw(st.integers(low - below if self.flawed else low, high))

    def flaw(self) -> bool:
        return self.flawed and self.data.draw(st.integers(0, 4)) == 4

    def choice(self, *good: Any, bad: Any) -> Any:
        return bad if self.flaw() else self.data.draw(st.sampled_from(good))

    def dtype(self) -> torch.dtype:
        return self.choice(torch.float32, torch.bfloat16, bad=torch.int32)

    def act(self) -> str:
        return self.choice("none", "relu", "leaky_relu", "tanh", bad="swish")


@fuzz
@given(st.data())
def test_conv(data: st.DataObject) -> None:
    draw = Draw(data)
    dtype = draw.dtype()
    images, height, width = draw.size(1, 2), draw.size(1, 12), draw.size(1, 12)
    channels = [draw.size(1, 20) for _ in range(draw.size(1, 2))]
    total, out = sum(channels) + draw.flaw(), draw.size(1, 20)
    stride = draw.size(1, 3)
    transposed = data.draw(st.booleans())
    kernel = draw.size(1, 7)
    options: dict[str, Any] = {
        "stride": stride,
        "padding": draw.size(0, kernel // 2),
        "output_padding": draw.size(0, min(1, max(0, stride - 1)) if transposed else 0),
        "transposed": transposed,
        "padding_mode": draw.choice("zeros", *([] if transposed else ["reflect", "replicate"]), bad="edge"),
        "input_act": draw.choice("none", "relu", "leaky_relu", bad="tanh"),
        "act": draw.act(),
    }
    x = [tensor(data, (images, c, height, width), dtype) for c in channels]
    sides = (total, out) if transposed else (out, total)
    weight = tensor(data, (*sides, kernel, kernel), data.draw(st.sampled_from([dtype, torch.float32])))
    bias = torch.randn(out + draw.flaw()) if data.draw(st.booleans()) else None
    algorithm = "auto"
    if draw.flawed:
        algorithm = data.draw(st.sampled_from(["direct", "winograd", "streamed2", "thin", "quick"]))

    def reference() -> Tensor:
        return conv_reference([t.double() for t in x], weight.double(), _double(bias), **options)

    answers_or_explains(
        lambda: conv(x, weight, bias, algorithm=algorithm, **options),
        reference,
        2e-2 if dtype == torch.bfloat16 else 2e-5,
        spreads=True,
    )


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


@fuzz
@given(st.data())
def test_instance_norm_act(data: st.DataObject) -> None:
    draw = Draw(data)
    dtype = draw.dtype()
    shape = (draw.size(1, 2), draw.size(1, 20), draw.size(1, 9), draw.size(2, 9))
    x = tensor(data, shape, dtype)
    weight = bias = residual = None
    if data.draw(st.booleans()):
        weight, bias = torch.randn(shape[1] + draw.flaw()), torch.randn(shape[1])
    if data.draw(st.booleans()):
        residual = tensor(data, shape, dtype)
    options: dict[str, Any] = {"act": draw.act(), "over_batch": data.draw(st.booleans())}
    options["eps"] = draw.choice(1e-5, 0.1, bad=-1.0)

    def reference() -> Tensor:
        return instance_norm_act_reference(
            x.double(), _double(weight), _double(bias), residual=_double(residual), **options
        )

    answers_or_explains(
        lambda: instance_norm_act(x, weight, bias, residual=residual, **options),
        reference,
        2e-2 if dtype == torch.bfloat16 else 1e-4,
    )


@fuzz
@given(st.data())
def test_label_conv(data: st.DataObject) -> None:
    draw = Draw(data)
    classes, kernel = draw.size(1, 5), draw.choice(1, 3, 5, 7, bad=4)
    shape = (draw.size(1, 2), draw.size(4, 14, 4), draw.size(4, 14, 4))
    dtype = draw.choice(torch.uint8, torch.int64, bad=torch.float32)
    labels = torch.randint(0, max(1, classes + draw.flaw()), shape).to(dtype)
    edges = torch.randint(0, 2, shape, dtype=torch.uint8) if data.draw(st.booleans()) else None
    weight = torch.randn(draw.size(1, 9), classes + (edges is not None), kernel, kernel)
    bias = torch.randn(weight.shape[0]) if data.draw(st.booleans()) else None
    levels, mode = draw.size(0, 2), draw.choice("reflect", "zeros", bad="edge")

    def reference() -> Tensor:
        return label_conv_reference(labels, edges, weight.double(), _double(bias), classes, levels, mode)

    answers_or_explains(
        lambda: label_conv(labels, edges, weight, bias, classes, levels, mode), reference, 1e-5
    )


@fuzz
@given(st.data())
def test_image_uint8(data: st.DataObject) -> None:
    draw = Draw(data)
    shape = (draw.size(1, 2), draw.size(1, 5), draw.size(1, 9), draw.size(1, 40))
    x, tanh = tensor(data, shape[draw.flaw() :], draw.dtype()), data.draw(st.booleans())
    # One step where a value lies on the border between two.
    answers_or_explains(lambda: image_uint8(x, tanh), lambda: image_uint8_reference(x, tanh), 2e-2)
