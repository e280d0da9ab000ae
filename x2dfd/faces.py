"""Find every face in a picture, place a 468-point mesh on it, and cut the aligned crop that all models look at.

Models: BlazeFace full-range (sparse) and Face Mesh of the MediaPipe project 0.10.21 (Apache-2.0, see NOTICE), run by
ai-edge-litert. Mesh point numbers are those of MediaPipe's canonical face model.
"""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from x2dfd.errors import SetupError, one_file
from x2dfd.files import printed_from_c
from x2dfd.types import Face

CROP_SIZE = 224
MARGIN = 1.3  # side of the crop over the longer side of the mesh's box, as in DeepfakeBench
LARGEST_CROP = 448
"""Side of the largest crop that an MLLM is shown; few pictures hold a larger face."""


def preprocessing(side: int) -> str:
    """The name of the crop that weights were trained on, which cards carry and loading compares."""
    cut = f"all faces; 468-point mesh; eyes level; square crop, margin {MARGIN}"
    return f"{cut}; {side} px RGB, padded with the CLIP mean; v1"


PREPROCESSING = preprocessing(CROP_SIZE)
"""The crop of experts and of the embedded model."""

PADDING = (122, 116, 104)
"""RGB of what lies outside the picture: the CLIP mean, which LLaVA pads with too."""

Array = NDArray[Any]

_MODELS = Path(__file__).parent / "weights" / "faces"
_DETECTOR_SIZE, _MESH_SIZE = 192, 192
_DETECTION_SCORE, _PRESENCE = 0.55, 0.6
_MIN_FACE = 20.0  # pixels; below this the crop is a guess
_PADDINGS = (2.5, 3.2, 4.2, 5.5)
"""Paddings with which a picture is searched again if no face was found; each shows it smaller than the last."""
_XNNPACK = re.compile(rb"INFO: Created TensorFlow Lite XNNPACK delegate")  # printed once; no option silences it

OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150,
    136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
_EYES = (
    (33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246),
    (263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466),
)
_BROWS = ((70, 63, 105, 66, 107, 55, 65, 52, 53, 46), (300, 293, 334, 296, 336, 285, 295, 282, 283, 276))
_LIPS = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291, 409, 270, 269, 267, 0, 37, 39, 40, 185)
_INNER_LIPS = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308, 415, 310, 311, 312, 13, 82, 81, 80, 191)
_NOSE = (168, 122, 193, 126, 129, 64, 98, 97, 2, 326, 327, 294, 358, 355, 417, 351)
_CHEEKS = (
    (50, 117, 118, 101, 36, 205, 207, 187, 147, 123, 116, 111),
    (280, 346, 347, 330, 266, 425, 427, 411, 376, 352, 345, 340),
)
_FOREHEAD = (54, 103, 67, 109, 10, 338, 297, 332, 284, 298, 293, 334, 296, 336, 9, 107, 66, 105, 63, 68)
_JAW = (
    58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 432, 422, 424, 418, 421, 200, 201, 194,
    204, 202, 212,
)  # fmt: skip


class _Tflite:
    """One tflite model with one input; returns its outputs by shape. Threads take turns with its one state."""

    def __init__(self, file: str) -> None:
        from ai_edge_litert.interpreter import Interpreter

        path = _MODELS / file
        if not path.is_file():
            raise SetupError(
                f"face model {path} is missing; get a fresh checkout and install it: pip install -e .",
                code="face_model_missing",
            )
        with printed_from_c(_XNNPACK, []):
            # Two threads find the same points in two thirds of the time; in batches they change nothing. Processes
            # without torch are the many that trainings cut crops in.
            threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
            self._model = Interpreter(model_path=str(path), num_threads=min(2, threads))
            self._model.allocate_tensors()
        self._turn = threading.Lock()
        self._input = self._model.get_input_details()[0]["index"]
        self._outputs = [(d["index"], tuple(d["shape"])) for d in self._model.get_output_details()]

    def __call__(self, image: Array) -> dict[tuple[int, ...], Array]:
        with self._turn:
            self._model.set_tensor(self._input, image[None].astype(np.float32))
            self._model.invoke()
            return {shape: self._model.get_tensor(index) for index, shape in self._outputs}


