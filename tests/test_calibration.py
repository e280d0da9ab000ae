"""The one number a reader acts on: fitted right, bounded as promised, and deaf to parts on what they cannot see."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner, Result

import x2dfd.run_calibrate
from eval.tasks.detect import seen_at_fit
from external_detectors.train.probe import probe
from external_detectors.train.tower import tower
from tests import tiny
from tests.raising import raises
from x2dfd import cli
from x2dfd.calibration import (
    SMALL,
    Calibration,
    Logistic,
    balance,
    choose_band,
    fit_calibration,
    fit_logistic,
    kind_of,
    logit,
    logits_of,
    probabilities,
)
from x2dfd.crops import CropSet
from x2dfd.errors import SetupError
from x2dfd.experts import BUILTIN, Shared, read_card, write_card
from x2dfd.faces import find_faces
from x2dfd.loading import load
from x2dfd.manifest import Sample, manifest_sha256, read_manifest, write_manifest
from x2dfd.run_calibrate import calibrate, face_of, held_out_in
from x2dfd.tower import degraded_view
from x2dfd.types import MLLM, Evidence, Face

Floats = NDArray[np.float64]

WHOLE = Logistic({"tower": 0.8}, {"tower": -1.0}, 0.2)
PART = Logistic({MLLM: 0.5, "tower": 1.0, "idle": 0.0}, {MLLM: 1.0, "tower": -2.0, "idle": 0.3}, -0.4)
EXPERTS = {"tower": "a" * 64, "idle": "b" * 64}
FITTED = Calibration(
    {"whole": WHOLE, "part": PART}, low=0.35, high=0.7, mllm_threshold=0.8, fitted_on={"n": 12, "experts": EXPERTS}
)


def simulate(n: int, weights: dict[str, float], bias: float, seed: int = 0) -> tuple[dict[str, Floats], Floats]:
    """Logits of each part, and labels drawn from the logistic with these weights."""
    rng = np.random.default_rng(seed)
    logits = {name: rng.normal(0.5, 1.2, n) for name in weights}
    total = bias + sum(w * (logits[name] - logits[name].mean()) for name, w in weights.items())
    return logits, (rng.random(n) < 1 / (1 + np.exp(-total))).astype(float)


def test_a_part_that_is_wrong_silent_or_perfect_spoils_no_weight() -> None:
    """A negative weight would call a face real because an expert called it fake; NaN must neither spread nor count as
    evidence; without the penalty, the weight of a perfect expert runs off to infinity."""
    logits, labels = simulate(2_000, {MLLM: 1.0, "tower": -1.0}, 0.0)
    alone = fit_logistic({MLLM: logits[MLLM]}, labels, np.ones(2_000))
    found = fit_logistic(logits, labels, np.ones(2_000))
    assert found.weights["tower"] == 0.0 and found.weights[MLLM] == pytest.approx(alone.weights[MLLM], abs=1e-3)
    holed = np.where(np.random.default_rng(3).random(2_000) < 0.3, np.nan, logits[MLLM])
    filled = np.where(np.isnan(holed), np.nanmean(holed), holed)
    got, wanted = (fit_logistic({MLLM: v}, labels, np.ones(2_000)) for v in (holed, filled))
    assert got.weights == pytest.approx(wanted.weights, abs=1e-4)
    assert got.means[MLLM] == pytest.approx(np.nanmean(holed), abs=1e-6)
    dead = {kind: {MLLM: logits[MLLM], "dead": np.full(2_000, np.nan)} for kind in ("whole", "part")}
    fitted = fit_calibration(dead, ["part" if y else "" for y in labels], ["a"] * 2_000)
    assert fitted.weights.get("dead", 0.0) == 0.0
    assert 0 < fitted.probability({"part": {MLLM: 1.0, "dead": 5.0}}) < 1
    sure = np.repeat([0.0, 1.0], [90, 10])
    perfect = fit_logistic({"perfect": sure * 12 - 6, MLLM: sure - 0.5}, sure, np.ones(100))
    assert all(0 < w < 10 for w in perfect.weights.values()) and math.isfinite(perfect.bias)


def test_a_missing_score_neither_accuses_nor_clears_where_most_pictures_are_fakes() -> None:
    """A plain mean over twice as many fakes as reals, in place of a score, says fake of whatever has none."""
    labels = np.repeat([0.0, 1.0], [300, 1500])
    logits = {MLLM: np.random.default_rng(8).normal(2 * labels - 1, 1.0)}
    found = fit_logistic(logits, labels, balance(labels, ["a"] * 1800))
    assert found({}) == found({MLLM: None}) == pytest.approx(0.5, abs=0.05)
    assert found({MLLM: found.means[MLLM]}) == found({})
    # A source counts by the root of its size: the largest does not decide alone, nor one picture as much as a thousand.
    labels, sources = np.repeat([0.0, 1.0], [104, 9]), ["big"] * 100 + ["few"] * 4 + ["gan"] * 9
    weights = balance(labels, sources)
    assert weights[labels == 0].sum() == pytest.approx(0.5) and weights[labels == 1].sum() == pytest.approx(0.5)
    assert weights[:100].sum() / weights[100:104].sum() == pytest.approx(10 / 2)


def test_the_odds_of_the_kinds_add_up() -> None:
    """The number is small enough to compute by hand; so it is."""
    logits = {"whole": {"tower": 1.5, MLLM: 9.0}, "part": {MLLM: 2.0, "tower": -1.0, "idle": 5.0}}
    whole = 1 / (1 + math.exp(-(0.2 + 0.8 * (1.5 + 1.0))))
    part = 1 / (1 + math.exp(-(-0.4 + 0.5 * (2.0 - 1.0) + 1.0 * (-1.0 + 2.0))))
    odds = whole / (1 - whole) + part / (1 - part)
    assert FITTED.probability(logits) == pytest.approx(odds / (1 + odds))
    assert FITTED.by_kind(logits) == pytest.approx({"whole": whole, "part": part})
    assert FITTED.weights == {"tower": 1.0, MLLM: 0.5, "idle": 0.0}
    sure = [{kind: {MLLM: by, "tower": by} for kind in ("whole", "part")} for by in (6.0, 99.0)]
    assert FITTED.probability(sure[0]) == FITTED.probability(sure[1])  # beyond 6 is saturation
    assert [logit(p) for p in (0.0, 1.0, 0.25)] == pytest.approx([logit(1e-6), -logit(1e-6), math.log(1 / 3)])
    for p, label in ((0, "real"), (0.3499, "real"), (0.35, "inconclusive"), (0.6999, "inconclusive"), (0.7, "fake")):
        verdict = FITTED.verdict(p, "whole")
        assert (verdict.label, verdict.p_fake) == (label, p)
        assert verdict.reason == ("in_band" if label == "inconclusive" else None)
        assert verdict.kind == ("whole" if label == "fake" else None)


def test_an_expert_speaks_of_what_it_covers_and_of_nothing_else() -> None:
    """Bug prevented: an expert for generated faces that talks a face swap down to "real"."""
    covers = {"gan": ("EFS",), "swap": ("FS", "FR", "real"), "any": ("blur", "jaw blending"), "both": ("FE", "EFS")}
    said = [Evidence(n, 0.1) for n in covers] + [Evidence("told", 0.9, kinds={"whole": 0.8, "part": 0.2})]
    logits = logits_of(1.5, said, covers)
    assert set(logits["whole"]) == {MLLM, "gan", "any", "both", "told"}
    assert set(logits["part"]) == {MLLM, "swap", "any", "both", "told"}
    assert logits["part"][MLLM] == logits["whole"][MLLM] == 1.5
    assert logits["whole"]["told"] == logits["part"]["told"] == logit(0.9)  # `kinds` names a fake; it weighs nothing
    absent = logits_of(None, [Evidence("gan", None, "no crop")], covers)
    assert absent["whole"] == {MLLM: None, "gan": None} and absent["part"] == {MLLM: None}

    one = {name: Logistic({name: 1.0}, {name: 0.0}, -1.0) for name in ("gan", "swap")}
    calibration = Calibration({"whole": one["gan"], "part": one["swap"]}, 0.3, 0.6)
    accused = {"swap": 0.95}
    for cleared in (0.5, 0.1, 1e-6):
        found = logits_of(None, [Evidence(n, p) for n, p in (accused | {"gan": cleared}).items()], covers)
        assert calibration.probability(found) >= one["swap"]({"swap": logit(0.95)}) > 0.8


def test_each_kind_is_fitted_on_its_own_fakes() -> None:
    """Bug prevented: an expert that is blind to one kind loses its weight for the other, or clears it."""
    n, rng = 400, np.random.default_rng(0)
    kinds = ["", "whole", "part"] * n
    of = np.array(kinds)
    one, two = (np.where(of == kind, 3.0, -3.0) + rng.normal(0, 1, 3 * n) for kind in ("whole", "part"))
    logits = {kind: {"gan": one, "swap": two} for kind in ("whole", "part")}
    fitted = fit_calibration(logits, kinds, ["a"] * (3 * n))
    assert fitted.kinds["whole"].weights["gan"] > 5 * fitted.kinds["whole"].weights["swap"]
    assert fitted.kinds["part"].weights["swap"] > 5 * fitted.kinds["part"].weights["gan"]
    chances = probabilities(fitted, logits, 3 * n)
    for kind in ("whole", "part"):
        assert (chances[of == kind] >= fitted.high).mean() > 0.9
    alone = fit_calibration({k: {n: v[of != "whole"] for n, v in p.items()} for k, p in logits.items()},
                            [k for k in kinds if k != "whole"], ["a"] * (2 * n))  # fmt: skip
    assert set(alone.kinds) == {"part"}  # nothing is said of a kind that was not there
    assert (kind_of("EFS"), *map(kind_of, ("FS", "FR", "FE"))) == ("whole", "part", "part", "part")
    with pytest.raises(ValueError, match="not a class of fakes"):
        kind_of("")


@pytest.mark.parametrize("seed", range(6))
def test_the_band_keeps_its_promises_in_every_source(seed: int) -> None:
    """A bound that holds on average is none for who brings the worst camera, or the worst generator."""
    rng = np.random.default_rng(seed)
    harsh = 2.0 * (seed % 3)  # in some draws most real pictures of one source look fake, and its fakes real

    def drawn(middle: float, n: int) -> Floats:
        return np.asarray(1 / (1 + np.exp(-rng.normal(middle, 2, n))))

    groups = [("a", 0, drawn(-2, 200)), ("b", 0, drawn(-2 + harsh, 67)), ("c", 0, drawn(-2, 20))]
    groups += [("a", 1, drawn(2, 120)), ("gan", 2, drawn(2 - harsh, 60 + seed))]
    # Sources of too few pictures for a bound of their own are bounded together.
    groups += [(f"small{k}", label, drawn(4 * label - 1, 9)) for k in range(6) for label in (0, 1)]
    p = np.concatenate([scores for *_, scores in groups])
    kinds = np.concatenate([np.full(len(scores), ("", "part", "whole")[label]) for _, label, scores in groups])
    sources = [name for name, _, scores in groups for _ in scores]
    low, high = choose_band(p, kinds, sources, false_alarms=0.05, misses={"whole": 0.10, "part": 0.20})
    judged: dict[tuple[str, int], list[float]] = defaultdict(list)
    for name, label, scores in groups:
        judged["small" if len(scores) < SMALL else name, label] += list(scores)
    for (_, label), found in judged.items():
        wrong = np.array(found) < low if label else np.array(found) >= high
        assert wrong.mean() <= (0.05, 0.20, 0.10)[label]
    assert 0 <= low <= high <= 1 + 1e-6


def test_the_fit_agrees_with_scikit_learn() -> None:
    """An independent solver must find the same optimum, sample weights and penalty included."""
    logits, labels = simulate(600, {MLLM: 0.7, "tower": 1.1}, 0.3, seed=1)
    weights = np.where(labels == 1, 3.0, 1.0) * np.random.default_rng(2).uniform(0.5, 1.5, len(labels))
    x = np.stack([np.clip(v, -6, 6) for v in logits.values()], 1)
    for ridge in (0.005, 0.02, 0.2):
        found = fit_logistic(logits, labels, weights, ridge=ridge)
        assert min(found.weights.values()) > 0  # no weight at its bound, so the two problems are the same
        # Ours: mean loss + ridge/2 |w|^2; scikit-learn's: C * summed loss + 1/2 |w|^2, with weights that sum to 1.
        oracle = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000)
        oracle.fit(x - [found.means[name] for name in logits], labels, sample_weight=weights / weights.sum())
        wanted = [*oracle.coef_[0], oracle.intercept_[0]]
        np.testing.assert_allclose([*found.weights.values(), found.bias], wanted, atol=1e-3)


def test_the_band_of_odd_sources() -> None:
    """A cap below the scores of a bad source breaks the promise where it matters; with a handful of pictures a source,
    each one's 5 % is nothing, all together they count; a band where none is needed withholds what is certain."""
    for sure in (0.999, 0.9999999, 1.0):
        p = np.concatenate([np.full(50, sure), np.linspace(0, 0.3, 50), np.linspace(0.9, 1.0, 40)])
        kinds, sources = np.repeat(["", "part"], [100, 40]), ["scanner"] * 50 + ["camera"] * 50 + [""] * 40
        low, high = choose_band(p, kinds, sources)
        assert (p[:50] >= high).mean() <= 0.05 and 0 <= low <= high
    rng = np.random.default_rng(0)
    p = np.concatenate([rng.uniform(0, 1, 60), rng.uniform(0.5, 1, 60)])
    _, high = choose_band(p, np.repeat(["", "part"], [60, 60]), [f"s{i // 6}" for i in range(120)])
    assert (p[:60] >= high).mean() <= 0.05 and high > 0.9
    p = np.concatenate([np.linspace(0, 0.1, 100), np.linspace(0.9, 1, 100)])
    low, high = choose_band(p, np.repeat(["", "whole"], [100, 100]), ["a"] * 200)
    assert low == high and 0.1 < low < 0.91


