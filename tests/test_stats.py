"""Intervals: how often they hold the truth, and that none is given where that is not known."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import binom, norm

from eval import stats
from eval.stats import NO_SPREAD, TOO_FEW, Measured


def names(at: np.ndarray) -> list[str]:
    return [f"g{i}" for i in at]


def share_held(draws: list[Measured], truth: float) -> float:
    """How often the interval holds the truth, of draws that nearly all have one."""
    bounds = [drawn.interval for drawn in draws if drawn.interval is not None]
    assert len(bounds) > 0.97 * len(draws)
    return float(np.mean([low <= truth <= high for low, high in bounds]))


@pytest.mark.slow
@pytest.mark.parametrize("trials", [8, 15, 30])
def test_the_interval_of_a_rate_covers_as_often_as_it_says(trials: int) -> None:
    """Eight film clips had an interval that held the truth 84 times in 100."""
    bounds = [stats.binomial_interval(float(k), trials) for k in range(trials + 1)]
    chances = []
    for share in np.linspace(0.1, 0.9, 33):  # counts are whole, so that the chance steps up and down with the share
        held = [k for k, (low, high) in enumerate(bounds) if low <= share <= high]
        chances.append(binom.pmf(held, trials, share).sum())
    assert 0.93 <= np.mean(chances) <= 0.97 and min(chances) > 0.9


@pytest.mark.parametrize(("first", "second"), [(8, 8), (8, 40), (30, 60)])
def test_the_interval_of_a_gap_between_rates_covers_as_often_as_it_says(first: int, second: int) -> None:
    """Two groups of people with the same rate must not look treated differently; small rates may cover more."""

    def figures(trials: int) -> list[Measured]:
        return [
            Measured(k / trials, stats.binomial_interval(float(k), float(trials)), trials, trials)
            for k in range(trials + 1)
        ]

    gaps = [[stats.rate_difference(a, b).interval for b in figures(second)] for a in figures(first)]
    chances = []
    for p in (0.05, 0.2, 0.4):
        for q in (0.05, 0.2, 0.4):
            weight = np.outer(binom.pmf(range(first + 1), first, p), binom.pmf(range(second + 1), second, q))
            held = [[i is not None and i[0] <= p - q <= i[1] for i in row] for row in gaps]
            chances.append(float((weight * held).sum()))
    assert min(chances) >= 0.93 and np.mean(chances) <= 0.985


@pytest.mark.parametrize(("first", "second"), [(8, 40), (30, 60)])
def test_the_interval_of_a_share_of_two_rates_covers_as_often_as_it_says(first: int, second: int) -> None:
    """How far "likely real" can be trusted must not look more certain than the two rates behind it."""

    def figures(trials: int) -> list[Measured]:
        return [
            Measured(k / trials, stats.binomial_interval(float(k), float(trials)), trials, trials)
            for k in range(trials + 1)
        ]

    shares = [[stats.rate_share(a, b) for b in figures(second)] for a in figures(first)]
    given = np.array([[share.interval is not None for share in row] for row in shares])
    assert given[1:, 1:].all() and not given[0].any() and not given[:, 0].any()
    chances = []
    for p in (0.05, 0.1, 0.2, 0.4):
        for q in (0.2, 0.5, 0.8):
            weight = np.outer(binom.pmf(range(first + 1), first, p), binom.pmf(range(second + 1), second, q))
            bounds = [[share.interval or (2.0, 2.0) for share in row] for row in shares]
            held = np.array([[low <= p / (p + q) <= high for low, high in row] for row in bounds])
            chances.append(float((weight * held).sum() / (weight * given).sum()))
    assert min(chances) >= 0.93 and np.mean(chances) <= 0.985
    assert stats.rate_share(Measured(0.1, (0.05, 0.2), 30, 30), Measured(0.3, None, 5, 2)).note == TOO_FEW
    assert stats.rate_share(Measured(0.0), Measured(0.0)).value is None


def test_a_rate_of_the_same_pictures_has_the_interval_of_their_groups() -> None:
    """Another rate of the pictures of a result file must not count each of them as a group of its own."""
    at = names(np.repeat(np.arange(40), np.random.default_rng(2).integers(1, 6, 40)))
    hits = np.random.default_rng(3).random(len(at)) < 0.2
    for known in (hits, ~hits, np.zeros(len(at), bool), np.ones(len(at), bool)):
        for k in (0, 7, len(at)):
            found = stats.rate_like(stats.rate(known.tolist(), at), k)
            truth = stats.rate([i < k for i in range(len(at))], at)
            assert (found.value, found.n, found.groups) == (truth.value, truth.n, truth.groups)
            assert found.interval == pytest.approx(truth.interval, abs=1e-6)
    few = stats.rate([True] * 3, ["a", "b", "c"])
    assert stats.rate_like(few, 1) == Measured(1 / 3, None, 3, 3, TOO_FEW) and stats.rate_like(Measured(None), 0).n == 0


def test_the_interval_of_a_rate_counts_groups_of_any_size() -> None:
    """Thirty frames of one clip counted as thirty pictures: an interval a fifth as wide as it should be."""
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(300):
        at = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        draws.append(stats.rate((rng.random(40) < 0.3)[at].tolist(), names(at)))
        assert (draws[-1].groups, draws[-1].n) == (40, len(at))
    assert 0.92 <= share_held(draws, 0.3) <= 0.98  # 300 draws: two standard errors about 93 to 97


def test_a_further_hit_never_lowers_a_bound() -> None:
    """One false alarm of 42 had a smaller upper bound than none."""
    at = np.repeat(np.arange(20), [1, 2, 3, 4, 5] * 4)
    order = np.random.default_rng(1).permutation(len(at))
    hits = np.zeros(len(at), dtype=bool)
    before = (0.0, 0.0)
    for i in (-1, *order):
        hits[i] |= i >= 0
        interval = stats.rate(hits.tolist(), names(at)).interval
        assert interval is not None and interval[0] >= before[0] and interval[1] > before[1] - 1e-9
        assert interval[1] - interval[0] > 0.05  # none is shown as certain
        before = interval
    none = stats.rate([False] * 30, names(np.arange(30))).interval
    assert none == pytest.approx((0.0, 1 - 0.05 ** (1 / 30)))


def test_few_groups_have_no_interval() -> None:
    """A hundred pictures of one person with no false alarm: [0 %, 0 %], or a bound that nobody checked."""
    one = stats.rate([False] * 100, ["person"] * 100)
    assert (one.interval, one.note, one.n, one.groups) == (None, TOO_FEW, 100, 1)
    uneven = stats.rate([False] * 100, ["clip"] * 92 + [str(i) for i in range(8)])  # nine groups that count as one
    assert uneven.interval is None and uneven.groups == 9
    labels, scores = np.array([1, 1, 1] + [0] * 40), np.linspace(1, 0, 43)
    three = stats.measured_auc(labels, scores, names(np.arange(43)))
    assert (three.value, three.interval, three.note) == (1.0, None, TOO_FEW)  # AUC 1 of three fakes was [1, 1]
    assert stats.rate([], []) == Measured(None)
    assert stats.measured_auc(np.ones(3, np.int64), np.zeros(3), ["a", "b", "c"]).value is None
    few, many = stats.rate([True] * 3, ["a", "b", "c"]), stats.rate([False] * 30, names(np.arange(30)))
    gap = stats.rate_difference(few, many)
    assert (gap.value, gap.interval, gap.note, gap.n, gap.groups) == (1.0, None, TOO_FEW, 33, 33)
    assert stats.rate_difference(few, stats.rate([], [])).value is None
    for figure in (Measured(0.5, (0.4, 0.6), 10, 5), Measured(None), three):  # read back from its file
        assert Measured.read(asdict(figure)) == figure


def test_no_interval_of_zero_width() -> None:
    """Complete separation, or a scorer that says the same of everything, resampled: certainty."""
    labels, at = np.repeat([0, 1], 40), names(np.arange(80))
    for scores in (labels * 1.0, np.full(80, 0.5)):
        found = stats.measured_auc(labels, scores, at)
        assert found.interval is None and found.note == NO_SPREAD
    same = stats.auc_difference(labels, labels * 0.9, labels * 0.8, at)
    assert same.value == 0 and same.interval is None
    assert stats.mean(np.full(30, 0.2), at[:30]).interval is None


def clustered(rng: np.random.Generator, count: int, size: int, auc: float) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels, scores and groups of `count` groups a class, half of the spread shared within a group."""
    at = np.arange(2 * count).repeat(size)
    labels = (at < count).astype(np.int64)
    spread = np.sqrt(0.5) * rng.standard_normal(2 * count)[at] + np.sqrt(0.5) * rng.standard_normal(len(at))
    return labels, spread + math.sqrt(2) * norm.ppf(auc) * labels, names(at)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "auc"), [(15, 0.6), (15, 0.8), (30, 0.8), (60, 0.9)])
