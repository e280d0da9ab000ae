"""Expert `mesonet`: MesoNet, a small network for early face swaps in compressed video.

Blind spot: forgeries unlike the Deepfakes and Face2Face of 2018, on which its published weights were trained.
Afchar, Nozick, Yamagishi & Echizen, "MesoNet: a Compact Facial Video Forgery Detection Network" (WIFS 2018, arXiv
1809.00888). The weights are Keras 2 HDF5 files that a user has on disk; h5py alone reads them, no Keras.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from external_detectors.published import Published, load_strictly, resized
from x2dfd.errors import SetupError
from x2dfd.faces import PREPROCESSING
from x2dfd.types import Card

if TYPE_CHECKING:
    import h5py

SIDE = 256
_LAYERS: dict[str, type[nn.Module]] = {
    "conv2d": nn.Conv2d,
    "batch_normalization": nn.BatchNorm2d,
    "dense": nn.Linear,
}
"""Keras' name of a layer that has weights, and ours."""
_NAMES = {
    "kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias",
    "moving_mean": "running_mean", "moving_variance": "running_var",
}  # fmt: skip
"""Keras' name of a tensor, and ours."""
_TENSOR = re.compile(rf"(?P<layer>({'|'.join(_LAYERS)})(?:_(\d+))?)/(?P=layer)/(\w+):0")  # conv2d_5/conv2d_5/kernel:0
LARGEST = 1024 * 16  # numbers in a tensor of either network


def _conv(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation), nn.ReLU()
    )


def _norm_pool(channels: int, pool: int) -> nn.Sequential:
    # Keras pads the pooling to "same"; at 256 px every side divides, so there is nothing to pad.
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3), nn.MaxPool2d(pool))


class _Inception(nn.Module):
    def __init__(self, inputs: int, a: int, b: int, c: int, d: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(  # in the order in which Keras created them
            [
                _conv(inputs, a, 1),
                nn.Sequential(_conv(inputs, b, 1), _conv(b, b, 3)),
                nn.Sequential(_conv(inputs, c, 1), _conv(c, c, 3, dilation=2)),
                nn.Sequential(_conv(inputs, d, 1), _conv(d, d, 3, dilation=3)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Meso(nn.Module):
    """RGB [n, 3, 256, 256] in 0..1 to logits [n] of **real**, class 1 of the published generator, which takes classes
    in the order of the alphabet."""

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features  # [n, 16, 8, 8]
        self.dense = nn.Linear(1024, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.features(x).permute(0, 2, 3, 1).flatten(1)  # Keras flattens height, width, channel
        logits: Tensor = self.out(nn.functional.leaky_relu(self.dense(flat), 0.1))[:, 0]
        return logits


class Meso4(_Meso):
    """Four convolutions; [n, 3, 256, 256] in 0..1 to logits [n] of real."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                *(_conv(3, 8, 3), _norm_pool(8, 2)),
                *(_conv(8, 8, 5), _norm_pool(8, 2)),
                *(_conv(8, 16, 5), _norm_pool(16, 2)),
                *(_conv(16, 16, 5), _norm_pool(16, 4)),
            )
        )


class MesoInception4(_Meso):
    """Two inception layers and two convolutions; [n, 3, 256, 256] in 0..1 to logits [n] of real."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                *(_Inception(3, 1, 4, 4, 2), _norm_pool(11, 2)),
                *(_Inception(11, 2, 4, 4, 2), _norm_pool(12, 2)),
                *(_conv(12, 16, 5), _norm_pool(16, 2)),
                *(_conv(16, 16, 5), _norm_pool(16, 4)),
            )
        )


def _renamed(tensors: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Keras' tensors under the network's names and in its layout; a tensor of no known layer keeps its name.

    Keras numbers the layers of a kind in the order of creation.
    """
    matches = {name: _TENSOR.fullmatch(name) for name in tensors}
    numbers = {kind: sorted({int(m[3] or 0) for m in matches.values() if m and m[2] == kind}) for kind in _LAYERS}
    layers = {kind: [n for n, m in net.named_modules() if isinstance(m, layer)] for kind, layer in _LAYERS.items()}
    state = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    for name, value in tensors.items():
        if (match := matches[name]) and match[4] in _NAMES:
            index = numbers[match[2]].index(int(match[3] or 0))
            if index < len(layers[match[2]]):
                name = f"{layers[match[2]][index]}.{_NAMES[match[4]]}"
        # Kernels are [height, width, in, out], or [in, out].
        state[name] = value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T if value.ndim == 2 else value
    return state


def load_mesonet(path: Path) -> Meso4 | MesoInception4:
    """The network whose weights `path` holds (Keras 2, HDF5, `save_weights`); the shapes tell which of the two it is.

    Raises SetupError when h5py is not installed, the file cannot be read, or any tensor is missing, left over, of
    another shape or not finite.
    """
    try:
        import h5py
    except ImportError as error:
        raise SetupError(f"expert 'mesonet' needs h5py ({error}): pip install h5py", code="package_missing") from error
    tensors: dict[str, Tensor] = {}

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            if item.size > LARGEST:
                raise SetupError(f"{path}: {name} is too large for MesoNet", code="checkpoint_shape_differs")
            tensors[name] = torch.from_numpy(item[()])

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # no HDF5, or a damaged one
        raise SetupError(f"{path} cannot be read as HDF5 ({error})", code="checkpoint_unreadable") from error
    for net in (Meso4(), MesoInception4()):
        state, (first, weight) = _renamed(tensors, net), next(iter(net.state_dict().items()))
        if first in state and state[first].shape == weight.shape:
            load_strictly(net, state, path)
            return net
    raise SetupError(f"{path} holds neither Meso4 nor MesoInception4", code="network_unknown")


class MesoNet(Published):
    """P(fake) of each face's aligned crop: 1 less the network's output, which is P(real). Each of the four published
    files works."""

    FILE = "MesoInception_DF.h5"
    card: ClassVar[Card] = Card(
        name="mesonet",
        version="2018",
        source="github.com/DariusAf/MesoNet (weights)",
        licence="Apache-2.0",
        sha256="",
        preprocessing=f"{PREPROCESSING}; squashed to {SIDE} px, bilinear; 0..1",
        paper="Afchar et al., MesoNet: a Compact Facial Video Forgery Detection Network, WIFS 2018, arXiv 1809.00888",
        blind_spot="Forgeries unlike the face swaps (or, with the F2F weights, the reenactments) of 2018; it was "
        "trained on crops of its own, not on ours.",
        trained_on="faces of web videos: Deepfakes (DF) or Face2Face (F2F) against film and TV",
        covers=("FS", "FR"),
    )

    def open(self, path: Path) -> Meso4 | MesoInception4:
        return load_mesonet(path)

    def p_fake(self, crops: Tensor) -> Tensor:
        logits: Tensor = self._net(resized(crops, SIDE))
        return (-logits).sigmoid()  # 1 - P(real)
