"""Manifests: lists of labelled files, as CSV, JSONL or Parquet.

One row a file, at least `path` and `label` (`real` or `fake`). Also read: `id, method, df_class, source, group,
split, cues, mask, video`; every other column is kept in `Sample.extra`. Relative paths start at the manifest's
folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from x2dfd.errors import X2DFDError
from x2dfd.stores import is_address
from x2dfd.types import DF_CLASSES, Cue

_COLUMNS = ("id", "path", "label", "method", "df_class", "source", "group", "split", "cues", "mask", "video")


@dataclass(frozen=True)
class Sample:
    """One labelled file of a manifest."""

    id: str  # unique in the manifest; the path as written there when there is no `id` column
    path: Path  # absolute
    label: Literal["real", "fake"]  # as written in the manifest, never guessed from a name
    method: str = ""  # how a fake was made
    df_class: str = ""  # one of DF_CLASSES, or "" when not known
    source: str = ""  # the data set or camera that the picture (or the photo it was forged from) comes from
    group: str = ""  # identity, clip or source photo; never on two sides of a split; the id when not given
    split: str = ""  # train, val, test, ...
    cues: tuple[Cue, ...] = ()  # known signs of forgery
    mask: Path | None = None  # absolute; where the forgery is
    video: str | None = None  # unique id of the clip that this frame belongs to
    extra: dict[str, Any] = field(default_factory=dict)  # the other columns, untouched

    @property
    def synthetic(self) -> bool:
        """The whole picture comes from a generator: it is no photo that was changed, with a mask of where."""
        return self.label == "fake" and self.df_class == "EFS" and self.mask is None

    @property
    def origin(self) -> str:
        """What one has seen before, or not: the generator of a picture made as a whole, else the photo's source."""
        return self.method.split("+")[0] if self.synthetic else self.source


def read_manifest(path: str | os.PathLike[str], *, split: str | None = None) -> list[Sample]:
    """Reads and checks a whole manifest; with `split`, returns only the samples of that split.

    Raises X2DFDError, with the row's number (1 = the first record), on a missing column, an unknown label, a
    duplicate path or id, a malformed row, a group that stands in two splits, and on an empty file or an empty split.
    Whether the files exist is not checked: a file that cannot be opened is one failed sample, not a failed run.
    """
    file = Path(os.path.abspath(path))
    samples = _check(file, _rows(file))
    if split is None:
        return samples
    chosen = [s for s in samples if s.split == split]
    if not chosen:
        known = ", ".join(sorted({s.split for s in samples if s.split})) or "none"
        raise X2DFDError(f"{file.name}: no sample of split {split!r} (splits: {known})")
    return chosen


