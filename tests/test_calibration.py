"""The one number a reader acts on: fitted right, bounded where it promised, and said to be unsure when it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from finetune.calibrate import Without, _chosen, _face, calibrate, score_unseen, trained_without
from tests import tiny
from tests.tiny import edit_json
from x2dfd.adapter import AdapterCard
from x2dfd.calibration import (
    FLOOR_SHARE,
    Calibration,
    chances_of_sources_left_out,
    choose_band,
    choose_floor,
    fit_calibration,
    fit_weights,
    logit,
)
from x2dfd.crops import CropSet
from x2dfd.errors import SetupError, UnknownName, X2DFDError
from x2dfd.faces import find_faces
from x2dfd.manifest import Sample
from x2dfd.tower import training_view

Floats = NDArray[np.float64]

FITTED = Calibration(
    weights={"mllm": 0.5, "blending": 1.0, "clip": 0.0},
    means={"mllm": 1.0, "blending": -2.0, "clip": 0.3},
    bias=0.2,
    low=0.35,
    high=0.7,
    mllm_threshold=0.8,
    fitted_on={"n": 12},
)


def simulate(n: int, weights: dict[str, float], bias: float, seed: int = 0) -> tuple[dict[str, Floats], Floats]:
    """Logits of each part, and labels drawn from the logistic with these weights."""
    rng = np.random.default_rng(seed)
    parts = {name: rng.normal(0.5, 1.2, n) for name in weights}
    total = bias + sum(w * (parts[name] - parts[name].mean()) for name, w in weights.items())
    return parts, (rng.random(n) < 1 / (1 + np.exp(-total))).astype(float)


def test_known_weights_are_found() -> None:
    """A slip in gradient or Hessian converges to other weights without a word."""
    true = {"mllm": 0.4, "blending": 1.5, "clip": 0.8}
    parts, labels = simulate(20_000, true, -0.7)
    weights, means, bias = fit_weights(parts, labels, np.ones(len(labels)), ridge=0.0)
    assert weights == pytest.approx(true, abs=0.07)
    assert bias == pytest.approx(-0.7, abs=0.05)
    assert means == pytest.approx({k: v.mean() for k, v in parts.items()}, abs=0.01)


@pytest.mark.parametrize("ridge", [0.005, 0.02, 0.2])
def test_the_fit_agrees_with_scikit_learn(ridge: float) -> None:
    """An independent solver must find the same optimum, sample weights and penalty included."""
    parts, labels = simulate(600, {"mllm": 0.7, "blending": 1.1}, 0.3, seed=1)
    sample_weights = np.where(labels == 1, 3.0, 1.0) * np.random.default_rng(2).uniform(0.5, 1.5, len(labels))
    weights, means, bias = fit_weights(parts, labels, sample_weights, ridge=ridge)
    assert min(weights.values()) > 0  # no weight at its bound, so the two problems are the same
    # Ours: mean loss + ridge/2 |w|^2; scikit-learn's: C * summed loss + 1/2 |w|^2, with weights that sum to 1.
    oracle = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000)
    x = np.stack([np.clip(v, -6, 6) - means[k] for k, v in parts.items()], 1)
    oracle.fit(x, labels, sample_weight=sample_weights / sample_weights.sum())
    np.testing.assert_allclose([*weights.values(), bias], [*oracle.coef_[0], oracle.intercept_[0]], atol=1e-4)


def test_a_part_that_points_the_wrong_way_gets_no_weight() -> None:
    """A negative weight would call a face real because an expert called it fake."""
    parts, labels = simulate(2_000, {"mllm": 1.0, "blending": -1.0}, 0.0)
    weights, _, _ = fit_weights(parts, labels, np.ones(len(labels)))
    assert weights["blending"] == 0.0
    alone, _, _ = fit_weights({"mllm": parts["mllm"]}, labels, np.ones(len(labels)))
    assert weights["mllm"] == pytest.approx(alone["mllm"], abs=1e-6)


def test_a_part_that_only_repeats_another_gets_no_negative_weight() -> None:
    """Two experts that look alike: by itself each helps, but beside the better one the worse would be subtracted."""
    rng = np.random.default_rng(4)
    good = rng.normal(0, 1.5, 4_000)
    copy = good + rng.normal(0, 0.4, 4_000)
    labels = (rng.random(4_000) < 1 / (1 + np.exp(-(2.5 * good - 1.2 * copy)))).astype(float)
    weights, _, _ = fit_weights({"good": good, "copy": copy}, labels, np.ones(4_000))
    alone, _, _ = fit_weights({"good": good}, labels, np.ones(4_000))
    assert weights["copy"] == 0.0
    assert weights["good"] == pytest.approx(alone["good"], abs=1e-6)


def test_classes_that_a_part_separates_give_finite_weights() -> None:
    """Without the penalty, the weight of a perfect expert runs off to infinity."""
    labels = np.repeat([0.0, 1.0], [90, 10])
    weights, _, bias = fit_weights({"perfect": labels * 12 - 6, "mllm": labels - 0.5}, labels, np.ones(100))
    assert all(0 < w < 10 for w in weights.values())
    assert math.isfinite(bias)


def test_a_missing_score_in_fitting_is_its_mean() -> None:
    """NaN must neither spread into the weights nor count as evidence."""
    parts, labels = simulate(3_000, {"mllm": 0.8, "blending": 1.2}, 0.0)
    gaps = np.random.default_rng(3).random(3_000) < 0.3
    holed = {**parts, "blending": np.where(gaps, np.nan, parts["blending"])}
    filled = {**parts, "blending": np.where(gaps, np.nanmean(holed["blending"]), parts["blending"])}
    got, wanted = (fit_weights(p, labels, np.ones(3_000)) for p in (holed, filled))
    assert got[0] == pytest.approx(wanted[0], abs=1e-6)
    assert got[1]["blending"] == pytest.approx(np.nanmean(holed["blending"]), abs=1e-6)


def test_a_missing_score_neither_accuses_nor_clears_where_most_pictures_are_fakes() -> None:
    """A plain mean over twice as many fakes as reals, in place of a score, says fake of whatever has none."""
    rng = np.random.default_rng(8)
    labels = np.repeat([0.0, 1.0], [300, 1500])
    parts = {"mllm": rng.normal(2 * labels - 1, 1.0)}
    even = np.where(labels == 1, 1 / 1500, 1 / 300)
    weights, means, bias = fit_weights(parts, labels, even)
    assert means["mllm"] == pytest.approx(np.average(parts["mllm"], weights=even))
    assert Calibration(weights, means, bias, 0.4, 0.6).probability({}) == pytest.approx(0.5, abs=0.05)


def test_a_part_that_never_scored_is_left_out() -> None:
    """An expert that failed on all pictures would turn every probability into NaN."""
    parts, labels = simulate(500, {"mllm": 1.0}, 0.0)
    weights, means, bias = fit_weights({**parts, "dead": np.full(500, np.nan)}, labels, np.ones(500))
    assert weights["dead"] == 0.0
    p = Calibration(weights, means, bias, 0.4, 0.6).probability({"mllm": 1.0, "dead": None})
    assert 0 < p < 1


# --- probability and verdict -----------------------------------------------------------------------------------------


def test_probability_is_the_logistic_of_the_centred_parts() -> None:
    """The number is small enough to compute by hand; so it is."""
    total = 0.2 + 0.5 * (2.0 - 1.0) + 1.0 * (-1.0 + 2.0)
    got = FITTED.probability({"mllm": 2.0, "blending": -1.0, "clip": 5.0})
    assert got == pytest.approx(1 / (1 + math.exp(-total)))
    assert FITTED.probability({"mllm": 99.0, "blending": -99.0}) == FITTED.probability({"mllm": 6.0, "blending": -6.0})


def test_a_missing_expert_stands_at_its_mean() -> None:
    """A missing score at 0 would accuse or clear, depending on where the expert's scores usually lie."""
    absent = FITTED.probability({"mllm": 2.0})
    assert absent == FITTED.probability({"mllm": 2.0, "blending": None})
    assert absent == pytest.approx(FITTED.probability({"mllm": 2.0, "blending": -2.0}))
    assert absent != pytest.approx(FITTED.probability({"mllm": 2.0, "blending": 0.0}), abs=0.05)


