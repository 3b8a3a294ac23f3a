"""Round trips, and files that are broken, hostile or of another network."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from p2pfast import models
from p2pfast.models import CheckpointError, load_checkpoint, norm_layer_of, read_state_dict

State = dict[str, Tensor]
INSTANCE = norm_layer_of("instance")
BATCH = norm_layer_of("batch")


def _old_format(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, Callable[[State, Path], None]] = {
    "new.pth": torch.save,
    "old.pth": _old_format,
    "file.safetensors": safetensors.torch.save_file,
}


def _same(model: nn.Module, state: State) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


@pytest.fixture
def net() -> nn.Module:
    return models.ResnetGenerator(3, 3, 4, BATCH, n_blocks=1)


@pytest.fixture
def refused(net: nn.Module, tmp_path: Path) -> Callable[..., CheckpointError]:
    """Loads a file into a network, which must fail, name the file and leave the network alone."""

    def check(path: Path, model: nn.Module = net) -> CheckpointError:
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, path)
        assert str(path) in str(caught.value)
        assert "weights_only" not in str(caught.value)
        assert len(str(caught.value)) < 5000
        assert _same(model, before)
        return caught.value

    return check


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("new.pth", ""),
        ("old.pth", "_orig_mod."),
        ("file.safetensors", "module."),
        ("new.pth", "module._orig_mod.module."),
    ],
)
def test_round_trip(small: Any, file: str, prefix: str, tmp_path: Path) -> None:
    source, target = small.make(), small.make()
    state = source.state_dict()
    FORMATS[file]({prefix + key: value for key, value in state.items()}, tmp_path / file)
    assert load_checkpoint(target, tmp_path / file) is target
    assert _same(target, state)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_take_plain_files_and_the_reverse(net: nn.Module, wrap: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(net)
    for p in other.parameters():
        nn.init.normal_(p)
    wrapped = wrap(copy.deepcopy(net))
    torch.save(other.state_dict(), tmp_path / "plain.pth")
    load_checkpoint(wrapped, tmp_path / "plain.pth")
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pth")
    assert _same(load_checkpoint(net, tmp_path / "wrapped.pth"), other.state_dict())


def test_a_submodule_that_was_compiled(net: nn.Module, tmp_path: Path) -> None:
    state = {key.replace("model.", "model._orig_mod.", 1): value for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(net, tmp_path / "a.pth")


def test_the_same_key_under_two_prefixes_is_an_error(net: nn.Module, tmp_path: Path, refused: Any) -> None:
    state = net.state_dict()
    torch.save({**state, "module.model.1.weight": state["model.1.weight"]}, tmp_path / "a.pth")
    assert "model.1.weight is there twice" in str(refused(tmp_path / "a.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_converted(net: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in net.state_dict().items()}  # also num_batches_tracked
    torch.save(state, tmp_path / "a.pth")
    for p in net.parameters():
        nn.init.zeros_(p)
    load_checkpoint(net, tmp_path / "a.pth")
    for key, value in net.state_dict().items():
        assert value.dtype == (torch.int64 if key.endswith("tracked") else torch.float32)
        assert torch.equal(value, state[key].to(value.dtype))


def test_a_half_precision_model_stays_one(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "a.pth")
    half = load_checkpoint(copy.deepcopy(net).to(torch.bfloat16), tmp_path / "a.pth")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_loading_is_seen_through_the_version_counter(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "a.pth")
    weight = net.get_parameter("model.1.weight")
    version = weight._version
    load_checkpoint(net, tmp_path / "a.pth")
    assert net.get_parameter("model.1.weight") is weight
    assert weight._version > version


def test_the_file_can_go_afterwards(net: nn.Module, tmp_path: Path) -> None:
    state = copy.deepcopy(net.state_dict())
    for file, save in FORMATS.items():
        save(state, tmp_path / file)
        load_checkpoint(net, tmp_path / file)
        (tmp_path / file).write_bytes(b"")
        assert _same(net, state)


def test_stale_instance_norm_statistics_are_dropped(tmp_path: Path) -> None:
    model = models.ResnetGenerator(3, 3, 4, INSTANCE, n_blocks=1)
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, nn.InstanceNorm2d):
            state[f"{name}.running_mean"] = torch.zeros(module.num_features)
            state[f"{name}.running_var"] = torch.ones(module.num_features)
            state[f"{name}.num_batches_tracked"] = torch.tensor(3)
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "a.pth")
    load_checkpoint(nn.DataParallel(model), tmp_path / "a.pth")
    state["model.0.running_mean"] = torch.zeros(4)  # a padding layer has none
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "b.pth")
    assert caught.value.unexpected == ("model.0.running_mean",)


def test_missing_batch_counter_of_old_files_is_zero(net: nn.Module, tmp_path: Path) -> None:
    net.get_buffer("model.2.num_batches_tracked").fill_(7)
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("tracked")}
    torch.save(state, tmp_path / "a.pth")
    load_checkpoint(net, tmp_path / "a.pth")
    assert int(net.get_buffer("model.2.num_batches_tracked")) == 0


@pytest.mark.parametrize("key", ["state_dict", "model", "G", "anything"])
def test_one_wrapped_state_dict_is_found(net: nn.Module, key: str, tmp_path: Path) -> None:
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.Adam(net.parameters())
    optimizer.step()
    content = {"epoch": 3, key: net.state_dict(), "optimizer": optimizer.state_dict(), "lr": [0.1]}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(net, tmp_path / "a.pth")
    torch.save({"checkpoint": content}, tmp_path / "b.pth")
    load_checkpoint(net, tmp_path / "b.pth")


def test_several_state_dicts_need_a_key(net: nn.Module, tmp_path: Path, refused: Any) -> None:
    other = models.PixelDiscriminator(3, 2)
    path = tmp_path / "a.pth"
    torch.save({"G": net.state_dict(), "D": other.state_dict()}, path)
    assert "holds 2 dictionaries of tensors (G, D); choose by key=" in str(refused(path))
    load_checkpoint(net, path, key="G")
    with pytest.raises(CheckpointError, match="no dictionary of tensors under key='E'; there are: 'G', 'D'"):
        load_checkpoint(net, path, key="E")


def test_mismatches_are_listed_by_kind(net: nn.Module, tmp_path: Path, refused: Any) -> None:
    state = net.state_dict()
    del state["model.26.bias" if "model.26.bias" in state else "model.18.bias"]
    state["model.1.weight"] = torch.zeros(4, 3, 5, 5)
    state["model.4.weight"] = torch.zeros(8, 4, 3, 3, dtype=torch.int32)
    state["extra.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pth")
    error = refused(tmp_path / "a.pth")
    assert error.missing == ("model.18.bias",)
    assert error.unexpected == ("extra.weight",)
    assert error.misshapen == (
        "model.1.weight: (4, 3, 5, 5) instead of (4, 3, 7, 7)",
        "model.4.weight: torch.int32 instead of torch.float32",
    )
    assert "missing (1): model.18.bias\n" in str(error)
    assert "unexpected (1): extra.weight\n" in str(error)
    assert "misshapen (2): model.1.weight: (4, 3, 5, 5) instead of (4, 3, 7, 7), " in str(error)


def test_long_lists_are_cut_and_counted(net: nn.Module, tmp_path: Path, refused: Any) -> None:
    torch.save({f"key{i}" + "x" * 5000: torch.zeros(1) for i in range(500)}, tmp_path / "a.pth")
    error = refused(tmp_path / "a.pth")
    assert len(error.unexpected) == 500
    assert "unexpected (500): " in str(error)
    assert "… and 492 more" in str(error)


def test_a_model_on_the_meta_device_is_an_error(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="to_empty"):
        load_checkpoint(copy.deepcopy(net).to("meta"), tmp_path / "a.pth")


class _Payload:
    """Unpickled, creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["new", "old", "new-protocol-4", *(f"pickle-{i}" for i in range(6))])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pickle_that_would_run_code_is_refused(
    how: str, suffix: str, net: nn.Module, tmp_path: Path, refused: Any
) -> None:
    path, target = tmp_path / f"evil{suffix}", tmp_path / "created"
    content = {**net.state_dict(), "model.1.weight": _Payload(target)}
    if how.startswith("pickle"):
        plain = {"model.1.weight": _Payload(target)}
        path.write_bytes(pickle.dumps(plain, protocol=int(how[-1])))
    else:
        protocol = 4 if how.endswith("4") else 2
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how != "old")
    error = refused(path)
    assert not target.exists()
    if suffix == ".pth":
        assert "refused, because reading it would run code from the file (posix.mkdir)" in str(error)
    # The payload is real: the ordinary unpickler runs it.
    if how == "pickle-2":
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_modules_and_torchscript_are_refused(net: nn.Module, tmp_path: Path, refused: Any) -> None:
    torch.save(net, tmp_path / "module.pth")
    assert "refused" in str(refused(tmp_path / "module.pth"))
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), tmp_path / "script.pth")
    assert "refused" in str(refused(tmp_path / "script.pth"))


