"""The report of a case: indication, comparison, findings and impression, with what each sentence states.

A label of the report is what its sentences say of the observation, the strongest word winning: present, then uncertain,
then absent. "No Finding" is stated by sentences too: 1 by an impression that finds nothing (devices do not count), -1
where it is hedged, 0 where the report calls itself abnormal.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN
from medclip_lab.data.phantom.case import NAMES, Case
from medclip_lab.data.phantom.phrases import DENIED, device_sentence, pick
from medclip_lab.data.phantom.sentences import Sentence, cap, denials, doubtful, phrase_of, present, strongest

_ROOMS = {  # the order in which a report walks through the chest
    "lungs": ("Consolidation", "Pneumonia", "Lung Opacity", "Edema", "Atelectasis", "Lung Lesion"),
    "pleura": ("Pleural Effusion", "Pneumothorax", "Pleural Other"),
    "heart": ("Cardiomegaly", "Enlarged Cardiomediastinum"),
    "bones": ("Fracture",),
    "devices": (SUPPORT_DEVICES,),
}
_URGENCY = (
    "Pneumothorax",
    "Pneumonia",
    "Consolidation",
    "Edema",
    "Lung Lesion",
    "Pleural Effusion",
    "Lung Opacity",
    "Fracture",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Atelectasis",
    "Pleural Other",
)
_REASONS = {
    "normal": ("with chest pain", "with cough", "for preoperative evaluation", "with dizziness", "with fever"),
    "heart": (
        "with shortness of breath",
        "with leg swelling and dyspnea",
        "with orthopnea",
        "with known heart failure",
    ),
    "infection": (
        "with fever and cough",
        "with productive cough",
        "with sepsis of unknown source",
        "with leukocytosis",
    ),
    "intensive": (
        "with respiratory failure",
        "after line placement",
        "with hypoxia",
        "after surgery",
        "after intubation",
    ),
    "trauma": ("after a fall", "after a motor vehicle collision", "with chest wall pain", "after blunt chest trauma"),
    "tumour": ("with weight loss", "with known malignancy", "with hemoptysis", "for staging", "on chemotherapy"),
    "chronic": ("with chronic cough", "with dyspnea on exertion", "with chest discomfort", "for follow-up"),
}
# What is said word for word again and again where there is nothing to say.
_STOCK = (
    (
        Sentence("The lungs are clear.", dict.fromkeys(("Lung Opacity", "Consolidation"), ABSENT)),
        Sentence("The cardiomediastinal silhouette is normal.", dict.fromkeys(_ROOMS["heart"], ABSENT)),
        Sentence("No pleural effusion or pneumothorax.", {"Pleural Effusion": ABSENT, "Pneumothorax": ABSENT}),
    ),
    (
        Sentence("Heart size is normal.", {"Cardiomegaly": ABSENT}),
        Sentence("The mediastinal contours are normal.", {"Enlarged Cardiomediastinum": ABSENT}),
        Sentence(
            "No focal consolidation, pleural effusion or pneumothorax.",
            dict.fromkeys(("Consolidation", "Pleural Effusion", "Pneumothorax"), ABSENT),
        ),
        Sentence("No acute osseous abnormality.", {"Fracture": ABSENT}),
    ),
    (
        Sentence(
            "There is no focal consolidation, effusion, pneumothorax or pulmonary edema.",
            dict.fromkeys(("Consolidation", "Pleural Effusion", "Pneumothorax", "Edema"), ABSENT),
        ),
    ),
)


@dataclass(frozen=True)
class Report:
    """A report, its sentences and its labels."""

    sections: dict[str, str]
    text: str
    sentences: list[dict[str, Any]]
    labels: dict[str, int | None]


def write_report(case: Case, rng: np.random.Generator) -> Report:
    """Put a case into words; the same case and generator give the same words."""
    findings = _findings(case, rng)
    impression = _impression(case, rng)
    numbered = len(impression) > 1 and rng.random() < 0.5
    lines = [f"{n}. {s.text}" if numbered else s.text for n, s in enumerate(impression, start=1)]
    sections = {
        "indication": _indication(case, rng),
        "comparison": _comparison(case, rng),
        "findings": " ".join(sentence.text for sentence in findings),
        "impression": " ".join(lines),
    }
    sentences = [*findings, *impression]
    labels: dict[str, int | None] = dict.fromkeys(CHEXPERT14)
    labels.update(strongest(sentences))
    return Report(
        sections,
        f"{sections['findings']} {sections['impression']}",
        [{"text": sentence.text, "labels": dict(sentence.labels)} for sentence in sentences],
        labels,
    )


def _indication(case: Case, rng: np.random.Generator) -> str:
    person = pick(rng, ("man", "male") if case.sex == "M" else ("woman", "female"))
    return f"{case.age}-year-old {person} {pick(rng, _REASONS[case.theme])}."


def _comparison(case: Case, rng: np.random.Generator) -> str:
    if case.number:
        known = (
            "Prior chest radiograph.",
            "Chest radiograph from earlier in the same admission.",
            "Prior radiographs.",
        )
        return pick(rng, (*known, "Chest radiograph from prior admission."))
    return pick(rng, ("None.", "None.", "None available.", "No prior studies.", "Prior outside study not available."))


def _findings(case: Case, rng: np.random.Generator) -> list[Sentence]:
    nothing = not any(f.present or f.state == UNCERTAIN or f.change for f in case.findings.values())
    if nothing and rng.random() < 0.45:
        return list(_STOCK[int(rng.integers(len(_STOCK)))])
    rooms: dict[str, list[Sentence]] = {}
    for room, names in _ROOMS.items():
        said = rooms[room] = []
        for name in names:
            finding = case.findings[name]
            if name == SUPPORT_DEVICES and finding.state == PRESENT and case.devices:
                said += [Sentence(device_sentence(d, case.number > 0, rng), {name: PRESENT}) for d in case.devices]
            elif finding.state == PRESENT:
                said.append(present(finding, rng))
            elif finding.state == UNCERTAIN:
                said.append(doubtful(finding, rng))
            elif finding.change == "resolved" and name in DENIED:
                before = DENIED[name][0]
                texts = [f"Previously seen {before} has resolved.", f"Interval resolution of the {before}."]
                said.append(Sentence(pick(rng, texts), {name: ABSENT}))
    denied = [name for name in NAMES if case.state(name) == ABSENT]
    order = ["lungs", "pleura", "heart", "bones", "devices"]
    if rng.random() < 0.5:
        order = [order[int(i)] for i in rng.permutation(5)]
    sentences = [sentence for room in order for sentence in rooms[room]]
    if rng.random() < 0.15:
        views = "Frontal and lateral views of the chest." if case.lateral else "Single frontal view of the chest."
        sentences.insert(0, Sentence(views))
    wanted = [name for name in denied if name not in strongest(sentences)]
    sentences += denials(wanted, case, rng)
    if not sentences:
        sentences = [Sentence(pick(rng, ("Frontal view of the chest.", "Chest radiograph of diagnostic quality.")))]
    return sentences


def _impression(case: Case, rng: np.random.Generator) -> list[Sentence]:
    seen = [case.findings[name] for name in _URGENCY if case.state(name) == PRESENT]
    doubted = [case.findings[name] for name in _URGENCY if case.state(name) == UNCERTAIN]
    if not seen and not doubted and case.state(SUPPORT_DEVICES) != UNCERTAIN:
        if rng.random() < 0.05:
            texts = [
                "No definite acute cardiopulmonary abnormality.",
                "Probably normal study.",
                "Likely no acute process.",
            ]
            return [Sentence(pick(rng, texts), {NO_FINDING: UNCERTAIN})]
        texts = [
            "No acute cardiopulmonary process.",
            "No acute cardiopulmonary process.",
            "No acute cardiopulmonary abnormality.",
            "Normal chest radiograph.",
            "No acute intrathoracic process.",
        ]
        if case.devices or case.number:
            texts = texts[:3]
        return [Sentence(pick(rng, texts), {NO_FINDING: PRESENT})]
    sentences: list[Sentence] = []
    kept = 3 if rng.random() < 0.5 else 5
    for finding in seen[:kept]:
        p = phrase_of(finding, rng)
        labels = {finding.name: PRESENT, **p.states}
        be = p.verb
        sentences.append(
            Sentence(pick(rng, (f"{cap(p.noun)}.", f"{cap(p.noun)}.", f"{cap(p.with_article)} {be} seen.")), labels)
        )
    sentences += [doubtful(finding, rng) for finding in doubted[:2]]
    if not seen and rng.random() < 0.5:
        texts = ["No definite acute cardiopulmonary abnormality.", "Otherwise probably normal study."]
        sentences.append(Sentence(pick(rng, texts), {NO_FINDING: UNCERTAIN}))
    elif seen and rng.random() < 0.12:
        texts = ["Abnormal chest radiograph as described.", "Overall abnormal study.", "Abnormal examination."]
        sentences.append(Sentence(pick(rng, texts), {NO_FINDING: ABSENT}))
    if case.devices and rng.random() < 0.3:
        texts = ["Support devices as described.", "Lines and tubes in satisfactory position.", "Hardware as above."]
        sentences.append(Sentence(pick(rng, texts), {SUPPORT_DEVICES: PRESENT}))
    stable = all(f.change == "unchanged" for f in case.findings.values() if f.change)
    if seen and stable and not doubted and case.number and rng.random() < 0.4:
        sentences.append(Sentence(pick(rng, ("No significant interval change.", "Unchanged from prior."))))
    if not sentences:  # only a doubtful device
        sentences.append(Sentence("No other abnormality.", {}))
    return sentences
