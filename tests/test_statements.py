"""What a file says of itself: each generator's own form is read with its place, and a hostile file costs little."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from typing import Any

import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from tests.pictures import encoded, png_chunk
from x2dfd.statements import (
    GENERATED,
    MAX_STATEMENTS,
    PARTLY,
    SOURCE,
    SOURCE_TYPES,
    of_generator,
    read_statements,
    source_type,
)

IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
WEB_UI = "a portrait\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Model: sd15"


def saved(format: str, **options: Any) -> bytes:
    return encoded(Image.new("RGB", (32, 32), "grey"), format, **options)


def png(**texts: str) -> bytes:
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return saved("PNG", pnginfo=info)


def with_chunk(picture: bytes, kind: bytes, data: bytes) -> bytes:
    return picture[:33] + png_chunk(kind, data) + picture[33:]  # after the signature and IHDR


def xmp(inside: str, attributes: str = "") -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" {attributes}>{inside}'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def exif(order: str = "<", **tags: bytes) -> bytes:
    """An EXIF blob of the given byte order: ASCII tags in its first directory, `comment` in the EXIF directory."""
    made = Image.Exif()
    made.endian = order
    for name, number in {"make": 271, "model": 272, "software": 305}.items():
        if name in tags:
            made[number] = tags[name].decode()
    if "comment" in tags:
        made.get_ifd(0x8769)[37510] = tags["comment"]
    return bytes(made.tobytes())


def one(data: bytes, format: str) -> dict[str, str]:
    [statement] = read_statements(data, format)
    return statement


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    "packet",
    [
        xmp("", f'Iptc4xmpExt:DigitalSourceType="{IPTC}trainedAlgorithmicMedia"'),
        xmp(f"<Iptc4xmpExt:DigitalSourceType>{IPTC}trainedAlgorithmicMedia</Iptc4xmpExt:DigitalSourceType>"),
        xmp(f'<Iptc4xmpExt:DigitalSourceType rdf:resource="{IPTC}trainedAlgorithmicMedia"/>'),
        xmp(f"<i:DigitalSourceType><rdf:Bag> <rdf:li>{IPTC}trainedAlgorithmicMedia</rdf:li></rdf:Bag>"),
    ],
    ids=["attribute", "element", "resource", "list"],
)  # fmt: skip
def test_the_source_type_is_read_in_every_format_and_form(format: str, packet: bytes) -> None:
    """Bug prevented: the statement that the law asks generators to write is "absent" for the one container or form."""
    if format == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode(), zip=True)
        data = saved("PNG", pnginfo=info)
    elif format == "TIFF":
        tags = ImageFileDirectory_v2()
        tags[700] = packet
        tags.tagtype[700] = 1
        data = saved("TIFF", tiffinfo=tags)
    else:
        data = saved(format, xmp=packet)
    found = one(data, format)
    assert found["kind"] == GENERATED and "trainedAlgorithmicMedia: made as a whole" in found["says"]
    place, _, number = found["where"].partition(", byte ")
    assert place == "XMP DigitalSourceType"
    if format != "PNG":  # where it is packed
        assert packet in data[int(number) : int(number) + len(packet) + 40]


def test_xmp_of_other_containers_is_found_where_it_stands() -> None:
    """Bug prevented: the same statement is silent in an AVIF or a video, at the end of which writers put it."""
    packet = xmp("", f'Iptc4xmpExt:DigitalSourceType="{IPTC}trainedAlgorithmicMedia"')
    gif = saved("GIF")  # XMP stands in it as it is, in an application extension
    files = [("GIF", gif[:13] + b"!\xff\x0bXMP DataXMP" + packet + gif[13:])]
    if features.check("avif"):
        files.append(("AVIF", saved("AVIF", xmp=packet)))
    for format, data in files:
        assert one(data, format)["where"] == f"XMP DigitalSourceType, byte {data.index(packet)}"
    for before, after in ((100, 5_000_000), (5_000_000, 100), (900_000, 900_000)):
        found = one(bytes(before) + packet + bytes(after), "mov")
        assert found["where"] == f"XMP DigitalSourceType, byte {before}"
    assert read_statements(b"<x:xmpmeta" * 300_000, "mov") == []
    assert read_statements(saved("GIF", comment=WEB_UI.encode()), "GIF")[0]["where"] == "GIF comment"
    assert read_statements(saved("GIF", comment=b"made by hand"), "GIF") == []
    assert read_statements(b"GIF89a\1", "GIF") == []


@pytest.mark.parametrize(("format", "name"), [("matroska", "matroska"), ("avi", "avi"), ("mov", "mp4")])
def test_tags_of_videos_are_read(format: str, name: str) -> None:
    """Bug prevented: a generated clip states its settings in a tag, and nothing of it is said."""
    av = pytest.importorskip("av")
    graph = json.dumps({"prompt": json.dumps({"3": {"class_type": "KSampler"}})})
    for text, program in ((WEB_UI.splitlines()[-1], "Stable Diffusion web UI"), (graph, "ComfyUI"), ("a holiday", "")):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=name) as container:
            container.metadata["comment"] = text
            stream = container.add_stream("mpeg4", rate=5, width=64, height=64)
            stream.pix_fmt = "yuv420p"
            container.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
            container.mux(stream.encode(None))
        said = read_statements(buffer.getvalue(), format)
        assert [s["kind"] for s in said] == [GENERATED] * bool(program), (said, program)
        assert all(program in s["says"] and s["where"].lower() == 'tag "comment"' for s in said)
        assert read_statements(buffer.getvalue()[:40], format) == []


def test_a_composite_is_called_what_it_is() -> None:
    """Bug prevented: a photo with a retouched sky leads its page as "made with a generator"."""
    assert source_type(IPTC + "compositeWithTrainedAlgorithmicMedia")[0] == PARTLY
    assert source_type(IPTC + "compositeSynthetic")[0] == PARTLY
    assert [name for name, (kind, _) in SOURCE_TYPES.items() if kind == GENERATED] == ["trainedAlgorithmicMedia"]
    captured = "digital source type digitalCapture: captured by a digital camera"
    assert source_type("digsrctype:digitalCapture") == (SOURCE, captured)
    kind, says = source_type(IPTC + "new\nType")
    assert kind == SOURCE and says.startswith("digital source type new Type: not among")
    packet = xmp("", f"Iptc4xmpExt:DigitalSourceType='{IPTC}compositeWithTrainedAlgorithmicMedia'")
    found = read_statements(saved("JPEG", xmp=packet), "JPEG")
    assert found[0]["kind"] == PARTLY and of_generator({"statements": found}) == []


GRAPH = '{"3": {"class_type": "KSampler", "inputs": {"seed": 1}}}'


@pytest.mark.parametrize(
    ("texts", "program"),
    [
        ({"parameters": WEB_UI}, "Stable Diffusion web UI (Steps: 20, Sampler: Euler a"),
        ({"prompt": GRAPH}, "ComfyUI"),
        ({"workflow": '{"nodes": []}'}, "ComfyUI"),
        ({"invokeai_metadata": '{"app_version": "4.2", "positive_prompt": "a"}'}, "InvokeAI"),
        ({"sd-metadata": '{"model": "stable diffusion", "app_id": "invoke-ai/InvokeAI"}'}, "InvokeAI"),
        ({"Dream": '"a face" -s 50 -S 417 -W512 -H512 -C7.5 -A k_lms'}, "InvokeAI"),
        ({"Comment": '{"prompt": "a", "steps": 28, "seed": 3, "sampler": "k_euler", "uc": "bad"}'}, "NovelAI"),
        ({"Software": "NovelAI"}, "NovelAI"),
        ({"fooocus_scheme": "fooocus"}, "Fooocus"),
        ({"parameters": '{"prompt": "a", "base_model": "juggernaut", "sampler": "dpmpp_2m"}'}, "Fooocus"),
        ({"parameters": '{"sui_image_params": {"prompt": "a"}}'}, "SwarmUI"),
        ({"Description": "a face --v 6 Job ID: 1b4e28ba-2fa1-11d2-883f-0016d3cca427"}, "Midjourney"),
        ({"AIGC": '{"Label": "1", "ContentProducer": "x"}'}, "AIGC 1"),
    ],
)  # fmt: skip
def test_each_generators_text_is_known(texts: dict[str, str], program: str) -> None:
    """Bug prevented: a picture that carries its own recipe is answered as if nothing were known of it."""
    data = png(**texts)
    found = one(data, "PNG")
    [(key, text)] = texts.items()
    assert found["kind"] == GENERATED and program in found["says"]
    start = int(found["where"].rpartition(" ")[2])
    assert found["where"] == f'PNG text "{key}", byte {start}' and data[start:].startswith(f"{key}\0{text}".encode())


def test_ordinary_texts_are_no_statement() -> None:
    """Bug prevented: a screenshot about Stable Diffusion, or a chart with a `parameters` text, is called generated."""
    ordinary = {
        "parameters": "width=3 height=4", "prompt": "name of the reader?", "workflow": "release", "Comment": "{}",
        "Title": "Stable Diffusion explained", "Description": "Midjourney lost; Job ID: 42", "Software": "GIMP 2.10",
        "Author": "Gemini Imagen", "Source": "Imagen de satélite", "Steps": "Steps: 20, then the door",
    }  # fmt: skip
    assert read_statements(png(**ordinary), "PNG") == []
    assert read_statements(saved("JPEG", comment=b"Made with love"), "JPEG") == []
    assert read_statements(png(parameters=WEB_UI), "avi") == []


def test_exif_is_read_wherever_it_stands() -> None:
    """Bug prevented: a WebP's recipe stands in fields meant for a camera's maker; a comment in the other byte order
    than the rest comes out as Chinese."""
    made = exif(make=b"workflow:" + b'{"nodes": []}', model=b"prompt:" + GRAPH.encode())
    ascii_comment = exif(comment=b"ASCII\0\0\0" + WEB_UI.encode(), software=b"Fooocus v2.5.0")
    for format in ("JPEG", "PNG", "WEBP"):
        said = "settings of an image generator: ComfyUI "
        found = read_statements(saved(format, exif=made), format)
        assert [s["says"] for s in found] == [f"{said}(the workflow)", f"{said}(the graph that was run)"]
        assert [s["kind"] for s in read_statements(saved(format, exif=ascii_comment), format)] == [GENERATED] * 2
    for order in "<>":
        for written in ("utf-16-le", "utf-16-be", "utf-16", "utf-8"):
            data = saved("JPEG", exif=exif(order, comment=b"UNICODE\0" + WEB_UI.encode(written), make=b"x"))
            statement = one(data, "JPEG")
            assert "Steps: 20, Sampler: Euler a" in statement["says"], (order, written)
            place, _, at = statement["where"].rpartition(" ")
            assert place == "EXIF UserComment, byte" and data[int(at) :].startswith(b"UNICODE\0")
    # ImageMagick turns a JPEG into a PNG, whose texts hold the profiles in hexadecimal.
    packet = xmp("", f'Iptc4xmpExt:DigitalSourceType="{IPTC}trainedAlgorithmicMedia"')
    for name, profile in (("xmp", packet), ("exif", exif(comment=b"ASCII\0\0\0" + WEB_UI.encode()))):
        text = f"\n{name}\n{len(profile):8d}\n{profile.hex()}\n"
        assert one(png(**{f"Raw profile type {name}": text}), "PNG")["kind"] == GENERATED


def test_marks_in_xmp_are_read() -> None:
    """Bug prevented: the credit line and the tool's name of large services are passed over."""
    marks = {
        'photoshop:Credit="Made with Google AI"': GENERATED,
        'photoshop:Credit="Edited with Google AI"': PARTLY,
        'xmp:CreatorTool="Adobe Firefly"': GENERATED,
        'Iptc4xmpExt:AISystemUsed="DALL·E 3 &amp; friends"': GENERATED,
        "TC260:AIGC='{&quot;Label&quot;:&quot;2&quot;}'": SOURCE,
        'Iptc4xmpExt:AISystemUsed="x" Iptc4xmpExt:DigitalSourceType="compositeWithTrainedAlgorithmicMedia"': PARTLY,
        'stEvt:softwareAgent="Adobe Firefly"': PARTLY,
        'xmp:CreatorTool="Adobe Photoshop 26.1"': None,
        'xmp:CreatorTool="" dc:title="Midjourney"': None,
    }
    for attributes, kind in marks.items():
        found = read_statements(saved("WEBP", xmp=xmp("", attributes)), "WEBP")
        assert {s["kind"] for s in found} == ({kind} if kind else set()), attributes
    utf16 = xmp("", 'xmp:CreatorTool="Midjourney"').decode().encode("utf-16-be")
    assert one(saved("WEBP", xmp=utf16), "WEBP")["says"] == "names a generator: Midjourney"


