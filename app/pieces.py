"""The pieces of the page as HTML, each drawn by a macro of page.jinja, and a visitor's case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jinja2

from x2dfd import curve as over_time
from x2dfd.answer import (
    KINDS_SAID,
    NEXT_STEPS,
    NOT_PROOF,
    WORDS,
    band,
    bound,
    counted,
    decoding,
    estimate,
    in_words,
    meaning,
    number,
    percent,
    remarks,
    status,
)
from x2dfd.errors import X2DFDError
from x2dfd.experts import expert_class
from x2dfd.figures import closer, jpeg_uri, letter_places, marked_areas, overlays, points_at
from x2dfd.html_report import PROVENANCE, UNCOUNTED, pages, strongest_sign
from x2dfd.media import Video, load_media
from x2dfd.statements import CAVEAT, LEAD, of_generator
from x2dfd.texts import origin
from x2dfd.types import FaceReport, Failure, Report, frames_asked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from x2dfd.figures import Pictures

STRIP = 8  # the latest frames, shown while a clip is judged
THUMB = 160  # side of a small picture, in pixels


@dataclass(frozen=True)
class Case:
    """A judged file, kept for one visitor."""

    report: Report
    file: str  # path of the upload until it is deleted
    pictures: Mapping[int | None, str]  # frame number (None: a photo) -> data URI of a JPEG
    model: str = ""  # name, in the page's list, of the model that judged it and answers questions
    stage: Literal["writing", "stopped", "done"] = "done"  # of the explanation
    why: str = ""  # reason for `stopped` if it was not the visitor

    def face(self, index: int | None) -> FaceReport | None:
        """The face with that index; with None, the face that decided the verdict."""
        matches = [f for f in self.report.faces if f.index == index]
        return matches[0] if matches else self.report.decider


@dataclass
class Progress:
    """The progress of the work on a clip."""

    frames: dict[int, str] = field(default_factory=dict)  # number of a searched frame -> data URI of a small JPEG
    worst: dict[int, FaceReport] = field(default_factory=dict)  # number of a judged frame -> most suspicious face

    def frame(self, index: int, pixels: NDArray[np.uint8]) -> None:
        self.frames[index] = jpeg_uri(pixels, THUMB)

    def face(self, face: FaceReport) -> None:
        if face.frame is not None:
            previous = self.worst.get(face.frame, face)
            self.worst[face.frame] = max(previous, face, key=FaceReport.suspicion)


def open_case(report: Report, file: str) -> tuple[Case, Pictures]:
    """The case, and its pixels as `html_report.render` takes them. Raises InputError when the upload is gone."""
    media = load_media(file, max_frames=frames_asked(report.media) or 1)
    if isinstance(media, Video):
        frames = {frame.index: frame.pixels for frame in media.frames}
        return Case(report, file, {number: jpeg_uri(pixels) for number, pixels in frames.items()}), frames
    return Case(report, file, {None: jpeg_uri(media.pixels)}), media.pixels


def card(result: Report | Failure) -> str:
    """The verdict card."""
    if isinstance(result, Failure):
        return draw("problem", result)
    return draw("card", result, status(result.verdict), meaning(result), remarks(result), decoding(result))


def face_panel(case: Case, index: int | None) -> str:
    """The picture with all its boxes, and the report on one face."""
    report, face = case.report, case.face(index)
    frame = face.frame if face else next(iter(case.pictures))
    width, height = (float(report.media[side]) for side in ("width", "height"))
    text = max(width, height) * 0.034
    marks = {area: (letter, colour) for area, letter, colour in marked_areas(face)} if face else {}
    figure = {
        "uri": case.pictures.get(frame),
        "size": (width, height),
        "text": text,
        "letters": letter_places(face, text, height) if face else {},
        "others": [f for f in report.faces if f.frame == frame and f is not face],
        "maps": overlays(face) if face else [],
        "map_on": face is not None and points_at(face),
        "closer": closer(face, width, height) if face else "",
        "first": min(f.index for f in report.faces if f.frame == frame) if face else 0,
        "name": named(face, report) if face else "",
    }
    return draw("panel", report, face, figure, marks, case.stage, case.why)


def curve(case: Case, index: int | None) -> str:
    """A clip's probability over its frames, each a button that shows the frame; nothing for a photo."""
    numbers = [number for number in case.pictures if number is not None]
    current = case.face(index)
    drawn = over_time.curve(case.report, numbers, {current.frame} if current else ())
    return draw("curve", drawn) if drawn else ""


def table(files: Sequence[tuple[str, Report | Failure]], total: int, current: int | None = None) -> str:
    """The results of several files, a row each; `current`: the row whose card is open."""
    verdicts = [None if isinstance(result, Failure) else result.verdict for _, result in files]
    counts = counted("failed" if v is None else status(v) for v in verdicts)
    return draw("table", list(zip(files, verdicts, strict=True)), total, current, counts)


def choices(report: Report) -> list[tuple[str, int]]:
    """The label and index of each face, for the dropdown."""
    return [(f"{named(face, report)}: {in_words(face.verdict, report.model)}", face.index) for face in report.faces]


def named(face: FaceReport, report: Report) -> str:
    """The name of a face: in a photo its number, in a clip its moment, with a number if the frame has several faces."""
    if face.time_s is None:
        return f"Face {face.index + 1}"
    several = sum(other.frame == face.frame for other in report.faces) > 1
    return f"At {face.time_s:.1f} s" + (f", face {number(face, report)}" if several else "")


@cache
def _blind_spot(expert: str) -> str:
    try:
        return expert_class(expert).card.blind_spot
    except X2DFDError:  # a report may name an expert that is not installed here
        return ""


@cache
def _template() -> jinja2.Template:
    own, shared = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.PackageLoader("x2dfd")
    environment = pages(jinja2.ChoiceLoader([own, shared]))
    environment.filters |= {
        "percent": percent,
        "estimate": estimate,
        "bound": bound,
        "band": band,
        "kind": status,
        "blind_spot": _blind_spot,
    }
    environment.globals |= {
        "WORDS": WORDS,
        "KINDS": KINDS_SAID,
        "STEPS": NEXT_STEPS,
        "origin": origin,
        "NOT_PROOF": NOT_PROOF,
        "PROVENANCE": PROVENANCE,
        "UNCOUNTED": UNCOUNTED,
        "LEAD": LEAD,
        "CAVEAT": CAVEAT,
        "of_generator": of_generator,
        "sign": strongest_sign,
    }
    return environment.get_template("page.jinja")


def draw(macro: str, *values: object) -> str:
    """Render a macro of page.jinja; every value is escaped as text."""
    return str(getattr(_template().module, macro)(*values))
