"""Scores a model on labelled images and writes numbers that can be refuted.

    python eval/run_bench.py detect --data manifest.csv --split val --model embedded --out results/val

writes `samples.parquet` (one row a sample), `result.json` (metrics with intervals, and where they come from),
`result.html` (the same with its curves) and, with `--compare`, `comparison.json`. A run that was cut off goes on where
it stopped; so does one with the same manifest and model and another `--limit` or `--bootstrap`. Models: eval.models;
tasks: `--list`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from eval import (  # noqa: E402
    ablation,
    answers,
    cuebench,
    curves,
    experts_bench,
    left_out,
    models,
    page,
    paired,
    risk,
    text_tasks,
    texts,
)
from eval import metrics as m  # noqa: E402
from eval.changes import CHANGES, SUITES, Change, changes_of  # noqa: E402
from eval.localisation import localisation  # noqa: E402
from eval.protocols import CORRECT, PROTOCOLS, Compat, pool_clips  # noqa: E402
from eval.scoring import (  # noqa: E402
    JPEG_QUALITY,
    LONGEST_SIDE,
    MIN_REALS,
    Layout,
    Resampling,
    Row,
    Store,
    changed,
    common_auc,
    digest,
    equalised,
    micro_f1,
    reason_of,
    say,
    score,
    sha256_of,
    slices,
    three_answers,
    value_of,
)
from x2dfd.errors import InputError, X2DFDError  # noqa: E402
from x2dfd.explain import read_cues, said_label  # noqa: E402
from x2dfd.files import file_sha256, write_bytes, write_text  # noqa: E402
from x2dfd.manifest import Sample, manifest_sha256, read_manifest  # noqa: E402
from x2dfd.types import DF_CLASSES, Cue, Failure, Report  # noqa: E402

JUDGED = "the judged samples"
ANSWERS = Layout(
    texts=("said", "reason", "rationale", "error"),
    numbers=("p_fake", "p_mllm"),
    packed=("notes", "cues", "contradictions", "pointed", "each_face"),
)
"""What a row of `detect` and `describe` holds, beside the sample and the experts' scores."""


@dataclass(frozen=True)
class Task:
    """What is asked and what is counted; a change of either is a new version."""

    name: str
    version: str
    unit: str
    line: str


TASKS = {
    task.name: task
    for task in (
        Task("detect", "5", "image, face, clip", "real or fake: verdict, MLLM alone, every expert, side by side"),
        Task("answer", "1", "image", f"real or fake in words (DF-D): {len(answers.QUESTIONS)} wordings, half reversed"),
        Task("classify", "1", "image", f"which kind of forgery, in words (DF-C): {', '.join(DF_CLASSES)}"),
        Task("describe", "4", "image", "the rationale: cues against those known, text against reference texts"),
        Task("locate", "1", "image", "where experts point against the forgery's mask: pixel AUC, IoU"),
        Task("assess", "1", "image", "which cues the MLLM can see (MFA), by x2dfd assess"),
        Task("chat", "2", "image", "one follow-up after the verdict (FC); with a judge, its marks apart"),
        Task(
            "ablation", "1", "image", "what the MLLM makes of picture, scores and pointing: parts left out, exchanged"
        ),
        Task("experts", "2", "image", "experts, their fusion, a baseline; changed pictures; maps"),
        Task(
            "left-out", "1", "image", "forge methods that `consistency` was trained without (--weights): it, the fusion"
        ),
    )
}

COMMANDS = {
    "eval.overlays": "text in the picture that claims real, fake or neither: the share of verdicts that it flips",
    "eval.trained_ablation": "trainings without explanations, without experts, with other scores or layers; one table",
    "eval.adversarial": "noise made against one expert (PGD), and what it does to the others; a report only",
}
"""What is a command of its own: `python -m NAME --data MANIFEST ...`."""


# ---------------------------------------------------------------- judging


def judged(
    model: models.Opened,
    samples: Sequence[Sample],
    *,
    equalise: bool,
    rationale: bool,
    batch_size: int,
    change: Change | None = None,
) -> tuple[list[Row], list[Row]]:
    """A row a sample, in order, and the model and versions that the answers state. `change`: of every picture."""
    told: dict[str, Report | Failure] = {}
    sources: list[Path | bytes] = []
    handed: list[Sample] = []
    for sample in samples:
        try:
            if change:
                sources.append(changed(sample.path, change, sample.id, equal=equalise))
            else:
                sources.append(equalised(sample.path) if equalise else sample.path)
            handed.append(sample)
        except InputError as error:
            told[sample.id] = Failure(str(sample.path), None, error.code, error.reason)
    reports = model.detector.detect_many(sources, batch_size=batch_size, rationale=rationale) if sources else ()
    for sample, report in zip(handed, reports, strict=True):
        told[sample.id] = report
    origins = [{"model": a.model, "versions": a.versions} for s in samples if isinstance(a := told[s.id], Report)]
    rows = [to_row(s, told[s.id]) for s in samples]
    if not model.writes:  # what stands in the MLLM's place says nothing
        rows = [row | {"p_mllm": None} for row in rows]
    return rows, origins


def blank_row(sample: Sample) -> Row:
    row: Row = {"id": sample.id, "sha256": sha256_of(sample.path), "p_fake": None, "said": None, "reason": None}
    row |= {"p_mllm": None, "experts": {}}
    row |= {"notes": {}, "rationale": "", "cues": [], "contradictions": [], "pointed": {}, "each_face": []}
    return row | {"error": None}


def to_row(sample: Sample, answer: Report | Failure) -> Row:
    """What is kept of an answer. The MLLM's and the experts' scores are those of the face that decided the verdict."""
    row = blank_row(sample)
    if isinstance(answer, Failure):
        return row | {"reason": answer.code, "error": f"{answer.reason} [{answer.code}]"}
    with_score = [f for f in answer.faces if f.verdict.p_fake is not None]
    face = max(with_score, key=lambda f: f.verdict.p_fake or 0.0, default=None)
    return row | {
        "p_fake": answer.verdict.p_fake,
        "said": answer.verdict.label,
        "reason": answer.verdict.reason,
        "p_mllm": face.p_fake_mllm if face else None,
        "experts": {e.expert: e.score for e in answer.evidence},
        "notes": {e.expert: e.note for e in answer.evidence if e.note},
        "rationale": answer.rationale,
        "cues": [asdict(c) for c in answer.cues],
        "contradictions": list(face.contradictions) if face else [],
        "pointed": {e.expert: [[c.area, c.artifact] for c in e.cues] for e in answer.evidence if e.cues},
        "each_face": [f.verdict.p_fake for f in with_score],
    }


