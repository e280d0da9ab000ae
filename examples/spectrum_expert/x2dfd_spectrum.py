"""Expert `spectrum`: how much of a face's detail lies at the highest frequencies, where decoders leave too little.

Blind spot: any blur, scaling or strong compression, which take the same frequencies away. An example, not a detector.
The idea: Durall, Keuper & Keuper, "Watch your Up-Convolution: CNN Based Generative Deep Neural Networks are Failing to
Reproduce Spectral Distributions" (CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from x2dfd.experts import Shared
from x2dfd.faces import PADDING, PREPROCESSING
from x2dfd.types import Card, Evidence, Face


class Spectrum:
    """P(fake) from the mean log power of the upper half of the frequencies, against that of the lower half."""

    card: ClassVar[Card] = Card(
        name="spectrum",
        version="1",
        source="one number in x2dfd_spectrum.py, chosen by hand; nothing was trained",
        licence="Apache-2.0",
        sha256="",  # no weight file
        preprocessing=PREPROCESSING,
        paper="after Durall et al., Watch your Up-Convolution, CVPR 2020",
        blind_spot="Blur, scaling and strong compression take the same frequencies away: a soft photo counts as fake.",
        covers=("frequency",),
    )

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [self._one(face) for face in faces]

    def _one(self, face: Face) -> Evidence:
        if (face.crop == PADDING).all(-1).mean() > 0.7:
            return Evidence(self.card.name, None, "most of the face lies outside the picture")
        grey = face.crop.mean(-1)  # [224, 224]
        window = np.outer(*(np.hanning(len(grey)),) * 2)
        power = np.log1p(np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2)
        frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(len(grey)),) * 2))  # 0.5: every other pixel
        drop = power[frequency < 0.25].mean() - power[(frequency >= 0.25) & (frequency < 0.5)].mean()
        return Evidence(self.card.name, float(1 / (1 + np.exp(4.0 - drop))))
