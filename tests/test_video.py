"""Clips as a player shows them, animations as clips, and how many frames stand in memory."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.pictures import clip_of, encoded
from tests.raising import raises
from x2dfd import hdr
from x2dfd.media import Frame, Picture, Video, load_media, load_picture, media_summary

av = pytest.importorskip("av")
Pixels = NDArray[np.uint8]

RED, GREEN, BLUE, GREY = (200, 40, 40), (40, 180, 60), (40, 40, 200), (120, 120, 120)
CORNERS = np.zeros((64, 96, 3), np.uint8)  # top left red, top right green, bottom left blue, bottom right grey
CORNERS[:32, :48], CORNERS[:32, 48:], CORNERS[32:, :48], CORNERS[32:, 48:] = RED, GREEN, BLUE, GREY


def video_of(source: bytes, max_frames: int = 4, **options: Any) -> Video:
    video = load_media(source, max_frames=max_frames, **options)
    assert isinstance(video, Video)
    return video


def with_matrix(data: bytes, *matrix: int) -> bytes:
    """The track header's matrix a, b, c, d (ISO 14496-12, 8.3.2) in place of the identity."""
    a, b, c, d = (65_536 * value for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    assert struct.unpack(">9i", data[at : at + 36])[0] == 65_536
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "expected", "note"),
    [
        ((1, 0, 0, 1), lambda p: p, None),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1], "mirrored:left_right"),
        ((1, 0, 0, -1), lambda p: p[::-1], "mirrored:top_bottom"),
        ((-1, 0, 0, -1), lambda p: p[::-1, ::-1], "rotation:180"),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1), "rotation:270"),
        ((0, -1, 1, 0), lambda p: np.rot90(p), "rotation:90"),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2), "mirrored:main_diagonal"),
        ((0, -1, -1, 0), lambda p: p[::-1, ::-1].transpose(1, 0, 2), "mirrored:other_diagonal"),
    ],
)
def test_all_eight_display_transforms(matrix: tuple[int, ...], expected: Any, note: str | None) -> None:
    """A mirrored clip of a selfie camera was turned on its head, so that no face was found in it."""
    video = video_of(with_matrix(clip_of([CORNERS] * 4), *matrix))
    wanted = expected(CORNERS)
    assert (video.height, video.width) == wanted.shape[:2]
    difference = np.abs(video.frames[1].pixels.astype(int) - wanted)
    assert np.median(difference) < 12 and difference.mean() < 12
    assert video.notes == ((note,) if note else ())


def test_pixels_that_are_not_square() -> None:
    """Anamorphic clips were judged squeezed; faces of other proportions score otherwise."""
    video = video_of(clip_of([CORNERS] * 4, sample_aspect_ratio=Fraction(16, 9)))
    assert (video.width, video.height) == (round(96 * 16 / 9), 64)
    assert video.notes == ("pixel_shape:16:9",)
    assert np.abs(video.frames[0].pixels[10, 10].astype(int) - RED).max() < 30
    assert video_of(clip_of([CORNERS] * 4, sample_aspect_ratio=Fraction(50, 1))).notes == ("pixel_shape_ignored",)


def moving_bar(moment: int) -> Pixels:
    picture = np.full((96, 128, 3), 30, np.uint8)
    picture[:, 8 + 6 * moment : 32 + 6 * moment] = 220
    return picture


def test_interlaced_clips_are_deinterlaced() -> None:
    """Two moments in one frame comb everything that moves, and experts take the comb for a forger's trace."""
    woven = []
    for i in range(8):
        frame = moving_bar(2 * i).copy()
        frame[1::2] = moving_bar(2 * i + 1)[1::2]
        woven.append(frame)
    interlaced = 1 << 18 | 1 << 29  # AV_CODEC_FLAG_INTERLACED_DCT and _INTERLACED_ME
    data = clip_of(woven, "mpeg2video", "matroska", flags=interlaced)
    video = video_of(data, 4)
    assert video.notes == ("deinterlaced",)
    for shown in video.frames:
        rows = shown.pixels[16:80].astype(int).mean(2)
        combed = np.abs(2 * rows[1:-1] - rows[:-2] - rows[2:]).mean()
        was = woven[shown.index][16:80].astype(int).mean(2)
        assert combed < 0.3 * np.abs(2 * was[1:-1] - was[:-2] - was[2:]).mean()
    # The first frame has none before it and the last none after it.
    data = clip_of([moving_bar(i) for i in range(3)], "mpeg2video", "matroska", flags=interlaced)
    assert [frame.index for frame in video_of(data, 8).frames] == [0, 1, 2]