# ---------------------------------------------------------------- detect


def detect_result(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    verdict: str,
    by: Sequence[str],
    draw: Resampling,
    promised: Row | None = None,
    compat: Compat = CORRECT,
) -> Row:
    """Metrics of the verdict (called `verdict` in the result), of the MLLM alone and of every expert.

    `promised`: what the calibration says of the split it was fitted on; the measured rates are set beside it. `compat`:
    quirks of stock metrics, whose numbers then stand beside ours.
    """
    columns: dict[str, list[float | None]] = {}
    if verdict:
        columns[verdict] = [row["p_fake"] for row in rows]
    if any(row["p_mllm"] is not None for row in rows):
        columns["mllm"] = [row["p_mllm"] for row in rows]
    for name in sorted({name for row in rows for name in row["experts"]}):
        columns[f"expert:{name}"] = [row["experts"].get(name) for row in rows]

    scorers: dict[str, Row] = {}
    for scorer, column in columns.items():
        missing = Counter(reason_of(row, scorer) for row, value in zip(rows, column, strict=True) if value is None)
        kept = [(i, value) for i, value in enumerate(column) if value is not None]
        scores = m.to_scores([value for _, value in kept])
        said = [rows[i]["said"] for i, _ in kept] if scorer == verdict else None
        scorers[scorer] = {"n_scored": len(kept), "unscored": dict(sorted(missing.items()))}
        of_kept = [samples[i] for i, _ in kept]
        scorers[scorer] |= _scorer(of_kept, scores, said, by, draw)
        if any(s.video for s in samples):
            scorers[scorer]["videos"] = _videos(samples, column, draw, compat)
        scorers[scorer]["curves"] = curves.of(m.to_labels(s.label for s in of_kept), scores)
        if scorer == verdict:
            scorers[scorer]["answers"] = three_answers(samples, rows, draw)
            if any(len(row["each_face"]) > 1 for row in rows):
                scorers[scorer]["faces"] = _faces(samples, rows, draw)
            scorers[scorer]["gaps"] = {c: g for c in by if c != "method" and (g := _gaps(samples, rows, c, draw))}
            if promised:
                scorers[scorer]["promise"] = risk.promise(samples, rows, promised, draw)
    headline = {f"{k}.auc": v["overall"]["auc"] | {"n": v["n_scored"]} for k, v in scorers.items()}
    if verdict:
        headline[f"{verdict}.false_alarms"] = scorers[verdict]["answers"]["false_alarms"]
    return {"headline": headline, "scorers": scorers, "common": common_auc(samples, columns, draw)}


_WITH_INTERVAL: dict[str, m.Metric] = {
    "auc": m.auc,
    "average_precision": m.average_precision,
    "eer": m.eer,
    "brier": m.brier,
    **{f"tpr_at_fpr_{rate}": partial(m.tpr_at_fpr, fpr=rate) for rate in (0.01, 0.05, 0.1)},
    # A resample repeats samples, which makes an ECE larger: of few samples, its interval lies too high.
    "ece_15": m.ece,
    "ece_15_even": m.ece_at_even_odds,
}


def _scorer(
    samples: Sequence[Sample], scores: m.Floats, said: list[str] | None, by: Sequence[str], draw: Resampling
) -> Row:
    labels, groups = m.to_labels(s.label for s in samples), [s.group for s in samples]
    real_recall, fake_recall = m.recalls(labels, scores)
    overall: Row = {"n": len(samples), "n_real": int((labels == 0).sum()), "n_fake": int(labels.sum())}
    overall["n_groups"] = len(set(groups))
    overall |= {name: draw.measure(fn, labels, scores, groups) for name, fn in _WITH_INTERVAL.items()}
    overall |= {"nll": m.nll(labels, scores), "cllr": m.cllr(labels, scores), "aurc": m.aurc(labels, scores)}
    overall["at_0.5"] = {
        "accuracy": m.accuracy(labels, scores),
        "balanced_accuracy": m.balanced_accuracy(labels, scores),
        "recall_real": real_recall,
        "recall_fake": fake_recall,
    }
    result: Row = {"overall": overall, "by": {}}
    for column in by:
        table = result["by"][column] = {}
        for value, reals, fakes, against in slices(samples, column):
            both = reals + fakes
            part: Row = {"against": against, "n_real": len(reals), "n_fake": len(fakes)}
            part["auc"] = draw.measure(m.auc, labels[both], scores[both], [groups[i] for i in both])
            if said and against != "all reals":
                part["false_alarms"] = draw.rate([said[i] == "fake" for i in reals], [groups[i] for i in reals])
            if said and against != "all fakes":
                part["found"] = draw.rate([said[i] == "fake" for i in fakes], [groups[i] for i in fakes])
            table[value] = part
    return result


