"""CT-RATE (Hamamci et al., 2024): non-contrast chest CT volumes with reports and eighteen abnormalities.

Layout of `dataset/` on Hugging Face, a row of each table being a volume: `radiology_text_reports/train_reports.csv` and
`validation_reports.csv`, `multi_abnormality_labels/train_predicted_labels.csv` and `valid_predicted_labels.csv`,
`metadata/train_metadata.csv` and `validation_metadata.csv`; and the volumes, in folders by patient and study:
`train_fixed/train_1/train_1_a/train_1_a_1.nii.gz`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from medclip_lab.data.report import report_text
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.tables import (
    NO_TEXT,
    find_image,
    find_optional_table,
    find_table,
    read_images,
    read_labels,
    read_rows,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

Volumes = Literal["fixed", "original", "none"]

ABNORMALITIES = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
"""As its tables spell them: predicted from the reports by a network of the data set's authors."""

_VAL_SHARE = 0.1  # of the training patients: what CT-RATE calls validation is what everybody tests on
_PARTS = {"train": "train", "valid": "validation"}  # as volumes and labels call a part -> as reports and metadata do
_VOLUME = re.compile(r"((train|valid)_\d+)_([a-z]+)_\d+\.nii\.gz")
_SECTION_OF = {
    "Findings_EN": "findings",
    "Impressions_EN": "impression",
    "ClinicalInformation_EN": "indication",
    "Technique_EN": "technique",
}
_NOT_GIVEN = ("", "not given", "nan")
_FACTS = ("PatientSex", "PatientAge", "ConvolutionKernel", "XYSpacing", "ZSpacing", "RescaleSlope", "RescaleIntercept")


class _Study(NamedTuple):
    volumes: tuple[str, ...]
    sections: tuple[tuple[str, str], ...]
    labels: tuple[int | None, ...]
    facts: tuple[tuple[str, ...], ...]
    """Of each volume, in the order of `_FACTS`; empty cells where there is no metadata."""
    differs: bool
    """Whether a later volume of the study has another report or other labels than the first."""


@dataclass(frozen=True)
class CtRate:
    """A study is a scan: its reconstructions as volumes, one report, one set of labels.

    What CT-RATE calls validation is split test, which is what is measured everywhere; a tenth of the training patients,
    by hash, is val. Volumes pass on byte for byte: nothing here decodes them yet.

    `extra` has "VolumeName", the files, by which `--labels-from` matches the own tables of the set; "sex" and "age";
    for each volume "spacing" (x, y, z in mm), "kernel" and "rescale": slope and intercept, to be applied once; None in
    place of all of them where the voxels are Hounsfield units already.
    """

    folder: Path = field(metadata={"help": "CT-RATE: the folder with radiology_text_reports/"})
    volumes: Volumes = field(
        default="fixed",
        metadata={
            "help": "fixed: those of train_fixed/ and valid_fixed/, in Hounsfield units; original: those of train/ and "
            "valid/; none: reports and labels alone"
        },
    )

    name = "ct-rate"
    license = "CC-BY-NC-SA-4.0; CT-RATE's terms: no redistribution of any portion"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        if self.volumes not in get_args(Volumes):
            raise UserError(f"volumes: one of {', '.join(get_args(Volumes))} expected, got {self.volumes!r}")
        found = [part for part, name in _PARTS.items() if find_optional_table(_reports(folder), f"{name}_reports.csv")]
        if not found:
            find_table(_reports(folder), "train_reports.csv", self.name)
        records = []
        for part in found:
            for study, content in _studies(folder, part, self.name).items():
                patient_id = f"ct-rate-{study.rpartition('_')[0]}"
                split = "test" if part == "valid" else split_by_hash(patient_id, val=_VAL_SHARE, test=0)
                records.append(Record(study_id=f"ct-rate-{study}", patient_id=patient_id, split=split, content=content))
        return records

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        paths = [] if self.volumes == "none" else [self._path(name) for name in study.volumes]
        found = read_images(paths, note)
        if study.differs:
            note("volumes of a study differ", "report and labels are those of the first volume")
        sections = dict(study.sections)
        text = report_text(sections)
        if not text:
            note(*NO_TEXT)
        places = found.places or range(len(study.volumes))
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[""] * len(found.images),
            modality="CT",
            sections=sections,
            text=text,
            labels=dict(zip(ABNORMALITIES, study.labels, strict=True)),
            source=self.name,
            license=self.license,
            extra=self._extra(study, [*places]),
        )

    def _path(self, name: str) -> Path | None:
        match = _VOLUME.fullmatch(name)
        assert match, "names were checked"
        patient, part, letter = match.groups()
        folder = f"{part}_fixed" if self.volumes == "fixed" else part
        return find_image([self.folder.expanduser()], f"{folder}/{patient}/{patient}_{letter}/{name}")

    def _extra(self, study: _Study, places: list[int]) -> dict[str, Any]:
        facts = [dict(zip(_FACTS, study.facts[place], strict=True)) for place in places]
        age = re.fullmatch(r"0*(\d+)Y", facts[0]["PatientAge"])
        scaled = [[_number(row["RescaleSlope"]), _number(row["RescaleIntercept"])] for row in facts]
        return {
            "VolumeName": [study.volumes[place] for place in places],
            "sex": facts[0]["PatientSex"],
            "age": int(age[1]) if age else None,
            "spacing": [_spacing(row["XYSpacing"], row["ZSpacing"]) for row in facts],
            "kernel": [row["ConvolutionKernel"] for row in facts],
            "rescale": scaled if self.volumes == "original" else None,
        }


