"""The ranking of cues: AUCs with intervals by group bootstrap, the controls, and the findings about each cue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from x2dfd.assessment.ask import CueQuestion, Floats, Pair
from x2dfd.files import Json
from x2dfd.types import Card

TOP_K = 40  # of 100 questions, in the paper
RESAMPLES = 1000
SHUFFLES = 40
HALVES = 20
MIN_PRESENT = 20  # images with the cue, and without it, below which the AUC on truth says too little
RANKED_BY = (
    "AUC of P(yes), mean over a cue's wordings: images where the cue is present against images where it is not, if the "
    f"truth is known and there are at least {MIN_PRESENT} of both; else fake against real"
)
RULE = (
    "strong: the lower end of the AUC's 95 % interval (group bootstrap) lies above 0.5 and the 95th percentile of "
    "the shuffled control (mean AUC of the top k when the truth is shuffled over groups); else weak"
)
RULE_TOP_K = "strong: among the first k of the ranking, as in X2-DFD; else weak"

Bools = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Separation:
    """How well P(yes) separates two sets of images."""

    auc: float | None  # None when one set is empty
    interval: Interval | None  # 95 %, by group bootstrap
    n_positive: int
    n_negative: int


@dataclass(frozen=True)
class Finding:
    """The figures of one question, or of one cue with all its wordings."""

    question: str | None  # None: this is about a cue
    area: str | None
    artifact: str | None
    origin: str
    wordings: int
    real_accuracy: float  # share of "no" on real images, from the hard answer, as published
    fake_accuracy: float  # share of "yes" on fake images; any other answer counts as neither
    balanced_accuracy: float  # their mean
    balanced_accuracy_interval: Interval | None
    yes_rate: float  # share of "yes" over all images: the model's yes-bias
    other_rate: float  # share of answers that are neither yes nor no
    overall: Separation  # fake against real
    present: Separation | None  # cue truly present against not; None without a cue
    decided_by: Literal["overall", "present"]  # which of the two ranks it
    strong: bool
    experts: tuple[str, ...]  # whose cards say that they cover the cue

    @property
    def cue(self) -> Pair | None:
        """Area and artifact."""
        return None if self.area is None or self.artifact is None else (self.area, self.artifact)

    @property
    def deciding(self) -> Separation:
        return self.present if self.present is not None and self.decided_by == "present" else self.overall


def experts_for(area: str, artifact: str, cards: Mapping[str, object]) -> tuple[str, ...]:
    """The experts whose card says that they cover a cue; `cards` as of `x2dfd.experts.cards`."""
    return tuple(name for name, c in cards.items() if isinstance(c, Card) and c.covers_cue(area, artifact))


def _aucs(scores: Floats, positive: Floats, negative: Floats) -> Floats:
    """AUC of scores [n] under each column of the weights [n, B]; ties count half; NaN where a side is empty."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)  # first image of each distinct score
    up, down = positive[order], negative[order]
    if len(starts) < len(scores):
        up, down = np.add.reduceat(up, starts, axis=0), np.add.reduceat(down, starts, axis=0)
    below = np.cumsum(down, axis=0) - down / 2
    pairs = up.sum(axis=0) * down.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(pairs > 0, (up * below).sum(axis=0) / pairs, np.nan))


def _interval(values: Floats) -> Interval | None:
    """Percentile interval of resampled values; None when more than half of them are undefined."""
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < len(values) or not len(defined):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None


def group_weights(groups: Sequence[str], resamples: int, seed: int) -> Floats:
    """Weights [n, resamples] of n images when whole groups are drawn with replacement.

    Frames of a clip and forgeries of a photo are not independent, so they are drawn together.
    """
    names, group_index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng([seed, 1])
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return np.asarray(draws.T[group_index], np.float64)


