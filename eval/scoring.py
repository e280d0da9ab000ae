"""What every benchmark task needs: pictures made alike, rows kept on disk while a run goes on, slices, intervals."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from eval import metrics as m
from eval.changes import Change
from x2dfd.errors import X2DFDError
from x2dfd.files import file_sha256, write_bytes
from x2dfd.manifest import Sample

Row = dict[str, Any]

MIN_REALS = 10  # fewer reals of its own, and a slice is compared with all reals
CHUNK = 32  # samples between two saves
FOLDS = 5  # parts of the groups, where something is chosen on the others
LONGEST_SIDE, JPEG_QUALITY = 1024, 90  # what every image goes through with --equalise


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    n: int
    seed: int

    def measure(self, fn: m.Metric, labels: m.Labels, scores: m.Floats, groups: Sequence[str]) -> dict[str, Any]:
        interval = m.bootstrap_interval(fn, labels, scores, groups, self.n, self.seed, centred=fn is m.ece_at_even_odds)
        return {"value": fn(labels, scores), "interval": list(interval) if interval else None}

    def rate(self, hits: Sequence[bool], groups: Sequence[str]) -> dict[str, Any]:
        if not hits:
            return {"value": None, "interval": None, "n": 0}
        array = np.asarray(hits, dtype=np.bool_)
        interval = m.rate_interval(array, groups, self.n, self.seed) if self.n else None
        return {"value": float(array.mean()), "interval": list(interval) if interval else None, "n": len(hits)}


def equalise(pixels: NDArray[np.uint8]) -> bytes:
    """The picture as every other one: longest side at most 1024, JPEG quality 90, so that the format tells nothing."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def equalised(path: Path) -> bytes:
    """The file's picture, equalised. Raises InputError for what is not a picture."""
    from x2dfd.media import load_picture

    return equalise(load_picture(path).pixels)


def changed(path: Path, change: Change, sample_id: str, *, equal: bool) -> bytes:
    """The file's picture under a change, as PNG; equalised before it, where that is wanted, as in task `experts`.

    Raises InputError for what is not a picture.
    """
    from PIL import Image

    from x2dfd.media import load_picture

    pixels = load_picture(equalised(path) if equal else path).pixels
    stream = io.BytesIO()
    Image.fromarray(change(pixels, sample_id)).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a sample's file, so that two runs can tell whether they saw the same bytes; None if unreadable."""
    try:
        return file_sha256(path)
    except OSError:
        return None  # the row says why: judging it fails for the same reason


def digest(items: Iterable[Sequence[str | None]]) -> str:
    """SHA-256 of items that begin with an id, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(items, key=lambda item: str(item[0]))).encode()).hexdigest()


# ---------------------------------------------------------------- rows on disk


Judge = Callable[[Sequence[Sample]], tuple[list[Row], list[dict[str, Any]]]]
"""Judges samples: their rows, in order, and the origins (model and versions) that the answers state."""


def score(judge: Judge, samples: Sequence[Sample], store: Store) -> tuple[list[Row], dict[str, Any]]:
    """Rows of all samples, in order, and their origin.

    Rows that `store` holds are used again if the model still is the one that made them: a stored sample is judged
    anew, and model and scores have to agree. Raises X2DFDError when no stored sample can be asked and others would be
    lost.
    """
    done, origin = store.read()
    # What could not be read is tried again, and so is a file that is another one now.
    kept = {
        s.id for s in samples if (row := done.get(s.id)) and not row["error"] and row["sha256"] == sha256_of(s.path)
    }
    probe = next((s for s in samples if s.id in kept), None)
    if done:
        rows, origins = judge([probe]) if probe else ([], [])
        if probe and origins[:1] == [origin] and _same(rows[0], done[probe.id]):
            say(f"going on: of {len(samples)} samples, those that were judged before are kept")
        elif not probe and (others := len(done.keys() - {s.id for s in samples})):
            # Nothing tells whether they are of this model, and those of another must not be mixed in.
            raise X2DFDError(
                f"{store.folder} holds {others} rows of other samples, which this run would throw away: of its own, "
                "none can be compared (failed before, or changed). Take another --out, or delete that folder"
            )
        else:
            changed = "the stored samples are not of this model" if probe else "no stored sample can be used"
            say(f"{changed}: starting anew")
            done, origin, kept = {}, None, set()
            store.start_anew()
    todo = [s for s in samples if s.id not in kept]
    if todo:
        done = {}  # they are on disk: what is judged does not pile up here
    started = time.monotonic()
    for at in range(0, len(todo), CHUNK):
        rows, origins = judge(todo[at : at + CHUNK])
        for stated in origins:
            origin = origin or stated
            if stated != origin:
                raise X2DFDError("the model changed during the run")
        store.add(rows, origin)
        n = at + len(rows)
        pace = n / (time.monotonic() - started)
        say(f"{n}/{len(todo)} images, {pace:.2f} a second, {_clock((len(todo) - n) / pace)} to go")
    if todo:
        done, _ = store.read(origin)
    # In one order of names, whether it was stated just now or read back: the same run ends in the same file.
    origin = json.loads(json.dumps(origin or {"model": {}, "versions": {}}, sort_keys=True))
    return [done[s.id] for s in samples], origin or {}


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{seconds / 60:.1f} min"


def _same(new: Row, old: Row) -> bool:
    def close(a: float | None, b: float | None) -> bool:
        return a is b if a is None or b is None else abs(a - b) < 1e-3

    names = new["experts"].keys() | old["experts"].keys()
    # A judge that gives no p_fake leaves it to be made of the stored scores.
    agree = all(close(new["experts"].get(n), old["experts"].get(n)) for n in names)
    return agree and ("p_fake" not in new or close(new["p_fake"], old["p_fake"]))


@dataclass(frozen=True)
class Layout:
    """What a task's row holds beside `id`, `sha256` and `experts`."""

    texts: tuple[str, ...]  # `error` is one of them
    numbers: tuple[str, ...]
    packed: tuple[str, ...]  # lists and tables, in a Parquet table as JSON


