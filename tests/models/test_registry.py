from __future__ import annotations

import pytest
import torch
from torch import nn

from p2pfast import models
from p2pfast.models import available, build


@pytest.mark.parametrize("name", available())
def test_every_name_builds_and_takes_every_norm(name: str) -> None:
    with torch.device("meta"):
        build(name)
        for norm, kind in (("instance", nn.InstanceNorm2d), ("batch", nn.BatchNorm2d), ("none", nn.Identity)):
            found = {type(m) for m in build(name, norm=norm).modules()}
            assert found & {nn.InstanceNorm2d, nn.BatchNorm2d, nn.Identity} == {kind}


def test_published_names_are_there() -> None:
    assert {
        "pix2pixhd-local",
        "pix2pixhd-global",
        "pix2pixhd-encoder",
        "pix2pixhd-multiscale-d",
        "unet_256",
        "unet_128",
        "resnet_9blocks",
        "resnet_6blocks",
        "basic",
        "n_layers",
        "pixel",
    } <= set(available())


def test_options_replace_published_values() -> None:
    with torch.device("meta"):
        model = build("pix2pixhd-local", ngf=8, input_nc=5, n_local_enhancers=2)
        norm_layer = build("unet_128", norm_layer=nn.InstanceNorm2d)
    assert isinstance(model, models.LocalEnhancer)
    assert model.state_dict()["model2_1.1.weight"].shape == (8, 5, 7, 7)
    assert any(isinstance(m, nn.InstanceNorm2d) for m in norm_layer.modules())


def test_a_build_leaves_the_registry_alone() -> None:
    with torch.device("meta"):
        build("pixel", ndf=8)
        assert build("pixel").state_dict()["net.0.weight"].shape[0] == 64


@pytest.mark.parametrize("size", [16, 70, 286])
def test_patchgan_sees_as_many_pixels_as_its_name_says(size: int) -> None:
    model = build(f"patchgan_{size}", norm="none", ndf=1, input_nc=1).double()
    x = torch.randn(1, 1, 600, 600, dtype=torch.float64, requires_grad=True)
    out = model(x)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    assert x.grad is not None
    rows = x.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == size


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'unet-256' \(did you mean 'unet_256'\?\); known names: pix2pixhd-local, "
    ):
        build("unet-256")
    with pytest.raises(ValueError, match="known names"):
        build("nothing like it")


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(
        TypeError, match="UnetGenerator has no option n_blocks; it takes input_nc, .*use_dropout"
    ):
        build("unet_256", n_blocks=3)
    with pytest.raises(TypeError, match="give one of them"):
        build("unet_256", norm="batch", norm_layer=nn.BatchNorm2d)
    with pytest.raises(ValueError, match="norm='group' is not known"):
        build("unet_256", norm="group")
