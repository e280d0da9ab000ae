"""The ablation tells a model that obeys its scores from one that looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_gen.writers import write_explanation
from eval.ablation import VARIANTS, ablation_result, exchanged, judge, questions
from eval.scoring import Resampling
from tests import tiny
from x2dfd.manifest import read_manifest
from x2dfd.types import Cue, Evidence

SAID = [
    Evidence("blending", 0.4),
    Evidence("consistency", 0.9, cues=(Cue("jaw", "blending"), Cue("skin", "colour"))),
]
DRAW = Resampling(50, 0)


class Reader:
    """Repeats its scores and what is pointed at, and does not look; `looks`: the opposite."""

    def __init__(self, looks: bool) -> None:
        self.looks = looks

    def look(self, crops: NDArray[np.uint8]) -> Any:
        return SimpleNamespace(level=float(crops.mean()))

    def verdict_logits(self, look: Any, asked: Sequence[str]) -> NDArray[np.float64]:
        if self.looks:
            return np.array([look.level - 128.0] * len(asked))
        return np.array(
            [10 * (float(q.split("consistency score is ")[1][:5]) - 0.5) if " is 0" in q else 0.0 for q in asked]
        )

    def write(self, look: Any, asked: Sequence[str], starts: Sequence[str]) -> list[str]:
        if self.looks:
            return ["The nose is blurred."]
        pointed = asked[0].split("points at ")[1].rstrip(".").split(" and ")
        cues = tuple(Cue(p.split(" ")[0], p.split(" ")[1]) for p in pointed)
        return [write_explanation("fake", cues, "FE", np.random.default_rng(0))]


def detector(looks: bool) -> Any:
    return SimpleNamespace(
        mllm=Reader(looks),
        evidence=lambda faces, look: [SAID for _ in faces],
        facts={"in_prompt": ["blending", "consistency"], "score_form": "numbers"},
    )


def test_every_variant_says_what_its_name_says() -> None:
    """Bug prevented: a variant that still carries what it claims to leave out."""
    asked = questions(SAID, np.random.default_rng(0))
    assert {*asked, "no picture"} == set(VARIANTS)
    assert "score" not in asked["no scores"] and "points" not in asked["no scores"]
    assert "0.900" in asked["scores only"] and "points" not in asked["scores only"]
    assert "score" not in asked["pointing only"] and "jaw blending" in asked["pointing only"]
    assert asked["all say fake"].count("0.950") == 2 and "points at" in asked["all say fake"]
    assert asked["all say real"].count("0.050") == 2 and "points" not in asked["all say real"]
    assert "0.900" not in asked["scores of chance"]


def test_what_is_exchanged_lies_elsewhere() -> None:
    """Bug prevented: an exchange that points at the same area, and so cannot tell who follows it."""
    for seed in range(30):
        found = exchanged(SAID, np.random.default_rng(seed))
        assert found is not None
        evidence, cue = found
        assert cue.area not in ("jaw", "skin") and evidence[1].cues == (cue,) and evidence[0].cues == ()
    assert exchanged([SAID[0]], np.random.default_rng(0)) is None


@pytest.mark.parametrize("looks", [False, True])
def test_a_reader_is_told_from_a_looker(looks: bool, tmp_path: Path, astronaut: NDArray[np.uint8]) -> None:
    """Bug prevented: shares that come out alike whatever the model does; a bad file that stops the run."""
    samples = read_manifest(tiny.write_small_manifest(tmp_path, astronaut))
    (tmp_path / "7.png").write_bytes(b"no picture")
    rows, _ = judge(detector(looks), samples, equal=False)
    assert [r["error"] is None for r in rows] == [True] * 7 + [False]
    measured = ablation_result(samples, rows, 0.5, DRAW)
    found = measured["ablation"]
    goes = found["scores against the picture"]
    assert goes["goes with the scores"]["value"] == (0.0 if looks else 1.0)
    assert goes["stays with the picture"]["value"] == (1.0 if looks else 0.0)
    assert goes["goes with the scores"]["n"] == found["n"] == 7 and sum(found["unscored"].values()) == 1
    auc = {name: value["value"] for name, value in found["auc"]["auc"].items()}
    assert auc["no scores"] == auc["whole"] if looks else auc["no scores"] == 0.5
    texts = found["texts"]
    assert texts["n"] == 3  # fakes with cues that can be read
    for name in ("own", "exchanged"):
        assert texts[name]["cues"]["of what was pointed at"]["value"] == (0.0 if looks else 1.0)
    assert rows == judge(detector(looks), samples, equal=False)[0]  # nothing is drawn anew
