"""The base class of experts that look at aligned crops with one network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from x2dfd.experts import Shared
from x2dfd.faces import CROP_SIZE
from x2dfd.types import Card, Evidence, Face


class CropExpert:
    """Gives batches of crops to a network. A subclass loads it in `__init__` and defines `p_fake` or `evidence`.

    A face gets no score, but a note with the reason, if its crop has another format or the network gives no number.
    """

    card: ClassVar[Card]
    at_once: ClassVar[int] = 8
    """Largest number of faces in a batch."""

    def p_fake(self, crops: Tensor) -> Tensor:
        """P(fake) [n] of crops [n, CROP_SIZE, CROP_SIZE, 3] uint8."""
        raise NotImplementedError

    def evidence(self, crops: Tensor, faces: Sequence[Face], shared: Shared | None) -> list[Evidence]:
        """The evidence for faces with the given crops, [n, CROP_SIZE, CROP_SIZE, 3] uint8.

        `shared` is that of the whole batch: its hidden states may be of more faces.
        """
        return [Evidence(self.card.name, score) for score in self.p_fake(crops).tolist()]

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        name = self.card.name
        results = [Evidence(name, None, f"the crop is not {CROP_SIZE} px RGB in 8 bits")] * len(faces)
        usable = [k for k, f in enumerate(faces) if f.crop.shape == (CROP_SIZE, CROP_SIZE, 3)]
        usable = [k for k in usable if faces[k].crop.dtype == np.uint8]
        for start in range(0, len(usable), self.at_once):
            batch = usable[start : start + self.at_once]
            with torch.inference_mode():
                crops = torch.from_numpy(np.stack([faces[k].crop for k in batch]))
                evidence = self.evidence(crops, [faces[k] for k in batch], shared)
            for k, result in zip(batch, evidence, strict=True):
                has_score = result.score is not None and math.isfinite(result.score)
                results[k] = result if has_score else Evidence(name, None, "the network gave no number")
        return results
