"""BIOMEDICA (Lozano et al., CVPR 2025): WebDataset shards of figures of PMC Open Access, read as they are.

A shard holds `KEY.jpg`, `KEY.txt` (the caption) and `KEY.json` (facts of image and article) for each figure. Headers
are listed once; a figure is then read by its place in the file, and nothing is unpacked.
"""

import json
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from medclip_lab.data.sample import MAX_MEMBER_BYTES, Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.data.sources.pmc_oa import article_of
from medclip_lab.data.sources.tables import figure_sample, read_images
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

MAX_JSON_BYTES = 64 * 2**20  # it holds the whole text of the article
_MEMBER = re.compile(r"(?P<key>.+?)\.(?P<suffix>jpg|txt|json)")
_FACTS = (
    *("image_panel_type", "image_panel_subtype", "image_primary_label", "image_secondary_label"),
    *("image_hash", "article_accession_id", "article_license", "article_mesh_terms", "article_keywords"),
)


class _Place(NamedTuple):
    offset: int
    size: int


class _Figure(NamedTuple):
    shard: str
    jpg: _Place | None
    txt: _Place | None
    json: _Place | None


@dataclass(frozen=True)
class Biomedica:
    """A figure is a study; its article, which the key names, stands for the patient.

    Splits are 80/10/10 by a hash of the article, as there are no official ones. No rules of ours read captions. The
    licence of a sample is that of its article. `extra` has panel type, labels, keywords and MeSH terms of the set.
    """

    folder: Path = field(metadata={"help": "BIOMEDICA: a folder with its .tar shards, at any depth"})

    name = "biomedica"
    license = "each figure as its article in PMC Open Access"

    def records(self) -> list[Record]:
        folder = existing_folder(self.folder, self.name)
        shards = sorted(folder.rglob("*.tar"))
        if not shards:
            raise UserError(f"{self.name}: no .tar file in {folder}")
        return [
            Record(
                study_id=f"biomedica-{key}",
                patient_id=(article := _article(key)),
                split=split_by_hash(article),
                content=figure,
            )
            for shard in shards
            for key, figure in _figures(shard, shard.relative_to(folder).as_posix()).items()
        ]

    def read(self, record: Record, note: Note) -> Sample:
        figure: _Figure = record.content
        if not any((figure.jpg, figure.txt, figure.json)):
            raise BadStudyError("unreadable shard", "no tar, or cut: what follows the cut is lost")
        shard = self.folder.expanduser() / figure.shard
        found = read_images([("jpg", _bytes(shard, figure.jpg, MAX_MEMBER_BYTES)) if figure.jpg else None], note)
        text = _bytes(shard, figure.txt, MAX_JSON_BYTES) if figure.txt else b""
        facts = _facts(_bytes(shard, figure.json, MAX_JSON_BYTES) if figure.json else b"{}")
        return figure_sample(self, record, found, text.decode("utf-8", errors="replace"), note, facts)


def _article(key: str) -> str:
    """A key is BATCH-ARTICLE-PLACE-NAME, the name with dashes of its own."""
    parts = key.split("-", 3)
    return parts[1].lower() if len(parts) == 4 else article_of(key)


def _figures(shard: Path, name: str) -> dict[str, _Figure]:
    """Key -> where the members of a figure are, from headers alone; a broken tar adds an empty figure of its name."""
    places: dict[str, dict[str, _Place]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            while member := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers it has seen
                match = _MEMBER.fullmatch(member.name)
                if match and member.isfile() and not member.issparse():
                    places.setdefault(match["key"], {})[match["suffix"]] = _Place(member.offset_data, member.size)
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a cut or broken header for the end, which is a block of zeros
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                places[name] = {}
    except (tarfile.TarError, EOFError, OSError):
        places[name] = {}
    return {key: _Figure(name, *map(found.get, ("jpg", "txt", "json"))) for key, found in places.items()}


def _bytes(shard: Path, place: _Place, limit: int) -> bytes:
    """Content of a member.

    Raises:
        BadStudyError: it is larger than `limit`, or the file ends before it.
    """
    if place.size > limit:
        raise BadStudyError("member too large", f"{place.size} bytes")
    try:
        with shard.open("rb") as file:
            file.seek(place.offset)
            data = file.read(place.size)
    except OSError as error:
        raise BadStudyError("unreadable shard", error.strerror or type(error).__name__) from None
    if len(data) < place.size:
        raise BadStudyError("unreadable shard", f"it ends {place.size - len(data)} bytes too early")
    return data


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadStudyError("bad json", f"KEY.json: {type(error).__name__}") from None
    if not isinstance(facts, dict):
        raise BadStudyError("bad json", f"KEY.json holds a {type(facts).__name__}, not an object")
    return {name: facts[name] for name in _FACTS if name in facts}
