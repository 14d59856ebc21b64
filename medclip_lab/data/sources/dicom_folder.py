"""A hospital's own folder of DICOM files, at any depth and under any names, grouped into studies by their headers.

Ids become pseudonyms under a key that stays with the hospital, and each file is written anew without names, dates and
UIDs (`deidentify`). The pixels are as they were: text burned into them stays.
"""

import hmac
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.sample import MAX_MEMBER_BYTES, Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record
from medclip_lab.data.sources.common import BadImageError, image_suffix, split_by_hash
from medclip_lab.data.sources.deidentify import VIEWS, deidentified
from medclip_lab.data.sources.dicom_header import cell, quietly, require_pydicom
from medclip_lab.data.sources.tables import frontal_first, read_images, view_name
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

MIN_KEY_BYTES = 16
_TAGS = (
    *("StudyInstanceUID", "PatientID", "IssuerOfPatientID", "Modality", "ViewPosition", "Rows"),
    *("SeriesNumber", "InstanceNumber"),
)


class _File(NamedTuple):
    series: int
    instance: int
    path: str
    patient: str
    view: str
    modality: str


class _Study(NamedTuple):
    files: tuple[_File, ...]
    fault: str = ""
    """Why it cannot be used, if the headers say so already."""


@dataclass(frozen=True)
class DicomFolder:
    """A study (StudyInstanceUID) is a record; a patient is a PatientID with its issuer, or the study where it is empty.

    Ids are the first 16 hex digits of HMAC-SHA256 with the key, over "study:UID" and "patient:ISSUER:ID". Splits are
    80/10/10 by a hash of the patient. Files that are no DICOM, DICOM without an image, and other modalities are passed
    over; a .dcm file that cannot be read is a bad study of its own.
    """

    folder: Path = field(metadata={"help": "a folder with DICOM files, at any depth"})
    key_file: Path | None = field(
        default=None,
        metadata={
            "help": f"file with a secret of at least {MIN_KEY_BYTES} bytes, which makes the pseudonyms; needed",
            "example": "key",
        },
    )
    modalities: str = field(
        default="CR,DX", metadata={"help": "modalities to read, with commas as DICOM names them; empty for all"}
    )
    license: str = field(default="private", metadata={"help": "noted in every study"})

    name = "dicom-folder"

    def records(self) -> list[Record]:
        require_pydicom()
        folder = existing_folder(self.folder, self.name)
        key = self._key()
        studies: dict[str, list[_File]] = {}
        records = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder).as_posix()
            try:
                listed = _listed(path, relative)
            except BadStudyError as error:
                name = f"dicom-{_pseudonym(key, f'file:{relative}')}"
                content = _Study((), str(error))
                records.append(Record(study_id=name, patient_id=name, split=split_by_hash(name), content=content))
                continue
            if listed and (not self.modalities or listed[1].modality in self.modalities.split(",")):
                studies.setdefault(listed[0], []).append(listed[1])
        if not studies and not records:
            what = f" of modality {self.modalities}" if self.modalities else ""
            raise UserError(f"{self.name}: no DICOM image{what} in {folder}")
        return [_record(key, uid, files) for uid, files in studies.items()] + records

    def read(self, record: Record, note: Note) -> Sample:
        study: _Study = record.content
        if study.fault:
            raise BadStudyError("unreadable image" if not study.files else "several patients", study.fault)
        folder = self.folder.expanduser()
        order = frontal_first([file.view for file in study.files])

        def image(place: int) -> tuple[str, bytes]:
            return "dcm", deidentified(_bytes(folder / study.files[place].path), f"{record.study_id}.{place}")

        found = read_images(order, note, image)
        used = [study.files[order[place]] for place in found.places]
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[file.view for file in used],
            modality=used[0].modality,
            source=self.name,
            license=self.license,
        )

    def _key(self) -> bytes:
        if self.key_file is None:
            raise UserError(
                f"{self.name}: --key-file is missing: name a file with a secret, "
                "made for instance by: python -c 'import secrets; print(secrets.token_hex())' > key"
            )
        try:
            key = self.key_file.expanduser().read_bytes().strip()
        except OSError as error:
            raise UserError(f"key-file: cannot read {self.key_file}: {error.strerror}") from None
        if len(key) < MIN_KEY_BYTES:
            raise UserError(f"key-file: {self.key_file} holds {len(key)} bytes, at least {MIN_KEY_BYTES} are needed")
        return key


def _listed(path: Path, relative: str) -> tuple[str, _File] | None:
    """StudyInstanceUID and what is needed of a file; None if it is no DICOM image.

    Raises:
        BadStudyError: a DICOM file that cannot be read.
    """
    import pydicom

    with path.open("rb") as file:
        magic = file.read(132)[128:]
    if magic != b"DICM":
        if image_suffix(path.name) == "dcm":
            raise BadStudyError("unreadable image", "no DICOM preamble")
        return None
    try:
        with quietly():
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_TAGS))
    except Exception as error:  # damaged files make pydicom raise almost anything
        raise BadStudyError("unreadable image", f"DICOM header: {type(error).__name__}") from None
    uid, patient, view = cell(header, "StudyInstanceUID"), cell(header, "PatientID"), cell(header, "ViewPosition")
    if not cell(header, "Rows"):
        return None  # a report, a presentation state, the directory of a CD
    if not uid:
        raise BadStudyError("unreadable image", "DICOM header: no StudyInstanceUID")
    return uid, _File(
        _number(cell(header, "SeriesNumber")),
        _number(cell(header, "InstanceNumber")),
        relative,
        f"{cell(header, 'IssuerOfPatientID')}:{patient}" if patient else "",
        view_name(view) if view.upper() in VIEWS else "",  # some type other things there
        cell(header, "Modality"),
    )


def _number(text: str) -> int:
    return int(text) if text.lstrip("-").isdigit() else 0


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MEMBER_BYTES:
            raise BadImageError("image too large", f"{size} bytes")
        return path.read_bytes()
    except OSError as error:
        cause = "missing image" if isinstance(error, FileNotFoundError) else "unreadable image"
        raise BadImageError(cause, error.strerror or type(error).__name__) from None


def _record(key: bytes, uid: str, files: list[_File]) -> Record:
    study_id = f"dicom-{_pseudonym(key, f'study:{uid}')}"
    patients = {file.patient for file in files}
    patient = files[0].patient
    patient_id = f"dicom-{_pseudonym(key, f'patient:{patient}')}" if patient else study_id
    # The PatientID itself goes no further than this: records are sent between machines.
    bare = tuple(file._replace(patient="") for file in sorted(files))
    fault = f"{len(patients)} PatientIDs in one study" if len(patients) > 1 else ""
    content = _Study(bare, fault)
    return Record(study_id=study_id, patient_id=patient_id, split=split_by_hash(patient_id), content=content)


def _pseudonym(key: bytes, what: str) -> str:
    return hmac.new(key, what.encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:16]
