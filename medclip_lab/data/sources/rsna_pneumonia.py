"""RSNA Pneumonia Detection Challenge 2018 (Shih et al., Radiology: AI 2019): frontal radiographs of NIH ChestX-ray14.

Layout of stage 2 on Kaggle: `stage_2_train_labels.csv` (a row a box), `stage_2_detailed_class_info.csv` and
`stage_2_train_images/PATIENTID.dcm`. "patientId" names an image: which patient of NIH it shows is told by
`pneumonia-challenge-dataset-mappings_2018.json` of the RSNA, which is read if it lies in the folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.dicom_header import read_header, require_pydicom, view_age_sex
from medclip_lab.data.sources.tables import find_image, find_table, read_images, read_rows, short
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

CLASSES = {
    "Normal": {NO_FINDING: PRESENT, "Lung Opacity": ABSENT, "Pneumonia": ABSENT},
    "No Lung Opacity / Not Normal": {NO_FINDING: ABSENT, "Lung Opacity": ABSENT, "Pneumonia": ABSENT},
    "Lung Opacity": {NO_FINDING: ABSENT, "Lung Opacity": PRESENT, "Pneumonia": PRESENT},
}
"""Class of an image -> what it says of CheXpert's names; of the others it says nothing."""

_MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
_BOX = ("x", "y", "width", "height")


class _Image(NamedTuple):
    name: str
    kind: str
    boxes: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class RsnaPneumonia:
    """An image is a study; splits are 80/10/10 by a hash of the patient, as there are no official ones with labels.

    Patients are those of NIH where the mapping of the RSNA is in the folder, else every image is one. `extra` has
    "class" and "boxes" (x, y, width, height in pixels of the original), and age and sex from the header.
    """

    folder: Path = field(metadata={"help": "RSNA Pneumonia: the folder with stage_2_train_labels.csv"})

    name = "rsna-pneumonia"
    license = "RSNA terms of use: any purpose, with the attribution asked for; images of the NIH Clinical Center"

    def records(self) -> list[Record]:
        require_pydicom()
        folder = existing_folder(self.folder, self.name)
        classes = _classes(find_table(folder, "stage_2_detailed_class_info.csv", self.name))
        patients = _nih_patients(folder / _MAPPING)
        records = []
        for name, boxes in _boxes(find_table(folder, "stage_2_train_labels.csv", self.name), classes).items():
            study_id = f"rsna-{name}"
            patient_id = patients.get(name, study_id)
            content = _Image(name, classes[name], tuple(boxes))
            records.append(
                Record(study_id=study_id, patient_id=patient_id, split=split_by_hash(patient_id), content=content)
            )
        return records

    def read(self, record: Record, note: Note) -> Sample:
        image: _Image = record.content
        path = find_image([self.folder.expanduser() / "stage_2_train_images"], f"{image.name}.dcm")
        found = read_images([path], note)
        view, extra = view_age_sex(read_header(found.images[0][1]))
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[view],
            labels={name: CLASSES[image.kind].get(name) for name in CHEXPERT14},
            source=self.name,
            license=self.license,
            extra=extra | {"class": image.kind, "boxes": [list(box) for box in image.boxes]},
        )


def _classes(table: Path) -> dict[str, str]:
    classes: dict[str, str] = {}
    for line, row in read_rows(table, ("patientId", "class")):
        if row["class"] not in CLASSES:
            raise UserError(f"{table}, line {line}: unknown class {short(row['class'])}, one of {', '.join(CLASSES)}")
        if classes.setdefault(row["patientId"], row["class"]) != row["class"]:
            raise UserError(f"{table}, line {line}: another class than before for the same image")
    return classes


def _boxes(table: Path, classes: dict[str, str]) -> dict[str, list[tuple[float, ...]]]:
    """Image -> its boxes, in the order of the table."""
    boxes: dict[str, list[tuple[float, ...]]] = {}
    for line, row in read_rows(table, ("patientId", *_BOX, "Target")):
        where = f"{table}, line {line}"
        if row["patientId"] not in classes:
            raise UserError(f"{where}: the image is not in stage_2_detailed_class_info.csv")
        if row["Target"] != ("1" if classes[row["patientId"]] == "Lung Opacity" else "0"):
            raise UserError(f"{where}: the Target contradicts the class in stage_2_detailed_class_info.csv")
        listed = boxes.setdefault(row["patientId"], [])
        if row["x"]:
            try:
                box = tuple(float(row[name]) for name in _BOX)
            except ValueError:
                raise UserError(f"{where}: a box needs four numbers") from None
            if box not in listed:
                listed.append(box)
    if not boxes:
        raise UserError(f"{table}: no row below the column names")
    return boxes


def _nih_patients(path: Path) -> dict[str, str]:
    """Image -> patient as the reader of NIH ChestX-ray14 calls it; empty without the file."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        # img_id is the file name of NIH: patient, follow-up
        return {row["subset_img_id"]: f"nih-{int(row['img_id'].partition('_')[0]):08d}" for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no JSON list of objects with subset_img_id and img_id: fetch it again") from None
