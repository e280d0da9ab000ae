"""From untrusted bytes to pixels: every picture and video enters here; what cannot be read leaves as one `InputError`.

What a file is, is decided by its first bytes, never by its name. Formats come from an allow-list, the pixel count is
checked before anything is decoded, and video containers are opened from local bytes with the format stated, so that
no playlist or link inside a file is followed.

Codes: `not_found`, `not_a_file`, `unreadable`, `empty_file`, `file_too_large`, `url_not_allowed`, `not_an_image`,
`unsupported_format`, `too_many_pixels`, `too_small`, `truncated`, `corrupt`, `bad_video`, `is_video`.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import logging
import os
import re
import stat
import struct
import sys
import tempfile
import threading
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError, features

from x2dfd.errors import InputError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_PIXELS = 50_000_000
"""Per picture and per video frame, checked before decoding."""
MIN_SIDE = 16
"""Pixels; nothing smaller can hold a face."""
MAX_BYTES = 500_000_000
"""Per file."""
MAX_VIDEO_FRAMES = 500_000
"""Per video: more than four hours at 30 frames a second."""

Source = str | Path | bytes | Image.Image

_MAX_KEPT_PIXELS = 4 * MAX_PIXELS  # of all sampled frames together: 600 MB of RGB
_MAX_DECODED_PIXELS = 50_000_000_000  # per video: 24,000 frames of 1080p, minutes on two cores
_MAX_JPEG_SCANS = 100  # a progressive photo has about ten; every scan costs a pass over all coefficients
_MAX_SEGMENTS = 10_000  # pieces of metadata before the picture; Pillow reads them one by one in Python
_MAX_GIF_BLOCKS = 2_000_000
_MAX_TIFF_TAGS = 200_000

# Pillow reports some broken TIFFs through logging; without a handler Python would print them on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def _not_checked() -> dict[str, Any]:
    return {"state": "not_checked"}


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: NDArray[np.uint8]  # [H, W, 3] RGB, EXIF orientation applied
    sha256: str  # of the file's bytes; for an image object see the note `hash_of_pixels`
    format: str  # "JPEG", "PNG", ...; "PIL" for an image object
    n_frames: int  # pictures in the file; the first one is decoded
    notes: tuple[str, ...]  # what decoding changed: "exif_orientation:6", "alpha_on_white", ...
    path: str | None  # as given by the caller; None for bytes and image objects
    file: dict[str, Any] = field(default_factory=dict)  # of the file: `bytes`, `modified` (of a path), `exif`
    provenance: dict[str, Any] = field(default_factory=_not_checked)  # see x2dfd.provenance


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded frame of a video."""

    index: int  # position in presentation order, from 0
    time_s: float  # since the first frame
    pixels: NDArray[np.uint8]  # [H, W, 3] RGB, rotation applied


@dataclass(frozen=True, eq=False)
class Video:
    """Frames sampled evenly over a clip."""

    sha256: str  # of the file's bytes
    format: str  # container: "mov", "matroska", "avi", "mpegts", "flv", "ogg"
    width: int  # of the first sampled frame, rotation applied
    height: int
    n_frames: int  # in the whole clip
    duration_s: float | None  # from the frames' times; None when the file does not give any
    frames: tuple[Frame, ...]  # in time order
    notes: tuple[str, ...]  # what decoding changed or could not read: "rotation:90", ...
    path: str | None  # as given by the caller; None for bytes
    file: dict[str, Any] = field(default_factory=dict)  # of the file: `bytes`, `modified` (of a path)
    provenance: dict[str, Any] = field(default_factory=_not_checked)  # see x2dfd.provenance


def load_media(source: Source, *, max_frames: int = 16) -> Picture | Video:
    """Decode a picture, or up to `max_frames` evenly spaced frames of a video; content decides which.

    `source` is a local path, the file's bytes, or a PIL image. Raises InputError for whatever cannot be judged.
    """
    if max_frames < 1:
        raise ValueError("max_frames must be at least 1")
    if isinstance(source, Image.Image):
        return _from_image(source)
    with _open(source) as (file, path):
        kind, name = _sniff(file)
        media = _load_video(file, name, max_frames, path) if kind == "video" else _load_file(file, name, path)
        return replace(media, file=_file_facts(file, path) | media.file)


