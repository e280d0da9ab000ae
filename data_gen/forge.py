"""Forgeries of real photos whose manipulation is known: image, mask, cues, strength, class.

`HARMLESS` changes (data_gen.harmless) are those of phones, apps and platforms. They change no label and are applied to
real photos and forgeries alike (`changed`), so that a model learns "processed" neither as "fake" nor as "real".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from data_gen.harmless import HARMLESS
from data_gen.methods import LATENT, METHODS
from data_gen.tools import Forgery, Method, Photo, grown_mask, rounded, untouched
from data_gen.visibility import SEEN_FROM, SHOWS, visible
from x2dfd.degrade import Pixels, Rng
from x2dfd.types import Cue

__all__ = [
    "FORGE_VERSION",
    "HARMLESS",
    "LATENT",
    "METHODS",
    "Forgery",
    "Method",
    "Photo",
    "changed",
    "forge",
    "joined_cues",
    "untouched",
]

FORGE_VERSION = 6
"""Goes up when the same seed gives another picture or truth about it; runs of other versions are not resumed."""


def forge(photo: Photo, method: Method, rng: Rng, donor: Photo | None = None, strength: float | None = None) -> Forgery:
    """Apply one method at a random (or given) strength in 0..1. The same generator state gives the same bytes.

    Each cue's score is measured on the picture (`visible`); one that does not show beside others is dropped. With a
    random strength, a forgery of which nothing can be seen is made again, stronger.
    """
    power = float(rng.uniform(0, 1)) if strength is None else strength
    while True:
        output, mask, pairs = method.make(photo, donor, power, rng)
        pixels = rounded(output)
        cue_masks = [mask * grown_mask(photo, a) if method.by_area and k != "blending" else mask for a, k in pairs]
        scores = [visible(photo.pixels, pixels, m, k) for m, (_, k) in zip(cue_masks, pairs, strict=True)]
        cues = _shown(pairs, scores)
        if strength is not None or not cues or power >= 1 or max(c.score or 0 for c in cues) >= SEEN_FROM:
            break
        power = min(1.0, power + 0.35)
    return Forgery(pixels, rounded(mask * 255), cues, method.name, method.df_class, round(power, 3))


def _shown(pairs: Sequence[tuple[str, str]], scores: Sequence[float]) -> tuple[Cue, ...]:
    """The cues (area, artifact) that show; the plainest stays in any case."""
    threshold = min(SHOWS, max(scores, default=0.0))
    return tuple(Cue(*pair, round(s, 3)) for pair, s in zip(pairs, scores, strict=True) if s >= threshold)


def joined_cues(before: Pixels, first: Forgery, second: Forgery) -> tuple[Cue, ...]:
    """The cues that still show after the photo `before` was forged twice. The second may hide cues of the first, so
    those are measured on the last picture; a cue of both keeps its higher score."""
    mask = first.mask.astype(np.float32) / 255
    scores = {(c.area, c.artifact): visible(before, second.pixels, mask, c.artifact) for c in first.cues}
    for cue in second.cues:
        pair = (cue.area, cue.artifact)
        scores[pair] = max(scores.get(pair, 0.0), cue.score or 0.0)
    return _shown(list(scores), list(scores.values()))


def changed(photo: Photo, forgery: Forgery, method: Method, rng: Rng) -> Forgery:
    """A forgery of `photo` under a harmless change; its cues and mask are those that still show.

    The photo itself takes the same change with the same draws, so that only the forgery makes the two differ. A cue's
    score falls with its own effect, a hidden cue is dropped (the plainest stays), and the mask loses the pixels that no
    longer differ, as under a sticker. A change that would cover the whole forgery is not made.
    """
    power, draws = float(rng.uniform(0, 1)), int(rng.integers(2**63))
    before, after = (
        rounded(method.make(replace(photo, pixels=p), None, power, np.random.default_rng(draws))[0])
        for p in (photo.pixels, forgery.pixels)
    )
    mask = forgery.mask.astype(np.float32) / 255
    scores = []
    for cue in forgery.cues:
        score = visible(photo.pixels, forgery.pixels, mask, cue.artifact)
        scores.append(min(1.0, (cue.score or 0.0) * visible(before, after, mask, cue.artifact) / max(score, 1e-6)))
    equal = (before == after).all(-1).astype(np.uint8)  # pixels agree here and there by chance: only patches count
    covered = cv2.morphologyEx(equal, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0
    remaining = np.where(covered, 0, forgery.mask).astype(np.uint8)
    if forgery.mask.any() and remaining.max() < 0.5 * forgery.mask.max():
        return forgery
    cues = _shown([(c.area, c.artifact) for c in forgery.cues], scores)
    return replace(forgery, pixels=after, mask=remaining, cues=cues)
