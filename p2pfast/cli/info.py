"""``p2pfast info``: what is available on this machine, and why the rest is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


def run_info(as_json: bool) -> None:
    """Print the report of p2pfast.runtime.availability."""
    from p2pfast.runtime import availability

    report = availability.report()
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=str))
        return
    console = Console(highlight=False)
    for title, section in report.items():
        table = Table(title=title, title_justify="left", title_style="bold", show_header=title == "kernels")
        if title == "kernels":
            _kernels(table, section)
        else:
            _section(table, section)
        console.print(table)


def _section(table: Table, section: Mapping[str, Any]) -> None:
    for key, value in section.items():
        if value is None and key.endswith("reason"):
            continue
        if key == "levels" and isinstance(value, Mapping):
            for level, lacking in value.items():
                table.add_row(
                    f"level {level}", Text(f"this machine lacks {lacking}" if lacking else "runs here")
                )
        else:
            table.add_row(key.replace("_", " "), Text(_text(value)))


def _kernels(table: Table, kernels: list[Mapping[str, Any]]) -> None:
    targets = [key for key in kernels[0] if key != "name"] if kernels else []
    for heading in ("operator", *targets):
        table.add_column(heading)
    for kernel in kernels:
        verdicts = (kernel[target] for target in targets)
        table.add_row(
            kernel["name"], *(Text("yes" if v["available"] else f"no: {v['reason']}") for v in verdicts)
        )


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_text(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(entry) for entry in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
