"""Faces: what is found and what is not, the aligned crop, and where the areas of a face lie."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray

from tests.pictures import encoded
from x2dfd.faces import (
    CROP_SIZE,
    PADDING,
    align,
    area_mask,
    area_polygons,
    find_faces,
    find_missed_faces,
    find_turned_faces,
)
from x2dfd.intake import Search, ready
from x2dfd.types import AREAS, Face
from x2dfd.video import Frame

Pixels = NDArray[np.uint8]
Array = NDArray[Any]

RIGHT_EYE, LEFT_EYE = (33, 133), (263, 362)  # corners; sides of the person
BOX = (178.0, 68.0, 95.0, 109.0)  # the astronaut's face, read off the picture

# Read off the picture by eye, in its pixels: what each area must cover.
MARKS: dict[str, tuple[tuple[int, int], ...]] = {
    "forehead": ((222, 84),), "eyebrows": ((200, 90), (252, 93)), "eyes": ((204, 101), (247, 104)),
    "nose": ((224, 124),), "mouth": ((224, 151),), "teeth": ((224, 145),), "cheeks": ((191, 122), (258, 124)),
    "jaw": ((220, 170),), "ears": ((177, 125), (274, 131)), "hair": ((220, 62),),
    "skin": ((191, 122), (258, 124), (222, 84)), "face-contour": ((181, 138), (268, 140)), "neck": ((226, 183),),
    "background": ((150, 130), (310, 120)),
}  # fmt: skip


@pytest.fixture(scope="module")
def face() -> Face:
    [found] = find_faces(skimage.data.astronaut())
    return found


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / (a[2] * a[3] + b[2] * b[3] - inter)


def _to_crop(face: Face, points: Array) -> Array:
    """Picture points [n, 2] in crop pixels, by the affine that the two sets of landmarks imply."""
    known = np.concatenate([face.landmarks, np.ones((468, 1))], 1)
    affine = np.linalg.lstsq(known, face.crop_landmarks, rcond=None)[0]
    return np.asarray(np.concatenate([points, np.ones((len(points), 1))], 1) @ affine)


def _tilt(points: Array) -> float:
    """Slope of the line through the eyes, in degrees."""
    x, y = points[list(LEFT_EYE)].mean(0) - points[list(RIGHT_EYE)].mean(0)
    return float(np.degrees(np.arctan2(y, x)))


def test_a_face_and_its_crop_are_where_the_landmarks_say(astronaut: Pixels, face: Face) -> None:
    """Bug prevented: a wrong anchor or letterbox offset moves every box and mesh; crop_landmarks and crop come from
    different transforms, so maps and masks sit beside the face."""
    assert _iou(face.box, BOX) > 0.8
    assert face.index == 0 and 0.5 < face.confidence <= 1
    assert face.landmarks.shape == face.crop_landmarks.shape == (468, 2)
    assert face.landmarks.dtype == face.crop_landmarks.dtype == np.float32
    assert face.crop.shape == (CROP_SIZE, CROP_SIZE, 3) and face.crop.dtype == np.uint8
    x, y, w, h = face.box
    assert np.allclose([*face.landmarks.min(0), *face.landmarks.max(0)], [x, y, x + w, y + h], atol=1e-3)
    for corners, eye in zip((RIGHT_EYE, LEFT_EYE), MARKS["eyes"], strict=True):
        assert np.linalg.norm(face.landmarks[list(corners)].mean(0) - eye) < 4
    crop, matrix = align(astronaut, face.landmarks)
    assert np.array_equal(crop, face.crop)
    assert np.allclose(cv2.transform(face.landmarks[None], matrix)[0], face.crop_landmarks, atol=0.01)
    inside = np.abs(face.crop_landmarks - (CROP_SIZE - 1) / 2).max() * 2 / CROP_SIZE
    assert 0.7 < inside < 1 / 1.25  # the mesh fills the crop up to the margin of 1.3
    teeth = _to_crop(face, np.array(MARKS["teeth"]))[0].round().astype(int)
    pupil = _to_crop(face, np.array(MARKS["eyes"]))[0].round().astype(int)
    assert face.crop[teeth[1], teeth[0]].min() > 150 > 100 > face.crop[pupil[1], pupil[0]].max()


@pytest.mark.parametrize("angle", [0, 25, -40])
def test_eyes_are_level_in_the_crop(astronaut: Pixels, face: Face, angle: int) -> None:
    """Bug prevented: the crop turns the wrong way, or not at all, for a head that leans."""
    matrix = cv2.getRotationMatrix2D((225, 200), angle, 1.0)
    turned = np.asarray(cv2.warpAffine(astronaut, matrix, (512, 512), borderMode=cv2.BORDER_REFLECT), np.uint8)
    [found] = find_faces(turned)
    assert abs(_tilt(found.crop_landmarks)) < 0.5
    assert found.roll_degrees == pytest.approx(face.roll_degrees - angle, abs=4)
    assert found.roll_degrees == pytest.approx(_tilt(found.landmarks), abs=3)
    expected = cv2.transform(face.landmarks[None], matrix)[0]
    assert np.linalg.norm(found.landmarks - expected, axis=1).mean() < 2.5
    assert np.linalg.norm(found.crop_landmarks - face.crop_landmarks, axis=1).mean() < 8


def test_outside_the_picture_is_padding(astronaut: Pixels) -> None:
    """Bug prevented: black or mirrored borders, which tell a cut photo from a whole one."""
    left_cut = np.ascontiguousarray(astronaut[:, 215:])
    [found] = find_faces(left_cut)
    _, matrix = align(left_cut, found.landmarks)
    yy, xx = np.mgrid[0:CROP_SIZE, 0:CROP_SIZE]
    where = cv2.transform(np.stack([xx, yy], -1).astype(np.float64), cv2.invertAffineTransform(matrix))
    padded = (found.crop == PADDING).all(-1)
    assert padded[where[..., 0] < -1.5].all() and (where[..., 0] < -1.5).mean() > 0.3
    assert padded[where[..., 0] > 1.5].mean() < 0.02


def test_every_face_of_a_collage(astronaut: Pixels) -> None:
    """Bug prevented: small faces of a large picture are missed, found twice by two tiles, or not sorted by size."""
    tile = astronaut[20:260, 120:330]
    picture = np.full((1200, 1600, 3), (90, 110, 120), np.uint8)
    wanted = []
    heads = (700, 700, 140), (20, 20, 500), (1250, 50, 170), (620, 30, 300), (1300, 800, 115), (1000, 40, 220)
    for x, y, height in heads:
        scale = height / tile.shape[0]
        width = round(tile.shape[1] * scale)
        picture[y : y + height, x : x + width] = cv2.resize(tile, (width, height), interpolation=cv2.INTER_AREA)
        wanted.append((x + (BOX[0] - 120) * scale, y + (BOX[1] - 20) * scale, BOX[2] * scale, BOX[3] * scale))
    wanted.sort(key=lambda box: -box[2])
    assert wanted[-1][2] < 50  # pixels, in a picture of 1600
    found = find_faces(picture)
    assert len(found) == len(wanted)
    assert [f.index for f in found] == list(range(6))
    for f, box in zip(found, wanted, strict=True):
        assert _iou(f.box, box) > 0.75


def test_no_face_where_there_is_none(astronaut: Pixels) -> None:
    """Bug prevented: a verdict on a cat, a cup or a page of text; a mesh placed on nothing, with the presence score
    never looked at; a resize to zero pixels on a thumbnail or a strip; more looks, more chances to see one."""
    names = ("coffee", "chelsea", "rocket", "brick", "grass", "coins", "hubble_deep_field", "page", "horse", "retina")
    pictures = [np.asarray(getattr(skimage.data, name)()) for name in names]
    pictures = [p.astype(np.uint8) * 255 if p.dtype == bool else p for p in pictures]
    pictures = [p if p.ndim == 3 else np.stack([p] * 3, -1) for p in pictures]
    turned = [find_turned_faces(np.ascontiguousarray(p[:300, :400, :3])) for p in pictures[:3]]
    assert turned == [([], 0)] * 3
    pictures += [np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)]
    pictures += [np.full((600, 800, 3), level, np.uint8) for level in (0, 127, 255)]
    for size in ((16, 16), (1, 1), (1, 900), (900, 1), (40, 40)):
        pictures.append(np.asarray(cv2.resize(astronaut, size, interpolation=cv2.INTER_AREA), np.uint8))
    for place, picture in enumerate(pictures):
        for find in (find_faces, find_missed_faces):
            assert find(np.ascontiguousarray(picture[..., :3])) == [], place


def test_areas_lie_where_they_should_and_leave_each_other_out(astronaut: Pixels, face: Face) -> None:
    """Bug prevented: swapped or mistyped mesh numbers put an area elsewhere, in the picture or in the crop; an area
    that covers its mark only because it covers half the face; 'skin' with the eyes in it, 'background' with the face in
    it, a contour that is a disc."""
    for area in AREAS:
        marks = np.array(MARKS.get(area, ((224, 124),)))
        for shape, landmarks, points in (
            (astronaut.shape, face.landmarks, marks.astype(float)),
            (face.crop.shape, face.crop_landmarks, _to_crop(face, marks)),
        ):
            mask = area_mask(landmarks, area, shape)
            assert mask.shape == tuple(shape[:2]) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
            x, y = points.round().astype(int).T
            known = (x >= 0) & (x < shape[1]) & (y >= 0) & (y < shape[0])  # the background's marks lie beside the crop
            assert mask.any() and (mask[y[known], x[known]] == 255).all(), area

    def middle(area: str) -> tuple[float, float]:
        y, x = np.nonzero(area_mask(face.crop_landmarks, area, face.crop.shape))
        return float(x.mean()), float(y.mean())

    order = ["hair", "forehead", "eyebrows", "eyes", "nose", "mouth", "jaw", "neck"]
    heights = [middle(area)[1] for area in order]
    assert all(b - a > 5 for a, b in pairwise(heights)), dict(zip(order, heights, strict=True))
    centre = middle("nose")[0]
    assert all(abs(middle(a)[0] - centre) < 12 for a in ("forehead", "eyebrows", "eyes", "mouth", "jaw", "cheeks"))
    sizes = {a: float((area_mask(face.crop_landmarks, a, face.crop.shape) > 0).mean()) for a in AREAS}
    assert max(sizes[a] for a in ("eyebrows", "eyes", "nose", "mouth", "teeth")) < 0.08 < sizes["skin"] < 0.5
    assert sizes["teeth"] < sizes["mouth"] < sizes["skin"] < sizes["whole-image"] == 1
    masks = {a: area_mask(face.landmarks, a, astronaut.shape) > 0 for a in AREAS}

    def share(part: str, whole: str) -> float:
        return float((masks[part] & masks[whole]).sum() / masks[part].sum())

    for hole in ("eyes", "eyebrows", "mouth"):
        assert share(hole, "skin") < 0.05
    for covered in ("skin", "face-contour", "hair", "ears", "neck", "nose", "eyes"):
        assert share(covered, "background") < 0.02
    assert share("teeth", "mouth") > 0.95 and share("cheeks", "skin") > 0.9
    for inner in ("nose", "eyes", "mouth"):
        assert share(inner, "face-contour") < 0.05
    assert masks["background"].mean() > 0.5


def test_polygons_follow_the_landmarks(face: Face) -> None:
    """Bug prevented: polygons in fixed pixels; reports draw them at the picture's own size."""
    found, moved = (area_polygons(face.landmarks * scale + 10 * (scale - 1)) for scale in (1, 2))
    assert {"eyes", "mouth", "jaw"} <= found.keys() <= set(AREAS)
    for area, polygons in found.items():
        for was, now in zip(polygons, moved[area], strict=True):
            # Hulls may start at another corner: compare what they enclose.
            before, after = (cv2.contourArea(p.astype(np.float32)) for p in (was, now))
            assert after == pytest.approx(4 * before, rel=0.05)
            assert np.allclose(now.mean(0), was.mean(0) * 2 + 10, atol=2)