def test_a_one_sided_part_accuses_but_does_not_clear() -> None:
    """Bug prevented: an expert for generated faces that talks a face swap down to "real"."""
    fitted = replace(FITTED, weights={"mllm": 0.5, "clip": 1.0}, floors={"clip": -0.5})
    at, below, far = (fitted.probability({"mllm": 1.0, "clip": x}) for x in (-0.5, -1.0, -5.0))
    assert at == below == far < fitted.probability({"mllm": 1.0, "clip": 0.5})
    # At its floor it abstains: that it found no generated face contradicts nobody.
    assert fitted.spread({"mllm": 9.0, "clip": -5.0}) == fitted.spread({"mllm": 9.0, "clip": -0.5}) == 0.0
    assert fitted.spread({"mllm": -9.0, "clip": 3.0}) > 0.9


def test_the_fit_sees_floored_logits() -> None:
    """Bug prevented: weights and means of other numbers than those that are counted when a verdict is given."""
    parts, labels = simulate(4000, {"mllm": 0.5, "clip": 1.0}, 0.0)
    floor = choose_floor(parts["clip"], labels)
    assert floor is not None
    assert np.mean(parts["clip"][labels == 0] < floor) == pytest.approx(FLOOR_SHARE, abs=0.01)
    cut = parts | {"clip": np.maximum(parts["clip"], floor)}
    assert fit_weights(parts, labels, np.ones(4000), floors={"clip": floor}) == fit_weights(cut, labels, np.ones(4000))
    assert choose_floor(np.full(4000, np.nan), labels) is None


