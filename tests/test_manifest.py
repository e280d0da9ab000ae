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

from tests.raising import raises
from x2dfd.errors import X2DFDError
from x2dfd.manifest import Sample, manifest_paths, manifest_sha256, read_manifest, write_manifest
from x2dfd.types import Cue

ROWS: list[dict[str, Any]] = [
    {"path": "a/1.png", "label": "real", "source": "ffhq", "group": "p1", "split": "val", "camera": "x100"},
    {"path": "a/2.png", "label": "fake", "method": "blend", "df_class": "FS", "source": "ffhq", "group": "p1",
     "split": "val", "cues": [{"area": "jaw", "artifact": "blending"}], "mask": "m/2.png", "video": "clip/7",
     "camera": "x100"},
]  # fmt: skip
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
    common: dict[str, Any] = {"source": "ffhq", "group": "p1", "split": "val", "extra": {"camera": "x100"}}
    forged: dict[str, Any] = {"method": "blend", "df_class": "FS", "cues": (Cue("jaw", "blending"),)}
    assert read_manifest(file) == [
        Sample(id="a/1.png", path=tmp_path / "a/1.png", label="real", **common),
        Sample(
            id="a/2.png", path=tmp_path / "a/2.png", label="fake", mask=tmp_path / "m/2.png", video="clip/7",
            **common, **forged,
        ),
    ]  # fmt: skip


def paths_of(file: Path) -> list[str]:
    """As both ways of reading give them, below the manifest's folder."""
    read = [s.path for s in read_manifest(file)]
    assert list(manifest_paths(file)) == read
    return [str(path.relative_to(file.parent)) for path in read]


CUES = b'{"path": "a", "label": "fake", "cues": %s}'


@pytest.mark.parametrize(
    ("name", "content", "paths"),
    [
        ("semicolon.csv", b"path;label\r\na,b.jpg;fake\r\n", ["a,b.jpg"]),
        ("told.csv", b"sep=;\r\nlabel;path\r\nfake;a.jpg\r\n", ["a.jpg"]),
        ("tabs.csv", b"label\tpath\nfake\ta;b.jpg\n", ["a;b.jpg"]),
        ("tabs.tsv", b"label\tpath\nfake\ta.jpg\n", ["a.jpg"]),
        ("quoted.csv", b'"path";"label"\n"a;b.jpg";"real"\n', ["a;b.jpg"]),
        ("comma.csv", b"path,label\na;b.jpg,real\n", ["a;b.jpg"]),
        ("spaces.csv", b"path, label\na b.jpg, real\n", ["a b.jpg"]),
        ("lead.csv", b'path,label\n" lead.jpg",fake\ntrail.jpg ,real\n', [" lead.jpg", "trail.jpg "]),
        ("bom.csv", b"\xef\xbb\xbfpath,label\na.jpg,fake\n", ["a.jpg"]),
        ("utf16.csv", "path,label\r\nä.jpg,fake\r\n".encode("utf-16"), ["ä.jpg"]),
        ("utf16be.csv", b"\xfe\xff" + "path\tlabel\nä.jpg\tfake\n".encode("utf-16-be"), ["ä.jpg"]),
        ("bom.jsonl", b'\xef\xbb\xbf{"path": " a.jpg", "label": "fake"}\n', [" a.jpg"]),
        ("utf16.jsonl", '{"path": "ä.jpg", "label": "fake"}\n'.encode("utf-16"), ["ä.jpg"]),
        ("windows.csv", b"path,label\nsub\\a.jpg,fake\nsub/b.jpg,fake\n", ["sub/a.jpg", "sub/b.jpg"]),
    ],
)
def test_lists_as_other_programs_save_them_are_read(
    tmp_path: Path, name: str, content: bytes, paths: list[str]
) -> None:
    """Bug prevented: a spreadsheet's list has "no path", or a name loses its space and is "no such file"."""
    (tmp_path / name).write_bytes(content)
    assert paths_of(tmp_path / name) == paths


def test_bytes_in_parquet_are_text(tmp_path: Path) -> None:
    """Bug prevented: every file of the list is called b'face.jpg', and none is found."""
    rows = {"path": [b"a.jpg", b"\xff.jpg"], "label": [b"fake", b"real"], "group": [b"g", b"h"], "more": [b"x", b"y"]}
    pq.write_table(pa.table({k: pa.array(v, pa.binary()) for k, v in rows.items()}), tmp_path / "b.parquet")
    assert paths_of(tmp_path / "b.parquet") == ["a.jpg", "\udcff.jpg"]
    first = read_manifest(tmp_path / "b.parquet")[0]
    assert (first.label, first.group, first.extra) == ("fake", "g", {"more": b"x"})
    pq.write_table(pa.table({"path": ["a.jpg"], "label": pa.array([b"\xff"], pa.binary())}), tmp_path / "c.parquet")
    with raises("manifest_value_not_text", "row 1", "'label'"):
        read_manifest(tmp_path / "c.parquet")
    values = [pa.array([value]) for value in ("a.jpg", "real", "fake")]
    pq.write_table(pa.Table.from_arrays(values, ["path", "label", "label"]), tmp_path / "d.parquet")
    with raises("manifest_column_twice", "'label'"):
        read_manifest(tmp_path / "d.parquet")


