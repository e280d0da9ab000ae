"""Metrics against answers worked out by hand, and against the ways in which published numbers went wrong."""

from __future__ import annotations

import math
import time
from functools import partial

import numpy as np
import pytest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from eval import metrics as m

# Sorted by score: real .1, fake .3, real .4, fake .8. Of 4 pairs 3 are in order.
LABELS = np.array([0, 1, 0, 1])
SCORES = np.array([0.1, 0.3, 0.4, 0.8])
METRICS: dict[str, m.Metric] = {
    "auc": m.auc,
    "average_precision": m.average_precision,
    "eer": m.eer,
    "nll": m.nll,
    "brier": m.brier,
    "ece": m.ece,
    "cllr": m.cllr,
    "accuracy": m.accuracy,
    "balanced_accuracy": m.balanced_accuracy,
    "ece_at_even_odds": m.ece_at_even_odds,
    "tpr_at_fpr": partial(m.tpr_at_fpr, fpr=0.1),
}


def sample(n: int, seed: int = 0) -> tuple[m.Labels, m.Floats]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    scores = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1).round(2)  # rounded: with ties
    return labels, scores


def test_known_answers() -> None:
    """A swapped class, a wrong log or a lost factor shows at once on four numbers."""
    assert m.auc(LABELS, SCORES) == pytest.approx(3 / 4)
    # precision 1 at the first fake (recall 1/2), 2/3 at the second
    assert m.average_precision(LABELS, SCORES) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # ROC points (fpr, tpr): (0, .5) and (.5, .5) and (.5, 1); |fnr - fpr| is 0 at (.5, .5)
    assert m.eer(LABELS, SCORES) == pytest.approx(0.5)
    assert m.brier(LABELS, SCORES) == pytest.approx((0.01 + 0.49 + 0.16 + 0.04) / 4)
    assert m.nll(LABELS, SCORES) == pytest.approx(-sum(map(math.log, (0.9, 0.3, 0.6, 0.8))) / 4)
    # each score is alone in its bin of width 1/15
    assert m.ece(LABELS, SCORES) == pytest.approx((0.1 + 0.7 + 0.4 + 0.2) / 4)
    # likelihood ratios at even priors: 1/9, 3/7, 2/3, 4
    of_fakes = (math.log2(1 + 7 / 3) + math.log2(1 + 1 / 4)) / 2
    of_reals = (math.log2(1 + 1 / 9) + math.log2(1 + 2 / 3)) / 2
    assert m.cllr(LABELS, SCORES) == pytest.approx((of_fakes + of_reals) / 2)
    assert m.accuracy(LABELS, SCORES, 0.5) == 3 / 4
    assert m.recalls(LABELS, SCORES, 0.35) == (0.5, 0.5)
    assert m.balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.9, 0.9])) == pytest.approx((2 / 3 + 1) / 2)
    assert m.tpr_at_fpr(LABELS, SCORES, 0.1) == 0.5
    assert m.tpr_at_fpr(LABELS, SCORES, 0.5) == 1.0


def test_known_answers_with_ties() -> None:
    """Ties broken by the order of the list win or lose pairs that nobody ranked."""
    # real .1, fake .5 and real .5, fake .9, fake .9: of 6 pairs 5 are in order and one is a tie
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.5, 0.5, 0.9, 0.9])
    assert m.auc(labels, scores) == pytest.approx(5.5 / 6)
    # both at .9: precision 1, recall 2/3; at .5 three of four are fakes, recall 1
    assert m.average_precision(labels, scores) == pytest.approx(2 / 3 * 1 + 1 / 3 * 3 / 4)
    # ROC points (fpr, fnr): (0, 1/3), (1/2, 0); the first is nearer to equal
    assert m.eer(labels, scores) == 0.0
    assert m.tpr_at_fpr(labels, scores, 0.4) == pytest.approx(2 / 3)
    # bins of width 1/2: {.1}, {.5, .5, .9, .9}
    assert m.ece(labels, scores, bins=2) == pytest.approx((0.1 + abs(3 - 2.8)) / 5)


