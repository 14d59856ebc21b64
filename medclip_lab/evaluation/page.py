"""One self-contained HTML page of a run: what went in, how it trained, what it can do, and against which controls.

The page asks the network for nothing (its content security policy forbids it), so it can be opened from a disk, mailed
or printed. Report texts are untrusted: the template escapes everything, and the policy names the page's one script by
its hash, so that text which got through all the same could not run. Images and report texts stand in the page as
readable content: it is as private as the data it was made from.
"""

import base64
import hashlib
import io
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, UnidentifiedImageError

from medclip_lab.evaluation import charts
from medclip_lab.evaluation.page_data import (
    MODEL,
    STATES,
    LossCurve,
    MapPoint,
    PageData,
)

MAP_LIMIT = 2000  # more points than this cost more bytes than they show
WIDE, NARROW = 808, 360  # px; each chart is drawn twice and the style sheet shows the one that fits


class Chart(NamedTuple):
    """One chart, drawn for a wide and for a narrow column."""

    wide: Markup
    narrow: Markup


class Control(NamedTuple):
    """How a control is drawn, in every chart of the page alike."""

    shape: str
    css: str


def image_uri(image: bytes, side: int) -> str:
    """`image` as a data: URI of a JPEG at most `side` px wide and high; metadata does not travel along.

    Raises:
        ValueError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            picture = _eight_bits(opened)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"the page cannot read one of its images ({len(image)} bytes): {error}") from None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    # Grain compresses badly without loss: as PNG the same pictures would be five times the page.
    encoded = io.BytesIO()
    picture.save(encoded, format="JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()


def _eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow would clip 16 bits at 255, which turns a radiograph white.
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        return Image.fromarray(((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8))
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None, decimals: int = 3) -> str:
    value = _finite(value)
    return "–" if value is None else f"{value:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _rank(value: float | None) -> str:
    return _number(value, 0 if value is not None and value == round(value, 0) else 1)


def _percent(value: float | None, decimals: int = 1) -> str:
    value = _finite(value)
    return "–" if value is None else f"{100 * value:.{decimals}f}%"


def _clamp(value: float) -> float:
    return min(1.0, max(0.0, _finite(value) or 0.0))


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _both(draw: Callable[[int], Markup]) -> Chart:
    return Chart(draw(WIDE), draw(NARROW))


def _controls(data: PageData) -> dict[str, Control]:
    """Every control of the page, in the order they appear in, with a shape and a colour of its own."""
    scores = [*([data.auroc_macro] if data.auroc_macro else []), *data.auroc]
    names = [name for score in scores for name in score.controls]
    names += [score.condition for score in data.retrieval if score.condition != MODEL]
    shapes = charts.SHAPES[1:]
    return {
        name: Control(shapes[i % len(shapes)], f"c{(i + 1) % charts.COLOURS + 1}")
        for i, name in enumerate(dict.fromkeys(names))
    }


def _training(curves: Sequence[LossCurve]) -> dict[str, Any]:
    lines, dropped = [], 0
    for i, curve in enumerate(curves):
        points = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
        dropped += len(curve.points) - len(points)
        if points:
            lines.append(charts.Line(name=curve.name, points=points, css=f"c{i % charts.COLOURS + 1}"))
    if not lines:
        return {"lines": [], "dropped": dropped}
    chart = _both(
        lambda width: charts.line_chart(
            lines, width=width, x_label="step", y_label="loss", description="Loss over the steps of the training"
        )
    )
    rows = [(line, min(line.points, key=lambda p: p[1]), max(line.points), min(line.points)) for line in lines]
    return {"lines": lines, "dropped": dropped, "chart": chart, "rows": rows}


def _classification(data: PageData, controls: Mapping[str, Control]) -> dict[str, Any]:
    scores = [*([data.auroc_macro] if data.auroc_macro else []), *data.auroc]
    used = {name: control for name, control in controls.items() if any(name in score.controls for score in scores)}
    rows, table, above, compared = [], [], 0, 0
    for score in scores:
        value, low, high = _finite(score.value), _finite(score.low), _finite(score.high)
        beside = {name: _finite(score.controls.get(name)) for name in used}
        text = _number(value, 2) + (f" ({low:.2f}–{high:.2f})" if low is not None and high is not None else "")
        reason = score.reason or "not scored"
        strong = score is data.auroc_macro
        clear = None
        if value is not None and low is not None:
            clear = low > max([0.5, *(control for control in beside.values() if control is not None)])
            compared += not strong
            above += clear and not strong
        counts = "" if score.positives is None else f"; {score.positives} present, {score.negatives} absent"
        rows.append(
            charts.DotRow(
                name=score.name,
                value=value,
                low=low,
                high=high,
                controls=beside,
                note=reason if value is None else text,
                title=f"{score.name}: {text}{counts}",
                strong=strong,
            )
        )
        table.append({"score": score, "value": value, "low": low, "high": high, "reason": reason, "controls": beside})
        table[-1] |= {"strong": strong, "clear": clear}
    if not rows:
        return {"rows": []}
    chart = _both(
        lambda width: charts.interval_plot(
            rows,
            controls={name: (control.shape, control.css) for name, control in used.items()},
            reference=0.5,
            width=width,
            description="AUROC of each finding with its interval, beside its controls and chance at 0.5",
        )
    )
    return {"rows": table, "controls": used, "chart": chart, "above": above, "compared": compared}


def _retrieval(data: PageData, controls: Mapping[str, Control]) -> dict[str, Any]:
    directions, ks = [], sorted({k for score in data.retrieval for k in score.recall})
    series = {MODEL: "c1", **{name: control.css for name, control in controls.items()}}
    series = {name: css for name, css in series.items() if any(score.condition == name for score in data.retrieval)}
    for direction in dict.fromkeys(score.direction for score in data.retrieval):
        scores = [score for score in data.retrieval if score.direction == direction]
        by_name = {score.condition: score for score in scores}
        main = by_name.get(MODEL, scores[0])
        groups = [
            charts.BarGroup(
                name=f"R@{k}",
                values=[_finite(by_name[name].recall.get(k)) if name in by_name else None for name in series],
                reference=_finite(main.chance.get(k)),
            )
            for k in ks
        ]
        chart = charts.grouped_bars(groups, series=series, width=NARROW, description=f"Recall, {direction}")
        directions.append({"name": direction, "scores": scores, "main": main, "chart": chart})
    has_chance = any(score.chance for score in data.retrieval)
    return {"directions": directions, "ks": ks, "series": series, "has_chance": has_chance}


def _map(points: Sequence[MapPoint]) -> dict[str, Any]:
    drawable = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    # Drawn by lot: every n-th point could be all of one modality, since callers interleave them.
    chosen = random.Random(0).sample(range(len(drawable)), min(MAP_LIMIT, len(drawable)))
    shown = [drawable[i] for i in sorted(chosen)]
    if not shown:
        return {"groups": []}
    sizes = Counter(point.group for point in shown)
    names = list(sizes)
    if len(names) > charts.COLOURS:  # more colours than this cannot be told apart: the smallest groups share the last
        kept = [name for name, _ in sizes.most_common(charts.COLOURS - 1)]
        names = [*[name for name in names if name in kept], f"other ({len(names) - len(kept)} groups)"]
    index = {name: i for i, name in enumerate(names)}
    dots = [
        charts.Dot(
            x=point.x,
            y=point.y,
            group=index.get(point.group, len(names) - 1),
            hollow=point.modality == "text",
            title=charts.fit(point.tooltip, 900),
        )
        for point in shown
    ]
    counts = Counter(dot.group for dot in dots)
    description = f"Map of {len(shown)} embeddings of images and texts in {len(names)} groups"
    return {
        "groups": [(name, i + 1, counts[i]) for i, name in enumerate(names)],
        "modalities": [m for m in ("image", "text") if any(point.modality == m for point in shown)],
        "chart": charts.scatter(dots, width=560, description=description),
        "shown": len(shown),
        "total": len(points),
    }


def _bars(data: PageData) -> dict[str, Chart]:
    """The two charts of lying bars: label counts and timings."""
    made = {}
    if data.label_counts:
        counts = [
            charts.BarRow(
                name=row.finding,
                parts=[
                    (state, getattr(row, state), f"{row.finding}: {getattr(row, state):,} {state}") for state in STATES
                ],
            )
            for row in data.label_counts
        ]
        made["labels"] = _both(
            lambda width: charts.bar_rows(counts, width=width, description="How many studies have each label state")
        )
    if data.timings:
        steps = [
            charts.BarRow(
                name=row.step,
                parts=[
                    ("reused" if row.reused else "c1", _finite(row.seconds) or 0.0, f"{row.step}: {row.seconds:,.1f} s")
                ],
                note=_duration(row.seconds) + (", reused" if row.reused else ""),
            )
            for row in data.timings
        ]
        made["timings"] = _both(
            lambda width: charts.bar_rows(steps, width=width, description="How long each step took")
        )
    return made


def resource(name: str) -> str:
    """A file of this package as text."""
    return files("medclip_lab.evaluation").joinpath(name).read_text(encoding="utf-8")


def templates() -> jinja2.Environment:
    """The package's templates, with every value escaped and the filters that format numbers."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(resource),
    )
    environment.filters |= {"number": _number, "percent": _percent, "rank": _rank, "duration": _duration}
    environment.filters |= {"clamp": _clamp, "capitalize_first": lambda text: text[:1].upper() + text[1:]}
    environment.globals |= {
        "image_uri": lru_cache(maxsize=None)(image_uri),
        "icon": charts.icon,
        "STATES": STATES,
        "MODEL": MODEL,
    }
    return environment


def script_hash(script: str) -> str:
    """How a content security policy names a script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def render_page(data: PageData) -> str:
    """The page as one HTML document that can be written to a file as UTF-8.

    Raises:
        ValueError: an image cannot be read.
    """
    environment = templates()
    script = resource("page.js")
    controls = _controls(data)
    page = environment.get_template("page.html.j2").render(
        data=data,
        style=Markup(resource("page.css")),  # noqa: S704 - the package's own file
        script=Markup(script),  # noqa: S704 - the package's own file
        script_hash=script_hash(script),
        bars=_bars(data),
        training=_training(data.loss_curves),
        classification=_classification(data, controls),
        retrieval=_retrieval(data, controls),
        map=_map(data.embedding_map),
    )
    return charts.printable(page)
