"""Numbers with their intervals: AUC, rates, ratios, and the number of groups that an interval needs.

Frames of a clip and forgeries of a photo are not independent, so every interval counts groups, not pictures. Where a
method was not shown to cover the truth in 93 to 97 of 100 simulated samples (`tests/test_stats.py`), there is no
interval, and `Measured.note` says why: metrics without such a method (EER, TPR at an FPR, ECE) are plain numbers. The
percentile bootstrap was among the methods that fell short (AUC 0.95 of 30 groups a class: 90 of 100).

`labels` are 1 for fake and 0 for real, `scores` are P(fake), both of shape [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, expit, logit
from scipy.stats import rankdata, t
from sklearn.metrics import roc_auc_score

from x2dfd.files import Json

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Interval = tuple[float, float]

TAIL = 0.025  # of a 95 % interval, on each side
RATE_GROUPS = 8  # effective number of groups for the interval of a rate
MEAN_GROUPS = 15  # groups for the interval of a mean, a ratio or an AUC; of the AUC in each class
TOO_FEW = "too few groups for an interval"
NO_SPREAD = "no interval: these pictures show no variation"


@dataclass(frozen=True)
class Measured:
    """A number, its interval, and the counts behind both."""

    value: float | None  # None where it is not defined
    interval: Interval | None = None  # 95 %
    n: int = 0  # pictures, or other units
    groups: int = 0  # independent groups of them
    note: str = ""  # why there is no interval

    @classmethod
    def read(cls, part: Json) -> Self:
        """Reads a figure of a result file; unknown keys are ignored."""
        interval = (float(part["interval"][0]), float(part["interval"][1])) if part.get("interval") else None
        return cls(part["value"], interval, part.get("n", 0), part.get("groups", 0), part.get("note", ""))


def both_classes(labels: Labels) -> bool:
    """Whether there are reals and fakes."""
    return bool(0 < labels.sum() < len(labels))


def auc(labels: Labels, scores: Floats) -> float | None:
    """Area under the ROC curve; ties count half. None where a class is missing."""
    return float(roc_auc_score(labels, scores)) if both_classes(labels) else None


def placed(groups: Sequence[str]) -> Labels:
    """The number of each sample's group [n], in the order of the groups' names."""
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].astype(np.int64)


def rate(hits: Sequence[bool], groups: Sequence[str]) -> Measured:
    """The share of hits.

    The interval is the exact binomial one with mid-P (Lancaster 1961; Berry & Armitage 1995). Its number of trials is
    Kish's effective number of groups, (sum of sizes)^2 / (sum of squared sizes): a further hit never lowers either end,
    and where the pictures of a group are unlike it is too wide, not too narrow.
    """
    if not len(hits):
        return Measured(None)
    share, sizes = float(np.mean(hits)), np.bincount(placed(groups)).astype(np.float64)
    trials = float(sizes.sum() ** 2 / (sizes**2).sum())
    if trials < RATE_GROUPS:
        return Measured(share, None, len(hits), len(sizes), TOO_FEW)
    return Measured(share, binomial_interval(share * trials, trials), len(hits), len(sizes))


def binomial_interval(hits: float, trials: float) -> Interval:
    """The mid-P interval of `hits` in `trials`; neither needs to be whole."""

    def above(p: float) -> float:
        """P(more hits) + P(as many) / 2 under the share `p`."""
        at_least = betainc(hits, trials - hits + 1, p) if hits > 0 else 1.0
        more = betainc(hits + 1, trials - hits, p) if hits < trials else 0.0
        return float(at_least + more) / 2

    low = brentq(lambda p: above(p) - TAIL, 0, 1) if hits > 0 else 0.0
    high = brentq(lambda p: above(p) - (1 - TAIL), 0, 1) if hits < trials else 1.0
    return float(low), float(high)


def rate_difference(first: Measured, second: Measured) -> Measured:
    """A rate minus another one of different groups. The interval combines those of the two rates (Newcombe 1998, method
    10)."""
    n, groups = first.n + second.n, first.groups + second.groups
    if first.value is None or second.value is None:
        return Measured(None, None, n, groups)
    value = first.value - second.value
    if first.interval is None or second.interval is None:
        return Measured(value, None, n, groups, TOO_FEW)
    down = np.hypot(first.value - first.interval[0], second.interval[1] - second.value)
    up = np.hypot(first.interval[1] - first.value, second.value - second.interval[0])
    return Measured(value, (value - float(down), value + float(up)), n, groups)


def rate_like(known: Measured, hits: int) -> Measured:
    """The rate of other hits among the very pictures of a known rate, whose interval tells as how many independent
    groups these pictures count."""
    share = hits / known.n if known.n else None
    if share is None or known.value is None or known.interval is None:
        return Measured(share, None, known.n, known.groups, known.note)
    value, end = known.value, 0 if known.value == 1 else 1
    given = known.interval[end]
    trials = float(brentq(lambda t: binomial_interval(value * t, t)[end] - given, 1.0, 2.0 * known.n))
    return Measured(share, binomial_interval(share * trials, trials), known.n, known.groups)


def rate_share(first: Measured, second: Measured) -> Measured:
    """A rate over the sum of two rates. The interval combines those of the two rates on the scale of log-odds (Zou &
    Donner 2008), as if no group had a part in both; where some have, it is approximate. There is none where a rate is
    0."""
    n, groups = first.n + second.n, first.groups + second.groups
    if first.value is None or second.value is None or not first.value + second.value:
        return Measured(None, None, n, groups)
    value = first.value / (first.value + second.value)
    if first.interval is None or second.interval is None or not 0 < value < 1:
        return Measured(value, None, n, groups, TOO_FEW)
    (low, high), (other_low, other_high) = np.log(first.interval), np.log(second.interval)
    middle, other = np.log(first.value), np.log(second.value)
    down, up = np.hypot(middle - low, other_high - other), np.hypot(high - middle, other - other_low)
    return Measured(value, (float(expit(logit(value) - down)), float(expit(logit(value) + up))), n, groups)


def ratio(parts: Floats, wholes: Floats, groups: Sequence[str]) -> Measured:
    """Sum of `parts` over sum of `wholes`, both [n]: a mean where the wholes are 1; micro F1 as 2 hits over items."""
    total = float(wholes.sum())
    if not total:
        return Measured(None, None, len(parts), len(set(groups)))
    value, group_of = float(parts.sum()) / total, placed(groups)
    return _linear(value, (parts - value * wholes) / total, group_of, int(group_of.max()) + 1, len(parts))


def mean(values: Sequence[float] | Floats, groups: Sequence[str]) -> Measured:
    """The mean of values, with its interval."""
    array = np.asarray(values, np.float64)
    return ratio(array, np.ones(len(array)), groups)


def measured_auc(labels: Labels, scores: Floats, groups: Sequence[str]) -> Measured:
    """AUC; the interval is DeLong's with the terms of a group added up (Obuchowski 1997), on the scale of log-odds."""
    value = auc(labels, scores)
    if value is None:
        return Measured(None, None, len(labels), len(set(groups)))
    return _linear(value, _auc_terms(labels, scores), placed(groups), _rarer(labels, groups), len(labels))


