"""The pictures of a report's page: shrunk, embedded, and with what was found marked on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from x2dfd import answer
from x2dfd.files import Json
from x2dfd.texts import map_points
from x2dfd.types import FaceReport, Report
from x2dfd.worker import isolated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pictures = NDArray[np.uint8] | Mapping[int, NDArray[np.uint8]] | None

MAX_SIDE = 1200  # longest side of an embedded picture, in pixels
MAX_FRAMES = 6  # frames shown of a video, the most suspicious ones
COLUMN, TALLEST = 460, 544  # pixels of a screen that a picture is scaled to: about as wide as its column, and as high
LETTER = 15  # pixels of the screen that the letter of a marked area takes
THUMB = 96  # side of a file's small picture in a list, in pixels: for 48 of a fine screen
STRIP_SIDE = 640  # of those behind the first, which stand in a strip
COLOURS = ("#e69f00", "#56b4e9", "#00a878", "#f0e442", "#4d8fe0", "#e0663a", "#d98bb8")  # apart for most colour vision


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


def frames_shown(faces: Sequence[FaceReport]) -> list[int]:
    """The frames of a video that are shown: the most suspicious ones, the worst first."""
    suspicion: dict[int, float] = {}
    for face in faces:
        if face.frame is not None:
            suspicion[face.frame] = max(suspicion.get(face.frame, 0.0), face.verdict.p_fake or 0.0)
    return sorted(suspicion, key=lambda frame: -suspicion[frame])[:MAX_FRAMES]


def moment(face: FaceReport) -> str:
    """When a face of a clip is seen, "3.2 s (frame 77)"; without the seconds where they are not known."""
    return f"frame {face.frame}" if face.time_s is None else f"{face.time_s:.1f} s (frame {face.frame})"


def prefix_of(face: FaceReport, report: Report) -> str:
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


def figures(report: Report, picture: Pictures) -> Iterator[Json]:
    """The pictures of a report with their marks: of a clip the most suspicious frame, then the others by time."""
    if picture is None:
        return
    if not isinstance(picture, Mapping):
        yield _figure(report, picture, list(report.faces), "", MAX_SIDE)
        return
    frames = [n for n in frames_shown(report.faces) if n in picture]
    for k, number in enumerate(frames[:1] + sorted(frames[1:])):
        faces = [face for face in report.faces if face.frame == number]
        yield _figure(report, picture[number], faces, moment(faces[0]), STRIP_SIDE if k else MAX_SIDE)


def _figure(report: Report, pixels: NDArray[np.uint8], faces: list[FaceReport], when: str, side: int) -> Json:
    width = float(report.media.get("width") or pixels.shape[1])
    height = float(report.media.get("height") or pixels.shape[0])
    letter = LETTER * width / min(COLUMN, TALLEST * width / height)
    legend: dict[str, tuple[str, str]] = {}
    shapes, boxes, maps = [], [], []
    for face in faces:
        maps += overlays(face)
        places = letter_places(face, letter, height)
        for area, letters, colour in marked_areas(face):
            key = prefix_of(face, report) + letters
            legend[key] = (colour, area if len(faces) == 1 else f"face {answer.number(face, report)}: {area}")
            for polygon, (x, y) in zip(face.areas[area], places[area], strict=True):
                points = " ".join(f"{float(a):.1f},{float(b):.1f}" for a, b in polygon)
                shapes.append(
                    {"points": points, "colour": colour, "key": key, "x": 100 * x / width, "y": 100 * y / height}
                )
        boxes.append(_box(face, report, width, height))
    description = "; ".join(
        f"face {answer.number(f, report)}: {answer.word(f.verdict).lower()}{answer.p_words(f.verdict, report.model)}"
        for f in faces
    )
    name = Path(report.path or "picture").name
    return {
        "uri": jpeg_uri(pixels, side),
        "alt": f"{f'At {when}: ' if when else ''}{name}, {description or 'no face found'}",
        "caption": when and f"{when}, {answer.word(max(faces, key=FaceReport.suspicion).verdict).lower()}",
        "first": side == MAX_SIDE,
        "width": width,
        "height": height,
        "ratio": pixels.shape[1] / pixels.shape[0],
        "shapes": shapes,
        "maps": maps,
        "map_on": any(points_at(face) for face in faces),
        "closer": closer(faces[0], width, height) if len(faces) == 1 else "",
        "closer_on": any(face.verdict.label == "fake" for face in faces),
        "mapped_by": ", ".join(dict.fromkeys(str(m["expert"]) for m in maps)),
        "boxes": boxes,
        "legend": [(key, *rest) for key, rest in legend.items()],
    }


def _box(face: FaceReport, report: Report, width: float, height: float) -> Json:
    """A face's box in pixels, and its label: its place in percent of the picture, its width in widths of a letter."""
    x, y, w, h = (float(v) for v in face.box)
    label = f"{answer.number(face, report)}  {answer.word(face.verdict)}"
    above = y > 0.08 * height  # else the label would lie on the forehead
    return {
        "x": x, "y": y, "w": w, "h": h, "kind": answer.status(face.verdict), "label": label,
        "left": 100 * x / width, "top": 100 * (y if above else y + h) / height, "above": above,
        "wide": 0.6 * len(label) + 1,  # a generous width: the reader's font is not known here
    }  # fmt: skip


def thumbnail(report: Report, picture: Pictures) -> Json | None:
    """A file's small picture for a list, `uri` and the place of its face in percent; None where there is no picture."""
    face = report.decider
    if isinstance(picture, Mapping):
        frame = face.frame if face is not None and face.frame in picture else next(iter(sorted(picture)), None)
        picture = None if frame is None else picture[frame]
    if picture is None:
        return None
    height, width = picture.shape[:2]
    # As `object-fit: cover` shows the middle of the longer side, that side needs no more than its share of pixels.
    side = round(THUMB * max(width, height) / min(width, height))
    x, y = 50.0, 50.0
    if face is not None and report.media.get("width") and report.media.get("height"):
        x = 100 * (face.box[0] + face.box[2] / 2) / report.media["width"]
        y = 100 * (face.box[1] + face.box[3] / 2) / report.media["height"]
    x, y = (min(max(v, 0.0), 100.0) for v in (x, y))
    return {"uri": jpeg_uri(picture, min(side, 4 * THUMB)), "x": x, "y": y}


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
    return face.verdict.label == "fake" and face.verdict.kind != "whole" and map_points(face.evidence)


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
