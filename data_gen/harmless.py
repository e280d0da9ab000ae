"""Harmless changes, as phones, apps and platforms make them: a real photo stays real, and a forgery a forgery."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from data_gen.tools import Made, Method, Photo, blend, face_size, grown_mask, oval_mask, pick, rounded
from x2dfd.degrade import Pixels, Rng, codec, rescale, soft, tone, video_codec
from x2dfd.faces import Array


def global_tone(photo: Photo, strength: float, rng: Rng) -> Array:
    return tone(photo.pixels, 0.2 + 0.6 * strength, rng)


def phone_hdr(photo: Photo, strength: float, rng: Rng) -> Array:
    """Local contrast and sharpening over the whole picture, as phone cameras do."""
    lab = cv2.cvtColor(photo.pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(1 + 1.5 * strength, (4, 4)).apply(lab[..., 0])
    x = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(np.float32)
    return x + (x - soft(x, 1.0)) * rng.uniform(0, 0.8) * strength


def denoise(photo: Photo, strength: float, rng: Rng) -> Array:
    """Noise reduction of a camera: the whole picture alike, skin and background."""
    return cv2.bilateralFilter(photo.pixels, 5, 10 + 25 * strength, 2 + 2 * strength)


def soft_focus(photo: Photo, strength: float, rng: Rng) -> Array:
    return soft(photo.pixels.astype(np.float32), 0.4 + 1.4 * strength)


def film_grain(photo: Photo, strength: float, rng: Rng) -> Array:
    grain = soft(rng.standard_normal(photo.pixels.shape[:2]).astype(np.float32), rng.uniform(0.3, 0.9))
    return photo.pixels + grain[..., None] * (4 + 14 * strength)


def shallow_depth(photo: Photo, strength: float, rng: Rng) -> Array:
    """Background out of focus, head and hair sharp: portrait lenses and portrait modes."""
    head = np.clip(
        oval_mask(photo) + grown_mask(photo, "hair") + grown_mask(photo, "neck") + grown_mask(photo, "ears"), 0, 1
    )
    k = max(1, round(0.12 * face_size(photo))) * 2 + 1
    keep = soft(cv2.dilate(head, np.ones((k, k), np.uint8)), 0.08 * face_size(photo))
    blurred = soft(photo.pixels.astype(np.float32), (0.01 + 0.04 * strength) * face_size(photo))
    return blend(blurred, photo.pixels, keep)


def make_up(photo: Photo, strength: float, rng: Rng) -> Array:
    out = photo.pixels.astype(np.float32)
    lips = soft(grown_mask(photo, "mouth") * (1 - grown_mask(photo, "teeth")), 0.01 * face_size(photo))
    red = np.array([rng.uniform(120, 200), rng.uniform(20, 70), rng.uniform(40, 90)], np.float32)
    out = blend(out, out * 0.5 + red * 0.5, lips * (0.2 + 0.5 * strength))
    lid = soft(np.clip(grown_mask(photo, "eyes", 0.03) - grown_mask(photo, "eyes"), 0, 1), 0.012 * face_size(photo))
    return blend(out, out * 0.6, lid * (0.2 + 0.5 * strength))


def glasses(photo: Photo, strength: float, rng: Rng) -> Array:
    """Drawn frames: an odd thing on a face is not a forgery of it."""
    out, size, p = photo.pixels.copy(), face_size(photo), photo.landmarks
    colour = tuple(int(c) for c in rng.integers(5, 90, 3))
    thick = max(1, round((0.01 + 0.02 * strength) * size))
    centres = [p[[33, 133]].mean(0), p[[263, 362]].mean(0)]
    radii = (max(2, round(0.15 * size)), max(2, round(rng.uniform(0.1, 0.15) * size)))
    tilt = float(np.degrees(np.arctan2(*(centres[1] - centres[0])[::-1])))
    for c in centres:
        cv2.ellipse(out, (int(c[0]), int(c[1])), radii, tilt, 0, 360, colour, thick, cv2.LINE_AA)
    temples = ((p[33] - (p[133] - p[33]) * 0.4, p[127]), (p[263] - (p[362] - p[263]) * 0.4, p[356]))
    for a, b in ((p[193], p[417]), *temples):
        cv2.line(out, (int(a[0]), int(a[1])), (int(b[0]), int(b[1])), colour, thick, cv2.LINE_AA)
    return out


def caption(photo: Photo, strength: float, rng: Rng) -> Array:
    """A small line of text or a watermark, as platforms add."""
    shade = (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
    out = photo.pixels.copy()
    _write(out, _words(rng, 5, 14), float(rng.choice((0.06, 0.97))), 0.02 + 0.04 * rng.random(), shade, "plain", rng)
    return out


def big_text(photo: Photo, strength: float, rng: Rng) -> Array:
    """Words across the picture, the face too, at any height: memes, subtitles, stamps of news channels."""
    out = photo.pixels.copy()
    light = rng.random() < 0.6
    shade = tuple(int(c) for c in (rng.integers(200, 256, 3) if light else rng.integers(0, 60, 3)))
    style = pick(rng, "plain", "outlined", "outlined", "bar")
    place, tall = rng.uniform(0.05, 0.97), 0.03 + 0.09 * strength
    for line in range(int(rng.integers(1, 3))):
        _write(out, _words(rng, 4, 26), place + 1.6 * line * tall, tall, shade, style, rng)
    return out


def sticker(photo: Photo, strength: float, rng: Rng) -> Array:
    """A flat shape in front of a part of the face: a sticker, a microphone, a mark of an app."""
    out, size = photo.pixels.copy(), face_size(photo)
    centre = photo.landmarks[int(rng.integers(len(photo.landmarks)))]
    half = [max(2, round(float(v) * size)) for v in rng.uniform(0.06, 0.12 + 0.14 * strength, 2)]
    x, y = int(centre[0]), int(centre[1])
    shades = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2)]
    edge = max(1, round(rng.uniform(0.005, 0.02) * size))
    turn = float(rng.uniform(0, 180))
    for shade, thick in ((shades[0], cv2.FILLED), (shades[1], edge)):
        if strength < 0.5:
            cv2.ellipse(out, (x, y), (half[0], half[1]), turn, 0, 360, shade, thick, cv2.LINE_AA)
        else:
            cv2.rectangle(out, (x - half[0], y - half[1]), (x + half[0], y + half[1]), shade, thick, cv2.LINE_AA)
    return out


def _words(rng: Rng, least: int, most: int) -> str:
    letters = list("ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz 0123456789 .!:")
    return "".join(rng.choice(letters, size=int(rng.integers(least, most))))


def _write(out: Pixels, text: str, place: float, tall: float, shade: tuple[int, ...], style: str, rng: Rng) -> None:
    """Text into the picture: base line at `place`, letters `tall`, shares of the picture's height; cut at the edge."""
    height, width = out.shape[:2]
    font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX]))
    (wide, up), below = cv2.getTextSize(text, font, 1.0, 1)
    scale = tall * height / up
    thick = max(1, round(scale * rng.uniform(1, 2.5)))
    x = round(float(rng.uniform(min(0.0, width - wide * scale), max(0.0, width - wide * scale))))
    y = round(place * height)
    if style == "bar":
        bar = slice(max(0, y - round(1.3 * up * scale)), max(0, y + round(below * scale) + 1))
        out[bar] = 0 if sum(shade) > 380 else 255
    elif style == "outlined":
        other = (0, 0, 0) if sum(shade) > 380 else (255, 255, 255)
        cv2.putText(out, text, (x, y), font, scale, other, 3 * thick, cv2.LINE_AA)
    cv2.putText(out, text, (x, y), font, scale, shade, thick, cv2.LINE_AA)


