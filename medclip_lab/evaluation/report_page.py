"""One self-contained HTML page of an evaluation: curves, tables, cases, and all that the figures were computed from.

The rules are those of the page of a run (`page.py`): nothing from the network, every value escaped. Images of cases
stand in it only if asked for; without them it holds counts and figures, and no id.
"""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from medclip_lab.evaluation import charts
from medclip_lab.evaluation.curves import confusion_of_one, precision_recall_points, roc_points
from medclip_lab.evaluation.gather import Labelled, pictures
from medclip_lab.evaluation.metrics import Floats
from medclip_lab.evaluation.page import NARROW, WIDE, Chart, resource, script_hash, templates
from medclip_lab.evaluation.suite import Evaluated
from medclip_lab.files import atomic_file
from medclip_lab.inference.encoder import Encoder
from medclip_lab.version import __version__

CURVE = 250  # px: a curve of each label, several in a row
SIDE = 320  # px of the images of cases
CASES = 3
"""Of each kind and label that are shown."""
CHANCE = ((0.0, 0.0), (1.0, 1.0))


def write_page(
    path: Path,
    encoder: Encoder,
    evaluated: Evaluated,
    labelset: str | Path,
    command: str,
    shards: str | Path | None = None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        shards: where the images of best and worst cases are read; None shows none.
    """
    images: dict[str, bytes] = {}
    if shards is not None:
        ids, records = evaluated.found.held_out.study_ids, evaluated.found.records
        rows = {row for finding in cases(evaluated) for _, found in finding["kinds"] for row in found}
        wanted = {ids[row]: int(records[row]["image"]) for row in rows}
        images = pictures(encoder, shards, evaluated.results["split"], wanted, SIDE)
    html = render(encoder, evaluated, labelset, command, images)
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(
    encoder: Encoder,
    evaluated: Evaluated,
    labelset: str | Path,
    command: str,
    images: Mapping[str, bytes] | None = None,
) -> str:
    """The page as one HTML document.

    Args:
        images: by study id, of the cases that are shown.
    """
    results, data = evaluated.results, evaluated.data
    shot = results["zero_shot"]
    found = confusion_of_one(evaluated.scores, data.positive, data.used)
    return fill(
        command,
        title=f"Zero-shot evaluation, split {results['split']}",
        lede=f"{results['studies']:,} studies of {results['patients']:,} patients, "
        f"{_findings(shot['macro']['labels'])} of label set {shot['labelset']}.",
        results=results,
        findings=findings(shot),
        curves=curves(data, evaluated.scores),
        reliability=reliability(shot),
        groups=_groups(results.get("subgroups")),
        classes=shot.get("exclusive"),
        confusion=confusion(data.names, found["counts"]),
        cases=_shown(evaluated, images or {}),
        corruptions=_corruptions(results.get("corruptions")),
        prompts=[(label.name, label.positive, label.negative) for label in encoder.labelset(labelset).labels],
        hashes=_hashes(encoder, results),
    )


def fill(command: str, **parts: Any) -> str:
    """The template with these parts; one that is not given is left out."""
    script = resource("page.js")
    optional = ("asked", "findings", "curves", "reliability", "groups", "classes", "confusion", "cases", "corruptions")
    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            command=command,
            version=__version__,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=Markup(resource("page.css") + resource("report.css")),  # noqa: S704 - the package's own files
            script=Markup(script),  # noqa: S704 - the package's own file
            script_hash=script_hash(script),
            **(dict.fromkeys(optional) | parts),
        )
    )
    return charts.printable(page)


def _both(draw: Any) -> Chart:
    return Chart(draw(WIDE), draw(NARROW))


def _rows(entries: list[dict[str, Any]], name: str) -> list[charts.DotRow]:
    rows = []
    for entry in entries:
        value = entry["auroc"]
        text = "" if value is None else f"{value:.2f} ({entry['low']:.2f}–{entry['high']:.2f})"
        note = entry.get("reason", "not scored") if value is None else text
        rows.append(
            charts.DotRow(
                name=str(entry[name]),
                value=value,
                low=entry.get("low"),
                high=entry.get("high"),
                note=note,
                strong=bool(entry.get("strong")),
            )
        )
    return rows


def _findings(number: int) -> str:
    return f"{number} finding{'' if number == 1 else 's'}"


def findings(shot: Mapping[str, Any]) -> Chart:
    macro = shot["macro"]
    mean = {**macro, "name": f"Mean of {_findings(macro['labels'])}", "strong": True}
    rows = _rows([*([mean] if len(shot["labels"]) > 1 else []), *shot["labels"]], "name")
    return _both(
        lambda width: charts.interval_plot(
            rows, controls={}, reference=0.5, width=width, description="AUROC of each finding with its interval"
        )
    )


def curves(data: Labelled, scores: Floats) -> list[dict[str, Any]]:
    """ROC and precision-recall of every label that has both classes."""
    drawn = []
    for column, name in enumerate(data.names):
        if data.lacks(column):
            continue
        used = data.used[:, column]
        of_label, positive = scores[used, column], data.positive[used, column]
        share = float(positive.mean())
        roc = charts.Line(name=name, points=roc_points(of_label, positive), css="c1")
        recall = charts.Line(name=name, points=precision_recall_points(of_label, positive), css="c3")
        drawn.append(
            {
                "name": name,
                "roc": charts.unit_curves(
                    [roc],
                    width=CURVE,
                    x_label="1 − specificity",
                    y_label="sensitivity",
                    description=f"ROC curve of {name}",
                    reference=CHANCE,
                ),
                "pr": charts.unit_curves(
                    [recall],
                    width=CURVE,
                    x_label="recall",
                    y_label="precision",
                    description=f"Precision-recall curve of {name}",
                    reference=((0.0, share), (1.0, share)),
                ),
            }
        )
    return drawn


def reliability(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the labels that are calibrated: scores alone are no probabilities."""
    drawn = []
    for row in table["labels"]:
        if "reliability" not in row:
            continue
        name, bins = row["name"], row["reliability"]
        total = sum(one["count"] for one in bins)
        error = sum(one["count"] * abs(one["probability"] - one["positives"]) for one in bins) / total
        line = charts.Line(name=name, points=[(one["probability"], one["positives"]) for one in bins], css="c4")
        chart = charts.unit_curves(
            [line],
            width=CURVE,
            x_label="probability",
            y_label="share present",
            description=f"Reliability of {name}",
            reference=CHANCE,
            dots=True,
        )
        perfect = row["metrics"]["ece"].get("if_perfect")
        drawn.append({"name": name, "error": error, "if_perfect": perfect, "bins": bins, "chart": chart})
    return drawn


def _groups(tables: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    drawn = []
    for column, table in (tables or {"columns": {}})["columns"].items():
        rows = _rows(table["groups"], "group")
        chart = _both(
            lambda width, rows=rows, column=column: charts.interval_plot(
                rows, controls={}, reference=0.5, width=width, description=f"Mean AUROC of each group by {column}"
            )
        )
        drawn.append({"column": column, "table": table, "chart": chart})
    return drawn


def confusion(names: Sequence[str], table: list[list[int]]) -> dict[str, Any] | None:
    """Only of labels that someone has alone; shades are shares of a row."""
    counts = np.array(table)
    kept = [column for column in range(len(names)) if counts[column].sum() or counts[:, column].sum()]
    if len(kept) < 2:
        return None
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    rows = [
        {"name": names[row], "cells": [(int(counts[row, c]), float(shares[row, c]), row == c) for c in kept]}
        for row in kept
    ]
    return {"names": [names[column] for column in kept], "rows": rows, "studies": int(counts.sum())}


def cases(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Rows of the studies that score best and worst for what they are, by finding and kind."""
    data, found = evaluated.data, []
    for column, name in enumerate(data.names):
        if data.lacks(column):
            continue
        used = data.used[:, column]
        order = [int(row) for row in np.argsort(evaluated.scores[:, column], kind="stable") if used[row]]
        present = [row for row in order if data.positive[row, column]]
        absent = [row for row in order if not data.positive[row, column]]
        kinds = [
            ("present, scored highest", present[::-1][:CASES]),
            ("present, scored lowest", present[:CASES]),
            ("absent, scored highest", absent[::-1][:CASES]),
        ]
        lower = {row: place / max(1, len(order) - 1) for place, row in enumerate(order)}
        found.append({"name": name, "column": column, "kinds": kinds, "lower": lower})
    return found


def _shown(evaluated: Evaluated, images: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The cases whose images there are."""
    ids, shown = evaluated.found.held_out.study_ids, []
    for finding in cases(evaluated) if images else []:
        scores, lower = evaluated.scores[:, finding["column"]], finding["lower"]
        rows = [
            (
                kind,
                [
                    {"image": images[ids[row]], "score": float(scores[row]), "rank": lower[row]}
                    for row in found
                    if ids[row] in images
                ],
            )
            for kind, found in finding["kinds"]
        ]
        shown.append({"name": finding["name"], "kinds": rows})
    return shown


def _corruptions(told: Mapping[str, Any] | None) -> Chart | None:
    if told is None:
        return None
    lines = [
        charts.Line(
            name=kind.replace("_", " "),
            points=[(0.0, told["clean_auroc"]), *((float(s + 1), 1 - error) for s, error in enumerate(errors))],
            css=f"c{number % charts.COLOURS + 1}",
        )
        for number, (kind, errors) in enumerate(told["errors"].items())
    ]
    return _both(
        lambda width: charts.line_chart(
            lines, width=width, x_label="severity", y_label="mean AUROC", description="AUROC under corruptions"
        )
    )


def _hashes(encoder: Encoder, results: Mapping[str, Any]) -> dict[str, str]:
    shot = results["zero_shot"]
    facts = {
        "bundle": encoder.fingerprint,
        "shards": str(results["shards"]),
        "label set": f"{shot['labelset']} {shot['labelset_hash']}",
        "studies": str(results["studies_hash"]),
        "rule of scoring": str(shot["rule"]),
        "labels": str(shot["policy"]),
        "intervals": f"95 %, {shot['bootstrap']['draws']} draws by {shot['bootstrap']['by']}, seed "
        f"{shot['bootstrap']['seed']}",
    }
    facts |= {f"ensemble, {number + 2}": member for number, member in enumerate(results["ensemble"])}
    if "comparison" in shot:
        facts["compared with"] = f"{shot['comparison']['with']} ({shot['comparison']['rule']})"
    return facts | {name: str(version) for name, version in results["versions"].items()}
