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

from external_detectors.published import Published, resized
from x2dfd.errors import SetupError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import Json
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
    """RGB [n, 3, 256, 256] in 0..1 to logits [n] of **real**: sigmoid(logit) is P(real), and P(fake) is 1 less that.

    "real" is class 1 of the published generator, which takes classes in the order of the alphabet.
    """

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


def _slots(layer: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors by Keras' names and in Keras' layout: views, so that copying into them fills the layer."""
    if isinstance(layer, nn.Conv2d) and layer.bias is not None:
        return {"kernel": layer.weight.permute(2, 3, 1, 0), "bias": layer.bias}  # [height, width, in, out]
    if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
        statistics = {"moving_mean": layer.running_mean, "moving_variance": layer.running_var}
        return {"gamma": layer.weight, "beta": layer.bias, **statistics}
    if isinstance(layer, nn.Linear):
        return {"kernel": layer.weight.T, "bias": layer.bias}  # [in, out]
    raise TypeError(f"no weights of Keras for {type(layer).__name__}")


def _keras_layers(path: Path, file: h5py.File) -> dict[str, list[Json]]:
    """For each kind of layer, the data sets of its layers in the order of creation: by number, as Keras counts up."""
    import h5py

    numbered: dict[str, dict[int, Json]] = {kind: {} for kind in _LAYERS}

    def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        # conv2d_5/conv2d_5/kernel:0
        found = re.fullmatch(rf"(?P<layer>({'|'.join(_LAYERS)})(?:_(\d+))?)/(?P=layer)/(\w+):0", name)
        if found is None:
            raise SetupError(
                f"{path} has {name} left over: it does not hold weights of MesoNet", code="checkpoint_left_over"
            )
        _, kind, number, tensor = found.groups()
        numbered[kind].setdefault(int(number or 0), {})[tensor] = item

    file.visititems(visit)
    return {kind: [layers[number] for number in sorted(layers)] for kind, layers in numbered.items()}


def load_mesonet(path: Path) -> Meso4 | MesoInception4:
    """The network whose weights `path` holds (Keras 2, HDF5, `save_weights`); which of the two, its shapes tell.

    Raises SetupError when h5py is not installed, the file cannot be read, or any tensor is missing, left over, of
    another shape or not finite.
    """
    try:
        import h5py
    except ImportError as error:
        raise SetupError(
            f"expert 'mesonet' reads HDF5 files with h5py ({error}): pip install h5py", code="package_missing"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            return _fill(path, _keras_layers(path, file))
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # no HDF5, or a damaged one
        raise SetupError(
            f"{path} is not a readable HDF5 file ({error}); get it again", code="checkpoint_unreadable"
        ) from error


def _fill(path: Path, found: dict[str, list[Json]]) -> Meso4 | MesoInception4:
    first = found["conv2d"][0].get("kernel") if found["conv2d"] else None
    networks: tuple[Meso4 | MesoInception4, ...] = (Meso4(), MesoInception4())
    for net in networks:
        layers = {kind: [m for m in net.modules() if isinstance(m, layer)] for kind, layer in _LAYERS.items()}
        if first is not None and first.shape == tuple(_slots(layers["conv2d"][0])["kernel"].shape):
            break
    else:
        raise SetupError(
            f"{path} begins neither as Meso4 nor as MesoInception4: it does not hold weights of MesoNet",
            code="network_unknown",
        )
    name = type(net).__name__
    for kind, ours in layers.items():
        if len(ours) != len(found[kind]):
            raise SetupError(
                f"{path} has {len(found[kind])} layers {kind} where {name} has {len(ours)}",
                code="checkpoint_layers_differ",
            )
        for number, (layer, theirs) in enumerate(zip(ours, found[kind], strict=True), start=1):
            slots = _slots(layer)
            if set(slots) != set(theirs):
                odd = ", ".join(sorted(set(slots) ^ set(theirs)))
                raise SetupError(
                    f"{path}: layer {number} of {kind} has missing or left-over tensors: {odd}",
                    code="checkpoint_layers_differ",
                )
            for tensor, slot in slots.items():
                shape, kept = theirs[tensor].shape, tuple(slot.shape)
                if shape != kept or theirs[tensor].dtype.kind != "f":
                    raise SetupError(
                        f"{path}: {tensor} of layer {number} of {kind} is {shape}, {name} has {kept}",
                        code="checkpoint_shape_differs",
                    )
                value = torch.from_numpy(theirs[tensor][()].astype("float32"))
                if not value.isfinite().all():
                    raise SetupError(
                        f"{path}: {tensor} of layer {number} of {kind} is not finite; get it again",
                        code="checkpoint_not_finite",
                    )
                with torch.no_grad():
                    slot.copy_(value)
    net.eval().requires_grad_(False)
    return net


class MesoNet(Published):
    """P(fake) of each face's aligned crop: 1 less the network's output, which is P(real).

    Each of the four published files will do under this name. It takes h5py to read them.
    """

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
