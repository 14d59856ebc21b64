"""Bars: side by side, and lying."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from medclip_lab.evaluation.charts.basics import NARROW, label, num, svg, tag, text_width, ticks


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars that stand side by side: one value for each series (None leaves a gap), and the value of chance."""

    name: str
    values: Sequence[float | None]
    reference: float | None = None


def grouped_bars(
    groups: Sequence[BarGroup], *, series: Mapping[str, str], width: float, height: float = 240, description: str
) -> Markup:
    """Bars of shares from 0 to 1 by group and series, with a dash over each group at chance.

    Args:
        series: name to colour class, in the order of each group's values.
    """
    shares = [v for group in groups for v in (*group.values, group.reference) if v is not None]
    if not groups or not all(math.isfinite(v) and v >= 0 for v in shares):
        raise ValueError("grouped bars need at least one group and finite shares that are not negative")
    y_ticks = ticks(0, max(0.05, *shares) * 1.05 if shares else 1.0, 4)
    top_value = max(y_ticks[-1], max(shares, default=1.0), 0.05)
    left, top, bottom = 46.0, 18.0, height - 28
    pitch = (width - left) / len(groups)
    bar = min(34.0, (pitch - 18) / max(1, len(series)))
    labelled = bar >= 26  # a narrower bar cannot carry its number: the table has it

    def sy(y: float) -> float:
        return bottom - y / top_value * (bottom - top)

    drawn = []
    for y in y_ticks:
        drawn.append(tag("path", d=f"M{num(left)} {num(sy(y))}H{num(width)}", class_="grid"))
        drawn.append(tag("text", f"{100 * y:g}%", x=left - 8, y=sy(y) + 4, text_anchor="end", class_="tick"))
    for i, group in enumerate(groups):
        start = left + pitch * i + (pitch - bar * len(series)) / 2
        for j, ((name, css), value) in enumerate(zip(series.items(), group.values, strict=True)):
            if value is None:
                continue
            hint = tag("title", f"{group.name}, {name}: {100 * value:.1f}%")
            x, y = start + bar * j + 1.5, min(sy(value), bottom - 1)
            drawn.append(
                tag("rect", hint, x=x, y=y, width=max(1.0, bar - 3), height=bottom - y, rx=2, class_=f"solid {css}")
            )
            if labelled:
                drawn.append(
                    tag(
                        "text",
                        f"{100 * value:.{0 if value >= 0.0995 else 1}f}",
                        x=x + (bar - 3) / 2,
                        y=y - 5,
                        text_anchor="middle",
                        class_="tick",
                    )
                )
        if group.reference is not None:
            hint = tag("title", f"{group.name}, chance: {100 * group.reference:.1f}%")
            line = f"M{num(start - 5)} {num(sy(group.reference))}h{num(bar * len(series) + 10)}"
            drawn.append(tag("path", hint, d=line, class_="reference"))
        drawn.append(
            label(group.name, pitch, x=left + pitch * (i + 0.5), y=bottom + 20, text_anchor="middle", class_="name")
        )
    return svg(width, height, description, drawn)


@dataclass(frozen=True, kw_only=True)
class BarRow:
    """One horizontal bar: its parts as (css class, length, tooltip), and the text at its right."""

    name: str
    parts: Sequence[tuple[str, float, str]]
    note: str = ""


def bar_rows(rows: Sequence[BarRow], *, width: float, description: str) -> Markup:
    """Horizontal bars, stacked from their parts, on one common scale from zero."""
    totals = [sum(length for _, length, _ in row.parts) for row in rows]
    if not rows or not all(math.isfinite(length) and length >= 0 for row in rows for _, length, _ in row.parts):
        raise ValueError("bars need at least one row and finite lengths that are not negative")
    stacked = width < NARROW
    pitch = 44.0 if stacked else 29.0
    left = 0.0 if stacked else min(0.36 * width, 18 + max(text_width(row.name) for row in rows))
    notes = max(text_width(row.note) for row in rows)
    right = width if stacked else width - min(0.3 * width, 12 + notes)
    scale = (right - left) / (max(totals) or 1.0)
    drawn = []
    for i, row in enumerate(rows):
        y = pitch * i
        middle = y + (30 if stacked else pitch / 2)
        text_y = y + 15 if stacked else middle + 4.5
        drawn.append(label(row.name, width * 0.6 if stacked else left - 16, x=0, y=text_y, class_="name"))
        x = left
        for css, length, title in row.parts:
            if length > 0:
                # A hair of air between parts; a sliver stays visible.
                w = max(1.0, length * scale - 1)
                hint = tag("title", title)
                drawn.append(tag("rect", hint, x=x, y=middle - 7, width=w, height=14, rx=2, class_=f"solid {css}"))
            x += length * scale
        if row.note:
            room = width * 0.4 if stacked else width - right - 8
            note_x, anchor = (width, "end") if stacked else (min(x, right) + 8, "start")
            drawn.append(label(row.note, room, x=note_x, y=text_y, text_anchor=anchor, class_="value name"))
    return svg(width, pitch * len(rows), description, drawn)
