"""Scores a model on labelled images and writes numbers that can be refuted.

    python eval/run_bench.py detect --data manifest.csv --split val --model embedded --out results/val

writes `samples.parquet` (one row a sample) and `result.json` (metrics with intervals, and where they come from). A
run that was cut off goes on where it stopped; so does one with the same manifest and model and another `--limit` or
`--bootstrap`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

import x2dfd  # noqa: E402
from eval import metrics as m  # noqa: E402
from x2dfd.errors import InputError, UnknownName, X2DFDError  # noqa: E402
from x2dfd.manifest import Sample, manifest_sha256, read_manifest  # noqa: E402
from x2dfd.types import Cue, Failure, Report  # noqa: E402

Row = dict[str, Any]

MIN_REALS = 10  # fewer reals of its own, and a slice is compared with all reals
JUDGED = "the judged samples"
CHUNK = 32  # samples between two saves
LONGEST_SIDE, JPEG_QUALITY = 1024, 90  # what every image goes through with --equalise


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
    )
}


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    n: int
    seed: int

    def measure(self, fn: m.Metric, labels: m.Labels, scores: m.Floats, groups: Sequence[str]) -> dict[str, Any]:
        interval = m.bootstrap_interval(fn, labels, scores, groups, self.n, self.seed)
        return {"value": fn(labels, scores), "interval": list(interval) if interval else None}

    def rate(self, hits: Sequence[bool], groups: Sequence[str]) -> dict[str, Any]:
        if not hits:
            return {"value": None, "interval": None, "n": 0}
        array = np.asarray(hits, dtype=np.bool_)
        interval = m.rate_interval(array, groups, self.n, self.seed) if self.n else None
        return {"value": float(array.mean()), "interval": list(interval) if interval else None, "n": len(hits)}


# ---------------------------------------------------------------- judging


def equalised(path: Path) -> bytes:
    """The image as every other one: decoded, longest side at most 1024, JPEG quality 90, so that the format tells
    nothing.

    Raises InputError for what is not a picture.
    """
    from PIL import Image

    from x2dfd.media import load_picture

    image = Image.fromarray(load_picture(path).pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def judge(
    detector: Any, samples: Sequence[Sample], *, equalise: bool, rationale: bool, batch_size: int
) -> list[Report | Failure]:
    """One answer a sample, in order."""
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
    return [answers[s.id] for s in samples]


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


def score(
    detector: Any, samples: Sequence[Sample], store: Store, *, equalise: bool, rationale: bool, batch_size: int
) -> tuple[list[Row], dict[str, Any]]:
    """Rows of all samples, in order, and the origin (model and versions) that the reports state.

    Rows that `store` holds are used again if the model still is the one that made them: a stored sample is judged
    anew, and model and score have to agree.
    """

    def rows_of(chunk: Sequence[Sample]) -> tuple[list[Row], list[dict[str, Any]]]:
        answers = judge(detector, chunk, equalise=equalise, rationale=rationale, batch_size=batch_size)
        origins = [{"model": a.model, "versions": a.versions} for a in answers if isinstance(a, Report)]
        return [to_row(s, a) for s, a in zip(chunk, answers, strict=True)], origins

    done, origin = store.read()
    probe = next((s for s in samples if s.id in done and done[s.id]["error"] is None), None)
    if done:
        rows, origins = rows_of([probe]) if probe else ([], [])
        if probe and origins[:1] == [origin] and _same(rows[0]["p_fake"], done[probe.id]["p_fake"]):
            _say(f"going on: {sum(s.id in done for s in samples)} of {len(samples)} samples were judged before")
        else:
            _say("the stored samples are not of this model: starting anew")
            done, origin = {}, None
            store.start_anew()
    todo = [s for s in samples if s.id not in done]
    started = time.monotonic()
    for at in range(0, len(todo), CHUNK):
        rows, origins = rows_of(todo[at : at + CHUNK])
        for stated in origins:
            origin = origin or stated
            if stated != origin:
                raise X2DFDError("the model changed during the run")
        store.add(rows, origin)
        done |= {row["id"]: row for row in rows}
        n = at + len(rows)
        _say(f"{n}/{len(todo)} images, {n / (time.monotonic() - started):.2f} a second")
    return [done[s.id] for s in samples], origin or {"model": {}, "versions": {}}


def _same(a: float | None, b: float | None) -> bool:
    return a is b if a is None or b is None else abs(a - b) < 1e-3


class Store:
    """Judged rows on disk: parts while a run goes on, `samples.parquet` when it is done."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key
        self.parts, self.table = folder / "parts", folder / "samples.parquet"
        self.anew = False  # the table is of another model: it stays until this run is done, but is not read

    def read(self) -> tuple[dict[str, Row], dict[str, Any] | None]:
        """Rows by id, made under the same key by the latest model, and their origin."""
        found: list[tuple[dict[str, Any], list[Row]]] = []
        if self.table.is_file():
            table = pq.read_table(self.table)
            head = json.loads((table.schema.metadata or {}).get(b"x2dfd", b"{}"))
            found.append((head, [_unpack(row) for row in table.to_pylist()] if head.get("key") == self.key else []))
        for part in sorted(self.parts.glob("*.jsonl")):
            first, *lines = part.read_text("utf-8").split("\n")
            head = json.loads(first)
            if head["key"] == self.key and head["anew"]:
                self.anew = True
            found.append((head, [json.loads(line) for line in lines if line]))
        found = [(head, rows) for head, rows in found if head.get("key") == self.key and head["origin"]]
        if self.anew:
            found = [(head, rows) for head, rows in found if head.get("anew")]
        if not found:
            return {}, None
        origin = found[-1][0]["origin"]
        return {row["id"]: row for head, rows in found if head["origin"] == origin for row in rows}, origin

    def add(self, rows: Iterable[Row], origin: dict[str, Any] | None) -> None:
        lines = [{"key": self.key, "origin": origin, "anew": self.anew}, *rows]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        self.parts.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(p.stem) for p in self.parts.glob("*.jsonl")), default=0)
        write_whole(self.parts / f"{number:06d}.jsonl", text.encode())

    def start_anew(self) -> None:
        """What is stored is not used; the last finished result stays until this run has replaced it."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self.anew = True

    def finish(self, samples: Sequence[Sample], rows: Sequence[Row], origin: dict[str, Any], base: Path) -> None:
        """Writes `samples.parquet` and drops the parts."""
        table = pa.Table.from_pylist([_pack(s, r, base) for s, r in zip(samples, rows, strict=True)], _schema(rows))
        head = json.dumps({"key": self.key, "origin": origin}, sort_keys=True)
        stream = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"x2dfd": head}), stream)
        write_whole(self.table, stream.getvalue())
        shutil.rmtree(self.parts, ignore_errors=True)


_TEXTS = ("id", "path", "label", "source", "method", "df_class", "group", "split", "video", "said", "reason")
_JSON = ("notes", "cues", "contradictions", "pointed")


def _schema(rows: Sequence[Row]) -> pa.Schema:
    experts = sorted({name for row in rows for name in row["experts"]})
    fields = [(name, pa.string()) for name in _TEXTS]
    fields += [(name, pa.float64()) for name in ("p_fake", "p_mllm", *(f"expert:{e}" for e in experts))]
    return pa.schema(fields + [(name, pa.string()) for name in ("rationale", *_JSON, "error")])


def _pack(sample: Sample, row: Row, base: Path) -> Row:
    flat = {k: v for k, v in row.items() if k != "experts"} | {f"expert:{k}": v for k, v in row["experts"].items()}
    flat |= {k: json.dumps(row[k], ensure_ascii=False) for k in _JSON}
    flat |= {k: getattr(sample, k) for k in ("label", "source", "method", "df_class", "group", "split", "video")}
    # Results are handed on: where the data lay on this machine is nobody's business.
    inside = sample.path.is_relative_to(base)
    return flat | {"path": sample.path.relative_to(base).as_posix() if inside else sample.path.name}


def _unpack(flat: Row) -> Row:
    kept = ("id", "p_fake", "said", "reason", "p_mllm", "rationale", "error")
    row = {k: flat[k] for k in kept} | {k: json.loads(flat[k]) for k in _JSON}
    return row | {"experts": {k.removeprefix("expert:"): v for k, v in flat.items() if k.startswith("expert:")}}


def write_whole(path: Path, data: bytes) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
        missing = Counter(_why(row, scorer) for row, value in zip(rows, column, strict=True) if value is None)
        kept = [(i, value) for i, value in enumerate(column) if value is not None]
        scores = m.to_scores([value for _, value in kept])
        said = [rows[i]["said"] for i, _ in kept] if scorer == verdict else None
        scorers[scorer] = {"n_scored": len(kept), "unscored": dict(sorted(missing.items()))}
        scorers[scorer] |= _scorer([samples[i] for i, _ in kept], scores, said, by, draw)
        if scorer == verdict:
            scorers[scorer]["answers"] = _answers(samples, rows, draw)
    headline = {f"{k}.auc": v["overall"]["auc"] | {"n": v["n_scored"]} for k, v in scorers.items()}
    if verdict:
        headline[f"{verdict}.false_alarms"] = scorers[verdict]["answers"]["false_alarms"]
    return {"headline": headline, "scorers": scorers, "common": _common(samples, columns, draw)}


def _common(samples: Sequence[Sample], columns: dict[str, list[float | None]], draw: Resampling) -> Row:
    """AUC on the samples that every scorer could score, so that the scorers can be compared."""
    kept = [i for i in range(len(samples)) if all(column[i] is not None for column in columns.values())]
    labels, groups = m.to_labels(samples[i].label for i in kept), [samples[i].group for i in kept]
    auc: Row = {}
    for scorer, column in columns.items():
        scores = m.to_scores([value for i in kept if (value := column[i]) is not None])
        auc[scorer] = draw.measure(m.auc, labels, scores, groups)
    return {"n": len(kept), "auc": auc}


def _why(row: Row, scorer: str) -> str:
    return str(row["notes"].get(scorer.removeprefix("expert:")) or row["reason"] or "no score")


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


def slices(samples: Sequence[Sample], column: str) -> Iterator[tuple[str, list[int], list[int], str]]:
    """For each value of a column: which reals are compared with which fakes, and whose they are.

    `method`: the fakes of the method against the reals of the sources that these fakes come from. Any other column:
    reals and fakes with that value. Fakes with fewer than 10 such reals are compared with all reals, reals without
    fakes with all fakes.
    """
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
            yield value, reals, all_fakes, "all fakes"
        elif len(reals) < MIN_REALS:
            yield value, all_reals, fakes, "all reals"
        else:
            yield value, reals, fakes, "own reals"


def value_of(sample: Sample, column: str) -> str:
    """A column's value; of a combined method ("swap+relight"), the first."""
    value = getattr(sample, column, None) or sample.extra.get(column)
    if column == "method" and value is not None:
        value = str(value).split("+")[0]
    return "" if value is None else str(value)


