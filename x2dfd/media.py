"""From untrusted bytes to pixels: every picture and video enters here; what cannot be read leaves as one `InputError`.

What a file is, is decided by its first bytes, never by its name. Formats come from an allow-list, the pixel count is
checked before anything is decoded, and video containers are opened from local bytes with the format stated, so that
no playlist or link inside a file is followed.

Codes: `not_found`, `not_a_file`, `unreadable`, `empty_file`, `file_too_large`, `url_not_allowed`, `not_an_image`,
`unsupported_format`, `too_many_pixels`, `too_small`, `truncated`, `corrupt`, `bad_video`, `is_video`, and those of
`errors.one_file`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from x2dfd.animations import MOVING, load_animation
from x2dfd.errors import InputError, one_file
from x2dfd.files import Json
from x2dfd.sniffing import MAX_BYTES, MAX_PIXELS, MIN_SIDE, check_bytes, sniff
from x2dfd.stills import MAX_REDUCED_PIXELS, Picture, decode, from_image, open_image
from x2dfd.video import MAX_VIDEO_FRAMES, Frame, Video, load_video

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "MAX_REDUCED_PIXELS",
    "MAX_VIDEO_FRAMES",
    "MIN_SIDE",
    "Frame",
    "Picture",
    "Source",
    "Video",
    "find_media",
    "load_media",
    "load_picture",
    "media_summary",
]

Source = str | Path | bytes | Image.Image


def load_media(
    source: Source, *, max_frames: int = 16, keep: Callable[[Frame], Frame] = lambda frame: frame
) -> Picture | Video:
    """Decode a picture, or up to `max_frames` evenly spaced frames of a video or an animation; content decides which.

    `source` is a local path, the file's bytes, or a PIL image. `keep` is called with each frame as it is decoded, and
    what it gives back stands in `Video.frames`: a caller that needs no pixels there, or smaller ones, holds one frame
    at a time. Raises InputError for whatever cannot be judged, and what `keep` raises.
    """
    if max_frames < 1:
        raise ValueError("max_frames must be at least 1")
    with one_file("decoding"):
        if isinstance(source, Image.Image):
            return from_image(source)
        with _open(source) as (file, path):
            kind, name = sniff(file)
            media: Picture | Video
            if kind == "video":
                media = load_video(file, name, max_frames, keep, path)
            else:
                opened = open_image(file, name)
                moving = opened.n_frames > 1 and name in MOVING
                media = load_animation(opened, max_frames, keep, path) if moving else decode(opened, path)
            return replace(media, file=_file_facts(file, path) | media.file)


def load_picture(source: Source) -> Picture:
    """Decode a picture, of an animation the first. Raises InputError; the code is `is_video` for a video."""
    with one_file("decoding"):
        if isinstance(source, Image.Image):
            return from_image(source)
        with _open(source) as (file, path):
            kind, name = sniff(file)
            if kind == "video":
                raise InputError("is_video", f"this is a video ({name}), and a picture is needed")
            picture = decode(open_image(file, name), path)
            return replace(picture, file=_file_facts(file, path) | picture.file)


def media_summary(media: Picture | Video) -> Json:
    """What `Report.media` holds: kind, format, width, height, n_frames, notes; for a video also duration, which
    frames were sampled, and how many were asked for.

    Of a file also its size in bytes, when it was last modified, and a summary of its EXIF.
    """
    if isinstance(media, Picture):
        height, width = media.pixels.shape[:2]
        kind = "image"
    else:
        height, width = media.height, media.width
        kind = "video"
    summary: Json = {
        "kind": kind,
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
        summary["frames_asked"] = media.asked
    return summary


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:")  # two letters or more: "C:" is a drive


@contextmanager
def _open(source: str | Path | bytes) -> Iterator[tuple[BinaryIO, str | None]]:
    if isinstance(source, bytes):
        check_bytes(len(source))
        yield io.BytesIO(source), None
        return
    path = str(source)
    local = os.path.lexists(path) if "\0" not in path else False
    if "://" in path or (_SCHEME.match(path) and not local):
        raise InputError("url_not_allowed", "only local files are read; fetch the address first")
    try:
        info = os.stat(path)
        # asked before opening: opening a pipe would wait for its other end
        if not stat.S_ISREG(info.st_mode):
            raise InputError("not_a_file", "this is not a regular file")
        check_bytes(info.st_size)
        file = open(path, "rb")  # noqa: SIM115 - closed below; only the opening belongs inside this try
    except ValueError as error:  # a NUL in the name
        raise InputError("not_found", "there is no such file") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError("not_found", "the path is longer than this system can open") from error
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise InputError("not_found", "there is no such file") from error
        raise InputError("unreadable", f"the file cannot be read: {error.strerror}") from error
    with file:
        yield file, path


def _file_facts(file: BinaryIO, path: str | None) -> Json:
    if path is None:
        return {"bytes": file.seek(0, os.SEEK_END)}
    info = os.fstat(file.fileno())
    facts: Json = {"bytes": info.st_size}
    with contextlib.suppress(OverflowError, ValueError, OSError):  # before year 1 or after 9999: no date at all
        facts["modified"] = datetime.fromtimestamp(int(info.st_mtime), UTC).isoformat()
    return facts


# --- folders ------------------------------------------------------------------------------------------------------


def find_media(
    paths: Iterable[str | Path], *, left_out: Callable[[Path], object] = lambda path: None
) -> Iterator[Path]:
    """Yield files as they are, and every regular file under each folder, in sorted order.

    Hidden files and folders are left out, and so are links that lead out of the folder or to another folder; of such a
    link `left_out` is told. Text files and the like are yielded too: they become rows with an error, not silence. The
    same holds for a path that does not exist and for a folder that may not be read.
    """
    for given in paths:
        path = Path(given)
        try:
            folder = path.is_dir()
        except OSError:  # below a folder that may not be read, or a name that is too long
            folder = False
        if folder:
            yield from _walk(path, left_out)
        else:
            yield path


def _walk(top: Path, left_out: Callable[[Path], object]) -> Iterator[Path]:
    root = top.resolve()
    names = _names(top)
    if names is None:
        yield top  # loading it fails with a reason, which is the row that the user needs
        return
    open_folders = [(top, names)]  # not by recursion: a folder may be thousands deep
    while open_folders:
        folder, names = open_folders[-1]
        if not names:
            open_folders.pop()
            continue
        path = folder / names.pop()
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:  # gone since it was listed
            continue
        except OSError:
            yield path  # as above
            continue
        if stat.S_ISDIR(mode):
            below = _names(path)
            if below is None:
                yield path
            else:
                open_folders.append((path, below))
        elif stat.S_ISLNK(mode) and not (path.is_file() and path.resolve().is_relative_to(root)):
            left_out(path)
        elif stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            yield path


def _names(folder: Path) -> list[str] | None:
    """What is to be looked at in a folder, from last to first; None where it may not be read."""
    try:
        names = os.listdir(folder)  # names alone: of a million files scandir's entries are hundreds of MB
    except OSError:
        return None
    return sorted((name for name in names if not name.startswith(".")), reverse=True)
