"""Statistics, their merge, the pass that applies them, and the whole operator, against float64."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.gpu import triton_reason
from p2pfast.ops.norm import instance_norm_act, instance_norm_act_reference

if triton_reason() is None:
    from p2pfast.ops.norm import triton as kernels

LAST = torch.channels_last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small images have several parts, several tiles a part, and parts that are merged twice."""
    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    monkeypatch.setattr(kernels, "GROUP", 2)
    monkeypatch.setattr(kernels, "RESIDENT", 0)


def image(
    *shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0, device: str = "cpu"
) -> Tensor:
    x = (torch.randn(shape) + offset).to(dtype, memory_format=LAST)
    return x.to(device)


def close_to_eager(y: Tensor, exact: Tensor, eager: Tensor) -> None:
    """At most twice eager's error, and what it would be if eager happened to be exact."""
    error, allowed = (y.double() - exact).abs().max(), (eager.double() - exact).abs().max()
    floor = 4 * EPSILON[y.dtype] * exact.abs().max()
    assert error <= max(2 * allowed, floor), (float(error), float(allowed))


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(("dtype", "planes"), [(d, False) for d in DTYPES] + [(torch.float32, True)], ids=str)
def test_statistics_and_merge(
    small_tiles: None, device: str, dtype: torch.dtype, planes: bool, offset: float
) -> None:
    images, channels, height, width = shape = (2, 5, 6, 9) if not planes else (2, 1, 9, 61)
    x = image(*shape, dtype=dtype, offset=offset, device=device)
    x = x.contiguous() if planes else x
    partial, count = kernels.statistics(x, planes)
    parts = len(count)
    assert partial.shape == (images, parts, 2, channels) and parts >= 3
    assert count.sum() == height * width
    pieces = x.double().permute(0, 2, 3, 1).reshape(images, -1, channels).split(count.int().tolist(), 1)
    for i, piece in enumerate(pieces):
        torch.testing.assert_close(partial[:, i, 0].double(), piece.mean(1), rtol=1e-6, atol=1e-6)
        m2 = piece.var(1, correction=0) * piece.shape[1]
        torch.testing.assert_close(partial[:, i, 1].double(), m2, rtol=1e-5, atol=1e-5)
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    for over_batch in (False, True):
        dims = (0, 2, 3) if over_batch else (2, 3)
        variance, mean = torch.var_mean(x.double(), dims, correction=0)
        found = kernels.merge(partial, count, over_batch, 1e-3, weight, bias)
        torch.testing.assert_close(found.mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found.variance.double(), variance, rtol=1e-4, atol=0)
        scale = weight.double() / (found.variance.double() + 1e-3).sqrt()
        torch.testing.assert_close(found.scale.double(), scale, rtol=1e-6, atol=0)
        shift = bias.double() - mean * scale
        torch.testing.assert_close(found.shift.double(), shift, rtol=1e-6, atol=1e-5 + 1e-7 * offset)


def test_merge_of_uneven_and_empty_parts(device: str) -> None:
    """As a convolution's tiles are."""
    x = torch.randn(2, 40, 3, dtype=torch.float64) + 3
    sizes = [7, 0, 16, 16, 1]
    partial = torch.full((2, len(sizes), 2, 3), torch.nan)
    for i, piece in enumerate(x.split(sizes, 1)):
        if sizes[i]:
            partial[:, i, 0] = piece.mean(1)
            partial[:, i, 1] = piece.var(1, correction=0) * sizes[i]
    found = kernels.merge(partial.to(device), torch.tensor(sizes, dtype=torch.float32).to(device))
    torch.testing.assert_close(found.mean.cpu(), x.mean(1).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.variance.cpu(), x.var(1, correction=0).float(), rtol=1e-5, atol=0)


