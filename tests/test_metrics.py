"""Metrics against answers worked out by hand, and against the ways in which published numbers went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from eval import metrics as m
from eval.stats import Floats, Labels, auc

# Sorted by score: real .1, fake .3, real .4, fake .8. Of 4 pairs 3 are in order.
LABELS = np.array([0, 1, 0, 1])
SCORES = np.array([0.1, 0.3, 0.4, 0.8])
METRICS: dict[str, Callable[[Labels, Floats], float | None]] = {
    "average_precision": m.average_precision, "eer": m.eer, "nll": m.nll, "ece": m.ece,
    "cllr": m.cllr, "accuracy": m.accuracy, "balanced_accuracy": m.balanced_accuracy,
    "tpr_at_fpr": partial(m.tpr_at_fpr, fpr=0.1),
}  # fmt: skip


def test_known_answers() -> None:
    """A swapped class, a wrong log or a lost factor shows at once on four numbers."""
    # precision 1 at the first fake (recall 1/2), 2/3 at the second
    assert m.average_precision(LABELS, SCORES) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    # ROC points (fpr, tpr): (0, .5) and (.5, .5) and (.5, 1); |fnr - fpr| is 0 at (.5, .5)
    assert m.eer(LABELS, SCORES) == pytest.approx(0.5)
    # A scorer that says the same of everything was called perfect.
    assert m.eer(LABELS, np.full(4, 0.3)) == 0.5
    assert m.nll(LABELS, SCORES) == pytest.approx(-sum(map(math.log, (0.9, 0.3, 0.6, 0.8))) / 4)
    # each score is alone in its bin of width 1/15
    assert m.ece(LABELS, SCORES) == pytest.approx((0.1 + 0.7 + 0.4 + 0.2) / 4)
    # likelihood ratios at even priors: 1/9, 3/7, 2/3, 4
    of_fakes = (math.log2(1 + 7 / 3) + math.log2(1 + 1 / 4)) / 2
    of_reals = (math.log2(1 + 1 / 9) + math.log2(1 + 2 / 3)) / 2
    assert m.cllr(LABELS, SCORES) == pytest.approx((of_fakes + of_reals) / 2)
    assert m.accuracy(LABELS, SCORES) == 3 / 4 and m.recalls(LABELS, SCORES) == (1, 0.5)
    assert m.balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.9, 0.9])) == pytest.approx((2 / 3 + 1) / 2)
    assert m.tpr_at_fpr(LABELS, SCORES, 0.1) == 0.5
    assert m.cllr(LABELS, np.full(4, 0.5)) == pytest.approx(1)  # no information
    # intersection over prediction alone rewards a single sure pixel
    truth, said = np.array([[1, 1, 0, 0]], np.bool_), np.array([[0, 1, 1, 0]], np.bool_)
    assert m.overlap(truth, said) == pytest.approx(1 / 3) and m.overlap(np.zeros_like(truth), said) is None
    # a sure wrong answer costs much, and not infinity, which is no JSON
    assert all(13 < (fn(np.array([0, 1]), np.array([1.0, 0.0])) or 0) < 21 for fn in (m.nll, m.cllr))
    with pytest.raises(ValueError, match="finite"):  # NaN sorts somewhere and gives a plausible AUC
        m.to_scores([0.1, float("nan")])
    with pytest.raises(ValueError, match="unknown"):
        m.to_labels(["fake", "0"])
    # a template in different spacing is still a template
    assert m.distinct_share(["The jaw is blurred.", "the jaw  is blurred.", "The eyes differ."]) == pytest.approx(2 / 3)


def test_known_answers_with_ties_and_at_edges() -> None:
    """Ties broken by the order of the list win or lose pairs that nobody ranked."""
    # real .1, fake .5 and real .5, fake .9, fake .9
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.5, 0.5, 0.9, 0.9])
    # ROC points (fpr, fnr): (0, 1/3), (1/2, 0); the first is nearer to equal
    assert m.eer(labels, scores) == pytest.approx(1 / 6)
    assert m.tpr_at_fpr(labels, scores, 0.4) == pytest.approx(2 / 3) and m.tpr_at_fpr(labels, scores, 0.5) == 1.0
    # bins of width 1/2, reals a quarter each and fakes a sixth: {.1}, {.5, .5, .9, .9}
    gaps = (-0.1 / 4, (0.5 + 0.1 + 0.1) / 6 - 0.5 / 4)
    assert m.ece(labels, scores, bins=2) == pytest.approx(sum(map(abs, gaps)))
    # floor(1.0 x 15) is bin 15 of 15
    assert m.ece(np.array([0, 1]), np.array([1.0, 1.0])) == pytest.approx(0.5)
    # Nine fakes in ten do not make a probability that takes both for equally likely look better.
    assert m.ece(np.array([0] + [1] * 9), np.full(10, 0.6), bins=1) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["average_precision", "eer", "cllr", "balanced_accuracy", "ece", "tpr_at_fpr"])
@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], []])
def test_one_class_is_not_defined(name: str, labels: list[int]) -> None:
    """NaN, or a cheerful 0.0 or 1.0, for a slice that holds only reals."""
    array = np.array(labels, dtype=np.int64)
    assert METRICS[name](array, np.linspace(0, 1, len(labels))) is None
    if not labels:
        assert {fn(array, array.astype(float)) for fn in METRICS.values()} == {None}
        assert m.distinct_share([]) is None
        assert m.cue_agreement([], [])["micro"] == {"precision": None, "recall": None, "f1": None}


def test_two_clips_with_one_folder_name_do_not_merge() -> None:
    """Grouping by folder name merges `A/000` and `B/000`: AUC 1.0 instead of the true 0.5."""
    clips = ["A/000", "A/000", "B/000", "B/000", "real/001", "real/001"]
    labels, scores = np.array([1, 1, 1, 1, 0, 0]), np.array([0.9, 0.9, 0.2, 0.2, 0.5, 0.5])
    names, pooled_labels, pooled = m.pool_by(clips, labels, scores)
    assert names == ["A/000", "B/000", "real/001"]
    assert auc(pooled_labels, pooled) == 0.5
    with pytest.raises(ValueError, match="x"):  # a mean label cut to an integer turns a fake clip into a real one
        m.pool_by(["x", "x"], np.array([0, 1]), np.array([0.1, 0.9]))
    ids, labels, scores = ["b", "a", "b", "b"], np.array([1, 0, 1, 1]), np.array([0.2, 0.5, 0.9, 0.1])
    assert m.pool_by(ids, labels, scores)[2].tolist() == pytest.approx([0.5, 0.4])


def test_cues_known_answers() -> None:
    """Micro and per-image means differ; silence must cost recall and not win precision."""
    truth = [{"jaw", "eyes"}, {"jaw"}, {"nose"}]
    said = [{"jaw"}, {"jaw", "hair", "skin"}, set()]
    result = m.cue_agreement(truth, said)
    assert result["micro"] == {"precision": 2 / 4, "recall": 2 / 4, "f1": 4 / 8}
    assert result["per_image"]["precision"] == pytest.approx((1 + 1 / 3) / 2)
    assert result["per_image"]["recall"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert result["per_image"]["f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


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
