"""A DICOM image without anything that tells whose it is: what shows the pixels is kept, all else is left out.

Kept are numbers (size, bits, windows, lookup tables, spacing) and the few words of the standard that displaying needs;
no dates, no descriptions, no private elements, no overlays, no UIDs of the original. What is burned into the pixels
stays: an image that says so of itself is refused.
"""

import hashlib
import io
from typing import TYPE_CHECKING, Any

from medclip_lab.data.sources.common import BadImageError
from medclip_lab.data.sources.dicom_header import quietly

if TYPE_CHECKING:
    from pydicom import Dataset

VIEWS = frozenset({"PA", "AP", "LL", "RL", "LATERAL", "LLD", "RLD", "LLO", "RLO"})

_NUMBERS = (
    *("SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PlanarConfiguration", "NumberOfFrames", "SmallestImagePixelValue", "LargestImagePixelValue"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing"),
    *("SliceThickness", "SpacingBetweenSlices", "ImageOrientationPatient", "ImagePositionPatient"),
    *("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"),
    *("RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData"),
    *("GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData"),
    *("BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData"),
    "PixelData",
)
_WORDS = {
    "PhotometricInterpretation": frozenset(
        {"MONOCHROME1", "MONOCHROME2", "RGB", "PALETTE COLOR"}
        | {"YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420"}
    ),
    "VOILUTFunction": frozenset({"LINEAR", "LINEAR_EXACT", "SIGMOID"}),
    "PresentationLUTShape": frozenset({"IDENTITY", "INVERSE"}),
    "LossyImageCompression": frozenset({"00", "01"}),
    "ImageLaterality": frozenset({"L", "R", "B", "U"}),
    "Laterality": frozenset({"L", "R"}),
    "ViewPosition": VIEWS,
    "Modality": frozenset({"CR", "DX", "MG", "CT", "MR", "US", "PT", "NM", "XA", "RF", "XC", "ES", "OP", "SM", "OT"}),
}
_TABLES = ("VOILUTSequence", "ModalityLUTSequence")
_OF_TABLE = ("LUTDescriptor", "LUTData")


def deidentified(data: bytes, name: str) -> bytes:
    """The image as a new DICOM file of the same transfer syntax, its UID made from `name` alone.

    Raises:
        BadImageError: no DICOM image, without pixels, or with a burned-in annotation.
    """
    import pydicom

    try:
        with quietly():
            source = pydicom.dcmread(io.BytesIO(data))
            if str(source.get("BurnedInAnnotation", "")).strip().upper() == "YES":
                raise BadImageError("burned-in annotation", "the header says that the pixels hold text")
            if "PixelData" not in source:
                raise BadImageError("unreadable image", "DICOM without pixels")
            return _written(_shown(source), source, name)
    except BadImageError:
        raise
    except Exception as error:  # damaged files make pydicom raise almost anything
        raise BadImageError("unreadable image", f"DICOM: {type(error).__name__}") from None


def _shown(source: "Dataset") -> "Dataset":
    """The elements that may stay."""
    from pydicom import Dataset

    shown = Dataset()
    for keyword in _NUMBERS:
        if keyword in source and _is_number(source[keyword].value):
            shown.add(source[keyword])
    for keyword, allowed in _WORDS.items():
        if str(source.get(keyword, "")).strip() in allowed:
            setattr(shown, keyword, str(source.get(keyword)).strip())
    for keyword in _TABLES:
        items = []
        for item in source.get(keyword) or ():
            items.append(Dataset())
            for inner in _OF_TABLE:
                if inner in item and _is_number(item[inner].value):
                    items[-1].add(item[inner])
        if items:
            setattr(shown, keyword, items)
    return shown


def _is_number(value: Any) -> bool:
    """Whether a value is a number, several, or bytes: an element of another type may hold a text, and is left out."""
    from pydicom.multival import MultiValue

    values = value if isinstance(value, MultiValue | list) else [value]
    return all(isinstance(one, int | float | bytes) or type(one).__name__ in ("DSdecimal", "IS") for one in values)


def _written(shown: "Dataset", source: "Dataset", name: str) -> bytes:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import UID, SecondaryCaptureImageStorage

    kind = UID(str(source.get("SOPClassUID", "")))
    shown.SOPClassUID = kind if not kind.is_private and kind.name != kind else SecondaryCaptureImageStorage
    shown.SOPInstanceUID = f"2.25.{int.from_bytes(hashlib.sha256(name.encode()).digest()[:15], 'big')}"
    shown.file_meta = FileMetaDataset()
    shown.file_meta.TransferSyntaxUID = source.file_meta.TransferSyntaxUID
    buffer = io.BytesIO()
    shown.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
