"""Tiny autoencoders that speak the latent spaces of latent-diffusion models: a real photo, drawn by such a decoder.

The weights are those of TAESD by Ollin Boer Bohan (MIT), which a user brings: a folder with
`<name>_encoder.safetensors` and `<name>_decoder.safetensors` of one or more. Nothing is downloaded. For the idea see
`data_gen.decoders`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_gen.decoders import through
from x2dfd.errors import SetupError
from x2dfd.faces import Array
from x2dfd.files import file_sha256

CHANNELS = {"taesd": 4, "taesdxl": 4, "taef1": 16}
"""Channels of the latent space: of Stable Diffusion 1 and 2, of SDXL, of FLUX.1."""

SHA256 = {
    "taesd_encoder": "a6b8c0fda4aad50784e543389e0239c72c5e31e9775c9e612ea8333bf3a77dcb",
    "taesd_decoder": "d903e7cc3ae58f21d985a3498a841fa8b230edccff7ac5d27607b0c557945c6f",
    "taesdxl_encoder": "3d78013286676a1a51074831230f90972e573698fe4b11416d6f28e0cd5bbe7e",
    "taesdxl_decoder": "ae5256b046b01d577279ed93a55bbb1fb2689e55aa14cfc0f7f841e0160202a5",
    "taef1_encoder": "19f5a854ce575fd0a1c0a52938410cf5fb4dc4b8ae71c8887533646d8fe47030",
    "taef1_decoder": "bb41500b646d5b8b592b7f3ca5d20d888c3075e209d178d99af609cd7e02a1d4",
}
"""By file name without `.safetensors`. Other files are refused: the same run has to give the same pictures."""

STRIDE = 8  # pixels of the picture a latent cell, along one side


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(64), nn.ReLU(), _conv(64), nn.ReLU(), _conv(64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def _conv(inputs: int, outputs: int = 64, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def encoder(channels: int) -> nn.Sequential:
    """[n, 3, h, w] in 0..1, sides divisible by STRIDE, to latents [n, channels, h/8, w/8]."""
    layers: list[nn.Module] = [_conv(3), _Block()]
    for _ in range(3):
        layers += [_conv(64, stride=2, bias=False), _Block(), _Block(), _Block()]
    return nn.Sequential(*layers, _conv(64, channels))


def decoder(channels: int) -> nn.Sequential:
    """Latents [n, channels, h, w] to pictures [n, 3, 8h, 8w], in 0..1 but for a little."""
    layers: list[nn.Module] = [_Clamp(), _conv(channels), nn.ReLU()]
    for _ in range(3):
        layers += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _conv(64, bias=False)]
    return nn.Sequential(*layers, _Block(), _conv(64, 3))


@lru_cache(maxsize=2)
def load(folder: Path) -> dict[str, nn.Sequential]:
    """The autoencoders of a folder, by name: encoder and decoder in a row. Raises SetupError when there is none, or a
    file is not the pinned one."""
    autoencoders: dict[str, nn.Sequential] = {}
    for name, channels in CHANNELS.items():
        networks = {f"{name}_encoder": encoder(channels), f"{name}_decoder": decoder(channels)}
        paths = {file_name: folder / f"{file_name}.safetensors" for file_name in networks}
        if not any(path.is_file() for path in paths.values()):
            continue
        for file_name, net in networks.items():
            if not paths[file_name].is_file():
                raise SetupError(
                    f"{paths[file_name]} is missing: encoder and decoder are needed both", code="autoencoder_incomplete"
                )
            if file_sha256(paths[file_name]) != SHA256[file_name]:
                raise SetupError(
                    f"{paths[file_name]} is not the file of TAESD that this version knows (SHA-256 differs)",
                    code="autoencoder_hash_differs",
                )
            try:
                net.load_state_dict({k: v.float() for k, v in load_file(paths[file_name]).items()})
            except (SafetensorError, RuntimeError) as error:
                raise SetupError(
                    f"{paths[file_name]} does not hold the tensors of TAESD: {error}", code="autoencoder_unreadable"
                ) from error
        autoencoders[name] = nn.Sequential(*networks.values()).eval().requires_grad_(False)
    if not autoencoders:
        names = ", or ".join(f"{name}_encoder.safetensors and {name}_decoder.safetensors" for name in CHANNELS)
        raise SetupError(
            f"{folder} holds no autoencoder. Put a pair of TAESD's files (MIT) into it: {names}",
            code="autoencoder_missing",
        )
    return autoencoders


_in_use: Path | None = None


def use(folder: Path | None) -> None:
    """Make `redraw` use the autoencoders of this folder in this process."""
    global _in_use
    _in_use = folder


def names() -> list[str]:
    """The autoencoders in use. Raises SetupError where none are."""
    return list(_loaded())


def _loaded() -> dict[str, nn.Sequential]:
    if _in_use is None:
        raise SetupError("redrawing in latents needs weights: data_gen forge --redraw DIR", code="autoencoder_missing")
    return load(_in_use)


def redraw(pixels: Array, name: str) -> NDArray[np.float32]:
    """The picture [h, w, 3], 0..255, encoded and decoded by `name`; same shape, float."""
    net = _loaded()[name]
    return through(lambda x: net(x.contiguous() / 255).clamp(0, 1) * 255, pixels, STRIDE)