@pytest.mark.parametrize(("p", "bound"), [(0.0, 1e-6), (1.0, 1 - 1e-6), (0.25, 0.25)])
def test_logit_is_bounded(p: float, bound: float) -> None:
    """An expert that says exactly 0 or 1 must not stop the run."""
    assert logit(p) == pytest.approx(math.log(bound / (1 - bound)))


@pytest.mark.parametrize(
    ("p", "label", "reason"),
    [
        (0.0, "real", None), (0.3499, "real", None), (0.35, "inconclusive", "in_band"),
        (0.6999, "inconclusive", "in_band"), (0.70, "fake", None), (1.0, "fake", None),
    ],
)  # fmt: skip
def test_verdict_labels_at_their_bounds(p: float, label: str, reason: str | None) -> None:
    """Off by one side of a bound, and the promised false-alarm rate is another."""
    verdict = FITTED.verdict(p, {})
    assert (verdict.label, verdict.p_fake, verdict.reason) == (label, p, reason)


def test_disagreement_is_the_reason_only_where_parts_that_count_disagree() -> None:
    """A reader is told why: two opposed experts are another thing than two lukewarm ones."""
    assert FITTED.verdict(0.5, {"mllm": 6.0, "blending": -6.0}).reason == "experts_disagree"
    assert FITTED.verdict(0.5, {"mllm": 1.5, "blending": -1.5}).reason == "in_band"
    assert FITTED.verdict(0.5, {"mllm": 6.0, "clip": -6.0}).reason == "in_band"  # clip has no weight
    assert FITTED.verdict(0.5, {"mllm": 6.0, "blending": None}).reason == "in_band"
    assert FITTED.verdict(0.9, {"mllm": 6.0, "blending": -6.0}).label == "fake"


def test_disagreement_withholds_a_verdict_only_where_the_calibration_says_so() -> None:
    """Two experts sure of opposite things, and a sure verdict: the reader is told nothing of the quarrel."""
    opposed: dict[str, float | None] = {"mllm": 6.0, "blending": -6.0}
    strict = replace(FITTED, disagreement=0.9)
    for p in (0.1, 0.9):
        assert FITTED.verdict(p, opposed).label != "inconclusive"  # files without the field keep their verdicts
        withheld = strict.verdict(p, opposed)
        assert (withheld.label, withheld.p_fake, withheld.reason) == ("inconclusive", p, "experts_disagree")
    assert strict.verdict(0.9, {"mllm": 6.0, "blending": 1.0}).label == "fake"
    assert strict.verdict(0.9, {"mllm": 6.0, "clip": -6.0}).label == "fake"  # clip has no weight
    assert strict.verdict(0.9, {}).label == "fake"
    assert strict.verdict(0.5, {"mllm": 1.0, "blending": -2.0}).reason == "in_band"


def test_the_spread_is_of_each_part_against_its_mean() -> None:
    """An expert that usually says .1 and says .3 now is on the other side than one that usually says .9."""
    spread = FITTED.spread({"mllm": 1.0 + math.log(3), "blending": -2.0 - math.log(3), "clip": 9.0, "other": 9.0})
    assert spread == pytest.approx(0.75 - 0.25)
    assert FITTED.spread({"mllm": 3.0, "blending": None}) == FITTED.spread({}) == 0.0


