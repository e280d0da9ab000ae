"""Task `detect`: real or fake, by the verdict, by the MLLM alone and by every expert, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

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
    called_fake,
    common_auc,
    false_alarms_by,
    point_metrics,
    share,
    slices,
    three_answers,
    train_apart,
    unscored,
    value_of,
)
from eval.stats import Floats, Labels, Measured
from eval.task import DECIDING, NO_ORIGIN, Outcome, Run, Task, judge_of
from x2dfd.files import Json
from x2dfd.manifest import Sample

JUDGED = "the judged samples"


def run(run: Run) -> Outcome:
    options, samples = run.options, run.samples
    compat, change = Compat.parse(options.compat), options.one_change()
    description = f"{change.name}: {change.line}" if change else None
    model = run.open()
    store = run.store(**({"change": description} if description else {}))
    if model.kind == "baseline":
        rows, counted_in = majority_rows(run.every(), samples)
        measured = {"majority_from": counted_in} | detect_result(samples, rows, "majority", options.by, compat=compat)
        return Outcome(store, rows, NO_ORIGIN, measured, model.name, scores_of=DECIDING, change=description)
    rows, origin = score(judge_of(run, model, rationale=False, change=change), samples, store)
    # One expert decides by its own score, and has no verdict.
    verdict = "" if model.kind == "expert" else "fusion" if model.kind == "fusion" else model.mode or "calibrated"
    calibration = model.detector.calibration
    fitted = calibration.fitted_on if calibration is not None and model.mode == "calibrated" else {}
    promised = None
    if verdict and "false_alarms_allowed" in fitted:
        promised = fitted | {"seen": seen_at_fit(fitted, run.sha256, options.split)}
    measured = detect_result(samples, rows, verdict, options.by, promised, compat)
    return Outcome(store, rows, origin, measured, model.name, model.mode, scores_of=DECIDING, change=description)


def seen_at_fit(fitted: Json, manifest: str, split: str | None) -> bool:
    """Whether a calibration of these facts was fitted on pictures of this split of the manifest of this hash."""
    if manifest not in fitted.get("manifests", ()):
        return False
    elsewhere = bool(fitted.get("unseen")) and split not in ("val", "test")  # of held-out sources, all other splits
    return split in (None, fitted.get("split")) or elsewhere


TASK = Task("detect", "6", "image, face, clip", "real or fake: verdict, MLLM alone, every expert, side by side", run)


def majority_rows(all_samples: Sequence[Sample], samples: Sequence[Sample]) -> tuple[list[SampleRow], str]:
    """Rows with the share of fakes as every score and the commoner label, and where the share was counted."""
    train = train_apart(all_samples, samples)
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

    `promised`: the rates that the calibration states for the split on which it was fitted, for comparison.
    `compat`: quirks of stock metrics; the numbers under these are added to ours.
    """
    columns, scorers = columns_of(rows, verdict), {}
    for scorer, column in columns.items():
        scored = Scored.of(samples, column)
        part: Part = {"n_scored": len(scored.at), "unscored": unscored(rows, column, scorer)}
        part["overall"] = scored.counts() | point_metrics(scored)
        answers = [str(rows[i].said) for i in scored.at] if scorer == verdict else None
        part["by"] = {c: by_slice(scored, answers, c) for c in by}
        if any(s.video for s in samples):
            part["videos"] = _videos(samples, column, compat)
        part["curves"] = curves.of(scored.labels, scored.scores)
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


def by_slice(scored: Scored, answers: Sequence[str] | None, column: str) -> Part:
    """AUC of each slice and, of a verdict, the shares of its reals and of its fakes that were called fake."""
    table: Part = {}
    for part in slices(scored.samples, column):
        counts = {"against": part.against, "n_real": len(part.reals), "n_fake": len(part.fakes)}
        table[part.value] = counts | {"auc": scored.auc(part.reals + part.fakes)}
        if answers:
            table[part.value] |= part.rates(answers, scored.groups)
    return table