def load_picture(source: Source) -> Picture:
    """Decode a picture. Raises InputError; the code is `is_video` when the content is a video."""
    if isinstance(source, Image.Image):
        return _from_image(source)
    with _open(source) as (file, path):
        kind, name = _sniff(file)
        if kind == "video":
            raise InputError("is_video", f"this is a video ({name}), and a picture is needed")
        return _load_file(file, name, path)


def media_summary(media: Picture | Video) -> dict[str, Any]:
    """What `Report.media` holds: kind, format, width, height, n_frames, notes; for a video also duration and frames.

    Of a file also its size in bytes, when it was last modified, and a summary of its EXIF.
    """
    if isinstance(media, Picture):
        height, width = media.pixels.shape[:2]
        kind = "image"
    else:
        height, width = media.height, media.width
        kind = "video"
    summary: dict[str, Any] = {
        "kind": kind,
        "format": media.format,
        "width": width,
        "height": height,
        "n_frames": media.n_frames,
        "notes": list(media.notes),
        **media.file,
    }
    if isinstance(media, Video):
        summary["duration_s"] = media.duration_s
        summary["frames"] = [frame.index for frame in media.frames]
    return summary


def find_media(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield files as they are, and every regular file under each folder, in sorted order.

    Hidden files and folders are left out, and so are links that lead out of the folder or to another folder.
    Text files and the like are yielded too: they become rows with an error, not silence. The same holds for a path
    that does not exist and for a folder that may not be read.
    """
    for given in paths:
        path = Path(given)
        try:
            folder = path.is_dir()
        except OSError:  # below a folder that may not be read, or a name that is too long
            folder = False
        if folder:
            yield from _walk(path, path.resolve())
        else:
            yield path


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))  # names alone: of a million files scandir's entries are hundreds of MB
    except OSError:
        yield folder  # loading it fails with a reason, which is the row that the user needs
        return
    for name in names:
        if name.startswith("."):
            continue
        path = folder / name
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:  # gone since it was listed
            continue
        except OSError:
            yield path  # loading it fails with a reason
            continue
        if stat.S_ISDIR(mode):
            yield from _walk(path, root)
        elif stat.S_ISREG(mode) or (stat.S_ISLNK(mode) and path.is_file() and path.resolve().is_relative_to(root)):
            yield path


# --- what is it ---------------------------------------------------------------------------------------------------

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two letters or more: "C:" is a drive


@contextmanager
def _open(source: str | Path | bytes) -> Iterator[tuple[BinaryIO, str | None]]:
    if isinstance(source, bytes):
        _check_bytes(len(source))
        yield io.BytesIO(source), None
        return
    path = str(source)
    local = os.path.lexists(path) if "\0" not in path else False
    if "://" in path or (_SCHEME.match(path) and not local):
        raise InputError("url_not_allowed", "only local files are read; fetch the address first")
    try:
        info = os.stat(path)
        # asked before opening: opening a pipe would wait for its other end
        if not stat.S_ISREG(info.st_mode):
            raise InputError("not_a_file", "this is not a regular file")
        _check_bytes(info.st_size)
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening belongs inside this try
    except ValueError as error:  # a NUL in the name
        raise InputError("not_found", "there is no such file") from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise InputError("not_found", "there is no such file") from error
        raise InputError("unreadable", f"the file cannot be read: {error.strerror}") from error
    with file:
        yield file, path


def _file_facts(file: BinaryIO, path: str | None) -> dict[str, Any]:
    if path is None:
        return {"bytes": file.seek(0, os.SEEK_END)}
    info = os.fstat(file.fileno())
    return {"bytes": info.st_size, "modified": datetime.fromtimestamp(int(info.st_mtime), UTC).isoformat()}


def _check_bytes(size: int) -> None:
    if size == 0:
        raise InputError("empty_file", "the file is empty")
    if size > MAX_BYTES:
        raise InputError("file_too_large", f"{size:,} bytes; at most {MAX_BYTES:,} are read")


def _read(file: BinaryIO, size: int = -1) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read: {error.strerror}") from error


# Image formats by their first bytes. WEBP, AVIF and HEIF are told apart below.
_IMAGES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0\x08\0\0\0", "TIFF"),
    (b"MM\0+\0\x08\0\0", "TIFF"),
)  # fmt: skip
_VIDEOS: tuple[tuple[bytes, str], ...] = (
    (b"\x1a\x45\xdf\xa3", "matroska"),
    (b"FLV\x01", "flv"),
    (b"OggS\0", "ogg"),
)
_REFUSED: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\x01\0", "ICO"),
    (b"%!PS", "EPS"),
    (b"\0\0\x01\xba", "MPEG program stream"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF/WMV"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def _sniff(file: BinaryIO) -> tuple[str, str]:
    """("image" or "video", format), from the first bytes; raises InputError for everything else."""
    head = _read(file, 1024)
    file.seek(0)
    for magic, name in _IMAGES:
        if head.startswith(magic):
            return "image", name
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":  # "BM" alone also begins many a text
        return "image", "BMP"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "image", "WEBP"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX"):
        return "video", "avi"
    for magic, name in _VIDEOS:
        if head.startswith(magic):
            return "video", name
    if head[4:8] == b"ftyp":
        end = max(16, min(int.from_bytes(head[:4], "big"), len(head)))
        brands = {head[8:12]} | {head[i : i + 4] for i in range(16, end, 4)}
        if brands & {b"avif", b"avis"}:
            return "image", "AVIF"
        if head[8:12] in _HEIF_BRANDS:
            return "image", "HEIF"
        return "video", "mov"
    # QuickTime before `ftyp`; a first byte from 0x20 on is text, as the box would be larger than any file read here
    if head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip") and head[0] < 0x20:
        return "video", "mov"
    for offset, step in ((0, 188), (4, 192)):  # plain, and with a time stamp before each packet
        if head[offset::step][:3] == b"GGG":
            return "video", "mpegts"
    for magic, name in _REFUSED:
        if head.startswith(magic):
            raise InputError("unsupported_format", f"{name} is not supported")
    raise InputError("not_an_image", "the content is neither a picture nor a video that can be read")


# --- pictures -----------------------------------------------------------------------------------------------------

_PILLOW = threading.RLock()  # warning filters are global to the process: two threads would restore each other's


@contextmanager
def _pillow(notes: list[str]) -> Iterator[None]:
    """Run Pillow: its warnings become notes, its many exceptions one InputError."""
    with _PILLOW, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            raise InputError("too_many_pixels", f"more pixels than the {MAX_PIXELS:,} that are decoded") from error
        except UnidentifiedImageError as error:
            raise InputError("corrupt", "the picture's header cannot be read") from error
        except MemoryError as error:
            raise InputError("unreadable", "not enough memory to decode the picture") from error
        except Exception as error:  # a parser fed with hostile bytes raises nearly anything
            reason = _plain(f"{type(error).__name__}: {error}")
            cut = isinstance(error, EOFError) or "truncated" in reason.lower()
            raise InputError("truncated" if cut else "corrupt", f"decoding failed ({reason})") from error
    # too many pixels is no remark: the caller's own check refuses them
    bombs = Image.DecompressionBombWarning
    notes += [f"warning:{_plain(str(w.message))}" for w in caught if not issubclass(w.category, bombs)]


# Its messages begin with the file's name, which is Pillow's, or with the function or the codec that complains.
_LIBTIFF = re.compile(
    rb"tempfile\.tif|\w*(TIFF|Decode|Setup|Predictor|JPEG|LZW|ZIP|LZMA|ZSTD|WebP|Fax|Luv|PixarLog)\w*[:,]"
)


@contextmanager
def _libtiff_messages(notes: list[str]) -> Iterator[None]:
    """libtiff prints on file descriptor 2 from C, and its complaints are all that tells of damage: note the first."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # a service without stderr
        yield
        return
    with tempfile.TemporaryFile() as messages, open(kept, "wb") as stderr:
        os.dup2(messages.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            messages.seek(0)
            lines = messages.read().splitlines(keepends=True)
            ours = [line for line in lines if _LIBTIFF.match(line)]
            stderr.writelines(line for line in lines if line not in ours)  # another thread's
            notes += [f"warning:{_plain(line.decode(errors='replace'))}" for line in ours[:1]]


def _plain(text: str, limit: int = 120) -> str:
    """Text out of a file or a parser, safe to print on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError("too_many_pixels", f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
    if min(width, height) < MIN_SIDE:
        raise InputError("too_small", f"{width} x {height} pixels; a side has at least {MIN_SIDE}")


def _load_file(file: BinaryIO, name: str, path: str | None) -> Picture:
    data = _read(file)
    _check_bytes(len(data))
    _require_decoder(name)
    notes: list[str] = []
    n_frames = _check_structure(data, name, notes)
    with _pillow(notes):
        image = Image.open(io.BytesIO(data), formats=[name])
        _check_size(*image.size)
        if n_frames is None:
            n_frames = int(getattr(image, "n_frames", 1))
        if n_frames > 1:
            notes.append(f"first_of_{n_frames}_frames")
        depth = _sample_bits(image, data)
        orientation, inverted = 1, False
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
            inverted = image.tag_v2.get(262) == 0  # WhiteIsZero
            turned = image.tag_v2.get(274, 1)  # by Pillow, while loading; other formats it leaves as they are
            with _libtiff_messages(notes):
                image.load()
            if turned in _TURN:
                notes.append(f"exif_orientation:{turned}")
        else:
            orientation = _walk_ifds(image.info.get("exif", b"").removeprefix(b"Exif\0\0")).orientation
            image.load()
        exif = _exif_summary(image, notes)
    pixels = _rgb(image, depth, inverted, orientation, notes)
    digest = hashlib.sha256(data).hexdigest()
    return Picture(pixels, digest, name, n_frames, tuple(dict.fromkeys(notes)), path, {"exif": exif} if exif else {})


_EXIF = {271: "make", 272: "model", 305: "software", 306: "changed", 36867: "taken", 36868: "digitised"}
"""Tags of EXIF 3.0 that are quoted. Names, comments, serial numbers and coordinates are not: they are about people."""


def _exif_summary(image: Image.Image, notes: list[str]) -> dict[str, str]:
    """Camera, software and times as the file states them (anyone can write them), and whether it states a place."""
    try:
        tags = image.getexif()
        found = dict(tags) | dict(tags.get_ifd(0x8769))
        place = bool(tags.get_ifd(0x8825))
    except Exception as error:  # a parser fed with hostile bytes raises nearly anything; the picture itself was read
        notes.append(f"exif_unreadable:{type(error).__name__}")
        return {}
    said = {name: _plain(str(found[tag]), 80) for tag, name in _EXIF.items() if found.get(tag)}
    return said | ({"place": "stated, not copied here"} if place else {})


def _from_image(image: Image.Image) -> Picture:
    """The hash covers what decides the pixels: mode, size, palette, transparency, profile, orientation and raw data."""
    notes = ["hash_of_pixels"]
    _check_size(*image.size)
    with _pillow(notes):
        image.load()
        orientation = image.getexif().get(274, 1)
        palette = (image.palette.mode, image.palette.tobytes()) if image.palette else None
        profile = image.info.get("icc_profile")
        facts = (image.mode, image.size, palette, image.info.get("transparency"), profile, orientation)
        digest = hashlib.sha256(repr(facts).encode())
        digest.update(image.tobytes())
    pixels = _rgb(image, 16, False, orientation, notes)
    return Picture(pixels, digest.hexdigest(), "PIL", 1, tuple(dict.fromkeys(notes)), None)


def _require_decoder(name: str) -> None:
    if name == "HEIF":
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError as error:
            reason = "HEIF/HEIC needs the package pillow-heif, which is not installed: save the photo as JPEG"
            raise InputError("unsupported_format", reason) from error
    if name in ("WEBP", "AVIF") and not features.check(name.lower()):
        raise InputError("unsupported_format", f"this installation of Pillow cannot read {name}")
    if name not in Image.OPEN:
        Image.init()
    if name not in Image.OPEN:  # Image.open would answer with a bare KeyError
        raise InputError("unsupported_format", f"this installation of Pillow cannot read {name}")


def _check_structure(data: bytes, name: str, notes: list[str]) -> int | None:
    """Refuse files built to keep a decoder busy. The number of pictures, where Pillow would count them slowly."""
    if name == "GIF":
        frames, whole = _count_gif_frames(data)
        if not whole:
            notes.append("frames_not_all_counted")
        return max(frames, 1)
    if name == "JPEG":
        _check_directories(_check_jpeg(data))
        return None
    pages = 1
    # WEBP, PNG, AVIF and HEIF carry EXIF as a TIFF of its own somewhere inside
    for start in [0] if name == "TIFF" else [m.start() for m in re.finditer(rb"II\*\0|MM\0\*", data)][:16]:
        pages = _check_directories(data[start:])
    return pages if name == "TIFF" else None


def _corrupt(reason: str) -> NoReturn:
    raise InputError("corrupt", reason)


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a JPEG marker with a length: no stuffing, fill or restart


def _check_jpeg(data: bytes) -> bytes:
    """Limit scans and segments; return the EXIF blob, joined over its segments as Pillow joins it."""
    exif: list[bytes] = []
    scans, at = 0, 2
    for _ in range(_MAX_SEGMENTS):
        marker = _MARKER.search(data, at)
        if marker is None or marker[1] == b"\xd9":
            return b"".join(exif)
        if scans == 0 and marker.start() - at > 65_536:
            _corrupt("the JPEG's segments do not follow each other")
        at = marker.end()
        end = at + max(int.from_bytes(data[at : at + 2], "big"), 2)
        if marker[1] == b"\xe1" and data[at + 2 : at + 8] == b"Exif\0\0":
            exif.append(data[at + 8 : end])
        scans += marker[1] == b"\xda"
        if scans > _MAX_JPEG_SCANS:
            _corrupt(f"the JPEG has more than {_MAX_JPEG_SCANS} scans")
        at = end
    _corrupt(f"the JPEG has more than {_MAX_SEGMENTS} segments")


def _count_gif_frames(data: bytes) -> tuple[int, bool]:
    """Frames in a GIF, and whether the whole file was walked; nothing is decoded."""

    def colours(at: int) -> int:
        flags = data[at] if at < len(data) else 0
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames = blocks = 0
    at = 13 + colours(10)
    while at < len(data) and data[at] in b",!":  # image, extension
        if data[at] == ord(","):
            frames += 1
            at += 11 + colours(at + 9)
        else:
            at += 2
        while at < len(data) and data[at]:
            at += data[at] + 1
            blocks += 1
            if frames == 0 and blocks > _MAX_SEGMENTS:
                _corrupt("the GIF has too much data before its first frame")
            if blocks > _MAX_GIF_BLOCKS:
                return frames, False
        at += 1
    return frames, True


@dataclass(frozen=True)
class _Directories:
    pages: int  # directories in the main chain
    claimed: int  # bytes that all tags say they hold
    orientation: int  # 1 when not given


_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SUB_DIRECTORIES = (34665, 34853, 40965)  # Exif, GPS, interoperability: those that Pillow follows


def _walk_ifds(blob: bytes) -> _Directories:
    """Walk the tag directories of a TIFF or an EXIF blob without reading any tag's data (TIFF 6.0, BigTIFF)."""
    order = {b"II": "<", b"MM": ">"}.get(blob[:2])
    if order is None or len(blob) < 16:
        return _Directories(0, 0, 1)
    big = struct.unpack_from(order + "H", blob, 2)[0] == 43
    count_format, tag_format, next_format = ("Q", "HHQQ", "Q") if big else ("H", "HHLL", "L")
    step, word, inline = (20, 8, 8) if big else (12, 4, 4)
    pages = claimed = tags = 0
    orientation = 1
    queue = [(struct.unpack_from(order + next_format, blob, 8 if big else 4)[0], True)]
    seen: set[int] = set()
    while queue:
        at, is_page = queue.pop()
        start = at + struct.calcsize(order + count_format)
        if at == 0 or at in seen or start > len(blob):
            continue
        seen.add(at)
        pages += is_page
        n = min(struct.unpack_from(order + count_format, blob, at)[0], (len(blob) - start) // step)
        tags += n + 1
        if tags > _MAX_TIFF_TAGS:
            _corrupt(f"more than {_MAX_TIFF_TAGS} tags")
        for tag, kind, count, value in struct.iter_unpack(order + tag_format, blob[start : start + n * step]):
            size = count * _TYPE_BYTES.get(kind, 0)
            if inline < size <= len(blob):  # longer than the file: refused by whoever reads it
                claimed += size
            if tag in _SUB_DIRECTORIES:
                queue.append((value, False))
            elif tag == 274 and is_page and pages == 1 and kind == 3:
                orientation = value >> (8 * inline - 16) if order == ">" else value & 0xFFFF
        end = start + n * step
        if is_page and end + word <= len(blob):
            queue.append((struct.unpack_from(order + next_format, blob, end)[0], True))
    return _Directories(pages, claimed, orientation)


def _check_directories(blob: bytes) -> int:
    """Tags that all point at the same megabytes would make Pillow copy them once each."""
    found = _walk_ifds(blob)
    if found.claimed > 2 * len(blob) + 1_000_000:
        _corrupt("the tags claim more data than the file holds")
    return max(found.pages, 1)


_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)  # none, CCITT, LZW, JPEG, deflate, PackBits: no rare decoder


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    compression = image.tag_v2.get(259, 1)
    if compression not in _TIFF_COMPRESSIONS:
        raise InputError("unsupported_format", f"TIFF compression {compression} is not supported")
    width, height = image.tag_v2.get(322, 1), image.tag_v2.get(323, 1)
    if width * height > MAX_PIXELS:
        raise InputError("too_many_pixels", f"tiles of {width} x {height} pixels")


def _sample_bits(image: Image.Image, data: bytes) -> int:
    """Bits of a sample as stored; Pillow halves 16-bit colour without a word."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(max(image.tag_v2.get(258, (8,))))
    return 16 if image.mode.startswith("I") else 8


# What undoes each EXIF orientation: quarter turns counterclockwise, after an optional left-right mirror.
_TURN: dict[int, tuple[bool, int]] = {
    2: (True, 0), 3: (False, 2), 4: (True, 2), 5: (True, 1), 6: (False, 3), 7: (True, 3), 8: (False, 1),
}  # fmt: skip


def _rgb(image: Image.Image, bits: int, inverted: bool, orientation: int, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W, 3] RGB, upright, in sRGB, on white."""
    if image.mode.startswith("I") or image.mode == "F":
        profile = image.info.get("icc_profile")
        image = Image.fromarray(_to_8_bit(image, bits, inverted, notes))
        if profile:
            image.info["icc_profile"] = profile
    elif bits == 16 and image.format in ("PNG", "TIFF"):
        notes.append("16bit_to_8bit")
    with _pillow(notes):
        colour, alpha = _split_alpha(image)
        colour = _to_srgb(colour, image.info.get("icc_profile"), notes)
        if colour.mode == "CMYK":
            notes.append("cmyk_to_rgb")
        if colour.mode != "RGB":
            colour = colour.convert("RGB")
        if alpha is not None and alpha.getextrema()[0] != 255:
            notes.append("alpha_on_white")
            colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    pixels = np.array(colour, dtype=np.uint8)  # [H, W, 3]
    if orientation in _TURN:
        notes.append(f"exif_orientation:{orientation}")
        mirror, turns = _TURN[orientation]
        pixels = np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirror else pixels, turns))
    return pixels


