"""The training layer: values, gradients, what is kept, against the reference in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from p2pfast.ops.conv.activation import activate
from p2pfast.ops.conv.op import run_conv
from p2pfast.ops.conv_norm_act import conv_norm_act, conv_norm_act_reference, convolution, join, on_cpu
from p2pfast.ops.conv_norm_act.pad import padded, unpadded

FORMATS = [torch.contiguous_format, torch.channels_last]
LAYERS: list[tuple[int, int, int, dict[str, Any]]] = [
    # inputs, outputs, kernel
    (5, 7, 7, {"padding": 3, "padding_mode": "reflect", "norm": "instance", "act": "relu"}),
    (18, 20, 3, {"padding": 1, "padding_mode": "reflect", "norm": "instance", "act": "relu"}),
    (18, 20, 3, {"padding": 1, "padding_mode": "replicate", "norm": "batch", "act": "relu"}),
    (18, 20, 3, {"padding": 1, "norm": "instance", "residual": True}),
    (18, 20, 3, {"padding": 1, "norm": "batch", "residual": True, "act": "leaky_relu", "slope": 0.2}),
    (18, 20, 3, {"stride": 2, "padding": 1, "norm": "instance", "affine": True, "act": "relu"}),
    (
        18,
        20,
        4,
        {"stride": 2, "padding": 1, "norm": "batch", "affine": True, "act": "leaky_relu", "slope": 0.2},
    ),
    (18, 20, 4, {"stride": 2, "padding": 2, "act": "leaky_relu", "slope": 0.2}),
    (18, 20, 4, {"stride": 1, "padding": 2, "act": "silu", "residual": True}),
    (18, 20, 3, {"stride": 2, "padding": 1, "output_padding": 1, "transposed": True, "norm": "instance"}),
    (
        18,
        20,
        4,
        {"stride": 2, "padding": 1, "transposed": True, "norm": "batch", "affine": True, "act": "tanh"},
    ),
    (18, 3, 7, {"padding": 3, "padding_mode": "reflect", "act": "tanh"}),
    (18, 20, 3, {"padding": 1, "norm": "batch", "running": True, "affine": True, "act": "relu"}),
    (4, 6, 1, {"norm": "instance", "act": "gelu"}),
]


def layer(number: int, memory_format: torch.memory_format) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors with gradients, and the other arguments."""
    inputs, outputs, kernel, options = LAYERS[number]
    options = dict(options)
    affine, residual, running = (options.pop(k, False) for k in ("affine", "residual", "running"))
    sides = (inputs, outputs) if options.get("transposed") else (outputs, inputs)
    tensors = {
        "x": (torch.randn(2, inputs, 12, 15) + 1).contiguous(memory_format=memory_format),
        "weight": torch.randn(*sides, kernel, kernel) / (inputs * kernel**2) ** 0.5,
        "bias": torch.randn(outputs),
    }
    if affine:
        tensors |= {"norm_weight": torch.rand(outputs) + 0.5, "norm_bias": torch.randn(outputs)}
    if residual:
        shape = conv_norm_act_reference(**tensors, **options).shape
        tensors["residual"] = torch.randn(shape).contiguous(memory_format=memory_format)
    if running:
        options |= {
            "running_mean": torch.randn(outputs),
            "running_var": torch.rand(outputs) + 0.5,
            "use_running": True,
        }
    return tensors, options


def run(
    function: Any,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    grad: Tensor | None,
    dtype: torch.dtype,
) -> Any:
    inputs = {k: v.to(dtype).detach().requires_grad_() for k, v in tensors.items()}
    y = function(**inputs, **options)
    grad = torch.ones_like(y) if grad is None else grad.to(dtype)
    return y, dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))