def test_a_backslash_in_a_name_that_is_there_stays(tmp_path: Path) -> None:
    """Bug prevented: a file whose name holds a backslash is looked for in a folder that is not there."""
    (tmp_path / "a\\b.jpg").touch()
    assert paths_of(as_csv(tmp_path, ["path,label", "a\\b.jpg,real"])) == ["a\\b.jpg"]
    file = as_csv(tmp_path, ["path,label", "C:\\photos\\a.jpg,real"])
    for reading in (lambda: read_manifest(file), lambda: list(manifest_paths(file))):
        with raises("manifest_path_foreign", "row 1"):
            reading()


@pytest.mark.parametrize(
    ("name", "content", "code", "facts"),
    [
        ("a.csv", b"path,label\na.png,real\nb.png,Fake1\n", "manifest_label_unknown", ["row 2", "'Fake1'"]),
        ("a.csv", b"path,label\nreal/a.png,\n", "manifest_label_unknown", ["row 1"]),
        ("a.csv", b"path,kind\na.png,real\n", "manifest_column_missing", ["row 1", "'label'"]),
        ("a.csv", b"file,label\na.png,real\n", "manifest_column_missing", ["header row", "'path'"]),
        ("a.csv", b"path,label\na.png,real\nx/../a.png,fake\n", "manifest_path_twice", ["row 2", "row 1"]),
        ("a.csv", b"path,label,id\na.png,real,1\nb.png,fake,1\n", "manifest_id_twice", ["row 2", "row 1"]),
        ("a.csv", b"path,label\na.png,real,oops\n", "manifest_row_malformed", ["row 1", "fields"]),
        ("a.csv", b"path,label,method\na.png,real\n", "manifest_row_malformed", ["row 1", "fields"]),
        ("a.csv", b"path,label,df_class\na.png,fake,real\n", "manifest_df_class_wrong", ["row 1", "'real'"]),
        ("a.csv", b"path,label,cues\na.png,fake,jaw\n", "manifest_cues_malformed", ["row 1"]),
        ("a.csv", b"path,label\n", "manifest_empty", []),
        ("a.csv", b"\n", "manifest_empty", []),
        ("a.csv", b"path,label,label\na.jpg,real,fake\n", "manifest_column_twice", ["'label'"]),
        ("a.csv", b"path,label\n\xe4.jpg,real\n", "manifest_not_utf8", ["UTF-8"]),
        ("a.csv", "path,label\na.jpg,real\n".encode("utf-16-le"), "manifest_not_utf8", ["UTF-16", "UTF-8"]),
        ("a.csv", b"path,label\na\0.jpg,real\n", "manifest_path_invalid", ["row 1", "NUL"]),
        ("a.jsonl", b'{"path": "a", "label": "real", "label": "fake"}', "manifest_row_malformed", ["row 1", "'label'"]),
        ("a.jsonl", b'{"path": "a", "label": ' + b"[" * 100_000, "manifest_row_malformed", ["row 1", "nested"]),
        ("a.jsonl", b'{"path": "a", "label": ' + b"9" * 5000 + b"}", "manifest_row_malformed", ["row 1", "5000"]),
        ("a.jsonl", b'{"path": ["a"], "label": "real"}', "manifest_value_not_text", ["row 1", "'path'"]),
        ("a.jsonl", b'{"path": "a", "label": "real", "group": {}}', "manifest_value_not_text", ["row 1", "'group'"]),
        ("a.jsonl", b'[{"path": "a", "label": "real"}]', "manifest_row_malformed", ["row 1", "object"]),
        ("a.jsonl", CUES % b'[{"area": "jaw", "artifact": ["x"]}]', "manifest_cues_malformed", ["row 1"]),
        ("a.jsonl", CUES % b'[{"area": "jaw", "artifact": "vibes"}]', "manifest_cues_malformed", ["row 1", "vibes"]),
        ("a.jsonl", CUES % b'{"area": "jaw"}', "manifest_cues_malformed", ["row 1"]),
        ("a.jsonl", CUES % b"7", "manifest_cues_malformed", ["row 1"]),
        ("a.jsonl", b'{"path": ', "manifest_row_malformed", ["row 1"]),
        ("a.parquet", b"PAR1", "manifest_unreadable", ["a.parquet"]),
        ("a.xlsx", b"", "manifest_format_unknown", ["a.xlsx"]),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_the_mend(
    tmp_path: Path, name: str, content: bytes, code: str, facts: list[str]
) -> None:
    """Bug prevented: a traceback, a guess which of two labels counts, or a message that says not what to change."""
    (tmp_path / name).write_bytes(content)
    with raises(code, *facts) as caught:
        read_manifest(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_group_on_two_sides_is_refused(tmp_path: Path) -> None:
    """Bug prevented: its other row is tested on, or trained on, also where it has no split or is not asked for."""
    for other in ("val", ""):
        file = as_csv(tmp_path, ["path,label,group,split", "a.png,real,g,train", f"b.png,fake,g,{other}"])
        for split in (None, "train"):
            with raises("group_across_splits", "row 2", "'g'", "row 1", "'train'"):
                read_manifest(file, split=split)
    read_manifest(as_csv(tmp_path, ["path,label,group,split", "a.png,real,g,", "b.png,fake,g,", "c.png,real,h,val"]))


def test_a_split_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt split would otherwise give an empty, perfect result."""
    file = as_csv(tmp_path, ["path,label,split", "a.png,real,train", "b.png,fake,val"])
    assert [s.id for s in read_manifest(file, split="val")] == ["b.png"]
    with raises("split_empty", "'vla'", "train, val"):
        read_manifest(file, split="vla")
    with raises("manifest_not_found", "none.csv"):
        read_manifest(tmp_path / "none.csv")


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