def test_a_saved_calibration_comes_back_whole(tmp_path: Path) -> None:
    """The same picture must get the same probability tomorrow, and another fit another hash."""
    FITTED.save(tmp_path)
    assert Calibration.load(tmp_path) == FITTED
    assert Calibration.load(tmp_path).sha256 == FITTED.sha256 != replace(FITTED, low=0.2).sha256
    data: dict[str, Any] = json.loads((tmp_path / "calibration.json").read_text())
    del data["mllm_threshold"]
    (tmp_path / "calibration.json").write_text(json.dumps(data))
    assert Calibration.load(tmp_path).mllm_threshold == 0.5


def test_sources_may_have_any_name(tmp_path: Path) -> None:
    """Bug prevented: a calibration on pictures of a source called "part" or "rate" is written and never read again."""
    rates = {name: {"rate": 0.1, "n": 10} for name in ("part", "whole", "rate", "answered", "ffhq")}
    facts = {**FITTED.fitted_on, "false_alarms": rates, "misses": rates, "answered": 0.5}
    replace(FITTED, fitted_on=facts).save(tmp_path)
    assert Calibration.load(tmp_path).fitted_on == facts
    replace(FITTED, fitted_on=facts | {"misses": {"part": {"rate": 7}}}).save(tmp_path)
    with raises("calibration_unreadable", "misses.part"):
        Calibration.load(tmp_path)