def screenshot(photo: Photo, strength: float, rng: Rng) -> Array:
    """As shown on a screen: scaled, sharpened by the viewer, bars of an app above or below."""
    out = np.clip(
        rescale(photo.pixels.astype(np.float32), rng.uniform(0.75 - 0.3 * strength, 1.0), cv2.INTER_CUBIC), 0, 255
    )
    out = np.clip(out + (out - soft(out, 1.0)) * rng.uniform(0.1, 0.2 + 0.5 * strength), 0, 255)
    height = out.shape[0]
    thick = max(2, round(rng.uniform(0.02, 0.05) * height))
    shade = float(rng.choice([12.0, 28.0, 240.0, 250.0]))
    for bar in (slice(0, thick), slice(height - thick, height)):
        if rng.random() < 0.6:
            out[bar] = shade
    return out


def share_twice(photo: Photo, strength: float, rng: Rng) -> Array:
    """Scaled and compressed twice, as a message that is passed on."""
    x: Array = photo.pixels
    for _ in range(2):
        x = rescale(x, rng.uniform(0.55, 0.95)).astype(np.float32)
        x = codec(x, pick(rng, ".jpg", ".webp"), int(rng.integers(max(20, round(70 - 40 * strength)), 92)))
    return x


def _method(name: str, change: Callable[[Photo, float, Rng], Array]) -> Method:
    """A change of the pixels, which leaves no mask and no cues."""

    def make(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
        return change(photo, strength, rng), np.zeros(photo.pixels.shape[:2], np.float32), []

    return Method(name, "real", make)


_CHANGES = (
    global_tone, phone_hdr, denoise, soft_focus, film_grain, shallow_depth, make_up, glasses, caption, big_text,
    sticker, screenshot, share_twice,
)  # fmt: skip
HARMLESS: dict[str, Method] = {change.__name__: _method(change.__name__, change) for change in _CHANGES}


def through_video(change: Method | None) -> Method:
    """A harmless change, or none, and then the whole frame through H.264, as a video's frames are."""

    def frame(photo: Photo, strength: float, rng: Rng) -> Array:
        pixels = change.make(photo, None, strength, rng)[0] if change else photo.pixels
        return video_codec(rounded(pixels), int(rng.integers(18, 38)))

    return _method(f"{change.name}+video" if change else "video", frame)
