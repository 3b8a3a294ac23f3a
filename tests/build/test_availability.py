from __future__ import annotations

import json
import subprocess

import pytest
import torch

from p2pfast.runtime import availability
from p2pfast.runtime.availability import report


def test_shape_of_the_report() -> None:
    found = json.loads(json.dumps(report()))
    assert set(found) == {"versions", "processor", "native", "gpu", "kernels"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"]
    assert found["processor"]["name"] and found["processor"]["cores"] >= 1
    assert found["processor"]["active_level"] in found["processor"]["levels"]
    assert found["native"]["available"] and found["native"]["compiler"]
    names = [kernel["name"] for kernel in found["kernels"]]
    assert "instance_edges" in names and names == sorted(names)


def test_everything_unavailable_has_a_reason() -> None:
    found = report()
    for kernel in found["kernels"]:
        for device in ("cpu", "cuda"):
            verdict = kernel[device]
            assert verdict["available"] == (verdict["reason"] is None), kernel
    assert found["gpu"]["available"] or found["gpu"]["reason"]
    assert found["versions"]["triton"] or found["versions"]["triton_reason"]
    assert found["native"]["cuda"] or found["native"]["reason"]


def test_instance_edges_runs_on_the_cpu() -> None:
    kernels = {kernel["name"]: kernel for kernel in report()["kernels"]}
    assert kernels["instance_edges"]["cpu"] == {"available": True, "reason": None}
    assert kernels["instance_edges"]["cuda"]["available"] == (
        torch.cuda.is_available() and report()["native"]["cuda"] is not None
    )


def test_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_options: object) -> None:
        raise OSError("broken machine")

    for part in ("_versions", "_processor", "_native", "_gpu", "_cpu_reason", "_cuda_reason"):
        monkeypatch.setattr(availability, part, broken)
    found = report()
    for part in ("versions", "processor", "native", "gpu"):
        assert found[part]["reason"] == "OSError: broken machine"
    assert all(kernel["cpu"]["reason"] == "OSError: broken machine" for kernel in found["kernels"])


def test_devices_come_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 580.65.06\n"
    monkeypatch.setattr(availability.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(
        availability.subprocess,
        "run",
        lambda command, **_options: subprocess.CompletedProcess(command, 0, answer, ""),
    )
    assert availability._devices() == [
        {
            "name": "NVIDIA H100 80GB HBM3",
            "compute_capability": "9.0",
            "memory": "81559 MiB",
            "driver": "580.65.06",
        }
    ]


def test_a_gpu_that_nvidia_smi_cannot_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_options: object) -> None:
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(availability.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(availability.subprocess, "run", fails)
    (device,) = availability._devices()
    assert device["name"] == "device 0" and "timed out" in device["reason"]


def test_a_cuda_build_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert availability._gpu() == {
        "available": False,
        "devices": [],
        "reason": "the driver reports no NVIDIA GPU (CUDA_VISIBLE_DEVICES, nvidia-smi)",
    }
