"""Expert `upsampling`: relations between neighbouring pixels that a decoder's enlarging layers leave.

Blind spot: whatever has been scaled or compressed since it was made; changes that no decoder drew.
After Tan et al., "Rethinking the Up-Sampling Operations in CNN-based Generative Network for Generalizable Deepfake
Detection", CVPR 2024; a small network of ours instead of their ResNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from external_detectors.weights_io import WEIGHTS, judge_crops, load_weights, to_unit
from x2dfd.experts import Shared, read_card
from x2dfd.types import Card, Evidence, Face


class Upsampling:
    """P(fake) of each face's aligned crop: drawn by a decoder."""

    card: ClassVar[Card] = read_card(WEIGHTS / "upsampling.card.json")
    one_sided = True  # its "real" says nothing of a face that was changed in part

    def __init__(self, folder: Path = WEIGHTS) -> None:
        import torch

        from external_detectors.upsampling_net import UpsamplingNet

        self.card = read_card(folder / "upsampling.card.json")  # type: ignore[misc]
        self._net = UpsamplingNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._net.load_state_dict(load_weights(self.card, folder))
        self._net.eval()

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return judge_crops(self.card.name, faces, lambda crops: self._net(to_unit(crops)).sigmoid())
