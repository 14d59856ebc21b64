"""The fourteen CheXpert observations in the MeSH terms of Open-i reports: a cross-check of the rules on the text."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT, SUPPORT_DEVICES, UNCERTAIN, Labels
from medclip_lab.data.label_rules import (
    ATELECTASIS,
    CM,
    CONSOLIDATION,
    EC,
    EDEMA,
    EFFUSION,
    FRACTURE,
    LESION,
    OPACITY,
    PLEURAL,
    PNEUMONIA,
    PNEUMOTHORAX,
)

_ELSEWHERE = (
    r"(?!.*/(?:abdomen|breast|neck|shoulder|spine|ribs?|thoracic vertebrae|humerus|clavicle|sternum|mediastinum|aorta|"
    r"skin))"
)
_MESH: tuple[tuple[tuple[str, ...], str], ...] = (
    ((CM,), r"cardiomegaly|(?:cardiac shadow|heart)/.*(?:enlarged|borderline)"),
    ((EC,), r"mediastinum/(?!.*(?:lymph nodes|blood vessels)).*(?:prominent|enlarged)"),
    (
        (EFFUSION,),
        r"pleural effusion|(?:costophrenic angle|sulcus|pleura)/.*blunted|h(?:ydro|emo)pneumothorax|hemothorax",
    ),
    ((PNEUMOTHORAX,), r"(?:hydro|hemo)?pneumothorax"),
    ((ATELECTASIS,), r"(?:pulmonary )?atelectasis|volume loss"),
    ((CONSOLIDATION,), r"consolidation"),
    ((PNEUMONIA,), r"pneumonia\b"),
    ((EDEMA,), r"pulmonary edema|pulmonary congestion|heart failure"),
    (
        (LESION,),
        rf"{_ELSEWHERE}(?:nodule|mass\b|(?:calcified )?granuloma\b|neoplasm|cavitation|(?:density|opacity)/.*round)",
    ),
    ((OPACITY,), rf"{_ELSEWHERE}(?:opacity|infiltrate|airspace disease|lung diseases, interstitial)"),
    ((OPACITY,), rf"{_ELSEWHERE}density/(?!.*round)(?:lung|retrocardiac|right|left|costophrenic)"),
    # The interstitium is called prominent as "Markings", "Lung" or "Thickening", as the indexer liked.
    ((OPACITY,), r"(?:markings|lung|thickening/lung)/.*interstitial|cicatrix(?!.*/(?:pleura|breast|ribs))"),
    ((PLEURAL,), r"(?:thickening|cicatrix|calcinosis)/.*pleura"),
    ((FRACTURE,), r"fractures, bone"),
    ((SUPPORT_DEVICES,), r"catheters, indwelling|implanted medical device|medical device|surgical instruments"),
    ((SUPPORT_DEVICES,), r"tube, inserted|stents|sutures|spinal fusion"),
)
_PATTERNS = tuple((re.compile(pattern), labels) for labels, pattern in _MESH)
_SILENT = ("no indexing", "technical quality of image unsatisfactory")
"""Terms that say nothing of the chest."""


def mesh_labels(terms: Iterable[str]) -> dict[str, int]:
    """Positive labels of Open-i MeSH terms such as "Pleural Effusion/right/small"; nothing is ever 0 or -1.

    No Finding is 1 where a report was indexed and none of its terms is one of the twelve pathologies: "normal", but
    also a report that has only degenerative vertebrae, as CheXpert would have it. "No Indexing" gives no label.
    """
    known = (" ".join(term.lower().split()) for term in terms)
    indexed = [term for term in known if term and not term.startswith(_SILENT)]
    found = {label for term in indexed for pattern, labels in _PATTERNS if pattern.match(term) for label in labels}
    if indexed and not found - {SUPPORT_DEVICES}:
        found.add(NO_FINDING)
    return {name: PRESENT for name in CHEXPERT14 if name in found}


def developed_on(study_id: str) -> bool:
    """Whether the rules may be mended on this report: on half of them, so that the others measure what that gained."""
    return hashlib.sha256(f"labeller:{study_id}".encode()).digest()[0] % 2 == 0


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the rules agree with the MeSH terms on one label.

    The indexers had no word for doubt and indexed "possible pneumonia" or its opacity as they saw fit, so an uncertain
    label counts as positive in `precision`, `recall` and `f1`; the `strict` figures count it as negative.
    """

    label: str
    mesh: int
    present: int
    uncertain: int
    absent: int
    both: int
    """Positive in MeSH and present or uncertain by the rules."""
    both_strict: int
    """Positive in MeSH and present by the rules."""
    denied: int
    """Positive in MeSH and absent by the rules: the only denials that this reference can call wrong."""

    @property
    def precision(self) -> float:
        return self.both / max(1, self.present + self.uncertain)

    @property
    def recall(self) -> float:
        return self.both / max(1, self.mesh)

    @property
    def f1(self) -> float:
        return 2 * self.both / max(1, self.mesh + self.present + self.uncertain)

    @property
    def precision_strict(self) -> float:
        return self.both_strict / max(1, self.present)

    @property
    def recall_strict(self) -> float:
        return self.both_strict / max(1, self.mesh)

    @property
    def f1_strict(self) -> float:
        return 2 * self.both_strict / max(1, self.mesh + self.present)


def agreement(pairs: Iterable[tuple[Labels, Mapping[str, int]]]) -> list[Agreement]:
    """Rules against MeSH, a row a label. `pairs`: labels of a report by the rules, and `mesh_labels` of its terms.

    Reports without any MeSH label (not indexed) are left out by this function.
    """
    kept = [(rules_say, mesh) for rules_say, mesh in pairs if mesh]
    rows = []
    for name in CHEXPERT14:
        values = [(rules_say.get(name), mesh.get(name) == PRESENT) for rules_say, mesh in kept]
        rows.append(
            Agreement(
                label=name,
                mesh=sum(positive for _, positive in values),
                present=sum(value == PRESENT for value, _ in values),
                uncertain=sum(value == UNCERTAIN for value, _ in values),
                absent=sum(value == ABSENT for value, _ in values),
                both=sum(positive and value in (PRESENT, UNCERTAIN) for value, positive in values),
                both_strict=sum(positive and value == PRESENT for value, positive in values),
                denied=sum(positive and value == ABSENT for value, positive in values),
            )
        )
    return rows


def agreement_table(rows: Iterable[Agreement]) -> str:
    """The rows as text for people."""
    head = f"{'label':27}{'MeSH':>6}{'1':>6}{'-1':>6}{'0':>6}{'0 in MeSH':>11}{'prec':>7}{'recall':>7}{'F1':>7}"
    lines = [f"{head}{'F1 of 1':>9}"]
    lines += [
        f"{row.label:27}{row.mesh:6}{row.present:6}{row.uncertain:6}{row.absent:6}{row.denied:11}"
        f"{row.precision:7.2f}{row.recall:7.2f}{row.f1:7.2f}{row.f1_strict:9.2f}"
        for row in rows
    ]
    return "\n".join(lines)
