"""Manifests: lists of labelled files, as CSV (also TSV, and with semicolons), JSONL or Parquet.

One row per file, with at least `path` and `label` (`real` or `fake`). Also read: `id, method, df_class, source, group,
split, cues, mask, video`; every other column is kept in `Sample.extra`. Relative paths start at the manifest's
folder. A path is taken as it is written, with its spaces; one with backslashes that names no file here is read as a
Windows path. Text is UTF-8, or UTF-16 with its byte order mark.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Literal, TextIO, cast

from x2dfd.errors import X2DFDError
from x2dfd.files import Json, checked, file_sha256, parse_json, write_text
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
    extra: Json = field(default_factory=dict)  # the other columns, untouched

    @property
    def synthetic(self) -> bool:
        """Whether a generator made the whole picture: no mask shows a changed area of a photo."""
        return self.label == "fake" and self.df_class == "EFS" and self.mask is None

    @property
    def origin(self) -> str:
        """The origin that a detector may know: the generator of a synthetic picture, else the photo's source."""
        return self.method.split("+")[0] if self.synthetic else self.source


def read_manifest(path: str | os.PathLike[str], *, split: str | None = None) -> list[Sample]:
    """Read and check a whole manifest; with `split`, return only the samples of that split.

    Raises X2DFDError, with the row's number (1 = the first record), on a missing or repeated column, an unknown label,
    a duplicate path or id, a malformed row, a group in two splits or only partly in one, and on an empty file or split.
    It does not check that the files exist.
    """
    file = Path(os.path.abspath(path))
    samples = _check(file, _rows(file))
    if split is None:
        return samples
    selected = [s for s in samples if s.split == split]
    if not selected:
        splits = ", ".join(sorted({s.split for s in samples if s.split})) or "none"
        raise X2DFDError(f"{file.name}: no sample of split {split!r} (splits: {splits})", code="split_empty")
    return selected


