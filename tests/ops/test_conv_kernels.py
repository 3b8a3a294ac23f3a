"""Every convolution algorithm, called as a plan calls it, against the reference in float64."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv import conv_reference
from p2pfast.ops.conv.op import ALGORITHMS, PADDING_MODES

Alloc = Callable[..., Tensor]
# Relative L2 error of minimal filtering in float32, as the operator's README documents it.
WINOGRAD_ERROR, WINOGRAD6_ERROR = 5e-6, 2e-5


@dataclass(frozen=True)
class Case:
    """A convolution; what is not the shape has defaults that exercise the most."""

    images: int
    height: int
    width: int
    channels: tuple[int, ...]
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    transposed: bool = False
    output_padding: int = 0
    padding_mode: str = "zeros"
    offset: float = 0.5
    norm: bool = True
    input_act: str = "leaky_relu"
    bias: float | None = 1.0
    act: str = "none"
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    packed_dtype: torch.dtype = torch.float32
    layout: str = "padded"
    out_layout: str = "padded"
    block: int = 0
    group: int = 0

    @property
    def out_size(self) -> tuple[int, int]:
        def side(size: int) -> int:
            if self.transposed:
                return (size - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding
            return (size + 2 * self.padding - self.kernel) // self.stride + 1

        return side(self.height), side(self.width)

    def supports(self, algorithm: str) -> bool:
        if algorithm == "direct":
            return True
        if algorithm == "thin":
            folded = self.kernel * self.out_channels * (self.kernel if self.transposed else 1)
            return (self.transposed or self.stride == 1) and self.out_channels <= 8 and folded <= 64
        if algorithm == "winograd6":
            return not self.transposed and (self.kernel, self.stride) == (3, 1)
        if self.transposed:
            return self.stride == 2 and self.padding == 1 and self.kernel in (3, 4)
        return self.kernel in (3, 4) and self.stride in (1, 2)

    def filtered(self, algorithm: str) -> bool:
        """Whether the algorithm saves multiplications, at the price of a larger error."""
        if algorithm == "thin":
            return not self.transposed and self.out_channels <= 4 and self.kernel in (3, 4, 5, 7)
        return algorithm != "direct"

    def __str__(self) -> str:
        channels = "+".join(map(str, self.channels))
        kind = f"t{self.stride}" if self.transposed else f"s{self.stride}"
        more = f"-o{self.output_padding}" if self.output_padding else ""
        more += f"-{self.padding_mode}" if self.padding_mode != "zeros" else ""
        size = f"{self.images}x{self.height}x{self.width}"
        return f"{size}-{channels}to{self.out_channels}-k{self.kernel}{kind}p{self.padding}{more}"


CASES = [
    Case(2, 13, 18, (20,), 24, 3, padding=1, padding_mode="reflect"),
    Case(1, 9, 7, (5,), 7, 3, padding=1),
    Case(1, 5, 70, (16,), 16, 3, padding=1, padding_mode="replicate"),  # several pieces of a row of tiles
    Case(2, 6, 5, (17, 10), 40, 3, padding=1, padding_mode="reflect"),
    Case(1, 4, 5, (300,), 40, 3, padding=1),  # several runs of the products' depth
    Case(1, 6, 9, (33, 37), 280, 3, padding=1, padding_mode="replicate"),  # many panels of columns
    Case(1, 1, 1, (3,), 3, 3, padding=1),
    Case(1, 2, 3, (4,), 5, 3, padding=1, padding_mode="reflect"),
    Case(1, 7, 9, (6,), 2, 3, padding=0),
    Case(1, 8, 8, (6,), 4, 3, padding=2),
    Case(2, 17, 19, (40,), 33, 3, 2, 1),
    Case(1, 12, 9, (3, 20), 16, 3, 2, 1, padding_mode="replicate"),
    Case(2, 16, 22, (17,), 19, 4, 2, 1),
    Case(1, 9, 7, (20, 5), 8, 4, 2, 1, padding_mode="reflect"),
    Case(1, 2, 2, (70,), 65, 4, 2, 1),
    Case(1, 11, 8, (12,), 20, 4, 1, 1),
    Case(1, 8, 9, (24,), 40, 3, 2, 1, transposed=True, output_padding=1),
    Case(2, 7, 5, (9, 15), 3, 3, 2, 1, transposed=True),
    Case(1, 8, 9, (24, 24), 40, 4, 2, 1, transposed=True),
    Case(1, 1, 1, (70,), 33, 4, 2, 1, transposed=True),
    Case(2, 5, 6, (24,), 3, 4, 2, 1, transposed=True),
    Case(1, 4, 5, (7,), 6, 2, 3, 0, transposed=True, output_padding=2),  # taps missing in some phases
    Case(1, 5, 4, (7,), 6, 5, 1, 3, transposed=True),
    Case(1, 10, 131, (24,), 3, 7, padding=3, padding_mode="reflect"),
    Case(2, 9, 11, (3,), 20, 7, padding=3, padding_mode="replicate"),
    Case(1, 9, 9, (33,), 5, 1),
    Case(1, 19, 14, (5,), 6, 5, 3, 2, padding_mode="reflect"),
    Case(1, 16, 17, (2,), 2, 16, 2, 5),
    Case(2, 14, 23, (33, 40), 24, 4, 1, 2, padding_mode="reflect"),
    Case(1, 5, 7, (12,), 24, 3, 1, 1, transposed=True),
    # Few output channels: every scheme along columns, slices of channels, several strips and bands.
    Case(2, 13, 12, (40,), 1, 4, 1, 1),
    Case(1, 38, 139, (7, 3), 2, 5, padding=2, padding_mode="replicate"),
    Case(2, 5, 21, (20, 50), 4, 3, padding=1, padding_mode="reflect"),
    Case(1, 9, 8, (3,), 3, 7, padding=3),
    Case(1, 130, 3, (5,), 1, 7, padding=2),
]
COMBINATIONS = [(c, a) for c in CASES for a in ALGORITHMS if c.supports(a)]
# One case of every kind for the properties that do not depend on the shape.
KINDS = [CASES[i] for i in (3, 11, 13, 16, 18, 23)]
KIND_COMBINATIONS = [(c, a) for c in KINDS for a in ALGORITHMS if c.supports(a)]


def name(value: Any) -> str:
    return str(value)


def padded(channels: int) -> int:
    return -(-channels // 16) * 16


def strided(alloc: Alloc, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """An (N, C, H, W) view of guarded memory."""
    images, channels, height, width = shape
    if layout == "nchw":
        return alloc(*shape, dtype=dtype)
    room = padded(channels) if layout == "padded" else channels
    return alloc(images, height, width, room, dtype=dtype)[..., :channels].permute(0, 3, 1, 2)


def view_fields(t: Tensor, layout: str) -> dict[str, Any]:
    _, channels, height, width = t.shape
    room = padded(channels) if layout == "padded" else channels
    fields: dict[str, Any] = {"data": t.data_ptr(), "dtype": int(t.dtype == torch.bfloat16)}
    if layout == "nchw":
        plane = height * width
        strides = (channels * plane, width, 1, plane)
    else:
        strides = (height * width * room, width * room, room, 1)
    names = ("image_stride", "row_stride", "pixel_stride", "channel_stride")
    return fields | dict(zip(names, strides, strict=True))


@dataclass
class Layer:
    """A case with its data: the arguments of the reference, and those of the kernels."""

    case: Case
    alloc: Alloc
    x: list[Tensor] = field(default_factory=list)
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor | None = None
    scale: list[Tensor] = field(default_factory=list)
    shift: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        c = self.case
        total = sum(c.channels)
        for channels in c.channels:
            shape = (c.images, channels, c.height, c.width)
            x = strided(self.alloc, shape, c.layout, c.dtype)
            x.copy_(torch.randn(shape) + c.offset)
            self.x.append(x)
            # Lanes past the last channel stay NaN: readers drop them.
            for buffers in (self.scale, self.shift):
                buffers.append(self.alloc(c.images, padded(channels)))
            self.scale[-1][:, :channels] = torch.rand(c.images, channels) + 0.5
            self.shift[-1][:, :channels] = torch.randn(c.images, channels)
        sides = (total, c.out_channels) if c.transposed else (c.out_channels, total)
        self.weight = self.alloc(*sides, c.kernel, c.kernel, dtype=c.weight_dtype)
        self.weight.copy_(torch.randn(self.weight.shape) / (total * c.kernel**2) ** 0.5)
        if c.bias is not None:
            self.bias = self.alloc(c.out_channels)
            self.bias.copy_(torch.randn(c.out_channels) + c.bias)

    def reference(self, dtype: torch.dtype) -> Tensor:
        c = self.case
        parts = []
        for x, scale, shift in zip(self.x, self.scale, self.shift, strict=True):
            channels = x.shape[1]
            v = x.to(dtype)
            if c.norm:
                v = v * scale[:, :channels, None, None].to(dtype) + shift[:, :channels, None, None].to(dtype)
            parts.append(v)
        return conv_reference(
            parts,
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            c.stride,
            c.padding,
            c.output_padding,
            c.transposed,
            c.padding_mode,
            input_act=c.input_act,
            input_slope=0.2,
            act=c.act,
            slope=0.3,
        )

    def call(self, out: Tensor) -> dict[str, Any]:
        c = self.case
        sources = []
        for x, scale, shift in zip(self.x, self.scale, self.shift, strict=True):
            source = view_fields(x, c.layout)
            source |= {"channels": x.shape[1], "act": ("none", "relu", "leaky_relu").index(c.input_act)}
            source["slope"] = 0.2
            if c.norm:
                source |= {
                    "scale": scale.data_ptr(),
                    "shift": shift.data_ptr(),
                    "norm_stride": scale.stride(0),
                }
            sources.append(source)
        outer, inner = self.weight.stride()[:2]
        acts = ("none", "relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu", "gelu")
        return {
            "sources": sources,
            "images": c.images,
            "height": c.height,
            "width": c.width,
            "out_height": c.out_size[0],
            "out_width": c.out_size[1],
            "out_channels": c.out_channels,
            "kernel_h": c.kernel,
            "kernel_w": c.kernel,
            "stride": c.stride,
            "pad_top": c.padding,
            "pad_left": c.padding,
            "transposed": c.transposed,
            "pad": PADDING_MODES.index(c.padding_mode),
            "weight": self.weight.data_ptr(),
            "weight_dtype": int(c.weight_dtype == torch.bfloat16),
            "packed_dtype": int(c.packed_dtype == torch.bfloat16),
            "weight_out_stride": inner if c.transposed else outer,
            "weight_in_stride": outer if c.transposed else inner,
            "bias": 0 if self.bias is None else self.bias.data_ptr(),
            "out": view_fields(out, c.out_layout),
            "act": acts.index(c.act),
            "slope": 0.3,
            "block": c.block,
            "group": c.group,
        }

    def run(self, algorithm: str, extra: dict[str, Any] | None = None, *, statistics: bool = True) -> Result:
        c, number = self.case, ALGORITHMS.index(algorithm)
        out = strided(self.alloc, (c.images, c.out_channels, *c.out_size), c.out_layout, c.dtype)
        call = self.call(out) | (extra or {})
        info = _C.conv_info(number, call)
        assert info["refuses"] is None
        packed = self.alloc(max(1, info["packed_floats"]))
        workspace = self.alloc(info["workspace_bytes"], dtype=torch.uint8)
        _C.conv_pack(number, call, packed.data_ptr())
        call |= {"packed": packed.data_ptr(), "workspace": workspace.data_ptr()}
        result = Result(out, info)
        if statistics and algorithm != "thin":
            result.partial = self.alloc(c.images, info["partials"], 2, padded(c.out_channels))
            result.count = self.alloc(c.images, info["partials"])
            call |= {"partial": result.partial.data_ptr(), "count": result.count.data_ptr()}
        _C.run_conv(number, call)
        return result


@dataclass
class Result:
    out: Tensor
    info: dict[str, Any]
    partial: Tensor = field(default_factory=lambda: torch.empty(0))
    count: Tensor = field(default_factory=lambda: torch.empty(0))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of each image and channel, merged in float64 by Chan's formula."""
        channels = self.out.shape[1]
        used = (self.count > 0)[..., None]
        count = self.count.double()[..., None]
        mean = self.partial[:, :, 0, :channels].double().where(used, 0.0)
        m2 = self.partial[:, :, 1, :channels].double().where(used, 0.0)
        total = count.sum(1)
        merged = (mean * count).sum(1) / total
        return merged, (m2 + count * (mean - merged[:, None]) ** 2).sum(1) / total


