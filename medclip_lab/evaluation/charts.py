"""Charts as inline SVG: pure functions from numbers to markup, without a plotting library.

Colours and fonts are left to the page's style sheet (classes `c1` to `c8` and the names of the label states), so one
drawing serves light mode, dark mode and paper. Every text goes through an escape, and every coordinate through `num`,
which refuses NaN and infinity: a number that cannot be drawn is a ValueError, and the caller says why it is absent.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

FONT = 13  # px; the style sheet sets the same size for `svg.chart text`
NARROW = 500  # below this width the names of rows stand above their marks, not beside them
COLOURS = 8  # classes c1..c8 of the style sheet
SHAPES = ("dot", "diamond", "cross", "triangle", "square")

# XML 1.0 has no way to write these, not even escaped; lone surrogates cannot be encoded as UTF-8 either.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """`text` with the characters that no XML or UTF-8 file can hold replaced by U+FFFD."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def num(value: float) -> str:
    """A coordinate with at most one decimal.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if not math.isfinite(value):
        raise ValueError(f"a chart cannot draw {value!r}: leave the value out and give its reason")
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """One element; strings are escaped unless they are Markup; `class_` means `class`, `text_anchor` `text-anchor`."""
    head = ""
    for key, value in attributes.items():
        if value is not None:
            text = printable(value) if isinstance(value, str) else num(value)
            head += f' {key.rstrip("_").replace("_", "-")}="{escape(text)}"'
    body = "".join(escape(child if isinstance(child, Markup) else printable(child)) for child in children)
    return Markup(f"<{name}{head}>{body}</{name}>")  # noqa: S704 - head and body were escaped just above


def _svg(width: float, height: float, description: str, children: Iterable[Markup]) -> Markup:
    return tag(
        "svg",
        *children,
        class_="chart",
        viewBox=f"0 0 {num(width)} {num(height)}",
        width=width,
        height=height,
        role="img",
        aria_label=description,
    )


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """At most `count` + 1 evenly spaced round numbers in [low, high]: multiples of 1, 2, 2.5 or 5 times a power of ten.

    `whole` keeps to integers, for an axis that counts.

    Raises:
        ValueError: an end is not finite, or the range is empty.
    """
    span = high - low
    if not math.isfinite(span):
        raise ValueError(f"an axis cannot go from {low!r} to {high!r}")
    if span <= 1e-12 * max(1.0, abs(low), abs(high)) or count < 1:
        raise ValueError(f"an axis from {low!r} to {high!r} with {count} steps is empty")
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    steps = [m * magnitude for m in (1, 2, 2.5, 5, 10) if not whole or (magnitude >= 1 and m * magnitude % 1 == 0)]
    step = next((step for step in steps if step >= span / count * (1 - 1e-9)), 1.0)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [min(max(i * step, low), high) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The shortest decimals that keep neighbouring ticks apart: 0.25, 0.50 or 1,000, 2,000."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values and values[0] else 1.0
    decimals = next((d for d in range(12) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), 12)
    return [f"{value + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}") for value in values]


def text_width(text: str, size: float = FONT) -> float:
    """An upper estimate of a text's width in px, made for the widest of the usual system fonts."""
    ems = 0.0
    for char in text:
        if unicodedata.east_asian_width(char) in "WF":
            ems += 1.05
        elif char in "iljtfr.,:;'|!() ":
            ems += 0.42
        else:
            ems += 0.78 if char.isupper() or char in "mwMW%@" else 0.64
    return ems * size


def fit(text: str, width: float, size: float = FONT) -> str:
    """`text`, cut with an ellipsis where it would be wider than `width` px."""
    text = " ".join(text.split())
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _label(text: str, width: float, **attributes: str | float | None) -> Markup:
    shown = fit(text, width)
    hint = [tag("title", text)] if shown != " ".join(text.split()) else []
    return tag("text", shown, *hint, **attributes)


def mark(shape: str, x: float, y: float, css: str, title: str = "") -> Markup:
    """One marker of `SHAPES` around (x, y); shapes differ as well as colours, for those who see no colours."""
    hint = [tag("title", title)] if title else []
    if shape == "dot":
        return tag("circle", *hint, cx=x, cy=y, r=5, class_=f"solid {css}")
    at = f"M{num(x)} {num(y)}"
    paths = {
        "diamond": f"{at}m0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "cross": f"{at}m-4 -4l8 8m0 -8l-8 8",
        "triangle": f"{at}m0 -5.5l5.5 9.5h-11z",
        "square": f"{at}m-4.5 -4.5h9v9h-9z",
    }
    return tag("path", *hint, d=paths[shape], class_=f"ring {css}")


