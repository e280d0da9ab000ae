"""Expert `clip-cues`: P(changed in part), from the cues that it sees in the areas of a face.

A small head on CLIP as it is compares each area of the face mesh with skin and surroundings, and scores the cues that
the forge makes. The likelier any cue in any area, the likelier the change. Learnt from many forgeries, each as it is,
the head beats both a logistic on the whole face and the tower's own head for cues (LOG.md). The tower joins the logits
of these cues with those of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from external_detectors.clip_probe import FEATURES, clip_areas
from external_detectors.crop_expert import CropExpert
from external_detectors.tower_net import POOLED, area_grid
from external_detectors.weights_io import load_weights
from x2dfd.adapter import EMBEDDED
from x2dfd.errors import SetupError, first_line
from x2dfd.experts import Shared, read_card
from x2dfd.fetch import require
from x2dfd.types import ARTIFACTS, Card, Evidence, Face

WEIGHTS = EMBEDDED / "experts"

NAME = "clip-cues"
"""Of its files; a tower without them beside its own names cues by its own head alone."""

_CUE = 64


class CueHead(nn.Module):
    """Areas of CLIP (`clip_areas`, [n, areas, FEATURES]) to logits of cues: [n, areas, artifacts]."""

    allowed: Tensor
    share: Tensor
    slope: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(FEATURES, _CUE)
        self.name = nn.Sequential(
            nn.Linear(3 * _CUE + len(POOLED), 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, len(ARTIFACTS))
        )
        self.dropout = nn.Dropout(0.2)
        # Only cues that enough training pictures show are named.
        self.register_buffer("allowed", torch.zeros(len(POOLED), len(ARTIFACTS)))
        self.register_buffer("share", torch.tensor(0.0))  # of this head in the logits of both
        self.register_buffer("slope", torch.tensor(1.0))  # from the evidence of all cues to the logit of a change
        self.register_buffer("offset", torch.tensor(0.0))

    def forward(self, areas: Tensor) -> Tensor:
        mixed = self.mix(self.dropout(areas))
        skin, around = (mixed[:, POOLED.index(a)].unsqueeze(1) for a in ("skin", "background"))
        area_ids = torch.eye(len(POOLED), dtype=mixed.dtype).expand(len(mixed), -1, -1)
        logits: Tensor = self.name(torch.cat([mixed, mixed - skin, mixed - around, area_ids], 2))
        return logits.masked_fill(self.allowed == 0, -12.0)

    def changed(self, logits: Tensor) -> Tensor:
        """The logit of P(changed in part) from those of the cues: [n]."""
        return self.slope * logits.flatten(1).logsumexp(1) + self.offset

    def join(self, tower: Tensor, own: Tensor) -> Tensor:
        """The tower's logits of the cues joined with those of this head, where it knows the cue."""
        joined = (1 - self.share) * tower + self.share * own
        return torch.where((self.allowed > 0) & (tower > -12.0), joined, tower)


def areas_of(crops: Tensor, faces: Sequence[Face], dtype: torch.dtype | None) -> Tensor:
    """CLIP's areas of the faces with these crops: [n, areas, FEATURES]."""
    grids = np.stack([area_grid(f.crop_landmarks) for f in faces])
    return clip_areas(crops, torch.from_numpy(grids).float() / 255, dtype)


def load_head(folder: Path, tower: str | None = None) -> tuple[CueHead, float] | None:
    """The head beside a tower's weights and the probability from which both together name a cue; None where the folder
    has none. Raises SetupError for weights that are damaged or of another shape, or whose share was chosen beside
    another tower than that of the SHA-256 `tower`."""
    path = folder / f"{NAME}.card.json"
    if not path.is_file():
        return None
    card, head = read_card(path), CueHead()
    try:
        head.load_state_dict(load_weights(card, folder))
    except RuntimeError as error:
        raise SetupError(
            f"expert {NAME!r} in {folder} does not fit its head: {first_line(error)}; train it again",
            code="weights_do_not_fit",
        ) from error
    if tower is not None and card.figures.get("tower") != tower:
        raise SetupError(
            f"expert {NAME!r} in {folder} was weighed beside another tower; train it again", code="weights_do_not_fit"
        )
    threshold = card.figures.get("cue_threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise SetupError(
            f"expert {NAME!r} in {folder} has no cue_threshold from 0 to 1; reinstall x2dfd",
            code="cue_threshold_missing",
        )
    return head.eval(), float(threshold)


class ClipCues(CropExpert):
    """P(changed in part) of each face's aligned crop."""

    card: ClassVar[Card] = read_card(WEIGHTS / f"{NAME}.card.json")
    at_once = 16

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / f"{NAME}.card.json")  # type: ignore[misc]
        loaded = load_head(folder)
        assert loaded is not None  # as its card is there
        self._head = loaded[0]
        require("base")  # fail now, not at the first face

    def evidence(self, crops: Tensor, faces: Sequence[Face], shared: Shared | None) -> list[Evidence]:
        logits = self._head(areas_of(crops, faces, shared.tower_dtype if shared else None))
        return [Evidence(NAME, score) for score in self._head.changed(logits).sigmoid().tolist()]
