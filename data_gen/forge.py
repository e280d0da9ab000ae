"""Forgeries of real photos whose manipulation is known: image, mask, cues, strength, class.

Every method is a function `(photo, donor, strength, rng) -> (pixels, mask, cues)`; it says what it did, so that an
explanation can be scored against the truth. `HARMLESS` methods change a photo as phones, apps and platforms do. They
change no label and are laid over real photos and forgeries alike (`changed`): so "processed" is learnt neither as
"fake" nor as "real".

Self-blending follows Shiohara & Yamasaki, "Detecting Deepfakes with Self-Blended Images" (CVPR 2022). The other methods
are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.degrade import codec, rescale, soft, tone
from x2dfd.faces import OVAL, area_mask
from x2dfd.types import Cue

Array = NDArray[Any]
Pixels = NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo with one face of interest."""

    pixels: Pixels  # [H, W, 3] RGB
    landmarks: NDArray[np.float32]  # [468, 2] in its pixels
    source: str  # the data source it belongs to
    group: str  # person, clip or photo id; a forgery inherits it


@dataclass(frozen=True, eq=False)
class Forgery:
    """What the forge made, and the truth about it."""

    pixels: Pixels  # [H, W, 3] RGB, same size as the photo
    mask: NDArray[np.uint8]  # [H, W], 0..255: how much of the new content stands at each pixel
    cues: tuple[Cue, ...]  # what a careful eye could point at; empty for harmless changes
    method: str
    df_class: str  # FS | FR | FE | EFS | real
    strength: float  # 0 (barely there) .. 1 (blatant)


Made = tuple[Array, Array, list[tuple[str, str]]]
"""New pixels (float or uint8 [H, W, 3]), mask [H, W] in 0..1, and (area, artifact) pairs."""


@dataclass(frozen=True)
class Method:
    name: str
    df_class: Literal["FS", "FR", "FE", "EFS", "real"]
    make: Callable[[Photo, Photo | None, float, Rng], Made]
    needs_donor: bool = False


# --- tools ---------------------------------------------------------------------------------------------------------


def _face_size(photo: Photo) -> float:
    oval = photo.landmarks[list(OVAL)]
    return float(np.sqrt(np.prod(oval.max(0) - oval.min(0))))


def _mask(photo: Photo, area: str, grow: float = 0.0) -> Array:
    """Mask of an area in 0..1, grown (or shrunk) by a share of the face's size."""
    mask = area_mask(photo.landmarks, area, photo.pixels.shape)
    pixels = round(abs(grow) * _face_size(photo))
    if pixels:
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * pixels + 1, 2 * pixels + 1))
        mask = np.asarray(cv2.dilate(mask, kernel) if grow > 0 else cv2.erode(mask, kernel), np.uint8)
    return mask.astype(np.float32) / 255.0


def _blend(base: Array, new: Array, mask: Array) -> Array:
    alpha = mask[..., None]
    return np.asarray(base.astype(np.float32) * (1 - alpha) + new.astype(np.float32) * alpha)


def _oval_mask(photo: Photo) -> Array:
    mask = np.zeros(photo.pixels.shape[:2], np.uint8)
    cv2.fillPoly(mask, [photo.landmarks[list(OVAL)].round().astype(np.int32)], 255)
    return mask.astype(np.float32) / 255.0