# --- the band --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_band_keeps_its_promises_on_the_fitting_data(seed: int) -> None:
    """The bound on false alarms holds in every source, however bad a source is, and however small the rest."""
    rng = np.random.default_rng(seed)
    sizes = {"a": 200, "b": 37, "c": 20}
    harsh = seed % 3  # in some draws nearly all real pictures of a source look fake
    real = {s: 1 / (1 + np.exp(-rng.normal(-2 + 4 * harsh * (s == "b"), 2, n))) for s, n in sizes.items()}
    fake = 1 / (1 + np.exp(-rng.normal(rng.uniform(-1, 3), 2, 15 + 40 * seed)))
    p = np.concatenate([*real.values(), fake])
    labels = np.concatenate([np.zeros(sum(sizes.values())), np.ones(len(fake))])
    sources = [s for s, n in sizes.items() for _ in range(n)] + ["a"] * len(fake)
    low, high = choose_band(p, labels, sources, false_alarms=0.05, misses=0.10)
    for scores in real.values():
        assert (scores >= high).mean() <= 0.05
    assert (fake < low).mean() <= 0.10
    assert 0 <= low <= high
    assert low <= 0.5 <= high


def test_a_source_that_is_nearly_always_called_fake_still_bounds_the_alarms() -> None:
    """A cap on `high` below the scores of a bad source would break the promise exactly where it matters."""
    p = np.concatenate([np.full(50, 0.999), np.linspace(0, 0.3, 50), np.linspace(0.9, 1.0, 40)])
    labels = np.repeat([0.0, 1.0], [100, 40])
    sources = ["scanner"] * 50 + ["camera"] * 50 + [""] * 40
    _, high = choose_band(p, labels, sources)
    assert (p[:50] >= high).mean() <= 0.05


def test_small_sources_are_pooled_when_no_source_is_large() -> None:
    """With a handful of pictures a source, each one's 5 % is nothing; all together they still bound `high`."""
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(0, 1, 60), rng.uniform(0.5, 1, 60)])
    labels = np.repeat([0.0, 1.0], [60, 60])
    _, high = choose_band(p, labels, [f"s{i // 6}" for i in range(120)])
    assert (p[:60] >= high).mean() <= 0.05
    assert high > 0.9


def test_small_sources_beside_a_large_one_bound_the_alarms_together() -> None:
    """A camera with a dozen pictures has a say as soon as a few like it make twenty."""
    rng = np.random.default_rng(1)
    large, small, fakes = rng.uniform(0, 0.4, 100), rng.uniform(0.3, 0.8, 24), rng.uniform(0.6, 1, 60)
    p, labels = np.concatenate([large, small, fakes]), np.repeat([0.0, 1.0], [124, 60])
    sources = ["large"] * 100 + ["selfie"] * 12 + ["studio"] * 12 + [""] * 60
    _, high = choose_band(p, labels, sources)
    assert (small >= high).mean() <= 0.05
    # Too few even together: they count among all reals.
    _, high = choose_band(
        np.delete(p, slice(105, 124)), np.delete(labels, slice(105, 124)), ["large"] * 105 + [""] * 60
    )
    assert high <= 0.8


def test_well_separated_scores_leave_hardly_any_band() -> None:
    """A band where none is needed would withhold verdicts that are certain."""
    p = np.concatenate([np.linspace(0, 0.1, 100), np.linspace(0.9, 1, 100)])
    assert choose_band(p, np.repeat([0.0, 1.0], [100, 100]), ["a"] * 200) == (0.5, 0.5)


def test_a_camera_that_was_not_calibrated_on_bounds_the_alarms_too() -> None:
    """5 % of the cameras that were there is not what users ask: they come with another one."""
    rng = np.random.default_rng(2)
    # What one part takes for a forgery is a camera's own: fitted with the camera, that part hardly counts.
    n = 150
    usual, odd, fakes = (rng.normal(m, 1, (n, 2)) for m in ((-2, -2), (-2, 3), (2, 2)))
    logits, labels = np.concatenate([usual, odd, fakes]), np.repeat([0.0, 0.0, 1.0], n)
    sources, parts = ["usual"] * n + ["odd"] * n + ["usual"] * n, {"mllm": logits[:, 0], "clip": logits[:, 1]}
    # Two more sources of fakes, so that each of the reals can be left out.
    sources[2 * n : 2 * n + 50] = ["odd"] * 50
    told = chances_of_sources_left_out(parts, labels, sources, np.ones(3 * n))
    assert set(told) == {"odd", "usual"} and len(told["odd"]) == n
    fitted = fit_calibration(parts, labels, sources, np.ones(3 * n))
    seen = np.array([fitted.probability({"mllm": a, "clip": b}) for a, b in logits[n : 2 * n]])
    assert (told["odd"] >= fitted.high).mean() <= 0.1 and (seen >= fitted.high).mean() <= 0.05
    low, high = choose_band(np.array([fitted.probability({"mllm": a, "clip": b}) for a, b in logits]), labels, sources)
    assert fitted.high > high and fitted.low == low


