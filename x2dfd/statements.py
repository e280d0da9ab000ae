"""Reads what a file's metadata state about how it was made: IPTC digital source type, generators' settings, software.

These are in XMP, EXIF, PNG text, comments of JPEG and GIF, and tags of videos. Anyone can write or remove such a
statement, so it is never part of the estimate.

Formats: PNG (ISO/IEC 15948), JPEG (ISO/IEC 10918-1), WebP (RFC 9649), TIFF 6.0 and EXIF 3.0, XMP (ISO 16684-1). The
digital source types are IPTC's (cv.iptc.org/newscodes/digitalsourcetype). XMP is searched as text and never parsed as
XML, so that no entity is expanded; every length and count is bounded.
"""

from __future__ import annotations

import html
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from x2dfd import sniffing
from x2dfd.errors import InputError
from x2dfd.files import Json

GENERATED = "generated"  # made with a generator
PARTLY = "part_generated"  # a generator made a part of it, or reworked it
SOURCE = "source"  # any other statement about the origin

LEAD = "By its own statement, this file was made with an AI generator."
CAVEAT = (
    "Such a statement can be removed from a file, and it can be added to any file. It is separate evidence and plays "
    "no part in the estimate."
)

SOURCE_TYPES = {
    "trainedAlgorithmicMedia": (GENERATED, "made as a whole by a trained model"),
    "compositeWithTrainedAlgorithmicMedia": (PARTLY, "edited with a generator, or put together with its output"),
    "compositeSynthetic": (PARTLY, "a composite of which at least one part is synthetic"),
    "algorithmicMedia": (SOURCE, "made by an algorithm that was not trained on pictures"),
    "algorithmicallyEnhanced": (SOURCE, "a picture that an algorithm enhanced"),
    "composite": (SOURCE, "a composite of several parts"),
    "compositeCapture": (SOURCE, "a composite of several captured pictures"),
    "computationalCapture": (SOURCE, "captured by a camera that computes the picture from several"),
    "dataDrivenMedia": (SOURCE, "drawn by a program from data"),
    "digitalArt": (SOURCE, "drawn by a person with digital tools"),
    "digitalCapture": (SOURCE, "captured by a digital camera"),
    "digitalCreation": (SOURCE, "made by a person with digital tools"),
    "humanEdits": (SOURCE, "a picture that a person edited without a generator"),
    "minorHumanEdits": (SOURCE, "a picture with minor edits by a person"),
    "negativeFilm": (SOURCE, "digitised from a negative"),
    "positiveFilm": (SOURCE, "digitised from a slide"),
    "print": (SOURCE, "digitised from a print"),
    "screenCapture": (SOURCE, "a screenshot"),
    "virtualRecording": (SOURCE, "a recording of a virtual event"),
}
"""IPTC digital source types: kind of statement, and what the type says."""
_SOURCE_TYPE = "digital source type"
_CAMERA = ("computationalCapture", "digitalCapture", "negativeFilm", "positiveFilm")
_TYPES = {name.lower(): (name, *rest) for name, rest in SOURCE_TYPES.items()}

_MAX_TEXT = 1_000_000  # bytes of one piece of text, unpacked
_MAX_TEXTS = 4_000_000  # characters of all of them together
_MAX_READ = 16_000_000  # bytes of a file, unpacked ones too
_MAX_PIECES = 10_000  # chunks, segments or tags that are read
MAX_STATEMENTS = 50
_MAX_QUOTE = 200  # characters of a text that are quoted


@dataclass(frozen=True)
class _Text:
    """A piece of text in the file."""

    field: str  # its name: `parameters`, `Software`, `UserComment`, `XMP`
    place: str  # where it stands, for people
    text: str


def read_statements(source: str | Path | bytes, format: str) -> list[dict[str, str]]:
    """The statements in a file's metadata about how it was made, in the file's order: `kind`, `says`, `where`.

    `format` as in `Report.media`. JPEG, PNG, WebP and TIFF are read in full. AVIF, HEIF, GIF, MP4, Matroska and AVI are
    searched for XMP, a GIF's comment and a video's tags; other formats give nothing. `kind` is GENERATED, PARTLY or
    SOURCE. No content of a file raises; OSError where the file cannot be read.
    """
    readers: dict[str, Callable[[_BoundedFile], Iterator[_Text]]] = {
        "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "TIFF": _tiff,
        "AVIF": _xmp_search, "HEIF": _xmp_search, "GIF": _gif,
        **{name: partial(_video, name) for name in ("mov", "matroska", "avi")},
    }  # fmt: skip
    if format not in readers:
        return []
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        statements = (s for text in _bounded(readers[format](_BoundedFile(file))) for s in _statements(text))
        unique = list(islice(dict.fromkeys(islice(statements, 4 * MAX_STATEMENTS)), MAX_STATEMENTS))
    return [{"kind": kind, "says": says, "where": where} for kind, says, where in unique]