def _to_8_bit(image: Image.Image, bits: int, inverted: bool, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W] grey from integers of up to 16 bits, or from floats between 0 and 1."""
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and high <= 1):  # also when either is NaN
            raise InputError("unsupported_format", "floating-point samples outside 0 to 1 have no agreed white")
        white = 1.0
        notes.append("float_to_8bit")
    else:
        if low < 0 or high > 65_535 or bits > 16:
            raise InputError("unsupported_format", "integer samples of more than 16 bits have no agreed white")
        white = 4095.0 if bits == 12 else 65_535.0
        notes.append(f"{12 if bits == 12 else 16}bit_to_8bit")
    grey = np.minimum(values / white, 1.0)
    if inverted:
        grey = 1.0 - grey
    return np.round(grey * 255).astype(np.uint8)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour as L, RGB or CMYK, and the alpha channel if there is one."""
    if image.mode in ("La", "RGBa"):
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode in ("RGBA", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _to_srgb(image: Image.Image, profile_bytes: bytes | None, notes: list[str]) -> Image.Image:
    if not profile_bytes:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile_bytes))
        name = _plain(ImageCms.getProfileDescription(profile), 60)
        if "srgb" in name.lower():
            return image  # a round trip would only add rounding
        if profile.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")  # grey pictures often carry the camera's colour profile
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notes.append(f"icc_ignored:{_plain(str(error), 60)}")
        return image
    if converted is None:  # only in-place conversion answers None
        raise RuntimeError("profileToProfile gave no image")
    notes.append(f"icc_to_srgb:{name}")
    return converted


