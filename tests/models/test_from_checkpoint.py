from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from p2pfast import models
from p2pfast.models import CheckpointError, available, build, from_checkpoint, infer, norm_layer_of

INSTANCE = norm_layer_of("instance")
BATCH = norm_layer_of("batch")


def _layout(model: nn.Module) -> list[str]:
    return [f"{name}: {module!r}" for name, module in model.named_modules() if not list(module.children())]


@pytest.mark.parametrize("kind", ["pth", "safetensors", "prefixed"])
def test_every_network_comes_back(small: Any, kind: str, run: Any, tmp_path: Path, request: Any) -> None:
    source = small.make()
    for buffer in source.buffers():
        buffer.add_(1)
    path = tmp_path / f"net.{'safetensors' if kind == 'safetensors' else 'pth'}"
    prefix = "module._orig_mod." if kind == "prefixed" else ""
    state = {prefix + key: value for key, value in source.state_dict().items()}
    (safetensors.torch.save_file if kind == "safetensors" else torch.save)(state, path)
    name = request.node.callspec.params["small"]
    known_by = {"patch-hd-wide": "PatchDiscriminatorHD"}  # ndf 4 never reaches the cap of 512
    loaded = from_checkpoint(path, architecture=known_by.get(name))
    assert type(loaded) is type(source)
    assert _layout(loaded) == _layout(source)
    for key, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    x = torch.randn(2, small.channels, *small.size)
    with torch.no_grad():
        for a, b in zip(run(loaded.eval(), x), run(source.eval(), x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", available())
def test_every_published_configuration_is_inferred(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
        network, options = infer({key: tuple(v.shape) for key, v in model.state_dict().items()})
        again = network(**options)
    assert type(again) is type(model)
    assert _layout(again) == _layout(model)


def test_full_size_published_state_dicts(golden_facts: Any) -> None:
    for facts in golden_facts("full_size_state_dicts").values():
        shapes = {f"module.{key}": tuple(shape) for key, shape in facts["keys"].items()}
        with torch.device("meta"):
            network, options = infer(shapes)
            model = network(**options)
        assert {f"module.{key}": tuple(v.shape) for key, v in model.state_dict().items()} == shapes


def _saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


def test_comes_in_the_published_test_time_mode(tmp_path: Path) -> None:
    batch = from_checkpoint(_saved(models.UnetGenerator(3, 3, 5, 2, BATCH), tmp_path / "a.pth"))
    assert all(module.training for module in batch.modules())
    dropout = from_checkpoint(_saved(models.ResnetGenerator(3, 3, 2, INSTANCE, True, 1), tmp_path / "b.pth"))
    assert dropout.training
    instance = from_checkpoint(_saved(models.ResnetGenerator(3, 3, 2, INSTANCE), tmp_path / "c.pth"))
    assert not any(module.training for module in instance.modules())


def test_unet_dropout_is_an_override(tmp_path: Path) -> None:
    path = _saved(models.UnetGenerator(3, 3, 6, 2, INSTANCE), tmp_path / "a.pth")
    model = from_checkpoint(path, use_dropout=True)
    assert model.training
    assert any(isinstance(module, nn.Dropout) for module in model.modules())


def test_ambiguous_keys_follow_the_documented_choice(tmp_path: Path) -> None:
    path = _saved(models.GlobalGenerator(3, 3, 2, 2, 3, INSTANCE), tmp_path / "a.pth")
    assert type(from_checkpoint(path)) is models.ResnetGenerator
    named = from_checkpoint(path, architecture="GlobalGenerator")
    assert type(named) is models.GlobalGenerator
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(from_checkpoint(path)(x), named(x))
    path = _saved(models.GlobalGenerator(3, 3, 2, 2, 0, INSTANCE), tmp_path / "b.pth")
    assert type(from_checkpoint(path)) is models.Encoder
    assert type(from_checkpoint(path, architecture="GlobalGenerator")) is models.GlobalGenerator


def test_hd_patchgan_is_known_by_the_cap_of_its_width() -> None:
    with torch.device("meta"):
        for network in (models.PatchDiscriminatorHD, models.NLayerDiscriminator):
            for ndf in (32, 128):
                state = network(3, ndf, 5, INSTANCE).state_dict()
                assert infer({key: tuple(v.shape) for key, v in state.items()})[0] is network


def test_stale_statistics_do_not_make_it_batch_norm(tmp_path: Path) -> None:
    model = models.ResnetGenerator(3, 3, 2, INSTANCE, n_blocks=1)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            state[f"{name}.running_mean"] = torch.zeros(module.num_features)
            state[f"{name}.running_var"] = torch.ones(module.num_features)
    torch.save(state, tmp_path / "a.pth")
    loaded = from_checkpoint(tmp_path / "a.pth")
    assert _layout(loaded) == _layout(model)


def test_overrides(tmp_path: Path) -> None:
    path = _saved(models.LocalEnhancer(3, 3, 2, 1, 1, 1, 1, INSTANCE), tmp_path / "a.pth")
    replicate = from_checkpoint(path, padding_type="replicate")
    assert any(isinstance(module, nn.ReplicationPad2d) for module in replicate.modules())
    none = from_checkpoint(path, norm="none")
    assert any(isinstance(module, nn.Identity) for module in none.modules())
    with pytest.raises(CheckpointError, match=r"does not fit LocalEnhancer; nothing was loaded\n  misshapen"):
        from_checkpoint(path, ngf=4)
    with pytest.raises(TypeError, match="LocalEnhancer has no option num_downs; it takes input_nc"):
        from_checkpoint(path, num_downs=4)
    with pytest.raises(ValueError, match="architecture='StyleGAN' is not known; give one of GlobalGenerator"):
        from_checkpoint(path, architecture="StyleGAN")
    with pytest.raises(TypeError, match="give one of them"):
        from_checkpoint(path, norm="batch", norm_layer=BATCH)
    with pytest.raises(CheckpointError, match="none of the known networks"):
        from_checkpoint(path, architecture="UnetGenerator")


def test_one_of_several_by_key(tmp_path: Path) -> None:
    g, d = models.ResnetGenerator(3, 3, 2, INSTANCE), models.PixelDiscriminator(3, 2)
    torch.save({"G": g.state_dict(), "D": d.state_dict()}, tmp_path / "a.pth")
    assert type(from_checkpoint(tmp_path / "a.pth", key="D")) is models.PixelDiscriminator
    with pytest.raises(CheckpointError, match="choose by key="):
        from_checkpoint(tmp_path / "a.pth")


def test_half_precision_becomes_the_default_dtype(tmp_path: Path) -> None:
    model = models.ResnetGenerator(3, 3, 2, INSTANCE, n_blocks=1)
    loaded = from_checkpoint(_saved(model.half(), tmp_path / "a.pth"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "state",
    [
        {"fc.weight": torch.zeros(3, 3)},
        {"model.1.weight": torch.zeros(4, 3, 7, 7)},
        {"model.1.weight": torch.zeros(0, 3, 7, 7), "model.4.weight": torch.zeros(1)},
        {"model.0.weight": torch.zeros(4, 3, 4, 4)},
        {"model.0.weight": torch.zeros(())},
        {"model.model.0.weight": torch.zeros(4)},
        {"net.0.weight": torch.zeros(())},
        {"layer7.0.weight": torch.zeros(1)},
        {"scale0_layer0.0.weight": torch.zeros(2, 2, 4, 4)},
        {"scale0_layer99999999.0.weight": torch.zeros(2, 2, 4, 4)},
        {"model99999999_1.1.weight": torch.zeros(2, 2, 7, 7), "model.1.weight": torch.zeros(2, 2, 7, 7)},
        {"model0.0.weight": torch.zeros(1, 1, 4, 4)},
        {"model.1.weight": torch.zeros(4, 3, 7, 7), "model.4.conv_block.9.weight": torch.zeros(4, 4, 3, 3)},
    ],
)
def test_unknown_or_incomplete_networks_are_one_clear_error(state: Any, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in str(caught.value)


def test_one_missing_tensor_is_named(tmp_path: Path) -> None:
    state = models.UnetGenerator(3, 3, 6, 2, BATCH).state_dict()
    del state["model.model.1.model.6.bias"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        from_checkpoint(tmp_path / "a.pth")
    assert caught.value.missing == ("model.model.1.model.6.bias",)


def test_no_random_numbers_are_drawn(tmp_path: Path) -> None:
    path = _saved(models.PixelDiscriminator(3, 2), tmp_path / "a.pth")
    before = torch.get_rng_state()
    from_checkpoint(path)
    assert torch.equal(torch.get_rng_state(), before)