def of_generator(provenance: Json) -> list[dict[str, str]]:
    """The statements of a `Report.provenance` that the answer begins with: "made with a generator"."""
    return [s for s in provenance.get("statements") or () if s.get("kind") == GENERATED]


def of_camera(provenance: Json) -> list[dict[str, str]]:
    """The statements that a camera took the file itself; those about its ingredients do not count."""
    statements = (s for s in provenance.get("statements") or () if "ingredient" not in str(s.get("where")))
    types = tuple(f"{_SOURCE_TYPE} {name}:" for name in _CAMERA)
    return [s for s in statements if str(s.get("says")).startswith(types)]


def source_type(value: str) -> tuple[str, str]:
    """Kind and text of the statement that an IPTC digital source type makes; `value` is its address or its name."""
    name = re.split(r"[/:#]", value.strip().rstrip("/"))[-1]
    label, kind, meaning = _TYPES.get(name.lower(), (plain(name), SOURCE, "not among the types that are known here"))
    return kind, f"{_SOURCE_TYPE} {label}: {meaning}"


def plain(text: str) -> str:
    """Text out of the file: one printable line of bounded length."""
    return sniffing.plain(text[: 4 * _MAX_QUOTE], _MAX_QUOTE)


# --- statements in a text -------------------------------------------------------------------------------------------

_GENERATORS = re.compile(
    r"\b(?:DALL[·\-. ]?E|ChatGPT|GPT-4o|GPT-Image|OpenAI|Adobe Firefly|Firefly Image|Midjourney|NovelAI|InvokeAI"
    r"|ComfyUI|Fooocus|AUTOMATIC1111|Stable Diffusion|Stability AI|SDXL|DreamStudio|Draw Things|Easy Diffusion|SwarmUI"
    r"|Made with Google AI|Google Imagen|Imagen [2-9]|Gemini [2-9]|Nano Banana|Bing Image Creator|FLUX\.[12]"
    r"|Black Forest Labs|Ideogram AI|Leonardo\.?AI|StyleGAN\d?)(?!\w)",
    re.IGNORECASE,
)
"""Generators by their own names. `Imagen` and `Gemini` alone are also other things."""

_PROGRAM_FIELDS = {"software", "encoder", "source", "creator", "generator", "make", "model"}
"""Fields that name what made the file; in a caption or a prompt the same name says nothing."""

