"""What tables of the user's own have in common, wherever their rows lie: columns by name, rows that share a study.

Read by `jsonl`, `parquet` and `hf_dataset`, which say how rows are listed and fetched.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.report import PREAMBLE, parse_sections, report_text
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record
from medclip_lab.data.sources.common import image_suffix, require_columns, split_by_hash
from medclip_lab.data.sources.tables import (
    NO_TEXT,
    SPLIT_OF,
    Report,
    chest_report,
    find_image,
    label_value,
    read_images,
    short,
    view_name,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder


class _Chosen(NamedTuple):
    """The columns to read; empty where the table has none."""

    image: str
    text: str
    study: str
    patient: str
    split: str
    view: str
    labels: dict[str, str]


class _Study(NamedTuple):
    where: str
    """Where the first row of the study is, for messages."""
    patient: str
    split: str
    labels: dict[str, int | None]
    rows: list[tuple[str, int, str]]
    """File, place in it and view of each row."""


@dataclass(frozen=True)
class RowSource(ABC):
    """A row is an image, a text, or both; rows that share a study are one study.

    An image cell is the path of a file below the image folder (absolute paths and ".." are never followed), encoded
    bytes, {"bytes": ..., "path": ...} as Hugging Face writes it, or a list of those; a text cell a text or a list.
    A study whose images are all bad is left out. Columns study_id, patient_id, split and view are taken where they are
    and no other is named. Without a study every row is one; without a patient every study is one; without a split it is
    the name of the file or folder (train, valid, test), else 80/10/10 by a hash of the patient.
    """

    folder: Path = field(metadata={"help": "the table, or a folder with several"})
    image: str = field(default="image", metadata={"help": "column of images, empty for none"})
    text: str = field(default="text", metadata={"help": "column of texts, empty for none"})
    study: str | None = field(default=None, metadata={"help": "column of study ids (default: study_id, if there)"})
    patient: str | None = field(
        default=None, metadata={"help": "column of patient ids (default: patient_id, if there)"}
    )
    split: str | None = field(default=None, metadata={"help": "column of train/val/test (default: split, if there)"})
    view: str | None = field(default=None, metadata={"help": "column of PA, AP, LATERAL (default: view, if there)"})
    labels: tuple[str, ...] | None = field(
        default=None,
        metadata={"help": "label columns with 1, 0, -1 or blank (default: those named as CheXpert's fourteen)"},
    )
    image_folder: Path | None = field(
        default=None, metadata={"help": "where image paths start (default: the folder of the table)"}
    )
    label_text: bool = field(
        default=True, metadata={"help": "whether texts are chest radiograph reports, labelled by our rules"}
    )
    license: str = field(default="private", metadata={"help": "noted in every study"})
    modality: str = field(default="CR", metadata={"help": "noted in every study"})

    name = ""

    @abstractmethod
    def files(self) -> list[tuple[Path, str]]:
        """The tables in order, and the split that the name of each tells ("" if none).

        Raises:
            UserError: there is none.
        """

    @abstractmethod
    def columns(self, file: Path) -> list[str]:
        """Column names.

        Raises:
            UserError: a table that cannot be read.
        """

    @abstractmethod
    def scan(self, file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(place, cells of `columns`) of each row; a cell of an image that is not text may be None."""

    @abstractmethod
    def fetch(self, file: Path, place: int) -> dict[str, Any]:
        """The row at a place of `scan`, whole."""

    def records(self) -> list[Record]:
        if not self.image and not self.text:
            raise UserError(f"{self.name}: neither an image nor a text column is named")
        if self.image_folder:
            existing_folder(self.image_folder, "image-folder")
        studies: dict[str, _Study] = {}
        for file, part in self.files():
            self._group(file, part, studies)
        if not studies:
            raise UserError(f"{self.name}: no row in {self.folder}")
        return [
            Record(
                study_id=study_id,
                patient_id=study.patient,
                split=study.split or split_by_hash(study.patient),
                content=study,
            )
            for study_id, study in studies.items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        named: list[Path | tuple[str, bytes] | None] = []
        views: list[str] = []
        paths: list[str] = []  # an image of two captions stands in two rows, and is one image
        texts: dict[str, None] = {}
        for file, place, view in study.rows:
            row = self.fetch(self._home() / file, place)
            for cell in _listed(row.get(self.image)) if self.image else []:
                if cell not in (None, "", *paths):
                    paths += [cell] if isinstance(cell, str) else []
                    named.append(self._image(self._home() / file, cell))
                    views.append(view)
            texts |= (
                dict.fromkeys(str(cell).strip() for cell in _listed(row.get(self.text)) if cell) if self.text else {}
            )
        found = read_images(named, note)
        report = self._report("\n\n".join(texts))
        if not report.text:
            if not found.images:
                raise BadStudyError("neither image nor text", "no image is named and the text says nothing")
            if any(texts):
                note(*NO_TEXT)
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[views[place] for place in found.places],
            modality=self.modality,
            sections=report.sections,
            text=report.text,
            labels=study.labels or report.labels,
            sentences=report.sentences,
            source=self.name,
            license=self.license,
        )

    def _home(self) -> Path:
        folder = self.folder.expanduser()
        return folder.parent if folder.is_file() else folder

    def _group(self, file: Path, part: str, studies: dict[str, _Study]) -> None:
        """Add the rows of a file to their studies."""
        name = file.relative_to(self._home()).as_posix()
        chosen = self._choose(file)
        wanted = [column for column in chosen[:-1] if column and column != chosen.text]
        for number, (place, row) in enumerate(self.scan(file, [*wanted, *chosen.labels.values()]), 1):
            where = f"{file}, row {number}"
            cells = {key: _text(row.get(column)) for key, column in zip(_Chosen._fields[:-1], chosen[:-1], strict=True)}
            if chosen.study and not cells["study"]:
                raise UserError(f"{where}: the study column {chosen.study!r} is empty")
            study_id = cells["study"] or _study_name(cells["image"]) or f"{name}-row-{number}"
            new = _Study(
                f"{name}, row {number}",
                cells["patient"] or study_id,
                _split(cells["split"], where, chosen.split) or part,
                {label: label_value(row.get(column), where, column) for label, column in chosen.labels.items()},
                [],
            )
            study = studies.setdefault(study_id, new)
            for what in ("patient", "split", "labels"):
                if getattr(study, what) != getattr(new, what):
                    raise UserError(f"{where}: another {what} than in {study.where}, which is of the same study")
            study.rows.append((name, place, view_name(cells["view"])))

    def _choose(self, file: Path) -> _Chosen:
        there = self.columns(file)
        named = self.labels or ()
        asked = (self.image, self.text, self.study, self.patient, self.split, self.view, *named)
        require_columns(file, there, [name for name in asked if name])
        usual = {column: column if column in there else "" for column in ("study_id", "patient_id", "split", "view")}
        known = {column.lower().replace("_", " "): column for column in there}
        labels = {name: known[name.lower()] for name in CHEXPERT14 if name.lower() in known}
        return _Chosen(
            self.image,
            self.text,
            self.study or usual["study_id"],
            self.patient or usual["patient_id"],
            self.split or usual["split"],
            self.view or usual["view"],
            {name: name for name in named} or labels,
        )

    def _image(self, file: Path, cell: Any) -> Path | tuple[str, bytes] | None:
        """Where an image is, or its suffix and bytes; None for a cell that is no image."""
        path = cell.get("path") if isinstance(cell, dict) else cell
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if isinstance(data, bytes):
            told = image_suffix(path) if isinstance(path, str) else None
            return ("dcm" if data[128:132] == b"DICM" else told or "png"), data  # the check finds what it really is
        root = self.image_folder.expanduser() if self.image_folder else file.parent
        return find_image([root], path) if isinstance(path, str) else None

    def _report(self, text: str) -> Report:
        sections = parse_sections(text)
        if not report_text(sections) and PREAMBLE in sections:
            sections = {
                "findings": sections.pop(PREAMBLE),
                **sections,
            }  # what stands before "COMPARISON:" is all it says
        return chest_report(sections) if self.label_text else Report(sections, report_text(sections), [], {})


