"""Small learnt autoencoders whose decoders draw a face anew, as the decoders of face swaps and generators do.

Trained by this project on real photos of split `train` (`python -m data_gen decoders`). They differ in stride, width,
enlargement and loss, so that none is learnt by heart. Redrawn pictures are aligned with their photo (the idea of Rajan
et al., "Aligned Datasets Improve Detection of Latent Diffusion-Generated Images", ICLR 2025).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from x2dfd.errors import SetupError, X2DFDError, first_line
from x2dfd.experts import write_card
from x2dfd.faces import PREPROCESSING, Array
from x2dfd.files import atomic_write, file_sha256
from x2dfd.manifest import manifest_sha256
from x2dfd.types import Card

WEIGHTS = Path(__file__).parent / "weights" / "decoders.safetensors"
PATCH = 96  # side of a training picture


@dataclass(frozen=True)
class Design:
    """How one autoencoder is built and trained."""

    name: str
    stride: int  # pixels of the picture a latent cell, along one side: 4 or 8
    latent: int  # channels of the latent
    up: str  # transposed | nearest | bilinear | shuffle
    adversarial: float  # weight of the patch discriminator's loss


DESIGNS: tuple[Design, ...] = (
    Design("t4", 4, 10, "transposed", 0.0),
    Design("n4", 4, 8, "nearest", 0.03),
    Design("s4", 4, 12, "shuffle", 0.03),
    Design("b8", 8, 32, "bilinear", 0.03),
    Design("t8", 8, 24, "transposed", 0.03),
    Design("n8", 8, 40, "nearest", 0.0),
)
_WIDTHS = {4: (24, 48), 8: (24, 48, 72)}


class _Up(nn.Module):
    def __init__(self, inner: int, outer: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(inner, outer, 4, 2, 1)
        elif kind == "shuffle":
            self.conv = nn.Sequential(nn.Conv2d(inner, 4 * outer, 3, padding=1), nn.PixelShuffle(2))
        else:
            self.conv = nn.Conv2d(inner, outer, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("nearest", "bilinear"):
            x = F.interpolate(x, scale_factor=2, mode=self.kind)
        return F.leaky_relu(self.conv(x), 0.2)


class Autoencoder(nn.Module):
    """Pictures [n, 3, h, w] in -1..1, sides divisible by the stride, to pictures of the same shape."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        widths = _WIDTHS[design.stride]
        down: list[nn.Module] = []
        inner = 3
        for width in widths:
            down += [nn.Conv2d(inner, width, 4, 2, 1), nn.LeakyReLU(0.2)]
            inner = width
        self.encode = nn.Sequential(
            *down, nn.Conv2d(inner, inner, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(inner, design.latent, 1)
        )
        up: list[nn.Module] = [nn.Conv2d(design.latent, inner, 3, padding=1), nn.LeakyReLU(0.2)]
        for width in (*widths[-2::-1], 20):
            up += [_Up(inner, width, design.up)]
            inner = width
        self.decode = nn.Sequential(
            *up, nn.Conv2d(inner, inner, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(inner, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        if self.training:  # with a little noise in the latents, a decoder learns to draw texture of its own
            z = z + 0.05 * z.detach().std() * torch.randn_like(z)
        output: Tensor = self.decode(z)
        return output


def _discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(48, 64, 3, 1, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 1, 3, 1, 1),
    )  # fmt: skip


def train_one(design: Design, crops: NDArray[np.uint8], rows: NDArray[np.intp], steps: int) -> Autoencoder:
    """Train one autoencoder on patches of real crops [n, s, s, 3]; `rows` are the ones to draw from."""
    torch.manual_seed(0)
    rng = np.random.default_rng([0, len(design.name), *design.name.encode()])
    net, critic = Autoencoder(design), _discriminator()
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3, betas=(0.5, 0.99))
    critic_optimiser = torch.optim.Adam(critic.parameters(), lr=5e-4, betas=(0.5, 0.99))
    start, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps) + 1e-5
        batch = torch.from_numpy(np.stack([_patch(crops[int(i)], rng) for i in rng.choice(rows, 16)]))
        real = batch.permute(0, 3, 1, 2).float() / 127.5 - 1
        redrawn = net(real)
        small_real, small_redrawn = F.avg_pool2d(real, 4), F.avg_pool2d(redrawn, 4)
        edges = sum(((redrawn.diff(dim=d) - real.diff(dim=d)).abs().mean() for d in (2, 3)), start=torch.zeros(()))
        loss = (redrawn - real).abs().mean() + (small_redrawn - small_real).abs().mean() + edges
        losses.append(loss.item())
        adversarial = design.adversarial > 0 and step > steps // 4
        if adversarial:
            loss = loss - design.adversarial * critic(redrawn).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if adversarial:
            critic_optimiser.zero_grad(set_to_none=True)
            hinge = F.relu(1 - critic(real)).mean() + F.relu(1 + critic(redrawn.detach())).mean()
            hinge.backward()
            critic_optimiser.step()
        if (step + 1) % 100 == 0:
            rate = (time.monotonic() - start) / (step + 1)
            print(
                f"{design.name} {step + 1}/{steps} {np.mean(losses[-100:]):.4f} {rate:.2f} s/step",
                file=sys.stderr,
                flush=True,
            )
    return net.eval()


def _patch(crop: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random patch, sometimes of a smaller copy of the crop: faces come in every size."""
    if rng.random() < 0.5:
        small = int(rng.integers(PATCH, crop.shape[0]))
        crop = np.asarray(cv2.resize(crop, (small, small), interpolation=cv2.INTER_AREA), np.uint8)
    y, x = rng.integers(0, crop.shape[0] - PATCH + 1, 2)
    patch = crop[y : y + PATCH, x : x + PATCH]
    return np.ascontiguousarray(patch[:, ::-1] if rng.random() < 0.5 else patch)


_in_use: Path | None = None


def use(path: Path | None) -> None:
    """Have `redraw` take the decoders of another weight file in this process; None for the committed ones."""
    global _in_use
    _in_use = path


@lru_cache(maxsize=2)
def load_bank(path: Path) -> dict[str, Autoencoder]:
    """The decoders of a weight file, by name. Raises SetupError when it is absent or holds something else."""
    if not path.is_file():
        raise SetupError(f"{path} is missing; train it: python -m data_gen decoders", code="decoders_missing")
    try:
        tensors = load_file(path)
        bank = {}
        for design in DESIGNS:
            net = Autoencoder(design)
            state = {k.split(".", 1)[1]: v.float() for k, v in tensors.items() if k.split(".", 1)[0] == design.name}
            net.load_state_dict(state)
            bank[design.name] = net.eval()
    except (SafetensorError, RuntimeError, IndexError) as error:
        raise SetupError(
            f"{path} does not hold decoders of the forge: {first_line(error)}", code="decoders_unreadable"
        ) from error
    return bank


def redraw(pixels: Array, name: str) -> NDArray[np.float32]:
    """The picture [h, w, 3], 0..255, drawn anew by decoder `name`; same shape, float."""
    net = load_bank(_in_use or WEIGHTS)[name]
    return through(lambda x: (net((x / 127.5 - 1).contiguous()).clamp(-1, 1) + 1) * 127.5, pixels, 8)


def through(net: Callable[[Tensor], Tensor], pixels: Array, stride: int) -> NDArray[np.float32]:
    """The output of a network [1, 3, h, w] → [1, 3, h, w], both 0..255, for a picture [h, w, 3] of any size."""
    height, width = pixels.shape[:2]
    padded = cv2.copyMakeBorder(
        np.asarray(pixels, np.float32), 0, -height % stride, 0, -width % stride, cv2.BORDER_REPLICATE
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would be other bytes
    try:
        with torch.inference_mode():
            output = net(torch.from_numpy(padded).permute(2, 0, 1)[None])
    finally:
        torch.set_num_threads(threads)
    return np.ascontiguousarray(output[0].permute(1, 2, 0).numpy()[:height, :width])


def train(data: Path, steps: int, work: Path, path: Path) -> None:
    """Train every decoder on the untouched real pictures of split `train`, and save finished ones in `work`. Raises
    X2DFDError when there are no such pictures, or when a decoder diverged."""
    from external_detectors.train.loop import licence_of, next_version
    from x2dfd.crops import load_crops

    crops = load_crops(data)
    rows = np.array(
        [i for i, s in enumerate(crops.samples) if (s.label, s.split) == ("real", "train") and s.method in ("none", "")]
    )
    if not len(rows):
        raise X2DFDError(f"{data}: no untouched real picture in split `train`", code="no_real_picture")
    work.mkdir(parents=True, exist_ok=True)
    nets, fidelity = {}, {}
    test_rows = [i for i, s in enumerate(crops.samples) if (s.label, s.split) == ("real", "calib")][:60]
    for design in DESIGNS:
        weights_file = work / f"{design.name}-{steps}-{manifest_sha256(data)[:12]}.safetensors"
        nets[design.name] = Autoencoder(design).eval()
        if not weights_file.is_file():
            state = train_one(design, crops.crops, rows, steps).state_dict()
            with atomic_write(weights_file) as temporary:
                save_file(state, temporary)
        nets[design.name].load_state_dict(load_file(weights_file))
        fidelity[design.name] = round(_fidelity(nets[design.name], crops.crops[test_rows]), 2) if test_rows else None
    save_bank(nets, path)
    sources = ", ".join(sorted({crops.samples[i].source for i in rows}))
    card = Card(
        name="decoders",
        version=next_version(path.parent, path.stem),
        source="trained by this project: data_gen/decoders.py",
        licence=licence_of(crops.samples[i] for i in rows),
        sha256=file_sha256(path),
        preprocessing=PREPROCESSING,
        paper="none; the use after Rajan et al., Aligned Datasets Improve Detection of Latent Diffusion-Generated "
        "Images, ICLR 2025",
        blind_spot="Small networks: they soften what a large generator would draw sharp.",
        weights=path.name,
        trained_on=f"{len(rows)} untouched real pictures, {steps} steps of 16 patches each; sources: {sources}",
        figures={"psnr_db_on_unseen_people": fidelity, "n": len(test_rows)},
    )
    write_card(path.with_suffix(".card.json"), card)


def _fidelity(net: Autoencoder, crops: NDArray[np.uint8]) -> float:
    """Mean peak signal-to-noise ratio of redrawn crops, dB."""
    x = torch.from_numpy(np.asarray(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        error = torch.cat([(net(part).clamp(-1, 1) - part).square().mean((1, 2, 3)) for part in x.split(8)])
    return float((10 * torch.log10(4 / error)).mean())


def save_bank(nets: dict[str, Autoencoder], path: Path) -> None:
    """All decoders in one 16-bit safetensors file, written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}.{k}": v.half().contiguous() for n, net in nets.items() for k, v in net.state_dict().items()}
    if any(not v.isfinite().all() for v in tensors.values()):
        raise X2DFDError("the training of a decoder diverged, so nothing was written", code="decoder_diverged")
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)