def auc_difference(labels: Labels, first: Floats, second: Floats, groups: Sequence[str]) -> Measured:
    """AUC of `first` minus AUC of `second` on the same samples."""
    a, b = auc(labels, first), auc(labels, second)
    if a is None or b is None:
        return Measured(None, None, len(labels), len(set(groups)))
    terms = _auc_terms(labels, first) - _auc_terms(labels, second)
    return _linear(a - b, terms, placed(groups), _rarer(labels, groups), len(labels), odds=False)


def _auc_terms(labels: Labels, scores: Floats) -> Floats:
    """Each sample's influence on the AUC [n]: its share of won pairs minus the class's mean, over the class's size."""
    fakes, ranks = labels == 1, rankdata(scores)
    n_fake, n_real = int(fakes.sum()), int((~fakes).sum())
    terms = np.empty(len(labels))
    won = (ranks[fakes] - rankdata(scores[fakes])) / n_real  # of each fake: P(a real lies below it)
    lost = 1 - (ranks[~fakes] - rankdata(scores[~fakes])) / n_fake  # of each real: P(a fake lies above it)
    terms[fakes], terms[~fakes] = (won - won.mean()) / n_fake, (lost - lost.mean()) / n_real
    return terms


def _rarer(labels: Labels, groups: Sequence[str]) -> int:
    """The number of groups of the class that has fewer, which limits what an AUC can tell."""
    return min(len({g for g, value in zip(groups, labels, strict=True) if value == label}) for label in (0, 1))


def _linear(value: float, terms: Floats, group_of: Labels, independent: int, n: int, *, odds: bool = True) -> Measured:
    """A value with the t interval of a sum of `terms` [n] that are independent between groups only. `odds`: on
    the scale of log-odds, so that the interval stays within 0 to 1."""
    count = int(group_of.max()) + 1
    if independent < MEAN_GROUPS:
        return Measured(value, None, n, count, TOO_FEW)
    error = float(np.sqrt((np.bincount(group_of, weights=terms) ** 2).sum() * count / (count - 1)))
    if error < 1e-12 or (odds and not 0 < value < 1):
        return Measured(value, None, n, count, NO_SPREAD)
    reach = float(t.ppf(1 - TAIL, independent - 1)) * error
    if not odds:
        return Measured(value, (value - reach, value + reach), n, count)
    reach /= value * (1 - value)
    return Measured(value, (float(expit(logit(value) - reach)), float(expit(logit(value) + reach))), n, count)
