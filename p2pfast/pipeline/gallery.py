"""The HTML page beside the results: every input with what became of it."""

from __future__ import annotations

import html
from pathlib import Path
from urllib.parse import quote

from p2pfast.pipeline.images import write_text

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 2rem auto; max-width: 1600px; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
       background: #fff; color: #222; }}
figure {{ margin: 0 0 2.5rem; }}
figcaption {{ font-weight: 600; overflow-wrap: anywhere; }}
.row {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: .75rem; }}
.row a {{ color: inherit; text-decoration: none; font-size: .85rem; }}
img {{ width: 100%; height: auto; display: block; background: #eee; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ccc; text-align: left; }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181c; color: #ddd; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def input_picture(folder: Path, name: str) -> Path:
    """Where the gallery keeps the picture of the input called ``name``."""
    return folder / "gallery" / f"{name}.jpg"


def page(title: str, body: str) -> str:
    """A complete HTML page; ``body`` is HTML, ``title`` is text."""
    return _PAGE.format(title=html.escape(title), body=body)


def figure(name: str, pictures: list[tuple[str, str]]) -> str:
    """One entry: ``pictures`` are (caption, path relative to the page) side by side."""
    cells = "\n".join(
        f'<a href="{quote(path)}"><img src="{quote(path)}" loading="lazy" alt="{html.escape(caption)} of '
        f'{html.escape(name)}">{html.escape(caption)}</a>'
        for caption, path in pictures
    )
    row = f'<div class="row">\n{cells}\n</div>'
    return f"<figure>\n<figcaption>{html.escape(name)}</figcaption>\n{row}\n</figure>"


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
