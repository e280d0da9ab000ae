"""Feature assessment: the numbers that decide what a model is taught must be right, repeatable and not luck."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.raising import raises
from x2dfd.assessment import (
    BANK,
    CueQuestion,
    assess,
    chart,
    experts_for,
    group_weights,
    read_assessment,
    read_questions,
    spearman,
    strong_cues,
    table,
)
from x2dfd.assessment.ask import PART
from x2dfd.crops import CropSet
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.manifest import Sample
from x2dfd.mllm import YesNo
from x2dfd.types import AREAS, ARTIFACTS, Card, Cue

SEAM = CueQuestion("Is there a seam along the jaw? Answer Yes or No.", "jaw", "blending", "bank")
BLUR = CueQuestion("Are the eyes blurred? Answer Yes or No.", "eyes", "blur", "bank")
TEETH = CueQuestion("Are the teeth misshapen? Answer Yes or No.", "teeth", "geometry", "bank")
HAT = CueQuestion("Is the person wearing a hat? Answer Yes or No.", None, None, "random")

Behaviour = Callable[[Sample, str, np.random.Generator], tuple[float, str]]


class Fake:
    """A model with known behaviour; it recognises a crop by the number written into its first pixel."""

    def __init__(self, samples: Sequence[Sample], behaviour: Behaviour, name: str = "fake 1", stop_after: int = 10**9):
        self.name, self.samples, self.behaviour, self.stop_after = name, samples, behaviour, stop_after
        self.seen: list[str] = []

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo:
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        number = int(crop[0, 0, 0]) + 256 * int(crop[0, 0, 1])
        sample = self.samples[number]
        self.seen.append(sample.id)
        # The same answer whenever it is asked.
        answers = [self.behaviour(sample, q, np.random.default_rng([number, *q.encode()])) for q in questions]
        return YesNo(np.array([p for p, _ in answers]), tuple(s for _, s in answers))


def said(p: float) -> tuple[float, str]:
    return p, "yes" if p > 0.5 else "no"


def always(answer: tuple[float, str]) -> Behaviour:
    return lambda sample, q, rng: answer


def has(sample: Sample, q: CueQuestion) -> bool:
    return any((c.area, c.artifact) == (q.area, q.artifact) for c in sample.cues)


def make(
    n: int = 120, per_group: int = 2, cue: CueQuestion = SEAM, share: float = 1.0, truth: bool = True
) -> tuple[list[Sample], CropSet]:
    """Half real, half fake; `share` of the fakes carry the cue, the others another one; groups of one label each."""
    samples = []
    for i in range(n):
        fake = i % 2 == 1
        pair = cue if (i // 2) % 10 < 10 * share else TEETH
        cues = (Cue(str(pair.area), str(pair.artifact)),) if fake and truth else ()
        group = f"{'f' if fake else 'r'}{i // 2 // per_group}"
        sample = Sample(f"s{i}", Path(f"/x/{i}.png"), "fake" if fake else "real", group=group, cues=cues, split="val")
        samples.append(sample)
    return samples, crops_of(samples)


def crops_of(samples: list[Sample]) -> CropSet:
    crops = np.zeros((len(samples), 4, 4, 3), np.uint8)
    crops[:, 0, 0, 0], crops[:, 0, 0, 1] = np.arange(len(samples)) % 256, np.arange(len(samples)) // 256
    return CropSet(samples, crops, np.zeros((len(samples), 468, 2), np.float32), {})


def knows_the_seam(sample: Sample, q: str, rng: np.random.Generator) -> tuple[float, str]:
    """Sees seams through noise, guesses about eyes, says yes of all teeth."""
    if q == SEAM.text:
        return said(float(np.clip(0.35 + 0.3 * has(sample, SEAM) + 0.15 * rng.standard_normal(), 0, 1)))
    return said(0.9) if q == TEETH.text else said(float(rng.random()))


def test_published_numbers_by_hand(tmp_path: Path) -> None:
    """Bug prevented: `other` left out of the denominator, or counted as no, lifts a model that mumbles."""
    samples, data = make(8, per_group=1)
    words = {"s0": "no", "s2": "other", "s4": "yes", "s6": "no", "s1": "yes", "s3": "other", "s5": "other", "s7": "no"}
    result = assess(Fake(samples, lambda s, q, r: (0.5, words[s.id])), data, [SEAM], tmp_path)
    [finding] = result.questions
    assert finding.real_accuracy == 2 / 4 and finding.fake_accuracy == 1 / 4
    assert finding.balanced_accuracy == 0.375
    assert finding.yes_rate == 2 / 8 and finding.other_rate == pytest.approx(3 / 8)
    assert finding.overall.auc == 0.5  # all probabilities tie
    saved = json.loads((tmp_path / "assessment.json").read_text())["published"]
    assert saved == [{"question": SEAM.text, "real_accuracy": 0.5, "fake_accuracy": 0.25, "balanced_accuracy": 0.375}]


def test_a_known_cue_a_guess_and_an_always_yes(tmp_path: Path) -> None:
    """Bug prevented: a question answered yes to everything passes for strong, or the order is reversed."""
    samples, data = make()
    result = assess(Fake(samples, knows_the_seam), data, [TEETH, BLUR, SEAM], tmp_path)
    best = result.cues[0]
    assert (best.area, best.artifact) == ("jaw", "blending") and best.strong
    assert best.overall.auc is not None and best.overall.auc > 0.85
    assert strong_cues(result) == [("jaw", "blending")]
    teeth = next(f for f in result.questions if f.question == TEETH.text)
    assert teeth.yes_rate == 1 and teeth.balanced_accuracy == 0.5 and teeth.overall.auc == 0.5 and not teeth.strong
    assert (teeth.real_accuracy, teeth.fake_accuracy) == (0, 1)
    published = [row["balanced_accuracy"] for row in result.published()]
    assert published == sorted((f.balanced_accuracy for f in result.questions), reverse=True)
    control = result.control["cues"]  # with shuffled labels, the ranking is at chance
    assert abs(control["shuffled_mean"] - 0.5) < 0.08 and control["shuffled_p95"] < 0.75
    first = assess(Fake(samples, knows_the_seam), data, [TEETH, BLUR, SEAM], tmp_path / "k", top_k=2)
    assert [f.strong for f in first.cues] == [True, True, False]
    assert "first k" in first.rule and first.control["cues"]["k"] == 2


def test_presence_is_told_from_fakeness(tmp_path: Path) -> None:
    """Bug prevented: a model that sees a seam exactly where there is one looks poor, since other fakes have none; an
    unrecorded cue of a fake counted as absent."""
    samples, data = make(120, share=0.5)
    result = assess(Fake(samples, lambda s, q, r: said(0.9 if has(s, SEAM) else 0.1)), data, [SEAM], tmp_path / "a")
    [finding] = result.cues
    assert finding.present is not None
    assert finding.present.auc == 1 and (finding.present.n_positive, finding.present.n_negative) == (30, 90)
    assert finding.overall.auc == pytest.approx(0.75)
    assert finding.decided_by == "present" and finding.deciding is finding.present
    samples, data = make(120)
    unknown = [replace(s, cues=()) if s.label == "fake" and i > 10 else s for i, s in enumerate(samples)]
    result = assess(Fake(unknown, knows_the_seam), replace(data, samples=unknown), [SEAM], tmp_path / "b")
    [finding] = result.cues
    assert finding.present is not None
    assert (finding.present.n_positive, finding.present.n_negative) == (5, 60)  # the reals, and no unknown fake
    assert finding.decided_by == "overall" and result.n_unknown_truth == 55


def test_a_cue_pools_its_wordings(tmp_path: Path) -> None:
    """Bug prevented: the last wording of a cue replaces the others."""
    samples, data = make(40)
    other = replace(SEAM, text="Does the jaw show a pasted edge? Answer Yes or No.")

    def two_voices(sample: Sample, q: str, rng: np.random.Generator) -> tuple[float, str]:
        return (0.4, "no") if q == other.text else (0.8 if sample.label == "fake" else 0.6, "yes")

    result = assess(Fake(samples, two_voices), data, [SEAM, other], tmp_path)
    [cue] = result.cues
    assert cue.wordings == 2 and cue.question is None and len(result.questions) == 2
    assert cue.overall.auc == 1  # the mean of both voices tells, the second alone would not
    assert cue.yes_rate == 0.5 and (cue.real_accuracy, cue.fake_accuracy) == (0.5, 0.5)


def test_groups_and_ranks_by_hand() -> None:
    """Bug prevented: ten frames of a clip resampled one by one, which makes every interval too narrow; ties ranked by
    position; an undefined value that spoils the sum."""
    groups = ["a", "b", "a", "c", "b"]
    weights = group_weights(groups, 500, seed=3)
    assert np.array_equal(weights[0], weights[2]) and np.array_equal(weights[1], weights[4])
    assert (weights[[0, 1, 3]].sum(0) == 3).all() and weights[0].max() > 1
    assert np.array_equal(weights, group_weights(groups, 500, seed=3))
    nan = float("nan")
    assert spearman(np.array([1.0, 2, 3, nan]), np.array([10.0, 20, 25, 1])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([3.0, 2, 2, 1])) == pytest.approx(-1)
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])) == pytest.approx(0.6)
    assert spearman(np.array([1.0, 2]), np.array([1.0, 2])) is None
    assert spearman(np.ones(5), np.arange(5.0)) is None


NOISE = [CueQuestion(f"{a} {b}? Answer Yes or No.", a, b, "bank") for a in AREAS for b in ARTIFACTS]


@pytest.mark.slow
def test_luck_is_not_strong(tmp_path: Path) -> None:
    """Bug prevented: the best of many guesses is taught as a strong cue. The control must see the same luck."""
    samples, data = make(100)
    questions = NOISE[:60]
    result = assess(Fake(samples, lambda s, q, r: said(float(r.random()))), data, questions, tmp_path)
    best, control = result.cues[0].deciding.auc, result.control["cues"]
    assert best is not None and best > 0.55  # luck there is
    assert control["k"] == 24
    assert 0.5 < control["shuffled_mean"] < 0.58 and abs(control["top_mean_auc"] - control["shuffled_mean"]) < 0.03
    assert strong_cues(result) == []
    held_out = result.stability["cues"]["held_out_top_mean_auc"]
    assert abs(result.stability["cues"]["spearman_mean"]) < 0.3 and abs(held_out - 0.5) < 0.03


def test_real_skill_is_stable_over_halves(tmp_path: Path) -> None:
    """Bug prevented: the two halves share images, or are compared by name and not by rank."""
    samples, data = make(200)
    questions = NOISE[:20]
    skill = {q.text: i / 8 for i, q in enumerate(questions)}

    def graded(sample: Sample, q: str, rng: np.random.Generator) -> tuple[float, str]:
        return said(float(1 / (1 + np.exp(-rng.standard_normal() - skill[q] * (sample.label == "fake")))))

    result = assess(Fake(samples, graded), data, questions, tmp_path)
    assert result.stability["cues"]["spearman_mean"] > 0.8
    assert (result.cues[0].area, result.cues[0].artifact) in [(q.area, q.artifact) for q in questions[-4:]]


def test_unrelated_questions_stand_apart_and_uncovered_cues_are_named(tmp_path: Path) -> None:
    """Bug prevented: a control question ranked among the cues, or taught as one; a blind spot of model and experts
    together goes unnoticed."""
    samples, data = make()
    result = assess(Fake(samples, knows_the_seam), data, [SEAM, HAT, BLUR], tmp_path)
    assert [f.question for f in result.unrelated] == [HAT.text]
    assert HAT.text not in [f.question for f in result.questions] and len(result.cues) == 2
    assert HAT.text not in [row["question"] for row in result.published()]
    assert result.random is not None
    assert result.random["cue_questions"]["best_mean_auc"] > 0.8 > result.random["unrelated_questions"]["best_mean_auc"]
    assert assess(Fake(samples, knows_the_seam), data, [SEAM], tmp_path / "without").random is None
    eyes = CueQuestion("Are the eyes oddly lit? Answer Yes or No.", "eyes", "lighting", "bank")
    nose = CueQuestion("Is the nose blurred? Answer Yes or No.", "nose", "blur", "bank")
    result = assess(Fake(samples, knows_the_seam), data, [SEAM, eyes, nose], tmp_path / "weak")
    assert result.uncovered == (("eyes", "lighting"),)
    assert next(f for f in result.cues if f.area == "nose").experts == ("tower", "clip-cues")
    assert "eyes · lighting" in table(result).split("covered by no expert:")[1].splitlines()[0]


def test_cards_say_what_experts_cover() -> None:
    """Bug prevented: a misspelt cue in a card covers nothing, in silence; a plug-in cannot cover a cue."""
    plain = Card("plain", "1", "here", "MIT", "", "crops", "no paper", "everything", covers=("noise", "blending"))
    with pytest.raises(ValueError, match="blendin"):
        replace(plain, covers=("blendin",))
    mine = replace(plain, name="mine", covers=("jaw lighting", "noise", "EFS"))
    known = {"plain": plain, "mine": mine, "broken": SetupError("not here")}
    assert experts_for("jaw", "lighting", known) == ("mine",)
    assert experts_for("nose", "lighting", known) == ()
    assert experts_for("nose", "noise", known) == ("plain", "mine")


def test_a_killed_run_goes_on_and_a_limit_keeps_what_there_is(tmp_path: Path) -> None:
    """Bug prevented: a run of hours starts anew, or ends otherwise after a kill; `--limit 20` after a long run throws
    the answers away; a larger one asks all again."""
    samples, data = make(100)
    questions = [SEAM, BLUR, HAT]
    assess(Fake(samples, knows_the_seam), data, questions, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        assess(Fake(samples, knows_the_seam, stop_after=3 * PART + 5), data, questions, tmp_path / "cut")
    assert not (tmp_path / "cut" / "assessment.json").exists()
    second = Fake(samples, knows_the_seam)
    assess(second, data, questions, tmp_path / "cut")
    assert len(second.seen) == 1 + 100 - 3 * PART  # one to see that the model is the same
    for name in ("answers.parquet", "assessment.json", "table.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    left = {p.name for p in (tmp_path / "cut").iterdir()}
    assert left == {".lock", "answers.parquet", "assessment.json", "table.md"}
    rows = pq.read_table(tmp_path / "cut" / "answers.parquet").to_pylist()
    assert [r["id"] for r in rows] == [s.id for s in samples] and len(rows[0]["p_yes"]) == 3
    samples, data = make(100)
    first, second, third = (Fake(samples, knows_the_seam) for _ in range(3))
    small = assess(first, data, [SEAM], tmp_path, limit=20)
    assert (small.n_real, small.n_fake, len(first.seen)) == (10, 10, 20)
    assess(second, data, [SEAM], tmp_path, limit=60)
    assert len(second.seen) == 1 + 40
    again = assess(third, data, [SEAM], tmp_path, limit=20)
    assert len(third.seen) == 1 and again == small
    assert pq.read_metadata(tmp_path / "answers.parquet").num_rows == 60


def test_answers_of_others_and_impossible_ones_are_not_used(tmp_path: Path) -> None:
    """Bug prevented: the ranking of a new model made of the old one's answers, or of another picture of the same id;
    the test split assessed in silence, hours about one class, one NaN sorted into a ranking."""
    samples, data = make(40)
    assess(Fake(samples, knows_the_seam), data, [SEAM], tmp_path)
    with raises("answers_of_another_run"):
        assess(Fake(samples, knows_the_seam, name="fake 2"), data, [SEAM], tmp_path)
    with raises("answers_of_another_model", "fake"):
        assess(Fake(samples, lambda s, q, r: said(0.123)), data, [SEAM], tmp_path)
    with raises("answers_of_another_run"):
        assess(Fake(samples, knows_the_seam), data, [BLUR], tmp_path)
    crops = data.crops.copy()
    crops[7, 1] = 9
    model = Fake(samples, knows_the_seam)
    assess(model, replace(data, crops=crops), [SEAM], tmp_path)
    assert model.seen == ["s0", "s7"]
    samples = [replace(s, split="test") if i >= 30 else s for i, s in enumerate(samples)]
    model = Fake(samples, knows_the_seam)
    result = assess(model, replace(data, samples=samples), [SEAM], tmp_path / "val", split="val")
    assert result.n_real + result.n_fake == 30 and set(model.seen) == {f"s{i}" for i in range(30)}
    reals = [s for s in samples if s.label == "real"]
    with raises("no_picture_of_label", "fake"):
        assess(model, crops_of(reals), [SEAM], tmp_path / "reals")
    with raises("question_twice"):
        assess(model, data, [SEAM, SEAM], tmp_path / "twice")
    for answer, fact in (((float("nan"), "yes"), "[0, 1]"), ((1.5, "yes"), "[0, 1]"), ((0.5, "Yes."), "'Yes.'")):
        with raises("answers_malformed", fact):
            assess(Fake(samples, always(answer)), data, [SEAM], tmp_path / "odd")


def test_undefined_is_none_and_the_file_reads_back(tmp_path: Path) -> None:
    """Bug prevented: NaN in JSON, which no other reader takes; a field lost on the way."""
    samples, data = make(8)
    one = [replace(s, group="g") for s in samples]  # one group: no interval; no present teeth: no AUC
    result = assess(Fake(one, knows_the_seam), replace(data, samples=one), [SEAM, TEETH, HAT], tmp_path)
    text = (tmp_path / "assessment.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    teeth = next(f for f in result.cues if f.area == "teeth")
    assert teeth.present is not None and teeth.present.auc is None and teeth.overall.interval is None
    assert not any(f.strong for f in result.cues)
    assert read_assessment(tmp_path / "assessment.json") == result == read_assessment(tmp_path)
    for broken in ("{}", "[]", "not json"):
        (tmp_path / "broken.json").write_text(broken)
        with raises("not_an_assessment", "broken.json"):
            read_assessment(tmp_path / "broken.json")


def test_question_files_are_checked(tmp_path: Path) -> None:
    """Bug prevented: a published list, which names no cues, read as one of ours."""
    file = tmp_path / "q.json"
    for text in ('["Is it?"]', '{"questions": []}', '{"questions": [{"text": "x"}]}', "x"):
        file.write_text(text)
        with pytest.raises(X2DFDError):
            read_questions(file)
    half = {"text": "x", "area": "jaw", "artifact": None, "origin": "bank"}
    file.write_text(json.dumps({"questions": [half]}))
    with raises("questions_malformed", "half a cue"):
        read_questions(file)
    assert len(read_questions(BANK)) >= 120


@pytest.mark.slow
def test_chart_is_drawn_and_can_do_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: an assessment of hours that ends in a traceback for want of a drawing library."""
    pytest.importorskip("matplotlib")
    samples, data = make(40)
    result = assess(Fake(samples, knows_the_seam), data, [SEAM, BLUR, TEETH], tmp_path)
    assert chart(result, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not chart(result, tmp_path / "b.png") and not (tmp_path / "b.png").exists()
