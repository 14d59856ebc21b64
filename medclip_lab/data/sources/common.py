"""What every source needs: splits by patient, images that have been looked at, tables that name their faults."""

import csv
import difflib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from medclip_lab.data.sample import IMAGE_SUFFIXES, MAX_MEMBER_BYTES
from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.errors import UserError

_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
_PILLOW_SUFFIXES = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "tiff": "TIFF"}
_NIFTI_HEADER = 352  # bytes; the magic stands at 344 in version 1, at 4 in version 2


def split_by_hash(patient_id: str, val: float = 0.1, test: float = 0.1) -> str:
    """The split of a patient: always the same, on every machine and whoever else is in the data."""
    number = int.from_bytes(hashlib.sha256(f"split:{patient_id}".encode()).digest()[:8], "big") / 2**64
    return "test" if number < test else "val" if number < test + val else "train"


class BadImageError(BadStudyError):
    """An image that cannot be used, and with it a study that has no other."""


def image_suffix(name: str) -> str | None:
    """The suffix a shard gives to a file of this name, None if it is no image we read."""
    lowered = name.lower()
    if lowered.endswith(".dicom"):
        return "dcm"
    return next((suffix for suffix in IMAGE_SUFFIXES if lowered.endswith(f".{suffix}")), None)


def read_image(path: Path | None) -> tuple[str, bytes]:
    """Suffix and unchanged bytes of an image that has been looked at: see `check_image`.

    Raises:
        BadImageError: there is no such file, it is no image, or it does not decode to its end.
    """
    try:
        there = path is not None and path.is_file()
    except OSError:  # a name that is no name, such as a report in the wrong column: it must not be printed
        there = False
    if path is None or not there:
        raise BadImageError("missing image", "no such file")
    suffix = image_suffix(path.name)
    if suffix is None:
        raise BadImageError("unknown image format", f"the suffix is none of {', '.join(IMAGE_SUFFIXES)}")
    if path.stat().st_size > MAX_MEMBER_BYTES:
        raise BadImageError("image too large", f"{path.stat().st_size} bytes")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError("unreadable image", error.strerror or type(error).__name__) from None
    return check_image(suffix, data), data


def check_image(suffix: str, data: bytes) -> str:
    """Look at an image: Pillow formats are decoded to the end, of DICOM and NIfTI only the magic is read.

    Returns:
        The suffix that its content deserves: hospitals export PNG files named .jpg.

    Raises:
        BadImageError: it does not decode.
    """
    if suffix == "dcm":
        if data[128:132] != b"DICM":
            raise BadImageError("unreadable image", "no DICOM preamble")
    elif suffix == "nii.gz":
        try:
            with gzip.open(io.BytesIO(data)) as file:
                header = file.read(_NIFTI_HEADER)
        except (OSError, EOFError, zlib.error):
            raise BadImageError("unreadable image", "not gzip") from None
        if header[344:347] not in (b"n+1", b"ni1") and header[4:7] not in (b"n+2", b"ni2"):
            raise BadImageError("unreadable image", "no NIfTI header")
    else:
        try:
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                image.verify()
            with Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
                image.load()  # verify() sees the header only: a file cut short passes it
                found = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}[str(image.format)]
                if _PILLOW_SUFFIXES.get(suffix) != image.format:
                    suffix = found
        except UnidentifiedImageError:
            raise BadImageError("unreadable image", "not a JPEG, PNG, WebP or TIFF file") from None
        except Exception as error:  # damaged files make decoders raise almost anything
            raise BadImageError("unreadable image", f"{type(error).__name__}: {error}") from None
    return suffix


def require_columns(path: Path, there: Sequence[str], needed: Iterable[str]) -> None:
    """Check that a table has its columns.

    Raises:
        UserError: one is missing; the message names it, the nearest name, and the columns that are there.
    """
    for column in needed:
        if column not in there:
            nearest = difflib.get_close_matches(column, there, n=1)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise UserError(f"{path}: no column {column!r}{hint}; the columns are {', '.join(map(repr, there))}")


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Column names of a .csv or .tsv file, and its rows as (line number, {column: text}), blanks stripped.

    A .csv may also be separated by semicolons or tabs. Empty rows are passed over; a short row has empty cells.

    Raises:
        UserError: no such file, no header, no UTF-8; while reading: a row with more cells than the header.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    head = text.partition("\n")[0]
    comma = path.suffix.lower() != ".tsv" and "," in head
    delimiter = "," if comma else "\t" if "\t" in head or path.suffix.lower() == ".tsv" else ";"
    # Long reports pass the default limit of a cell; strict: an open quote is a fault, not the rest of the file.
    csv.field_size_limit(max(csv.field_size_limit(), 2**24))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns = [name.strip() for name in next(reader, [])]
    if not any(columns):
        raise UserError(f"{path}: the file is empty: a line of column names is needed")

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        line = reader.line_num + 1
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    if len(cells) > len(columns):
                        raise UserError(f"{path}, line {line}: {len(cells)} cells, but {len(columns)} columns")
                    padded = [*cells, *[""] * (len(columns) - len(cells))]
                    yield line, {name: cell.strip() for name, cell in zip(columns, padded, strict=True)}
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: {error}") from None

    return columns, rows()