def test_a_part_that_knows_only_what_it_has_met_gets_no_weight() -> None:
    """Bug prevented: an expert that recognises the development pictures accuses every camera that is new to it."""
    parts, labels = simulate(2000, {"mllm": 1.0, "clip": 2.0}, 0.0)
    sources, even = ["a", "b"] * 1000, np.ones(2000)
    seen = fit_calibration(parts, labels, sources, even)
    assert fit_calibration(parts, labels, sources, even, unseen=parts) == seen  # as good on what is new to it
    unseen = parts | {"clip": np.full(2000, 3.0)}  # what it does not know it calls fake
    new = fit_calibration(parts, labels, sources, even, unseen=unseen)
    lost = parts | {"clip": -parts["clip"]}
    none = fit_calibration(parts, labels, sources, even, unseen=lost)
    assert 0.1 * seen.weights["clip"] < new.weights["clip"] < 0.8 * seen.weights["clip"]
    assert none.weights["clip"] == 0.0 and none.weights["mllm"] > 0.4
    # The bound on a camera that was left out is taken from what the parts say of it then.
    told = chances_of_sources_left_out(parts, labels, sources, even, unseen=unseen)
    assert max((p >= new.high).mean() for p in told.values()) <= 0.1
    assert np.mean(told["a"]) > np.mean(chances_of_sources_left_out(parts, labels, sources, even)["a"]) + 0.1


def test_fakes_of_a_generator_that_nothing_met_are_seldom_called_real() -> None:
    """Bug prevented: a band that promises few misses by pictures of generators that the MLLM knows by heart."""
    parts, labels = simulate(2000, {"mllm": 1.0, "consistency": 1.0}, 0.0)
    sources = np.array(["film"] * 2000, object)
    made = (labels == 1) & (np.arange(2000) % 2 == 0)
    sources[made] = "gan"
    parts["mllm"][made] += 3.0
    unseen = {"mllm": parts["mllm"] - 5.0 * made, "consistency": parts["consistency"]}
    even = np.ones(2000)
    new = fit_calibration(parts, labels, sources.tolist(), even, unseen=unseen)
    told = chances_of_sources_left_out(parts, labels, sources.tolist(), even, unseen=unseen, fakes=True)
    assert set(told) == {"gan"} and len(told["gan"]) == made.sum()  # without "film" there are no reals
    assert max((p < new.low).mean() for p in told.values()) == pytest.approx(0.2, abs=0.01)
    chances = np.array([new.probability({n: float(v[k]) for n, v in parts.items()}) for k in range(2000)])
    assert (chances[labels == 1] < new.low).mean() < 0.05  # where they are known the bound of a tenth is slack


