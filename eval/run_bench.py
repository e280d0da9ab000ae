"""Scores a model on labelled images and writes numbers that can be refuted.

    python eval/run_bench.py detect --data manifest.csv --split val --model embedded --out results/val

writes `samples.parquet` (one row a sample) and `result.json` (metrics with intervals, and where they come from). A
run that was cut off goes on where it stopped; so does one with the same manifest and model and another `--limit` or
`--bootstrap`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

import x2dfd  # noqa: E402
from eval import experts_bench  # noqa: E402
from eval import metrics as m  # noqa: E402
from eval.changes import CHANGES  # noqa: E402
from eval.scoring import (  # noqa: E402
    JPEG_QUALITY,
    LONGEST_SIDE,
    Layout,
    Resampling,
    Row,
    Store,
    common_auc,
    equalised,
    reason_of,
    say,
    score,
    slices,
    three_answers,
    value_of,
)
from x2dfd.errors import InputError, UnknownName, X2DFDError  # noqa: E402
from x2dfd.files import write_bytes  # noqa: E402
from x2dfd.manifest import Sample, manifest_sha256, read_manifest  # noqa: E402
from x2dfd.types import Cue, Failure, Report  # noqa: E402

JUDGED = "the judged samples"
ANSWERS = Layout(
    texts=("said", "reason", "rationale", "error"),
    numbers=("p_fake", "p_mllm"),
    packed=("notes", "cues", "contradictions", "pointed"),
)
"""What a row of `detect` and `describe` holds, beside the sample and the experts' scores."""


@dataclass(frozen=True)
class Task:
    """What is asked and what is counted; a change of either is a new version."""

    name: str
    version: str
    unit: str
    line: str
    rationale: bool  # whether the model has to write


TASKS = {
    task.name: task
    for task in (
        Task("detect", "2", "image", "real or fake: the verdict, the MLLM alone and every expert, side by side", False),
        Task(
            "describe",
            "2",
            "image",
            "cues named in the rationale against those known; experts that point beside it",
            True,
        ),
        Task(
            "experts",
            "1",
            "image",
            "the experts without the MLLM, their fusion and a baseline; changed pictures; where they point",
            False,
        ),
    )
}


# ---------------------------------------------------------------- judging


def judged(
    detector: Any, samples: Sequence[Sample], *, equalise: bool, rationale: bool, batch_size: int
) -> tuple[list[Row], list[Row]]:
    """A row a sample, in order, and the model and versions that the answers state."""
    answers: dict[str, Report | Failure] = {}
    sources: list[Path | bytes] = []
    handed: list[Sample] = []
    for sample in samples:
        try:
            sources.append(equalised(sample.path) if equalise else sample.path)
            handed.append(sample)
        except InputError as error:
            answers[sample.id] = Failure(str(sample.path), None, error.code, error.reason)
    reports = detector.detect_many(sources, batch_size=batch_size, rationale=rationale) if sources else ()
    for sample, report in zip(handed, reports, strict=True):
        answers[sample.id] = report
    origins = [{"model": a.model, "versions": a.versions} for s in samples if isinstance(a := answers[s.id], Report)]
    return [to_row(s, answers[s.id]) for s in samples], origins


def blank_row(sample: Sample) -> Row:
    row: Row = {"id": sample.id, "p_fake": None, "said": None, "reason": None, "p_mllm": None, "experts": {}}
    return row | {"notes": {}, "rationale": "", "cues": [], "contradictions": [], "pointed": {}, "error": None}


def to_row(sample: Sample, answer: Report | Failure) -> Row:
    """What is kept of an answer. The MLLM's and the experts' scores are those of the face that decided the verdict."""
    row = blank_row(sample)
    if isinstance(answer, Failure):
        return row | {"reason": answer.code, "error": f"{answer.reason} [{answer.code}]"}
    judged = [f for f in answer.faces if f.verdict.p_fake is not None]
    face = max(judged, key=lambda f: f.verdict.p_fake or 0.0, default=None)
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
    }


# ---------------------------------------------------------------- detect