def test_a_large_picture_gives_the_crop_of_the_small_one(astronaut: Pixels) -> None:
    """Bug prevented: sampling a 24-megapixel face point by point, so that noise turns into a pattern of our own."""
    small = np.full((400, 600, 3), (90, 110, 120), np.uint8)
    small[:, 100:512] = astronaut[:400, :412]
    large = np.asarray(cv2.resize(small, (6000, 4000), interpolation=cv2.INTER_CUBIC), np.uint8)
    large[::2, ::2] = np.clip(large[::2, ::2].astype(np.int16) + 60, 0, 255).astype(np.uint8)
    large[1::2, 1::2] = np.clip(large[1::2, 1::2].astype(np.int16) - 60, 0, 255).astype(np.uint8)
    [near], [far] = find_faces(large), find_faces(small)
    assert np.linalg.norm(near.landmarks / 10 - far.landmarks, axis=1).mean() < 1
    assert near.roll_degrees == pytest.approx(far.roll_degrees, abs=1)
    # Averaged over each crop pixel the checkerboard is gone; a point sample of it is off by up to 60.
    assert np.abs(near.crop.astype(float) - far.crop).mean() < 9
    rough = [float(np.abs(cv2.Laplacian(f.crop.astype(np.float32), cv2.CV_32F)).mean()) for f in (near, far)]
    assert rough[0] < 1.3 * rough[1]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_face_that_lies_on_its_side_is_found_upright(astronaut: Pixels, face: Face, turns: int) -> None:
    """Bug prevented: no face in a photo whose EXIF was lost, or boxes of the turned copy drawn on the photo."""
    photo = np.ascontiguousarray(astronaut[:320, 70:370])
    lying = np.ascontiguousarray(np.rot90(photo, -turns))
    [found], degrees = find_turned_faces(lying)
    assert degrees == 90 * turns
    x, y, w, h = found.box
    shown = np.zeros(photo.shape[:2])
    shown[68:177, 108:203] = 1  # the astronaut's face, as BOX says, in the cut-out
    where = np.rot90(shown, -turns)
    assert where[round(y) : round(y + h), round(x) : round(x + w)].mean() > 0.8
    assert abs(_tilt(found.crop_landmarks)) < 0.5
    assert np.abs(found.crop.astype(int) - face.crop).mean() < 12
    assert np.linalg.norm(found.crop_landmarks - face.crop_landmarks, axis=1).mean() < 4


