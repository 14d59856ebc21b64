"""Dots: values with their intervals in rows, and points in a plane."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from medclip_lab.evaluation.charts.basics import (
    COLOURS,
    NARROW,
    label,
    mark,
    num,
    svg,
    tag,
    text_width,
    tick_labels,
    ticks,
)


@dataclass(frozen=True, kw_only=True)
class DotRow:
    """One row of an interval plot. Without a value, `note` is drawn in place of the marks; with one, at its right."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    controls: Mapping[str, float | None] = field(default_factory=dict)
    note: str = ""
    title: str = ""
    strong: bool = False


def interval_plot(
    rows: Sequence[DotRow], *, controls: Mapping[str, tuple[str, str]], reference: float, width: float, description: str
) -> Markup:
    """A dot with its interval for each row, its controls beside it, and one dashed reference line through all.

    Args:
        controls: name of a control to the (shape, colour class) it is drawn with, in the order of the legend.
        reference: where chance lies.
    """
    stacked = width < NARROW
    numbers = [reference, reference - 0.06, 1.0]
    for row in rows:
        numbers += [v for v in (row.value, row.low, row.high, *row.controls.values()) if v is not None]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("an interval plot needs finite numbers: give None and a note instead")
    low, high = math.floor(min(numbers) * 10) / 10, math.ceil(max(numbers) * 10 - 1e-9) / 10
    pitch, top = (46.0, 24.0) if stacked else (31.0, 26.0)
    left = 8.0 if stacked else min(0.36 * width, 20 + max((text_width(row.name) for row in rows), default=0))
    notes = max((text_width(row.note) for row in rows if row.value is not None), default=0)
    right = width - 8 if stacked else width - min(0.26 * width, 16 + notes)
    gap = 14.0 if any(row.strong for row in rows) else 0.0  # air between the rows that sum up and the others
    bottom = top + pitch * len(rows) + gap
    height = bottom + 10

    def sx(x: float) -> float:
        return left + (x - low) / (high - low) * (right - left)

    starts: list[float] = []
    for i, row in enumerate(rows):
        before = starts[-1] + pitch if starts else top
        starts.append(before + (gap if i and rows[i - 1].strong and not row.strong else 0))
    # Upright lines cross the marks only: the names and the reasons are read without a line through them.
    lanes = [
        (y + 22 if stacked else y, y + pitch) for y, row in zip(starts, rows, strict=True) if row.value is not None
    ]

    def upright(x: float) -> str:
        return "".join(f"M{num(sx(x))} {num(lane_top)}V{num(lane_bottom)}" for lane_top, lane_bottom in lanes)

    drawn = []
    x_ticks = ticks(low, high, 5 if stacked else 8)
    for x, name in zip(x_ticks, tick_labels(x_ticks), strict=True) if lanes else []:
        drawn.append(tag("path", d=upright(x), class_="grid"))
        drawn.append(tag("text", name, x=sx(x), y=top - 10, text_anchor="middle", class_="tick"))
    if lanes:
        drawn.append(tag("path", d=upright(reference), class_="reference"))
    for y, row in zip(starts, rows, strict=True):
        middle = y + (33 if stacked else pitch / 2)
        text_y = y + 16 if stacked else middle + 4.5
        css = "name strong" if row.strong else "name"
        room = left - 18
        if stacked:
            room = width - 12 - min(0.45 * width, text_width(row.note) if row.value is not None else 0)
        drawn.append(label(row.name, room, x=0, y=text_y, class_=css))
        if row.value is None:
            x, note_y = (0.0, middle + 4.5) if stacked else (left + 6, text_y)
            drawn.append(label(row.note, width - x - 8, x=x, y=note_y, class_="missing"))
        else:
            room = width * 0.45 if stacked else width - right - 12
            drawn.append(label(row.note, room, x=width, y=text_y, text_anchor="end", class_=f"value {css}"))
            if row.low is not None and row.high is not None:
                bar = f"M{num(sx(row.low))} {num(middle)}H{num(sx(row.high))}"
                drawn.append(tag("path", d=bar, class_="interval c1"))
            for name, (shape, colour) in controls.items():
                value = row.controls.get(name)
                if value is not None:
                    hint = f"{row.name}, {name}: {value:.3f}"
                    drawn.append(mark(shape, sx(value), middle, colour, hint))
            drawn.append(mark("dot", sx(row.value), middle, "c1", row.title or f"{row.name}: {row.note}"))
    return svg(width, height, description, drawn)


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of a scatter plot: `group` counts from 0, `hollow` points are drawn as small open squares."""

    x: float
    y: float
    group: int
    hollow: bool
    title: str = ""


def scatter(dots: Sequence[Dot], *, width: float, description: str) -> Markup:
    """Points without axes, one scale for both directions; class `g<n>` holds a group and `solid|ring` its two kinds.

    The drawing is as high as its points ask for, between 0.55 and 1 times its width.
    """
    if not dots or not all(math.isfinite(dot.x) and math.isfinite(dot.y) for dot in dots):
        raise ValueError("a scatter plot needs points, and every one of them finite")
    x_low, x_high = min(dot.x for dot in dots), max(dot.x for dot in dots)
    y_low, y_high = min(dot.y for dot in dots), max(dot.y for dot in dots)
    x_span, y_span = x_high - x_low, y_high - y_low
    height = width * (min(1.0, max(0.55, y_span / x_span)) if x_span > 0 else 0.55)
    scales = [(side - 24) / span for side, span in ((width, x_span), (height, y_span)) if span > 0]
    scale = min(scales, default=0.0)  # a single spot has no extent: it goes to the middle
    drawn = []
    for group in sorted({dot.group for dot in dots}):
        layers = []
        for hollow in (False, True):
            shapes = []
            for dot in dots:
                if dot.group == group and dot.hollow == hollow:
                    x = width / 2 + (dot.x - (x_low + x_high) / 2) * scale
                    y = height / 2 - (dot.y - (y_low + y_high) / 2) * scale
                    hint = [tag("title", dot.title)] if dot.title else []
                    if hollow:
                        shapes.append(tag("path", *hint, d=f"M{num(x - 2.5)} {num(y - 2.5)}h5v5h-5z"))
                    else:
                        shapes.append(tag("circle", *hint, cx=x, cy=y, r=3))
            if shapes:
                layers.append(tag("g", *shapes, class_="ring" if hollow else "solid"))
        drawn.append(tag("g", *layers, class_=f"g{group + 1} c{group % COLOURS + 1}"))
    return svg(width, height, description, drawn)