@pytest.mark.parametrize("curve", ["HLG", "PQ"])
def test_hdr_comes_out_as_on_an_ordinary_screen(curve: str) -> None:
    """Shown untoned, HDR is grey and pale, which moves every score."""
    levels = np.array([0.05, 0.2, 0.6, 1.0])  # light, of reference white
    if curve == "HLG":
        scene = (levels * 203 / 1000) ** (1 / 1.2)  # undo the display's gamma
        low, high = np.sqrt(3 * scene), 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
        signal = np.where(scene <= 1 / 12, low, high)
    else:
        y = (levels * 203 / 10_000) ** (2610 / 16384)
        signal = ((3424 / 4096 + 2413 / 128 * y) / (1 + 2392 / 128 * y)) ** (2523 / 32)
    samples = np.round(signal * 65_535).astype(np.uint16)[None, :, None].repeat(3, 2).repeat(70, 0)
    seen = hdr.to_bt709(samples, hdr.HLG if curve == "HLG" else hdr.PQ, hdr.BT2020)
    plain = np.round(np.minimum(levels, 0.875) ** (1 / 2.4) * 255)  # white itself is compressed to 0.875
    assert np.abs(seen[69, :, 1] - plain).max() <= 2
    assert np.ptp(seen.astype(int), axis=2).max() <= 1  # grey stays grey
    assert (np.diff(seen[0, :, 0].astype(int)) > 0).all()
    # The conversion is reached by a file too.
    trc = 18 if curve == "HLG" else 16
    video = video_of(clip_of([CORNERS] * 4, "mpeg2video", "matroska", color_trc=trc, color_primaries=9, colorspace=9))
    assert video.notes == (f"hdr_tone_mapped:{curve}", "bt2020_to_bt709")
    assert np.abs(video.frames[0].pixels.astype(int) - CORNERS).mean() > 10


def test_a_missing_index_is_said() -> None:
    """'Invalid data found' of a download that was cut off tells nobody that it was."""
    data = clip_of([CORNERS] * 4)
    for cut in (data[: data.index(b"moov") - 4], data.replace(b"moov", b"skip")):
        with raises("bad_video", "index"):
            load_media(cut)


@pytest.mark.slow
def test_a_long_clip_is_not_decoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of video would cost an hour of decoding; without key frames skipped, its end would not be seen."""
    shades = [np.full((64, 96, 3), 40 + i % 200, np.uint8) for i in range(300)]
    for format, codec in (("avi", "mpeg4"), ("mp4", "mpeg4"), ("mpegts", "mpeg2video")):
        data = clip_of(shades, codec, format, gop_size=10)
        monkeypatch.setattr("x2dfd.video._MAX_DECODED_PIXELS", 60 * 96 * 64)
        video = video_of(data, 4)
        assert [frame.index for frame in video.frames] == [37, 112, 187, 262], format
        greys = [float(frame.pixels.mean()) for frame in video.frames]
        assert greys == pytest.approx([40 + i % 200 for i in (37, 112, 187, 262)], abs=3)


def test_one_frame_at_a_time_stands_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 frames of a 4K clip are 800 MB; faces are found frame by frame, so that none need be kept."""
    monkeypatch.setattr("x2dfd.video._MAX_KEPT_PIXELS", 2 * 96 * 64)
    data = clip_of([CORNERS] * 10)
    sizes: list[tuple[int, ...]] = []

    def keep(frame: Frame) -> Frame:
        sizes.append(frame.pixels.shape)
        return Frame(frame.index, frame.time_s, frame.pixels[:0])

    video = video_of(data, 5, keep=keep)
    assert sizes == [(64, 96, 3)] * 5 and len(video.frames) == 5 and (video.width, video.height) == (96, 64)
    assert "memory_limit_after_2_frames" in video_of(data, 5).notes
    monkeypatch.undo()
    summary = media_summary(video_of(data, 32))  # what explains the report later: the same number, the same frames
    assert summary["frames_asked"] == 32 and summary["frames"] == list(range(10))


