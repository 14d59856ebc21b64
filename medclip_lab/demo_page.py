"""What the demo shows on its page: everything classified and searched through the exported files."""

import io
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import medclip_lab
from medclip_lab.data.findings import NO_FINDING, PRESENT
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.doctor import cpu_name, memory_gib
from medclip_lab.evaluation import page_data as pages
from medclip_lab.evaluation.page import render_page
from medclip_lab.evaluation.protocol import HeldOut
from medclip_lab.files import atomic_file
from medclip_lab.inference.encoder import Encoder
from medclip_lab.retrieval.index import Index
from medclip_lab.training.console import diary

QUERIES = (
    "Large left pleural effusion.",
    "Right pneumothorax.",
    "Pacemaker in place.",
    "Pulmonary edema with cardiomegaly.",
    "No acute cardiopulmonary process.",
)
# The order in which a finding gives a study its colour on the map: the one a radiologist would mention first.
COLOURS = ("Pneumothorax", "Pleural Effusion", "Edema", "Pneumonia", "Cardiomegaly", "Support Devices", NO_FINDING)


class Controls:
    """Names of the controls on the page and in the results."""

    BLURRED = "blurred image"
    SHUFFLED = "shuffled pairs"


def write_page(
    out: Path,
    results: dict[str, Any],
    held_out: HeldOut,
    encoder: Encoder,
    indexes: dict[str, Index],
    run: Path,
    shards: Path,
    facts: dict[str, Any],
) -> Path:
    """Write `out/page.html` and `out/example.png`; returns the page."""
    example = _example(held_out)
    with atomic_file(out / "example.png") as temporary:
        temporary.write_bytes(held_out.images[example])
    manifest = Manifest.load(shards)
    data = pages.PageData(
        title="From shards to a searchable, classifying model",
        lede="Image-report pairs became shards, two small towers trained on them, and the exported files answered the "
        "questions below. The images are drawn phantoms of patients the model never saw.",
        version=medclip_lab.__version__,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=facts["command"],
        machine=_machine(),
        notes=["Not a medical device. These are drawn phantoms, not patients, and the scores are not probabilities."],
        remarks={
            "map": "Principal axes of both modalities together, each centred on its own mean; a dot's colour is the "
            "finding a radiologist would name first."
        },
        headline=_tiles(results, facts),
        splits=_splits(manifest),
        label_counts=[_label_counts(name, counts) for name, counts in manifest.facts["labels"].items()],
        samples=_samples(held_out),
        loss_curves=_curves(run),
        auroc_macro=_macro(results),
        auroc=_aurocs(results),
        retrieval=_retrieval(results),
        text_queries=[_text_query(query, held_out, encoder, indexes["image"]) for query in QUERIES],
        image_queries=[_image_query(row, held_out, encoder, indexes["text"]) for row in _interesting(held_out, 4)],
        classified=_classified(held_out, encoder),
        embedding_map=_map(held_out),
        timings=[pages.Timing(step=name, seconds=seconds, reused=reused) for name, seconds, reused in facts["timings"]],
        commands=_commands(out, facts["settings"]),
    )
    path = out / "page.html"
    with atomic_file(path) as temporary:
        temporary.write_text(render_page(data), encoding="utf-8")
    return path


def _machine() -> dict[str, str]:
    from importlib.metadata import version

    memory = memory_gib()
    return {
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory} GiB" if memory else "unknown",
        "Python": platform.python_version(),
        "torch": version("torch"),
        "open_clip": version("open_clip_torch"),
    }


def at_k(values: dict[Any, float], k: int) -> float:
    """R@k from results in memory (integer keys) or read back from JSON (string keys)."""
    return values[k] if k in values else values[str(k)]


def _tiles(results: dict[str, Any], facts: dict[str, Any]) -> list[pages.Tile]:
    macro = results["model"]["zero_shot"]["macro"]
    tiles = [
        pages.Tile(
            name="macro AUROC, zero-shot",
            value=f"{macro['auroc']:.3f} ({macro['low']:.3f}-{macro['high']:.3f})",
            note=f"mean of {macro['labels']} findings, 95 % interval by patient",
        )
    ]
    for direction, name in (("text_to_image", "text to image R@10"), ("image_to_text", "image to text R@10")):
        found = results["model"]["retrieval"][direction]
        recall, chance = at_k(found["recall"], 10), at_k(found["chance"], 10)
        note = f"{recall / chance:.1f} times chance ({chance:.1%}), {found['gallery']} candidates"
        tiles.append(pages.Tile(name=name, value=f"{recall:.1%}", note=note))
    train = sum(seconds for name, seconds, _ in facts["timings"] if name == "train")
    total = sum(seconds for _, seconds, _ in facts["timings"])
    tiles += [
        pages.Tile(name="training", value=f"{train:.0f} s", note=f"all steps together {total:.0f} s"),
        pages.Tile(name="peak memory", value=f"{facts['peak_memory_gib']:.1f} GiB", note="of the whole job"),
    ]
    return tiles


