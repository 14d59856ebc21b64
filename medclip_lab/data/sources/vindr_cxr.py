"""VinDr-CXR 1.0.0 (Nguyen et al., Scientific Data 2022): 18,000 PA radiographs, 28 labels by radiologists.

Layout as PhysioNet distributes it: `train/IMAGE.dicom`, `test/IMAGE.dicom`, `annotations/image_labels_train.csv` with
a row for each image and each of its three radiologists, and `annotations/image_labels_test.csv` with a consensus.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.findings import ABSENT, PRESENT, UNCERTAIN
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.tables import find_image, find_table, map_findings, read_images, read_rows, short
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

CHEXPERT_OF: dict[str, tuple[str, ...]] = {
    "No finding": ("No Finding",),
    "Atelectasis": ("Atelectasis",),
    "Cardiomegaly": ("Cardiomegaly",),
    "Consolidation": ("Consolidation",),
    "Edema": ("Edema",),
    "Pneumothorax": ("Pneumothorax",),
    "Pneumonia": ("Pneumonia",),
    "Pleural effusion": ("Pleural Effusion",),
    "Pleural thickening": ("Pleural Other",),
    "Lung Opacity": ("Lung Opacity",),
    "Infiltration": ("Lung Opacity",),
    "Nodule/Mass": ("Lung Lesion",),
    "Lung tumor": ("Lung Lesion",),
    "Clavicle fracture": ("Fracture",),
    "Rib fracture": ("Fracture",),
}
"""The labels of VinDr-CXR that CheXpert has a word for."""
OWN = (
    *("Aortic enlargement", "Calcification", "Emphysema", "Enlarged PA", "ILD", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Pulmonary fibrosis", "Other lesion", "COPD", "Tuberculosis"),
)
"""Those it has no word for: they stand in `labels` under the names of the set."""
_OTHER = "Other diseases"  # "Other disease" in the table of the test images

_VAL_SHARE = 0.1  # of the images of the training table


class _Image(NamedTuple):
    name: str
    readers: int
    votes: Counter[str]


@dataclass(frozen=True)
class VindrCxr:
    """An image is a study and a patient, as the set tells no patients.

    Splits: the official test images; a tenth of the training images, by hash, is val. A finding is present if most of
    the radiologists of an image saw it, uncertain if fewer did, else absent. `extra` has "readers" and "votes".
    """

    folder: Path = field(metadata={"help": "VinDr-CXR: the folder with annotations/, train/ and test/"})

    name = "vindr-cxr"
    license = "PhysioNet Credentialed Health Data License 1.5.0"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        annotations = folder / "annotations" if (folder / "annotations").is_dir() else folder
        records = []
        for part in ("train", "test"):
            table = find_table(annotations, f"image_labels_{part}.csv", self.name)
            for name, image in _images(table).items():
                study_id = f"vindr-{name}"
                split = "test" if part == "test" else split_by_hash(study_id, val=_VAL_SHARE, test=0)
                content = image._replace(name=f"{part}/{name}.dicom")
                records.append(Record(study_id=study_id, patient_id=study_id, split=split, content=content))
        return records

    def read(self, record: Record, note: Note) -> Sample:
        image: _Image = record.content
        found = read_images([find_image([self.folder.expanduser()], image.name)], note)
        states = {name: state_of_votes(image.votes[name], image.readers) for name in (*CHEXPERT_OF, *OWN, _OTHER)}
        by_state = {state: [name for name in states if states[name] == state] for state in (PRESENT, UNCERTAIN)}
        own: dict[str, int | None] = {name: states[name] for name in (*OWN, _OTHER)}
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            images=found.images,
            view=["PA"],
            labels=map_findings(CHEXPERT_OF, by_state[PRESENT], by_state[UNCERTAIN]) | own,
            source=self.name,
            license=self.license,
            extra={"readers": image.readers, "votes": dict(image.votes)},
        )


def state_of_votes(votes: int, readers: int) -> int:
    """What radiologists say together: present if most of them do, uncertain if some."""
    return PRESENT if 2 * votes > readers else UNCERTAIN if votes else ABSENT


def _images(table: Path) -> dict[str, _Image]:
    """Image -> the votes of its radiologists, in the order of the table; a radiologist counts once for an image."""
    columns = (*CHEXPERT_OF, *OWN)
    images: dict[str, _Image] = {}
    readers: set[tuple[str, str]] = set()
    for line, row in read_rows(table, ("image_id", *columns), ("rad_id", _OTHER, "Other disease")):
        if (row["image_id"], row["rad_id"]) in readers:
            continue
        readers.add((row["image_id"], row["rad_id"]))
        cells = {name: row[name] for name in columns} | {_OTHER: row[_OTHER] or row["Other disease"]}
        image = images.get(row["image_id"], _Image("", 0, Counter()))
        for name, value in cells.items():
            if value not in ("0", "1", "0.0", "1.0"):
                raise UserError(f"{table}, line {line}: column {name!r} holds {short(value)}, 0 or 1 expected")
        seen = Counter(name for name, value in cells.items() if value.startswith("1"))
        images[row["image_id"]] = _Image("", image.readers + 1, image.votes + seen)
    if not images:
        raise UserError(f"{table}: no row below the column names")
    return images
