"""Moving pictures (GIF, APNG, WebP, AVIF) as clips, by Pillow."""

from __future__ import annotations

from collections.abc import Callable

from x2dfd.errors import InputError
from x2dfd.stills import Opened, exif_summary, pillow, rgb, sample_bits
from x2dfd.video import Frame, FrameCollector, Video, positions

MOVING = frozenset({"GIF", "PNG", "WEBP", "AVIF"})
"""Formats whose pictures form a clip, unlike the pages of a TIFF and the views of a JPEG (MPO)."""

_MAX_PIXELS = 2_000_000_000  # in all frames up to the last sampled one, as each is decoded: about 20 s
_UNTIMED_S = 0.1  # a frame without a duration, as browsers show it


def load_animation(opened: Opened, max_frames: int, keep: Callable[[Frame], Frame], path: str | None) -> Video:
    """Up to `max_frames` evenly spaced frames, each upright, in sRGB and on white. Raises InputError."""
    image, notes = opened.image, opened.notes
    reachable = min(opened.n_frames, max(_MAX_PIXELS // (image.width * image.height), 1))
    if reachable < opened.n_frames:
        notes.append("decoding_limit_reached")
    depth = sample_bits(opened)
    collector = FrameCollector(keep, notes)
    index, begins_s, ends_s = -1, 0.0, 0.0  # of the frame that was decoded last
    for target in positions(reachable, max_frames):
        try:
            with pillow(notes):
                while index < target:
                    index += 1
                    image.seek(index)
                    image.load()
                    begins_s = ends_s
                    ends_s += float(image.info.get("duration") or 0) / 1000 or _UNTIMED_S
                snapshot = image.copy()
        except InputError as error:
            if not collector.frames:
                raise
            notes.append(f"undecodable_from_frame:{index}:{error.code}")
            break
        if not collector.add(Frame(target, begins_s, rgb(snapshot, depth, False, opened.orientation, notes))):
            break
    duration = ends_s if index + 1 == opened.n_frames else None
    file = {"exif": exif} if (exif := exif_summary(opened)) else {}
    return collector.video(opened.sha256, opened.name, opened.n_frames, duration, max_frames, path, file)
