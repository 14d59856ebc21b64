"""A study of a phantom patient, as plain data."""

import hashlib
from typing import Any

import numpy as np

from medclip_lab.data.findings import CHEXPERT14, NO_FINDING, SUPPORT_DEVICES
from medclip_lab.data.phantom.anatomy import Body
from medclip_lab.data.phantom.canvas import Box
from medclip_lab.data.phantom.case import NAMES, Case, first_case, next_case
from medclip_lab.data.phantom.draw import draw_frontal, draw_lateral, encode
from medclip_lab.data.phantom.report import write_report

_FOLLOW_UPS = (0.52, 0.27, 0.13, 0.08)  # share of patients with one, two, three and four studies
_OPACITIES = ("Consolidation", "Pneumonia")  # also a Lung Opacity in truth and regions, as in CheXpert's hierarchy
_SIZED = ("Pleural Effusion", "Pneumothorax")


def studies_of(seed: int, patient: int) -> int:
    """How many studies a patient has, one to four."""
    return 1 + int(_rng(seed, patient, 0).choice(4, p=_FOLLOW_UPS))


def _rng(seed: int, patient: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence((seed, patient, stream)))


def patient_name(seed: int, patient: int) -> str:
    return f"p-{seed}-{patient:05d}"


def split_of(patient_id: str) -> str:
    part = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:4], "big") / 2**32
    return "train" if part < 0.7 else "val" if part < 0.8 else "test"


def make_study(seed: int, patient: int, number: int, size: int) -> dict[str, Any]:
    """Study `number` of a patient, from 0, as fields of a `Sample`; what came before it is gone through, not drawn."""
    history = _rng(seed, patient, 1)
    case = first_case(history)
    body = Body.sample(history, case.age, case.sex)
    for _ in range(number):
        case = next_case(history, case)
    rng = _rng(seed, patient, 2 + number)  # its own, so that a change of the drawing changes no history
    return _make_study(case, body, rng, size)


def _make_study(case: Case, body: Body, rng: np.random.Generator, size: int) -> dict[str, Any]:
    report = write_report(case, rng)
    pictures, views = [draw_frontal(case, body, rng, size)], [case.view]
    if case.lateral:
        pictures.append(draw_lateral(case, body, rng, size))
        views.append("LATERAL")
    return {
        "images": [("png", encode(picture)) for picture, _ in pictures],
        "view": views,
        "sections": report.sections,
        "text": report.text,
        "labels": report.labels,
        "sentences": report.sentences,
        "extra": {
            "age": case.age,
            "sex": case.sex,
            "truth": _truth(case),
            "regions": _regions([boxes for _, boxes in pictures]),
        },
    }


def _truth(case: Case) -> dict[str, dict[str, Any]]:
    """What is drawn, whatever the report makes of it."""
    truth: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        finding = case.findings[name]
        entry: dict[str, Any] = {"present": finding.present}
        if finding.present and name == SUPPORT_DEVICES:
            entry["kinds"] = [device.kind for device in case.devices] or ["faint line"]
        elif finding.present:
            entry["severity"] = ("mild", "moderate", "severe")[finding.severity]
            entry["side"], entry["zone"] = finding.side or None, finding.zone or None
            if name in _SIZED:
                entry["size"] = ("small", "moderate", "large")[finding.severity]
            elif finding.size_cm is not None:
                entry["size"] = f"{finding.size_cm:.1f} cm"
            if finding.kind:
                entry["kind"] = finding.kind
        truth[name] = entry
    opacities = [name for name in _OPACITIES if case.findings[name].present]
    if opacities:
        truth["Lung Opacity"] = {**truth["Lung Opacity"], "present": True, "as": opacities}
    truth[NO_FINDING] = {"present": not any(truth[name]["present"] for name in NAMES if name != SUPPORT_DEVICES)}
    return {name: truth[name] for name in CHEXPERT14}


def _regions(images: list[dict[str, list[Box]]]) -> dict[str, list[dict[str, Any]]]:
    regions: dict[str, list[dict[str, Any]]] = {}
    for number, boxes in enumerate(images):
        for name, found in boxes.items():
            entries = [{"image": number, "box": box} for box in found]
            for target in (name, "Lung Opacity") if name in _OPACITIES else (name,):
                regions.setdefault(target, []).extend(dict(entry) for entry in entries)
    return regions