_model = cache(_Tflite)
_DETECTOR, _MESH = "face_detection_full_range_sparse.tflite", "face_landmark.tflite"


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -80, 80))))


def _detect(window: Array, offset: tuple[float, float], pad: float) -> Array:
    """Candidates of one window, [n, 17]: score, x0, y0, x1, y1 and six key points, in picture pixels.

    The window is letterboxed to a square whose side is its longer side times `pad`.
    """
    height, width = window.shape[:2]
    side = max(height, width) * pad
    scale = _DETECTOR_SIZE / side
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(window, size, interpolation=cv2.INTER_AREA)
    canvas = np.zeros((_DETECTOR_SIZE, _DETECTOR_SIZE, 3), np.float32)
    top, left = (_DETECTOR_SIZE - small.shape[0]) // 2, (_DETECTOR_SIZE - small.shape[1]) // 2
    canvas[top : top + small.shape[0], left : left + small.shape[1]] = small
    out = _model(_DETECTOR)(canvas / 127.5 - 1.0)
    raw, logits = out[(1, 2304, 16)][0], out[(1, 2304, 1)][0, :, 0]
    keep = _sigmoid(logits) > _DETECTION_SCORE
    if not keep.any():
        return np.zeros((0, 17))
    cells = np.arange(2304)[keep]  # one anchor a cell of a 48 x 48 grid
    anchors = np.stack([(cells % 48 + 0.5) / 48, (cells // 48 + 0.5) / 48], 1) * _DETECTOR_SIZE
    values = raw[keep].reshape(-1, 8, 2)
    points = values + anchors[:, None]
    points[:, 1] = values[:, 1]  # the second pair is width and height, not a point
    centre, half = points[:, 0], points[:, 1] / 2
    boxes = np.concatenate([centre - half, centre + half], 1).reshape(-1, 2, 2)
    xy = np.concatenate([boxes, points[:, 2:]], 1)  # [n, 8, 2]
    xy = (xy - [left, top]) / scale + offset
    return np.concatenate([_sigmoid(logits[keep])[:, None], xy.reshape(len(xy), 16)], 1)


def _overlap(a: Array, b: Array) -> tuple[float, float]:
    """Intersection over union, and over the smaller of two boxes x0, y0, x1, y1."""
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0, 0.0
    inter = w * h
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return inter / (area_a + area_b - inter), inter / max(min(area_a, area_b), 1e-9)


def _candidates(pixels: Array) -> list[Array]:
    """Face candidates over the whole picture and, where it is large, over overlapping tiles of it."""
    height, width = pixels.shape[:2]
    # The second, padded look finds faces that fill the frame: the detector was made for faces at a distance.
    candidates = [_detect(pixels, (0, 0), 1.0), _detect(pixels, (0, 0), 1.8)]
    for tiles in (2, 4):
        if max(height, width) < 192 * tiles:
            break
        side = math.ceil(max(height, width) / tiles * 1.3)
        for top in np.linspace(0, max(height - side, 0), math.ceil(height / side) if height <= side else tiles):
            for left in np.linspace(0, max(width - side, 0), math.ceil(width / side) if width <= side else tiles):
                y, x = round(float(top)), round(float(left))
                candidates.append(_detect(pixels[y : y + side, x : x + side], (x, y), 1.0))
    return _without_overlaps(np.concatenate(candidates))


def _without_overlaps(rows: Array) -> list[Array]:
    """Candidates, the surest first, without those that lie over a surer one."""
    kept: list[Array] = []
    for row in rows[np.argsort(-rows[:, 0])]:
        if all(max(iou / 0.3, inside / 0.7) < 1 for iou, inside in (_overlap(row[1:5], k[1:5]) for k in kept)):
            kept.append(row)
    return kept


def _place_mesh(pixels: Array, centre: Array, side: float, angle: float) -> tuple[Array, float]:
    """Mesh points [468, 2] in picture pixels and P(a face is there), from a turned square region."""
    matrix = _square_to(centre, side, angle, _MESH_SIZE)
    region = _warp(pixels, matrix, _MESH_SIZE)
    out = _model(_MESH)(region.astype(np.float32) / 255.0)
    points = out[(1, 1, 1, 1404)].reshape(468, 3)[:, :2]
    presence = float(_sigmoid(out[(1, 1, 1, 1)]).ravel()[0])
    return cv2.transform(points[None], cv2.invertAffineTransform(matrix))[0], presence


def _square_to(centre: Array, side: float, angle: float, size: int) -> Array:
    """Affine [2, 3] from picture pixels to a `size` square: turned by `angle` radians, `side` picture pixels wide."""
    scale = size / side
    c, s = math.cos(angle) * scale, math.sin(angle) * scale
    half = size / 2
    return np.array([[c, s, half - c * centre[0] - s * centre[1]], [-s, c, half + s * centre[0] - c * centre[1]]])


def _warp(pixels: Array, matrix: Array, size: int) -> NDArray[np.uint8]:
    """Cut the square; a large face is first shrunk by area averaging, so that sampling adds no pattern."""
    scale = math.hypot(matrix[0, 0], matrix[0, 1])
    if scale < 0.5:
        corners = cv2.transform(
            np.array([[[0, 0], [size, 0], [size, size], [0, size]]], np.float64), cv2.invertAffineTransform(matrix)
        )[0]
        x0, y0 = np.maximum(np.floor(corners.min(0)).astype(int) - 2, 0)
        x1, y1 = np.ceil(corners.max(0)).astype(int) + 2
        part = pixels[y0:y1, x0:x1]
        if part.size:
            # Shrink so that the remaining warp stays between 0.5 and 1.
            f = 2 ** math.floor(-math.log2(scale))
            small = cv2.resize(
                part, (max(1, part.shape[1] // f), max(1, part.shape[0] // f)), interpolation=cv2.INTER_AREA
            )
            fx, fy = part.shape[1] / small.shape[1], part.shape[0] / small.shape[0]
            matrix = matrix.copy()
            matrix[:, 2] += matrix[:, 0] * x0 + matrix[:, 1] * y0
            matrix[:, 0] *= fx
            matrix[:, 1] *= fy
            pixels = small
    return np.asarray(
        cv2.warpAffine(pixels, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=PADDING), np.uint8
    )


def _roll(points: Array) -> float:
    right, left = points[list(_EYES[0])].mean(0), points[list(_EYES[1])].mean(0)
    return math.atan2(left[1] - right[1], left[0] - right[0])


def align(pixels: Array, landmarks: Array, side: int = CROP_SIZE) -> tuple[NDArray[np.uint8], Array]:
    """The aligned crop [side, side, 3] and the affine [2, 3] from picture to crop pixels.

    Eyes level, square, centred on the mesh; what lies outside the picture is PADDING.
    """
    angle = _roll(landmarks)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned = landmarks @ turn.T
    low, high = turned.min(0), turned.max(0)
    centre = ((low + high) / 2) @ turn
    matrix = _square_to(centre, float((high - low).max()) * MARGIN, angle, side)
    return _warp(pixels, matrix, side), matrix


@one_file("finding faces")
def find_faces(pixels: NDArray[np.uint8], side: int = CROP_SIZE) -> list[Face]:
    """All upright faces of a picture, largest first. No face is an empty list, not an error.

    `pixels`: [H, W, 3] uint8 RGB. `side`: of the crop that the MLLM sees; `Face.large` where it is not CROP_SIZE.
    Raises InputError if the models fail on the pixels.
    """
    return _faces(pixels, _meshes(pixels, _candidates(pixels)), side)


@one_file("finding faces")
def find_missed_faces(pixels: NDArray[np.uint8], side: int = CROP_SIZE) -> list[Face]:
    """As `find_faces`, for a picture in which it found none: closely cut faces, profiles, hard light, sunglasses."""
    # The detector was made for faces at a distance, so the picture is shown to it ever smaller. Each size keeps its own
    # candidates: one on a beard had hidden the face around it, and the mesh then refused the beard.
    candidates = [row for padding in _PADDINGS for row in _without_overlaps(_detect(pixels, (0, 0), padding))]
    return _faces(pixels, _meshes(pixels, sorted(candidates, key=lambda row: -row[0])), side)


@one_file("finding faces")
def find_turned_faces(
    pixels: NDArray[np.uint8], turns: Sequence[int] = (1, 2, 3), side: int = CROP_SIZE
) -> tuple[list[Face], int]:
    """As `find_faces`, for a picture that lies on its side or upside down, which its file does not state.

    The quarter `turns` are tried in order, and the one with the surest face is taken. Also returns the degrees,
    counterclockwise, that would set the picture upright: 90, 180, 270, or 0 if no turn shows a face. Boxes and
    landmarks are in the given picture's pixels; crops are upright.
    """
    best: tuple[float, list[tuple[Array, float]], int] = (0.0, [], 0)
    for turn in turns:
        turned = np.ascontiguousarray(np.rot90(pixels, turn))
        meshes = _meshes(turned, _candidates(turned))
        surest = max((score for _, score in meshes), default=0.0)
        if surest > best[0]:
            best = (surest, [(_turned_back(points, turn, pixels.shape), score) for points, score in meshes], turn)
    return _faces(pixels, best[1], side), 90 * best[2]


def _turned_back(points: Array, turns: int, shape: Sequence[int]) -> Array:
    """Points [n, 2] of the picture that np.rot90(pixels, turns) gives, in `pixels`, which has that shape."""
    height, width = shape[:2]
    x, y = points[:, 0], points[:, 1]
    if turns == 1:
        return np.stack([width - 1 - y, x], 1)
    if turns == 2:
        return np.stack([width - 1 - x, height - 1 - y], 1)
    return np.stack([y, height - 1 - x], 1)


def _meshes(pixels: NDArray[np.uint8], candidates: Sequence[Array]) -> list[tuple[Array, float]]:
    """Mesh points [468, 2] and the detector's score of each candidate that holds a face, largest first."""
    meshes: list[tuple[Array, float]] = []
    for row in candidates:
        box, keys = row[1:5], row[5:].reshape(6, 2)
        side = float(max(box[2] - box[0], box[3] - box[1]))
        if side < _MIN_FACE:
            continue
        right_eye, left_eye = keys[0], keys[1]
        angle = math.atan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0])
        centre = np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])
        points, presence = _place_mesh(pixels, centre, side * 1.5, angle)
        if presence < _PRESENCE:
            continue
        # A second look from the mesh itself: the first box is coarse.
        low, high = points.min(0), points.max(0)
        points, presence = _place_mesh(pixels, (low + high) / 2, float((high - low).max()) * 1.5, _roll(points))
        size = points.max(0) - points.min(0)
        if presence < _PRESENCE or max(size) < _MIN_FACE or not np.isfinite(points).all():
            continue
        bounds = np.concatenate([points.min(0), points.max(0)])
        if any(max(_overlap(bounds, np.concatenate([p.min(0), p.max(0)]))) > 0.6 for p, _ in meshes):
            continue
        meshes.append((points, float(row[0])))
    meshes.sort(key=lambda f: -float(np.prod(f[0].max(0) - f[0].min(0))))
    return meshes


def _faces(pixels: NDArray[np.uint8], meshes: Sequence[tuple[Array, float]], side: int) -> list[Face]:
    faces = []
    for index, (points, score) in enumerate(meshes):
        crop, matrix = align(pixels, points)
        large = align(pixels, points, side=side)[0] if side != CROP_SIZE else None
        low, high = points.min(0), points.max(0)
        faces.append(
            Face(
                index=index,
                box=(float(low[0]), float(low[1]), float(high[0] - low[0]), float(high[1] - low[1])),
                landmarks=points.astype(np.float32),
                confidence=score,
                crop=crop,
                crop_landmarks=cv2.transform(points[None], matrix)[0].astype(np.float32),
                roll_degrees=math.degrees(_roll(points)),
                large=large,
            )
        )
    return faces


def _hull(points: Array) -> Array:
    return np.asarray(cv2.convexHull(points.astype(np.float32))[:, 0])


def _scaled(points: Array, about: Array, factor: float) -> Array:
    return np.asarray((points - about) * factor + about)


def area_polygons(landmarks: NDArray[np.float32]) -> dict[str, list[Array]]:
    """Polygons [n, 2] of each area that the mesh can place, in the pixels of `landmarks` ([468, 2]).

    Ears, hair, neck and contour are drawn around the face's oval and are approximate; `accessories` and `background`
    have no polygon, `skin` and `whole-image` stand for the oval and everything.
    """
    p = np.asarray(landmarks, np.float32)
    oval, centre = p[list(OVAL)], p[list(OVAL)].mean(0)
    across, down = p[454] - p[234], p[152] - p[10]
    outer, inner = _scaled(oval, centre, 1.07), _scaled(oval, centre, 0.86)
    top = [OVAL.index(i) for i in (127, 162, 21, 54, 103, 67, 109, 10, 338, 297, 332, 284, 251, 389, 356)]
    brow_to_crown = oval[top]
    hair = np.concatenate([brow_to_crown, (brow_to_crown - down * 0.28 + (brow_to_crown - centre) * 0.12)[::-1]])
    ears = [
        np.array(
            [e - down * 0.16, e - down * 0.14 + s * across * 0.14, e + down * 0.2 + s * across * 0.1, e + down * 0.2]
        )
        for e, s in ((p[234], -1.0), (p[454], 1.0))
    ]
    neck = np.array([p[172], p[152], p[397], p[397] + down * 0.35, p[172] + down * 0.35])
    return {
        "forehead": [p[list(_FOREHEAD)]],
        "eyebrows": [_hull(p[list(b)]) for b in _BROWS],
        "eyes": [_scaled(q := p[list(e)], q.mean(0), 1.35) for e in _EYES],
        "nose": [_hull(p[list(_NOSE)])],
        "mouth": [_scaled(q := p[list(_LIPS)], q.mean(0), 1.1)],
        "teeth": [p[list(_INNER_LIPS)]],
        "cheeks": [_hull(p[list(c)]) for c in _CHEEKS],
        "jaw": [p[list(_JAW)]],
        "ears": ears,
        "hair": [hair],
        "skin": [oval],
        "face-contour": [np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])],
        "neck": [neck],
    }