@pytest.mark.parametrize("tuned", ["library", "native"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_value_and_gradients(
    number: int, memory_format: torch.memory_format, tuned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every convolution by the library, and by the native kernels where they fit."""

    def choose(key: object, *candidates: Any, device: object) -> Tensor:
        result: Tensor = candidates[{"library": 0, "native": -1}[tuned]]()
        return result

    monkeypatch.setattr(convolution, "fastest", choose)
    monkeypatch.setattr(convolution, "settled", lambda *_: None)
    tensors, options = layer(number, memory_format)
    exact_y, _ = run(conv_norm_act_reference, tensors, options, None, torch.float64)
    grad = torch.randn(exact_y.shape, dtype=torch.float64)
    exact_y, exact = run(conv_norm_act_reference, tensors, options, grad, torch.float64)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
        y, got = run(conv_norm_act, tensors, options, grad, dtype)
        fused = options.get("act") != "gelu"
        assert y.is_contiguous(memory_format=torch.channels_last if fused else memory_format)
        assert y.dtype == dtype
        assert (y.double() - exact_y).abs().max() <= tolerance * exact_y.abs().max()
        for name, expected in exact.items():
            # Against the size of a weight's gradient: a bias before a norm has none but rounding.
            size = expected.norm() if name != "bias" else exact["weight"].norm()
            error = (got[name].double() - expected).norm()
            assert got[name].shape == expected.shape and error <= 2 * tolerance * size, (
                name,
                float(error / size),
            )


def test_what_is_kept() -> None:
    """A chain keeps its first input and every raw output; not what passes from layer to layer."""
    weights = [torch.randn(8, 8, 3, 3, requires_grad=True) for _ in range(3)]
    x = torch.randn(1, 8, 16, 16).contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        y = x
        for w in weights:
            y = conv_norm_act(y, w, padding=1, padding_mode="reflect", norm="instance", act="relu")
        return y

    # Three raw outputs, the result that is held here, and the statistics.
    assert x.nbytes * 4 <= storages_alive(run, [x, *weights]) <= x.nbytes * 4 + 2000
    y = run()
    y.square().sum().backward()
    reference = x
    copies = [w.detach().clone().requires_grad_() for w in weights]
    for w in copies:
        options = {"padding": 1, "padding_mode": "reflect", "norm": "instance", "act": "relu"}
        reference = conv_norm_act_reference(reference, w, **options)
    reference.square().sum().backward()
    for w, c in zip(weights, copies, strict=True):
        torch.testing.assert_close(w.grad, c.grad, rtol=1e-3, atol=1e-2)


def storages_alive(run: Callable[[], object], given: Sequence[Tensor]) -> int:
    """Bytes that live after ``run``, without those of the tensors given."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    storage = t.untyped_storage()
                    made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    run()  # scratch memory that stays
    with Note():
        kept = run()
    known = {t.untyped_storage()._cdata for t in given}
    alive = sum(size for key, (ref, size) in made.items() if key not in known and not ref.expired())
    del kept
    return alive


def skip(
    x: Tensor,
    weights: Sequence[Tensor],
    act: str,
    layer: Callable[..., Tensor],
    joined: Callable[..., Tensor],
) -> Tensor:
    """Two layers, and a third that reads both."""
    a, b, c = weights
    first = layer(x, a, padding=1, norm="batch", act="leaky_relu", slope=0.2)
    second = layer(first, b, padding=1, norm="batch")
    return layer(joined([first, second], act, 0.2), c, padding=1, norm="batch")


def joined_by_pytorch(tensors: Sequence[Tensor], act: str, slope: float) -> Tensor:
    return activate(torch.cat(list(tensors), 1), act, slope)


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_skip_connection_is_made_again(dtype: torch.dtype, act: str) -> None:
    x = (torch.randn(2, 5, 9, 11) + 1).to(dtype)
    weights = [(torch.randn(8, c, 3, 3) / 9).to(dtype).requires_grad_() for c in (5, 8, 16)]
    y = skip(x, weights, act, conv_norm_act, join)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, weights, grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(got, torch.autograd.grad(y, weights, grad), strict=True))
    exact = [w.detach().double().requires_grad_() for w in weights]
    expected_y = skip(x.double(), exact, act, conv_norm_act_reference, joined_by_pytorch)
    expected = torch.autograd.grad(expected_y, exact, grad.double())
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    assert (y.double() - expected_y).abs().max() <= tolerance * expected_y.abs().max()
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 2 * tolerance * b.norm()


def test_a_skip_connection_keeps_raw_outputs_only() -> None:
    """Three of 8 channels, that of the result, and the statistics; PyTorch keeps twice as much."""
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, c, 3, 3, requires_grad=True) for c in (8, 8, 16)]
    layer = 8 * 32 * 32 * 4
    ours = storages_alive(lambda: skip(x, weights, "relu", conv_norm_act, join), [x, *weights])
    assert 4 * layer <= ours < 4.2 * layer
    plain = storages_alive(
        lambda: skip(x, weights, "relu", conv_norm_act_reference, joined_by_pytorch), [x, *weights]
    )
    assert plain >= 2 * ours


