from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.conv.reference import conv_reference

pytest.importorskip("triton")

from p2pfast.ops.conv.gpu import launch  # noqa: E402
from p2pfast.ops.conv.triton import Config, Source, conv, pack, parts  # noqa: E402

NAN = float("nan")
SMALL = Config(32, 32, 32)


class Buffer:
    """An NHWC view inside a larger buffer of NaN: reads outside it spoil results, writes outside are seen."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str, extra: int = 5) -> None:
        n, h, w, c = shape
        pixel = c + extra
        row = (w + 1) * pixel
        image = (h + 1) * row
        self.all = torch.full((n * image + 64,), NAN, dtype=dtype, device=device)
        self.view = self.all.as_strided(shape, (image, row, pixel, 1), 32)

    def fill(self, values: Tensor) -> Tensor:
        self.view.copy_(values)
        return self.view

    def untouched_outside(self) -> bool:
        inside = self.view.clone()
        self.view.fill_(NAN)
        result = bool(self.all.isnan().all())
        self.view.copy_(inside)
        return result


@dataclass(frozen=True)
class Case:
    """A convolution of the tests; every one has deferred normalisation, bias, statistics and activations."""

    channels: tuple[int, ...] = (20,)
    out: int = 18
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    pad: int = 1
    mode: str = "zeros"
    transposed: bool = False
    output_padding: int = 0
    layout: str | None = None
    size: tuple[int, int] = (5, 6)
    images: int = 1
    config: Config = SMALL
    dtype: torch.dtype = torch.float32
    residual: bool = True
    statistics: bool = True
    act: str = "leaky_relu"
    offset: float = 3.0


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double().cpu() - truth).norm() / truth.norm())


def run(case: Case, device: str) -> None:
    """Runs a case and compares it with float64 and, for its error, with PyTorch in the same dtype."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dtype, total = case.dtype, sum(case.channels)
    x = [(random(case.images, c, *case.size) + case.offset).to(dtype) for c in case.channels]
    ends = (total, case.out) if case.transposed else (case.out, total)
    fan = total * case.kernel[0] * case.kernel[1]
    weight = (random(*ends, *case.kernel) / fan**0.5).to(dtype)
    bias, factor = random(case.out).float(), random(case.out).float()
    scale, shift = random(case.images, total).abs().float() + 0.5, random(case.images, total).float()
    geometry = (case.stride, case.pad, case.output_padding, case.transposed, case.mode)

    def reference(to: torch.dtype) -> Tensor:
        y = conv_reference(
            [t.to(to) for t in x],
            weight.to(to),
            None,
            *geometry,
            scale.to(to),
            shift.to(to),
            "leaky_relu",
            0.2,
        )
        if case.residual:  # what a norm by stored statistics leaves to do comes with it
            y = y * factor.to(to)[:, None, None]
        return y + bias.to(to)[:, None, None]

    raw, eager = reference(torch.float64), reference(dtype)
    _, _, height, width = raw.shape
    added = (random(*raw.shape) + 1).to(dtype)
    scale_r, shift_r = random(case.out).float(), random(case.out).float()

    def finish(y: Tensor) -> Tensor:
        if case.residual:
            value = (
                added.to(y.dtype) * scale_r.to(y.dtype)[:, None, None] + shift_r.to(y.dtype)[:, None, None]
            )
            y = y + torch.relu(value)
        return activate(y, case.act, 0.1)

    truth = finish(raw)
    allowed = 2 * relative(finish(eager), truth) + 2e-7

    def nhwc(t: Tensor) -> Tensor:
        return t.permute(0, 2, 3, 1).to(device)

    sources, at = [], 0
    for t in x:
        c = t.shape[1]
        held = Buffer((case.images, *case.size, c), dtype, device).fill(nhwc(t))
        norm = scale[:, at : at + c].to(device), shift[:, at : at + c].to(device)
        sources.append(Source(held, *norm, "leaky_relu", 0.2))
        at += c
    residual = None
    if case.residual:
        held = Buffer((case.images, height, width, case.out), dtype, device).fill(nhwc(added))
        residual = Source(held, scale_r.to(device), shift_r.to(device), "relu")
    packed = pack(
        weight.to(device),
        case.transposed,
        dtype,
        stride=case.stride,
        padding=(case.pad, case.pad),
        channels=case.channels,
        layout=case.layout,
    )
    out = Buffer((case.images, height, width, case.out), dtype, device)
    partial = count = None
    if case.statistics:
        number = parts(packed, height, width, case.config)
        partial = torch.full((case.images, number, 2, case.out), NAN, device=device)
        count = torch.full((number,), NAN, device=device)
    conv(
        sources,
        packed,
        bias.to(device),
        out.view,
        stride=case.stride,
        padding=(case.pad, case.pad),
        pad_mode=case.mode,
        act=case.act,
        slope=0.1,
        factor=factor.to(device) if case.residual else None,
        residual=residual,
        partial=partial,
        count=count,
        config=case.config,
        precision="ieee",
    )
    assert out.untouched_outside()
    assert relative(out.view.permute(0, 3, 1, 2), truth) <= allowed
    if partial is not None and count is not None:
        assert float(count.sum()) == height * width
        check_statistics(partial, count, raw, 2 * relative(eager, raw))