def _faces(samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row:
    """AUC and EER of every face that was found, each with its picture's label, as protocols over all faces count."""
    found = [(s, p) for s, row in zip(samples, rows, strict=True) for p in row["each_face"]]
    labels, scores = m.to_labels(s.label for s, _ in found), m.to_scores([p for _, p in found])
    groups = [s.group for s, _ in found]
    several = sum(len(row["each_face"]) > 1 and s.label == "fake" for s, row in zip(samples, rows, strict=True))
    result: Row = {"n": len(found), "fake_pictures_with_several": several, "label": "that of the picture"}
    return result | {name: draw.measure(fn, labels, scores, groups) for name, fn in (("auc", m.auc), ("eer", m.eer))}


def _videos(
    samples: Sequence[Sample], column: Sequence[float | None], draw: Resampling, compat: Compat = CORRECT
) -> Row:
    """AUC and EER of whole clips, frames pooled by clip id: the mean over scored frames, and as papers after SBI do."""
    clips = [s.video or s.id for s in samples]
    labels = m.to_labels(s.label for s in samples)
    group_of = {clip: s.group for clip, s in zip(clips, samples, strict=True)}
    kept = [(i, value) for i, value in enumerate(column) if value is not None]
    scored = m.to_scores([value for _, value in kept])
    mean = m.pool_by([clips[i] for i, _ in kept], labels[[i for i, _ in kept]], scored)
    sbi, without = m.pool_sbi(clips, labels, column)

    def measured(names: Sequence[str], pooled_labels: m.Labels, pooled: m.Floats) -> Row:
        groups = [group_of[name] for name in names]
        both = {name: draw.measure(fn, pooled_labels, pooled, groups) for name, fn in (("auc", m.auc), ("eer", m.eer))}
        return {"n": len(names)} | both

    found = measured(*mean) | {"pooling": "mean over the scored frames"}
    how = "mean over all frames of the most suspicious face, 0.5 without one"
    found["sbi"] = measured(*sbi) | {"pooling": how, "frames_without_score": without}
    if compat.clips:  # its groups are not ours, so there is nothing to draw an interval from
        kept_samples = [samples[i] for i, _ in kept]
        names, pooled_labels, pooled = pool_clips(kept_samples, labels[[i for i, _ in kept]], scored, compat)
        auc, eer = m.auc(pooled_labels, pooled), m.eer(pooled_labels, pooled)
        found["stock"] = {"n": len(names), "auc": auc, "eer": eer, "pooling": "by the folder's name alone"}
    return found


def _gaps(samples: Sequence[Sample], rows: Sequence[Row], column: str, draw: Resampling) -> Row | None:
    """How far apart the values of a column are: largest minus smallest, with the interval of that difference.

    Of the AUC within a value, its false alarms and what was found of its fakes; over values with at least
    `MIN_REALS` reals (fakes). A gap is never negative, so chance alone makes one: look at the interval of the parts.
    """
    values = [value_of(s, column) for s in samples]
    scored = [i for i, row in enumerate(rows) if row["p_fake"] is not None and values[i]]
    if not scored:
        return None
    labels = m.to_labels(samples[i].label for i in scored)
    scores = m.to_scores([rows[i]["p_fake"] for i in scored])
    fake_said = np.array([rows[i]["said"] == "fake" for i in scored])
    names, place = np.unique([values[i] for i in scored], return_inverse=True)
    count = {k: [int(((place == v) & (labels == k)).sum()) for v in range(len(names))] for k in (0, 1)}

    def auc(mine: m.Labels) -> float | None:
        return m.rank_auc(labels[mine], scores[mine])

    def share(label: int) -> Callable[[m.Labels], float | None]:
        def of(mine: m.Labels) -> float | None:
            own = mine[labels[mine] == label]
            return float(fake_said[own].mean()) if len(own) else None

        return of

    gaps: Row = {}
    for what, fn, need in (("auc", auc, (0, 1)), ("false_alarms", share(0), (0,)), ("found", share(1), (1,))):
        enough = [v for v in range(len(names)) if all(count[k][v] >= MIN_REALS for k in need)]
        if len(enough) < 2:
            continue

        def gap(index: m.Labels, _: m.Floats, fn: Any = fn, enough: Sequence[int] = enough) -> float | None:
            found = [fn(index[place[index] == v]) for v in enough]
            return None if None in found else float(max(found) - min(found))

        at = np.arange(len(scored))
        known = sorted((fn(at[place == v]) or 0.0, str(names[v])) for v in enough)
        measured = draw.measure(gap, at, np.zeros(len(at)), [samples[i].group for i in scored])
        gaps[what] = measured | {"highest": known[-1][1], "lowest": known[0][1]}
    return gaps or None


# ---------------------------------------------------------------- describe


def describe_result(
    samples: Sequence[Sample],
    rows: Sequence[Row],
    usual: frozenset[Pair] | None,
    template: dict[str, str],
    compare: Callable[[Sequence[Sequence[str]], Sequence[str]], Row],
    draw: Resampling,
) -> Row:
    """Agreement of the cues said with the cues known; without rows (no model), the baselines alone.

    `usual`: the cues that the majority baseline says; None where no cues are known, and texts are compared alone.
    `template`: what the label-conditioned baseline answers to each label. `compare`: text metrics of references and
    texts.
    """
    by_template = {label: pairs_of(read_cues(text)) for label, text in template.items()}
    said: dict[str, list[frozenset[Pair] | None]] = {"majority": [usual] * len(samples)} if usual is not None else {}
    said["template"] = [by_template[s.label] for s in samples]
    if rows:
        # Without an MLLM there is no text; what experts point at stands for itself.
        named = [frozenset((c["area"], c["artifact"]) for c in row["cues"]) for row in rows]
        if any(row["rationale"] for row in rows):
            said["model"] = [None if row["p_fake"] is None else cues for row, cues in zip(rows, named, strict=True)]
        # What the text adds to, or loses of, what an expert had pointed at: the MLLM has read that in its question.
        for expert in sorted({name for row in rows for name in row["pointed"] if usual is not None}):
            pointed = [frozenset((a, k) for a, k in row["pointed"].get(expert, ())) for row in rows]
            said[f"expert:{expert}"] = [
                None if row["p_fake"] is None else cues for row, cues in zip(rows, pointed, strict=True)
            ]
    scorers: dict[str, Row] = {}
    known = [s.label == "fake" and (bool(s.cues) or usual is None) for s in samples]
    for name, heard_of in said.items():
        kept = [i for i, cues in enumerate(heard_of) if cues is not None and known[i]]
        reals = [cues for cues, s in zip(heard_of, samples, strict=True) if cues is not None and s.label == "real"]
        groups = [samples[i].group for i in kept]
        scorers[name] = {"n_scored": len(kept) + len(reals), "n_fake": len(kept), "n_real": len(reals)}
        if usual is None:
            continue
        for what, reduce in (("cues", lambda pairs: pairs), ("areas", lambda pairs: {area for area, _ in pairs})):
            truth = [reduce(pairs_of(samples[i].cues)) for i in kept]
            heard = [reduce(heard_of[i]) for i in kept]
            scorers[name][what] = m.cue_agreement(truth, heard) | {"micro_f1": micro_f1(truth, heard, groups, draw)}
        methods = [value_of(samples[i], "method") for i in kept]
        scorers[name]["by_method"] = {
            method: _by_method(
                heard_of, samples, [i for i, own in zip(kept, methods, strict=True) if own == method], draw
            )
            for method in sorted(set(methods))
        }
        scorers[name]["invented_on_reals"] = sum(bool(cues) for cues in reals) / len(reals) if reals else None
    if "model" in scorers:
        written = [row["rationale"] for row in rows if row["rationale"]]
        with_score = [(row, s.group) for row, s in zip(rows, samples, strict=True) if row["p_fake"] is not None]
        against = [(bool(row["contradictions"]), group) for row, group in with_score]
        # Text against score: the words say one label and the verdict the other.
        labels = [(said_label(row["rationale"]), row["said"], group) for row, group in with_score]
        apart = [(own != verdict, g) for own, verdict, g in labels if own and verdict != "inconclusive"]
        scorers["model"] |= {
            "unscored": dict(sorted(Counter(reason_of(row, "") for row in rows if row["p_fake"] is None).items())),
            "without_text": sum(not row["rationale"] for row, _ in with_score),
            "distinct_texts": m.distinct_share(written),
            "contradictions": sum(hit for hit, _ in against) / len(against) if against else None,
            "contradictions_interval": draw.rate([h for h, _ in against], [g for _, g in against])["interval"],
            "disagreement": draw.rate([h for h, _ in apart], [g for _, g in apart]),
        }
    told = [references(s) for s in samples]
    for name, line in (("template", [template[s.label] for s in samples]), ("model", [r["rationale"] for r in rows])):
        if name in scorers:
            kept = [i for i in range(len(samples)) if told[i] and line[i]]
            scorers[name]["text"] = {"n": len(kept)} | compare([told[i] for i in kept], [line[i] for i in kept])
    headline: Row = {}
    for name, part in scorers.items():
        if usual is None:
            for metric in ("bleu_mean", "rouge_l"):
                value = part["text"].get(metric, {}).get("value")
                headline[f"{name}.{metric}"] = {"value": value, "interval": None, "n": part["text"]["n"]}
            continue
        headline |= {f"{name}.{what}_f1": part[what]["micro_f1"] | {"n": part["n_fake"]} for what in ("cues", "areas")}
    return {"headline": headline, "scorers": scorers}


Pair = tuple[str, str]
REFERENCES = 3  # written for a sample that brings none
SHOWN = 20  # questions of annotations, in the result


def references(sample: Sample) -> list[str]:
    """A sample's reference texts; where the manifest has none, texts that the grammar writes of its known cues."""
    from data_gen.writers import write_explanation

    if given := texts.references_of(sample):
        return list(given)
    kind = "real" if sample.label == "real" else sample.df_class
    if not kind:  # the grammar closes with the class
        return []
    seed = int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8])
    return [
        write_explanation(sample.label, sample.cues, kind, np.random.default_rng([seed, k])) for k in range(REFERENCES)
    ]


