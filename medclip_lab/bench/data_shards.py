"""The same images and texts as shards of ours and as shards that open_clip reads, one study a sample."""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_lab.data.decode import DecodeError, decode_image
from medclip_lab.data.decoded import DEEP_MODES
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import read_split
from medclip_lab.data.sample import Sample
from medclip_lab.data.sources.phantom import Phantom
from medclip_lab.data.sources.reading import read_all
from medclip_lab.data.writing import write_all
from medclip_lab.errors import UserError

SHARD_SAMPLES = 128
DRAWN, DRAWN_SIZE = 32, 256  # different phantoms, and their side; each copy gets a grain of its own
GRAIN = 3.0  # makes a JPEG of 1024 x 1024 about 160 kB, as radiographs are
JPEG_QUALITY = 90
BITS = 12


@dataclass(frozen=True)
class Kind:
    """One of the made sets."""

    side: int
    suffix: str
    deep: bool = False


KINDS = {"1024-jpeg": Kind(1024, "jpg"), "320-jpeg": Kind(320, "jpg"), "512-png16": Kind(512, "png", deep=True)}


@dataclass(frozen=True)
class Study:
    """What one sample of the bench holds."""

    suffix: str
    image: bytes
    text: str


def made(kind: Kind, number: int) -> Iterator[Study]:
    """Phantoms enlarged to the size of a film, with grain, so that decoding them costs what a film's does."""
    rng = np.random.default_rng(0)
    drawn = [
        (Image.open(io.BytesIO(sample.images[0][1])), sample.text)
        for sample in _phantoms(min(DRAWN, number), DRAWN_SIZE)
    ]
    for picture, text in islice(cycle(drawn), number):
        smooth = np.asarray(picture.resize((kind.side, kind.side), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = smooth + _grain(rng, kind.side)
        if kind.deep:
            image = Image.fromarray(np.clip(pixels * 2 ** (BITS - 8), 0, 2**BITS - 1).astype(np.uint16))
        else:
            image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        yield Study(kind.suffix, _encode(image, kind.suffix), text)


def _grain(rng: np.random.Generator, side: int) -> NDArray[np.float32]:
    """Noise of a detector: blurred over two pixels, and half as much that is not."""
    coarse = Image.fromarray(rng.normal(0, GRAIN, (side // 2, side // 2)).astype(np.float32))
    blurred = np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))
    return blurred + rng.normal(0, GRAIN / 2, (side, side)).astype(np.float32)


def given(folder: str | Path, number: int) -> Iterator[Study]:
    """The first image of each study of existing shards; a study without a report gets one of a phantom.

    Raises:
        UserError: no shards.
    """
    manifest = Manifest.load(folder)
    reports = cycle([sample.text for sample in _phantoms(DRAWN, 32)])
    split = "+".join(sorted({shard.split for shard in manifest.shards}))
    studies = read_split(manifest, split, Quarantine(manifest.count(split), 1.0))
    found = (
        Study(study.images[0][0], study.images[0][1], study.record.get("text") or next(reports))
        for study in studies
        if study.images
    )
    yield from islice(found, number)


def write(studies: Iterator[Study], ours: Path, peer: Path) -> tuple[int, float, bool]:
    """Write the shards of both sides: the same images, unless open_clip would lose what is deeper than 8 bits.

    Returns:
        The number of samples, the mean bytes of an image, and whether `peer` holds 8-bit copies as PNG.

    Raises:
        UserError: no images, or one that cannot be decoded.
    """
    taken = list(studies)
    if not taken:
        raise UserError("bench data: no images in these shards")
    try:
        deep = taken[0].suffix == "dcm" or decode_image(taken[0].image, taken[0].suffix).image.mode in DEEP_MODES
        copies = [_eight_bits(study) for study in taken] if deep else taken
    except DecodeError as error:
        raise UserError(f"bench data: an image cannot be decoded: {error}") from None
    write_all(_samples(taken), ours, "bench", SHARD_SAMPLES)
    _write_theirs(copies, peer)
    return len(taken), sum(len(study.image) for study in taken) / len(taken), deep


def _eight_bits(study: Study) -> Study:
    image = decode_image(study.image, study.suffix).eight_bits()
    return Study("png", _encode(image, "png"), study.text)


def _encode(image: Image.Image, suffix: str) -> bytes:
    encoded = io.BytesIO()
    if suffix == "jpg":
        image.save(encoded, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(encoded, "PNG")
    return encoded.getvalue()


def _write_theirs(studies: list[Study], folder: Path) -> None:
    """As open_clip reads them: an image and a `.txt` a sample."""
    folder.mkdir(parents=True)
    for first in range(0, len(studies), SHARD_SAMPLES):
        path = folder / f"train-{first // SHARD_SAMPLES:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, study in enumerate(studies[first : first + SHARD_SAMPLES], first):
                for suffix, data in ((study.suffix, study.image), ("txt", study.text.encode())):
                    info = tarfile.TarInfo(f"s{number:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _samples(studies: list[Study]) -> Iterator[Sample]:
    for number, study in enumerate(studies):
        images = [(study.suffix, study.image)]
        yield Sample(study_id=f"s{number}", patient_id=f"p{number}", split="train", images=images, text=study.text)


def _phantoms(number: int, size: int) -> list[Sample]:
    return list(read_all(Phantom(studies=number, size=size)))