def test_each_picture_is_judged_by_what_never_saw_its_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: "unseen" scores from experts that learnt from the source, or a prompt that holds theirs."""
    kinds = [("real", "none", "a"), ("real", "none", "b"), ("fake", "gan", "made"), ("fake", "swap", "a")]
    samples = [
        Sample(str(k), Path("x"), label, method, "EFS" if method == "gan" else "", source, str(k), "calib")  # type: ignore[arg-type]
        for k, (label, method, source) in enumerate(kinds * 2)
    ]
    crops = CropSet(samples, np.zeros((8, 1, 1, 3), np.uint8), np.zeros((8, 468, 2), np.float32), {})

    def expert(sha256: str, held_out: list[str]) -> SimpleNamespace:
        card = replace(tiny.Brightness.card, sha256=sha256, figures={"held_out": held_out})
        return SimpleNamespace(card=card)

    def load(name: str, folder: Path) -> SimpleNamespace:
        return expert(folder.name, [folder.name] if folder.name != "b" else [])

    asked: list[tuple[str, str, list[int]]] = []

    def scored(detector: Any, _: CropSet, rows: list[int], seed: int, *, all_score: bool) -> dict[str, Floats]:
        assert not all_score  # an expert may abstain on all of one source
        asked.append((detector.mllm, detector.experts[0].card.sha256, rows))
        return {name: np.full(len(rows), 1.0 + len(asked)) for name in ("mllm", tiny.EXPERT)}

    monkeypatch.setattr("finetune.calibrate.load_expert", load)
    monkeypatch.setattr("finetune.calibrate.score_parts", scored)
    monkeypatch.setattr(
        "finetune.calibrate.Detector", lambda mllm, experts, *_: SimpleNamespace(mllm=mllm, experts=experts)
    )
    shipped = SimpleNamespace(mllm="shipped", experts=[expert("shipped", [])], facts={})
    card = AdapterCard("a", "1", "", "", "of shipped", "", "", "", score_form="words")
    adapters = {"half": replace(card, left_out=("b", "gan", "elsewhere"), sha256="of half")}
    monkeypatch.setattr("finetune.calibrate.read_adapter_card", lambda path: adapters[path.name])
    monkeypatch.setattr("finetune.calibrate.load", lambda path, mode, experts: SimpleNamespace(mllm=path.name))
    parts = {name: np.zeros(7) for name in ("mllm", tiny.EXPERT)}
    rows = [0, 1, 2, 3, 4, 6, 7]  # crops; the scores stand in this order
    origins = [s.origin for s in samples] + [""]

    def trained() -> dict[str, Without]:
        return trained_without(tmp_path, origins, [tiny.EXPERT], card)

    with pytest.raises(X2DFDError, match="trained without any of , a, b, gan"):
        trained()
    for origin in ("a", "gan"):
        (tmp_path / origin).mkdir()
        (tmp_path / origin / f"{tiny.EXPERT}.card.json").touch()
    without = trained()
    assert {o: list(w.experts) for o, w in without.items()} == {"a": [tiny.EXPERT], "gan": [tiny.EXPERT]}
    told = score_unseen(shipped, parts, crops, rows, without, 1)  # type: ignore[arg-type]
    assert asked == [("shipped", "a", [0, 3, 4, 7]), ("shipped", "gan", [2, 6])]
    for name in ("mllm", tiny.EXPERT):
        assert told[name].tolist() == [2, 0, 3, 2, 2, 3, 2] and not parts[name].any()
    asked.clear()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "card.json").touch()
    without = trained()
    assert {o: w.hashes() for o, w in without.items()} == {
        "a": {tiny.EXPERT: "a"}, "b": {"mllm": "of half"}, "gan": {tiny.EXPERT: "gan", "mllm": "of half"}
    }  # fmt: skip
    score_unseen(shipped, parts, crops, rows, without, 1)  # type: ignore[arg-type]
    assert sorted(asked) == [("half", "gan", [2, 6]), ("half", "shipped", [1]), ("shipped", "a", [0, 3, 4, 7])]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "card.json").touch()
    for left_out, reason in ((), "does not say that it never saw any"), (("gan",), "trained without gan too"):
        adapters["other"] = replace(card, left_out=left_out)
        with pytest.raises(X2DFDError, match=reason):
            trained()
    for changed in {"tower": "lora"}, {"experts": {"clip": "x"}}, {"text_layers": 3}:
        adapters["other"] = replace(card, left_out=("a",), **changed)
        with pytest.raises(X2DFDError, match=f"other differs from the calibrated one in {next(iter(changed))}"):
            trained()
    adapters["other"] = replace(card, left_out=("a",))
    (tmp_path / "other").rename(tmp_path / "a2")
    adapters["a2"] = adapters["other"]
    assert trained()["a"].adapter == tmp_path / "a2"
    (tmp_path / "b").mkdir()
    with pytest.raises(X2DFDError, match="holds no weights"):
        trained()
    (tmp_path / "b" / f"{tiny.EXPERT}.card.json").touch()
    with pytest.raises(X2DFDError, match="does not say that it never saw b"):
        trained()


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_saved_calibration_comes_back_whole(tmp_path: Path) -> None:
    """The same picture must get the same probability tomorrow."""
    FITTED.save(tmp_path)
    assert Calibration.load(tmp_path) == FITTED


@pytest.mark.parametrize(
    "broken",
    [
        "", "{", "[]", "null", "{}", '{"weights": {}}', json.dumps({**FITTED.__dict__, "extra": 1}),
        json.dumps({**FITTED.__dict__, "means": {"mllm": 0.0}}), json.dumps({**FITTED.__dict__, "bias": "0.2"}),
        json.dumps({**FITTED.__dict__, "weights": ["mllm"]}), json.dumps({**FITTED.__dict__, "bias": float("nan")}),
        json.dumps({**FITTED.__dict__, "low": 0.9}), json.dumps({**FITTED.__dict__, "disagreement": 1.5}),
        json.dumps({**FITTED.__dict__, "disagreement": "0.6"}), "[" * 100_000,
        json.dumps({**FITTED.__dict__, "high": 9}),
        json.dumps({**FITTED.__dict__, "low": -5}), json.dumps({**FITTED.__dict__, "mllm_threshold": 2}),
        json.dumps({**FITTED.__dict__, "weights": {"mllm": -1.0}}), json.dumps({**FITTED.__dict__, "bias": 1e300}),
        json.dumps({**FITTED.__dict__, "floors": {"mllm": "low"}}), json.dumps({**FITTED.__dict__, "fitted_on": []}),
        json.dumps({**FITTED.__dict__, "fitted_on": {"experts": ["clip"]}}),
        json.dumps({**FITTED.__dict__, "fitted_on": {"false_alarms_per_source": {"ffhq": {"rate": -3, "n": 9}}}}),
        json.dumps(FITTED.__dict__).replace('"bias"', '"high": 0.5, "bias"'),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_the_command_that_mends_it(tmp_path: Path, broken: str) -> None:
    """A calibration that is half there must fail when it is loaded, not in the middle of a run."""
    (tmp_path / "calibration.json").write_text(broken)
    with pytest.raises(SetupError, match=r"python -m finetune\.calibrate"):
        Calibration.load(tmp_path)


def test_an_absent_file_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    """An adapter without its last step gives no percentage."""
    with pytest.raises(SetupError, match=r"python -m finetune\.calibrate"):
        Calibration.load(tmp_path)


def test_later_fields_may_be_absent(tmp_path: Path) -> None:
    """Files written before a field with a default existed stay readable."""
    FITTED.save(tmp_path)
    path = tmp_path / "calibration.json"
    edit_json(path)
    data: dict[str, Any] = json.loads(path.read_text())
    del data["fitted_on"], data["mllm_threshold"], data["disagreement"]
    path.write_text(json.dumps(data))
    assert Calibration.load(tmp_path).mllm_threshold == 0.5
    assert Calibration.load(tmp_path).disagreement is None


def test_a_mirrored_view_keeps_its_landmarks_on_the_face() -> None:
    """Bug prevented: experts that pool by area calibrated on the other side's areas."""
    [face] = find_faces(np.array(skimage.data.astronaut()))
    crops = CropSet(
        [Sample(str(k), Path("x"), "real", group=str(k)) for k in range(8)],
        np.repeat(face.crop[None], 8, 0),
        np.repeat(face.crop_landmarks[None], 8, 0),
        {},
    )
    flips = [training_view(face.crop, 1, k)[1] for k in range(8)]
    assert any(flips) and not all(flips)
    for k, flipped in enumerate(flips):
        told = _face(crops, k, 1).crop_landmarks
        wanted = 223 - face.crop_landmarks[:, 0] if flipped else face.crop_landmarks[:, 0]
        assert np.allclose(told[:, 0], wanted) and np.allclose(told[:, 1], face.crop_landmarks[:, 1])
    assert np.array_equal(_face(crops, 0, None).crop, face.crop)


