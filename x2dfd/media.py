"""Turns untrusted bytes into pixels. Every picture and video enters here; one that cannot be read is an `InputError`.

The first bytes decide the format of a file, never its name. Formats come from an allow-list, the pixel count is
checked before anything is decoded, and video containers are opened from local bytes with the format stated, so that
no playlist or link inside a file is followed.

Codes: `not_found`, `not_a_file`, `unreadable`, `empty_file`, `file_too_large`, `url_not_allowed`, `not_an_image`,
`unsupported_format`, `too_many_pixels`, `too_small`, `truncated`, `corrupt`, `bad_video`, `is_video`, and those of
`errors.one_file` and `x2dfd.worker`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from x2dfd.animations import MOVING, load_animation
from x2dfd.errors import InputError, one_file
from x2dfd.files import Json
from x2dfd.paths import open_source
from x2dfd.sniffing import sniff
from x2dfd.stills import Picture, decode, from_image, open_image
from x2dfd.types import MAX_FRAMES
from x2dfd.video import Frame, Video, load_video
from x2dfd.worker import isolated

__all__ = ["Frame", "Picture", "Source", "Video", "check_source", "load_media", "load_picture", "media_summary"]

Source = str | Path | bytes | Image.Image


def check_source(source: object) -> Source:
    """The same object. Raises TypeError where it is no path, bytes or picture."""
    if isinstance(source, Source):
        return source
    raise TypeError(f"a file is a path (str or Path), its bytes or a PIL image, not {type(source).__name__}")


@isolated
def load_media(
    source: Source, *, max_frames: int = 16, keep: Callable[[Frame], Frame] = lambda frame: frame
) -> Picture | Video:
    """Decode a picture, or up to `max_frames` evenly spaced frames of a video or an animation; content decides which.

    `source` is a local path, the file's bytes, or a PIL image. `Video.frames` holds the results of `keep`, so that a
    caller can hold one frame at a time; under `worker.isolating`, `keep` has to be a module's function. Raises
    InputError for a file that cannot be used, TypeError for what names no file, and the exceptions of `keep`.
    """
    check_source(source)
    if not 1 <= max_frames <= MAX_FRAMES:
        raise ValueError(f"the number of frames must be from 1 to {MAX_FRAMES}, not {max_frames}")
    with one_file("decoding"):
        if isinstance(source, Image.Image):
            return from_image(source)
        with open_source(source) as (file, path):
            kind, name = sniff(file)
            media: Picture | Video
            if kind == "video":
                media = load_video(file, name, max_frames, keep, path)
            elif (opened := open_image(file, name)).n_frames > 1 and name in MOVING:
                media = load_animation(opened, max_frames, keep, path)
            else:
                media = decode(opened, path)
            return replace(media, file=_file_facts(file, path) | media.file)


def load_picture(source: Source) -> Picture:
    """Decode a picture, or the first of an animation. Raises InputError; the code is `is_video` for a video."""
    check_source(source)
    with one_file("decoding"):
        if isinstance(source, Image.Image):
            return from_image(source)
        with open_source(source) as (file, path):
            kind, name = sniff(file)
            if kind == "video":
                raise InputError("is_video", f"this is a video ({name}), and a picture is needed")
            picture = decode(open_image(file, name), path)
            return replace(picture, file=_file_facts(file, path) | picture.file)


def media_summary(media: Picture | Video) -> Json:
    """`Report.media` of a picture or a video (with the sampled frames), with facts about the file."""
    height, width = media.pixels.shape[:2] if isinstance(media, Picture) else (media.height, media.width)
    summary: Json = {
        "kind": "image" if isinstance(media, Picture) else "video",
        "format": media.format,
        "width": width,
        "height": height,
        "n_frames": media.n_frames,
        "notes": list(media.notes),
        **media.file,
    }
    if isinstance(media, Video):
        summary["duration_s"] = media.duration_s
        summary["frames"] = [frame.index for frame in media.frames]
        summary["frames_asked"] = media.frames_asked
    return summary


def _file_facts(file: BinaryIO, path: str | None) -> Json:
    if path is None:
        return {"bytes": file.seek(0, os.SEEK_END)}
    info = os.fstat(file.fileno())
    facts: Json = {"bytes": info.st_size}
    with contextlib.suppress(OverflowError, ValueError, OSError):  # before year 1 or after 9999: no date at all
        facts["modified"] = datetime.fromtimestamp(int(info.st_mtime), UTC).isoformat()
    return facts
