"""What a file's metadata state of how it was made: IPTC digital source type, generators' settings, software.

Read from XMP, EXIF, PNG text, comments of JPEG and GIF and tags of videos, each with its place in the file. Anyone can
write such a statement and anyone can remove it, so it is never part of the estimate.

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
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from x2dfd.errors import InputError
from x2dfd.files import Json

GENERATED = "generated"  # made with a generator
PARTLY = "part_generated"  # a generator made a part of it, or reworked it
SOURCE = "source"  # anything else that is said of the origin

LEAD = "By its own statement, this file was made with an AI generator."
CAVEAT = (
    "Such a statement can be removed from a file, and it can be added to any file. It is evidence of its own and plays "
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
_MAX_ALL = 4_000_000  # characters of all of them together
_MAX_READ = 16_000_000  # bytes of a file, unpacked ones too
_MAX_PIECES = 10_000  # chunks, segments or tags that are looked at
MAX_STATEMENTS = 50
_WORDS = 200  # characters that are quoted of a text in the file


@dataclass(frozen=True)
class _Text:
    """A piece of text in the file."""

    field: str  # its name: `parameters`, `Software`, `UserComment`, `XMP`
    place: str  # where it stands, for people
    text: str


def read_statements(source: str | Path | bytes, format: str) -> list[dict[str, str]]:
    """What the metadata of a file state about how it was made, in the order of the file: `kind`, `says`, `where`.

    `format` as in `Report.media`. JPEG, PNG, WebP and TIFF are read in full; of AVIF, HEIF, GIF, MP4, Matroska and AVI
    XMP, the comment of a GIF and the tags of a video; of other formats nothing. `kind` is one of GENERATED, PARTLY and
    SOURCE. What a file holds never raises; OSError where it cannot be read.
    """
    readers: dict[str, Callable[[_Bytes], Iterator[_Text]]] = {
        "JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "TIFF": _tiff,
        "AVIF": _searched, "HEIF": _searched, "GIF": _gif, "mov": _video("mov"), "matroska": _video("matroska"),
        "avi": _video("avi"),
    }  # fmt: skip
    if format not in readers:
        return []
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        said = (statement for text in _bounded(readers[format](_Bytes(file))) for statement in _said(text))
        found = list(islice(dict.fromkeys(islice(said, 4 * MAX_STATEMENTS)), MAX_STATEMENTS))
    return [{"kind": kind, "says": says, "where": where} for kind, says, where in found]


def of_generator(provenance: Json) -> list[dict[str, str]]:
    """The statements of a `Report.provenance` that lead the answer: "made with a generator"."""
    return [s for s in provenance.get("statements") or () if s.get("kind") == GENERATED]


def of_camera(provenance: Json) -> list[dict[str, str]]:
    """The statements that a camera took the file; not those about what it was made of."""
    own = (s for s in provenance.get("statements") or () if "ingredient" not in str(s.get("where")))
    return [s for s in own if str(s.get("says")).startswith(tuple(f"{_SOURCE_TYPE} {name}:" for name in _CAMERA))]


def source_type(value: str) -> tuple[str, str]:
    """Kind of statement, and what an IPTC digital source type says; it is given by its address or its name."""
    name = re.split(r"[/:#]", value.strip().rstrip("/"))[-1]
    known, kind, meaning = _TYPES.get(name.lower(), (plain(name), SOURCE, "not among the types that are known here"))
    return kind, f"{_SOURCE_TYPE} {known}: {meaning}"


def plain(text: str) -> str:
    """Text out of the file: one printable line of bounded length."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * _WORDS]).split())[:_WORDS]


# --- what a text says -----------------------------------------------------------------------------------------------

_NAMES = re.compile(
    r"\b(?:DALL[·\-. ]?E|ChatGPT|GPT-4o|GPT-Image|OpenAI|Adobe Firefly|Firefly Image|Midjourney|NovelAI|InvokeAI"
    r"|ComfyUI|Fooocus|AUTOMATIC1111|Stable Diffusion|Stability AI|SDXL|DreamStudio|Draw Things|Easy Diffusion|SwarmUI"
    r"|Made with Google AI|Google Imagen|Imagen [2-9]|Gemini [2-9]|Nano Banana|Bing Image Creator|FLUX\.[12]"
    r"|Black Forest Labs|Ideogram AI|Leonardo\.?AI|StyleGAN\d?)(?!\w)",
    re.IGNORECASE,
)
"""Generators by their own names. `Imagen` and `Gemini` alone are also other things."""

_NAMING = {"software", "encoder", "source", "creator", "generator", "make", "model"}
"""Fields that name what made the file; in a caption or a prompt the same name says nothing."""