def check_statistics(partial: Tensor, count: Tensor, raw: Tensor, error: float) -> None:
    """Merged parts against the mean and variance of the float64 result."""
    mean, m2 = partial.double().cpu().unbind(2)
    n = count.double().cpu()[None, :, None]
    whole = (mean * n).sum(1) / n.sum()
    variance = (m2.sum(1) + ((mean - whole[:, None]) ** 2 * n).sum(1)) / n.sum()
    deviation = raw.var((2, 3), correction=0).sqrt()
    size = float(raw.abs().max())
    assert (whole - raw.mean((2, 3))).abs().max() <= size * (error + 1e-6)
    assert (variance.sqrt() - deviation).abs().max() <= size * (error + 1e-6)


# Programs that share the depth of a tile, and their sums in a second launch.
SPLIT = {
    "two sources": Case((20, 35), 18, mode="reflect", images=2, config=Config(16, 16, 32, splits=4)),
    "few channels": Case((3,), 18, kernel=(5, 5), pad=2, config=Config(16, 16, 32, splits=2)),
    "more splits than steps": Case(kernel=(1, 1), pad=0, config=Config(32, 16, 32, splits=4)),
    "phases": Case(
        (20, 12),
        kernel=(4, 4),
        stride=2,
        transposed=True,
        layout="phases",
        config=Config(16, 16, 32, splits=2),
    ),
    "columns": Case(
        out=5,
        stride=2,
        transposed=True,
        output_padding=1,
        layout="columns",
        config=Config(16, 16, 32, splits=2),
    ),
    "bfloat16": Case(config=Config(32, 32, 32, splits=2), dtype=torch.bfloat16),
}

# Weights through a tensor descriptor.
DESCRIBED = Config(16, 16, 32, descriptor=True)
DESCRIPTOR = {
    "reflect, columns in blocks": Case((64,), 35, mode="reflect", size=(4, 7), images=2, config=DESCRIBED),
    "two sources": Case((32, 64), config=DESCRIBED),
    "bfloat16": Case((32,), config=DESCRIBED, dtype=torch.bfloat16),
    "phases": Case((32,), kernel=(4, 4), stride=2, transposed=True, layout="phases", config=DESCRIBED),
    "columns": Case((32,), 5, stride=2, transposed=True, layout="columns", config=DESCRIBED),
    "split": Case((32, 32), config=replace(DESCRIBED, splits=4)),
}

