import contextlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medclip_lab.data.decode import MAX_SCANS, DecodeError, decode_image, read_image, suffix_of
from medclip_lab.errors import UserError


def encode(pixels: "np.ndarray[Any, Any]", kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


GREY = (np.random.default_rng(0).random((20, 30)) * 255).astype(np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (20, 30), dtype=np.uint16)
DEEP[0, :2] = 0, 2**16 - 1
COLOUR = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
KINDS = {"png": "PNG", "tif": "TIFF", "jpg": "JPEG", "webp": "WEBP"}


def values(data: bytes, suffix: str, **options: Any) -> "np.ndarray[Any, Any]":
    return np.asarray(decode_image(data, suffix, **options).image)


@pytest.mark.parametrize("pixels", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_eight_bits_are_exact(pixels: "np.ndarray[Any, Any]", suffix: str) -> None:
    decoded = decode_image(encode(pixels, KINDS[suffix], **({"lossless": True} if suffix == "webp" else {})), suffix)
    found = np.asarray(decoded.image)
    if suffix == "webp" and pixels.ndim == 2:  # which has no greyscale
        found = found[..., 0]
    assert (found == pixels).all()
    assert decoded.eight_bits() is decoded.image, "nothing to window"


@pytest.mark.parametrize(("pixels", "mode"), [(GREY, "L"), (COLOUR, "RGB")])
def test_jpeg(pixels: "np.ndarray[Any, Any]", mode: str) -> None:
    smooth = np.asarray(Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC))
    decoded = decode_image(encode(smooth, "JPEG", quality=95, subsampling=0 if mode == "RGB" else -1), "jpg")
    assert decoded.image.mode == mode
    assert np.abs(np.asarray(decoded.image).astype(int) - smooth).mean() < 4


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}], ids=str)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_survive_until_the_window(suffix: str, options: dict[str, str]) -> None:
    decoded = decode_image(encode(DEEP, KINDS[suffix], **(options if suffix == "tif" else {})), suffix)
    assert (np.asarray(decoded.image) == DEEP).all()
    eight = np.asarray(decoded.eight_bits())
    assert (eight == np.rint(DEEP * np.float32(255 / 65535))).all()
    narrow = np.asarray(decoded.eight_bits((1000.0, 500.0)))
    expected = np.clip((DEEP.astype(float) - 750) / 500 * 255, 0, 255)
    assert np.abs(narrow - expected).max() <= 0.51


def test_big_endian_and_inverted_tiff() -> None:
    def tiff(order: str, photometric: int) -> bytes:
        entries = [(256, 3, 30), (257, 3, 20), (258, 3, 16), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
        entries += [(277, 3, 1), (278, 3, 20), (279, 4, DEEP.nbytes)]
        strip = DEEP.astype(DEEP.dtype.newbyteorder(order)).tobytes()
        magic = b"II*\0" if order == "<" else b"MM\0*"
        fields = b"".join(
            struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
            for tag, kind, value in entries
        )
        end = struct.pack(order + "I", 8 + len(strip)) + strip + struct.pack(order + "H", len(entries))
        return magic + end + fields + b"\0\0\0\0"

    assert (values(tiff("<", 1), "tif") == DEEP).all()
    assert (values(tiff(">", 1), "tif") == DEEP).all()
    plain, inverted = (np.asarray(decode_image(tiff("<", kind), "tif").eight_bits()) for kind in (1, 0))
    assert np.abs(plain.astype(int) + inverted - 255).max() <= 1, "white is zero"


def test_colour_beside_alpha_and_palette() -> None:
    rgba = np.dstack([COLOUR, np.full((20, 30), 255, np.uint8)])
    assert (np.asarray(decode_image(encode(rgba, "PNG"), "png").eight_bits()) == COLOUR).all()
    buffer = io.BytesIO()
    Image.fromarray(GREY).convert("LA").save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "png").eight_bits().mode == "L"
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).quantize(16).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "png").eight_bits().mode == "RGB"


def test_values_that_are_not_finite() -> None:
    with pytest.raises(DecodeError, match="not finite"):
        decode_image(encode(np.array([[0, np.nan]], np.float32), "TIFF"), "tif").eight_bits()


@pytest.mark.parametrize(
    ("data", "suffix", "message"),
    [
        (b"", "png", "broken png"),
        (encode(GREY, "PNG")[:200], "png", "broken png"),
        (encode(GREY, "JPEG")[:300], "jpg", "broken jpg"),
        (encode(GREY, "PNG"), "jpg", "broken jpg"),
        (encode(GREY, "WEBP")[:60], "webp", "broken webp"),
        (encode(DEEP, "TIFF")[:600], "tif", "broken tif"),
        (b"<svg/>", "svg", r"no decoder for \.svg"),
    ],
)
def test_broken_images(data: bytes, suffix: str, message: str) -> None:
    with pytest.raises(DecodeError, match=message):
        decode_image(data, suffix)


