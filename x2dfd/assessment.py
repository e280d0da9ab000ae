"""Model feature assessment (MFA): which forgery cues a multimodal LLM can see.

Every yes/no question is put to the model about every labelled face; questions and cues are ranked by how well P(yes)
separates. MFA is from X2-DFD (arXiv 2410.06126), which ranks by the hard answer; beside that stand here the AUC of
P(yes), intervals by group bootstrap, the images where a cue is *truly* present, and two controls: shuffled truth and
questions that have nothing to do with forgery.

Files written: `answers.parquet` (a row an image), `assessment.json`, `table.md`, `assessment.png`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from x2dfd.errors import X2DFDError
from x2dfd.files import write_text
from x2dfd.manifest import manifest_sha256
from x2dfd.progress import progress
from x2dfd.types import Cue

if TYPE_CHECKING:
    from x2dfd.crops import CropSet

BANK = Path(__file__).parent / "questions.json"
"""The questions that are asked when no others are given."""

TOP_K = 40  # of 100 questions, in the paper
RESAMPLES = 1000
SHUFFLES = 40
HALVES = 20
MIN_PRESENT = 20  # images with the cue, and without it, below which the AUC on truth says too little
PART = 16  # images whose answers a killed run can lose
RANKED_BY = (
    "AUC of P(yes), mean over a cue's wordings: images where the cue is present against images where it is not, if the "
    f"truth is known and there are at least {MIN_PRESENT} of both; else fake against real"
)
RULE = (
    "strong: the lower end of the AUC's 95 % interval (group bootstrap) lies above 0.5 and the 95th percentile of "
    "the shuffled control (mean AUC of the top k when the truth is shuffled over groups); else weak"
)
RULE_TOP_K = "strong: among the first k of the ranking, as in X2-DFD; else weak"

COVERS: dict[str, tuple[tuple[str, str], ...]] = {
    "blending": (
        ("*", "blending"),
        *((area, a) for area in ("face-contour", "jaw", "cheeks", "forehead") for a in ("colour", "blur", "noise")),
        *(("skin", a) for a in ("colour", "blur", "noise")),
    ),
    "clip": (
        *(("whole-image", a) for a in ("texture", "frequency", "noise", "lighting", "colour", "missing-detail")),
        *(("skin", a) for a in ("texture", "frequency", "missing-detail")),
        ("cheeks", "texture"),
        ("forehead", "texture"),
        ("*", "frequency"),
    ),
    "consistency": tuple(
        ("*", a)
        for a in (
            "blending",
            "blur",
            "noise",
            "colour",
            "compression",
            "frequency",
            "missing-detail",
            "texture",
            "geometry",
            "asymmetry",
            "expression",
        )
    ),
    "upsampling": (("whole-image", "frequency"), ("whole-image", "texture"), ("skin", "frequency")),
    "spectrum-noise": (("*", "noise"), ("*", "frequency"), ("whole-image", "compression"), ("whole-image", "texture")),
}
"""Which expert is trained to see which (area, artifact); `*` is any. A declaration, not a measurement."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Interval = tuple[float, float]


@dataclass(frozen=True)
class CueQuestion:
    """A yes/no question about one face."""

    text: str
    area: str | None  # of the cue that a yes asserts; None for a control, or when a published text names none
    artifact: str | None
    origin: str  # bank | random | published:FILE | generated:MODEL

    def __post_init__(self) -> None:
        if (self.area is None) != (self.artifact is None):
            raise ValueError(f"half a cue: {self.area} x {self.artifact}")
        if self.area is not None and self.artifact is not None:
            Cue(self.area, self.artifact)


class Answers(Protocol):
    """What a model says to q questions."""

    @property
    def p_yes(self) -> Floats: ...  # [q], softmax over the Yes and No tokens
    @property
    def said(self) -> tuple[str, ...]: ...  # q times the greedy answer: "yes", "no" or "other"


class Answerer(Protocol):
    """Any MLLM that answers yes/no questions about one aligned face crop [224, 224, 3]."""

    name: str

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> Answers: ...


@dataclass(frozen=True)
class Separation:
    """How well P(yes) separates two sets of images."""

    auc: float | None  # None when one set is empty
    interval: Interval | None  # 95 %, by group bootstrap
    n_positive: int
    n_negative: int


