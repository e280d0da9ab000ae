"""Decoding: what goes wrong with pictures and videos in practice, or on purpose, must not reach a verdict unseen."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import struct
import subprocess
import time
import warnings
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from skimage.data import astronaut

from tests import fuzz
from tests.pictures import clip_of, encoded, png_of
from tests.raising import raises
from x2dfd.errors import InputError
from x2dfd.media import Picture, Source, Video, load_media, load_picture, media_summary
from x2dfd.paths import find_media
from x2dfd.sniffing import MAX_BYTES, MAX_PIXELS

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """96 x 64, with detail and no symmetry."""
    return Image.fromarray(astronaut()[40:168, 150:342]).resize((96, 64))


def code_of(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        load_media(source)
    assert caught.value.reason and "Error" not in caught.value.reason  # a library's words help nobody
    assert "not processed" not in caught.value.reason
    return caught.value.code


def clip(format: str = "mp4", codec: str = "mpeg4", n: int = 50, gop: int = 12, b_frames: int = 0) -> bytes:
    """A clip at 25 frames a second whose frame i is grey 40 + 4i."""
    greys = (np.full((64, 128, 3), 40 + 4 * i, np.uint8) for i in range(n))
    return clip_of(greys, codec, format, bit_rate=2_000_000, gop_size=gop, max_b_frames=b_frames)


# --- pictures: what comes out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "off"), [("PNG", 0), ("TIFF", 0), ("BMP", 0), ("JPEG", 8), ("WEBP", 8), ("GIF", 8), ("AVIF", 8)]
)
def test_each_format_keeps_its_pixels(photo: Image.Image, format: str, off: float) -> None:
    """A hidden conversion moves every forensic score; a wrong matrix in one format makes that format look fake."""
    picture = load_picture(encoded(photo, format, quality=95))
    assert (picture.format, picture.n_frames, picture.notes, picture.path) == (format, 1, (), None)
    assert np.abs(picture.pixels.astype(float) - np.asarray(photo)).mean() <= off


def test_jpeg_is_decoded_at_full_size(photo: Image.Image) -> None:
    """JPEG `draft` would give a picture of other statistics than the file's own."""
    data = encoded(photo.resize((960, 640)), "JPEG")
    with Image.open(io.BytesIO(data)) as plain:
        np.testing.assert_array_equal(load_picture(data).pixels, np.asarray(plain.convert("RGB")))


ORIENTED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize(
    ("format", "endian", "off"),
    [*((f, e, 0) for f in ("PNG", "TIFF", "WEBP") for e in "<>"), ("JPEG", "<", 8), ("AVIF", "<", 8)],
)
def test_exif_orientation(photo: Image.Image, format: str, endian: str, off: float, orientation: int) -> None:
    """A phone photo left lying on its side has no face; turned twice (TIFF) or read in the wrong byte order neither."""
    exif = Image.Exif()
    exif.endian, exif[274] = endian, orientation
    options: dict[str, Any] = {"exif": exif.tobytes(), "quality": 95, "lossless": off == 0}
    if format == "TIFF":
        options = {"tiffinfo": {274: orientation}, "big_endian": endian == ">"}
    picture = load_picture(encoded(photo, format, **options))
    expected = ORIENTED[orientation](np.asarray(photo))
    assert picture.pixels.shape == expected.shape
    assert np.abs(picture.pixels.astype(float) - expected).mean() <= off
    assert picture.notes == (() if orientation == 1 else (f"exif_orientation:{orientation}",))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_white(photo: Image.Image, format: str) -> None:
    """Hidden pixels under transparency are not what the viewer sees, so no expert may see them."""
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, :48], alpha[:, 48:60] = 0, 128
    data = encoded(Image.merge("RGBA", (*photo.split(), Image.fromarray(alpha))), format, lossless=True)
    picture = load_picture(data)
    source = np.asarray(photo, dtype=float)
    assert (picture.pixels[:, :48] == 255).all()
    assert np.abs(picture.pixels[:, 48:60] - (source[:, 48:60] * 128 + 255 * 127) / 255).max() <= 1
    np.testing.assert_array_equal(picture.pixels[:, 60:], np.asarray(photo)[:, 60:])
    assert "alpha_on_white" in picture.notes


