"""Files that promise more than they hold: refused from their headers, with memory bounded in a process of its own."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CAP_MIB = 64
RUN = """
import json, sys
from pathlib import Path
from medclip_lab.data.decode import DecodeError, decode_image
import medclip_lab.data.dicom, pydicom, pydicom.pixels, openjpeg, libjpeg

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

for path in sys.argv[1:]:
    data = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    try:
        decode_image(data, path.rpartition(".")[2], frame=0 if path.endswith("dcm") else None, max_pixels=2**22)
        told = "decoded"
    except DecodeError as error:
        told = str(error)
    print(json.dumps([told, peak() - before]))
"""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


SMALL = Image.new("L", (8, 8))


def png() -> bytes:
    """11,000 x 11,000 black pixels in 120 kB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    squeezed = zlib.compressobj(9)
    rows = b"".join(squeezed.compress(bytes(11001)) for _ in range(11000)) + squeezed.flush()
    head = struct.pack(">IIBBBBB", 11000, 11000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_text() -> bytes:
    """A small image whose comment inflates to 160 MB."""
    plain = encoded(SMALL, "PNG")
    squeezed = zlib.compressobj(9)
    body = b"Comment\0\0" + b"".join(squeezed.compress(bytes(2**20)) for _ in range(160)) + squeezed.flush()
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return plain[:33] + chunk + plain[33:]


def jpeg() -> bytes:
    """65,500 x 65,500 pixels, of which none is there."""
    data = bytearray(encoded(SMALL, "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def webp() -> bytes:
    """A canvas of 16,383 x 16,383, for which the decoder takes 2 GB as it is opened."""
    data = bytearray(encoded(SMALL.convert("RGB"), "WEBP", lossless=True))
    start = data.index(b"VP8L") + 9
    data[start : start + 4] = (16382 | 16382 << 14).to_bytes(4, "little")
    return bytes(data)


def tiff() -> bytes:
    """8 x 8 pixels in one tile of 40,000 x 40,000."""
    entries = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40000), (323, 40000), (324, 8)]
    entries += [(325, 16)]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 24) + bytes(16) + struct.pack("<H", len(entries)) + fields + bytes(4)


def dicom_deflated() -> bytes:
    """A megabyte that inflates to 160 MB."""
    from pydicom import uid

    from .test_dicom import RAMP, dicom

    syntax = uid.DeflatedExplicitVRLittleEndian
    plain = dicom(RAMP, syntax=syntax)
    start = plain.index(syntax.encode()) + len(syntax)
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return plain[:start] + b"".join(squeezed.compress(bytes(2**20)) for _ in range(160)) + squeezed.flush()


def dicom_frames() -> bytes:
    from .test_dicom import RAMP, dicom

    return dicom(RAMP, NumberOfFrames=2**30)


def dicom_header() -> bytes:
    from .test_dicom import RAMP, dicom

    return dicom(RAMP, Rows=60000, Columns=60000)


def dicom_stream() -> bytes:
    """A dataset of 80 x 64 whose JPEG 2000 stream promises 60,000 x 60,000."""
    from pydicom import uid

    from .test_dicom import dataset, written

    pixels = np.zeros((80, 64), np.uint8)
    made = dataset(pixels)
    made.compress(uid.JPEG2000Lossless, pixels, generate_instance_uid=False)
    data = written(made)
    start = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:start] + struct.pack(">II", 60000, 60000) + data[start + 8 :]


def dicom_jpeg() -> bytes:
    from .test_dicom import shipped

    data = bytearray(shipped("SC_rgb_small_odd_jpeg.dcm"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "pixels.png": (png, "more than the cap"),
    "text.png": (png_text, "broken png"),
    "size.jpg": (jpeg, "DecompressionBomb"),
    "canvas.webp": (webp, "more than the cap"),
    "tile.tif": (tiff, "more than the cap"),
    "deflated.dcm": (dicom_deflated, "inflates to more than"),
    "frames.dcm": (dicom_frames, "more than the cap"),
    "header.dcm": (dicom_header, "more than the cap"),
    "stream.dcm": (dicom_stream, "more than the cap"),
    "jpeg.dcm": (dicom_jpeg, "more than the cap"),
}


def test_bombs_are_refused_and_take_no_memory(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    pytest.importorskip("libjpeg")
    for name, (make, _) in BOMBS.items():
        (tmp_path / name).write_bytes(make())
    paths = [str(tmp_path / name) for name in BOMBS]
    run = subprocess.run([sys.executable, "-c", RUN, *paths], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for (name, (_, expected)), line in zip(BOMBS.items(), run.stdout.splitlines(), strict=True):
        told, grown = json.loads(line)
        assert expected in told, name
        assert grown < CAP_MIB, f"{name}: {grown:.0f} MiB"
