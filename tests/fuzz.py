"""Mutants of small files against every parser, each in a process that can be killed: `python -m tests.fuzz --help`.

What a parser may do with one is give a value or raise an X2DFDError. A finding is any other exception, a crash, more
CPU than CPU_SECONDS, more memory than PEAK_BYTES, or a small file that the worn process no longer reads. The same seed
gives the same mutants.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import pkgutil
import random
import re
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from skimage.data import astronaut

from tests.pictures import clip_of, encoded
from x2dfd import case
from x2dfd.adapter import read_adapter_card
from x2dfd.calibration import Calibration
from x2dfd.errors import InputError, X2DFDError
from x2dfd.intake import ready
from x2dfd.manifest import manifest_paths, read_manifest
from x2dfd.media import load_media
from x2dfd.provenance import read_provenance
from x2dfd.statements import read_statements
from x2dfd.types import Cue, Evidence
from x2dfd.validation import Validation
from x2dfd.worker import Worker

CPU_SECONDS = 2.0
PEAK_BYTES = 300_000_000
EMBEDDED = Path(__file__).parents[1] / "x2dfd" / "weights" / "embedded"

# --- seeds ---


def pictures(kind: str) -> list[bytes]:
    """Small files of one format: plain, and with what its parser branches on."""
    if kind == "heic":
        import pillow_heif

        pillow_heif.register_heif_opener()
    noise = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8)
    frames = [Image.fromarray(one) for one in noise]
    exif = Image.Exif()
    exif[274], exif[271], exif[305] = 6, "maker", "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5"
    source = b'<x:xmpmeta><a Iptc4xmpExt:DigitalSourceType="trainedAlgorithmicMedia"/></x:xmpmeta>'
    tags: dict[str, Any] = {"exif": exif, "icc_profile": b"\0" * 140, "xmp": source}
    texts = PngInfo()
    texts.add_text("parameters", exif[305], zip=True)
    texts.add_itxt("XML:com.adobe.xmp", source.decode(), zip=True)
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 80}
    forms: dict[str, list[tuple[Image.Image, str, dict[str, Any]]]] = {
        "jpeg": [(frames[0], "JPEG", tags), (frames[0], "JPEG", {"progressive": True}),
                 (frames[0].convert("CMYK"), "JPEG", {})],
        "png": [(frames[0], "PNG", tags | {"pnginfo": texts}), (frames[0].convert("P"), "PNG", {"transparency": 3}),
                (Image.fromarray(noise[0, ..., 0].astype(np.uint16) * 255), "PNG", {})],
        "apng": [(frames[0], "PNG", moving)],
        "gif": [(frames[0], "GIF", moving), (frames[0], "GIF", {"comment": b"a" * 300})],
        "webp": [(frames[0], "WEBP", tags), (frames[0].convert("RGBA"), "WEBP", {"lossless": True}),
                 (frames[0], "WEBP", moving)],
        "avif": [(frames[0], "AVIF", {}), (frames[0], "AVIF", moving)],
        "tiff": [(frames[0], "TIFF", {"compression": c}) for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
        + [(frames[0].convert("1"), "TIFF", {"compression": "group4"}), (frames[0], "TIFF", moving)],
        "bmp": [(frames[0], "BMP", {}), (frames[0].convert("P"), "BMP", {})],
        "heic": [(frames[0], "HEIF", {})],
    }  # fmt: skip
    return [encoded(image, format, **options) for image, format, options in forms[kind]]


def clips(container: str, *codecs: str) -> list[bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    return [
        clip_of(
            noise, codec, container, rate=5, bit_rate=300_000, pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p"
        )
        for codec in codecs
        if codec in av.codecs_available
    ]


@cache
def photos() -> list[bytes]:
    """A photo of a face, small, in the two formats that most photos come in."""
    small = Image.fromarray(astronaut()[:240, 100:340]).resize((120, 120))
    return [encoded(small, format, quality=80) for format in ("JPEG", "WEBP")]


ROWS = [
    {"path": "a.png", "label": "real", "source": "s", "group": "g1", "split": "val"},
    {"path": "b.png", "label": "fake", "method": "swap", "df_class": "FS", "group": "g2", "split": "val",
     "cues": '[{"area": "jaw", "artifact": "blending"}]'},
]  # fmt: skip


def tables(kind: str) -> list[bytes]:
    columns = list({key: None for row in ROWS for key in row})
    if kind == "csv":
        found = []
        for delimiter in ",;\t":
            lines = io.StringIO()
            writer = csv.DictWriter(lines, columns, delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
            found.append(lines.getvalue().encode())
        return found
    if kind == "jsonl":
        return ["".join(json.dumps(row) + "\n" for row in ROWS).encode()]
    buffer = io.BytesIO()
    pq.write_table(pa.table({key: [row.get(key) for row in ROWS] for key in columns}), buffer)
    return [buffer.getvalue()]


def shipped(name: str) -> list[bytes]:
    return [(EMBEDDED / name).read_bytes()]


def validations() -> list[bytes]:
    from tests.test_html_report import VALIDATION

    steps = [[0.0, 0.05, 0.02, 0.1], [0.4, 1.5, 0.8, 2.5], [0.8, 30.0, 9.0, 60.0]]
    model = {"adapter_sha256": "b" * 64, "experts": {}, "band": [0.3, 0.7], "prompt_sha256": "c" * 64}
    more = {"manifest_sha256": "a" * 64, "model": model, "steps": steps}
    return [json.dumps(VALIDATION | more).encode()]


def a_report() -> Any:
    from tests.test_html_report import face, report

    said = (Evidence("tower", 0.8, cues=(Cue("jaw", "blending", 0.7),), kinds={"whole": 0.1, "part": 0.8}),)
    one = face(evidence=said, crop=((0.0, 0.0), (40.0, 0.0), (0.0, 40.0)))
    return report(path="a.png", faces=(one,), likelihood_ratio={"value": None, "reason": "none"})


TALK = [{"from": "human", "value": "<image>\nReal or fake?"}, {"from": "gpt", "value": "This image is fake. A seam."}]


def instructions() -> list[bytes]:
    one = {"id": "a/detect", "task": "detect", "row": 0, "split": "train", "label": "fake", "conversations": TALK}
    return ["".join(json.dumps(one | {"row": k, "id": f"{k}/detect"}) + "\n" for k in range(2)).encode()]


def conversations() -> list[bytes]:
    """Of each format, without pictures: whether those are there is asked of the disk."""
    said = [{**TALK[0], "value": "Is a face round?"}, TALK[1]]
    spoken = [{"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]} for t in said]
    asked = [{"role": "system", "content": "Be brief."}, *spoken]
    lines = "".join(json.dumps({"messages": asked, "images": []}) + "\n" for _ in range(2))
    return [json.dumps([{"id": "1", "conversations": said}]).encode(), lines.encode()]


def questions() -> list[bytes]:
    made = {"text": "Is the jaw blurred? Answer Yes or No.", "area": "jaw", "artifact": "blur", "origin": "bank"}
    return [json.dumps({"questions": [made, made | {"area": None, "artifact": None, "origin": "random"}]}).encode()]


def cases() -> list[bytes]:
    return [case.dumps([a_report()]).encode()]


def replies() -> list[bytes]:
    top = [{"token": " fake", "logprob": -0.1, "bytes": None}, {"token": " real", "logprob": -2.5, "bytes": None}]
    choice = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": " fake"},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}]},
    }  # fmt: skip
    whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    return [json.dumps(whole).encode()]


# --- parsers ---


FACES_OF = 16  # so many mutants of media, one is also searched for faces


def media(data: bytes) -> None:
    _warm()
    if zlib.crc32(data) % FACES_OF == 0:
        face(data)
        return
    loaded = load_media(data, max_frames=4)
    read_provenance(data, loaded.format)


def statements(data: bytes) -> None:
    """Also of pictures that no longer open."""
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        read_statements(data, format)


def face(data: bytes) -> None:
    """The whole of what becomes of a file before a model looks: decoded, turned, its faces found and aligned."""
    ready(data, 4)


@cache
def _warm() -> None:
    """The models that find faces are loaded once, which is no cost of a file."""
    face(photos()[0])


def from_file(name: str, parse: Callable[[Path], object] | str) -> Callable[[bytes], None]:
    """A parser of a path, or the place that it is imported from, as one of bytes: in a file of that name."""

    def call(data: bytes) -> None:
        path = _folder() / name
        path.write_bytes(data)
        (pkgutil.resolve_name(parse) if isinstance(parse, str) else parse)(path)

    return call


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="x2dfd-fuzz-"))


def manifest(path: Path) -> None:
    first: X2DFDError | None = None
    for read in (read_manifest, lambda one: list(manifest_paths(one))):
        try:
            read(path)
        except X2DFDError as error:
            first = error
    if first is not None:
        raise first


def adapter_card(path: Path) -> None:
    read_adapter_card(path.parent)


def calibration(path: Path) -> None:
    found = Calibration.load(path.parent)
    found.verdict(found.probability({kind: dict.fromkeys(one.means, 1.0) for kind, one in found.kinds.items()}))


def validation(path: Path) -> None:
    found = Validation.load(path.parent)
    assert found is not None
    found.likelihood_ratio(0.5)
    found.summary()


def case_record(path: Path) -> None:
    report = a_report()
    answering: Any = SimpleNamespace(detect_many=lambda *_, **__: [report], explain=lambda *_: report)
    made = case.read(path)
    case.mode_stated(made)
    case.precision_stated(made)
    case.verify(made, path, answering)


def instruction_set(path: Path) -> None:
    from finetune.data import read_records

    samples = [SimpleNamespace(id=str(k), origin="s", synthetic=False, split="train", group="g", source="s", extra={})
               for k in range(2)]  # fmt: skip
    crops: Any = SimpleNamespace(samples=samples)
    read_records(path, "train", crops)


def ranking(path: Path) -> None:
    from x2dfd.assessment.report import read_assessment

    read_assessment(path).to_dict()


REPLY = [b""]  # what the endpoint writes


@cache
def _served() -> tuple[Any, Any]:
    """A model at an endpoint, and the endpoint, which is there as long as somebody holds it."""
    from tests.stand_in import odd, writes
    from x2dfd.served import ServedMLLM

    endpoint = odd(lambda handler: writes(handler, REPLY[0]))
    return ServedMLLM(endpoint.__enter__(), "m", retries=0), endpoint


def endpoint(data: bytes) -> None:
    served, _ = _served()
    served._failures = served._refusals = 0
    REPLY[0] = data
    encoding = served.encode(np.zeros((1, 8, 8, 3), np.uint8))
    served.verdict_logits(encoding, ["?"])
    served.write(encoding, ["?"], [""])


def png_checksums(data: bytes) -> bytes:
    """The same chunks with sums that fit: else hardly a mutant comes past the first."""
    made, at = bytearray(data), 8
    while at + 12 <= len(made):
        end = at + 8 + int.from_bytes(made[at : at + 4], "big")
        if end + 4 > len(made):
            break
        made[end : end + 4] = zlib.crc32(made[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(made)


@dataclass(frozen=True)
class Target:
    """A parser, and small files that it can read."""

    seeds: Callable[[], list[bytes]]
    parse: Callable[[bytes], None]
    text: bool = False  # JSON: values are exchanged as well as bytes
    mend: Callable[[bytes], bytes] | None = None  # makes every second mutant's checksums right


def _picture(kind: str) -> Target:
    return Target(lambda: pictures(kind), media, mend=png_checksums if kind in ("png", "apng") else None)


def _clip(container: str, *codecs: str) -> Target:
    return Target(lambda: clips(container, *codecs), media)


PICTURES = ("jpeg", "png", "apng", "gif", "webp", "avif", "tiff", "bmp")
MEDIA: dict[str, Target] = {kind: _picture(kind) for kind in PICTURES}
if find_spec("pillow_heif") is not None:
    MEDIA["heic"] = _picture("heic")
MEDIA |= {
    "mp4": _clip("mp4", "libx264", "mpeg4"),
    "mov": _clip("mov", "mjpeg", "libx265"),
    "mkv": _clip("matroska", "libvpx", "ffv1"),
    "avi": _clip("avi", "mpeg4", "mjpeg"),
    "flv": _clip("flv", "flv"),
    "ts": _clip("mpegts", "mpeg2video"),
    "ogv": Target(lambda: [(Path(__file__).parent / "seeds" / "theora.ogv").read_bytes()], media),
    "face": Target(photos, face),
    "statements": Target(lambda: [pictures(kind)[0] for kind in ("jpeg", "png", "webp", "tiff")], statements),
}
TARGETS: dict[str, Target] = MEDIA | {
    "manifest.csv": Target(lambda: tables("csv"), from_file("manifest.csv", manifest), text=True),
    "manifest.jsonl": Target(lambda: tables("jsonl"), from_file("manifest.jsonl", manifest), text=True),
    "manifest.parquet": Target(lambda: tables("parquet"), from_file("manifest.parquet", manifest)),
    "adapter-card": Target(lambda: shipped("card.json"), from_file("card.json", adapter_card), text=True),
    "expert-card": Target(
        lambda: shipped("experts/tower.card.json"), from_file("tower.card.json", "x2dfd.experts:read_card"), text=True
    ),
    "calibration": Target(lambda: shipped("calibration.json"), from_file("calibration.json", calibration), text=True),
    "validation": Target(validations, from_file("validation.json", validation), text=True),
    "case": Target(cases, from_file("a.case.json", case_record), text=True),
    "instructions": Target(instructions, from_file("instructions.jsonl", instruction_set), text=True),
    "conversations": Target(conversations, from_file("talk.json", "data_gen.exchange:read"), text=True),
    "questions": Target(questions, from_file("questions.json", "x2dfd.assessment.ask:read_questions"), text=True),
    "assessment": Target(lambda: shipped("assessment.json"), from_file("assessment.json", ranking), text=True),
    "endpoint": Target(replies, endpoint, text=True),
}

# --- mutants ---

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES: tuple[str, ...] = (
    "null", "true", "-1", "0", "1e308", "-1e999", "NaN", '""', '"' + "x" * 5000 + '"', "[]", "{}", "9" * 400,
    "9" * 5000, "[" * 150 + "]" * 150, "[" * 100_000, '{"a":1,"a":2}', '"\\ud800"', '"real"', "[[1,2],3]", "0.5",
)  # fmt: skip
_LEAF = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')


def mutants(target: Target, seed: int) -> Iterator[bytes]:
    """Endless: each seed once as it is, then changed in one to eight places."""
    seeds = target.seeds()
    yield from seeds
    rng = random.Random(seed)
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            if target.text and rng.random() < 0.7:
                data = _other_value(rng, data)
            else:
                _other_bytes(rng, data, rng.choice(seeds))
        yield target.mend(bytes(data)) if target.mend and rng.random() < 0.5 else bytes(data)


def _other_value(rng: random.Random, data: bytearray) -> bytearray:
    said = data.decode("utf-8", "surrogateescape")
    leaves = [leaf for leaf in _LEAF.finditer(said) if said[leaf.end() : leaf.end() + 1] != ":"]  # no keys
    if not leaves:
        return data
    leaf = rng.choice(leaves)
    return bytearray((said[: leaf.start()] + rng.choice(_VALUES) + said[leaf.end() :]).encode("utf-8", "replace"))


def _other_bytes(rng: random.Random, data: bytearray, other: bytes) -> None:
    near_head = rng.random() < 0.5  # where the structure mostly is
    at = rng.randrange(max(min(len(data), 200) if near_head else len(data), 1))
    end = at + rng.choice((1, 2, 4, 16, 64, 1024))
    match rng.randrange(7):
        case 0:
            data[at:end] = bytes(b ^ (1 << rng.randrange(8)) for b in data[at : at + 1]) + data[at + 1 : end]
        case 1:
            number, width = rng.choice(_NUMBERS), rng.choice("BHIQ")
            size = struct.calcsize(f"<{width}")
            data[at : at + size] = struct.pack(rng.choice("<>") + width, number & (256**size - 1))
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        case 4:
            data[at:end] = rng.randbytes(end - at)
        case 5:
            del data[at:]
        case _:
            start = rng.randrange(max(len(other), 1))
            data[at:end] = other[start : start + end - at]


# --- running ---


@dataclass
class Found:
    """What became of a target's mutants."""

    mutants: int = 0
    read: int = 0  # without an error
    codes: Counter[str] = field(default_factory=Counter)
    worst_cpu_s: float = 0.0
    worst_bytes: int = 0
    findings: list[tuple[str, bytes]] = field(default_factory=list)  # what, and the mutant


