"""What a source needs from the header of a DICOM file; pydicom is an extra, so it is asked for when first needed."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from medclip_lab.data.sources.base import BadStudyError
from medclip_lab.data.sources.tables import view_name
from medclip_lab.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset


def require_pydicom() -> None:
    """Check that pydicom is there.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError("DICOM needs pydicom: pip install 'medclip_lab[dicom]'") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Keep pydicom from warning and logging: it quotes the values it finds odd, names and UIDs among them."""
    logger = logging.getLogger("pydicom")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def read_header(data: bytes) -> "Dataset":
    """Everything before the pixels of an image.

    Raises:
        BadStudyError: pydicom cannot read it, or it is no image; the reason names no content.
    """
    import pydicom

    try:
        with quietly():
            header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    except Exception as error:  # damaged files make pydicom raise almost anything
        raise BadStudyError("unreadable image", f"DICOM header: {type(error).__name__}") from None
    if not cell(header, "Rows"):
        raise BadStudyError("unreadable image", "DICOM header: no image")
    return header


def cell(header: "Dataset", keyword: str) -> str:
    """An element as text, empty where it is missing, empty, or not to be read."""
    try:
        with quietly():
            value: Any = header.get(keyword)
            return "" if value is None else str(value).strip()
    except Exception:  # pydicom converts when asked, and raises for values it cannot convert
        return ""


def view_age_sex(header: "Dataset") -> tuple[str, dict[str, Any]]:
    """The view, and age in years and sex as far as the header says them."""
    age = cell(header, "PatientAge").upper().removesuffix("Y")
    return view_name(cell(header, "ViewPosition")), {
        "age": int(age) if age.isdigit() else None,
        "sex": cell(header, "PatientSex").upper(),
    }
