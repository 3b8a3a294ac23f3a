"""Choosing a kernel's layout and tiles, and the library's convolution that competes with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2pfast.ops.conv.reference import conv_reference

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from p2pfast.ops.conv.gpu import choice, configs  # noqa: E402
from p2pfast.ops.conv.gpu.configs import Machine  # noqa: E402
from p2pfast.ops.conv.triton import (  # noqa: E402
    Candidate,
    Choice,
    Config,
    Problem,
    Source,
    choose,
    default_config,
    library_conv,
    pack,
)

TRUNK = Problem(1, (32, 64), (32, 64), (1024,), 1024, (3, 3), padding=(1, 1), pad_mode="reflect")
CPU = torch.device("cpu")


def test_the_model_prefers_what_fits_the_shape() -> None:
    wide = choose(TRUNK, CPU)
    assert wide.best.layout == "plain" and wide.best.config is not None
    assert (wide.best.config.bm, wide.best.config.bn) == (128, 128)
    assert not wide.best.measured and "estimated" in wide.explain() and "make 4096 columns" in wide.explain()
    narrow = replace(TRUNK, size=(512, 1024), out_size=(512, 1024), channels=(64,), out_channels=64)
    config = choose(narrow, CPU).best.config
    assert config is not None and config.bn == 64
    tiny = replace(TRUNK, size=(2, 2), out_size=(2, 2), channels=(512,), out_channels=512)
    config = choose(tiny, CPU).best.config
    assert config is not None and config.bm <= 32


def test_columns_of_several_pixels_take_small_tiles() -> None:
    """Where their values are stored one by one, larger ones spill registers."""
    even = Problem(1, (512, 1024), (1024, 2048), (64,), 32, (4, 4), 2, (1, 1), transposed=True)
    for problem in (replace(even, out_channels=39), replace(even, out_size=(1023, 2047))):
        found = [c.config for c in choice.estimated(problem, CPU, ("columns",))[0]]
        assert found and all(c is not None and c.bm * c.bn <= 1024 * c.warps for c in found)
    assert (128, 128) in [(c.config.bm, c.config.bn) for c in choice.estimated(even, CPU)[0] if c.config]


def test_a_plan_and_its_run_agree_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan sizes statistics with tensors on the meta device; the weights tell which device will run."""
    small = Machine(processors=8, shared=48 * 1024)
    monkeypatch.setattr(choice, "machine", lambda device: small if device == CPU else Machine())
    packed = pack(torch.zeros(128, 64, 3, 3), False, torch.bfloat16)
    found = []
    for device in ("cpu", "meta"):
        x, out = (
            torch.empty(1, 16, 16, c, dtype=torch.bfloat16, device=device) for c in (64, packed.out_channels)
        )
        found.append(default_config(packed, x, out))
    assert found[0] == found[1]
    assert configs.shared_bytes(found[0], packed.columns, 2) <= small.shared


def test_the_model_prefers_folded_columns_where_they_help() -> None:
    head = replace(
        TRUNK, size=(1024, 2048), out_size=(1024, 2048), channels=(32,), out_channels=3, statistics=False
    )
    head = replace(head, kernel=(7, 7), padding=(3, 3))
    assert choose(head, CPU).best.layout == "rows"
    up = Problem(1, (512, 1024), (1024, 2048), (64,), 32, (3, 3), 2, (1, 1), transposed=True)
    assert choose(up, CPU).best.layout == "columns"
    wide = replace(up, size=(32, 64), out_size=(64, 128), channels=(1024,), out_channels=512)
    assert choose(wide, CPU).best.layout == "phases"


