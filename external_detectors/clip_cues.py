"""A second head for cues, on CLIP as it is: the forensic tower joins its logits with those of its own head.

The tower learns from its training what its pictures have in common, and its areas look alike to its own head where a
forgery is faint. CLIP's areas, which no training on forgeries has bent, differ from skin and surroundings in other
ways, so the two together name more cues rightly than either (LOG.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from external_detectors.clip_probe import CLASS_FEATURES
from external_detectors.tower_net import POOLED
from external_detectors.weights_io import load_weights
from x2dfd.errors import SetupError, first_line
from x2dfd.experts import read_card
from x2dfd.types import ARTIFACTS

NAME = "clip-cues"
"""Of its files beside those of the tower; a tower without them names cues by its own head alone."""

_CUE = 64


class ClipCues(nn.Module):
    """Areas of CLIP (`clip_areas`, [n, areas, CLASS_FEATURES]) to logits of cues: [n, areas, artifacts]."""

    allowed: Tensor
    share: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(CLASS_FEATURES, _CUE)
        self.name = nn.Sequential(
            nn.Linear(3 * _CUE + len(POOLED), 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, len(ARTIFACTS))
        )
        self.dropout = nn.Dropout(0.2)
        # Only cues that enough training pictures show are named.
        self.register_buffer("allowed", torch.zeros(len(POOLED), len(ARTIFACTS)))
        self.register_buffer("share", torch.tensor(0.0))  # of this head in the logits of both

    def forward(self, areas: Tensor) -> Tensor:
        mixed = self.mix(self.dropout(areas))
        skin, around = (mixed[:, POOLED.index(a)].unsqueeze(1) for a in ("skin", "background"))
        area_ids = torch.eye(len(POOLED), dtype=mixed.dtype).expand(len(mixed), -1, -1)
        logits: Tensor = self.name(torch.cat([mixed, mixed - skin, mixed - around, area_ids], 2))
        return logits.masked_fill(self.allowed == 0, -12.0)

    def join(self, tower: Tensor, own: Tensor) -> Tensor:
        """The tower's logits of the cues joined with those of this head, where it knows the cue."""
        joined = (1 - self.share) * tower + self.share * own
        return torch.where((self.allowed > 0) & (tower > -12.0), joined, tower)


def load_clip_cues(folder: Path) -> tuple[ClipCues, float] | None:
    """The head beside a tower's weights and the probability from which both together name a cue; None where the folder
    has none. Raises SetupError for weights that are damaged or of another shape."""
    path = folder / f"{NAME}.card.json"
    if not path.is_file():
        return None
    card, head = read_card(path), ClipCues()
    try:
        head.load_state_dict(load_weights(card, folder))
    except RuntimeError as error:
        raise SetupError(
            f"{card.weights} in {folder} does not fit its head: {first_line(error)}; train it again",
            code="weights_do_not_fit",
        ) from error
    threshold = card.figures.get("cue_threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise SetupError(
            f"{path} has no cue_threshold from 0 to 1; reinstall x2dfd",
            code="cue_threshold_missing",
        )
    return head.eval(), float(threshold)
