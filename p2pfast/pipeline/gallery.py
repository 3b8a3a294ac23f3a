"""The HTML page beside the results: every input with what became of it."""

from __future__ import annotations

from pathlib import Path

from p2pfast.data.images import write_text
from p2pfast.data.page import figure, page


def input_picture(folder: Path, name: str) -> Path:
    """Where the gallery keeps the picture of the input called ``name``."""
    return folder / "gallery" / f"{name}.jpg"


def write_gallery(folder: Path, title: str, results: list[tuple[str, Path]]) -> Path:
    """Write ``folder``/index.html with (name, result file) entries; inputs are shown where pictured."""
    figures = []
    for name, result in results:
        pictures = []
        if input_picture(folder, name).exists():
            pictures.append(("input", input_picture(folder, name).relative_to(folder).as_posix()))
        pictures.append(("result", result.relative_to(folder).as_posix()))
        figures.append(figure(name, pictures))
    target = folder / "index.html"
    write_text(target, page(title, "\n".join(figures)))
    return target
