"""PadChest (Bustos et al., Medical Image Analysis 2020): 16-bit radiographs with Spanish reports and 193 findings.

Layout: `PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv` (a row an image), and the PNG files in the folders of the
column ImageDir (`0/` ... `54/`), in `images/`, or all in FOLDER.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.tables import (
    caption,
    find_image,
    find_table,
    frontal_first,
    map_findings,
    read_images,
    read_rows,
    view_name,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

_OF_CHEXPERT = {
    "No Finding": "normal",
    "Enlarged Cardiomediastinum": "mediastinal enlargement, superior mediastinal enlargement",
    "Cardiomegaly": "cardiomegaly",
    "Lung Lesion": "nodule, multiple nodules, pulmonary mass, lung metastasis, granuloma, calcified granuloma",
    "Lung Opacity": "infiltrates, interstitial pattern, ground glass pattern, reticular interstitial pattern, "
    "reticulonodular interstitial pattern, miliary opacities, alveolar pattern, increased density",
    "Edema": "pulmonary edema, heart insufficiency, hilar congestion",
    "Consolidation": "consolidation",
    "Pneumonia": "pneumonia, atypical pneumonia",
    "Atelectasis": "atelectasis, total atelectasis, lobar atelectasis, segmental atelectasis, laminar atelectasis, "
    "round atelectasis, atelectasis basal",
    "Pneumothorax": "pneumothorax, hydropneumothorax",
    "Pleural Effusion": "pleural effusion, loculated pleural effusion, loculated fissural effusion, hydropneumothorax, "
    "empyema, hemothorax",
    "Pleural Other": "pleural thickening, apical pleural thickening, calcified pleural thickening, pleural plaques, "
    "calcified pleural plaques, pleural mass",
    "Fracture": "fracture, clavicle fracture, humeral fracture, vertebral fracture, rib fracture, callus rib fracture",
    "Support Devices": "tracheostomy tube, endotracheal tube, nsg tube, chest drain tube, gastrostomy tube, "
    "ventriculoperitoneal drain tube, catheter, central venous catheter, central venous catheter via subclavian vein, "
    "central venous catheter via jugular vein, central venous catheter via umbilical vein, "
    "reservoir central venous catheter, electrical device, dual chamber device, single chamber device, pacemaker, dai, "
    "artificial heart valve, artificial mitral heart valve, artificial aortic heart valve, sternotomy",
}
CHEXPERT_OF: dict[str, list[str]] = {}
"""Finding of PadChest in lower case -> observations of CheXpert; findings that are not here map to none."""
for _name, _listed in _OF_CHEXPERT.items():
    for _finding in _listed.split(", "):
        CHEXPERT_OF.setdefault(_finding, []).append(_name)

_IN_DOUBT = {"costophrenic angle blunting": "pleural effusion"}  # as our label rules read it
_NOTHING_SAID = frozenset({"exclude", "suboptimal study"})  # such an image has no labels at all
_UNCHANGED = "unchanged"  # the findings of an earlier study hold on, whichever they were: what is not listed is unknown

_TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
_ITEM = re.compile(r"'([^']*)'")  # "['normal', ' pleural effusion', '']": a list as Python prints it
_PLAIN = re.compile(r"[0-9A-Za-z._-]+")


class _Study(NamedTuple):
    images: list[str]
    """ImageDir and ImageID."""
    views: list[str]
    report: str
    findings: tuple[str, ...]
    facts: dict[str, str]


@dataclass(frozen=True)
class Padchest:
    """A study is a record; splits are 80/10/10 by a hash of the patient, as there are no official ones.

    The report is the text (section findings), in Spanish, and read by no rules of ours. `extra` has all findings of the
    set as "finding_labels", and "method_label": Physician, or RNN_model for labels that a network gave.
    """

    folder: Path = field(metadata={"help": f"PadChest: the folder with {_TABLE} and the image folders"})

    name = "padchest"
    license = "PADCHEST Dataset Research Use Agreement"

    def records(self) -> list[Record]:
        table = find_table(existing_folder(self.folder, self.name), _TABLE, self.name)
        return [
            Record(
                study_id=f"padchest-{study_id}",
                patient_id=f"padchest-{patient}",
                split=split_by_hash(f"padchest-{patient}"),
                content=study,
            )
            for (patient, study_id), study in _studies(table).items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        order = frontal_first(study.views)
        found = read_images([self._image(study.images[place]) for place in order], note)
        report = caption(study.report)
        if not report.text:
            note("no report", "kept as an image without text")
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[study.views[order[place]] for place in found.places],
            sections=report.sections,
            text=report.text,
            labels=chexpert_labels(study.findings),
            source=self.name,
            license=self.license,
            extra={"language": "es", "finding_labels": list(study.findings), **study.facts},
        )

    def _image(self, name: str) -> Path | None:
        folder = self.folder.expanduser()
        roots = [folder, folder / "images"]
        return find_image(roots, name) or find_image(roots, name.partition("/")[2])


def chexpert_labels(findings: tuple[str, ...]) -> dict[str, int | None]:
    """Labels by CheXpert's names from the findings of a study.

    What is not listed is absent, but unknown (None) if the report calls something unchanged; nothing is known of images
    to be excluded, of suboptimal ones, and of those without any finding.
    """
    names = {finding.lower() for finding in findings}
    if not names or names & _NOTHING_SAID:
        return dict.fromkeys(CHEXPERT14)
    states = map_findings(CHEXPERT_OF, names, [_IN_DOUBT[name] for name in names if name in _IN_DOUBT])
    return {name: state or None for name, state in states.items()} if _UNCHANGED in names else states


def _studies(table: Path) -> dict[tuple[str, str], _Study]:
    """(patient, study) -> what the rows of its images say, in the order of the table."""
    studies: dict[tuple[str, str], _Study] = {}
    needed = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "Report", "Labels")
    for line, row in read_rows(table, needed, ("MethodLabel", "PatientSex_DICOM", "PatientBirth")):
        if not all(_PLAIN.fullmatch(row[name]) for name in ("StudyID", "PatientID", "ImageID")):
            raise UserError(f"{table}, line {line}: StudyID, PatientID and ImageID have letters, digits, '.', '_', '-'")
        facts = {"method_label": row["MethodLabel"], "sex": row["PatientSex_DICOM"], "birth_year": row["PatientBirth"]}
        key = (row["PatientID"], row["StudyID"])
        new = _Study([], [], row["Report"], tuple(_findings(row["Labels"])), facts)
        study = studies.setdefault(key, new)
        image = f"{row['ImageDir']}/{row['ImageID']}"
        if image not in study.images:
            study.images.append(image)
            study.views.append(view_name(row["Projection"]))
    if not studies:
        raise UserError(f"{table}: no row below the column names")
    return studies


def _findings(cell: str) -> Iterator[str]:
    yield from dict.fromkeys(finding.strip() for finding in _ITEM.findall(cell) if finding.strip())
