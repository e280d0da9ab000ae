"""Localisation: pixel AUC and IoU of the experts' maps against the forgery's mask, over the aligned crop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from eval import metrics as m
from eval import stats
from eval.rows import SampleRow
from eval.scoring import FOLDS, Part, folds, value_of
from eval.stats import Floats
from x2dfd.crops import MASK_SIZE, mask_on_crop
from x2dfd.errors import InputError
from x2dfd.faces import CROP_SIZE, area_polygons
from x2dfd.files import Json
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import Face

Pixels = NDArray[np.uint8]

OVAL, CENTRE = "baseline:oval", "baseline:centre"
CENTRE_SIGMA = 0.25  # of the crop's side
THRESHOLDS = tuple(round(0.05 * k, 2) for k in range(1, 20))


def truth_on_crop(path: Path, shape: Sequence[int], pixels: Pixels, face: Face) -> NDArray[np.bool_]:
    """Where the crop is forged: [MASK_SIZE, MASK_SIZE]. Raises InputError when the mask cannot tell that."""
    mask: Pixels = np.ascontiguousarray(load_picture(path).pixels[..., 0])
    if mask.shape != tuple(shape[:2]):
        raise InputError("other_size", "the mask is not of the size of its picture")
    height, width = pixels.shape[:2]
    if mask.shape != (height, width):  # the picture was shrunk by --equalise
        mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    truth = mask_on_crop(mask, pixels, face.landmarks) > 127
    if truth.all() or not truth.any():
        raise InputError("all_or_nothing", "the mask covers all of the crop, or nothing of it")
    return np.asarray(truth)


def places(maps: Json, face: Face, truth: NDArray[np.bool_]) -> Part:
    """How well each map, and two baselines that ignore the picture, locate the forgery. Thresholds are shares of a
    map's own maximum, because the score, not the map, tells whether there is a forgery."""
    arrays = {name: np.asarray(rows, np.float32) for name, rows in maps.items()}
    arrays = {name: rows / max(float(rows.max()), 1e-6) for name, rows in arrays.items()}
    grids = {
        name: np.asarray(cv2.resize(rows, (MASK_SIZE, MASK_SIZE), interpolation=cv2.INTER_LINEAR))
        for name, rows in arrays.items()
    }
    grids |= {OVAL: _oval(face), CENTRE: _centre()} if grids else {}
    labels = truth.ravel().astype(np.int64)
    return {
        name: {
            "auc": _short(stats.auc(labels, grid.ravel().astype(np.float64))),
            "iou": [_short(m.overlap(truth, grid >= t)) for t in THRESHOLDS],
        }
        for name, grid in grids.items()
    }


def _short(value: float | None) -> float:
    assert value is not None  # `truth_on_crop` refuses the masks for which these are not defined
    return round(value, 6)


def _oval(face: Face) -> NDArray[np.float32]:
    """1 inside the face's oval: the guess that the whole face was changed."""
    [oval] = area_polygons(face.crop_landmarks)["skin"]
    grid = np.zeros((MASK_SIZE, MASK_SIZE), np.float32)
    cv2.fillPoly(grid, [(oval * (MASK_SIZE / CROP_SIZE)).round().astype(np.int32)], 1.0)
    return grid


def _centre() -> NDArray[np.float32]:
    """A bell in the middle of the crop, the same for every picture."""
    at = (np.arange(MASK_SIZE) + 0.5) / MASK_SIZE - 0.5
    square = at[:, None] ** 2 + at[None, :] ** 2
    return np.exp(-square / (2 * CENTRE_SIGMA**2)).astype(np.float32)


def localisation(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """Pixel AUC and IoU of each map, as means over the masked fakes, overall and by method. The groups are divided into
    `FOLDS` folds; a picture's IoU is taken at the threshold with the best mean IoU on the other folds, so that no
    threshold is chosen on the picture that it measures."""
    masked = [i for i, s in enumerate(samples) if s.label == "fake" and s.mask is not None]
    with_maps = [i for i in masked if rows[i].places]
    reasons = Counter(rows[i].notes.get("mask") or rows[i].reason or "no map" for i in masked if not rows[i].places)
    names = sorted({name for i in with_maps for name in rows[i].places}, key=lambda n: (n in (OVAL, CENTRE), n))
    maps: Part = {}
    for name in names:
        indices = [i for i in with_maps if name in rows[i].places]
        aucs = m.to_scores([rows[i].places[name]["auc"] for i in indices])
        curves = np.array([rows[i].places[name]["iou"] for i in indices])
        groups, methods = [samples[i].group for i in indices], [value_of(samples[i], "method") for i in indices]
        ious, thresholds = _at_thresholds_of_others(curves, folds(groups))

        positions = range(len(indices))
        by_method = {method: [k for k in positions if methods[k] == method] for method in sorted(set(methods))}
        maps[name] = _means(positions, aucs, ious, groups) | {
            "thresholds": thresholds,
            "iou_by_threshold": {
                str(t): round(float(v), 6) for t, v in zip(THRESHOLDS, curves.mean(axis=0), strict=True)
            },
            "by_method": {method: _means(chosen, aucs, ious, groups) for method, chosen in by_method.items()},
        }
    return {
        "n_masks": len(masked),
        "n": len(with_maps),
        "left_out": dict(sorted(reasons.items())),
        "iou_at": f"the best threshold of the other groups, {FOLDS} parts",
        "baselines": {
            OVAL: "the whole oval of the face",
            CENTRE: f"the same bell in every crop's middle, sigma {CENTRE_SIGMA} of its side",
        },
        "maps": maps,
    }


def _means(chosen: Sequence[int], aucs: Floats, ious: Floats, groups: Sequence[str]) -> Part:
    aucs, ious, groups = aucs[list(chosen)], ious[list(chosen)], [groups[k] for k in chosen]
    return {"n": len(chosen), "auc": stats.mean(aucs, groups), "iou": stats.mean(ious, groups)}


def _at_thresholds_of_others(curves: Floats, fold_of: NDArray[np.int64]) -> tuple[Floats, list[float]]:
    """IoU of each picture [n] from its curve [n, thresholds], and the thresholds used; 0.5 with a single fold."""
    best = np.full(len(curves), THRESHOLDS.index(0.5))
    for fold in set(fold_of.tolist()):
        others = curves[fold_of != fold]
        if len(others):
            best[fold_of == fold] = others.mean(axis=0).argmax()
    return curves[np.arange(len(curves)), best], sorted({THRESHOLDS[k] for k in best})
