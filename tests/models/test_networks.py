"""The networks against the published implementations' keys, outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import p2pfast
from p2pfast import models
from p2pfast.models import build, instance_mean, norm_layer_of

INSTANCE = norm_layer_of("instance")
BATCH = norm_layer_of("batch")

GOLDEN: dict[str, Callable[[], nn.Module]] = {
    "hd_global_ngf16": lambda: models.GlobalGenerator(36, 3, 16, 4, 9, INSTANCE),
    "hd_local_ngf8": lambda: models.LocalEnhancer(36, 3, 8, 4, 9, 1, 3, INSTANCE),
    "hd_multiscale_d_ndf16": lambda: models.MultiscaleDiscriminator(39, 16, 3, INSTANCE, False, 3, True),
    "patchgan_basic_ndf16": lambda: models.NLayerDiscriminator(6, 16, 3, BATCH),
    "patchgan_pixel_ndf16": lambda: models.PixelDiscriminator(6, 16, INSTANCE),
    "resnet_9blocks_ngf16": lambda: models.ResnetGenerator(3, 3, 16, INSTANCE, False, 9),
    "unet_128_ngf16_batch_eval": lambda: models.UnetGenerator(3, 3, 7, 16, BATCH),
    "unet_256_ngf16_batch": lambda: models.UnetGenerator(3, 3, 8, 16, BATCH),
}
FULL_SIZE: dict[str, Callable[[], nn.Module]] = {
    "hd_global_1024x512": lambda: build("pix2pixhd-global"),
    "hd_local_2048x1024": lambda: build("pix2pixhd-local"),
    "hd_d": lambda: build("pix2pixhd-multiscale-d"),
    "hd_encoder": lambda: build("pix2pixhd-encoder"),
    "unet_256": lambda: build("unet_256"),
    "unet_128": lambda: build("unet_128"),
    "resnet_9blocks": lambda: build("resnet_9blocks"),
    "resnet_9blocks_dropout": lambda: build("resnet_9blocks", use_dropout=True),
    "resnet_6blocks": lambda: build("resnet_6blocks"),
    "patchgan_basic": lambda: build("basic"),
    "patchgan_cyclegan": lambda: build("patchgan_cyclegan"),
}


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_in_order_and_shapes(name: str, golden_facts: Any) -> None:
    facts = golden_facts("full_size_state_dicts")[name]
    with torch.device("meta"):
        model = FULL_SIZE[name]()
    assert list(_shapes(model).items()) == list(facts["keys"].items())
    assert sum(p.numel() for p in model.parameters()) == facts["params"]


def test_every_full_size_network_is_covered(golden_facts: Any) -> None:
    assert set(golden_facts("full_size_state_dicts")) == set(FULL_SIZE)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs(
    name: str, fast: bool, seeded: Any, golden_facts: Any, golden_input: Any, golden_outputs: Any, run: Any
) -> None:
    facts = golden_facts(name)
    model = seeded(GOLDEN[name]()).train(facts["mode"] == "train")
    assert _shapes(model) == facts["keys"]
    model = p2pfast.optimize(model) if fast else model
    with torch.no_grad():
        outputs = run(model, golden_input(name, 0, facts["inputs"][0]))
    expected = golden_outputs(name)
    assert len(outputs) == len(expected)
    step = facts.get("step", 1)
    for actual, wanted in zip(outputs, expected, strict=True):
        _assert_close(actual[..., ::step, ::step], wanted)


def test_golden_encoder(seeded: Any, golden_facts: Any, golden_input: Any, golden_outputs: Any) -> None:
    name = "hd_encoder_nef8"
    model = seeded(models.Encoder(3, 3, 8, 4, INSTANCE))
    assert _shapes(model) == golden_facts(name)["keys"]
    y, x = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    inst = (y // 16 * 1000 + x // 40)[None, None]
    with torch.no_grad():
        out = model(golden_input(name, 0, (1, 3, 64, 128)), inst)
    _assert_close(out, golden_outputs(name)[0])


def _assert_gradients(model: nn.Module, expected: dict[str, float]) -> None:
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters() if p.grad is not None}
    assert norms.keys() == expected.keys()
    largest = max(expected.values())
    for key, norm in norms.items():
        # A bias before InstanceNorm has no gradient but rounding.
        assert norm == pytest.approx(expected[key], rel=2e-3, abs=2e-6 * largest), key


def test_golden_pix2pixhd_training_step(seeded: Any, golden_facts: Any, golden_input: Any) -> None:
    name = "train_step_pix2pixhd"
    facts = golden_facts(name)
    g = seeded(models.GlobalGenerator(36, 3, 8, 2, 3, INSTANCE))
    d = seeded(models.MultiscaleDiscriminator(39, 8, 3, INSTANCE, False, 2, True))
    label = golden_input(name, "label", (1, 36, 64, 128))
    real = golden_input(name, "image", (1, 3, 64, 128)).tanh()
    fake = g(label)

    def lsgan(scales: list[list[Tensor]], target: float) -> Tensor:
        return sum(((scale[-1] - target) ** 2).mean() for scale in scales)  # type: ignore[return-value]

    fake_features = d(torch.cat([label, fake], 1))
    real_features = d(torch.cat([label, real], 1))
    matching: Any = sum(
        10 * 4 / 4 / 2 * F.l1_loss(a, b.detach())
        for f, r in zip(fake_features, real_features, strict=True)
        for a, b in zip(f[:-1], r[:-1], strict=True)
    )
    gan = lsgan(fake_features, 1.0)
    assert gan.item() == pytest.approx(facts["loss_G_GAN"], rel=1e-4)
    assert float(matching.detach()) == pytest.approx(facts["loss_G_GAN_Feat"], rel=1e-4)
    (gan + matching).backward()
    _assert_gradients(g, facts["grad_norm_G"])
    d.zero_grad()
    loss_fake = lsgan(d(torch.cat([label, fake.detach()], 1)), 0.0)
    loss_real = lsgan(d(torch.cat([label, real], 1)), 1.0)
    assert loss_fake.item() == pytest.approx(facts["loss_D_fake"], rel=1e-4)
    assert loss_real.item() == pytest.approx(facts["loss_D_real"], rel=1e-4)
    (0.5 * (loss_fake + loss_real)).backward()
    _assert_gradients(d, facts["grad_norm_D"])


def test_golden_pix2pix_training_step(seeded: Any, golden_facts: Any, golden_input: Any) -> None:
    name = "train_step_pix2pix"
    facts = golden_facts(name)
    g = seeded(models.UnetGenerator(3, 3, 7, 8, BATCH))
    d = seeded(models.NLayerDiscriminator(6, 8, 3, BATCH))
    a = golden_input(name, "A", (2, 3, 128, 128)).tanh()
    b = golden_input(name, "B", (2, 3, 128, 128)).tanh()
    fake = g(a)

    def vanilla(logits: Tensor, real: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    loss_fake = vanilla(d(torch.cat([a, fake.detach()], 1)), 0.0)
    loss_real = vanilla(d(torch.cat([a, b], 1)), 1.0)
    assert loss_fake.item() == pytest.approx(facts["loss_D_fake"], rel=1e-4)
    assert loss_real.item() == pytest.approx(facts["loss_D_real"], rel=1e-4)
    (0.5 * (loss_fake + loss_real)).backward()
    _assert_gradients(d, facts["grad_norm_D"])
    gan = vanilla(d(torch.cat([a, fake], 1)), 1.0)
    l1 = 100 * F.l1_loss(fake, b)
    assert gan.item() == pytest.approx(facts["loss_G_GAN"], rel=1e-4)
    assert l1.item() == pytest.approx(facts["loss_G_L1"], rel=1e-4)
    (gan + l1).backward()
    _assert_gradients(g, facts["grad_norm_G"])


def test_traced_by_fx(small: Any, run: Any) -> None:
    model = small.make().eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, small.channels, *small.size)
    args = (x, torch.randint(0, 3, (2, 1, *small.size))) if isinstance(model, models.Encoder) else (x,)
    with torch.no_grad():
        expected, actual = model(*args), traced(*args)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    kinds = {
        type(traced.get_submodule(node.target)) for node in traced.graph.nodes if node.op == "call_module"
    }
    assert all(kind.__module__.startswith("torch.nn") for kind in kinds)


def test_generators_keep_sizes_that_are_multiples(small_generator: Any, run: Any) -> None:
    model = small_generator.make().eval()
    multiple = model.size_multiple
    size = (multiple * 2, multiple * 3) if multiple > 4 else (multiple * 5, multiple * 4)
    with torch.no_grad():
        (out,) = run(model, torch.randn(1, model.input_nc, *size))
    assert out.shape == (1, model.output_nc, *size)


def test_odd_sizes_are_taken_as_published() -> None:
    with torch.no_grad():
        assert models.GlobalGenerator(3, 3, 2, 2, 1, INSTANCE)(torch.randn(1, 3, 21, 18)).shape[2:] == (
            24,
            20,
        )
        assert models.ResnetGenerator(3, 3, 2, INSTANCE, n_blocks=1)(torch.randn(1, 3, 17, 9)).shape[2:] == (
            20,
            12,
        )


def _loop_mean(features: Tensor, inst: Tensor) -> Tensor:
    out = features.clone()
    for b in range(len(features)):
        for i in inst[b].unique():
            mask = inst[b, 0] == i
            out[b][:, mask] = features[b][:, mask].mean(1, keepdim=True)
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_instance_mean_against_a_loop(dtype: torch.dtype) -> None:
    features = 100 + torch.randn(3, 4, 9, 7, dtype=torch.float64)
    inst = torch.randint(0, 6, (3, 1, 9, 7)).to(dtype)
    torch.testing.assert_close(instance_mean(features, inst), _loop_mean(features, inst))


def test_instance_mean_of_large_and_negative_ids() -> None:
    features = torch.randn(2, 3, 8, 8)
    ids = torch.tensor([-1, 32767, 32768, 65535, 2**31, 2**53 + 1, 2**53])
    inst = ids[torch.randint(0, len(ids), (2, 1, 8, 8))]
    torch.testing.assert_close(instance_mean(features, inst), _loop_mean(features, inst))


def test_instance_mean_loses_nothing_over_large_regions_with_offset() -> None:
    features = 1000 + torch.randn(1, 1, 512, 512)
    out = instance_mean(features, torch.zeros(1, 1, 512, 512, dtype=torch.int32))
    assert out.unique().numel() == 1
    assert out[0, 0, 0, 0].item() == pytest.approx(features.double().mean().item(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instance_mean_keeps_dtype(dtype: torch.dtype) -> None:
    features = torch.randn(1, 2, 4, 4).to(dtype)
    inst = torch.arange(16).view(1, 1, 4, 4)
    assert torch.equal(instance_mean(features, inst), features)


def test_instance_mean_gradient() -> None:
    features = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inst = torch.randint(0, 3, (2, 1, 3, 4))
    assert torch.autograd.gradcheck(lambda f: instance_mean(f, inst), features)


def test_instance_mean_of_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"instances has shape \(1, 1, 4, 5\).*\(1, 1, 4, 4\)"):
        instance_mean(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 5, dtype=torch.int64))


def test_biases_follow_the_norm() -> None:
    for norm, biased in (
        (nn.InstanceNorm2d, True),
        (INSTANCE, True),
        (BATCH, False),
        (nn.BatchNorm2d, False),
    ):
        keys = models.ResnetGenerator(3, 3, 2, norm, n_blocks=1).state_dict()
        assert ("model.1.bias" in keys) is biased
        assert "model.19.bias" not in keys or biased
        keys = models.GlobalGenerator(3, 3, 2, 1, 1, norm).state_dict()
        assert "model.1.bias" in keys


def test_unet_dropout_is_where_it_is_published() -> None:
    model = models.UnetGenerator(3, 3, 7, 2, BATCH, use_dropout=True)
    assert sum(isinstance(m, nn.Dropout) for m in model.modules()) == 2
    assert _shapes(model) == _shapes(models.UnetGenerator(3, 3, 7, 2, BATCH))


def test_sigmoid_has_no_effect_with_features() -> None:
    plain = models.MultiscaleDiscriminator(3, 2, 2, INSTANCE, True, 2, False)
    assert all(0 <= scale[-1].min() and scale[-1].max() <= 1 for scale in plain(torch.randn(1, 3, 32, 32)))
    features = models.PatchDiscriminatorHD(3, 2, 2, INSTANCE, True, True)
    assert len(features(torch.randn(1, 3, 32, 32))) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.GlobalGenerator(3, 3, n_blocks=-1), "n_blocks=-1 must be an integer of at least 0"),
        (lambda: models.LocalEnhancer(3, 3, n_local_enhancers=0), "n_local_enhancers=0 .* at least 1"),
        (lambda: models.UnetGenerator(3, 3, 4), "num_downs=4 .* at least 5"),
        (
            lambda: models.ResnetGenerator(3, 3, padding_type="same"),
            "padding_type='same' is not known; .*reflect",
        ),
        (lambda: models.MultiscaleDiscriminator(3, num_D=0), "num_D=0"),
        (lambda: models.PatchDiscriminatorHD(3, n_layers=0), "n_layers=0"),
        (lambda: norm_layer_of("group"), "norm='group' is not known; give one of instance, batch, none"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
