"""Task `detect`: real or fake, by the verdict, by the MLLM alone and by every expert, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eval import curves, stats
from eval import metrics as m
from eval.protocols import CORRECT, Compat, pool_clips
from eval.rows import SampleRow, score
from eval.scoring import (
    MIN_REALS,
    Column,
    Part,
    Scored,
    common_auc,
    point_metrics,
    slices,
    three_answers,
    train_apart,
    unscored,
    value_of,
)
from eval.stats import Floats, Labels, Measured
from eval.task import DECIDING, NO_ORIGIN, Made, Run, Task, judge_of
from x2dfd.manifest import Sample

JUDGED = "the judged samples"


def run(run: Run) -> Made:
    options, samples = run.options, run.samples
    compat, change = Compat.parse(options.compat), options.one_change()
    told = f"{change.name}: {change.line}" if change else None
    model = run.open()
    store = run.store(**({"change": told} if told else {}))
    if model.kind == "baseline":
        rows, counted_in = majority_rows(run.every(), samples)
        measured = {"majority_from": counted_in} | detect_result(samples, rows, "majority", options.by, compat=compat)
        return Made(store, rows, NO_ORIGIN, measured, model.name, scores_of=DECIDING, change=told)
    rows, origin = score(judge_of(run, model, rationale=False, change=change), samples, store)
    # One expert decides by its own score, and has no verdict.
    verdict = "" if model.kind == "expert" else "fusion" if model.kind == "fusion" else model.mode or "calibrated"
    calibration = getattr(model.detector, "calibration", None)
    fitted = calibration.fitted_on if calibration is not None and model.mode == "calibrated" else {}
    promised = None
    if verdict and "false_alarms_allowed" in fitted:
        same = fitted.get("manifest_sha256") == run.sha256
        promised = fitted | {"seen": same and options.split in (None, fitted.get("split"))}
    measured = detect_result(samples, rows, verdict, options.by, promised, compat)
    return Made(store, rows, origin, measured, model.name, model.mode, scores_of=DECIDING, change=told)


TASK = Task("detect", "6", "image, face, clip", "real or fake: verdict, MLLM alone, every expert, side by side", run)


def majority_rows(every: Sequence[Sample], samples: Sequence[Sample]) -> tuple[list[SampleRow], str]:
    """Everybody gets the share of fakes as score and the commoner label, and where the share was counted."""
    train = train_apart(every, samples)
    share = float(np.mean(m.to_labels(s.label for s in train or samples)))
    rows = [SampleRow.of(s) for s in samples]
    for row in rows:
        row.p_fake, row.said = share, "fake" if share > 0.5 else "real"
    return rows, "train split" if train else JUDGED


def columns_of(rows: Sequence[SampleRow], verdict: str) -> dict[str, Column]:
    """Scorer -> its P(fake) of each row: the verdict (under that name, if any), the MLLM alone, every expert."""
    columns: dict[str, Column] = {verdict: [row.p_fake for row in rows]} if verdict else {}
    if any(row.p_mllm is not None for row in rows):
        columns["mllm"] = [row.p_mllm for row in rows]
    for name in sorted({name for row in rows for name in row.experts}):
        columns[f"expert:{name}"] = [row.experts.get(name) for row in rows]
    return columns


def detect_result(
    samples: Sequence[Sample],
    rows: Sequence[SampleRow],
    verdict: str,
    by: Sequence[str],
    promised: Part | None = None,
    compat: Compat = CORRECT,
) -> Part:
    """Metrics of the verdict (called `verdict` in the result), of the MLLM alone and of every expert.

    `promised`: the rates that the calibration states for the split it was fitted on, to compare the measured ones with.
    `compat`: quirks of stock metrics, whose numbers are added to ours.
    """
    columns, scorers = columns_of(rows, verdict), {}
    for scorer, column in columns.items():
        of = Scored.of(samples, column)
        part: Part = {"n_scored": len(of.at), "unscored": unscored(rows, column, scorer)}
        part["overall"] = of.counts() | point_metrics(of)
        said = [str(rows[i].said) for i in of.at] if scorer == verdict else None
        part["by"] = {c: by_slice(of, said, c) for c in by}
        if any(s.video for s in samples):
            part["videos"] = _videos(samples, column, compat)
        part["curves"] = curves.of(of.labels, of.scores)
        if scorer == verdict:
            part["answers"] = three_answers(samples, rows)
            if any(len(row.each_face) > 1 for row in rows):
                part["faces"] = _faces(samples, rows)
            part["gaps"] = {c: g for c in by if c != "method" and (g := _gaps(samples, rows, c))}
            if promised:
                part["promise"] = _promise(samples, rows, promised)
        scorers[scorer] = part
    headline = {f"{name}.auc": part["overall"]["auc"] for name, part in scorers.items()}
    if verdict:
        headline[f"{verdict}.false_alarms"] = scorers[verdict]["answers"]["false_alarms"]
    return {"headline": headline, "scorers": scorers, "common": common_auc(samples, columns)}


def by_slice(of: Scored, said: Sequence[str] | None, column: str) -> Part:
    """AUC of each slice and, of a verdict, the shares of its reals and of its fakes that were called fake."""
    table: Part = {}
    for part in slices(of.samples, column):
        counts = {"against": part.against, "n_real": len(part.reals), "n_fake": len(part.fakes)}
        table[part.value] = counts | {"auc": of.auc(part.reals + part.fakes)}
        if said:
            table[part.value] |= part.rates(said, of.groups)
    return table


def _promise(samples: Sequence[Sample], rows: Sequence[SampleRow], promised: Part) -> Part:
    """What the calibration allowed, and the false alarms of this run: over all reals, and of each source. `kept` is
    false where the whole interval lies above that. `seen`: these are the calibration's pictures."""
    allowed = float(promised["false_alarms_allowed"])
    reals = [(s, row.said == "fake") for s, row in zip(samples, rows, strict=True) if s.label == "real" and row.said]

    def measured(chosen: Sequence[tuple[Sample, bool]]) -> Part:
        rate = stats.rate([hit for _, hit in chosen], [s.group for s, _ in chosen])
        low = rate.interval[0] if rate.interval else None
        return rate.to_json() | {"kept": None if low is None else bool(low <= allowed)}

    sources = sorted({s.source for s, _ in reals if s.source})
    return {
        "false_alarms_allowed": allowed,
        "promised_on": {k: promised.get(k) for k in ("split", "n_real", "groups")},
        "seen": bool(promised.get("seen")),
        "measured": measured(reals),
        "by_source": {source: measured([r for r in reals if r[0].source == source]) for source in sources},
    }


