"""Wheels and source distributions, built from a copy of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a checkout"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's files with only the smallest native sources, so that a build takes seconds."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    for name in ("cmake", "p2pfast"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    kept = {
        "level",
        "processor",
        "parallel",
        "borrowed",
        "instance_edges",
        "runtime",
        "peak",
        "gemm",
        "simd",
        "bindings",
        "check",
    }
    for source in (ROOT / "csrc").rglob("*"):
        if source.is_file() and source.stem in kept and "tests" not in source.parts:
            target = copy / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    return copy


def build(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=checkout,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_wheel(checkout: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        ".",
    ]
    environment = os.environ | {"P2PFAST_CUDA": "0"}
    result = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("p2pfast/_C.") and name.endswith(".so") for name in names) == 1
    assert "p2pfast/ops/instance_edges/README.md" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "benchmarks", "build"))]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = """
import p2pfast, torch
from p2pfast import _C
from p2pfast.ops.instance_edges import instance_edges
assert not hasattr(_C, "cuda_instance_edges")
assert _C.build_info()["cuda_reason"] == "p2pfast was built with P2PFAST_CUDA=0"
assert instance_edges(torch.tensor([[1, 1, 2]])).tolist() == [[0, 1, 1]]
print(p2pfast.__path__[0])
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith(str(tmp_path))


def test_unknown_cuda_setting(checkout: Path) -> None:
    result = build(checkout, "build_ext", P2PFAST_CUDA="maybe")
    assert result.returncode != 0
    assert "P2PFAST_CUDA=maybe: choose auto, 0 or 1" in result.stdout + result.stderr


def test_a_new_binding_needs_only_its_file(checkout: Path, tmp_path: Path) -> None:
    (checkout / "csrc/bindings/answer.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        "namespace p2pfast {\n"
        'void bind_answer(pybind11::module_& m) { m.def("answer", [] { return 42; }); }\n'
        "}\n"
    )
    result = build(checkout, "build_ext", "--build-lib", str(tmp_path), P2PFAST_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr
    code = "import _C; print(_C.answer())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "p2pfast", capture_output=True, text=True
    )
    assert run.stdout.strip() == "42", run.stderr
