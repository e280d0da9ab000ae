"""Reports as one self-contained HTML page: no script, no request to anywhere, every text escaped."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from x2dfd import answer, texts
from x2dfd.answer import LIMITS, NEXT_STEPS, NOT_PROOF, percent, shown
from x2dfd.errors import SetupError
from x2dfd.experts import cards
from x2dfd.files import Json, write_bytes
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import Card, Cue, FaceReport, Failure, ModelInfo, Report
from x2dfd.worker import isolated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8] | Mapping[int, NDArray[np.uint8]] | None

MAX_SIDE = 1200  # longest side of an embedded picture, in pixels
MAX_FRAMES = 6  # frames shown of a video, the most suspicious ones
STRIP_SIDE = 640  # of those behind the first, which stand in a strip
COLOURS = ("#e69f00", "#56b4e9", "#00a878", "#f0e442", "#4d8fe0", "#e0663a", "#d98bb8")  # apart for most colour vision

PROVENANCE = {
    "absent": "The file carries no Content Credentials (C2PA). Most files do not; this is no sign of forgery.",
    "trusted": "The file carries Content Credentials (C2PA) that are valid, from a signer on a trust list.",
    "valid_untrusted": "The file carries intact Content Credentials (C2PA), but their signer is on no trust list.",
    "invalid": "The file carries Content Credentials (C2PA) that do not match it. Ordinary editing can cause this too.",
    "error": "The file's Content Credentials (C2PA) could not be read.",
    "not_checked": "The file was not checked for Content Credentials (C2PA).",
}


UNCOUNTED = "Has no weight of its own in the verdict."


@isolated
def shrunk(source: Path | bytes, frames: int, wanted: set[int | None]) -> tuple[str, Pictures]:
    """The file's SHA-256, and the picture, or the wanted ones of a clip's `frames`, as the page has them.

    They are shrunk at once, as a thousand camera photos would fill the memory. Raises InputError.
    """
    from x2dfd.media import Frame, Picture, load_media

    def keep(frame: Frame) -> Frame:
        pixels = _shrunk(frame.pixels, MAX_SIDE) if frame.index in wanted else frame.pixels[:0]
        return replace(frame, pixels=pixels)

    media = load_media(source, max_frames=frames, keep=keep)
    if isinstance(media, Picture):
        return media.sha256, _shrunk(media.pixels, MAX_SIDE)
    return media.sha256, {frame.index: frame.pixels for frame in media.frames if frame.index in wanted}


def render(reports: Sequence[Report | Failure], pictures: Sequence[Pictures]) -> str:
    """The HTML page for `reports`, a section each.

    `pictures` beside `reports`: pixels [H, W, 3] uint8 RGB at any scale, of a video by frame number, or None for none.
    """
    experts = dict.fromkeys(e.expert for r in reports if isinstance(r, Report) for f in r.faces for e in f.evidence)
    expert_cards = cards(experts)
    blind_spots = {name: card.blind_spot for name, card in expert_cards.items() if isinstance(card, Card)}
    models = [report.model for report in reports if isinstance(report, Report)]
    shared = len(models) > 1 and all(model == models[0] for model in models)  # then its facts stand once, at the end
    sections = [
        _failure(report) if isinstance(report, Failure) else _section(report, picture, {} if shared else blind_spots)
        for report, picture in zip(reports, pictures, strict=True)
    ]
    template = pages(jinja2.PackageLoader("x2dfd")).get_template("report.html.jinja")
    html = template.render(
        cards=[card for name in experts if isinstance(card := expert_cards.get(name), Card)],
        shared=shared,
        rates=[s["rates"] for s in sections if s.get("rates")],
        limits=_limits(sections),
        judged=any(s.get("scale") for s in sections),
        counted=answer.counted(s["kind"] for s in sections),
        steps=NEXT_STEPS,
        sections=sections,
        not_proof=NOT_PROOF,
        lead=LEAD,
        caveat=CAVEAT,
        uncounted=UNCOUNTED,
        generated=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")  # file names may hold bytes that are no UTF-8


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
QUIET = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
"""What keeps a browser from speaking to its maker's servers by itself."""