def _faces(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """AUC and EER of every face that was found, each with its picture's label, as protocols over all faces count."""
    found = [(s, p) for s, row in zip(samples, rows, strict=True) for p in row.each_face]
    of = Scored.of([s for s, _ in found], [p for _, p in found])
    several = sum(len(row.each_face) > 1 and s.label == "fake" for s, row in zip(samples, rows, strict=True))
    counts = {"n": len(found), "fake_pictures_with_several": several, "label": "that of the picture"}
    return counts | {"auc": of.auc(), "eer": m.eer(of.labels, of.scores)}


def _videos(samples: Sequence[Sample], column: Column, compat: Compat) -> Part:
    """AUC and EER of whole clips, frames pooled by clip id: the mean over scored frames, and as papers after SBI do."""
    clips, labels = [s.video or s.id for s in samples], m.to_labels(s.label for s in samples)
    group_of = {clip: s.group for clip, s in zip(clips, samples, strict=True)}
    of = Scored.of(samples, column)
    sbi, without = m.pool_sbi(clips, labels, column)

    def measured(names: Sequence[str], pooled_labels: Labels, pooled: Floats) -> Part:
        auc = stats.measured_auc(pooled_labels, pooled, [group_of[name] for name in names])
        return {"n": len(names), "auc": auc, "eer": m.eer(pooled_labels, pooled)}

    pooled = m.pool_by([clips[i] for i in of.at], of.labels, of.scores)
    found = measured(*pooled) | {"pooling": "mean over the scored frames"}
    how = "mean over all frames of the most suspicious face, 0.5 without one"
    found["sbi"] = measured(*sbi) | {"pooling": how, "frames_without_score": without}
    if compat.clips:  # its groups are not ours, so there is nothing to draw an interval from
        names, of_clips, scores = pool_clips(of.samples, of.labels, of.scores, compat)
        auc, eer = stats.auc(of_clips, scores), m.eer(of_clips, scores)
        found["stock"] = {"n": len(names), "auc": auc, "eer": eer, "pooling": "by the folder's name alone"}
    return found


def _gaps(samples: Sequence[Sample], rows: Sequence[SampleRow], column: str) -> Part | None:
    """How far apart the values of a column are: the largest minus the smallest figure, and whose they are.

    Of the AUC within a value, its false alarms and what was found of its fakes; over values with at least `MIN_REALS`
    reals (fakes). A gap is never negative, so chance alone makes one: look at the intervals of the two figures.
    """
    values = [value_of(s, column) for s in samples]
    of = Scored.of(samples, [row.p_fake if value else None for row, value in zip(rows, values, strict=True)])
    fake_said = [rows[i].said == "fake" for i in of.at]
    groups = np.array([values[i] for i in of.at])

    def rate(label: int) -> Callable[[Sequence[int]], Measured]:
        def measure(own: Sequence[int]) -> Measured:
            mine = [i for i in own if of.labels[i] == label]
            return stats.rate([fake_said[i] for i in mine], [of.groups[i] for i in mine])

        return measure

    gaps: Part = {}
    for what, measure, need in (("auc", of.auc, (0, 1)), ("false_alarms", rate(0), (0,)), ("found", rate(1), (1,))):
        figures: dict[str, Measured] = {}
        for value in sorted(set(groups.tolist())):
            own = np.flatnonzero(groups == value)
            if all((of.labels[own] == label).sum() >= MIN_REALS for label in need):
                figures[value] = measure(own.tolist())
        if len(figures) >= 2:
            ordered = sorted(figures, key=lambda v: figures[v].value or 0.0)
            low, high = figures[ordered[0]], figures[ordered[-1]]
            gap = {"value": (high.value or 0.0) - (low.value or 0.0), "figures": [low, high]}
            gaps[what] = gap | {"highest": ordered[-1], "lowest": ordered[0]}
    return gaps or None
