"""Compares two result files of the same benchmark by ratio, and fails where the newer one is slower.

    python benchmarks/regression.py old.json new.json [--allowed 1.1]

Rows are matched by everything that is not a measurement. Exit status 1: a row is slower than allowed, or a
row of the old file is missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

TIME = "median_s"
MEASURED = set("first_s median_s min_s relative_l2 psnr_db peak_gb before_gb planned_gb rounds".split())


def rows_of(path: Path) -> dict[tuple[Any, ...], float]:
    """Seconds by what was measured."""
    found = {}
    for row in json.loads(path.read_text())["rows"]:
        key = tuple((k, v) for k, v in sorted(row.items()) if k not in MEASURED)
        found[key] = row.get(TIME, row.get("min_s"))
    return found


def compare(old: Path, new: Path, allowed: float) -> list[str]:
    """Complaints, none if the newer file is as good; prints a line a row."""
    before, after = rows_of(old), rows_of(new)
    complaints = []
    for key, seconds in before.items():
        label = " ".join(str(v) for _, v in key)
        if key not in after:
            complaints.append(f"missing: {label}")
            continue
        ratio = after[key] / seconds
        print(f"{ratio:6.2f}  {label}")
        if ratio > allowed:
            complaints.append(f"{ratio:.2f} times the time of before: {label}")
    return complaints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--allowed", type=float, default=1.1, help="ratio of times that still passes")
    options = parser.parse_args()
    complaints = compare(options.old, options.new, options.allowed)
    print("\n".join(complaints) or "no regression")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