def printer() -> str:
    """The browser that prints pages to PDF here: its path. Raises SetupError with what to install."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SetupError(
            "a PDF needs a browser to print it, and none is here: install chromium (apt install chromium), or take "
            "--report NAME.html and print it from a browser",
            code="browser_missing",
        )
    return browser


def write_pdf(path: str | os.PathLike[str], html: str) -> None:
    """Prints a page to `path`, whole or not at all. Raises SetupError where nothing here prints, or it fails."""
    browser = printer()
    with tempfile.TemporaryDirectory(prefix="x2dfd-") as folder:
        page, out = Path(folder) / "page.html", Path(folder) / "page.pdf"
        page.write_text(html, "utf-8")
        command = [browser, "--headless", *QUIET, "--no-pdf-header-footer", f"--user-data-dir={folder}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # as root a browser starts in no other way
        command += [f"--print-to-pdf={out}", page.as_uri()]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            data = out.read_bytes()
        except (OSError, subprocess.SubprocessError) as error:
            raise SetupError(
                f"{browser} could not print the page ({error}); print the HTML from a browser", code="print_failed"
            ) from error
    write_bytes(Path(path), data)


def _limits(sections: Sequence[Json]) -> dict[str, str]:
    """What a reader of these sections must know: nothing of estimates where there are none."""
    if not any(s.get("scale") for s in sections):
        return {"Only faces": LIMITS["Only faces"]}
    weighed = any(s.get("ratio") for s in sections)
    return {name: text for name, text in LIMITS.items() if weighed or name != "The likelihood ratio"}


def _failure(failure: Failure) -> Json:
    return {
        "name": failure.path or "(bytes)",
        "kind": "failed",
        "word": answer.WORDS["failed"],
        "p": "",
        "reason": failure.reason,
        "technical": [("Code", failure.code), ("SHA-256", failure.sha256 or "the file could not be read")],
    }


def _section(report: Report, picture: Pictures, blind_spots: Mapping[str, str]) -> Json:
    model, verdict = report.model, report.verdict
    calibrated = model.get("mode") != "paper"
    decider = report.decider
    frames = _frames(report.faces)
    detailed = [face for face in report.faces if face.frame is None or face.frame in frames]
    return {
        "name": report.path or "(picture given as bytes)",
        "kind": answer.status(verdict),
        "word": answer.word(verdict),
        "p": percent(verdict.p_fake) if verdict.p_fake is not None else "",
        "of_kind": answer.KINDS_SAID.get(verdict.kind or "") if verdict.label == "fake" else None,
        "decider": _face(decider, True, report, blind_spots) if decider else None,
        "sign": strongest_sign(report),
        "meaning": answer.meaning(report),
        "remarks": answer.remarks(report),
        "calibrated": calibrated,
        "scale": _scale(verdict.p_fake, answer.band(model), model.get("threshold")),
        "figures": list(_figures(report, picture)),
        "faces": [_face(face, face is decider, report, blind_spots) for face in detailed],
        "extent": _extent(report, frames),
        "briefly": [
            (
                _moment(face),
                answer.number(face, report),
                answer.status(face.verdict),
                answer.word(face.verdict),
                percent(face.verdict.p_fake),
            )
            for face in report.faces
            if face not in detailed
        ],
        "generator": of_generator(report.provenance),
        "statements": report.provenance.get("statements") or (),
        "provenance": _provenance(report.provenance),
        "file": list(_file(report)),
        "ratio": _ratio(report),
        "no_ratio": report.likelihood_ratio.get("reason", ""),
        "rates": _rates(report),
        "warnings": report.warnings,
        "technical": list(_technical(report)),
    }


def _technical(report: Report) -> Iterator[tuple[str, str]]:
    """What answered, in a few rows; the JSON record has it in full."""
    model, versions = report.model, report.versions
    facts = (model.get("name"), model.get("runs_on"), (model.get("served") or {}).get("host"), model.get("mode"))
    yield "Model", ", ".join(str(word) for word in facts if word) or "not stated"
    yield "Versions", ", ".join(f"{name} {versions[name]}" for name in ("x2dfd", "torch") if name in versions)
    adapter = model.get("adapter_sha256") or (model.get("base") or {}).get("sha256")
    hashes = {"file": report.sha256, "model": adapter, "calibration": model.get("calibration_sha256")}
    yield "SHA-256 begins", ", ".join(f"{name} {value[:12]}" for name, value in hashes.items() if value)
    side, codec = model.get("crop_size", ModelInfo.crop_size), model.get("crops_through")
    yield "Face crop", f"{side} pixels" + (f", through {codec}" if codec else "")
    if decoded := answer.decoding(report):
        yield "Decoding", decoded
    if band := answer.band(model):
        yield "Thresholds", f"no answer from {percent(band[0])} to {percent(band[1])}"
    elif (threshold := model.get("threshold")) is not None:
        yield "Threshold", f"fake from {percent(threshold)}"


def strongest_sign(report: Report) -> str:
    """Of the signs that a fake's text names the one that the experts are surest of, "a seam runs along the jaw"; ""
    where it names none. Signs that no expert points at come last, by the text's own word of degree."""
    from x2dfd.texts import cue_clause

    face = report.decider
    if report.verdict.label != "fake" or face is None:
        return ""

    def sureness(cue: Cue) -> float:
        return max((1.0 if score is None else score for score in _sure_to(cue, face, report)), default=0.0)

    return f"{cue_clause(max(face.cues, key=lambda c: (sureness(c), c.score or 0.0)))}." if face.cues else ""


