"""Manifests: what is wrong in a list of files must be said with its row, and nothing may be guessed."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from x2dfd.errors import X2DFDError
from x2dfd.manifest import Sample, manifest_sha256, read_manifest, write_manifest
from x2dfd.types import Cue

ROWS: list[dict[str, Any]] = [
    {"path": "a/1.png", "label": "real", "source": "ffhq", "group": "p1", "split": "val", "camera": "x100"},
    {
        "path": "a/2.png",
        "label": "fake",
        "method": "blend",
        "df_class": "FS",
        "source": "ffhq",
        "group": "p1",
        "split": "val",
        "cues": [{"area": "jaw", "artifact": "blending"}],
        "mask": "m/2.png",
        "video": "clip/7",
        "camera": "x100",
    },
]
COLUMNS = ["path", "label", "method", "df_class", "source", "group", "split", "cues", "mask", "video", "camera"]


def as_csv(folder: Path, lines: list[str]) -> Path:
    file = folder / "manifest.csv"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    file = folder / "manifest.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return file


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_the_three_formats_say_the_same(tmp_path: Path, suffix: str) -> None:
    """A column read in one format and dropped in another would change results with the file's ending."""
    file = tmp_path / f"manifest.{suffix}"
    flat = [{c: json.dumps(r[c]) if c == "cues" and c in r else r.get(c) for c in COLUMNS} for r in ROWS]
    if suffix == "csv":
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            writer.writeheader()
            writer.writerows(flat)
    elif suffix == "jsonl":
        as_jsonl(tmp_path, ROWS)
    else:
        pq.write_table(pa.Table.from_pylist(flat), file)
    real, fake = read_manifest(file)
    assert real == Sample(
        id="a/1.png",
        path=tmp_path / "a/1.png",
        label="real",
        source="ffhq",
        group="p1",
        split="val",
        extra={"camera": "x100"},
    )
    assert fake == Sample(
        id="a/2.png",
        path=tmp_path / "a/2.png",
        label="fake",
        method="blend",
        df_class="FS",
        source="ffhq",
        group="p1",
        split="val",
        cues=(Cue("jaw", "blending"),),
        mask=tmp_path / "m/2.png",
        video="clip/7",
        extra={"camera": "x100"},
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["path,label", "a.png,real", "b.png,Fake1"], "row 2.*'Fake1'"),
        (["path,label", "real/a.png,"], "row 1.*neither"),
        (["path,kind", "a.png,real"], "row 1.*no column 'label'"),
        (["file,label", "a.png,real"], "row 1.*no column 'path'"),
        (["path,label", "a.png,real", "x/../a.png,fake"], "row 2.*same path as row 1"),
        (["path,label,id", "a.png,real,1", "b.png,fake,1"], "row 2.*same id as row 1"),
        (["path,label", "a.png,real,oops"], "row 1.*fields"),
        (["path,label,method", "a.png,real"], "row 1.*fields"),
        (["path,label,df_class", "a.png,fake,real"], "row 1.*df_class"),
        (["path,label,cues", "a.png,fake,jaw"], "row 1.*cues"),
        (["path,label,cues", 'a.png,fake,"[{""area"": ""jaw"", ""artifact"": ""vibes""}]"'], "row 1.*vocabulary"),
        (["path,label,group,split", "a.png,real,g,train", "b.png,fake,g,val"], "row 2.*group 'g'.*row 1"),
        (["path,label"], "no rows"),
        ([""], "no rows"),
    ],
)
def test_a_fault_is_named_with_its_row(tmp_path: Path, lines: list[str], said: str) -> None:
    """A row that is skipped or guessed at ends as a wrong number that nobody can trace."""
    with pytest.raises(X2DFDError, match=said):
        read_manifest(as_csv(tmp_path, lines))


def test_broken_files_are_errors_of_ours(tmp_path: Path) -> None:
    """A typing slip must not end in a traceback."""
    for name, content in {"a.jsonl": b'{"path": ', "b.jsonl": b"[1]\n", "c.csv": b"path,label\n\xff,real\n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "e.xlsx").write_bytes(b"")
    for name in ("a.jsonl", "b.jsonl", "c.csv", "d.parquet", "e.xlsx", "none.csv"):
        with pytest.raises(X2DFDError, match=name):
            read_manifest(tmp_path / name)


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt split would otherwise give an empty, perfect result."""
    file = as_csv(tmp_path, ["path,label,split", "a.png,real,train", "b.png,fake,val"])
    assert [s.id for s in read_manifest(file, split="val")] == ["b.png"]
    with pytest.raises(X2DFDError, match=r"'vla'.*train, val"):
        read_manifest(file, split="vla")


def test_a_fault_outside_the_split_is_still_found(tmp_path: Path) -> None:
    """Checking only the split asked for would miss a group that leaks across splits."""
    file = as_csv(tmp_path, ["path,label,split,group", "a.png,real,train,g", "b.png,fake,val,g"])
    with pytest.raises(X2DFDError, match="group"):
        read_manifest(file, split="val")


def test_written_samples_are_read_back_equal_and_can_be_moved(tmp_path: Path) -> None:
    """Absolute paths in a manifest break the set as soon as its folder moves."""
    before = tmp_path / "before"
    before.mkdir()
    samples = read_manifest(as_jsonl(before, ROWS))
    write_manifest(before / "again.jsonl", samples)
    assert read_manifest(before / "again.jsonl") == samples
    after = before.rename(tmp_path / "after")
    assert read_manifest(after / "again.jsonl")[0].path == after / "a/1.png"


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A run that dies while writing must not leave half a data set behind that looks complete."""
    file = tmp_path / "manifest.jsonl"
    write_manifest(file, [{"path": "a.png", "label": "real"}])
    old = file.read_bytes()
    for bad in ({"path": "b.png", "label": "maybe"}, {"path": "b.png", "label": "fake", "score": float("nan")}):
        with pytest.raises((X2DFDError, ValueError)):
            write_manifest(file, [{"path": "a.png", "label": "fake"}, bad])
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.jsonl"]
    assert manifest_sha256(file) == hashlib.sha256(old).hexdigest()
