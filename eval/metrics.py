"""Metrics as pure functions over numpy arrays.

`labels` are 1 for fake and 0 for real, `scores` are P(fake), both of shape [n]. An undefined metric (one class only, no
samples) is None, never NaN. AUC and all intervals: `eval.stats`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import average_precision_score, log_loss, roc_curve

from eval.stats import Floats, Labels, both_classes
from x2dfd.files import Json

# A wrong probability of exactly 0 or 1 would cost infinitely much; this bounds the cost at 13.8 nats.
_EPS = 1e-6


def average_precision(labels: Labels, scores: Floats) -> float | None:
    """Average precision with fake as the positive class, no interpolation."""
    return float(average_precision_score(labels, scores)) if both_classes(labels) else None


def eer(labels: Labels, scores: Floats) -> float | None:
    """Equal error rate: the mean of FPR and FNR at the ROC point where they are nearest to each other. (DeepfakeBench
    gives that point's FPR alone, which calls a scorer with constant output perfect.)"""
    if not both_classes(labels):
        return None
    fpr, tpr, _ = roc_curve(labels, scores)
    nearest = np.argmin(np.abs((1 - tpr) - fpr))
    return float((fpr[nearest] + 1 - tpr[nearest]) / 2)


def tpr_at_fpr(labels: Labels, scores: Floats, fpr: float) -> float | None:
    """The largest share of fakes found by a threshold that calls at most the share `fpr` of reals fake."""
    if not both_classes(labels):
        return None
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(true[false <= fpr].max())


def accuracy(labels: Labels, scores: Floats) -> float | None:
    """Share of right answers when a score above 0.5 means fake."""
    return float(np.mean((scores > 0.5) == (labels == 1))) if len(labels) else None


def recalls(labels: Labels, scores: Floats) -> tuple[float | None, float | None]:
    """Share of reals called real and share of fakes called fake, when a score above 0.5 means fake."""
    fake = scores > 0.5
    real_recall = float(np.mean(~fake[labels == 0])) if np.any(labels == 0) else None
    fake_recall = float(np.mean(fake[labels == 1])) if np.any(labels == 1) else None
    return real_recall, fake_recall


def balanced_accuracy(labels: Labels, scores: Floats) -> float | None:
    """Mean of the recalls of both classes."""
    real, fake = recalls(labels, scores)
    return None if real is None or fake is None else (real + fake) / 2


def nll(labels: Labels, scores: Floats) -> float | None:
    """Mean negative log-likelihood in nats; scores are kept 1e-6 away from 0 and 1."""
    return float(log_loss(labels, np.clip(scores, _EPS, 1 - _EPS), labels=[0, 1])) if len(labels) else None


def in_bins(labels: Labels, scores: Floats, bins: int) -> tuple[Floats, Labels]:
    """Each sample's weight [n] and its bin of equal width [n]. Reals and fakes weigh a half each: P(fake) assumes even
    odds, so the share of fakes in a manifest must not count."""
    weight = np.where(labels == 1, 0.5 / labels.sum(), 0.5 / (labels == 0).sum())
    return weight, np.minimum((scores * bins).astype(np.int64), bins - 1)


def ece(labels: Labels, scores: Floats, bins: int = 15) -> float | None:
    """Expected calibration error of P(fake), over `in_bins`."""
    if not both_classes(labels):
        return None
    weight, place = in_bins(labels, scores, bins)
    return float(np.abs(np.bincount(place, weights=weight * (labels - scores), minlength=bins)).sum())


def cllr(labels: Labels, scores: Floats) -> float | None:
    """Log-likelihood-ratio cost in bits (Bruemmer & du Preez 2006): 0 is perfect, 1 says nothing. Scores are read as
    posteriors under even odds, and kept 1e-6 away from 0 and 1."""
    if not both_classes(labels):
        return None
    p = np.clip(scores, _EPS, 1 - _EPS)
    log_ratio = np.log(p / (1 - p))
    of_fakes = np.logaddexp(0, -log_ratio[labels == 1]).mean()
    of_reals = np.logaddexp(0, log_ratio[labels == 0]).mean()
    return float((of_fakes + of_reals) / (2 * np.log(2)))


def pool_by(ids: Sequence[str], labels: Labels, scores: Floats) -> tuple[list[str], Labels, Floats]:
    """Pools frame scores to their mean per clip; frames with the same id in `ids` are one clip. Returns the ids in
    sorted order with their labels and scores. Raises ValueError when frames of one id differ in label."""
    names, share, pooled = means_by(ids, labels, scores)
    if mixed := [name for name, value in zip(names, share, strict=True) if 0 < value < 1]:
        raise ValueError(f"real and fake frames under one id: {', '.join(mixed[:3])}")
    return names, share.astype(np.int64), pooled


def means_by(ids: Sequence[str], labels: Labels, scores: Floats) -> tuple[list[str], Floats, Floats]:
    """The different ids, sorted, with the mean label and the mean score of each."""
    names, place = np.unique(np.asarray(ids, dtype=str), return_inverse=True)
    sizes = np.bincount(place)
    return names.tolist(), np.bincount(place, labels) / sizes, np.bincount(place, scores) / sizes


def pool_sbi(
    ids: Sequence[str], labels: Labels, scores: Sequence[float | None]
) -> tuple[tuple[list[str], Labels, Floats], int]:
    """Pools as the papers after SBI (Shiohara & Yamasaki 2022) do: the mean of the frames' most suspicious faces, where
    a frame without a score (None) counts 0.5. Also returns the number of such frames."""
    filled = to_scores([0.5 if s is None else s for s in scores])
    return pool_by(ids, labels, filled), sum(s is None for s in scores)


def risk_coverage(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Coverage [n] and the share of wrong answers at it [n]. The surest answers come first: those farthest from
    0.5 in log-odds. Ties are answered together, so that the order of samples does not matter."""
    p = np.clip(scores, _EPS, 1 - _EPS)
    sure = np.abs(np.log(p / (1 - p)))
    wrong = (scores > 0.5) != (labels == 1)
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


def overlap(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> float | None:
    """Intersection over union of two masks of one shape; None where nothing is true."""
    return float((truth & predicted).sum() / (truth | predicted).sum()) if truth.any() else None


def cue_agreement(truth: Sequence[Collection[object]], predicted: Sequence[Collection[object]]) -> Json:
    """Precision, recall and F1 of sets, one pair of sets an image (areas, or (area, artifact) pairs).

    `micro` counts over all images together. `per_image` is the mean over images: precision over images where
    something was said, recall over images where something is true, F1 over images where either holds.
    """
    counts = np.array([(len(set(t) & set(p)), len(set(p)), len(set(t))) for t, p in zip(truth, predicted, strict=True)])
    counts = counts.reshape(-1, 3)
    each = [precision_recall_f1(row[None]) for row in counts]
    return {
        "n": len(counts),
        "micro": precision_recall_f1(counts),
        "per_image": {key: _mean(e[key] for e in each) for key in ("precision", "recall", "f1")},
    }


def precision_recall_f1(counts: NDArray[np.int64]) -> dict[str, float | None]:
    """From counts [n, 3] of right, said and true items, summed over n."""
    correct, predicted, true = (int(v) for v in counts.sum(axis=0))
    return {
        "precision": correct / predicted if predicted else None,
        "recall": correct / true if true else None,
        "f1": 2 * correct / (predicted + true) if predicted + true else None,
    }


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return sum(defined) / len(defined) if defined else None


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
