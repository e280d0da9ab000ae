"""The rows of judged samples: saved in parts during a run, in `samples.parquet` after it."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from x2dfd.errors import X2DFDError
from x2dfd.files import Json, file_sha256, json_object, write_bytes
from x2dfd.manifest import Sample
from x2dfd.row_parts import RowParts

CHUNK = 32  # samples between two saves

Pair = tuple[str, str]
"""Area and artifact of a cue."""
Scores = dict[str, float | None]
"""Expert -> its score of a face, None without one."""
Origin = Json
"""The model and the versions that answers state."""


@dataclass
class SampleRow:
    """The answer about one sample. A task fills the fields that it needs."""

    id: str
    sha256: str | None  # of the file; None if unreadable
    error: str | None = None  # why the file could not be judged
    reason: str | None = None  # why there is no answer
    said: str | None = None  # fake, real or inconclusive; for tasks in words, the decision or class in the answer
    p_fake: float | None = None
    p_mllm: float | None = None  # P(fake) of the language model alone
    experts: Scores = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # expert -> why it has no score
    each_face: list[float] = field(default_factory=list)  # P(fake) of every face
    rationale: str = ""
    cues: list[Pair] = field(default_factory=list)  # that the rationale names
    contradictions: list[str] = field(default_factory=list)
    pointed: dict[str, list[Pair]] = field(default_factory=dict)  # expert -> cues that it points at
    question: str = ""
    answer: str = ""
    changed: dict[str, Scores | None] = field(default_factory=dict)  # change -> scores, None where the face was lost
    places: dict[str, Json] = field(default_factory=dict)  # map -> how well it is placed (eval.localisation)

    @classmethod
    def of(cls, sample: Sample) -> Self:
        """An empty row."""
        return cls(sample.id, sha256_of(sample.path))

    @classmethod
    def read(cls, data: Json) -> Self:
        """From JSON."""
        row = cls(**data)
        row.cues = [(a, k) for a, k in row.cues]
        row.pointed = {name: [(a, k) for a, k in pairs] for name, pairs in row.pointed.items()}
        return row

    def failed(self, code: str, reason: str) -> Self:
        """The row of a file that could not be judged."""
        self.reason, self.error = code, f"{reason} [{code}]"
        return self

    def why(self, scorer: str) -> str:
        """Why a scorer has no score of this sample."""
        return self.notes.get(scorer.removeprefix("expert:")) or self.reason or "no score"


_NUMBERS = ("p_fake", "p_mllm")
_TEXTS = ("error", "reason", "said", "rationale", "question", "answer")
_PACKED = ("notes", "each_face", "cues", "contradictions", "pointed", "changed", "places")  # as JSON
_OF_SAMPLE = ("label", "source", "method", "df_class", "group", "split", "video")


def sha256_of(path: Path) -> str | None:
    """SHA-256 of a sample's file, so that two runs can tell whether they saw the same bytes; None if unreadable."""
    try:
        return file_sha256(path)
    except OSError:
        return None  # judging fails for the same reason, which the row then states


