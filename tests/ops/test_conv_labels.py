"""Convolutions of inputs that are one vector for each label over large parts: computed once and copied."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from p2pfast import _C
from p2pfast.ops.conv.op import ALGORITHMS
from tests.ops.test_conv_kernels import Alloc, Case, Layer, Result, check

CASES = [
    Case(2, 41, 50, (20,), 24, 3, 2, 1),
    Case(1, 64, 33, (5,), 40, 4, 2, 1, padding_mode="reflect"),
    Case(1, 40, 26, (24,), 17, 3, padding=1, padding_mode="reflect"),
    Case(1, 25, 25, (3,), 3, 3, 2, 0),
]
# Outputs of a tile, and its window's step, size and origin without padding, in each dimension.
SCHEMES = {
    ("winograd", 3, 1): (4, 4, 6),
    ("winograd2", 3, 1): (2, 2, 4),
    ("winograd6", 3, 1): (6, 6, 8),
    ("winograd", 3, 2): (4, 8, 9),
    ("winograd2", 3, 2): (2, 4, 5),
    ("winograd", 4, 2): (4, 8, 10),
    ("winograd2", 4, 2): (2, 4, 6),
}


def regions(case: Case, labels: int, size: int) -> Tensor:
    """(images, height, width) squares of labels, with a diagonal of pixels that have none."""
    rows, columns = -(-case.height // size), -(-case.width // size)
    few = torch.randint(0, labels, (case.images, rows, columns))
    if labels > 64:
        few = (torch.arange(rows * columns) % labels).view(1, rows, columns).expand(case.images, -1, -1)
    full = few.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, : case.height, : case.width].clone()
    y, x = torch.meshgrid(torch.arange(case.height), torch.arange(case.width), indexing="ij")
    full[:, (y - x).abs() % 37 == 30] = 255
    return full.to(torch.uint8)


def fill(layer: Layer, uniform: Tensor) -> None:
    """Gives every pixel of a label that label's values; those without a label keep theirs."""
    x = layer.x[0]
    table = torch.randn(256, x.shape[1]).to(x.dtype)
    values = table[uniform.long()].permute(0, 3, 1, 2)
    x.copy_(torch.where((uniform != 255)[:, None], values, x))


def tiles_of(uniform: Tensor, case: Case, algorithm: str) -> Tensor:
    """What out_uniform must hold: the label of tiles whose window lies inside the image and holds one."""
    outputs, step, window = SCHEMES[algorithm, case.kernel, case.stride]
    height, width = case.out_size
    expected = torch.full((case.images, height, width), 255, dtype=torch.uint8)
    for y in range(0, height - outputs + 1, outputs):
        for x in range(0, width - outputs + 1, outputs):
            top, left = y // outputs * step - case.padding, x // outputs * step - case.padding
            if min(top, left) < 0 or top + window > case.height or left + window > case.width:
                continue
            seen = uniform[:, top : top + window, left : left + window].flatten(1)
            same = (seen == seen[:, :1]).all(1)
            expected[:, y : y + outputs, x : x + outputs] = torch.where(same, seen[:, 0], 255)[:, None, None]
    return expected


def both(layer: Layer, algorithm: str, uniform: Tensor, alloc: Alloc) -> tuple[Result, Result, Tensor]:
    given = alloc(*uniform.shape, dtype=torch.uint8)
    given.copy_(uniform)
    out_uniform = alloc(layer.case.images, *layer.case.out_size, dtype=torch.uint8)
    skipped = layer.run(algorithm, {"uniform": given.data_ptr(), "out_uniform": out_uniform.data_ptr()})
    return layer.run(algorithm), skipped, out_uniform


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [(c, a) for c in CASES for a in ("winograd", "winograd2", "winograd6") if c.supports(a)],
    ids=str,
)
@pytest.mark.parametrize(("labels", "size"), [(3, 23), (90, 6), (1, 100)])
def test_equals_the_convolution_of_every_tile(
    cpu_level: str, buffers: Alloc, case: Case, algorithm: str, labels: int, size: int
) -> None:
    for variant in (case, replace(case, block=7, dtype=torch.bfloat16, out_layout="dense", act="relu")):
        layer = Layer(variant, buffers)
        uniform = regions(case, labels, size)
        fill(layer, uniform)
        plain, skipped, out_uniform = both(layer, algorithm, uniform, buffers)
        check(layer, algorithm, skipped)
        assert torch.equal(skipped.out, plain.out)
        for a, b in zip(skipped.statistics(), plain.statistics(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(out_uniform, tiles_of(uniform, case, algorithm))
        assert (out_uniform != 255).any() or labels == 90


def test_a_chain_and_bad_values(cpu_level: str, buffers: Alloc) -> None:
    """The map of the output serves the next layer; a NaN stays with its label."""
    first = Case(1, 64, 96, (16,), 16, 3, 2, 1, norm=False, bias=None)
    layer = Layer(first, buffers)
    uniform = torch.zeros(1, 64, 96, dtype=torch.uint8)
    uniform[:, :, 48:] = 7
    fill(layer, uniform)
    layer.x[0][:, 2, :, 48:] = float("nan")
    plain, skipped, between = both(layer, "winograd", uniform, buffers)
    assert torch.equal(skipped.out.isnan(), plain.out.isnan())
    assert not skipped.out[..., :24].isnan().any() and skipped.out[..., 28:].isnan().all()
    second = Layer(replace(first, height=32, width=48), buffers)
    second.x[0].copy_(skipped.out)
    plain, skipped, after = both(second, "winograd", between, buffers)
    assert torch.equal(skipped.out.isnan(), plain.out.isnan())
    assert torch.equal(skipped.out.nan_to_num(), plain.out.nan_to_num())
    assert after.unique().tolist() == [0, 7, 255]


@pytest.mark.parametrize("algorithm", ["winograd", "direct", "thin"])
def test_what_cannot_copy_computes_everything(buffers: Alloc, algorithm: str) -> None:
    case = Case(1, 20, 20, (5,), 3, 3, padding=1, out_layout="nchw", dtype=torch.float32)
    layer = Layer(case, buffers)
    uniform = torch.zeros(1, 20, 20, dtype=torch.uint8)
    fill(layer, uniform)
    skipped = layer.run(algorithm, {"uniform": uniform.data_ptr()})
    check(layer, algorithm, skipped)
    assert torch.equal(skipped.out, layer.run(algorithm).out)


def test_a_map_of_the_output_needs_one_of_the_input(buffers: Alloc) -> None:
    layer = Layer(Case(1, 8, 8, (5,), 3, 3, padding=1), buffers)
    made = buffers(1, 8, 8, dtype=torch.uint8)
    for algorithm, given in (("winograd", 0), ("direct", made.data_ptr())):
        with pytest.raises(ValueError, match="out_uniform needs uniform"):
            layer.run(algorithm, {"uniform": given, "out_uniform": made.data_ptr()})
    assert _C.conv_info(ALGORITHMS.index("winograd"), layer.call(layer.x[0]))["refuses"] is None