def detect_result(
    samples: Sequence[Sample], rows: Sequence[Row], verdict: str, by: Sequence[str], draw: Resampling
) -> Row:
    """Metrics of the verdict (called `verdict` in the result), of the MLLM alone and of every expert."""
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
        scorers[scorer] |= _scorer([samples[i] for i, _ in kept], scores, said, by, draw)
        if scorer == verdict:
            scorers[scorer]["answers"] = three_answers(samples, rows, draw)
    headline = {f"{k}.auc": v["overall"]["auc"] | {"n": v["n_scored"]} for k, v in scorers.items()}
    if verdict:
        headline[f"{verdict}.false_alarms"] = scorers[verdict]["answers"]["false_alarms"]
    return {"headline": headline, "scorers": scorers, "common": common_auc(samples, columns, draw)}


def _scorer(
    samples: Sequence[Sample], scores: m.Floats, said: list[str] | None, by: Sequence[str], draw: Resampling
) -> Row:
    labels, groups = m.to_labels(s.label for s in samples), [s.group for s in samples]
    real_recall, fake_recall = m.recalls(labels, scores)
    overall: Row = {"n": len(samples), "n_real": int((labels == 0).sum()), "n_fake": int(labels.sum())}
    overall["n_groups"] = len(set(groups))
    for name, fn in (("auc", m.auc), ("average_precision", m.average_precision), ("eer", m.eer), ("brier", m.brier)):
        overall[name] = draw.measure(fn, labels, scores, groups)
    overall |= {f"tpr_at_fpr_{rate}": m.tpr_at_fpr(labels, scores, rate) for rate in (0.01, 0.05, 0.1)}
    overall |= {"nll": m.nll(labels, scores), "ece_15": m.ece(labels, scores), "cllr": m.cllr(labels, scores)}
    overall["at_0.5"] = {
        "accuracy": m.accuracy(labels, scores),
        "balanced_accuracy": m.balanced_accuracy(labels, scores),
        "recall_real": real_recall,
        "recall_fake": fake_recall,
    }
    result: Row = {"overall": overall, "by": {}}
    if any(s.video for s in samples):
        clips = [s.video or s.id for s in samples]
        names, pooled_labels, pooled = m.pool_by(clips, labels, scores)
        group_of = dict(zip(clips, groups, strict=True))
        clip_groups = [group_of[name] for name in names]
        result["videos"] = {"n": len(names), "pooling": "mean"} | {
            name: draw.measure(fn, pooled_labels, pooled, clip_groups) for name, fn in (("auc", m.auc), ("eer", m.eer))
        }
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


# ---------------------------------------------------------------- describe


def describe_result(samples: Sequence[Sample], rows: Sequence[Row], usual: frozenset[Pair], draw: Resampling) -> Row:
    """Agreement of the cues said with the cues known; without rows (no model), the baseline alone."""
    said: dict[str, list[frozenset[Pair] | None]] = {"majority": [usual] * len(samples)}
    if rows:
        named = [frozenset((c["area"], c["artifact"]) for c in row["cues"]) for row in rows]
        said["model"] = [None if row["p_fake"] is None else cues for row, cues in zip(rows, named, strict=True)]
        # What the text adds to, or loses of, what an expert had pointed at: the MLLM has read that in its question.
        for expert in sorted({name for row in rows for name in row["pointed"]}):
            pointed = [frozenset((a, k) for a, k in row["pointed"].get(expert, ())) for row in rows]
            said[f"expert:{expert}"] = [
                None if row["p_fake"] is None else cues for row, cues in zip(rows, pointed, strict=True)
            ]
    scorers: dict[str, Row] = {}
    for name, answers in said.items():
        kept = [i for i, cues in enumerate(answers) if cues is not None and samples[i].label == "fake"]
        reals = [cues for cues, s in zip(answers, samples, strict=True) if cues is not None and s.label == "real"]
        groups = [samples[i].group for i in kept]
        scorers[name] = {"n_scored": len(kept) + len(reals), "n_fake": len(kept), "n_real": len(reals)}
        for what, reduce in (("cues", lambda pairs: pairs), ("areas", lambda pairs: {area for area, _ in pairs})):
            truth = [reduce(pairs_of(samples[i].cues)) for i in kept]
            heard = [reduce(answers[i]) for i in kept]
            scorers[name][what] = m.cue_agreement(truth, heard) | {"micro_f1": _micro_f1(truth, heard, groups, draw)}
        methods = [value_of(samples[i], "method") for i in kept]
        scorers[name]["by_method"] = {
            method: _by_method(
                answers, samples, [i for i, own in zip(kept, methods, strict=True) if own == method], draw
            )
            for method in sorted(set(methods))
        }
        scorers[name]["invented_on_reals"] = sum(bool(cues) for cues in reals) / len(reals) if reals else None
    if rows:
        texts = [row["rationale"] for row in rows if row["rationale"]]
        judged = [row for row in rows if row["p_fake"] is not None]
        scorers["model"] |= {
            "unscored": dict(sorted(Counter(reason_of(row, "") for row in rows if row["p_fake"] is None).items())),
            "without_text": sum(not row["rationale"] for row in judged),
            "distinct_texts": m.distinct_share(texts),
            "contradictions": sum(bool(r["contradictions"]) for r in judged) / len(judged) if judged else None,
        }
    headline: Row = {}
    for name, part in scorers.items():
        headline |= {f"{name}.{what}_f1": part[what]["micro_f1"] | {"n": part["n_fake"]} for what in ("cues", "areas")}
    return {"headline": headline, "scorers": scorers}


