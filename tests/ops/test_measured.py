"""The fastest way of several: measured once, the same for every process."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from p2pfast.ops import measured
from p2pfast.ops.conv_norm_act import conv_norm_act

calls = {"slow": 0, "quick": 0}


def slow() -> str:
    calls["slow"] += 1
    time.sleep(0.005)
    return "slow"


def quick() -> str:
    calls["quick"] += 1
    return "quick"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    new_process(monkeypatch)
    calls.update(slow=0, quick=0)
    yield tmp_path


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_chosen", {})
    monkeypatch.setattr(measured, "_settled", {})


def test_measured_once_and_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        assert measured.fastest(("key",), quick, slow) == "quick"
    assert calls == {"slow": 4, "quick": 9}
    new_process(monkeypatch)
    assert measured.fastest(("key",), quick, slow) == "quick"
    assert calls == {"slow": 4, "quick": 10}
    measured.fastest(("another key",), quick, slow)
    assert calls["slow"] == 8
    monkeypatch.setenv("P2PFAST_TUNE", "force")
    new_process(monkeypatch)
    measured.fastest(("key",), quick, slow)
    assert calls["slow"] == 12


def test_the_first_process_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has measured the same at the same time, and found another way faster."""
    original = measured._seconds

    def late(ways: tuple[Callable[[], object], ...], seconds: float) -> list[float]:
        (signature,) = found
        (folder / "ways.json").write_text(json.dumps({signature: "slow"}))
        return original(ways, seconds)

    measured.fastest(("key",), quick, slow)
    found = json.loads((folder / "ways.json").read_text())
    (folder / "ways.json").unlink()
    new_process(monkeypatch)
    monkeypatch.setattr(measured, "_seconds", late)
    assert measured.fastest(("key",), quick, slow) == "slow"


@pytest.mark.parametrize("fixed", ["off", "deterministic"])
def test_the_last_without_measuring(folder: Path, monkeypatch: pytest.MonkeyPatch, fixed: str) -> None:
    try:
        if fixed == "off":
            monkeypatch.setenv("P2PFAST_TUNE", "off")
        else:
            torch.use_deterministic_algorithms(True)
        assert measured.fastest(("key",), quick, slow) == "slow"
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls == {"slow": 1, "quick": 0} and not list(folder.iterdir())


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {"b": 1}}', "\xff"])
def test_a_broken_cache_is_made_anew(folder: Path, content: str) -> None:
    (folder / "ways.json").write_text(content)
    assert measured.fastest(("key",), quick, slow) == "quick"
    assert "quick" in json.loads((folder / "ways.json").read_text()).values()


def test_an_unwritable_folder_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(folder / "file"))
    assert measured.fastest(("key",), quick, slow) == "quick"


def test_a_layer_computes_the_same_in_the_next_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 16, 3, 3)

    def step() -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = conv_norm_act(*leaves, padding=1, norm="instance", act="relu")
        return (y.detach(), *torch.autograd.grad(y.square().sum(), leaves))

    first = step()
    assert len(json.loads((folder / "ways.json").read_text())) == 3
    new_process(monkeypatch)
    monkeypatch.setattr(measured, "_seconds", lambda *a: pytest.fail("measured again"))
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


def test_the_first_is_kept_unless_another_leads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_seconds", lambda ways, seconds: [1.0, 0.97])
    assert measured.pick(("tie",), slow, quick, lead=0.05) == "slow"
    assert measured.pick(("no tie",), slow, quick, lead=0.02) == "quick"


@pytest.fixture
def device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """One that is pretended, and waits for nothing."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(device))
    waits.clear()
    return torch.device("cuda:0")


waits: list[torch.device] = []


def test_on_a_gpu_the_time_is_until_it_has_finished(device: torch.device) -> None:
    assert measured.fastest(("key",), quick, slow, device=device) == "quick"
    # The first run of each, which compiles, and the one that is asked for are not timed.
    assert len(waits) == calls["quick"] - 1 + calls["slow"] and calls["slow"] >= 2
    assert measured.fastest(("key",), quick, slow, device=device) == "quick"
    assert measured.fastest(("key",), quick, slow) == "quick"


def failing() -> str:
    raise RuntimeError("does not compile")


def test_what_fails_on_a_gpu_is_left_out(device: torch.device, folder: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"failing cannot run on cuda:0 .* does not compile"):
        assert measured.fastest(("key",), failing, quick, slow, device=device) == "quick"
    assert measured.fastest(("key",), failing, quick, slow, device=device) == "quick"
    assert list(json.loads((folder / "ways.json").read_text()).values()) == ["quick"]
    with pytest.raises(RuntimeError, match="does not compile"):
        measured.fastest(("key",), quick, failing, device=device)


def test_nothing_is_measured_during_a_capture(
    device: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "in_capture", lambda device: True)
    assert measured.fastest(("key",), quick, slow, device=device) == "slow"
    assert calls == {"slow": 1, "quick": 0} and not list(folder.iterdir()) and not waits
    monkeypatch.setattr(measured, "in_capture", lambda device: False)
    assert measured.fastest(("key",), quick, slow, device=device) == "quick"
    monkeypatch.setattr(measured, "in_capture", lambda device: True)
    assert measured.fastest(("key",), quick, slow, device=device) == "quick"
