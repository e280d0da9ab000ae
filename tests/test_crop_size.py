"""A model that takes larger face crops gets them, the same ones in every stage, and experts keep theirs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import x2dfd
from data_gen.build import BuildConfig, build
from finetune.config import FinetuneConfig
from finetune.train import train
from tests import families, tiny
from tests.raising import raises
from x2dfd.adapter import WHOLE, AdapterCard, check_contents, read_adapter_card
from x2dfd.assessment import CueQuestion, run_assess
from x2dfd.checkpoints import crop_size_of
from x2dfd.crops import load_crops
from x2dfd.detector import through_codec
from x2dfd.experts import BUILTIN
from x2dfd.faces import CROP_SIZE, PREPROCESSING, find_faces, preprocessing
from x2dfd.mllm import LocalEncoding, LocalMLLM
from x2dfd.run_calibrate import calibrate, face_of
from x2dfd.tower import augmented_view, view_face

ASKED = [
    CueQuestion(f"Is there {what}? Answer Yes or No.", "jaw", artifact, "bank")
    for what, artifact in (("a seam", "blending"), ("blur", "blur"))
]


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
    assert np.array_equal(through_codec([view_face(large, 1, 1)])[0].view, augmented_view(large.views[1], 1, 1))


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


@pytest.mark.slow
def test_the_whole_road_of_another_family(
    tmp_path: Path, astronaut: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assess, build, train, calibrate and detect have to show a model the same crops, and a calibration that was fitted
    on others holds for none."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    families.write_model(tmp_path / "base", "Qwen3-VL")
    manifest = tiny.write_small_manifest(tmp_path / "data", astronaut)
    plain, sides = LocalMLLM.encode, set[int]()

    def encode(self: LocalMLLM, crops: NDArray[np.uint8]) -> LocalEncoding:
        sides.add(crops.shape[1])
        return plain(self, crops)

    monkeypatch.setattr(LocalMLLM, "encode", encode)
    base = f"hub:{tmp_path / 'base'}"
    (tmp_path / "asked.json").write_text(json.dumps({"questions": [asdict(q) for q in ASKED]}))
    run_assess(manifest, tmp_path / "mfa", tmp_path / "asked.json", limit=2, model=base)
    made = BuildConfig(str(manifest), str(tmp_path / "mfa" / "assessment.json"), (tiny.EXPERT,), follow_ups=0)
    config = FinetuneConfig(
        str(build(made, tmp_path / "set")), str(manifest), str(tmp_path / "out"), base=str(tmp_path / "base"),
        lora_r=4, lr=1e-2, accumulate=1, batch=8, max_steps=2,
    )  # fmt: skip
    card = read_adapter_card(train(config))
    assert card.crop_size == 448 and card.preprocessing == preprocessing(448) and len(card.probes) == 3
    spec = f"{base}+{config.out}"
    fitted = calibrate(spec, [manifest], split="train")
    assert set(fitted.weights) == {"mllm", tiny.EXPERT}
    detector = x2dfd.load(spec)
    report = detector.detect(Image.fromarray(astronaut), rationale=False)
    assert detector.mode == "calibrated" and report.model["crop_size"] == 448
    assert report.verdict.p_fake is not None and report.faces[0].evidence[0].score is not None
    assert sides == {448}