Pair = tuple[str, str]


def _by_method(
    answers: Sequence[frozenset[Pair] | None], samples: Sequence[Sample], chosen: Sequence[int], draw: Resampling
) -> Row:
    """Micro F1 of cues and areas over the chosen fakes."""
    groups = [samples[i].group for i in chosen]
    truth, heard = [pairs_of(samples[i].cues) for i in chosen], [answers[i] or frozenset() for i in chosen]
    areas = [{area for area, _ in pairs} for pairs in truth], [{area for area, _ in pairs} for pairs in heard]
    return {
        "n": len(chosen),
        "cues": _micro_f1(truth, heard, groups, draw),
        "areas": _micro_f1(*areas, groups, draw),
    }


def pairs_of(cues: Iterable[Cue]) -> frozenset[Pair]:
    return frozenset((c.area, c.artifact) for c in cues)


def _micro_f1(truth: Sequence[Any], said: Sequence[Any], groups: Sequence[str], draw: Resampling) -> dict[str, Any]:
    counts = np.array([(len(t & s), len(s), len(t)) for t, s in zip(truth, said, strict=True)], dtype=np.int64)

    def f1(index: m.Labels, _: m.Floats) -> float | None:
        return m.precision_recall_f1(counts.reshape(-1, 3)[index])["f1"]

    return draw.measure(f1, np.arange(len(counts)), np.zeros(len(counts)), groups)


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
    """Judges, measures, writes both files and returns what `result.json` holds. Raises X2DFDError."""
    task, manifest, out = TASKS[args.task], Path(os.path.abspath(args.data)), Path(args.out)
    samples, skipped = choose(task, manifest, args)
    draw, sha256 = Resampling(args.bootstrap, args.seed), manifest_sha256(manifest)
    key = {"task": task.name, "version": task.version, "manifest": sha256, "mode": args.mode, "equalise": args.equalise}
    made = _run_experts if task.name == "experts" else _run_detector
    store, rows, origin, measured = made(args, samples, skipped, key, draw)

    labels = Counter(s.label for s in samples)
    named = args.model in ("majority", "embedded") or args.model.startswith("expert:")
    packages = {name: version(name) for name in ("numpy", "scikit-learn", "pillow", "pyarrow")}
    result = {
        "task": {"name": task.name, "version": task.version, "unit": task.unit},
        "data": {
            "manifest": manifest.name,
            "sha256": sha256,
            "split": args.split,
            "limit": args.limit,
            "n": len(samples),
            "n_real": labels["real"],
            "n_fake": labels["fake"],
            "n_groups": len({s.group for s in samples}),
        },
        "model": {
            "name": args.model if named else Path(os.path.abspath(args.model)).name,
            "mode": None if args.model == "majority" or task.name == "experts" else args.mode,
            "stated": origin["model"] | measured.pop("stated", {}),
        },
        "settings": {
            "equalise": f"JPEG {JPEG_QUALITY}, longest side {LONGEST_SIDE}" if args.equalise else None,
            "seed": args.seed,
            "bootstrap": args.bootstrap,
            "interval": "95 %, percentile, groups drawn with replacement",
            "scores_of": "the largest face" if task.name == "experts" else "the face that decided the verdict",
        },
        "code": code_state(),
        "versions": origin["versions"] | {"python": platform.python_version()} | packages,
        "device": device(),
        "failures": dict(sorted(Counter(row["reason"] for row in rows if row["error"]).items())),
        **measured,
    }
    store.finish(samples, rows, origin, manifest.parent)
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    write_bytes(out / "result.json", (text + "\n").encode())
    return result


