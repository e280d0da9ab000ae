"""Expert `clip-probe`: a logistic on class tokens of CLIP as it is, without any addition.

The forensic tower is trained end to end and sees small traces, but what it learnt fits new generators less. Features
that no training on forgeries has bent keep more of their worth there (Ojha et al., arXiv 2302.10174), most of all those
of the middle layers (Koutlis & Papadopoulos, arXiv 2402.19091). The calibration joins both.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from external_detectors.crop_expert import CropExpert
from external_detectors.weights_io import load_weights
from x2dfd.adapter import EMBEDDED
from x2dfd.errors import SetupError
from x2dfd.experts import read_card
from x2dfd.fetch import require
from x2dfd.tower import CLASS_LAYERS, WIDTH, class_tokens
from x2dfd.types import Card

WEIGHTS = EMBEDDED / "experts"


class ClipProbe(CropExpert):
    """P(fake) of each face's aligned crop; it says nothing of where or why."""

    card: ClassVar[Card] = read_card(WEIGHTS / "clip-probe.card.json")
    at_once = 16

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "clip-probe.card.json")  # type: ignore[misc]
        weights = load_weights(self.card, folder)
        self._weight, self._bias = weights["weight"], weights["bias"]
        if self._weight.shape != (len(CLASS_LAYERS) * WIDTH,):
            raise SetupError(
                f"expert 'clip-probe' in {folder} was fitted on other layers; train it again",
                code="weights_do_not_fit",
            )
        require("base")  # fail now, not at the first face

    def p_fake(self, crops: Tensor) -> Tensor:
        return (class_tokens(crops) @ self._weight + self._bias).sigmoid()