def test_the_interval_of_an_auc_covers_as_often_as_it_says(count: int, auc: float) -> None:
    """The percentile bootstrap of thirty groups held an AUC of 0.95 ninety times in a hundred."""
    rng = np.random.default_rng(count)
    draws = [stats.measured_auc(*clustered(rng, count, 3, auc)) for _ in range(400)]
    assert 0.925 <= share_held(draws, auc) <= 0.98  # 400 draws: two standard errors about 93 to 97


@pytest.mark.slow
def test_the_interval_of_a_difference_covers_as_often_as_it_says() -> None:
    """Unpaired, the difference of two models on the same pictures drowns in that of the pictures."""
    rng = np.random.default_rng(4)
    draws = []
    for _ in range(400):
        labels, scores, groups = clustered(rng, 30, 2, 0.8)
        other = scores + 0.3 * rng.standard_normal(len(scores))
        draws.append(stats.auc_difference(labels, scores, other, groups))
    truth = 0.8 - norm.cdf(norm.ppf(0.8) * math.sqrt(2) / math.sqrt(2 + 2 * 0.09))
    assert 0.925 <= share_held(draws, truth) <= 0.98
    assert np.median([drawn.interval[1] - drawn.interval[0] for drawn in draws if drawn.interval]) < 0.1


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers_as_often_as_it_says() -> None:
    """Micro F1 counts items, and items of one picture and pictures of one photo go together."""
    rng = np.random.default_rng(5)
    draws = []
    for _ in range(400):
        at = np.repeat(np.arange(30), 2)
        right = rng.binomial(3, rng.beta(3, 3, 30)[at])
        items = 2 * right + rng.binomial(4, 0.5, 60)
        draws.append(stats.ratio((2.0 * right).astype(np.float64), items.astype(np.float64), names(at)))
    assert 0.925 <= share_held(draws, 3 / 5) <= 0.98


