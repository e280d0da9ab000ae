"""The forge's methods. Each takes a photo, perhaps a donor, a strength and a generator, and returns a `Made`.

Self-blending follows Shiohara & Yamasaki, "Detecting Deepfakes with Self-Blended Images" (CVPR 2022). The other methods
are ours.
"""

from __future__ import annotations

import cv2
import numpy as np

from data_gen.tools import (
    CONTROL,
    Made,
    Method,
    Photo,
    blend,
    blend_mask,
    dct_thin,
    enlarged,
    face_size,
    feather,
    fit_donor,
    grown_mask,
    match_colour,
    oval_mask,
    pick,
    remap,
    shows_teeth,
    shrunk,
    smooth_noise,
    tps_maps,
    upsample_trace,
    wander,
)
from x2dfd.degrade import Rng, codec, rescale, soft, tone
from x2dfd.faces import OVAL, Array


def self_blend(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    base = photo.pixels
    mask, seam = blend_mask(photo, rng)
    cues = [(seam, "blending")]
    altered: Array = base.astype(np.float32)
    amount = 0.1 + 0.9 * strength
    # One of the two layers is changed, at random: a seam may lie on either side.
    all_changes = ["tone", "blur", "sharpen", "down", "codec", "noise"]
    changes = list(rng.choice(all_changes, size=rng.integers(1, 4), replace=False))
    if strength > 0.5 and "tone" not in changes:
        changes.append("tone")
    for change in changes:
        if change == "tone":
            altered = tone(altered, amount, rng)
            if strength > 0.3:
                cues.append(("skin", "colour"))
        elif change == "blur":
            altered = soft(altered, rng.uniform(0.3, 1.4) * amount)
            cues.append(("skin", "blur"))
        elif change == "sharpen":
            altered = np.clip(altered + (altered - soft(altered, 1.2)) * rng.uniform(0.3, 1.2) * amount, 0, 255)
        elif change == "down":
            factor = 1 - rng.uniform(0.2, 0.6) * amount
            altered = rescale(altered, factor, int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC])))
            cues.append(("skin", "blur"))
        elif change == "codec":
            altered = codec(altered, ".jpg", int(95 - 60 * amount * rng.uniform(0.5, 1))).astype(np.float32)
        else:
            altered = altered + rng.standard_normal(altered.shape).astype(np.float32) * rng.uniform(1, 7) * amount
            cues.append(("skin", "noise"))
    changed_is_inner = rng.random() < 0.6
    inner: Array = altered if changed_is_inner else base.astype(np.float32)
    outer: Array = base.astype(np.float32) if changed_is_inner else altered
    size = face_size(photo)
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
    alpha = feather(mask, photo, rng) * rng.choice([0.5, 0.75, 1.0, 1.0, 1.0])
    return blend(outer, inner, alpha), alpha, list(dict.fromkeys(cues))


