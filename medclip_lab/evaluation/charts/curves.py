"""Curves in the unit square: ROC, precision and recall, reliability."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from medclip_lab.evaluation.charts.basics import label, num, svg, tag
from medclip_lab.evaluation.charts.lines import Line

_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_MOST = 600  # corners of a curve: more cost bytes and show nothing


def unit_curves(
    lines: Sequence[Line],
    *,
    width: float,
    x_label: str,
    y_label: str,
    description: str,
    reference: tuple[tuple[float, float], tuple[float, float]] | None = None,
    dots: bool = False,
) -> Markup:
    """Curves of shares over shares, both from 0 to 1, in a square; points are joined in their own order.

    Args:
        reference: ends of one dashed line, such as chance.
        dots: mark each point, with its values as tooltip.

    Raises:
        ValueError: no curve, or a point that is not in the unit square.
    """
    points = [value for line in lines for point in line.points for value in point]
    if not points or not all(math.isfinite(value) and -1e-9 <= value <= 1 + 1e-9 for value in points):
        raise ValueError("curves need points in the unit square: leave the curve out and give its reason")
    left, top, right, bottom = 40.0, 24.0, width - 10, width - 26

    def sx(x: float) -> float:
        return left + x * (right - left)

    def sy(y: float) -> float:
        return bottom - y * (bottom - top)

    drawn = [label(y_label, width, x=0, y=12, class_="name")]
    for tick in _TICKS:
        drawn.append(tag("path", d=f"M{num(left)} {num(sy(tick))}H{num(right)}", class_="grid"))
        drawn.append(tag("text", f"{tick:g}", x=left - 8, y=sy(tick) + 4, text_anchor="end", class_="tick"))
        drawn.append(tag("text", f"{tick:g}", x=sx(tick), y=bottom + 16, text_anchor="middle", class_="tick"))
    drawn.append(label(x_label, width, x=right, y=width + 6, text_anchor="end", class_="name"))
    if reference is not None:
        (x0, y0), (x1, y1) = reference
        path = f"M{num(sx(x0))} {num(sy(y0))}L{num(sx(x1))} {num(sy(y1))}"
        drawn.append(tag("path", d=path, class_="reference"))
    for line in lines:
        kept = _corners(line.points)
        step = math.ceil(len(kept) / _MOST)
        kept = kept[::step] + ([kept[-1]] if (len(kept) - 1) % step else [])
        path = "M" + "L".join(f"{num(sx(x))} {num(sy(y))}" for x, y in kept)
        drawn.append(tag("path", tag("title", line.name), d=path, class_=f"line {line.css}"))
        for x, y in kept if dots else []:
            hint = tag("title", f"{line.name}, {x_label} {x:.3f}: {y:.3f}")
            drawn.append(tag("circle", hint, cx=sx(x), cy=sy(y), r=4, class_=f"solid {line.css}"))
    return svg(width, width + 12, description, drawn)


def _corners(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without the points in the middle of a level or upright stretch: of a step only its ends are needed."""
    kept: list[tuple[float, float]] = []
    for point in points:
        while len(kept) > 1 and any(kept[-2][axis] == kept[-1][axis] == point[axis] for axis in (0, 1)):
            kept.pop()
        kept.append(point)
    return kept