# --- videos -------------------------------------------------------------------------------------------------------

_SEEKABLE = ("mov", "matroska")  # their index names key frames exactly; other containers are decoded in sequence
_CODECS = (
    "h264,hevc,vp8,libvpx,vp9,libvpx-vp9,av1,libdav1d,libaom-av1,mpeg4,msmpeg4,msmpeg4v2,mpeg1video,mpeg2video,"
    "h263,flv,mjpeg,prores,dnxhd,theora,ffv1,huffyuv,ffvhuff,utvideo,rawvideo,png,cinepak,svq3,vc1,wmv3,dvvideo"
)


def _refuse_open(*_: object) -> NoReturn:
    raise OSError(errno.EACCES, "a media file may not open another")


def _load_video(file: BinaryIO, container_name: str, max_frames: int, path: str | None) -> Video:
    digest = hashlib.sha256()
    while chunk := _read(file, 1 << 20):
        digest.update(chunk)
    notes: list[str] = []
    with _container(file, container_name) as (container, stream):
        timeline = _timeline(container, stream)
        rate = float(stream.average_rate or 0) or None
        stated = (container.duration or 0) / 1_000_000  # FFmpeg's AV_TIME_BASE
    n = len(timeline.pts)
    if n == 0:
        raise InputError("bad_video", "the video track has no frames")
    with _container(file, container_name) as (container, stream):  # afresh: it was read to its end
        frames = _sample(container, stream, timeline, rate, max_frames, notes)
    if not frames:
        raise InputError("bad_video", "no frame of the video can be decoded")
    duration = None
    if timeline.timed and rate:
        duration = (timeline.pts[-1] - timeline.pts[0]) * timeline.time_base + 1 / rate
    elif rate:
        duration = n / rate
    if duration and stated > 1.1 * duration + 0.5:
        notes.append(f"file_says_{stated:.1f}_s")  # cut short, or the sound goes on alone
    height, width = frames[0].pixels.shape[:2]
    remarks = tuple(dict.fromkeys(notes))
    return Video(digest.hexdigest(), container_name, width, height, n, duration, tuple(frames), remarks, path)


