"""Reports as one self-contained HTML page: no script, no request to anywhere, every text escaped."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from x2dfd.case import LIMITS, NEXT_STEPS, NOT_PROOF
from x2dfd.errors import SetupError
from x2dfd.experts import cards
from x2dfd.files import write_bytes
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import Card, FaceReport, Failure, Report, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8] | Mapping[int, NDArray[np.uint8]] | None

MAX_SIDE = 1200  # longest side of an embedded picture, in pixels
MAX_FRAMES = 6  # frames shown of a video, the most suspicious ones
COLOURS = ("#e69f00", "#56b4e9", "#00a878", "#f0e442", "#4d8fe0", "#e0663a", "#d98bb8")  # apart for most colour vision

REASONS = {
    "no_face": "No face was found, so nothing was assessed. This says nothing about whether the picture is real.",
    "in_band": "The estimate lies in the range in which the models are wrong too often to give an answer.",
    "not_a_photograph": "This looks like a drawing, a painting or a render. Forgery detection applies to photos only.",
}
PROVENANCE = {
    "absent": "The file carries no Content Credentials (C2PA). Most files do not; this is no sign of forgery.",
    "trusted": "The file carries Content Credentials (C2PA) that are valid, from a signer on a trust list.",
    "valid_untrusted": "The file carries intact Content Credentials (C2PA), but their signer is on no trust list.",
    "invalid": "The file carries Content Credentials (C2PA) that do not match it. Ordinary editing can cause this too.",
    "error": "The file's Content Credentials (C2PA) could not be read.",
    "not_checked": "The file was not checked for Content Credentials (C2PA).",
}


UNCOUNTED = "Has no weight of its own in the verdict."


def percent(p: float | None) -> str:
    """A probability for people; never rounded to certainty."""
    if p is None:
        return "no estimate"
    return "< 1 %" if p < 0.005 else "> 99 %" if p > 0.995 else f"{100 * p:.0f} %"


def render(reports: Sequence[Report | Failure], pictures: Sequence[Pictures]) -> str:
    """The HTML page for `reports`, a section each.

    `pictures` goes beside `reports`: the picture's pixels [H, W, 3] uint8 RGB at any scale (boxes and areas are placed
    by `report.media`'s width and height), for a video a mapping from frame number to pixels, or None to show none.
    Raises ValueError when the two differ in length.
    """
    known = cards()
    blind_spots = {name: card.blind_spot for name, card in known.items() if isinstance(card, Card)}
    sections = [
        _failure(report) if isinstance(report, Failure) else _section(report, picture, blind_spots)
        for report, picture in zip(reports, pictures, strict=True)
    ]
    named = dict.fromkeys(e.expert for r in reports if isinstance(r, Report) for f in r.faces for e in f.evidence)
    html = _template().render(
        cards=[card for name in named if isinstance(card := known.get(name), Card)],
        limits=LIMITS,
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
    """The browser that prints pages to PDF here: its path. Raises SetupError with what to install.

    A browser and nothing smaller: other HTML printers lay out neither grids nor the face boxes.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SetupError(
            "a PDF needs a browser to print it, and none is here: install chromium (apt install chromium), or take "
            "--report NAME.html and print it from a browser"
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
            raise SetupError(f"{browser} could not print the page ({error}); print the HTML from a browser") from error
    write_bytes(Path(path), data)


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "name": failure.path or "(bytes)",
        "kind": "failed",
        "word": "Not judged",
        "p": "",
        "reason": failure.reason,
        "technical": [("Code", failure.code), ("SHA-256", failure.sha256 or "the file could not be read")],
    }


def _section(report: Report, picture: Pictures, blind_spots: Mapping[str, str]) -> dict[str, Any]:
    model, verdict = report.model, report.verdict
    band = model.get("band")
    calibrated = model.get("mode") != "paper"
    decider = report.decider
    frames = _frames(report.faces)
    full = [face for face in report.faces if face.frame is None or face.frame in frames]
    files = int(report.timings.get("files", 1))
    batch = f" for {files} files together" if files > 1 else ""
    return {
        "name": report.path or "(picture given as bytes)",
        "kind": _kind(verdict),
        "word": _word(verdict),
        "p": percent(verdict.p_fake) if verdict.p_fake is not None else "",
        "meaning": _meaning(report),
        "calibrated": calibrated,
        "scale": _scale(verdict.p_fake, band, model.get("threshold")),
        "figures": list(_figures(report, picture)),
        "faces": [_face(face, face is decider, report, blind_spots) for face in full],
        "briefly": [
            (_moment(face), face.index + 1, _kind(face.verdict), _word(face.verdict), percent(face.verdict.p_fake))
            for face in report.faces
            if face not in full
        ],
        "generator": of_generator(report.provenance),
        "statements": report.provenance.get("statements") or (),
        "provenance": _provenance(report.provenance),
        "file": list(_file(report)),
        "ratio": _ratio(report),
        "rates": _rates(model.get("validation")),
        "warnings": report.warnings,
        "technical": [
            ("SHA-256 of the file", report.sha256),
            *_flat("Media", report.media),
            *_flat("Model", model),
            *_flat("Provenance", {key: value for key, value in report.provenance.items() if key != "statements"}),
            *_flat("Versions", report.versions),
            *((f"Seconds{batch}: {k}", f"{seconds:.2f}") for k, seconds in report.timings.items() if k != "files"),
        ],
    }