def _reports(folder: Path) -> Path:
    return folder / "radiology_text_reports"


def _studies(folder: Path, part: str, what: str) -> dict[str, _Study]:
    """Study -> what is told of it, in the order of the table of reports."""
    table = find_table(_reports(folder), f"{_PARTS[part]}_reports.csv", what)
    labels = _labels(find_optional_table(folder / "multi_abnormality_labels", f"{part}_predicted_labels.csv"))
    facts = _facts(find_optional_table(folder / "metadata", f"{_PARTS[part]}_metadata.csv"))
    studies: dict[str, _Study] = {}
    seen: set[str] = set()
    for line, row in read_rows(table, ("VolumeName", "Findings_EN", "Impressions_EN"), tuple(_SECTION_OF)[2:]):
        name = row["VolumeName"]
        match = _VOLUME.fullmatch(name)
        if not match or match[2] != part:
            raise UserError(f"{table}, line {line}: VolumeName is no {part}_PATIENT_SCAN_VOLUME.nii.gz")
        if name in seen:
            raise UserError(f"{table}, line {line}: this volume stands there twice")
        seen.add(name)
        told = {section: " ".join(row[column].split()) for column, section in _SECTION_OF.items()}
        sections = tuple(
            (section, text) for section, text in told.items() if text.rstrip(".").lower() not in _NOT_GIVEN
        )
        states, fact = labels.get(name, (None,) * len(ABNORMALITIES)), facts.get(name, ("",) * len(_FACTS))
        study = f"{match[1]}_{match[3]}"
        first = studies.get(study)
        if first is None:
            studies[study] = _Study((name,), sections, states, (fact,), False)
            continue
        differs = first.differs or (first.sections, first.labels) != (sections, states)
        studies[study] = first._replace(volumes=(*first.volumes, name), facts=(*first.facts, fact), differs=differs)
    if not studies:
        raise UserError(f"{table}: no row below the column names")
    return studies


def _labels(table: Path | None) -> dict[str, tuple[int | None, ...]]:
    if table is None:
        return {}
    columns = {name: name for name in ABNORMALITIES}
    return {
        row["VolumeName"]: tuple(read_labels(row, columns, f"{table}, line {line}").values())
        for line, row in read_rows(table, ("VolumeName", *ABNORMALITIES))
    }


def _facts(table: Path | None) -> dict[str, tuple[str, ...]]:
    if table is None:
        return {}
    return {
        row["VolumeName"]: tuple(row[name] for name in _FACTS) for _, row in read_rows(table, ("VolumeName",), _FACTS)
    }


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _spacing(plane: str, between: str) -> list[float] | None:
    """x, y, z in mm from "[0.7, 0.7]" and "1.5"; None if any is not told."""
    values = [_number(text) for text in [*plane.strip("[]").split(","), between]]
    return [value for value in values if value] if len(values) == 3 and all(values) else None
