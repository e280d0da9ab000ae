"""Changes of pictures that test whether scores are robust: named, deterministic, the same for reals and fakes.

`CHANGES` are the ten that `run_bench.py experts` scores by default. The suite `CODEC` has several kinds of change,
each from mild to strong. `changes_of("codec")`, `changes_of("half,codec/jpeg/40")` name them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from x2dfd.degrade import Pixels, Rng, codec, soft, video_codec
from x2dfd.errors import UnknownName
from x2dfd.faces import Array

Make = Callable[[Pixels, Rng], Pixels]

FORMAT_SWAP = "jpeg95"
"""The change of the file format: a PNG of the picture holds its unchanged pixels, this JPEG does not."""


@dataclass(frozen=True)
class Change:
    """One change of a picture [H, W, 3] uint8 RGB; its size may become another."""

    name: str
    line: str  # what is done, with its parameters; the result quotes it
    make: Make

    def __call__(self, pixels: Pixels, sample_id: str) -> Pixels:
        """The changed picture. The randomness depends on the names of change and sample only."""
        seed = hashlib.sha256(f"{self.name}:{sample_id}".encode()).digest()
        return self.make(pixels, np.random.default_rng(np.frombuffer(seed, np.uint32)))


def _rounded(pixels: Array) -> Pixels:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _coded(kind: str, quality: int) -> Make:
    return lambda pixels, _: codec(pixels, kind, quality)


def _shrunk(factor: float) -> Make:
    def make(pixels: Pixels, _: Rng) -> Pixels:
        height, width = (max(1, round(side * factor)) for side in pixels.shape[:2])
        return np.asarray(cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA), np.uint8)

    return make


def _blurred(sigma: float) -> Make:
    return lambda pixels, _: _rounded(soft(pixels.astype(np.float32), sigma))


def _noisy(deviation: float) -> Make:
    return lambda pixels, rng: _rounded(pixels + deviation * rng.standard_normal(pixels.shape, np.float32))


def _on_a_screen(pixels: Pixels, _: Rng) -> Pixels:
    height, width = pixels.shape[:2]
    scale = min(0.8, 720 / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC), np.float32)
    return _rounded(resized + 0.4 * (resized - soft(resized, 1.0)))


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
            _on_a_screen,
        ),
    )
}
"""Their parameters were fixed before anything was scored with them."""


def _levels(kind: str, line: str, makes: dict[str, Make]) -> tuple[Change, ...]:
    """Changes `codec/KIND/PARAMETER`; `line` is filled with the parameter."""
    return tuple(Change(f"codec/{kind}/{value}", line.format(value), make) for value, make in makes.items())


def _kernel(side: int, sigma: float) -> Make:
    return lambda pixels, _: np.asarray(cv2.GaussianBlur(pixels, (side, side), sigma), np.uint8)


def _as_video(crf: int) -> Make:
    return lambda pixels, _: video_codec(pixels, crf)


def _longest(side: int) -> Make:
    return lambda pixels, rng: _shrunk(min(1.0, side / max(pixels.shape[:2])))(pixels, rng)


def _chained(*steps: Make) -> Make:
    def make(pixels: Pixels, rng: Rng) -> Pixels:
        for step in steps:
            pixels = step(pixels, rng)
        return pixels

    return make


CODEC: dict[str, tuple[Change, ...]] = {
    "jpeg": _levels("jpeg", "JPEG, quality {}", {f"{q}": _coded(".jpg", q) for q in (80, 60, 40, 20, 10)}),
    "webp": _levels("webp", "WebP, quality {}", {f"{q}": _coded(".webp", q) for q in (80, 50, 20)}),
    "h264": _levels("h264", "H.264, one frame, CRF {}", {f"{q}": _as_video(q) for q in (23, 30, 38)}),
    "resize": _levels(
        "resize", "longest side at most {}, mean of areas", {f"{s}": _longest(s) for s in (224, 112, 64)}
    ),
    "blur": _levels(
        "blur",
        "Gaussian blur, kernel and sigma {} pixels",
        {f"{k}-{s}": _kernel(k, s) for k, s in ((5, 0.5), (7, 1.0), (11, 1.5), (13, 2.0), (19, 3.0))},
    ),
    "noise": _levels(
        "noise",
        "Gaussian noise of each value, standard deviation {} of the range",
        {f"{s}": _noisy(255 * s) for s in (0.01, 0.03, 0.05, 0.1, 0.2)},
    ),
    "screenshot": (CHANGES["screenshot"],),
    "share": (
        Change("codec/share/once", "longest side at most 1080, JPEG 75", _chained(_longest(1080), _coded(".jpg", 75))),
        Change(
            "codec/share/recompressed",
            "longest side at most 1080, JPEG 70; at most 720, WebP 60; JPEG 80: passed on twice",
            _chained(_longest(1080), _coded(".jpg", 70), _longest(720), _coded(".webp", 60), _coded(".jpg", 80)),
        ),
    ),
    "screenshot-share": (
        Change("codec/screenshot-share/once", "screenshot, then JPEG 75", _chained(_on_a_screen, _coded(".jpg", 75))),
        Change(
            "codec/screenshot-share/twice",
            "screenshot, JPEG 70, screenshot of that, JPEG 50",
            _chained(_on_a_screen, _coded(".jpg", 70), _on_a_screen, _coded(".jpg", 50)),
        ),
    ),
}
"""Kind -> changes from mild to strong: true codecs, sizes, blur and noise with the parameters of GenD's sweep (blur's
kernel and sigma, sides, noise); the WebP, H.264 and chain parameters are ours."""


def changes_of(names: str) -> dict[str, Change]:
    """The changes that a comma-separated list names: a change, the suite `codec`, or a kind of it (`codec/blur`).

    `none` is no change. Raises UnknownName.
    """
    suite = [change for kind in CODEC.values() for change in kind]
    by_name = CHANGES | {change.name: change for change in suite}
    groups = {"codec": suite} | {f"codec/{kind}": list(changes) for kind, changes in CODEC.items()}
    selected: dict[str, Change] = {}
    for name in (n.strip() for n in names.split(",")):
        if not name or name == "none":
            continue
        if name not in by_name and name not in groups:
            raise UnknownName("change", name, [*CHANGES, *groups])  # without their single degrees: too many for a line
        selected |= {c.name: c for c in groups.get(name) or [by_name[name]]}
    return selected
