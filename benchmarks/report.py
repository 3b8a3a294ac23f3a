"""Turns a result file of engines.py into the table of the README and a plot.

    python benchmarks/report.py results/engines_zen3.json --plot docs/engines.png

The table goes to standard output. Needs matplotlib for the plot (extra "bench").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["network"], row["size"]), {})[row["engine"]] = row
    return cases


def ratio(engines: dict[str, dict[str, Any]], mine: str) -> float | None:
    """The fastest peer's time over p2pfast's, of the same precision."""
    half = mine.endswith("bfloat16")
    peers = [
        row["median_s"]
        for name, row in engines.items()
        if not name.startswith("p2pfast") and name.endswith("bfloat16") == half
    ]
    return min(peers) / engines[mine]["median_s"] if peers and mine in engines else None


def table(rows: Rows) -> str:
    """Milliseconds of each engine, and p2pfast's ratios, in Markdown."""
    cases = by_case(rows)
    names = list(dict.fromkeys(row["engine"] for row in rows))
    lines = [
        "| network, size | " + " | ".join(names) + " | float32 | bfloat16 |",
        "|---" * (len(names) + 3) + "|",
    ]
    for (network, size), engines in cases.items():
        cells = [f"{engines[n]['median_s'] * 1e3:.0f}" if n in engines else "" for n in names]
        for mine in ("p2pfast", "p2pfast_bfloat16"):
            value = ratio(engines, mine)
            cells.append("" if value is None else f"**{value:.2f}×**")
        lines.append(f"| {network} {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: Rows, title: str, path: Path) -> None:
    """Bars of speed against PyTorch eager in float32, a group a network; p2pfast's in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = by_case(rows)
    names = [n for n in dict.fromkeys(row["engine"] for row in rows) if n != "eager"]
    figure, axes = pyplot.subplots(figsize=(1.7 * len(cases) + 3, 4.2))
    width, own = 0.85 / len(names), iter(("darkred", "red", "orange"))
    for i, name in enumerate(names):
        heights = []
        for engines in cases.values():
            eager = engines.get("eager", {}).get("median_s")
            heights.append(eager / engines[name]["median_s"] if eager and name in engines else 0.0)
        colour = next(own) if name.startswith("p2pfast") else str(0.35 + 0.5 * i / len(names))
        axes.bar([x + i * width for x in range(len(cases))], heights, width, label=name, color=colour)
    axes.set_xticks(
        [x + 0.425 - width / 2 for x in range(len(cases))], [f"{n}\n{s}" for n, s in cases], fontsize=8
    )
    axes.set_ylabel("speed, PyTorch eager float32 = 1")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="what engines.py wrote")
    parser.add_argument("--plot", type=Path, help="write the plot there")
    options = parser.parse_args()
    found = json.loads(options.results.read_text())
    print(table(found["rows"]))
    if options.plot is not None:
        threads = found["rows"][0]["threads"]
        plot(found["rows"], f"{found['processor']}, {threads} threads, {found['level']}", options.plot)


if __name__ == "__main__":
    main()