def template_texts(every: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, str]:
    """One answer for all reals and one for all fakes: the commonest reference, or where all differ the first by id.

    Of the train split, where there is one apart; else of the judged samples.
    """
    counted: dict[str, Counter[str]] = {"real": Counter(), "fake": Counter()}
    for sample in sorted(train_apart(every, samples) or samples, key=lambda s: s.id):
        counted[sample.label].update(references(sample)[:1])
    return {label: found.most_common(1)[0][0] if found else "" for label, found in counted.items()}


def _by_method(
    answers: Sequence[frozenset[Pair] | None], samples: Sequence[Sample], chosen: Sequence[int], draw: Resampling
) -> Row:
    """Micro F1 of cues and areas over the chosen fakes."""
    groups = [samples[i].group for i in chosen]
    truth, heard = [pairs_of(samples[i].cues) for i in chosen], [answers[i] or frozenset() for i in chosen]
    areas = [{area for area, _ in pairs} for pairs in truth], [{area for area, _ in pairs} for pairs in heard]
    return {
        "n": len(chosen),
        "cues": micro_f1(truth, heard, groups, draw),
        "areas": micro_f1(*areas, groups, draw),
    }


def pairs_of(cues: Iterable[Cue]) -> frozenset[Pair]:
    return frozenset((c.area, c.artifact) for c in cues)


def usual_cues(every: Sequence[Sample], samples: Sequence[Sample]) -> tuple[frozenset[Pair], str]:
    """The most frequent cue set of fakes, and where it was counted: in the train split, else in the judged samples."""
    train = [s for s in train_apart(every, samples) if s.cues]
    counted = Counter(tuple(sorted(pairs_of(s.cues))) for s in (train or samples) if s.cues)
    most = min(counted, key=lambda cues: (-counted[cues], cues))
    return frozenset(most), "train split" if train else JUDGED