def _frames(faces: Sequence[FaceReport]) -> set[int]:
    """The frames of a video that are shown: the most suspicious ones."""
    suspicion: dict[int, float] = {}
    for face in faces:
        if face.frame is not None:
            suspicion[face.frame] = max(suspicion.get(face.frame, 0.0), face.verdict.p_fake or 0.0)
    return set(sorted(suspicion, key=lambda frame: -suspicion[frame])[:MAX_FRAMES])


def _kind(verdict: Verdict) -> str:
    return "none" if verdict.p_fake is None else verdict.label


def _word(verdict: Verdict) -> str:
    if verdict.p_fake is None:
        return "Not assessed"
    return {"fake": "Likely fake", "real": "Likely real", "inconclusive": "Inconclusive"}[verdict.label]


def _meaning(report: Report) -> str:
    verdict = report.verdict
    subject = "this face" if len(report.faces) == 1 else "the most suspicious face"
    if verdict.label == "inconclusive" or verdict.p_fake is None:
        reason = verdict.reason or "unstated"
        return REASONS.get(reason, f"No answer is given; the stated reason is: {reason}.")
    if verdict.label == "fake":
        return f"To the models, {subject} looks more like the forged faces they know than like real ones."
    found = "no sign" if len(report.faces) == 1 else "in no face a sign"
    return (
        f"The models found {found} of the forgeries they know. "
        "That does not show the picture is authentic: a forgery of an unknown kind can look like this."
    )


def _scale(p: float | None, band: Sequence[float] | None, threshold: float | None) -> dict[str, Any] | None:
    if p is None:
        return None
    spoken = f"P(fake) {percent(p)} on a scale from 0 to 100"
    if band:
        spoken += f"; no answer is given between {100 * band[0]:.0f} and {100 * band[1]:.0f}"
    return {
        "p": 100 * p,
        "low": 100 * band[0] if band else None,
        "high": 100 * band[1] if band else None,
        "threshold": 100 * threshold if threshold is not None else None,
        "spoken": spoken,
    }


def _face(face: FaceReport, decides: bool, report: Report, blind_spots: Mapping[str, str]) -> dict[str, Any]:
    prefix = _prefix(face, report.faces)
    letters = {area: prefix + letter for area, letter, _ in _areas(face)}
    rows = [(e.expert, e.score, e.note, blind_spots.get(e.expert)) for e in face.evidence]
    counted = [name not in report.uncounted for name, *_ in rows]
    return {
        "number": face.index + 1,
        "alone": len(report.faces) == 1,
        "decides": decides,
        "kind": _kind(face.verdict),
        "word": _word(face.verdict),
        "p": percent(face.verdict.p_fake),
        "reason": REASONS.get(face.verdict.reason or "", face.verdict.reason),
        "at": None if face.frame is None else _moment(face),
        "rationale": face.rationale,
        "contradictions": face.contradictions,
        "cues": [(letters.get(c.area, ""), c.area, c.artifact, c.score) for c in face.cues],
        "measured": any(cue.score is not None for cue in face.cues),
        "scored": [
            (name, 100 * score, note, blind, counts)
            for (name, score, note, blind), counts in zip(rows, counted, strict=True)
            if score is not None
        ],
        "unscored": [
            (name, note or "no reason was given", blind) for name, score, note, blind in rows if score is None
        ],
        "mllm": None if face.p_fake_mllm is None else percent(face.p_fake_mllm),
    }


def _moment(face: FaceReport) -> str:
    return f"frame {face.frame}" + ("" if face.time_s is None else f", {face.time_s:.1f} s")


def _prefix(face: FaceReport, faces: Sequence[FaceReport]) -> str:
    """Keeps the letters of several faces in one picture apart: face 2's area A is `2A`."""
    return f"{face.index + 1}" if sum(other.frame == face.frame for other in faces) > 1 else ""


def _areas(face: FaceReport) -> list[tuple[str, str, str]]:
    """(area, letter, colour) of the cues that can be drawn, in the order of the cues."""
    named = dict.fromkeys(cue.area for cue in face.cues if face.areas.get(cue.area))
    return [(area, chr(ord("A") + i), COLOURS[i % len(COLOURS)]) for i, area in enumerate(named)]


def _figures(report: Report, picture: Pictures) -> Iterator[dict[str, Any]]:
    if picture is None:
        return
    if not isinstance(picture, Mapping):
        yield _figure(report, picture, list(report.faces), "")
        return
    for number in sorted(_frames(report.faces) & picture.keys()):
        faces = [face for face in report.faces if face.frame == number]
        yield _figure(report, picture[number], faces, f"Frame {number}: ")