def files_of(folder: Path, suffix: str, what: str) -> list[tuple[Path, str]]:
    """A file, or the files of a suffix in a folder, each with the split that its name begins with.

    Raises:
        UserError: there is none.
    """
    folder = folder.expanduser()
    files = [folder] if folder.is_file() else sorted(existing_folder(folder, what).glob(f"*{suffix}"))
    if not files:
        raise UserError(f"{what}: no {suffix} file in {folder}")
    # train.jsonl, train-00000-of-00003.parquet
    return [(file, SPLIT_OF.get(file.name.partition(".")[0].partition("-")[0].lower(), "")) for file in files]


def _listed(cell: Any) -> list[Any]:
    return cell if isinstance(cell, list) else [cell]


def _text(cell: Any) -> str:
    """A cell that names something; numbers are names too, what is neither is empty."""
    return str(cell).strip() if isinstance(cell, str | int) else ""


def _study_name(image: str) -> str:
    """An image path as the name of a study; of an absolute one, whose folders may name people, the end and a hash."""
    if not image.startswith(("/", "~")):
        return image
    return f"{Path(image).name}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"


def _split(cell: str, where: str, column: str) -> str:
    if column and cell.lower() not in SPLIT_OF:
        raise UserError(f"{where}: column {column!r} holds {short(cell)}, one of train, val, test expected")
    return SPLIT_OF.get(cell.lower(), "")
