"""The data gradient's native kernel against float64, and where training takes it."""

from __future__ import annotations

import pytest
import torch

from p2pfast import _C
from p2pfast.ops.conv_norm_act import convolution, on_cpu
from p2pfast.ops.conv_norm_act.geometry import Geometry
from p2pfast.ops.data_gradient import data_gradient, data_gradient_reference

LAYERS = [  # images, inputs, outputs, height, width, padding, mode
    (1, 16, 16, 8, 8, 1, "reflect"),
    (2, 18, 20, 17, 33, 1, "reflect"),
    (3, 5, 7, 5, 7, 1, "replicate"),
    (1, 70, 33, 2, 3, 1, "reflect"),
    (2, 130, 40, 9, 6, 2, "reflect"),
    (1, 3, 300, 1, 1, 1, "replicate"),
    (2, 66, 1, 1, 6, 3, "replicate"),
    (5, 33, 9, 40, 44, 1, "zeros"),  # more images than one pass takes
    (1, 17, 65, 6, 5, 0, "zeros"),
    (2, 1, 4, 4, 9, 2, "zeros"),
    (1, 20, 6, 3, 4, 3, "zeros"),
]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_reference(dtype: torch.dtype, weights: torch.dtype, cpu_level: str) -> None:
    """At any number of threads with the same bits."""
    for images, inputs, outputs, height, width, padding, mode in LAYERS:
        size, grown = (images, inputs, height, width), 2 * padding - 2
        weight = torch.randn(outputs, inputs, 3, 3).to(weights)
        grad = torch.randn(images, outputs, height + grown, width + grown).to(dtype)
        grad = grad.contiguous(memory_format=torch.channels_last)
        expected = data_gradient_reference(grad, weight, size, padding, mode)
        found, before = [], torch.get_num_threads()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                found.append(data_gradient(grad, weight, size, padding, mode))
            finally:
                torch.set_num_threads(before)
        got = found[0]
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, found[1])
        tolerance = 5e-6 if dtype == torch.float32 else 3e-3
        assert (got.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_training_takes_it_for_few_padded_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_cpu, "_multiplies_pairs", lambda _: False)
    geometry = Geometry(1, 1, 0, False, mode)
    grad = torch.randn(2, 20, 6, 9).contiguous(memory_format=torch.channels_last)
    weight, size = torch.randn(20, 24, 3, 3), torch.Size((2, 24, 6, 9))
    ways = convolution.data_gradient_ways(grad, size, weight, geometry)
    own = ["streamed2", "streamed" if mode == "zeros" else "adjoint"]
    assert [way.__name__ for way in ways][-2:] == own
    expected = data_gradient_reference(grad, weight, size, 1, mode)
    for way in ways:  # each folds the padding
        assert (way().double() - expected).norm() <= 5e-6 * expected.norm()


def test_refusals() -> None:
    grad = torch.randn(1, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="needs 3x3"):
        data_gradient(grad, torch.randn(4, 4, 4, 4), (1, 4, 9, 9), 1, "zeros")
    with pytest.raises(ValueError, match="all of the output"):
        data_gradient(grad, torch.randn(4, 4, 3, 3), (1, 4, 9, 8), 1, "reflect")
    wide = torch.randn(1, 1, 260, 260).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="fewer pixels"):
        data_gradient(wide, torch.randn(1, 1, 3, 3), (1, 1, 260, 260), 1, "reflect")
    with pytest.raises(ValueError, match="need an address"):
        call = {"images": 1, "height": 8, "width": 8, "out_height": 8, "out_width": 8, "out_channels": 4}
        call |= {"kernel_h": 3, "kernel_w": 3, "pad_top": 1, "pad_left": 1}
        call |= {"weight_out_stride": 36, "weight_in_stride": 9}
        place = {"data": 0, "image_stride": 256, "row_stride": 32, "pixel_stride": 4}
        _C.Program().data_gradient({**call, "sources": [{**place, "channels": 4}], "out": place}, place)