def train_apart(every: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """The train split, or nothing when some of it is judged."""
    judged = {s.id for s in samples}
    train = [s for s in every if s.split == "train"]
    return [] if any(s.id in judged for s in train) else train


# ---------------------------------------------------------------- the run


def run(args: argparse.Namespace) -> Row:
    """Judges, measures, writes the files and returns what `result.json` holds. Raises X2DFDError."""
    task, manifest, out = TASKS[args.task], Path(os.path.abspath(args.data)), Path(args.out)
    if manifest.is_dir():
        manifest = cuebench.open_set(manifest)
        args.data = str(manifest)
    check_model(args)
    samples, skipped = choose(task, manifest, args)
    draw, sha256 = Resampling(args.bootstrap, args.seed), manifest_sha256(manifest)
    key = {"task": task.name, "version": task.version, "manifest": sha256, "equalise": args.equalise}
    asked = [models.named(v) if v else None for v in (args.model, args.base, args.adapter)]
    key |= {"model": [*asked, args.served, args.tools, args.mode]}
    made = RUNNERS[task.name](Run(args, samples, skipped, key, draw))
    samples = made.samples or samples
    labels = Counter(s.label for s in samples)
    packages = {name: version(name) for name in ("numpy", "scikit-learn", "pillow", "pyarrow")}
    result = {
        "task": {"name": task.name, "version": task.version, "unit": task.unit},
        "data": {
            "manifest": manifest.name,
            "sha256": sha256,
            "samples_sha256": digest([s.id, s.label] for s in samples),
            "pictures_sha256": digest([row["id"], row["sha256"]] for row in made.rows),
            "split": args.split,
            "limit": args.limit,
            "n": len(samples),
            "n_real": labels["real"],
            "n_fake": labels["fake"],
            "n_groups": len({s.group for s in samples}),
        },
        "model": {"name": made.model, "mode": made.mode, "stated": made.origin["model"] | made.stated},
        "settings": {
            "equalise": f"JPEG {JPEG_QUALITY}, longest side {LONGEST_SIDE}" if args.equalise else None,
            "change": made.change,
            "seed": args.seed,
            "bootstrap": args.bootstrap,
            "interval": "95 %, percentile, groups drawn with replacement",
            "scores_of": made.scores_of,
        },
        "code": code_state(),
        "versions": made.origin["versions"] | {"python": platform.python_version()} | packages,
        "device": device(),
        "failures": dict(sorted(Counter(row["reason"] for row in made.rows if row["error"]).items())),
        **made.measured,
    }
    made.store.finish(samples, made.rows, made.origin, manifest.parent)
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    write_bytes(out / "result.json", (text + "\n").encode())
    write_text(out / "result.html", page.render(result))
    return result


def check_model(args: argparse.Namespace) -> None:
    """Raises X2DFDError for a model that the task cannot take; before anything is read or opened."""
    models.check(args)
    if any(given != (args.task == "left-out") for given in (bool(args.weights), bool(args.calib))):
        raise X2DFDError("left-out needs --weights A,B and --calib MANIFEST, and no other task takes them")
    if args.changes is not None and args.task not in ("detect", "experts"):
        raise X2DFDError("only experts and detect take --changes")
    if args.task == "detect":
        one_change(args)
    if args.model == "template" and args.task != "describe":
        raise X2DFDError("template is told the label: it is a baseline of describe alone")
    if args.with_mllm and (args.task != "experts" or args.experts or args.mode or not models.has_mllm(args.model)):
        raise X2DFDError("--with-mllm is for the task experts, all of them, of a calibrated model that has an MLLM")
    if args.task not in ("experts", "locate", "left-out"):
        return
    one = args.model.startswith(models.EXPERT)
    if args.base or args.served or args.model in models.BASELINES or (one and args.task != "locate"):
        allowed = "embedded, fusion or an adapter's folder" + (", or expert:NAME" if args.task == "locate" else "")
        raise X2DFDError(f"{args.task} is about experts: --model {allowed}, and --experts A,B for some of them")


def one_change(args: argparse.Namespace) -> Change | None:
    """The change under which `detect` judges. Raises X2DFDError (UnknownName) for more than one."""
    named = changes_of(args.changes or "")
    if len(named) > 1:
        raise X2DFDError(
            f"detect judges under one change a run, and --changes {args.changes} is {len(named)}, such as "
            f"{next(iter(named))}: a run and an --out each"
        )
    return next(iter(named.values()), None)


@dataclass(frozen=True)
class Run:
    """What a task is given."""

    args: argparse.Namespace
    samples: list[Sample]
    skipped: int  # samples without the truth that the task needs
    key: Row
    draw: Resampling

    def store(self, layout: Layout, **more: Any) -> Store:
        """Raises X2DFDError when `--out` holds rows of other samples alone."""
        store = Store(Path(self.args.out), self.key | more, layout)
        store.check(self.samples)
        return store

    def trainings(self) -> list[left_out.Training]:
        return left_out.read_trainings(self.args.weights)

    def every(self) -> list[Sample]:
        return read_manifest(self.args.data)


@dataclass(frozen=True)
class Made:
    """What a task gives back."""

    store: Store
    rows: list[Row]
    origin: Row
    measured: Row
    model: str
    mode: str | None = None
    stated: Row = field(default_factory=dict)  # of the model, beside what its answers state
    scores_of: str = "the largest face"
    change: str | None = None  # what was done to every picture before it was judged
    samples: list[Sample] | None = None  # where the task chose its own


NO_ORIGIN: Row = {"model": {}, "versions": {}}
DECIDING = "the face that decided the verdict"


def _run_detect(run: Run) -> Made:
    args, samples = run.args, run.samples
    compat = Compat.parse(args.compat)
    change = one_change(args)
    told = f"{change.name}: {change.line}" if change else None
    model = models.open_model(args)
    store = run.store(ANSWERS, **({"change": told} if told else {}))
    notes: Row = {}
    if model.kind == "baseline":
        rows, notes["majority_from"] = majority_rows(run.every(), samples)
        measured = detect_result(samples, rows, "majority", args.by, run.draw, compat=compat)
        return Made(store, rows, NO_ORIGIN, notes | measured, model.name, scores_of=DECIDING, change=told)
    ask = partial(judged, model, equalise=args.equalise, rationale=False, batch_size=args.batch_size, change=change)
    rows, origin = score(ask, samples, store)
    if model.expert:
        measured = detect_result(samples, rows, "", args.by, run.draw, compat=compat)
    else:
        verdict = "fusion" if model.kind == "fusion" else model.mode or "calibrated"
        measured = detect_result(samples, rows, verdict, args.by, run.draw, _promised(model, run), compat)
    return Made(store, rows, origin, measured, model.name, model.mode, scores_of=DECIDING, change=told)


def _promised(model: models.Opened, run: Run) -> Row | None:
    calibration = getattr(model.detector, "calibration", None)
    if calibration is None or model.mode != "calibrated" or "false_alarms_allowed" not in calibration.fitted_on:
        return None
    fitted: Row = calibration.fitted_on
    same = fitted.get("manifest_sha256") == run.key["manifest"]
    return fitted | {"seen": same and run.args.split in (None, fitted.get("split"))}


def _run_describe(run: Run) -> Made:
    args, samples = run.args, run.samples
    every = run.every()
    usual, counted_in = usual_cues(every, samples) if any(s.cues for s in samples) else (None, None)
    own = sum(bool(texts.references_of(s)) for s in samples)
    asked: Counter[str] = Counter()
    for sample in samples:
        asked.update(texts.questions_of(sample))
    notes: Row = {
        "skipped_fakes_without_cues": run.skipped,
        "majority_from": counted_in,
        "majority": None if usual is None else sorted(usual),
        "references": {
            "of_the_manifest": own,
            "annotations": {
                "questions": len(asked),
                "answers": asked.total(),
                "commonest": dict(sorted(asked.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]),
            },
            "written": sum(bool(references(s)) for s in samples) - own,
            "written_by": f"the grammar of data_gen.writers from the known cues, {REFERENCES} a sample: the embedded "
            "model was trained on its sentences, which flatters it",
        },
    }
    model = models.open_model(args)
    store = run.store(ANSWERS)
    rows: list[Row] = []
    origin = NO_ORIGIN
    if model.kind != "baseline":
        ask = partial(judged, model, equalise=args.equalise, rationale=True, batch_size=args.batch_size)
        rows, origin = score(ask, samples, store)
    compare = partial(texts.text_metrics, encoder=args.sentence_encoder, meteor=args.meteor)
    measured = describe_result(samples, rows, usual, template_texts(every, samples), compare, run.draw)
    rows = rows or [blank_row(s) for s in samples]
    return Made(store, rows, origin, notes | measured, model.name, model.mode, scores_of=DECIDING)


def _run_words(run: Run) -> Made:
    """`answer` and `classify`."""
    args, samples, classes = run.args, run.samples, run.args.task == "classify"
    model = models.open_model(args)
    store = run.store(text_tasks.LAYOUT)
    threshold = 0.5
    if model.name == "majority":
        rows, origin = _majority_words(run), NO_ORIGIN
    else:
        text_tasks.need_texts(model, args.task)
        ask = partial(
            text_tasks.ask,
            model.detector,
            question=text_tasks.class_question if classes else text_tasks.answer_question,
            read=text_tasks.read_class if classes else text_tasks.read_answer,
            equal=args.equalise,
            batch_size=args.batch_size,
        )
        rows, origin = score(ask, samples, store)
        if model.detector.calibration:
            threshold = model.detector.calibration.mllm_threshold
    if classes:
        measured: Row = {"skipped_without_class": run.skipped} | text_tasks.classify_result(samples, rows, run.draw)
    else:
        measured = text_tasks.answer_result(samples, rows, threshold, run.draw)
    return Made(store, rows, origin, measured, model.name, model.mode)


def _majority_words(run: Run) -> list[Row]:
    """The commoner label (or class) as everybody's answer."""
    if run.args.task == "classify":
        train = [s for s in train_apart(run.every(), run.samples) if s.df_class]
        known = [s.df_class for s in train or run.samples if s.df_class]
        said = min(set(known), key=lambda c: (-known.count(c), c))
        return [text_tasks.blank(s) | {"said": said} for s in run.samples]
    rows, _ = majority_rows(run.every(), run.samples)
    return [text_tasks.blank(s) | {k: r[k] for k in ("said", "p_fake")} for s, r in zip(run.samples, rows, strict=True)]


def _run_chat(run: Run) -> Made:
    args = run.args
    if bool(args.judge) != bool(args.judge_model):
        raise X2DFDError("--judge URL and --judge-model NAME go together")
    judge = text_tasks.Judge(args.judge, args.judge_model, args.seed) if args.judge else None
    model = models.open_model(args)
    text_tasks.need_texts(model, args.task)
    store = run.store(text_tasks.LAYOUT, judge=judge.facts() if judge else None)
    ask = partial(text_tasks.converse, model.detector, equal=args.equalise, judge=judge, batch_size=args.batch_size)
    rows, origin = score(ask, run.samples, store)
    measured = text_tasks.chat_result(run.samples, rows, judge, run.draw)
    return Made(store, rows, origin, measured, model.name, model.mode, scores_of=DECIDING)


def _run_ablation(run: Run) -> Made:
    args = run.args
    model = models.open_model(args)
    text_tasks.need_texts(model, args.task)
    calibration = model.detector.calibration
    store = run.store(ablation.LAYOUT)
    ask = partial(ablation.judge, model.detector, equal=args.equalise)
    rows, origin = score(ask, run.samples, store)
    threshold = calibration.mllm_threshold if calibration else 0.5
    measured = ablation.ablation_result(run.samples, rows, threshold, run.draw)
    return Made(store, rows, origin, measured, model.name, model.mode)


def _run_experts(run: Run) -> Made:
    """`experts`, and `locate`, which is its maps alone."""
    args, samples, locate = run.args, run.samples, run.args.task == "locate"
    names = args.experts.split(",") if args.experts else None
    if args.model.startswith(models.EXPERT):
        names = [args.model.removeprefix(models.EXPERT)]
    own = args.model in ("embedded", models.FUSION) or args.model.startswith(models.EXPERT)
    changes = {} if locate else dict(CHANGES) if args.changes is None else changes_of(args.changes)
    whole = models.open_model(args).detector if args.with_mllm else None
    panel = experts_bench.Panel.load("embedded" if own else args.model, names, whole)
    more = {"experts": [e.card.name for e in panel.experts], "changes": {n: c.line for n, c in changes.items()}}
    more |= {"mllm": panel.facts()["mllm"]} if whole else {}
    store = run.store(experts_bench.LAYOUT, **more)
    ask = partial(experts_bench.judge, panel, changes, equal=args.equalise, batch_size=args.batch_size)
    scored, origin = score(ask, samples, store)
    rows = experts_bench.joined_rows(panel, scored)
    if locate:
        placed = localisation(samples, rows, run.draw)
        headline = {
            f"map:{n}.{what}": part[key] | {"n": part["n"]}
            for n, part in placed["maps"].items()
            for what, key in (("pixel_auc", "auc"), ("iou", "iou"))
        }
        measured: Row = {"skipped_without_mask": run.skipped, "headline": headline, "localisation": placed}
    else:
        measured = experts_bench.experts_result(panel, samples, rows, changes, args.by, run.draw)
    stated = {"fusion": panel.fusion, "held_out": panel.held_out.get(experts_bench.FUSION, [])}
    return Made(store, rows, origin, measured, models.named(args.model), stated=stated)


def _run_assess(run: Run) -> Made:
    """The ranking of `x2dfd assess`, with its files beside the result."""
    from x2dfd.assessment import BANK, assess, chosen_pictures, read_questions
    from x2dfd.crops import load_crops
    from x2dfd.detector import versions

    args = run.args
    model = models.open_model(args)
    text_tasks.need_texts(model, args.task)
    crops = load_crops(Path(args.data), workers=min(4, os.cpu_count() or 1))
    found = assess(
        model.detector.mllm,
        crops,
        read_questions(args.questions or BANK),
        Path(args.out) / "assessment",
        limit=args.limit,
        split=args.split,
        seed=args.seed,
        manifest_hash=run.key["manifest"],
    )

    def auc(finding: Any) -> Row:
        told = finding.deciding
        n = told.n_positive + told.n_negative
        return {"value": told.auc, "interval": list(told.interval) if told.interval else None, "n": n}

    headline = {f"cue {f.area} {f.artifact}.auc": auc(f) for f in found.cues}
    measured = {
        "headline": headline,
        "assessment": {
            "files": "assessment/",
            "questions_sha256": found.questions_sha256,
            "n_real": found.n_real,
            "n_fake": found.n_fake,
            "n_unusable": found.n_unusable,
            "strong": [f"{f.area} {f.artifact}" for f in found.cues if f.strong],
            "rule": found.rule,
            "ranked_by": found.ranked_by,
            "n_questions": len(found.questions),
            "n_cues": len(found.cues),
            "control": found.control,
            "stability": found.stability,
            "random": found.random,
        },
    }
    origin = {"model": model.detector.facts, "versions": versions()}
    asked = [crops.samples[i] for i in chosen_pictures(crops, args.split, args.limit, args.seed)]
    rows = [blank_row(s) for s in asked]
    scores_of = "the largest face, as load_crops cuts it; pictures are not re-encoded"
    store = run.store(ANSWERS)
    return Made(store, rows, origin, measured, model.name, model.mode, scores_of=scores_of, samples=asked)


def _run_left_out(run: Run) -> Made:
    args, samples = run.args, run.samples
    if len({s.label for s in samples}) < 2:
        raise X2DFDError("left-out needs real pictures, and fakes by methods that a training left out")
    compared = left_out.Compared.load("embedded" if args.model == models.FUSION else args.model, run.trainings())
    store = run.store(experts_bench.LAYOUT, experts=[e.card.name for e in compared.panel.experts])
    ask = partial(experts_bench.judge, compared.panel, {}, equal=args.equalise, batch_size=args.batch_size)
    rows, origin = score(ask, samples, store)
    calib = left_out.score_calibration(compared, Path(args.calib), Path(args.out) / "calib")
    measured = left_out.left_out_result(compared, samples, rows, calib[0], calib[1], run.draw)
    notes = {"skipped_fakes_of_other_methods": run.skipped, "calib": calib[2]}
    return Made(store, rows, origin, notes | measured, models.named(args.model))


RUNNERS: dict[str, Callable[[Run], Made]] = {
    "detect": _run_detect,
    "answer": _run_words,
    "classify": _run_words,
    "describe": _run_describe,
    "locate": _run_experts,
    "assess": _run_assess,
    "chat": _run_chat,
    "ablation": _run_ablation,
    "experts": _run_experts,
    "left-out": _run_left_out,
}


def choose(task: Task, manifest: Path, args: argparse.Namespace) -> tuple[list[Sample], int]:
    """The samples to judge, and how many were skipped because the task has no truth for them."""
    samples = read_manifest(manifest, split=args.split)
    if args.split is None and any(s.split == "train" for s in samples):
        say("no --split given: samples of the train split are judged too")
    needs: dict[str, Callable[[Sample], bool]] = {
        "describe": lambda s: s.label == "real" or bool(s.cues or texts.references_of(s)),
        "classify": lambda s: bool(s.df_class),
        "locate": lambda s: s.label == "fake" and s.mask is not None,
    }
    if task.name == "left-out":
        trainings = left_out.read_trainings(args.weights)
        needs["left-out"] = lambda s: s.label == "real" or any(t.unseen(s) for t in trainings)
    has_truth = needs.get(task.name)
    known = [s for s in samples if has_truth is None or has_truth(s)]
    skipped, samples = len(samples) - len(known), known
    if not samples:
        wanted = {"describe": "known cues or references", "classify": "a known df_class", "locate": "a known mask"}
        truth = wanted.get(task.name, "a known left-out method")
        raise X2DFDError(f"{manifest.name}: no chosen sample has {truth}, nothing to {task.name}")
    # `assess` draws its own pictures: as many real ones as fakes.
    if task.name != "assess" and args.limit is not None and args.limit < len(samples):
        chosen = np.random.default_rng(args.seed).permutation(len(samples))[: args.limit]
        samples = [samples[i] for i in sorted(chosen)]
    if task.name == "describe" and not any(s.cues or texts.references_of(s) for s in samples):
        raise X2DFDError(f"{manifest.name}: no chosen sample has known cues or references, nothing to describe")
    check_clips(samples)
    for column in args.by:
        if column not in ("source", "method") and not any(value_of(s, column) for s in samples):
            raise X2DFDError(f"--by {column}: the manifest has no such column, or it is empty")
    return samples, skipped


def majority_rows(every: Sequence[Sample], samples: Sequence[Sample]) -> tuple[list[Row], str]:
    """Everybody gets the share of fakes as score and the commoner label, and where the share was counted."""
    train = train_apart(every, samples)
    share = float(np.mean(m.to_labels(s.label for s in train or samples)))
    said = "fake" if share > 0.5 else "real"
    return [blank_row(s) | {"p_fake": share, "said": said} for s in samples], "train split" if train else JUDGED


def check_clips(samples: Iterable[Sample]) -> None:
    """Raises X2DFDError when one clip id names frames of different clips, which would merge their scores."""
    seen: dict[str, tuple[str, ...]] = {}
    for s in samples:
        traits = (s.label, s.method, s.source, s.group)
        if s.video and seen.setdefault(s.video, traits) != traits:
            raise X2DFDError(f"video {s.video!r} is two clips, {seen[s.video]} and {traits}: give each its own id")


def code_state() -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None outside a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True, check=False)

    commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    if commit.returncode or status.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def device() -> str:
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(0)) if torch and torch.cuda.is_available() else f"cpu ({platform.machine()})"