def _shuffles(groups: Sequence[str], seed: int) -> NDArray[np.intp]:
    """[n, SHUFFLES]: the image whose truth image i gets. Each group gets the truths of a random group, in random order.

    Truth (label and cues together) thus stays clustered, but belongs to other images.
    """
    names, group_index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    members = [np.flatnonzero(group_index == g) for g in range(len(names))]
    rng = np.random.default_rng([seed, 2])
    result = np.zeros((len(group_index), SHUFFLES), np.intp)
    for column in range(SHUFFLES):
        for images, donor_group in zip(members, rng.permutation(len(names)), strict=True):
            result[images, column] = np.resize(rng.permutation(members[donor_group]), len(images))
    return result


def _halves(groups: Sequence[str], seed: int) -> Floats:
    """[n, 2 * HALVES] weights: columns 2i and 2i + 1 are the two halves of the groups of split i."""
    names, group_index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng([seed, 3])
    columns = []
    for _ in range(HALVES):
        half = np.isin(group_index, rng.permutation(len(names))[: len(names) // 2])
        columns += [half, ~half]
    return np.stack(columns, 1).astype(np.float64)


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation over the entries defined in both; None for fewer than three, or if one side is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3:
        return None
    x, y = rankdata(a[both]), rankdata(b[both])
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else None


def top_mean(aucs: Floats, k: int) -> float:
    """Mean of the k best defined values; NaN when there is none."""
    defined = np.sort(aucs[np.isfinite(aucs)])[::-1][:k]
    return float(defined.mean()) if len(defined) else float("nan")


@dataclass(frozen=True, eq=False)
class Truth:
    """The truth about the n assessed images."""

    fake: Bools  # [n]
    pairs: dict[Pair, Bools]  # cue -> [n], true where the image has it
    known: Bools  # [n]: the cues of this image are known; false for a fake without a record of them
    groups: list[str]

    def sides(self, cue: Pair | None) -> tuple[Bools, Bools]:
        """Positive and negative images: with and without the cue, or fake and real for None."""
        if cue is None:
            return self.fake, ~self.fake
        present = self.pairs.get(cue, np.zeros(len(self.fake), bool))
        return present & self.known, ~present & self.known


@dataclass(frozen=True, eq=False)
class Entry:
    """A question or a cue before its figures are computed."""

    question: CueQuestion
    columns: list[int]  # of the answers
    scores: Floats  # [n], mean P(yes)
    basis: Pair | None  # the cue whose presence ranks it; None: fake against real


class Ranking:
    """Entries of one kind, all ranked and controlled in the same way."""

    def __init__(self, entries: Sequence[Entry], truth: Truth, seed: int, top_k: int | None) -> None:
        self.entries = list(entries)
        self.k = top_k or min(TOP_K, max(1, -(-2 * len(entries) // 5)))  # the paper's 40 of 100
        ones = np.ones((len(truth.fake), 1))
        self.aucs = self._deciding(truth, ones)[:, 0]  # [entries]
        shuffled = np.full((len(entries), SHUFFLES), np.nan)
        shuffle = _shuffles(truth.groups, seed)
        for e, entry in enumerate(entries):
            positive, negative = truth.sides(entry.basis)
            shuffled[e] = _aucs(entry.scores, positive[shuffle].astype(float), negative[shuffle].astype(float))
        means = np.array([top_mean(column, self.k) for column in shuffled.T])
        defined = bool(np.isfinite(means).any())
        self.null_mean = float(np.nanmean(means)) if defined else None
        self.bar = float(np.nanquantile(means, 0.95)) if defined else None
        self.halves = self._deciding(truth, _halves(truth.groups, seed))  # [entries, 2 * HALVES]

    def _deciding(self, truth: Truth, weights: Floats) -> Floats:
        rows = []
        for entry in self.entries:
            positive, negative = truth.sides(entry.basis)
            rows.append(_aucs(entry.scores, weights * positive[:, None], weights * negative[:, None]))
        return np.stack(rows) if rows else np.zeros((0, weights.shape[1]))

    def control(self) -> Json:
        return {
            "k": self.k,
            "shuffles": SHUFFLES,
            "top_mean_auc": _or_none(top_mean(self.aucs, self.k)),
            "shuffled_mean": self.null_mean,
            "shuffled_p95": self.bar,
        }

    def stability(self) -> Json:
        """Rank correlation between two halves of the groups, and the mean AUC of one half's best on the other half."""
        correlations, held_out = [], []
        for i in range(0, self.halves.shape[1], 2):
            for a, b in ((self.halves[:, i], self.halves[:, i + 1]), (self.halves[:, i + 1], self.halves[:, i])):
                best = np.argsort(np.where(np.isfinite(a), -a, np.inf), kind="stable")[: self.k]
                if np.isfinite(b[best]).any():
                    held_out.append(float(np.nanmean(b[best])))
            value = spearman(self.halves[:, i], self.halves[:, i + 1])
            if value is not None:
                correlations.append(value)
        return {
            "splits": HALVES,
            "spearman_mean": float(np.mean(correlations)) if correlations else None,
            "spearman_p05_p95": [float(q) for q in np.quantile(correlations, [0.05, 0.95])] if correlations else None,
            "held_out_top_mean_auc": float(np.mean(held_out)) if held_out else None,
        }


def findings(
    ranking: Ranking,
    truth: Truth,
    yes: Bools,
    no: Bools,
    weights: Floats,
    top_k: int | None,
    of_cues: bool,
    cards: Mapping[str, object],
) -> tuple[Finding, ...]:
    """The figures of each entry, best first."""
    enough_groups = len(set(truth.groups)) >= 2
    order = np.argsort(np.where(np.isfinite(ranking.aucs), -ranking.aucs, np.inf), kind="stable").tolist()
    real = ~truth.fake

    def separation(entry: Entry, cue: Pair | None) -> Separation:
        positive, negative = truth.sides(cue)
        auc = _aucs(entry.scores, positive[:, None].astype(float), negative[:, None].astype(float))[0]
        interval = None
        if np.isfinite(auc) and enough_groups:
            blocks = np.array_split(weights, max(1, weights.size // 2_000_000), axis=1)  # bounds memory
            interval = _interval(
                np.concatenate([_aucs(entry.scores, b * positive[:, None], b * negative[:, None]) for b in blocks])
            )
        return Separation(_or_none(float(auc)), interval, int(positive.sum()), int(negative.sum()))

    result = []
    for rank, e in enumerate(order):
        entry, q = ranking.entries[e], ranking.entries[e].question
        said_yes, said_no = yes[:, entry.columns].mean(1), no[:, entry.columns].mean(1)  # [n], over the wordings
        real_accuracy, fake_accuracy = float(said_no[real].mean()), float(said_yes[truth.fake].mean())
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = (
                (said_no * real) @ weights / (real @ weights)
                + (said_yes * truth.fake) @ weights / (truth.fake @ weights)
            ) / 2
        cue = q.cue
        overall, present = separation(entry, None), separation(entry, cue) if cue else None
        deciding = present if present is not None and entry.basis else overall
        lower_end = deciding.interval[0] if deciding.interval else None
        if top_k is not None:
            strong = rank < top_k and deciding.auc is not None
        else:
            strong = lower_end is not None and ranking.bar is not None and lower_end > max(0.5, ranking.bar)
        result.append(
            Finding(
                question=None if of_cues else q.text,
                area=q.area,
                artifact=q.artifact,
                origin=q.origin,
                wordings=len(entry.columns),
                real_accuracy=real_accuracy,
                fake_accuracy=fake_accuracy,
                balanced_accuracy=(real_accuracy + fake_accuracy) / 2,
                balanced_accuracy_interval=_interval(resampled) if enough_groups else None,
                yes_rate=float(said_yes.mean()),
                other_rate=float(1 - (yes | no)[:, entry.columns].mean()),
                overall=overall,
                present=present,
                decided_by="present" if entry.basis else "overall",
                strong=strong,
                experts=experts_for(cue[0], cue[1], cards) if cue else (),
            )
        )
    return tuple(result)
