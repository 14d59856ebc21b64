"""What the readers of public data sets share: their tables, label cells, image paths and reports.

Tables are untrusted: a cell names a file only if it is a plain relative path (`plain_path`), whatever it holds.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from medclip_lab.data.findings import ABSENT, CHEXPERT14, PRESENT, UNCERTAIN
from medclip_lab.data.labeller import combine_labels, labelled_sentences
from medclip_lab.data.report import report_text
from medclip_lab.data.sample import MAX_MEMBER_BYTES, Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record, Source
from medclip_lab.data.sources.common import BadImageError, check_image, read_image, require_columns
from medclip_lab.errors import UserError

SPLIT_OF = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validate", "validation", "dev"), "val"
)
"""How data sets call their splits, in lower case -> how shards do."""

LABEL_OF: dict[str, int | None] = {"": None} | {
    text: value for value in (PRESENT, ABSENT, UNCERTAIN) for text in (str(value), f"{value}.0")
}
"""A label cell as CheXpert, NegBio and CheXbert write it -> its state."""

_VIEW_OF = {"L": "LATERAL", "LL": "LATERAL", "LATERAL": "LATERAL", "AP_HORIZONTAL": "AP"}
_FRONTAL = ("PA", "AP")
_LONGEST_CELL = 2**24  # characters; longer reports than the csv module's own limit exist


# -------------------------------------------------------------------------------------------------------------- tables


def find_table(folder: Path, name: str, what: str) -> Path:
    """The table `name` (ending in .csv) of a folder, or the same compressed.

    Raises:
        UserError: neither is there.
    """
    path = find_optional_table(folder, name)
    if path is None:
        raise UserError(f"{what}: neither {name} nor {name}.gz in {folder}: name the folder that holds it")
    return path


def find_optional_table(folder: Path, name: str) -> Path | None:
    """As `find_table`, None where there is none."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_rows(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a .csv or .csv.gz file with commas, as (line number, {column: text}), one at a time.

    Only the columns asked for are kept, blanks around a cell stripped; an optional one that is not there, and the cells
    that a short row lacks, are empty. Empty rows are passed over.

    Raises:
        UserError: a needed column is missing; no UTF-8; a broken or cut file; a row with more cells than the header.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    opened = gzip.open if path.suffix == ".gz" else open
    line = 1
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            require_columns(path, columns, needed)
            places = {name: columns.index(name) for name in (*needed, *optional) if name in columns}
            absent = {name: "" for name in optional if name not in columns}
            line = reader.line_num + 1
            for cells in reader:
                if any(cells):
                    if len(cells) > len(columns):
                        raise UserError(f"{path}, line {line}: {len(cells)} cells, but {len(columns)} columns")
                    cells += [""] * (len(columns) - len(cells))
                    yield line, {name: cells[place].strip() for name, place in places.items()} | absent
                line = reader.line_num + 1
    except UnicodeDecodeError:
        raise UserError(f"{path}, after line {line}: not UTF-8: save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip says a cut file by EOFError, a foreign one by OSError
        raise UserError(f"{path}, after line {line}: cannot be read: {type(error).__name__}: fetch it again") from None


def read_labels(row: Mapping[str, str], columns: Mapping[str, str], where: str) -> dict[str, int | None]:
    """Labels of a row.

    Args:
        columns: label -> its column.

    Raises:
        UserError: a cell that is no label.
    """
    try:
        return {name: LABEL_OF[row[column]] for name, column in columns.items()}
    except KeyError:
        return {name: label_value(row[column], where, column) for name, column in columns.items()}


def label_value(cell: Any, where: str, column: str) -> int | None:
    """A label from a cell of text, a number, a truth value or None (NaN counts as None).

    Raises:
        UserError: it is none of 1, 0, -1, blank.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    text = str(int(cell)) if isinstance(cell, bool) else str(cell).strip()
    if text not in LABEL_OF:
        # CheXbert's first release wrote class numbers, and its 0 would be read as absent.
        hint = " (class numbers of CheXbert? 0 blank, 1, 2 absent, 3 uncertain)" if text[:1] in ("2", "3") else ""
        raise UserError(
            f"{where}: label column {column!r} holds {short(text)}, one of 1, 0, -1 or blank expected{hint}"
        )
    return LABEL_OF[text]


def short(cell: str) -> str:
    """A cell for an error message: a long one may be report text, which must not be printed."""
    return repr(cell) if len(cell) <= 12 else f"a text of {len(cell)} characters"


def map_findings(
    chexpert_of: Mapping[str, Sequence[str]], present: Iterable[str], uncertain: Iterable[str] = ()
) -> dict[str, int | None]:
    """Labels by CheXpert's names for a set that lists, for each image, the findings it has.

    Args:
        chexpert_of: finding of the set -> the names of CheXpert that it makes present; findings may be missing.

    Returns:
        1 where a finding that is present maps to the name, else -1 where one in doubt does, else 0; None for names that
        no finding maps to, as the set never says them.
    """
    said = {name for names in chexpert_of.values() for name in names}
    states = {name: ABSENT if name in said else None for name in CHEXPERT14}
    for findings, state in ((uncertain, UNCERTAIN), (present, PRESENT)):
        states |= {name: state for finding in findings for name in chexpert_of.get(finding, ())}
    return states


# -------------------------------------------------------------------------------------------------------------- images


def plain_path(name: str) -> PurePosixPath | None:
    """A relative path as a cell may name it; None if it is absolute, climbs with "..", or is none at all."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part or not part.isprintable() for part in parts):
        return None
    return PurePosixPath(name)


def find_image(roots: Iterable[Path], name: str) -> Path | None:
    """The file `name` under the first root that has it; None if none has, or `name` is no `plain_path`."""
    relative = plain_path(name)
    if relative is None:
        return None
    try:
        return next((root / relative for root in roots if (root / relative).is_file()), None)
    except OSError:  # longer than a name can be
        return None


def files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """File name -> path of the files of these suffixes at any depth: for tables that name files without folders.

    Of two files of one name the first in the order of paths counts.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.name.lower().endswith(suffixes):
            found.setdefault(path.name, path)
    return found


def view_name(view: str) -> str:
    """A view as shards call it: PA, AP, LATERAL; any other in capitals as the set calls it, empty if unknown."""
    view = view.strip().upper()
    return "" if view in ("UNK", "UNKNOWN", "NAN") else _VIEW_OF.get(view, view)


def frontal_first(views: Sequence[str]) -> list[int]:
    """Places of the images of a study, frontal ones first, for who reads only the first image."""
    return sorted(range(len(views)), key=lambda place: views[place] not in _FRONTAL)


class Images(NamedTuple):
    """The usable images of a study."""

    images: list[tuple[str, bytes]]
    places: list[int]
    """Which of those asked for they are."""


def read_image_cell(image: Path | tuple[str, bytes] | None) -> tuple[str, bytes]:
    """Read and check an image, given as a path or as suffix and bytes; None is one that is not there.

    Raises:
        BadImageError: see `common.check_image`.
    """
    if not isinstance(image, tuple):
        return read_image(image)
    suffix, data = image
    if len(data) > MAX_MEMBER_BYTES:
        raise BadImageError("image too large", f"{len(data)} bytes")
    return check_image(suffix, data), data


def read_images(
    images: Sequence[Any], note: Note, read: Callable[[Any], tuple[str, bytes]] = read_image_cell
) -> Images:
    """Read and check the images of a study.

    Args:
        note: told of bad ones if others are good.
        read: suffix and bytes of an image; raises BadImageError.

    Raises:
        BadStudyError: images are named, but not one can be used.
    """
    good: list[tuple[str, bytes]] = []
    places: list[int] = []
    bad: list[BadImageError] = []
    for place, image in enumerate(images):
        try:
            good.append(read(image))
            places.append(place)
        except BadImageError as error:
            bad.append(error)
    if bad:
        reason = f"{len(bad)} of {len(images)} images: {bad[0].reason}"
        if not good:
            raise BadStudyError(bad[0].cause, reason)
        note(bad[0].cause, reason, counted=True)
    return Images(good, places)


# ------------------------------------------------------------------------------------------------------------- reports


class Report(NamedTuple):
    """What a shard holds of a report."""

    sections: dict[str, str]
    text: str
    sentences: list[dict[str, Any]]
    labels: dict[str, int | None]
    """By our rules; empty where nothing is labelled."""


def chest_report(sections: dict[str, str]) -> Report:
    """A chest radiograph report in English, from its sections, with sentences labelled by our rules."""
    sentences = labelled_sentences(sections)
    labels = combine_labels(sentence["labels"] for sentence in sentences) if sentences else {}
    return Report(sections, report_text(sections), sentences, labels)


def caption(text: str) -> Report:
    """A text that our rules do not understand: the caption of any figure, a report in another language."""
    text = " ".join(text.split())
    sections = {"findings": text} if any(map(str.isalnum, text)) else {}
    return Report(sections, report_text(sections), [], {})


def figure_sample(
    source: Source, record: Record, images: Images, text: str, note: Note, extra: Mapping[str, Any] | None = None
) -> Sample:
    """A study that is one figure of an article and its caption; `extra` may have a licence of its own."""
    report = caption(text)
    if not report.text:
        note("no caption", "kept as an image without text")
    extra = dict(extra or {})
    return Sample(
        study_id=record.study_id,
        patient_id=record.patient_id,
        split=record.split,
        images=images.images,
        view=[""],
        modality="OT",
        sections=report.sections,
        text=report.text,
        source=source.name,
        license=str(extra.get("article_license") or source.license),
        extra=extra,
    )


NO_TEXT = ("no findings and no impression", "kept as an image without text")
"""Cause and reason for a study whose report says nothing."""