def icon(kind: str, css: str) -> Markup:
    """The key of a legend: a marker of `SHAPES`, or a `line`, a `reference` line, a `bar`."""
    if kind in ("line", "reference"):
        drawn = tag("path", d="M1 8h14", class_=f"{kind} {css}")
    elif kind == "bar":
        drawn = tag("rect", x=2, y=2, width=12, height=12, rx=2, class_=f"solid {css}")
    else:
        drawn = mark(kind, 8, 8, css)
    return tag("svg", drawn, class_="icon", viewBox="0 0 16 16", width=16, height=16, aria_hidden="true")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a line chart; `css` is a colour class."""

    name: str
    points: Sequence[tuple[float, float]]
    css: str

    @property
    def smoothed(self) -> bool:
        """Whether there are points enough for a moving mean to say more than they do."""
        return len(self.points) >= 30


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centred moving mean; at the ends the window shrinks to a third before it leans, so they neither hook nor lag."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    n, half = len(values), window // 2
    means = []
    for i in range(n):
        reach = max(min(half, i, n - 1 - i), half // 3)
        start, stop = max(0, i - reach), min(n, i + reach + 1)
        means.append((sums[stop] - sums[start]) / (stop - start))
    return means


def _thin(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points that keep the lowest and the highest of each stretch, so no spike is lost."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def line_chart(
    lines: Sequence[Line], *, width: float, height: float = 300, x_label: str, y_label: str, description: str
) -> Markup:
    """Series over a common axis. A series of many points is drawn pale, with its moving mean over it."""
    points = [point for line in lines for point in line.points]
    if not points or not all(map(math.isfinite, (value for point in points for value in point))):
        raise ValueError("a line chart needs points, and every one of them finite")
    x_low, x_high = _widened(min(x for x, _ in points), max(x for x, _ in points))
    y_low, y_high = _widened(min(y for _, y in points), max(y for _, y in points))
    x_ticks = ticks(x_low, x_high, 4 if width < NARROW else 8, whole=all(x == int(x) for x, _ in points))
    y_ticks = ticks(y_low, y_high, 5)
    y_names = tick_labels(y_ticks)
    left, top, right, bottom = 12 + max(map(text_width, y_names)), 26.0, width - 16, height - 42

    def sx(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def sy(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    def path(line: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{num(sx(x))} {num(sy(y))}" for x, y in line)

    drawn = [_label(y_label, width, x=0, y=12, class_="name")]
    for y, name in zip(y_ticks, y_names, strict=True):
        drawn.append(tag("path", d=f"M{num(left)} {num(sy(y))}H{num(right)}", class_="grid"))
        drawn.append(tag("text", name, x=left - 8, y=sy(y) + 4, text_anchor="end", class_="tick"))
    for x, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        drawn.append(tag("text", name, x=sx(x), y=bottom + 18, text_anchor="middle", class_="tick"))
    drawn.append(_label(x_label, width, x=right, y=height - 4, text_anchor="end", class_="name"))
    for line in sorted(lines, key=lambda line: -len(line.points)):  # sparse series lie on top of dense ones
        ordered = sorted(line.points)
        main = ordered
        if line.smoothed:
            drawn.append(tag("path", d=path(_thin(ordered, 600)), class_=f"raw {line.css}"))
            means = smooth([y for _, y in ordered], max(7, len(ordered) // 30))
            main = [(x, mean) for (x, _), mean in zip(ordered, means, strict=True)]
        drawn.append(tag("path", d=path(_thin(main, 300)), class_=f"line {line.css}"))
        css, radius = ("hit", 7.0) if line.smoothed else (f"solid {line.css}", 3.5)
        for x, y in ordered[:: math.ceil(len(ordered) / 80)]:
            hint = tag("title", f"{line.name}, {x_label} {x:,g}: {y:.4g}")
            drawn.append(tag("circle", hint, cx=sx(x), cy=sy(y), r=radius, class_=css))
    return _svg(width, height, description, drawn)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that an axis can show even where all values are the same."""
    if high - low > 1e-9 * max(1.0, abs(low), abs(high)):
        return low, high
    pad = 0.5 * max(1.0, abs(low))
    return low - pad, high + pad


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
        drawn.append(_label(row.name, room, x=0, y=text_y, class_=css))
        if row.value is None:
            x, note_y = (0.0, middle + 4.5) if stacked else (left + 6, text_y)
            drawn.append(_label(row.note, width - x - 8, x=x, y=note_y, class_="missing"))
        else:
            room = width * 0.45 if stacked else width - right - 12
            drawn.append(_label(row.note, room, x=width, y=text_y, text_anchor="end", class_=f"value {css}"))
            if row.low is not None and row.high is not None:
                bar = f"M{num(sx(row.low))} {num(middle)}H{num(sx(row.high))}"
                drawn.append(tag("path", d=bar, class_="interval c1"))
            for name, (shape, colour) in controls.items():
                value = row.controls.get(name)
                if value is not None:
                    hint = f"{row.name}, {name}: {value:.3f}"
                    drawn.append(mark(shape, sx(value), middle, colour, hint))
            drawn.append(mark("dot", sx(row.value), middle, "c1", row.title or f"{row.name}: {row.note}"))
    return _svg(width, height, description, drawn)


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
            _label(group.name, pitch, x=left + pitch * (i + 0.5), y=bottom + 20, text_anchor="middle", class_="name")
        )
    return _svg(width, height, description, drawn)


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
        drawn.append(_label(row.name, width * 0.6 if stacked else left - 16, x=0, y=text_y, class_="name"))
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
            drawn.append(_label(row.note, room, x=note_x, y=text_y, text_anchor=anchor, class_="value name"))
    return _svg(width, pitch * len(rows), description, drawn)


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
    return _svg(width, height, description, drawn)