@pytest.mark.parametrize("file", FORMATS)
def test_truncated_files(file: str, net: nn.Module, tmp_path: Path, refused: Any) -> None:
    FORMATS[file](net.state_dict(), tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    for length in [1, 4, 9, 50, len(whole) // 4, len(whole) // 2, len(whole) - 1000, len(whole) - 1]:
        (tmp_path / file).write_bytes(whole[:length])
        assert "not a checkpoint, or damaged" in str(refused(tmp_path / file)), length


@pytest.mark.parametrize("file", FORMATS)
def test_flipped_bytes_never_leave_the_model_half_loaded(file: str, net: nn.Module, tmp_path: Path) -> None:
    FORMATS[file](net.state_dict(), tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        damaged = bytearray(whole)
        for _ in range(20):
            place = int(torch.randint(0, min(len(whole), 8000), (), generator=generator))
            damaged[place] = int(torch.randint(0, 256, (), generator=generator))
        (tmp_path / file).write_bytes(damaged)
        before = copy.deepcopy(net.state_dict())
        try:
            load_checkpoint(net, tmp_path / file)
        except CheckpointError:
            assert _same(net, before)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is some text\n",
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
        b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        b"\x80\x02}.",
        bytes(64),
        b"\xff" * 64,
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_other_files(suffix: str, content: bytes, tmp_path: Path, refused: Any) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    refused(tmp_path / f"a{suffix}")


def test_missing_empty_and_directories(tmp_path: Path, refused: Any) -> None:
    assert "no such file" in str(refused(tmp_path / "none.pth"))
    assert "not a file" in str(refused(tmp_path))
    (tmp_path / "empty.pth").touch()
    assert "the file is empty" in str(refused(tmp_path / "empty.pth"))
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("a.txt", "text")
    assert "not a checkpoint, or damaged" in str(refused(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds a Tensor, not a dictionary of tensors"),
        ([1, 2], "holds a list"),
        ({}, "it holds nothing"),
        ({"epoch": 3, "a": torch.zeros(1)}, r"it holds 'epoch' \(int\)"),
        ({1: torch.zeros(1)}, "these keys are not text: 1"),
        ({"a": torch.zeros(3, device="meta")}, "unusable tensors: a: not a plain dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "unusable tensors: a: not a plain dense tensor"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "a: claims more values than the file holds"),
    ],
)
def test_contents_that_are_no_state_dict(content: object, message: str, tmp_path: Path, refused: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    assert refused(tmp_path / "a.pth").__class__ is CheckpointError
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "a.pth")
