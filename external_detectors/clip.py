"""Expert `clip`: a linear head over the later layers of the CLIP tower; faces synthetic as a whole.

Blind spot: generators unlike those it was trained on, above all on photos from sources that it does not know.
After Koutlis & Papadopoulos, "Leveraging Representations from Intermediate Encoder-blocks for Synthetic Image
Detection" (ECCV 2024): what betrays a generator lies in the layers before the final embedding. Instead of their
class-token projections: mean and standard deviation over the patch tokens of each layer, and a plain logistic head.
It shares the tower's forward pass with the embedded MLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from external_detectors.weights_io import WEIGHTS, load_weights
from x2dfd.experts import Shared, read_card
from x2dfd.fetch import require
from x2dfd.types import Card, Evidence, Face


class Clip:
    """P(fake) of each face's aligned crop: synthetic as a whole."""

    card: ClassVar[Card] = read_card(WEIGHTS / "clip.card.json")
    one_sided = True  # its "real" says nothing of a face that was changed in part

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "clip.card.json")  # type: ignore[misc]
        self._state = load_weights(self.card, folder)
        require("base")  # said now, not at the first face; the tower itself is only loaded when nobody shares theirs

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        import numpy as np
        import torch

        from external_detectors.clip_head import FIRST, LAST, head_logits
        from x2dfd.tower import patch_statistics, tower_states

        if not faces:
            return []
        states = shared.tower_states if shared else None
        with torch.inference_mode():
            if states is None or len(states) <= LAST:
                states = tower_states(torch.from_numpy(np.stack([f.crop for f in faces])), LAST)
            scores = head_logits(self._state, patch_statistics(states[FIRST : LAST + 1])).sigmoid()
        return [Evidence(self.card.name, float(s)) for s in scores]