def _splits(manifest: Manifest) -> list[pages.SplitCounts]:
    counts = []
    for split in manifest.facts["splits"]:
        studies = list(read_split(manifest, split, Quarantine(manifest.count(split))))
        counts.append(
            pages.SplitCounts(
                split=split,
                studies=len(studies),
                images=sum(len(study.images) for study in studies),
                patients=len({study.record["patient_id"] for study in studies}),
            )
        )
    return sorted(counts, key=lambda row: ("train", "val", "test").index(row.split))


def _label_counts(name: str, counts: dict[str, int]) -> pages.LabelCounts:
    return pages.LabelCounts(
        finding=name,
        present=counts.get("1", 0),
        absent=counts.get("0", 0),
        uncertain=counts.get("-1", 0),
        unmentioned=counts.get("null", 0),
    )


def _states(labels: dict[str, int | None]) -> dict[str, pages.LabelState]:
    return {name: pages.label_state(value) for name, value in labels.items()}


def _present(labels: dict[str, int | None]) -> set[str]:
    return {name for name, value in labels.items() if value == PRESENT and name != NO_FINDING}


def _interesting(held_out: HeldOut, number: int) -> list[int]:
    """Rows with different findings: each brings as many new ones as any other row would."""
    chosen: list[int] = []
    seen: set[str] = set()
    for _ in range(number):
        rows = [row for row in range(len(held_out.labels)) if row not in chosen and held_out.texts[row]]
        if not rows:
            break
        best = max(rows, key=lambda row: (len(_present(held_out.labels[row]) - seen), -len(held_out.texts[row])))
        if not _present(held_out.labels[best]) - seen:
            seen = set()  # all have been shown: begin again, or only normal studies would follow
            best = max(rows, key=lambda row: len(_present(held_out.labels[row])))
        chosen.append(best)
        seen |= _present(held_out.labels[best])
    return chosen


def _example(held_out: HeldOut) -> int:
    return _interesting(held_out, 1)[0]


def _samples(held_out: HeldOut) -> list[pages.Sample]:
    normal = [row for row, labels in enumerate(held_out.labels) if labels.get(NO_FINDING) == PRESENT][:2]
    rows = [*_interesting(held_out, 10), *normal]
    return [
        pages.Sample(image=held_out.images[row], text=held_out.texts[row], labels=_states(held_out.labels[row]))
        for row in dict.fromkeys(rows)
    ]


def _curves(run: Path) -> list[pages.LossCurve]:
    lines = list(diary(run))
    curves = [
        pages.LossCurve(name=name, points=[(line["step"], line[key]) for line in lines if key in line])
        for name, key in (("training", "loss"), ("validation", "val_loss"))
    ]
    return [curve for curve in curves if curve.points]


def _macro(results: dict[str, Any]) -> pages.FindingScore:
    macro = results["model"]["zero_shot"]["macro"]
    controls = {name: result["zero_shot"]["macro"]["auroc"] for name, result in results.items() if name != "model"}
    return pages.FindingScore(
        name="Mean", value=macro["auroc"], low=macro["low"], high=macro["high"], controls=controls
    )


def _aurocs(results: dict[str, Any]) -> list[pages.FindingScore]:
    rows = []
    for number, row in enumerate(results["model"]["zero_shot"]["labels"]):
        controls = {
            name: result["zero_shot"]["labels"][number]["auroc"] for name, result in results.items() if name != "model"
        }
        rows.append(
            pages.FindingScore(
                name=row["name"],
                value=row["auroc"],
                low=row["low"],
                high=row["high"],
                positives=row["positives"],
                negatives=row["negatives"],
                controls=controls,
                reason=row.get("reason", ""),
            )
        )
    return rows


def _retrieval(results: dict[str, Any]) -> list[pages.RetrievalScore]:
    rows = []
    for direction in ("text_to_image", "image_to_text"):
        for name, result in results.items():
            found = result["retrieval"][direction]
            rows.append(
                pages.RetrievalScore(
                    direction=direction.replace("_", " "),
                    condition=pages.MODEL if name == "model" else name,
                    recall={int(k): value for k, value in found["recall"].items()},
                    chance={int(k): value for k, value in found["chance"].items()},
                    median_rank=found["median_rank"],
                    chance_median_rank=found["median_rank_chance"],
                    count=found["queries"],
                )
            )
    return rows


