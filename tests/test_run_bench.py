"""The benchmark runner, with a stand-in for the model: what is counted, what is kept, and what a rerun changes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import x2dfd
from eval import command, compare, models, page, protocols, scoring, stats, tables, texts
from eval.bench import TASKS
from eval.changes import changes_of
from eval.rows import Store
from eval.validation import validation
from tests.raising import raises
from tests.stub import Killed
from x2dfd.files import file_sha256
from x2dfd.manifest import write_manifest
from x2dfd.types import Cue, Evidence, FaceReport, Failure, Report, Verdict

ROOT = Path(__file__).resolve().parent.parent
REASON = "the crop is too small"


class StandIn:
    """Calls bright pictures fake; the brighter, the surer. Its expert `half` sees nothing in very dark ones."""

    def __init__(self, weights: str = "w1", stop_after: int = 10**6, shift: float = 0.0) -> None:
        self.weights, self.left, self.shift = weights, stop_after, shift
        self.seen: list[Path | bytes] = []
        self.mode = "calibrated"

    def detect_many(
        self, sources: Sequence[Path | bytes], batch_size: int = 8, rationale: bool = True
    ) -> Iterator[Report | Failure]:
        for source in sources:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.seen.append(source)
            yield self.judge(source, rationale)

    def judge(self, source: Path | bytes, rationale: bool) -> Report | Failure:
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert("RGB")
        except OSError:
            return Failure(str(source), None, "not_an_image", "no picture")
        p = float(np.clip(np.asarray(image).mean() / 255 + self.shift, 0, 1))
        label = "fake" if p > 0.6 else "real" if p < 0.4 else "inconclusive"
        verdict = Verdict(label, p, None if label != "inconclusive" else "in_band")  # type: ignore[arg-type]
        evidence = (
            Evidence("good", p**2, cues=(Cue("jaw", "blending"), Cue("mouth", "blur")) if p > 0.6 else ()),
            Evidence("half", None, REASON) if p < 0.1 else Evidence("half", 0.5),
        )
        cues = (Cue("jaw", "blending"),) if rationale and label == "fake" else ()
        text = "This image is fake: the jaw is blended." if cues else ""
        face = FaceReport(0, (0, 0, 8, 8), 0.9, verdict, 1 - p, text, cues, evidence, ("x",) if p > 0.9 else ())
        report = Report(
            None, "0" * 64, {}, verdict, (face,), text, cues, evidence, {}, {"sha256": self.weights}, {}, {}
        )
        if p > 0.99:  # a picture without a face
            return replace(report, verdict=Verdict("inconclusive", None, "no_face"), faces=(), evidence=(), cues=())
        return report


def picture(path: Path, brightness: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(int(brightness * 1e6)).normal(brightness * 255, 3, (40, 60, 3))
    Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(path)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list({key: None for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the curves takes longer than all the rest; tests/test_page.py looks at them."""
    monkeypatch.setattr(page, "_plots", lambda result: iter(()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 pictures: 24 real of two sources, 14 fakes of two methods, a broken file and a picture without a face."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    cues = '[{"area": "jaw", "artifact": "blending"}]'
    for i in range(38):
        fake, camera = i >= 24, "ffhq" if i % 2 else "film"
        level = float(rng.uniform(0.35, 0.92) if fake else rng.uniform(0.02, 0.65))
        name = f"p/{i:02d}.{'png' if i % 3 else 'jpg'}"
        picture(tmp_path / name, level)
        row = {"path": name, "label": "fake" if fake else "real", "source": camera, "group": f"g{i % 24}"}
        row |= {
            "split": "val",
            "method": ("blend" if camera == "ffhq" else "gan") if fake else "none",
            "cues": cues if fake else "",
        }
        rows.append(row)
    for row in rows[26:38:2]:  # the GAN's fakes have a source without reals
        row["source"] = "gan-faces"
    (tmp_path / "p/broken.jpg").write_bytes(b"not a picture")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "p/white.png")
    common = {"group": "", "split": "val", "method": "blend", "source": "ffhq", "cues": cues}
    rows += [{"path": f"p/{name}", "label": "fake", **common} for name in ("broken.jpg", "white.png")]
    return write_csv(tmp_path / "manifest.csv", rows)


def bench(monkeypatch: pytest.MonkeyPatch, detector: StandIn, *words: Any) -> int:
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: detector, raising=False)
    return command.main([str(word) for word in words])


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return loaded


