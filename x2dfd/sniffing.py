"""Finds a file's format by its first bytes, and refuses files built to keep a decoder busy, without decoding them.

A file's name never counts. Formats come from an allow-list, and `Budget` limits the cost of one file of any format.
"""

from __future__ import annotations

import os
import re
import struct
import time
from dataclasses import dataclass
from typing import BinaryIO

from x2dfd.errors import InputError

MAX_PIXELS = 50_000_000
"""Per picture and per video frame, checked before decoding."""
MIN_SIDE = 16
"""Pixels; nothing smaller can hold a face."""
MAX_BYTES = 500_000_000
"""Per file."""

_PIECES = 2_000_000  # at most, of a file of any size
_PASSES = 4  # over the file's bytes, before a picture is decoded
_MAX_JPEG_SCANS = 100  # a progressive photo has about ten; every scan costs a pass over all coefficients
_MAX_SCANNED_PIXELS = 2_000_000_000  # pixels times scans
_MAX_GIF_BLOCKS = 2_000_000


@dataclass
class Budget:
    """A limit on the cost of parsing one file of any format: pieces that are walked one by one, and bytes copied.

    A piece is a unit of a parser: a read, a chunk, a box, a tag. Slow pieces count as several, so that parsing ends
    within about two seconds.
    """

    pieces: int
    copied: int

    @classmethod
    def of(cls, size: int) -> Budget:
        """For a file of `size` bytes: a GIF of full blocks needs half of these pieces, and nothing needs more."""
        return cls(min(50_000 + size // 64, _PIECES), _PASSES * size + 1_000_000)

    def spend(self, pieces: int, copied: int = 0) -> None:
        """Count a cost. Raises InputError when the limit is exceeded."""
        self.pieces -= pieces
        self.copied -= copied
        if self.pieces < 0:
            raise InputError("corrupt", "the file is cut into more pieces than a picture or a video has")
        if self.copied < 0:
            raise InputError("corrupt", "the file's parts claim more data than it holds")


class Metered:
    """A file whose reads count against a budget, which stops any library's parser on endless small pieces.

    `seconds`: CPU time of this thread from opening to the last read at most; None where decoding counts pixels instead.
    """

    def __init__(self, file: BinaryIO, budget: Budget, seconds: float | None = None) -> None:
        self._file, self._budget = file, budget
        self._until = None if seconds is None else time.thread_time() + seconds

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._budget.spend(1, len(data))
        if self._until is not None and time.thread_time() > self._until:
            raise InputError("bad_video", "the file takes too long to look through")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def plain(text: str, limit: int = 120) -> str:
    """Text out of a file or a parser, safe to print on one line."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]


def check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError("too_many_pixels", f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")
    if min(width, height) < MIN_SIDE:
        raise InputError("too_small", f"{width} x {height} pixels; a side has at least {MIN_SIDE}")


def check_bytes(size: int) -> None:
    if size == 0:
        raise InputError("empty_file", "the file is empty")
    if size > MAX_BYTES:
        raise InputError("file_too_large", f"{size:,} bytes; at most {MAX_BYTES:,} are read")


def read(file: BinaryIO | Metered, size: int = -1) -> bytes:
    try:
        return file.read(size)
    except OSError as error:
        raise InputError("unreadable", f"the file cannot be read: {error.strerror}") from error


# Formats by their first bytes. The others are told apart in `sniff`.
_IMAGES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    ((b"GIF87a", b"GIF89a"), "GIF"),
    ((b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"), "TIFF"),
)
_VIDEOS = ((b"\x1a\x45\xdf\xa3", "matroska"), (b"FLV\x01", "flv"), (b"OggS\0", "ogg"))
_REFUSED = (
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    ((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "JPEG 2000"),
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL"),
    (b"\0\0\x01\0", "ICO"),
    (b"%!PS", "EPS"),
    (b"\0\0\x01\xba", "MPEG program stream"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "ASF/WMV"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}


def sniff(file: BinaryIO) -> tuple[str, str]:
    """("image" or "video", format), from the first bytes; raises InputError for everything else."""
    head = read(file, 1024)
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


def check_structure(data: bytes, name: str, budget: Budget, notes: list[str]) -> int | None:
    """Refuse files built to keep a decoder busy. Returns the number of pictures if Pillow would count them slowly."""
    if name == "GIF":
        return max(_count_gif_frames(data, budget, notes), 1)
    if name == "TIFF":
        return max(walk_ifds(data, budget).pages, 1)
    if name == "JPEG":
        walk_ifds(_check_jpeg(data, budget), budget)
    return None


_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a JPEG marker with a length: no stuffing, fill or restart
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15; the others are tables
_MAX_EXIF = 20_000_000  # bytes; Pillow joins the segments one by one, each time copying all before it


def _check_jpeg(data: bytes, budget: Budget) -> bytes:
    """Limit scans and segments; return the EXIF blob, joined over its segments as Pillow joins it."""
    exif: list[bytes] = []
    scans, pixels, position = 0, 0, 2
    while True:
        marker = _MARKER.search(data, position)
        if marker is None or marker[1] == b"\xd9":
            return b"".join(exif)
        if scans == 0 and marker.start() - position > 65_536:
            raise InputError("corrupt", "the JPEG's segments do not follow each other")
        budget.spend(20)
        position = marker.end()
        end = position + max(int.from_bytes(data[position : position + 2], "big"), 2)
        if marker[1] == b"\xe1" and data[position + 2 : position + 8] == b"Exif\0\0":
            exif.append(data[position + 8 : end])
            if 65_536 * len(exif) > _MAX_EXIF:
                raise InputError("corrupt", "the JPEG's EXIF is cut into too many segments")
        if marker[1][0] in _FRAME_HEADERS:
            size = data[position + 3 : position + 7]
            pixels = int.from_bytes(size[:2], "big") * int.from_bytes(size[2:], "big")
        scans += marker[1] == b"\xda"
        if scans > _MAX_JPEG_SCANS or scans * pixels > _MAX_SCANNED_PIXELS:
            raise InputError("corrupt", f"the JPEG has {scans} scans or more of {pixels:,} pixels")
        position = end


def _count_gif_frames(data: bytes, budget: Budget, notes: list[str]) -> int:
    """Frames in a GIF, or in the part of it that was walked; nothing is decoded."""

    def colours(position: int) -> int:
        flags = data[position] if position < len(data) else 0
        return 3 << ((flags & 7) + 1) if flags & 0x80 else 0

    frames = blocks = 0
    position = 13 + colours(10)
    while position < len(data) and data[position] in b",!":  # image, extension
        is_extension = data[position] == ord("!")
        frames += not is_extension
        position += 2 if is_extension else 11 + colours(position + 9)
        while position < len(data) and data[position]:
            position += data[position] + 1
            blocks += 1
            if is_extension:  # Pillow joins a comment's blocks one by one
                budget.spend(20)
            if blocks > _MAX_GIF_BLOCKS:
                notes.append("frames_not_all_counted")
                return frames
        position += 1
    return frames


@dataclass(frozen=True)
class Directories:
    pages: int  # directories in the main chain
    orientation: int  # 1 when not given


_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SUB_DIRECTORIES = (34665, 34853, 40965)  # Exif, GPS, interoperability: those that Pillow follows


def walk_ifds(blob: bytes, budget: Budget) -> Directories:
    """Walk the tag directories of a TIFF or an EXIF blob without reading any tag's data (TIFF 6.0, BigTIFF).

    The sizes that tags claim count as copied: Pillow would copy the same megabytes once for each tag that names them.
    """
    order = {b"II": "<", b"MM": ">"}.get(blob[:2])
    if order is None or len(blob) < 16:
        return Directories(0, 1)
    big = struct.unpack_from(order + "H", blob, 2)[0] == 43
    count_format, tag_format, next_format = ("Q", "HHQQ", "Q") if big else ("H", "HHLL", "L")
    entry_bytes, offset_bytes, inline_bytes = (20, 8, 8) if big else (12, 4, 4)
    pages, orientation = 0, 1
    queue = [(struct.unpack_from(order + next_format, blob, 8 if big else 4)[0], True)]
    visited: set[int] = set()
    while queue:
        position, is_page = queue.pop()
        start = position + struct.calcsize(order + count_format)
        if position == 0 or position in visited or start > len(blob):
            continue
        visited.add(position)
        pages += is_page
        n_tags = min(struct.unpack_from(order + count_format, blob, position)[0], (len(blob) - start) // entry_bytes)
        end = start + n_tags * entry_bytes
        budget.spend(4 * (n_tags + 1))
        for tag, kind, count, value in struct.iter_unpack(order + tag_format, blob[start:end]):
            size = count * _TYPE_BYTES.get(kind, 0)
            if inline_bytes < size <= len(blob):  # a size beyond the file's is refused when it is read
                budget.spend(0, size)
            if tag in _SUB_DIRECTORIES:
                queue.append((value, False))
            elif tag == 274 and is_page and pages == 1 and kind == 3:
                orientation = value >> (8 * inline_bytes - 16) if order == ">" else value & 0xFFFF
        if is_page and end + offset_bytes <= len(blob):
            queue.append((struct.unpack_from(order + next_format, blob, end)[0], True))
    return Directories(pages, orientation)


# Boxes that hold boxes, down to the depth at which a parser would walk an endless list of them.
_BOXES = frozenset(
    {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"edts", b"dinf", b"mvex", b"moof", b"traf", b"meta"}
)


def has_index(file: BinaryIO, size: int, budget: Budget) -> bool:
    """Whether an MP4 or MOV has the box that locates its frames (ISO 14496-12); refuses a file of endless boxes."""
    has_box = False
    ranges = [(0, size)]
    while ranges:
        offset, end = ranges.pop()
        while offset + 8 <= end:
            budget.spend(20)
            file.seek(offset)
            head = read(file, 16)
            length, kind, start = int.from_bytes(head[:4], "big"), head[4:8], offset + 8
            if length == 1:
                length, start = int.from_bytes(head[8:], "big"), offset + 16
            elif length == 0:  # to the end
                length = end - offset
            if length < start - offset:
                break
            has_box = has_box or kind in (b"moov", b"moof")
            if kind in _BOXES:
                ranges.append((start, min(offset + length, end)))
            offset += length
    return has_box