@dataclass(frozen=True)
class Drift:
    """The verdict of `--compare`."""

    moved: list[str]  # headline numbers beyond the reference's interval, and samples that were lost or won
    notes: list[str]  # what differs and explains it: model, versions, code, device


def drift(result: Row, reference: Row) -> Drift:
    """What moved by more than its interval; raises X2DFDError when the two results are not about the same samples."""
    compared = [("task", "name"), ("task", "version"), ("data", "sha256"), ("data", "split"), ("data", "limit")]
    compared += [("data", "samples_sha256"), ("data", "pictures_sha256")]
    compared += [("settings", "equalise"), ("settings", "change")]
    for part, name in compared:
        here, there = result[part][name], reference.get(part, {}).get(name)
        if here != there:
            raise X2DFDError(f"not comparable: {part} {name} is {here} here and {there} in the reference")
    notes = [
        f"{name} differs"
        for name in ("model", "versions", "code", "device", "settings")
        if result[name] != reference.get(name)
    ]
    moved = []
    for name in sorted(result["headline"].keys() | reference["headline"].keys()):
        new, old = result["headline"].get(name), reference["headline"].get(name)
        if new is None or old is None:
            moved.append(f"{name} is only in {'the reference' if new is None else 'this result'}")
        elif new["n"] != old["n"]:
            moved.append(f"{name}: {new['n']} samples scored, {old['n']} in the reference")
        elif None in (new["value"], old["value"]):
            if new["value"] is not old["value"]:
                moved.append(f"{name}: {new['value']}, {old['value']} in the reference")
        else:
            low, high = old["interval"] or (old["value"], old["value"])
            if not low - 1e-9 <= new["value"] <= high + 1e-9:
                moved.append(f"{name}: {new['value']:.4f}, outside [{low:.4f}, {high:.4f}] of the reference")
    return Drift(moved, notes)