def test_measured_choices_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that is given: the GPU's own cannot run everywhere."""
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    times = iter([3e-5, 1e-5, 2e-5, 4e-5, 5e-5, 6e-5, 7e-5])
    asked: list[str] = []
    monkeypatch.setattr(choice, "graph_seconds", lambda run, device: next(times))
    monkeypatch.setattr(choice, "machine", lambda device: Machine())
    monkeypatch.setattr(choice, "_signature", lambda *about: "shape")
    monkeypatch.setattr(choice, "_compile", lambda problem, worth, device: None)

    def runner(problem: Problem, candidate: Candidate, device: torch.device) -> None:
        asked.append(candidate.name)

    monkeypatch.setattr(choice, "runner", runner)
    device = torch.device("cuda")
    first = choose(TRUNK, device)
    assert first.best.measured and first.best.name == asked[1] and first.best.seconds == 1e-5
    assert "library" in asked and "measured 10 µs" in first.explain()
    count = len(asked)
    assert choose(TRUNK, device) == first and len(asked) == count
    (tmp_path / "gpu-tiles.json").write_text(json.dumps({"shape": [["plain", [1, 2], 3]]}))
    times = iter([1.0] * 9)
    choose(TRUNK, device)
    assert len(asked) > count  # an entry that makes no sense is measured again
    monkeypatch.setenv("P2PFAST_TUNE", "off")
    assert not choose(TRUNK, device).best.measured


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    monkeypatch.setattr(choice, "in_capture", lambda device: True)
    monkeypatch.setattr(choice, "machine", lambda device: Machine())
    assert not choose(TRUNK, torch.device("cuda")).best.measured


def test_tiles_that_do_not_fit_a_device_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory is known when a kernel is compiled; the others go on."""
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    names: list[str] = []
    any_fit = [True]

    def time(name: str, device: torch.device) -> float:
        names.append(name)
        if len(names) == 1 or not any_fit[0]:
            raise OutOfResources(131072, 101376, "shared memory")
        return 1e-5 * len(names)

    monkeypatch.setattr(choice, "graph_seconds", time)
    monkeypatch.setattr(choice, "machine", lambda device: Machine())
    monkeypatch.setattr(choice, "_signature", lambda *about: "shape")
    monkeypatch.setattr(choice, "_compile", lambda problem, worth, device: None)
    monkeypatch.setattr(choice, "runner", lambda problem, candidate, device: candidate.name)
    found = choose(TRUNK, torch.device("cuda"), library=False)
    assert found.best.measured and found.best.name == names[1]
    assert "Required: 131072" in dict(found.refused)[names[0]]
    any_fit[0] = False
    monkeypatch.setenv("P2PFAST_TUNE", "force")
    assert not choose(TRUNK, torch.device("cuda"), library=False).best.measured


def test_no_configuration_means_a_measured_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of ``choose`` for weights on a GPU: the same layout, the sizes of the tensors."""
    asked: list[tuple[Problem, tuple[str, ...] | None]] = []

    def chosen(
        problem: Problem, device: torch.device, library: bool, layouts: tuple[str, ...] | None
    ) -> Choice:
        asked.append((problem, layouts))
        return Choice(Candidate("phases", Config(64, 64, 64), 1e-5, True))

    monkeypatch.setattr(choice, "choose", chosen)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    packed = pack(torch.zeros(64, 128, 4, 4), True, torch.bfloat16, stride=2, padding=(1, 1))
    x, out = torch.empty(1, 8, 9, 64, device="meta"), torch.empty(1, 16, 18, 128, device="meta")
    decided = choice._decide(packed, x.bfloat16(), out.bfloat16(), torch.device("cuda"))
    assert decided == Config(64, 64, 64)
    expected = Problem(1, (8, 9), (16, 18), (64,), 128, (4, 4), 2, (1, 1), transposed=True)
    assert asked == [(expected, ("phases",))]
    packed = pack(torch.zeros(64, 3, 4, 4), True, torch.bfloat16, stride=2, padding=(1, 1))
    assert packed.layout == "columns" and packed.window == (3, 3)
    choice._decide(packed, x.bfloat16(), out[..., :3].bfloat16(), torch.device("cuda"))
    assert asked[1] == (replace(expected, out_channels=3), ("columns",))


@pytest.mark.gpu
def test_measures_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("P2PFAST_TUNE", "on")
    found = choose(TRUNK, torch.device("cuda"))
    assert found.best.measured and found.best.seconds > 0
    assert choose(TRUNK, torch.device("cuda")) == found