@pytest.mark.parametrize("suffix", KINDS)
def test_size_is_checked_before_decoding(suffix: str) -> None:
    data = encode(GREY, KINDS[suffix])
    assert decode_image(data, suffix, max_pixels=600).image.size == (30, 20)
    with pytest.raises(DecodeError, match="600 pixels, more than the cap of 599"):
        decode_image(data, suffix, max_pixels=599)


def test_frames_of_a_tiff() -> None:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "TIFF", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    with pytest.raises(DecodeError, match="more than one frame"):
        decode_image(buffer.getvalue(), "tif")
    assert (values(buffer.getvalue(), "tif", frame=0) == GREY).all()
    assert (values(buffer.getvalue(), "tif", frame=1) == 255 - GREY).all()
    with pytest.raises(DecodeError, match="no frame 2"):
        decode_image(buffer.getvalue(), "tif", frame=2)
    with pytest.raises(DecodeError, match="no frame 1"):
        decode_image(encode(GREY, "PNG"), "png", frame=1)


def test_suffixes_and_files(tmp_path: Path) -> None:
    assert suffix_of("1.2.840.DCM") == "dcm"
    assert suffix_of("volume.NII.GZ") == "nii.gz"
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path / "none.png")
    (tmp_path / "a.png").write_bytes(encode(GREY, "PNG"))
    assert (np.asarray(read_image(tmp_path / "a.png").image) == GREY).all()


def film(width: int, height: int) -> "np.ndarray[Any, Any]":
    """A picture whose detail is coarser than a pixel, as of a radiograph."""
    coarse = np.random.default_rng(0).random((height // 16, width // 16)) * 255
    return np.asarray(Image.fromarray(coarse.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("at_least", "size"), [(64, (80, 64)), (65, (160, 128)), (128, (160, 128)), (300, (640, 512)), (900, (640, 512))]
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_scaled_decode_is_near_the_full_one(mode: str, at_least: int, size: tuple[int, int]) -> None:
    """Within 2 levels on average of the full decode made as small with a box filter."""
    pixels = np.asarray(Image.fromarray(film(640, 512)).convert(mode))
    data = encode(pixels, "JPEG", quality=92, subsampling=0 if mode == "RGB" else -1)
    small = decode_image(data, "jpg", at_least=at_least).image
    assert (small.size, small.mode) == (size, mode)
    full = decode_image(data, "jpg").image
    assert full.size == (640, 512)
    reduced = np.asarray(full.reduce(640 // size[0])).astype(int)
    assert np.abs(np.asarray(small) - reduced).mean() < 2
    assert (values(encode(GREY, "PNG"), "png", at_least=5) == GREY).all(), "for JPEG only"


def test_a_progressive_jpeg_of_many_scans() -> None:
    data = encode(film(64, 64), "JPEG", progressive=True)
    start = data.index(b"\xff\xda")
    end = data.index(b"\xff", start + 12)
    scan = data[start:end]
    assert decode_image(data, "jpg").image.size == (64, 64)
    with pytest.raises(DecodeError, match=f"more than {MAX_SCANS} scans"):
        decode_image(data[:start] + scan * MAX_SCANS + data[start:], "jpg")


SAMPLES = {
    "png": encode(DEEP, "PNG"),
    "tif": encode(DEEP, "TIFF", compression="tiff_lzw"),
    "jpg": encode(film(64, 48), "JPEG", progressive=True),
    "jpeg": encode(COLOUR, "JPEG"),
    "webp": encode(COLOUR, "WEBP"),
}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, str]:
    """A file of one of the kinds, cut anywhere or with some bits turned."""
    suffix = draw(st.sampled_from(sorted(SAMPLES)))
    data = bytearray(SAMPLES[suffix])
    for position in draw(st.lists(st.integers(0, 8 * len(data) - 1), max_size=12)):
        data[position // 8] ^= 1 << position % 8
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))]), suffix


@settings(max_examples=400, deadline=5000)
@given(damaged(), st.sampled_from([None, 0]), st.sampled_from([None, 8]))
def test_damage_raises_nothing_else(damage: tuple[bytes, str], frame: int | None, at_least: int | None) -> None:
    with contextlib.suppress(DecodeError):
        decoded = decode_image(*damage, frame=frame, at_least=at_least, max_pixels=2**20)
        decoded.eight_bits()
