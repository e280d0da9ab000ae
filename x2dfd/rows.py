"""The table of `x2dfd detect --out`: one row a file, none lost or doubled by a kill, in memory that does not grow.

During a run the rows are in an SQLite file in the table's folder (`NAME.work`), written once a second. At the end the
table itself (Parquet, or JSONL) is written whole from it. A killed run, or a later one over the same files, resumes.
A row's path is absolute, so that files of the same name in different folders have a row each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from x2dfd.errors import X2DFDError, first_line
from x2dfd.files import Json, atomic_write, check_fields, parse_json
from x2dfd.stores import STDIN, sha256_of
from x2dfd.types import Failure, Report, frames_asked

if TYPE_CHECKING:
    import pyarrow as pa

    from x2dfd.stores import Place

SECONDS = 1.0  # of work that a kill can cost, besides the current batch
PART = 1024  # rows of the finished table in memory at a time

COLUMNS = {
    "path": "string", "sha256": "string", "label": "string", "p_fake": "double", "reason": "string",
    "error_code": "string", "error_reason": "string", "n_faces": "int32", "mode": "string", "rationale": "bool",
    "model_hash": "string", "report": "string",
}  # fmt: skip
"""Columns of the table, in order, with their Arrow types; a failure has its code and reason, and no label."""


class Rows:
    """The table of `--out`. One process at a time; raises X2DFDError when the files are foreign, locked or full."""

    def __init__(self, path: Path, model: Json, rationale: bool) -> None:
        """`model`: Report.model of this run's reports; rows of another model are not reused."""
        self.path = path
        self.work = path.with_name(path.name + ".work")  # the rows of an unfinished table
        self._model_hash = model_hash(model)
        self._mode = str(model.get("mode", ""))
        self._rationale = rationale
        self._save_time = time.monotonic()
        self._count = 0
        self._closed = False
        self.doubles = 0  # repeated paths of this run, which are skipped
        self.damaged = 0  # stored rows of this run's files that cannot be read, which do not count as known
        with self._guard():
            self._database = sqlite3.connect(self.work, isolation_level=None, timeout=1, check_same_thread=False)
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA cache_size=-8192")  # KiB
            self._database.execute("BEGIN EXCLUSIVE")
            if not self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'rows'").fetchone():
                columns = ", ".join(f"{c} {'PRIMARY KEY' if c == 'path' else ''}" for c in COLUMNS)
                self._database.execute(f"CREATE TABLE rows ({columns})")
                self._read_table()
            # This run's files, in order; the rows of other files come after them in the table.
            self._database.execute("DROP TABLE IF EXISTS asked")
            self._database.execute("CREATE TABLE asked (place INTEGER PRIMARY KEY, path TEXT UNIQUE)")
            self.save()

    # --- rows ---

    def ask(self, path: Place) -> bool:
        """Add a file to this run; False when the run holds it already."""
        self._count += 1
        with self._guard():
            cursor = self._database.execute(
                "INSERT OR IGNORE INTO asked VALUES (?, ?)", (self._count, utf8(_absolute(path)))
            )
        self.doubles += cursor.rowcount == 0
        return cursor.rowcount == 1

    def known(self, path: Place) -> Report | None:
        """The stored report of this file with unchanged content, by the same model; failures are tried again."""
        with self._guard():
            row = self._database.execute(
                "SELECT sha256, report FROM rows WHERE path = ? AND error_code IS NULL AND rationale = ? "
                "AND model_hash = ?",
                (utf8(_absolute(path)), self._rationale, self._model_hash),
            ).fetchone()
        if row is None:
            return None
        try:
            if sha256_of(path) != row[0]:
                return None
            return replace(_stored_report(row[1], self._model_hash), path=str(path))  # as this run names it
        except OSError:  # judging it again gives the reason
            return None
        except (ValueError, KeyError, TypeError):
            self.damaged += 1
            return None

    def add(self, path: Place, result: Report | Failure) -> None:
        """Store a result; it replaces an older one of that path."""
        place = _absolute(path)
        row: Json = dict.fromkeys(COLUMNS)
        row |= {"path": utf8(place), "sha256": result.sha256, "mode": self._mode, "rationale": self._rationale}
        if isinstance(result, Failure):
            row |= {"error_code": result.code, "error_reason": result.reason}
        else:
            row |= {
                "model_hash": model_hash(result.model),
                "label": result.verdict.label,
                "p_fake": result.verdict.p_fake,
                "reason": result.verdict.reason,
                "n_faces": len(result.faces),
                # As Report.to_json, but without the copy that asdict makes, and without the batch's timings and the
                # path as typed, so that the same files give the same bytes in every run, shard and cluster.
                "report": json.dumps(vars(result) | {"path": place, "timings": {}}, default=vars, allow_nan=False),
            }
        self._put(row)
        if time.monotonic() - self._save_time >= SECONDS:
            self.save()

    def _put(self, row: Json) -> None:
        with self._guard():
            self._database.execute(
                f"INSERT OR REPLACE INTO rows VALUES ({', '.join('?' * len(COLUMNS))})", [row[c] for c in COLUMNS]
            )

    def save(self) -> None:
        """Commit: every row so far survives a kill."""
        with self._guard():
            self._database.execute("COMMIT")
            self._database.execute("BEGIN EXCLUSIVE")
        self._save_time = time.monotonic()

    # --- the finished table ---

    def finish(self) -> None:
        """Write the table whole, this run's files first and in their order, and remove the working file."""
        self.save()
        writer = _write_jsonl if self.path.suffix == ".jsonl" else _write_parquet
        with self._guard():
            with atomic_write(self.path) as temporary:
                writer(temporary, self._in_order())
            self.close()
            for name in ("", "-journal"):
                self.work.with_name(self.work.name + name).unlink(missing_ok=True)

    def close(self) -> None:
        """Commit the rows and close the file."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._guard():
                if self._database.in_transaction:  # a full disk has ended it already
                    self._database.execute("COMMIT")
        finally:
            self._database.close()

    def _in_order(self) -> Iterator[list[Json]]:
        columns = ", ".join(f"rows.{c}" for c in COLUMNS)
        for query in (
            f"SELECT {columns} FROM asked CROSS JOIN rows ON rows.path = asked.path ORDER BY asked.place",
            f"SELECT {columns} FROM rows WHERE NOT EXISTS (SELECT 1 FROM asked WHERE asked.path = rows.path) "
            "ORDER BY rows.rowid",
        ):
            cursor = self._database.execute(query)
            while chunk := cursor.fetchmany(PART):
                rows = [dict(zip(COLUMNS, values, strict=True)) for values in chunk]
                yield [row | {"rationale": bool(row["rationale"])} for row in rows]

    def _read_table(self) -> None:
        """The rows of a finished table."""
        if not self.path.exists():
            return
        try:
            for n, row in enumerate((_read_jsonl if self.path.suffix == ".jsonl" else _read_parquet)(self.path), 1):
                if set(row) != set(COLUMNS):
                    raise ValueError(f"other columns: {', '.join(row)}"[:80])
                if wrong := [name for name, kind in COLUMNS.items() if not _fits(row[name], kind)]:
                    raise ValueError(f"row {n} has no {COLUMNS[wrong[0]]} as {wrong[0]!r}")
                self._put(row)
        except (OSError, ValueError, TypeError) as error:  # pyarrow's errors derive from the first two
            self._database.execute("ROLLBACK")
            self._database.close()
            self.work.unlink(missing_ok=True)
            raise X2DFDError(
                f"{self.path} is not a table of x2dfd ({first_line(error)}): move it away or give another --out",
                code="table_foreign",
            ) from error

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise X2DFDError(
                    f"another run is writing {self.path}: wait for it, or give another --out", code="table_locked"
                ) from error
            raise X2DFDError(f"cannot write {self.work}: {error}", code="cannot_write") from error
        except sqlite3.DatabaseError as error:
            raise X2DFDError(
                f"{self.work} is damaged ({error}): remove it to start the run anew", code="table_damaged"
            ) from error
        except OSError as error:
            raise X2DFDError(f"cannot write {self.path}: {error.strerror or error}", code="cannot_write") from error


_DESCRIPTIONS = ("validation", "blind_spot", "licence", "weights", "counts_for")
# `calibration_sha256` stands for the weights.


def model_hash(model: Json) -> str:
    """SHA-256 of Report.model without descriptions, which change no answer."""
    decisive = {key: value for key, value in model.items() if key not in _DESCRIPTIONS}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _stored_report(text: str, model: str) -> Report:
    """A stored report by the model of that hash. Raises ValueError, KeyError or TypeError for a damaged one."""
    data = parse_json(text)
    check_fields(Report, data)
    report = Report.from_dict(data)  # restores what `to_dict` leaves out
    frames_asked(report.media)
    if model_hash(report.model) != model:
        raise ValueError("its model is not that of its row")
    return report


def _fits(value: object, kind: str) -> bool:
    """Whether a value can stand in a column of that Arrow type."""
    if value is None or isinstance(value, bool):
        return value is None or kind == "bool"
    if kind == "int32":
        return isinstance(value, int) and abs(value) < 2**31
    return isinstance(value, str) if kind == "string" else kind == "double" and isinstance(value, int | float)


def _absolute(place: Place) -> str:
    """A place as rows name it, whatever folder the command is run in."""
    if isinstance(place, str) and (place == STDIN or "://" in place):
        return place
    folder, name = os.path.split(place)
    if ".." in Path(folder).parts:  # behind a link, it leads elsewhere than the text says
        folder = os.path.realpath(folder)
    return os.path.abspath(os.path.join(folder, name))


def utf8(path: str | Path) -> str:
    """A path as text that Parquet can hold, also where the name is no UTF-8; no two paths give the same text.

    A byte that is no UTF-8 becomes a backslash and `udc..`. A name that holds that text has its backslashes doubled.
    """
    text = str(path)
    if "\\udc" in text or any("\udc80" <= c <= "\udcff" for c in text):
        text = text.replace("\\", "\\\\")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])


def _write_parquet(path: Path, chunks: Iterator[list[Json]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, _schema()) as writer:
        for chunk in chunks:
            writer.write_table(pa.Table.from_pylist(chunk, schema=_schema()))


def _read_parquet(path: Path) -> Iterator[Json]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(_schema()):
            raise ValueError("another schema")
        for batch in file.iter_batches(PART):
            yield from batch.to_pylist()


def _write_jsonl(path: Path, chunks: Iterator[list[Json]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for chunk in chunks:
            for row in chunk:
                report = row["report"]
                with contextlib.suppress(ValueError):  # a damaged one, of a file outside of this run, stays as it is
                    report = None if report is None else parse_json(report)
                file.write(json.dumps(row | {"report": report}, allow_nan=False) + "\n")


def _read_jsonl(path: Path) -> Iterator[Json]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = parse_json(line)
            report = row["report"] if isinstance(row, dict) and "report" in row else None
            yield {**row, "report": None if report is None else json.dumps(report, allow_nan=False)}