def test_a_text_of_the_file_cannot_steer_what_is_shown() -> None:
    """Bug prevented: an escape sequence or a bidirectional mark in a field turns the terminal's line around."""
    found = one(png(Software="NovelAI \x1b[2J\u202efdp.exe " + "x" * 5000), "PNG")
    assert found["says"].isprintable() and len(found["says"]) < 250
    name = "x\x1b[2J"
    data = with_chunk(saved("PNG"), b"tEXt", b"parameters\0" + WEB_UI.encode() + name.encode())
    assert all(value.isprintable() for value in one(data, "PNG").values())


BOMB = zlib.compress(b"<x>" + b" DigitalSourceType " * 500_000, 9)
BROKEN = zlib.compress(bytes(990_000), 9)[:-6] + b"\xff" * 20
TAGS = b"II*\0\x08\0\0\0\x00\x14" + struct.pack("<HHLL", 305, 2, 60_000, 4_000) * 5120
ENTITIES = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
EXIF, PROFILE = b"\xff\xe1\xff\xf0Exif\0\0", b"Raw profile type exif\0\0"
FAR_TAG = struct.pack("<HHLL", 305, 2, 900_000, 900_000)
TIFF = b"II*\0\x08\0\0\0"
HOSTILE: dict[str, tuple[str, Any]] = {
    "packed": ("PNG", lambda: with_chunk(saved("PNG"), b"zTXt", b"parameters\0\0" + BOMB)),
    "packed XMP": ("PNG", lambda: with_chunk(saved("PNG"), b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)),
    "chunks": ("PNG", lambda: saved("PNG")[:33] + png_chunk(b"teSt", b"") * 1_000_000),
    "texts": ("PNG", lambda: saved("PNG")[:33] + png_chunk(b"tEXt", b"parameters\0" + WEB_UI.encode()) * 100_000),
    "fill": ("JPEG", lambda: b"\xff\xd8" + b"\xff" * 20_000_000),
    "entities": ("WEBP", lambda: saved("WEBP", xmp=ENTITIES + b"&b;" * 300_000)),
    "near misses": ("WEBP", lambda: saved("WEBP", xmp=b'<a DigitalSourceType resource="' * 30_000)),
    "spaces": ("WEBP", lambda: saved("WEBP", xmp=(b"CreatorTool" + b" " * 60 + b"=" + b" " * 60) * 7_000)),
    "open tags": ("WEBP", lambda: saved("WEBP", xmp=(b"Credit>" + b"<" + b"a" * 99 + b">") * 9_000)),
    "steps": ("PNG", lambda: with_chunk(saved("PNG"), b"tEXt", b"parameters\0" + b"Steps: 1, " * 99_000)),
    "tags": ("TIFF", lambda: TIFF + b"\xff\xff" + struct.pack("<HHLL", 305, 2, 1_000_000, 0) * 65_535),
    "tags over zeros": ("TIFF", lambda: TIFF + b"\xff\xff" + FAR_TAG * 65_535 + bytes(1_000_000)),
    "EXIF again and again": (
        "JPEG",
        lambda: b"\xff\xd8" + (EXIF + (TAGS + bytes(65_518))[:65_512]) * 500 + b"\xff\xd9",
    ),
    "packed and broken": ("PNG", lambda: saved("PNG")[:33] + png_chunk(b"zTXt", PROFILE + BROKEN) * 9000),
    "circle": ("TIFF", lambda: TIFF + b"\x01\0" + struct.pack("<HHLL", 34665, 4, 1, 8) + bytes(4)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_costs_little(name: str) -> None:
    """Bug prevented: a text that unpacks to gigabytes, or one that a pattern tries in every way, holds the batch."""
    format, make = HOSTILE[name]
    data = make()
    start = time.process_time()
    found = read_statements(data, format)
    assert time.process_time() - start < 2 and len(found) <= MAX_STATEMENTS
