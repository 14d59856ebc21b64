"""SIIM-ACR Pneumothorax Segmentation 2019: frontal radiographs with a mask for each pneumothorax.

Layout: `train-rle.csv` (ImageId, EncodedPixels; a row a mask, -1 for none; stage 2 calls it `stage_2_train.csv`) and
DICOM files named by ImageId at any depth, `dicom-images-train/STUDY/SERIES/IMAGEID.dcm` in the original.
"""

from dataclasses import dataclass, field
from pathlib import Path

from medclip_lab.data.findings import ABSENT, CHEXPERT14, NO_FINDING, PRESENT
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.dicom_header import read_header, require_pydicom, view_age_sex
from medclip_lab.data.sources.tables import files_by_name, find_optional_table, find_table, read_images, read_rows
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

_TABLES = ("train-rle.csv", "stage_2_train.csv")
_NO_MASK = "-1"


@dataclass(frozen=True)
class SiimAcr:
    """An image is a study and a patient, as the table tells no patients; splits are 80/10/10 by a hash of it.

    Only Pneumothorax is labelled; where there is one, there is no No Finding. Masks are counted, not read.
    """

    folder: Path = field(metadata={"help": "SIIM-ACR Pneumothorax: the folder with train-rle.csv"})

    name = "siim-acr"
    license = "rules of the SIIM-ACR challenge on Kaggle; the NIH Clinical Center is to be named as the source"

    def records(self) -> list[Record]:
        require_pydicom()
        folder = existing_folder(self.folder, self.name)
        table = next((path for name in _TABLES if (path := find_optional_table(folder, name))), None)
        masks = _masks(table or find_table(folder, _TABLES[0], self.name))
        files = {name: path.relative_to(folder) for name, path in files_by_name(folder, (".dcm",)).items()}
        if not files:
            raise UserError(f"{self.name}: no .dcm file in {folder}")
        return [
            Record(
                study_id=f"siim-{image}",
                patient_id=f"siim-{image}",
                split=split_by_hash(f"siim-{image}"),
                content=(files.get(f"{image}.dcm"), count),
            )
            for image, count in masks.items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        path, masks = record.content
        found = read_images([self.folder.expanduser() / path if path else None], note)
        view, extra = view_age_sex(read_header(found.images[0][1]))
        labels: dict[str, int | None] = dict.fromkeys(CHEXPERT14)
        labels["Pneumothorax"] = PRESENT if masks else ABSENT
        if masks:
            labels[NO_FINDING] = ABSENT
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=[view],
            labels=labels,
            source=self.name,
            license=self.license,
            extra=extra | {"masks": masks},
        )


def _masks(table: Path) -> dict[str, int]:
    """Image -> number of its masks, in the order of the table."""
    masks: dict[str, set[str]] = {}
    for line, row in read_rows(table, ("ImageId", "EncodedPixels")):
        if not row["ImageId"] or not row["EncodedPixels"]:
            raise UserError(f"{table}, line {line}: ImageId and EncodedPixels must not be empty")
        runs = masks.setdefault(row["ImageId"], set())
        if row["EncodedPixels"] != _NO_MASK:
            runs.add(row["EncodedPixels"])
    if not masks:
        raise UserError(f"{table}: no row below the column names")
    return {image: len(runs) for image, runs in masks.items()}
