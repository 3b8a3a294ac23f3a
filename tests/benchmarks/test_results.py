"""The scripts that read result files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(engine: str, seconds: float) -> dict[str, Any]:
    return {"network": "n", "size": "8x8", "engine": engine, "threads": 1, "median_s": seconds}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_a_slower_or_missing_row_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = script("regression").compare
    old = written(tmp_path / "old.json", row("a", 1.0), row("b", 1.0), row("c", 1.0))
    new = written(tmp_path / "new.json", row("a", 1.05), row("b", 1.3))
    complaints = compare(old, new, 1.1)
    assert len(complaints) == 2 and "1.30" in complaints[0] and "missing" in complaints[1]
    assert compare(old, old, 1.1) == []


def test_the_table_compares_with_the_fastest_peer_of_the_precision() -> None:
    report = script("report")
    rows = [row("eager", 4.0), row("openvino", 3.0), row("p2pfast", 1.0)]
    rows += [row("openvino_bfloat16", 2.5), row("p2pfast_bfloat16", 0.5)]
    table = report.table(rows)
    assert "**3.00×**" in table and "**5.00×**" in table and "4000" in table
