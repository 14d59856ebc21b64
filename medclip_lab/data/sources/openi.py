"""Open-i chest radiograph reports of Indiana University (Demner-Fushman et al., JAMIA 2016), as XML.

Text only: the images of the collection are another download and are not read here.
"""

import re
import tarfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from medclip_lab.data.labeller import combine_labels, labelled_sentences
from medclip_lab.data.mesh import mesh_labels
from medclip_lab.data.report import PREAMBLE, report_text
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.base import BadStudyError, Note, Record
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

MAX_XML_BYTES = 2**20  # the largest of the collection has 30 kB
NO_TEXT = "no findings and no impression"

# Names a report by its place in the archive when its XML cannot be read; never a path of the user's.
_NAMED = re.compile(r"[0-9A-Za-z_-]{1,40}")


class _BadXmlError(ValueError):
    """A member that is no report; the message holds nothing of its content."""


@dataclass(frozen=True)
class OpenI:
    """Reports are text-only studies, with sentences, labels by our rules, and MeSH terms.

    `extra` has "mesh" (the major terms) and "mesh_labels" (`mesh.mesh_labels` of them). Every report counts as a
    patient of its own, as the collection tells no patients; the splits are 80/10/10 by a hash of the report's name.
    """

    path: Path = field(
        metadata={
            "help": "NLMCXR_reports.tgz, which is never unpacked, or a folder with its XML files at any depth",
            "example": "NLMCXR_reports.tgz",
        }
    )

    name = "openi"
    license = "CC BY-NC-ND 4.0"

    def records(self) -> list[Record]:
        """One a file, with what it says: an archive is gone through but once, and all its reports have 10 MB.

        Raises:
            UserError: no such path, an archive that cannot be read, no XML in it.
        """
        records = []
        for name, data in _xml_files(self.path):
            report: _Report | str
            try:
                report = _parse(data)
                study_id = f"openi-{report.name.lower()}"
            except _BadXmlError as error:
                report, study_id = str(error), f"openi-{name.lower()}"
            records.append(
                Record(study_id=study_id, patient_id=study_id, split=split_by_hash(study_id), content=report)
            )
        if not records:
            raise UserError(f"{self.name}: no .xml file in {self.path}")
        return records

    def read(self, record: Record, note: Note) -> Sample:  # noqa: ARG002 - a report is whole or useless
        """A report with its labels.

        Raises:
            BadStudyError: the file is no report, or has neither findings nor impression (28 of 3,955).
        """
        report: _Report | str = record.content
        if isinstance(report, str):
            raise BadStudyError("bad xml", report)
        text = report_text(report.sections)
        if not any(map(str.isalpha, text)):
            raise BadStudyError(NO_TEXT, "nothing to train on")
        sentences = labelled_sentences(report.sections)
        return Sample(
            study_id=record.study_id,
            patient_id=record.patient_id,
            split=record.split,
            sections=report.sections,
            text=text,
            labels=combine_labels(sentence["labels"] for sentence in sentences),
            sentences=sentences,
            source=self.name,
            license=self.license,
            extra={"mesh": report.terms, "mesh_labels": mesh_labels(report.terms)},
        )


class _Report(NamedTuple):
    name: str
    sections: dict[str, str]
    terms: list[str]
    """Major MeSH terms."""


def _xml_files(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """(file name without suffix, content); None where the file is larger than any report."""
    path = path.expanduser()
    if path.is_file():
        try:
            with tarfile.open(path, "r|*") as archive:  # a stream: members are read in passing, nothing is unpacked
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(".xml"):
                        file = archive.extractfile(member) if member.size <= MAX_XML_BYTES else None
                        yield _name(member.name), file.read() if file else None
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise UserError(f"{OpenI.name}: cannot read the archive {path}: {type(error).__name__}: {error}") from None
        return
    folder = existing_folder(path, OpenI.name)
    for file_path in sorted(folder.rglob("*.xml")):
        if file_path.is_file():
            yield _name(file_path.name), file_path.read_bytes() if file_path.stat().st_size <= MAX_XML_BYTES else None


def _name(member: str) -> str:
    return "-".join(_NAMED.findall(Path(member).stem)) or "unnamed"


def _tree(data: bytes) -> ET.Element:
    """The elements of a document; one with a document type is refused, in whatever encoding, so no entity expands."""

    def refuse(*_: object) -> None:
        raise _BadXmlError("document types are refused")

    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


def _parse(data: bytes | None) -> _Report:
    if data is None:
        raise _BadXmlError(f"larger than {MAX_XML_BYTES} bytes")
    try:
        root = _tree(data)
    except expat.ExpatError as error:
        raise _BadXmlError(f"not well-formed at line {error.lineno}") from None
    identifier = root.find("uId")
    report_id = identifier.get("id", "") if identifier is not None else ""
    if not _NAMED.fullmatch(report_id):
        raise _BadXmlError("no uId")
    sections = {}
    for element in root.iter("AbstractText"):
        content = " ".join("".join(element.itertext()).split())
        if content:
            sections[element.get("Label", PREAMBLE).lower()] = content
    terms = [" ".join(element.text.split()) for element in root.iter("major") if element.text and element.text.strip()]
    return _Report(report_id, sections, terms)
