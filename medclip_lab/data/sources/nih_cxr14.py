"""NIH ChestX-ray14 (Wang et al., CVPR 2017): frontal radiographs with labels, without reports.

Two layouts are read. The original: `Data_Entry_2017*.csv`, images in `images/` or `images_001/images/` ..., and
`train_val_list.txt` and `test_list.txt` where they are. A reduced one: `metadata.csv` with the columns image,
finding_labels, patient_id, follow_up, age, sex, view, split, and images in `images/`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT
from medclip_lab.data.sample import SPLITS, Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import read_image, read_table, require_columns, split_by_hash
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

# The fifteen NIH names; those that CheXpert has no word for stay in extra["finding_labels"] only.
CHEXPERT_OF: dict[str, str | None] = {
    "No Finding": NO_FINDING,
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Emphysema": None,
    "Fibrosis": None,
    "Hernia": None,
}
NEVER_LABELLED = tuple(name for name in CHEXPERT14 if name not in CHEXPERT_OF.values())

_REDUCED = "metadata.csv"
_VAL_SHARE = 0.1  # of the patients of train_val_list.txt
_OLDEST = 120  # years; the original holds ages such as 414


@dataclass(frozen=True)
class NihCxr14:
    """A study is an image, in the order of the table; image bytes are passed on unchanged.

    Labels: 1 if listed and 0 if not for the names NIH labels, None for the others (`NEVER_LABELLED`). Splits: those of
    `metadata.csv`; else `test_list.txt` is test, and a tenth of the patients of `train_val_list.txt`, by hash, is val;
    without lists 80/10/10 by a hash of the patient.
    """

    folder: Path = field(
        metadata={"help": "folder with Data_Entry_2017*.csv and the images", "example": "path/to/CXR8"}
    )

    name = "nih-cxr14"
    license = "no restriction on use; the NIH Clinical Center is to be named as the source"

    def records(self) -> list[Record]:
        """One an image.

        Raises:
            UserError: no such folder, neither table in it, a missing column, an unknown finding, split or patient, no
                images at all.
        """
        layout = _layout(self.folder)
        folder = layout.table.parent
        images = _image_paths(folder)
        lists = {name: _read_list(folder / f"{name}_list.txt") for name in ("train_val", "test")}
        return [_record(row, f"{layout.table}, line {line}", layout, images, lists) for line, row in layout.rows]

    def read(self, record: Record, note: Note) -> Sample:  # noqa: ARG002 - a study is one image: good or bad
        """An image with its labels.

        Raises:
            BadStudyError: the image is missing or cannot be read.
        """
        study: _Study = record.content
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=[read_image(study.image)],
            view=[study.view],
            labels=_labels(study.facts["finding_labels"]),
            source=self.name,
            license=self.license,
            extra=study.facts,
        )


@dataclass(frozen=True)
class _Study:
    image: Path | None
    view: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    table: Path
    columns: dict[str, str]
    """Our name of a column -> its name in the table."""
    rows: list[tuple[int, dict[str, str]]]


def _record(
    row: dict[str, str],
    where: str,
    layout: _Layout,
    images: dict[str, Path],
    lists: dict[str, frozenset[str] | None],
) -> Record:
    cells = {name: row[column] for name, column in layout.columns.items()}
    findings = [name.strip() for name in cells["finding_labels"].split("|")]
    unknown = [name for name in findings if name not in CHEXPERT_OF]
    if unknown:
        raise UserError(f"{where}: unknown finding {unknown[0]!r}, one of {', '.join(CHEXPERT_OF)} expected")
    patient_id = _patient(cells["patient_id"], where)
    facts = {
        "age": _age(cells["age"]),
        "sex": cells["sex"].upper(),
        "follow_up": int(cells["follow_up"]) if cells["follow_up"].isdigit() else None,
        "finding_labels": findings,
    }
    return Record(
        study_id="nih-" + re.sub(r"[^0-9a-z]+", "-", Path(cells["image"]).stem.lower()).strip("-"),
        patient_id=patient_id,
        split=_split(cells, patient_id, lists, where),
        content=_Study(images.get(cells["image"]), cells["view"].upper(), facts),
    )


def _layout(folder: Path) -> _Layout:
    folder = existing_folder(folder, NihCxr14.name)
    original = sorted(folder.glob("Data_Entry_2017*.csv"))
    if (folder / _REDUCED).is_file():
        table = folder / _REDUCED
        names = ("image", "finding_labels", "patient_id", "follow_up", "age", "sex", "view", "split")
        columns = {name: name for name in names}
        there, rows = read_table(table)
    elif original:
        table = original[-1]  # a later version has a longer name: Data_Entry_2017_v2020.csv
        there, rows = read_table(table)
        columns = {
            "image": "Image Index",
            "finding_labels": "Finding Labels",
            "follow_up": "Follow-up #",
            "patient_id": "Patient ID",
            "age": "Patient Age",
            "sex": "Patient Sex" if "Patient Sex" in there else "Patient Gender",
            "view": "View Position",
        }
    else:
        raise UserError(f"{NihCxr14.name}: neither Data_Entry_2017*.csv nor {_REDUCED} in {folder}")
    require_columns(table, there, columns.values())
    return _Layout(table, columns, list(rows))


def _image_paths(folder: Path) -> dict[str, Path]:
    """File name -> path, over all image folders: names in a table are looked up here and never joined to a path."""
    folders = [folder / "images", *sorted(folder.glob("images_*"))]
    folders += [inner / "images" for inner in folders[1:]]
    paths = {path.name: path for inner in folders if inner.is_dir() for path in inner.iterdir() if path.is_file()}
    if not paths:
        raise UserError(f"{NihCxr14.name}: no images in {folder / 'images'} nor in {folder / 'images_*'}")
    return paths


def _read_list(path: Path) -> frozenset[str] | None:
    return frozenset(path.read_text(encoding="utf-8").split()) if path.is_file() else None


def _labels(findings: list[str]) -> dict[str, int | None]:
    listed = {CHEXPERT_OF[name] for name in findings}
    return {name: None if name in NEVER_LABELLED else PRESENT if name in listed else ABSENT for name in CHEXPERT14}


def _split(cells: dict[str, str], patient_id: str, lists: dict[str, frozenset[str] | None], where: str) -> str:
    if "split" in cells:
        if cells["split"] not in SPLITS:
            raise UserError(f"{where}: unknown split {cells['split']!r}, one of {', '.join(SPLITS)} expected")
        return cells["split"]
    train_val, test = lists["train_val"], lists["test"]
    if test is None and train_val is None:
        return split_by_hash(patient_id)
    if cells["image"] in test if test is not None else cells["image"] not in (train_val or ()):
        return "test"
    if train_val is not None and cells["image"] not in train_val:
        raise UserError(f"{where}: the image is in neither train_val_list.txt nor test_list.txt")
    return split_by_hash(patient_id, val=_VAL_SHARE, test=0)


def _patient(value: str, where: str) -> str:
    if not value.isdigit():
        raise UserError(f"{where}: patient {value!r} is not a number")
    return f"nih-{int(value):08d}"


def _age(value: str) -> int | None:
    """Years; the first release wrote "058Y", and "013M" or "002D" for the youngest. None if it cannot be an age."""
    match = re.fullmatch(r"(\d{1,4})([YMD]?)", value.strip().upper())
    if not match:
        return None
    years = int(match[1]) // {"M": 12, "D": 365}.get(match[2], 1)
    return years if years <= _OLDEST else None
