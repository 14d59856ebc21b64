"""What all charts are made of: escaped elements, finite numbers, ticks, and texts of known width."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

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


def svg(width: float, height: float, description: str, children: Iterable[Markup]) -> Markup:
    """A chart as one element with a description for those who do not see it."""
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


def label(text: str, width: float, **attributes: str | float | None) -> Markup:
    """A text, cut to `width` px; what is cut off is told by its tooltip."""
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


def widened(low: float, high: float) -> tuple[float, float]:
    """A range that an axis can show even where all values are the same."""
    if high - low > 1e-9 * max(1.0, abs(low), abs(high)):
        return low, high
    pad = 0.5 * max(1.0, abs(low))
    return low - pad, high + pad