def test_a_first_value_that_is_an_outlier(small_tiles: None, device: str) -> None:
    x = image(1, 1, 1, 60, device=device)
    x[..., 0] = 1e4
    found = kernels.merge(*kernels.statistics(x))
    torch.testing.assert_close(found.variance[0, 0].double(), x.double().var(correction=0), rtol=1e-5, atol=0)
    # A part that does not hold it, and is all one value.
    x = torch.full((1, 2, 4, 4), 1e4, device=device)
    found = kernels.merge(*kernels.statistics(x))
    assert (found.mean == 1e4).all() and (found.variance == 0).all()


def test_nan_stays_in_its_channel(small_tiles: None, device: str) -> None:
    x = image(1, 3, 4, 5, device=device)
    x[0, 1, 2, 2] = torch.nan
    y = kernels.instance_norm_act(x, act="relu")
    assert y[0, 1].isnan().all() and not y[0, ::2].isnan().any()


def test_an_image_does_not_depend_on_its_batch(small_tiles: None, device: str) -> None:
    x = image(3, 4, 5, 9, device=device)
    whole = kernels.instance_norm_act(x)
    alone = kernels.instance_norm_act(x[1:2])
    assert torch.equal(whole[1:2], alone)


APPLIED: list[dict[str, Any]] = [
    {"act": "relu"},
    {"act": "leaky_relu", "slope": 0.2, "residual": True, "slice": True},
    {
        "input_act": "relu",
        "residual": True,
        "residual_norm": True,
        "residual_act": "leaky_relu",
        "residual_slope": 0.1,
    },
    {"act": "tanh", "pad": (1, 2, 3, 0), "pad_mode": "reflect", "residual": True, "residual_norm": True},
    {"act": "relu", "pad": (0, 1, 2, 1), "pad_mode": "replicate", "residual": True},
    {"act": "sigmoid", "pad": (1, 0, 0, 2), "pad_mode": "zeros", "slice": True},
    {"norm": False, "pad": (1, 1, 1, 1), "pad_mode": "reflect"},
    {"norm": False, "act": "relu", "border": True},
    {"act": "relu", "inside": True, "residual": True},
]


@pytest.mark.parametrize("case", APPLIED, ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()))
def test_apply(monkeypatch: pytest.MonkeyPatch, small_tiles: None, device: str, case: dict[str, Any]) -> None:
    dtype = DTYPES[len(str(case)) % 3]
    images, channels, height, width = shape = (2, 5, 3, 7)
    call = {
        k: v
        for k, v in case.items()
        if k not in ("norm", "residual", "residual_norm", "slice", "border", "inside")
    }
    wide = image(images, channels + 3, height, width, dtype=dtype, device=device)
    x = wide[:, 2 : 2 + channels]
    if case.get("inside"):
        x = image(images, channels, height + 2, width + 2, dtype=dtype, device=device)[:, :, 1:-1, 1:-1]
        monkeypatch.setattr(kernels, "channels_last", lambda t, any_rows: t if any_rows else None)
    scale, shift, residual_scale, residual_shift = torch.randn(4, images, channels, device=device)
    call |= {"scale": scale, "shift": shift} if case.get("norm", True) else {"scale": None, "shift": None}
    if case.get("residual"):
        call["residual"] = image(*shape, dtype=dtype, device=device)
    if case.get("residual_norm"):
        call |= {"residual_scale": residual_scale[0], "residual_shift": residual_shift[0]}

    def expected(dtype: torch.dtype) -> Tensor:
        v = x.to(dtype)
        if case.get("norm", True):
            v = v * scale[..., None, None].to(dtype) + shift[..., None, None].to(dtype)
        v = activate(v, case.get("input_act", "none"))
        if case.get("residual"):
            r = call["residual"].to(dtype)
            if case.get("residual_norm"):
                r = r * residual_scale[0, :, None, None].to(dtype) + residual_shift[0, :, None, None].to(
                    dtype
                )
            v = v + activate(r, case.get("residual_act", "none"), case.get("residual_slope", 0.0))
        v = activate(v, case.get("act", "none"), case.get("slope", 0.0))
        if "pad" in case:
            top, bottom, left, right = case["pad"]
            mode = {"zeros": "constant"}.get(case["pad_mode"], case["pad_mode"])
            v = F.pad(v, (left, right, top, bottom), mode=mode)
        return v

    exact = expected(torch.float64)
    rows, columns = exact.shape[2:]
    if case.get("slice"):
        whole = x.new_full((images, rows, columns, channels + 4), torch.nan).permute(0, 3, 1, 2)
        call["out"] = whole[:, 3 : 3 + channels]
    elif case.get("border"):
        whole = x.new_full((images, rows + 2, columns + 2, channels), torch.nan).permute(0, 3, 1, 2)
        call["out"] = whole[:, :, 1:-1, 1:-1]
    y = kernels.apply(x, **call)
    assert y.shape == exact.shape and y.dtype == dtype
    close_to_eager(y, exact, expected(dtype))
    if "out" in call:
        assert y is call["out"] and whole.isnan().sum() == whole.numel() - y.numel()
    else:
        assert y.is_contiguous(memory_format=LAST)


