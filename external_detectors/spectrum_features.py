"""What the expert `spectrum-noise` measures on a crop, shared by its training and its use.

Spectrum: decoders leave too little or too much power at high frequencies and peaks at their grid (Durall et al., "Watch
your Up-Convolution", CVPR 2020). Noise: what a median filter takes away, its strength inside and outside the face, and
how neighbouring residuals go together (after the co-occurrences of Fridrich & Kodovsky, "Rich Models for Steganalysis
of Digital Images", IEEE TIFS 2012).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.faces import CROP_SIZE, area_mask

Array = NDArray[Any]

_RINGS = 28
_REGIONS = ("skin", "eyes", "mouth", "nose", "cheeks", "forehead", "hair", "background")
_LEVELS = 2  # residuals are rounded to -2 .. 2


@lru_cache(maxsize=1)
def _rings() -> tuple[Array, Array, Array]:
    """Ring number of each frequency, its angle's octant, and the window."""
    f = np.fft.fftfreq(CROP_SIZE)
    fy, fx = f[:, None], np.fft.rfftfreq(CROP_SIZE)[None]
    ring = np.minimum((np.hypot(fy, fx) / 0.5 * _RINGS).astype(int), _RINGS)
    steep = np.abs(np.arctan2(np.abs(fy), np.abs(fx)) - np.pi / 4) > np.pi / 8  # along an axis, not a diagonal
    window = np.outer(*(np.hanning(CROP_SIZE),) * 2).astype(np.float32)
    return ring, steep, window


def _spectrum(plane: Array) -> list[float]:
    """Log power in rings against the mean of all, how much of it lies along the axes, and the highest peaks."""
    ring, steep, window = _rings()
    power = np.log(np.abs(np.fft.rfft2((plane - plane.mean()) * window)) ** 2 + 1e-2)
    n = np.bincount(ring.ravel(), minlength=_RINGS + 1)[:_RINGS]
    mean = np.bincount(ring.ravel(), power.ravel(), _RINGS + 1)[:_RINGS] / n
    axes = (
        np.bincount(ring[steep], power[steep], _RINGS + 1)[:_RINGS]
        / np.bincount(ring[steep], minlength=_RINGS + 1)[:_RINGS]
    )
    above = power - np.append(mean, mean[-1])[ring]
    peaks = [float(above[(ring >= a) & (ring < b)].max()) for a, b in ((7, 14), (14, 21), (21, _RINGS))]
    return [*(mean - mean.mean()).tolist(), float(mean.mean()), *(axes - mean)[3::3].tolist(), *peaks]


def _noise(residual: Array, masks: list[Array]) -> list[float]:
    """Log strength and heaviness of tails of the residual in each region, and each region against the skin."""
    out, base = [], 0.0
    for k, mask in enumerate(masks):
        values = residual[mask]
        if values.size < 50:
            out += [0.0, 0.0]
            continue
        spread = float(np.log(values.std() + 0.05))
        heavy = float(np.log(np.abs(values).mean() + 0.02)) - spread
        base = spread if k == 0 else base
        out += [spread if k == 0 else spread - base, heavy]
    return out


def _together(residual: Array, mask: Array) -> list[float]:
    """How often pairs of neighbouring rounded residuals occur inside a mask; mirrored pairs count as one."""
    side = 2 * _LEVELS + 1
    level = (np.clip(np.rint(residual), -_LEVELS, _LEVELS) + _LEVELS).astype(int)
    table = np.zeros((side, side))
    for a, b, inside in (
        (level[:, :-1], level[:, 1:], mask[:, :-1]),
        (level[:-1], level[1:], mask[:-1]),
    ):
        table += np.bincount((a * side + b)[inside], minlength=side * side).reshape(side, side)
    table = table + table.T + table[::-1, ::-1] + table.T[::-1, ::-1]
    table /= max(1.0, table.sum())
    kept = [(i, j) for i in range(side) for j in range(i, side) if i + j <= side - 1]
    return [float(np.log(table[i, j] + 1e-4)) for i, j in kept]


def features(crop: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    """The numbers of one crop [224, 224, 3] with its landmarks [468, 2] in crop pixels."""
    planes = cv2.cvtColor(crop, cv2.COLOR_RGB2YCrCb)
    luma = planes[..., 0].astype(np.float32)
    areas = [area_mask(landmarks, a, (CROP_SIZE, CROP_SIZE)) > 127 for a in _REGIONS]
    out = _spectrum(luma)
    for k in (1, 2):
        out += _spectrum(planes[..., k].astype(np.float32))[:_RINGS:3]
    residual = luma - cv2.medianBlur(planes[..., 0], 3)
    out += _noise(residual, areas)
    wide = luma - cv2.GaussianBlur(luma, (0, 0), 2.0)
    out += _noise(wide, areas)
    face = areas[0] | areas[1] | areas[2] | areas[3]
    out += _together(residual, face) + _together(residual, areas[-1])
    fine = luma[:, 1:] - luma[:, :-1]
    out += _together(fine, face[:, 1:])
    return np.asarray(out, np.float32)


def perceptron(state: dict[str, Any], x: Array) -> Array:
    """Logits [n] of features [n, f]: standardised, one hidden layer (or none), one number."""
    h = np.clip((x - state["mean"]) / state["std"], -8, 8)
    if "hidden.weight" in state:
        h = np.maximum(h @ state["hidden.weight"] + state["hidden.bias"], 0)
    return np.asarray(h @ state["out.weight"] + state["out.bias"])
