"""The rows that `x2dfd detect --out` keeps: one a file, never lost or doubled by a kill, in memory that does not grow.

While a run goes on they stand in an SQLite file beside the table (`NAME.work`), written once a second; at the end the
table itself (Parquet, or JSONL) is written whole from it. A killed run, or a later one over the same files, resumes.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from x2dfd.errors import X2DFDError
from x2dfd.files import Json, json_object, parse_json, whole
from x2dfd.stores import sha256_of
from x2dfd.types import Failure, Report

if TYPE_CHECKING:
    import pyarrow as pa

    from x2dfd.stores import Place

SECONDS = 1.0  # of work that a kill can cost, besides the batch under way
PART = 1024  # rows of the finished table in memory at a time

COLUMNS = {
    "path": "string", "sha256": "string", "label": "string", "p_fake": "double", "reason": "string",
    "error_code": "string", "error_reason": "string", "n_faces": "int32", "mode": "string", "rationale": "bool",
    "model_hash": "string", "report": "string",
}  # fmt: skip
"""Of the table, in order, with their Arrow types; a failure has its code and reason, and no label."""


class Rows:
    """The table of `--out`. One process at a time; raises X2DFDError when the files are foreign, locked or full."""

    def __init__(self, path: Path, model: Json, rationale: bool) -> None:
        """`model`: Report.model of the reports to come; a kept row of another model is not used."""
        self.path = path
        self.work = work_file(path)
        self._model_hash = model_hash(model)
        self._mode = str(model.get("mode", ""))
        self._rationale = rationale
        self._saved = time.monotonic()
        self._place = 0
        self._closed = False
        self.doubles = 0  # paths that came a second time in this run, and were passed over
        with self._guard():
            self._base = sqlite3.connect(self.work, isolation_level=None, timeout=1, check_same_thread=False)
            self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._base.execute("PRAGMA cache_size=-8192")  # KiB
            self._base.execute("BEGIN EXCLUSIVE")
            if not self._base.execute("SELECT 1 FROM sqlite_master WHERE name = 'rows'").fetchone():
                columns = ", ".join(f"{c} {'PRIMARY KEY' if c == 'path' else ''}" for c in COLUMNS)
                self._base.execute(f"CREATE TABLE rows ({columns})")
                self._take_over()
            # Which files this run was asked about, in order; the others' rows stand behind them in the table.
            self._base.execute("DROP TABLE IF EXISTS asked")
            self._base.execute("CREATE TABLE asked (place INTEGER PRIMARY KEY, path TEXT UNIQUE)")
            self.save()

    # --- rows ---

    def ask(self, path: Place) -> bool:
        """Note that the run comes to this file; False when it has come to it before."""
        self._place += 1
        with self._guard():
            done = self._base.execute("INSERT OR IGNORE INTO asked VALUES (?, ?)", (self._place, utf8(path)))
        self.doubles += done.rowcount == 0
        return done.rowcount == 1

    def known(self, path: Place) -> Report | None:
        """The kept report of that very file, by the same model; a failure is tried again."""
        with self._guard():
            row = self._base.execute(
                "SELECT sha256, report FROM rows WHERE path = ? AND error_code IS NULL AND rationale = ? "
                "AND model_hash = ?",
                (utf8(path), self._rationale, self._model_hash),
            ).fetchone()
        if row is None:
            return None
        try:
            same = sha256_of(path) == row[0]
        except OSError:  # not readable: judged again, which gives the reason
            return None
        return Report.from_json(row[1]) if same else None

    def add(self, path: Place, result: Report | Failure) -> None:
        """Keep a result, in place of an older one of that path."""
        row: Json = dict.fromkeys(COLUMNS)
        row |= {"path": utf8(path), "sha256": result.sha256, "mode": self._mode, "rationale": self._rationale}
        if isinstance(result, Failure):
            row |= {"error_code": result.code, "error_reason": result.reason}
        else:
            row |= {
                "model_hash": model_hash(result.model),
                "label": result.verdict.label,
                "p_fake": result.verdict.p_fake,
                "reason": result.verdict.reason,
                "n_faces": len(result.faces),
                # As Report.to_json, without the copy of everything that asdict makes first; and without how long the
                # batch took, so that the same files give the same bytes in every run, shard and cluster.
                "report": json.dumps(vars(result) | {"timings": {}}, default=vars, allow_nan=False),
            }
        self._put(row)
        if time.monotonic() - self._saved >= SECONDS:
            self.save()

    def _put(self, row: Json) -> None:
        with self._guard():
            self._base.execute(
                f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * len(COLUMNS))})", [row[c] for c in COLUMNS]
            )

    def save(self) -> None:
        """What was added survives a kill from here on."""
        with self._guard():
            self._base.execute("COMMIT")
            self._base.execute("BEGIN EXCLUSIVE")
        self._saved = time.monotonic()

    # --- the finished table ---

    def finish(self) -> None:
        """Write the table whole, this run's files first and in their order, and remove the working file."""
        self.save()
        writer = _write_jsonl if self.path.suffix == ".jsonl" else _write_parquet
        with self._guard():
            with whole(self.path) as temporary:
                writer(temporary, self._in_order())
            self.close()
            for name in ("", "-journal"):
                self.work.with_name(self.work.name + name).unlink(missing_ok=True)

    def close(self) -> None:
        """Keep what was added and let go of the file."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._guard():
                if self._base.in_transaction:  # a full disk has ended it already
                    self._base.execute("COMMIT")
        finally:
            self._base.close()

    def _in_order(self) -> Iterator[list[Json]]:
        columns = ", ".join(f"rows.{c}" for c in COLUMNS)
        for question in (
            f"SELECT {columns} FROM asked CROSS JOIN rows ON rows.path = asked.path ORDER BY asked.place",
            f"SELECT {columns} FROM rows WHERE NOT EXISTS (SELECT 1 FROM asked WHERE asked.path = rows.path) "
            "ORDER BY rows.rowid",
        ):
            found = self._base.execute(question)
            while part := found.fetchmany(PART):
                rows = [dict(zip(COLUMNS, values, strict=True)) for values in part]
                yield [row | {"rationale": bool(row["rationale"])} for row in rows]

    def _take_over(self) -> None:
        """The rows of a finished table."""
        if not self.path.exists():
            return
        try:
            for row in (_read_jsonl if self.path.suffix == ".jsonl" else _read_parquet)(self.path):
                if set(row) != set(COLUMNS):
                    raise ValueError(f"other columns: {', '.join(row)}"[:80])
                self._put(row)
        except (OSError, ValueError, TypeError) as error:  # pyarrow's errors derive from the first two
            self._base.execute("ROLLBACK")
            self._base.close()
            self.work.unlink(missing_ok=True)
            raise X2DFDError(
                f"{self.path} is no table of x2dfd: move it away or give another --out", code="table_foreign"
            ) from error

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise X2DFDError(
                    f"another run writes {self.path}: wait for it, or give another --out", code="table_locked"
                ) from error
            raise X2DFDError(f"cannot write {self.work}: {error}", code="cannot_write") from error
        except sqlite3.DatabaseError as error:
            raise X2DFDError(
                f"{self.work} is damaged ({error}): remove it, and the run starts anew", code="table_damaged"
            ) from error
        except OSError as error:
            raise X2DFDError(f"cannot write {self.path}: {error.strerror or error}", code="cannot_write") from error


def work_file(path: Path) -> Path:
    """Where the rows of an unfinished table stand."""
    return path.with_name(path.name + ".work")


_SAID = ("validation", "blind_spot", "licence", "weights")  # `calibration_sha256` stands for the weights


def model_hash(model: Json) -> str:
    """SHA-256 of Report.model, without what is only said about the model: that moves no answer."""
    moves = {key: value for key, value in model.items() if key not in _SAID}
    return hashlib.sha256(json.dumps(moves, sort_keys=True).encode()).hexdigest()


def utf8(path: str | Path) -> str:
    """A path that Parquet can hold, also where the name has bytes that are no UTF-8; no two paths give the same.

    Such a byte becomes a backslash and `udc..`. A name that spells that out has its backslashes doubled.
    """
    text = str(path)
    if "\\udc" in text or any("\udc80" <= c <= "\udcff" for c in text):
        text = text.replace("\\", "\\\\")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])


def _write_parquet(path: Path, parts: Iterator[list[Json]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, _schema()) as writer:
        for part in parts:
            writer.write_table(pa.Table.from_pylist(part, schema=_schema()))


def _read_parquet(path: Path) -> Iterator[Json]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(_schema()):
            raise ValueError("another schema")
        for batch in file.iter_batches(PART):
            yield from batch.to_pylist()


def _write_jsonl(path: Path, parts: Iterator[list[Json]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for part in parts:
            for row in part:
                report = None if row["report"] is None else json_object(row["report"], path)
                file.write(json.dumps(row | {"report": report}, allow_nan=False) + "\n")


def _read_jsonl(path: Path) -> Iterator[Json]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = parse_json(line)
            report = row["report"] if isinstance(row, dict) and "report" in row else None
            yield {**row, "report": None if report is None else json.dumps(report, allow_nan=False)}