def test_calibration_at_even_odds() -> None:
    """The error of a probability that takes both answers for equally likely is not to be had from nine fakes in ten."""
    # in one bin: of the reals .6, of the fakes .6 on average; at even odds the true share is 1/2
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.6, 0.6, 0.6, 0.6])
    assert m.ece(labels, scores, bins=1) == pytest.approx(abs(3 / 4 - 0.6))
    assert m.ece_at_even_odds(labels, scores, bins=1) == pytest.approx(abs(1 / 2 - 0.6))
    labels, scores = np.array([0, 1, 1, 1]), np.array([0.1, 0.2, 0.8, 0.8])
    # two bins: .1 (weight 1/2) and .2 (1/6): gap 1/2 x -.1 + 1/6 x .8; two of .8: gap 1/3 x .2
    assert m.ece_at_even_odds(labels, scores, bins=2) == pytest.approx(abs(-0.1 / 2 + 0.8 / 6) + 0.2 / 3)
    even = np.array([0, 0, 1, 1])
    assert m.ece_at_even_odds(even, scores) == pytest.approx(m.ece(even, scores))


def test_the_mean_and_the_overlap_of_masks() -> None:
    """Intersection over prediction alone rewards a single sure pixel."""
    truth, said = np.array([[1, 1, 0, 0]], np.bool_), np.array([[0, 1, 1, 0]], np.bool_)
    assert m.overlap(truth, said) == pytest.approx(1 / 3)
    assert (m.overlap(truth, truth), m.overlap(truth, ~truth), m.overlap(np.zeros_like(truth), said)) == (
        1.0,
        0.0,
        None,
    )
    nothing = np.zeros(0, np.int64)
    assert m.mean(LABELS, SCORES) == pytest.approx(0.4) and m.mean(nothing, nothing.astype(float)) is None


def test_cllr_knows_the_prior_and_says_one_for_no_information() -> None:
    """Posteriors from a 4:1 training set read under even priors would pass for evidence."""
    assert m.cllr(LABELS, np.full(4, 0.5)) == pytest.approx(1)
    assert m.cllr(LABELS, np.full(4, 0.8), prior=0.8) == pytest.approx(1)


def test_eer_is_not_interpolated() -> None:
    """An interpolated EER (1/4 here) does not compare with DeepfakeBench's (1/3)."""
    labels, scores = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0.1, 0.2, 0.7, 0.6, 0.8, 0.9, 0.95])
    # between (fpr 0, fnr 1/4) and (fpr 1/3, fnr 1/4) the second is nearer to equal: 1/12 against 1/4
    assert m.eer(labels, scores) == pytest.approx(1 / 3)


def test_ece_puts_the_score_one_into_the_last_bin() -> None:
    """floor(1.0 x 15) is bin 15 of 15: an index error, or a sure answer that is left out."""
    assert m.ece(np.array([0, 1]), np.array([1.0, 1.0])) == pytest.approx(0.5)
    # two bins: .01 and .02 share the first one (mean .015, no fake), .9 has its own
    assert m.ece(np.array([0, 0, 1]), np.array([0.01, 0.02, 0.9])) == pytest.approx(2 / 3 * 0.015 + 1 / 3 * 0.1)


def test_a_sure_wrong_answer_costs_much_but_not_infinity() -> None:
    """Infinity is not JSON, and one saturated score would hide all the others."""
    for fn in (m.nll, m.cllr):
        value = fn(np.array([0, 1]), np.array([1.0, 0.0]))
        assert value is not None and 13 < value < 21


@pytest.mark.parametrize(
    "name", ["auc", "average_precision", "eer", "cllr", "balanced_accuracy", "ece_at_even_odds", "tpr_at_fpr"]
)
@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_is_not_defined(name: str, labels: list[int]) -> None:
    """NaN, or a cheerful 0.0 or 1.0, for a slice that holds only reals."""
    array = np.array(labels, dtype=np.int64)
    assert METRICS[name](array, np.linspace(0, 1, len(labels))) is None
    assert m.tpr_at_fpr(array, np.linspace(0, 1, len(labels)), 0.1) is None


def test_nothing_gives_none_everywhere() -> None:
    """A slice in which nothing could be scored must not become NaN in the result file."""
    nothing = np.array([], dtype=np.int64)
    assert {name: fn(nothing, nothing.astype(float)) for name, fn in METRICS.items()} == dict.fromkeys(METRICS)
    assert m.bootstrap_interval(m.auc, nothing, nothing.astype(float), []) is None
    assert m.distinct_share([]) is None
    assert m.selective(nothing, [])["coverage"] is None
    assert m.cue_agreement([], [])["micro"] == {"precision": None, "recall": None, "f1": None}


