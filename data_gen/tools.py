"""The building blocks of the forge's methods: photos, forgeries, warps, masks, blends and colours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.degrade import Pixels, Rng, soft
from x2dfd.faces import OVAL, Array, area_mask
from x2dfd.types import Cue


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo with one face of interest."""

    pixels: Pixels  # [H, W, 3] RGB
    landmarks: NDArray[np.float32]  # [468, 2] in its pixels
    source: str  # the data source it belongs to
    group: str  # person, clip or photo id; a forgery inherits it


@dataclass(frozen=True, eq=False)
class Forgery:
    """A forged picture, and the truth about it."""

    pixels: Pixels  # [H, W, 3] RGB, same size as the photo
    mask: NDArray[np.uint8]  # [H, W], 0..255: the share of new content at each pixel
    cues: tuple[Cue, ...]  # signs that a careful viewer could point at; empty for harmless changes
    method: str
    df_class: str  # FS | FR | FE | EFS | real
    strength: float  # 0 (barely there) .. 1 (blatant)


def untouched(photo: Photo, method: str = "none", df_class: str = "real", strength: float = 0.0) -> Forgery:
    """An unchanged photo, or a ready-made fake with unknown cues; both have no cues and no mask."""
    return Forgery(photo.pixels, np.zeros(photo.pixels.shape[:2], np.uint8), (), method, df_class, strength)


Made = tuple[Array, Array, list[tuple[str, str]]]
"""New pixels (float or uint8 [H, W, 3]), mask [H, W] in 0..1, and (area, artifact) pairs."""


@dataclass(frozen=True)
class Method:
    name: str
    df_class: Literal["FS", "FR", "FE", "EFS", "real"]
    make: Callable[[Photo, Photo | None, float, Rng], Made]
    needs_donor: bool = False
    same_group: bool = False  # a donor, where there is one, is another picture of the same person, clip or photo
    by_area: bool = False  # each cue but a seam is measured inside its own area: the method changes several at once


def face_size(photo: Photo) -> float:
    oval = photo.landmarks[list(OVAL)]
    return float(np.sqrt(np.prod(oval.max(0) - oval.min(0))))


def grown_mask(photo: Photo, area: str, grow: float = 0.0) -> Array:
    """Mask of an area in 0..1, grown (or shrunk) by a share of the face's size."""
    mask = area_mask(photo.landmarks, area, photo.pixels.shape)
    pixels = round(abs(grow) * face_size(photo))
    if pixels:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
        mask = np.asarray(cv2.dilate(mask, kernel) if grow > 0 else cv2.erode(mask, kernel), np.uint8)
    return mask.astype(np.float32) / 255.0


def shows_teeth(photo: Photo) -> bool:
    return bool(grown_mask(photo, "teeth").sum() > 0.004 * face_size(photo) ** 2)


