"""Degradations of pictures: tone, size, blur, noise, codecs.

The forge, the augmentation of trainings and the tests of robustness share them, so that they mean the same thing.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.faces import Array

Pixels = NDArray[np.uint8]
Rng = np.random.Generator

DEGRADE_VERSION = 3
"""Raise it when the same generator state gives other pixels: cached features of augmented views are then recomputed."""


def soft(x: Array, sigma: float) -> Array:
    """Gaussian blur, sigma in pixels."""
    return np.asarray(cv2.GaussianBlur(x, (0, 0), max(sigma, 0.3)))


def tone(pixels: Array, amount: float, rng: Rng) -> Array:
    """A shift of colour, brightness and contrast; `amount` 1 is plain to see."""
    gain = 1 + rng.uniform(-0.22, 0.22, 3) * amount
    contrast = 1 + rng.uniform(-0.3, 0.3) * amount
    shift = 128 - 128 * contrast + rng.uniform(-30, 30) * amount
    saturation = 1 + rng.uniform(-0.5, 0.5) * amount
    # All of it is linear: contrast and shift, then the gain of each colour, then the distance from grey.
    mix = (saturation * np.eye(3) + (1 - saturation) / 3) * gain
    matrix = np.column_stack([mix * contrast, mix.sum(1) * shift])
    return np.asarray(np.clip(cv2.transform(pixels.astype(np.float32), matrix), 0, 255), np.float32)


def rescale(pixels: Array, factor: float, up: int = cv2.INTER_LINEAR, down: int = cv2.INTER_AREA) -> Array:
    """Shrink by `factor` and enlarge to the old size, with the given interpolations of OpenCV."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, (max(4, round(width * factor)), max(4, round(height * factor))), interpolation=down)
    return np.asarray(cv2.resize(small, (width, height), interpolation=up))


CODEC = (".jpg", 90)
"""Every face crop goes through this codec before a model sees it, so that a PNG and its JPEG look nearly the same.
Trainings use codecs of all qualities."""


def _in_bytes(pixels: Array) -> Pixels:
    """A copy in 0..255, cut off at the ends."""
    return (pixels if pixels.dtype == np.uint8 else np.clip(pixels, 0, 255)).astype(np.uint8)


def codec(pixels: Array, kind: str, quality: int) -> Pixels:
    """Through a real codec and back. `kind`: ".jpg" or ".webp"."""
    flag = cv2.IMWRITE_JPEG_QUALITY if kind == ".jpg" else cv2.IMWRITE_WEBP_QUALITY
    ok, data = cv2.imencode(kind, cv2.cvtColor(_in_bytes(pixels), cv2.COLOR_RGB2BGR), [flag, quality])
    if not ok:
        raise RuntimeError(f"the codec {kind} refused a picture of shape {pixels.shape}")
    decoded: Any = cv2.imdecode(data, cv2.IMREAD_COLOR)
    return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), np.uint8)


def video_codec(pixels: Array, crf: int) -> Pixels:
    """Through H.264 as the first frame of a video, and back. `crf`: x264's constant rate factor, 0 (best) .. 51.

    Its loop filter smooths what a JPEG would leave: the seam of a swap in a video has been through it.
    """
    import av

    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2  # 4:2:0 needs even sides
    clipped = _in_bytes(pixels)
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.time_base, encoder.thread_count = Fraction(1, 25), 1
    encoder.options = {"crf": str(crf), "preset": "veryfast", "tune": "zerolatency"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(clipped[:height, :width]), format="rgb24")
    # One thread each: starting more takes ten times as long as such a small frame.
    packets = [*encoder.encode(frame.reformat(format="yuv420p", threads=1)), *encoder.encode(None)]
    decoder = av.CodecContext.create("h264", "r")
    decoder.thread_count = 1
    frames = [f for p in [*packets, None] for f in decoder.decode(p)]
    if len(frames) != 1:
        raise RuntimeError(f"H.264 gave {len(frames)} frames for a picture of shape {pixels.shape}")
    clipped[:height, :width] = frames[0].to_ndarray(format="rgb24", threads=1)
    return clipped


def degrade(pixels: Pixels, rng: Rng) -> Pixels:
    """Random scaling, blur, noise and codec, drawn alike for both labels. The size stays.

    Used wherever training data is made, so that neither format nor resolution gives the label away.
    """
    x: Array = pixels
    if rng.random() < 0.5:
        up = int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA]))
        x = rescale(x, rng.uniform(0.35, 1.0), up, int(rng.choice([cv2.INTER_AREA, cv2.INTER_LINEAR])))
    if rng.random() < 0.15:
        x = soft(x.astype(np.float32), rng.uniform(0.3, 1.0))
    if rng.random() < 0.15:
        x = x + rng.standard_normal(x.shape, np.float32) * np.float32(rng.uniform(1, 6))
    if rng.random() < 0.3:
        x = tone(x, rng.uniform(0, 0.4), rng)
    if rng.random() < 0.7:
        kind = rng.random()
        if kind < 0.25:
            x = video_codec(x, int(rng.integers(18, 36)))
        else:
            x = codec(x, ".webp" if kind < 0.4 else ".jpg", int(rng.integers(40, 98)))
    return _in_bytes(x if x.dtype == np.uint8 else np.rint(x))  # rint turns bytes into 16-bit floats, slowly
