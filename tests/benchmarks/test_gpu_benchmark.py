"""The GPU benchmark's own code: what it says without a GPU, how it records, isolates and compares."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def gpu() -> Any:
    import gpu as module

    return module


def test_a_dry_run_needs_no_gpu_and_stays_below_eight_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu().main(["unused", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert all(section.name in text for section in gpu().SECTIONS)
    assert sum(section.seconds for section in gpu().SECTIONS) < 480 and gpu().BUDGET < 480


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu().main([str(tmp_path / "out")]) == 2
    assert "no GPU to measure:" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_section_is_implemented() -> None:
    import gpu_sections

    assert set(gpu_sections.SECTIONS) == {section.name for section in gpu().SECTIONS}


def test_sections_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fails, one hangs and one works; what they wrote up to then is in the summary."""
    section = gpu().Section
    monkeypatch.setattr(
        gpu(), "SECTIONS", (section("bad", 60, ""), section("slow", 1, ""), section("good", 60, ""))
    )
    monkeypatch.setattr(gpu(), "missing", lambda: None)
    script = """import pathlib, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
(folder / f"{name}.jsonl").write_text('{"section": "%s", "what": "w"}\\n{"section": "cut' % name)
if name == "slow":
    time.sleep(60)
sys.exit(name == "bad")
"""
    (tmp_path / "gpu_sections.py").write_text(script)
    monkeypatch.setattr(gpu(), "__file__", str(tmp_path / "gpu.py"))
    command = [str(tmp_path / "out"), "--budget", "61", "--sections", "bad", "slow", "good"]
    assert gpu().main(command) == 1
    summary = json.loads((tmp_path / "out" / "gpu.json").read_text())
    results = {name: state["result"] for name, state in summary["sections"].items()}
    assert "status 1: see bad.log" in results["bad"] and "stopped after 1 s" in results["slow"]
    assert results["good"] == "done" and [r["section"] for r in summary["rows"]] == ["bad", "slow", "good"]
    assert "| good | done |" in (tmp_path / "out" / "gpu.md").read_text()


def test_what_a_section_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a section that is stopped, or that fails and leaves them, would go on using the device."""
    script = """import pathlib, subprocess, sys, time
late = pathlib.Path(sys.argv[2]) / "late"
work = f"import pathlib, time; time.sleep(1.5); pathlib.Path({str(late)!r}).touch()"
subprocess.Popen([sys.executable, "-c", work])
time.sleep(60 if sys.argv[1] == "slow" else 0)
"""
    (tmp_path / "gpu_sections.py").write_text(script)
    monkeypatch.setattr(gpu(), "__file__", str(tmp_path / "gpu.py"))
    for name in ("slow", "leaves"):
        gpu().run_section(gpu().Section(name, 1, ""), tmp_path, [], 0.8 if name == "slow" else 10.0)
    time.sleep(1.7)
    assert not (tmp_path / "late").exists()


def test_rows_that_are_errors_are_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a trial on the CPU is interpreted."""
    script = """import json, os, pathlib, sys
row = {"section": "s", "what": os.environ.get("TRITON_INTERPRET", ""), "error": "E"}
(pathlib.Path(sys.argv[2]) / "s.jsonl").write_text(json.dumps(row))
"""
    (tmp_path / "gpu_sections.py").write_text(script)
    monkeypatch.setattr(gpu(), "__file__", str(tmp_path / "gpu.py"))
    state = gpu().run_section(gpu().Section("s", 60, ""), tmp_path, ["--cpu"], 60.0)
    assert state["result"] == "done; 1 of its rows are errors: see s.jsonl"
    assert json.loads((tmp_path / "s.jsonl").read_text())["what"] == "1"


def test_a_section_may_use_what_others_left() -> None:
    assert gpu().allowance(30, 100, 50) == 50 and gpu().allowance(30, 60, 50) == 30
    assert gpu().allowance(30, 20, 50) == 20


def test_shares_and_comparisons(tmp_path: Path) -> None:
    import gpu_record

    record = gpu_record.Recorder(tmp_path, "ceilings")
    record(what="copy", gb_s=3000.0)
    record(what="matmul bfloat16", tflop_s=800.0)
    record = gpu_record.Recorder(tmp_path, "kernels")
    record(what="k", dtype="bfloat16", ms=1.0, gb_s=1500.0, tflop_s=200.0)
    for engine, ms in (("eager", 9.0), ("torch.compile", 6.0), ("p2pfast", 2.0), ("p2pfast slow", 3.0)):
        record(what="net", engine=engine, dtype="bfloat16", ms=ms)
    record(what="net", engine="broken", dtype="bfloat16", error="RuntimeError: no")
    rows = gpu_record.shares(gpu_record.read_rows(tmp_path, ["ceilings", "kernels", "absent"]))
    kernel = next(r for r in rows if r["what"] == "k")
    assert kernel["share_of_copy"] == 0.5 and kernel["share_of_matmul"] == 0.25
    (found,) = gpu_record.compared(rows)
    assert found["fastest_peer"] == "torch.compile" and found["times_faster"] == 3.0
    summary = {"device": "D", "versions": {"torch": "1"}, "sections": {}, "compared": [found], "rows": rows}
    page = gpu_record.markdown(summary)
    assert "| net | bfloat16 | 2 (p2pfast) | 6 (torch.compile) | 3.00 |" in page and "| 50% |" in page
    assert "| net | eager | bfloat16 | 9 |" in page and "net  broken" in page.split("Errors:")[1]


def test_outcomes_of_pytest() -> None:
    """Of one process and of many, and without counting what the summary says again."""
    import gpu_sections

    lines = [
        "tests/a.py::test_one PASSED      [ 50%]",
        "[gw3] [ 60%] FAILED tests/a.py::test_two[x y]",
        "tests/a.py::test_three SKIPPED (no reason) [ 70%]",
        "[gw1] [ 80%] ERROR tests/b.py::test_four",
        "FAILED tests/a.py::test_two[x y] - AssertionError",
        "= 1 failed, 1 passed in 3.0s =",
    ]
    counts, failed = gpu_sections.outcomes(lines)
    assert counts == {"passed": 1, "failed": 1, "errors": 1, "skipped": 1}
    assert failed == ["tests/a.py::test_two[x", "tests/b.py::test_four"]


def test_a_section_records_in_the_interpreter(tmp_path: Path) -> None:
    """The cheapest section as a process, on the CPU: its numbers mean nothing."""
    command = [sys.executable, str(FOLDER / "gpu_sections.py"), "ceilings", str(tmp_path)]
    subprocess.run([*command, "--scale", "small", "--cpu"], check=True, capture_output=True, timeout=120)
    rows = [json.loads(text) for text in (tmp_path / "ceilings.jsonl").read_text().splitlines()]
    assert {"copy", "matmul bfloat16", "second-level cache read"} <= {r["what"] for r in rows}
