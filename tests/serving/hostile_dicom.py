"""Broken DICOM in every transfer syntax that pydicom knows by name: each claims one, and lies in one way."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.data import test_dicom

PIXELS = np.random.default_rng(0).integers(0, 256, (80, 64), dtype=np.uint8)
NOISE = np.random.default_rng(1).integers(0, 256, 300, dtype=np.uint8).tobytes()
JPEG = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 80, 64, 1) + b"\x01\x11\x00"
J2K = b"\xff\x4f\xff\x51" + struct.pack(">HH8IHBBB", 41, 0, 64, 80, 0, 0, 64, 80, 0, 0, 1, 7, 1, 1)
RLE = struct.pack("<16I", 1, 64, *[0] * 14)
PIXEL_DATA, ITEM, END = b"\xe0\x7f\x10\x00", b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"


def elements(**changes: Any) -> bytes:
    """The dataset in explicit little endian, from its first tag to that before the pixels; None leaves a tag out."""
    made = test_dicom.dataset(PIXELS)
    for name, value in changes.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    data = test_dicom.written(made)
    start = 144 + struct.unpack_from("<I", data, 140)[0]
    return data[start : data.rindex(PIXEL_DATA)]


def native(pixels: bytes) -> bytes:
    return PIXEL_DATA + b"OB\0\0" + struct.pack("<I", len(pixels)) + pixels


def encapsulated(*fragments: bytes) -> bytes:
    items = (ITEM + struct.pack("<I", len(one)) + one for one in (b"", *fragments))
    return PIXEL_DATA + b"OB\0\0" + b"\xff" * 4 + b"".join(items) + END + bytes(4)


def file(syntax: str, content: bytes) -> bytes:
    """A file whose meta group has nothing but the syntax."""
    name = syntax.encode() + b"\0" * (len(syntax) % 2)
    meta = b"\x02\x00\x10\x00UI" + struct.pack("<H", len(name)) + name
    return bytes(128) + b"DICM\x02\x00\x00\x00UL\x04\x00" + struct.pack("<I", len(meta)) + meta + content


def nested(depth: int) -> bytes:
    """Sequences in sequences, of undefined length, none of which ends."""
    return (b"\x40\x00\x75\x02SQ\0\0" + b"\xff" * 4 + ITEM + b"\xff" * 4) * depth


WAYS: dict[str, Callable[[], bytes]] = {
    "no fragment": lambda: elements() + encapsulated(),
    "noise": lambda: elements() + encapsulated(NOISE),
    "a JPEG of noise": lambda: elements() + encapsulated(JPEG + NOISE),
    "a JPEG 2000 of noise": lambda: elements() + encapsulated(J2K + NOISE),
    "a JPEG header alone": lambda: elements() + encapsulated(JPEG),
    "an RLE beyond its end": lambda: elements() + encapsulated(RLE),
    "half of the pixels": lambda: elements() + native(PIXELS.tobytes()[:2560]),
    "a fragment of 2 GB": lambda: (
        elements() + PIXEL_DATA + b"OB\0\0" + b"\xff" * 4 + ITEM + b"\xf0\xff\xff\x7f" + NOISE
    ),
    "pixels of 4 GB": lambda: elements() + PIXEL_DATA + b"OB\0\0" + b"\xf0\xff\xff\xff" + NOISE,
    "no rows": lambda: elements(Rows=None) + native(PIXELS.tobytes()),
    "seven bits": lambda: elements(BitsAllocated=7) + native(PIXELS.tobytes()),
    "many samples": lambda: elements(SamplesPerPixel=65_535) + native(PIXELS.tobytes()),
    "no photometric": lambda: elements(PhotometricInterpretation=None) + native(PIXELS.tobytes()),
    "no pixels": lambda: elements(),
    "nested sequences": lambda: elements() + nested(3000),
}


def cases() -> Iterator[tuple[str, bytes]]:
    from pydicom.uid import UID_dictionary

    known = [(number, facts[0]) for number, facts in UID_dictionary.items() if facts[1] == "Transfer Syntax"]
    for number, name in known:
        for way, content in WAYS.items():
            yield f"{name}: {way}", file(number, content())