def test_the_error_of_an_auc_by_hand() -> None:
    """A paired test that forgets the pairing finds nothing."""
    labels = np.repeat([1, 0], 30)
    scores = np.random.default_rng(0).normal(labels, 1)
    won = np.array([[(f > r) + (f == r) / 2 for r in scores[30:]] for f in scores[:30]])
    error = math.sqrt(np.var(won.mean(axis=1)) / 30 + np.var(won.mean(axis=0)) / 30)  # DeLong et al. 1988
    found = stats.measured_auc(labels, scores, names(np.arange(60)))
    assert found.value == pytest.approx(won.mean()) and found.value is not None and found.interval is not None
    reach = (math.log(found.interval[1] / (1 - found.interval[1])) - math.log(found.value / (1 - found.value))) / 2.045
    assert reach * found.value * (1 - found.value) == pytest.approx(error * math.sqrt(60 / 59), rel=1e-3)


def test_copies_do_not_matter() -> None:
    """Ten near copies of each clip pretend to be ten times the evidence."""
    labels, scores, groups = clustered(np.random.default_rng(6), 20, 2, 0.7)
    found = stats.measured_auc(labels, scores, groups)
    copied = stats.measured_auc(np.repeat(labels, 10), np.repeat(scores, 10), [g for g in groups for _ in range(10)])
    assert copied.interval == pytest.approx(found.interval)
