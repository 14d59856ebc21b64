"""A table of the user's own: a row an image, a text, or both; rows that share a study are one study."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medclip_lab.data.findings import CHEXPERT14
from medclip_lab.data.labeller import combine_labels, labelled_sentences
from medclip_lab.data.report import PREAMBLE, parse_sections, report_text
from medclip_lab.data.sample import SPLITS, Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record
from medclip_lab.data.sources.common import read_table, require_columns, split_by_hash
from medclip_lab.data.sources.tables import SPLIT_OF, read_images, read_labels, short
from medclip_lab.errors import UserError


@dataclass(frozen=True)
class CsvPairs:
    """The studies of a table (.csv with commas, semicolons or tabs, or .tsv; UTF-8), in the order they first appear.

    A study may have several rows, each with an image; its texts, if they differ, follow each other. A study without a
    usable image is text-only only if it names none: if all images it names are bad, it is left out.
    """

    path: Path = field(metadata={"help": ".csv or .tsv with a header line", "example": "studies.csv"})
    image: str = field(default="image", metadata={"help": "column of image paths, empty for none", "example": "image"})
    text: str = field(default="text", metadata={"help": "column of reports, empty for none", "example": "report"})
    study: str | None = field(
        default=None,
        metadata={
            "help": "column of study ids, its rows being one study (default: study_id, if there, else the image path "
            "or the number of the row)"
        },
    )
    patient: str | None = field(
        default=None,
        metadata={"help": "column of patient ids (default: patient_id, if there, else every study is a patient)"},
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "column of train/val/test (default: split, if there, else 80/10/10 by a hash of the patient)"
        },
    )
    view: str | None = field(default=None, metadata={"help": "column of PA, AP, LATERAL (default: view, if there)"})
    labels: tuple[str, ...] | None = field(
        default=None,
        metadata={
            "help": "label columns with 1, 0, -1 or blank (default: those named as CheXpert's fourteen, in any case; "
            "without one labels come from the text by our rules)"
        },
    )
    label_text: bool = field(
        default=True, metadata={"help": "whether texts are chest radiograph reports, labelled by our rules"}
    )
    image_folder: Path | None = field(
        default=None, metadata={"help": "where relative image paths start (default: the folder of the table)"}
    )
    license: str = field(default="private", metadata={"help": "noted in every study"})
    modality: str = field(default="CR", metadata={"help": "noted in every study"})

    name = "csv"

    def records(self) -> list[Record]:
        """One a study.

        Raises:
            UserError: no such file, no UTF-8, a missing column, a cell of a label, split or study that cannot be, rows
                of one study that contradict each other.
        """
        path = self.path.expanduser()
        columns, rows = read_table(path)
        chosen = {
            "image": _column(path, columns, self.image, None),
            "text": _column(path, columns, self.text, None),
            "study": _column(path, columns, self.study, "study_id"),
            "patient": _column(path, columns, self.patient, "patient_id"),
            "split": _column(path, columns, self.split, "split"),
            "view": _column(path, columns, self.view, "view"),
        }
        if not chosen["image"] and not chosen["text"]:
            raise UserError(f"{path}: neither an image nor a text column is named")
        studies = _group(path, rows, chosen, _label_columns(path, columns, self.labels))
        if not studies:
            raise UserError(f"{path}: no row below the column names")
        return [
            Record(
                study_id=study_id,
                patient_id=study.patient_id,
                split=study.split or split_by_hash(study.patient_id),
                content=study,
            )
            for study_id, study in studies.items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        """A study with its images, text and labels.

        Args:
            note: told of bad images if others are good, and of a text that says nothing beside an image.

        Raises:
            BadStudyError: it names images, but not one can be used (DICOM is looked at no further than its preamble),
                or it has neither image nor text.
        """
        study: _Study = record.content
        base = (self.image_folder or self.path.parent).expanduser()
        found = read_images([base / _home(cell) for cell in study.images], note)
        views = list(study.images.values())
        sections = parse_sections("\n\n".join(study.texts))
        if not report_text(sections) and PREAMBLE in sections:
            # What stands before "COMPARISON:" is all it says.
            sections = {"findings": sections.pop(PREAMBLE), **sections}
        text = report_text(sections)
        if not text and not found.images:
            raise BadStudyError("neither image nor text", "no image is named and the text says nothing")
        if not text and study.texts:
            note("no findings and no impression", "kept as an image without text")
        sentences = labelled_sentences(sections) if self.label_text else []
        by_rules = combine_labels(sentence["labels"] for sentence in sentences) if sentences else {}
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[views[place] for place in found.places],
            modality=self.modality,
            sections=sections,
            text=text,
            labels=study.labels or by_rules,
            sentences=sentences,
            source=self.name,
            license=self.license,
        )


@dataclass
class _Study:
    """The rows of one study, put together."""

    line: int
    patient_id: str
    split: str
    labels: dict[str, int | None]
    """By columns; empty if the table has none."""
    images: dict[str, str] = field(default_factory=dict)
    """Image cell -> view; a dict, so that an image of two captions is one image."""
    texts: dict[str, None] = field(default_factory=dict)


def _column(csv_path: Path, columns: list[str], name: str | None, usual: str | None) -> str:
    """The column to read, empty if there is none: the one named, which must be there, or the usual one if it is."""
    if name:
        require_columns(csv_path, columns, [name])
        return name
    return usual if usual in columns and usual is not None and name is None else ""


def _label_columns(csv_path: Path, columns: list[str], names: Sequence[str] | None) -> dict[str, str]:
    """Label -> its column."""
    if names is not None:
        require_columns(csv_path, columns, names)
        return {name: name for name in names}
    known = {column.lower().replace("_", " "): column for column in columns}
    return {name: known[name.lower()] for name in CHEXPERT14 if name.lower() in known}


def _group(
    csv_path: Path, rows: Iterator[tuple[int, dict[str, str]]], chosen: dict[str, str], labels: dict[str, str]
) -> dict[str, _Study]:
    studies: dict[str, _Study] = {}
    for line, row in rows:
        where = f"{csv_path}, line {line}"
        cells = {name: row[column] if column else "" for name, column in chosen.items()}
        if chosen["study"] and not cells["study"]:
            raise UserError(f"{where}: the study column {chosen['study']!r} is empty")
        study_id = cells["study"] or _name_of(cells["image"]) or f"{csv_path.stem}-line-{line}"
        facts = _Study(
            line=line,
            patient_id=cells["patient"] or study_id,
            split=_split(cells["split"], where, chosen["split"]),
            labels=read_labels(row, labels, where),
        )
        study = studies.setdefault(study_id, facts)
        for what, other in (("patient_id", "another patient"), ("split", "another split"), ("labels", "other labels")):
            if getattr(study, what) != getattr(facts, what):
                raise UserError(f"{where}: {other} than on line {study.line}, which is of the same study")
        if cells["image"]:
            study.images.setdefault(cells["image"], cells["view"].upper())
        if cells["text"]:
            study.texts.setdefault(cells["text"])
    return studies


def _name_of(image: str) -> str:
    """An image path as the name of a study; of an absolute one, whose folders may name people, the end and a hash."""
    path = _home(image)
    return f"{path.name}-{hashlib.sha256(image.encode()).hexdigest()[:8]}" if path.is_absolute() else image


def _home(cell: str) -> Path:
    try:
        return Path(cell).expanduser()
    except RuntimeError:  # "~name" of nobody
        return Path(cell)


def _split(value: str, where: str, column: str) -> str:
    if value and value.lower() not in SPLIT_OF:
        raise UserError(f"{where}: column {column!r} holds {short(value)}, one of {', '.join(SPLITS)} expected")
    if column and not value:
        raise UserError(f"{where}: column {column!r} is empty, one of {', '.join(SPLITS)} expected")
    return SPLIT_OF.get(value.lower(), "")