def _sure_to(cue: Cue, face: FaceReport, report: Report) -> list[float | None]:
    """The probabilities that experts with a weight give a sign of a face; [] where none points at it."""
    return [
        c.score
        for e in face.evidence
        if e.expert not in report.uncounted
        for c in e.cues
        if (c.area, c.artifact) == (cue.area, cue.artifact)
    ]


def _frames(faces: Sequence[FaceReport]) -> list[int]:
    """The frames of a video that are shown: the most suspicious ones, the worst first."""
    suspicion: dict[int, float] = {}
    for face in faces:
        if face.frame is not None:
            suspicion[face.frame] = max(suspicion.get(face.frame, 0.0), face.verdict.p_fake or 0.0)
    return sorted(suspicion, key=lambda frame: -suspicion[frame])[:MAX_FRAMES]


def _extent(report: Report, frames: Sequence[int]) -> str:
    """How many faces of a picture, or frames of a clip, are explained: a face in six frames is not six faces."""
    if not frames:
        return "1 face" if len(report.faces) == 1 else f"{len(report.faces)} faces"
    n = max(len(report.media.get("frames") or ()), len({face.frame for face in report.faces}))
    return f"explained in {len(frames)} of {n} frame{'' if n == 1 else 's'}"


def _scale(p: float | None, band: Sequence[float] | None, threshold: float | None) -> Json | None:
    if p is None:
        return None
    description = f"chance of a fake: {percent(p)} on a scale from 0 to 100"
    if band:
        description += f"; no answer is given between {100 * band[0]:.0f} and {100 * band[1]:.0f}"
    return {
        "p": 100 * p,
        "low": 100 * band[0] if band else None,
        "high": 100 * band[1] if band else None,
        "threshold": 100 * threshold if threshold is not None else None,
        "spoken": description,
    }