def manifest_paths(path: str | os.PathLike[str], *, remote: Collection[str] = ()) -> Iterator[Path | str]:
    """The absolute paths of a manifest's rows, one after another; only the column `path` is needed.

    `remote`: stores (s3, gs ...) whose addresses (s3://bucket/face.jpg) stay such, as strings.
    Raises X2DFDError, with the row's number, on a malformed row or one without a path.
    """
    file = Path(os.path.abspath(path))
    for number, row in _rows(file):
        if not (text := _text(row, "path")):
            raise X2DFDError(f"{file.name}: row {number}: no path (columns: {', '.join(row)})")
        yield text if is_address(text, remote) else _absolute(file.parent, text)


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Sample | Mapping[str, Any]]) -> None:
    """Writes a JSONL manifest, whole or not at all.

    Paths of a Sample are written relative to the manifest's folder where they lie below it. Raises X2DFDError for
    rows that `read_manifest` would refuse.
    """
    file = Path(os.path.abspath(path))
    records = [_record(r, file.parent) if isinstance(r, Sample) else dict(r) for r in rows]
    _check(file, enumerate(records, start=1))
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def manifest_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the manifest file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not file.is_file():
        raise X2DFDError(f"no such manifest: {file}")
    readers = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise X2DFDError(f"{file.name}: a manifest ends in .csv, .jsonl or .parquet")
    try:
        yield from readers[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise X2DFDError(f"{file.name}: not UTF-8 text ({error.reason})") from error


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise X2DFDError(f"{file.name}: row {number}: not as many fields as the header names")
                yield number, dict(row)
        except csv.Error as error:
            raise X2DFDError(f"{file.name}: line {reader.line_num}: {error}") from error


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate((text for text in stream if text.strip()), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise X2DFDError(f"{file.name}: row {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise X2DFDError(f"{file.name}: row {number}: not a JSON object")
            yield number, row


def _parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield from enumerate((row for batch in table.iter_batches(4096) for row in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as error:
        raise X2DFDError(f"{file.name}: not a Parquet file ({error})") from error


def _check(file: Path, rows: Iterable[tuple[int, dict[str, Any]]]) -> list[Sample]:
    """Turns rows into samples and refuses what contradicts itself across rows."""
    samples: list[Sample] = []
    paths: dict[Path, int] = {}
    ids: dict[str, int] = {}
    splits: dict[str, tuple[str, int]] = {}
    for number, row in rows:
        where = f"{file.name}: row {number}"
        sample = _sample(where, file.parent, row)
        if sample.path in paths:
            raise X2DFDError(f"{where}: same path as row {paths[sample.path]}: {row['path']}")
        if sample.id in ids:
            raise X2DFDError(f"{where}: same id as row {ids[sample.id]}: {sample.id}")
        if sample.split:
            split, first = splits.setdefault(sample.group, (sample.split, number))
            if split != sample.split:
                raise X2DFDError(
                    f"{where}: group {sample.group!r} is in {sample.split!r}, in row {first} it is in {split!r}"
                )
        paths[sample.path] = ids[sample.id] = number
        samples.append(sample)
    if not samples:
        raise X2DFDError(f"{file.name}: no rows")
    return samples


def _sample(where: str, folder: Path, row: dict[str, Any]) -> Sample:
    for column in ("path", "label"):
        if column not in row:
            raise X2DFDError(f"{where}: no column {column!r} (columns: {', '.join(row)})")
    path = _text(row, "path")
    if not path:
        raise X2DFDError(f"{where}: empty path")
    label = _text(row, "label")
    if label not in ("real", "fake"):
        raise X2DFDError(f"{where}: label {row['label']!r} is neither 'real' nor 'fake'")
    df_class = _text(row, "df_class")
    if df_class and (df_class not in DF_CLASSES or (df_class == "real") != (label == "real")):
        raise X2DFDError(
            f"{where}: df_class {df_class!r} does not fit label {label!r} (known: {', '.join(DF_CLASSES)})"
        )
    identity = _text(row, "id") or path
    mask = _text(row, "mask")
    return Sample(
        id=identity,
        path=_absolute(folder, path),
        label=cast(Literal["real", "fake"], label),
        method=_text(row, "method"),
        df_class=df_class,
        source=_text(row, "source"),
        group=_text(row, "group") or identity,
        split=_text(row, "split"),
        cues=_cues(where, row.get("cues")),
        mask=_absolute(folder, mask) if mask else None,
        video=_text(row, "video") or None,
        extra={k: v for k, v in row.items() if k not in _COLUMNS},
    )


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    # A Parquet file that went through pandas writes a missing text as NaN.
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _cues(where: str, value: Any) -> tuple[Cue, ...]:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ()
    try:
        return tuple(Cue(**cue) for cue in (json.loads(value) if isinstance(value, str) else value))
    except (TypeError, ValueError) as error:
        raise X2DFDError(f'{where}: cues are not [{{"area": ..., "artifact": ...}}]: {error}') from error


def _absolute(folder: Path, path: str) -> Path:
    return Path(os.path.abspath(folder / path))


def _record(sample: Sample, folder: Path) -> dict[str, Any]:
    def place(path: Path) -> str:
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    known: dict[str, Any] = {
        "id": sample.id,
        "path": place(sample.path),
        "label": sample.label,
        "method": sample.method,
        "df_class": sample.df_class,
        "source": sample.source,
        "group": sample.group,
        "split": sample.split,
        "cues": [
            {"area": c.area, "artifact": c.artifact} | ({} if c.score is None else {"score": c.score})
            for c in sample.cues
        ],
        "mask": place(sample.mask) if sample.mask else None,
        "video": sample.video,
    }
    return {k: v for k, v in known.items() if v not in ("", None, [])} | sample.extra