def manifest_paths(path: str | os.PathLike[str], *, remote: Collection[str] = ()) -> Iterator[Path | str]:
    """The absolute paths of a manifest's rows, in order; only the column `path` is needed.

    `remote`: stores (s3, gs ...) whose addresses (s3://bucket/face.jpg) are yielded as strings.
    Raises X2DFDError, with the row's number, on a malformed row or one without a path.
    """
    file = Path(os.path.abspath(path))
    for number, row in _rows(file):
        where = f"{file.name}: row {number}"
        if not (text := _path(where, row, "path")):
            raise X2DFDError(f"{where}: no path (columns: {', '.join(row)})", code="manifest_path_missing")
        yield text if is_address(text, remote) else _absolute(where, file.parent, text)


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Sample | Json]) -> None:
    """Write a JSONL manifest, whole or not at all.

    Paths of a Sample below the manifest's folder are written relative to it. Raises X2DFDError for rows that
    `read_manifest` would refuse.
    """
    file = Path(os.path.abspath(path))
    records = [_record(r, file.parent) if isinstance(r, Sample) else dict(r) for r in rows]
    _check(file, enumerate(records, start=1))
    write_text(file, "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records))


def manifest_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the manifest file's bytes, in hexadecimal."""
    return file_sha256(Path(path))


def _rows(file: Path) -> Iterator[tuple[int, Json]]:
    if not file.is_file():
        raise X2DFDError(f"no such manifest: {file}", code="manifest_not_found")
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise X2DFDError(
            f"{file.name}: a manifest's name ends in .csv, .tsv, .jsonl or .parquet; save a spreadsheet as CSV UTF-8",
            code="manifest_format_unknown",
        )
    try:
        yield from readers[file.suffix.lower()](file)
    except UnicodeDecodeError as error:
        raise X2DFDError(
            f"{file.name}: not UTF-8 text ({error.reason}): save it as UTF-8 (in a spreadsheet: as CSV UTF-8)",
            code="manifest_not_utf8",
        ) from error
    except OSError as error:
        raise X2DFDError(f"{file}: cannot be read ({error.strerror or error})", code="manifest_unreadable") from error


def _open_text(file: Path) -> TextIO:
    """The text of a manifest, as UTF-16 if it has that byte order mark, else as UTF-8."""
    with file.open("rb") as stream:
        is_utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return file.open(encoding="utf-16" if is_utf16 else "utf-8-sig", newline="")


def _csv(file: Path) -> Iterator[tuple[int, Json]]:
    with _open_text(file) as stream:
        header = stream.readline()
        if header.startswith("sep="):  # a spreadsheet's remark
            header = stream.readline()
        delimiter = next((d for d in ",;\t" if "path" in map(_unquoted, header.split(d))), ",")
        # If the header has spaces after commas, those in rows are no part of paths either.
        reader = csv.reader(
            itertools.chain([header], stream),
            delimiter=delimiter,
            skipinitialspace=f"{delimiter} " in header,
            strict=True,
        )
        try:
            names = [name.strip() for name in next(reader, [])]
            if "\0" in header:
                raise X2DFDError(
                    f"{file.name}: UTF-16 text without a byte order mark: save it as UTF-8", code="manifest_not_utf8"
                )
            if repeated := [name for name, n in Counter(names).items() if n > 1]:
                raise X2DFDError(
                    f"{file.name}: the column {repeated[0]!r} occurs twice in the header", code="manifest_column_twice"
                )
            if names and "path" not in names:  # in a list without a header row a file's name stands there
                raise X2DFDError(
                    f"{file.name}: its header row has no column 'path' (columns: {', '.join(names)})",
                    code="manifest_column_missing",
                )
            for number, cells in enumerate((cells for cells in reader if cells), start=1):
                if len(cells) != len(names):
                    raise X2DFDError(
                        f"{file.name}: row {number}: not as many fields as the header names",
                        code="manifest_row_malformed",
                    )
                yield number, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise X2DFDError(f"{file.name}: line {reader.line_num}: {error}", code="manifest_row_malformed") from error


def _unquoted(cell: str) -> str:
    return cell.strip().strip('"')


def _jsonl(file: Path) -> Iterator[tuple[int, Json]]:
    with _open_text(file) as stream:
        for number, line in enumerate((text for text in stream if text.strip()), start=1):
            try:
                row = parse_json(line)
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise X2DFDError(
                    f"{file.name}: row {number}: not JSON ({reason})", code="manifest_row_malformed"
                ) from error
            if not isinstance(row, dict):
                raise X2DFDError(
                    f"{file.name}: row {number}: not a JSON object: a line holds one object",
                    code="manifest_row_malformed",
                )
            yield number, row


def _parquet(file: Path) -> Iterator[tuple[int, Json]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if repeated := [name for name, n in Counter(table.schema_arrow.names).items() if n > 1]:
                raise X2DFDError(f"{file.name}: the column {repeated[0]!r} occurs twice", code="manifest_column_twice")
            yield from enumerate((row for batch in table.iter_batches(4096) for row in batch.to_pylist()), start=1)
    except (pa.ArrowException, OSError) as error:
        raise X2DFDError(f"{file.name}: not a Parquet file ({error})", code="manifest_unreadable") from error


def _check(file: Path, rows: Iterable[tuple[int, Json]]) -> list[Sample]:
    """Turn rows into samples; refuse contradictions between rows."""
    samples: list[Sample] = []
    paths: dict[Path, int] = {}
    ids: dict[str, int] = {}
    splits: dict[str, tuple[str, int]] = {}  # of each group: its split, and the first row that states it
    for number, row in rows:
        where = f"{file.name}: row {number}"
        sample = _sample(where, file.parent, row)
        if sample.path in paths:
            raise X2DFDError(
                f"{where}: same path as row {paths[sample.path]}: {row['path']}", code="manifest_path_twice"
            )
        if sample.id in ids:
            raise X2DFDError(f"{where}: same id as row {ids[sample.id]}: {sample.id}", code="manifest_id_twice")
        split, first = splits.setdefault(sample.group, (sample.split, number))
        if split != sample.split:
            own, other = (f"in {name!r}" if name else "in no split" for name in (sample.split, split))
            raise X2DFDError(
                f"{where}: group {sample.group!r} is {own}, in row {first} it is {other}", code="group_across_splits"
            )
        paths[sample.path] = ids[sample.id] = number
        samples.append(sample)
    if not samples:
        raise X2DFDError(f"{file.name}: no rows", code="manifest_empty")
    return samples


def _sample(where: str, folder: Path, row: Json) -> Sample:
    for column in ("path", "label"):
        if column not in row:
            raise X2DFDError(
                f"{where}: no column {column!r} (columns: {', '.join(row)})", code="manifest_column_missing"
            )
    path = _path(where, row, "path")
    if not path:
        raise X2DFDError(f"{where}: empty path", code="manifest_path_missing")
    texts = {column: _text(where, row, column) for column in _COLUMNS if column not in ("path", "mask", "cues")}
    label = texts["label"]
    if label not in ("real", "fake"):
        raise X2DFDError(f"{where}: label {row['label']!r} is neither 'real' nor 'fake'", code="manifest_label_unknown")
    df_class = texts["df_class"]
    if df_class and (df_class not in DF_CLASSES or (df_class == "real") != (label == "real")):
        raise X2DFDError(
            f"{where}: df_class {df_class!r} does not fit label {label!r} (known: {', '.join(DF_CLASSES)})",
            code="manifest_df_class_wrong",
        )
    identity = texts["id"] or path
    mask = _path(where, row, "mask")
    return Sample(
        id=identity,
        path=_absolute(where, folder, path),
        label=cast(Literal["real", "fake"], label),
        method=texts["method"],
        df_class=df_class,
        source=texts["source"],
        group=texts["group"] or identity,
        split=texts["split"],
        cues=_cues(where, row.get("cues")),
        mask=_absolute(where, folder, mask) if mask else None,
        video=texts["video"] or None,
        extra={k: v for k, v in row.items() if k not in _COLUMNS},
    )


def _text(where: str, row: Json, column: str) -> str:
    """The text of a column without the spaces around it; "" if it is empty or absent."""
    value = row.get(column)
    if isinstance(value, bytes):  # as Parquet files without a text type hold it
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise X2DFDError(
                f"{where}: column {column!r} holds bytes that are not UTF-8 text", code="manifest_value_not_text"
            ) from error
    if isinstance(value, dict | list):
        raise X2DFDError(f"{where}: column {column!r} holds no text", code="manifest_value_not_text")
    # A Parquet file that went through pandas writes a missing text as NaN.
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _path(where: str, row: Json, column: str) -> str:
    """A path as it is written: a file's name may begin or end with a space, and need not be UTF-8."""
    value = row.get(column)
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, str):
        return _text(where, row, column)
    return value if value.strip() else ""


def _cues(where: str, value: object) -> tuple[Cue, ...]:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ()
    try:
        cues = parse_json(value) if isinstance(value, str | bytes) else value
        if not isinstance(cues, list | tuple):
            raise TypeError("it is not a list")
        return tuple(checked(Cue, cue) for cue in cues)
    except (TypeError, ValueError) as error:
        raise X2DFDError(
            f'{where}: cues are not [{{"area": ..., "artifact": ...}}]: {error}', code="manifest_cues_malformed"
        ) from error


def _absolute(where: str, folder: Path, path: str) -> Path:
    if "\0" in path:
        raise X2DFDError(f"{where}: a path holds a NUL character", code="manifest_path_invalid")
    if "\\" in path and os.sep == "/" and not os.path.lexists(folder / path):  # written on Windows
        if PureWindowsPath(path).drive:
            raise X2DFDError(
                f"{where}: {path} names a drive of another machine: write paths relative to the manifest's folder",
                code="manifest_path_foreign",
            )
        path = path.replace("\\", "/")
    return Path(os.path.abspath(folder / path))


def _record(sample: Sample, folder: Path) -> Json:
    def relative(path: Path) -> str:
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

    columns = {name: getattr(sample, name) for name in _COLUMNS} | {
        "path": relative(sample.path),
        "cues": [{k: v for k, v in asdict(cue).items() if v is not None} for cue in sample.cues],
        "mask": relative(sample.mask) if sample.mask else None,
    }
    return {k: v for k, v in columns.items() if v not in ("", None, [])} | sample.extra
