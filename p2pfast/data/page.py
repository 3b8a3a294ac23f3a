"""HTML pages of pictures side by side, for results, the demo and training runs."""

from __future__ import annotations

import html
from urllib.parse import quote

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