def _face(face: FaceReport, decides: bool, report: Report, blind_spots: Mapping[str, str]) -> Json:
    prefix = _prefix(face, report)
    letters = {area: prefix + letter for area, letter, _ in marked_areas(face)}
    cues = []
    for c in face.cues:
        sure = max((score for score in _sure_to(c, face, report) if score is not None), default=None)
        cues.append((letters.get(c.area, ""), c.area, c.artifact, "–" if sure is None else percent(sure)))
    return {
        "number": answer.number(face, report),
        "place": answer.place(face, report),
        "alone": len(report.faces) == 1,
        "decides": decides,
        "kind": answer.status(face.verdict),
        "word": answer.word(face.verdict),
        "p": percent(face.verdict.p_fake),
        "reason": answer.reason(report, face),
        "at": None if face.frame is None else _moment(face),
        # Why nothing was assessed is said already; a number and its sign stay on one line.
        "rationale": "" if face.verdict.p_fake is None else face.rationale.replace(" %", "\N{NO-BREAK SPACE}%"),
        "assessed": face.verdict.p_fake is not None,
        "origin": texts.origin(face, report),
        "contradictions": face.contradictions,
        "cues": cues,
        "scored": [
            (e.expert, 100 * e.score, e.note, blind_spots.get(e.expert), e.expert not in report.uncounted)
            for e in face.evidence
            if e.score is not None
        ],
        "unscored": [
            (e.expert, e.note or "no reason was given", blind_spots.get(e.expert))
            for e in face.evidence
            if e.score is None
        ],
        "mllm": None if face.p_fake_mllm is None else percent(face.p_fake_mllm),
    }


def _moment(face: FaceReport) -> str:
    return f"frame {face.frame}" + ("" if face.time_s is None else f", {face.time_s:.1f} s")


def _prefix(face: FaceReport, report: Report) -> str:
    """Keeps the letters of several faces in one picture apart: face 2's area A is `2A`."""
    several = sum(other.frame == face.frame for other in report.faces) > 1
    return str(answer.number(face, report)) if several else ""


def marked_areas(face: FaceReport) -> list[tuple[str, str, str]]:
    """(area, letter, colour) of the cues that can be drawn, in the order of the cues."""
    areas = dict.fromkeys(cue.area for cue in face.cues if face.areas.get(cue.area))
    return [(area, chr(ord("A") + i), COLOURS[i % len(COLOURS)]) for i, area in enumerate(areas)]


def letter_places(face: FaceReport, size: float, height: float) -> dict[str, list[tuple[float, float]]]:
    """By marked area the place of each polygon's letter: its centre, or the nearest place above or below it where no
    other letter of that size stands, in a picture of that height."""
    places: dict[str, list[tuple[float, float]]] = {}
    for area, *_ in marked_areas(face):
        for polygon in face.areas[area]:
            x, y = (float(v) for v in np.mean(polygon, axis=0))
            occupied = [b for points in places.values() for a, b in points if abs(x - a) < size]
            steps = sorted(range(-len(occupied) - 1, len(occupied) + 2), key=lambda step: (abs(step), step))
            free = (
                y + step * size
                for step in steps
                if size / 2 <= y + step * size <= height - size / 2
                and all(abs(y + step * size - b) >= size for b in occupied)
            )
            places.setdefault(area, []).append((x, next(free, y)))
    return places


def _figures(report: Report, picture: Pictures) -> Iterator[Json]:
    if picture is None:
        return
    if not isinstance(picture, Mapping):
        yield _figure(report, picture, list(report.faces), "", MAX_SIDE)
        return
    for k, number in enumerate(n for n in _frames(report.faces) if n in picture):
        faces = [face for face in report.faces if face.frame == number]
        yield _figure(report, picture[number], faces, f"Frame {number}: ", STRIP_SIDE if k else MAX_SIDE)


