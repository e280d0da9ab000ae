"""The network of the expert `upsampling`, shared by its training and its use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def neighbour_residual(x: Tensor) -> Tensor:
    """What a pixel has beyond the first pixel of its 2 x 2 block: [n, c, h, w] to the same shape; even sides.

    Enlarging layers give neighbours relations that a camera does not (Tan et al., "Rethinking the Up-Sampling
    Operations in CNN-based Generative Network for Generalizable Deepfake Detection", CVPR 2024).
    """
    small = x[..., ::2, ::2]
    return x - small.repeat_interleave(2, -1).repeat_interleave(2, -2)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; halves the sides."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer))
        self.past = nn.Conv2d(inner, outer, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.past(F.avg_pool2d(x, 2)))


class UpsamplingNet(nn.Module):
    """Crops [n, 3, 224, 224] in -1..1 to logits [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.Sequential(_Block(32, 48), _Block(48, 72), _Block(72, 96))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(2 * 96, 1)

    def forward(self, x: Tensor) -> Tensor:
        f = self.blocks(self.stem(neighbour_residual(x) * 4)).flatten(2)  # [n, 96, 14 * 14]
        said: Tensor = self.classifier(self.dropout(torch.cat([f.mean(2), f.std(2)], 1)))[:, 0]
        return said
