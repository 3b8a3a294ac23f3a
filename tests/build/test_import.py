"""Importing p2pfast: quick, silent, without CUDA and without Triton. Each in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


def run(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_is_quick_after_torch() -> None:
    code = """
        import time, torch
        start = time.process_time()
        import p2pfast, p2pfast.ops.instance_edges, p2pfast.runtime.availability
        print(time.process_time() - start)
    """
    # Twice at most: the first one may compile byte code.
    seconds = float(run(code).stdout)
    assert seconds < 1.0 or float(run(code).stdout) < 1.0


def test_never_warns() -> None:
    # torch itself may warn; what is imported after it must not.
    code = """
        import torch, warnings
        warnings.simplefilter("error")
        import p2pfast, p2pfast.cli, p2pfast.runtime.availability
        p2pfast.runtime.availability.report()
    """
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_never_touches_cuda() -> None:
    code = """
        import torch
        def touched(*args, **kwargs):
            raise AssertionError("CUDA was initialised")
        torch.cuda._lazy_init = torch.cuda.init = touched
        if hasattr(torch._C, "_cuda_init"):
            torch._C._cuda_init = touched
        import p2pfast, p2pfast.cli, p2pfast.ops.instance_edges
        from p2pfast.runtime.availability import report
        report()
        assert not torch.cuda.is_initialized()
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_works_when_triton_cannot_be_imported(error: str) -> None:
    code = f"""
        import sys, torch
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise {error}("no triton")
        sys.modules.pop("triton", None)
        sys.meta_path.insert(0, Refuse())
        import p2pfast, p2pfast.cli
        from p2pfast.ops.instance_edges import instance_edges
        from p2pfast.runtime.availability import report
        if {error} is ImportError:  # torch's own check for triton survives nothing else
            assert instance_edges(torch.tensor([[1, 2]])).tolist() == [[1, 1]]
        versions = report()["versions"]
        assert versions["triton"] is None and versions["triton_reason"], versions
    """
    result = run(code)
    assert result.returncode == 0, result.stderr


LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")


@pytest.mark.parametrize("level", LEVELS)
def test_level_forced_by_the_environment(level: str) -> None:
    code = """
        import torch
        from p2pfast import _C
        from p2pfast.ops.instance_edges import instance_edges
        try:
            instance_edges(torch.tensor([[1, 2]]))
        except RuntimeError as error:
            print("error", error)
        else:
            print("active", _C.active_level())
        print(_C.missing_for(__import__("os").environ["P2PFAST_CPU"]))
    """
    result = run(code, P2PFAST_CPU=level)
    assert result.returncode == 0, result.stderr
    outcome, _, missing = result.stdout.partition("\n")
    missing = missing.strip()
    if missing:
        assert outcome.startswith(f"error P2PFAST_CPU={level}: ") and f"lacks {missing}" in outcome
        assert "the highest it can run is" in outcome
    else:
        assert outcome == f"active {level}"


def test_unknown_level_lists_the_names() -> None:
    code = "import torch; from p2pfast import _C; _C.active_level()"
    result = run(code, P2PFAST_CPU="sse9")
    assert result.returncode != 0
    assert "P2PFAST_CPU=sse9: unknown instruction-set level" in result.stderr
    assert ", ".join(LEVELS) in result.stderr


def test_unset_and_empty_take_the_highest_level() -> None:
    code = "from p2pfast import _C; assert _C.active_level() == _C.supported_level()"
    assert run(code, P2PFAST_CPU="").returncode == 0


def test_a_wrong_level_does_not_break_the_report() -> None:
    code = """
        import json
        from p2pfast.runtime.availability import report
        processor = json.loads(json.dumps(report()))["processor"]
        assert processor["active_level"] is None and "P2PFAST_CPU=sse9" in processor["reason"], processor
    """
    result = run(code, P2PFAST_CPU="sse9")
    assert result.returncode == 0, result.stderr