def test_autocast_keeps_no_copy_of_the_weights() -> None:
    """They are lowered again in the backward pass, whose gradients are the weights' own precision."""
    x = torch.randn(1, 64, 4, 4).bfloat16().contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(64, 64, 3, 3, requires_grad=True) for _ in range(2)]

    def run() -> Tensor:
        y = x
        with torch.autocast("cpu", torch.bfloat16):
            for w in weights:
                y = conv_norm_act(y, w, padding=1, norm="instance", act="relu")
        return y

    assert storages_alive(run, [x, *weights]) < 5 * x.nbytes  # a copy of a weight has 36 times as many bytes
    run().float().square().sum().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in weights)


def test_a_finished_backward_pass_frees_what_was_joined() -> None:
    """Also while the loss is held, as training loops do."""
    x = torch.randn(1, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(8, c, 3, 3, requires_grad=True) for c in (8, 8, 16)]

    def step() -> Tensor:
        loss = skip(x, weights, "relu", conv_norm_act, join).square().mean()
        torch.autograd.grad(loss, weights)
        return loss

    assert storages_alive(step, [x, *weights]) < 2000


@pytest.mark.parametrize("act", ["none", "relu", "tanh"])
def test_second_derivatives_of_a_skip_connection(act: str) -> None:
    results = []
    for layer, joined in ((conv_norm_act, join), (conv_norm_act_reference, joined_by_pytorch)):
        torch.manual_seed(4)
        x = torch.randn(2, 5, 6, 7, requires_grad=True)
        weights = [(torch.randn(4, c, 3, 3) / 9).requires_grad_() for c in (5, 4, 8)]
        loss = skip(x, weights, act, layer, joined).pow(3).mean()
        (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(of_x.square().sum(), weights))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_joined_tensor_changed_in_place_is_noticed() -> None:
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    y = x * 1.0
    result = join([y, y], "relu")
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("sizes", [((1, 2, 4, 4), (1, 2, 4, 1)), ((1, 2, 4, 4), (1, 2, 4))])
def test_what_cannot_be_joined(sizes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(RuntimeError):
        join([torch.randn(size, requires_grad=True) for size in sizes], "relu")
    with pytest.raises(ValueError, match="act is 'swish'"):
        join([torch.randn(1, 2, 4, 4)], "swish")


def test_an_output_changed_in_place_is_kept_itself() -> None:
    a, b = (torch.randn(4, 4, 3, 3, requires_grad=True) for _ in range(2))
    x = torch.randn(1, 4, 8, 8)
    found = []
    for function in (conv_norm_act, conv_norm_act_reference):
        y = function(x, a, padding=1, norm="instance")
        y.mul_(torch.linspace(0, 1, 8))
        found.append(
            torch.autograd.grad(function(y, b, padding=1, norm="instance", act="tanh").sum(), (a, b))
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_running_statistics(norm: str) -> None:
    module = (nn.BatchNorm2d if norm == "batch" else nn.InstanceNorm2d)(
        6, affine=True, track_running_stats=True
    )
    x, weight = torch.randn(3, 4, 7, 9), torch.randn(6, 4, 3, 3)
    expected = module(nn.functional.conv2d(x, weight))
    mean, var = torch.zeros(6), torch.ones(6)
    y = conv_norm_act(x, weight, norm=norm, running_mean=mean, running_var=var)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)


def test_autocast() -> None:
    tensors, options = layer(1, torch.contiguous_format)
    inputs = {k: v.requires_grad_() for k, v in tensors.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_norm_act(**inputs, **options)
    assert y.dtype == torch.bfloat16
    exact_y, exact = run(conv_norm_act_reference, tensors, options, None, torch.float64)
    assert (y.double() - exact_y).abs().max() < 4e-2 * exact_y.abs().max()
    got = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in got)
    with torch.autocast("cpu", dtype=torch.float16):
        y = conv_norm_act(**inputs, **options)
    assert y.dtype == torch.float16
    assert (y.double() - exact_y).abs().max() < 1e-2 * exact_y.abs().max()


@pytest.mark.parametrize("number", [1, 2])
def test_a_backward_pass_within_autocast(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way that could be chosen gets tensors of one dtype: autocast pads in float32."""
    monkeypatch.setattr(convolution, "library_has_bfloat16", lambda: True)
    tensors, options = layer(number, torch.channels_last)
    inputs = {k: v.requires_grad_() for k, v in tensors.items()}

    def every(key: object, *ways: Callable[[], Tensor], device: object = None) -> Tensor:
        return [way() for way in ways][-1]

    monkeypatch.setattr(convolution, "fastest", every)
    monkeypatch.setattr(convolution, "settled", lambda *_: None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_norm_act(**inputs, **options)
        within = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(within, outside, strict=True))


NARROW: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((1, 33, 12, 1), (33, 15, 3, 3), {"stride": 2, "padding": 1, "transposed": True}),
    ((1, 5, 4, 2), (16, 5, 4, 4), {"stride": 3, "padding": 1}),
    ((2, 20, 1, 1), (18, 20, 3, 3), {"padding": 1}),
    ((1, 64, 2, 2), (32, 64, 4, 4), {"stride": 2, "padding": 1}),
]


@pytest.mark.parametrize(("size", "weights", "options"), NARROW)
def test_images_smaller_than_the_kernel(
    size: tuple[int, ...], weights: tuple[int, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of taps that see nothing but padding are zero, whichever way is chosen."""
    monkeypatch.setattr(convolution, "library_has_bfloat16", lambda: True)

    def every(key: object, *ways: Callable[[], Tensor], device: object = None) -> Tensor:
        results = [way() for way in ways]
        for result in results:
            assert (result - results[-1]).abs().max() <= 2e-2 * results[-1].abs().max()
        return results[-1]

    monkeypatch.setattr(convolution, "fastest", every)
    monkeypatch.setattr(convolution, "settled", lambda *_: None)
    x = torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(weights).bfloat16().requires_grad_()
    y = conv_norm_act(x, weight, **options)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight), grad)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.autograd.grad(conv_norm_act_reference(*exact, **options), exact, grad.double())
    for got, wanted in zip(found, expected, strict=True):
        assert (got - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_every_way_in_bfloat16(number: int, monkeypatch: pytest.MonkeyPatch, cpu_level: str) -> None:
    """Whichever is chosen, at most twice PyTorch's error in bfloat16; products of pairs among them."""
    monkeypatch.setattr(on_cpu._C, "multiplies_pairs", lambda: True)
    monkeypatch.setattr(convolution, "library_has_bfloat16", lambda: True)
    tensors, options = layer(number, torch.channels_last)
    found: list[tuple[str, str, Tensor]] = []

    def every(key: tuple[Any, ...], *ways: Callable[[], Tensor], device: object = None) -> Tensor:
        results = [way() for way in ways]
        found.extend((key[0], way.__name__, r) for way, r in zip(ways, results, strict=True))
        return results[0]

    monkeypatch.setattr(convolution, "fastest", every)
    monkeypatch.setattr(convolution, "settled", lambda *_: None)
    geometry = convolution.Geometry(
        options.get("stride", 1),
        options.get("padding", 0),
        options.get("output_padding", 0),
        options.get("transposed", False),
        options.get("padding_mode", "zeros"),
    )
    x = tensors["x"].detach().bfloat16().contiguous(memory_format=torch.channels_last)
    weight = tensors["weight"].detach().bfloat16()
    y = convolution.forward(x, weight, None, geometry)
    grad = torch.randn_like(y)
    convolution.data_gradient(grad, x.shape, weight, geometry)
    of_weight = convolution.weight_gradient(grad, x, weight, geometry)
    double = x.double().requires_grad_(), weight.double().requires_grad_()
    trials = list(found)
    exact = convolution.forward(*double, None, geometry)
    gradients = torch.autograd.grad(exact, double, grad.double())
    truth = {"forward": exact, "data": gradients[0], "weight": gradients[1]}
    by_library = {kind: r for kind, name, r in trials if name == "library"}
    assert of_weight.shape == weight.shape and len(by_library) == 3
    for kind, name, result in trials:
        error, allowed = ((r.double() - truth[kind]).norm() for r in (result, by_library[kind]))
        assert error <= 2 * allowed, (kind, name, error / allowed)
    in_pairs = any(name == "direct, pairs" for kind, name, _ in trials if kind == "forward")
    assert in_pairs == (weight.shape[2] in (1, 7) and weight.shape[0] > 4)


@pytest.mark.parametrize("number", [1, 3, 4, 6, 8, 9])
def test_gradcheck_of_the_reference(number: int) -> None:
    tensors, options = layer(number, torch.contiguous_format)
    small = {k: v.double()[..., :4, :4] if k in ("x", "weight") else v.double() for k, v in tensors.items()}
    small = {k: v[:2] if k == "x" else v for k, v in small.items() if k != "residual"}
    for i in (0, 1):
        small["weight"] = small["weight"].narrow(i, 0, 3)
    small["x"] = small["x"][:, :3].detach()
    small = {k: v[:3] if v.dim() == 1 else v for k, v in small.items()}
    names = list(small)
    values = [v.detach().clone().requires_grad_() for v in small.values()]
    options["act"] = "tanh"
    torch.autograd.gradcheck(
        lambda *v: conv_norm_act(**dict(zip(names, v, strict=True)), **options), values, fast_mode=True
    )


def test_double_backward() -> None:
    """A gradient penalty through two layers, of which the second makes its input again."""
    tensors, options = layer(7, torch.contiguous_format)
    second = torch.randn(6, 20, 3, 3, requires_grad=True)
    inputs = {k: v.requires_grad_() for k, v in tensors.items()}
    found = []
    for function in (conv_norm_act, conv_norm_act_reference):
        y = function(**inputs, **options, norm="instance")
        y = function(y, second, norm="instance", act="leaky_relu", slope=0.2)
        (first,) = torch.autograd.grad((y**2).sum(), inputs["x"], create_graph=True)
        penalty = (first.flatten(1).norm(dim=1) - 1).square().mean()
        found.append(torch.autograd.grad(penalty, (inputs["x"], inputs["weight"], second)))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_gradients_of_a_block_can_be_differentiated(norm: str) -> None:
    """Its input is its residual too, and its layers share a weight and the norm's parameters."""
    shapes = {"x": (2, 8, 6, 7), "weight": (8, 8, 3, 3), "gain": (8,), "bias": (8,)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    found = []
    for function, dtype in ((conv_norm_act, torch.float32), (conv_norm_act_reference, torch.float64)):
        x, weight, gain, bias = inputs = [t.to(dtype).requires_grad_() for t in given.values()]
        affine = {"norm": norm, "norm_weight": gain, "norm_bias": bias} if norm != "none" else {"bias": bias}
        first = function(x, weight, padding=1, act="tanh", **affine)
        y = function(first, weight, padding=1, act="silu", residual=first, **affine)
        y = function(y, weight, padding=1, act="leaky_relu", slope=0.2, residual=first, **affine)
        if norm == "none":
            del inputs[2]
        once = torch.autograd.grad(y.cos().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(g.square().sum() for g in once), inputs)
        found.append((*once, *twice))
    for a, b in zip(*found, strict=True):
        assert (a - b).detach().norm() <= 2e-4 * b.detach().norm()


@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("norm", ["none", "instance"])
def test_only_the_residual_needs_a_gradient(norm: str, act: str) -> None:
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    residual = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = conv_norm_act(x, weight, padding=1, norm=norm, act=act, residual=residual)
    (first,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    torch.testing.assert_close(first, 2 * y)
    (second,) = torch.autograd.grad(first.sum(), residual)
    torch.testing.assert_close(second, 2.0 * (torch.ones_like(y) if act == "none" else y > 0))


def test_inputs_of_other_sizes_with_results_of_one_size() -> None:
    """What was chosen for one is not taken for the other, whose gradient may have other ways."""
    weight = torch.randn(24, 24, 4, 4, requires_grad=True)
    for width in (16, 17, 16):
        x = torch.randn(1, 24, 16, width, requires_grad=True)
        y = conv_norm_act(x, weight, stride=2, padding=1)
        got = torch.autograd.grad(y.square().sum(), (x, weight))
        expected = conv_norm_act_reference(x, weight, stride=2, padding=1)
        for a, b in zip(got, torch.autograd.grad(expected.square().sum(), (x, weight)), strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_a_view_of_the_input_is_kept_itself() -> None:
    x, weight = torch.randn(1, 8, 6, 6, requires_grad=True), torch.randn(8, 8, 3, 3)
    found = []
    for function in (conv_norm_act, conv_norm_act_reference):
        y = function(x, weight, padding=1, norm="instance", act="relu")
        turned = y.transpose(2, 3)
        y = function(y, weight, padding=1, norm="instance", act="relu", residual=turned)
        found.append(torch.autograd.grad((y * torch.arange(36.0).view(6, 6)).sum(), x)[0])
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()


def test_another_default_device() -> None:
    x, weight = torch.randn(1, 8, 6, 6, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            y = conv_norm_act(x, weight, padding=1, norm="instance", act="relu")
            y = join([y, y], "relu")
            found.append((y, *torch.autograd.grad(y.sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forward_mode_is_refused() -> None:
    x, weight = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 3, 3)
    for memory_format in FORMATS:
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
            dual = forward_ad.make_dual(x.contiguous(memory_format=memory_format), torch.ones_like(x))
            conv_norm_act(dual, weight, norm="instance")


def test_a_changed_norm_parameter_is_noticed() -> None:
    weight, gain = torch.randn(4, 4, 3, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    y = conv_norm_act(torch.randn(1, 4, 8, 8), weight, norm="instance", norm_weight=gain)
    y = conv_norm_act(y, weight, norm="instance")
    with torch.no_grad():
        gain.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_under_a_compiler() -> None:
    tensors, options = layer(1, torch.contiguous_format)
    inputs = {k: v.requires_grad_() for k, v in tensors.items()}
    compiled = torch.compile(lambda v: conv_norm_act(**v, **options), backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 20, 12, 15)
    names = ["x", "weight"]
    got = torch.autograd.grad(compiled(inputs), [inputs[n] for n in names], grad)
    want = torch.autograd.grad(conv_norm_act(**inputs, **options), [inputs[n] for n in names], grad)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_gradient_of_padding(mode: str) -> None:
    for padding, size in itertools.product((1, 2, 3), ((4, 5), (4, 9), (12, 6))):
        x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        y = padded(x, padding, mode)
        grad = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, grad)
        torch.testing.assert_close(unpadded(grad.clone(), padding, mode), expected)


TURNED = [
    *itertools.product(["direct", "winograd", "winograd2", "streamed", "streamed2"], [3, 4], [17]),
    ("winograd6", 3, 17),
    ("direct", 7, 36),
    ("thin", 7, 3),
    ("thin", 3, 8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("algorithm", "kernel", "channels"), TURNED)
def test_data_gradients_of_stride_one(
    algorithm: str, kernel: int, channels: int, dtype: torch.dtype, cpu_level: str
) -> None:
    """By the convolution with the turned weight, its axes exchanged."""
    x = torch.randn(2, channels, 9, 14, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, channels, kernel, kernel).to(dtype)
    y = torch.conv2d(x, weight.double(), padding=1)
    grad = torch.randn(y.shape).to(dtype)
    (expected,) = torch.autograd.grad(y, x, grad.double())
    given = grad.contiguous(memory_format=torch.channels_last)
    got = run_conv([given], weight, None, tuple(x.shape), 1, kernel - 2, algorithm=algorithm, turned=True)
    bound = 2e-5 if dtype == torch.float32 else 1e-2
    assert (got - expected).abs().max() <= bound * expected.abs().max()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "group"}, "norm is 'group'"),
    ({"padding_mode": "circular"}, "padding_mode is 'circular'"),
    ({"padding_mode": "reflect", "transposed": True}, "only 'zeros'"),
    ({"use_running": True, "norm": "batch"}, "use_running is True"),
    ({"x": torch.zeros(0, 4, 5, 5)}, "x has shape"),
    ({"act": "mish"}, "act is 'mish'"),
    ({"weight": torch.zeros(4, 2, 3, 3)}, r"weight has shape \(4, 2, 3, 3\); \(out_channels, 4"),
    ({"weight": torch.zeros(8, 4, 3, 3), "transposed": True}, r"\(4, out_channels"),
    ({"weight": torch.zeros(4, 4, 3)}, "weight has shape"),
    ({"weight": torch.zeros(4, 4, 7, 7)}, "would give an output of -1x-1"),
    ({"bias": torch.zeros(1)}, r"bias has shape \(1,\); \(4,\)"),
    ({"norm": "batch", "norm_weight": torch.zeros(5)}, "norm_weight has shape"),
    ({"norm": "batch", "running_mean": torch.zeros(1, 4)}, "running_mean has shape"),
    ({"residual": torch.zeros(1, 4, 1, 1)}, r"residual has shape \(1, 4, 1, 1\), the result \(1, 4, 3, 3\)"),
    ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
    ({"padding": 5, "padding_mode": "reflect"}, "reflection needs it below"),
    ({"stride": 0}, "stride is 0"),
    ({"output_padding": 1}, "output_padding 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1] for b in BAD])
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_norm_act(**{"x": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(4, 4, 3, 3), **change})