Scores = dict[str, dict[str, dict[str, Any]]]
"""Scorer -> id -> label, group and score."""


def compare(result: Row, out: Path, reference: Row, scores: Scores | X2DFDError) -> Row:
    """What `comparison.json` holds: the drift, and per scorer the difference of the AUCs, this run's minus the other's.

    `scores`: of the reference's samples, or why there are none. Raises X2DFDError as `drift` does.
    """
    found = drift(result, reference)
    pairs: Row = {}
    if isinstance(scores, X2DFDError):
        found.notes.append(f"no paired test: {scores}")
    else:
        here, settings = paired.read_scores(out, result), result["settings"]
        draws = {"n": settings["bootstrap"], "seed": settings["seed"]}
        both = {name: paired.paired(here[name], scores[name], **draws) for name in here if name in scores}
        pairs = {name: pair for name, pair in both.items() if None not in pair["auc"]}
    return {"moved": found.moved, "notes": found.notes, "paired": pairs}


def _pair_line(name: str, pair: Row) -> str:
    bounds, p = pair["difference"]["interval"], pair["delong"]["p"]
    interval = "" if bounds is None else f" [{bounds[0]:+.4f}, {bounds[1]:+.4f}]"
    tested = "" if p is None else f", DeLong p={p:.2g}"
    return f"paired {name}: AUC {pair['difference']['value']:+.4f}{interval}{tested}, n={pair['n']}"