def _promise(samples: Sequence[Sample], rows: Sequence[SampleRow], promised: Part) -> Part:
    """The rate of false alarms that the calibration allows, and this run's: over all reals, and of each source. `kept`
    is false if the whole interval lies above the allowed rate. `seen`: these are the calibration's pictures."""
    allowed = float(promised["false_alarms_allowed"])
    reals = [(s, row) for s, row in zip(samples, rows, strict=True) if s.label == "real" and row.said]

    def with_kept(rate: Measured) -> Part:
        return asdict(rate) | {"kept": rate.interval[0] <= allowed if rate.interval else None}

    return {
        "false_alarms_allowed": allowed,
        "promised_on": {k: promised.get(k) for k in ("split", "n_real", "groups")},
        "seen": bool(promised.get("seen")),
        "measured": with_kept(share(reals, called_fake)),
        "by_source": {s: with_kept(rate) for s, rate in false_alarms_by(samples, rows, "source").items()},
    }


def _faces(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """AUC and EER over all detected faces, each with its picture's label, as in protocols that count every face."""
    faces = [(s, p) for s, row in zip(samples, rows, strict=True) for p in row.each_face]
    scored = Scored.of([s for s, _ in faces], [p for _, p in faces])
    several = sum(len(row.each_face) > 1 and s.label == "fake" for s, row in zip(samples, rows, strict=True))
    counts = {"n": len(faces), "fake_pictures_with_several": several, "label": "that of the picture"}
    return counts | {"auc": scored.auc(), "eer": m.eer(scored.labels, scored.scores)}


def _videos(samples: Sequence[Sample], column: Column, compat: Compat) -> Part:
    """AUC and EER of whole clips, frames pooled by clip id: the mean over scored frames, and as papers after SBI do."""
    clips, labels = [s.video or s.id for s in samples], m.to_labels(s.label for s in samples)
    group_of = {clip: s.group for clip, s in zip(clips, samples, strict=True)}
    scored = Scored.of(samples, column)
    sbi, without_score = m.pool_sbi(clips, labels, column)

    def measured(names: Sequence[str], pooled_labels: Labels, pooled: Floats) -> Part:
        auc = stats.measured_auc(pooled_labels, pooled, [group_of[name] for name in names])
        return {"n": len(names), "auc": auc, "eer": m.eer(pooled_labels, pooled)}

    pooled = m.pool_by([clips[i] for i in scored.at], scored.labels, scored.scores)
    result = measured(*pooled) | {"pooling": "mean over the scored frames"}
    sbi_pooling = "mean over all frames of the most suspicious face, 0.5 without one"
    result["sbi"] = measured(*sbi) | {"pooling": sbi_pooling, "frames_without_score": without_score}
    if compat.clips:  # its clips are not our groups, so there is no interval
        names, of_clips, scores = pool_clips(scored.samples, scored.labels, scored.scores)
        auc, eer = stats.auc(of_clips, scores), m.eer(of_clips, scores)
        result["stock"] = {"n": len(names), "auc": auc, "eer": eer, "pooling": "by the folder's name alone"}
    return result


def _gaps(samples: Sequence[Sample], rows: Sequence[SampleRow], column: str) -> Part | None:
    """How far apart the values of a column are: the largest figure minus the smallest, and the values that have them.

    The figures are AUC, false alarms and the share of fakes found, over values with at least `MIN_REALS` reals (fakes).
    A gap is never negative, so chance alone makes one: look at the intervals of the two figures.
    """
    values = [value_of(s, column) for s in samples]
    scored = Scored.of(samples, [row.p_fake if value else None for row, value in zip(rows, values, strict=True)])
    judged = [(samples[i], rows[i]) for i in scored.at]
    places = {value: [k for k, i in enumerate(scored.at) if values[i] == value] for value in sorted(set(values))}
    gaps: Part = {}
    for what, labels in (("auc", (0, 1)), ("false_alarms", (0,)), ("found", (1,))):
        figures: dict[str, Measured] = {}
        for value, of_value in places.items():
            chosen = [k for k in of_value if scored.labels[k] in labels]
            if all((scored.labels[chosen] == label).sum() >= MIN_REALS for label in labels):
                figures[value] = (
                    scored.auc(chosen) if what == "auc" else share([judged[k] for k in chosen], called_fake)
                )
        if len(figures) >= 2:
            ordered = sorted(figures, key=lambda v: figures[v].value or 0.0)
            low, high = figures[ordered[0]], figures[ordered[-1]]
            gap = {"value": (high.value or 0.0) - (low.value or 0.0), "figures": [low, high]}
            gaps[what] = gap | {"highest": ordered[-1], "lowest": ordered[0]}
    return gaps or None
