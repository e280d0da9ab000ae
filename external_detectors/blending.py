"""Expert `blending`: sees where one face layer was laid over another.

Blind spot: a face that is synthetic as a whole has no seam, and heavy compression hides one.
Self-blended images, Shiohara & Yamasaki, CVPR 2022; EfficientNet-Lite0 instead of their B4, for a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from external_detectors.weights_io import WEIGHTS, judge_crops, load_weights, to_unit
from x2dfd.experts import Shared, read_card
from x2dfd.types import Card, Evidence, Face


class Blending:
    """P(fake) of each face's aligned crop."""

    card: ClassVar[Card] = read_card(WEIGHTS / "blending.card.json")

    def __init__(self, folder: Path = WEIGHTS) -> None:
        import torch

        from external_detectors.lite0 import Lite0

        self.card = read_card(folder / "blending.card.json")  # type: ignore[misc]
        self._net = Lite0().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._net.load_state_dict(load_weights(self.card, folder))
        self._net.eval()

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return judge_crops(self.card.name, faces, lambda crops: self._net(to_unit(crops)).sigmoid())