def rounded(values: Array) -> Pixels:
    """As whole numbers, cut off at 0 and 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def blend(base: Array, new: Array, mask: Array) -> Array:
    alpha = mask[..., None]
    return np.asarray(base.astype(np.float32) * (1 - alpha) + new.astype(np.float32) * alpha)


def oval_mask(photo: Photo) -> Array:
    mask = np.zeros(photo.pixels.shape[:2], np.uint8)
    cv2.fillPoly(mask, [photo.landmarks[list(OVAL)].round().astype(np.int32)], 255)
    return mask.astype(np.float32) / 255.0


def tps_maps(target: Array, source: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Maps for cv2.remap that carry `source` points [n, 2] onto `target` points: a thin-plate spline, solved exactly at
    the points, evaluated on a coarse grid and enlarged: 3 ms instead of 100."""

    def radial(a: Array, b: Array) -> Array:
        d = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.asarray(d * np.log(d + 1e-6))

    n = len(target)
    scale = float(max(shape[:2]))
    t, s = target / scale, source / scale
    system = np.zeros((n + 3, n + 3))
    system[:n, :n] = radial(t, t) + 1e-5 * np.eye(n)
    system[:n, n:] = np.concatenate([np.ones((n, 1)), t], 1)
    system[n:, :n] = system[:n, n:].T
    weights = np.linalg.solve(system, np.concatenate([s - t, np.zeros((3, 2))]))
    height, width = shape[:2]
    gh, gw = max(height // 8, 2), max(width // 8, 2)
    yy, xx = np.mgrid[0:gh, 0:gw]
    grid = np.stack([xx / (gw - 1) * (width - 1), yy / (gh - 1) * (height - 1)], -1).reshape(-1, 2) / scale
    shift = (radial(grid, t) @ weights[:n] + np.concatenate([np.ones((len(grid), 1)), grid], 1) @ weights[n:]) * scale
    coarse = (grid * scale + shift).reshape(gh, gw, 2).astype(np.float32)
    # Corners of the coarse grid lie on corner pixels, so enlarge by an affine that keeps them there.
    matrix = np.array([[(gw - 1) / (width - 1), 0, 0], [0, (gh - 1) / (height - 1), 0]])
    maps = cv2.warpAffine(
        coarse, matrix, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return np.ascontiguousarray(maps[..., 0]), np.ascontiguousarray(maps[..., 1])


def remap(pixels: Array, maps: tuple[Array, Array]) -> Array:
    return np.asarray(cv2.remap(pixels, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101))


CONTROL = np.unique(np.concatenate([np.array(OVAL), np.arange(0, 468, 7)]))
"""About a hundred mesh points: the oval and every seventh."""


def match_colour(new: Array, like: Array, mask: Array, amount: float) -> Array:
    """Mean and spread of `new` moved to those of `like` inside the mask, in Lab (Reinhard et al. 2001)."""
    inside = mask > 0.5
    if inside.sum() < 20:
        return new
    a = cv2.cvtColor(np.clip(new, 0, 255).astype(np.uint8), cv2.COLOR_RGB2LAB).astype(np.float32)
    b = cv2.cvtColor(like, cv2.COLOR_RGB2LAB).astype(np.float32)
    ma, sa, mb, sb = a[inside].mean(0), a[inside].std(0) + 1e-3, b[inside].mean(0), b[inside].std(0)
    moved = (a - ma) * np.clip(sb / sa, 0.5, 2.0) + mb
    out = cv2.cvtColor(np.clip(moved, 0, 255).astype(np.uint8), cv2.COLOR_LAB2RGB).astype(np.float32)
    return np.asarray(new * (1 - amount) + out * amount)


def smooth_noise(shape: tuple[int, ...], sigma: float, rng: Rng) -> Array:
    """Smooth random field [H, W] in about -1..1."""
    height, width = shape[:2]
    coarse = rng.standard_normal((max(3, round(height / sigma) + 2), max(3, round(width / sigma) + 2)))
    return np.asarray(cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / 2)


def elastic(mask: Array, amount: float, rng: Rng) -> Array:
    yy, xx = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32)
    sigma = rng.uniform(0.06, 0.2) * mask.shape[1]
    dx, dy = (smooth_noise(mask.shape, sigma, rng) * amount for _ in range(2))
    return np.asarray(cv2.remap(mask, xx + dx.astype(np.float32), yy + dy.astype(np.float32), cv2.INTER_LINEAR))


def pick(rng: Rng, *names: str) -> str:
    return str(rng.choice(names))


def blend_mask(photo: Photo, rng: Rng) -> tuple[Array, str]:
    """A random face region for blending and the area at whose edge the seam lies."""
    kind = rng.choice(["oval", "wide", "inner", "lower", "upper"], p=[0.3, 0.2, 0.25, 0.15, 0.1])
    points = photo.landmarks
    if kind in ("oval", "wide"):
        mask = oval_mask(photo)
        if kind == "wide":
            k = max(1, round(0.05 * face_size(photo))) * 2 + 1
            mask = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k)))
        seam = "face-contour"
    else:
        chosen = {
            "inner": (33, 263, 70, 300, 105, 334, 61, 291, 17, 152, 200, 50, 280, 205, 425, 18, 9),
            "lower": (116, 345, 6, 58, 288, 152, 172, 397, 50, 280),
            "upper": (10, 103, 332, 127, 356, 205, 425, 2, 54, 284),
        }[str(kind)]
        hull = cv2.convexHull(points[list(chosen)]).round().astype(np.int32)
        mask = np.zeros(photo.pixels.shape[:2], np.float32)
        cv2.fillConvexPoly(mask, hull, 1.0)
        seam = {"inner": "cheeks", "lower": "jaw", "upper": "forehead"}[str(kind)]
    mask = elastic(mask, rng.uniform(0, 0.06) * face_size(photo), rng)
    return np.asarray(mask), seam


