"""CheXpert (Irvin et al., AAAI 2019): chest radiographs with labels, small or full, without reports.

Read are `train.csv`, `valid.csv` and, where they are, `test.csv` or `test_labels.csv` of the test set. Images lie as
the tables say (`CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg`, from FOLDER or from inside the first
folder of that path), or as the full set is downloaded: `CheXpert-v1.0 batch 1 (validate & csv)/valid/patient...` with
the tables, `CheXpert-v1.0 batch 2 (train 1)/patient...` and so on.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.tables import (
    find_image,
    find_optional_table,
    find_table,
    frontal_first,
    read_images,
    read_labels,
    read_rows,
    view_name,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

IMAGE_PATH = re.compile(
    r"(?P<patient>patient\d+)/(?P<study>study\d+)/(?P<view>view\d+_(?P<side>frontal|lateral))\.\w+$"
)
"""The end of a path of CheXpert and CheXpert Plus."""

_LABELS = {name: name for name in CHEXPERT14}


class _Study(NamedTuple):
    images: list[str]
    views: list[str]
    labels: dict[str, int | None]
    same: bool
    """Whether all rows of the study have the same labels."""
    facts: dict[str, str]


@dataclass(frozen=True)
class Chexpert:
    """A study is a record. Splits are the official ones: train, valid (val) and, where it is, test."""

    folder: Path = field(metadata={"help": "CheXpert: the folder with train.csv and valid.csv, or the one above"})
    train_table: str = field(
        default="train.csv",
        metadata={"help": "train.csv, or other labels: train_cheXbert.csv, train_visualCheXbert.csv"},
    )

    name = "chexpert"
    license = "Stanford University Dataset Research Use Agreement"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        home = _home(folder, self.train_table)
        tables = [
            ("train", find_table(home, self.train_table, self.name)),
            ("val", find_table(_home(folder, "valid.csv"), "valid.csv", self.name)),
        ]
        test = find_optional_table(home, "test.csv") or find_optional_table(home, "test_labels.csv")
        if test:
            tables.append(("test", test))
        return [
            Record(
                study_id=f"chexpert-{patient}-{study}", patient_id=f"chexpert-{patient}", split=split, content=content
            )
            for split, table in tables
            for (patient, study), content in _studies(table).items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        order = frontal_first(study.views)
        paths = [_image(self.folder.expanduser(), study.images[place]) for place in order]
        found = read_images(paths, note)
        if not study.same:
            note("contradicting labels", "rows of one study differ: those of the first are kept")
        age = study.facts["Age"]
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[study.views[order[place]] for place in found.places],
            labels=study.labels,
            source=self.name,
            license=self.license,
            extra={"sex": study.facts["Sex"], "age": int(age) if age.isdigit() else None},
        )


def _home(folder: Path, table: str) -> Path:
    """The folder of a table: FOLDER itself, or the one folder in it that has the table."""
    homes = [folder, *_folders(folder)]
    return next((home for home in homes if find_optional_table(home, table)), folder)


def _studies(table: Path) -> dict[tuple[str, str], _Study]:
    """(patient, study) -> what its rows say, in the order of the table."""
    studies: dict[tuple[str, str], _Study] = {}
    for line, row in read_rows(table, ("Path", *CHEXPERT14), ("Sex", "Age", "Frontal/Lateral", "AP/PA")):
        match = IMAGE_PATH.search(row["Path"])
        if match is None:
            raise UserError(f"{table}, line {line}: the Path does not end in patientN/studyN/viewN_frontal.jpg")
        labels = read_labels(row, _LABELS, f"{table}, line {line}")
        new = _Study([], [], labels, True, {"Sex": row["Sex"], "Age": row["Age"]})
        key = (match["patient"], match["study"])
        study = studies.setdefault(key, new)
        if study.labels != labels:
            studies[key] = study = study._replace(same=False)
        if row["Path"] not in study.images:
            study.images.append(row["Path"])
            study.views.append(view_of(match["side"], row["AP/PA"]))
    if not studies:
        raise UserError(f"{table}: no row below the column names")
    return studies


def view_of(side: str, direction: str) -> str:
    """View by the columns of CheXpert: AP or PA of a frontal image, else LATERAL."""
    return "LATERAL" if side == "lateral" else view_name(direction)


def _image(folder: Path, path: str) -> Path | None:
    """Where the image of a Path is: see the head of this file."""
    roots = [folder, *_folders(folder)]
    inner = path.partition("/")[2]
    return find_image(roots, path) or find_image(roots, inner) or find_image(roots, inner.partition("/")[2])


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
