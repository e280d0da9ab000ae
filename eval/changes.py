"""What is done to a picture to see whether a score stands it: named, deterministic, the same for reals and fakes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from x2dfd.degrade import Array, Pixels, Rng, codec, soft

FORMAT_SWAP = "jpeg95"
"""The change that stands for another file format: the unchanged pixels are what a PNG of the picture holds."""


@dataclass(frozen=True)
class Change:
    """One change of a picture [H, W, 3] uint8 RGB; its size may become another."""

    name: str
    line: str  # what is done, with its parameters; stands in the result
    make: Callable[[Pixels, Rng], Pixels]

    def __call__(self, pixels: Pixels, sample_id: str) -> Pixels:
        """The changed picture. What is random depends on the change's and the sample's name only."""
        seed = hashlib.sha256(f"{self.name}:{sample_id}".encode()).digest()
        return self.make(pixels, np.random.default_rng(np.frombuffer(seed, np.uint32)))


def _rounded(pixels: Array) -> Pixels:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _coded(kind: str, quality: int) -> Callable[[Pixels, Rng], Pixels]:
    return lambda pixels, _: codec(pixels, kind, quality)


def _shrunk(factor: float) -> Callable[[Pixels, Rng], Pixels]:
    def make(pixels: Pixels, _: Rng) -> Pixels:
        height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)

    return make


def _blurred(sigma: float) -> Callable[[Pixels, Rng], Pixels]:
    return lambda pixels, _: _rounded(soft(pixels.astype(np.float32), sigma))


def _noisy(deviation: float) -> Callable[[Pixels, Rng], Pixels]:
    return lambda pixels, rng: _rounded(pixels + deviation * rng.standard_normal(pixels.shape, np.float32))


def _on_a_screen(longest: int, factor: float, radius: float, amount: float) -> Callable[[Pixels, Rng], Pixels]:
    def make(pixels: Pixels, _: Rng) -> Pixels:
        from PIL import Image

        height, width = pixels.shape[:2]
        scale = min(factor, longest / max(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        shown = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), np.float32)
        return _rounded(shown + amount * (shown - soft(shown, radius)))

    return make


CHANGES: dict[str, Change] = {
    change.name: change
    for change in (
        Change(FORMAT_SWAP, "JPEG, quality 95", _coded(".jpg", 95)),
        Change("jpeg75", "JPEG, quality 75", _coded(".jpg", 75)),
        Change("jpeg50", "JPEG, quality 50", _coded(".jpg", 50)),
        Change("jpeg30", "JPEG, quality 30", _coded(".jpg", 30)),
        Change("webp50", "WebP, quality 50", _coded(".webp", 50)),
        Change("half", "half as wide and high, mean of areas; the face is sought in the small picture", _shrunk(0.5)),
        Change("quarter", "a quarter as wide and high, mean of areas; sought in the small picture", _shrunk(0.25)),
        Change("blur", "Gaussian blur, sigma 1.5 pixels", _blurred(1.5)),
        Change("noise", "Gaussian noise of each value, standard deviation 8 of 255", _noisy(8.0)),
        Change(
            "screenshot",
            "as shown on a screen: bicubic to 0.8 of its size, longest side at most 720; unsharp mask, sigma 1 pixel, "
            "40 %; PNG",
            _on_a_screen(720, 0.8, 1.0, 0.4),
        ),
    )
}
"""Parameters were stated before anything was scored with them."""
