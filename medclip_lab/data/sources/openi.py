"""Open-i chest radiograph reports of Indiana University (Demner-Fushman et al., JAMIA 2016), as XML.

Text only: the images of the collection are another download and are not read here.
"""

import re
import tarfile
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.parsers import expat

from medclip_lab.data.labeller import combine_labels, labelled_sentences
from medclip_lab.data.mesh import mesh_labels
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.report import PREAMBLE, report_text
from medclip_lab.data.shards import Sample
from medclip_lab.data.sources.common import split_by_hash
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

WHAT = "openi"
LICENSE = "CC BY-NC-ND 4.0"
MAX_XML_BYTES = 2**20  # the largest of the collection has 30 kB
NO_TEXT = "no findings and no impression"

# Names a report by its place in the archive when its XML cannot be read; never a path of the user's.
_NAMED = re.compile(r"[0-9A-Za-z_-]{1,40}")


class _BadXmlError(ValueError):
    """A member that is no report; the message holds nothing of its content."""


def openi_total(path: Path) -> int:
    """Number of XML files in the archive or folder; errors as `openi_samples`."""
    return sum(1 for _ in _xml_files(path))


def openi_samples(path: Path, quarantine: Quarantine | None = None) -> Iterator[Sample]:
    """The reports of Open-i as text-only studies, with sentences, labels by our rules, and MeSH terms.

    `extra` has "mesh" (the major terms) and "mesh_labels" (`mesh.mesh_labels` of them). Every report counts as a
    patient of its own, as the collection tells no patients; the splits are 80/10/10 by a hash of the report's name.

    Args:
        path: `NLMCXR_reports.tgz`, which is streamed and never unpacked, or a folder with the XML files at any depth.
        quarantine: gets files that are no reports, and reports with neither findings nor impression (28 of 3,955); by
            default one for this call with the usual ceiling.

    Raises:
        UserError: no such path, an archive that cannot be read, no XML in it, too many bad files. The path is looked
            at when the first study is asked for.
    """
    quarantine = quarantine if quarantine is not None else Quarantine(openi_total(path))
    count = 0
    for name, data in _xml_files(path):
        count += 1
        key = f"openi-{name.lower()}"
        try:
            report_id, sections, terms = _parse(data)
        except _BadXmlError as error:
            quarantine.add("", key, "bad xml", str(error))
            continue
        key = f"openi-{report_id.lower()}"
        text = report_text(sections)
        if not any(map(str.isalpha, text)):
            quarantine.add("", key, NO_TEXT, "nothing to train on")
            continue
        sentences = labelled_sentences(sections)
        yield Sample(
            study_id=key,
            patient_id=key,
            split=split_by_hash(key),
            sections=sections,
            text=text,
            labels=combine_labels(sentence["labels"] for sentence in sentences),
            sentences=sentences,
            source=WHAT,
            license=LICENSE,
            extra={"mesh": terms, "mesh_labels": mesh_labels(terms)},
        )
    if not count:
        raise UserError(f"{WHAT}: no .xml file in {path}")


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
            raise UserError(f"{WHAT}: cannot read the archive {path}: {type(error).__name__}: {error}") from None
        return
    folder = existing_folder(path, WHAT)
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


def _parse(data: bytes | None) -> tuple[str, dict[str, str], list[str]]:
    """Name, sections and major MeSH terms of a report."""
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
    return report_id, sections, terms