def _figure(report: Report, pixels: NDArray[np.uint8], faces: list[FaceReport], prefix: str, side: int) -> Json:
    width = float(report.media.get("width") or pixels.shape[1])
    height = float(report.media.get("height") or pixels.shape[0])
    text = max(width, height) * 0.026
    legend: dict[str, tuple[str, str]] = {}
    shapes, boxes, maps = [], [], []
    for face in faces:
        maps += overlays(face)
        places = letter_places(face, text, height)
        for area, letter, colour in marked_areas(face):
            key = _prefix(face, report) + letter
            legend[key] = (colour, area if len(faces) == 1 else f"face {answer.number(face, report)}: {area}")
            for polygon, (x, y) in zip(face.areas[area], places[area], strict=True):
                points = " ".join(f"{float(a):.1f},{float(b):.1f}" for a, b in polygon)
                shapes.append({"points": points, "colour": colour, "key": key, "x": x, "y": y})
        x, y, w, h = (float(v) for v in face.box)
        label = f"{answer.number(face, report)}  {answer.word(face.verdict)}"
        chip = 0.62 * text * len(label)  # a generous width: the reader's font is not known here
        boxes.append(
            {"x": x, "y": y, "w": w, "h": h, "kind": answer.status(face.verdict), "label": label, "chip": chip,
             "chip_x": max(0.0, min(x, width - chip)),
             "chip_y": y - 1.5 * text if y > 1.5 * text else min(y + h, height - 1.5 * text)}
        )  # fmt: skip
    description = "; ".join(
        f"face {answer.number(f, report)}: {answer.word(f.verdict).lower()}{answer.p_words(f.verdict, report.model)}"
        for f in faces
    )
    return {
        "uri": jpeg_uri(pixels, side),
        "alt": f"{prefix}{Path(report.path or 'picture').name}, {description or 'no face found'}",
        "caption": prefix.rstrip(": "),
        "width": width,
        "height": height,
        "text": text,
        "shapes": shapes,
        "maps": maps,
        "map_on": any(points_at(face) for face in faces),
        "closer": closer(faces[0], width, height) if len(faces) == 1 else "",
        "closer_on": any(face.verdict.label == "fake" for face in faces),
        "mapped_by": ", ".join(dict.fromkeys(str(m["expert"]) for m in maps)),
        "boxes": boxes,
        "legend": [(key, *rest) for key, rest in legend.items()],
    }


def overlays(face: FaceReport) -> list[dict[str, str | float]]:
    """The maps that experts drew of a face: `uri` of a PNG, its `side`, the `matrix` that places it, the `expert`.

    None of a face that was not assessed: there is no change to suspect.
    """
    if len(face.crop) != 3 or face.verdict.p_fake is None:
        return []
    (x, y), right, down = face.crop
    made: list[dict[str, str | float]] = []
    for e in face.evidence:
        side = len(e.map)
        if side == 0 or any(len(row) != side for row in e.map):
            continue
        pixels = np.zeros((side, side, 4), np.uint8)  # one a cell
        pixels[..., :3] = (150, 30, 255)  # no skin is violet
        pixels[..., 3] = 110 * np.clip(np.asarray(e.map, np.float32), 0, 1)  # the face is to be seen through it
        matrix = ((right[0] - x) / side, (right[1] - y) / side, (down[0] - x) / side, (down[1] - y) / side, x, y)
        placed = " ".join(f"{v:.4f}" for v in matrix)
        made.append({"uri": _data_uri(pixels, "png"), "matrix": placed, "side": side, "expert": e.expert})
    return made


def closer(face: FaceReport, width: float, height: float) -> str:
    """CSS variables that enlarge a picture of that size about its point (--x, --y) until a small face fills it by half;
    "" where the face is large."""
    x, y, w, h = face.box
    scale = min(0.55 * min(width / w, height / h), 10.0) if w > 0 and h > 0 else 1.0
    if scale < 1.8:
        return ""
    # The point that stays where it is while the face's centre moves to the picture's; no edge is left blank.
    point = [(scale * (a + side / 2) / size - 0.5) / (scale - 1) for a, side, size in ((x, w, width), (y, h, height))]
    left, top = (100 * min(max(f, 0.0), 1.0) for f in point)
    return f"--scale:{scale:.2f};--x:{left:.1f}%;--y:{top:.1f}%"


def points_at(face: FaceReport) -> bool:
    """Whether a map of a face that is called changed in part points at something: then it is shown unasked."""
    verdict = face.verdict
    if verdict.label != "fake" or verdict.kind == "whole":
        return False
    return any(value >= 0.5 for e in face.evidence for row in e.map for value in row)