def _tps_maps(target: Array, source: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Maps for cv2.remap that carry `source` points [n, 2] onto `target` points: a thin-plate spline.

    Solved exactly at the points, evaluated on a coarse grid and enlarged: 3 ms instead of 100.
    """

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


def _remap(pixels: Array, maps: tuple[Array, Array]) -> Array:
    return np.asarray(cv2.remap(pixels, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101))


_CONTROL = np.unique(np.concatenate([np.array(OVAL), np.arange(0, 468, 7)]))
"""About a hundred mesh points: the oval and every seventh."""


def _match_colour(new: Array, like: Array, mask: Array, amount: float) -> Array:
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


def _smooth_noise(shape: tuple[int, ...], sigma: float, rng: Rng) -> Array:
    """Smooth random field [H, W] in about -1..1."""
    height, width = shape[:2]
    coarse = rng.standard_normal((max(3, round(height / sigma) + 2), max(3, round(width / sigma) + 2)))
    return np.asarray(cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / 2)


def _elastic(mask: Array, amount: float, rng: Rng) -> Array:
    yy, xx = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]].astype(np.float32)
    sigma = rng.uniform(0.06, 0.2) * mask.shape[1]
    dx, dy = (_smooth_noise(mask.shape, sigma, rng) * amount for _ in range(2))
    return np.asarray(cv2.remap(mask, xx + dx.astype(np.float32), yy + dy.astype(np.float32), cv2.INTER_LINEAR))


def _pick(rng: Rng, *names: str) -> str:
    return str(rng.choice(names))


# --- forgeries -----------------------------------------------------------------------------------------------------


def _blend_mask(photo: Photo, rng: Rng) -> tuple[Array, str]:
    """A random face region for blending and the area at whose edge the seam lies."""
    kind = rng.choice(["oval", "wide", "inner", "lower", "upper"], p=[0.3, 0.2, 0.25, 0.15, 0.1])
    points = photo.landmarks
    if kind in ("oval", "wide"):
        mask = _oval_mask(photo)
        if kind == "wide":
            k = max(1, round(0.05 * _face_size(photo))) * 2 + 1
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
    mask = _elastic(mask, rng.uniform(0, 0.06) * _face_size(photo), rng)
    return np.asarray(mask), seam


def _feather(mask: Array, photo: Photo, rng: Rng) -> Array:
    """Edge softened by two blurs of random width, the seam somewhere inside or outside the old edge."""
    size = _face_size(photo)
    wide = soft(mask, rng.uniform(0.01, 0.05) * size)
    cut = rng.choice([0.05, 0.3, 0.5, 0.7])
    return soft(np.clip((wide - cut) / (1 - cut), 0, 1).astype(np.float32), rng.uniform(0.004, 0.05) * size)


def self_blend(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    base = photo.pixels
    mask, seam = _blend_mask(photo, rng)
    cues = [(seam, "blending")]
    other: Array = base.astype(np.float32)
    amount = 0.1 + 0.9 * strength
    # One of the two layers is changed, at random: a seam may lie on either side.
    known = ["tone", "blur", "sharpen", "down", "codec", "noise"]
    kinds = list(rng.choice(known, size=rng.integers(1, 4), replace=False))
    if strength > 0.5 and "tone" not in kinds:
        kinds.append("tone")
    for kind in kinds:
        if kind == "tone":
            other = tone(other, amount, rng)
            if strength > 0.3:
                cues.append(("skin", "colour"))
        elif kind == "blur":
            other = soft(other, rng.uniform(0.3, 1.4) * amount)
            cues.append(("skin", "blur"))
        elif kind == "sharpen":
            other = np.clip(other + (other - soft(other, 1.2)) * rng.uniform(0.3, 1.2) * amount, 0, 255)
        elif kind == "down":
            factor = 1 - rng.uniform(0.2, 0.6) * amount
            other = rescale(other, factor, int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC])))
            cues.append(("skin", "blur"))
        elif kind == "codec":
            other = codec(other, ".jpg", int(95 - 60 * amount * rng.uniform(0.5, 1))).astype(np.float32)
        else:
            other = other + rng.standard_normal(other.shape).astype(np.float32) * rng.uniform(1, 7) * amount
            cues.append(("skin", "noise"))
    changed_is_inner = rng.random() < 0.6
    inner: Array = other if changed_is_inner else base.astype(np.float32)
    outer: Array = base.astype(np.float32) if changed_is_inner else other
    size = _face_size(photo)
    # The inner layer moves a little: real swaps never sit exactly.
    slip = 0.3 + 0.7 * strength
    shift, turn = rng.uniform(-0.03, 0.03, 2) * size * slip, rng.uniform(-2, 2) * slip
    zoom = 1 + rng.uniform(-0.04, 0.05) * slip
    centre = photo.landmarks[list(OVAL)].mean(0)
    matrix: Array = cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), turn, zoom)
    matrix[:, 2] += shift
    dims = (base.shape[1], base.shape[0])
    inner = cv2.warpAffine(inner, matrix, dims, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    mask = cv2.warpAffine(mask, matrix, dims)
    alpha = _feather(mask, photo, rng) * rng.choice([0.5, 0.75, 1.0, 1.0, 1.0])
    return _blend(outer, inner, alpha), alpha, list(dict.fromkeys(cues))


def _fit_donor(photo: Photo, donor: Photo, points: Array) -> Array:
    """The donor's pixels warped so that its mesh lies on the photo's mesh."""
    maps = _tps_maps(photo.landmarks[points].astype(float), donor.landmarks[points].astype(float), photo.pixels.shape)
    # A large donor is shrunk first: sampling it point by point would alias.
    ratio = _face_size(donor) / _face_size(photo)
    source = soft(donor.pixels.astype(np.float32), 0.4 * ratio) if ratio > 1.5 else donor.pixels.astype(np.float32)
    return _remap(source, maps)


def swap(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    if donor is None:
        raise ValueError("a face swap needs a donor")
    warped = _fit_donor(photo, donor, _CONTROL)
    mask, seam = _blend_mask(photo, rng)
    match = float(np.clip(1.05 - strength * rng.uniform(0.5, 1.0), 0, 1))
    new = _match_colour(warped, photo.pixels, _oval_mask(photo), match)
    cues = [(seam, "blending")]
    if match < 0.6:
        cues.append(("skin", "colour"))
    if rng.random() < 0.5:  # generators work at a low resolution
        new = rescale(new, rng.uniform(0.35, 0.8))
        cues.append(("skin", "blur"))
    alpha = _feather(mask, photo, rng)
    if rng.random() < 0.25:
        hard = (alpha > 0.5).astype(np.uint8) * 255
        hard[[0, -1]] = 0
        hard[:, [0, -1]] = 0
        ys, xs = np.nonzero(hard)
        if len(xs) > 400:
            centre = (int(xs.min() + xs.max()) // 2, int(ys.min() + ys.max()) // 2)
            source = np.clip(new, 0, 255).astype(np.uint8)
            # OpenCV writes into the mask it is given.
            cloned = cv2.seamlessClone(source, photo.pixels, hard.copy(), centre, cv2.NORMAL_CLONE)
            return cloned, hard / 255.0, cues
    return _blend(photo.pixels, new, alpha), alpha, cues


def autoencode(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """A face drawn anew at a low resolution and put back: what an autoencoder swap of a video frame looks like.

    By a learnt decoder (data_gen.decoders), or by its imitation: few frequencies a block, then an enlargement.
    """
    size = _face_size(photo)
    points = photo.landmarks[_CONTROL].astype(float)
    moved = points + _wander(points, (0.004 + 0.014 * strength) * size, rng)
    new: Array = _remap(photo.pixels.astype(np.float32), _tps_maps(moved, points, photo.pixels.shape))
    if rng.random() < 0.65:
        new = _redrawn(new, min(1.0, rng.uniform(64, 224) * (1.2 - 0.5 * strength) / size), rng)
        factor = 1.0
    else:
        factor = min(0.85, rng.uniform(40, 120) * (1.2 - 0.5 * strength) / size)
        small = _dct_thin(_small(new, factor), 8, rng.uniform(0.35, 0.6))
        new = _enlarged(small, photo.pixels.shape, factor, rng)
    if rng.random() < 0.5:
        new = np.clip(new + (new - soft(new, 1.0 / factor)) * rng.uniform(0.2, 0.9), 0, 255)
    mask, seam = _blend_mask(photo, rng)
    cues = [(seam, "blending"), ("skin", "blur")]
    if rng.random() < 0.7:
        new = tone(new, 0.1 + 0.5 * strength, rng)
        cues.append(("skin", "colour"))
    alpha = _feather(mask, photo, rng)
    return _blend(photo.pixels, new, alpha), alpha, cues


def _small(pixels: Array, factor: float) -> Array:
    height, width = pixels.shape[:2]
    side = (max(16, round(width * factor)), max(16, round(height * factor)))
    return np.asarray(cv2.resize(pixels, side, interpolation=cv2.INTER_AREA))


def _enlarged(small: Array, shape: tuple[int, ...], factor: float, rng: Rng) -> Array:
    up = _pick(rng, "cubic", "cubic", "linear", "nearest")
    flag = {"cubic": cv2.INTER_CUBIC, "linear": cv2.INTER_LINEAR, "nearest": cv2.INTER_NEAREST}[up]
    new: Array = np.asarray(cv2.resize(small, shape[1::-1], interpolation=flag))
    return soft(new, 0.45 / factor) if up == "nearest" else new  # a decoder's convolution follows its enlargement


def _redrawn(pixels: Array, factor: float, rng: Rng) -> Array:
    """The picture through one of the learnt decoders, at `factor` of its size."""
    from data_gen.decoders import DESIGNS, redraw

    name = _pick(rng, *(d.name for d in DESIGNS))
    if factor >= 1:
        return redraw(pixels, name)
    drawn = redraw(_small(pixels, factor), name)
    return np.asarray(cv2.resize(drawn, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC))


def redraw(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The whole picture from a learnt decoder: synthetic everywhere, and like its photo in all else."""
    new = _redrawn(photo.pixels.astype(np.float32), rng.uniform(0.6, 1.0), rng)
    if rng.random() < 0.3:
        new = new + (new - soft(new, 1.0)) * rng.uniform(0.2, 0.8)
    new = _blend(photo.pixels, new, np.full(photo.pixels.shape[:2], 0.7 + 0.3 * strength, np.float32))
    return new, np.ones(photo.pixels.shape[:2], np.float32), [("whole-image", "frequency")]


def _wander(points: Array, amount: float, rng: Rng) -> Array:
    """Smooth random shifts [n, 2] of mesh points: each the sum of a few waves over the face."""
    span = float(np.ptp(points, 0).max()) + 1e-6
    shift = np.zeros_like(points)
    for _ in range(3):
        wave, phase = rng.uniform(-4, 4, (2, 2)), rng.uniform(0, 2 * np.pi, 2)
        shift += np.sin(points / span @ wave + phase) / 1.7
    return np.asarray(shift * amount)


_TRANSPLANTS = ("eyes", "mouth", "nose", "eyebrows")


def transplant(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    if donor is None:
        raise ValueError("a transplant needs a donor")
    area = _pick(rng, *_TRANSPLANTS)
    mask = _mask(photo, area, rng.uniform(0.02, 0.05))
    warped = _fit_donor(photo, donor, _CONTROL)
    new = _match_colour(warped, photo.pixels, mask, float(np.clip(1.1 - strength, 0, 1)))
    alpha = soft(mask, rng.uniform(0.008, 0.03) * _face_size(photo))
    cues = [(area, "blending")] + ([(area, "colour")] if strength > 0.5 else [])
    return _blend(photo.pixels, new, alpha), alpha, cues


_ONE_SIDE = {"eyes": (33, 133, 159, 145), "eyebrows": (70, 107, 105, 52), "cheeks": (50, 117, 205, 187)}
_CENTRAL = {"mouth": (61, 291, 13, 14), "nose": (129, 358, 2, 6), "jaw": (152, 172, 397, 200)}


def _bulge(photo: Photo, centre: Array, radius: float, zoom: float, shift: Array) -> tuple[Array, Array]:
    """Local magnification about a point, fading to nothing at `radius`. Returns pixels and mask."""
    yy, xx = np.mgrid[0 : photo.pixels.shape[0], 0 : photo.pixels.shape[1]].astype(np.float32)
    dx, dy = xx - centre[0], yy - centre[1]
    fade = np.clip(1 - (dx**2 + dy**2) / radius**2, 0, 1) ** 1.5
    to_x, to_y = (xx - dx * zoom * fade - shift[0] * fade, yy - dy * zoom * fade - shift[1] * fade)
    mask = (fade > 0.05).astype(np.float32)
    return _remap(photo.pixels, (to_x.astype(np.float32), to_y.astype(np.float32))), mask


def area_warp(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    one_sided = rng.random() < 0.5
    table = _ONE_SIDE if one_sided else _CENTRAL
    area = _pick(rng, *table)
    points = photo.landmarks[list(table[area])]
    reach = 0.6 if area == "jaw" else 1.0  # its points lie far apart: a whole circle would take in nose and neck
    radius = float(max(np.ptp(points, 0))) * reach * rng.uniform(0.9, 1.2) + 0.05 * _face_size(photo)
    zoom = rng.choice([-1, 1]) * (0.12 + 0.3 * strength)
    shift = rng.uniform(-1, 1, 2) * (0.02 + 0.06 * strength) * _face_size(photo)
    pixels, mask = _bulge(photo, points.mean(0), radius, float(zoom), shift)
    return pixels, mask, [(area, "asymmetry" if one_sided else "geometry")]


def expression(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Mouth corners or brows moved by the mesh, the rest held: a crude reenactment."""
    size, p = _face_size(photo), photo.landmarks.astype(float)
    held = np.array([*OVAL, 33, 133, 263, 362, 1, 6, 168, 50, 280])
    amount = (0.035 + 0.06 * strength) * size
    if rng.random() < 0.65:
        area, moved = "mouth", np.array([61, 291, 13, 14, 0, 17, 39, 269, 181, 405])
        delta = np.zeros((len(moved), 2))
        lift = rng.choice([-1, 1]) * amount
        delta[:2, 1] -= lift
        if rng.random() < 0.6:  # opened or pressed lips
            gap = rng.uniform(0.3, 1.0) * amount
            delta[[3, 5, 8, 9], 1] += gap
        delta[0, 0] -= lift * 0.5
        delta[1, 0] += lift * 0.5
    else:
        area, moved = "eyebrows", np.array([70, 63, 105, 66, 107, 300, 293, 334, 296, 336])
        delta = np.zeros((len(moved), 2))
        delta[:, 1] -= rng.choice([-1, 1]) * amount
        if rng.random() < 0.4:
            delta[5:] *= -0.3
    target = np.concatenate([p[held], p[moved] + delta])
    source = np.concatenate([p[held], p[moved]])
    out = _remap(photo.pixels, _tps_maps(target, source, photo.pixels.shape))
    mask = _mask(photo, area, 0.08)
    alpha = soft(mask, 0.03 * size)
    return _blend(photo.pixels, out, alpha), alpha, [(area, "expression")]


def smooth_skin(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, "skin", "skin", "cheeks", "forehead")
    strong = cv2.bilateralFilter(photo.pixels, 9, 30 + 60 * strength, 4 + 6 * strength)
    if strength > 0.4:
        strong = cv2.bilateralFilter(strong, 9, 30 + 60 * strength, 4 + 6 * strength)
    alpha = soft(_mask(photo, area), 0.02 * _face_size(photo)) * (0.6 + 0.4 * strength)
    return _blend(photo.pixels, strong, alpha), alpha, [(area, "texture")]


def relight(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Light from a side that the surroundings do not know."""
    centre, size = photo.landmarks[list(OVAL)].mean(0), _face_size(photo)
    yy, xx = np.mgrid[0 : photo.pixels.shape[0], 0 : photo.pixels.shape[1]].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.tanh(((xx - centre[0]) * np.cos(angle) + (yy - centre[1]) * np.sin(angle)) / (0.35 * size))
    gain = 1 + ramp * (0.18 + 0.4 * strength)
    alpha = soft(_oval_mask(photo), 0.04 * size)
    lit = np.clip(photo.pixels.astype(np.float32) * gain[..., None], 0, 255)
    return _blend(photo.pixels, lit, alpha), alpha, [("skin", "lighting")]


def tone_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, "skin", "skin", "mouth", "eyes", "neck", "forehead")
    new = tone(photo.pixels, 0.35 + 0.65 * strength, rng)
    alpha = soft(_mask(photo, area, 0.01), rng.uniform(0.01, 0.04) * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [(area, "colour")]


_LOCAL = ("eyes", "mouth", "nose", "cheeks", "forehead", "jaw", "skin")


def blur_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, *_LOCAL)
    new = soft(photo.pixels.astype(np.float32), (0.006 + 0.018 * strength) * _face_size(photo))
    alpha = soft(_mask(photo, area, 0.03), 0.015 * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [(area, "blur")]


def noise_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, *_LOCAL)
    grain: Array = rng.standard_normal(photo.pixels.shape).astype(np.float32)
    grain = soft(grain, rng.uniform(0.3, 0.9)) * 1.6 if rng.random() < 0.5 else grain
    new = photo.pixels.astype(np.float32) + grain * (5 + 15 * strength)
    alpha = soft(_mask(photo, area, 0.02), 0.01 * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [(area, "noise")]


def recompress_area(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, *_LOCAL)
    new = codec(photo.pixels, _pick(rng, ".jpg", ".jpg", ".webp"), int(35 - 27 * strength))
    alpha = soft(_mask(photo, area, 0.03), 0.006 * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [(area, "compression")]


def _dct_thin(pixels: Array, block: int, keep: float) -> Array:
    """Each block keeps only its low frequencies: what a small autoencoder does to texture."""
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


def _upsample_trace(pixels: Array, rng: Rng) -> Array:
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


def resynthesise(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The whole face (or picture) rebuilt from fewer numbers, as decoders do."""
    if rng.random() < 0.6:
        new = _upsample_trace(photo.pixels, rng)
        if strength > 0.6:
            new = _upsample_trace(new, rng)
    else:
        new = _dct_thin(photo.pixels, int(rng.choice([8, 16])), 0.5 - 0.28 * strength)
    # Part of the original is left: the dial has to move the picture all the way, not only where a pass is added.
    new = _blend(photo.pixels, new, np.full(photo.pixels.shape[:2], 0.4 + 0.6 * strength, np.float32))
    if rng.random() < 0.5:
        return new, np.ones(photo.pixels.shape[:2], np.float32), [("whole-image", "frequency")]
    alpha = soft(_oval_mask(photo), 0.02 * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [("skin", "frequency")]


def inpaint(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = _pick(rng, "eyebrows", "cheeks", "forehead", "nose", "mouth")
    mask = _mask(photo, area, 0.01 + 0.02 * strength)
    # A patch of it that grows with the strength: the whole would be blatant at any.
    field = _smooth_noise(mask.shape, 0.12 * _face_size(photo), rng)
    if (mask > 0.5).any():
        mask = mask * (field >= np.quantile(field[mask > 0.5], 0.85 * (1 - strength)))
    hole = (mask > 0.5).astype(np.uint8) * 255
    filled = cv2.inpaint(photo.pixels, hole, 3, cv2.INPAINT_TELEA)
    artifact = "missing-detail" if area in ("eyebrows", "nose", "mouth") else "texture"
    return filled, hole / 255.0, [(area, artifact)]


def missing_detail(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Lashes, pupils, teeth or lip lines melted: a median filter keeps edges and eats detail."""
    open_mouth = _mask(photo, "teeth").sum() > 0.004 * _face_size(photo) ** 2
    area = _pick(rng, "eyes", "eyes", "teeth") if open_mouth else _pick(rng, "eyes", "mouth")
    k = max(3, round((0.02 + 0.04 * strength) * _face_size(photo)) // 2 * 2 + 1)
    new = cv2.medianBlur(photo.pixels, min(k, 21))
    alpha = soft(_mask(photo, area, 0.015), 0.008 * _face_size(photo))
    return _blend(photo.pixels, new, alpha), alpha, [(area, "missing-detail")]


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("self_blend", "FS", self_blend),
        Method("swap", "FS", swap, needs_donor=True),
        Method("autoencode", "FS", autoencode),
        Method("transplant", "FE", transplant, needs_donor=True),
        Method("area_warp", "FE", area_warp),
        Method("expression", "FR", expression),
        Method("smooth_skin", "FE", smooth_skin),
        Method("relight", "FE", relight),
        Method("tone_mismatch", "FE", tone_mismatch),
        Method("blur_mismatch", "FE", blur_mismatch),
        Method("noise_mismatch", "FE", noise_mismatch),
        Method("recompress_area", "FE", recompress_area),
        Method("resynthesise", "EFS", resynthesise),
        Method("redraw", "EFS", redraw),
        Method("inpaint", "FE", inpaint),
        Method("missing_detail", "FE", missing_detail),
    )
}

# --- harmless changes: a real photo stays real under them, a forgery stays a forgery ---------------------------------


def _everywhere(pixels: Array, photo: Photo) -> Made:
    return pixels, np.zeros(photo.pixels.shape[:2], np.float32), []


def global_tone(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    return _everywhere(tone(photo.pixels, 0.2 + 0.6 * strength, rng), photo)


def phone_hdr(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Local contrast and sharpening over the whole picture, as phone cameras do."""
    lab = cv2.cvtColor(photo.pixels, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(1 + 1.5 * strength, (4, 4)).apply(lab[..., 0])
    x = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).astype(np.float32)
    return _everywhere(x + (x - soft(x, 1.0)) * rng.uniform(0, 0.8) * strength, photo)


def denoise(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Noise reduction of a camera: the whole picture alike, skin and background."""
    return _everywhere(cv2.bilateralFilter(photo.pixels, 5, 10 + 25 * strength, 2 + 2 * strength), photo)


def soft_focus(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    return _everywhere(soft(photo.pixels.astype(np.float32), 0.4 + 1.4 * strength), photo)


def film_grain(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    grain = soft(rng.standard_normal(photo.pixels.shape[:2]).astype(np.float32), rng.uniform(0.3, 0.9))
    return _everywhere(photo.pixels + grain[..., None] * (4 + 14 * strength), photo)


def shallow_depth(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Background out of focus, head and hair sharp: portrait lenses and portrait modes."""
    head = np.clip(_oval_mask(photo) + _mask(photo, "hair") + _mask(photo, "neck") + _mask(photo, "ears"), 0, 1)
    k = max(1, round(0.12 * _face_size(photo))) * 2 + 1
    keep = soft(cv2.dilate(head, np.ones((k, k), np.uint8)), 0.08 * _face_size(photo))
    blurred = soft(photo.pixels.astype(np.float32), (0.01 + 0.04 * strength) * _face_size(photo))
    return _everywhere(_blend(blurred, photo.pixels, keep), photo)


def make_up(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    out = photo.pixels.astype(np.float32)
    lips = soft(_mask(photo, "mouth") * (1 - _mask(photo, "teeth")), 0.01 * _face_size(photo))
    red = np.array([rng.uniform(120, 200), rng.uniform(20, 70), rng.uniform(40, 90)], np.float32)
    out = _blend(out, out * 0.5 + red * 0.5, lips * (0.2 + 0.5 * strength))
    lid = soft(np.clip(_mask(photo, "eyes", 0.03) - _mask(photo, "eyes"), 0, 1), 0.012 * _face_size(photo))
    return _everywhere(_blend(out, out * 0.6, lid * (0.2 + 0.5 * strength)), photo)


def glasses(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Drawn frames: an odd thing on a face is not a forgery of it."""
    out, size, p = photo.pixels.copy(), _face_size(photo), photo.landmarks
    colour = tuple(int(c) for c in rng.integers(5, 90, 3))
    thick = max(1, round((0.01 + 0.02 * strength) * size))
    centres = [p[[33, 133]].mean(0), p[[263, 362]].mean(0)]
    radii = (max(2, round(0.15 * size)), max(2, round(rng.uniform(0.1, 0.15) * size)))
    tilt = float(np.degrees(np.arctan2(*(centres[1] - centres[0])[::-1])))
    for c in centres:
        cv2.ellipse(out, (int(c[0]), int(c[1])), radii, tilt, 0, 360, colour, thick, cv2.LINE_AA)
    temples = ((p[33] - (p[133] - p[33]) * 0.4, p[127]), (p[263] - (p[362] - p[263]) * 0.4, p[356]))
    for a, b in ((p[193], p[417]), *temples):
        cv2.line(out, (int(a[0]), int(a[1])), (int(b[0]), int(b[1])), colour, thick, cv2.LINE_AA)
    return _everywhere(out, photo)


def caption(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """A small line of text or a watermark, as platforms add."""
    shade = (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
    out = photo.pixels.copy()
    _write(out, _words(rng, 5, 14), float(rng.choice((0.06, 0.97))), 0.02 + 0.04 * rng.random(), shade, "plain", rng)
    return _everywhere(out, photo)


def big_text(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Words across the picture, the face too, at any height: memes, subtitles, stamps of news channels."""
    out = photo.pixels.copy()
    light = rng.random() < 0.6
    shade = tuple(int(c) for c in (rng.integers(200, 256, 3) if light else rng.integers(0, 60, 3)))
    style = _pick(rng, "plain", "outlined", "outlined", "bar")
    place, tall = rng.uniform(0.05, 0.97), 0.03 + 0.09 * strength
    for line in range(int(rng.integers(1, 3))):
        _write(out, _words(rng, 4, 26), place + 1.6 * line * tall, tall, shade, style, rng)
    return _everywhere(out, photo)


def sticker(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """A flat shape in front of a part of the face: a sticker, a microphone, a mark of an app."""
    out, size = photo.pixels.copy(), _face_size(photo)
    centre = photo.landmarks[int(rng.integers(len(photo.landmarks)))]
    half = [max(2, round(float(v) * size)) for v in rng.uniform(0.06, 0.12 + 0.14 * strength, 2)]
    x, y = int(centre[0]), int(centre[1])
    shades = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2)]
    edge = max(1, round(rng.uniform(0.005, 0.02) * size))
    turn = float(rng.uniform(0, 180))
    for shade, thick in ((shades[0], cv2.FILLED), (shades[1], edge)):
        if strength < 0.5:
            cv2.ellipse(out, (x, y), (half[0], half[1]), turn, 0, 360, shade, thick, cv2.LINE_AA)
        else:
            cv2.rectangle(out, (x - half[0], y - half[1]), (x + half[0], y + half[1]), shade, thick, cv2.LINE_AA)
    return _everywhere(out, photo)


def _words(rng: Rng, least: int, most: int) -> str:
    letters = list("ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvwxyz 0123456789 .!:")
    return "".join(rng.choice(letters, size=int(rng.integers(least, most))))


def _write(out: Pixels, text: str, place: float, tall: float, shade: tuple[int, ...], style: str, rng: Rng) -> None:
    """Text into the picture: base line at `place`, letters `tall`, shares of the picture's height; cut at the edge."""
    height, width = out.shape[:2]
    font = int(rng.choice([cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX]))
    (wide, up), below = cv2.getTextSize(text, font, 1.0, 1)
    scale = tall * height / up
    thick = max(1, round(scale * rng.uniform(1, 2.5)))
    x = round(float(rng.uniform(min(0.0, width - wide * scale), max(0.0, width - wide * scale))))
    y = round(place * height)
    if style == "bar":
        bar = slice(max(0, y - round(1.3 * up * scale)), max(0, y + round(below * scale) + 1))
        out[bar] = 0 if sum(shade) > 380 else 255
    elif style == "outlined":
        other = (0, 0, 0) if sum(shade) > 380 else (255, 255, 255)
        cv2.putText(out, text, (x, y), font, scale, other, 3 * thick, cv2.LINE_AA)
    cv2.putText(out, text, (x, y), font, scale, shade, thick, cv2.LINE_AA)


def screenshot(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """As shown on a screen: scaled, sharpened by the viewer, bars of an app above or below."""
    out = np.clip(
        rescale(photo.pixels.astype(np.float32), rng.uniform(0.75 - 0.3 * strength, 1.0), cv2.INTER_CUBIC), 0, 255
    )
    out = np.clip(out + (out - soft(out, 1.0)) * rng.uniform(0.1, 0.2 + 0.5 * strength), 0, 255)
    height = out.shape[0]
    thick = max(2, round(rng.uniform(0.02, 0.05) * height))
    shade = float(rng.choice([12.0, 28.0, 240.0, 250.0]))
    for bar in (slice(0, thick), slice(height - thick, height)):
        if rng.random() < 0.6:
            out[bar] = shade
    return _everywhere(out, photo)


def share_twice(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Scaled and compressed twice, as a message that is passed on."""
    x: Array = photo.pixels
    for _ in range(2):
        x = rescale(x, rng.uniform(0.55, 0.95)).astype(np.float32)
        x = codec(x, _pick(rng, ".jpg", ".webp"), int(rng.integers(max(20, round(70 - 40 * strength)), 92)))
    return _everywhere(x, photo)


HARMLESS: dict[str, Method] = {
    m.name: m
    for m in (
        Method("global_tone", "real", global_tone),
        Method("phone_hdr", "real", phone_hdr),
        Method("denoise", "real", denoise),
        Method("soft_focus", "real", soft_focus),
        Method("film_grain", "real", film_grain),
        Method("shallow_depth", "real", shallow_depth),
        Method("make_up", "real", make_up),
        Method("glasses", "real", glasses),
        Method("caption", "real", caption),
        Method("big_text", "real", big_text),
        Method("sticker", "real", sticker),
        Method("screenshot", "real", screenshot),
        Method("share_twice", "real", share_twice),
    )
}


FORGE_VERSION = 4
"""Goes up when the same seed gives another picture or another truth about it: a run of an older one is not gone on."""

_PLAIN = {
    "texture": 5.0, "lighting": 22.0, "blending": 6.0, "blur": 6.0, "colour": 14.0, "asymmetry": 16.0,
    "geometry": 16.0, "missing-detail": 8.0, "expression": 12.0, "noise": 9.0, "frequency": 5.0, "compression": 6.0,
}  # fmt: skip
"""Change in grey levels at which an artifact is plain to see (score 0.63). Set by looking at the catalogue."""
SEEN_FROM = 0.1
"""A score below this is a forgery that no eye could point at."""
_SHOWS = 0.05
"""A cue beside a plainer one is dropped below this: its own measure does not show it."""


def visible(before: Pixels, after: Pixels, mask: Array, artifact: str) -> float:
    """How plainly an artifact shows, 0..1: the change that was made, not what a dial was set to.

    Where several changes meet, each cue is measured by its own effect: `blending` by the gradients along the mask's
    edge, `blur` by the fine detail that is lost, `noise` by the fine detail that came, `colour` by the shift of each
    channel's mean and spread. Of these three the plainer side of the mask counts, as either layer of a blend may be
    the changed one. Any other artifact is the only one of its method: the root mean square change under the mask.
    """
    old, new = before.astype(np.float32), after.astype(np.float32)
    where = mask > 0.2
    if artifact in _OWN_EFFECT:
        change = max((_OWN_EFFECT[artifact](old, new, side) for side in (where, ~where) if side.any()), default=0.0)
    elif artifact == "blending":
        slope = cv2.Sobel(mask.astype(np.float32), cv2.CV_32F, 1, 0) ** 2
        slope = slope + cv2.Sobel(mask.astype(np.float32), cv2.CV_32F, 0, 1) ** 2
        change = _rms(np.hypot(*_gradients(new.mean(-1) - old.mean(-1))), slope > 0.15 * slope.max())
    else:
        change = _rms(new.mean(-1) - old.mean(-1), where)
    return float(1 - np.exp(-change / _PLAIN[artifact]))


def _rms(values: Array, where: Array) -> float:
    return float(np.sqrt(np.square(values[where]).mean())) if where.any() else 0.0


def _gradients(grey: Array) -> tuple[Array, Array]:
    across, down = (cv2.Sobel(grey, cv2.CV_32F, *d, ksize=3) / 4 for d in ((1, 0), (0, 1)))
    return np.asarray(across), np.asarray(down)


def _detail(pixels: Array, side: Array) -> float:
    """Mean square of what is finer than about three pixels, over the pixels of `side`."""
    return float(np.square((pixels - soft(pixels, 1.5))[side]).mean())


def _spread(pixels: Array, side: Array) -> Array:
    """Standard deviation of each channel of what is coarser than that, over the pixels of `side`."""
    return np.asarray(soft(pixels, 3.0)[side].std(0))


def _detail_moved(old: Array, new: Array, side: Array) -> float:
    """Mean square of fine detail that came (or, below 0, went); what a change of contrast alone does is left out."""
    gain = float(np.clip((_spread(new, side).mean() + 1) / (_spread(old, side).mean() + 1), 0.5, 2))
    return _detail(new, side) - gain**2 * _detail(old, side)


def _detail_lost(old: Array, new: Array, side: Array) -> float:
    return float(np.sqrt(max(0.0, -_detail_moved(old, new, side))))


def _detail_gained(old: Array, new: Array, side: Array) -> float:
    return float(np.sqrt(max(0.0, _detail_moved(old, new, side))))


def _tone_moved(old: Array, new: Array, side: Array) -> float:
    """Distance of two normal distributions a channel: what another person's features or a warp hardly move."""
    mean, spread = new[side].mean(0) - old[side].mean(0), _spread(new, side) - _spread(old, side)
    return float(np.sqrt((mean**2 + spread**2).mean()))


_OWN_EFFECT: dict[str, Callable[[Array, Array, Array], float]] = {
    "blur": _detail_lost,
    "noise": _detail_gained,
    "colour": _tone_moved,
}


def forge(photo: Photo, method: Method, rng: Rng, donor: Photo | None = None, strength: float | None = None) -> Forgery:
    """Apply one method at a random (or given) strength in 0..1. The same generator state gives the same bytes.

    Each cue's score is measured on the picture (`visible`); a cue that does not show beside others (a blur that was
    sharpened away) is dropped. With a random strength, a forgery of which nothing can be seen (a blur on a blurred
    photo, say) is made again, stronger.
    """
    power = float(rng.uniform(0, 1)) if strength is None else strength
    while True:
        made, mask, pairs = method.make(photo, donor, power, rng)
        pixels = np.clip(np.rint(made), 0, 255).astype(np.uint8)
        scores = [visible(photo.pixels, pixels, mask, k) for _, k in pairs]
        least = min(_SHOWS, max(scores, default=0.0))  # the plainest cue stays
        cues = tuple(Cue(a, k, round(s, 3)) for s, (a, k) in zip(scores, pairs, strict=True) if s >= least)
        if strength is not None or not cues or power >= 1 or max(c.score or 0 for c in cues) >= SEEN_FROM:
            break
        power = min(1.0, power + 0.35)
    return Forgery(
        pixels=pixels,
        mask=np.clip(np.rint(mask * 255), 0, 255).astype(np.uint8),
        cues=cues,
        method=method.name,
        df_class=method.df_class,
        strength=round(power, 3),
    )


def joined_cues(before: Pixels, first: Forgery, second: Forgery) -> tuple[Cue, ...]:
    """The cues of a photo `before` that was forged, and its forgery once more: those that still show.

    The second may hide what the first left (noise, then smoothed skin), so the first's are measured on the last
    picture. A cue of both counts by the plainer of its scores.
    """
    mask = first.mask.astype(np.float32) / 255
    scores = {(c.area, c.artifact): visible(before, second.pixels, mask, c.artifact) for c in first.cues}
    for cue in second.cues:
        pair = (cue.area, cue.artifact)
        scores[pair] = max(scores.get(pair, 0.0), cue.score or 0.0)
    least = min(_SHOWS, max(scores.values(), default=0.0))
    return tuple(Cue(area, artifact, round(s, 3)) for (area, artifact), s in scores.items() if s >= least)


def changed(photo: Photo, made: Forgery, method: Method, rng: Rng) -> Forgery:
    """A forgery of `photo` under a harmless change; the truth about it is what still shows.

    The photo itself takes the same change with the same draws, so that what the two still differ by is the forgery's
    doing: a cue's score falls with its own effect, one that is hidden is dropped (the plainest stays), and the mask
    ends where nothing differs any more, as under a sticker. A change that would cover the whole forgery is not made.
    """
    power, draws = float(rng.uniform(0, 1)), int(rng.integers(2**63))
    before, after = (
        np.clip(np.rint(method.make(replace(photo, pixels=p), None, power, np.random.default_rng(draws))[0]), 0, 255)
        for p in (photo.pixels, made.pixels)
    )
    before, after = before.astype(np.uint8), after.astype(np.uint8)
    mask = made.mask.astype(np.float32) / 255
    scores = []
    for cue in made.cues:
        was = visible(photo.pixels, made.pixels, mask, cue.artifact)
        scores.append(min(1.0, (cue.score or 0.0) * visible(before, after, mask, cue.artifact) / max(was, 1e-6)))
    least = min(_SHOWS, max(scores, default=0.0))
    same = (before == after).all(-1).astype(np.uint8)  # pixels agree here and there by chance: only patches count
    covered = cv2.morphologyEx(same, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)) > 0
    left = np.where(covered, 0, made.mask).astype(np.uint8)
    if made.mask.any() and left.max() < 0.5 * made.mask.max():
        return made
    return replace(
        made,
        pixels=after,
        mask=left,
        cues=tuple(replace(c, score=round(s, 3)) for c, s in zip(made.cues, scores, strict=True) if s >= least),
    )
