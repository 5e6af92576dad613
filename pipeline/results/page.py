"""Pages of a report: HTML that needs no other file and no network, in light and dark, to be printed too."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.resources import files

STATIC = "static"


def document(title: str, body: Iterable[str], *, plots: bool = False) -> str:
    """Write a whole page.

    Parameters
    ----------
    title
        Its title, as text.
    body
        Its parts, as HTML.
    plots
        Whether it needs Plotly, which takes 5 MB.
    """
    scripts = ([_plotly()] if plots else []) + [_static("report.js")]
    last = "".join(f"<script>{script}</script>" for script in scripts[-1:])
    first = "".join(f"<script>{script}</script>" for script in scripts[:-1])
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_static('colours.css')}{_static('report.css')}</style>{first}</head>"
        f"<body><main>{''.join(body)}</main>{last}</body></html>\n"
    )


def text(words: object) -> str:
    """Escape a text for HTML and its attributes."""
    return html.escape(str(words))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Write a table of texts."""
    top = "".join(f"<th scope=col>{text(cell)}</th>" for cell in head)
    lines = ["".join(f"<td>{text(cell)}</td>" for cell in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def image(data: bytes, kind: str, alt: str, attributes: str = "") -> str:
    """Write an image into the page: its file's bytes, its type (png or jpeg), and what it shows."""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{text(alt)}" loading=lazy {attributes}>'


@lru_cache
def _static(name: str) -> str:
    return (files("pipeline.results") / STATIC / name).read_text()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script
