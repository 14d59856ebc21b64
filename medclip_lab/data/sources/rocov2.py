"""ROCO v2 (Rückert et al., Scientific Data 2024): radiology figures of open-access articles with captions and concepts.

Layout as unpacked from Zenodo: `{train,valid,test}/ID.jpg` with `{train,valid,test}_captions.csv` (ID, Caption),
`*_concepts.csv` and `*_concepts_manual.csv` (ID, CUIs separated by semicolons), `cui_mapping.csv` (CUI, Canonical name)
and `license_information.csv` (ID, PMCID, Attribution, Link). All but the captions may be missing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import Note, Record
from medclip_lab.data.sources.tables import (
    SPLIT_OF,
    figure_sample,
    find_image,
    find_optional_table,
    find_table,
    read_images,
    read_rows,
)
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

PARTS = ("train", "valid", "test")


class _Figure(NamedTuple):
    image: str
    caption: str
    concepts: tuple[str, ...]
    article: str
    attribution: str


@dataclass(frozen=True)
class Rocov2:
    """A figure is a study and a patient; splits are the official ones. No rules of ours read the captions.

    `extra` has "concepts" (names where `cui_mapping.csv` is there, else CUIs), "article" (PMC id) and "attribution".
    """

    folder: Path = field(metadata={"help": "ROCO v2: the folder with train_captions.csv and train/"})

    name = "rocov2"
    license = "CC BY-NC-SA 4.0; each figure as its article, see extra.attribution"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        tables = [(part, find_optional_table(folder, f"{part}_captions.csv")) for part in PARTS]
        if not any(table for _, table in tables):
            find_table(folder, "train_captions.csv", self.name)
        names = _column(folder, "cui_mapping.csv", "CUI", "Canonical name")
        articles = _column(folder, "license_information.csv", "ID", "PMCID")
        attributions = _column(folder, "license_information.csv", "ID", "Attribution")
        records = []
        for part, table in tables:
            manual = _column(folder, f"{part}_concepts_manual.csv", "ID", "CUIs")
            concepts = _column(folder, f"{part}_concepts.csv", "ID", "CUIs")
            for identifier, text in (_captions(table) if table else {}).items():
                codes = f"{concepts.get(identifier, '')};{manual.get(identifier, '')}".split(";")
                content = _Figure(
                    f"{part}/{identifier}.jpg",
                    text,
                    tuple(dict.fromkeys(names.get(code, code) for code in map(str.strip, codes) if code)),
                    articles.get(identifier, ""),
                    attributions.get(identifier, ""),
                )
                study_id = identifier.lower()
                records.append(Record(study_id=study_id, patient_id=study_id, split=SPLIT_OF[part], content=content))
        return records

    def read(self, record: Record, note: Note) -> Sample:
        figure: _Figure = record.content
        folder = self.folder.expanduser()
        part = figure.image.partition("/")[0]
        # train_images.zip holds train/, but some unpack it into a folder of its name
        found = read_images([find_image([folder, folder / f"{part}_images"], figure.image)], note)
        extra = {"concepts": list(figure.concepts), "article": figure.article, "attribution": figure.attribution}
        return figure_sample(self, record, found, figure.caption, note, extra)


def _captions(table: Path) -> dict[str, str]:
    captions: dict[str, str] = {}
    for line, row in read_rows(table, ("ID", "Caption")):
        if not row["ID"]:
            raise UserError(f"{table}, line {line}: the ID is empty")
        if captions.setdefault(row["ID"], row["Caption"]) != row["Caption"]:
            raise UserError(f"{table}, line {line}: another caption than before for the same ID")
    return captions


def _column(folder: Path, name: str, key: str, value: str) -> dict[str, str]:
    """One column of an optional table by another; empty where there is no such table."""
    table = find_optional_table(folder, name)
    return {row[key]: row[value] for _, row in read_rows(table, (key, value))} if table else {}