def test_alpha_of_other_modes(photo: Image.Image) -> None:
    """Grey and palette came out with the hidden colour; a note on an opaque screenshot makes it look edited."""
    opaque = load_picture(encoded(photo.convert("RGBA"), "PNG"))
    np.testing.assert_array_equal(opaque.pixels, np.asarray(photo))
    assert opaque.notes == ()
    grey = Image.merge("LA", (photo.convert("L"), Image.new("L", photo.size, 0)))
    assert (load_picture(encoded(grey, "PNG")).pixels == 255).all()
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.paste(0, (0, 0, 16, 32))
    picture = load_picture(encoded(palette, "PNG", transparency=bytes([0, 255])))
    assert picture.pixels[0, [0, 31]].tolist() == [[255, 255, 255], [0, 0, 255]]
    assert picture.notes == ("alpha_on_white",)


def test_16_bits_are_scaled_and_noted() -> None:
    """Clipped at 255 they are white, their low byte is stripes, and a TIFF where zero is white came out negative."""
    ramp = np.tile(np.linspace(0, 65_535, 256).astype(np.uint16), (32, 1))
    rows = b"".join(b"\0" + row.repeat(3).astype(">u2").tobytes() for row in ramp)
    tiff = encoded(Image.fromarray(ramp), "TIFF")
    black, white = (struct.pack("<HHLH", 262, 3, 1, zero) for zero in (1, 0))
    assert tiff.count(black) == 1
    for data, expected, off in (
        (encoded(Image.fromarray(ramp), "PNG"), range(256), 0),
        (tiff, range(256), 0),
        (tiff.replace(black, white), range(255, -1, -1), 0),
        (png_of(256, 32, zlib.compress(rows), depth=16), range(256), 1),
    ):
        picture = load_picture(data)
        assert np.abs(picture.pixels[0].astype(int) - np.array(expected)[:, None]).max() <= off
        assert picture.notes == ("16bit_to_8bit",)


def test_float_tiff() -> None:
    """Floats between 0 and 1 have one meaning; others have none, and a guess would be an answer about noise."""
    ramp = np.tile(np.linspace(0, 1, 256, dtype=np.float32), (32, 1))
    picture = load_picture(encoded(Image.fromarray(ramp), "TIFF"))
    assert picture.pixels[0, :, 0].tolist() == list(range(256))
    assert picture.notes == ("float_to_8bit",)
    assert code_of(encoded(Image.fromarray(ramp * 7), "TIFF")) == "unsupported_format"
    ramp[3, 3] = np.nan
    assert code_of(encoded(Image.fromarray(ramp), "TIFF")) == "unsupported_format"


def test_cmyk() -> None:
    """Inverted CMYK turns a face into its negative."""
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    for format in ("JPEG", "TIFF"):
        picture = load_picture(encoded(cyan, format))
        assert np.abs(picture.pixels[16, 16].astype(int) - [0, 255, 255]).max() < 6
        assert "cmyk_to_rgb" in picture.notes


