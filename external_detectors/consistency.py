"""Expert `consistency`: compares each area of the face with the rest of it, and points at what does not fit.

Blind spot: a face that a generator made as a whole is consistent with itself; strong compression levels differences.
The network and its training on forgeries with known cues are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from external_detectors.consistency_net import (
    LIKELY,
    MAX_CUES,
    POINTS_FROM,
    POOLED,
    ConsistencyNet,
    area_grid,
    both_ways,
)
from external_detectors.crop_expert import CropExpert
from external_detectors.weights_io import WEIGHTS, load_weights
from x2dfd.errors import SetupError
from x2dfd.experts import read_card
from x2dfd.types import ARTIFACTS, Card, Cue, Evidence, Face


class Consistency(CropExpert):
    """P(fake) of each face's aligned crop, the likeliest cues, and a map of where it was changed."""

    card: ClassVar[Card] = read_card(WEIGHTS / "consistency.card.json")
    at_once = 32

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "consistency.card.json")  # type: ignore[misc]
        self._net = ConsistencyNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._net.load_state_dict(load_weights(self.card, folder))
        self._net.eval()
        if not isinstance(self.card.figures.get("cue_threshold"), float):
            raise SetupError(
                f"the card of expert 'consistency' in {folder} names no cue_threshold; reinstall x2dfd",
                code="cue_threshold_missing",
            )
        self._threshold = float(self.card.figures["cue_threshold"])

    def look(self, crops: Tensor, faces: Sequence[Face]) -> list[Evidence]:
        areas = torch.from_numpy(np.stack([area_grid(f.crop_landmarks) for f in faces]))
        fake, cues, where = both_ways(self._net, crops, areas)
        scores, chances = fake.sigmoid().tolist(), cues.sigmoid().flatten(1)
        maps = F.avg_pool2d(where.sigmoid()[:, None], 2)[:, 0].tolist()  # [n, 14, 14]
        out = []
        for score, chance, rows in zip(scores, chances, maps, strict=True):
            best = chance.topk(MAX_CUES)
            pairs = [(divmod(k, len(ARTIFACTS)), p) for p, k in zip(*(t.tolist() for t in best), strict=True)]
            found = [
                Cue(POOLED[area], ARTIFACTS[artifact], round(p, 3))
                for place, ((area, artifact), p) in enumerate(pairs)
                if score >= POINTS_FROM and p >= (LIKELY if place == 0 else self._threshold)
            ]
            grid = tuple(tuple(round(v, 3) for v in row) for row in rows)
            note = "points at " + ", ".join(f"{c.area} {c.artifact}" for c in found) if found else None
            out.append(Evidence(self.card.name, float(score), note, tuple(found), grid))
        return out