def lips_closed(landmarks: NDArray[np.float32]) -> bool:
    """Whether no teeth can show: the gap between the lips is less than 4 % of the mouth's width."""
    gap, width = (float(np.linalg.norm(landmarks[a] - landmarks[b])) for a, b in ((13, 14), (78, 308)))
    return gap < 0.04 * width


def area_mask(landmarks: NDArray[np.float32], area: str, shape: Sequence[int]) -> NDArray[np.uint8]:
    """Mask [H, W] of 0/255 for one area. `background` is all but face, hair, ears and neck."""
    return np.asarray(area_masks(landmarks, (area,), shape)[0])


def area_masks(landmarks: NDArray[np.float32], areas: Sequence[str], shape: Sequence[int]) -> NDArray[np.uint8]:
    """The mask of each area, as `area_mask`: [areas, H, W]."""
    polygons = {a: [q.round().astype(np.int32) for q in shapes] for a, shapes in area_polygons(landmarks).items()}
    masks = np.zeros((len(areas), shape[0], shape[1]), np.uint8)
    holes = {"background": ("skin", "face-contour", "hair", "ears", "neck"), "skin": ("eyes", "eyebrows", "mouth")}
    for mask, area in zip(masks, areas, strict=True):
        if area in ("background", "whole-image", "accessories"):
            mask[:] = 255
        else:
            cv2.fillPoly(mask, polygons[area], 255)
        for hole in holes.get(area, ()):
            cv2.fillPoly(mask, polygons[hole], 0)
    return masks
