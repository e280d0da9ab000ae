"""Reports as one self-contained HTML page: no script, no request to anywhere, every text escaped."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from x2dfd import answer, texts
from x2dfd.answer import LIMITS, NEXT_STEPS, NOT_PROOF, percent, shown
from x2dfd.curve import curve
from x2dfd.errors import SetupError
from x2dfd.experts import cards
from x2dfd.figures import figures, frames_shown, marked_areas, moment, prefix_of, thumbnail
from x2dfd.files import Json, write_bytes
from x2dfd.paths import shown_names
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.types import Card, Cue, FaceReport, Failure, ModelInfo, Report, Verdict, renamed

if TYPE_CHECKING:
    from x2dfd.figures import Pictures

PROVENANCE = {
    "absent": "The file carries no Content Credentials (C2PA). Most files do not; this is no sign of forgery.",
    "trusted": "The file carries Content Credentials (C2PA) that are valid, from a signer on a trust list.",
    "valid_untrusted": "The file carries intact Content Credentials (C2PA), but their signer is on no trust list.",
    "invalid": "The file carries Content Credentials (C2PA) that do not match it. Ordinary editing can cause this too.",
    "error": "The file's Content Credentials (C2PA) could not be read.",
    "not_checked": "The file was not checked for Content Credentials (C2PA).",
}


UNCOUNTED = "Has no weight of its own in the verdict."

SERVICES = {
    "TinEye": "https://tineye.com/",
    "Google Lens": "https://lens.google.com/",
    "Content Credentials Verify": "https://contentcredentials.org/verify",
}
"""Pages that the next steps name. The report only links to them: nothing is asked there before a reader clicks."""
FIRST_STEPS = {
    "fake": "Look at the face yourself, and find out whether the picture was only retouched or filtered: that causes "
    "false alarms.",
    "real": "Check place, date and caption: only the faces were judged, and a real photo can be shown with a false "
    "story.",
    "inconclusive": "Look for another picture or clip of the same moment, and judge that: it may give an answer.",
    "none": "Check what the picture shows by other means, such as its place, its date and any writing in it: nothing "
    "of it was judged.",
}
"""By kind of answer, what to do before what every answer needs (x2dfd.answer.NEXT_STEPS)."""
NEXT_ORDER = {"inconclusive": (2, 0, 1, 3), "real": (1, 0, 2, 3)}
"""By kind of answer, the order of NEXT_STEPS where it is another: an original may give an answer where there is none,
and a real photo misleads by where it is shown."""
GROUPS = (*answer.WORDS,)  # files in a list, by their answer: those without one last


def render(reports: Sequence[Report | Failure], pictures: Sequence[Pictures]) -> str:
    """The HTML page for `reports`, a section each.

    `pictures` beside `reports`: pixels [H, W, 3] uint8 RGB at any scale, of a video by frame number, or None for none.
    Several files are listed by their answers, the likeliest fakes first, under their paths from their common folder.
    """
    reports = renamed(reports, shown_names([report.path for report in reports]))
    experts = dict.fromkeys(e.expert for r in reports if isinstance(r, Report) for f in r.faces for e in f.evidence)
    expert_cards = cards(experts)
    blind_spots = {name: card.blind_spot for name, card in expert_cards.items() if isinstance(card, Card)}
    models = [report.model for report in reports if isinstance(report, Report)]
    shared = len(models) > 1 and all(model == models[0] for model in models)  # then its facts stand once, at the end
    sections = [
        _failure(report) if isinstance(report, Failure) else _section(report, picture, {} if shared else blind_spots)
        for report, picture in zip(reports, pictures, strict=True)
    ]
    listed = sorted(sections, key=lambda s: (GROUPS.index(s["kind"]), -s["p_fake"]))
    template = pages(jinja2.PackageLoader("x2dfd")).get_template("report.html.jinja")
    html = template.render(
        cards=[card for name in experts if isinstance(card := expert_cards.get(name), Card)],
        shared=shared,
        rates=[s["rates"] for s in sections if s.get("rates")],
        limits=_limits(sections),
        judged=any(s.get("scale") for s in sections),
        counted=answer.counted(s["kind"] for s in sections),
        unanswered=_unanswered([s["kind"] for s in sections]),
        groups=[(kind, answer.WORDS[kind], [s for s in listed if s["kind"] == kind]) for kind in GROUPS],
        sections=listed,
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


@dataclass(frozen=True)
class Step:
    """Something to do next, and pages that help with it: a name and an address each."""

    text: str
    links: tuple[tuple[str, str], ...] = ()


def next_steps(verdict: Verdict, video: bool = False) -> list[Step]:
    """What to do after an answer, in an order that goes with it."""
    search, published, original, opinion = NEXT_STEPS
    searched, credentials = (("TinEye", "Google Lens"), ("Content Credentials Verify",))
    still = " Of a clip, search for a single frame." if video else ""
    steps = [
        Step(search + still, tuple((name, SERVICES[name]) for name in searched)),
        Step(published),
        Step(original, tuple((name, SERVICES[name]) for name in credentials)),
        Step(opinion),
    ]
    kind = answer.status(verdict)
    return [Step(FIRST_STEPS[kind]), *(steps[k] for k in NEXT_ORDER.get(kind, range(len(steps))))]


def _unanswered(kinds: Sequence[str]) -> str:
    """How many files of how many got no answer, and why; "" where every file got one, or all have the same result."""
    whys = {
        "inconclusive": ("is", "are", "too uncertain"),
        "none": ("was", "were", "not assessed"),
        "failed": ("was", "were", "not judged"),
    }
    n = Counter(kinds)
    counts = [f"{n[kind]} {one if n[kind] == 1 else more} {why}" for kind, (one, more, why) in whys.items() if n[kind]]
    if not counts or len(n) < 2:
        return ""
    total = sum(n[kind] for kind in whys)
    return f"{total} of {len(kinds)} files got no answer: {', '.join(counts)}."


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
        "p_fake": 0.0,
        "of_kind": None,
        "thumbnail": None,
        "reason": failure.reason,
        "technical": [("Code", failure.code), ("SHA-256", failure.sha256 or "the file could not be read")],
    }


def _section(report: Report, picture: Pictures, blind_spots: Mapping[str, str]) -> Json:
    model, verdict = report.model, report.verdict
    calibrated = model.get("mode") != "paper"
    decider = report.decider
    frames = frames_shown(report.faces)
    detailed = [face for face in report.faces if face.frame is None or face.frame in frames]
    return {
        "name": report.path or "(picture given as bytes)",
        "kind": answer.status(verdict),
        "word": answer.word(verdict),
        "p": answer.estimate(verdict, model) if verdict.p_fake is not None else "",
        "p_fake": verdict.p_fake or 0.0,
        "of_kind": answer.KINDS_SAID.get(verdict.kind or "") if verdict.label == "fake" else None,
        "decider": _face(decider, True, report, blind_spots) if decider else None,
        "sign": strongest_sign(report),
        "meaning": answer.meaning(report),
        "remarks": answer.remarks(report),
        "calibrated": calibrated,
        "scale": _scale(verdict, model),
        "figures": list(figures(report, picture)),
        "thumbnail": thumbnail(report, picture),
        "curve": curve(report, report.media.get("frames") or sorted(frames), frames),
        "steps": next_steps(verdict, report.media.get("kind") == "video"),
        "faces": [_face(face, face is decider, report, blind_spots) for face in detailed],
        "extent": _extent(report, frames),
        "briefly": [
            (
                moment(face),
                answer.number(face, report),
                answer.status(face.verdict),
                answer.word(face.verdict),
                answer.estimate(face.verdict, model),
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
        yield "Thresholds", f"no answer from {answer.bound(band[0])} to {answer.bound(band[1])}"
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


def _extent(report: Report, frames: Sequence[int]) -> str:
    """How many faces of a picture, or frames of a clip, are explained: a face in six frames is not six faces."""
    if not frames:
        return "1 face" if len(report.faces) == 1 else f"{len(report.faces)} faces"
    n = max(len(report.media.get("frames") or ()), len({face.frame for face in report.faces}))
    return f"explained in {len(frames)} of {n} frame{'' if n == 1 else 's'}"


def _scale(verdict: Verdict, model: Json) -> Json | None:
    p, band, threshold = verdict.p_fake, answer.band(model), model.get("threshold")
    if p is None:
        return None
    description = f"chance of a fake: {answer.estimate(verdict, model)} on a scale from 0 to 100"
    if band:
        description += f"; no answer is given between {answer.bound(band[0])} and {answer.bound(band[1])}"
    return {
        "p": 100 * p,
        "low": 100 * band[0] if band else None,
        "high": 100 * band[1] if band else None,
        "threshold": 100 * threshold if threshold is not None else None,
        "spoken": description,
    }


def _face(face: FaceReport, decides: bool, report: Report, blind_spots: Mapping[str, str]) -> Json:
    prefix = prefix_of(face, report)
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
        "p": answer.estimate(face.verdict, report.model),
        "reason": answer.reason(report, face),
        "at": None if face.frame is None else moment(face),
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