_MIDJOURNEY_JOB = re.compile(r"\bJob ID: ?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_WEB_UI = re.compile(r"Steps: \d{1,5}, [^\n]{0,200}?(?:Sampler|CFG scale|Seed): [^\n]{0,120}")
_DREAM = re.compile(r"-s ?\d{1,4} -S ?\d{1,12} ")
_AIGC_LABEL = re.compile(r"[\"']?Label[\"']?\s{0,5}:\s{0,5}[\"']?([123])")
_AIGC_LABELS = {
    "1": (GENERATED, "is generated"),
    "2": (SOURCE, "may be generated"),
    "3": (SOURCE, "is thought to be generated"),
}


def _statements(text: _Text) -> Iterator[tuple[str, str, str]]:
    """The statements in a piece of text: kind, text for people, place."""
    if program := _generator_settings(text):
        yield GENERATED, f"settings of an image generator: {plain(program)}", text.place
    field = text.field.lower()
    if field == "xmp":
        yield from _xmp_statements(text)
    elif field == "aigc":
        yield from _aigc_statements(text.text, text.place)
    elif field in _PROGRAM_FIELDS:
        yield from _name_statements(text.text, text.place)


def _generator_settings(text: _Text) -> str | None:
    """The program whose generator settings a text holds, recognised by their form; None where it holds none."""
    field, content = text.field.lower(), text.text
    if match := _WEB_UI.match(content, max(content.rfind("Steps: "), 0)):
        return f"Stable Diffusion web UI ({match[0]})"
    if '"class_type"' in content and (field == "prompt" or content.startswith("prompt:")):
        return "ComfyUI (the graph that was run)"
    if (
        field == "comment"
        and re.match(r'\s*\{"(?:prompt|workflow)"', content)
        and ("class_type" in content or "nodes" in content)
    ):
        return "ComfyUI (what was run, as a video's comment)"
    if '"nodes"' in content and (field == "workflow" or content.startswith("workflow:")):
        return "ComfyUI (the workflow)"
    if '"sui_image_params"' in content:
        return "SwarmUI"
    if field in ("invokeai_metadata", "invokeai_graph", "sd-metadata") and content.lstrip().startswith("{"):
        return "InvokeAI"
    if field == "dream" and _DREAM.search(content):
        return "InvokeAI"
    if field == "fooocus_scheme" or ('"base_model"' in content and '"sampler"' in content and '"prompt"' in content):
        return "Fooocus"
    if '"sampler"' in content and '"uc"' in content and '"seed"' in content:
        return "NovelAI"
    if field == "use_stable_diffusion_model":
        return "Easy Diffusion"
    if field in ("description", "imagedescription") and _MIDJOURNEY_JOB.search(content):
        return "Midjourney (a job's number)"
    return None


def _name_statements(name: str, place: str) -> Iterator[tuple[str, str, str]]:
    if re.search(r"\bEdited with Google AI\b", name[: 4 * _MAX_QUOTE]):
        yield PARTLY, "names a generator that edited it: Edited with Google AI", place
    elif generator_named(name):
        yield GENERATED, f"names a generator: {plain(name)}", place


def generator_named(name: str) -> bool:
    """Whether a program's name is that of a generator."""
    return _GENERATORS.search(name[: 4 * _MAX_QUOTE]) is not None


def _aigc_statements(text: str, place: str) -> Iterator[tuple[str, str, str]]:
    """The label that GB 45438-2025 asks for: 1 is, 2 may be, 3 is thought to be generated."""
    if label := _AIGC_LABEL.search(text[:10_000]):
        kind, meaning = _AIGC_LABELS[label[1]]
        yield kind, f"labelled (AIGC {label[1]}): it {meaning}", place


def _xmp_statements(text: _Text) -> Iterator[tuple[str, str, str]]:
    def place(name: str) -> str:
        return text.place.replace("XMP", f"XMP {name}", 1)

    types = [source_type(value) for value in _xmp_values(text.text, "DigitalSource(?:file)?Type")]
    for kind, says in types:
        yield kind, says, place("DigitalSourceType")
    whole = not types or any(kind == GENERATED for kind, _ in types)  # a composite names the system of its part
    for value in _xmp_values(text.text, "AISystemUsed"):
        yield GENERATED if whole else PARTLY, f"names the AI system {plain(value)}", place("AISystemUsed")
    for name in ("CreatorTool", "Credit"):
        for value in _xmp_values(text.text, name):
            yield from _name_statements(value, place(name))
    for value in filter(generator_named, _xmp_values(text.text, "softwareAgent")):  # of a step in the file's history
        yield PARTLY, f"names a generator that edited it: {plain(value)}", place("softwareAgent")
    for value in _xmp_values(text.text, "AIGC"):
        yield from _aigc_statements(value, place("AIGC"))


def _xmp_values(text: str, name: str) -> Iterator[str]:
    """The values of a property, written as an attribute, as an element, or as a resource that an element names."""
    pattern = (
        rf"(?<![A-Za-z]){name}"
        r"(?:\s{0,20}=\s{0,20}(?:\"([^\"<>]{1,300})\"|'([^'<>]{1,300})')"
        r"|\s{1,20}[^<>]{0,100}?resource\s{0,20}=\s{0,20}[\"']([^\"'<>]{1,300})[\"']"
        r"|(?:\s{1,20}[^\s=<>][^<>]{0,200})?>(?:\s{0,50}<[^<>/]{1,100}>){0,3}\s{0,50}([^<\s][^<]{0,300})<)"
    )
    for match in islice(re.finditer(pattern, text), MAX_STATEMENTS):
        yield html.unescape(next(group for group in match.groups() if group))


# --- texts in a file ------------------------------------------------------------------------------------------------

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_EXTENSION = b"http://ns.adobe.com/xmp/extension/\0"
_TAGS = {
    270: "ImageDescription", 271: "Make", 272: "Model", 305: "Software", 315: "Artist", 700: "XMP", 37500: "MakerNote",
    37510: "UserComment", 40091: "XPTitle", 40092: "XPComment",
}  # fmt: skip
_TEXT_TYPES = (1, 2, 7, 129)  # bytes, ASCII, undefined, UTF-8


def _bounded(texts: Iterator[_Text]) -> Iterator[_Text]:
    remaining = _MAX_TEXTS
    for text in texts:
        remaining -= len(text.text)
        if remaining < 0:
            return
        yield text


class _BoundedFile:
    """A file with a limit on the bytes read, each time they are: thousands of tags may name the same megabyte."""

    def __init__(self, file: BinaryIO, remaining: int = _MAX_READ) -> None:
        self.file, self.remaining = file, remaining

    def read_at(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(max(min(size, _MAX_TEXT, self.remaining), 0))
        self.remaining -= len(data)
        return data

    def unpacked(self, data: bytes) -> bytes:
        """Decompressed by zlib; empty where that fails, which counts as much as the longest text."""
        try:
            text = zlib.decompressobj().decompress(data, _MAX_TEXT)
        except zlib.error:
            text = b""
        self.remaining -= len(text) or _MAX_TEXT
        return text


def _jpeg(file: _BoundedFile) -> Iterator[_Text]:
    """Up to the first scan."""
    extensions: list[bytes] = []  # parts of the XMP in further segments
    offset = 2
    for _ in range(_MAX_PIECES):
        head = file.read_at(offset, 4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xD9, 0xDA):
            break
        if head[1] in (0x01, 0xFF) or 0xD0 <= head[1] <= 0xD8:  # fill, or a marker without a length
            offset += 1 if head[1] == 0xFF else 2
            continue
        start, end = offset + 4, offset + 2 + int.from_bytes(head[2:], "big")
        if head[1] == 0xE1:
            data = file.read_at(start, end - start)
            if data.startswith(b"Exif\0\0"):
                yield from _exif(file, start + 6, end)
            elif data.startswith(_XMP):
                yield _Text("XMP", f"XMP, byte {start}", _decode(data[len(_XMP) :]))
            elif data.startswith(_XMP_EXTENSION):
                extensions.append(data[len(_XMP_EXTENSION) + 40 :])  # after the whole's hash and length, and the offset
        elif head[1] == 0xFE:
            yield _Text("comment", f"JPEG comment, byte {start}", _decode(file.read_at(start, end - start)))
        offset = max(end, offset + 2)
    if extensions:
        yield _Text("XMP", "XMP, in its extension", _decode(b"".join(extensions)[:_MAX_TEXT]))


def _png(file: _BoundedFile) -> Iterator[_Text]:
    offset = 8
    for _ in range(_MAX_PIECES):
        head = file.read_at(offset, 8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:], offset + 8
        if kind == b"eXIf":
            yield from _exif(file, start, start + size)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = file.read_at(start, size).partition(b"\0")
            name, text = plain(keyword.decode("latin-1")), _png_text(file, kind, rest)
            if name == "XML:com.adobe.xmp":
                yield _Text("XMP", f"XMP, byte {start}", text)
            elif name.startswith("Raw profile type"):
                yield from _png_profile(file, name, text, start)
            else:
                yield _Text(name, f'PNG text "{name}", byte {start}', text)
        offset = start + size + 4


def _png_text(file: _BoundedFile, kind: bytes, rest: bytes) -> str:
    """The text of a chunk after its keyword; what cannot be unpacked is empty."""
    packed = kind == b"zTXt"
    if kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # flag and method, language, translated keyword
    elif packed:
        rest = rest[1:]  # method
    if packed:
        rest = file.unpacked(rest)
    if kind == b"iTXt":
        return rest.decode("utf-8", "replace")
    try:
        return rest.decode("utf-8")  # which is what generators write, though the format says Latin-1
    except UnicodeDecodeError:
        return rest.decode("latin-1")


def _png_profile(file: _BoundedFile, name: str, text: str, offset: int) -> Iterator[_Text]:
    """XMP or EXIF in PNG text as ImageMagick writes it: a name, a length and hexadecimal digits."""
    try:
        data = bytes.fromhex("".join(text.split()[2:]))
    except ValueError:
        return
    if not data.startswith(b"Exif\0\0"):
        yield _Text("XMP", f"XMP, byte {offset}", _decode(data.removeprefix(_XMP)))
        return
    inner = _BoundedFile(io.BytesIO(data), file.remaining)
    for exif in _exif(inner, 6, len(data)):
        yield _Text(exif.field, f'{exif.place.split(",")[0]}, in PNG text "{name}", byte {offset}', exif.text)
    file.remaining = inner.remaining


def _webp(file: _BoundedFile) -> Iterator[_Text]:
    offset = 12
    for _ in range(_MAX_PIECES):
        head = file.read_at(offset, 8)
        if len(head) < 8:
            return
        size, start = int.from_bytes(head[4:], "little"), offset + 8
        if head[:4] == b"EXIF":
            skip = 6 if file.read_at(start, 6) == b"Exif\0\0" else 0
            yield from _exif(file, start + skip, start + size)
        elif head[:4] == b"XMP ":
            yield _Text("XMP", f"XMP, byte {start}", _decode(file.read_at(start, size)))
        offset = start + size + size % 2


def _xmp_search(file: _BoundedFile) -> Iterator[_Text]:
    """XMP in a container of any form: found by its tags in the first and in the last megabyte."""
    for start in dict.fromkeys((0, max(file.file.seek(0, os.SEEK_END) - _MAX_TEXT, 0))):
        data = file.read_at(start, _MAX_TEXT)
        first = data.find(b"<x:xmpmeta")
        last = data.find(b"</x:xmpmeta>", max(first, 0))
        if 0 <= first < last:
            yield _Text("XMP", f"XMP, byte {start + first}", _decode(data[first:last]))


def _gif(file: _BoundedFile) -> Iterator[_Text]:
    from PIL import Image

    yield from _xmp_search(file)
    file.file.seek(0)
    try:
        with Image.open(file.file, formats=["GIF"]) as image:
            comment = image.info.get("comment", b"")
    except (OSError, ValueError, SyntaxError):  # damaged: its comment cannot be read
        return
    yield _Text("comment", "GIF comment", _decode(comment[:_MAX_TEXT]))


def _video(name: str, file: _BoundedFile) -> Iterator[_Text]:
    """XMP and the tags of a container of that name."""
    from x2dfd.video import container_tags

    yield from _xmp_search(file)
    try:
        tags = container_tags(file.file, name)
    except InputError:  # decoding it failed too, and its row gives the reason
        return
    for key, value in tags.items():  # `com.apple.quicktime.software`
        yield _Text(key.rpartition(".")[2], f'tag "{plain(key)}"', value[:_MAX_TEXT])


def _tiff(file: _BoundedFile) -> Iterator[_Text]:
    return _exif(file, 0, file.file.seek(0, os.SEEK_END))


def _exif(file: _BoundedFile, base: int, end: int) -> Iterator[_Text]:
    """The texts in the first directory of a TIFF at the bytes `base` to `end`, and in its EXIF directory."""
    head = file.read_at(base, 8)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None or len(head) < 8:
        return
    queue = [struct.unpack_from(order + "L", head, 4)[0]]
    for _ in range(2):
        if not queue:
            return
        offset = base + queue.pop()
        count = struct.unpack(order + "H", file.read_at(offset, 2).ljust(2, b"\0"))[0]
        entries = file.read_at(offset + 2, min(12 * count, end - offset - 2)) if offset + 2 < end else b""
        for i in range(min(len(entries) // 12, _MAX_PIECES)):
            tag, kind, size, value = struct.unpack_from(order + "HHLL", entries, 12 * i)
            if tag == 34665:  # the EXIF directory
                queue = [value]
            elif tag in _TAGS and kind in _TEXT_TYPES:
                start = offset + 2 + 12 * i + 8 if size <= 4 else base + value
                data = file.read_at(start, min(size, end - start)) if start < end else b""
                place = f"XMP, byte {start}" if tag == 700 else f"EXIF {_TAGS[tag]}, byte {start}"
                yield _Text(_TAGS[tag], place, _tag_text(tag, data))


def _tag_text(tag: int, data: bytes) -> str:
    if tag in (40091, 40092):  # Windows' own
        return data.decode("utf-16-le", "replace").rstrip("\0")
    if tag == 37510 and data[:8] == b"UNICODE\0":
        return _decode_utf16(data[8:])
    if tag == 37510 and data[:8] in (b"ASCII\0\0\0", bytes(8)):
        data = data[8:]
    return _decode(data).rstrip("\0")


def _decode_utf16(data: bytes) -> str:
    """UTF-16 in either byte order, as writers agree on none: the zeros of its ASCII characters show which one it is."""
    zeros = [data[i:4000:2].count(0) for i in (0, 1)]
    if not any(zeros):
        try:
            return data.decode("utf-8")  # some write it under this name
        except UnicodeDecodeError:
            pass
    return data.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "replace").strip("\0\ufeff")


def _decode(data: bytes) -> str:
    """UTF-8 or, where every other byte is zero, UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:2] == b"\0<" or data[:2] == b"<\0":
        return _decode_utf16(data)
    return data.decode("utf-8", "replace")
