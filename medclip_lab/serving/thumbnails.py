"""Small pictures of the studies an index holds, where the operator says where their images lie.

An index holds no pixels. What is made here is decoded anew from the source, shrunk, and encoded from its pixels alone:
no header, comment or profile of the file goes with it, and nothing is kept.
"""

import base64
import io
import threading
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from medclip_lab.data.decode import DecodeError, decode_image, suffix_of
from medclip_lab.data.index import read_index, scan
from medclip_lab.data.manifest import Manifest
from medclip_lab.data.preprocess import Preprocess
from medclip_lab.data.quarantine import Quarantine
from medclip_lab.data.reader import BadSampleError, Reader
from medclip_lab.data.sample import IMAGE_SUFFIXES, make_key
from medclip_lab.data.writing import MANIFEST
from medclip_lab.errors import UserError
from medclip_lab.files import existing_folder

SIDE = 192
"""Pixels of the longer side: a picture to tell cases apart, not to read."""


class Pictures(Protocol):
    """Where the images of studies lie."""

    def find(self, study_id: str, number: int) -> tuple[str, bytes] | None:
        """(suffix, bytes) of an image of a study; None if it is not there. Any number of threads may ask."""
        ...


class ShardPictures:
    """Images in shards, found by the key that a study's id makes."""

    def __init__(self, manifest: Manifest) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(manifest.shards):
            path = shard.local()
            index = read_index(path, shard.sha256) if shard.sha256 else None
            if index is None:
                with path.open("rb") as file:
                    index = scan(file)
            for place, entry in enumerate(index.entries):
                self._places.setdefault(entry.key, (number, place))
        self._reader = Reader(manifest.shards, Quarantine(max(1, len(self._places)), 1.0))
        self._lock = threading.Lock()

    def find(self, study_id: str, number: int) -> tuple[str, bytes] | None:
        place = self._places.get(make_key(study_id), self._places.get(study_id))
        if place is None:
            return None
        try:
            with self._lock:  # a reader goes to a place in a file, then reads
                study = self._reader.study(*place)
        except (BadSampleError, OSError):
            return None
        if study.record.get("study_id") != study_id or number >= len(study.images):
            return None
        return study.images[number]


class FolderPictures:
    """Files named STUDY.png, or of several images STUDY/0.png, STUDY/1.png and so on; looked up by name, and never
    opened by a path that an index made.

    A second image is no STUDY.1.png: ids have dots, and that may be another study.
    """

    def __init__(self, folder: Path) -> None:
        self._paths: dict[tuple[str, int], Path] = {}
        for entry in sorted(folder.iterdir()):
            if entry.is_dir():
                for path in sorted(entry.iterdir()):
                    number = _name(path)
                    if number is not None and number.isascii() and number.isdigit() and len(number) <= 6:
                        self._paths.setdefault((entry.name, int(number)), path)
            elif (name := _name(entry)) is not None:
                self._paths.setdefault((name, 0), entry)
        if not self._paths:
            raise UserError(f"thumbnails: {folder} holds neither shards nor images: name the folder of either")

    def find(self, study_id: str, number: int) -> tuple[str, bytes] | None:
        path = self._paths.get((study_id, number))
        try:
            return None if path is None else (suffix_of(path.name), path.read_bytes())
        except OSError:
            return None


def _name(path: Path) -> str | None:
    """Of an image, its name without the suffix."""
    suffix = suffix_of(path.name)
    return path.name[: -len(suffix) - 1] if suffix in IMAGE_SUFFIXES and path.is_file() else None


def open_pictures(folder: Path) -> Pictures:
    """Of a folder of shards, or of images.

    Raises:
        UserError: no such folder, or neither in it.
    """
    folder = existing_folder(folder, "thumbnails")
    if (folder / MANIFEST).exists():
        return ShardPictures(Manifest.load(folder))
    return FolderPictures(folder)


def thumbnail(
    pictures: Pictures, study_id: str, number: int, preprocess: Preprocess, max_pixels: int, max_bytes: int
) -> str | None:
    """A JPEG of at most `SIDE` pixels a side, base64; None where there is no image, or none that can be used."""
    found = pictures.find(study_id, number)
    if found is None or len(found[1]) > max_bytes:
        return None
    try:
        picture = preprocess.window(decode_image(found[1], found[0], max_pixels=max_pixels))
    except (DecodeError, UserError):
        return None  # of several frames, for example
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    # From an array: what else Pillow knows of the file, as comments and profiles, would be written too.
    Image.fromarray(np.asarray(picture)).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