def swapped_profile() -> bytes:
    """An sRGB profile named otherwise, whose red and blue primaries have changed places."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    data[:] = data.replace(b"s\0R\0G\0B", b"o\0d\0d\0!").replace(b"sRGB built-in", b"odd! built-in")
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_icc_profiles(photo: Image.Image) -> None:
    """Wide-gamut photos read as sRGB are pale, which looks forged; a broken profile must not cost the verdict."""
    picture = load_picture(encoded(photo, "PNG", icc_profile=swapped_profile()))
    assert any(note.startswith("icc_to_srgb:") and "odd" in note for note in picture.notes)
    assert np.abs(picture.pixels.astype(int) - np.asarray(photo)[..., ::-1]).mean() < 2
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile, notes in ((srgb, 0), (b"not a profile" * 20, 1), (swapped_profile()[:200], 1)):
        picture = load_picture(encoded(photo, "PNG", icc_profile=profile))
        np.testing.assert_array_equal(picture.pixels, np.asarray(photo))
        assert [note.startswith("icc_ignored:") for note in picture.notes] == [True] * notes


def test_image_objects(photo: Image.Image) -> None:
    """The demo hands them over: judged by other pixels than files, or one hash for two (palette, shape, turn)."""
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(photo, "PNG", exif=exif.tobytes())
    with Image.open(io.BytesIO(data)) as image:
        from_object = load_picture(image)
    np.testing.assert_array_equal(from_object.pixels, load_picture(data).pixels)
    assert (from_object.format, from_object.path) == ("PIL", None)
    assert "hash_of_pixels" in from_object.notes
    images = [Image.new("P", (32, 20), 0) for _ in range(2)]
    images[0].putpalette([255, 0, 0])
    images[1].putpalette([0, 0, 255])
    images += [Image.new("L", (20, 32), 0), Image.new("L", (32, 20), 0), Image.new("L", (32, 20), 0)]
    images[-1].getexif()[274] = 6
    hashes = [load_picture(image).sha256 for image in images]
    assert len(set(hashes)) == len(images)
    assert load_picture(images[0].copy()).sha256 == hashes[0]


def test_hash_is_of_the_bytes(tmp_path: Path, photo: Image.Image) -> None:
    """The hash in a case report must equal what `sha256sum` prints."""
    path = tmp_path / "file"
    for data in (encoded(photo, "JPEG"), clip(n=3)):
        path.write_bytes(data)
        media = load_media(path)
        assert media.sha256 == load_media(data).sha256 == hashlib.sha256(data).hexdigest()
        assert media.path == str(path)


# --- what is refused ----------------------------------------------------------------------------------------------


def webp_canvas(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    still = encoded(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    frame = b"ANMF" + struct.pack("<I", 16 + len(still)) + bytes(6) + b"\x0f\0\0\x0f\0\0" + bytes(4) + still
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body + frame)) + body + frame


def tiff_sharing_data(n_tags: int, n_bytes: int) -> bytes:
    """A directory of `n_tags` tags that all point at the same `n_bytes`."""
    first = 8 + 2 + 12 * n_tags + 4
    tags = b"".join(struct.pack("<HHLL", 40_000 + i, 1, n_bytes, first) for i in range(n_tags))
    return b"II*\0" + struct.pack("<LH", 8, n_tags) + tags + bytes(4 + n_bytes)


BOMBS = {
    "png-400MP": png_of(20_000, 20_000, b""),
    "png-81MP": png_of(9_000, 9_000, b""),
    "jpeg-1600MP": encoded(Image.new("RGB", (64, 64)), "JPEG").replace(b"\0\x40\0\x40", b"\x9c\x40\x9c\x40", 1),
    "gif": encoded(Image.new("L", (16, 16)), "GIF").replace(b"\x10\0\x10\0", b"\xff\xff\xff\xff", 1),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6),
    "webp-256MP": webp_canvas(16_000, 16_000),
    "png-just-above": encoded(Image.new("1", (50_000, 1_001)), "PNG"),
}
TAGS = tiff_sharing_data(2_000, 2_000_000)  # which make a TIFF reader copy 4 GB
SCANS = encoded(Image.new("RGB", (96, 64)), "JPEG", progressive=True)  # each costs a pass over the picture
GIF = encoded(Image.new("L", (16, 16)), "GIF")
AT = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)
ENDLESS = {
    "shared-tags": TAGS,
    "shared-tags-in-exif": encoded(Image.new("RGB", (96, 64)), "PNG", exif=TAGS),
    "jpeg-scans": SCANS[:-2] + SCANS[SCANS.rindex(b"\xff\xda") : -2] * 500 + b"\xff\xd9",
    "gif-comments": GIF[:AT] + b"!\xfe" + b"\x01x" * 1_000_000 + b"\0" + GIF[AT:],  # joined one by one
}


@pytest.mark.parametrize("name", [*BOMBS, *ENDLESS])
def test_bombs_are_refused_at_once(name: str) -> None:
    """A small file must not cost gigabytes or minutes."""
    assert MAX_PIXELS == 50_000_000  # of a camera's picture
    code, seconds, peak = fuzz.cost(load_media, (BOMBS | ENDLESS)[name])
    assert code == ("too_many_pixels" if name in BOMBS else "corrupt")
    assert seconds < (0.5 if name in BOMBS else 2) and peak < 50_000_000


def test_rare_tiff_decoders_are_not_reached(photo: Image.Image) -> None:
    """Old codecs that no camera writes are where parser bugs live."""
    data = encoded(photo, "TIFF", compression="packbits")
    at = data.index(struct.pack("<HHL", 259, 3, 1)) + 8
    for compression in (6, 32809, 34676, 50001, 9999):
        assert code_of(data[:at] + struct.pack("<H", compression) + data[at + 2 :]) in ("unsupported_format", "corrupt")
    assert code_of(data[:at] + struct.pack("<H", 32809) + data[at + 2 :]) == "unsupported_format"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"the free encyclopedia, saved as a photo\n" * 9, "not_an_image"),
        (b"BM: a text that begins like a bitmap", "not_an_image"),
        (b"GGG" * 300, "bad_video"),
        (b"<html><img src=x></html>", "not_an_image"),
        (b"\0", "not_an_image"),
        (b"%PDF-1.7\n", "unsupported_format"),
        (b"8BPS\0\x01" + bytes(40), "unsupported_format"),
        (b"\xff\xd8\xff\xe0", "corrupt"),
        (b"\x89PNG\r\n\x1a\n", "corrupt"),
        (b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20), "corrupt"),
        (b"\0\0\0\x18ftypisom" + bytes(300), "bad_video"),
        (b"\x1a\x45\xdf\xa3" + bytes(300), "bad_video"),
        (encoded(Image.new("RGB", (15, 400)), "PNG"), "too_small"),  # slivers crash resizing later on
        (b"#EXTM3U\n#EXTINF:1,\nhttp://localhost/a.ts\n", "not_an_image"),
        (b"ffconcat version 1.0\nfile '/etc/hostname'\n", "not_an_image"),
        (b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5000 RTP/AVP 96\n", "not_an_image"),
    ],
)
def test_refusals_have_stable_codes(tmp_path: Path, data: bytes, code: str) -> None:
    """Names do not count: each is called photo.jpg. One bad file in a thousand must be one row with a reason."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    assert code_of(path) == code_of(data) == code


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_half_a_file_is_an_error(photo: Image.Image, format: str) -> None:
    """Half a photo with a grey rest is not the photo; JPEG decoders like to return it."""
    data = encoded(photo.resize((192, 128)), format)
    code = code_of(data[: len(data) // 2])
    assert code == "truncated" if format in ("JPEG", "PNG", "BMP") else code in ("truncated", "corrupt")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """A pipe would block for ever, a folder raise what nobody catches, a disk image fill the memory."""
    assert code_of(tmp_path) == "not_a_file"
    assert code_of(tmp_path / "none.jpg") == "not_found"
    assert code_of("a\0b.jpg") == "not_found"
    assert code_of("a" * 5_000) == "not_found"
    os.mkfifo(tmp_path / "pipe")
    assert code_of(tmp_path / "pipe") == "not_a_file"
    (tmp_path / "loop").symlink_to("loop")
    assert code_of(tmp_path / "loop") == "unreadable"
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    begin = time.perf_counter()
    assert code_of(tmp_path / "huge.png") == "file_too_large"
    assert time.perf_counter() - begin < 0.5


def test_addresses_are_refused(tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reaches the network, or another file, because somebody typed an address."""
    web = ("http://localhost/a.jpg", Path("http://localhost/a.jpg"), "https://localhost/a.mp4", "rtsp://localhost/1")
    for address in (*web, "file:///etc/hostname", "concat:a.mp4|b.mp4", "data:image/png;base64,AAAA"):
        assert code_of(address) == "url_not_allowed", address
    monkeypatch.chdir(tmp_path)
    photo.save("holiday: beach.png")  # a file that people have
    assert load_picture("holiday: beach.png").format == "PNG"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "mp4", "avi", "mkv", "ts"])
def test_damaged_files_print_and_warn_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What tests/test_fuzz.py cannot see: parsers that warn, or print from C, for each bad file of a thousand."""
    damaged = [*islice(fuzz.mutants(fuzz.TARGETS[kind], 0), 60)]
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in damaged:
            with contextlib.suppress(InputError):
                load_media(data, max_frames=4)
    assert capfd.readouterr() == ("", "")


# --- videos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "codec", "b_frames", "format"),
    [
        ("mp4", "mpeg4", 0, "mov"),
        ("mp4", "libx264", 2, "mov"),
        ("mov", "libx264", 3, "mov"),
        ("webm", "libvpx", 0, "matroska"),
        ("matroska", "mpeg4", 2, "matroska"),
        ("avi", "mpeg4", 0, "avi"),
        ("mpegts", "mpeg2video", 2, "mpegts"),
        ("flv", "flv", 0, "flv"),
    ],
)
@pytest.mark.parametrize("gop", [5, 100])
def test_frames_are_evenly_spaced(container: str, codec: str, b_frames: int, format: str, gop: int) -> None:
    """Frames from the beginning only, off by one after a seek, or in coding order: the face that was swapped late
    would never be looked at, and `time_s` would point at another picture."""
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    video = load_media(clip(container, codec, gop=gop, b_frames=b_frames), max_frames=5)
    assert isinstance(video, Video)
    assert (video.format, video.n_frames, video.width, video.height) == (format, 50, 128, 64)
    assert [frame.index for frame in video.frames] == [5, 15, 25, 35, 45]
    assert [frame.time_s for frame in video.frames] == pytest.approx([0.2, 0.6, 1.0, 1.4, 1.8], abs=0.002)
    seen = [float(frame.pixels.mean() - 40) / 4 for frame in video.frames]  # which frame of `clip` each is
    assert seen == pytest.approx([5, 15, 25, 35, 45], abs=0.7)
    assert video.duration_s == pytest.approx(2.0, abs=0.05)
    assert video.notes == ()


def test_video_is_recognised_by_content(tmp_path: Path, photo: Image.Image) -> None:
    """A video named .jpg, and a picture named .mp4; frames that repeat in a short clip would weigh twice."""
    (tmp_path / "a.jpg").write_bytes(clip(n=3))
    (tmp_path / "a.mp4").write_bytes(encoded(photo, "JPEG"))
    video = load_media(tmp_path / "a.jpg", max_frames=16)
    assert isinstance(video, Video) and [frame.index for frame in video.frames] == [0, 1, 2]
    assert isinstance(load_media(str(tmp_path / "a.mp4")), Picture)
    with raises("is_video"):
        load_picture(tmp_path / "a.jpg")
    sound = io.BytesIO()  # a voice memo has nothing to look at
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate = 48_000
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert code_of(sound.getvalue()) == "bad_video"


def test_lost_end_is_noted() -> None:
    """A clip whose end cannot be decoded must not pass for the whole clip."""
    data = clip("mp4", gop=100)
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    middle = (start + end) // 2
    video = load_media(data[:middle] + bytes(end - middle) + data[end:], max_frames=5)
    assert isinstance(video, Video)
    assert len(video.frames) < 5
    assert f"frames_missing:{5 - len(video.frames)}" in video.notes
    assert any(note.startswith("undecodable_packets:") for note in video.notes)


def test_decoding_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key frame at the start of an endless clip must not keep a process busy for hours, nor fill its memory."""
    import x2dfd.video as media

    data = clip("avi")
    # As if its first key frame were its only one.
    monkeypatch.setattr(media._Decoder, "approach", lambda self, target: None)
    monkeypatch.setattr(media, "_MAX_DECODED_PIXELS", 20 * 128 * 64)
    video = load_media(data, max_frames=5)
    assert isinstance(video, Video)
    assert [frame.index for frame in video.frames] == [5, 15]
    assert "decoding_limit_reached" in video.notes
    monkeypatch.undo()
    monkeypatch.setattr(media, "MAX_VIDEO_FRAMES", 40)
    assert code_of(data) == "file_too_large"


# --- summaries and folders ----------------------------------------------------------------------------------------


def test_summary_quotes_camera_and_times_and_no_place(photo: Image.Image, tmp_path: Path) -> None:
    """A case report needs the file's size, times and camera; coordinates, names and serial numbers are about people."""
    exif = Image.Exif()
    exif[271], exif[305], exif[315] = "Nikon\x00", "Editor\n2 <b>", "Jane Roe"
    exif.get_ifd(0x8769)[36867] = "2024:05:06 07:08:09"
    exif.get_ifd(0x8769)[0xA431] = "serial 4711"
    exif.get_ifd(0x8825)[2] = (47.0, 22.0, 33.0)
    path = tmp_path / "a.jpg"
    photo.save(path, exif=exif)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    summary = media_summary(load_media(path))
    assert summary["exif"] == {
        "make": "Nikon", "software": "Editor 2 <b>", "taken": "2024:05:06 07:08:09", "place": "stated, not copied here",
    }  # fmt: skip
    assert (summary["bytes"], summary["modified"]) == (path.stat().st_size, "2020-09-13T12:26:40+00:00")
    assert "modified" not in media_summary(load_media(path.read_bytes()))


def test_find_media(tmp_path: Path) -> None:
    """A run over a folder must be repeatable, silent about nothing, and stay inside the folder."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for path in ("in/b.jpg", "in/a/z.png", "in/a/notes.txt", "in/.hidden.jpg", "in/.git/c.jpg", "out/secret.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    (inside / "leak.jpg").symlink_to(outside / "secret.jpg")
    (inside / "leak").symlink_to(outside)
    (inside / "round").symlink_to(inside)
    (inside / "same.jpg").symlink_to("b.jpg")
    os.mkfifo(inside / "pipe")
    (inside / "broken.jpg").symlink_to("nowhere")
    told: list[Path] = []
    given: list[str | Path] = [inside, str(outside / "secret.jpg"), tmp_path / "missing.jpg"]
    found = list(find_media(given, left_out=told.append))
    assert {"broken.jpg", "leak.jpg"} <= {path.name for path in told}  # a folder of links gave nothing and no reason
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "in/a/notes.txt", "in/a/z.png", "in/b.jpg", "in/same.jpg", "out/secret.jpg", "missing.jpg",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_folder_thousands_deep(tmp_path: Path) -> None:
    """Walking it by recursion ended the whole run; a path that no system call takes is a row of its own."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (tmp_path / "z.jpg").write_bytes(b"x")
    try:
        deep, photo = find_media([tmp_path])
        assert photo.name == "z.jpg" and len(str(deep)) > 4000
        assert code_of(deep) == "not_found"
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.parametrize("seconds", [-(10**12), 10**12])
def test_dates_that_no_calendar_holds(
    tmp_path: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    """A file of the year 33,658, as some archives unpack them, ended the run with OverflowError."""
    path = tmp_path / "a.png"
    photo.save(path)
    assert "modified" in media_summary(load_media(path))
    real = os.fstat

    def dated(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        return os.stat_result((*found[:8], seconds, *found[9:10]))

    monkeypatch.setattr("os.fstat", dated)
    assert "modified" not in media_summary(load_media(path))
