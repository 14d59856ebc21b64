"""MIMIC-CXR-JPG 2.0.0 and 2.1.0 (Johnson et al., 2019 and 2024): chest radiographs, with the reports of MIMIC-CXR.

Layout as PhysioNet distributes it: `files/p10/p10000032/s50414267/DICOM_ID.jpg` and the tables
`mimic-cxr-2.0.0-{split,metadata,chexpert,negbio}.csv.gz`; the reports are `files/p10/p10000032/s50414267.txt` in
`mimic-cxr-reports.zip` of MIMIC-CXR.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.report import parse_sections, report_text
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.tables import (
    NO_TEXT,
    SPLIT_OF,
    chest_report,
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

Labeller = Literal["chexpert", "negbio", "rules"]
MAX_REPORT_BYTES = 2**20  # the longest has some 10 kB

_NUMBER = re.compile(r"\d{8}")
_DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")
_RADIOLOGIST = "mimic-cxr-2.1.0-test-set-labeled.csv"  # of the test split, new in 2.1.0
_HEADED = re.compile(r"^[ \t]*[A-Z][A-Z /]{2,}:", re.MULTILINE)
_AIRSPACE = "Airspace Opacity"  # how that table calls Lung Opacity


_States = tuple[int | None, ...]
"""States of CHEXPERT14, in its order: a quarter of the memory of a dict."""


class _Study(NamedTuple):
    subject: str
    study: str
    images: tuple[str, ...]
    views: tuple[str, ...]
    labels: _States | None
    """None where our rules are asked."""
    radiologist: _States | None


@dataclass(frozen=True)
class MimicCxr:
    """A study is a record: its images, its report if there are reports, and the labels of a labeller.

    Splits are the official ones, by patient. `extra` has "dicom_ids", and "radiologist_labels" where a radiologist
    labelled the report.
    """

    folder: Path = field(metadata={"help": "MIMIC-CXR-JPG: the folder with files/ and mimic-cxr-2.0.0-split.csv.gz"})
    reports: Path | None = field(
        default=None,
        metadata={
            "help": "mimic-cxr-reports.zip of MIMIC-CXR, or the folder in which its files/ lie (default: "
            "mimic-cxr-reports.zip or mimic-cxr-reports/ in FOLDER, if there, else the studies have no text)",
            "example": "mimic-cxr-reports.zip",
        },
    )
    labeller: Labeller = field(
        default="chexpert",
        metadata={"help": "chexpert or negbio: the set's own table; rules: ours, from the reports"},
    )
    label_table: Path | None = field(
        default=None,
        metadata={
            "help": "a CSV with study_id and the fourteen observations, such as CheXbert's, instead of --labeller"
        },
    )

    name = "mimic-cxr"
    license = "PhysioNet Credentialed Health Data License 1.5.0"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        self._check()
        views = dict(_views(find_table(folder, "mimic-cxr-2.0.0-metadata.csv", self.name)))
        label_table, expert = self._label_table(folder), find_optional_table(folder, _RADIOLOGIST)
        labels = dict(_labels(label_table)) if label_table else {}
        radiologist = dict(_labels(expert)) if expert else {}
        unlabelled = (None,) * len(CHEXPERT14) if label_table else None
        records = []
        split_table = find_table(folder, "mimic-cxr-2.0.0-split.csv", self.name)
        for (subject, study, split), dicoms in _studies(split_table).items():
            seen = [views.get(dicom, "") for dicom in dicoms]
            order = frontal_first(seen)
            content = _Study(
                subject,
                study,
                tuple(dicoms[place] for place in order),
                tuple(seen[place] for place in order),
                labels.get(study, unlabelled),
                radiologist.get(study),
            )
            study_id, patient_id = f"mimic-{study}", f"mimic-{subject}"
            records.append(Record(study_id=study_id, patient_id=patient_id, split=split, content=content))
        return records

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        place = f"files/p{study.subject[:2]}/p{study.subject}/s{study.study}"
        home = self.folder.expanduser() / place
        found = read_images([_image(home, dicom) for dicom in study.images], note)
        text = self._report(place + ".txt", note)
        report = chest_report(_sections(text))
        if text and not report.text:
            note(*NO_TEXT)
        extra: dict[str, object] = {"dicom_ids": [study.images[number] for number in found.places]}
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[study.views[number] for number in found.places],
            sections=report.sections,
            text=report.text,
            labels=report.labels if study.labels is None else _named(study.labels),
            sentences=report.sentences,
            source=self.name,
            license=self.license,
            extra=extra | ({"radiologist_labels": _named(study.radiologist)} if study.radiologist else {}),
        )

    def _check(self) -> None:
        reports = self._reports()
        if self.labeller not in get_args(Labeller):
            raise UserError(f"labeller: one of {', '.join(get_args(Labeller))} expected, got {self.labeller!r}")
        if reports and not (reports.is_dir() or zipfile.is_zipfile(reports)):
            raise UserError(f"reports: neither a folder nor a zip file: {reports}")
        if self.labeller == "rules" and not self.label_table and not reports:
            raise UserError("labeller: rules needs reports: name mimic-cxr-reports.zip with --reports")

    def _label_table(self, folder: Path) -> Path | None:
        """The table of labels, None for those of our rules."""
        if self.label_table:
            return self.label_table.expanduser()
        if self.labeller == "rules":
            return None
        return find_table(folder, f"mimic-cxr-2.0.0-{self.labeller}.csv", self.name)

    def _reports(self) -> Path | None:
        if self.reports:
            return self.reports.expanduser()
        folder = self.folder.expanduser()
        places = (folder / "mimic-cxr-reports.zip", folder / "mimic-cxr-reports")
        return next((place for place in places if place.exists()), None)

    def _report(self, name: str, note: Note) -> str:
        """The report at `name`, empty where there is none or it cannot be read."""
        reports = self._reports()
        if reports is None:
            return ""
        try:
            data = (reports / name).read_bytes() if reports.is_dir() else _from_zip(reports, name)
        except (FileNotFoundError, KeyError):
            note("missing report", "no text file of this study")
            return ""
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            note("unreadable report", type(error).__name__, counted=True)
            return ""
        if len(data) > MAX_REPORT_BYTES:
            note("unreadable report", f"larger than {MAX_REPORT_BYTES} bytes", counted=True)
            return ""
        return data.decode("utf-8", errors="replace")


def _studies(path: Path) -> dict[tuple[str, str, str], list[str]]:
    """(subject, study, split) -> its images, in the order of the table."""
    studies: dict[tuple[str, str, str], list[str]] = {}
    first: dict[str, tuple[str, str, str]] = {}
    for line, row in read_rows(path, ("dicom_id", "study_id", "subject_id", "split")):
        where = f"{path}, line {line}"
        if not _DICOM_ID.fullmatch(row["dicom_id"]):
            raise UserError(f"{where}: the dicom_id is no name of a MIMIC-CXR image")
        if not _NUMBER.fullmatch(row["study_id"]) or not _NUMBER.fullmatch(row["subject_id"]):
            raise UserError(f"{where}: study_id and subject_id have eight digits")
        if row["split"] not in SPLIT_OF:
            raise UserError(f"{where}: unknown split {row['split']!r}, one of train, validate, test expected")
        key = (row["subject_id"], row["study_id"], SPLIT_OF[row["split"]])
        if first.setdefault(row["study_id"], key) != key:
            raise UserError(f"{where}: another subject or split than before for the same study")
        dicoms = studies.setdefault(key, [])
        if row["dicom_id"] not in dicoms:
            dicoms.append(row["dicom_id"])
    if not studies:
        raise UserError(f"{path}: no row below the column names")
    return studies


def _views(path: Path) -> Iterator[tuple[str, str]]:
    for _, row in read_rows(path, ("dicom_id", "ViewPosition")):
        yield row["dicom_id"], view_name(row["ViewPosition"])


def _labels(path: Path) -> Iterator[tuple[str, _States]]:
    """study_id and labels of each row of a table of any labeller."""
    if not path.is_file():
        raise UserError(f"label-table: no such file: {path}")
    opacity = _AIRSPACE if path.name.startswith(_RADIOLOGIST) else "Lung Opacity"
    columns = {name: opacity if name == "Lung Opacity" else name for name in CHEXPERT14}
    for line, row in read_rows(path, ("study_id", *columns.values())):
        yield row["study_id"], tuple(read_labels(row, columns, f"{path}, line {line}").values())


def _sections(text: str) -> dict[str, str]:
    """Sections of a report; of one without findings and impression the last paragraph serves as findings.

    So does the code that comes with MIMIC-CXR: in such reports what was seen follows the comparison without a header.
    """
    sections = parse_sections(text)
    paragraphs = [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if paragraphs and not report_text(sections) and not _HEADED.search(paragraphs[-1]):
        sections |= {"findings": " ".join(paragraphs[-1].split())}
    return sections


def _named(states: _States) -> dict[str, int | None]:
    return dict(zip(CHEXPERT14, states, strict=True))


def _image(home: Path, dicom: str) -> Path:
    """The JPEG, or the DICOM file of those who put MIMIC-CXR in the same tree."""
    original = home / f"{dicom}.dcm"
    return original if original.is_file() else home / f"{dicom}.jpg"


@lru_cache(maxsize=1)
def _zip(path: Path, process: int) -> zipfile.ZipFile:  # noqa: ARG001 - a forked process must not share the position
    """Opened once a process: the directory of 227,835 files takes a second to read."""
    return zipfile.ZipFile(path)


def _from_zip(path: Path, name: str) -> bytes:
    with _zip(path, os.getpid()).open(name) as file:
        return file.read(MAX_REPORT_BYTES + 1)