def _text_query(query: str, held_out: HeldOut, encoder: Encoder, images: Index) -> pages.TextQuery:
    from medclip_lab.data.labeller import label_sentence

    asked = {name for name, value in label_sentence(query).items() if value == PRESENT}
    row_of = {study: row for row, study in enumerate(held_out.study_ids)}
    hits: list[pages.ImageHit] = []
    for hit in images.search(encoder.encode_texts([query]), k=20)[0]:
        row = row_of.get(hit.study_id)
        if row is None or hit.row["image"] != 0 or len(hits) == 6:
            continue  # the page holds the first image of each study
        labels = held_out.labels[row]
        right = bool(asked) and all(labels.get(name) == PRESENT for name in asked)
        hits.append(
            pages.ImageHit(
                image=held_out.images[row],
                score=hit.score,
                caption=held_out.texts[row],
                match="shared" if right else "none",
            )
        )
    return pages.TextQuery(query=query, hits=hits)


def _image_query(row: int, held_out: HeldOut, encoder: Encoder, reports: Index) -> pages.ImageQuery:
    labels_of = dict(zip(held_out.study_ids, held_out.labels, strict=True))
    mine = _present(held_out.labels[row])
    query = encoder.encode_images([Image.open(io.BytesIO(held_out.images[row]))])
    hits: list[pages.TextHit] = []
    for hit in reports.search(query, k=5, with_text=True)[0]:
        own = hit.study_id == held_out.study_ids[row] or hit.row["text"] == held_out.texts[row]
        shared = bool(mine & _present(labels_of.get(hit.study_id, {})))
        match: pages.Match = "own" if own else "shared" if shared else "none"
        hits.append(pages.TextHit(text=hit.row["text"], score=hit.score, match=match))
    return pages.ImageQuery(image=held_out.images[row], hits=hits, caption=held_out.texts[row])


def _classified(held_out: HeldOut, encoder: Encoder) -> list[pages.ClassifiedImage]:
    rows = _interesting(held_out, 4)
    images = [Image.open(io.BytesIO(held_out.images[row])) for row in rows]
    classifier = encoder.zero_shot_classifier("chexpert14")
    everyone = classifier.scores(held_out.features)
    answers = classifier.predict(images)
    return [
        pages.ClassifiedImage(
            image=held_out.images[row],
            caption=held_out.texts[row],
            predictions=[
                pages.Prediction(
                    finding=name,
                    # Scores of different findings do not compare; how many images score lower does.
                    score=float((everyone[:, column] < value["score"]).mean()),
                    state=pages.label_state(held_out.labels[row].get(name)),
                )
                for column, (name, value) in enumerate(answer.items())
            ],
        )
        for row, answer in zip(rows, answers, strict=True)
    ]


def _map(held_out: HeldOut) -> list[pages.MapPoint]:
    rows = [row for row, text in enumerate(held_out.texts) if text][:600]
    features = [held_out.features[rows], held_out.text_features[: len(rows)]]
    centred = np.concatenate([part - part.mean(0) for part in features])
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    places = centred @ axes.T
    points = []
    for number, (x, y) in enumerate(places):
        row = rows[number % len(rows)]
        labels = held_out.labels[row]
        group = next((name for name in COLOURS if labels.get(name) == PRESENT), "other")
        points.append(
            pages.MapPoint(
                x=float(x),
                y=float(y),
                group=group,
                modality="image" if number < len(rows) else "text",
                tooltip=", ".join(sorted(_present(labels))) or NO_FINDING,
            )
        )
    return points


def _commands(out: Path, settings: dict[str, Any]) -> list[pages.Command]:
    seed, studies, size = settings["seed"], settings["studies"], settings["size"]
    steps = {
        "shards": f"medclip-lab prepare phantom --studies {studies} --seed {seed} --size {size} --out {out}/shards",
        "train": f"medclip-lab train --config phantom --data.sources.phantom.shards={out}/shards --seed={seed} "
        f"--out {out}/run",
        "export": f"medclip-lab export {out}/run --out {out}/bundle",
        "evaluate": f"medclip-lab evaluate {out}/bundle {out}/shards --split test",
        "embed": f"medclip-lab embed {out}/bundle {out}/shards --split test --include-text --out {out}/embeddings",
        "index": f"medclip-lab index {out}/embeddings --modality image --include-text --out {out}/index-images",
        "search": f'medclip-lab search {out}/bundle {out}/index-images --text "Large left pleural effusion."',
        "classify": f"medclip-lab classify {out}/bundle {out}/example.png",
    }
    return [pages.Command(step=step, command=command) for step, command in steps.items()]