def _line(name: str, measured: Row) -> str:
    if measured["value"] is None:
        return f"{name}: not defined"
    low, high = measured["interval"] or (None, None)
    interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
    return f"{name}: {measured['value']:.4f}{interval}, n={measured['n']}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command's options, checked as far as they can be without opening anything."""
    parser = argparse.ArgumentParser(
        prog="run_bench.py",
        description="Scores a model on labelled images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python eval/run_bench.py detect --data manifest.csv --split val --out results/val\n"
        "  python eval/run_bench.py describe --data forged/manifest.jsonl --model majority --out results/cues\n"
        "  python eval/run_bench.py answer --data manifest.csv --served http://localhost:8000/v1 --model NAME --out a\n"
        "  python eval/run_bench.py experts --data manifest.csv --changes jpeg50,half --out results/experts\n"
        "  python eval/run_bench.py detect --data manifest.csv --changes codec/share/once --out results/shared\n"
        "  python eval/run_bench.py left-out --data val.jsonl --calib calib.jsonl --weights no_swap,no_blur --out out",
    )
    parser.add_argument("task", nargs="?", choices=list(TASKS), help="what is asked (see --list)")
    parser.add_argument("--list", action="store_true", help="list tasks, changes, protocols, suites and other commands")
    parser.add_argument(
        "--data", metavar="MANIFEST", help="CSV, JSONL or Parquet with path and label, or CueBench's folder"
    )
    models.add_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where result.json, result.html and samples.parquet go")
    parser.add_argument("--split", help="judge this split only")
    parser.add_argument("--limit", type=int, metavar="N", help="judge N samples, drawn with the seed")
    parser.add_argument("--by", default="source,method", help="columns to report by (default: source,method)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--equalise", action=argparse.BooleanOptionalAction, default=True, help="re-encode all alike")
    parser.add_argument("--experts", metavar="A,B", help="experts: these (default: all of ours, and mesonet if here)")
    parser.add_argument(
        "--changes",
        metavar="A,B",
        help="experts: score under these changes or suites too, or none (default: the changes); detect: judge every "
        "picture under this one (default: as it is)",
    )
    parser.add_argument("--with-mllm", action="store_true", help="experts: the MLLM too; the fusion is the whole model")
    parser.add_argument("--weights", metavar="A,B", help="left-out: folders of trainings with --hold-out")
    parser.add_argument("--calib", metavar="MANIFEST", help="left-out: split `calib` of it fits each fusion anew")
    parser.add_argument("--sentence-encoder", type=Path, metavar="DIR", help="describe: encoder for the similarity")
    parser.add_argument("--meteor", action="store_true", help="describe: METEOR too (Java; a minute and more)")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="assess: these questions")
    parser.add_argument("--judge", metavar="URL", help="chat: an OpenAI-compatible endpoint that marks answers")
    parser.add_argument("--judge-model", metavar="NAME", help="chat: the judge's name there")
    parser.add_argument("--compat", default="", metavar="A,B", help="detect: stock quirks (clips) beside ours")
    parser.add_argument(
        "--compare",
        metavar="REF.json",
        help="exit 1 when a headline number left its interval; with REF's samples.parquet beside it, paired tests too",
    )
    args = parser.parse_args(argv)
    if not args.list and not (args.task and args.data and args.out):
        parser.error("TASK, --data and --out are needed (or --list)")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    args.by = [column for column in args.by.split(",") if column]
    args.weights = [folder for folder in (args.weights or "").split(",") if folder]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when it ran, 1 on drift from the reference, 2 on what the user has to mend, other samples included."""
    args = parse(argv)
    if args.list:
        for task in TASKS.values():
            print(f"{task.name}\tv{task.version}\tper {task.unit}\t{task.line}")
        for change in CHANGES.values():
            print(f"change {change.name}\t{change.line}")
        for protocol in PROTOCOLS.values():
            print(f"protocol {protocol.name}\tv{protocol.version}\t{protocol.line}")
        for name, suite in SUITES.items():
            print(f"suite {name}\t{sum(map(len, suite.values()))} changes: {', '.join(suite)}")
        for name, line in COMMANDS.items():
            print(f"command python -m {name}\t{line}")
        return 0
    try:
        # Before the run, which may write to the same folder.
        reference = _reference(Path(args.compare)) if args.compare else None
        result = run(args)
        print(*(_line(name, measured) for name, measured in result["headline"].items()), sep="\n")
        if reference is None:
            return 0
        stated, scores, sha256 = reference
        found = compare(result, Path(args.out), stated, scores)
    except X2DFDError as error:
        say(f"error: {error}")
        return 2
    of = {"result_sha256": file_sha256(Path(args.out) / "result.json"), "reference_sha256": sha256}
    write_text(Path(args.out) / "comparison.json", json.dumps(of | found, ensure_ascii=False, indent=1) + "\n")
    for name, pair in found["paired"].items():
        print(_pair_line(name, pair))
    for note in found["notes"]:
        print(f"note: {note}")
    print("drift: " + ("; ".join(found["moved"]) if found["moved"] else "none"))
    return 1 if found["moved"] else 0


def _reference(path: Path) -> tuple[Row, Scores | X2DFDError, str]:
    """A result file, the scores of the table beside it or why there are none, and the file's SHA-256."""
    try:
        reference = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{path}: not a result file ({error})") from error
    if not isinstance(reference, dict) or "headline" not in reference:
        raise X2DFDError(f"{path}: not a result file (no headline)")
    try:
        scores: Scores | X2DFDError = paired.read_scores(path.parent, reference)
    except X2DFDError as error:  # the drift can be told without them
        scores = error
    return reference, scores, file_sha256(path)


if __name__ == "__main__":
    sys.exit(main())
