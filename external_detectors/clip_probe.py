"""Expert `clip-probe`: a logistic on features of CLIP as it is, without any addition; and what reads CLIP for others.

The forensic tower is trained end to end and sees small traces, but what it learnt fits new generators less. Features
that no training on forgeries has bent keep more of their worth there (Ojha et al., arXiv 2302.10174), most of all those
of the middle layers (Koutlis & Papadopoulos, arXiv 2402.19091). `clip-probe` reads class tokens, which describe the
whole crop, for faces made as a whole; `clip-cues` reads areas, for faces changed in part.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from external_detectors.crop_expert import CropExpert
from external_detectors.tower_net import GRID
from external_detectors.weights_io import load_weights
from x2dfd.adapter import EMBEDDED
from x2dfd.errors import SetupError
from x2dfd.experts import Shared, read_card
from x2dfd.fetch import require
from x2dfd.tower import WIDTH, tower_states
from x2dfd.types import Card, Evidence, Face

WEIGHTS = EMBEDDED / "experts"

LAYERS = (6, 7, 8, 9)
"""Layers whose outputs are read; no later one is run. Sets of held-out sources chose them, and the features: LOG.md."""

FEATURES = len(LAYERS) * WIDTH
"""The class tokens, or what is read of an area."""

VERSION = 1
"""Of the features; raise it when the same crop gives others."""

_PATCHES = 14  # a side
_last: deque[tuple[object, Tensor]] = deque(maxlen=4)  # passes, 39 MB each at most: 64 faces, the frames of two clips
_lock = Lock()


def clip_features(crops: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The class tokens after each of LAYERS, of uint8 crops [n, CROP_SIZE, CROP_SIZE, 3]: [n, FEATURES]. `dtype`: as of
    `tower_states`."""
    return _read(crops, dtype)[:, :, 0].flatten(1)


def clip_areas(crops: Tensor, areas: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The mean patch of each area, after each of LAYERS: [n, areas, FEATURES].

    `areas`: the share of each cell in each area, [n, areas, GRID, GRID], on the crops.
    """
    shares = F.avg_pool2d(areas, GRID // _PATCHES).flatten(2)
    shares = shares / shares.sum(2, keepdim=True).clamp(min=1e-3)
    means = torch.einsum("nap,nlpw->nalw", shares, _read(crops, dtype)[:, :, 1:])
    return F.layer_norm(means, (WIDTH,)).flatten(2)


def _read(crops: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The outputs of LAYERS: [n, layers, 1 + patches, WIDTH]. Those of the last crops are kept, as several experts ask
    for the same."""
    key = (LAYERS, dtype, hashlib.sha256(crops.contiguous().numpy().data).digest())
    with _lock:
        if (known := next((read for other, read in _last if other == key), None)) is not None:
            return known
    states = tower_states(crops, max(LAYERS), dtype=dtype)
    read = torch.stack([states[layer] for layer in LAYERS], 1)
    with _lock:
        _last.append((key, read))
    return read


class ClipProbe(CropExpert):
    """P(fake) of each face's aligned crop; it says nothing of where or why."""

    card: ClassVar[Card] = read_card(WEIGHTS / "clip-probe.card.json")
    at_once = 16

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "clip-probe.card.json")  # type: ignore[misc]
        weights = load_weights(self.card, folder)
        shapes = {key: tuple(value.shape) for key, value in weights.items() if value.is_floating_point()}
        if shapes != {"weight": (FEATURES,), "bias": ()}:
            raise SetupError(
                f"expert 'clip-probe' in {folder} was fitted on other features; train it again",
                code="weights_do_not_fit",
            )
        self._weight, self._bias = weights["weight"], weights["bias"]
        require("base")  # fail now, not at the first face

    def p_fake(self, crops: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (clip_features(crops, dtype) @ self._weight + self._bias).sigmoid()

    def evidence(self, crops: Tensor, faces: Sequence[Face], shared: Shared | None) -> list[Evidence]:
        scores = self.p_fake(crops, shared.tower_dtype if shared else None)
        return [Evidence(self.card.name, score) for score in scores.tolist()]
