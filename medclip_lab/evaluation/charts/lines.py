"""Series over a common axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from medclip_lab.evaluation.charts.basics import NARROW, label, num, svg, tag, text_width, tick_labels, ticks, widened


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
    x_low, x_high = widened(min(x for x, _ in points), max(x for x, _ in points))
    y_low, y_high = widened(min(y for _, y in points), max(y for _, y in points))
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

    drawn = [label(y_label, width, x=0, y=12, class_="name")]
    for y, name in zip(y_ticks, y_names, strict=True):
        drawn.append(tag("path", d=f"M{num(left)} {num(sy(y))}H{num(right)}", class_="grid"))
        drawn.append(tag("text", name, x=left - 8, y=sy(y) + 4, text_anchor="end", class_="tick"))
    for x, name in zip(x_ticks, tick_labels(x_ticks), strict=True):
        drawn.append(tag("text", name, x=sx(x), y=bottom + 18, text_anchor="middle", class_="tick"))
    drawn.append(label(x_label, width, x=right, y=height - 4, text_anchor="end", class_="name"))
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
    return svg(width, height, description, drawn)
