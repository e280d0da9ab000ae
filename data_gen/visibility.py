"""How plainly a change shows: a cue's score is measured on the picture, not derived from the strength setting."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from x2dfd.degrade import Pixels, soft
from x2dfd.faces import Array

_PLAIN = {
    "texture": 5.0, "lighting": 22.0, "blending": 6.0, "blur": 6.0, "colour": 14.0, "asymmetry": 16.0,
    "geometry": 16.0, "missing-detail": 8.0, "expression": 12.0, "noise": 9.0, "frequency": 5.0, "compression": 6.0,
}  # fmt: skip
"""Change in grey levels at which an artifact is plain to see (score 0.63). Set by looking at the catalogue."""
SEEN_FROM = 0.1
"""A score below this is a forgery that no eye could point at."""
SHOWS = 0.05
"""A cue beside a plainer one is dropped below this: its own measure does not show it."""


def visible(before: Pixels, after: Pixels, mask: Array, artifact: str) -> float:
    """How plainly an artifact shows, 0..1, measured on the change that was made.

    Where several changes meet, each cue is measured by its own effect: `blending` by the gradients along the mask's
    edge, `blur` by the fine detail that is lost, `noise` by the fine detail that came, `colour` by the shift of each
    channel's mean and spread. Of these three the plainer side of the mask counts, as either layer of a blend may be
    the changed one. Every other artifact is the only one of its method: the root mean square change under the mask.
    """
    old, new = before.astype(np.float32), after.astype(np.float32)
    inside = mask > 0.2
    if artifact in _OWN_EFFECT:
        change = max((_OWN_EFFECT[artifact](old, new, side) for side in (inside, ~inside) if side.any()), default=0.0)
    elif artifact == "blending":
        slope = cv2.Sobel(mask.astype(np.float32), cv2.CV_32F, 1, 0) ** 2
        slope = slope + cv2.Sobel(mask.astype(np.float32), cv2.CV_32F, 0, 1) ** 2
        across, down = (cv2.Sobel(new.mean(-1) - old.mean(-1), cv2.CV_32F, *d) / 4 for d in ((1, 0), (0, 1)))
        change = _rms(np.hypot(across, down), slope > 0.15 * slope.max())
    else:
        change = _rms(new.mean(-1) - old.mean(-1), inside)
    return float(1 - np.exp(-change / _PLAIN[artifact]))


def _rms(values: Array, inside: Array) -> float:
    return float(np.sqrt(np.square(values[inside]).mean())) if inside.any() else 0.0


def _detail(pixels: Array, side: Array) -> float:
    """Mean square of detail finer than about three pixels, over the pixels of `side`."""
    return float(np.square((pixels - soft(pixels, 1.5))[side]).mean())


def _spread(pixels: Array, side: Array) -> Array:
    """Standard deviation of each channel of coarser structure, over the pixels of `side`."""
    return np.asarray(soft(pixels, 3.0)[side].std(0))


def _detail_moved(old: Array, new: Array, side: Array) -> float:
    """Mean square of added (below 0: lost) fine detail, without the effect of a mere change of contrast."""
    gain = float(np.clip((_spread(new, side).mean() + 1) / (_spread(old, side).mean() + 1), 0.5, 2))
    return _detail(new, side) - gain**2 * _detail(old, side)


def _tone_moved(old: Array, new: Array, side: Array) -> float:
    """Distance of each channel's two normal distributions, on which another person's features or a warp hardly act."""
    mean, spread = new[side].mean(0) - old[side].mean(0), _spread(new, side) - _spread(old, side)
    return float(np.sqrt((mean**2 + spread**2).mean()))


_OWN_EFFECT: dict[str, Callable[[Array, Array, Array], float]] = {
    "blur": lambda old, new, side: float(np.sqrt(max(0.0, -_detail_moved(old, new, side)))),
    "noise": lambda old, new, side: float(np.sqrt(max(0.0, _detail_moved(old, new, side)))),
    "colour": _tone_moved,
}