SAVED = json.loads(json.dumps(asdict(FITTED)))
PARTLY = SAVED["kinds"]["part"]


@pytest.mark.parametrize(
    "broken",
    [
        "", "{", "[]", "null", "{}", json.dumps({**SAVED, "extra": 1}), json.dumps({**SAVED, "kinds": {}}),
        json.dumps({**SAVED, "kinds": {"other": PARTLY}}), json.dumps({**SAVED, "kinds": ["part"]}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "means": {MLLM: 0.0}}}}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "bias": "0.2"}}}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "bias": float("nan")}}}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "weights": ["mllm"]}}}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "weights": {MLLM: -1.0}}}}),
        json.dumps({**SAVED, "kinds": {"part": {**PARTLY, "bias": 1e300}}}), "[" * 100_000,
        json.dumps({**SAVED, "low": 0.9}), json.dumps({**SAVED, "high": "1"}), json.dumps({**SAVED, "high": 9}),
        json.dumps({**SAVED, "low": -5}), json.dumps({**SAVED, "mllm_threshold": 2}),
        json.dumps({**SAVED, "fitted_on": []}), json.dumps({**SAVED, "fitted_on": {"experts": ["clip"]}}),
        json.dumps({k: v for k, v in SAVED.items() if k != "fitted_on"}), json.dumps({**SAVED, "fitted_on": {}}),
        json.dumps({**SAVED, "fitted_on": {"experts": {"tower": "a" * 64}}}),
        *(json.dumps({**SAVED, "fitted_on": {"experts": EXPERTS, **change}}) for change in (
            {"misses_allowed": {"whole": "few", "part": 0.1}}, {"false_alarms_allowed": None}, {"false_alarms": [1]},
            {"false_alarms_allowed": [0.05, 0.1]}, {"n_real": "20"}, {"n_fake": 0}, {"n_real": None},
        )),
        json.dumps(SAVED).replace('"low"', '"high": 0.5, "low"'),
        json.dumps({"weights": {MLLM: 1.0}, "means": {MLLM: 0.0}, "bias": 0.0, "low": 0.3, "high": 0.6}),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_the_command_that_mends_it(tmp_path: Path, broken: str) -> None:
    """A calibration that is half there, or of a former shape, must fail when it is loaded and not within a run. Bug
    prevented: experts that `fitted_on` does not name are left out in silence, and the rest decides alone."""
    (tmp_path / "calibration.json").write_text(broken)
    with raises("calibration_unreadable", "x2dfd calibrate"):
        Calibration.load(tmp_path)
    with raises("calibration_unreadable", "absent", "x2dfd calibrate"):
        Calibration.load(tmp_path / "absent")