def _answers(samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row:
    """The three answers, over everything that could be opened: a picture without a face counts as not answered."""
    pairs = [(s, row["said"]) for s, row in zip(samples, rows, strict=True) if row["said"]]
    result = m.selective(m.to_labels(s.label for s, _ in pairs), [said for _, said in pairs])
    reals = [(s.group, said) for s, said in pairs if s.label == "real"]
    fakes = [(s.group, said) for s, said in pairs if s.label == "fake"]
    result["false_alarms"] = draw.rate([said == "fake" for _, said in reals], [g for g, _ in reals])
    result["misses"] = draw.rate([said == "real" for _, said in fakes], [g for g, _ in fakes])
    reasons = Counter(row["reason"] or "no reason" for row in rows if row["said"] == "inconclusive")
    return result | {"inconclusive": dict(sorted(reasons.items()))}


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
            "unscored": dict(sorted(Counter(_why(row, "") for row in rows if row["p_fake"] is None).items())),
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
    every = read_manifest(manifest)
    samples, skipped = choose(task, manifest, args)
    draw, sha256 = Resampling(args.bootstrap, args.seed), manifest_sha256(manifest)
    baseline, expert = args.model == "majority", args.model.startswith("expert:")
    key = {"task": task.name, "version": task.version, "manifest": sha256, "mode": args.mode, "equalise": args.equalise}
    store = Store(out, key | {"baseline": baseline})
    notes: Row = {}
    if baseline:
        rows, notes["majority_from"] = majority_rows(every, samples)
        origin: Row = {"model": {}, "versions": {}}
    else:
        detector = x2dfd.load(None if expert or args.model == "embedded" else args.model, mode=args.mode)
        rows, origin = score(
            detector, samples, store, equalise=args.equalise, rationale=task.rationale, batch_size=args.batch_size
        )
    if task.name == "describe":
        usual, counted_in = usual_cues(every, samples)
        notes |= {"skipped_fakes_without_cues": skipped, "majority_from": counted_in, "majority": sorted(usual)}
        measured = describe_result(samples, [] if baseline else rows, usual, draw)
    elif expert:
        measured = detect_result(samples, only_expert(rows, args.model.removeprefix("expert:")), "", args.by, draw)
    else:
        measured = detect_result(samples, rows, "majority" if baseline else args.mode, args.by, draw)

    labels = Counter(s.label for s in samples)
    named = baseline or expert or args.model == "embedded"
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
            "mode": None if baseline else args.mode,
            "stated": origin["model"],
        },
        "settings": {
            "equalise": f"JPEG {JPEG_QUALITY}, longest side {LONGEST_SIDE}" if args.equalise else None,
            "seed": args.seed,
            "bootstrap": args.bootstrap,
            "interval": "95 %, percentile, groups drawn with replacement",
            "scores_of": "the face that decided the verdict",
        },
        "code": code_state(),
        "versions": origin["versions"] | {"python": platform.python_version()} | packages,
        "device": device(),
        "failures": dict(sorted(Counter(row["reason"] for row in rows if row["error"]).items())),
        **notes,
        **measured,
    }
    store.finish(samples, rows, origin, manifest.parent)
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    write_whole(out / "result.json", (text + "\n").encode())
    return result