def test_apply_in_place_and_into_another_dtype(device: str) -> None:
    x = image(1, 4, 3, 5, dtype=torch.bfloat16, device=device)
    scale, shift = torch.randn(2, 4, device=device)
    exact = x.double() * scale[:, None, None].double() + shift[:, None, None].double()
    out = torch.full_like(x, torch.nan, dtype=torch.float32)
    torch.testing.assert_close(kernels.apply(x, scale, shift, out=out).double(), exact, rtol=1e-6, atol=1e-6)
    assert kernels.apply(x, scale, shift, out=x) is x
    torch.testing.assert_close(x, exact.bfloat16())


def variants(channels: int, device: str) -> list[dict[str, Any]]:
    weight, bias = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    per_image = torch.randn(2, channels, device=device)
    return [
        {},
        {"weight": weight, "bias": bias, "over_batch": True},
        {"mean": bias, "variance": weight, "weight": weight},
        {"mean": per_image, "variance": per_image.abs() + 0.1, "eps": 1e-3},
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole map", "in parts"])
def test_operator(
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    device: str,
    whole: bool,
    dtype: torch.dtype,
) -> None:
    if not whole:
        request.getfixturevalue("small_tiles")
    shape = (2, 5, 5, 7)
    acts = itertools.cycle([("relu", 0.0), ("leaky_relu", 0.2), ("none", 0.0), ("tanh", 0.0)])
    for kwargs, offset in itertools.product(variants(5, device), (0.0, 1e3)):
        if offset and "mean" in kwargs:
            continue
        x = image(*shape, dtype=dtype, offset=offset, device=device)
        act, slope = next(acts)
        call = {**kwargs, "act": act, "slope": slope}
        if act != "relu":
            call["residual"] = image(*shape, dtype=dtype, device=device)
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
        exact = instance_norm_act_reference(x.double(), **double)
        y = kernels.instance_norm_act(x, **call)
        assert y.is_contiguous(memory_format=LAST) and y.dtype == dtype
        close_to_eager(y, exact, instance_norm_act_reference(x, **call))


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 33, 4, 1), (1, 3, 17, 5), (2, 17, 1, 6)], ids=str)
def test_sizes(device: str, shape: tuple[int, ...]) -> None:
    x = image(*shape, offset=3.0, device=device)
    exact = instance_norm_act_reference(x.double(), act="relu")
    torch.testing.assert_close(kernels.instance_norm_act(x, act="relu").double(), exact, rtol=1e-5, atol=1e-5)
    y = kernels.instance_norm_act(x.contiguous(), act="relu")
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_more_values_than_32_bits_count(monkeypatch: pytest.MonkeyPatch, device: str, tmp_path: Path) -> None:
    """Images, pixels and planes more than 2^31 values apart, in a file with holes."""
    if device != "cpu":
        pytest.skip("such tensors are files, which the interpreter reads")
    far = 2**31 + 64
    with open(tmp_path / "values", "wb") as file:
        file.truncate(2 * (far + 4096))
    whole = torch.from_file(str(tmp_path / "values"), shared=True, size=far + 4096, dtype=torch.float16)
    x = whole.as_strided((2, 4, 3, 5), (far, 1, 20, 4))
    x.copy_(torch.randn(2, 4, 3, 5))
    y = kernels.instance_norm_act(x)
    assert torch.equal(y, kernels.instance_norm_act(x.clone(memory_format=LAST)))
    for name, value in (("RESIDENT", 0), ("TILE", 4), ("PROGRAMS", 64)):
        monkeypatch.setattr(kernels, name, value)
    pixels = whole.as_strided((1, 4, 1, 3), (0, 1, 0, 2**30))
    pixels.copy_(torch.randn(1, 4, 1, 3))
    exact = instance_norm_act_reference(pixels.double())
    torch.testing.assert_close(kernels.instance_norm_act(pixels).double(), exact, rtol=2e-3, atol=2e-3)
    scale, shift, *_ = kernels.merge(*kernels.statistics(pixels))
    kernels.apply(pixels, scale, shift, out=pixels)
    torch.testing.assert_close(pixels.double(), exact, rtol=2e-3, atol=2e-3)
    planes = whole.as_strided((1, 2, 1, 5), (2 * far, far, 5, 1))
    planes.copy_(torch.randn(1, 2, 1, 5))
    found = kernels.merge(*kernels.statistics(planes, planes=True))
    torch.testing.assert_close(found.mean, planes.float().mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pad": (3, 0, 0, 0)},
            r"pad is \(3, 0, 0, 0\) of an image of 3 x 4; reflect padding must be smaller",
        ),
        ({"pad": (-1, 0, 0, 0)}, "it must not be negative"),
        ({"pad_mode": "circular"}, "pad_mode is 'circular'; choose one of zeros, reflect, replicate"),
        ({"scale": None}, "scale and shift go together"),
        ({"scale": torch.zeros(3)}, r"scale is torch.float32 \(3,\); float32 \(2,\) or \(1, 2\) is expected"),
        ({"residual": torch.zeros(1, 2, 3, 5)}, r"residual has shape \(1, 2, 3, 5\)"),
        ({"out": torch.zeros(1, 2, 3, 5)}, r"out has shape \(1, 2, 3, 5\); \(1, 2, 3, 4\) is expected"),
        ({"out": torch.zeros(1, 2, 3, 4)}, "its channels must be adjacent"),
        ({"act": "mish"}, "act is 'mish'"),
    ],
    ids=lambda v: "" if isinstance(v, dict) else v,
)
def test_bad_arguments(device: str, change: dict[str, Any], message: str) -> None:
    call = {"x": torch.zeros(1, 2, 3, 4), "scale": torch.zeros(2), "shift": torch.zeros(2)} | change
    call = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=message):
        kernels.apply(**call)


def test_the_operator_has_a_cuda_kernel() -> None:
    overload = instance_norm_act._opoverload
    assert overload.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, 4, 5, dtype=torch.float16, device="cuda")
        y = instance_norm_act(x, act="relu")
        assert y.device.type == "cuda" and y.is_contiguous(memory_format=LAST)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_images_on_the_gpu(dtype: torch.dtype) -> None:
    for shape in ((1, 64, 512, 1024), (2, 1024, 32, 64), (2, 3, 300, 301)):
        x = image(*shape, dtype=dtype, offset=5.0, device="cuda")
        exact = instance_norm_act_reference(x.double(), act="relu")
        y = instance_norm_act(x, act="relu")
        close_to_eager(y, exact, instance_norm_act_reference(x, act="relu"))
        assert torch.equal(y, instance_norm_act(x, act="relu"))
