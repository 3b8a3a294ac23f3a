"""When a plan is captured as a CUDA graph, and what follows where that fails; PyTorch's CUDA is pretended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_runtime.plain import PlainKernels, ShuffledFrame
from networks import make, relative

import p2pfast
from p2pfast.ops.gpu import capture as capturing
from p2pfast.runtime.gpu import engine, frame
from p2pfast.runtime.gpu.plan import GpuPlan

CPU = torch.device("cpu")


class Graph:
    def __init__(self) -> None:
        self.replay = lambda: EVENTS.append("replay")


class Recorded(frame.Frame):
    def _on_streams(self, main: Any) -> None:
        EVENTS.append("steps")


EVENTS: list[str] = []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    @contextlib.contextmanager
    def capture(graph: Any, device: torch.device) -> Iterator[None]:
        EVENTS.append("capture")
        yield

    EVENTS.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(frame, "capture", capture)
    return Recorded(GpuPlan(), CPU)


def after(recorded: Recorded) -> list[str]:
    EVENTS.clear()
    recorded._during(None)
    return list(EVENTS)


def test_a_capture_follows_a_run_of_the_same_thread(recorded: Recorded) -> None:
    """cuDNN's choices are a thread's own: it would measure in the middle of another thread's capture."""
    assert after(recorded) == ["steps"]
    thread = threading.Thread(target=recorded._during, args=(None,))
    thread.start()
    thread.join()
    assert EVENTS == ["steps", "steps"]
    assert after(recorded) == ["steps"]
    assert after(recorded) == ["capture", "steps", "replay"]
    assert after(recorded) == ["replay"]


def test_without_a_graph_where_a_capture_fails(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def fails(graph: Any, device: torch.device) -> Iterator[None]:
        yield
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(frame, "capture", fails)
    assert after(recorded) == ["steps"]
    with pytest.warns(RuntimeWarning, match=r"without a CUDA graph: its capture failed \(operation not"):
        assert after(recorded) == ["steps", "steps"]
    assert after(recorded) == ["steps"]
    assert recorded.plan.obstacles == ["its capture failed (operation not permitted)"]


@pytest.mark.parametrize("wrong", [False, True])
def test_captures_are_on_the_device_and_leave_the_stream(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's own stream for captures is on the first device that had one, and stays after a failure."""
    current: list[Any] = ["callers"]

    @contextlib.contextmanager
    def graph(of: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert (of, stream, capture_error_mode) == ("graph", "stream of 1", "thread_local")
        current[0] = stream
        yield

    cuda = SimpleNamespace(
        device=lambda device: contextlib.nullcontext(),
        current_device=lambda: 1,
        current_stream=lambda: current[0],
        set_stream=lambda stream: current.__setitem__(0, stream),
        Stream=lambda device: f"stream of {device}",
        graph=graph,
    )
    monkeypatch.setattr(capturing, "torch", SimpleNamespace(cuda=cuda))
    capturing._stream.cache_clear()
    graph_of: Any = "graph"
    with pytest.raises(RuntimeError) if wrong else contextlib.nullcontext():
        with capturing.capture(graph_of, torch.device("cuda:1")):
            assert current == ["stream of 1"]
            if wrong:
                raise RuntimeError
    assert current == ["callers"] and not capturing._one.locked()
    capturing._stream.cache_clear()


def test_in_a_graph_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is that graph's for good: no later call gets it."""
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels(), "frame": ShuffledFrame})
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net, backend="cuda")
    expected = fast(x)
    state: Any = fast.__dict__["_p2pfast"]
    frames = [f for kept in state.engine.idle.values() for f in kept]
    monkeypatch.setattr(engine, "in_capture", lambda device: True)
    assert relative(fast(x), expected) == 0
    assert [f for kept in state.engine.idle.values() for f in kept] == frames
    assert state.engine.seconds() == [0.0] * len(state.engine.last[0].reports)
    monkeypatch.setattr(engine, "in_capture", lambda device: False)
    assert relative(fast(x), expected) == 0


def test_inference_mode_may_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan keeps is made outside of it: PyTorch refuses later writes to tensors made inside."""
    monkeypatch.setenv("P2PFAST_STRICT", "1")
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels(), "frame": ShuffledFrame})
    net, (x,) = make("resnet-batch")
    fast = p2pfast.optimize(net.eval(), backend="cuda")
    with torch.inference_mode():
        expected = fast(x)
    assert relative(fast(x), expected) == 0
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    changed = fast(x)
    assert relative(changed, expected) > 0.01
    with torch.inference_mode():
        assert relative(fast(x.clone()), changed) == 0
