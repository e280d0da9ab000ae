"""The network of the expert `consistency`, shared by its training and its use.

An EfficientNet-Lite0 trunk whose features are pooled inside each area of the face mesh. What an area looks like is
compared with the rest of the face and with the surroundings, and every pair of area and artifact gets a logit of its
own; a map says where the picture was changed; one logit says whether it was changed at all.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from external_detectors.lite0 import lite0
from external_detectors.weights_io import to_unit
from x2dfd.faces import CROP_SIZE, area_mask
from x2dfd.types import AREAS, ARTIFACTS

POOLED = tuple(a for a in AREAS if a != "accessories")
"""Areas that the face mesh locates; `whole-image` is the whole crop."""

GRID = 28
"""Side of the feature grid and of the map: eight pixels of the crop a cell."""

POINTS_FROM = 0.5
"""Smallest P(fake) at which cues are named: the likeliest cues of a face that looks real mean nothing."""

MAX_CUES = 3
"""Most cues that are named for one face."""

LIKELY = 0.1
"""Lowest probability at which the likeliest cue is named; all others need the threshold of the card."""

_FINE, _COARSE = 9, 15  # modules of the trunk after which features have stride 8 (40 channels) and 16 (112 channels)
_WIDTH = 96


def area_grid(landmarks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The share of each cell in each area, 0..255: [areas, GRID, GRID], from landmarks in crop pixels [468, 2]."""
    double = 2 * GRID
    points = landmarks * (double / CROP_SIZE)
    masks = [area_mask(points, area, (double, double)) for area in POOLED]
    small = [cv2.resize(m, (GRID, GRID), interpolation=cv2.INTER_AREA) for m in masks]
    return np.asarray(np.stack(small), np.uint8)


class ConsistencyNet(nn.Module):
    """Crops [n, 3, 224, 224] in -1..1 and area grids [n, areas, 28, 28] in 0..1 to logits.

    Returns fake [n], cues [n, areas, artifacts], map [n, 28, 28].
    """

    allowed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.trunk = lite0()
        self.mix = nn.Sequential(nn.Conv2d(40 + 112, _WIDTH, 1, bias=False), nn.BatchNorm2d(_WIDTH), nn.ReLU())
        self.place = nn.Conv2d(_WIDTH, 1, 1)
        self.name = nn.Sequential(
            nn.Linear(4 * _WIDTH + len(POOLED), 160), nn.ReLU(), nn.Dropout(0.1), nn.Linear(160, len(ARTIFACTS))
        )
        self.decide = nn.Linear(1280 + len(ARTIFACTS) + 2, 1)
        self.dropout = nn.Dropout(0.2)
        # Cues that training has shown; no other is ever named.
        self.register_buffer("allowed", torch.zeros(len(POOLED), len(ARTIFACTS)))

    def forward(self, x: Tensor, areas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.trunk[:_FINE](x)  # [n, 40, 28, 28]
        coarse = self.trunk[_FINE:_COARSE](fine)  # [n, 112, 14, 14]
        deep = self.trunk[_COARSE:](coarse).mean((2, 3))  # [n, 1280]
        wide = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        f = self.mix(torch.cat([fine, wide], 1))  # [n, 96, 28, 28]
        where = self.place(f)[:, 0]  # [n, 28, 28]
        flat = f.flatten(2).transpose(1, 2)  # [n, cells, 96]
        share = areas.flatten(2)
        share = share / share.sum(2, keepdim=True).clamp(min=1e-3)  # [n, areas, cells]
        mean = share @ flat  # [n, areas, 96]
        spread = (share @ flat.square() - mean.square()).clamp(min=1e-6).sqrt()
        face, around = (mean[:, POOLED.index(a)].unsqueeze(1) for a in ("skin", "background"))
        label = torch.eye(len(POOLED), dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        cues: Tensor = self.name(torch.cat([mean, spread, mean - face, mean - around, label], 2))
        cues = cues.masked_fill(self.allowed == 0, -12.0)
        said = torch.stack([where.flatten(1).amax(1), where.flatten(1).mean(1)], 1)
        joined = torch.cat([self.dropout(deep), cues.amax(1).clamp(min=-8) / 4, said / 4], 1)
        fake: Tensor = self.decide(joined)[:, 0]
        return fake, cues, where


def both_ways(net: nn.Module, crops: Tensor, areas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The network's logits (verdict, cues, map) on uint8 crops and area grids: the mean of each face and its mirror.

    Half of the noise that a codec brings cancels out.
    """
    grids = areas.float() / 255
    fake, cues, where = net(to_unit(torch.cat([crops, crops.flip(2)])), torch.cat([grids, grids.flip(3)]))
    there, mirrored = where.chunk(2)
    return fake.view(2, -1).mean(0), cues.unflatten(0, (2, -1)).mean(0), (there + mirrored.flip(2)) / 2