@dataclass(frozen=True)
class Finding:
    """What was found of one question, or of one cue with all its wordings."""

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
    experts: tuple[str, ...]  # that cover the cue, by declaration

    @property
    def deciding(self) -> Separation:
        return self.present if self.present is not None and self.decided_by == "present" else self.overall

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        def separation(d: dict[str, Any] | None) -> Separation | None:
            return None if d is None else Separation(**{**d, "interval": _pair(d["interval"])})

        return cls(
            **{
                **data,
                "balanced_accuracy_interval": _pair(data["balanced_accuracy_interval"]),
                "overall": separation(data["overall"]),
                "present": separation(data["present"]),
                "experts": tuple(data["experts"]),
            }
        )


@dataclass(frozen=True)
class Assessment:
    """The ranking, what it is worth, and what it was made of."""

    model: str
    manifest_sha256: str | None
    questions_sha256: str
    split: str | None
    limit: int | None
    seed: int
    n_real: int
    n_fake: int
    n_groups: int
    n_unusable: int  # files of the manifest (any split) without a usable face
    n_unknown_truth: int  # fakes whose cues nobody recorded: left out where presence is compared
    ranked_by: str
    rule: str
    cues: tuple[Finding, ...]  # best first
    questions: tuple[Finding, ...]  # best first, without the controls
    unrelated: tuple[Finding, ...]  # the control questions, best first
    control: dict[str, Any]  # the same ranking with shuffled truth: mean and 95th percentile of the top-k mean AUC
    stability: dict[str, Any]  # Spearman correlation of the rankings of two halves of the groups
    random: dict[str, Any] | None  # unrelated questions beside ours, fake against real
    uncovered: tuple[tuple[str, str], ...]  # weak cues that no expert covers

    def published(self) -> list[dict[str, Any]]:
        """The question list in X2-DFD's result shape, best balanced accuracy first."""
        keys = ("question", "real_accuracy", "fake_accuracy", "balanced_accuracy")
        rows = [{k: getattr(f, k) for k in keys} for f in self.questions]
        return sorted(rows, key=lambda r: -float(r["balanced_accuracy"]))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "published": self.published()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        ours = dict(data)
        ours.pop("published", None)  # derived
        for key in ("cues", "questions", "unrelated"):
            ours[key] = tuple(Finding.from_dict(f) for f in ours[key])
        ours["uncovered"] = tuple((area, artifact) for area, artifact in ours["uncovered"])
        return cls(**ours)


def _pair(value: Sequence[float] | None) -> Interval | None:
    return None if value is None else (value[0], value[1])