class Store:
    """Judged rows on disk: parts while a run goes on, `samples.parquet` when it is done."""

    def __init__(self, folder: Path, key: dict[str, Any], layout: Layout) -> None:
        self.folder, self.key, self.layout = folder, key, layout
        self.parts, self.table = folder / "parts", folder / "samples.parquet"
        self._next: int | None = None  # number of the next part
        self.anew = False  # the table is of another model: it stays until this run is done, but is not read

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises X2DFDError when rows lie here and none is of these samples: finishing would throw them away."""
        stored: set[str] = set()
        if self.table.is_file():
            stored |= set(pq.read_table(self.table, columns=["id"])["id"].to_pylist())
        for part in self.parts.glob("*.jsonl"):
            stored |= {json.loads(line)["id"] for line in part.read_text("utf-8").split("\n")[1:] if line}
        if stored and stored.isdisjoint(s.id for s in samples):
            raise X2DFDError(
                f"{self.folder} holds {len(stored)} rows of other samples, which this run would throw away: take "
                "another --out, or delete that folder"
            )

    def read(self, origin: dict[str, Any] | None = None) -> tuple[dict[str, Row], dict[str, Any] | None]:
        """Rows by id, made under the same key by the latest model, and their origin.

        With `origin`, of that model; rows without any origin (nothing could be judged in their part) are of all.
        """
        found: list[tuple[dict[str, Any], list[Row]]] = []
        if self.table.is_file():
            table = pq.read_table(self.table)
            head = json.loads((table.schema.metadata or {}).get(b"x2dfd", b"{}"))
            own = head.get("key") == self.key
            found.append((head, [_unpack(row, self.layout) for row in table.to_pylist()] if own else []))
        for part in sorted(self.parts.glob("*.jsonl")):
            first, *lines = part.read_text("utf-8").split("\n")
            head = json.loads(first)
            if head["key"] == self.key and head["anew"]:
                self.anew = True
            found.append((head, [json.loads(line) for line in lines if line]))
        found = [(head, rows) for head, rows in found if head.get("key") == self.key]
        if self.anew:
            found = [(head, rows) for head, rows in found if head.get("anew")]
        stated = [head["origin"] for head, _ in found if head["origin"]]
        origin = origin or (stated[-1] if stated else None)
        return {row["id"]: row for head, rows in found if head["origin"] in (origin, None) for row in rows}, origin

    def add(self, rows: Iterable[Row], origin: dict[str, Any] | None) -> None:
        lines = [{"key": self.key, "origin": origin, "anew": self.anew}, *rows]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        self.parts.mkdir(parents=True, exist_ok=True)
        if self._next is None:
            self._next = 1 + max((int(p.stem) for p in self.parts.glob("*.jsonl")), default=0)
        write_bytes(self.parts / f"{self._next:06d}.jsonl", text.encode())
        self._next += 1

    def start_anew(self) -> None:
        """What is stored is not used; the last finished result stays until this run has replaced it."""
        shutil.rmtree(self.parts, ignore_errors=True)
        self._next, self.anew = None, True

    def finish(self, samples: Sequence[Sample], rows: Sequence[Row], origin: dict[str, Any], base: Path) -> None:
        """Writes `samples.parquet` and drops the parts, but for rows of samples that were judged in another run."""
        others = {} if self.anew else self.read(origin)[0]
        for sample in samples:
            others.pop(sample.id, None)
        packed = [_pack(s, r, self.layout, base) for s, r in zip(samples, rows, strict=True)]
        table = pa.Table.from_pylist(packed, _schema(rows, self.layout))
        head = json.dumps({"key": self.key, "origin": origin}, sort_keys=True)
        stream = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({"x2dfd": head}), stream)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.table, stream.getvalue())
        shutil.rmtree(self.parts, ignore_errors=True)
        self._next, self.anew = None, False
        if others:  # a smaller --limit must not throw hours away
            self.add(others.values(), origin)


_OF_SAMPLE = ("label", "source", "method", "df_class", "group", "split", "video")


def _schema(rows: Sequence[Row], layout: Layout) -> pa.Schema:
    experts = sorted({name for row in rows for name in row["experts"]})
    numbers = (*layout.numbers, *(f"expert:{e}" for e in experts))
    fields = [(name, pa.string()) for name in ("id", "path", *_OF_SAMPLE)]
    fields += [("sha256", pa.string()), *((name, pa.float64()) for name in numbers)]
    return pa.schema(fields + [(name, pa.string()) for name in (*layout.texts, *layout.packed)])


def _pack(sample: Sample, row: Row, layout: Layout, base: Path) -> Row:
    flat = {k: v for k, v in row.items() if k != "experts"} | {f"expert:{k}": v for k, v in row["experts"].items()}
    flat |= {k: json.dumps(row[k], ensure_ascii=False) for k in layout.packed}
    flat |= {k: getattr(sample, k) for k in _OF_SAMPLE}
    # Results are handed on: where the data lay on this machine is nobody's business.
    inside = sample.path.is_relative_to(base)
    return flat | {"path": sample.path.relative_to(base).as_posix() if inside else sample.path.name}


def _unpack(flat: Row, layout: Layout) -> Row:
    row = {k: flat[k] for k in ("id", "sha256", *layout.numbers, *layout.texts)}
    row |= {k: json.loads(flat[k]) for k in layout.packed}
    return row | {"experts": {k.removeprefix("expert:"): v for k, v in flat.items() if k.startswith("expert:")}}


# ---------------------------------------------------------------- what is counted


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


def three_answers(samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row:
    """The three answers, over everything that could be opened: a picture without a face counts as not answered.

    AUC and ECE are of the answered pictures alone, as the accuracy is.
    """
    pairs = [(s, row["said"]) for s, row in zip(samples, rows, strict=True) if row["said"]]
    result = m.selective(m.to_labels(s.label for s, _ in pairs), [said for _, said in pairs])
    answered = [(s, row["p_fake"]) for s, row in zip(samples, rows, strict=True) if row["said"] in ("fake", "real")]
    labels, scores = m.to_labels(s.label for s, _ in answered), m.to_scores([p for _, p in answered])
    for name, fn in (("auc", m.auc), ("ece_15", m.ece), ("ece_15_even", m.ece_at_even_odds)):
        result[name] = draw.measure(fn, labels, scores, [s.group for s, _ in answered])
    reals = [(s.group, said) for s, said in pairs if s.label == "real"]
    fakes = [(s.group, said) for s, said in pairs if s.label == "fake"]
    result["false_alarms"] = draw.rate([said == "fake" for _, said in reals], [g for g, _ in reals])
    result["misses"] = draw.rate([said == "real" for _, said in fakes], [g for g, _ in fakes])
    reasons = Counter(row["reason"] or "no reason" for row in rows if row["said"] == "inconclusive")
    return result | {"inconclusive": dict(sorted(reasons.items()))}


def common_auc(samples: Sequence[Sample], columns: dict[str, list[float | None]], draw: Resampling) -> Row:
    """AUC on the samples that every scorer could score, so that the scorers can be compared."""
    kept = [i for i in range(len(samples)) if all(column[i] is not None for column in columns.values())]
    labels, groups = m.to_labels(samples[i].label for i in kept), [samples[i].group for i in kept]
    auc: Row = {}
    for scorer, column in columns.items():
        scores = m.to_scores([value for i in kept if (value := column[i]) is not None])
        auc[scorer] = draw.measure(m.auc, labels, scores, groups)
    return {"n": len(kept), "auc": auc}


def micro_f1(truth: Sequence[Any], said: Sequence[Any], groups: Sequence[str], draw: Resampling) -> Row:
    """F1 over (area, artifact) pairs or areas of all samples together, one pair of sets a sample, with its interval."""
    counts = np.array([(len(t & s), len(s), len(t)) for t, s in zip(truth, said, strict=True)], dtype=np.int64)

    def f1(index: m.Labels, _: m.Floats) -> float | None:
        return m.precision_recall_f1(counts.reshape(-1, 3)[index])["f1"]

    return draw.measure(f1, np.arange(len(counts)), np.zeros(len(counts)), groups)


def folds(groups: Sequence[str], seed: int = 0) -> NDArray[np.int64]:
    """A number 0 .. FOLDS - 1 for each sample [n], the same for all of a group, whatever the order of samples."""
    names, place = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.random.default_rng(seed).permutation(len(names))[place] % FOLDS


def reason_of(row: Row, scorer: str) -> str:
    return str(row["notes"].get(scorer.removeprefix("expert:")) or row["reason"] or "no score")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
