"""The heads on the forensic tower, shared by its training and its use.

The tower is the base's CLIP ViT-B/16 with trained additions (LoRA, arXiv 2106.09685; or layer norms). The heads read
four of its layers. Statistics over all patches decide real or fake and the kind of fake, patches pooled inside the
areas of the face mesh give the cues, and a map says where the picture was changed, if it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from x2dfd.faces import CROP_SIZE, area_masks
from x2dfd.tower import HEAD_LAYERS as LAYERS
from x2dfd.tower import WIDTH
from x2dfd.types import AREAS, ARTIFACTS

POOLED = tuple(a for a in AREAS if a != "accessories")
"""Areas that the face mesh locates; `whole-image` is all that the tower sees."""

GRID = 28
"""Side of the area grids and of the map: eight pixels of what the tower sees a cell."""

POINTS_FROM = 0.5
"""Smallest P(fake) at which cues are named, as even the likeliest cues of a face that looks real mean nothing."""

MAX_CUES = 3
"""Largest number of cues that are named for one face."""

CUE_SEEN_FROM = 0.15
"""Cues with a lower score are neither targets nor errors of a training, as few people would see them."""

KINDS = ("real", "EFS", "FS", "FR", "FE")
"""Classes of the second head, as in DFA-Bench: bona fide, entire synthesis, swap, reenactment, editing."""

_PATCHES = 14  # a side
_POOLED = WIDTH * len(LAYERS)
_CUE = 64
_PLACE = 32


def area_grid(landmarks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The share of each cell in each area, 0..255: [areas, GRID, GRID], from landmarks [468, 2] in its pixels."""
    double = 2 * GRID
    points = landmarks * (double / CROP_SIZE)
    masks = area_masks(points, POOLED, (double, double))
    small = [cv2.resize(m, (GRID, GRID), interpolation=cv2.INTER_AREA) for m in masks]
    return np.asarray(np.stack(small), np.uint8)


class HeadLogits(NamedTuple):
    """Logits of n faces."""

    fake: Tensor  # [n]
    kinds: Tensor  # [n, KINDS]
    cues: Tensor  # [n, POOLED, ARTIFACTS]
    map: Tensor  # [n, GRID, GRID]
    photo: Tensor  # [n]: a photograph, forged or not, against a drawing, a painting, a render


class _MapHead(nn.Module):
    """Patches [n, 196, 4 * 768] and area grids [n, areas, 28, 28] to the logits of a map: [n, GRID, GRID].

    The logit of a cell follows from its patch, the patches around it, its area and the mean of the whole face: a swap
    fills the face, a changed mouth does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(_POOLED, _PLACE)
        self.dropout = nn.Dropout(0.2)
        self.near = nn.Conv2d(2 * _PLACE + len(POOLED), _PLACE, 3, padding=1)
        self.further = nn.Conv2d(_PLACE, _PLACE, 3, padding=1)
        self.cells = nn.Conv2d(_PLACE, (GRID // _PATCHES) ** 2, 1)

    def forward(self, patches: Tensor, areas: Tensor) -> Tensor:
        mixed = self.dropout(torch.relu(self.mix(patches))).transpose(1, 2).unflatten(2, (_PATCHES, _PATCHES))
        whole = mixed.mean((2, 3), keepdim=True).expand_as(mixed)
        features = torch.cat([mixed, whole, F.avg_pool2d(areas, GRID // _PATCHES)], 1)
        features = torch.relu(self.further(torch.relu(self.near(features))))
        return F.pixel_shuffle(self.cells(features), GRID // _PATCHES)[:, 0]


class TowerHeads(nn.Module):
    """Hidden states of the tower, embeddings first, each [n, 1 + 196, 768], and area grids [n, areas, 28, 28] in 0..1
    to `HeadLogits`."""

    allowed: Tensor

    def __init__(self) -> None:
        super().__init__()
        features = 2 * _POOLED + WIDTH
        self.norm = nn.LayerNorm(features)
        self.fake = nn.Linear(features, 1)
        self.cls = nn.Linear(features, len(KINDS))
        self.photo = nn.Linear(features, 1)
        self.map = _MapHead()
        self.mix = nn.Linear(_POOLED, _CUE)
        self.name = nn.Sequential(
            nn.Linear(4 * _CUE + len(POOLED), 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, len(ARTIFACTS))
        )
        self.dropout = nn.Dropout(0.3)
        # Only cues that enough training pictures show are ever named.
        self.register_buffer("allowed", torch.zeros(len(POOLED), len(ARTIFACTS)))

    def forward(self, states: Sequence[Tensor], areas: Tensor) -> HeadLogits:
        layers = [F.layer_norm(states[layer].float(), (WIDTH,))[:, 1:] for layer in LAYERS]
        pooled = self.dropout(self.norm(self.statistics(states)))
        patches = torch.cat(layers, 2)  # [n, 196, 4 * 768]
        map_logits = self.map(patches, areas)
        cues = self.cues(patches, areas)
        return HeadLogits(self.fake(pooled)[:, 0], self.cls(pooled), cues, map_logits, self.photo(pooled)[:, 0])

    def statistics(self, states: Sequence[Tensor]) -> Tensor:
        """The last class token, and mean and deviation over the patches of each layer: [n, 6912]."""
        layers = [F.layer_norm(states[layer].float(), (WIDTH,)) for layer in LAYERS]
        patches = [tokens[:, 1:] for tokens in layers]
        spread = [p.var(1).add(1e-6).sqrt() for p in patches]
        return torch.cat(
            [layers[-1][:, 0], *(s for p, v in zip(patches, spread, strict=True) for s in (p.mean(1), v))], 1
        )

    def cues(self, patches: Tensor, areas: Tensor) -> Tensor:
        """Logits of the cues, from each area's look compared with skin and surroundings: [n, areas, artifacts]."""
        share = F.avg_pool2d(areas, GRID // _PATCHES).flatten(2)
        share = share / share.sum(2, keepdim=True).clamp(min=1e-3)  # [n, areas, 196]
        mixed = self.mix(patches)
        mean = share @ mixed  # [n, areas, 64]
        spread = (share @ mixed.square() - mean.square()).clamp(min=1e-6).sqrt()
        skin, around = (mean[:, POOLED.index(a)].unsqueeze(1) for a in ("skin", "background"))
        area_ids = torch.eye(len(POOLED), dtype=mean.dtype, device=mean.device).expand(len(mean), -1, -1)
        cues: Tensor = self.name(torch.cat([mean, spread, mean - skin, mean - around, area_ids], 2))
        return cues.masked_fill(self.allowed == 0, -12.0)