# --- files ----------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[CueQuestion]:
    """Read a question file of `python -m data_gen questions`. Raises X2DFDError when it is not one."""
    try:
        data = json.loads(path.read_text("utf-8"))
        questions = [CueQuestion(**q) for q in data["questions"]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise X2DFDError(
            f"{path}: not a question file ({error}); a published list becomes one by "
            f"`python -m data_gen questions --published {path} --out FILE`"
        ) from error
    if not questions:
        raise X2DFDError(f"{path}: no questions")
    return questions


def read_assessment(path: Path) -> Assessment:
    """Read `assessment.json` (or the folder that holds it). Raises X2DFDError when it is not one."""
    file = path / "assessment.json" if path.is_dir() else path
    try:
        return Assessment.from_dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise X2DFDError(f"{file}: not an assessment ({error!r}); make one: x2dfd assess --data … --out …") from error


def strong_cues(assessment: Assessment) -> list[tuple[str, str]]:
    """(area, artifact) of the strong cues, best first."""
    return [(f.area, f.artifact) for f in assessment.cues if f.strong and f.area and f.artifact]


def experts_for(area: str, artifact: str) -> tuple[str, ...]:
    """The experts that cover a cue, by the table `COVERS`."""
    return tuple(
        name for name, pairs in COVERS.items() if any(a in ("*", area) and b in ("*", artifact) for a, b in pairs)
    )


def uncovered(cues: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of the (weak) cues that no expert covers."""
    return [(area, artifact) for area, artifact in cues if not experts_for(area, artifact)]


# --- answers --------------------------------------------------------------------------------------------------------

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("crop_sha256", pa.string()),
        ("p_yes", pa.list_(pa.float64())),
        ("said", pa.list_(pa.string())),
    ]
)
_Row = dict[str, Any]


def _save_rows(path: Path, rows: Sequence[_Row], key: dict[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    table = pa.Table.from_pylist(list(rows), schema=_SCHEMA.with_metadata(key))
    pq.write_table(table, temporary, use_dictionary=["said"])
    os.replace(temporary, path)


def _saved_rows(out: Path, key: dict[str, str]) -> dict[str, _Row]:
    """Answers of earlier runs in `out`, by image id."""
    rows: dict[str, _Row] = {}
    for file in [out / "answers.parquet", *sorted((out / "answers.parts").glob("*.parquet"))]:
        if not file.is_file():
            continue
        table = pq.read_table(file)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        if any(metadata.get(k) != v for k, v in key.items()):
            raise X2DFDError(f"{out} holds answers of another model or to other questions; choose another --out")
        rows.update({r["id"]: r for r in table.to_pylist()})
    return rows


def _ask(model: Answerer, crop: NDArray[np.uint8], texts: Sequence[str]) -> tuple[list[float], list[str]]:
    answers = model.yes_no(np.ascontiguousarray(crop), texts)
    p_yes, said = np.asarray(answers.p_yes, np.float64), list(answers.said)
    if p_yes.shape != (len(texts),) or len(said) != len(texts):
        raise X2DFDError(
            f"{model.name} gave {p_yes.shape} probabilities and {len(said)} answers to {len(texts)} questions"
        )
    if not (np.isfinite(p_yes).all() and (p_yes >= 0).all() and (p_yes <= 1).all()):
        raise X2DFDError(f"{model.name} gave a P(yes) outside [0, 1]")
    if strange := set(said) - {"yes", "no", "other"}:
        raise X2DFDError(f"{model.name} gave answers other than yes, no, other: {sorted(strange)}")
    return p_yes.tolist(), said


def _answers(
    model: Answerer, data: CropSet, chosen: Sequence[int], texts: Sequence[str], out: Path, show: bool
) -> list[_Row]:
    """Answers for the chosen images, in their order; what an earlier run saved is not asked again."""
    parts = out / "answers.parts"
    parts.mkdir(parents=True, exist_ok=True)
    key = {"model": model.name, "questions": json.dumps(list(texts), ensure_ascii=False)}
    saved = _saved_rows(out, key)
    known = {
        s.id: saved[s.id]
        for i, s in enumerate(data.samples)
        if s.id in saved and saved[s.id]["crop_sha256"] == _sha256(data, i)
    }
    again = next((i for i in chosen if data.samples[i].id in known), None)
    if again is not None:  # two models may go by one name
        p_yes, _ = _ask(model, data.crops[again], texts)
        if not np.allclose(p_yes, known[data.samples[again].id]["p_yes"], rtol=0, atol=1e-3):
            raise X2DFDError(f"{out} holds answers of another model named {model.name!r}; choose another --out")
    todo = [i for i in chosen if data.samples[i].id not in known]
    fresh: list[_Row] = []
    number = len(list(parts.glob("*.parquet")))
    for done, i in enumerate(progress(todo, "asking") if show else todo, start=1):
        p_yes, said = _ask(model, data.crops[i], texts)
        fresh.append({"id": data.samples[i].id, "crop_sha256": _sha256(data, i), "p_yes": p_yes, "said": said})
        if len(fresh) == PART or done == len(todo):
            _save_rows(parts / f"{number:06d}.parquet", fresh, key)
            known.update({r["id"]: r for r in fresh})
            number, fresh = number + 1, []
    # Answers beyond the chosen images stay: a smaller --limit must not throw hours away.
    _save_rows(out / "answers.parquet", [known[s.id] for s in data.samples if s.id in known], key)
    for file in parts.glob("*"):
        file.unlink()
    parts.rmdir()
    return [known[data.samples[i].id] for i in chosen]


def _sha256(data: CropSet, i: int) -> str:
    return hashlib.sha256(data.crops[i].tobytes()).hexdigest()


# --- statistics -----------------------------------------------------------------------------------------------------


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
    return float(value) if np.isfinite(value) else None


def group_weights(groups: Sequence[str], resamples: int, seed: int) -> Floats:
    """Weights [n, resamples] of n images when whole groups are drawn with replacement.

    Frames of a clip and forgeries of a photo are not independent: they come and go together.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng([seed, 1])
    draws = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return np.asarray(draws.T[place], np.float64)


def _shuffles(groups: Sequence[str], seed: int) -> NDArray[np.intp]:
    """[n, SHUFFLES]: whose truth image i gets. Each group gets the truths of one random group, in random order.

    Truth (label and cues together) thus stays clustered as it is, but belongs to other images.
    """
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    members = [np.flatnonzero(place == g) for g in range(len(names))]
    rng = np.random.default_rng([seed, 2])
    result = np.zeros((len(place), SHUFFLES), np.intp)
    for column in range(SHUFFLES):
        for mine, theirs in zip(members, rng.permutation(len(names)), strict=True):
            result[mine, column] = np.resize(rng.permutation(members[theirs]), len(mine))
    return result


def _halves(groups: Sequence[str], seed: int) -> Floats:
    """[n, 2 * HALVES] weights: columns 2i and 2i + 1 are the two halves of the groups of split i."""
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng([seed, 3])
    columns = []
    for _ in range(HALVES):
        first = np.isin(place, rng.permutation(len(names))[: len(names) // 2])
        columns += [first, ~first]
    return np.stack(columns, 1).astype(np.float64)


def _ranks(values: Floats) -> Floats:
    """Ranks from 0, ties averaged."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts + 1) / 2)[place])


def spearman(a: Floats, b: Floats) -> float | None:
    """Rank correlation over the entries that both define; None below three of them, or when one side is constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3:
        return None
    x, y = _ranks(a[both]), _ranks(b[both])
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum() / norm) if norm > 0 else None


def _top_mean(aucs: Floats, k: int) -> float:
    """Mean of the k best defined values; NaN when there is none."""
    defined = np.sort(aucs[np.isfinite(aucs)])[::-1][:k]
    return float(defined.mean()) if len(defined) else float("nan")


@dataclass(frozen=True, eq=False)
class _Truth:
    """What is known of the n assessed images."""

    fake: Bools  # [n]
    pairs: dict[tuple[str, str], Bools]  # cue -> [n], truly there
    known: Bools  # [n]: the cues of this image are known; false for a fake without a record of them
    groups: list[str]

    def sides(self, cue: tuple[str, str] | None) -> tuple[Bools, Bools]:
        """Positive and negative images: cue there or not, or fake and real for None."""
        if cue is None:
            return self.fake, ~self.fake
        there = self.pairs.get(cue, np.zeros(len(self.fake), bool))
        return there & self.known, ~there & self.known


@dataclass(frozen=True, eq=False)
class _Entry:
    """A question or a cue before it is judged."""

    question: CueQuestion
    columns: list[int]  # of the answers
    scores: Floats  # [n], mean P(yes)
    basis: tuple[str, str] | None  # the cue whose presence ranks it; None: fake against real


class _Ranking:
    """Entries of one kind, all ranked and controlled in the same way."""

    def __init__(self, entries: Sequence[_Entry], truth: _Truth, seed: int, top_k: int | None) -> None:
        self.entries = list(entries)
        self.k = top_k or min(TOP_K, max(1, -(-2 * len(entries) // 5)))  # the paper's 40 of 100
        ones = np.ones((len(truth.fake), 1))
        self.aucs = self._deciding(truth, ones)[:, 0]  # [entries]
        shuffled = np.full((len(entries), SHUFFLES), np.nan)
        moved = _shuffles(truth.groups, seed)
        for e, entry in enumerate(entries):
            up, down = truth.sides(entry.basis)
            shuffled[e] = _aucs(entry.scores, up[moved].astype(float), down[moved].astype(float))
        self.null = np.array([_top_mean(column, self.k) for column in shuffled.T])
        self.null_mean = _or_none(float(np.nanmean(self.null))) if np.isfinite(self.null).any() else None
        self.bar = float(np.nanquantile(self.null, 0.95)) if np.isfinite(self.null).any() else None
        self.halves = self._deciding(truth, _halves(truth.groups, seed))  # [entries, 2 * HALVES]

    def _deciding(self, truth: _Truth, weights: Floats) -> Floats:
        rows = []
        for entry in self.entries:
            up, down = truth.sides(entry.basis)
            rows.append(_aucs(entry.scores, weights * up[:, None], weights * down[:, None]))
        return np.stack(rows) if rows else np.zeros((0, weights.shape[1]))

    def control(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "shuffles": SHUFFLES,
            "top_mean_auc": _or_none(_top_mean(self.aucs, self.k)),
            "shuffled_mean": self.null_mean,
            "shuffled_p95": self.bar,
        }

    def stability(self) -> dict[str, Any]:
        """Agreement of two halves, and what the best of one half are worth on the other."""
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


def _findings(
    ranking: _Ranking, truth: _Truth, yes: Bools, no: Bools, weights: Floats, top_k: int | None, of_cues: bool
) -> tuple[Finding, ...]:
    """Everything said of each entry, best first."""
    enough_groups = len(set(truth.groups)) >= 2
    order = np.argsort(np.where(np.isfinite(ranking.aucs), -ranking.aucs, np.inf), kind="stable").tolist()
    real = ~truth.fake

    def separation(entry: _Entry, cue: tuple[str, str] | None) -> Separation:
        up, down = truth.sides(cue)
        auc = _aucs(entry.scores, up[:, None].astype(float), down[:, None].astype(float))[0]
        interval = None
        if np.isfinite(auc) and enough_groups:
            blocks = np.array_split(weights, max(1, weights.size // 2_000_000), axis=1)  # bounds memory
            interval = _interval(
                np.concatenate([_aucs(entry.scores, b * up[:, None], b * down[:, None]) for b in blocks])
            )
        return Separation(_or_none(float(auc)), interval, int(up.sum()), int(down.sum()))

    found = []
    for place, e in enumerate(order):
        entry, q = ranking.entries[e], ranking.entries[e].question
        said_yes, said_no = yes[:, entry.columns].mean(1), no[:, entry.columns].mean(1)  # [n], over the wordings
        real_accuracy, fake_accuracy = float(said_no[real].mean()), float(said_yes[truth.fake].mean())
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled = (
                (said_no * real) @ weights / (real @ weights)
                + (said_yes * truth.fake) @ weights / (truth.fake @ weights)
            ) / 2
        cue = (q.area, q.artifact) if q.area is not None and q.artifact is not None else None
        overall, present = separation(entry, None), separation(entry, cue) if cue else None
        deciding = present if present is not None and entry.basis else overall
        low = deciding.interval[0] if deciding.interval else None
        if top_k is not None:
            strong = place < top_k and deciding.auc is not None
        else:
            strong = low is not None and ranking.bar is not None and low > max(0.5, ranking.bar)
        found.append(
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
                experts=experts_for(*cue) if cue else (),
            )
        )
    return tuple(found)


# --- the assessment -------------------------------------------------------------------------------------------------


def chosen_pictures(data: CropSet, split: str | None, limit: int | None, seed: int) -> list[int]:
    """Images to ask about, in the data's order; with `limit`, half real and half fake as far as they go.

    A smaller limit chooses a part of what a larger one chooses.
    """
    rng = np.random.default_rng([seed, 0])
    sides = {
        label: [i for i, s in enumerate(data.samples) if s.label == label and split in (None, s.split)]
        for label in ("real", "fake")
    }
    if empty := [label for label, side in sides.items() if not side]:
        where = f" in split {split!r}" if split else ""
        raise X2DFDError(f"an assessment compares real and fake; there is no usable {empty[0]} image{where}")
    if limit is not None and limit < 2:
        raise X2DFDError("--limit must be at least 2: one real, one fake")
    order = sorted(
        (turn, label, i) for label, side in sides.items() for turn, i in enumerate(rng.permutation(side).tolist())
    )
    return sorted(i for _, _, i in order[:limit])


def assess(
    model: Answerer,
    data: CropSet,
    questions: Sequence[CueQuestion],
    out: Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    seed: int = 0,
    progress: bool = True,
    top_k: int | None = None,
    manifest_hash: str | None = None,
) -> Assessment:
    """Ask every question about every image, rank questions and cues, and write all of it into `out`.

    A killed run goes on where it stopped and ends with the same files. Questions of origin `random` are the control;
    they are not ranked among the others. `top_k`: call the first k strong, as in the paper, instead of by `RULE`.
    Raises X2DFDError without both classes, without questions, for a repeated question, and when `out` holds answers
    of another model or question set.
    """
    texts = [q.text for q in questions]
    if repeated := sorted({t for t in texts if texts.count(t) > 1}):
        raise X2DFDError(f"asked twice: {repeated[0]}")
    if all(q.origin == "random" for q in questions):
        raise X2DFDError("no cue questions to ask")
    chosen = chosen_pictures(data, split, limit, seed)
    out.mkdir(parents=True, exist_ok=True)
    rows = _answers(model, data, chosen, texts, out, progress)
    p_yes, said = np.array([r["p_yes"] for r in rows]), np.array([r["said"] for r in rows])  # [n, q]

    truth = _truth(data, chosen)
    entries = [_entry([q], [j], p_yes, truth) for j, q in enumerate(questions)]
    by_cue: dict[tuple[str, str], list[int]] = {}
    for j, q in enumerate(questions):
        if q.area is not None and q.artifact is not None and q.origin != "random":
            by_cue.setdefault((q.area, q.artifact), []).append(j)
    rankings = {
        "cues": _Ranking(
            [_entry([questions[j] for j in js], js, p_yes, truth) for js in by_cue.values()], truth, seed, top_k
        ),
        "questions": _Ranking([e for e in entries if e.question.origin != "random"], truth, seed, top_k),
        "unrelated": _Ranking([e for e in entries if e.question.origin == "random"], truth, seed, top_k),
    }
    weights = group_weights(truth.groups, RESAMPLES, seed)
    found = {
        kind: _findings(ranking, truth, said == "yes", said == "no", weights, top_k, kind == "cues")
        for kind, ranking in rankings.items()
    }
    result = Assessment(
        model=model.name,
        manifest_sha256=manifest_hash,
        questions_sha256=hashlib.sha256(json.dumps([asdict(q) for q in questions]).encode()).hexdigest(),
        split=split,
        limit=limit,
        seed=seed,
        n_real=int((~truth.fake).sum()),
        n_fake=int(truth.fake.sum()),
        n_groups=len(set(truth.groups)),
        n_unusable=len(data.unusable),
        n_unknown_truth=int((~truth.known).sum()),
        ranked_by=RANKED_BY,
        rule=RULE if top_k is None else RULE_TOP_K,
        cues=found["cues"],
        questions=found["questions"],
        unrelated=found["unrelated"],
        control={kind: rankings[kind].control() for kind in ("cues", "questions")},
        stability={kind: rankings[kind].stability() for kind in ("cues", "questions")},
        random=_beside_random(found["questions"], found["unrelated"], rankings["questions"].k),
        uncovered=tuple(
            uncovered((f.area, f.artifact) for f in found["cues"] if not f.strong and f.area and f.artifact)
        ),
    )
    write_text(
        out / "assessment.json", json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    )
    write_text(out / "table.md", table(result))
    return result


def _truth(data: CropSet, chosen: Sequence[int]) -> _Truth:
    samples = [data.samples[i] for i in chosen]
    pairs: dict[tuple[str, str], Bools] = {}
    for n, sample in enumerate(samples):
        for cue in sample.cues:
            pairs.setdefault((cue.area, cue.artifact), np.zeros(len(samples), bool))[n] = True
    return _Truth(
        fake=np.array([s.label == "fake" for s in samples]),
        pairs=pairs,
        known=np.array([s.label == "real" or bool(s.cues) for s in samples]),
        groups=[s.group for s in samples],
    )


def _entry(questions: Sequence[CueQuestion], columns: list[int], p_yes: Floats, truth: _Truth) -> _Entry:
    q = questions[0]
    cue = (q.area, q.artifact) if q.area is not None and q.artifact is not None else None
    enough = cue is not None and min(int(side.sum()) for side in truth.sides(cue)) >= MIN_PRESENT
    origin = ", ".join(dict.fromkeys(q.origin for q in questions))
    return _Entry(
        CueQuestion(q.text, q.area, q.artifact, origin), columns, p_yes[:, columns].mean(1), cue if enough else None
    )


def _beside_random(ours: Sequence[Finding], unrelated: Sequence[Finding], k: int) -> dict[str, Any] | None:
    """Cue questions and unrelated ones, fake against real; of both the same share is called best."""
    if not unrelated:
        return None

    def figures(findings: Sequence[Finding]) -> dict[str, Any]:
        aucs = np.array([np.nan if f.overall.auc is None else f.overall.auc for f in findings])
        best = max(1, round(len(findings) * k / len(ours)))
        return {
            "n": len(findings),
            "best": best,
            "mean_auc": _top_mean(aucs, len(aucs)),
            "best_mean_auc": _top_mean(aucs, best),
        }

    return {"cue_questions": figures(ours), "unrelated_questions": figures(unrelated)}


# --- for people -----------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _images(a: Assessment) -> str:
    split = f", split {a.split}" if a.split else ""
    return f"{a.n_fake} fake and {a.n_real} real images of {a.n_groups} groups{split}"


def _rows(findings: Sequence[Finding]) -> list[str]:
    rows = []
    for place, f in enumerate(findings, start=1):
        cue = f"{f.area} · {f.artifact}" if f.area else "–"
        d = f.deciding
        basis = "cue present" if f.decided_by == "present" else "fake"
        cells = [
            str(place),
            *([f.question.replace("|", "\\|")] if f.question else []),
            cue,
            _number(d.auc),
            _range(d.interval),
        ]
        cells += [f"{basis}: {d.n_positive} / {d.n_negative}", _number(f.overall.auc), _number(f.balanced_accuracy)]
        cells += [_number(f.yes_rate), "strong" if f.strong else "weak", ", ".join(f.experts) or "none"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def table(a: Assessment) -> str:
    """The assessment as a Markdown page."""
    strong = sum(f.strong for f in a.cues)
    end = [
        "AUC",
        "95 % interval",
        "positive / negative",
        "AUC fake/real",
        "balanced accuracy",
        "yes-bias",
        "",
        "experts",
    ]

    def grid(first: list[str], findings: Sequence[Finding]) -> list[str]:
        names = [*first, *end]
        return [f"| {' | '.join(names)} |", "|" + "---|" * len(names), *_rows(findings), ""]

    control, stability = a.control["cues"], a.stability["cues"]
    lines = [
        f"# What {a.model} sees",
        "",
        f"{_images(a)}; {len(a.questions)} questions on {len(a.cues)} cues; seed {a.seed}.",
        "",
        f"- **{strong} strong, {len(a.cues) - strong} weak.** {a.rule[0].upper()}{a.rule[1:]}.",
        f"- Ranked by: {a.ranked_by}.",
        f"- Best {control['k']} cues: mean AUC {_number(control['top_mean_auc'])}; with shuffled truth "
        f"{_number(control['shuffled_mean'])} (95th percentile {_number(control['shuffled_p95'])}).",
        f"- Two halves of the groups: rank correlation {_number(stability['spearman_mean'])}; best of one half have "
        f"mean AUC {_number(stability['held_out_top_mean_auc'])} on the other.",
    ]
    if a.random:
        mine, other = a.random["cue_questions"], a.random["unrelated_questions"]
        lines.append(
            f"- Fake against real, unrelated questions: best {other['best']} {_number(other['best_mean_auc'])}, "
            f"all {_number(other['mean_auc'])}; cue questions: best {mine['best']} {_number(mine['best_mean_auc'])}, "
            f"all {_number(mine['mean_auc'])}."
        )
    if a.n_unknown_truth:
        lines.append(f"- {a.n_unknown_truth} fakes without recorded cues are left out where presence is compared.")
    blind = ", ".join(f"{area} · {artifact}" for area, artifact in a.uncovered) or "none"
    lines += [f"- Weak, and covered by no expert: {blind}.", "", "## Cues", ""]
    lines += [*grid(["", "cue"], a.cues), "## Questions", "", *grid(["", "question", "cue"], a.questions)]
    if a.unrelated:
        lines += ["## Unrelated questions (control)", "", *grid(["", "question", "cue"], a.unrelated)]
    return "\n".join(lines)


_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Eyes and forehead": ("#2f6db3", ("eyes", "eyebrows", "forehead")),
    "Mouth and jaw": ("#c2413b", ("mouth", "teeth", "jaw")),
    "Nose and cheeks": ("#c98a1b", ("nose", "cheeks")),
    "Skin": ("#8a5a3c", ("skin",)),
    "Contour, hair, ears, neck": ("#2e8b6f", ("face-contour", "hair", "ears", "neck")),
    "Surroundings": ("#6b7280", ("background", "accessories")),
    "Whole image": ("#7a4fa3", ("whole-image",)),
}


def chart(a: Assessment, path: Path) -> bool:
    """Draw the cues' AUC with intervals, by area; False when matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False

    groups = [
        (title, colour, [f for f in a.cues if f.area in areas and f.deciding.auc is not None])
        for title, (colour, areas) in _GROUPS.items()
    ]
    groups = [g for g in groups if g[2]]
    # Two columns of about equal length; a panel's title is worth two bars.
    cost = [len(g[2]) + 2.5 for g in groups]
    total, cut = sum(cost), 0
    while cut < len(groups) and sum(cost[: cut + 1]) <= total / 2 + 3:
        cut += 1
    columns = [c for c in (groups[: max(cut, 1)], groups[max(cut, 1) :]) if c]
    tallest = max((sum(len(g[2]) + 2.5 for g in c) for c in columns), default=3)
    ends = [e for f in a.cues for e in (f.deciding.interval or (f.deciding.auc or 0.5,) * 2)]
    low, high = min([0.4, *ends]) - 0.02, max([0.7, *ends]) + 0.02
    height = 0.2 * tallest + 2.1
    figure = Figure(figsize=(6.6 * max(len(columns), 1), height), facecolor="white")
    FigureCanvasAgg(figure)
    control = a.control["cues"]
    strong = sum(f.strong for f in a.cues)
    top = 1 - 1.15 / height
    figure.text(
        0.02,
        1 - 0.35 / height,
        f"What {a.model} sees: {strong} strong of {len(a.cues)} cues",
        fontsize=15,
        weight="bold",
        va="center",
    )
    note = f"AUC of P(yes) with 95 % interval. {_images(a)}; best {control['k']} cues "
    note += f"{_number(control['top_mean_auc'])}, shuffled truth {_number(control['shuffled_mean'])}"
    figure.text(0.02, 1 - 0.68 / height, note + ".", fontsize=9.5, color="#444444", va="center")
    unit = (top - 0.75 / height) / tallest
    for c, column in enumerate(columns):
        left = (c + 0.27) / len(columns)
        width = 0.70 / len(columns)
        y = top
        for title, colour, findings in column:
            axes = figure.add_axes((left, y - unit * (len(findings) + 1), width, unit * len(findings)))
            y -= unit * (len(findings) + 2.5)
            axes.set_title(title, loc="left", fontsize=10.5, weight="bold", color=colour, pad=4)
            for place, f in enumerate(findings):
                auc = f.deciding.auc or 0.0
                axes.barh(place, auc - 0.5, left=0.5, height=0.72, color=colour, alpha=1.0 if f.strong else 0.28)
                if f.deciding.interval:
                    axes.plot(
                        f.deciding.interval, (place, place), color="#222222", linewidth=0.9, solid_capstyle="butt"
                    )
                face = "#222222" if f.decided_by == "present" else "white"
                axes.plot(
                    auc,
                    place,
                    "o",
                    markersize=3.2,
                    markerfacecolor=face,
                    markeredgecolor="#222222",
                    markeredgewidth=0.7,
                )
            axes.set_yticks(range(len(findings)), [f"{f.area} · {f.artifact}" for f in findings], fontsize=8.5)
            for label, f in zip(axes.get_yticklabels(), findings, strict=True):
                label.set_color("#111111" if f.strong else "#777777")
            axes.set_xlim(low, high)
            axes.set_ylim(len(findings) - 0.4, -0.6)
            axes.axvline(0.5, color="#888888", linewidth=0.8)
            if control["shuffled_p95"] is not None:
                axes.axvline(control["shuffled_p95"], color="#b00020", linewidth=1.0, linestyle=(0, (4, 2)))
            axes.tick_params(axis="y", length=0)
            axes.tick_params(axis="x", labelsize=8, length=2, color="#999999")
            axes.xaxis.grid(True, color="#e5e5e5", linewidth=0.6)
            axes.set_axisbelow(True)
            for side in ("top", "right", "left", "bottom"):
                axes.spines[side].set_visible(False)
    figure.text(
        0.02,
        0.22 / height,
        "Full colour: strong.  Pale: weak.  Filled dot: cue truly present against not.  Hollow: fake against real.  "
        "Dashed: 95th percentile of the shuffled control.",
        fontsize=9,
        color="#444444",
    )
    figure.savefig(path, dpi=140)
    return True


def run_assess(
    data: Path,
    out: Path,
    questions: Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    model: str | None = None,
    seed: int = 0,
    base: str | None = None,
    served: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """The command `x2dfd assess`: load, assess, write, and print what a person wants to know first."""
    asked = read_questions(questions or BANK)
    import x2dfd
    from x2dfd.crops import load_crops

    crops = load_crops(data, workers=min(4, os.cpu_count() or 1))
    # Whether a verdict is calibrated does not matter here, and calibration comes later on the road.
    mllm = x2dfd.load(model, base=base, served=served, experts=[], mode="paper", device=device, dtype=dtype).mllm
    a = assess(mllm, crops, asked, out, limit=limit, split=split, seed=seed, manifest_hash=manifest_sha256(data))
    if not chart(a, out / "assessment.png"):
        print("no chart: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
    print(table(a).split("\n## ", 1)[0].strip())
    print(f"\n{out / 'table.md'}\n{out / 'assessment.json'}")
