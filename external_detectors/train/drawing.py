"""Drawings made from photos, as training examples of pictures that are no photographs.

Painted, posterised, outlined and sketched versions by OpenCV's non-photorealistic filters (Gastal & Oliveira,
"Domain Transform for Edge-Aware Image and Video Processing", SIGGRAPH 2011, and mean shift).
"""

from __future__ import annotations

import cv2
import numpy as np

from x2dfd.degrade import Pixels, Rng, soft
from x2dfd.faces import Array

DRAWING_VERSION = 3
"""Raise it when the same generator state gives other pixels: cached features of drawings are then computed anew."""


def drawing(crop: Pixels, rng: Rng) -> Pixels:
    """A crop [s, s, 3] in the style of a drawing or a painting; the style is chosen at random."""
    styles = (_painted, _sketched, _cartoon, _flat)
    out = styles[int(rng.integers(len(styles)))](crop, rng)
    if rng.random() < 0.3:  # colours unlike those of skin
        shifted = cv2.cvtColor(out, cv2.COLOR_RGB2HSV).astype(np.int16)
        shifted[..., 0] = (shifted[..., 0] + int(rng.integers(180))) % 180
        out = cv2.cvtColor(np.clip(shifted, 0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
    return np.asarray(out, np.uint8)


def _painted(x: Pixels, rng: Rng) -> Array:
    small = cv2.stylization(_half(x), sigma_s=rng.uniform(10, 40), sigma_r=rng.uniform(0.3, 0.7))
    return np.asarray(cv2.resize(small, x.shape[1::-1], interpolation=cv2.INTER_CUBIC))


def _half(x: Pixels) -> Array:
    """At half the size, where these filters take a fifth of the time."""
    return np.asarray(cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))


def _sketched(x: Pixels, rng: Rng) -> Array:
    grey, colour = cv2.pencilSketch(
        x, sigma_s=rng.uniform(20, 80), sigma_r=rng.uniform(0.03, 0.1), shade_factor=rng.uniform(0.02, 0.06)
    )
    return np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB) if rng.random() < 0.5 else colour)


def _cartoon(x: Pixels, rng: Rng) -> Array:
    """Flat colours with dark outlines."""
    flat = _flat(x, rng)
    grey = cv2.medianBlur(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), 5)
    lines = cv2.adaptiveThreshold(
        grey, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, int(rng.choice([7, 9, 11])), int(rng.integers(2, 6))
    )
    return np.asarray(np.minimum(flat, soft(lines, 0.6)[..., None]), np.uint8)


def _flat(x: Pixels, rng: Rng) -> Array:
    """A handful of colours, in patches."""
    rounds = (cv2.TERM_CRITERIA_COUNT + cv2.TERM_CRITERIA_EPS, 2, 1)  # OpenCV makes five, for little
    small = cv2.pyrMeanShiftFiltering(_half(x), int(rng.integers(3, 7)), int(rng.integers(15, 40)), termcrit=rounds)
    smooth = cv2.resize(small, x.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    levels = int(rng.integers(4, 9))
    return (
        np.asarray((np.floor(smooth / 256.0 * levels) + 0.5) * (255 / levels), np.float32).clip(0, 255).astype(np.uint8)
    )
