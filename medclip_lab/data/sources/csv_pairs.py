"""A table of the user's own: a row an image, a text, or both; rows that share a study are one study."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medclip_lab.data.findings import ABSENT, CHEXPERT14, PRESENT, UNCERTAIN
from medclip_lab.data.labeller import combine_labels, labelled_sentences
from medclip_lab.data.manifest import SPLITS
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.report import PREAMBLE, parse_sections, report_text
from medclip_lab.data.shards import Sample, make_key
from medclip_lab.data.sources.common import BadImageError, read_image, read_table, require_columns, split_by_hash
from medclip_lab.errors import UserError

WHAT = "csv"
_VALUES: dict[str, int | None] = {"": None} | {
    text: value for value in (PRESENT, ABSENT, UNCERTAIN) for text in (str(value), f"{value}.0")
}
_SPLITS = {split: split for split in SPLITS} | {"training": "train", "valid": "val", "validation": "val", "dev": "val"}


@dataclass
class _Study:
    """The rows of one study, put together."""

    line: int
    patient_id: str
    split: str
    labels: dict[str, int | None]
    images: dict[str, str] = field(default_factory=dict)
    """Image cell -> view; a dict, so that an image of two captions is one image."""
    texts: dict[str, None] = field(default_factory=dict)


def csv_total(csv_path: Path, study_column: str | None = None) -> int:
    """Number of studies in a table, or of rows if it names no study; errors as `csv_samples`."""
    columns, rows = read_table(csv_path.expanduser())
    study = _column(csv_path, columns, study_column, "study_id")
    return len({row[study] if study else line for line, row in rows})


def csv_samples(
    csv_path: Path,
    quarantine: Quarantine | None = None,
    *,
    image_folder: Path | None = None,
    image_column: str | None = "image",
    text_column: str | None = "text",
    study_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    view_column: str | None = None,
    label_columns: Sequence[str] | None = None,
    label_text: bool = True,
    license: str = "private",
    modality: str = "CR",
) -> Iterator[Sample]:
    """The studies of a table (.csv with commas, semicolons or tabs, or .tsv; UTF-8), in the order they first appear.

    A study may have several rows, each with an image; its texts, if they differ, follow each other. A study without a
    usable image is text-only only if it names none: if all images it names are bad, it is left out.

    Args:
        quarantine: gets missing and unreadable images (DICOM is looked at no further than its preamble) and studies
            with neither image nor text; by default one for this call with the usual ceiling.
        image_folder: where relative image paths start; by default the folder of the table.
        image_column, text_column: None or empty if the table has none.
        study_column: by default "study_id" where there is one, else an image path names a study, and so does the
            number of a row without image.
        patient_column: by default "patient_id" where there is one, else every study is a patient.
        split_column: by default "split" where there is one, else 80/10/10 by a hash of the patient.
        view_column: by default "view" where there is one.
        label_columns: names of labels, cells 1, 0, -1 or blank; by default the columns named as CheXpert's fourteen, in
            any case. If there are none, labels come from the text by `labeller`.
        label_text: False for texts that are no chest radiograph reports: no sentence is labelled by our rules.

    Raises:
        UserError: no such file, no UTF-8, a missing column, a cell of a label, split or study that cannot be, rows of
            one study that contradict each other, too many bad images. The table is read when the first study is asked
            for.
    """
    csv_path = csv_path.expanduser()
    columns, rows = read_table(csv_path)
    chosen = {
        "image": _column(csv_path, columns, image_column, None),
        "text": _column(csv_path, columns, text_column, None),
        "study": _column(csv_path, columns, study_column, "study_id"),
        "patient": _column(csv_path, columns, patient_column, "patient_id"),
        "split": _column(csv_path, columns, split_column, "split"),
        "view": _column(csv_path, columns, view_column, "view"),
    }
    if not chosen["image"] and not chosen["text"]:
        raise UserError(f"{csv_path}: neither an image nor a text column is named")
    labels = _label_columns(csv_path, columns, label_columns)
    studies = _group(csv_path, rows, chosen, labels)
    if not studies:
        raise UserError(f"{csv_path}: no row below the column names")
    quarantine = quarantine if quarantine is not None else Quarantine(len(studies))
    base = (image_folder or csv_path.parent).expanduser()
    for study_id, study in studies.items():
        images, views = _read_images(study_id, study, base, quarantine)
        if study.images and not images:
            continue
        sections = parse_sections("\n\n".join(study.texts))
        if not report_text(sections) and PREAMBLE in sections:
            sections = {
                "findings": sections.pop(PREAMBLE),
                **sections,
            }  # what stands before "COMPARISON:" is all it says
        text = report_text(sections)
        key = make_key(study_id)
        if not text and not images:
            quarantine.add("", key, "neither image nor text", "no image is named and the text says nothing")
            continue
        if not text and study.texts:
            quarantine.note("", key, "no findings and no impression", "kept as an image without text")
        sentences = labelled_sentences(sections) if label_text else []
        by_rules = combine_labels(sentence["labels"] for sentence in sentences) if sentences else {}
        yield Sample(
            study_id=study_id,
            patient_id=study.patient_id,
            split=study.split or split_by_hash(study.patient_id),
            images=images,
            view=views,
            modality=modality,
            sections=sections,
            text=text,
            labels=study.labels if labels else by_rules,
            sentences=sentences,
            source=WHAT,
            license=license,
        )


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
            labels={name: _label(row[column], where, column) for name, column in labels.items()},
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


def _short(value: str) -> str:
    """A cell for an error message: a long one is likely report text, which must not be printed."""
    return repr(value) if len(value) <= 12 else f"a text of {len(value)} characters"


def _split(value: str, where: str, column: str) -> str:
    if value and value.lower() not in _SPLITS:
        raise UserError(f"{where}: column {column!r} holds {_short(value)}, one of {', '.join(SPLITS)} expected")
    if column and not value:
        raise UserError(f"{where}: column {column!r} is empty, one of {', '.join(SPLITS)} expected")
    return _SPLITS.get(value.lower(), "")


def _label(value: str, where: str, column: str) -> int | None:
    if value not in _VALUES:
        raise UserError(f"{where}: label column {column!r} holds {_short(value)}, one of 1, 0, -1 or blank expected")
    return _VALUES[value]


def _read_images(
    study_id: str, study: _Study, base: Path, quarantine: Quarantine
) -> tuple[list[tuple[str, bytes]], list[str]]:
    """The images of a study that can be used, and their views; a study with bad ones is counted once."""
    images, views, bad = [], [], []
    for cell, view in study.images.items():
        try:
            images.append(read_image(base / _home(cell)))
            views.append(view)
        except BadImageError as error:
            bad.append(error)
    if bad:
        reason = f"{len(bad)} of {len(study.images)} images: {bad[0].reason}"
        quarantine.add("", make_key(study_id), bad[0].cause, reason)
    return images, views
