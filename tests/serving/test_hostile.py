"""Hostile files, a hundred, or as many as MEDCLIP_LAB_HOSTILE says: each is refused, in bounded memory, unwritten."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data import test_bombs as bombs

from . import hostile_pictures as pictures

pytest.importorskip("fastapi")
pytest.importorskip("pydicom")
pytest.importorskip("libjpeg")

from . import hostile_dicom as broken

CASES = int(os.environ.get("MEDCLIP_LAB_HOSTILE", "100"))
CAP_MIB = 192
"""What a refusal may take: the body of a request several times over, and nothing that a header promises."""
RUN = """
import json, os, sys
from pathlib import Path
from starlette.testclient import TestClient
from medclip_lab.serving import Settings, create_app

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

opened, watching = [], False

def watch(event, arguments):
    # Whatever Python opens to write to, or makes, moves and removes, while the service answers.
    if not watching:
        return
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if arguments[0] != "/proc/self/clear_refs":
            opened.append(arguments[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.truncate", "os.link", "os.symlink", "tempfile.mkstemp"):
        opened.append(event)

sys.addaudithook(watch)
bundle, folder, temporary = map(Path, sys.argv[1:])
app = create_app(Settings(bundle=bundle, max_pixels=2**22, decode_threads=1))
with TestClient(app, base_url="http://localhost") as client:
    good = (folder / "good").read_bytes()
    raw = {"content-type": "application/octet-stream"}
    assert client.post("/v1/classify", content=good, headers=raw).status_code == 200
    watching = True
    for path in sorted(folder.glob("case-*")):
        data = path.read_bytes()
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        answer = client.post("/v1/classify", content=data, headers=raw)
        print(json.dumps([path.name, answer.status_code, answer.headers["content-type"], peak() - before]))
    assert client.post("/v1/classify", content=good, headers=raw).status_code == 200
    watching = False
    print(json.dumps({"left": [str(path) for path in temporary.rglob("*")], "opened": opened}))
"""


def picture(kind: str, size: tuple[int, int] = (60, 50), **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    return bombs.encoded(Image.fromarray(noise), kind, **options)


def polyglots() -> Iterator[tuple[str, bytes]]:
    """An image that another reader takes for something else."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a.txt", "a")
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        yield f"zip after {kind}", picture(kind) + packed.getvalue()
    yield "html after PNG", picture("PNG") + b"<html><script>alert(1)</script>"
    comment = b"\xff\xfe" + struct.pack(">H", 31) + b"<script>alert(1)</script>    "
    plain = picture("JPEG")
    yield "script in JPEG", plain[:2] + comment + plain[2:]
    yield "pdf in JPEG", plain[:2] + b"\xff\xfe" + struct.pack(">H", 11) + b"%PDF-1.7\n" + plain[2:]
    for start in (b"MZ", b"\x7fELF", b"PK\x03\x04", b"#!/bin/sh\n", b"<html>", b"%PDF-1.4", b"GIF89a", b"II*\0"):
        yield f"DICOM after {start!r}", start.ljust(128, b"\0") + dicom()[128:]


def others() -> Iterator[tuple[str, bytes]]:
    """What is no image at all, whatever it may be called."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(10**6))
    yield "zip", packed.getvalue()
    yield "html", b"<!doctype html><script>alert(1)</script>"
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "xml", b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'
    yield "gzip of zeros", zlib.compress(bytes(10**7))
    yield "pickle", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix."
    yield "gif", picture("GIF")
    yield "bmp", picture("BMP")
    yield "postscript", b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 10 10\n"
    yield "nothing", b"\0" * 200


def sides() -> Iterator[tuple[str, bytes]]:
    for kind in ("PNG", "TIFF"):
        yield f"100k x 1 {kind}", picture(kind, (100_000, 1))
        yield f"1 x 100k {kind}", picture(kind, (1, 100_000))
    yield "16k x 1 WEBP", picture("WEBP", (16_000, 1), lossless=True)
    yield "60k x 1 JPEG", picture("JPEG", (60_000, 1))


def dicom() -> bytes:
    from tests.data import test_dicom

    return bytes(test_dicom.dicom(test_dicom.RAMP))


def syntaxes() -> Iterator[bytes]:
    """A DICOM in every transfer syntax that can be written here."""
    from pydicom import uid

    from tests.data import test_dicom

    plain = (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian)
    for syntax in plain:
        yield bytes(test_dicom.dicom(test_dicom.RAMP, syntax=syntax))
    for syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        pixels = np.random.default_rng(0).integers(0, 256, (80, 64), dtype=np.uint8)
        made = test_dicom.dataset(pixels)
        made.compress(syntax, pixels, generate_instance_uid=False)
        yield bytes(test_dicom.written(made))
    for name in ("SC_rgb_small_odd_jpeg.dcm",):
        yield bytes(test_dicom.shipped(name))


def broken_dicom(chance: random.Random, whole: list[bytes]) -> bytes:
    """Cut in the pixels or before, or its sizes and syntax overwritten: no reader can be content."""
    data = chance.choice(whole)
    way = chance.randrange(3)
    if way == 0:
        return data[: chance.randrange(132, len(data) // 2)]
    if way == 1:
        place = data.find(b"1.2.840.10008.1.2")
        return data[:place] + b"9.9.999.99999" + data[place + 13 :]
    place = data.find(b"\x28\x00\x10\x00")
    if place < 0:  # deflated: its header is not to be seen
        return data[:400]
    at = place + 8  # after tag and length, or after tag, type and short length
    return data[:at] + struct.pack("<H", 65_000) + data[at + 2 :]


def truncated(chance: random.Random) -> bytes:
    data = picture(chance.choice(("PNG", "JPEG", "WEBP", "TIFF")), (chance.randrange(20, 90), chance.randrange(20, 90)))
    return data[: chance.randrange(1, int(len(data) * 0.8))]


def scrambled(chance: random.Random) -> bytes:
    """A PNG whose every chunk after the header lies."""
    data = bytearray(picture("PNG"))
    for _ in range(40):
        data[chance.randrange(41, len(data) - 12)] ^= chance.randrange(1, 256)
    return bytes(data)


def hostile() -> Iterator[tuple[str, bytes, str]]:
    """Name, content, and what is to come of it: "refused", "image" or "either"."""
    found = [(f"bomb {name}", make()) for name, (make, _) in bombs.BOMBS.items()]
    found += [*polyglots(), *others(), *sides(), *pictures.refused(), *broken.cases()]
    whole = list(syntaxes())
    chance = random.Random(0)
    ways: list[Callable[[], bytes]] = [
        lambda: truncated(chance),
        lambda: scrambled(chance),
        lambda: broken_dicom(chance, whole),
        lambda: chance.choice((b"\xff\xd8\xff", b"II*\0", b"\x89PNG\r\n\x1a\n")) + chance.randbytes(500),
    ]
    found += [(f"random {number % len(ways)}", ways[number % len(ways)]()) for number in range(120)]
    yield from ((name, data, "refused") for name, data in found)
    yield from ((name, data, "image") for name, data in pictures.valid())
    yield from ((name, data, "either") for name, data in pictures.damaged(200))


def test_hostile_files_are_refused_in_bounded_memory_and_leave_nothing(toy_bundle: Path, tmp_path: Path) -> None:
    files, temporary = tmp_path / "files", tmp_path / "temporary"
    files.mkdir()
    temporary.mkdir()
    (files / "good").write_bytes(picture("PNG"))
    known = list(hostile())
    assert len({data for _, data, _ in known}) > 900
    step = max(len(known) / CASES, 1)
    taken = [known[int(number * step)] for number in range(min(CASES, len(known)))]
    for number, (_, data, _) in enumerate(taken):
        (files / f"case-{number:04}").write_bytes(data)
    here = {path: path.stat().st_mtime_ns for path in toy_bundle.rglob("*")}
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(toy_bundle), str(files), str(temporary)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"TMPDIR": str(temporary)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    *lines, left = run.stdout.splitlines()
    assert json.loads(left) == {"left": [], "opened": []}
    assert {path: path.stat().st_mtime_ns for path in toy_bundle.rglob("*")} == here
    failed = []
    for (name, _, expected), line in zip(taken, lines, strict=True):
        _, status, kind, grown = json.loads(line)
        refused = 400 <= status < 500 and kind == "application/problem+json"
        met = {"refused": refused, "image": status == 200, "either": refused or status == 200}[expected]
        if not met or grown > CAP_MIB:
            failed.append((name, status, kind, round(grown)))
    assert not failed