def test_methods_kept_for_figures_on_unseen_ones_are_not_calibrated_on() -> None:
    """Bug prevented: a band that was set with the methods whose figures are said to be of unseen ones."""
    methods = ["", "swap", "relight", "swap+relight"]
    samples = [Sample(m or "real", Path("x"), "fake" if m else "real", m, group=m, split="calib") for m in methods]
    crops = CropSet(samples, np.zeros((4, 1, 1, 3), np.uint8), np.zeros((4, 468, 2), np.float32), {})
    assert _chosen(crops, "calib", None, ("relight",)) == [0, 1]


def test_the_file_counts_verdicts_as_they_will_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alarms and finds counted before disagreement withholds some promise what nobody will see."""
    parts, labels = simulate(400, {"mllm": 1.0, "blending": 2.0}, 0.0)
    samples = [
        Sample(str(i), Path("x"), "fake" if y else "real", source="s", group=str(i), split="calib")
        for i, y in enumerate(labels)
    ]
    crops = CropSet(samples, np.zeros((400, 1, 1, 3), np.uint8), np.zeros((400, 468, 2), np.float32), {})
    stand_ins = {
        "load_crops": lambda data: crops,
        "read_adapter_card": lambda folder: AdapterCard("a", "1", "", "", "", "", "", ""),
        "load": lambda adapter, **told: SimpleNamespace(experts=[tiny.Brightness()]),
        "score_parts": lambda detector, crops, rows, seed: parts,
        "manifest_sha256": lambda data: "0" * 64,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"finetune.calibrate.{name}", stand_in)
    plain, strict = calibrate(tmp_path, tmp_path), calibrate(tmp_path, tmp_path, disagreement=0.7)
    assert Calibration.load(tmp_path) == strict
    assert replace(strict, disagreement=None, fitted_on={}) == replace(plain, fitted_on={})
    rows = [{name: float(v[i]) for name, v in parts.items()} for i in range(400)]
    for result in (plain, strict):
        said = np.array([result.verdict(result.probability(row), row).label for row in rows])
        assert result.fitted_on["inconclusive"] == pytest.approx((said == "inconclusive").mean(), abs=1e-4)
        assert result.fitted_on["fakes_found"] == pytest.approx((said[labels == 1] == "fake").mean(), abs=1e-4)
        alarms = (said[labels == 0] == "fake").mean()
        assert result.fitted_on["false_alarms_per_source"]["s"]["rate"] == pytest.approx(alarms, abs=1e-4)
    assert strict.fitted_on["experts"] == {tiny.EXPERT: tiny.Brightness.card.sha256}
    assert strict.fitted_on["inconclusive"] > plain.fitted_on["inconclusive"] + 0.01
    with pytest.raises(X2DFDError, match="between 0 and 1"):
        calibrate(tmp_path, tmp_path, disagreement=1.0)
    assert plain.fitted_on["fitted_also_unseen"] == {}
    # With what an expert says of a source that is new to it.
    card = replace(tiny.Brightness.card, sha256="e" * 64, figures={"held_out": ["s"]})
    monkeypatch.setattr("finetune.calibrate.load_expert", lambda name, folder: SimpleNamespace(card=card))
    monkeypatch.setattr(
        "finetune.calibrate.score_unseen", lambda d, p, *_: p | {"blending": np.where(labels == 1, -2.0, 2.0)}
    )
    (tmp_path / "left" / "s").mkdir(parents=True)
    (tmp_path / "left" / "s" / f"{tiny.EXPERT}.card.json").touch()
    new = calibrate(tmp_path, tmp_path, unseen=tmp_path / "left")
    assert new.fitted_on["fitted_also_unseen"] == {"s": {tiny.EXPERT: "e" * 64}}
    assert new.weights["blending"] < 0.1 < plain.weights["blending"]
    assert not capsys.readouterr().err
    calibrate(tmp_path, tmp_path)  # it would trust the expert again, and nobody would know why
    assert "without --unseen" in capsys.readouterr().err


def test_experts_that_were_added_stay_until_they_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a second calibration without `--add` silently loses the expert of the first."""
    asked: list[list[str]] = []
    known, labels = simulate(200, {"mllm": 1.0, "blending": 1.0, "clip": 1.0, "mine": 1.0}, 0.0)
    samples = [
        Sample(str(i), Path("x"), "fake" if y else "real", source="s", group=str(i)) for i, y in enumerate(labels)
    ]
    samples = [replace(s, split="calib") for s in samples]
    crops = CropSet(samples, np.zeros((200, 1, 1, 3), np.uint8), np.zeros((200, 468, 2), np.float32), {})

    def load(adapter: Path, **told: Any) -> SimpleNamespace:
        asked.append(told["experts"])
        return SimpleNamespace(experts=[])

    stand_ins = {
        "load_crops": lambda data: crops,
        "read_adapter_card": lambda folder: AdapterCard("a", "1", "", "", "", "", "", "", experts={"blending": "0"}),
        "load": load,
        "score_parts": lambda *_: {name: known[name] for name in ("mllm", *asked[-1])},
        "manifest_sha256": lambda data: "0" * 64,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(f"finetune.calibrate.{name}", stand_in)
    calibrate(tmp_path, tmp_path, add=["mine"])
    calibrate(tmp_path, tmp_path)
    calibrate(tmp_path, tmp_path, add=["clip"])
    calibrate(tmp_path, tmp_path, drop=["mine"])
    assert asked == [["blending", "mine"], ["blending", "mine"], ["blending", "mine", "clip"], ["blending", "clip"]]
    assert set(Calibration.load(tmp_path).weights) == {"mllm", "blending", "clip"}
    for name in ("mine", "blending"):  # gone already; and the prompt needs it
        with pytest.raises(UnknownName, match="added expert"):
            calibrate(tmp_path, tmp_path, drop=[name])
