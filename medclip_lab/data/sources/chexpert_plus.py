"""CheXpert Plus (Chambon et al., 2024): the radiographs of CheXpert with their reports, cut into sections.

Layout: `df_chexpert_plus_240401.csv` (a row an image), `chexbert_labels/{impression,findings,report}_fixed.json` (JSON
lines, as they are in the archive of that name), and images at `path_to_image` in `PNG/`, of suffix .png whatever the
table says, or those of CheXpert.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.chexpert import IMAGE_PATH, view_of
from medclip_lab.data.sources.tables import (
    NO_TEXT,
    SPLIT_OF,
    chest_report,
    find_image,
    find_table,
    frontal_first,
    label_value,
    read_images,
    read_rows,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

LabelledPart = Literal["impression", "findings", "report", "rules"]

# Column -> our section. Left out: the accession number, and what follows the impression.
_SECTION_OF = {
    "section_narrative": "narrative",
    "section_clinical_history": "indication",
    "section_history": "indication",
    "section_comparison": "comparison",
    "section_technique": "technique",
    "section_findings": "findings",
    "section_impression": "impression",
    "section_summary": "impression",
}
_TABLE = "df_chexpert_plus_240401.csv"
_IMAGE_SUFFIXES = (".png", ".jpg", ".dcm")


class _Study(NamedTuple):
    images: list[str]
    """Paths without suffix."""
    views: list[str]
    sections: dict[str, str]
    labels: dict[str, int | None] | None
    facts: dict[str, str]


@dataclass(frozen=True)
class ChexpertPlus:
    """A study is a record; ids are those of CheXpert, so that the two sets are known to overlap.

    Splits are the official ones: train and valid (val).
    """

    folder: Path = field(metadata={"help": f"CheXpert Plus: the folder with {_TABLE}"})
    images: Path | None = field(
        default=None,
        metadata={"help": "where train/patient.../ lies, such as a CheXpert folder (default: FOLDER or its PNG/)"},
    )
    labels: LabelledPart = field(
        default="impression",
        metadata={"help": "which labels of CheXbert: of the impression, the findings or the report; rules: ours"},
    )

    name = "chexpert-plus"
    license = "Stanford University Dataset Research Use Agreement"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        if self.labels not in get_args(LabelledPart):
            raise UserError(f"labels: one of {', '.join(get_args(LabelledPart))} expected, got {self.labels!r}")
        if self.images:
            existing_folder(self.images, "images")
        labels = None if self.labels == "rules" else dict(_labels(_label_file(folder, self.labels)))
        return [
            Record(
                study_id=f"chexpert-{patient}-{study}", patient_id=f"chexpert-{patient}", split=split, content=content
            )
            for (split, patient, study), content in _studies(find_table(folder, _TABLE, self.name), labels).items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        order = frontal_first(study.views)
        roots = [self.images.expanduser()] if self.images else self._roots()
        found = read_images([_image(roots, study.images[place]) for place in order], note)
        report = chest_report(study.sections)
        if study.sections and not report.text:
            note(*NO_TEXT)
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[study.views[order[place]] for place in found.places],
            sections=report.sections,
            text=report.text,
            labels=report.labels if study.labels is None else study.labels,
            sentences=report.sentences,
            source=self.name,
            license=self.license,
            extra=dict(study.facts),
        )

    def _roots(self) -> list[Path]:
        folder = self.folder.expanduser()
        return [folder, folder / "PNG", folder / "PNG" / "PNG"]  # the archive PNG.zip holds a folder PNG


def _image(roots: list[Path], stem: str) -> Path | None:
    return next((path for suffix in _IMAGE_SUFFIXES if (path := find_image(roots, stem + suffix))), None)


def _studies(table: Path, labels: dict[str, dict[str, int | None]] | None) -> dict[tuple[str, str, str], _Study]:
    """(split, patient, study) -> what the rows of its images say, in the order of the table."""
    studies: dict[tuple[str, str, str], _Study] = {}
    blank: dict[str, int | None] = dict.fromkeys(CHEXPERT14)
    needed = ("path_to_image", "ap_pa", "section_findings", "section_impression", "split")
    optional = (*(column for column in _SECTION_OF if column not in needed), "age", "sex", "race", "ethnicity")
    for line, row in read_rows(table, needed, optional):
        match = IMAGE_PATH.search(row["path_to_image"])
        if match is None:
            raise UserError(f"{table}, line {line}: path_to_image does not end in patientN/studyN/viewN_frontal.jpg")
        if row["split"] not in SPLIT_OF:
            raise UserError(f"{table}, line {line}: unknown split {row['split']!r}, one of train, valid, test expected")
        stem = row["path_to_image"].rpartition(".")[0]
        key = (SPLIT_OF[row["split"]], match["patient"], match["study"])
        if key not in studies:
            facts = {name: row[name] for name in ("age", "sex", "race", "ethnicity") if row[name]}
            states = labels.get(stem, blank) if labels is not None else None
            studies[key] = _Study([], [], _sections(row), states, facts)
        if stem not in studies[key].images:
            studies[key].images.append(stem)
            studies[key].views.append(view_of(match["side"], row["ap_pa"]))
    if not studies:
        raise UserError(f"{table}: no row below the column names")
    return studies


def _sections(row: dict[str, str]) -> dict[str, str]:
    sections: dict[str, str] = {}
    for column, section in _SECTION_OF.items():
        if any(map(str.isalnum, row[column])):
            sections[section] = f"{sections[section]}\n{row[column]}" if section in sections else row[column]
    return sections


def _label_file(folder: Path, part: str) -> Path:
    name = f"{part}_fixed.json"
    found = next((path for path in (folder / "chexbert_labels" / name, folder / name) if path.is_file()), None)
    if found is None:
        raise UserError(f"chexpert-plus: no chexbert_labels/{name} in {folder}: fetch it, or take --labels rules")
    return found


def _labels(path: Path) -> Iterator[tuple[str, dict[str, int | None]]]:
    """path_to_image without suffix, and its labels, of each line."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            where = f"{path}, line {line}"
            try:
                row = json.loads(text)
                stem, cells = row["path_to_image"].rpartition(".")[0], {name: row[name] for name in CHEXPERT14}
            except (json.JSONDecodeError, TypeError, AttributeError):
                raise UserError(f"{where}: no JSON object with path_to_image") from None
            except KeyError as error:
                raise UserError(f"{where}: no key {error}") from None
            yield stem, {name: label_value(cell, where, name) for name, cell in cells.items()}
