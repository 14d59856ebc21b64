"""The page of one protocol: the report of an evaluation, with what was asked and how the list was drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medclip_lab.evaluation.gather import Labelled
from medclip_lab.evaluation.metrics import Floats
from medclip_lab.evaluation.report_page import confusion, curves, fill, findings, reliability
from medclip_lab.files import atomic_file

TASKS = {
    "multi_label": "Which of several findings are there? Each is scored by itself.",
    "exclusive": "Which one of several findings is it? The greatest score decides.",
    "class_retrieval": "Images of a class, found by a sentence and by another image.",
    "report_retrieval": "The report of an image among all, and the image of a report.",
}


def write_page(
    path: Path, result: Mapping[str, Any], data: Labelled | None, scores: Floats | None, command: str
) -> None:
    """Write the page, whole or not at all.

    Args:
        result: of `run_protocol`.
        data, scores: truth and scores [N, K] that it rests on; None for retrieval, which has no curves.
    """
    html = render(result, data, scores, command)
    with atomic_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def render(result: Mapping[str, Any], data: Labelled | None, scores: Floats | None, command: str) -> str:
    """The page as one HTML document; it holds counts and figures, and no id."""
    shot, classes = result.get("zero_shot"), result.get("exclusive")
    cells = classes["confusion"] if classes else None
    return fill(
        command,
        title=f"Protocol {result['protocol']['name']}",
        lede=f"{result['studies']:,} studies of {result['patients']:,} patients, split {result['protocol']['split']}.",
        results=result,
        asked=_asked(result),
        findings=findings(shot) if shot else None,
        curves=curves(data, scores) if data is not None and scores is not None else None,
        reliability=reliability(shot) if shot else None,
        classes=classes,
        confusion=confusion(cells["names"], cells["counts"]) if cells else None,
        prompts=[(name, told["positive"], told["negative"]) for name, told in _prompts(result).items()],
        hashes=_hashes(result),
    )


def _prompts(result: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Those that were asked: finding the own report asks none."""
    return {} if result["protocol"]["task"] == "report_retrieval" else result["prompts"]


def _asked(result: Mapping[str, Any]) -> dict[str, Any]:
    protocol, sampling = result["protocol"], result["protocol"]["sampling"]
    facts = {"source": protocol["source"], "views": ", ".join(protocol["views"]) or "any, the first image of a study"}
    if _prompts(result):
        facts["label set"] = protocol["labelset"]
        facts["labels from"] = protocol["labels_from"]
        facts["rule of scoring"] = str(result["zero_shot"]["rule"] if "zero_shot" in result else result["score"])
    if sampling:
        alone = "with one of them alone" if sampling["rule"] == "exclusive" else "with the label"
        facts["list"] = (
            f"{sampling['per_label']:,} studies of each of {len(sampling['labels'])} labels, {alone}, by SHA-256 of "
            f"seed {sampling['seed']} and study"
        )
    facts |= {f"left out, {reason}": f"{count:,}" for reason, count in result["left_out"].items()}
    facts |= {f"unusable, {reason}": f"{count:,}" for reason, count in result["unusable"].items()}
    return {
        "task": TASKS[protocol["task"]],
        "description": protocol["description"],
        "notes": protocol["notes"],
        "facts": {name: value for name, value in facts.items() if value},
        "differs": [
            f"Not the original list: {told['found']:,} {name}, there {told['expected']:,}."
            for name, told in result["differs_from_the_original"].items()
        ],
    }


def _hashes(result: Mapping[str, Any]) -> dict[str, str]:
    facts = {"bundle": result["bundle"], "shards": result["shards"], "list of studies": result["list_hash"]}
    if _prompts(result):
        facts["label set"] = f"{result['protocol']['labelset']} {result['labelset_hash']}"
    told = (result.get("zero_shot") or result).get("bootstrap")
    if told:
        facts["intervals"] = f"95 %, {told['draws']} draws by {told['by']}, seed {told['seed']}"
    return facts | {name: str(version) for name, version in result["versions"].items()}