Made = tuple[Store, list[Row], Row, Row]
"""The store, the rows, their origin, and what was measured."""


def _run_detector(
    args: argparse.Namespace, samples: Sequence[Sample], skipped: int, key: Row, draw: Resampling
) -> Made:
    every = read_manifest(args.data)
    baseline, expert = args.model == "majority", args.model.startswith("expert:")
    describing = args.task == "describe"
    store = Store(Path(args.out), key | {"baseline": baseline}, ANSWERS)
    notes: Row = {}
    if baseline:
        rows, notes["majority_from"] = majority_rows(every, samples)
        origin: Row = {"model": {}, "versions": {}}
    else:
        detector = x2dfd.load(None if expert or args.model == "embedded" else args.model, mode=args.mode)
        ask = partial(
            judged,
            detector,
            equalise=args.equalise,
            rationale=TASKS[args.task].rationale,
            batch_size=args.batch_size,
        )
        rows, origin = score(ask, samples, store)
    if describing:
        usual, counted_in = usual_cues(every, samples)
        notes |= {"skipped_fakes_without_cues": skipped, "majority_from": counted_in, "majority": sorted(usual)}
        measured = describe_result(samples, [] if baseline else rows, usual, draw)
    elif expert:
        measured = detect_result(samples, only_expert(rows, args.model.removeprefix("expert:")), "", args.by, draw)
    else:
        measured = detect_result(samples, rows, "majority" if baseline else args.mode, args.by, draw)
    return store, rows, origin, notes | measured


def _run_experts(args: argparse.Namespace, samples: Sequence[Sample], skipped: int, key: Row, draw: Resampling) -> Made:
    changes = experts_bench.chosen_changes(args.changes)
    panel = experts_bench.Panel.load(args.model, args.experts.split(",") if args.experts else None)
    key = key | {"experts": [e.card.name for e in panel.experts], "changes": {n: CHANGES[n].line for n in changes}}
    store = Store(Path(args.out), key, experts_bench.LAYOUT)
    ask = partial(experts_bench.judge, panel, changes, equal=args.equalise, batch_size=args.batch_size)
    scored, origin = score(ask, samples, store)
    rows = experts_bench.joined_rows(panel, scored)
    measured = experts_bench.experts_result(panel, samples, rows, changes, args.by, draw)
    stated = {"fusion": panel.fusion, "held_out": panel.held_out.get(experts_bench.FUSION, [])}
    return store, rows, origin, {"stated": stated} | measured


def choose(task: Task, manifest: Path, args: argparse.Namespace) -> tuple[list[Sample], int]:
    """The samples to judge, and how many fakes were skipped because `describe` has no truth for them."""
    samples = read_manifest(manifest, split=args.split)
    if args.split is None and any(s.split == "train" for s in samples):
        say("no --split given: samples of the train split are judged too")
    skipped = 0
    if task.name == "describe":
        skipped = sum(s.label == "fake" and not s.cues for s in samples)
        samples = [s for s in samples if s.label == "real" or s.cues]
    if args.limit is not None and args.limit < len(samples):
        chosen = np.random.default_rng(args.seed).permutation(len(samples))[: args.limit]
        samples = [samples[i] for i in sorted(chosen)]
    if task.name == "describe" and not any(s.cues for s in samples):
        raise X2DFDError(f"{manifest.name}: no chosen sample has known cues, nothing to describe")
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