@contextmanager
def _container(file: BinaryIO, name: str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its main video stream; every FFmpeg error inside becomes `bad_video`."""
    import av
    from av.video.stream import VideoStream

    file.seek(0)
    # whatever is inside: no other file, no network, no exotic decoder, no oversized frame
    options = {"protocol_whitelist": "none", "codec_whitelist": _CODECS, "max_pixels": str(MAX_PIXELS)}
    try:
        with av.open(file, mode="r", format=name, options=options, io_open=_refuse_open) as container:
            stream = container.streams.best("video")
            if not isinstance(stream, VideoStream):
                raise InputError("bad_video", "there is no video track")
            # no context at all means that FFmpeg has no decoder for the track
            if stream.codec_context is None or stream.codec_context.name not in _CODECS.split(","):
                raise InputError("unsupported_format", "the video's codec is not supported")
            if stream.codec_context.width and stream.codec_context.height:
                _check_size(stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError, OverflowError, MemoryError) as error:
        reason = _plain(getattr(error, "strerror", None) or str(error))
        raise InputError("bad_video", f"the video cannot be read ({reason})") from error


@dataclass(frozen=True)
class _Timeline:
    pts: list[int]  # of every frame in presentation order; without times, simply 0, 1, 2, ...
    keys: list[int]  # positions of key frames in `pts`, ascending
    key_dts: list[int]  # where to seek for each of them
    timed: bool  # whether `pts` are times
    time_base: float  # seconds per unit of pts


def _timeline(container: InputContainer, stream: VideoStream) -> _Timeline:
    """Read all packets without decoding any."""
    packets: list[tuple[int | None, int | None, bool]] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.dts, packet.is_keyframe))
        if len(packets) > MAX_VIDEO_FRAMES:
            raise InputError("file_too_large", f"the video has more than {MAX_VIDEO_FRAMES:,} frames")
    base = float(stream.time_base or 0)
    pts = sorted(p for p, _, _ in packets if p is not None)
    timed = base > 0 and len(pts) == len(packets) == len(set(pts))
    if not timed:
        return _Timeline(list(range(len(packets))), [], [], False, base)
    position = {p: i for i, p in enumerate(pts)}
    keys = sorted((position[p], p if d is None else d) for p, d, is_key in packets if is_key and p is not None)
    return _Timeline(pts, [k for k, _ in keys], [d for _, d in keys], True, base)


def _sample(
    container: InputContainer,
    stream: VideoStream,
    timeline: _Timeline,
    rate: float | None,
    max_frames: int,
    notes: list[str],
) -> list[Frame]:
    """The middles of equal stretches of the clip; from key frame to key frame where the container can seek."""
    n = len(timeline.pts)
    decoder = _Decoder(container, stream, timeline)
    frames: list[Frame] = []
    kept = 0
    wanted = min(max_frames, n)
    seekable = timeline.timed and container.format.name.split(",")[0] in _SEEKABLE
    for target in ((2 * j + 1) * n // (2 * wanted) for j in range(wanted)):
        if frames and target <= frames[-1].index:
            continue  # frames in between could not be decoded
        k = bisect_right(timeline.keys, target) - 1
        if seekable and k >= 0 and timeline.keys[k] > decoder.position:
            decoder.seek(timeline.key_dts[k], timeline.keys[k])
        found = decoder.next_from(target)
        if found is None:
            break
        index, frame = found
        kept += frame.width * frame.height
        if kept > _MAX_KEPT_PIXELS:
            notes.append(f"memory_limit_after_{len(frames)}_frames")
            break
        if frame.is_corrupt:
            notes.append(f"damaged_frame:{index}")
        pixels = _frame_pixels(frame, notes)
        if timeline.timed:
            time_s = (timeline.pts[index] - timeline.pts[0]) * timeline.time_base
        else:
            time_s = index / rate if rate else 0.0
        frames.append(Frame(index, time_s, pixels))
    if decoder.broken:
        notes.append(f"undecodable_packets:{decoder.broken}")
    if decoder.spent:
        notes.append("decoding_limit_reached")
    if len(frames) < wanted:
        notes.append(f"frames_missing:{wanted - len(frames)}")
    return frames


class _Decoder:
    """Frames in presentation order with their positions, within a budget of decoded pixels."""

    def __init__(self, container: InputContainer, stream: VideoStream, timeline: _Timeline) -> None:
        self.position = 0  # of the next frame
        self.broken = 0  # packets that could not be decoded
        self.spent = False
        self._container, self._stream, self._timeline = container, stream, timeline
        self._budget = _MAX_DECODED_PIXELS
        self._frames = self._decode()

    def seek(self, dts: int, position: int) -> None:
        self._container.seek(dts, stream=self._stream, backward=True)
        self.position = position
        self._frames = self._decode()

    def next_from(self, target: int) -> tuple[int, VideoFrame] | None:
        """The first frame at or after `target`; None at the end of the clip or of the budget."""
        for frame in self._frames:
            if self._timeline.timed and frame.pts is not None:
                index = min(bisect_left(self._timeline.pts, frame.pts), len(self._timeline.pts) - 1)
            else:
                index = min(self.position, len(self._timeline.pts) - 1)
            self.position = index + 1
            if index >= target:
                return index, frame
        return None

    def _decode(self) -> Iterator[VideoFrame]:
        import av

        for packet in self._container.demux(self._stream):
            try:
                frames = packet.decode()
            except av.InvalidDataError:
                self.broken += 1  # one damaged packet does not spoil the clip
                continue
            except EOFError:
                return
            for frame in frames:
                self._budget -= frame.width * frame.height
                if self._budget < 0:
                    self.spent = True
                    return
                yield frame


def _frame_pixels(frame: VideoFrame, notes: list[str]) -> NDArray[np.uint8]:
    """[H, W, 3] RGB, turned as the file says."""
    _check_size(frame.width, frame.height)
    if frame.color_trc in (16, 18):  # PQ and HLG (ITU-T H.273)
        notes.append("hdr_not_tone_mapped")
    pixels: NDArray[np.uint8] = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    turns = round(frame.rotation / 90) % 4
    if turns:
        notes.append(f"rotation:{90 * turns}")
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
    return pixels