def measured(name: str, data: bytes) -> tuple[str, float, int]:
    """In the worker: what a target's parser makes of a mutant, as `cost` says it."""
    return cost(TARGETS[name].parse, data)


def cost(parse: Callable[[bytes], object], data: bytes) -> tuple[str, float, int]:
    """The code of the error ("" for none), seconds of CPU, and bytes of memory at the peak."""
    code = ""
    resident = _resident("VmRSS", reset=True)
    start = time.process_time()
    try:
        parse(data)
    except InputError as error:
        code = f"unexpected: {error.reason}" if error.code == "failed" else error.code
    except X2DFDError as error:
        code = error.code
    except Exception as error:
        code = f"unexpected: {type(error).__name__}: {error}"[:200]
    return code, time.process_time() - start, max(_resident("VmHWM") - resident, 0)


def _resident(which: str, reset: bool = False) -> int:
    """Bytes, of this process; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(rf"{which}:\s*(\d+)", status.read_text())[1]) * 1024  # type: ignore[index]


def run(name: str, seed: int = 0, *, most: int | None = None, seconds: float | None = None) -> Found:
    """Mutants of one target, until there were `most` or `seconds` of the clock have passed."""
    found = Found()
    target = TARGETS[name]
    # The clock is long: the first call imports what the parser needs, on a machine that may be busy.
    worker = Worker(10 * CPU_SECONDS, 2 << 30, clock=300.0, doing=name, module="tests.fuzz")
    with contextlib.closing(worker):
        # Imports what the parser needs, outside of the measurement.
        first = [worker.call(measured, name, seed_file)[0] for seed_file in target.seeds()]
        until = None if seconds is None else time.monotonic() + seconds
        for data in mutants(target, seed):
            if (most is not None and found.mutants >= most) or (until is not None and time.monotonic() > until):
                break
            found.mutants += 1
            try:
                code, cpu, peak = worker.call(measured, name, data)
            except InputError as error:
                found.findings.append((f"{error.code}: {error.reason}", data))
                continue
            found.read += not code
            found.codes[code.partition(":")[0]] += bool(code)
            found.worst_cpu_s = max(found.worst_cpu_s, cpu)
            found.worst_bytes = max(found.worst_bytes, peak)
            if code.startswith("unexpected") or cpu > CPU_SECONDS or peak > PEAK_BYTES:
                found.findings.append((code or f"{cpu:.1f} s of CPU, {peak >> 20} MB", data))
        for seed_file, before in zip(target.seeds(), first, strict=True):
            if (code := worker.call(measured, name, seed_file)[0]) != before:
                found.findings.append((f"a seed that gave {before!r} gives {code!r} after all mutants", seed_file))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", choices=[[], *TARGETS, "media"], metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--mutants", type=int, default=2500, metavar="N", help="of each target (default: 2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the mutants that were findings here")
    given = parser.parse_args()
    names = [n for one in given.target or TARGETS for n in (MEDIA if one == "media" else [one])]
    bad = 0
    for name in names:
        found = run(name, given.seed, most=given.mutants)
        bad += len(found.findings)
        codes = ", ".join(f"{n} {code}" for code, n in found.codes.most_common(5) if n)
        print(
            f"{name:<17} {found.mutants} mutants, {found.read} read, {len(found.findings)} findings, worst "
            f"{found.worst_cpu_s:.2f} s CPU, +{found.worst_bytes >> 20} MB; {codes}",
            flush=True,
        )
        for k, (what, data) in enumerate(found.findings):
            print(f"  {what}", flush=True)
            if given.out is not None:
                given.out.mkdir(parents=True, exist_ok=True)
                (given.out / f"{name}-{given.seed}-{k}").write_bytes(data)
    sys.exit(bad > 0)


if __name__ == "__main__":
    from tests import fuzz  # under the name by which the worker can import it

    fuzz.main()
