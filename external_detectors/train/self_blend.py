"""Self-blending: a photo blended with a changed copy of itself, made anew for every sample.

After Shiohara & Yamasaki, "Detecting Deepfakes with Self-Blended Images" (CVPR 2022): a detector learns the trace of
blending and not a method or a person. Not only whole faces are blended but also parts of them, most often the region of
the mouth, because a reenactment replaces little else.
"""

from __future__ import annotations

import cv2
import numpy as np

from x2dfd.degrade import Pixels, Rng, codec, rescale, soft
from x2dfd.faces import Array

_MOUTH = (61, 291, 17, 0, 57, 287, 200, 164)
"""Mesh points around the mouth."""


def self_blend(crop: Pixels, landmarks: Array, rng: Rng) -> tuple[Pixels, Array]:
    """A forged crop [s, s, 3], and the copy's share of each pixel [s, s], 0..1.

    `landmarks`: [468, 2] in the crop's pixels.
    """
    size = crop.shape[0]
    mask: Array = np.zeros((size, size), np.float32)
    hull = cv2.convexHull(np.ascontiguousarray(_region(landmarks, rng), np.float32))
    cv2.fillConvexPoly(mask, hull.astype(np.int32), 1.0)
    bend = [_field(size, rng) * rng.uniform(1, 9) for _ in range(2)]
    mask = _warped(mask, bend[0], bend[1])
    mask = soft(mask, rng.uniform(1, 6))
    if rng.random() < 0.5:  # a harder edge inside of the soft one
        mask = soft(np.clip((mask - 0.3) * 2.5, 0, 1), rng.uniform(0.8, 3))
    mask *= np.float32(rng.choice([0.25, 0.5, 0.75, 1, 1, 1]))
    inner: Array = crop
    outer: Array = crop
    if rng.random() < 0.5:
        inner = _changed(inner, rng)
    else:
        outer = _changed(outer, rng)
    if rng.random() < 0.35:
        inner = _warped(inner, bend[1] * np.float32(0.35), bend[0] * np.float32(0.35))
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-3, 3), rng.uniform(0.96, 1.04))
    matrix[:, 2] += rng.uniform(-0.03, 0.03, 2) * size
    inner = np.asarray(cv2.warpAffine(inner, matrix, (size, size), borderMode=cv2.BORDER_REFLECT), np.uint8)
    mask = np.asarray(cv2.warpAffine(mask, matrix, (size, size)), np.float32)
    return np.asarray(cv2.blendLinear(inner, outer, mask, 1 - mask), np.uint8), mask


def _region(points: Array, rng: Rng) -> Array:
    """The mesh points whose hull is replaced: the face, its lower part, its middle, the mouth, a disc anywhere."""
    kind = rng.random()
    if kind < 0.35:
        return np.asarray(points[points[:, 1] > np.percentile(points[:, 1], rng.uniform(5, 45))])
    if kind < 0.48:
        width = np.ptp(points[:, 0]) * rng.uniform(0.2, 0.45)
        return np.asarray(points[np.abs(points[:, 0] - np.median(points[:, 0])) < width])
    if kind < 0.6:
        mouth = points[list(_MOUTH)]
        return np.asarray((mouth - mouth.mean(0)) * rng.uniform(1.0, 1.5) + mouth.mean(0), np.float32)
    if kind < 0.68:
        centre = points[rng.integers(len(points))]
        reach = np.ptp(points[:, 1]) * rng.uniform(0.15, 0.35)
        return np.asarray(points[((points - centre) ** 2).sum(1) < reach**2])
    return points


def _field(size: int, rng: Rng) -> Array:
    """A smooth random field [size, size] in about -1..1."""
    return np.asarray(
        cv2.resize(rng.uniform(-1, 1, (9, 9)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    )


def _warped(x: Array, dx: Array, dy: Array) -> Array:
    yy, xx = np.arange(x.shape[0], dtype=np.float32)[:, None], np.arange(x.shape[1], dtype=np.float32)
    return np.asarray(cv2.remap(x, xx + dx, yy + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _changed(x: Pixels, rng: Rng) -> Pixels:
    """A copy that differs as another photo of the same face would: colour, contrast, sharpness, noise, codec."""
    out: Array = x.astype(np.float32)
    if rng.random() < 0.8:
        gain, shift = np.diag(1 + rng.uniform(-0.12, 0.12, 3)), rng.uniform(-18, 18, (3, 1))
        out = cv2.transform(out, np.hstack([gain, shift]))
    if rng.random() < 0.5:
        out = (out - 110) * (1 + rng.uniform(-0.2, 0.2)) + 110
    if rng.random() < 0.5:
        out = rescale(out, rng.uniform(0.3, 0.9), int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC])))
    elif rng.random() < 0.5:
        amount = rng.uniform(0.3, 1.2)
        out = out * (1 + amount) - amount * soft(out, 1.5)
    if rng.random() < 0.2:
        out = out + rng.standard_normal(out.shape, np.float32) * rng.uniform(1, 5)
    if rng.random() < 0.3:
        return codec(out, ".jpg", int(rng.integers(30, 90)))
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)
