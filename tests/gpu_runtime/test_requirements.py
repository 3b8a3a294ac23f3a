"""What is said where a GPU is wanted and cannot be used."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from gpu_runtime.plain import PlainKernels
from networks import make

import p2pfast
from p2pfast.fuse import trial
from p2pfast.runtime.gpu import engine, frame, require
from p2pfast.runtime.memory import OutOfMemory

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
def test_no_gpu_is_an_error_with_the_remedy() -> None:
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net, backend="cuda")
    with pytest.raises(
        require.CannotUseGpu, match=r"backend='cuda': .*(CUDA build|nvidia-smi).*backend='cpu'"
    ):
        fast(x)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU" in str(require.device_reason())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA_VISIBLE_DEVICES" in str(require.device_reason())
    pretend(monkeypatch, (7, 5))
    assert "compute capability 7.5; the fused kernels need 8.0" in str(require.kernels_reason(device))
    pretend(monkeypatch)
    monkeypatch.setattr(
        require, "triton_reason", lambda: "Triton is not installed: `pip install p2pfast[gpu]`"
    )
    assert "p2pfast[gpu]" in str(require.kernels_reason(device))


def test_a_network_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    net, (x,) = make("resnet")
    with pytest.raises(
        require.CannotUseGpu, match=r"the network is on cpu: move it and its inputs with \.cuda"
    ):
        p2pfast.optimize(net, backend="cuda")(x)


def on_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "on_cpu", {"kernels": PlainKernels()})


def test_an_input_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    on_plain(monkeypatch)
    net, (x,) = make("resnet")
    with pytest.raises(require.WrongDevice, match=r"argument 0 is on meta and the network on cpu"):
        p2pfast.optimize(net, backend="cuda")(x.to("meta"))


def test_a_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    on_plain(monkeypatch)
    net, (x,) = make("resnet")
    with pytest.raises(
        OutOfMemory, match=r"memory_limit is 100\.0 KB and this input needs .*raise the limit"
    ):
        p2pfast.optimize(net, backend="cuda", memory_limit=100_000)(x)


def test_an_unsupported_dtype_runs_in_pytorch_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_plain(monkeypatch)
    net, (x,) = make("resnet")
    fast = p2pfast.optimize(net.double(), backend="cuda")
    assert torch.equal(fast(x.double()), net(x.double()).detach())
    assert "float16" in str(p2pfast.explain(fast))


def test_float16_is_for_cuda() -> None:
    net, _ = make("resnet")
    with pytest.raises(ValueError, match="move it to a CUDA device first"):
        p2pfast.optimize(net, dtype=torch.float16)
    p2pfast.optimize(net, dtype=torch.float16, backend="cuda")


@pytest.mark.parametrize("missing", ["Triton is not installed", "compute capability 7.5"])
def test_auto_leaves_a_gpu_that_cannot_be_used_to_pytorch_with_a_warning(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters pretend to be on a device, as nothing else of it is needed to see what is decided."""
    monkeypatch.setattr(require, "kernels_reason", lambda device: missing)
    net, (x,) = make("resnet")
    fast: Any = p2pfast.optimize(net)
    state = fast.__dict__["_p2pfast"]
    with pytest.warns(RuntimeWarning, match=f"leaves ResnetGenerator to PyTorch: {missing}"):
        with pytest.raises(Exception, match=missing):
            state._check_device(torch.device("cuda:0"))
    state.options["backend"] = "cuda"
    with pytest.raises(require.CannotUseGpu, match=missing):
        state._check_device(torch.device("cuda:0"))


def test_too_little_memory_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*size: int, **kind: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", none)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**8)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**8)
    with pytest.raises(
        OutOfMemory,
        match=r"tensors of 2\.00 GB cannot be allocated on cuda:0: 1\.00 GB of 80\.00 GB are free and "
        r"PyTorch keeps 200\.0 MB unused; take a smaller image or batch",
    ):
        frame.allocate(2 * 10**9, torch.device("cuda:0"), "memory for intermediate tensors")


def test_a_trial_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock waits for it: a clock on the host would compare launches (tests/ops/test_measured.py)."""
    asked: list[Any] = []
    monkeypatch.setattr(trial, "_gpu", lambda captured, tensors: torch.device("cuda", 3))
    monkeypatch.setattr(trial, "would_be_seen", lambda captured: False)
    monkeypatch.setattr(trial, "signature", lambda captured, tensors: "network")
    monkeypatch.setattr(trial, "unmarked", lambda captured: contextlib.nullcontext())
    monkeypatch.setattr(trial, "parameters", lambda captured: [])
    monkeypatch.setattr(trial.measured, "fixed", lambda: False)

    def pick(key: Any, *ways: Any, **options: Any) -> str:
        asked.append(options["device"])
        return str(ways[0].__name__)

    monkeypatch.setattr(trial.measured, "pick", pick)
    captured: Any = None
    assert trial.plan_loses(captured, [], ((), {}), lambda: None, lambda: None)
    assert trial.Trial(captured, []).fastest(["chains", "modules"]) == "chains"
    assert asked == [torch.device("cuda", 3)] * 2