def _close_up(astronaut: Pixels, x: int, y: int, half: int) -> tuple[Pixels, float]:
    """A square of the portrait about a point, 400 pixels wide, and its enlargement."""
    part = astronaut[y - half : y + half, x - half : x + half]
    return np.asarray(cv2.resize(part, (400, 400), interpolation=cv2.INTER_CUBIC), np.uint8), 200 / half


def test_a_face_that_the_first_look_misses_is_found_from_afar(astronaut: Pixels, face: Face) -> None:
    """Bug prevented: "no face" for a face without forehead and chin, and for portraits in profile or in hard light."""
    picture, scale = _close_up(astronaut, 225, 124, 32)
    assert find_faces(picture) == []
    [found] = find_missed_faces(picture)
    expected = (face.landmarks - [225 - 32, 124 - 32]) * scale
    assert np.linalg.norm(found.landmarks - expected, axis=1).mean() < 0.04 * BOX[2] * scale
    assert found.crop.shape == face.crop.shape and abs(_tilt(found.crop_landmarks)) < 0.5


def test_a_clip_of_close_ups_is_not_judged_on_one_frame(astronaut: Pixels) -> None:
    """Bug prevented: after the first face that was found from afar, the clip's other frames got no second look."""
    picture, _ = _close_up(astronaut, 225, 124, 32)
    for first in (picture, astronaut):  # one that the first look misses, too, or finds
        search = Search()
        for index in range(9):
            search.frame(Frame(index, index / 10, picture if index else first))
        frames = [found.frame for found in search.faces]
        assert frames == ([*range(9)] if first is picture else [0, 4, 5, 6, 7, 8]) and not search.turned


def test_an_upright_face_is_not_judged_on_its_head(astronaut: Pixels) -> None:
    """Bug prevented: upside down, the detector saw a face in an upright close-up; its crop stood on its head, and the
    report said that the picture does."""
    picture, _ = _close_up(astronaut, 231, 124, 31)
    assert find_turned_faces(picture)[1] == 180
    looked = ready(encoded(picture, "PNG"), 1)
    [found] = looked.faces
    assert abs(found.face.roll_degrees) < 10 and not any("faces_turned" in note for note in looked.summary["notes"])
    lying = ready(encoded(astronaut[:320, 70:370][::-1, ::-1], "PNG"), 1)
    assert len(lying.faces) == 1 and "faces_turned:180" in lying.summary["notes"]


def test_loading_the_face_models_prints_nothing() -> None:
    """Bug prevented: a line of the runtime's own on the stderr of every command."""
    code = "from x2dfd import faces; faces._model(faces._MESH)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
