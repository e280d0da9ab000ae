"""Metrics as pure functions over numpy arrays.

`labels` are 1 for fake and 0 for real, `scores` are P(fake), both of shape [n]. What is not defined (one class only,
no samples) is None, never NaN. The definitions of AUC, EER and AP are those of DeepfakeBench.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score, roc_curve

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Metric = Callable[[Labels, Floats], float | None]
Interval = tuple[float, float]

# A probability of exactly 0 or 1 that is wrong would cost infinitely much; this bounds the cost at 13.8 nats.
_EPS = 1e-6


def _both(labels: Labels) -> bool:
    return bool(np.any(labels == 1) and np.any(labels == 0))


def auc(labels: Labels, scores: Floats) -> float | None:
    """Area under the ROC curve, trapezoids, ties count half."""
    return float(roc_auc_score(labels, scores)) if _both(labels) else None


def average_precision(labels: Labels, scores: Floats) -> float | None:
    """Average precision with fake as the positive class, no interpolation."""
    return float(average_precision_score(labels, scores)) if _both(labels) else None


def eer(labels: Labels, scores: Floats) -> float | None:
    """Equal error rate: the FPR at the ROC point with the smallest |FNR - FPR|, no interpolation, as DeepfakeBench
    has it.

    The curve is scikit-learn's default one, which leaves out points on a straight line.
    """
    if not _both(labels):
        return None
    fpr, tpr, _ = roc_curve(labels, scores)
    return float(fpr[np.nanargmin(np.abs((1 - tpr) - fpr))])


def tpr_at_fpr(labels: Labels, scores: Floats, fpr: float) -> float | None:
    """The largest share of fakes found by a threshold that calls at most the share `fpr` of reals fake."""
    if not _both(labels):
        return None
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(true[false <= fpr].max())


def accuracy(labels: Labels, scores: Floats, threshold: float = 0.5) -> float | None:
    """Share of right answers when a score above `threshold` means fake."""
    return float(np.mean((scores > threshold) == (labels == 1))) if len(labels) else None


def recalls(labels: Labels, scores: Floats, threshold: float = 0.5) -> tuple[float | None, float | None]:
    """Share of reals called real and share of fakes called fake, when a score above `threshold` means fake."""
    fake = scores > threshold
    real_recall = float(np.mean(~fake[labels == 0])) if np.any(labels == 0) else None
    fake_recall = float(np.mean(fake[labels == 1])) if np.any(labels == 1) else None
    return real_recall, fake_recall


def balanced_accuracy(labels: Labels, scores: Floats, threshold: float = 0.5) -> float | None:
    """Mean of the recalls of both classes."""
    real, fake = recalls(labels, scores, threshold)
    return None if real is None or fake is None else (real + fake) / 2


def nll(labels: Labels, scores: Floats) -> float | None:
    """Mean negative log-likelihood in nats; scores are kept 1e-6 away from 0 and 1."""
    return float(log_loss(labels, np.clip(scores, _EPS, 1 - _EPS), labels=[0, 1])) if len(labels) else None


def brier(labels: Labels, scores: Floats) -> float | None:
    """Mean squared difference between score and label."""
    return float(brier_score_loss(labels, scores, pos_label=1)) if len(labels) else None


def ece(labels: Labels, scores: Floats, bins: int = 15) -> float | None:
    """Expected calibration error of P(fake), bins of equal width: sum of share x |mean label - mean score|."""
    if not len(labels):
        return None
    place = np.minimum((scores * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, weights=labels - scores, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def ece_at_even_odds(labels: Labels, scores: Floats, bins: int = 15) -> float | None:
    """`ece` when reals and fakes weigh a half each: of a probability that assumes them equally likely beforehand."""
    if not _both(labels):
        return None
    return _resampled_ece(labels, scores, np.ones((1, len(labels)), np.int64), bins)[0]


def cllr(labels: Labels, scores: Floats, prior: float = 0.5) -> float | None:
    """Log-likelihood-ratio cost in bits (Bruemmer & du Preez 2006): 0 is perfect, 1 says nothing.

    Scores are read as posteriors under the prior P(fake) = `prior`, and kept 1e-6 away from 0 and 1.
    """
    if not _both(labels):
        return None
    p = np.clip(scores, _EPS, 1 - _EPS)
    log_ratio = np.log(p / (1 - p)) - np.log(prior / (1 - prior))
    of_fakes = np.logaddexp(0, -log_ratio[labels == 1]).mean()
    of_reals = np.logaddexp(0, log_ratio[labels == 0]).mean()
    return float((of_fakes + of_reals) / (2 * np.log(2)))


def pool_by(
    ids: Sequence[str], labels: Labels, scores: Floats, how: Literal["mean", "max"] = "mean"
) -> tuple[list[str], Labels, Floats]:
    """Pools frame scores to one score per clip; `ids` name the clips, must be unique to them, and are the only key.

    Returns the ids in sorted order with their labels and scores. Raises ValueError when frames of one id differ in
    label.
    """
    names, place = np.unique(np.asarray(ids, dtype=str), return_inverse=True)
    low, high = np.full(len(names), 2), np.full(len(names), -1)
    np.minimum.at(low, place, labels)
    np.maximum.at(high, place, labels)
    if mixed := names[low != high].tolist():
        raise ValueError(f"real and fake frames under one id: {', '.join(mixed[:3])}")
    if how == "mean":
        pooled = np.bincount(place, weights=scores, minlength=len(names)) / np.bincount(place, minlength=len(names))
    else:
        pooled = np.full(len(names), -np.inf)
        np.maximum.at(pooled, place, scores)
    return names.tolist(), low.astype(np.int64), pooled


def pool_sbi(
    ids: Sequence[str], labels: Labels, scores: Sequence[float | None]
) -> tuple[tuple[list[str], Labels, Floats], int]:
    """Pools as the papers after SBI (Shiohara & Yamasaki 2022) do; also returns how many frames had no score.

    A frame's score is that of its most suspicious face; a frame without one (None) counts 0.5; the mean over a clip's
    frames is the clip's.
    """
    filled = to_scores([0.5 if s is None else s for s in scores])
    return pool_by(ids, labels, filled), sum(s is None for s in scores)


def risk_coverage(labels: Labels, scores: Floats, threshold: float = 0.5) -> tuple[Floats, Floats]:
    """Coverage [n] and the share of wrong answers at it [n], the surest answers first.

    Sure is far from `threshold` on the scale of log-odds, the answer is the side; ties are answered together, so that
    the order of samples does not matter.
    """
    p, at = np.clip(scores, _EPS, 1 - _EPS), np.clip(threshold, _EPS, 1 - _EPS)
    sure = np.abs(np.log(p / (1 - p)) - np.log(at / (1 - at)))
    wrong = (scores > threshold) != (labels == 1)
    levels, place = np.unique(-sure, return_inverse=True)
    answered = np.cumsum(np.bincount(place, minlength=len(levels)))
    errors = np.cumsum(np.bincount(place, weights=wrong, minlength=len(levels)))
    return answered / max(len(labels), 1), errors / answered


def aurc(labels: Labels, scores: Floats) -> float | None:
    """Area under the risk-coverage curve (Geifman & El-Yaniv 2017): mean risk over all coverages; 0 is perfect."""
    if not len(labels):
        return None
    coverage, risk = risk_coverage(labels, scores)
    return float((np.diff(coverage, prepend=0.0) * risk).sum())


def rank_auc(labels: Labels, scores: Floats) -> float | None:
    """`auc` by ranks (Mann & Whitney): the same number, several times as fast on few samples."""
    n_fake = int(labels.sum())
    n_real = len(labels) - n_fake
    if not n_fake or not n_real:
        return None
    return float((rankdata(scores)[labels == 1].sum() - n_fake * (n_fake + 1) / 2) / (n_fake * n_real))


def delong(labels: Labels, first: Floats, second: Floats) -> dict[str, float | None]:
    """Difference of two AUCs on the same samples, its standard error, z, and two-sided p (DeLong et al. 1988).

    Takes samples as independent, which frames of a clip are not: the group bootstrap is the one to trust there.
    """
    if not _both(labels):
        return {"difference": None, "standard_error": None, "z": None, "p": None}
    fakes, reals = labels == 1, labels == 0
    m, n = int(fakes.sum()), int(reals.sum())
    of_fakes, of_reals = [], []  # structural components: P(real below this fake), P(fake above this real)
    for scores in (first, second):
        every = rankdata(scores)
        of_fakes.append((every[fakes] - rankdata(scores[fakes])) / n)
        of_reals.append(1 - (every[reals] - rankdata(scores[reals])) / m)
    difference = float(of_fakes[0].mean() - of_fakes[1].mean())
    spread = [np.var(a - b, ddof=1) / len(a) if len(a) > 1 else np.nan for a, b in (tuple(of_fakes), tuple(of_reals))]
    error = float(np.sqrt(sum(spread)))
    if not np.isfinite(error) or error == 0:
        return {"difference": difference, "standard_error": None, "z": None, "p": 1.0 if difference == 0 else None}
    z = difference / error
    return {"difference": difference, "standard_error": error, "z": z, "p": float(2 * norm.sf(abs(z)))}


def bootstrap_interval(
    fn: Metric,
    labels: Labels,
    scores: Floats,
    groups: Sequence[str],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    centred: bool = False,
) -> Interval | None:
    """Percentile interval of `fn(labels, scores)` when whole groups are drawn with replacement, `n` times.

    `centred`: moved so that the value of all samples is its median: for a mean of absolute gaps (ECE), which grows with
    the noise that resampling adds, and would lie below its own interval.

    Frames of a clip and forgeries of a photo are not independent: they come and go together. Resamples in which `fn`
    is not defined are left out; None when that is more than half of them, or when there are fewer than two groups.
    Does not depend on the order of the samples.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    if len(names) < 2 or n < 1:
        return None
    order = np.lexsort((scores, labels, place))  # so that ties in floating-point sums fall alike in every order
    labels, scores, place = labels[order], scores[order], place[order]
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)
    values: list[float] = []
    quick = _quick(fn)
    # In blocks, because [n, samples] weights of a large run would not fit into memory.
    for block in np.array_split(draws, max(1, n * len(labels) // 5_000_000 + 1)):
        if quick is not None:
            values.extend(quick(labels, scores, block[:, place]))
            continue
        for weights in block[:, place]:
            chosen = np.repeat(np.arange(len(labels)), weights)
            value = fn(labels[chosen], scores[chosen])
            if value is not None:
                values.append(value)
    if len(values) * 2 < n:
        return None
    tail = (1 - level) / 2
    low, middle, high = np.quantile(values, [tail, 0.5, 1 - tail])
    if centred and (own := fn(labels, scores)) is not None:
        low, high = (np.clip(v + own - middle, 0, 1) for v in (low, high))
    return float(low), float(high)


def _quick(fn: Metric) -> Callable[[Labels, Floats, NDArray[np.int64]], list[float]] | None:
    """The metric over all rows of weights [resamples, samples] at once, where it is one of those that can."""
    if isinstance(fn, partial) and fn.func is tpr_at_fpr and not fn.args and set(fn.keywords) == {"fpr"}:
        return partial(_resampled_tpr, fpr=fn.keywords["fpr"])
    known: dict[Metric, Callable[[Labels, Floats, NDArray[np.int64]], list[float]]] = {
        auc: _resampled_auc,
        average_precision: _resampled_precision,
        ece_at_even_odds: _resampled_ece,
    }
    return known.get(fn)


def _ranked(labels: Labels, scores: Floats, weights: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Fakes and reals at each distinct score, ascending: [resamples, distinct scores] each.

    Resamples with one class only are left out.
    """
    order = np.argsort(scores, kind="stable")
    ranked = weights[:, order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # first sample of each distinct score
    fakes = np.add.reduceat(ranked * labels[order], starts, axis=1)
    reals = np.add.reduceat(ranked, starts, axis=1) - fakes
    both = (fakes.sum(axis=1) > 0) & (reals.sum(axis=1) > 0)
    return fakes[both], reals[both]


def _resampled_auc(labels: Labels, scores: Floats, weights: NDArray[np.int64]) -> list[float]:
    fakes, reals = _ranked(labels, scores, weights)
    below = np.cumsum(reals, axis=1) - reals
    won = (fakes * (below + reals / 2)).sum(axis=1)
    return [float(v) for v in won / (fakes.sum(axis=1) * reals.sum(axis=1))]


def _resampled_precision(labels: Labels, scores: Floats, weights: NDArray[np.int64]) -> list[float]:
    fakes, reals = _ranked(labels, scores, weights)
    found, called = (np.cumsum(x[:, ::-1], axis=1) for x in (fakes, fakes + reals))
    summed = (fakes[:, ::-1] * (found / np.maximum(called, 1))).sum(axis=1)
    return [float(v) for v in summed / fakes.sum(axis=1)]


def _resampled_tpr(labels: Labels, scores: Floats, weights: NDArray[np.int64], fpr: float) -> list[float]:
    fakes, reals = _ranked(labels, scores, weights)
    found, alarms = (np.cumsum(x[:, ::-1], axis=1) for x in (fakes, reals))
    allowed = alarms / alarms[:, -1:] <= fpr
    return [float(v) for v in (found * allowed).max(axis=1) / found[:, -1]]


def _resampled_ece(labels: Labels, scores: Floats, weights: NDArray[np.int64], bins: int = 15) -> list[float]:
    """Expected calibration error with half of the weight on each class."""
    place = np.minimum((scores * bins).astype(np.int64), bins - 1)
    binned = np.equal.outer(place, np.arange(bins))  # [samples, bins]
    gaps = []
    for label in (0, 1):
        own = weights * (labels == label)
        with np.errstate(invalid="ignore"):  # a resample without this class becomes NaN and is left out below
            gaps.append(own @ (binned * (label - scores)[:, None]) / own.sum(axis=1, keepdims=True))
    errors = np.abs(gaps[0] + gaps[1]).sum(axis=1) / 2
    return [float(v) for v in errors[np.isfinite(errors)]]


def rate_interval(
    hits: NDArray[np.bool_], groups: Sequence[str], n: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval | None:
    """Interval of a share, by group bootstrap.

    A share of exactly 0 or 1 never varies under resampling; its open side is then the exact binomial (Clopper-
    Pearson) bound with the number of groups as the number of trials.
    """
    share = hits.mean() if len(hits) else 0.5
    if share in (0.0, 1.0):
        bound = float(((1 - level) / 2) ** (1 / len(set(groups))))
        return (0.0, 1 - bound) if share == 0 else (bound, 1.0)
    return bootstrap_interval(_mean_label, hits.astype(np.int64), hits.astype(np.float64), groups, n, seed, level)


def _mean_label(labels: Labels, scores: Floats) -> float | None:
    return float(labels.mean()) if len(labels) else None


def selective(labels: Labels, said: Sequence[str]) -> dict[str, Any]:
    """What is right when a system may decline: `said` holds `fake`, `real` or `inconclusive`.

    `coverage` is the share answered; accuracies are over what was answered; `false_alarms` is the share of all reals
    called fake and `misses` the share of all fakes called real, so that declining lowers both.
    """
    answer = np.asarray(said, dtype=str)
    real, fake = labels == 0, labels == 1
    answered = answer != "inconclusive"
    guess = (answer[answered] == "fake").astype(np.float64)
    return {
        "n": len(labels),
        "n_answered": int(answered.sum()),
        "coverage": float(answered.mean()) if len(labels) else None,
        "accuracy": accuracy(labels[answered], guess),
        "balanced_accuracy": balanced_accuracy(labels[answered], guess),
        "false_alarms": float(np.mean(answer[real] == "fake")) if real.any() else None,
        "misses": float(np.mean(answer[fake] == "real")) if fake.any() else None,
    }


def mean(_: Labels, values: Floats) -> float | None:
    """The mean of values that are not scores, for intervals of what is measured a picture; labels do not count."""
    return float(values.mean()) if len(values) else None


def overlap(truth: NDArray[np.bool_], said: NDArray[np.bool_]) -> float | None:
    """Intersection over union of two masks of one shape; None where nothing is true."""
    return float((truth & said).sum() / (truth | said).sum()) if truth.any() else None


def cue_agreement(truth: Sequence[Collection[Any]], said: Sequence[Collection[Any]]) -> dict[str, Any]:
    """Precision, recall and F1 of sets, one pair of sets an image (areas, or (area, artifact) pairs).

    `micro` counts over all images together. `per_image` is the mean over images: precision over images where
    something was said, recall over images where something is true, F1 over images where either holds.
    """
    counts = np.array([(len(set(t) & set(s)), len(set(s)), len(set(t))) for t, s in zip(truth, said, strict=True)])
    counts = counts.reshape(-1, 3)
    each = [precision_recall_f1(row[None]) for row in counts]
    return {
        "n": len(counts),
        "micro": precision_recall_f1(counts),
        "per_image": {key: _mean(e[key] for e in each) for key in ("precision", "recall", "f1")},
    }


def precision_recall_f1(counts: NDArray[np.int64]) -> dict[str, float | None]:
    """From counts [n, 3] of right, said and true items, summed over n."""
    right, said, true = (int(v) for v in counts.sum(axis=0))
    return {
        "precision": right / said if said else None,
        "recall": right / true if true else None,
        "f1": 2 * right / (said + true) if said + true else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def distinct_share(texts: Sequence[str]) -> float | None:
    """Share of different texts; case and white space do not count. A low share means a template."""
    return len({" ".join(t.lower().split()) for t in texts}) / len(texts) if len(texts) else None


def to_labels(labels: Iterable[str]) -> Labels:
    """`fake` to 1, `real` to 0; raises ValueError on anything else."""
    values = list(labels)
    if unknown := set(values) - {"real", "fake"}:
        raise ValueError(f"unknown labels: {sorted(unknown)}")
    return np.array([v == "fake" for v in values], dtype=np.int64)


def to_scores(scores: ArrayLike) -> Floats:
    """Scores as float64; raises ValueError on NaN or infinity, which would silently spoil a ranking."""
    values = np.asarray(scores, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    return values