def swap(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    if donor is None:
        raise ValueError("a face swap needs a donor")
    warped = fit_donor(photo, donor, CONTROL)
    mask, seam = blend_mask(photo, rng)
    match = float(np.clip(1.05 - strength * rng.uniform(0.5, 1.0), 0, 1))
    new = match_colour(warped, photo.pixels, oval_mask(photo), match)
    cues = [(seam, "blending")]
    if match < 0.6:
        cues.append(("skin", "colour"))
    if rng.random() < 0.5:  # generators work at a low resolution
        new = rescale(new, rng.uniform(0.35, 0.8))
        cues.append(("skin", "blur"))
    alpha = feather(mask, photo, rng)
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
    return blend(photo.pixels, new, alpha), alpha, cues


def autoencode(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """A face drawn anew at a low resolution and put back, as autoencoder swaps of video frames look: by a learnt
    decoder (data_gen.decoders), or by its imitation: few frequencies a block, then an enlargement."""
    size = face_size(photo)
    points = photo.landmarks[CONTROL].astype(float)
    moved = points + wander(points, (0.004 + 0.014 * strength) * size, rng)
    new: Array = remap(photo.pixels.astype(np.float32), tps_maps(moved, points, photo.pixels.shape))
    if rng.random() < 0.65:
        new = _redrawn(new, min(1.0, rng.uniform(64, 224) * (1.2 - 0.5 * strength) / size), rng)
        factor = 1.0
    else:
        factor = min(0.85, rng.uniform(40, 120) * (1.2 - 0.5 * strength) / size)
        small = dct_thin(shrunk(new, factor), 8, rng.uniform(0.35, 0.6))
        new = enlarged(small, photo.pixels.shape, factor, rng)
    if rng.random() < 0.5:
        new = np.clip(new + (new - soft(new, 1.0 / factor)) * rng.uniform(0.2, 0.9), 0, 255)
    mask, seam = blend_mask(photo, rng)
    cues = [(seam, "blending"), ("skin", "blur")]
    if rng.random() < 0.7:
        new = tone(new, 0.1 + 0.5 * strength, rng)
        cues.append(("skin", "colour"))
    alpha = feather(mask, photo, rng)
    return blend(photo.pixels, new, alpha), alpha, cues


def _redrawn(pixels: Array, factor: float, rng: Rng) -> Array:
    """The picture through one of the learnt decoders, at `factor` of its size."""
    from data_gen.decoders import DESIGNS, redraw

    name = pick(rng, *(d.name for d in DESIGNS))
    if factor >= 1:
        return redraw(pixels, name)
    redrawn = redraw(shrunk(pixels, factor), name)
    return np.asarray(cv2.resize(redrawn, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC))


def redraw(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The whole picture from a learnt decoder: synthetic everywhere, and like its photo in all else."""
    new = _redrawn(photo.pixels.astype(np.float32), rng.uniform(0.6, 1.0), rng)
    if rng.random() < 0.3:
        new = new + (new - soft(new, 1.0)) * rng.uniform(0.2, 0.8)
    new = blend(photo.pixels, new, np.full(photo.pixels.shape[:2], 0.7 + 0.3 * strength, np.float32))
    return new, np.ones(photo.pixels.shape[:2], np.float32), [("whole-image", "frequency")]


_TRANSPLANTS = ("eyes", "mouth", "nose", "eyebrows")


def transplant(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    if donor is None:
        raise ValueError("a transplant needs a donor")
    area = pick(rng, *_TRANSPLANTS)
    mask = grown_mask(photo, area, rng.uniform(0.02, 0.05))
    warped = fit_donor(photo, donor, CONTROL)
    new = match_colour(warped, photo.pixels, mask, float(np.clip(1.1 - strength, 0, 1)))
    alpha = soft(mask, rng.uniform(0.008, 0.03) * face_size(photo))
    cues = [(area, "blending")] + ([(area, "colour")] if strength > 0.5 else [])
    return blend(photo.pixels, new, alpha), alpha, cues


_ONE_SIDE = {"eyes": (33, 133, 159, 145), "eyebrows": (70, 107, 105, 52), "cheeks": (50, 117, 205, 187)}
_CENTRAL = {"mouth": (61, 291, 13, 14), "nose": (129, 358, 2, 6), "jaw": (152, 172, 397, 200)}


def _bulge(photo: Photo, centre: Array, radius: float, zoom: float, shift: Array) -> tuple[Array, Array]:
    """Local magnification about a point, fading to nothing at `radius`. Returns pixels and mask."""
    yy, xx = np.mgrid[0 : photo.pixels.shape[0], 0 : photo.pixels.shape[1]].astype(np.float32)
    dx, dy = xx - centre[0], yy - centre[1]
    fade = np.clip(1 - (dx**2 + dy**2) / radius**2, 0, 1) ** 1.5
    to_x, to_y = (xx - dx * zoom * fade - shift[0] * fade, yy - dy * zoom * fade - shift[1] * fade)
    mask = (fade > 0.05).astype(np.float32)
    return remap(photo.pixels, (to_x.astype(np.float32), to_y.astype(np.float32))), mask


def area_warp(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    one_sided = rng.random() < 0.5
    table = _ONE_SIDE if one_sided else _CENTRAL
    area = pick(rng, *table)
    points = photo.landmarks[list(table[area])]
    reach = 0.6 if area == "jaw" else 1.0  # its points lie far apart: a whole circle would take in nose and neck
    radius = float(max(np.ptp(points, 0))) * reach * rng.uniform(0.9, 1.2) + 0.05 * face_size(photo)
    zoom = rng.choice([-1, 1]) * (0.12 + 0.3 * strength)
    shift = rng.uniform(-1, 1, 2) * (0.02 + 0.06 * strength) * face_size(photo)
    pixels, mask = _bulge(photo, points.mean(0), radius, float(zoom), shift)
    return pixels, mask, [(area, "asymmetry" if one_sided else "geometry")]


_LIPS = [61, 291, 13, 14, 0, 17, 39, 269, 181, 405]
_LOWER_LIP = [3, 5, 8, 9]  # places in _LIPS
_HELD = [*OVAL, 33, 133, 263, 362, 1, 6, 168, 50, 280]


def expression(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Mouth corners or brows moved by the mesh, the rest held: a crude reenactment."""
    size, p = face_size(photo), photo.landmarks.astype(float)
    amount = (0.035 + 0.06 * strength) * size
    if rng.random() < 0.65:
        area, moved = "mouth", _LIPS
        delta = np.zeros((len(moved), 2))
        lift = rng.choice([-1, 1]) * amount
        delta[:2, 1] -= lift
        if rng.random() < 0.6:  # opened or pressed lips
            gap = rng.uniform(0.3, 1.0) * amount
            delta[_LOWER_LIP, 1] += gap
        delta[0, 0] -= lift * 0.5
        delta[1, 0] += lift * 0.5
    else:
        area, moved = "eyebrows", [70, 63, 105, 66, 107, 300, 293, 334, 296, 336]
        delta = np.zeros((len(moved), 2))
        delta[:, 1] -= rng.choice([-1, 1]) * amount
        if rng.random() < 0.4:
            delta[5:] *= -0.3
    target = np.concatenate([p[_HELD], p[moved] + delta])
    source = np.concatenate([p[_HELD], p[moved]])
    out = remap(photo.pixels, tps_maps(target, source, photo.pixels.shape))
    mask = grown_mask(photo, area, 0.08)
    alpha = soft(mask, 0.03 * size)
    return blend(photo.pixels, out, alpha), alpha, [(area, "expression")]


def smooth_skin(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, "skin", "skin", "cheeks", "forehead")
    strong = cv2.bilateralFilter(photo.pixels, 9, 30 + 60 * strength, 4 + 6 * strength)
    if strength > 0.4:
        strong = cv2.bilateralFilter(strong, 9, 30 + 60 * strength, 4 + 6 * strength)
    alpha = soft(grown_mask(photo, area), 0.02 * face_size(photo)) * (0.6 + 0.4 * strength)
    return blend(photo.pixels, strong, alpha), alpha, [(area, "texture")]


def relight(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Light from a side that does not fit the surroundings."""
    centre, size = photo.landmarks[list(OVAL)].mean(0), face_size(photo)
    yy, xx = np.mgrid[0 : photo.pixels.shape[0], 0 : photo.pixels.shape[1]].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.tanh(((xx - centre[0]) * np.cos(angle) + (yy - centre[1]) * np.sin(angle)) / (0.35 * size))
    gain = 1 + ramp * (0.18 + 0.4 * strength)
    alpha = soft(oval_mask(photo), 0.04 * size)
    lit = np.clip(photo.pixels.astype(np.float32) * gain[..., None], 0, 255)
    return blend(photo.pixels, lit, alpha), alpha, [("skin", "lighting")]


def tone_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, "skin", "skin", "mouth", "eyes", "neck", "forehead")
    new = tone(photo.pixels, 0.35 + 0.65 * strength, rng)
    alpha = soft(grown_mask(photo, area, 0.01), rng.uniform(0.01, 0.04) * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [(area, "colour")]


_LOCAL = ("eyes", "mouth", "nose", "cheeks", "forehead", "jaw", "skin")


def blur_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, *_LOCAL)
    new = soft(photo.pixels.astype(np.float32), (0.006 + 0.018 * strength) * face_size(photo))
    alpha = soft(grown_mask(photo, area, 0.03), 0.015 * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [(area, "blur")]


def noise_mismatch(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, *_LOCAL)
    grain: Array = rng.standard_normal(photo.pixels.shape).astype(np.float32)
    grain = soft(grain, rng.uniform(0.3, 0.9)) * 1.6 if rng.random() < 0.5 else grain
    new = photo.pixels.astype(np.float32) + grain * (5 + 15 * strength)
    alpha = soft(grown_mask(photo, area, 0.02), 0.01 * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [(area, "noise")]


def recompress_area(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, *_LOCAL)
    new = codec(photo.pixels, pick(rng, ".jpg", ".jpg", ".webp"), int(35 - 27 * strength))
    alpha = soft(grown_mask(photo, area, 0.03), 0.006 * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [(area, "compression")]


def resynthesise(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The whole face (or picture) rebuilt from fewer numbers, as decoders do."""
    if rng.random() < 0.6:
        new = upsample_trace(photo.pixels, rng)
        if strength > 0.6:
            new = upsample_trace(new, rng)
    else:
        new = dct_thin(photo.pixels, int(rng.choice([8, 16])), 0.5 - 0.28 * strength)
    # Part of the original is left: the dial has to move the picture all the way, not only where a pass is added.
    new = blend(photo.pixels, new, np.full(photo.pixels.shape[:2], 0.4 + 0.6 * strength, np.float32))
    if rng.random() < 0.5:
        return new, np.ones(photo.pixels.shape[:2], np.float32), [("whole-image", "frequency")]
    alpha = soft(oval_mask(photo), 0.02 * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [("skin", "frequency")]


def inpaint(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    area = pick(rng, "eyebrows", "cheeks", "forehead", "nose", "mouth")
    mask = grown_mask(photo, area, 0.01 + 0.02 * strength)
    # A patch of the area that grows with the strength: the whole area would be blatant at any strength.
    field = smooth_noise(mask.shape, 0.12 * face_size(photo), rng)
    if (mask > 0.5).any():
        mask = mask * (field >= np.quantile(field[mask > 0.5], 0.85 * (1 - strength)))
    hole = (mask > 0.5).astype(np.uint8) * 255
    filled = cv2.inpaint(photo.pixels, hole, 3, cv2.INPAINT_TELEA)
    artifact = "missing-detail" if area in ("eyebrows", "nose", "mouth") else "texture"
    return filled, hole / 255.0, [(area, artifact)]


def missing_detail(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Lashes, pupils, teeth or lip lines melted: a median filter keeps edges and eats detail."""
    area = pick(rng, "eyes", "eyes", "teeth") if shows_teeth(photo) else pick(rng, "eyes", "mouth")
    k = max(3, round((0.02 + 0.04 * strength) * face_size(photo)) // 2 * 2 + 1)
    new = cv2.medianBlur(photo.pixels, min(k, 21))
    alpha = soft(grown_mask(photo, area, 0.015), 0.008 * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [(area, "missing-detail")]


_AROUND_MOUTH = [164, 206, 426, 216, 436, 210, 430, 199, 61, 291]


def mouth(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """Another mouth, as in reenactment of a video's lower face: the donor's (usually another frame of the clip), or the
    photo's own, opened, closed or moved."""
    size, p = face_size(photo), photo.landmarks.astype(float)
    teeth = shows_teeth(photo)
    if donor is not None:  # only points outside of the mouth are fixed: the donor's mouth keeps its shape
        new = fit_donor(photo, donor, np.array(_HELD))
        cues, teeth = [("mouth", "blending")], teeth and shows_teeth(donor)
    else:
        delta = np.zeros((len(_LIPS), 2))
        amount = (0.03 + 0.05 * strength) * size
        kind = pick(rng, "open", "close", "move")
        if kind == "move":
            delta += rng.choice([-1, 1], 2) * amount * rng.uniform(0.3, 1.0, 2)
        else:
            gap = amount if kind == "open" else -min(amount, 0.9 * float(np.linalg.norm(p[14] - p[13])) + 0.01 * size)
            delta[_LOWER_LIP, 1] += gap
        points = np.concatenate([p[_HELD], p[_LIPS]])
        moved = np.concatenate([p[_HELD], p[_LIPS] + delta])
        new = remap(photo.pixels, tps_maps(moved, points, photo.pixels.shape)).astype(np.float32)
        cues, teeth = [("mouth", "blending"), ("mouth", "expression")], teeth and kind != "close"
    hull = cv2.convexHull(photo.landmarks[_AROUND_MOUTH].round().astype(np.int32))
    area = np.zeros(photo.pixels.shape[:2], np.uint8)
    cv2.fillConvexPoly(area, hull, 255)
    k = 2 * max(1, round(rng.uniform(0.01, 0.04) * size)) + 1
    area = np.asarray(cv2.dilate(area, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))), np.uint8)
    alpha = soft(area.astype(np.float32) / 255, rng.uniform(0.015, 0.05) * size)
    new = match_colour(new, photo.pixels, alpha, float(np.clip(1.1 - 0.6 * strength, 0, 1)))
    if donor is not None or rng.random() < 0.5:  # a renderer works at a low resolution
        new = rescale(new, min(0.95, rng.uniform(64, 160) * (1.3 - 0.8 * strength) / size))
        cues += [("mouth", "blur"), *([("teeth", "blur")] if teeth else [])]
    return blend(photo.pixels, new, alpha), alpha, cues


def _through_latents(photo: Photo, strength: float, rng: Rng) -> Array:
    """The picture redrawn by a latent-diffusion decoder, which keeps less of a smaller picture."""
    from data_gen import latent

    name, plain = pick(rng, *latent.names()), rng.random() < 0.5
    pixels: Array = photo.pixels.astype(np.float32)
    factor = 1 - 0.45 * strength if plain else 1.1 - 0.45 * strength
    height, width = pixels.shape[:2]
    scaled = cv2.resize(pixels, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_AREA)
    redrawn = latent.redraw(scaled, name)
    return np.asarray(cv2.resize(redrawn, (width, height), interpolation=cv2.INTER_CUBIC))


def _drawn_badly(photo: Photo) -> list[tuple[str, str]]:
    return [(area, "missing-detail") for area in ("eyes", "mouth", *["teeth"] * shows_teeth(photo))]


def latent_redraw(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The whole picture from the decoder of a latent-diffusion model, and like its photo in all else."""
    new = _through_latents(photo, strength, rng)
    return new, np.ones(photo.pixels.shape[:2], np.float32), [("whole-image", "texture"), *_drawn_badly(photo)]


def latent_face(photo: Photo, donor: Photo | None, strength: float, rng: Rng) -> Made:
    """The face alone from such a decoder, blended in, as by inpainting and face editing with diffusion models."""
    new = _through_latents(photo, strength, rng)
    alpha = soft(oval_mask(photo), rng.uniform(0.01, 0.05) * face_size(photo))
    return blend(photo.pixels, new, alpha), alpha, [("skin", "texture"), *_drawn_badly(photo)]


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
        Method("mouth", "FR", mouth, same_group=True, by_area=True),
    )
}

LATENT: dict[str, Method] = {
    m.name: m
    for m in (
        Method("latent_redraw", "EFS", latent_redraw, by_area=True),
        Method("latent_face", "FE", latent_face, by_area=True),
    )
}
"""Methods that draw with the weights of `data_gen.latent`, which a user has to bring."""