LIBRARY = {
    "reflect": (Problem(2, (4, 5), (4, 5), (6,), 5, (3, 3), padding=(1, 1), pad_mode="reflect"), 0),
    "two sources, stride 2": (Problem(2, (6, 5), (3, 3), (6, 4), 5, (3, 3), 2, (1, 1)), 0),
    "uneven padding": (Problem(1, (6, 6), (3, 3), (6,), 5, (4, 4), 2, (1, 1), pad_mode="replicate"), 0),
    "transposed": (Problem(2, (3, 4), (6, 8), (6,), 5, (3, 3), 2, (1, 1), transposed=True), 1),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_library_does_the_same(name: str, device: str) -> None:
    problem, output_padding = LIBRARY[name]
    problem = replace(problem, dtype=torch.float32)
    x = [torch.randn(problem.images, *problem.size, c, device=device) for c in problem.channels]
    total = sum(problem.channels)
    ends = (total, problem.out_channels) if problem.transposed else (problem.out_channels, total)
    weight, bias = (
        torch.randn(*ends, *problem.kernel, device=device),
        torch.randn(problem.out_channels).to(device),
    )
    scale, shift = torch.rand(total, device=device) + 0.5, torch.randn(total, device=device)
    added = torch.randn(problem.images, *problem.out_size, problem.out_channels, device=device)
    out = torch.full(added.shape, float("nan"), device=device)
    parts_of = scale.split(list(problem.channels)), shift.split(list(problem.channels))
    found = library_conv(
        [Source(t, s, b, "relu") for t, s, b in zip(x, *parts_of, strict=True)],
        weight,
        bias,
        out,
        stride=problem.stride,
        padding=problem.padding,
        pad_mode=problem.pad_mode,
        transposed=problem.transposed,
        act="tanh",
        residual=Source(added),
        statistics=True,
    )
    raw = conv_reference(
        [t.permute(0, 3, 1, 2).double() for t in x],
        weight.double(),
        bias.double(),
        problem.stride,
        problem.padding[0],
        output_padding,
        problem.transposed,
        problem.pad_mode,
        scale.double(),
        shift.double(),
        "relu",
    )
    truth = torch.tanh(raw + added.permute(0, 3, 1, 2).double())
    torch.testing.assert_close(
        out.permute(0, 3, 1, 2).double(), truth, rtol=0, atol=5e-2 if device == "cuda" else 1e-4
    )
    assert found is not None and float(found[1].sum()) == raw.shape[2] * raw.shape[3]


def test_candidates_run(device: str) -> None:
    """What a measurement times: each layout, and the library."""
    down = Problem(1, (3, 4), (3, 4), (17,), 3, (3, 3), padding=(1, 1), dtype=torch.float32)
    up = replace(down, out_size=(6, 8), stride=2, transposed=True)
    small = Config(16, 16, 32)
    for problem, layout, config in (
        (down, "plain", small),
        (replace(down, statistics=False), "rows", small),
        (up, "columns", small),
        (down, None, None),
    ):
        choice.runner(problem, Candidate(layout, config, 0.0), torch.device(device))()


def test_layers_of_few_tiles_are_split() -> None:
    """The middle of a U-Net at batch 1 has work for a few multiprocessors of an H100 only."""
    device = torch.device("cpu")
    small = Problem(1, (4, 4), (2, 2), (512,), 512, (4, 4), 2, (1, 1))
    best = choose(small, device).best
    assert best.config is not None and best.config.splits > 1 and "splits" in best.name
    large = Problem(1, (512, 1024), (512, 1024), (64,), 64, (3, 3), 1, (1, 1))
    assert all(c.config is None or c.config.splits == 1 for c in (choose(large, device).best,))


def test_a_clock_also_sees_descriptors() -> None:
    """Where the device has them, and the model's choice stays what it was."""
    found, _ = choice.estimated(TRUNK, CPU)
    with pytest.MonkeyPatch.context() as patch:
        for has in (False, True):
            patch.setattr(choice, "machine", lambda device, has=has: Machine(descriptors=has))
            worth = choice.contenders(TRUNK, found, CPU)
            extra = [c for c in worth if c.config is not None and c.config.descriptor]
            assert len(extra) == (2 if has else 0) and worth[0] == found[0]
        odd = replace(TRUNK, channels=(1000,))
        assert not [c for c in choice.contenders(odd, found, CPU) if c.config and c.config.descriptor]
    assert extra[0].name.endswith(", descriptor")
