"""What a bench measured as bars, in one SVG file."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from medclip_lab.evaluation.charts import BarRow, bar_rows, tag
from medclip_lab.files import atomic_file

STYLE = """
text{font:13px system-ui,sans-serif;fill:#1d2733}
.head{font-size:15px;font-weight:600}
.c1{fill:#1f77b4}
.c2{fill:#b9c3cd}
"""
WIDTH, MARGIN, HEAD = 820.0, 20.0, 34.0


def draw(title: str, panels: Sequence[tuple[str, Sequence[BarRow]]], path: Path) -> None:
    """Write panels of bars below each other; the colours are c1 for ours and c2 for a peer."""
    top = MARGIN
    drawn: list[str] = [tag("style", STYLE), tag("text", title, x=MARGIN, y=top + 12, class_="head")]
    top += HEAD
    for head, rows in panels:
        drawn.append(tag("text", head, x=MARGIN, y=top + 12))
        top += HEAD - 10
        chart = str(bar_rows(rows, width=WIDTH, description=head))
        height = 29.0 * len(rows)
        drawn.append(Markup(chart.replace("<svg ", f'<svg x="{MARGIN:g}" y="{top:g}" ', 1)))  # noqa: S704 - our chart
        top += height + MARGIN
    width = WIDTH + 2 * MARGIN
    background = tag("rect", width=width, height=top, fill="#ffffff")
    svg = tag("svg", background, *drawn, xmlns="http://www.w3.org/2000/svg", width=width, height=top, role="img")
    with atomic_file(path) as temporary:
        temporary.write_text(str(svg), encoding="utf-8")