def errors(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def check(layer: Layer, algorithm: str, result: Result) -> None:
    """The error policy of the project: twice that of the same computation by PyTorch in the same dtype.

    For some small shapes PyTorch splits its sums; a running float32 sum of the same depth is right as well.
    """
    exact = layer.reference(torch.float64)
    assert result.out.isfinite().all()
    eager = errors(layer.reference(layer.case.dtype), exact)
    depth = sum(layer.case.channels) * layer.case.kernel**2
    allowed = max(2 * eager, 2e-7, 0.125 * torch.finfo(torch.float32).eps * depth**0.5)
    if layer.case.filtered(algorithm):
        allowed = max(allowed, WINOGRAD6_ERROR if algorithm == "winograd6" else WINOGRAD_ERROR)
    assert errors(result.out, exact) <= allowed


@pytest.mark.parametrize(("case", "algorithm"), COMBINATIONS, ids=name)
def test_matches_the_reference(cpu_level: str, buffers: Alloc, case: Case, algorithm: str) -> None:
    layer = Layer(case, buffers)
    for block, group in ((0, 0), (7, 16), (40, 64)):
        layer.case = replace(case, block=block, group=group)
        check(layer, algorithm, layer.run(algorithm))


@pytest.mark.parametrize(
    ("case", "algorithm"), [(c, a) for c, a in KIND_COMBINATIONS if a != "thin"], ids=name
)
def test_packed_bfloat16(cpu_level: str, buffers: Alloc, case: Case, algorithm: str) -> None:
    """Half the memory; exact where bfloat16 weights are packed as they are."""
    case = replace(case, weight_dtype=torch.bfloat16)
    for block in (0, 40):
        layer = Layer(replace(case, block=block), buffers)
        wide = layer.run(algorithm)
        layer.case = replace(layer.case, packed_dtype=torch.bfloat16)
        narrow = layer.run(algorithm)
        assert 2 * narrow.info["packed_floats"] in (
            wide.info["packed_floats"],
            wide.info["packed_floats"] + 1,
        )
        if algorithm == "direct":
            torch.testing.assert_close(narrow.out, wide.out, rtol=1e-6, atol=1e-6)
        else:
            assert errors(narrow.out, wide.out.double()) < (3e-2 if algorithm == "winograd6" else 1e-2)


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_layouts_and_dtypes(cpu_level: str, buffers: Alloc, case: Case, algorithm: str) -> None:
    layouts = ("padded", "dense", "nchw")
    dtypes = (torch.float32, torch.bfloat16)
    for layout, out_layout, dtype in itertools.product(layouts, layouts, dtypes):
        same = replace(case, layout=layout, out_layout=out_layout, dtype=dtype)
        for variant in (same, replace(same, weight_dtype=dtype, norm=False, input_act="none", bias=None)):
            if variant.layout == variant.out_layout or variant.norm:
                layer = Layer(variant, buffers)
                check(layer, algorithm, layer.run(algorithm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["direct", "winograd", "winograd2", "winograd6"])
def test_outputs_that_go_past_the_caches(
    cpu_level: str, buffers: Alloc, algorithm: str, dtype: torch.dtype
) -> None:
    case = Case(1, 301, 470, (3,), 64, 3, padding=1, padding_mode="reflect", dtype=dtype, block=40)
    layer = Layer(case, buffers)
    check(layer, algorithm, layer.run(algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_activations(cpu_level: str, buffers: Alloc, algorithm: str) -> None:
    for act in ("relu", "leaky_relu", "tanh", "sigmoid", "elu", "silu", "gelu"):
        for input_act in ("none", "relu", "leaky_relu"):
            case = Case(1, 6, 5, (9,), 5, 3, padding=1, act=act, input_act=input_act)
            layer = Layer(case, buffers)
            check(layer, algorithm, layer.run(algorithm))


@pytest.mark.parametrize(("case", "algorithm"), [(c, a) for c, a in COMBINATIONS if a != "thin"], ids=name)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics(cpu_level: str, buffers: Alloc, case: Case, algorithm: str, offset: float) -> None:
    """Of the float32 values before the activation, however far their mean is from zero."""
    case = replace(case, bias=offset, block=9)
    result = Layer(case, buffers).run(algorithm)
    values = result.out.double()
    mean, variance = result.statistics()
    assert result.count.sum(1).tolist() == [values[0, 0].numel()] * case.images
    torch.testing.assert_close(mean, values.mean((2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, values.var((2, 3), correction=0), rtol=1e-4, atol=1e-6)
    # They do not depend on what is stored, but for the order of the sums.
    for other in (replace(case, act="relu"), replace(case, act="tanh", out_layout="nchw")):
        torch.manual_seed(1)
        first = Layer(case, buffers).run(algorithm)
        torch.manual_seed(1)
        second = Layer(other, buffers).run(algorithm)
        assert torch.equal(first.count, second.count)
        real = slice(None), slice(None), slice(None), slice(case.out_channels)
        used = first.count > 0
        ours, theirs = first.partial[real][used], second.partial[real][used]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a != "thin"])
def test_statistics_of_a_flat_image(cpu_level: str, buffers: Alloc, algorithm: str) -> None:
    """What a part sees first, at a corner of zero padding, is unlike all that follows."""
    case = Case(1, 60, 130, (8,), 16, 3, padding=1, norm=False, input_act="none", block=10000)
    layer = Layer(case, buffers)
    layer.x[0][:] = torch.rand(1, 8, 1, 1) * 10
    layer.weight += 1
    result = layer.run(algorithm)
    mean, variance = result.statistics()
    values = result.out.double()
    torch.testing.assert_close(mean, values.mean((2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance, values.var((2, 3), correction=0), rtol=1e-2, atol=0)


def test_refusals() -> None:
    for case in CASES:
        layer = Layer(case, torch.empty)
        out = torch.empty(case.images, case.out_channels, *case.out_size)
        call = layer.call(out) | {"out": view_fields(out, "nchw")}
        for algorithm in ALGORITHMS:
            reason = _C.conv_info(ALGORITHMS.index(algorithm), call)["refuses"]
            assert (reason is None) == case.supports(algorithm), (str(case), algorithm, reason)
            if reason is not None:
                with pytest.raises(ValueError, match=reason[:10]):
                    _C.run_conv(ALGORITHMS.index(algorithm), call)


def test_fewer_multiplications() -> None:
    """The counts of the README, a whole number of tiles, one channel in and one out."""

    def count(algorithm: str, **shape: Any) -> float:
        case = Case(1, 16, 16, (1,), 1, **shape)
        call = Layer(case, torch.empty).call(torch.empty(1, 1, *case.out_size))
        result: float = _C.conv_info(ALGORITHMS.index(algorithm), call)["multiplications"]
        return result

    s1 = {"kernel": 3, "padding": 1}
    assert (count("winograd", **s1), count("winograd2", **s1)) == (16 * 36, 64 * 16)
    assert count("winograd6", **s1) == 9 * 64
    f4 = {"kernel": 4, "padding": 1}  # 15x15 outputs
    assert (count("winograd", **f4), count("winograd2", **f4)) == (16 * 49, 64 * 25)
    s2 = {"kernel": 3, "stride": 2, "padding": 1}
    assert (count("winograd", **s2), count("winograd2", **s2)) == (4 * 81, 16 * 25)
    s4 = {"kernel": 4, "stride": 2, "padding": 1}
    assert (count("winograd", **s4), count("winograd2", **s4)) == (4 * 100, 16 * 36)
    t3 = {"kernel": 3, "stride": 2, "padding": 1, "transposed": True, "output_padding": 1}
    assert (count("winograd", **t3), count("winograd2", **t3)) == (16 * 81, 64 * 25)
    t4 = {"kernel": 4, "stride": 2, "padding": 1, "transposed": True}
    assert (count("winograd", **t4), count("winograd2", **t4)) == (16 * 100, 64 * 36)
    for shape, taps in ((s1, 9 * 256), (s2, 9 * 64), (s4, 16 * 64), (t3, 9 * 256), (t4, 16 * 256)):
        assert count("direct", **shape) == taps


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_nan_and_infinity_propagate(
    cpu_level: str, buffers: Alloc, case: Case, algorithm: str, poison: float
) -> None:
    case = replace(case, input_act="none")
    layer = Layer(case, buffers)
    layer.x[-1][-1, -1, case.height // 2, case.width - 2] = poison
    exact = layer.reference(torch.float64)
    result = layer.run(algorithm)
    assert (~exact.isfinite()).any() and exact.isfinite().any()
    if not case.filtered(algorithm):
        assert torch.equal(result.out.isnan(), exact.isnan())
        assert torch.equal(result.out.isposinf(), exact.isposinf())
    else:
        assert (result.out.isnan() | ~exact.isnan()).all()
        assert (~result.out.isfinite() | exact.isfinite()).all()
    assert result.out[: case.images - 1].isfinite().all()  # other images do not see it
    relu = Layer(replace(case, act="relu", dtype=torch.bfloat16, input_act="relu"), buffers)
    if poison != poison:
        relu.x[-1][-1, -1, case.height // 2, case.width - 2] = poison
        assert (relu.run(algorithm).out.isnan() | ~exact.isnan()).all()


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_a_bad_weight_stays_in_its_channel(
    cpu_level: str, buffers: Alloc, case: Case, algorithm: str
) -> None:
    layer = Layer(case, buffers)
    layer.weight.select(1 if case.transposed else 0, 1)[0, 1, 1] = float("nan")
    assert layer.bias is not None
    layer.bias[0] = float("inf")
    out = layer.run(algorithm).out
    exact = layer.reference(torch.float64)
    assert (out[:, 1].isnan() | ~exact[:, 1].isnan()).all() and out[:, 1].isnan().any()
    assert out[:, 0].isposinf().all() and out[:, 2:].isfinite().all()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_same_bits_with_any_number_of_threads(
    buffers: Alloc, threads: Callable[[int], None], case: Case, algorithm: str
) -> None:
    layer = Layer(replace(case, block=7, group=16), buffers)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(layer.run(algorithm))
    for other in results[1:]:
        assert torch.equal(other.out, results[0].out)
        assert torch.equal(other.count, results[0].count)
        channels = case.out_channels
        mine, first = other.partial[..., :channels], results[0].partial[..., :channels]
        assert torch.equal(mine.view(torch.int32), first.view(torch.int32))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_fork(buffers: Alloc, threads: Callable[[int], None]) -> None:
    """As in a DataLoader's worker: the thread pool of the parent is not there any more."""
    threads(2)
    layer = Layer(CASES[0], buffers)
    out = strided(buffers, (2, 24, *CASES[0].out_size), "padded", torch.float32)
    call = layer.call(out)
    number = ALGORITHMS.index("winograd")
    info = _C.conv_info(number, call)
    packed, workspace = buffers(info["packed_floats"]), buffers(info["workspace_bytes"], dtype=torch.uint8)
    _C.conv_pack(number, call, packed.data_ptr())
    call |= {"packed": packed.data_ptr(), "workspace": workspace.data_ptr()}
    _C.run_conv(number, call)
    before = out.numpy().copy()
    out.fill_(0)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        _C.run_conv(number, call)
        os._exit(0 if (out.numpy() == before).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    _C.run_conv(number, call)
    assert (out.numpy() == before).all()
