"""Made-up data sets in the layout of real ones, and a source read as an engine reads it."""

import csv
import gzip
import io
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from medclip_lab.data.sample import Sample
from medclip_lab.data.shards import write_shards
from medclip_lab.data.sources.base import BadStudyError, Record, Source
from medclip_lab.data.sources.dicom_header import quietly


def image(shade: int = 90, kind: str = "PNG", depth: int = 8) -> bytes:
    """A small encoded image; shades tell images apart."""
    buffer = io.BytesIO()
    pixels = np.full((24, 32), shade, dtype=np.uint16 if depth == 16 else np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def dicom(shade: int = 90, **elements: Any) -> bytes:
    """A small DICOM file with the elements given by keyword."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 8, 8, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = bytes([shade]) * 64
    dataset["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    with quietly():
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    """A file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """A table as pandas writes it, compressed if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    data = buffer.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


class Outcome(NamedTuple):
    samples: dict[str, Sample]
    notes: list[tuple[str, str, str]]
    """(study, cause, reason)"""
    bad: dict[str, tuple[str, str]]
    """Study -> cause and reason."""
    records: list[Record]

    def only(self) -> Sample:
        (sample,) = self.samples.values()
        return sample


def run(source: Source, shards: Path | None = None) -> Outcome:
    """Read a source as an engine does: listed twice, sent through pickle, every study read twice."""
    source = pickle.loads(pickle.dumps(source))
    records = list(source.records())
    assert list(source.records()) == records
    assert len({record.study_id for record in records}) == len(records)
    outcome = Outcome({}, [], {}, records)
    for record in pickle.loads(pickle.dumps(records)):

        def note(cause: str, reason: str, counted: bool = False, study: str = record.study_id) -> None:
            outcome.notes.append((study, cause, reason))

        try:
            sample = source.read(record, note)
            assert source.read(record, lambda cause, reason, counted=False: None) == sample
        except BadStudyError as error:
            outcome.bad[record.study_id] = (error.cause, error.reason)
            continue
        assert (sample.study_id, sample.patient_id, sample.split) == (record.study_id, record.patient_id, record.split)
        assert len(sample.view) == len(sample.images)
        assert sample.source == source.name
        outcome.samples[sample.study_id] = sample
    if shards:
        manifest = write_shards(outcome.samples.values(), shards, source.name)
        assert manifest.facts["samples"] == len(outcome.samples)
    return outcome
