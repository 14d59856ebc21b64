"""Odd pictures: some are images all the same, some are not, and of a damaged one nobody can say beforehand."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

NOISE = np.random.default_rng(0).integers(0, 256, (50, 60, 4), dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def valid() -> Iterator[tuple[str, bytes]]:
    """Images that other services stumble over: they are answered."""
    grey, colour, alpha = (Image.fromarray(NOISE[..., :n].squeeze()) for n in (1, 3, 4))
    for number in range(9):  # 0 is not a direction
        exif = Image.Exif()
        exif[0x0112] = number
        yield f"EXIF orientation {number}", saved(grey, "JPEG", exif=exif)
    yield "EXIF of noise", saved(grey, "JPEG", exif=b"Exif\0\0" + NOISE.tobytes()[:4000])
    yield (
        "EXIF that points at itself",
        saved(grey, "JPEG", exif=b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)),
    )
    yield "CMYK", saved(colour.convert("CMYK"), "JPEG")
    yield "progressive", saved(grey, "JPEG", progressive=True)
    yield "palette", saved(colour.convert("P"), "PNG")
    yield "palette with transparency", saved(colour.convert("P"), "PNG", transparency=0)
    yield "one bit", saved(grey.convert("1"), "PNG")
    yield "16 bits", saved(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), "PNG")
    for kind in ("PNG", "WEBP", "TIFF"):
        yield f"alpha {kind}", saved(alpha, kind)
    yield "interlaced grey and alpha", saved(alpha.convert("LA"), "PNG")
    for way in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield f"TIFF {way}", saved(grey, "TIFF", compression=way)
    yield "one pixel", saved(grey.crop((0, 0, 1, 1)), "PNG")
    yield "16 bits TIFF, big endian", tiff16()
    plain = saved(grey, "PNG")
    yield "PNG with a false gamma", plain[:33] + chunk(b"gAMA", bytes(4)) + plain[33:]
    yield "PNG with a comment", plain[:33] + chunk(b"tEXt", b"Comment\0" + b"a" * 5000) + plain[33:]


def tiff16() -> bytes:
    values = NOISE[..., 0].astype(">u2").tobytes()
    tags = [(256, 60), (257, 50), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 50), (279, len(values))]
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    return b"MM\0*" + struct.pack(">I", 8 + len(values)) + values + struct.pack(">H", len(tags)) + entries + bytes(4)


def refused() -> Iterator[tuple[str, bytes]]:
    """Several pictures in one and none of them named, and headers that contradict themselves."""
    frames = [Image.fromarray(np.roll(NOISE[..., 0], turn)) for turn in range(3)]
    for kind in ("PNG", "WEBP", "TIFF"):
        yield f"animated {kind}", saved(frames[0], kind, save_all=True, append_images=frames[1:])
    whole = saved(frames[0], "PNG")
    for width, height in (
        (0, 50),
        (60, 0),
        (2**31 - 1, 1),
        (2**31, 2**31),
        (100_000, 1),
        (1, 100_000),
        (40_000, 40_000),
    ):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        yield f"PNG of {width} x {height}", whole[:8] + header + whole[33:]
    for depth, colour in ((3, 0), (8, 1), (16, 3), (255, 255)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60, 50, depth, colour, 0, 0, 0))
        yield f"PNG of depth {depth}, colour {colour}", whole[:8] + header + whole[33:]
    yield "PNG without pixels", whole[:33] + chunk(b"IEND", b"")
    plain = saved(frames[0], "JPEG")
    place = plain.index(b"\xff\xc0")
    for height, width in ((0, 60), (50, 0), (65_535, 65_535), (65_535, 1), (1, 65_535)):
        yield f"JPEG of {width} x {height}", plain[: place + 5] + struct.pack(">HH", height, width) + plain[place + 9 :]
    for part in range(1, 17):
        for kind, data in (("PNG", whole), ("JPEG", plain)):
            yield f"{kind} cut at {part}/20", data[: len(data) * part // 20]


def damaged(count: int) -> Iterator[tuple[str, bytes]]:
    """Good files with some bits flipped, wherever they are: answered or refused, and nothing else."""
    chance = random.Random(1)
    whole = [data for _, data in valid()]
    for number in range(count):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield f"flipped bits {number}", bytes(data)