def test_agrees_with_scikit_learn() -> None:
    """Our own formulas (recalls, TPR at FPR, pooling by weights) must say what the library says where both exist."""
    labels, scores = sample(500)
    assert m.auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
    assert m.average_precision(labels, scores) == pytest.approx(sk.average_precision_score(labels, scores))
    assert m.brier(labels, scores) == pytest.approx(sk.brier_score_loss(labels, scores))
    assert m.accuracy(labels, scores) == pytest.approx(sk.accuracy_score(labels, scores > 0.5))
    assert m.balanced_accuracy(labels, scores) == pytest.approx(sk.balanced_accuracy_score(labels, scores > 0.5))
    real, fake = m.recalls(labels, scores)
    assert real == pytest.approx(sk.recall_score(labels, scores > 0.5, pos_label=0))
    assert fake == pytest.approx(sk.recall_score(labels, scores > 0.5))
    assert m.nll(labels, scores) == pytest.approx(sk.log_loss(labels, np.clip(scores, 1e-6, 1 - 1e-6)))
    # the cost of likelihood ratios at even priors is the log loss with half of the weight on each class, in bits
    weights = np.where(labels == 1, 1 / labels.sum(), 1 / (1 - labels).sum())
    in_nats = sk.log_loss(labels, np.clip(scores, 1e-6, 1 - 1e-6), sample_weight=weights)
    assert m.cllr(labels, scores) == pytest.approx(in_nats / math.log(2))
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    assert m.eer(labels, scores) == pytest.approx(fpr[np.abs(1 - tpr - fpr).argmin()])
    inside = scores[(scores * 15) % 1 != 0], labels[(scores * 15) % 1 != 0]  # at an edge the two differ in side
    share, mean = calibration_curve(inside[1], inside[0], n_bins=15)
    filled = np.bincount((inside[0] * 15).astype(int), minlength=15)
    by_library = np.abs(share - mean) @ filled[filled > 0] / len(inside[0])
    assert m.ece(inside[1], inside[0]) == pytest.approx(by_library)
    found = [np.mean(scores[labels == 1] >= t) for t in set(scores) if np.mean(scores[labels == 0] >= t) <= 0.05]
    assert m.tpr_at_fpr(labels, scores, 0.05) == pytest.approx(max(found))


def test_the_order_of_samples_does_not_matter() -> None:
    """A result that depends on the order of the manifest cannot be reproduced from a shuffled one."""
    labels, scores = sample(200)
    groups = [f"g{i // 4}" for i in range(200)]
    order = np.random.default_rng(1).permutation(200)
    for name, fn in METRICS.items():
        assert fn(labels[order], scores[order]) == pytest.approx(fn(labels, scores), abs=1e-12), name
    shuffled = [groups[i] for i in order]
    for fn in (m.auc, m.eer):
        straight = m.bootstrap_interval(fn, labels, scores, groups, n=50)
        assert m.bootstrap_interval(fn, labels[order], scores[order], shuffled, n=50) == pytest.approx(straight)
    assert m.pool_by(shuffled, np.zeros(200, dtype=np.int64), scores[order])[2] == pytest.approx(
        m.pool_by(groups, np.zeros(200, dtype=np.int64), scores)[2]
    )


def test_two_clips_with_one_folder_name_do_not_merge() -> None:
    """Grouping by folder name merges `A/000` and `B/000`: AUC 1.0 instead of the true 0.5."""
    methods, folders = ["A", "A", "B", "B", "real", "real"], ["000", "000", "000", "000", "001", "001"]
    labels, scores = np.array([1, 1, 1, 1, 0, 0]), np.array([0.9, 0.9, 0.2, 0.2, 0.5, 0.5])
    clips = [f"{a}/{b}" for a, b in zip(methods, folders, strict=True)]
    names, pooled_labels, pooled = m.pool_by(clips, labels, scores)
    assert names == ["A/000", "B/000", "real/001"]
    assert m.auc(pooled_labels, pooled) == 0.5
    assert m.auc(*m.pool_by(folders, labels, scores)[1:]) == 1.0