ORDINARY = {
    "zeros": Case(images=2, config=Config(16, 16, 32)),
    "reflect": Case(mode="reflect", size=(4, 7), images=2),
    "replicate, stride 2": Case(mode="replicate", stride=2, pad=2, kernel=(5, 5)),
    "4x4, stride 2": Case(kernel=(4, 4), stride=2, size=(6, 7)),
    "1x1": Case(kernel=(1, 1), pad=0),
    "no padding": Case(pad=0),
    "wide padding": Case(kernel=(4, 4), pad=3, size=(2, 3)),
    "rectangular": Case(kernel=(1, 4), pad=0),
    "full tiles": Case(channels=(32,), out=16, size=(4, 8), config=Config(16, 16, 32)),
    "columns in blocks": Case(out=35, config=Config(32, 16, 32)),
    "thin input": Case(channels=(3,), kernel=(7, 7), pad=3, mode="reflect", size=(5, 5)),
    "thin input, stride 2": Case(channels=(6,), kernel=(4, 4), stride=2),
    "two sources": Case(channels=(17, 33), images=2),
    "two sources, one thin": Case(channels=(3, 20), mode="reflect"),
    "two thin sources": Case(channels=(3, 1), stride=2),
    "one pixel": Case(kernel=(4, 4), stride=2, size=(2, 2), images=3, config=Config(16, 32, 64)),
    "far from zero": Case(offset=300.0),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_convolutions(name: str, device: str) -> None:
    run(ORDINARY[name], device)


TRANSPOSED = {
    "3x3": Case(transposed=True, images=2, stride=2, output_padding=1, size=(3, 5)),
    "4x4": Case(transposed=True, stride=2, kernel=(4, 4)),
    "odd output": Case(transposed=True, stride=2, size=(3, 3)),
    "two sources": Case(channels=(17, 33), transposed=True, stride=2, kernel=(4, 4), size=(2, 3)),
    "stride 3": Case(transposed=True, stride=3, pad=0, kernel=(5, 5), output_padding=2, size=(2, 3)),
    "phases without taps": Case(
        transposed=True, stride=3, pad=0, kernel=(2, 2), output_padding=1, size=(3, 2)
    ),
    "stride 1": Case(transposed=True, stride=1),
    "thin input": Case(channels=(5,), transposed=True, stride=2, size=(3, 4)),
    "one pixel": Case(transposed=True, stride=2, kernel=(4, 4), size=(1, 1)),
}


@pytest.mark.parametrize("layout", ["phases", "columns"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed(name: str, layout: str, device: str) -> None:
    case = TRANSPOSED[name]
    if layout == "columns":
        case = replace(case, out=3, config=Config(32, 32, 32))
    run(replace(case, layout=layout), device)


ROWS = {
    "7x7": Case(out=3, kernel=(7, 7), pad=3, mode="reflect", size=(5, 6), act="tanh"),
    "one channel, two sources": Case(channels=(17, 3), out=1, kernel=(4, 4), size=(5, 9), images=2),
    "blocks across": Case(out=2, pad=0, size=(4, 40)),
    "low image": Case(out=4, mode="replicate", size=(1, 7)),
}


@pytest.mark.parametrize("name", ROWS)
def test_few_output_channels(name: str, device: str) -> None:
    run(replace(ROWS[name], layout="rows"), device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_short_dtypes(dtype: torch.dtype, transposed: bool, device: str) -> None:
    run(Case(dtype=dtype, transposed=transposed, stride=1 + transposed, size=(4, 5)), device)


@pytest.mark.parametrize("name", SPLIT)
def test_split_depth(name: str, device: str) -> None:
    run(SPLIT[name], device)


@pytest.mark.parametrize("name", DESCRIPTOR)
def test_descriptors(name: str, device: str) -> None:
    run(DESCRIPTOR[name], device)


def test_a_descriptor_needs_whole_tiles(device: str) -> None:
    with pytest.raises(ValueError, match=r"needs channels that its depth divides, here \(20,\)"):
        run(Case(config=DESCRIBED), device)


@pytest.mark.parametrize("case", [Case(images=2), ROWS["7x7"], ORDINARY["thin input"]])
def test_images_of_more_than_two_to_the_31_elements(
    case: Case, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their index arithmetic, on small ones."""
    monkeypatch.setattr(launch, "_span", lambda t: 2**31)
    few = case.out == 3
    run(replace(case, layout="rows" if few else None), device)


@pytest.mark.parametrize("act", ["relu", "none"])
def test_nan_and_infinity_pass(act: str, device: str) -> None:
    x = torch.zeros(1, 4, 4, 16, device=device)
    x[0, 0, 0, 0], x[0, 3, 3, 5] = NAN, float("inf")
    out = torch.empty(1, 4, 4, 16, device=device)
    weight = torch.ones(16, 16, 1, 1, device=device)
    ones = torch.ones(16, device=device)
    source = Source(x, ones, ones, act)
    conv([source], pack(weight, False, torch.float32), None, out, config=SMALL, precision="ieee")
    assert out[0, 0, 0].isnan().all() and out[0, 3, 3].isposinf().all()
    assert int(out.isfinite().sum()) == 14 * 16


@pytest.mark.parametrize("act", ["none", "relu", "tanh", "sigmoid", "elu", "silu", "gelu"])
def test_activations(act: str, device: str) -> None:
    run(Case(channels=(16,), kernel=(1, 1), pad=0, act=act, residual=False, statistics=False), device)
