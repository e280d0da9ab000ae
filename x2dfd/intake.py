"""Turns a file into faces: opens it, finds its faces, and drops its pixels.

Every exception that a file causes in a library becomes an InputError here (`errors.one_file`), or a Failure.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from x2dfd.errors import InputError, one_file
from x2dfd.faces import CROP_SIZE, find_faces, find_missed_faces, find_turned_faces
from x2dfd.files import Json, file_sha256
from x2dfd.media import Frame, Picture, Source, Video, load_media, media_summary
from x2dfd.provenance import read_provenance
from x2dfd.types import Face, FaceReport, Failure, Report, frames_asked
from x2dfd.worker import isolated

OnProgress = Callable[[Frame | FaceReport], None]

FRAME_FACES = 4  # most faces judged in one frame of a video
TURN_EVERY = 4  # while a clip has shown no face, one in so many frames is searched in the other three turns too
MUCH_SURER = 0.2  # an upright face is believed over a turned one if its confidence is higher by this
CUT_OFF = 0.05  # of a face's width: a face that reaches further over the edge counts as cut
MAX_FACES = 24  # in one picture; the smaller ones are left out with a warning
NO_PIXELS = np.empty((0, 0, 3), np.uint8)


@dataclass(frozen=True, eq=False)
class FoundFace:
    """A face, with the frame and time of a clip at which it was found."""

    face: Face
    frame: int | None
    time_s: float | None


@dataclass(frozen=True, eq=False)
class Ready:
    """A file ready for the models: decoded, with its faces, without its pixels."""

    media: Picture | Video | Failure
    summary: Json  # Report.media
    faces: list[FoundFace]
    notes: list[str]
    seconds: dict[str, float]


class Search:
    """Finds the faces of a file, and those of a clip while it is decoded, so that memory holds one frame at a time."""

    def __init__(self, on_progress: OnProgress | None = None, side: int = CROP_SIZE) -> None:
        self.faces: list[FoundFace] = []
        self._side = side  # of the MLLM's crop
        self._on_progress = on_progress
        self.turned = 0  # degrees counterclockwise that set a picture upright whose file does not state them
        self._padded = False  # only `find_missed_faces` found a face in the clip, so every frame gets it too
        self.seconds = 0.0
        self._left_out = 0
        self._frames = 0
        self._n_cut = 0  # pictures or frames whose largest face reaches over the edge

    def picture(self, picture: Picture) -> None:
        faces = self._find(picture.pixels, turning=True)
        self._left_out = len(faces[MAX_FACES:])
        self.faces = [FoundFace(face, None, None) for face in faces[:MAX_FACES]]

    def frame(self, frame: Frame) -> Frame:
        """The frame without its pixels."""
        search_turned = not self.faces and self._frames % TURN_EVERY == 0
        padded = self._padded or (bool(self.faces) and not self.turned and self._frames % TURN_EVERY == 0)
        faces = self._find(frame.pixels, turning=search_turned or bool(self.turned), padded=padded)
        self._frames += 1
        self._left_out += len(faces[FRAME_FACES:])
        for face in faces[:FRAME_FACES]:
            self.faces.append(FoundFace(replace(face, index=len(self.faces)), frame.index, frame.time_s))
        if self._on_progress:
            self._on_progress(frame)
        return replace(frame, pixels=NO_PIXELS)

    def _find(self, pixels: NDArray[np.uint8], turning: bool, padded: bool = False) -> list[Face]:
        start = time.perf_counter()
        faces = find_faces(pixels, self._side)
        if padded and not faces:
            faces = find_missed_faces(pixels, self._side)
            self._padded = self._padded or bool(faces)
        elif turning and not faces:
            turns = (self.turned // 90,) if self.turned else (1, 2, 3)
            faces, turned = find_turned_faces(pixels, turns, self._side)
            if not self.turned:
                missed = find_missed_faces(pixels, self._side)
                if _best_confidence(missed) > _best_confidence(faces) + MUCH_SURER:
                    faces, turned, self._padded = missed, 0, True
            self.turned = self.turned or turned
        self._n_cut += bool(faces) and _is_cut(faces[0], pixels.shape[1], pixels.shape[0])
        self.seconds += time.perf_counter() - start
        return faces

    def notes(self) -> list[str]:
        """Report.warnings."""
        notes = []
        if self._left_out:
            largest = f"; a frame's {FRAME_FACES} largest are judged" if self._frames else ""
            notes.append(f"{self._left_out} smaller faces were left out{largest}")
        if self._n_cut:
            where = f" in {self._n_cut} of {self._frames} frames" if self._frames else ""
            notes.append(f"the largest face is cut by the edge of the picture{where}: what lies outside was not judged")
        if self.turned:
            lies = "is upside down" if self.turned == 180 else "lies on its side"
            notes.append(f"the picture {lies} and has no orientation tag that says so: faces were found by turning it")
        return notes


def _best_confidence(faces: Sequence[Face]) -> float:
    return max((face.confidence for face in faces), default=0.0)


def _is_cut(face: Face, width: int, height: int) -> bool:
    """Whether the face's mesh reaches over the edge of its picture by more than the mesh's own error."""
    (left, top), (right, bottom) = face.landmarks.min(0), face.landmarks.max(0)
    return bool(max(-left, -top, right - width, bottom - height) > CUT_OFF * (right - left))


@isolated
def ready(source: Source, frames: int, side: int = CROP_SIZE, on_progress: OnProgress | None = None) -> Ready:
    """A file ready for the models; `side` is that of the MLLM's crop. Raises InputError (see `errors.one_file`)."""
    search = Search(on_progress, side)
    start = time.perf_counter()
    media = load_media(source, max_frames=frames, keep=search.frame)
    if not isinstance(source, Image):
        with one_file("reading Content Credentials"):
            media = replace(media, provenance=read_provenance(source, media.format))
    decode_seconds = time.perf_counter() - start - search.seconds
    summary = media_summary(media)
    if isinstance(media, Picture):
        search.picture(media)
        # Two batches are held in memory, and a camera's photo takes 150 MB; the models look at the crops alone.
        media = replace(media, pixels=NO_PIXELS)
    if search.turned:
        summary["notes"].append(f"faces_turned:{search.turned}")
    return Ready(media, summary, search.faces, search.notes(), {"decode": decode_seconds, "faces": search.seconds})


def ready_or_failure(
    source: Source, frames: int, side: int = CROP_SIZE, on_progress: OnProgress | None = None
) -> Ready:
    try:
        return ready(source, frames, side, on_progress=on_progress)
    except InputError as error:
        return Ready(_failure(source, error), {}, [], [], {})


@isolated
def faces_of_report(report: Report, source: Source, side: int = CROP_SIZE) -> list[FoundFace]:
    """The faces of a report's file, in the report's order. Raises InputError, also if `source` is another file."""
    search = Search(side=side)
    media = load_media(source, max_frames=frames_asked(report.media) or 1, keep=search.frame)
    if report.sha256 != media.sha256:
        raise InputError("other_picture", "this is not the picture that the report is about")
    if isinstance(media, Picture):
        search.picture(media)
    return search.faces


def _failure(source: Source, error: InputError) -> Failure:
    path = str(source) if isinstance(source, str | Path) else None
    digest = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else None
    if path is not None and error.code != "file_too_large":
        with contextlib.suppress(OSError):  # an unreadable file has no hash
            digest = file_sha256(Path(path)) if Path(path).is_file() else None
    return Failure(path, digest, error.code, error.reason)