def test_pooling_by_mean_and_by_max() -> None:
    """A clip of unequal length must not weigh its frames by anybody else's count."""
    ids, labels, scores = ["b", "a", "b", "b"], np.array([1, 0, 1, 1]), np.array([0.2, 0.5, 0.9, 0.1])
    assert m.pool_by(ids, labels, scores)[2].tolist() == pytest.approx([0.5, 0.4])
    assert m.pool_by(ids, labels, scores, "max")[2].tolist() == [0.5, 0.9]


def test_real_and_fake_under_one_clip_are_refused() -> None:
    """The mean label of a mixed group, cut to an integer, turns a fake clip into a real one."""
    with pytest.raises(ValueError, match="x"):
        m.pool_by(["x", "x"], np.array([0, 1]), np.array([0.1, 0.9]))


def test_copies_do_not_make_an_interval_narrower() -> None:
    """Ten near copies of each clip, resampled one by one, pretend to be ten times the evidence."""
    labels, scores = sample(60)
    many_labels, many_scores = np.repeat(labels, 10), np.repeat(scores, 10)
    by_clip = m.bootstrap_interval(m.auc, many_labels, many_scores, [f"c{i // 10}" for i in range(600)])
    by_frame = m.bootstrap_interval(m.auc, many_labels, many_scores, [str(i) for i in range(600)])
    assert by_clip is not None and by_frame is not None
    assert by_clip[1] - by_clip[0] > 2 * (by_frame[1] - by_frame[0])


@pytest.mark.parametrize(
    "fn",
    [m.auc, m.average_precision, m.ece_at_even_odds, partial(m.tpr_at_fpr, fpr=0.05), partial(m.tpr_at_fpr, fpr=0.01)],
    ids=["auc", "ap", "ece", "tpr05", "tpr01"],
)
def test_the_fast_way_through_resamples_is_the_slow_one(fn: m.Metric) -> None:
    """The vectorised path has its own handling of ties and weights: it must give the generic path's interval."""
    labels, scores = sample(150, seed=3)
    groups = [f"g{i % 40}" for i in range(150)]
    slow = m.bootstrap_interval(lambda a, b: fn(a, b), labels, scores, groups, n=200)
    assert m._quick(fn) is not None
    assert m.bootstrap_interval(fn, labels, scores, groups, n=200) == pytest.approx(slow)


