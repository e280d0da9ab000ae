"""Experts `clip-probe` and `clip-contrast`: logistics on features of CLIP as it is, without any addition.

The forensic tower is trained end to end and sees small traces, but what it learnt fits new generators less. Features
that no training on forgeries has bent keep more of their worth there (Ojha et al., arXiv 2302.10174), most of all those
of the middle layers (Koutlis & Papadopoulos, arXiv 2402.19091). `clip-probe` reads class tokens, which describe the
whole crop, for faces made as a whole. `clip-contrast` also compares the patches of the face with those at its edge and
around it, for faces that were changed in part. The calibration joins them with the tower.
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
from x2dfd.faces import MARGIN
from x2dfd.fetch import require
from x2dfd.tower import WIDTH, tower_states
from x2dfd.types import Card, Evidence, Face

WEIGHTS = EMBEDDED / "experts"

LAYERS = (6, 7, 8, 9)
"""Layers whose outputs are read; no later one is run. Sets of held-out sources chose them, and the features: LOG.md."""

CLASS_FEATURES = len(LAYERS) * WIDTH
"""The class tokens, which come first among the features."""

FEATURES = 3 * CLASS_FEATURES

VERSION = 1
"""Of the features; raise it when the same crop gives others."""

_PATCHES = 14  # a side
_WIDTH_OF_FACE = 0.85  # in parts of its height, in the mean
_EDGE = 0.87, 1.13  # in parts of the face's radius


def _places() -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the patches [196], of sum 1, whose mean is that of the face, its edge, its surroundings.

    Alignment puts the middle of the mesh's box into the middle of its crop, and gives its longer side the same length.
    """
    across = (torch.arange(_PATCHES) + 0.5) / _PATCHES - 0.5
    half_height = 0.5 / MARGIN
    radius = torch.hypot(across[:, None] / half_height, across[None] / (half_height * _WIDTH_OF_FACE)).flatten()
    face, around = radius < _EDGE[0], radius > _EDGE[1]
    return tuple(place / place.sum() for place in (face, ~face & ~around, around))  # type: ignore[return-value]


_FACE, _FACE_EDGE, _AROUND = _places()
_last: deque[tuple[object, Tensor]] = deque(maxlen=4)  # batches: 64 faces, the frames of two clips
_lock = Lock()


def clip_features(crops: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Features of uint8 crops [n, CROP_SIZE, CROP_SIZE, 3]: [n, FEATURES], for each of LAYERS its class tokens, then
    the mean patch of the face less that around it, then that of the face's edge less that of the face. `dtype`: as of
    `tower_states`.

    Those of the last crops are kept, as both experts ask for the same.
    """
    key = _key(crops, dtype)
    with _lock:
        known = next((features for other, features in _last if other == key), None)
    return _features(_read(crops, dtype), key) if known is None else known


def clip_areas(crops: Tensor, areas: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The mean patch of each area, after each of LAYERS: [n, areas, CLASS_FEATURES].

    `areas`: the share of each cell in each area, [n, areas, GRID, GRID], on the crops. The pass also serves
    `clip_features`.
    """
    read = _read(crops, dtype)
    _features(read, _key(crops, dtype))
    shares = F.avg_pool2d(areas, GRID // _PATCHES).flatten(2)
    shares = shares / shares.sum(2, keepdim=True).clamp(min=1e-3)
    means = torch.einsum("nap,nlpw->nalw", shares, read[:, :, 1:])
    return F.layer_norm(means, (WIDTH,)).flatten(2)


def _key(crops: Tensor, dtype: torch.dtype | None) -> object:
    return LAYERS, dtype, hashlib.sha256(crops.contiguous().numpy().data).digest()


def _read(crops: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The outputs of LAYERS: [n, layers, 1 + patches, WIDTH]."""
    states = tower_states(crops, max(LAYERS), dtype=dtype)
    return torch.stack([states[layer] for layer in LAYERS], 1)


def _features(read: Tensor, key: object) -> Tensor:
    """`clip_features` of what was read, which are kept."""
    face, edge, around = (torch.einsum("p,nlpw->nlw", place, read[:, :, 1:]) for place in (_FACE, _FACE_EDGE, _AROUND))
    features = torch.cat([part.flatten(1) for part in (read[:, :, 0], face - around, edge - face)], 1)
    with _lock:
        _last.append((key, features))
    return features


class ClipProbe(CropExpert):
    """P(fake) of each face's aligned crop; it says nothing of where or why."""

    card: ClassVar[Card] = read_card(WEIGHTS / "clip-probe.card.json")
    at_once = 16
    features = CLASS_FEATURES

    def __init__(self, folder: Path = WEIGHTS) -> None:
        name = type(self).card.name
        self.card = read_card(folder / f"{name}.card.json")  # type: ignore[misc]
        weights = load_weights(self.card, folder)
        shapes = {key: tuple(value.shape) for key, value in weights.items() if value.is_floating_point()}
        if shapes != {"weight": (self.features,), "bias": ()}:
            raise SetupError(
                f"expert {name!r} in {folder} was fitted on other features; train it again", code="weights_do_not_fit"
            )
        self._weight, self._bias = weights["weight"], weights["bias"]
        require("base")  # fail now, not at the first face

    def p_fake(self, crops: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return (clip_features(crops, dtype)[:, : self.features] @ self._weight + self._bias).sigmoid()

    def evidence(self, crops: Tensor, faces: Sequence[Face], shared: Shared | None) -> list[Evidence]:
        scores = self.p_fake(crops, shared.tower_dtype if shared else None)
        return [Evidence(self.card.name, score) for score in scores.tolist()]


class ClipContrast(ClipProbe):
    """P(changed in part) of each face's aligned crop; it says nothing of where or why."""

    card: ClassVar[Card] = read_card(WEIGHTS / "clip-contrast.card.json")
    features = FEATURES