def animation(format: str, n: int = 6, **options: Any) -> bytes:
    frames = [Image.new("RGB", (40, 32), (20 + 30 * i, 0, 0)) for i in range(n)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:], duration=200, **options)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_is_a_clip(format: str) -> None:
    """An animation that begins black was judged by its black frame."""
    video = video_of(animation(format), 3)
    assert (video.format, video.n_frames, video.width, video.height) == (format, 6, 40, 32)
    assert [frame.index for frame in video.frames] == [1, 3, 5]
    assert [frame.time_s for frame in video.frames] == pytest.approx([0.2, 0.6, 1.0], abs=0.01)
    assert video.duration_s == pytest.approx(1.2, abs=0.01)
    for frame in video.frames:
        assert np.abs(frame.pixels.astype(int) - [20 + 30 * frame.index, 0, 0]).max() < 14
    assert media_summary(video)["kind"] == "video"
    still = load_picture(animation(format))
    assert still.n_frames == 6 and still.notes == ("first_of_6_frames",)
    assert np.abs(still.pixels[16, 20].astype(int) - [20, 0, 0]).max() < 14


@pytest.mark.parametrize("format", ["GIF", "PNG"])
def test_an_animation_as_an_image_object_says_that_one_picture_was_looked_at(format: str) -> None:
    """Bug prevented: Image.open("a.gif") is judged by its first frame, and nobody is told."""
    with Image.open(io.BytesIO(animation(format))) as image:
        first, again = load_picture(image), load_picture(image)
        assert first.notes == again.notes == ("hash_of_pixels", "first_of_6_frames") and first.n_frames == 6
        np.testing.assert_array_equal(first.pixels, again.pixels)
        image.seek(3)
        later = load_picture(image)
    assert later.notes == ("hash_of_pixels", "one_of_6_frames")
    assert np.abs(later.pixels[16, 20].astype(int) - [110, 0, 0]).max() < 14
    assert load_picture(image.copy()).n_frames == 1
    with Image.open(io.BytesIO(animation(format))) as image:
        image.thumbnail((32, 32))
        small = load_picture(image)
        assert image.size == (32, 26) == small.pixels.shape[1::-1]  # what the caller did to it stays
    with Image.open(io.BytesIO(encoded(image.convert("RGB"), "GIF"))) as still:
        still.load()
    assert load_picture(still).notes == ("hash_of_pixels",)  # after its file was closed


def test_animations_that_are_transparent_damaged_or_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hidden is not what a viewer sees; what was read of a cut one counts; every frame before one is decoded,
    so that a bomb of a million frames would take hours."""
    frames = [Image.new("RGBA", (40, 32), (20 + 40 * i, 0, 0, 0 if i == 1 else 255)) for i in range(3)]
    video = video_of(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100, blend=0), 3)
    assert [frame.pixels[5, 5].tolist() for frame in video.frames] == [[20, 0, 0], [255] * 3, [100, 0, 0]]
    assert "alpha_on_white" in video.notes
    data = animation("GIF", 12)
    video = video_of(data[: len(data) * 2 // 3], 6)
    assert len(video.frames) == 5 and "undecodable_from_frame:5:truncated" in video.notes
    monkeypatch.setattr("x2dfd.animations._MAX_PIXELS", 4 * 40 * 32)
    video = video_of(animation("GIF", 6), 2)
    assert [frame.index for frame in video.frames] == [1, 3]
    assert "decoding_limit_reached" in video.notes and video.duration_s is None
    pages = load_media(animation("TIFF"))  # a scan of several pages does not move
    assert isinstance(pages, Picture) and "first_of_6_frames" in pages.notes