def digest(items: Iterable[Sequence[str | None]]) -> str:
    """SHA-256 of items that begin with an id, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(items, key=lambda item: str(item[0]))).encode()).hexdigest()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


Judge = Callable[[Sequence[Sample]], tuple[list[SampleRow], list[Origin]]]
"""Judges samples: their rows, in order, and the origins that the answers state."""


def score(
    judge: Judge, samples: Sequence[Sample], store: Store, *, joined: bool = False
) -> tuple[list[SampleRow], Origin]:
    """Rows of all samples, in order, and their origin. `joined`: `p_fake` is computed from scores, not by the judge.

    Stored rows are used again if one of their samples, judged anew, gets the same scores from the same model. Raises
    X2DFDError if none can be judged anew and rows of other samples would be lost.
    """
    stored, origin = store.read()
    # A file that could not be read, or has changed, is judged again.
    reusable = {
        s.id for s in samples if (row := stored.get(s.id)) and not row.error and row.sha256 == sha256_of(s.path)
    }
    if stored and not _same_model(judge, samples, store, stored, origin, reusable, joined):
        origin, reusable = None, set()
        store.start_anew()
    todo = [s for s in samples if s.id not in reusable]
    stored = {}  # they are on disk, and must not pile up in memory
    started = time.monotonic()
    for at in range(0, len(todo), CHUNK):
        rows, origins = judge(todo[at : at + CHUNK])
        for new_origin in origins:
            origin = origin or new_origin
            if new_origin != origin:
                raise X2DFDError("the model changed during the run", code="model_changed")
        store.add(rows, origin)
        n = at + len(rows)
        pace = n / (time.monotonic() - started)
        say(f"{n}/{len(todo)} images, {pace:.2f} a second, {(len(todo) - n) / pace / 60:.1f} min to go")
    stored, _ = store.read(origin)
    # Sorted, because an origin that was read back may have another order: the same run must give the same file.
    origin = json.loads(json.dumps(origin or {"model": {}, "versions": {}}, sort_keys=True))
    return [stored[s.id] for s in samples], origin or {}


def _same_model(
    judge: Judge,
    samples: Sequence[Sample],
    store: Store,
    stored: dict[str, SampleRow],
    origin: Origin | None,
    reusable: set[str],
    joined: bool,
) -> bool:
    """Whether the stored rows are of this model. Raises X2DFDError if no row can tell and others would be lost."""
    probe = next((s for s in samples if s.id in reusable), None)
    rows, origins = judge([probe]) if probe else ([], [])
    if probe and origins[:1] == [origin] and _same_scores(rows[0], stored[probe.id], joined):
        say(f"resuming: of {len(samples)} samples, those that were judged before are kept")
        return True
    if not probe and (others := len(stored.keys() - {s.id for s in samples})):
        # They may be of another model, whose rows must not be mixed in.
        raise X2DFDError(
            f"{store.folder} holds {others} rows of other samples, which this run would delete, and none of its own "
            "to compare with (they failed, or have changed). Choose another --out, or delete that folder",
            code="rows_of_other_samples",
        )
    reason = "the stored samples are not of this model" if probe else "no stored sample can be used"
    say(f"{reason}: starting anew")
    return False


def _same_scores(new: SampleRow, old: SampleRow, joined: bool) -> bool:
    def close(a: float | None, b: float | None) -> bool:
        return a is b if a is None or b is None else abs(a - b) < 1e-3

    names = new.experts.keys() | old.experts.keys()
    agree = all(close(new.experts.get(n), old.experts.get(n)) for n in names)
    return agree and (joined or close(new.p_fake, old.p_fake))


class Store:
    """Judged rows on disk: parts during a run, `samples.parquet` after it."""

    def __init__(self, folder: Path, key: Json) -> None:
        self.folder, self.key = folder, key
        self.parts, self.table = RowParts(folder / "parts"), folder / "samples.parquet"
        self.anew = False  # whether the table is of another model: it then stays until the run is done, but is not read

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises X2DFDError if the folder holds rows, but none of these samples: finishing would delete them."""
        stored: set[str] = set()
        try:
            if self.table.is_file():
                stored |= set(pq.read_table(self.table, columns=["id"])["id"].to_pylist())
            stored |= {row["id"] for _, rows in self.parts for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors derive from the first three
            raise X2DFDError(
                f"{self.folder} holds rows that cannot be read ({error}): take another --out, or delete that folder",
                code="rows_unreadable",
            ) from error
        if stored and stored.isdisjoint(s.id for s in samples):
            raise X2DFDError(
                f"{self.folder} holds {len(stored)} rows of other samples, which this run would delete: choose "
                "another --out, or delete that folder",
                code="rows_of_other_samples",
            )

    def read(self, origin: Origin | None = None) -> tuple[dict[str, SampleRow], Origin | None]:
        """Rows by id under the same key, of the latest model or that of `origin`, and their origin.

        Rows without an origin are always included: nothing could be judged in their part.
        """
        batches: list[tuple[Json, list[SampleRow]]] = []
        if self.table.is_file():
            table = pq.read_table(self.table)
            head = json_object((table.schema.metadata or {}).get(b"x2dfd", b"{}"), self.table)
            if head.get("key") == self.key:
                batches.append((head, [_unpack(row) for row in table.to_pylist()]))
        for head, rows in self.parts:
            if head.get("key") == self.key:
                self.anew = self.anew or head["anew"]
                batches.append((head, [SampleRow.read(row) for row in rows]))
        if self.anew:
            batches = [(head, rows) for head, rows in batches if head.get("anew")]
        origins = [head["origin"] for head, _ in batches if head["origin"]]
        origin = origin or (origins[-1] if origins else None)
        return {row.id: row for head, rows in batches if head["origin"] in (origin, None) for row in rows}, origin

    def add(self, rows: Iterable[SampleRow], origin: Origin | None) -> None:
        self.parts.add({"key": self.key, "origin": origin, "anew": self.anew}, map(asdict, rows))

    def start_anew(self) -> None:
        """Ignores the stored rows; the last finished result stays until this run has replaced it."""
        self.parts.clear()
        self.anew = True

    def finish(self, samples: Sequence[Sample], rows: Sequence[SampleRow], origin: Origin, base: Path) -> None:
        """Writes `samples.parquet` and deletes the parts, except rows of samples that only another run judged."""
        other_rows = {} if self.anew else self.read(origin)[0]
        for sample in samples:
            other_rows.pop(sample.id, None)
        packed = [_pack(s, r, base) for s, r in zip(samples, rows, strict=True)]
        numbers = (*_NUMBERS, *(f"expert:{e}" for e in sorted({name for row in rows for name in row.experts})))
        fields = [(name, pa.string()) for name in ("id", "path", *_OF_SAMPLE, "sha256")]
        fields += [(name, pa.float64()) for name in numbers] + [(name, pa.string()) for name in (*_TEXTS, *_PACKED)]
        head = json.dumps({"key": self.key, "origin": origin}, sort_keys=True)
        stream = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(packed, pa.schema(fields, {"x2dfd": head})), stream)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.table, stream.getvalue())
        self.parts.clear()
        self.anew = False
        if other_rows:  # a smaller --limit must not throw hours away
            self.add(other_rows.values(), origin)


def _pack(sample: Sample, row: SampleRow, base: Path) -> Json:
    flat = asdict(row)
    flat |= {f"expert:{name}": value for name, value in flat.pop("experts").items()}
    flat |= {k: json.dumps(flat[k], ensure_ascii=False) for k in _PACKED}
    flat |= {k: getattr(sample, k) for k in _OF_SAMPLE}
    # Results are published: they must not reveal where the data lay on this machine.
    inside = sample.path.is_relative_to(base)
    return flat | {"path": sample.path.relative_to(base).as_posix() if inside else sample.path.name}


def _unpack(flat: Json) -> SampleRow:
    row = {k: flat[k] for k in ("id", "sha256", *_NUMBERS, *_TEXTS)} | {k: json.loads(flat[k]) for k in _PACKED}
    return SampleRow.read(
        row | {"experts": {k.removeprefix("expert:"): v for k, v in flat.items() if k.startswith("expert:")}}
    )
