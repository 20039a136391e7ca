"""Pages in one file: no server, no network, images inside."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sgpo.reporting.figures import save_figure

CSS = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:1040px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .3rem} h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #ddd}
img{max-width:100%;display:block;margin:1rem 0} .note{color:#666}
table{border-collapse:collapse;font-size:.9rem;display:block;overflow-x:auto}
th,td{padding:.25rem .8rem;text-align:left}
th{border-bottom:2px solid #ccc} td{border-bottom:1px solid #eee;vertical-align:top} td.n{text-align:right;
font-variant-numeric:tabular-nums} pre{background:#f6f7f8;padding:.8rem;overflow-x:auto;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.85rem;margin:.3rem 0} summary{cursor:pointer}
.tag{padding:0 .45em;border-radius:.5em;background:#eceff1;font-size:.85em} .right{background:#d5efe3}
.wrong{background:#fbe0d3} .target{background:#0072b2;color:#fff} .masked{text-decoration:underline wavy #d55e00}
"""


def page(title: str, subtitle: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page: headings and the HTML under each."""
    body = "\n".join(f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{CSS}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        f'<p class="note">{escape(subtitle)}</p>\n{body}\n</body></html>\n'
    )


def note(sentence: str) -> str:
    """A sentence in grey."""
    return f'<p class="note">{escape(sentence)}</p>'


def cell_text(value: Any) -> str:
    """A table cell: numbers with six significant digits, everything else as it is."""
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of plain values; numbers stand to the right."""

    def cell(value: Any) -> str:
        return f"<td{' class=n' if isinstance(value, int | float) else ''}>{escape(cell_text(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def image(path: Path, alt: str) -> str:
    """A PNG, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def plot_html(draw: Callable[[], Figure | None], path: Path, title: str, missing: str) -> str:
    """The plot of `draw`, also written to `path`; where nothing can be drawn, a sentence with what is missing."""
    return image(path, title) if save_figure(draw, path) else note(f"{title}: left out, {missing}.")
