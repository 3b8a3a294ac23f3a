"""Builds p2pfast._C with CMake; everything else is in pyproject.toml.

Environment: P2PFAST_CUDA=auto|0|1, P2PFAST_EMULATE_WIDE=0|1 (16-lane code paths on an AVX2 machine),
P2PFAST_JOBS (compile jobs; the number of cores by default), P2PFAST_WERROR=0|1 (warnings are errors; off,
because compilers that nobody has tried warn of other things).
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str, attribute: str) -> str:
    """The executable of the Python package `name` if it is installed, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), attribute)
        found = shutil.which(name, path=os.fspath(folder))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise SystemExit(f"building p2pfast needs {name}: run `pip install {name}` first")
    return found


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise SystemExit("building p2pfast needs pybind11: run `pip install pybind11` first") from None
    return pybind11.get_cmake_dir()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        emulate, strict = (
            os.environ.get(f"P2PFAST_{name}", "0") not in ("", "0") for name in ("EMULATE_WIDE", "WERROR")
        )
        # One folder per interpreter and kind, kept between builds: only what changed is compiled again.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}{'-emulate' if emulate else ''}"
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake", "CMAKE_BIN_DIR")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja", "BIN_DIR"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_dir(),
            "P2PFAST_CUDA": os.environ.get("P2PFAST_CUDA", "") or "auto",
            "P2PFAST_EMULATE_WIDE": "ON" if emulate else "OFF",
            "P2PFAST_WERROR": "ON" if strict else "OFF",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *defines], check=True)
        jobs = os.environ.get("P2PFAST_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--target", "_C", "-j", jobs], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never written in place: another process may have the old module mapped.
        fresh = target.with_suffix(".new")
        shutil.copy2(build / target.name, fresh)
        os.replace(fresh, target)


setup(ext_modules=[Extension("p2pfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
