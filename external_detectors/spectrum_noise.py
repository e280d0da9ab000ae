"""Expert `spectrum-noise`: power spectrum and noise residual of a face, against what photos have.

Blind spot: strong compression and scaling, which write a spectrum and a noise of their own; noise added afterwards.
Features in spectrum_features.py; a small perceptron trained by scikit-learn, kept as plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from external_detectors.weights_io import WEIGHTS, load_weights
from x2dfd.experts import Shared, read_card
from x2dfd.types import Card, Evidence, Face


class SpectrumNoise:
    """P(fake) of each face's aligned crop."""

    card: ClassVar[Card] = read_card(WEIGHTS / "spectrum-noise.card.json")

    def __init__(self, folder: Path = WEIGHTS) -> None:
        self.card = read_card(folder / "spectrum-noise.card.json")  # type: ignore[misc]
        self._state = {k: v.numpy() for k, v in load_weights(self.card, folder).items()}

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        import numpy as np

        from external_detectors.spectrum_features import features, perceptron

        if not faces:
            return []
        logits = perceptron(self._state, np.stack([features(f.crop, f.crop_landmarks) for f in faces]))
        return [Evidence(self.card.name, float(s)) for s in 1 / (1 + np.exp(-logits))]