def choose(task: Task, manifest: Path, args: argparse.Namespace) -> tuple[list[Sample], int]:
    """The samples to judge, and how many fakes were skipped because `describe` has no truth for them."""
    samples = read_manifest(manifest, split=args.split)
    if args.split is None and any(s.split == "train" for s in samples):
        _say("no --split given: samples of the train split are judged too")
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
        "  python eval/run_bench.py describe --data forged/manifest.jsonl --model majority --out results/cues",
    )
    parser.add_argument("task", nargs="?", choices=list(TASKS), help="what is asked (see --list)")
    parser.add_argument("--list", action="store_true", help="list the tasks")
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
    parser.add_argument("--compare", metavar="REF.json", help="exit 1 when a headline number left its interval")
    args = parser.parse_args(argv)
    if args.list:
        for task in TASKS.values():
            print(f"{task.name}\tv{task.version}\tper {task.unit}\t{task.line}")
        return 0
    if not (args.task and args.data and args.out):
        parser.error("TASK, --data and --out are needed (or --list)")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be 1 or more")
    args.by = [column for column in args.by.split(",") if column]
    try:
        reference = _reference(Path(args.compare)) if args.compare else None
        result = run(args)
        print(*(_line(name, measured) for name, measured in result["headline"].items()), sep="\n")
        if reference is None:
            return 0
        moved = drift(result, reference)
    except X2DFDError as error:
        _say(f"error: {error}")
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