def jpeg_uri(pixels: NDArray[np.uint8], side: int = MAX_SIDE) -> str:
    """A picture [H, W, 3] as a data URI, its longer side at most `side` pixels."""
    return _data_uri(_shrunk(pixels, side), "jpeg", quality=85)


def _shrunk(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8)


def _data_uri(pixels: NDArray[np.uint8], format: str, **options: int) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _provenance(provenance: Json) -> tuple[str, str, list[tuple[str, str]]]:
    state = str(provenance.get("state", "not_checked"))
    names = {"signer": "Signed by", "generator": "Made with", "signed": "Signed at", "source_types": "States as source",
             "codes": "Codes", "reason": "Reason"}  # fmt: skip
    rows = [(name, _joined(value)) for key, name in names.items() if (value := provenance.get(key))]
    word = state.replace("valid_", "valid, ").replace("_", " ")
    return word, PROVENANCE.get(state, PROVENANCE["not_checked"]), rows


def _file(report: Report) -> Iterator[tuple[str, str]]:
    """What identifies the file, and what it states of itself."""
    media = report.media
    yield "SHA-256", report.sha256
    yield "Format", str(media.get("format", "not stated"))
    size = f"{media['bytes']:,} bytes, " if "bytes" in media else ""
    yield "Size", f"{size}{media.get('width')} x {media.get('height')} pixels"
    if "modified" in media:
        yield "Last modified here", str(media["modified"])
    names = {"make": "Camera maker", "model": "Camera", "software": "Software", "taken": "Taken",
             "digitised": "Digitised", "changed": "Changed", "place": "Place"}  # fmt: skip
    exif = media.get("exif") or {}
    if not exif:
        yield "EXIF", "none" + ", as in most copies that were shared online" * (media.get("kind") != "video")
    for key, value in exif.items():
        yield f"{names.get(key, key)} (EXIF)", str(value)


def _ratio(report: Report) -> Json | None:
    """The likelihood ratio in words; None where there is none."""
    ratio = report.likelihood_ratio
    if ratio.get("value") is None:
        return None
    value, (low, high), (least, most) = float(ratio["value"]), ratio["interval"], ratio["limits"]
    sides, bounds = ("forged pictures", "real ones"), (low, high)
    if value < 1:
        sides, bounds = ("real pictures", "forged ones"), (1 / high, 1 / low)
    at_even_odds = [percent(v / (1 + v)) for v in (value, low, high)]
    return {
        "value": f"{max(value, 1 / value):.3g}",
        "interval": "{:.3g} to {:.3g}".format(*bounds),
        "sides": sides,
        "open": low <= 1 <= high,
        "at_even_odds": "{} (95 %: {} to {})".format(*at_even_odds),
        "most": (f"{most:.3g}", f"{1 / least:.3g}"),
        "propositions": ratio["propositions"],
        "run": ratio["run"],
    }


def _rates(report: Report) -> Json | None:
    """Error rates of the validation run, as rows."""
    validation: Json | None = report.model.get("validation")
    if not validation:
        return None
    names = {"false_alarms": "Real pictures called fake", "misses": "Forged pictures called real",
             "answered": "Pictures that got an answer"}  # fmt: skip
    rows = []
    for key, name in names.items():
        rate = validation["rates"][key]
        interval = rate.get("interval")
        bounds = f" (95 %: {100 * interval[0]:.1f} % to {100 * interval[1]:.1f} %)" if interval else ""
        rows.append((name, f"{100 * rate['value']:.1f} %{bounds}, of {rate['n']}"))
    return {"remark": ""} | dict(validation) | {"rows": rows, "kind": report.media.get("kind")}


def _joined(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def pages(loader: jinja2.BaseLoader) -> jinja2.Environment:
    """Templates whose values are escaped text without characters that steer it; markup of a macro stays markup."""
    return jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
