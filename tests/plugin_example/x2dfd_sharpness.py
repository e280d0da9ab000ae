"""Expert `sharpness`: calls a face fake that is softer than its picture should be.

Blind spot: everything but sharpness; an honest photo that is out of focus counts as fake. An example, not a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

from x2dfd.experts import Shared
from x2dfd.faces import PADDING, PREPROCESSING
from x2dfd.types import Card, Evidence, Face


class Sharpness:
    """P(fake) from the mean absolute Laplacian of the aligned crop."""

    card: ClassVar[Card] = Card(
        name="sharpness",
        version="1",
        source="two numbers in x2dfd_sharpness.py; nothing was trained",
        licence="Apache-2.0",
        sha256="",  # no weight file
        preprocessing=PREPROCESSING,
        paper="none",
        blind_spot="Everything but sharpness; honest photos that are out of focus.",
    )

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [self._one(face) for face in faces]

    def _one(self, face: Face) -> Evidence:
        seen = (face.crop != PADDING).any(-1)
        if seen.mean() < 0.3:
            return Evidence(self.card.name, None, "most of the face lies outside the picture")
        detail = np.abs(cv2.Laplacian(cv2.cvtColor(face.crop, cv2.COLOR_RGB2GRAY), cv2.CV_32F))[seen].mean()
        return Evidence(self.card.name, float(1 / (1 + np.exp(detail - 6.0))))
