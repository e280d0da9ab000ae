"""Compares a run with a reference: numbers outside the reference's intervals, and AUCs on the samples of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eval import metrics as m
from eval import stats
from eval.bench import Result
from eval.rows import digest
from eval.stats import Measured
from x2dfd.errors import X2DFDError
from x2dfd.files import file_sha256, json_object, parse_json


@dataclass(frozen=True)
class ScoredSample:
    """A sample of a run, as one scorer scored it."""

    label: str
    group: str
    score: float | None


Scores = dict[str, dict[str, ScoredSample]]
"""Scorer (`p_fake`, `p_mllm`, `expert:NAME`) -> id -> sample."""


def read_scores(folder: Path, result: Result) -> Scores:
    """Every score in the table beside the file of `result`. Raises X2DFDError if there is no table, or that of another
    run."""
    path = folder / "samples.parquet"
    if not path.is_file():
        raise X2DFDError("no samples.parquet beside the reference", code="scores_missing")
    try:
        table = pq.read_table(path)
        rows = table.to_pylist()
        pictures = digest([row["id"], row["sha256"]] for row in rows)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise X2DFDError(f"{path} cannot be read ({error})", code="scores_unreadable") from error
    metadata = json_object((table.schema.metadata or {}).get(b"x2dfd", b"{}"), path)
    model, stated = (part.get("model", {}) for part in (metadata.get("origin", {}), result))
    same_model = all(stated.get("stated", {}).get(name) == value for name, value in model.items())
    if not same_model or pictures != result.get("data", {}).get("pictures_sha256"):
        raise X2DFDError("samples.parquet beside the reference is of another run", code="scores_of_another_run")
    scorers = [name for name in table.schema.names if name.startswith(("p_", "expert:"))]
    return {name: {r["id"]: ScoredSample(r["label"], r["group"], r[name]) for r in rows} for name in scorers}


@dataclass(frozen=True)
class Pair:
    """Two scorers on the samples that both scored."""

    n: int
    n_first_only: int
    n_second_only: int
    n_unscored: int
    auc: tuple[float | None, float | None]
    difference: Measured  # first minus second


def paired(first: dict[str, ScoredSample], second: dict[str, ScoredSample]) -> Pair:
    """AUC of both on the common samples, and their difference. Raises X2DFDError when the runs share no sample, or give
    one different labels or groups."""
    common = sorted(first.keys() & second.keys())
    if not common:
        raise X2DFDError("the runs share no sample", code="no_shared_sample")
    others = [i for i in common if (first[i].label, first[i].group) != (second[i].label, second[i].group)]
    if others:
        raise X2DFDError(
            f"{len(others)} samples have another label or group, such as {others[0]}", code="samples_differ"
        )
    ids = [i for i in common if None not in (first[i].score, second[i].score)]
    labels = m.to_labels(first[i].label for i in ids)
    a, b = (m.to_scores(np.array([run[i].score for i in ids], np.float64)) for run in (first, second))
    return Pair(
        len(ids),
        len(first.keys() - second.keys()),
        len(second.keys() - first.keys()),
        len(common) - len(ids),
        (stats.auc(labels, a), stats.auc(labels, b)),
        stats.auc_difference(labels, a, b, [first[i].group for i in ids]),
    )


@dataclass
class Comparison:
    """The findings of `--compare`, as `comparison.json` holds them."""

    moved: list[str] = field(default_factory=list)  # headline numbers beyond the reference's interval, lost samples
    notes: list[str] = field(default_factory=list)  # differences that may explain it: model, versions, code, device
    paired: dict[str, Pair] = field(default_factory=dict)  # this run minus the reference


@dataclass(frozen=True)
class Reference:
    """A finished run to compare with."""

    result: Result
    scores: Scores | None
    reason: str  # why there are no scores
    sha256: str

    @classmethod
    def read(cls, path: Path) -> Reference:
        """A result file, and the scores of the table beside it. Raises X2DFDError for any other file."""
        try:
            result = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise X2DFDError(f"{path}: not a result file ({error})", code="not_a_result") from error
        parts = ("headline", "task", "data", "settings", "model")
        if not isinstance(result, dict) or not all(isinstance(result.get(part), dict) for part in parts):
            raise X2DFDError(f"{path}: not a result file (it lacks one of {', '.join(parts)})", code="not_a_result")
        try:
            return cls(result, read_scores(path.parent, result), "", file_sha256(path))
        except X2DFDError as error:  # drift can be measured without scores
            return cls(result, None, str(error), file_sha256(path))


def compare(result: Result, out: Path, reference: Reference) -> Comparison:
    """Compares a result with the reference. Raises X2DFDError when they are not about the same samples."""
    comparison = drift(result, reference.result)
    if reference.scores is None:
        comparison.notes.append(f"no paired test: {reference.reason}")
        return comparison
    scores = read_scores(out, result)
    pairs = {name: paired(scores[name], reference.scores[name]) for name in scores if name in reference.scores}
    comparison.paired = {name: pair for name, pair in pairs.items() if None not in pair.auc}
    return comparison


def drift(result: Result, reference: Result) -> Comparison:
    """The numbers that left their interval. Raises X2DFDError when the two results are not about the same samples."""
    keys = [("task", "name"), ("task", "version"), ("data", "sha256"), ("data", "split"), ("data", "limit")]
    keys += [("data", "samples_sha256"), ("data", "pictures_sha256")]
    keys += [("settings", "equalise"), ("settings", "change")]
    for section, name in keys:
        value, expected = result[section][name], reference.get(section, {}).get(name)
        if value != expected:
            raise X2DFDError(
                f"not comparable: {section} {name} is {value} here, {expected} in the reference", code="not_comparable"
            )
    sections = ("model", "versions", "code", "device", "settings")
    comparison = Comparison(notes=[f"{name} differs" for name in sections if result[name] != reference.get(name)])
    for name in sorted(result["headline"].keys() | reference["headline"].keys()):
        new, old = result["headline"].get(name), reference["headline"].get(name)
        if new is None or old is None:
            comparison.moved.append(f"{name} is only in {'the reference' if new is None else 'this result'}")
        elif line := _moved(name, Measured.read(new), Measured.read(old)):
            comparison.moved.append(line)
    return comparison


def _moved(name: str, new: Measured, old: Measured) -> str | None:
    if new.n != old.n:
        return f"{name}: {new.n} samples scored, {old.n} in the reference"
    if new.value is None or old.value is None:
        return None if new.value is old.value else f"{name}: {new.value}, {old.value} in the reference"
    low, high = old.interval or (old.value, old.value)
    if low - 1e-9 <= new.value <= high + 1e-9:
        return None
    return f"{name}: {new.value:.4f}, outside [{low:.4f}, {high:.4f}] of the reference"
