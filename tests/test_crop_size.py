"""A model that takes larger face crops gets them, the same ones in every stage, and experts keep theirs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from tests import tiny
from tests.raising import raises
from x2dfd.adapter import WHOLE, AdapterCard, check_contents
from x2dfd.calibrate import face_of
from x2dfd.crops import load_crops
from x2dfd.detector import through_codec
from x2dfd.faces import CROP_SIZE, PREPROCESSING, find_faces, preprocessing
from x2dfd.loading import crop_size_of
from x2dfd.tower import seen_view, view_face


def test_a_larger_crop_is_of_the_same_face_and_has_more_of_it(astronaut: NDArray[np.uint8]) -> None:
    """Enlarged from the experts' crop, it would hold nothing new; cut otherwise, MLLM and experts would disagree."""
    [plain], [face] = find_faces(astronaut), find_faces(astronaut, 448)
    assert plain.large is None and plain.view is plain.crop
    assert np.array_equal(face.crop, plain.crop) and face.view.shape == (448, 448, 3)
    small = cv2.resize(face.view, (CROP_SIZE, CROP_SIZE), interpolation=cv2.INTER_AREA).astype(float)
    assert np.abs(small - plain.crop).mean() < 3
    [seen] = through_codec([face])
    assert seen.view.shape == (448, 448, 3) and not np.array_equal(seen.view, face.view)


def test_crops_of_two_sizes_stand_beside_each_other(tmp_path: Path, astronaut: NDArray[np.uint8]) -> None:
    """Those of one model must not be taken for another's, nor made anew whenever the model changes."""
    manifest = tiny.write_small_manifest(tmp_path, astronaut, 2)
    small, large = load_crops(manifest), load_crops(manifest, side=336)
    assert small.large is None and large.views.shape == (len(small.samples), 336, 336, 3)
    assert np.array_equal(small.crops, large.crops) and np.array_equal(small.landmarks, large.landmarks)
    for face in (view_face(large, 0, 1), face_of(large, 0, 1), face_of(large, 1, 1)):
        assert face.crop.shape == (CROP_SIZE, CROP_SIZE, 3) and face.view.shape == (336, 336, 3)
    assert np.array_equal(through_codec([view_face(large, 1, 1)])[0].view, seen_view(large.views[1], 1, 1))


def test_crop_size_is_part_of_what_an_adapter_is_checked_for(tmp_path: Path) -> None:
    """An adapter of larger crops that is shown small ones is asked about other pictures than it learnt from."""
    assert preprocessing(CROP_SIZE) == PREPROCESSING != preprocessing(336)
    card = AdapterCard(
        name="tiny", version="1", source="a test", licence="Apache-2.0", sha256="", preprocessing=preprocessing(336),
        paper="none", blind_spot="everything", weights=WHOLE, crop_size=336,
    )  # fmt: skip
    check_contents(tmp_path, card)
    with raises("crops_differ"):
        check_contents(tmp_path, replace(card, crop_size=CROP_SIZE))


@pytest.mark.parametrize(
    ("crop_size", "size", "side"),
    [
        ({"height": 336, "width": 336}, {"shortest_edge": 336}, 336),  # LLaVA-1.5
        (None, {"height": 384, "width": 384}, 384),  # LLaVA-OneVision
        (None, {"height": 896, "width": 896}, 448),  # Gemma 3
        (None, {"shortest_edge": 3136, "longest_edge": 1003520}, 448),  # Qwen-VL: pixels in all
        (None, {"longest_edge": 1024}, 448),  # Pixtral
        (None, {"height": 56, "width": 56}, 224),
    ],
)
def test_the_image_processor_says_what_a_model_takes(crop_size: Any, size: Any, side: int) -> None:
    processor = SimpleNamespace(image_processor=SimpleNamespace(crop_size=crop_size, size=size))
    assert crop_size_of(cast(Any, processor)) == side