judged_by: dict[str, set[int]] = defaultdict(set)
"""By the SHA-256 of an expert's weights, which samples it was asked about."""


class Judge(tiny.Brightness):
    """Brightness with replaceable weights: those in `folder` may say what they were trained without."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            self.card = read_card(folder / f"{tiny.EXPERT}.card.json")  # type: ignore[misc]

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        judged_by[self.card.sha256] |= {f.index for f in faces}
        return super().judge(faces, shared)


PICTURES = (
    ("real", "", "", "a", "calib"), ("fake", "swap", "FS", "a", "calib"), ("real", "", "", "b", "calib"),
    ("fake", "gan", "EFS", "made", "calib"), ("real", "", "", "a", "train"), ("fake", "gan", "EFS", "made", "train"),
    ("real", "", "", "new", "train"), ("fake", "swap", "FS", "new", "train"), ("real", "", "", "new", "val"),
    ("fake", "gan", "EFS", "made", "val"), ("real", "", "", "a", "val"), ("fake", "warp", "FE", "a", "calib"),
)  # fmt: skip
"""Label, method, class, source and split; the source `new` and the generator `gan` are what one expert never saw.

The generator's pictures go to the adapter's own expert all the same."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of PICTURES, the fakes brighter."""
    folder, photo = tmp_path_factory.mktemp("photos"), skimage.data.astronaut()[:320, 80:400].astype(np.int16)
    samples = []
    for i, (label, method, df_class, source, split) in enumerate(PICTURES):
        light = 12 * (label == "fake") + 3 * (i % 5)
        Image.fromarray(np.clip(photo + light, 0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        samples.append(
            Sample(str(i), folder / f"{i}.png", label, method, df_class, source, str(i), split)  # type: ignore[arg-type]
        )
    write_manifest(folder / "manifest.jsonl", samples)
    return folder / "manifest.jsonl"


@pytest.fixture
def adapter(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the adapter, which a held-out method was kept from."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, "tests.test_calibration:Judge")

    def numbered(crops: CropSet, i: int, view_seed: int) -> Face:
        return replace(face_of(crops, i, view_seed), index=i)

    monkeypatch.setattr(x2dfd.run_calibrate, "face_of", numbered)
    judged_by.clear()
    copy = Path(shutil.copytree(folders[1], tmp_path / "adapter"))
    tiny.edit_card(copy, held_out=("warp",))
    return copy


@pytest.fixture
def spec(base: Path, adapter: Path) -> str:
    """The adapter on its base."""
    return f"hub:{base}+{adapter}"


def command(*words: object) -> Result:
    done = CliRunner().invoke(cli.app, ["calibrate", *map(str, words)])
    assert done.exit_code == 0, done.output
    return done


def held_out_expert(folder: Path, name: str, *left_out: str) -> None:
    """Weights of the expert that were trained without something."""
    (folder / name).mkdir(parents=True)
    card = replace(tiny.Brightness.card, sha256=name * 64, figures={"left_out": list(left_out)})
    write_card(folder / name / f"{tiny.EXPERT}.card.json", card)


def test_each_picture_is_judged_by_what_never_saw_its_origin(
    adapter: Path, spec: str, photos: Path, tmp_path: Path
) -> None:
    """Bug prevented: "unseen" scores of weights that learnt from the source, or a choice on the pictures of `val`; of
    `train`, or of methods whose figures are said to be of unseen ones."""
    alone = calibrate(spec, [photos])
    assert judged_by == {tiny.Brightness.card.sha256: {0, 1, 2, 3}}
    assert set(alone.weights) == {MLLM, tiny.EXPERT} and alone.fitted_on["unseen"] == []
    assert alone == Calibration.load(adapter) and alone.mllm_threshold != 0.5
    judged_by.clear()
    held_out_expert(tmp_path / "unseen", "c", "gan", "new")
    held_out_expert(tmp_path / "unseen", "d", "new")  # the first that never met the source judges it
    done = command("--model", spec, "--data", photos, "--held-out", tmp_path / "unseen")
    assert judged_by == {tiny.Brightness.card.sha256: {0, 1, 2, 3}, "c" * 64: {6, 7}}
    fitted = Calibration.load(adapter)
    assert set(fitted.weights) == {tiny.EXPERT} and fitted.weights[tiny.EXPERT] > 0  # nobody knows the MLLM elsewhere
    assert set(fitted.kinds) == {"whole", "part"}
    facts = fitted.fitted_on
    assert (facts["n_real"], facts["n_fake"], facts["groups"]) == (3, 3, 6)
    assert set(facts["false_alarms"]) == {"a", "b", "new"} and set(facts["misses"]) == {"a", "gan", "new"}
    told = [(one["sha256"], one["left_out"]) for one in facts["unseen"]]
    assert told == [("c" * 64, ["gan", "new"]), ("d" * 64, ["new"])]
    assert facts["experts"] == {tiny.EXPERT: tiny.Brightness.card.sha256}
    assert json.loads(done.stdout)["low"] == fitted.low
    report = load(spec).detect(photos.parent / "1.png", rationale=False)
    assert report.verdict.p_fake is not None and report.faces[0].p_fake_mllm is None


def test_a_bench_knows_the_pictures_of_a_fit(spec: str, photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a page that says of the very pictures of the fit that they were not used for it."""
    manifest, facts = manifest_sha256(photos), calibrate(spec, [photos]).fitted_on
    seen = [split for split in ("calib", "train", "val", None) if seen_at_fit(facts, manifest, split)]
    assert seen == ["calib", None] and not seen_at_fit(facts, "0" * 64, "calib") and not seen_at_fit({}, manifest, None)
    held_out_expert(tmp_path / "unseen", "c", "gan", "new")  # whose pictures of split train are fitted on, too
    facts = calibrate(spec, [photos], held_out=tmp_path / "unseen").fitted_on
    assert seen_at_fit(facts, manifest, "train") and not seen_at_fit(facts, manifest, "val")


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("left_out", [5, None, "s1", [["a"]], [5], {"a": 1}, []])
def test_left_out_is_a_list_of_names(tmp_path: Path, left_out: object) -> None:
    """Bug prevented: the text "s1" is read as its letters, so that pictures of s1 count as unseen by nobody."""
    held_out_expert(tmp_path, "c")
    card = tmp_path / "c" / f"{tiny.EXPERT}.card.json"
    write_card(card, replace(read_card(card), figures={"left_out": left_out}))
    with raises("left_out_invalid", tmp_path / "c"):
        held_out_in(tmp_path, [tiny.EXPERT])


def test_a_picture_counts_once_over_all_manifests(spec: str, photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a manifest that is given twice, or two that share a picture, count its pictures twice."""
    with raises("manifest_path_twice", photos):
        calibrate(spec, [photos, photos])
    shared = read_manifest(photos)[2]
    write_manifest(tmp_path / "more.jsonl", [replace(shared, id="other")])
    both, facts = [photos, tmp_path / "more.jsonl"], (shared.path, photos, tmp_path / "more.jsonl")
    with raises("manifest_path_twice", *facts):
        calibrate(spec, both)
    with raises("manifest_path_twice", *facts):
        tower(both, tmp_path / "out")
    with raises("manifest_path_twice", *facts):
        probe(both, tmp_path / "features", tmp_path / "out")


def test_a_calibration_that_fails_leaves_the_last_one(
    adapter: Path, spec: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a wrong split or folder, or a kill, and the adapter has no calibration any more."""
    before = (adapter / "calibration.json").read_bytes()
    with raises("no_picture_of_label", "'test'"):
        calibrate(spec, [photos], split="test")
    with raises("left_out_missing", "nothing"):
        calibrate(spec, [photos], held_out=tmp_path / "nothing")
    held_out_expert(tmp_path / "c", "c")
    with raises("left_out_invalid", tmp_path / "c"):
        calibrate(spec, [photos], held_out=tmp_path / "c")
    held_out_expert(tmp_path / "d", "d", "new")
    with raises("left_out_invalid", "tower"):  # its own weights know the source
        held_out_in(tmp_path / "d", [tiny.EXPERT, "tower"])
    with raises("expert_not_calibrated", tiny.EXPERT):
        calibrate(spec, [photos], experts=[])
    with raises("expert_twice", tiny.EXPERT):
        calibrate(spec, [photos], experts=[tiny.EXPERT, tiny.EXPERT])
    seen: list[bytes] = []

    def loading(*spec: object, **options: object) -> None:
        seen.append((adapter / "calibration.json").read_bytes())  # what a kill leaves
        raise SetupError("stopped", code="stopped")

    monkeypatch.setattr(x2dfd.run_calibrate, "load", loading)
    with raises("stopped", "stopped"):
        calibrate(spec, [photos])
    assert seen == [before]
    assert (adapter / "calibration.json").read_bytes() == before
    assert sorted(p.name for p in adapter.glob("calib*")) == ["calibration.json"]


def test_calibrate_says_what_its_fit_cannot_know(
    spec: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a fit to six pictures says "> 99 %" without a word, an expert that got no weight and a picture
    without a face go unmentioned, and --limit draws pictures of one label and blames the split."""
    samples = read_manifest(photos)
    Image.fromarray(np.zeros((320, 320, 3), np.uint8)).save(tmp_path / "dark.png")
    dark = Sample("dark", tmp_path / "dark.png", "real", source="a", group="dark", split="calib")
    some = [s for s in samples if s.df_class != "EFS"]
    write_manifest(tmp_path / "some.jsonl", [*some, dark])
    for name, expert in (("silent", Silent), ("whole-only", WholeOnly), ("wrong", Wrong)):
        monkeypatch.setitem(BUILTIN, name, f"tests.test_calibration:{expert.__name__}")
    experts = f"{tiny.EXPERT},silent,whole-only,wrong"
    done = command("--model", spec, "--data", tmp_path / "some.jsonl", "--experts", experts)
    for said in (
        "1 of 4 pictures not used: no usable face (dark, no_face)",
        "fitted on 2 real and 1 fake pictures: probabilities near 0 and 1 are not supported by so few",
        "no faces made as a whole among the pictures: the rule knows fakes changed in part only",
        "silent has no weight: it gave no score",
        "whole-only has no weight: the kind of fake that its card names (covers) is not among the pictures",
        "wrong has no weight: its score did not help on these pictures",
    ):
        assert f"note: {said}" in done.stderr
    assert f"{tiny.EXPERT} has no weight" not in done.stderr and json.loads(done.stdout)["n_real"] == 2
    report = load(spec, experts=[tiny.EXPERT]).detect(photos.parent / "1.png", rationale=False)
    assert any("2 real and 1 fake" in warning for warning in report.warnings)
    for limit in (2, 3):
        fitted = calibrate(spec, [photos], limit=limit)
        facts = fitted.fitted_on
        assert facts["n_real"] + facts["n_fake"] == limit and min(facts["n_real"], facts["n_fake"]) == 1
    assert FITTED.few_pictures is None and replace(FITTED, fitted_on={"n_real": 50, "n_fake": 50}).few_pictures is None


class Silent(tiny.Brightness):
    """It scores no face."""

    card = replace(tiny.Brightness.card, name="silent")

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [Evidence("silent", None, "dark")] * len(faces)


class WholeOnly(tiny.Brightness):
    """It knows faces made as a whole."""

    card = replace(tiny.Brightness.card, name="whole-only", covers=("EFS",))


class Wrong(tiny.Brightness):
    """It takes the reals for the fakes."""

    card = replace(tiny.Brightness.card, name="wrong")

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        return [Evidence("wrong", 1 - float(f.crop.mean()) / 255) for f in faces]


def test_a_mirrored_view_keeps_its_landmarks_on_the_face() -> None:
    """Bug prevented: experts that pool by area calibrated on the other side's areas; or only one way of seeing."""
    [face] = find_faces(np.array(skimage.data.astronaut()))
    samples = [Sample(str(k), Path("x"), "real", group=str(k)) for k in range(12)]
    crops = CropSet(samples, np.repeat(face.crop[None], 12, 0), np.repeat(face.crop_landmarks[None], 12, 0), {})
    seen = {"plain": 0, "view": 0, "mirrored": 0}
    for k in range(12):
        found, (view, flipped) = face_of(crops, k, 1), degraded_view(face.crop, 1, k)
        plain = np.array_equal(found.crop, face.crop)
        seen["plain" if plain else "mirrored" if flipped else "view"] += 1
        assert plain or np.array_equal(found.crop, view)
        wanted = 223 - face.crop_landmarks[:, 0] if flipped and not plain else face.crop_landmarks[:, 0]
        assert np.allclose(found.crop_landmarks[:, 0], wanted)
    assert min(seen.values()) > 0