def _figure(report: Report, pixels: NDArray[np.uint8], faces: list[FaceReport], what: str) -> dict[str, Any]:
    width = float(report.media.get("width") or pixels.shape[1])
    height = float(report.media.get("height") or pixels.shape[0])
    text = max(width, height) * 0.026
    legend: dict[str, tuple[str, str]] = {}
    shapes, boxes, maps = [], [], []
    for face in faces:
        maps += overlays(face)
        for area, letter, colour in _areas(face):
            key = _prefix(face, faces) + letter
            legend[key] = (colour, area if len(faces) == 1 else f"face {face.index + 1}: {area}")
            for polygon in face.areas[area]:
                xs, ys = [float(p[0]) for p in polygon], [float(p[1]) for p in polygon]
                points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
                centre = (sum(xs) / len(xs), sum(ys) / len(ys)) if polygon else (0.0, 0.0)
                shapes.append({"points": points, "colour": colour, "key": key, "x": centre[0], "y": centre[1]})
        x, y, w, h = (float(v) for v in face.box)
        label = f"{face.index + 1}  {_word(face.verdict)}"
        if face.verdict.p_fake is not None:
            label += f" {percent(face.verdict.p_fake)}"
        chip = 0.62 * text * len(label)  # a generous width: the reader's font is not known here
        boxes.append(
            {"x": x, "y": y, "w": w, "h": h, "kind": _kind(face.verdict), "label": label, "chip": chip,
             "chip_x": max(0.0, min(x, width - chip)),
             "chip_y": y - 1.5 * text if y > 1.5 * text else min(y + h, height - 1.5 * text)}
        )  # fmt: skip
    spoken = "; ".join(f"face {f.index + 1}: {_word(f.verdict).lower()}, {percent(f.verdict.p_fake)}" for f in faces)
    return {
        "uri": _jpeg_uri(pixels),
        "alt": f"{what}{Path(report.path or 'picture').name}, {spoken or 'no face found'}",
        "caption": what.rstrip(": "),
        "width": width,
        "height": height,
        "text": text,
        "shapes": shapes,
        "maps": maps,
        "mapped_by": ", ".join(dict.fromkeys(str(m["expert"]) for m in maps)),
        "boxes": boxes,
        "legend": [(key, *rest) for key, rest in legend.items()],
    }


def overlays(face: FaceReport) -> list[dict[str, str | float]]:
    """The maps that experts drew of a face: `uri` of a PNG, its `side`, the `matrix` that places it, the `expert`."""
    if len(face.crop) != 3:
        return []
    return [_map(face.crop, e.map, e.expert) for e in face.evidence if _square(e.map)]


def _square(rows: Sequence[Sequence[float]]) -> bool:
    return len(rows) > 0 and all(len(row) == len(rows) for row in rows)


def _map(
    corners: Sequence[tuple[float, float]], rows: Sequence[Sequence[float]], expert: str
) -> dict[str, str | float]:
    """An expert's map as a picture of one pixel a cell, and the matrix that lays it over the crop it was made of."""
    from PIL import Image

    values = np.clip(np.asarray(rows, np.float32), 0, 1)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = (255, 60, 20)
    pixels[..., 3] = 200 * values
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (x, y), right, down = corners
    side = len(rows)
    matrix = ((right[0] - x) / side, (right[1] - y) / side, (down[0] - x) / side, (down[1] - y) / side, x, y)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"uri": uri, "matrix": " ".join(f"{v:.4f}" for v in matrix), "side": side, "expert": expert}


def _jpeg_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _provenance(provenance: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, str]]]:
    state = str(provenance.get("state", "not_checked"))
    names = {"signer": "Signed by", "generator": "Made with", "signed": "Signed at", "source_types": "States as source",
             "codes": "Codes", "reason": "Reason"}  # fmt: skip
    rows = [
        (name, value) for key, name in names.items() for _, value in _flat(name, provenance.get(key) or "") if value
    ]
    word = state.replace("valid_", "valid, ").replace("_", " ")
    return word, PROVENANCE.get(state, PROVENANCE["not_checked"]), rows


def _file(report: Report) -> Iterator[tuple[str, str]]:
    """What identifies the file, and what it states of itself."""
    media = report.media
    yield "SHA-256", report.sha256
    if "bytes" in media:
        yield "Size", f"{media['bytes']:,} bytes, {media.get('width')} x {media.get('height')} pixels"
    if "modified" in media:
        yield "Last modified here", str(media["modified"])
    names = {"make": "Camera maker", "model": "Camera", "software": "Software", "taken": "Taken",
             "digitised": "Digitised", "changed": "Changed", "place": "Place"}  # fmt: skip
    exif = media.get("exif") or {}
    if not exif:
        yield "EXIF", "none, as in most copies that went through a network"
    for key, value in exif.items():
        yield f"{names.get(key, key)} (EXIF)", str(value)


def _ratio(report: Report) -> dict[str, Any] | None:
    """The likelihood ratio in words; None in reports that know of none."""
    told = report.likelihood_ratio
    if not told:
        return None
    if told.get("value") is None:
        return {"missing": told.get("reason") or "unstated"}
    value, (low, high), limits = float(told["value"]), told["interval"], told["limits"]
    return {
        "missing": None,
        "value": _times(value),
        "interval": f"{_times(low)} to {_times(high)}",
        "limits": f"{_times(limits[0])} to {_times(limits[1])}",
        "towards": "the second" if value < 1 else "the first",
        "open": low <= 1 <= high,
        "propositions": told["propositions"],
        "run": told["run"],
    }


