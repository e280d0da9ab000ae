"""Points of the curves that a result's page draws: ROC, calibration, risk against coverage."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_curve

from eval import metrics as m
from eval.stats import Floats, Labels, both_classes
from x2dfd.files import Json

POINTS = 200  # of a curve, at most
BINS = 10  # of the calibration curve, equal width


def of(labels: Labels, scores: Floats) -> Json:
    """`roc`: [false alarms, fakes found]; `risk_coverage`: [coverage, risk]; `reliability`: a row for each bin that is
    not empty, at even odds, which the probability assumes. All are empty if a class is missing."""
    if not both_classes(labels):
        return {"roc": [], "risk_coverage": [], "reliability": []}
    fpr, tpr, _ = roc_curve(labels, scores)
    coverage, risk = m.risk_coverage(labels, scores)
    return {
        "roc": _thinned(fpr, tpr),
        "risk_coverage": _thinned(coverage, risk),
        "reliability": _reliability(labels, scores) if scores.min() >= 0 and scores.max() <= 1 else [],
    }


def _reliability(labels: Labels, scores: Floats) -> list[Json]:
    """For each bin of P(fake), its mean, the share of fakes at even odds, and the number of pictures."""
    weight, place = m.in_bins(labels, scores, BINS)
    rows = []
    for k in np.unique(place):
        in_bin = place == k
        weights = weight[in_bin]
        rows.append(
            {
                "bin": [round(k / BINS, 4), round((k + 1) / BINS, 4)],
                "n": int(in_bin.sum()),
                "mean": round(float((scores[in_bin] * weights).sum() / weights.sum()), 4),
                "fake": round(float(weights[labels[in_bin] == 1].sum() / weights.sum()), 4),
            }
        )
    return rows


def _thinned(x: Floats, y: Floats) -> list[list[float]]:
    """At most POINTS points, ends included."""
    indices = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return [[round(float(x[i]), 4), round(float(y[i]), 4)] for i in indices]