def only_expert(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows as if this expert were the whole model."""
    known = {expert for row in rows for expert in row["experts"]}
    if name not in known:
        raise UnknownName("expert", name, known)
    return [row | {"p_mllm": None, "experts": {name: row["experts"].get(name)}} for row in rows]


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


def drift(result: Row, reference: Row) -> list[str]:
    """What moved by more than its interval; raises X2DFDError when the two results are not about the same samples."""
    for part, name in (("task", "name"), ("task", "version"), ("data", "sha256"), ("data", "split"), ("data", "limit")):
        here, there = result[part][name], reference.get(part, {}).get(name)
        if here != there:
            raise X2DFDError(f"not comparable: {part} {name} is {here} here and {there} in the reference")
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
    return moved


def _line(name: str, measured: Row) -> str:
    if measured["value"] is None:
        return f"{name}: not defined"
    low, high = measured["interval"] or (None, None)
    interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
    return f"{name}: {measured['value']:.4f}{interval}, n={measured['n']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when it ran, 1 on drift from the reference, 2 on what the user has to mend."""
    parser = argparse.ArgumentParser(
        prog="run_bench.py",
        description="Scores a model on labelled images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python eval/run_bench.py detect --data manifest.csv --split val --out results/val\n"
        "  python eval/run_bench.py describe --data forged/manifest.jsonl --model majority --out results/cues\n"
        "  python eval/run_bench.py experts --data manifest.csv --changes jpeg50,half --out results/experts",
    )
    parser.add_argument("task", nargs="?", choices=list(TASKS), help="what is asked (see --list)")
    parser.add_argument("--list", action="store_true", help="list the tasks, and the changes of `experts`")
    parser.add_argument("--data", metavar="MANIFEST", help="CSV, JSONL or Parquet with path and label")
    parser.add_argument("--model", default="embedded", help="embedded, an adapter's folder, expert:NAME or majority")
    parser.add_argument("--out", metavar="DIR", help="where result.json and samples.parquet go")
    parser.add_argument("--split", help="judge this split only")
    parser.add_argument("--limit", type=int, metavar="N", help="judge N samples, drawn with the seed")
    parser.add_argument("--mode", choices=("calibrated", "paper"), default="calibrated")
    parser.add_argument("--by", default="source,method", help="columns to report by (default: source,method)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples for intervals; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--equalise", action=argparse.BooleanOptionalAction, default=True, help="re-encode all alike")
    parser.add_argument("--experts", metavar="A,B", help="experts: these (default: all of ours, and mesonet if here)")
    parser.add_argument(
        "--changes", metavar="A,B", help="experts: score under these changes too, or none (default: all)"
    )
    parser.add_argument("--compare", metavar="REF.json", help="exit 1 when a headline number left its interval")
    args = parser.parse_args(argv)
    if args.list:
        for task in TASKS.values():
            print(f"{task.name}\tv{task.version}\tper {task.unit}\t{task.line}")
        for change in CHANGES.values():
            print(f"change {change.name}\t{change.line}")
        return 0
    if not (args.task and args.data and args.out):
        parser.error("TASK, --data and --out are needed (or --list)")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    if args.task == "experts" and (args.model == "majority" or args.model.startswith("expert:")):
        parser.error("experts takes --model embedded or an adapter's folder, and --experts")
    args.by = [column for column in args.by.split(",") if column]
    try:
        reference = _reference(Path(args.compare)) if args.compare else None
        result = run(args)
        print(*(_line(name, measured) for name, measured in result["headline"].items()), sep="\n")
        if reference is None:
            return 0
        moved = drift(result, reference)
    except X2DFDError as error:
        say(f"error: {error}")
        return 2
    print("drift: " + ("; ".join(moved) if moved else "none"))
    return 1 if moved else 0


def _reference(path: Path) -> Row:
    try:
        reference = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise X2DFDError(f"{path}: not a result file ({error})") from error
    if not isinstance(reference, dict) or "headline" not in reference:
        raise X2DFDError(f"{path}: not a result file (no headline)")
    return reference


if __name__ == "__main__":
    sys.exit(main())
