"""Streams and memory of plans: what may run at the same time shares nothing."""

from __future__ import annotations

import pytest
from gpu_runtime.plain import PlainKernels

from p2pfast.runtime.gpu import forms
from p2pfast.runtime.gpu.engine import streams_wanted
from p2pfast.runtime.gpu.forms import APPLIED, LIBRARY, PROLOGUE, Layer
from p2pfast.runtime.gpu.frame import Frame, graphs_wanted
from p2pfast.runtime.gpu.plan import AFTER, BEFORE, DURING, GpuPlan, Memory, Step
from p2pfast.runtime.gpu.schedule import finish, schedule, together


def nothing(frame: Frame) -> None:
    raise AssertionError("a schedule runs nothing")


def step(name: str, reads: tuple[Memory, ...], writes: tuple[Memory, ...], phase: int = DURING) -> Step:
    return Step(name, nothing, reads, writes, phase)


def branches() -> tuple[list[Step], dict[str, Memory]]:
    """An input, two chains that meet, and a result."""
    m = {name: Memory(100, name) for name in ("x", "a1", "a2", "b1", "b2", "sum")}
    return [
        step("in", (), (m["x"],), BEFORE),
        step("a1", (m["x"],), (m["a1"],)),
        step("b1", (m["x"],), (m["b1"],)),
        step("a2", (m["a1"],), (m["a2"],)),
        step("b2", (m["b1"],), (m["b2"],)),
        step("add", (m["a2"], m["b2"]), (m["sum"],)),
        step("out", (m["sum"],), (), AFTER),
    ], m


def test_branches_run_on_two_streams_and_meet() -> None:
    steps, _ = branches()
    found = schedule(steps, 2)
    assert found.count == 2
    assert found.streams[1] == found.streams[3] != found.streams[2] == found.streams[4]
    assert found.streams[0] == found.streams[6] == 0
    # One wait, where the branches meet; that all of them end is the frame's business.
    assert [len(w) for w in found.waits] == [0, 0, 0, 0, 0, 1, 0]
    assert schedule(steps, 1).count == 1


def test_memory_is_shared_only_in_order() -> None:
    steps, m = branches()
    for streams in (1, 2):
        plan = GpuPlan(steps=steps, memories=list(m.values()))
        for memory in plan.memories:
            memory.uses.clear()
        finish(plan, streams)
        before = plan.schedule.before
        for a in m.values():
            for b in m.values():
                if a is not b and together(before, a, b):
                    assert a.offset + 100 <= b.offset or b.offset + 100 <= a.offset
        assert all(memory.offset % 256 == 0 for memory in m.values())
        # In one stream a1 has ended when b2 starts; in two they may be alive together.
        assert together(before, m["a1"], m["b2"]) == (streams == 2)


def test_a_step_in_no_graph_stays_on_the_first_stream() -> None:
    steps, _ = branches()
    steps[4].obstacle = "it runs in PyTorch"
    assert schedule(steps, 4).streams[4] == 0


def layer(channels: int, height: int, width: int, **options: object) -> Layer:
    values: dict[str, object] = {
        "images": 1,
        "channels": channels,
        "height": height,
        "width": width,
        "out_channels": channels,
        "out_height": height,
        "out_width": width,
        "taps": 9,
        "itemsize": 2,
        "transposed": False,
        "stride": 1,
        "pending": True,
        "border": True,
        "ready": False,
        "statistics": True,
        **options,
    }
    return Layer(**values)  # type: ignore[arg-type]


def test_wide_layers_normalise_on_load_and_deep_ones_in_a_pass() -> None:
    """The flagship's two extremes, as the estimate sees them; on a device a clock decides."""
    assert forms.choose(layer(1024, 32, 64), None).kind == APPLIED
    assert forms.choose(layer(64, 512, 1024), None).kind == PROLOGUE
    assert forms.choose(layer(1024, 32, 64, pending=False, ready=True), None).kind == APPLIED


def test_a_clock_overrules_the_estimate_and_is_told_why() -> None:
    seconds = {PROLOGUE: 3e-5, APPLIED: 2e-5, LIBRARY: 1e-5}
    form = forms.choose(layer(256, 64, 64), lambda kind: seconds[kind])
    assert form.kind == LIBRARY and form.reason.startswith("measured 10 µs")
    assert "prologue 30 µs" in form.reason
    assert forms.choose(layer(256, 64, 64), None).reason.startswith("estimated")
    with pytest.raises(ValueError, match="library cannot run here: no"):
        forms.choose(layer(8, 8, 8, strange="no"), None, LIBRARY)


@pytest.mark.parametrize(("name", "value"), [("P2PFAST_STREAMS", "0"), ("P2PFAST_CUDA_GRAPHS", "maybe")])
def test_bad_settings(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        streams_wanted()
        graphs_wanted()


def test_plain_kernels_have_every_method_of_the_interface() -> None:
    from p2pfast.runtime.gpu.kernels import Kernels

    wanted = {name for name in vars(Kernels) if not name.startswith("_")}
    assert wanted <= set(dir(PlainKernels))
