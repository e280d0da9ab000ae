"""`python -m eval.validation --run DIR --model DIR`: writes the figures of a validation run beside the model's weights.

Likelihood ratios come from the pool-adjacent-violators algorithm over the run's calibrated scores, both labels weighing
the same. One misleading picture is added at either end (Laplace's rule; Bruemmer & du Preez 2006), which bounds the
ratios by what so many pictures can support. Intervals: 95 %, groups drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import typer
from sklearn.isotonic import IsotonicRegression

from eval import metrics as m
from eval.stats import Floats, Labels, both_classes
from x2dfd.adapter import EMBEDDED
from x2dfd.cli import run_command
from x2dfd.errors import X2DFDError
from x2dfd.files import Json, parse_json
from x2dfd.validation import FILE, MODEL_FACTS, Validation

DRAWS = 1000
MIN_GROUPS = 20


def log_ratios(scores: Floats, labels: Labels, at: Floats) -> Floats:
    """log10 of the bounded PAV likelihood ratio at the scores `at`."""
    n_real, n_fake = int((labels == 0).sum()), int(labels.sum())
    x = np.concatenate([[-1.0], scores, [2.0]])
    y = np.concatenate([[1], labels, [0]])
    weights = np.where(y == 1, 1 / (n_fake + 1), 1 / (n_real + 1))
    p = IsotonicRegression(out_of_bounds="clip").fit(x, y, sample_weight=weights).predict(at)
    return np.asarray(np.log10(p / (1 - p)), np.float64)


def steps(
    scores: Floats, labels: Labels, groups: Sequence[str], draws: int = DRAWS
) -> list[tuple[float, float, float, float]]:
    """Rows of (lowest score, likelihood ratio, lower end, upper end of its interval), in rising order."""
    ordered = np.unique(scores)
    whole = log_ratios(scores, labels, ordered)
    first = np.flatnonzero(np.diff(np.round(whole, 6), prepend=np.nan) != 0)
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = np.random.default_rng(0)
    ratios: list[Floats] = []
    while len(ratios) < draws:
        count = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[place]
        chosen = np.repeat(np.arange(len(scores)), count)
        if both_classes(labels[chosen]):
            ratios.append(log_ratios(scores[chosen], labels[chosen], ordered[first]))
    low, high = np.percentile(ratios, [2.5, 97.5], axis=0)
    begin = [0.0, *((ordered[i - 1] + ordered[i]) / 2 for i in first[1:])]
    table = zip(begin, whole[first], np.minimum(low, whole[first]), np.maximum(high, whole[first]), strict=True)
    return [(round(float(p), 6), *(float(f"{10**v:.4g}") for v in values)) for p, *values in table]  # type: ignore[misc]


def validation(run: Path, remark: str = "") -> Validation:
    """Reads a folder that `run_bench.py detect` wrote. Raises X2DFDError for any other, or an uncalibrated run."""
    try:
        result = parse_json((run / "result.json").read_bytes())
        rows = pq.read_table(run / "samples.parquet").to_pylist()
        return _summary(run, remark, result, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise X2DFDError(
            f"{run} holds no finished run of `run_bench.py detect` in calibrated mode: {error!r:.200}",
            code="not_a_finished_run",
        ) from error


def _summary(run: Path, remark: str, result: Json, rows: Sequence[Json]) -> Validation:
    scorer, stated, data = result["scorers"]["calibrated"], result["model"]["stated"], result["data"]
    answers, overall = scorer["answers"], scorer["overall"]
    if change := result["settings"].get("change"):
        raise X2DFDError(f"{run}: every picture was changed ({change})", code="pictures_changed")
    scored = [row for row in rows if row["p_fake"] is not None]
    scores, labels = m.to_scores([row["p_fake"] for row in scored]), m.to_labels(row["label"] for row in scored)
    groups = [{row["group"] for row, value in zip(scored, labels, strict=True) if value == label} for label in (0, 1)]
    if min(map(len, groups)) < MIN_GROUPS:
        raise X2DFDError(f"{run}: fewer than {MIN_GROUPS} groups of real or of fake pictures", code="too_few_groups")
    if scorer.get("promise", {}).get("seen"):
        raise X2DFDError(
            f"{run}: its pictures are those that the calibration was fitted on", code="pictures_of_the_fit"
        )
    equalised = result["settings"].get("equalise")
    alike = f", all re-encoded: {equalised}" if equalised else ""
    return Validation(
        run=f"{result['task']['name']}, manifest {data['sha256'][:12]}, split {data['split'] or 'all'}{alike}",
        manifest_sha256=data["sha256"],
        model={key: stated[key] for key in MODEL_FACTS},
        n_real=data["n_real"],
        n_fake=data["n_fake"],
        n_groups=data["n_groups"],
        methods=tuple(sorted({(row["method"] or "").split("+")[0] for row in scored if row["label"] == "fake"} - {""})),
        sources=tuple(sorted({row["source"] for row in scored if row["label"] == "real" and row["source"]})),
        rates={
            "false_alarms": answers["false_alarms"],
            "misses": answers["misses"],
            "answered": answers["coverage"],
            "auc": overall["auc"],
        },
        cllr=round(overall["cllr"], 4),
        steps=tuple(steps(scores, labels, [row["group"] for row in scored])),
        remark=remark,
    )


def main(
    run: Annotated[Path, typer.Option(help="--out of a finished run_bench.py detect")],
    model: Annotated[Path, typer.Option(help="adapter directory", show_default="embedded")] = EMBEDDED,
    remark: Annotated[
        str, typer.Option(help="a sentence for readers, such as what the model knew of the pictures")
    ] = "",
) -> None:
    """Write the figures of a validation run beside the model's weights."""
    summary = validation(run, remark)
    summary.save(model)
    limits = summary.likelihood_ratio(0.0)["limits"]
    print(f"{model / FILE}: {len(summary.steps)} steps, likelihood ratios from {limits[0]} to {limits[1]}")


if __name__ == "__main__":
    run_command(main, "Example:\n\n  python -m eval.validation --run build/run --model build/adapter")