def _times(value: float) -> str:
    return f"1/{1 / value:.3g}" if value < 1 else f"{value:.3g}"


def _rates(validation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Error rates of the validation run, as rows."""
    if not validation:
        return None
    names = {"false_alarms": "Real pictures called fake", "misses": "Forged pictures called real",
             "answered": "Pictures that got an answer"}  # fmt: skip
    rows = []
    for key, name in names.items():
        rate = validation["rates"][key]
        between = rate.get("interval")
        bounds = f" (95 %: {100 * between[0]:.1f} % to {100 * between[1]:.1f} %)" if between else ""
        rows.append((name, f"{100 * rate['value']:.1f} %{bounds}, of {rate['n']}"))
    return dict(validation) | {"rows": rows}


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A nested value as rows (dotted name, text)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}: {key}" if ":" not in name else f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        yield name, ", ".join(str(item) for item in value) or "none"
    else:
        yield name, "none" if value is None else str(value)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_PAGE.replace("/*STYLE*/", _STYLE))


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1c2430; --soft: #566072; --line: #dfe1e4; --quiet: #eef0f2;
  --fake: #a8281e; --fake-bg: #fbeceb; --real: #1c6b40; --real-bg: #e9f5ee;
  --inconclusive: #835600; --inconclusive-bg: #fbf3e2; --none: #4d5869; --none-bg: #eef0f3;
  --bar: #4a6c97;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #13161b; --card: #1b2027; --ink: #e6e9ed; --soft: #a3adba; --line: #323a45; --quiet: #272e37;
    --fake: #ff9d92; --fake-bg: #3a1f1e; --real: #86d8a5; --real-bg: #18301f;
    --inconclusive: #f1c56b; --inconclusive-bg: #352a14; --none: #b4bdc9; --none-bg: #272e37;
    --bar: #86a9d6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main, header.page, footer { max-width: 66rem; margin: 0 auto; padding: 0 1.25rem; }
header.page { padding-top: 2.25rem; }
h1 { font-size: 1.35rem; font-weight: 650; margin: 0; }
h2 { font-size: 1.15rem; font-weight: 650; margin: 0 0 1rem; }
h3 { font-size: 1.02rem; font-weight: 650; margin: 0 0 .35rem; }
h4 { font-size: .84rem; font-weight: 600; margin: 1.3rem 0 .45rem; color: var(--soft); }
p { margin: .4rem 0; max-width: 44rem; }
.soft { color: var(--soft); } .small { font-size: .875rem; }
.fake { color: var(--fake); } .real { color: var(--real); }
.inconclusive { color: var(--inconclusive); } .none, .failed { color: var(--none); }
.icon { width: 1.15em; height: 1.15em; flex: none; vertical-align: -.2em; }
section.file { margin-top: 2.25rem; padding-top: 2rem; border-top: 1px solid var(--line); }
section.file:first-of-type { border-top: 0; padding-top: 0; margin-top: 1.5rem; }
.top { display: grid; gap: 1.25rem; align-items: start; }
@media (min-width: 52rem) { .top.pictured { grid-template-columns: minmax(0, 1.08fr) minmax(0, 1fr); } }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; padding: 1.25rem 1.4rem; }
.card + .card { margin-top: 1.25rem; }
.verdict { border-top: .3rem solid currentColor; }
.verdict > p:not(.answer, .soft), .verdict > div { color: var(--ink); }
.card > :last-child { margin-bottom: 0; }
.verdict .answer { display: flex; align-items: center; gap: .55rem; font-size: 1.65rem; font-weight: 680; margin: 0; }
.verdict .p { font-size: 1.02rem; margin: .1rem 0 .9rem; }
.verdict .p b { font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.proof { border-top: 1px solid var(--line); margin-top: .9rem; padding-top: .75rem; font-size: .9rem; }
.scale { margin: 1.7rem 0 .6rem; }
.track {
  position: relative; height: .8rem; border-radius: .4rem; background: var(--quiet); border: 1px solid var(--line);
}
.track > span { position: absolute; top: 0; bottom: 0; }
.track .low { left: 0; background: var(--real); opacity: .35; border-radius: .4rem 0 0 .4rem; }
.track .high { right: 0; background: var(--fake); opacity: .35; border-radius: 0 .4rem .4rem 0; }
.track .band {
  background: repeating-linear-gradient(115deg, var(--inconclusive) 0 2px, transparent 2px 7px);
  border: solid var(--inconclusive); border-width: 0 1px;
}
.track .tick { width: 2px; margin-left: -1px; top: -.25rem; bottom: -.25rem; background: var(--soft); }
.track .mark {
  top: -.5rem; bottom: -.3rem; width: .3rem; margin-left: -.15rem; border-radius: .15rem; background: var(--ink);
  outline: 2px solid var(--card);
}
.ends { display: flex; justify-content: space-between; font-size: .8rem; color: var(--soft); margin-top: .35rem; }
.key { list-style: none; margin: .3rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem;
  font-size: .84rem; }
.key li { display: flex; align-items: center; gap: .4rem; }
.swatch { display: inline-block; min-width: 1.35rem; height: 1.15rem; border-radius: .25rem; font-size: .75rem;
  font-weight: 700; line-height: 1.15rem; text-align: center; padding: 0 .25rem; color: #14181e; }
figure { margin: 0; } figure + figure { margin-top: 1.1rem; }
.picture { position: relative; border-radius: .75rem; overflow: hidden; line-height: 0; background: var(--quiet);
  width: fit-content; max-width: 100%; }
.picture img { display: block; max-width: 100%; width: 100%; height: auto; }
.map { display: none; } figure:has(.switch input:checked) .map { display: inline; }
figure:has(.switch input:checked) :is(.area, .letter) { display: none; }
.switch { display: block; margin-bottom: .4rem; }
.picture svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.picture text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; font-weight: 650; }
.box { fill: none; vector-effect: non-scaling-stroke; }
.box.under { stroke: #ffffff; stroke-width: 4.5; stroke-opacity: .85; } .box.over { stroke-width: 2; }
.on-fake { --c: #a8281e; } .on-real { --c: #1c6b40; } .on-inconclusive { --c: #835600; } .on-none { --c: #4d5869; }
.box.over { stroke: var(--c); } .chip { fill: var(--c); } .chip-text { fill: #ffffff; }
.area { fill-opacity: .3; stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.letter { fill: #ffffff; stroke: #14181e; paint-order: stroke; stroke-linejoin: round; }
figcaption { margin-top: .5rem; font-size: .84rem; color: var(--soft); }
.face header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .9rem; }
.rationale { font-size: 1.05rem; margin: .3rem 0; white-space: pre-line; }
.note { border-left: .25rem solid var(--inconclusive); background: var(--inconclusive-bg);
  border-radius: 0 .4rem .4rem 0; padding: .65rem .9rem; margin: .9rem 0; }
.stated { margin: .2rem 0 .5rem; padding-left: 1.1rem; }
.note ul { margin: .2rem 0 0; padding-left: 1.1rem; } .note p { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--soft); font-size: .84rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-size: .84rem; font-weight: 600; color: var(--soft); }
tbody th { font-weight: 500; }
.cues { width: auto; min-width: min(100%, 26rem); overflow-wrap: break-word; }
.answers td, .answers thead th { overflow-wrap: normal; white-space: nowrap; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.experts { list-style: none; margin: 0; padding: 0; display: grid; gap: .85rem; max-width: 46rem; }
.expert { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: .1rem 1rem; }
.expert b { font-weight: 550; }
.expert .bar { grid-column: 1 / -1; height: .5rem; border-radius: .25rem; background: var(--quiet);
  border: 1px solid var(--line); overflow: hidden; }
.expert .bar span { display: block; height: 100%; background: var(--bar); }
.expert p { grid-column: 1 / -1; margin: .1rem 0 0; font-size: .86rem; color: var(--soft); max-width: none; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .75rem; margin-top: 1.25rem; }
summary { cursor: pointer; padding: .85rem 1.4rem; font-weight: 550; }
details table { margin: 0 1.4rem 1.2rem; width: calc(100% - 2.8rem); font-size: .84rem; }
details td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details tbody th { width: 34%; }
a { color: inherit; text-underline-offset: .15em; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
.limits { margin-top: 2.25rem; padding-top: 2rem; border-top: 1px solid var(--line); }
.limits dl { display: grid; gap: .15rem 1.5rem; margin: 0; }
.limits dt { font-weight: 600; } .limits dd { margin: 0 0 .6rem; color: var(--soft); max-width: 44rem; }
@media (min-width: 40rem) { .limits dl { grid-template-columns: 11rem minmax(0, 1fr); } }
.facts { display: grid; grid-template-columns: minmax(7rem, auto) minmax(0, 1fr); gap: .15rem 1rem; margin: .4rem 0;
  font-size: .88rem; } .facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.plain, .steps { padding-left: 1.2rem; margin: .4rem 0; } details caption { padding-top: .6rem; font-weight: 550; }
footer { padding-top: 1.5rem; padding-bottom: 2.5rem; color: var(--soft); font-size: .84rem; }
@media (max-width: 30rem) {
  main, header.page, footer { padding-left: 1rem; padding-right: 1rem; }
  .cues { font-size: .84rem; } .cues th, .cues td { padding-right: .5rem; }
  .card { padding: 1rem 1.05rem; } summary { padding: .8rem 1.05rem; }
  details table { margin: 0 1.05rem 1rem; width: calc(100% - 2.1rem); }
}
@media print {
  :root {
    color-scheme: light; --page: #ffffff; --card: #ffffff; --ink: #000000; --soft: #444444; --line: #bbbbbb;
    --quiet: #eeeeee; --fake: #a8281e; --real: #1c6b40; --inconclusive: #835600; --inconclusive-bg: #fbf3e2;
    --none: #4d5869; --bar: #4a6c97;
  }
  body { font-size: 10.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  section.file + section.file { break-before: page; border-top: 0; }
  figure, .verdict, tr, .note, dl > * { break-inside: avoid; } h2, h3, h4, dt { break-after: avoid; }
  .picture img { max-height: 14cm; width: auto; }
  .switch { display: none; } summary { list-style: none; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""

_PAGE = """\
{% macro icon(kind) %}
<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="2.2"\
 stroke-linecap="round" stroke-linejoin="round">
{% if kind == "fake" %}<path d="M12 3.5 22 20.5H2Z"/><path d="M12 10v4.5M12 17.4v.1"/>
{% elif kind == "real" %}<circle cx="12" cy="12" r="9.5"/><path d="m7.5 12.4 3.1 3.1 6-6.6"/>
{% elif kind == "inconclusive" %}<circle cx="12" cy="12" r="9.5"/>
<path d="M9.2 9.3a2.9 2.9 0 1 1 4.2 2.6c-1 .5-1.4 1.1-1.4 2M12 17v.1"/>
{% else %}<circle cx="12" cy="12" r="9.5"/><path d="M7.5 12h9"/>
{% endif %}</svg>
{% endmacro %}
{% macro stated(statements) %}
<ul class="stated">{% for t in statements %}<li>{{ t.says }} <span class="soft small">({{ t.where }})</span></li>
{% endfor %}</ul>
{% endmacro %}
{% macro facts(rows) %}
<details>
<summary>Technical details</summary>
<table><tbody>
{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
</details>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"\
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>x2dfd report{% if sections|length == 1 %}: {{ sections[0].name }}{% endif %}</title>
<style>/*STYLE*/</style>
</head>
<body>
<header class="page">
<h1>Deepfake analysis report</h1>
<p class="soft small">{{ sections|length }} file{{ "" if sections|length == 1 else "s" }}, made with x2dfd on\
 {{ generated }}</p>
</header>
<main>
{% if sections|length > 1 %}
<nav aria-label="Files">
<table class="answers">
<thead><tr><th scope="col">File</th><th scope="col">Answer</th><th scope="col">P(fake)</th></tr></thead>
<tbody>
{% for s in sections %}
<tr><th scope="row"><a href="#file-{{ loop.index }}"><bdi>{{ s.name }}</bdi></a></th>
<td class="{{ s.kind }}">{{ icon(s.kind) }} {{ s.word }}</td><td class="number">{{ s.p }}</td></tr>
{% endfor %}
</tbody>
</table>
</nav>
{% endif %}
{% for s in sections %}
<section class="file" id="file-{{ loop.index }}" aria-labelledby="name-{{ loop.index }}">
<h2 id="name-{{ loop.index }}"><bdi>{{ s.name }}</bdi></h2>
{% if s.kind == "failed" %}
<div class="card verdict {{ s.kind }}">
<p class="answer failed">{{ icon(s.kind) }} {{ s.word }}</p>
<p>This file could not be judged: {{ s.reason }}</p>
</div>
{{ facts(s.technical) }}
{% else %}
<div class="top{% if s.figures %} pictured{% endif %}">
{% if s.figures %}
<div>
{% for f in s.figures %}
<figure>
{% if f.maps %}
<label class="switch"><input type="checkbox"> Show where a change is suspected (map of: {{ f.mapped_by }})</label>
{% endif %}
<div class="picture">
<img src="{{ f.uri }}" alt="{{ f.alt }}">
<svg viewBox="0 0 {{ "%.0f %.0f"|format(f.width, f.height) }}" preserveAspectRatio="none" aria-hidden="true">
{% for m in f.maps %}<image class="map" href="{{ m.uri }}" width="{{ m.side }}" height="{{ m.side }}"\
 transform="matrix({{ m.matrix }})" preserveAspectRatio="none"/>
{% endfor %}
{% for a in f.shapes %}<polygon class="area" points="{{ a.points }}" fill="{{ a.colour }}" stroke="{{ a.colour }}"/>
{% endfor %}
{% for b in f.boxes %}
{% for layer in ("under", "over") %}
<rect class="box {{ layer }} on-{{ b.kind }}" x="{{ "%.1f"|format(b.x) }}" y="{{ "%.1f"|format(b.y) }}"\
 width="{{ "%.1f"|format(b.w) }}" height="{{ "%.1f"|format(b.h) }}"/>
{% endfor %}
{% endfor %}
{% for a in f.shapes %}<text class="letter" x="{{ "%.1f"|format(a.x) }}" y="{{ "%.1f"|format(a.y) }}"\
 font-size="{{ "%.1f"|format(f.text) }}" stroke-width="{{ "%.1f"|format(f.text / 5) }}" text-anchor="middle"\
 dominant-baseline="central">{{ a.key }}</text>
{% endfor %}
{% for b in f.boxes %}
<g class="on-{{ b.kind }}"><rect class="chip" x="{{ "%.1f"|format(b.chip_x) }}" y="{{ "%.1f"|format(b.chip_y) }}"\
 width="{{ "%.1f"|format(b.chip) }}" height="{{ "%.1f"|format(f.text * 1.5) }}"/>
<text class="chip-text" x="{{ "%.1f"|format(b.chip_x + f.text * 0.4) }}"\
 y="{{ "%.1f"|format(b.chip_y + f.text * 0.78) }}" font-size="{{ "%.1f"|format(f.text) }}"\
 dominant-baseline="central">{{ b.label }}</text></g>
{% endfor %}
</svg>
</div>
<figcaption>
{% if f.caption %}{{ f.caption }}{% endif %}
{% if f.legend %}
<ul class="key" aria-label="Marked areas">
{% for key, colour, area in f.legend %}<li><span class="swatch" style="background:{{ colour }}">{{ key }}</span>\
{{ area }}</li>
{% endfor %}
</ul>
{% endif %}
</figcaption>
</figure>
{% endfor %}
</div>
{% endif %}
<div>
{% if s.generator %}
<div class="note" role="note"><p><strong>{{ lead }}</strong> {{ caveat }}</p>
{{ stated(s.generator) }}</div>
{% endif %}
<div class="card verdict {{ s.kind }}">
<p class="answer {{ s.kind }}">{{ icon(s.kind) }} {{ s.word }}</p>
{% if s.scale %}
<p class="p">Estimated probability of forgery: <b>{{ s.p }}</b>\
{% if not s.calibrated %}, the language model's own number, not calibrated{% endif %}</p>
<div class="scale" role="img" aria-label="{{ s.scale.spoken }}">
<div class="track">
{% if s.scale.low is not none %}
<span class="low" style="width:{{ "%.1f"|format(s.scale.low) }}%"></span>
<span class="high" style="width:{{ "%.1f"|format(100 - s.scale.high) }}%"></span>
<span class="band" style="left:{{ "%.1f"|format(s.scale.low) }}%;\
width:{{ "%.1f"|format(s.scale.high - s.scale.low) }}%"></span>
{% elif s.scale.threshold is not none %}
<span class="low" style="width:{{ "%.1f"|format(s.scale.threshold) }}%"></span>
<span class="high" style="width:{{ "%.1f"|format(100 - s.scale.threshold) }}%"></span>
{% endif %}
{% if s.scale.threshold is not none %}\
<span class="tick" style="left:{{ "%.1f"|format(s.scale.threshold) }}%"></span>{% endif %}
<span class="mark" style="left:{{ "%.1f"|format(s.scale.p) }}%"></span>
</div>
<div class="ends"><span>0 % real</span><span>100 % fake</span></div>
</div>
{% if s.scale.low is not none %}
<p class="small soft">Inconclusive between {{ "%.0f"|format(s.scale.low) }} % and {{ "%.0f"|format(s.scale.high) }} %\
 (hatched){% if s.scale.threshold is not none %}; decision threshold {{ "%.0f"|format(s.scale.threshold) }} %\
 (thin line){% endif %}.</p>
{% endif %}
{% endif %}
<p>{{ s.meaning }}</p>
<p class="proof"><strong>{{ not_proof }}</strong></p>
</div>
{% if s.warnings %}
<div class="note" role="note"><p><strong>Warnings</strong></p>
<ul>{% for w in s.warnings %}<li>{{ w }}</li>{% endfor %}</ul></div>
{% endif %}
<div class="card">
<h3>Provenance: {{ s.provenance[0] }}</h3>
<p class="small soft">{{ s.provenance[1] }} It plays no part in the estimate.</p>
{% if s.statements %}<h4>What the file states of how it was made</h4>
{{ stated(s.statements) }}
<p class="small soft">{{ caveat }}</p>{% endif %}
{% if s.provenance[2] %}<dl class="facts">
{% for name, value in s.provenance[2] %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>{% endif %}
</div>
<div class="card">
<h3>The file</h3>
<dl class="facts">
{% for name, value in s.file %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>
<p class="small soft">The file was not changed. What EXIF states can be written by anyone.</p>
</div>
</div>
</div>
{% if not s.figures %}<p class="soft small">The picture is not embedded in this report.</p>{% endif %}
{% for face in s.faces %}
<article class="card face" style="margin-top:1.25rem">
<header>
<h3>{{ "The face" if face.alone else "Face %d"|format(face.number) }}{% if face.at %}, {{ face.at }}{% endif %}</h3>
<span class="{{ face.kind }}">{{ icon(face.kind) }} {{ face.word }}, {{ face.p }}</span>
{% if face.decides and not face.alone %}<span class="soft small">decides the file's answer</span>{% endif %}
</header>
{% if face.reason %}<p class="small soft">{{ face.reason }}</p>{% endif %}
<h4>Explanation</h4>
{% if face.rationale %}<p class="rationale">{{ face.rationale }}</p>
<p class="small soft">Written by the language model after the answer was scored. It may be wrong in detail.
{% if face.kind == "inconclusive" %}No answer is given here: the text argues for the side that is a little\
 likelier.{% endif %}</p>
{% else %}<p class="soft">No explanation was asked for.</p>{% endif %}
{% if face.contradictions %}
<div class="note" role="note"><p><strong>The explanation contradicts the findings</strong></p>
<ul>{% for c in face.contradictions %}<li>{{ c }}</li>{% endfor %}</ul></div>
{% endif %}
{% if face.cues %}
<h4>Signs named in the explanation</h4>
<table class="cues">
<thead><tr><th scope="col">On the picture</th><th scope="col">Area</th><th scope="col">Artifact</th>\
{% if face.measured %}<th scope="col">Strength</th>{% endif %}</tr></thead>
<tbody>
{% for letter, area, artifact, score in face.cues %}
<tr><td>{{ letter or "not drawn" }}</td><th scope="row">{{ area }}</th><td>{{ artifact }}</td>\
{% if face.measured %}<td>{{ "not measured" if score is none else "%.0f %%"|format(100 * score) }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
{% endif %}
{% if face.scored %}
<h4>What each expert says (its own probability of forgery)</h4>
<ul class="experts">
{% for name, score, note, blind, counts in face.scored %}
<li class="expert"><b>{{ name }}</b><span class="number">{{ "%.0f %%"|format(score) }}</span>
<div class="bar" aria-hidden="true"><span style="width:{{ "%.1f"|format(score) }}%"></span></div>
{% if note %}<p>{{ note }}</p>{% endif %}
{% if not counts %}<p>{{ uncounted }}</p>{% endif %}
{% if blind %}<p>Blind spot: {{ blind }}</p>{% endif %}</li>
{% endfor %}
</ul>
{% endif %}
{% if face.unscored %}
<h4>Experts that gave no score</h4>
<ul class="experts">
{% for name, note, blind in face.unscored %}
<li class="expert"><b>{{ name }}</b><span class="soft small">no score</span><p>{{ note }}</p>
{% if blind %}<p>Blind spot: {{ blind }}</p>{% endif %}</li>
{% endfor %}
</ul>
{% endif %}
{% if face.mllm %}
<h4>The language model's own number</h4>
<p><span class="number">{{ face.mllm }}</span>
<span class="soft small">probability of forgery, before calibration</span></p>
{% endif %}
</article>
{% endfor %}
{% if s.ratio %}
<div class="card" style="margin-top:1.25rem">
<h3>What the score weighs</h3>
{% if s.ratio.missing %}<p>No likelihood ratio is given: {{ s.ratio.missing }}.</p>
{% else %}
<p>Likelihood ratio <b class="number">{{ s.ratio.value }}</b> (95 %: {{ s.ratio.interval }}), in favour of\
 {{ s.ratio.towards }} of two propositions{% if s.ratio.open %};\
 the interval holds 1, so the score does not speak clearly for either{% endif %}.</p>
<ul class="plain">{% for p in s.ratio.propositions %}<li>{{ p }}</li>{% endfor %}</ul>
<p class="small soft">A score like this one is that many times as frequent under the first as under the second,
in the validation run ({{ s.ratio.run }}). A run of that size supports no more than {{ s.ratio.limits }}.
How likely a forgery was beforehand is not part of it.</p>
{% endif %}
{% if s.rates %}
<h4>Error rates of the model in that run</h4>
<dl class="facts">
{% for name, value in s.rates.rows %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
<dt>Forgeries in it</dt><dd>{{ s.rates.methods|join(", ") }} ({{ s.rates.n_fake }} pictures)</dd>
<dt>Real pictures in it</dt><dd>{{ s.rates.sources|join(", ") }} ({{ s.rates.n_real }} pictures)</dd>
<dt>People, clips or photos</dt><dd>{{ s.rates.n_groups }}</dd>
<dt>Cost of the scores (Cllr)</dt><dd>{{ "%.2f"|format(s.rates.cllr) }}; 0 is perfect, 1 says nothing</dd>
</dl>
{% endif %}
</div>
{% endif %}
{% if s.briefly %}
<details>
<summary>Faces in other frames ({{ s.briefly|length }})</summary>
<table>
<thead><tr><th scope="col">When</th><th scope="col">Face</th>\
<th scope="col">Answer</th><th scope="col">P(fake)</th></tr></thead>
<tbody>
{% for when, number, kind, word, p in s.briefly %}
<tr><th scope="row">{{ when }}</th><td>{{ number }}</td><td class="{{ kind }}">{{ word }}</td><td>{{ p }}</td></tr>
{% endfor %}
</tbody>
</table>
</details>
{% endif %}
{{ facts(s.technical) }}
{% endif %}
</section>
{% endfor %}
{% if cards %}
<details>
<summary>The experts' cards</summary>
{% for card in cards %}
<table><caption>{{ card.name }}, version {{ card.version }}</caption><tbody>
{% for name, value in (("Blind spot", card.blind_spot), ("Paper", card.paper), ("Trained on", card.trained_on),
 ("Licence", card.licence), ("Source", card.source), ("SHA-256 of the weights", card.sha256)) if value %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table>
{% endfor %}
</details>
{% endif %}
<section class="limits" aria-labelledby="limits">
<h2 id="limits">How to read this, and its limits</h2>
<dl>
{% for name, text in limits.items() %}<dt>{{ name }}</dt>
<dd>{{ text }}</dd>
{% endfor %}
</dl>
<h2>Next steps for the reader</h2>
<ol class="steps">
{% for step in steps %}<li>{{ step }}</li>
{% endfor %}</ol>
<p class="small soft">Whether this still is what the file gives: <code>x2dfd verify NAME.case.json FILE</code>,
with the record that was written beside this page.</p>
</section>
</main>
<footer>The file itself was not changed. {{ not_proof }}</footer>
</body>
</html>
"""
