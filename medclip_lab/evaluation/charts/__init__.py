"""Charts as inline SVG: pure functions from numbers to markup, without a plotting library.

Colours and fonts are left to the page's style sheet (classes `c1` to `c8` and the names of the label states), so one
drawing serves light mode, dark mode and paper. Every text goes through an escape, and every coordinate through `num`,
which refuses NaN and infinity: a number that cannot be drawn is a ValueError, and the caller says why it is absent.
"""

from medclip_lab.evaluation.charts.bars import BarGroup, BarRow, bar_rows, grouped_bars
from medclip_lab.evaluation.charts.basics import (
    COLOURS,
    FONT,
    NARROW,
    SHAPES,
    fit,
    icon,
    mark,
    num,
    printable,
    tag,
    text_width,
    tick_labels,
    ticks,
)
from medclip_lab.evaluation.charts.curves import unit_curves
from medclip_lab.evaluation.charts.lines import Line, line_chart, smooth
from medclip_lab.evaluation.charts.points import Dot, DotRow, interval_plot, scatter

__all__ = [
    "COLOURS",
    "FONT",
    "NARROW",
    "SHAPES",
    "BarGroup",
    "BarRow",
    "Dot",
    "DotRow",
    "Line",
    "bar_rows",
    "fit",
    "grouped_bars",
    "icon",
    "interval_plot",
    "line_chart",
    "mark",
    "num",
    "printable",
    "scatter",
    "smooth",
    "tag",
    "text_width",
    "tick_labels",
    "ticks",
    "unit_curves",
]
