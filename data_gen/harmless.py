"""Harmless changes, as phones, apps and platforms make them: a real photo stays real, and a forgery a forgery."""

from __future__ import annotations

import cv2
import numpy as np

from data_gen.tools import (
    Made,
    Method,
    Photo,
    Pixels,
    Rng,
    blend,
    face_size,
    grown_mask,
    oval_mask,
    pick,
)
from x2dfd.degrade import codec, rescale, soft, tone, video_codec
from x2dfd.faces import Array


def _everywhere(pixels: Array, photo: Photo) -> Made:
    return pixels, np.zeros(photo.pixels.shape[:2], np.float32), []


def global_tone(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    return _everywhere(tone(photo.pixels, 0.2 + 0.6 * strength, rng), photo)


def phone_hdr(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Local contrast and sharpening over the whole picture, as phone cameras do."""
    lab = cv2.cvtColor(photo.pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(1 + 1.5 * strength, (4, 4)).apply(lab[..., 0])
    x = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(np.float32)
    return _everywhere(x + (x - soft(x, 1.0)) * rng.uniform(0, 0.8) * strength, photo)


def denoise(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Noise reduction of a camera: the whole picture alike, skin and background."""
    return _everywhere(cv2.bilateralFilter(photo.pixels, 5, 10 + 25 * strength, 2 + 2 * strength), photo)


def soft_focus(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    return _everywhere(soft(photo.pixels.astype(np.float32), 0.4 + 1.4 * strength), photo)


def film_grain(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    grain = soft(rng.standard_normal(photo.pixels.shape[:2]).astype(np.float32), rng.uniform(0.3, 0.9))
    return _everywhere(photo.pixels + grain[..., None] * (4 + 14 * strength), photo)


def shallow_depth(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Background out of focus, head and hair sharp: portrait lenses and portrait modes."""
    head = np.clip(
        oval_mask(photo) + grown_mask(photo, "hair") + grown_mask(photo, "neck") + grown_mask(photo, "ears"), 0, 1
    )
    k = max(1, round(0.12 * face_size(photo))) * 2 + 1
    keep = soft(cv2.dilate(head, np.ones((k, k), np.uint8)), 0.08 * face_size(photo))
    blurred = soft(photo.pixels.astype(np.float32), (0.01 + 0.04 * strength) * face_size(photo))
    return _everywhere(blend(blurred, photo.pixels, keep), photo)


def make_up(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    out = photo.pixels.astype(np.float32)
    lips = soft(grown_mask(photo, "mouth") * (1 - grown_mask(photo, "teeth")), 0.01 * face_size(photo))
    red = np.array([rng.uniform(120, 200), rng.uniform(20, 70), rng.uniform(40, 90)], np.float32)
    out = blend(out, out * 0.5 + red * 0.5, lips * (0.2 + 0.5 * strength))
    lid = soft(np.clip(grown_mask(photo, "eyes", 0.03) - grown_mask(photo, "eyes"), 0, 1), 0.012 * face_size(photo))
    return _everywhere(blend(out, out * 0.6, lid * (0.2 + 0.5 * strength)), photo)


def glasses(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
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
    return _everywhere(out, photo)


def caption(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """A small line of text or a watermark, as platforms add."""
    shade = (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
    out = photo.pixels.copy()
    _write(out, _words(rng, 5, 14), float(rng.choice((0.06, 0.97))), 0.02 + 0.04 * rng.random(), shade, "plain", rng)
    return _everywhere(out, photo)


def big_text(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Words across the picture, the face too, at any height: memes, subtitles, stamps of news channels."""
    out = photo.pixels.copy()
    light = rng.random() < 0.6
    shade = tuple(int(c) for c in (rng.integers(200, 256, 3) if light else rng.integers(0, 60, 3)))
    style = pick(rng, "plain", "outlined", "outlined", "bar")
    place, tall = rng.uniform(0.05, 0.97), 0.03 + 0.09 * strength
    for line in range(int(rng.integers(1, 3))):
        _write(out, _words(rng, 4, 26), place + 1.6 * line * tall, tall, shade, style, rng)
    return _everywhere(out, photo)


def sticker(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
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
    return _everywhere(out, photo)


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


def screenshot(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
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
    return _everywhere(out, photo)


def share_twice(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Scaled and compressed twice, as a message that is passed on."""
    x: Array = photo.pixels
    for _ in range(2):
        x = rescale(x, rng.uniform(0.55, 0.95)).astype(np.float32)
        x = codec(x, pick(rng, ".jpg", ".webp"), int(rng.integers(max(20, round(70 - 40 * strength)), 92)))
    return _everywhere(x, photo)


HARMLESS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("global_tone", "real", global_tone),
        Method("phone_hdr", "real", phone_hdr),
        Method("denoise", "real", denoise),
        Method("soft_focus", "real", soft_focus),
        Method("film_grain", "real", film_grain),
        Method("shallow_depth", "real", shallow_depth),
        Method("make_up", "real", make_up),
        Method("glasses", "real", glasses),
        Method("caption", "real", caption),
        Method("big_text", "real", big_text),
        Method("sticker", "real", sticker),
        Method("screenshot", "real", screenshot),
        Method("share_twice", "real", share_twice),
    )
}


def through_video(change: Method | None) -> Method:
    """A harmless change, or none, and then the whole frame through H.264, as a video's frames are."""

    def make(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
        pixels = change.make(photo, donor, strength, rng)[0] if change else photo.pixels
        return _everywhere(video_codec(np.clip(np.rint(pixels), 0, 255), int(rng.integers(18, 38))), photo)

    return Method(f"{change.name}+video" if change else "video", "real", make)