_JOB = re.compile(r"\bJob ID: ?[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_WEB_UI = re.compile(r"Steps: \d{1,5}, [^\n]{0,200}?(?:Sampler|CFG scale|Seed): [^\n]{0,120}")
_DREAM = re.compile(r"-s ?\d{1,4} -S ?\d{1,12} ")
_AIGC = re.compile(r"[\"']?Label[\"']?\s{0,5}:\s{0,5}[\"']?([123])")
_LABELS = {
    "1": (GENERATED, "is generated"),
    "2": (SOURCE, "may be generated"),
    "3": (SOURCE, "is thought to be generated"),
}


def _said(text: _Text) -> Iterator[tuple[str, str, str]]:
    """Statements in a piece of text: kind, what it says, where it stands."""
    if program := _settings(text):
        yield GENERATED, f"settings of an image generator: {plain(program)}", text.place
    field = text.field.lower()
    if field == "xmp":
        yield from _said_in_xmp(text)
    elif field == "aigc":
        yield from _labelled(text.text, text.place)
    elif field in _NAMING:
        yield from _named(text.text, text.place)


def _settings(text: _Text) -> str | None:
    """The generator whose settings a text holds, in the form that its own program writes; None where it holds none."""
    field, said = text.field.lower(), text.text
    if found := _WEB_UI.match(said, max(said.rfind("Steps: "), 0)):
        return f"Stable Diffusion web UI ({found[0]})"
    if '"class_type"' in said and (field == "prompt" or said.startswith("prompt:")):
        return "ComfyUI (the graph that was run)"
    if (
        field == "comment"
        and re.match(r'\s*\{"(?:prompt|workflow)"', said)
        and ("class_type" in said or "nodes" in said)
    ):
        return "ComfyUI (what was run, as a video's comment)"
    if '"nodes"' in said and (field == "workflow" or said.startswith("workflow:")):
        return "ComfyUI (the workflow)"
    if '"sui_image_params"' in said:
        return "SwarmUI"
    if field in ("invokeai_metadata", "invokeai_graph", "sd-metadata") and said.lstrip().startswith("{"):
        return "InvokeAI"
    if field == "dream" and _DREAM.search(said):
        return "InvokeAI"
    if field == "fooocus_scheme" or ('"base_model"' in said and '"sampler"' in said and '"prompt"' in said):
        return "Fooocus"
    if '"sampler"' in said and '"uc"' in said and '"seed"' in said:
        return "NovelAI"
    if field == "use_stable_diffusion_model":
        return "Easy Diffusion"
    if field in ("description", "imagedescription") and _JOB.search(said):
        return "Midjourney (a job's number)"
    return None


def _named(said: str, where: str) -> Iterator[tuple[str, str, str]]:
    if re.search(r"\bEdited with Google AI\b", said[: 4 * _WORDS]):
        yield PARTLY, "names a generator that edited it: Edited with Google AI", where
    elif generator_named(said):
        yield GENERATED, f"names a generator: {plain(said)}", where


def generator_named(said: str) -> bool:
    """The name of a program is that of a generator."""
    return _NAMES.search(said[: 4 * _WORDS]) is not None


def _labelled(said: str, where: str) -> Iterator[tuple[str, str, str]]:
    """The label that GB 45438-2025 asks for: 1 is, 2 may be, 3 is thought to be generated."""
    if label := _AIGC.search(said[:10_000]):
        kind, meaning = _LABELS[label[1]]
        yield kind, f"labelled (AIGC {label[1]}): it {meaning}", where


def _said_in_xmp(text: _Text) -> Iterator[tuple[str, str, str]]:
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
            yield from _named(value, place(name))
    for value in filter(generator_named, _xmp_values(text.text, "softwareAgent")):  # of a step in the file's history
        yield PARTLY, f"names a generator that edited it: {plain(value)}", place("softwareAgent")
    for value in _xmp_values(text.text, "AIGC"):
        yield from _labelled(value, place("AIGC"))


def _xmp_values(text: str, name: str) -> Iterator[str]:
    """The values of a property, written as an attribute, as an element, or as a resource that an element names."""
    pattern = (
        rf"(?<![A-Za-z]){name}"
        r"(?:\s{0,20}=\s{0,20}(?:\"([^\"<>]{1,300})\"|'([^'<>]{1,300})')"
        r"|\s{1,20}[^<>]{0,100}?resource\s{0,20}=\s{0,20}[\"']([^\"'<>]{1,300})[\"']"
        r"|(?:\s{1,20}[^\s=<>][^<>]{0,200})?>(?:\s{0,50}<[^<>/]{1,100}>){0,3}\s{0,50}([^<\s][^<]{0,300})<)"
    )
    for found in islice(re.finditer(pattern, text), MAX_STATEMENTS):
        yield html.unescape(next(group for group in found.groups() if group))


# --- where the texts stand ------------------------------------------------------------------------------------------

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_MORE = b"http://ns.adobe.com/xmp/extension/\0"
_TAGS = {
    270: "ImageDescription", 271: "Make", 272: "Model", 305: "Software", 315: "Artist", 700: "XMP", 37500: "MakerNote",
    37510: "UserComment", 40091: "XPTitle", 40092: "XPComment",
}  # fmt: skip
_TEXT_TYPES = (1, 2, 7, 129)  # bytes, ASCII, undefined, UTF-8


def _bounded(texts: Iterator[_Text]) -> Iterator[_Text]:
    left = _MAX_ALL
    for text in texts:
        left -= len(text.text)
        if left < 0:
            return
        yield text


class _Bytes:
    """A file of which so much is read, and then no more: tags that all name the same megabyte cost it once each."""

    def __init__(self, file: BinaryIO, left: int = _MAX_READ) -> None:
        self.file, self.left = file, left

    def at(self, at: int, size: int) -> bytes:
        self.file.seek(at)
        data = self.file.read(max(min(size, _MAX_TEXT, self.left), 0))
        self.left -= len(data)
        return data

    def unpacked(self, data: bytes) -> bytes:
        """Out of zlib's form; nothing where it is broken, which costs as much as the longest text."""
        try:
            found = zlib.decompressobj().decompress(data, _MAX_TEXT)
        except zlib.error:
            found = b""
        self.left -= len(found) or _MAX_TEXT
        return found


def _jpeg(file: _Bytes) -> Iterator[_Text]:
    """Up to the first scan."""
    more: list[bytes] = []  # XMP that goes on in further segments
    at = 2
    for _ in range(_MAX_PIECES):
        head = file.at(at, 4)
        if len(head) < 4 or head[0] != 0xFF or head[1] in (0xD9, 0xDA):
            break
        if head[1] in (0x01, 0xFF) or 0xD0 <= head[1] <= 0xD8:  # fill, or a marker without a length
            at += 1 if head[1] == 0xFF else 2
            continue
        start, end = at + 4, at + 2 + int.from_bytes(head[2:], "big")
        if head[1] == 0xE1:
            data = file.at(start, end - start)
            if data.startswith(b"Exif\0\0"):
                yield from _exif(file, start + 6, end)
            elif data.startswith(_XMP):
                yield _Text("XMP", f"XMP, byte {start}", _decoded(data[len(_XMP) :]))
            elif data.startswith(_XMP_MORE):
                more.append(data[len(_XMP_MORE) + 40 :])  # after the whole's hash, length and this part's place in it
        elif head[1] == 0xFE:
            yield _Text("comment", f"JPEG comment, byte {start}", _decoded(file.at(start, end - start)))
        at = max(end, at + 2)
    if more:
        yield _Text("XMP", "XMP, in its extension", _decoded(b"".join(more)[:_MAX_TEXT]))


def _png(file: _Bytes) -> Iterator[_Text]:
    at = 8
    for _ in range(_MAX_PIECES):
        head = file.at(at, 8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        size, kind, start = int.from_bytes(head[:4], "big"), head[4:], at + 8
        if kind == b"eXIf":
            yield from _exif(file, start, start + size)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = file.at(start, size).partition(b"\0")
            name, text = plain(keyword.decode("latin-1")), _png_text(file, kind, rest)
            if name == "XML:com.adobe.xmp" or name.startswith("Raw profile type"):
                yield from _profile(file, name, text, start)
            else:
                yield _Text(name, f'PNG text "{name}", byte {start}', text)
        at = start + size + 4


def _png_text(file: _Bytes, kind: bytes, rest: bytes) -> str:
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


def _profile(file: _Bytes, name: str, text: str, at: int) -> Iterator[_Text]:
    """XMP in PNG text, as it is or as ImageMagick writes it: a name, a length and hexadecimal digits."""
    if not name.startswith("Raw profile type"):
        yield _Text("XMP", f"XMP, byte {at}", text)
        return
    try:
        data = bytes.fromhex("".join(text.split()[2:]))
    except ValueError:
        return
    if not data.startswith(b"Exif\0\0"):
        yield _Text("XMP", f"XMP, byte {at}", _decoded(data.removeprefix(_XMP)))
        return
    inner = _Bytes(io.BytesIO(data), file.left)
    for found in _exif(inner, 6, len(data)):
        yield _Text(found.field, f'{found.place.split(",")[0]}, in PNG text "{name}", byte {at}', found.text)
    file.left = inner.left


def _webp(file: _Bytes) -> Iterator[_Text]:
    at = 12
    for _ in range(_MAX_PIECES):
        head = file.at(at, 8)
        if len(head) < 8:
            return
        size, start = int.from_bytes(head[4:], "little"), at + 8
        if head[:4] == b"EXIF":
            skip = 6 if file.at(start, 6) == b"Exif\0\0" else 0
            yield from _exif(file, start + skip, start + size)
        elif head[:4] == b"XMP ":
            yield _Text("XMP", f"XMP, byte {start}", _decoded(file.at(start, size)))
        at = start + size + size % 2


def _searched(file: _Bytes) -> Iterator[_Text]:
    """XMP in a container that is not walked here: found by its tags in the first and in the last megabyte."""
    for start in dict.fromkeys((0, max(file.file.seek(0, os.SEEK_END) - _MAX_TEXT, 0))):
        data = file.at(start, _MAX_TEXT)
        first = data.find(b"<x:xmpmeta")
        last = data.find(b"</x:xmpmeta>", max(first, 0))
        if 0 <= first < last:
            yield _Text("XMP", f"XMP, byte {start + first}", _decoded(data[first:last]))


def _gif(file: _Bytes) -> Iterator[_Text]:
    from PIL import Image

    yield from _searched(file)
    file.file.seek(0)
    try:
        with Image.open(file.file, formats=["GIF"]) as opened:
            comment = opened.info.get("comment", b"")
    except (OSError, ValueError, SyntaxError):  # damaged: nothing can be said of it
        return
    yield _Text("comment", "GIF comment", _decoded(comment[:_MAX_TEXT]))


def _video(name: str) -> Callable[[_Bytes], Iterator[_Text]]:
    """XMP and the tags of a container of that name."""

    def read(file: _Bytes) -> Iterator[_Text]:
        from x2dfd.video import container_tags

        yield from _searched(file)
        try:
            tags = container_tags(file.file, name)
        except InputError:  # it could not be decoded either, which its row says
            return
        for key, value in tags.items():  # `com.apple.quicktime.software`
            yield _Text(key.rpartition(".")[2], f'tag "{plain(key)}"', value[:_MAX_TEXT])

    return read


def _tiff(file: _Bytes) -> Iterator[_Text]:
    return _exif(file, 0, file.file.seek(0, os.SEEK_END))


def _exif(file: _Bytes, base: int, end: int) -> Iterator[_Text]:
    """The texts in the first directory of a TIFF that stands from `base` to `end`, and in its EXIF directory."""
    head = file.at(base, 8)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None or len(head) < 8:
        return
    queue = [struct.unpack_from(order + "L", head, 4)[0]]
    for _ in range(2):
        if not queue:
            return
        at = base + queue.pop()
        count = struct.unpack(order + "H", file.at(at, 2).ljust(2, b"\0"))[0]
        entries = file.at(at + 2, min(12 * count, end - at - 2)) if at + 2 < end else b""
        for i in range(min(len(entries) // 12, _MAX_PIECES)):
            tag, kind, size, value = struct.unpack_from(order + "HHLL", entries, 12 * i)
            if tag == 34665:  # the EXIF directory
                queue = [value]
            elif tag in _TAGS and kind in _TEXT_TYPES:
                start = at + 2 + 12 * i + 8 if size <= 4 else base + value
                data = file.at(start, min(size, end - start)) if start < end else b""
                place = f"XMP, byte {start}" if tag == 700 else f"EXIF {_TAGS[tag]}, byte {start}"
                yield _Text(_TAGS[tag], place, _tag_text(tag, data))


def _tag_text(tag: int, data: bytes) -> str:
    if tag in (40091, 40092):  # Windows' own
        return data.decode("utf-16-le", "replace").rstrip("\0")
    if tag == 37510 and data[:8] == b"UNICODE\0":
        return _two_byte_text(data[8:])
    if tag == 37510 and data[:8] in (b"ASCII\0\0\0", bytes(8)):
        data = data[8:]
    return _decoded(data).rstrip("\0")


def _two_byte_text(data: bytes) -> str:
    """UTF-16 in whichever byte order it makes sense: writers agree on none. The zeros of its ASCII characters tell."""
    zeros = [data[i:4000:2].count(0) for i in (0, 1)]
    if not any(zeros):
        try:
            return data.decode("utf-8")  # some write it under this name
        except UnicodeDecodeError:
            pass
    return data.decode("utf-16-be" if zeros[0] > zeros[1] else "utf-16-le", "replace").strip("\0\ufeff")


def _decoded(data: bytes) -> str:
    """UTF-8 or, where every other byte is zero, UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:2] == b"\0<" or data[:2] == b"<\0":
        return _two_byte_text(data)
    return data.decode("utf-8", "replace")