def test_one_pass_reports_all_scorers_and_counts_what_had_no_score(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be scored must be neither wrong, nor real, nor gone."""
    detector = StandIn()
    assert bench(monkeypatch, detector, "detect", "--data", data, "--split", "val", "--out", tmp_path / "out") == 0
    assert len(detector.seen) == 39  # every readable picture once
    result = result_of(tmp_path / "out")
    scorers = result["scorers"]
    assert list(scorers) == ["calibrated", "mllm", "expert:good", "expert:half"]
    assert scorers["calibrated"]["unscored"] == {"no_face": 1, "not_an_image": 1}
    assert scorers["calibrated"]["n_scored"] == 38 and "faces" not in scorers["calibrated"]  # one in each picture
    assert scorers["expert:half"]["unscored"].pop(REASON) == 38 - scorers["expert:half"]["n_scored"] > 0
    auc = scorers["calibrated"]["overall"]["auc"]
    assert 0.5 < auc["value"] < 1 and auc["note"] == stats.TOO_FEW and auc["groups"] == 24  # 14 of them hold fakes
    assert scorers["expert:good"]["overall"]["auc"]["value"] == auc["value"]  # p squared ranks as p does
    assert scorers["mllm"]["overall"]["auc"]["value"] == pytest.approx(1 - auc["value"])
    assert scorers["expert:half"]["overall"]["auc"]["value"] == 0.5
    assert result["common"]["n"] == scorers["expert:half"]["n_scored"]
    assert result["data"]["n"] == 40 and result["failures"] == {"not_an_image": 1}
    assert result["model"]["stated"] == {"sha256": "w1"}
    answers = scorers["calibrated"]["answers"]
    assert answers["n"] == 39 and answers["inconclusive"]["no_face"] == 1 and answers["coverage"]["value"] < 1
    low, high = answers["false_alarms"]["interval"]
    assert 0 <= low <= answers["false_alarms"]["value"] < high and answers["false_alarms"]["groups"] == 24


def test_samples_can_be_recounted_from_the_table(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sceptic recomputes the numbers from the rows; the rows must be all there and not tell where they were made."""
    bench(monkeypatch, StandIn(), "detect", "--data", data, "--out", tmp_path / "out")
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert len(rows) == 40 and str(tmp_path) not in json.dumps(rows)
    assert str(tmp_path) not in (tmp_path / "out" / "result.json").read_text()
    fakes = [r["p_fake"] for r in rows if r["label"] == "fake" and r["p_fake"] is not None]
    reals = [r["p_fake"] for r in rows if r["label"] == "real" and r["p_fake"] is not None]
    auc = np.mean([(f > r) + (f == r) / 2 for f in fakes for r in reals])
    assert result_of(tmp_path / "out")["headline"]["calibrated.auc"]["value"] == pytest.approx(auc)
    answers = result_of(tmp_path / "out")["scorers"]["calibrated"]["answers"]
    answered = [r for r in rows if r["said"] in ("fake", "real")]
    pairs = [
        (f["p_fake"] > r["p_fake"]) + (f["p_fake"] == r["p_fake"]) / 2
        for f in answered for r in answered if (f["label"], r["label"]) == ("fake", "real")
    ]  # fmt: skip
    assert len(answered) == answers["n_answered"] < 38 and answers["auc"]["value"] == pytest.approx(np.mean(pairs))
    bins = [min(int(r["p_fake"] * 15), 14) for r in answered]
    count = {label: sum(r["label"] == label for r in answered) for label in ("real", "fake")}
    gaps = [sum(((r["label"] == "fake") - r["p_fake"]) / count[r["label"]] / 2
                for r, own in zip(answered, bins, strict=True) if own == k) for k in range(15)]  # fmt: skip
    assert answers["ece"] == pytest.approx(np.abs(gaps).sum())
    alarms = np.mean([r["said"] == "fake" for r in rows if r["label"] == "real"])
    assert result_of(tmp_path / "out")["headline"]["calibrated.false_alarms"]["value"] == pytest.approx(alarms)
    (broken,) = [r for r in rows if r["error"]]
    assert broken["path"] == "p/broken.jpg" and broken["p_fake"] is None and broken["said"] is None


def test_every_face_is_counted_where_a_picture_shows_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group photo is judged by its most suspicious face: how well single faces are told apart does not show there."""

    class Group(StandIn):
        def judge(self, source: Path | bytes, rationale: bool) -> Report | Failure:
            report = super().judge(source, rationale)
            assert isinstance(report, Report)
            face = report.faces[0]
            calm = replace(face, index=1, verdict=Verdict("real", 0.05))
            return replace(report, faces=(face, calm))

    levels = {"real": (0.1, 0.3), "fake": (0.2, 0.7)}
    rows = []
    for label, pair in levels.items():
        for level in pair:
            picture(tmp_path / f"{level}.png", level)
            rows.append({"path": f"{level}.png", "label": label})
    data = write_csv(tmp_path / "m.csv", rows)
    assert bench(monkeypatch, Group(), "detect", "--data", data, "--no-equalise", "--out", tmp_path / "out") == 0
    scorer = result_of(tmp_path / "out")["scorers"]["calibrated"]
    assert scorer["overall"]["auc"]["value"] == pytest.approx(0.75)
    assert scorer["faces"]["n"] == 8 and scorer["faces"]["fake_pictures_with_several"] == 2
    higher = sum((f > r) + (f == r) / 2 for f in (0.2, 0.7, 0.05, 0.05) for r in (0.1, 0.3, 0.05, 0.05))
    assert scorer["faces"]["auc"]["value"] == pytest.approx(higher / 16)
    assert "every face" in (tmp_path / "out/result.html").read_text("utf-8")


def test_a_slice_says_whom_it_was_compared_with(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AUC 0.99 of GAN faces against film frames is not AUC against the photos that the GAN imitates."""
    words = ("detect", "--data", data, "--out", tmp_path / "out")
    bench(monkeypatch, StandIn(), *words)
    by = result_of(tmp_path / "out")["scorers"]["calibrated"]["by"]
    assert list(by["method"]) == ["blend", "gan"]
    assert (by["method"]["blend"]["against"], by["method"]["blend"]["n_real"]) == ("own reals", 12)
    assert (by["source"]["gan-faces"]["against"], by["source"]["gan-faces"]["n_real"]) == ("all reals", 24)
    assert "false_alarms" not in by["source"]["gan-faces"] and by["source"]["film"]["false_alarms"]["n"] == 12
    # A source of reals only has an AUC too.
    rows = list(csv.DictReader(data.read_text("utf-8").splitlines()))
    write_csv(data, [r for r in rows if not (r["source"] == "film" and r["label"] == "fake")])
    bench(monkeypatch, StandIn(), *words)
    film = result_of(tmp_path / "out")["scorers"]["calibrated"]["by"]["source"]["film"]
    assert film["against"] == "all fakes" and film["n_real"] == 12 and film["n_fake"] > 7 and "found" not in film
    # Manifests are sorted by label: a limit is not the head of the list.
    bench(monkeypatch, StandIn(), *words, "--limit", 20)
    counts = result_of(tmp_path / "out")["data"]
    assert counts["n"] == 20 and counts["n_fake"] > 0


def test_every_picture_reaches_the_model_in_one_format(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If fakes are PNG and reals are JPEG, a detector of JPEG gets AUC 1.0."""
    picture(tmp_path / "p/00.jpg", 0.2)
    Image.open(tmp_path / "p/01.png").resize((2000, 1000)).save(tmp_path / "p/01.png")
    detector = StandIn()
    bench(monkeypatch, detector, "detect", "--data", data, "--out", tmp_path / "out")
    tables_of = set()
    for source in detector.seen:
        assert isinstance(source, bytes)
        image = Image.open(io.BytesIO(source))
        tables_of.add((image.format, str(image.quantization)))  # type: ignore[attr-defined]
        assert max(image.size) <= 1024
    assert len(tables_of) == 1
    plain = StandIn()
    bench(monkeypatch, plain, "detect", "--data", data, "--out", tmp_path / "raw", "--no-equalise")
    assert all(isinstance(source, Path) for source in plain.seen)
    assert result_of(tmp_path / "raw")["settings"]["equalise"] is None


def test_every_picture_is_judged_under_one_change(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of unchanged pictures in the result of a change, of another one, or of reals or fakes alone."""
    words = ("detect", "--data", data, "--out", tmp_path / "out")
    assert bench(monkeypatch, StandIn(), *words) == 0
    plain = result_of(tmp_path / "out")
    shutil.copy(tmp_path / "out" / "result.json", tmp_path / "plain.json")
    assert plain["settings"]["change"] is None
    half = StandIn()
    assert bench(monkeypatch, half, *words, "--changes", "half") == 0
    assert len(half.seen) == 39  # none of the stored rows is of this change
    shown = [np.asarray(Image.open(io.BytesIO(source))) for source in half.seen if isinstance(source, bytes)]
    sizes = [picture.shape for picture in shown]
    assert sizes == [(20, 30, 3)] * 38 + [(20, 20, 3)]
    first = data.parent / "p/00.jpg"
    as_it_was = np.asarray(Image.open(io.BytesIO(scoring.equalised(first))))
    assert np.array_equal(shown[0], changes_of("half")["half"](as_it_was, "p/00.jpg"))  # as in task `experts`
    with raises("pictures_changed", "half"):
        validation(tmp_path / "out")  # error rates under a change are none of a picture as it came
    result = result_of(tmp_path / "out")
    assert result["settings"]["change"].startswith("half: half as wide") and result["failures"] == {"not_an_image": 1}
    assert result["data"] == plain["data"]  # the manifest's files are the same
    assert "Every picture was changed" in (tmp_path / "out" / "result.html").read_text("utf-8")
    assert "changed before it was judged, half: " in tables.table("detect-all", {"half": result})
    again, other = StandIn(), StandIn()
    bench(monkeypatch, again, *words, "--changes", "half")
    bench(monkeypatch, other, *words, "--changes", "codec/noise/0.2")
    assert (len(again.seen), len(other.seen)) == (1, 39)  # one, to see that the model is the same
    capsys.readouterr()
    for wrong, code, fact in (
        (("--changes", "half", "--compare", tmp_path / "plain.json"), "not_comparable", "half"),
        (("--changes", "half,quarter"), "changes_too_many", "2"),
        (("--changes", "deeperforensics/GB"), "changes_too_many", "5, such as deeperforensics/GB/1"),
        (("--changes", "hafl"), "unknown_name", "did you mean 'half'"),
    ):
        assert bench(monkeypatch, StandIn(), *words, *wrong) == 2
        assert f"error [{code}]: " in (said := capsys.readouterr().err) and fact in said
    assert bench(monkeypatch, StandIn(), "describe", *words[1:], "--changes", "half") == 2
    assert "error [changes_not_for_task]: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of hours must not start anew, and what it ends with must not depend on where it was cut off."""
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    words = ("detect", "--data", data, "--split", "val")
    bench(monkeypatch, StandIn(), *words, "--out", tmp_path / "straight")
    with pytest.raises(Killed):
        bench(monkeypatch, StandIn(stop_after=20), *words, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    second = StandIn()
    bench(monkeypatch, second, *words, "--out", tmp_path / "cut")
    assert len(second.seen) == 1 + 39 - 18  # one to see that the model is the same; three saved chunks of six stay
    straight, cut = ((tmp_path / name / "result.json").read_bytes() for name in ("straight", "cut"))
    assert straight == cut
    written = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert written == ["result.html", "result.json", "samples.parquet"]
    third = StandIn()
    bench(monkeypatch, third, *words, "--out", tmp_path / "cut")
    assert len(third.seen) == 1 and (tmp_path / "cut" / "result.json").read_bytes() == straight


def test_a_file_that_changed_is_judged_again_and_hours_are_not_thrown_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old scores under a new picture's name; an outage that stays an unreadable file; rows lost to a smaller limit."""
    words = ("detect", "--data", data, "--split", "val", "--out", tmp_path / "out")
    bench(monkeypatch, StandIn(), *words)
    rows = [r for r in csv.DictReader(data.read_text("utf-8").splitlines()) if r["split"] == "val"]
    few = StandIn()
    bench(monkeypatch, few, *words, "--limit", 5)
    assert len(few.seen) <= 2 and result_of(tmp_path / "out")["data"]["n"] == 5
    path = data.parent / rows[0]["path"]  # the first, which was asked whether the model is the same
    before = path.read_bytes()
    picture(path, 0.77)
    assert path.read_bytes() != before
    all_again = StandIn()
    bench(monkeypatch, all_again, *words)
    assert len(all_again.seen) <= 1 + 2  # to see that the model is the same, the new picture, and what failed before
    stored = {r["path"]: r for r in pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()}
    assert len(stored) == 40 and stored[rows[0]["path"]]["p_fake"] == pytest.approx(0.77, abs=0.02)
    # The one picture that --limit 1 asks for was replaced: the 39 others were gone.
    one = ("detect", "--data", data, "--out", tmp_path / "one")
    assert bench(monkeypatch, StandIn(), *one, "--limit", 1) == 0
    (chosen,) = pq.read_table(tmp_path / "one" / "samples.parquet")["path"].to_pylist()
    bench(monkeypatch, StandIn(), *one)
    picture(data.parent / chosen, 0.3)
    assert bench(monkeypatch, StandIn(), *one, "--limit", 1) == 2
    again = StandIn()
    assert bench(monkeypatch, again, *one) == 0 and len(again.seen) == 2


def test_rows_of_other_samples_are_not_thrown_away(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another split, or another manifest, with the --out of a run of hours: its rows were gone without a word."""
    rows = list(csv.DictReader(data.read_text("utf-8").splitlines()))
    for row in rows[::2]:
        row["split"] = "test"
    write_csv(data, rows)
    words = ("--data", data, "--out", tmp_path / "out")
    assert bench(monkeypatch, StandIn(), "detect", *words, "--split", "val") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    asked = StandIn()
    for model in ("embedded", "majority"):
        assert bench(monkeypatch, asked, "detect", *words, "--split", "test", "--model", model) == 2
        assert f"out holds {len(rows) // 2} rows" in (said := capsys.readouterr().err)
        assert "error [rows_of_other_samples]: " in said
    other = write_csv(data.parent / "other.csv", [row for row in rows if row["split"] == "test"])
    assert bench(monkeypatch, asked, "detect", "--data", other, "--out", tmp_path / "out") == 2
    assert not asked.seen and {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    # Nor are those of a run that was cut off.
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    cut = ("detect", "--data", data, "--out", tmp_path / "cut", "--split")
    with pytest.raises(Killed):
        bench(monkeypatch, StandIn(stop_after=8), *cut, "val")
    assert bench(monkeypatch, asked, *cut, "test") == 2
    assert "cut holds 6 rows" in capsys.readouterr().err
    # With some in common, a run goes on as before, and keeps what it was not asked for.
    assert bench(monkeypatch, asked, "detect", *words) == 0
    assert len(asked.seen) == 1 + 19  # to see that the model is the same, and those that are new and readable


@pytest.mark.slow
@pytest.mark.parametrize("other", [StandIn("w2"), StandIn("w1", shift=0.05)], ids=["hash", "score"])
def test_rows_of_another_model_are_not_used_again(
    other: StandIn, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new model's result made of the old model's scores, also when its run was cut off in between."""
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    words = ("detect", "--data", data, "--out")
    bench(monkeypatch, StandIn(), *words, tmp_path / "out")
    other.left = 1 + 10
    with pytest.raises(Killed):
        bench(monkeypatch, other, *words, tmp_path / "out")
    other.left = 1000
    bench(monkeypatch, other, *words, tmp_path / "out")
    bench(monkeypatch, other, *words, tmp_path / "fresh")
    assert (tmp_path / "out" / "result.json").read_bytes() == (tmp_path / "fresh" / "result.json").read_bytes()


def test_drift_is_an_exit_status(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A comparison that always passes guards nothing; one with other samples compares nothing."""
    words = ("detect", "--data", data, "--out", tmp_path / "out", "--compare", tmp_path / "ref.json")
    bench(monkeypatch, StandIn(), *words[:4], tmp_path / "out")
    reference = result_of(tmp_path / "out")
    (tmp_path / "ref.json").write_text(json.dumps(reference))
    assert bench(monkeypatch, StandIn(), *words) == 0
    assert "drift: none" in capsys.readouterr().out
    fewer = json.loads(json.dumps(reference))
    fewer["headline"]["calibrated.auc"]["n"] += 1  # failing on the hard pictures raises the AUC
    (moved,) = compare.drift(reference, fewer).moved
    assert "calibrated.auc" in moved
    reference["headline"]["mllm.auc"] = {"value": 0.9, "interval": [0.85, 0.95], "n": 38}
    (tmp_path / "ref.json").write_text(json.dumps(reference))
    assert bench(monkeypatch, StandIn(), *words) == 1
    assert "mllm.auc" in capsys.readouterr().out.split("drift:")[1]
    assert bench(monkeypatch, StandIn(), *words, "--limit", 30) == 2
    assert "error [not_comparable]: " in capsys.readouterr().err


def test_a_comparison_pairs_the_samples(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number within the reference's interval can still be a worse model; and pairing the wrong rows finds nothing."""

    class Other(StandIn):
        def judge(self, source: Path | bytes, rationale: bool) -> Report | Failure:
            report = super().judge(source, rationale)
            if isinstance(report, Failure) or report.verdict.p_fake is None:
                return report
            p = 0.5 + 0.3 * np.sin(20 * report.verdict.p_fake)  # another order, without ties
            return replace(report, verdict=replace(report.verdict, p_fake=float(p)))

    words = ("detect", "--data", data, "--out")
    bench(monkeypatch, StandIn(), *words, tmp_path / "ref")
    reference = tmp_path / "ref" / "result.json"
    bench(monkeypatch, Other(), *words, tmp_path / "out", "--compare", reference)
    assert "paired p_fake: difference of the AUCs: -" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    assert found["result_sha256"] == file_sha256(tmp_path / "out" / "result.json")
    assert found["reference_sha256"] == file_sha256(reference)

    # By hand: P(real below fake) for every fake and every real, in both runs (DeLong et al. 1988).
    tables_of = [
        {r["id"]: r for r in pq.read_table(tmp_path / name / "samples.parquet").to_pylist()} for name in ("out", "ref")
    ]
    ids = [i for i, r in tables_of[0].items() if r["p_fake"] is not None]
    won = []
    for table in tables_of:
        fakes = [table[i]["p_fake"] for i in ids if table[i]["label"] == "fake"]
        reals = [table[i]["p_fake"] for i in ids if table[i]["label"] == "real"]
        won.append(np.array([[(f > r) + (f == r) / 2 for r in reals] for f in fakes]))
    apart = won[0] - won[1]
    pair = found["paired"]["p_fake"]
    assert pair["n"] == len(ids) == 38 and pair["n_first_only"] == pair["n_second_only"] == 0
    assert pair["difference"]["value"] == pytest.approx(apart.mean()) and apart.mean() < -0.1
    # What did not change is told as such.
    assert found["paired"]["expert:good"]["difference"]["value"] == 0.0

    # A table that is not the reference's own, or none: the drift is told, and why there is no test.
    for spoil in (
        lambda: (tmp_path / "ref" / "samples.parquet").unlink(),
        lambda: shutil.copy(tmp_path / "third" / "samples.parquet", tmp_path / "ref"),
    ):
        bench(monkeypatch, StandIn("w2"), *words, tmp_path / "third")
        spoil()
        capsys.readouterr()
        bench(monkeypatch, Other(), *words, tmp_path / "out", "--compare", reference)
        assert "note: no paired test: " in (said := capsys.readouterr().out) and "paired p_fake" not in said
        assert json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))["paired"] == {}


def test_one_expert_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`expert:towe` must not quietly report the verdict instead, nor an expert's number as that of an MLLM."""
    words = ("detect", "--data", data, "--out", tmp_path / "out", "--model")
    assert bench(monkeypatch, StandIn(), *words, "expert:towe") == 2
    assert "did you mean 'tower'" in capsys.readouterr().err

    class One(StandIn):
        def judge(self, source: Path | bytes, rationale: bool) -> Report | Failure:
            report = super().judge(source, rationale)
            return report if isinstance(report, Failure) else replace(report, evidence=report.evidence[:1])

    monkeypatch.setattr(models, "experts_alone", lambda name: One())
    assert bench(monkeypatch, StandIn(), *words, "expert:good") == 0
    assert list(result_of(tmp_path / "out")["scorers"]) == ["expert:good"]
    assert bench(monkeypatch, StandIn(), *words, "fusion") == 0
    assert list(result_of(tmp_path / "out")["scorers"]) == ["fusion", "expert:good"]
    # Accuracy alone makes the majority class look like a model.
    assert bench(monkeypatch, StandIn(), *words, "majority") == 0
    result = result_of(tmp_path / "out")
    scorer = result["scorers"]["majority"]
    assert scorer["overall"]["auc"]["value"] == 0.5 and scorer["overall"]["at_0.5"]["accuracy"] == 0.6
    assert scorer["answers"]["balanced_accuracy"] == 0.5
    assert result["majority_from"] == "the judged samples"


def test_explanations_against_known_cues(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline stands beside the model; a template is seen as one; invented cues on real pictures are counted."""
    assert bench(monkeypatch, StandIn(), "describe", "--data", data, "--out", tmp_path / "out") == 0
    result = result_of(tmp_path / "out")
    model, majority = result["scorers"]["model"], result["scorers"]["majority"]
    assert (model["n_fake"], majority["n_fake"]) == (14, 16)  # two fakes could not be judged
    assert model["cues"]["micro"]["precision"] == 1.0 and 0 < model["cues"]["micro"]["recall"] < 1
    assert majority["cues"]["micro"]["f1"] == 1.0 and majority["invented_on_reals"]["value"] == 1.0
    assert 0 < model["invented_on_reals"]["value"] < 0.5
    assert model["distinct_texts"] < 0.2 and model["unscored"] == {"no_face": 1, "not_an_image": 1}
    assert result["majority"] == [["jaw", "blending"]]
    # What an expert pointed at stands beside the text that was written with it in view.
    pointing = result["scorers"]["expert:good"]
    assert pointing["n_fake"] == model["n_fake"] and pointing["cues"]["micro"]["precision"] == 0.5
    assert pointing["cues"]["micro"]["recall"] == model["cues"]["micro"]["recall"]
    # Agreement with an empty truth is not a zero and not a one.
    file = write_csv(tmp_path / "m.csv", [{"path": "a.png", "label": "fake"}])
    assert bench(monkeypatch, StandIn(), "describe", "--data", file, "--out", tmp_path / "none") == 2
    assert "error [nothing_to_measure]: " in capsys.readouterr().err


def test_annotations_without_cues_are_scored_as_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `eval.protocols annotations` writes was refused; and no cues known is not an F1 of 0."""
    records: list[dict[str, Any]] = []
    for i in range(8):
        picture(tmp_path / f"p/{i}.png", 0.2 + 0.08 * i)
        record = {"image": f"p/{i}.png", "label": int(i < 4), "question": "Why?"}
        records.append(record | {"answer": ["Nothing is odd.", "It is a photo."] if i < 4 else ["Its jaw is blended."]})
    told = "This image is fake: the jaw is blended."
    records += [record | {"question": "What is odd?", "answer": told} for record in records[4:]]
    (tmp_path / "a.json").write_text(json.dumps(records), "utf-8")
    read = protocols.read_annotations(tmp_path / "a.json", [tmp_path], real=["1"], fake=["0"])
    write_manifest(tmp_path / "a.jsonl", read.samples)
    compared: list[tuple[list[list[str]], list[str]]] = []

    def exact(references: list[list[str]], said: list[str], **_: Any) -> dict[str, Any]:
        compared.append((references, said))
        right = np.mean([text in own for own, text in zip(references, said, strict=True)])
        return {"rouge_l": {"value": float(right), "by": "a stand-in"}}

    monkeypatch.setattr(texts, "text_metrics", exact)
    assert bench(monkeypatch, StandIn(), "describe", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "out") == 0
    result = result_of(tmp_path / "out")
    of_template, of_model = compared
    assert of_template[0] == [["Nothing is odd.", "It is a photo."]] * 4 + [["Its jaw is blended.", told]] * 4
    assert set(of_model[1]) == {told}
    asked = {"questions": 2, "answers": 4 * 2 + 4 * 2, "commonest": {"Why?": 12, "What is odd?": 4}}
    assert result["references"]["annotations"] == asked
    assert (result["references"]["of_the_manifest"], result["references"]["written"]) == (8, 0)
    assert list(result["scorers"]) == ["template", "model"] and result["majority"] is None
    model = result["scorers"]["model"]
    assert not {"cues", "areas", "by_method", "invented_on_reals"} & model.keys()
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    assert model["text"]["n"] == sum(bool(row["rationale"]) for row in rows) > 1
    assert list(result["headline"]) == [f"{n}.{k}" for n in ("template", "model") for k in ("bleu_mean", "rouge_l")]
    rouge = result["headline"]["model.rouge_l"]
    assert (rouge["value"], rouge["interval"], rouge["n"]) == (1.0, None, model["text"]["n"])
    assert result["headline"]["model.bleu_mean"]["value"] is None  # not measured here, which is no zero
    table = tables.table("describe", {"describe": result})
    assert "answers to 2 different questions" in table and "| model | " in table and "F1" not in table

    # Beside pictures with known cues, those without are in the text metrics alone.
    cued = [replace(s, cues=(Cue("jaw", "blending"),)) if i == 7 else s for i, s in enumerate(read.samples)]
    write_manifest(tmp_path / "b.jsonl", cued)
    assert bench(monkeypatch, StandIn(), "describe", "--data", tmp_path / "b.jsonl", "--out", tmp_path / "mixed") == 0
    model = result_of(tmp_path / "mixed")["scorers"]["model"]
    assert model["n_fake"] == model["cues"]["n"] == 1 and model["text"]["n"] > 1


def test_a_clip_id_shared_by_two_clips_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`000_003` under two manipulations would merge into one clip."""
    rows = list(csv.DictReader(data.read_text("utf-8").splitlines()))
    for row in rows:
        row["video"] = row["group"] + row["method"]
    words = ("detect", "--data", data, "--out", tmp_path / "out")
    write_csv(data, [r for r in rows if r["group"]])
    assert bench(monkeypatch, StandIn(), *words) == 0
    videos = result_of(tmp_path / "out")["scorers"]["calibrated"]["videos"]
    assert videos["n"] == 38 and "stock" not in videos
    assert bench(monkeypatch, StandIn(), *words, "--compat", "clips") == 0
    stock = result_of(tmp_path / "out")["scorers"]["calibrated"]["videos"]["stock"]
    assert stock["n"] == len({Path(row["path"]).parent.name for row in rows})  # folders of one name are one clip there
    assert bench(monkeypatch, StandIn(), *words, "--compat", "clip") == 2
    rows[25]["video"] = rows[24]["video"] = "000_003"
    write_csv(data, rows)
    assert bench(monkeypatch, StandIn(), *words) == 2
    assert "error [clips_share_id]: " in (said := capsys.readouterr().err) and "'000_003'" in said


def test_it_runs_as_a_script() -> None:
    """Run from another folder, the checkout's root is not on the path by itself."""
    script = ROOT / "eval" / "run_bench.py"
    done = subprocess.run([sys.executable, script, "--list"], cwd="/", capture_output=True, text=True, check=True)
    listed = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert listed[: len(TASKS)] == list(TASKS)
    assert {"change jpeg50", "suite codec", "protocol df40-p1"} <= set(listed[len(TASKS) :])


def test_readme_tables_follow_the_results(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number in the README that was typed, or that is older than the result file."""
    bench(monkeypatch, StandIn(), "detect", "--data", data, "--out", tmp_path / "out")
    results, readme = tmp_path / "results", tmp_path / "README.md"
    results.mkdir()
    (tmp_path / "out" / "result.json").rename(results / "val.json")
    readme.write_text("# Title\n\n<!-- table:detect-all -->\n<!-- /table -->\n\nafter\n", "utf-8")
    result = json.loads((results / "val.json").read_text("utf-8"))
    result["code"] = {"commit": "c", "dirty": False}
    result["hashes"] |= {"base": "b", "adapter": "a", "calibration": "c"}
    (results / "val.json").write_text(json.dumps(result), "utf-8")

    def made(*words: str) -> tuple[int, str]:
        options = ["--pages", str(readme), "--results", str(results), *words]
        run = subprocess.run([sys.executable, "-m", "eval.tables", *options], cwd=ROOT, capture_output=True, text=True)
        return run.returncode, run.stderr

    assert made("--check")[0] == 1
    assert made() == (0, "")
    text = readme.read_text("utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\nafter\n")
    assert "| AUC | calibrated |" in text and "method blend" in text and "| fake / real | groups |" in text
    assert made("--check") == (0, "")
    readme.write_text(text.replace("0.500", "0.501", 1), "utf-8")
    assert made("--check")[0] == 1
    readme.write_text("<!-- table:detekt -->\n<!-- /table -->\n", "utf-8")
    code, said = made()
    assert code == 1 and "detekt" in said
    assert {tables.table(name, {}) for name in tables.TABLES} == {tables.NOT_MEASURED}  # not the last one, nor none


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"code": {"commit": "c", "dirty": True}}, "changes that are in no commit"),
        ({"code": None}, "from which commit"),
        ({"hashes": {"manifest": "m", "base": "b", "calibration": "c"}}, "no SHA-256 of its adapter"),
        ({"hashes": {}}, "no SHA-256 of its manifest"),
    ],
)
def test_a_result_of_unknown_origin_is_not_quoted(change: dict[str, Any], why: str) -> None:
    """Numbers of code that nobody can get, or of weights that nobody can name."""
    result = {"task": {"name": "detect"}, "model": {"name": "embedded"}, "code": {"commit": "c", "dirty": False}}
    result["hashes"] = {"manifest": "m", "base": "b", "adapter": "a", "calibration": "c"}
    assert tables.faults("val", result) == []
    assert why in "; ".join(tables.faults("val", result | change))


def test_what_lies_in_the_way_is_one_line(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table or a reference that was cut off in copying, or a folder in its place, ended in a traceback."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "samples.parquet").write_bytes(b"PAR1")
    with raises("rows_unreadable", tmp_path / "cut"):
        Store(tmp_path / "cut", {}).check([])
    for number, text in enumerate((b"{", b"[" * 5000, b'{"headline": []}', b"\xff")):
        path = tmp_path / f"{number}.json"
        path.write_bytes(text)
        with raises("not_a_result", path):
            compare.Reference.read(path)
    assert bench(monkeypatch, StandIn(), "detect", "--data", data, "--out", data) == 2
    assert bench(monkeypatch, StandIn(), "detect", "--data", data, "--out", tmp_path / "o", "--seed", "-1") == 2


def test_looks_at_a_reporting_set_are_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions 4 to 6 were compared on the very set that is reported: the best of several looks is no measurement."""
    ledger = tmp_path / "looks.jsonl"

    def look(weights: str, out: str) -> dict[str, Any]:
        words = ["detect", "--data", data, "--split", "val", "--reporting", ledger, "--out", tmp_path / out]
        assert bench(monkeypatch, StandIn(weights), *words) == 0
        return result_of(tmp_path / out)

    first, again = look("w1", "a"), look("w1", "b")
    assert first["reporting"] == again["reporting"] == {"versions": ["embedded"], "look": 1}
    assert len(ledger.read_text().splitlines()) == 1
    other = look("w2", "c")
    assert other["reporting"]["look"] == 2 and "look number 2" in (tmp_path / "c" / "result.html").read_text()
    assert "look number 2" in "; ".join(tables.faults("val", other)) and not [
        fault for fault in tables.faults("val", first) if "look" in fault
    ]
    ledger.write_text("[1]\n")
    words = ["detect", "--data", data, "--reporting", ledger, "--out", tmp_path / "d"]
    assert bench(monkeypatch, StandIn(), *words) == 2
