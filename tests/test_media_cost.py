"""What looking at one file may cost: inputs built to keep a parser busy end early, in any format."""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from tests import fuzz
from tests.pictures import encoded, png_begin, png_chunk
from tests.raising import raises
from x2dfd import sniffing, stills
from x2dfd.media import load_media, load_picture

SECONDS = 5.0  # of CPU, generously: each took a fraction of one when it was written, and 15 or more before


def box(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


PNG = png_begin(20, 20)
MP4 = box(b"ftyp", b"isom" + bytes(12))
JPEG = encoded(Image.new("RGB", (64, 64), (90, 60, 30)), "JPEG")
EXIF = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: JPEG[:2] + b"\xff" * 30_000_000 + JPEG[2:], id="jpeg-fill-bytes"),
        pytest.param(lambda: JPEG[:2] + b"\xff" * 30_000_000, id="jpeg-only-fill-bytes"),
        pytest.param(lambda: JPEG[:2] + EXIF * 400 + JPEG[2:], id="jpeg-exif-joined-piece-by-piece"),
        pytest.param(lambda: PNG + png_chunk(b"abCd") * 3_000_000, id="png-empty-chunks"),
        pytest.param(lambda: PNG + png_chunk(b"IDAT") * 3_000_000, id="png-empty-data"),
        pytest.param(lambda: MP4 + box(b"free") * 4_000_000, id="mp4-boxes"),
        pytest.param(lambda: MP4 + box(b"moov", box(b"free") * 4_000_000), id="mp4-boxes-in-the-index"),
    ],
)
def test_endless_pieces_end_early(data: Callable[[], bytes]) -> None:
    """Pillow walks such a JPEG byte by byte and such a PNG chunk by chunk, in Python and under its lock."""
    code, seconds, _ = fuzz.cost(load_media, data())
    assert code == "corrupt" and seconds < SECONDS


def test_ordinary_files_stay_far_below_the_limit() -> None:
    """A limit that an ordinary file comes near to refuses someone's holiday photo."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), np.uint8))
    for format in ("JPEG", "PNG", "TIFF", "WEBP"):
        data = encoded(noise, format)
        opened = stills.open_image(io.BytesIO(data), format)
        before = opened.budget.pieces
        stills.decode(opened, None)
        whole = sniffing.Budget.of(len(data)).pieces
        assert whole - opened.budget.pieces < whole / 10 and before > 0


def test_looking_through_a_video_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of endless empty elements are walked in C; the clock is asked with each read."""
    monkeypatch.setattr("x2dfd.video._SECONDS", 0.0)
    monkeypatch.setattr("x2dfd.video._SECONDS_A_BYTE", 0.0)
    with raises("bad_video"):
        load_media(b"\x1a\x45\xdf\xa3\x80" + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\xec\x80" * 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["16-bit", "alpha"])
def test_a_small_tiff_of_many_pixels_stays_within_memory(kind: str) -> None:
    """Whole copies in floating point, or in every mode on the way, took 1.5 GB for a file of 200 KB."""
    size = (7100, 7000)
    grey = Image.fromarray(np.full(size[::-1], 60_000, np.uint16))
    picture = grey if kind == "16-bit" else Image.new("RGBA", size, (1, 2, 3, 100))
    code, _, peak = fuzz.cost(load_media, encoded(picture, "TIFF", compression="tiff_adobe_deflate"))
    assert code == "" and peak < 500_000_000


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8160, 6144), (12_000, 9_000)])
def test_a_large_photo_is_decoded_at_reduced_size(size: tuple[int, int]) -> None:
    """Telephones make 50 and 108 megapixels; refusing them refuses the very file that a forensic check needs."""
    assert size[0] * size[1] > sniffing.MAX_PIXELS
    picture = Image.new("RGB", size, (200, 40, 40))
    picture.paste((40, 40, 200), (size[0] // 2, 0, *size))
    seen = load_picture(encoded(picture, "JPEG", quality=50))
    assert seen.pixels.shape == (size[1] // 2, size[0] // 2, 3)
    assert np.abs(seen.pixels[10, 10].astype(int) - [200, 40, 40]).max() < 12
    assert np.abs(seen.pixels[-10, -10].astype(int) - [40, 40, 200]).max() < 12
    assert seen.notes == (f"reduced_from:{size[0]}x{size[1]}",)


def test_many_scans_of_a_large_jpeg_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs a pass over all pixels, so that a hundred of a large picture take minutes."""
    progressive = encoded(Image.new("RGB", (64, 64)), "JPEG", progressive=True)
    monkeypatch.setattr(sniffing, "_MAX_SCANNED_PIXELS", 64 * 64 * 9)
    with raises("corrupt", "scans"):
        load_picture(progressive)


def test_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The photo of every iPhone: 'unsupported' alone leaves its owner without a next step."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1"):
        with raises("unsupported_format", "x2dfd[heic]"):
            load_media(b"\0\0\0\x20ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(80))
