from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.instance_edges import instance_edges
from p2pfast.ops.label_conv import label_conv, label_conv_reference
from p2pfast.ops.label_conv.cuda import LabelConvGeometry, convolve_labels, pack_tables

GUARD = 256
EPS = torch.finfo(torch.float32).eps


@dataclass
class Case:
    """Labels in blocks (with windows of one label) or a pixel each, and weights with an offset bias."""

    batch: int = 1
    height: int = 8
    width: int = 8
    classes: int = 5
    cout: int = 16
    kernel: int = 7
    pool_levels: int = 0
    padding_mode: str = "reflect"
    has_edges: bool = True
    block: int = 1
    edge_share: float = 0.02
    bias: float | None = 3.0

    def make(self) -> dict[str, Any]:
        size = (self.batch, -(-self.height // self.block), -(-self.width // self.block))
        labels = torch.randint(0, self.classes, size, dtype=torch.uint8)
        labels = labels.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)
        labels = labels[:, : self.height, : self.width].contiguous()
        edges = (torch.rand(labels.shape) < self.edge_share).to(torch.uint8) if self.has_edges else None
        weight = torch.randn(self.cout, self.classes + self.has_edges, self.kernel, self.kernel)
        return {
            "labels": labels,
            "edges": edges,
            "weight": weight,
            "bias": None if self.bias is None else torch.randn(self.cout) + self.bias,
            "num_classes": self.classes,
            "pool_levels": self.pool_levels,
            "padding_mode": self.padding_mode,
        }


CASES = {
    "7x7": Case(height=9, width=70, cout=20),
    "7x7 blocks": Case(height=40, width=205, block=16, classes=9, cout=32),
    "no edges": Case(height=24, width=130, block=16, has_edges=False),
    "no bias": Case(height=24, width=66, block=16, bias=None),
    "batch": Case(batch=3, height=21, width=67, block=12, cout=33),
    "many channels": Case(height=12, width=65, cout=112, block=10),
    "3x3": Case(height=19, width=131, kernel=3, block=8),
    "5x5 zeros": Case(height=19, width=131, kernel=5, block=9, padding_mode="zeros"),
    "1x1": Case(height=5, width=66, kernel=1, block=4),
    "smallest reflection": Case(height=4, width=4, block=4, edge_share=0),
    "7x7 zeros": Case(batch=2, height=30, width=129, block=16, padding_mode="zeros"),
    "one pixel": Case(height=1, width=1, padding_mode="zeros"),
    "one row": Case(height=1, width=150, padding_mode="zeros", block=20),
    "one column": Case(height=90, width=1, padding_mode="zeros", block=20),
    "256 classes": Case(height=8, width=64, classes=256, cout=5, kernel=3),
    "one class": Case(height=12, width=75, classes=1, edge_share=0.01),
    "pooled": Case(height=40, width=210, pool_levels=1, block=16, cout=64, classes=9),
    "pooled pixels": Case(batch=2, height=15, width=131, pool_levels=1, cout=17),
    "pooled no edges": Case(height=40, width=133, pool_levels=1, block=16, has_edges=False),
    "pooled zeros": Case(
        batch=2, height=21, width=1050, pool_levels=1, block=12, padding_mode="zeros", kernel=5
    ),
    "pooled one pixel": Case(height=2, width=1, pool_levels=1, padding_mode="zeros"),
    "pooled twice": Case(batch=2, height=51, width=165, pool_levels=2, block=16, cout=40),
    "pooled twice, long lists": Case(height=27, width=33, pool_levels=2, classes=256, cout=18),
    "pooled three times": Case(height=33, width=80, pool_levels=3, padding_mode="zeros", kernel=3, block=5),
}


def assert_close(y: Tensor, inputs: dict[str, Any]) -> None:
    """At most twice the error of PyTorch's float32 convolution against the reference in float64."""
    double: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    exact = label_conv_reference(**double)
    eager = label_conv_reference(**inputs)
    assert y.shape == exact.shape
    allowed = 2 * (eager - exact).abs().max() + 4 * EPS * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(cpu_level: str, case: Case) -> None:
    inputs = case.make()
    y = label_conv(**inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, inputs)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.sampled_from([1, 3, 5, 7]))
    padding_mode = draw(st.sampled_from(["reflect", "zeros"]))
    pool_levels = draw(st.integers(0, 2))
    smallest = (kernel // 2 << pool_levels) + 1 if padding_mode == "reflect" else 1
    case = Case(
        batch=draw(st.integers(1, 2)),
        height=draw(st.integers(smallest, smallest + 12)),
        width=draw(st.integers(smallest, smallest + 80)),
        classes=draw(st.integers(1, 12)),
        cout=draw(st.integers(1, 18)),
        kernel=kernel,
        pool_levels=pool_levels,
        padding_mode=padding_mode,
        has_edges=draw(st.booleans()),
        block=draw(st.integers(1, 20)),
        edge_share=draw(st.sampled_from([0, 0.01, 0.3])),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    inputs = case.make()
    assert_close(label_conv(**inputs), inputs)


def test_other_integer_dtypes_and_strides() -> None:
    inputs = Case(height=12, width=40, block=5).make()
    expected = label_conv(**inputs)
    for dtype in (
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.int32,
        torch.uint32,
        torch.int64,
        torch.uint64,
    ):
        assert torch.equal(label_conv(**{**inputs, "labels": inputs["labels"].to(dtype)}), expected)
    turned = {k: inputs[k].transpose(1, 2).contiguous().transpose(1, 2) for k in ("labels", "edges")}
    turned["edges"] = turned["edges"] != 0
    turned["weight"] = inputs["weight"].to(memory_format=torch.channels_last)
    assert torch.equal(label_conv(**{**inputs, **turned}), expected)


def test_any_nonzero_byte_is_an_edge() -> None:
    for pool_levels in (0, 1):
        inputs = Case(height=20, width=40, edge_share=0.3, pool_levels=pool_levels).make()
        expected = label_conv(**inputs)
        scaled = inputs["edges"] * torch.randint(1, 256, inputs["edges"].shape, dtype=torch.uint8)
        assert torch.equal(label_conv(**{**inputs, "edges": scaled}), expected)


def test_double_and_half_weights_are_used_as_float() -> None:
    inputs = Case().make()
    half = {**inputs, "weight": inputs["weight"].half(), "bias": inputs["bias"].bfloat16()}
    single = {**inputs, "weight": half["weight"].float(), "bias": half["bias"].float()}
    assert torch.equal(label_conv(**half), label_conv(**single))


def test_bfloat16_is_the_rounded_float32(cpu_level: str) -> None:
    for name in ("batch", "many channels", "pooled", "7x7 zeros"):
        inputs = CASES[name].make()
        y = label_conv(**inputs, dtype=torch.bfloat16)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, label_conv(**inputs).bfloat16())


def test_weights_of_absent_labels_do_not_matter() -> None:
    inputs = Case(height=12, width=80, block=8).make()
    inputs["labels"].clamp_(max=2)
    expected = label_conv(**inputs)
    inputs["weight"][:, 3:5] = torch.nan
    assert torch.equal(label_conv(**inputs), expected)


def test_empty_batch() -> None:
    inputs = Case(batch=0).make()
    assert label_conv(**inputs).shape == (0, 16, 8, 8)


def guarded(size: int) -> tuple[Tensor, Tensor]:
    """Bytes of 0xFF (NaN in every floating-point format) with a guard on both sides; all, and the middle."""
    whole = torch.full((size + 2 * GUARD,), 255, dtype=torch.uint8)
    return whole, whole[GUARD : GUARD + size]


def run_native(inputs: dict[str, Any], dtype: torch.dtype, band_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel on poisoned buffers: NHWC output with padding lanes, statistics and the uniform map."""
    labels, edges, weight = inputs["labels"], inputs["edges"], inputs["weight"]
    shape = _C.LabelConvShape(
        batch=labels.shape[0],
        height=labels.shape[1],
        width=labels.shape[2],
        classes=inputs["num_classes"],
        has_edges=edges is not None,
        cout=weight.shape[0],
        kernel=weight.shape[2],
        pool_levels=inputs["pool_levels"],
        reflect=inputs["padding_mode"] == "reflect",
        band_rows=band_rows,
    )
    layout = _C.LabelConvLayout(shape)
    packed_all, packed = guarded(layout.packed_floats * 4)
    out_all, out = guarded(layout.output_elements * dtype.itemsize)
    partials_all, partials = guarded(layout.partial_floats * 4)
    uniform_all, uniform = guarded(layout.uniform_bytes)
    scratch_all, scratch = guarded(layout.scratch_bytes)
    bias = inputs["bias"]
    _C.label_conv_pack(
        shape,
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        packed=packed.data_ptr(),
    )
    _C.label_conv(
        shape,
        labels=labels.data_ptr(),
        edges=0 if edges is None else edges.data_ptr(),
        packed=packed.data_ptr(),
        out=out.data_ptr(),
        out_bf16=dtype == torch.bfloat16,
        scratch=scratch.data_ptr(),
        partials=partials.data_ptr() if band_rows else 0,
        uniform=uniform.data_ptr(),
    )
    for whole in (packed_all, out_all, partials_all, uniform_all, scratch_all):
        assert (whole[:GUARD] == 255).all() and (whole[-GUARD:] == 255).all()
    size = (labels.shape[0], layout.out_height, layout.out_width)
    return (
        out.view(dtype).view(*size, layout.stride),
        partials.view(torch.float32).view(labels.shape[0], layout.bands, 2, layout.stride),
        uniform.view(size),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["batch", "7x7 zeros", "pooled zeros", "pooled pixels", "one pixel", "1x1"])
def test_poisoned_buffers(cpu_level: str, name: str, dtype: torch.dtype) -> None:
    inputs = CASES[name].make()
    out, _, _ = run_native(inputs, dtype, band_rows=0)
    cout = inputs["weight"].shape[0]
    assert (out[..., cout:] == 0).all()
    assert torch.equal(out[..., :cout].permute(0, 3, 1, 2), label_conv(**inputs, dtype=dtype))


@pytest.mark.parametrize("band_rows", [1, 4, 7, 1000])
@pytest.mark.parametrize("name", ["7x7", "batch", "7x7 blocks", "pooled", "1x1", "one pixel", "pooled zeros"])
def test_statistics(cpu_level: str, name: str, band_rows: int) -> None:
    inputs = CASES[name].make()
    inputs["bias"] += 1000  # a mean far above the deviation
    out, partials, _ = run_native(inputs, torch.float32, band_rows)
    rounded, same, _ = run_native(inputs, torch.bfloat16, band_rows)
    assert torch.equal(same, partials)
    for band, rows in enumerate(out.double().split(band_rows, 1)):
        values = rows.flatten(1, 2)
        mean = values.mean(1)
        m2 = ((values - mean[:, None]) ** 2).sum(1)
        torch.testing.assert_close(partials[:, band, 0].double(), mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(partials[:, band, 1].double(), m2, rtol=1e-4, atol=1e-7)


def test_statistics_with_an_outlier_first() -> None:
    inputs = Case(height=8, width=700, classes=3, kernel=1, has_edges=False, cout=16).make()
    inputs["weight"][:] = torch.tensor([1e3, 0.0, 0.01]).view(1, 3, 1, 1)
    inputs["labels"].clamp_(min=1)[0, 0, 0] = 0
    inputs["edges"] = torch.ones_like(inputs["labels"])  # nothing is uniform: all is accumulated
    inputs["weight"] = torch.cat([inputs["weight"], torch.zeros(16, 1, 1, 1)], 1)
    out, partials, _ = run_native(inputs, torch.float32, band_rows=1)
    m2 = ((out.double() - out.double().mean(2, keepdim=True)) ** 2).sum(2)
    torch.testing.assert_close(partials[:, :, 1].double(), m2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        CASES["7x7 blocks"],
        CASES["7x7 zeros"],
        CASES["1x1"],
        Case(height=90, width=301, block=40, pool_levels=1, edge_share=1e-3),
        Case(batch=2, height=91, width=203, block=30, pool_levels=1, edge_share=1e-3, padding_mode="zeros"),
        Case(height=120, width=300, block=70, pool_levels=2, edge_share=1e-4),
    ],
    ids=str,
)
def test_uniform_map(cpu_level: str, case: Case) -> None:
    inputs = case.make()
    _, _, uniform = run_native(inputs, torch.float32, band_rows=0)
    # A window is uniform if the convolution with a filter of ones sees one label everywhere.
    ones = torch.ones(1, 1, case.kernel, case.kernel, dtype=torch.float64)
    expected = torch.full_like(uniform, 255)
    edges = inputs["edges"].bool()
    for label in range(case.classes):
        here = ((inputs["labels"] == label) & ~edges).double()[:, None]
        for _ in range(case.pool_levels):
            here = torch.nn.functional.avg_pool2d(here, 3, 2, 1, count_include_pad=False)
        here = (here == 1).double()
        mode = "reflect" if case.padding_mode == "reflect" else "constant"
        padded = torch.nn.functional.pad(here, [case.kernel // 2] * 4, mode=mode)
        count = torch.nn.functional.conv2d(padded, ones)[:, 0]
        expected[count == case.kernel**2] = label
    assert (expected != 255).any()
    assert torch.equal(uniform, expected)


def test_same_result_with_any_number_of_threads() -> None:
    inputs = CASES["pooled zeros"].make()
    before = _C.num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            _C.set_num_threads(threads)
            results.append(run_native(inputs, torch.float32, band_rows=3))
    finally:
        _C.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_output_written_around_the_cache(cpu_level: str) -> None:
    for dtype, width in ((torch.float32, 460), (torch.bfloat16, 920)):
        inputs = Case(batch=2, height=300, width=width, cout=10, classes=3, kernel=3, block=60).make()
        both, _, _ = run_native(inputs, dtype, band_rows=0)
        for image in range(2):
            half = {**inputs, "labels": inputs["labels"][image, None], "edges": inputs["edges"][image, None]}
            single, _, _ = run_native(half, dtype, band_rows=0)
            assert single.nbytes < 16 << 20 < both.nbytes
            assert torch.equal(both[image], single[0])


@pytest.mark.parametrize("name", ["batch", "pooled pixels"])
def test_opcheck(name: str) -> None:
    inputs = CASES[name].make()
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.p2pfast.label_conv.default, tuple(inputs.values()), {"dtype": dtype})


def test_no_gradient() -> None:
    inputs = Case().make()
    inputs["weight"].requires_grad_()
    with torch.no_grad():
        assert not label_conv(**inputs).requires_grad
    with pytest.raises(RuntimeError, match="autograd"):
        label_conv(**inputs).sum().backward()


BAD = [
    ({"labels": torch.zeros(1, 8, 8)}, TypeError, "labels has dtype torch.float32"),
    ({"labels": torch.zeros(8, 8, dtype=torch.uint8)}, ValueError, r"labels has shape \(8, 8\)"),
    (
        {"labels": torch.zeros(1, 0, 8, dtype=torch.uint8), "edges": None},
        ValueError,
        "at least 1|num_classes",
    ),
    ({"labels": torch.full((1, 8, 8), 5, dtype=torch.uint8)}, ValueError, "to 5; with num_classes=5"),
    ({"labels": torch.full((1, 8, 8), -1)}, ValueError, "from -1"),
    ({"labels": torch.full((1, 8, 8), 257)}, ValueError, "to 257"),
    ({"edges": torch.zeros(1, 8, 8)}, TypeError, "edges has dtype"),
    ({"edges": torch.zeros(1, 8, 9, dtype=torch.uint8)}, ValueError, "edges has shape"),
    ({"edges": None}, ValueError, r"\(out_channels, 5, kernel, kernel\)"),
    ({"num_classes": 257}, ValueError, "num_classes is 257"),
    ({"num_classes": 4}, ValueError, "weight has shape"),
    ({"weight": torch.zeros(16, 6, 7, 5)}, ValueError, "weight has shape"),
    ({"weight": torch.zeros(16, 6, 4, 4)}, ValueError, "kernel of 4"),
    ({"weight": torch.zeros(16, 6, 9, 9)}, ValueError, "kernel of 9"),
    ({"weight": torch.zeros(0, 6, 7, 7)}, ValueError, "no output channels"),
    ({"weight": torch.zeros(16, 6, 7, 7, dtype=torch.int32)}, TypeError, "weight has dtype"),
    ({"bias": torch.zeros(15)}, ValueError, "bias has shape"),
    ({"bias": torch.zeros(16, dtype=torch.int64)}, TypeError, "bias has dtype"),
    ({"pool_levels": -1}, ValueError, "pool_levels is -1"),
    ({"pool_levels": 9}, ValueError, "pool_levels is 9"),
    ({"pool_levels": 2}, ValueError, "pooled map of 2x2 is too small"),
    ({"padding_mode": "same"}, ValueError, "padding_mode is 'same'"),
    ({"dtype": torch.float16}, TypeError, "dtype is torch.float16"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        label_conv(**{**Case().make(), **change})


def test_too_small_for_reflection_as_in_torch() -> None:
    for height, width in ((3, 9), (9, 3), (1, 1)):
        inputs = Case(height=height, width=width).make()
        with pytest.raises(RuntimeError):
            label_conv_reference(**inputs)
        with pytest.raises(ValueError, match="too small for reflection padding of 3"):
            label_conv(**inputs)


def test_native_checks() -> None:
    good = {"batch": 1, "height": 8, "width": 8, "classes": 5, "has_edges": True, "cout": 16, "kernel": 7}
    for field, value, message in [
        ("classes", 0, "classes is 0"),
        ("classes", 257, "classes is 257"),
        ("kernel", 6, "kernel is 6"),
        ("kernel", 9, "kernel is 9"),
        ("height", 0, "height is 0"),
        ("width", 3, "smaller side is 3"),
        ("batch", -1, "batch is -1"),
        ("cout", 0, "cout is 0"),
        ("pool_levels", 9, "pool_levels is 9"),
        ("band_rows", -1, "band_rows is -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.LabelConvShape(**{**good, field: value})
    shape = _C.LabelConvShape(**good)
    buffers = {"labels": 64, "edges": 64, "packed": 64, "out": 64, "out_bf16": False, "scratch": 64}
    for change, message in [
        ({"edges": 0}, "edges are to be given"),
        ({"labels": 0}, "labels is null"),
        ({"scratch": 0}, "scratch is null"),
        ({"scratch": 65}, "aligned"),
        ({"partials": 64}, "band_rows"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.label_conv(shape, **{**buffers, **change})


@pytest.mark.parametrize("count", [0, 1, 63, 64, 1000, (1 << 18) + 5])
def test_max_label(cpu_level: str, count: int) -> None:
    labels = torch.randint(0, 200, (count,), dtype=torch.uint8)
    for at in {0, count // 2, count - 1} & set(range(count)):
        changed = labels.clone()
        changed[at] = 255
        assert _C.label_conv_max_label(labels=changed.data_ptr(), count=count) == 255
    expected = int(labels.max()) if count else 0
    assert _C.label_conv_max_label(labels=labels.data_ptr() if count else 0, count=count) == expected


def on_cuda(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}


@pytest.mark.gpu
class TestCuda:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_matches_the_reference(self, case: Case) -> None:
        inputs = case.make()
        y = label_conv(**on_cuda(inputs))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y.cpu(), inputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", ["batch", "many channels", "pooled", "7x7 zeros"])
    def test_small_dtypes_are_the_rounded_float32(self, name: str, dtype: torch.dtype) -> None:
        inputs = on_cuda(CASES[name].make())
        assert torch.equal(label_conv(**inputs, dtype=dtype), label_conv(**inputs).to(dtype))

    @pytest.mark.parametrize(
        "name", ["7x7 blocks", "batch", "many channels", "pooled", "pooled zeros", "1x1"]
    )
    def test_statistics_edges_from_ids_and_slices(self, name: str) -> None:
        inputs = on_cuda(CASES[name].make())
        weight = inputs["weight"]
        ids = torch.randint(0, 3, inputs["labels"].shape, dtype=torch.int64).cuda() << 40
        inputs["edges"] = instance_edges(ids)
        expected = label_conv(**inputs)
        cout = expected.shape[1]
        geometry = LabelConvGeometry(
            inputs["num_classes"], cout, weight.shape[-1], inputs["pool_levels"], inputs["padding_mode"]
        )
        tables = pack_tables(weight, inputs["bias"] + 1000, geometry, True)
        whole = torch.full((expected.shape[0], cout + 12, *expected.shape[2:]), torch.nan).cuda()
        whole = whole.to(memory_format=torch.channels_last)
        labels = inputs["labels"].to(torch.int16)
        result = convolve_labels(
            labels, None, ids, tables, geometry, out=whole[:, 4 : 4 + cout], statistics=True
        )
        torch.testing.assert_close(result.image, expected + 1000, rtol=1e-6, atol=0)
        assert whole[:, :4].isnan().all() and whole[:, 4 + cout :].isnan().all()
        assert result.partials is not None and result.counts is not None
        count = result.counts.double()[None, :, None]
        mean, m2 = result.partials.double().unbind(2)
        image = result.image.double().flatten(2)
        total = count.sum()
        assert total == image.shape[2]
        centre = (mean * count).sum(1) / total
        torch.testing.assert_close(centre, image.mean(2), rtol=1e-6, atol=0)
        all_m2 = (m2 + count * (mean - centre[:, None]) ** 2).sum(1)
        torch.testing.assert_close(all_m2, ((image - centre[..., None]) ** 2).sum(2), rtol=1e-3, atol=1e-6)
        again = convolve_labels(labels, None, ids, tables, geometry, statistics=True)
        assert again.partials is not None and torch.equal(again.partials, result.partials)

    def test_labels_out_of_range(self) -> None:
        inputs = on_cuda(CASES["7x7 blocks"].make())
        inputs["labels"][0, 20, 100] = 200
        with pytest.raises(ValueError, match="labels has values from 0 to 200"):
            label_conv(**inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = label_conv(**inputs)
        graph.replay()
        assert y[:, :, 17:24, 97:104].isnan().all() and not y[:, :, :17].isnan().any()
