"""Results of the GPU benchmark: rows as they come, one folder, one summary. Needs no GPU."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the benchmark: its name, the most seconds it may take, and what it answers."""

    name: str
    seconds: int
    about: str


class Recorder:
    """Appends rows of one section to a file at once, so that what runs out of time keeps what it has."""

    def __init__(self, folder: Path, section: str) -> None:
        self.section, self.path = section, folder / f"{section}.jsonl"
        self.path.unlink(missing_ok=True)

    def __call__(self, **row: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"section": self.section, **row}) + "\n")
        print(line(row), flush=True)


def line(row: Row) -> str:
    """A row for people."""
    parts = []
    for key, value in row.items():
        text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())[:500]
        parts.append(text if key in ("what", "engine") else f"{key} {text}")
    return "  ".join(parts)


def read_rows(folder: Path, sections: Iterable[str]) -> list[Row]:
    """The rows of all sections; a last line that was cut off is left out."""
    rows = []
    for name in sections:
        path = folder / f"{name}.jsonl"
        for text in path.read_text().splitlines() if path.is_file() else []:
            try:
                rows.append(json.loads(text))
            except ValueError:
                continue
    return rows


def shares(rows: list[Row]) -> list[Row]:
    """Rows with the share of the measured ceilings that their rates reach.

    ``gb_s`` is compared with the copy, ``tflop_s`` with the large matrix product of the same dtype.
    """
    ceilings = {r["what"]: r for r in rows if r.get("section") == "ceilings"}
    copy = ceilings.get("copy", {}).get("gb_s")
    for row in rows:
        if row.get("section") == "ceilings":
            continue
        if copy and "gb_s" in row:
            row["share_of_copy"] = row["gb_s"] / copy
        product = ceilings.get(f"matmul {row.get('dtype')}", {}).get("tflop_s")
        if product and "tflop_s" in row:
            row["share_of_matmul"] = row["tflop_s"] / product
    return rows


def compared(rows: list[Row]) -> list[Row]:
    """For every case that several engines ran: p2pfast's time against the fastest of the others."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "engine" in row and "ms" in row:
            cases.setdefault((row["what"], row["dtype"]), {})[row["engine"]] = row["ms"]
    found = []
    for (what, dtype), engines in cases.items():
        ours = {k: v for k, v in engines.items() if k.startswith("p2pfast")}
        peers = {k: v for k, v in engines.items() if not k.startswith("p2pfast")}
        if ours and peers:
            mine, peer = min(ours, key=lambda k: ours[k]), min(peers, key=lambda k: peers[k])
            found.append(
                {
                    "what": what,
                    "dtype": dtype,
                    "p2pfast": mine,
                    "p2pfast_ms": ours[mine],
                    "fastest_peer": peer,
                    "peer_ms": peers[peer],
                    "times_faster": peers[peer] / ours[mine],
                }
            )
    return found


def median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def markdown(summary: Row) -> str:
    """The summary as a page: where it ran, what became of every section, comparisons, rates."""
    lines = [f"# {summary['device']}", ""]
    if "command" in summary:
        lines += [f"Measured on {summary['date']} by `{summary['command']}`.", ""]
    lines += [", ".join(f"{k} {v}" for k, v in summary["versions"].items()), ""]
    lines += ["| section | result | seconds |", "|---|---|---|"]
    for name, state in summary["sections"].items():
        lines.append(f"| {name} | {state['result']} | {state['seconds']:.0f} |")
    if summary["compared"]:
        lines += [
            "",
            "| case | dtype | p2pfast ms | fastest peer ms | times faster |",
            "|---|---|---|---|---|",
        ]
        for row in summary["compared"]:
            peer = f"{row['peer_ms']:.3g} ({row['fastest_peer']})"
            lines.append(
                f"| {row['what']} | {row['dtype']} | {row['p2pfast_ms']:.3g} ({row['p2pfast']}) | {peer} | "
                f"{row['times_faster']:.2f} |"
            )
    lines += _engines(summary["rows"]) + _rates(summary["rows"])
    rest = [r for r in summary["rows"] if "ms" not in r and "error" not in r]
    wrong = [r for r in summary["rows"] if "error" in r]
    for title, rows in (("Also", rest), ("Errors", wrong)):
        if rows:
            lines += ["", f"{title}:", "", *(f"- {line(r)}" for r in rows)]
    return "\n".join(lines) + "\n"


def _engines(rows: list[Row]) -> list[str]:
    """Every engine's time of every case, and its memory: the peak, or of a training step what it adds."""
    found = [r for r in rows if "engine" in r and "ms" in r]
    lines = ["", "| case | engine | dtype | ms | MB | relative error |", "|---" * 6 + "|"]
    for r in found:
        memory = r.get("peak_mb", r.get("step_mb"))
        cells = [r["what"], r["engine"], r["dtype"], f"{r['ms']:.3g}"]
        cells += ["" if memory is None else f"{memory:.0f}"]
        cells += [f"{r['relative_l2']:.1e}" if "relative_l2" in r else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines if found else []


def _rates(rows: list[Row]) -> list[str]:
    """Kernels with their shares of the ceilings."""
    found = [r for r in rows if "share_of_copy" in r or "share_of_matmul" in r]
    lines = ["", "| kernel | dtype | ms | GB/s | of the copy | TFLOP/s | of the product |", "|---" * 7 + "|"]
    for r in found:
        cells = [r["what"], str(r.get("dtype", "")), f"{r.get('ms', 0):.3g}"]
        for value, share in (("gb_s", "share_of_copy"), ("tflop_s", "share_of_matmul")):
            cells += [f"{r[value]:.0f}" if value in r else "", f"{r[share]:.0%}" if share in r else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines if found else []


def environment() -> Row:
    """The device, its driver and the versions in use."""
    import torch

    import p2pfast

    versions = {
        "p2pfast": p2pfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    versions["cuda"] = str(torch.version.cuda)
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "none"
    device = "no GPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        versions["cudnn"] = str(torch.backends.cudnn.version())
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ]
        try:
            versions["driver, clock, power"] = subprocess.run(
                query, capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            versions["driver, clock, power"] = f"unknown: {error}"
    return {"device": device, "versions": versions, "cores": os.cpu_count(), "system": platform.platform()}
