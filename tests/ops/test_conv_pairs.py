"""Products of bfloat16 pairs, at every level: the emulation is exact, so it stands for the instruction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import RUNNABLE_LEVELS, TESTED_LEVELS
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.op import ALGORITHMS
from tests.ops.conftest import Buffers
from tests.ops.test_conv_kernels import CASES, KINDS, Alloc, Case, Layer, errors, name

PAIRS: dict[str, Any] = {"packed_dtype": 2}
PAIRED = ("direct", "winograd", "winograd2", "streamed", "streamed2")
SMALL_TILES = ("direct", "winograd2", "streamed2")  # what the planner uses unless accuracy is "fast"
COMBINATIONS = [(c, a) for c in CASES for a in PAIRED if c.supports(a)]
KIND_COMBINATIONS = [(c, a) for c in KINDS for a in PAIRED if c.supports(a)]


def allowed(layer: Layer, algorithm: str, exact: Tensor) -> float:
    """Twice the error of PyTorch in bfloat16.

    More for what the planner uses only if accuracy is "fast", large tiles, and what it never uses, tiles of
    4x4 kernels with stride 1.
    """
    eager = errors(layer.reference(torch.bfloat16), exact)
    wild = algorithm != "direct" and (layer.case.kernel, layer.case.stride) == (4, 1)
    factor = 12 if wild else 2 if algorithm in SMALL_TILES else 5
    return factor * max(eager, 2e-3)


@pytest.mark.parametrize(("case", "algorithm"), COMBINATIONS, ids=name)
def test_within_the_error_policy_of_bfloat16(
    cpu_level: str, buffers: Alloc, case: Case, algorithm: str
) -> None:
    layer = Layer(replace(case, dtype=torch.bfloat16, weight_dtype=torch.bfloat16), buffers)
    exact = layer.reference(torch.float64)
    for block, group in ((0, 0), (7, 16)):
        layer.case = replace(layer.case, block=block, group=group)
        out = layer.run(algorithm, PAIRS).out
        assert out.isfinite().all() and errors(out, exact) <= allowed(layer, algorithm, exact)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_direct_is_exact_where_nothing_is_rounded(cpu_level: str, buffers: Alloc, case: Case) -> None:
    """Small integers: every product and every sum is exact, whatever the order."""
    layer = Layer(replace(case, norm=False, input_act="none", bias=None), buffers)
    for t in (*layer.x, layer.weight):
        t.copy_(torch.randint(-8, 9, t.shape))
    assert torch.equal(layer.run("direct", PAIRS).out, layer.run("direct").out)


def test_half_the_memory() -> None:
    for case, algorithm in COMBINATIONS:
        call = Layer(case, torch.empty).call(torch.empty(1, 1, *case.out_size))
        number, channels = ALGORITHMS.index(algorithm), sum(case.channels)
        wide, pairs = (_C.conv_info(number, call | p)["packed_floats"] for p in ({}, PAIRS))
        assert wide <= 2 * pairs <= wide * (channels + 1) / channels


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_statistics(cpu_level: str, buffers: Alloc, case: Case, algorithm: str) -> None:
    """Of the float32 sums, far from zero."""
    result = Layer(replace(case, bias=1000.0, block=9), buffers).run(algorithm, PAIRS)
    values = result.out.double()
    mean, variance = result.statistics()
    assert result.count.sum(1).tolist() == [values[0, 0].numel()] * case.images
    torch.testing.assert_close(mean, values.mean((2, 3)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(variance, values.var((2, 3), correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [(5,), (7, 4), (33,)], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_reach_what_depends_on_them(
    cpu_level: str, buffers: Alloc, channels: tuple[int, ...], poison: float
) -> None:
    """Odd numbers of channels: a pair must not take its second value from the next pixel."""
    shapes = [Case(2, 7, 9, channels, 6, k, s, k // 2) for k, s in ((1, 1), (3, 1), (3, 2), (7, 1))]
    shapes += [Case(2, 6, 5, channels, 6, k, 2, 1, transposed=True) for k in (3, 4)]
    for shape in shapes:
        for at in (0, -1):
            layer = Layer(replace(shape, input_act="none"), buffers)
            layer.x[at][-1, at, shape.height // 2, shape.width - 2] = poison
            exact = layer.reference(torch.float64)
            for algorithm in filter(shape.supports, PAIRED):
                out = layer.run(algorithm, PAIRS).out
                if algorithm == "direct":
                    assert torch.equal(out.isnan(), exact.isnan())
                    assert torch.equal(out.isposinf(), exact.isposinf())
                    assert torch.equal(out.isneginf(), exact.isneginf())
                assert (~out.isfinite() | exact.isfinite()).all()
                assert out[0].isfinite().all()


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_same_bits_with_any_number_of_threads(buffers: Alloc, case: Case, algorithm: str) -> None:
    before = _C.num_threads()
    layer = Layer(replace(case, block=7, group=16), buffers)
    results = []
    for count in (1, 2, 3):
        _C.set_num_threads(count)
        results.append(layer.run(algorithm, PAIRS).out)
    _C.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results[1:])


@pytest.mark.parametrize(("case", "algorithm"), KIND_COMBINATIONS, ids=name)
def test_the_same_values_at_every_level(buffers: Alloc, case: Case, algorithm: str) -> None:
    """But for the order of additions in the transforms, and so roundings that fall to the other side."""
    layer, found = Layer(case, buffers), []
    before = _C.active_level()
    for level in RUNNABLE_LEVELS:
        _C.set_active_level(level)
        found.append(layer.run(algorithm, PAIRS).out)
    _C.set_active_level(before)
    for other in found[1:]:
        assert errors(other, found[0].double()) < 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    torch.manual_seed(draw(0, 9))
    transposed = data.draw(st.booleans())
    kernel = data.draw(st.sampled_from([1, 2, 3, 3, 3, 4, 4, 5, 7]))
    stride = draw(1, 3)
    padding = draw(0, kernel // 2)
    case = Case(
        draw(1, 2),
        draw(kernel, 14),
        draw(kernel, 14) + data.draw(st.sampled_from([0, 0, 50])),
        tuple(draw(1, 40) for _ in range(draw(1, 2))),
        draw(1, 70),
        kernel,
        stride,
        padding,
        transposed,
        output_padding=draw(0, min(1, stride - 1)) if transposed else 0,
        padding_mode="zeros" if transposed else data.draw(st.sampled_from(["zeros", "reflect", "replicate"])),
        norm=data.draw(st.booleans()),
        input_act=data.draw(st.sampled_from(["none", "relu", "leaky_relu"])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        layout=data.draw(st.sampled_from(["padded", "dense", "nchw"])),
        out_layout=data.draw(st.sampled_from(["padded", "dense", "nchw"])),
        block=data.draw(st.sampled_from([0, 5, 24, 48])),
        group=data.draw(st.sampled_from([0, 16, 64])),
    )
    if transposed and padding >= kernel or min(case.out_size) < 1:
        return
    alloc = Buffers()
    layer = Layer(case, alloc)
    exact = layer.reference(torch.float64)
    before = _C.active_level()
    _C.set_active_level(data.draw(st.sampled_from(TESTED_LEVELS)))
    try:
        for algorithm in filter(case.supports, PAIRED):
            out = layer.run(algorithm, PAIRS).out
            assert errors(out, exact) <= 2 * allowed(layer, algorithm, exact)
    finally:
        _C.set_active_level(before)
    alloc.check()
