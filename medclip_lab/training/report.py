"""The page a run leaves behind: its curves, settings, data, machine and time, in one file that asks for nothing."""

import datetime
import math
import platform
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch
from markupsafe import Markup

from medclip_lab.doctor import cpu_name, memory_gib
from medclip_lab.evaluation import charts
from medclip_lab.evaluation.page import NARROW, WIDE, Chart
from medclip_lab.files import atomic_file
from medclip_lab.inference.bundle import versions
from medclip_lab.training.console import HEALTH, MEASURED, diary

REPORT = "report.html"


class Figure(NamedTuple):
    """Some curves over the steps, and what to look for in them."""

    title: str
    hint: str
    lines: list[charts.Line]
    chart: Chart


HINTS = {
    "Loss": "Training is read on batches, validation on the held-out split, with averaged weights if there are any.",
    "Terms of the loss": "Each term as it is, before its weight.",
    "Learning rate": "The highest of all groups of parameters.",
    "Scale": "Of the logits. At 100 it is held.",
    "Bias": "Of the logits.",
    "Norm of the gradient": "Before clipping.",
    "Studies a second": "On all devices.",
    "Waiting for data": "Share of the time. Above a few percent, more loader processes or smaller images help.",
    "Matches within the batch": "Share of rows whose own partner scores highest.",
    "Effective rank": "Of the features of a batch: near 1 a tower has collapsed.",
}


def write_report(out: Path, config: Any, done: dict[str, Any]) -> Path:
    """Write the page of a finished run into its folder.

    Args:
        out: folder of the run, with its metrics.
        config: its settings, a `RunConfig`.
        done: what is known at its end: "steps", "seconds", "resumed_at", "world_size", "unusable".
    """
    from medclip_lab.config import to_yaml

    readings = list(diary(out))
    last: dict[str, Any] = next((reading for reading in reversed(readings) if "loss" in reading), {})
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(_resource("medclip_lab.training", "report.html.j2")).render(
        title=out.name,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=Markup(_resource("medclip_lab.evaluation", "page.css")),  # noqa: S704 - the package's own file
        tiles=_tiles(readings, last, done, config.data.batch_size),
        figures=_figures(readings),
        icon=charts.icon,
        sources=config.data.sources,
        unusable=[
            (source, cause, count) for source, causes in done["unusable"].items() for cause, count in causes.items()
        ],
        machine=_machine(done),
        settings=to_yaml(config),
    )
    with atomic_file(out / REPORT) as temporary:
        temporary.write_text(charts.printable(page), encoding="utf-8")
    return out / REPORT


def _resource(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _tiles(
    readings: Sequence[dict[str, Any]], last: dict[str, Any], done: dict[str, Any], batch_size: int
) -> list[tuple[str, str, str]]:
    """Name, value and note of the figures at the head."""
    steps, resumed = done["steps"], done["resumed_at"]
    note = f"since step {resumed:,}, where it went on" if resumed else f"on {done['world_size']} process(es)"
    tiles = [
        ("Steps", f"{steps:,}", f"of {batch_size:,} studies"),
        ("Time", _duration(done["seconds"]), note),
    ]
    if last.get("loss") is not None:
        tiles.append(("Loss at the end", f"{last['loss']:.4f}", f"step {last['step']:,}"))
    checks = [r for r in readings if r.get("val_loss") is not None]
    if checks:
        best = min(checks, key=lambda reading: reading["val_loss"])
        tiles.append(("Least validation loss", f"{best['val_loss']:.4f}", f"step {best['step']:,}"))
    speeds = sorted(r["samples_per_second"] for r in readings if r.get("samples_per_second") is not None)
    if speeds:
        tiles.append(("Studies a second", f"{speeds[len(speeds) // 2]:,.0f}", "median, on all devices"))
    if last.get("memory_gib") is not None:
        tiles.append(("Memory", f"{last['memory_gib']:.1f} GiB", "peak of the first process"))
    return tiles


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _figures(readings: Sequence[dict[str, Any]]) -> list[Figure]:
    terms = dict.fromkeys(name for reading in readings for name in reading if name not in {"step"} | MEASURED | HEALTH)
    wanted: dict[str, dict[str, str]] = {
        "Loss": {"loss": "training", "val_loss": "validation"},
        "Terms of the loss": {name: name for name in terms},
        "Learning rate": {"lr": "learning rate"},
        "Scale": {"logit_scale": "scale"},
        "Bias": {"logit_bias": "bias"},
        "Norm of the gradient": {"grad_norm": "norm"},
        "Matches within the batch": {"image_to_text_top1": "image to text", "text_to_image_top1": "text to image"},
        "Effective rank": {"image_rank": "images", "text_rank": "texts"},
        "Studies a second": {"samples_per_second": "studies a second"},
        "Waiting for data": {"data_wait": "share of the time"},
    }
    figures = []
    for title, series in wanted.items():
        lines = []
        for number, (key, name) in enumerate(series.items()):
            points = [
                (float(r["step"]), float(r[key])) for r in readings if r.get(key) is not None and math.isfinite(r[key])
            ]
            if points:
                lines.append(charts.Line(name=name, points=points, css=f"c{number % charts.COLOURS + 1}"))
        if lines:
            figures.append(Figure(title, HINTS[title], lines, Chart(*(_draw(title, lines, w) for w in (WIDE, NARROW)))))
    return figures


def _draw(title: str, lines: list[charts.Line], width: int) -> Markup:
    return charts.line_chart(
        lines, width=width, height=260, x_label="step", y_label=title.lower(), description=f"{title} over the steps"
    )


def _machine(done: dict[str, Any]) -> dict[str, str]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    facts = {
        "Processes": str(done["world_size"]),
        "GPUs of this machine": ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "none",
        "CPU": str(cpu_name()),
        "Memory": f"{memory_gib()} GiB",
        "System": platform.platform(),
    }
    return facts | versions()
