"""Shared by several tasks: equalised pictures, the slices of a set, and the figures of each."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval import metrics as m
from eval import stats
from eval.changes import Change
from eval.rows import SampleRow
from eval.stats import Floats, Labels, Measured
from x2dfd.files import Json
from x2dfd.manifest import Sample
from x2dfd.media import load_picture

Part = Json
"""A part of a result file: names to numbers, texts, `Measured` figures and further parts. JSON when it is written."""
Column = Sequence[float | None]
"""A scorer's P(fake) of each sample, None where it has none."""
Judged = tuple[Sample, SampleRow]

MIN_REALS = 10  # with fewer reals of its own, a slice is compared with all reals
FOLDS = 5  # of the groups, where something is chosen on the other folds
LONGEST_SIDE, JPEG_QUALITY = 1024, 90  # what every image goes through with --equalise


def equalise(pixels: NDArray[np.uint8]) -> bytes:
    """The picture in a common form, longest side at most 1024, JPEG quality 90, so that its format reveals nothing."""
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def equalised(path: Path) -> bytes:
    """The file's picture, equalised. Raises InputError for a file that is no picture."""
    return equalise(load_picture(path).pixels)


def changed(path: Path, change: Change, sample_id: str, *, equal: bool) -> bytes:
    """The file's picture under a change, as PNG. With `equal` it is equalised first, as in task `experts`. Raises
    InputError."""
    pixels = load_picture(equalised(path) if equal else path).pixels
    stream = io.BytesIO()
    Image.fromarray(change(pixels, sample_id)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


@dataclass(frozen=True)
class Scored:
    """The samples that a scorer could score: labels [n], scores [n], groups [n]."""

    samples: list[Sample]
    labels: Labels
    scores: Floats
    groups: list[str]
    at: list[int]  # their places among all samples

    @classmethod
    def of(cls, samples: Sequence[Sample], column: Column) -> Scored:
        at = [i for i, value in enumerate(column) if value is not None]
        scored = [samples[i] for i in at]
        scores = m.to_scores([value for value in column if value is not None])
        return cls(scored, m.to_labels(s.label for s in scored), scores, [s.group for s in scored], at)

    def auc(self, chosen: Sequence[int] | None = None) -> Measured:
        """The AUC of all samples, or of the chosen ones."""
        subset = range(len(self.samples)) if chosen is None else chosen
        index = np.asarray(subset, np.int64)
        return stats.measured_auc(self.labels[index], self.scores[index], [self.groups[i] for i in subset])

    def counts(self) -> Part:
        n_fake = int(self.labels.sum())
        return {"n": len(self.samples), "n_real": len(self.samples) - n_fake, "n_fake": n_fake,
                "n_groups": len(set(self.groups))}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """Samples with one value of a column, and the reals and fakes that are compared."""

    value: str
    reals: list[int]
    fakes: list[int]
    against: str  # own reals, all reals, all fakes

    def rates(self, answers: Sequence[str], groups: Sequence[str]) -> dict[str, Measured]:
        """The share of its own reals, and of its own fakes, that were called fake."""
        rates = {}
        for name, indices, pool in (("false_alarms", self.reals, "all reals"), ("found", self.fakes, "all fakes")):
            if self.against != pool:
                rates[name] = stats.rate([answers[i] == "fake" for i in indices], [groups[i] for i in indices])
        return rates


def slices(samples: Sequence[Sample], column: str) -> Iterator[Slice]:
    """The slices of a column. Those of `method` have the fakes of a method and the reals of their sources, those of any
    other column the reals and fakes with a value. Fakes with fewer than 10 such reals are compared with all reals,
    reals without fakes with all fakes."""
    values = [value_of(s, column) for s in samples]
    all_reals = [i for i, s in enumerate(samples) if s.label == "real"]
    all_fakes = [i for i, s in enumerate(samples) if s.label == "fake"]
    for value in sorted(set(values) - {""}):
        fakes = [i for i in all_fakes if values[i] == value]
        if column == "method":
            if not fakes:  # what reals have there ("none") is not a method
                continue
            sources = {samples[i].source for i in fakes}
            reals = [i for i in all_reals if samples[i].source in sources]
        else:
            reals = [i for i in all_reals if values[i] == value]
        if not fakes:
            yield Slice(value, reals, all_fakes, "all fakes")
        elif len(reals) < MIN_REALS:
            yield Slice(value, all_reals, fakes, "all reals")
        else:
            yield Slice(value, reals, fakes, "own reals")


def value_of(sample: Sample, column: str) -> str:
    """A column's value, or the first method of a combined one ("swap+relight")."""
    value = getattr(sample, column, None) or sample.extra.get(column)
    if column == "method" and value is not None:
        value = str(value).split("+")[0]
    return "" if value is None else str(value)


def folds(groups: Sequence[str]) -> NDArray[np.int64]:
    """A number 0 .. FOLDS - 1 for each sample [n], the same for all of a group, whatever the order of samples."""
    group_of = stats.placed(groups)
    return np.random.default_rng(0).permutation(int(group_of.max(initial=-1)) + 1)[group_of] % FOLDS


def train_apart(all_samples: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """The train split, or nothing if some of it is judged."""
    judged_ids = {s.id for s in samples}
    train = [s for s in all_samples if s.split == "train"]
    return [] if any(s.id in judged_ids for s in train) else train


def share(pairs: Sequence[Judged], hit: Callable[[Sample, SampleRow], bool]) -> Measured:
    """The share of the judged samples that are hits."""
    return stats.rate([hit(s, row) for s, row in pairs], [s.group for s, _ in pairs])


def called_fake(_: Sample, row: SampleRow) -> bool:
    """A hit, for `share`."""
    return row.said == "fake"


def three_answers(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """The three answers over all pictures that could be opened; one without a face counts as not answered. AUC, ECE and
    accuracy are of the answered pictures alone."""
    pairs = [(s, row) for s, row in zip(samples, rows, strict=True) if row.said]
    answered = [(s, row) for s, row in pairs if row.said != "inconclusive"]
    reals, fakes = ([p for p in pairs if p[0].label == label] for label in ("real", "fake"))
    scored = Scored.of([s for s, _ in answered], [row.p_fake for _, row in answered])
    reasons = Counter(row.reason or "no reason" for _, row in pairs if row.said == "inconclusive")
    predictions = m.to_scores([row.said == "fake" for _, row in answered])
    return {
        "n": len(pairs),
        "n_answered": len(answered),
        "coverage": share(pairs, lambda _, row: row.said != "inconclusive"),
        "accuracy": share(answered, lambda s, row: row.said == s.label),
        "balanced_accuracy": m.balanced_accuracy(m.to_labels(s.label for s, _ in answered), predictions),
        "auc": scored.auc(),
        "ece": m.ece(scored.labels, scored.scores),
        "false_alarms": share(reals, called_fake),
        "misses": share(fakes, lambda _, row: row.said == "real"),
        "inconclusive": dict(sorted(reasons.items())),
    }


def false_alarms_by(samples: Sequence[Sample], rows: Sequence[SampleRow], column: str) -> dict[str, Measured]:
    """For each value of a column, the share of its reals that were called fake. One without a face counts as not."""
    reals: dict[str, list[Judged]] = defaultdict(list)
    for s, row in zip(samples, rows, strict=True):
        if s.label == "real" and row.said:
            reals[value_of(s, column)].append((s, row))
    return {value: share(reals[value], called_fake) for value in sorted(reals) if value}


def common_auc(samples: Sequence[Sample], columns: Mapping[str, Column]) -> Part:
    """AUC on the samples that every scorer could score, so that the scorers can be compared."""
    common = [i for i in range(len(samples)) if all(column[i] is not None for column in columns.values())]
    subset = [samples[i] for i in common]
    return {"n": len(common), "auc": {n: Scored.of(subset, [c[i] for i in common]).auc() for n, c in columns.items()}}


def micro_f1(truth: Sequence[Set[object]], predicted: Sequence[Set[object]], groups: Sequence[str]) -> Measured:
    """F1 over (area, artifact) pairs or areas of all samples together, one pair of sets a sample."""
    correct = np.array([2.0 * len(t & p) for t, p in zip(truth, predicted, strict=True)])
    items = np.array([float(len(t) + len(p)) for t, p in zip(truth, predicted, strict=True)])
    return stats.ratio(correct, items, groups)


def unscored(rows: Sequence[SampleRow], column: Column, scorer: str = "") -> dict[str, int]:
    """The reasons for missing scores, each with its count."""
    return dict(sorted(Counter(r.why(scorer) for r, v in zip(rows, column, strict=True) if v is None).items()))


def point_metrics(scored: Scored, *, probability: bool = True) -> Part:
    """The metrics of the ranking and, for a probability, of its calibration. Those without an interval are numbers."""
    tpr = {f"tpr_at_fpr_{fpr}": m.tpr_at_fpr(scored.labels, scored.scores, fpr) for fpr in (0.01, 0.05, 0.1)}
    metrics: Part = {"auc": scored.auc(), "average_precision": m.average_precision(scored.labels, scored.scores)}
    metrics |= {"eer": m.eer(scored.labels, scored.scores)} | tpr
    if not probability:
        return metrics
    metrics |= {
        "brier": stats.mean((scored.scores - scored.labels) ** 2, scored.groups),
        "ece": m.ece(scored.labels, scored.scores),
    }
    for name, fn in (("nll", m.nll), ("cllr", m.cllr), ("aurc", m.aurc)):
        metrics[name] = fn(scored.labels, scored.scores)
    real, fake = m.recalls(scored.labels, scored.scores)
    accuracy = {"accuracy": m.accuracy(scored.labels, scored.scores)}
    accuracy |= {"balanced_accuracy": m.balanced_accuracy(scored.labels, scored.scores)}
    return metrics | {"at_0.5": accuracy | {"recall_real": real, "recall_fake": fake}}
