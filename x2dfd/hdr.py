"""Converts video of high dynamic range (HLG, PQ) and wide gamut (BT.2020) to the colours of a usual screen (BT.709).

Display light follows the standards (HLG and PQ: ITU-R BT.2100; a plain curve: BT.1886). Reference white of 203 nits
becomes white (BT.2408), brighter light is compressed, and colours outside BT.709 are cut (BT.2407, 2.2).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PQ, HLG = 16, 18
"""Transfer characteristics (ITU-T H.273)."""
BT2020 = 9
"""Colour primaries (ITU-T H.273)."""

_WHITE = 203.0  # nits
_PEAK = 1000.0  # nits, of the display that HLG is defined on
_KNEE = 0.75  # of white; brighter light is compressed
_GAMMA = 2.4
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_ROWS = 64  # at a time: the floats of a whole frame would take hundreds of megabytes


def _light(transfer: int) -> NDArray[np.float32]:
    """[65536]: the light of each 16-bit sample, where 1 is white; for HLG the scene's light, from 0 to 1."""
    signal = np.linspace(0, 1, 65_536)
    if transfer == PQ:
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10_000 / _WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    else:
        light = signal**_GAMMA
    return light.astype(np.float32)


def to_bt709(samples: NDArray[np.uint16], transfer: int, primaries: int) -> NDArray[np.uint8]:
    """RGB samples [H, W, 3] of 16 bits, in the given curve and primaries (ITU-T H.273), as 8-bit BT.709 [H, W, 3]."""
    table = _light(transfer)
    result = np.empty(samples.shape, np.uint8)
    for top in range(0, len(samples), _ROWS):
        light = table[samples[top : top + _ROWS]]
        if transfer == HLG:  # from the scene to the display, whose gamma is 1.2
            light *= np.maximum(light @ _LUMINANCE, 1e-9)[..., None] ** 0.2 * (_PEAK / _WHITE)
        if primaries == BT2020:
            light = np.maximum(light @ _TO_BT709.T, 0)
        if transfer in (PQ, HLG):
            peak = np.maximum(light.max(-1, keepdims=True), 1e-9)
            excess = np.maximum(peak - _KNEE, 0)
            light *= np.where(excess > 0, _KNEE + (1 - _KNEE) * excess / (excess + 1 - _KNEE), peak) / peak
        result[top : top + _ROWS] = np.round(np.clip(light, 0, 1) ** (1 / _GAMMA) * 255)
    return result