def feather(mask: Array, photo: Photo, rng: Rng) -> Array:
    """Edge softened by two blurs of random width, the seam somewhere inside or outside the old edge."""
    size = face_size(photo)
    wide = soft(mask, rng.uniform(0.01, 0.05) * size)
    cut = rng.choice([0.05, 0.3, 0.5, 0.7])
    return soft(np.clip((wide - cut) / (1 - cut), 0, 1).astype(np.float32), rng.uniform(0.004, 0.05) * size)


def fit_donor(photo: Photo, donor: Photo, points: Array) -> Array:
    """The donor's pixels warped so that its mesh lies on the photo's mesh."""
    maps = tps_maps(photo.landmarks[points].astype(float), donor.landmarks[points].astype(float), photo.pixels.shape)
    # A large donor is shrunk first: sampling it point by point would alias.
    ratio = face_size(donor) / face_size(photo)
    source = soft(donor.pixels.astype(np.float32), 0.4 * ratio) if ratio > 1.5 else donor.pixels.astype(np.float32)
    return remap(source, maps)


def shrunk(pixels: Array, factor: float) -> Array:
    height, width = pixels.shape[:2]
    side = (max(16, round(width * factor)), max(16, round(height * factor)))
    return np.asarray(cv2.resize(pixels, side, interpolation=cv2.INTER_AREA))


def enlarged(small: Array, shape: tuple[int, ...], factor: float, rng: Rng) -> Array:
    up = pick(rng, "cubic", "cubic", "linear", "nearest")
    flag = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}[up]
    new: Array = np.asarray(cv2.resize(small, shape[1::-1], interpolation=flag))
    return soft(new, 0.45 / factor) if up == "nearest" else new  # a decoder's convolution follows its enlargement


def wander(points: Array, amount: float, rng: Rng) -> Array:
    """Smooth random shifts [n, 2] of mesh points: each the sum of a few waves over the face."""
    span = float(np.ptp(points, 0).max()) + 1e-6
    shift = np.zeros_like(points)
    for _ in range(3):
        wave, phase = rng.uniform(-4, 4, (2, 2)), rng.uniform(0, 2 * np.pi, 2)
        shift += np.sin(points / span @ wave + phase) / 1.7
    return np.asarray(shift * amount)


def dct_thin(pixels: Array, block: int, keep: float) -> Array:
    """Each block keeps only its low frequencies: a small autoencoder does the same to texture."""
    height, width = pixels.shape[0] // block * block, pixels.shape[1] // block * block
    out = pixels.astype(np.float32).copy()
    # By rows: the two-dimensional transform of the identity is the identity.
    basis = cv2.dct(np.eye(block, dtype=np.float32), flags=cv2.DCT_ROWS).T
    index = np.arange(block)
    low = (index[:, None] + index[None]) < 2 * block * keep
    x = out[:height, :width].reshape(height // block, block, width // block, block, 3).transpose(0, 2, 4, 1, 3)
    x = np.einsum("ij,abcjk,lk->abcil", basis, x, basis) * low
    x = np.einsum("ji,abcjk,kl->abcil", basis, x, basis)
    out[:height, :width] = x.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)
    return out


def upsample_trace(pixels: Array, rng: Rng) -> Array:
    """Halve, then double as a generator's decoder does: nearest or zero-insertion with a small random kernel."""
    height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
    x: Array = pixels[:height, :width].astype(np.float32)
    small = cv2.resize(x, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
    small = small + (small - soft(small, 0.8)) * rng.uniform(0.3, 1.2)
    sparse = rng.random() < 0.5
    if sparse:
        up = np.zeros_like(x)
        up[::2, ::2] = small * 4
    else:
        up = small.repeat(2, 0).repeat(2, 1)
    kernel = rng.uniform(0.2, 1, (3, 3)) + np.array([[0, 0.5, 0], [0.5, 1.5, 0.5], [0, 0.5, 0]])
    kernel = (kernel / kernel.sum()).astype(np.float32)
    if sparse:
        # Each of the four phases must sum to a quarter, or the grid would be blatant.
        for i in range(2):
            for j in range(2):
                phase = kernel[i::2, j::2]
                kernel[i::2, j::2] = phase / phase.sum() * 0.25 * (1 + rng.uniform(-0.04, 0.04))
    up = cv2.filter2D(up, -1, kernel, borderType=cv2.BORDER_REFLECT_101)
    out = pixels.astype(np.float32).copy()
    out[:height, :width] = up
    return out