def test_a_calibration_error_lies_in_its_own_interval() -> None:
    """Resampled gaps are larger than the sample's own: the plain percentiles leave its value out."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 150)
    labels = (rng.random(150) < p).astype(np.int64)
    groups = [str(i) for i in range(150)]
    value = m.ece_at_even_odds(labels, p)
    plain = m.bootstrap_interval(m.ece_at_even_odds, labels, p, groups, n=300)
    moved = m.bootstrap_interval(m.ece_at_even_odds, labels, p, groups, n=300, centred=True)
    assert value is not None and plain is not None and moved is not None
    assert moved[0] < value < moved[1] and moved[0] < plain[0] and moved[1] < plain[1]


def test_a_share_that_is_just_allowed_is_allowed() -> None:
    """One alarm in twenty is 5 %, in the quick way through resamples as in the slow one."""
    labels = np.repeat([0, 1], [20, 4])
    scores = np.concatenate([np.linspace(0, 0.5, 19), [0.8], [0.2, 0.7, 0.75, 0.9]])
    assert m.tpr_at_fpr(labels, scores, 0.05) == 3 / 4
    assert m._resampled_tpr(labels, scores, np.ones((1, 24), np.int64), 0.05) == [3 / 4]


def test_resamples_of_one_class_only_are_left_out() -> None:
    """With two reals among twenty groups every seventh resample has none: NaN, or a quick path that counts it as 0."""
    labels, scores = np.array([0, 0] + [1] * 18), np.linspace(0.05, 0.95, 20)
    groups = [str(i) for i in range(20)]
    for fn in (m.auc, m.average_precision, m.ece_at_even_odds, partial(m.tpr_at_fpr, fpr=0.05)):
        interval = m.bootstrap_interval(fn, labels, scores, groups, n=300)
        assert interval == pytest.approx(
            m.bootstrap_interval(lambda a, b, fn=fn: fn(a, b), labels, scores, groups, n=300)  # type: ignore[misc]
        )


def test_an_interval_covers_the_truth_and_depends_on_the_seed_only() -> None:
    """An interval that is too narrow passes chance for progress."""
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1,1) > N(0,1)): difference N(1, sqrt 2)
    inside = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = np.repeat([0, 1], 60)
        interval = m.bootstrap_interval(m.auc, labels, rng.normal(labels, 1), [str(i) for i in range(120)], n=300)
        assert interval is not None
        inside += interval[0] <= truth <= interval[1]
    assert 34 <= inside <= 40
    args = (m.auc, *sample(80), [str(i) for i in range(80)])
    assert m.bootstrap_interval(*args, n=100, seed=1) == m.bootstrap_interval(*args, n=100, seed=1)
    assert m.bootstrap_interval(*args, n=100, seed=1) != m.bootstrap_interval(*args, n=100, seed=2)


def test_one_group_has_no_interval() -> None:
    """All frames from one clip: resampling gives the same number every time, which is not certainty."""
    assert m.bootstrap_interval(m.auc, LABELS, SCORES, ["g"] * 4) is None


def test_two_thousand_samples_are_resampled_in_seconds() -> None:
    """A bootstrap that takes minutes is switched off."""
    labels, scores = sample(2000)
    started = time.process_time()
    m.bootstrap_interval(m.auc, labels, scores, [str(i) for i in range(2000)], n=1000)
    assert time.process_time() - started < 10


def test_no_false_alarm_in_few_photos_is_not_a_rate_of_zero() -> None:
    """A bootstrap of 0 out of 30 says [0, 0]; the exact bound is 11.6 %, and with clips it is the clips that count."""
    hits = np.zeros(30, dtype=np.bool_)
    assert m.rate_interval(hits, [str(i) for i in range(30)]) == pytest.approx((0, 0.1157), abs=1e-4)
    assert m.rate_interval(~hits, [str(i) for i in range(30)]) == pytest.approx((0.8843, 1), abs=1e-4)
    three_clips = m.rate_interval(hits, [str(i % 3) for i in range(30)])
    assert three_clips is not None and three_clips[1] > 0.7


def test_declining_is_neither_right_nor_wrong() -> None:
    """`inconclusive` counted as real would be wrong answers nobody gave; dropped unseen, it flatters everything."""
    labels = np.array([0, 0, 0, 0, 1, 1])
    result = m.selective(labels, ["real", "fake", "inconclusive", "inconclusive", "fake", "inconclusive"])
    assert result == {
        "n": 6,
        "n_answered": 3,
        "coverage": 0.5,
        "accuracy": pytest.approx(2 / 3),
        "balanced_accuracy": pytest.approx((1 / 2 + 1) / 2),
        "false_alarms": 0.25,
        "misses": 0.0,
    }


def test_cues_known_answers() -> None:
    """Micro and per-image means differ; silence must cost recall and not win precision."""
    truth = [{"jaw", "eyes"}, {"jaw"}, {"nose"}]
    said = [{"jaw"}, {"jaw", "hair", "skin"}, set()]
    result = m.cue_agreement(truth, said)
    assert result["micro"] == {"precision": 2 / 4, "recall": 2 / 4, "f1": 4 / 8}
    assert result["per_image"]["precision"] == pytest.approx((1 + 1 / 3) / 2)
    assert result["per_image"]["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["per_image"]["f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_distinct_texts() -> None:
    """A template in different spacing is still a template."""
    assert m.distinct_share(["The jaw is blurred.", "the jaw  is blurred.", "The eyes differ."]) == pytest.approx(2 / 3)


def test_not_a_number_is_refused() -> None:
    """NaN sorts somewhere and gives a plausible AUC."""
    with pytest.raises(ValueError, match="finite"):
        m.to_scores([0.1, float("nan")])
    with pytest.raises(ValueError, match="unknown"):
        m.to_labels(["fake", "0"])


def test_sbi_pooling_counts_a_frame_without_a_face_as_half() -> None:
    """Dropping such frames is another protocol, several points apart; and max over frames is a third."""
    (names, labels, pooled), missing = m.pool_sbi(
        ["a", "a", "b", "b"], m.to_labels(["fake", "fake", "real", "real"]), [0.9, None, 0.2, 0.4]
    )
    assert names == ["a", "b"] and labels.tolist() == [1, 0] and missing == 1
    assert pooled == pytest.approx([0.7, 0.3])


def test_risk_and_coverage_by_hand() -> None:
    """The curve read from the wrong end says that the least sure answers are the best."""
    labels, scores = m.to_labels(["fake", "real", "fake", "real"]), np.array([0.99, 0.1, 0.4, 0.55])
    coverage, risk = m.risk_coverage(labels, scores)  # surest: 0.99 right, 0.1 right, 0.4 wrong, 0.55 wrong
    assert coverage == pytest.approx([0.25, 0.5, 0.75, 1.0]) and risk == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert m.aurc(labels, scores) == pytest.approx((1 / 3 + 1 / 2) / 4)
    tied = m.risk_coverage(m.to_labels(["fake", "real"]), np.array([0.7, 0.7]))
    assert tied[0].tolist() == [1.0] and tied[1].tolist() == [0.5]  # not 0 first because the fake stands first
    assert m.aurc(m.to_labels([]), np.array([])) is None


def test_delong_by_hand_and_against_resampling() -> None:
    """A paired test that forgets the pairing finds nothing, or everything."""
    labels = np.array([1, 1, 0, 0])
    # First: both fakes above both reals. Second: one pair of four is wrong.
    found = m.delong(labels, np.array([0.9, 0.8, 0.2, 0.1]), np.array([0.9, 0.3, 0.4, 0.1]))
    # Components of the second: fakes 1 and 1/2, reals 1/2 and 1: variance 0.125 / 2 on each side.
    assert found["difference"] == pytest.approx(0.25)
    assert found["standard_error"] == pytest.approx(np.sqrt(0.125 / 2 + 0.125 / 2))
    same = m.delong(labels, np.array([0.9, 0.8, 0.2, 0.1]), np.array([9.0, 8.0, 2.0, 1.0]))
    assert same["difference"] == 0 and same["p"] == 1.0
    rng = np.random.default_rng(3)
    y = (rng.random(400) < 0.5).astype(np.int64)
    a, b = y + rng.normal(0, 1, 400), y + rng.normal(0, 1.5, 400)
    drawn = [rng.integers(0, 400, 400) for _ in range(400)]
    spread = np.std([m.rank_auc(y[i], a[i]) - m.rank_auc(y[i], b[i]) for i in drawn])  # type: ignore[operator]
    assert m.delong(y, a, b)["standard_error"] == pytest.approx(spread, rel=0.15)
    assert m.delong(np.ones(3, np.int64), a[:3], b[:3])["difference"] is None


def test_auc_by_ranks_is_the_auc() -> None:
    """A faster way that breaks ties differently changes every interval."""
    rng = np.random.default_rng(0)
    y, scores = rng.integers(0, 2, 200), rng.integers(0, 9, 200) / 9
    assert m.rank_auc(y, scores) == pytest.approx(m.auc(y, scores))
    assert m.rank_auc(np.zeros(3, np.int64), scores[:3]) is None


def test_agrees_with_torchmetrics() -> None:
    """A definition of our own under a known name."""
    classification = pytest.importorskip(
        "torchmetrics.functional.classification", reason="torchmetrics is not installed (pip install -e '.[bench]')"
    )
    import torch

    rng = np.random.default_rng(5)
    y = rng.integers(0, 2, 500)
    p = np.clip(y * 0.3 + rng.random(500) * 0.7, 0, 1)
    given = torch.tensor(p), torch.tensor(y)
    assert m.auc(y, p) == pytest.approx(float(classification.binary_auroc(*given)), abs=1e-6)
    assert m.average_precision(y, p) == pytest.approx(float(classification.binary_average_precision(*given)), abs=1e-6)
    assert m.accuracy(y, p) == pytest.approx(float(classification.binary_accuracy(*given)), abs=1e-6)
    # Its ECE is of P(fake) against the label too, with bins of equal width.
    theirs = classification.binary_calibration_error(*given, n_bins=15, norm="l1")
    assert m.ece(y, p) == pytest.approx(float(theirs), abs=1e-6)
