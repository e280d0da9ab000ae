"""Expert `tower`: the forensic tower's own score, its cues and its map.

Blind spot: reenactment that moves little but the mouth, generators that leave no trace at 224 pixels. The network is
the base's CLIP ViT-B/16 with additions that this project trained end to end (external_detectors.train.tower). It sees
less around the face than the crop holds, and the embedded model shares its forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from external_detectors.clip_cues import areas_of, load_head
from external_detectors.crop_expert import CropExpert
from external_detectors.tower_net import MAX_CUES, POINTS_FROM, POOLED, HeadLogits, TowerHeads, area_grid
from external_detectors.weights_io import load_weights
from x2dfd.adapter import EMBEDDED
from x2dfd.errors import SetupError, first_line
from x2dfd.experts import Shared, read_card
from x2dfd.faces import CROP_SIZE, lips_closed
from x2dfd.fetch import require
from x2dfd.tower import CLOSER, CLOSER_MATRIX, HEAD_LAYERS, additions_sha256, read_additions, tower_states
from x2dfd.types import ARTIFACTS, Card, Cue, Evidence, Face

WEIGHTS = EMBEDDED / "experts"
"""The weights belong to the embedded model, which shares this tower."""

_CELLS = 14  # a side of the map


def load_heads(card: Card, folder: Path) -> TowerHeads:
    """The heads in a tower's weights. Raises SetupError for weights that are damaged or of another shape."""
    weights, heads = load_weights(card, folder), TowerHeads()
    try:
        heads.load_state_dict({k: v for k, v in weights.items() if not k.startswith("tower.")})
    except RuntimeError as error:
        raise SetupError(
            f"expert 'tower' in {folder} does not fit its heads: {first_line(error)}; train it again",
            code="weights_do_not_fit",
        ) from error
    return heads.eval()


class Tower(CropExpert):
    """P(fake) of each face's aligned crop, the likeliest kind of fake, the likeliest cues, and a map."""

    card: ClassVar[Card] = read_card(WEIGHTS / "tower.card.json")
    at_once = 16

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "tower.card.json")  # type: ignore[misc]
        self._heads = load_heads(self.card, folder)
        self._additions = folder / self.card.weights
        self.tower = additions_sha256(read_additions(self._additions))
        require("base")  # fail now, not at the first face
        threshold: object = self.card.figures.get("cue_threshold")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise SetupError(
                f"expert 'tower' in {folder} has no cue_threshold from 0 to 1; reinstall x2dfd",
                code="cue_threshold_missing",
            )
        self._threshold = float(threshold)
        self._clip_cues = load_head(folder, self.card.sha256)

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        """Reuse the embedded model's pass over these crops where there is one, else run a pass of its own."""
        states = shared.tower_states if shared and shared.tower == self.tower else None
        if states is None or len(states) <= max(HEAD_LAYERS):
            return super().judge(faces, shared)
        with torch.inference_mode():
            return self._evidence(states, faces, shared.tower_dtype if shared else None)

    def evidence(self, crops: Tensor, faces: Sequence[Face], shared: Shared | None) -> list[Evidence]:
        dtype = shared.tower_dtype if shared else None
        return self._evidence(tower_states(crops, max(HEAD_LAYERS), self._additions, dtype), faces, dtype)

    def _evidence(
        self, states: Sequence[Tensor], faces: Sequence[Face], dtype: torch.dtype | None = None
    ) -> list[Evidence]:
        points = (cv2.transform(f.crop_landmarks[None], CLOSER_MATRIX)[0].astype(np.float32) for f in faces)
        areas = torch.from_numpy(np.stack([area_grid(p) for p in points]))
        logits: HeadLogits = self._heads(states, areas.float() / 255)
        # The map says where the picture was changed if it was, so it is fainter where a change is unlikely.
        likely = (logits.fake.sigmoid() / POINTS_FROM).clamp(max=1)[:, None, None]
        maps = _on_crop(logits.map.sigmoid() * likely).tolist()
        scores = logits.fake.sigmoid()
        efs_shares = logits.kinds[:, 1:].softmax(1)[:, 0]  # of a fake: P(EFS)
        in_part = (scores >= POINTS_FROM) & (efs_shares <= 0.5)
        cue_logits, cues_from = self._joined(logits.cues, in_part, faces, dtype)
        cue_chances = cue_logits.sigmoid()
        cue_chances[[lips_closed(f.crop_landmarks) for f in faces], POOLED.index("teeth")] = 0  # nobody sees them
        no_photos = logits.photo.neg().sigmoid().tolist()
        out = []
        for score, share, no_photo, chances, least, rows in zip(
            scores.tolist(), efs_shares.tolist(), no_photos, cue_chances.flatten(1), cues_from, maps, strict=True
        ):
            best = chances.topk(MAX_CUES)
            pairs = [(divmod(k, len(ARTIFACTS)), p) for p, k in zip(*(t.tolist() for t in best), strict=True)]
            cues = tuple(
                Cue(POOLED[area], ARTIFACTS[artifact], round(p, 3))
                for (area, artifact), p in pairs
                if score >= POINTS_FROM
                and p >= least
                # No single area of a face made as a whole is forged: areas named there were wrong (LOG.md).
                and (share <= 0.5 or POOLED[area] == "whole-image")
            )
            grid = tuple(tuple(round(v, 3) for v in row) for row in rows)
            kinds = {"whole": score * share, "part": score * (1 - share)}
            note = "points at " + ", ".join(f"{c.area} {c.artifact}" for c in cues) if cues else None
            out.append(Evidence(self.card.name, float(score), note, cues, grid, kinds, no_photo))
        return out

    def _joined(
        self, cues: Tensor, in_part: Tensor, faces: Sequence[Face], dtype: torch.dtype | None
    ) -> tuple[Tensor, list[float]]:
        """Logits of the cues, [n, areas, artifacts], of faces `in_part` [n] joined with those on CLIP, and each face's
        probability from which they are named."""
        if self._clip_cues is None or not in_part.any():
            return cues, [self._threshold] * len(faces)
        head, threshold = self._clip_cues
        own = []
        for start in range(0, len(faces), self.at_once):  # the batches of the experts on CLIP, which share the pass
            batch = faces[start : start + self.at_once]
            own.append(head(areas_of(torch.from_numpy(np.stack([f.crop for f in batch])), batch, dtype)))
        joined = torch.where(in_part[:, None, None], head.join(cues, torch.cat(own)), cues)
        return joined, [threshold if part else self._threshold for part in in_part.tolist()]


def _on_crop(maps: Tensor) -> Tensor:
    """Maps of what the tower sees, [n, GRID, GRID], as maps of the whole crop: [n, 14, 14].

    A cell at the border, of which the tower sees a part, has the mean of that part.
    """
    view = F.interpolate(maps[:, None], size=CROP_SIZE - 2 * CLOSER, mode="bilinear")
    total, seen = (F.avg_pool2d(F.pad(v, (CLOSER,) * 4), CROP_SIZE // _CELLS) for v in (view, torch.ones_like(view)))
    return (total / seen)[:, 0]
