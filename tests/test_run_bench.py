"""The benchmark runner, with a stand-in for the model: what is counted, what is kept, and what a rerun changes."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
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
HASHES = ("manifest", "base", "adapter", "calibration")


class StandIn:
    """Calls bright pictures fake; the brighter, the surer. Its expert `half` sees nothing in very dark ones.
    `edit`: what becomes of every report."""

    def __init__(
        self,
        weights: str = "w1",
        stop_after: int = 10**6,
        shift: float = 0.0,
        edit: Callable[[Report], Report] = lambda report: report,
    ) -> None:
        self.weights, self.left, self.shift, self.edit = weights, stop_after, shift, edit
        self.seen: list[Path | bytes] = []
        self.mode, self.calibration = "calibrated", None

    def detect_many(
        self, sources: Sequence[Path | bytes], batch_size: int = 8, rationale: bool = True
    ) -> Iterator[Report | Failure]:
        for source in sources:
            if self.left == 0:
                raise Killed
            self.left -= 1
            self.seen.append(source)
            report = self.judge(source, rationale)
            yield report if isinstance(report, Failure) else self.edit(report)

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
        method = ("blend" if camera == "ffhq" else "gan") if fake else "none"
        row = {"path": name, "label": "fake" if fake else "real", "source": camera, "group": f"g{i % 24}"}
        rows.append(row | {"split": "val", "method": method, "cues": cues if fake else ""})
    for row in rows[26:38:2]:  # the GAN's fakes have a source without reals
        row["source"] = "gan-faces"
    (tmp_path / "p/broken.jpg").write_bytes(b"not a picture")
    Image.new("RGB", (40, 40), "white").save(tmp_path / "p/white.png")
    common = {"group": "", "split": "val", "method": "blend", "source": "ffhq", "cues": cues}
    rows += [{"path": f"p/{name}", "label": "fake", **common} for name in ("broken.jpg", "white.png")]
    return write_csv(tmp_path / "manifest.csv", rows)


def result_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return loaded


class Runs:
    """The command on the pictures of a manifest, with a stand-in for the model."""

    def __init__(self, data: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.folder, self._patch, self._capsys = data, data.parent, patch, capsys

    def __call__(self, detector: StandIn, *words: Any, task: str = "detect", out: str = "out") -> int:
        self._patch.setattr(x2dfd, "load", lambda *_, **__: detector, raising=False)
        given = [task, "--data", self.data, "--out", self.folder / out, *words]
        return command.main([str(word) for word in given])

    def result(self, out: str = "out") -> dict[str, Any]:
        return result_of(self.folder / out)

    def rows(self, out: str = "out") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pq.read_table(self.folder / out / "samples.parquet").to_pylist()
        return found

    def said(self) -> str:
        """On both streams, since it was last asked."""
        return "".join(self._capsys.readouterr())

    def refuse(self, code: str, *words: Any, fact: str = "", detector: StandIn | None = None, **given: str) -> None:
        """The command ends in this error, whose line holds the fact."""
        self.said()
        assert self(detector or StandIn(), *words, **given) == 2
        assert f"error [{code}]: " in (said := self.said()) and fact in said

    def manifest(self) -> list[dict[str, str]]:
        return list(csv.DictReader(self.data.read_text("utf-8").splitlines()))


@pytest.fixture
def runs(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(data, monkeypatch, capsys)


def test_one_pass_reports_all_scorers_and_counts_what_had_no_score(runs: Runs) -> None:
    """What could not be scored must be neither wrong, nor real, nor gone."""
    detector = StandIn()
    assert runs(detector, "--split", "val") == 0
    assert len(detector.seen) == 39  # every readable picture once
    result = runs.result()
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


def test_files_that_could_not_be_judged_are_told(runs: Runs) -> None:
    """Bug prevented: a headline over the files that could be read, without a word on the others; a run in which no
    file could be read counts as a success."""
    assert runs(StandIn()) == 0
    assert "1 of 40 files could not be judged: not_an_image 1" in runs.said()
    for row in runs.manifest():
        (runs.folder / row["path"]).write_bytes(b"not a picture")
    assert runs(StandIn(), out="none") == 2
    assert "40 of 40 files could not be judged: not_an_image 40" in runs.said()


def test_samples_can_be_recounted_from_the_table(runs: Runs) -> None:
    """A sceptic recomputes the numbers from the rows; the rows must be all there and not tell where they were made."""
    runs(StandIn())
    rows, result = runs.rows(), runs.result()
    assert len(rows) == 40 and str(runs.folder) not in json.dumps(rows)
    assert str(runs.folder) not in (runs.folder / "out" / "result.json").read_text()

    def share_in_order(of: list[dict[str, Any]]) -> float:
        fakes, reals = ([r["p_fake"] for r in of if r["label"] == label] for label in ("fake", "real"))
        return float(np.mean([(f > r) + (f == r) / 2 for f in fakes for r in reals]))

    scored = [r for r in rows if r["p_fake"] is not None]
    assert result["headline"]["calibrated.auc"]["value"] == pytest.approx(share_in_order(scored))
    answers = result["scorers"]["calibrated"]["answers"]
    answered = [r for r in rows if r["said"] in ("fake", "real")]
    assert len(answered) == answers["n_answered"] < 38
    assert answers["auc"]["value"] == pytest.approx(share_in_order(answered))
    bins = [min(int(r["p_fake"] * 15), 14) for r in answered]
    count = {label: sum(r["label"] == label for r in answered) for label in ("real", "fake")}
    gaps = [sum(((r["label"] == "fake") - r["p_fake"]) / count[r["label"]] / 2
                for r, own in zip(answered, bins, strict=True) if own == k) for k in range(15)]  # fmt: skip
    assert answers["ece"] == pytest.approx(np.abs(gaps).sum())
    alarms = np.mean([r["said"] == "fake" for r in rows if r["label"] == "real"])
    assert result["headline"]["calibrated.false_alarms"]["value"] == pytest.approx(alarms)
    (broken,) = [r for r in rows if r["error"]]
    assert broken["path"] == "p/broken.jpg" and broken["p_fake"] is None and broken["said"] is None


def test_every_face_is_counted_where_a_picture_shows_several(runs: Runs) -> None:
    """A group photo is judged by its most suspicious face: how well single faces are told apart does not show there."""

    def beside_a_calm_one(report: Report) -> Report:
        calm = replace(report.faces[0], index=1, verdict=Verdict("real", 0.05))
        return replace(report, faces=(*report.faces, calm))

    rows = [
        {"path": f"{level}.png", "label": "real" if level in (0.1, 0.3) else "fake"} for level in (0.1, 0.2, 0.3, 0.7)
    ]
    for row in rows:
        picture(runs.folder / row["path"], float(row["path"][:3]))
    write_csv(runs.data, rows)
    assert runs(StandIn(edit=beside_a_calm_one), "--no-equalise") == 0
    scorer = runs.result()["scorers"]["calibrated"]
    assert scorer["overall"]["auc"]["value"] == pytest.approx(0.75)
    assert scorer["faces"]["n"] == 8 and scorer["faces"]["fake_pictures_with_several"] == 2
    higher = sum((f > r) + (f == r) / 2 for f in (0.2, 0.7, 0.05, 0.05) for r in (0.1, 0.3, 0.05, 0.05))
    assert scorer["faces"]["auc"]["value"] == pytest.approx(higher / 16)
    assert "every face" in (runs.folder / "out/result.html").read_text("utf-8")


def test_a_slice_says_whom_it_was_compared_with(runs: Runs) -> None:
    """AUC 0.99 of GAN faces against film frames is not AUC against the photos that the GAN imitates."""
    runs(StandIn())
    by = runs.result()["scorers"]["calibrated"]["by"]
    assert list(by["method"]) == ["blend", "gan"]
    assert (by["method"]["blend"]["against"], by["method"]["blend"]["n_real"]) == ("own reals", 12)
    assert (by["source"]["gan-faces"]["against"], by["source"]["gan-faces"]["n_real"]) == ("all reals", 24)
    assert "false_alarms" not in by["source"]["gan-faces"] and by["source"]["film"]["false_alarms"]["n"] == 12
    # A source of reals only has an AUC too. Manifests are sorted by label: a limit is not the head of the list.
    write_csv(runs.data, [r for r in runs.manifest() if (r["source"], r["label"]) != ("film", "fake")])
    runs(StandIn(), "--limit", 30)
    result = runs.result()
    film = result["scorers"]["calibrated"]["by"]["source"]["film"]
    assert film["against"] == "all fakes" and film["n_fake"] > 0 and "found" not in film
    assert result["data"]["n"] == 30 and result["data"]["n_fake"] > 0


def test_every_picture_reaches_the_model_in_one_format(runs: Runs) -> None:
    """If fakes are PNG and reals are JPEG, a detector of JPEG gets AUC 1.0."""
    picture(runs.folder / "p/00.jpg", 0.2)
    large = runs.folder / "p/01.png"
    Image.open(large).resize((2000, 1000)).save(large)
    detector, plain = StandIn(), StandIn()
    runs(detector)
    forms = set()
    for source in detector.seen:
        assert isinstance(source, bytes)
        image = Image.open(io.BytesIO(source))
        forms.add((image.format, str(image.quantization)))  # type: ignore[attr-defined]
        assert max(image.size) <= 1024
    assert len(forms) == 1
    runs(plain, "--no-equalise", out="raw")
    assert all(isinstance(source, Path) for source in plain.seen)
    assert runs.result("raw")["settings"]["equalise"] is None


def test_every_picture_is_judged_under_one_change(runs: Runs) -> None:
    """Scores of unchanged pictures in the result of a change, of another one, or of reals or fakes alone."""
    assert runs(StandIn()) == 0
    plain = runs.result()
    reference = shutil.copy(runs.folder / "out" / "result.json", runs.folder / "plain.json")
    assert plain["settings"]["change"] is None
    half, again, other = StandIn(), StandIn(), StandIn()
    assert runs(half, "--changes", "half") == 0
    assert len(half.seen) == 39  # none of the stored rows is of this change
    shown = [np.asarray(Image.open(io.BytesIO(source))) for source in half.seen if isinstance(source, bytes)]
    assert [pixels.shape for pixels in shown] == [(20, 30, 3)] * 38 + [(20, 20, 3)]
    as_it_was = np.asarray(Image.open(io.BytesIO(scoring.equalised(runs.folder / "p/00.jpg"))))
    assert np.array_equal(shown[0], changes_of("half")["half"](as_it_was, "p/00.jpg"))  # as in task `experts`
    with raises("pictures_changed", "half"):
        validation(runs.folder / "out")  # error rates under a change are none of a picture as it came
    result = runs.result()
    assert result["settings"]["change"].startswith("half: half as wide") and result["failures"] == {"not_an_image": 1}
    assert result["data"] == plain["data"]  # the manifest's files are the same
    assert "Every picture was changed" in (runs.folder / "out" / "result.html").read_text("utf-8")
    assert "changed before it was judged, half: " in tables.table("detect", {"half": result})
    runs(again, "--changes", "half")
    runs(other, "--changes", "codec/noise/0.2")
    assert (len(again.seen), len(other.seen)) == (1, 39)  # one, to see that the model is the same
    runs.refuse("not_comparable", "--changes", "half", "--compare", reference, fact="half")
    runs.refuse("changes_too_many", "--changes", "half,quarter", fact="2")
    runs.refuse("changes_too_many", "--changes", "codec/blur", fact="5, such as codec/blur/5-0.5")
    runs.refuse("unknown_name", "--changes", "hafl", fact="did you mean 'half'")
    runs.refuse("changes_not_for_task", "--changes", "half", task="describe")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of hours must not start anew, and what it ends with must not depend on where it was cut off."""
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    runs(StandIn(), out="straight")
    with pytest.raises(Killed):
        runs(StandIn(stop_after=20), out="cut")
    assert not (runs.folder / "cut" / "result.json").exists()
    for seen in (1 + 39 - 18, 1):  # one to see that the model is the same; three saved chunks of six stay
        detector = StandIn()
        runs(detector, out="cut")
        assert len(detector.seen) == seen and runs.result("cut") == runs.result("straight")
    left = sorted(p.name for p in (runs.folder / "cut").iterdir())
    assert left == [".lock", "result.html", "result.json", "samples.parquet"]


def test_a_file_that_changed_is_judged_again_and_hours_are_not_thrown_away(runs: Runs) -> None:
    """Old scores under a new picture's name; an outage that stays an unreadable file; rows lost to a smaller limit."""
    runs(StandIn())
    few, all_again, again = StandIn(), StandIn(), StandIn()
    runs(few, "--limit", 5)
    assert len(few.seen) <= 2 and runs.result()["data"]["n"] == 5
    first = runs.manifest()[0]["path"]  # which was asked whether the model is the same
    before = (runs.folder / first).read_bytes()
    picture(runs.folder / first, 0.77)
    assert (runs.folder / first).read_bytes() != before
    runs(all_again)
    assert len(all_again.seen) <= 1 + 2  # to see that the model is the same, the new picture, and what failed before
    stored = {r["path"]: r for r in runs.rows()}
    assert len(stored) == 40 and stored[first]["p_fake"] == pytest.approx(0.77, abs=0.02)
    # The one picture that --limit 1 asks for was replaced: the 39 others were gone.
    assert runs(StandIn(), "--limit", 1, out="one") == 0
    [chosen] = runs.rows("one")
    runs(StandIn(), out="one")
    picture(runs.folder / chosen["path"], 0.3)
    runs.refuse("rows_of_other_samples", "--limit", 1, out="one", fact="holds 39 rows")
    assert runs(again, out="one") == 0 and len(again.seen) == 2


def test_rows_of_other_samples_are_not_thrown_away(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split, or another manifest, with the --out of a run of hours: its rows were gone without a word."""
    rows = runs.manifest()
    for row in rows[::2]:
        row["split"] = "test"
    write_csv(runs.data, rows)
    assert runs(StandIn(), "--split", "val") == 0
    before = {p.name: p.read_bytes() for p in (runs.folder / "out").iterdir()}
    asked = StandIn()
    for model in ("embedded", "majority"):
        fact = f"out holds {len(rows) // 2} rows"
        runs.refuse("rows_of_other_samples", "--split", "test", "--model", model, detector=asked, fact=fact)
    other = write_csv(runs.folder / "other.csv", [row for row in rows if row["split"] == "test"])
    runs.refuse("rows_of_other_samples", "--data", other, detector=asked)
    assert not asked.seen and {p.name: p.read_bytes() for p in (runs.folder / "out").iterdir()} == before
    # Nor are those of a run that was cut off.
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    with pytest.raises(Killed):
        runs(StandIn(stop_after=8), "--split", "val", out="cut")
    runs.refuse("rows_of_other_samples", "--split", "test", detector=asked, out="cut", fact="cut holds 6 rows")
    # With some in common, a run goes on as before, and keeps what it was not asked for.
    assert runs(asked) == 0
    assert len(asked.seen) == 1 + 19  # to see that the model is the same, and those that are new and readable


@pytest.mark.slow
@pytest.mark.parametrize("other", [StandIn("w2"), StandIn("w1", shift=0.05)], ids=["hash", "score"])
def test_rows_of_another_model_are_not_used_again(other: StandIn, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new model's result made of the old model's scores, also when its run was cut off in between."""
    monkeypatch.setattr("eval.rows.CHUNK", 6)
    runs(StandIn())
    other.left = 1 + 10
    with pytest.raises(Killed):
        runs(other)
    other.left = 1000
    runs(other)
    runs(other, out="fresh")
    assert runs.result() == runs.result("fresh")


def test_drift_is_an_exit_status(runs: Runs) -> None:
    """A comparison that always passes guards nothing; one with other samples compares nothing."""
    file = runs.folder / "ref.json"
    runs(StandIn())
    reference = runs.result()
    file.write_text(json.dumps(reference))
    assert runs(StandIn(), "--compare", file) == 0 and "drift: none" in runs.said()
    fewer = json.loads(json.dumps(reference))
    fewer["headline"]["calibrated.auc"]["n"] += 1  # failing on the hard pictures raises the AUC
    (moved,) = compare.drift(reference, fewer).moved
    assert "calibrated.auc" in moved
    reference["headline"]["mllm.auc"] = {"value": 0.9, "interval": [0.85, 0.95], "n": 38}
    file.write_text(json.dumps(reference))
    assert runs(StandIn(), "--compare", file) == 1 and "mllm.auc" in runs.said().split("drift:")[1]
    runs.refuse("not_comparable", "--compare", file, "--limit", 30)


def test_a_comparison_pairs_the_samples(runs: Runs) -> None:
    """A number within the reference's interval can still be a worse model; and pairing the wrong rows finds nothing."""

    def in_another_order(report: Report) -> Report:
        if report.verdict.p_fake is None:
            return report
        p = 0.5 + 0.3 * np.sin(20 * report.verdict.p_fake)  # without ties
        return replace(report, verdict=replace(report.verdict, p_fake=float(p)))

    runs(StandIn(), out="ref")
    reference = runs.folder / "ref" / "result.json"
    runs(StandIn(edit=in_another_order), "--compare", reference)
    assert "paired p_fake: difference of the AUCs: -" in runs.said()
    found = json.loads((runs.folder / "out" / "comparison.json").read_text("utf-8"))
    assert found["result_sha256"] == file_sha256(runs.folder / "out" / "result.json")
    assert found["reference_sha256"] == file_sha256(reference)
    # By hand: P(real below fake) for every fake and every real, in both runs (DeLong et al. 1988).
    ours, theirs = ({r["id"]: r for r in runs.rows(name)} for name in ("out", "ref"))
    ids = [i for i, r in ours.items() if r["p_fake"] is not None]
    won = []
    for judged in (ours, theirs):
        fakes, reals = ([judged[i]["p_fake"] for i in ids if judged[i]["label"] == label] for label in ("fake", "real"))
        won.append(np.array([[(f > r) + (f == r) / 2 for r in reals] for f in fakes]))
    apart = (won[0] - won[1]).mean()
    pair = found["paired"]["p_fake"]
    assert pair["n"] == len(ids) == 38 and pair["n_first_only"] == pair["n_second_only"] == 0
    assert pair["difference"]["value"] == pytest.approx(apart) and apart < -0.1
    assert found["paired"]["expert:good"]["difference"]["value"] == 0.0  # what did not change is told as such
    # A table that is not the reference's own, or none: the drift is told, and why there is no test.
    runs(StandIn("w2"), out="third")
    table = runs.folder / "ref" / "samples.parquet"
    for spoil in (table.unlink, lambda: shutil.copy(runs.folder / "third" / "samples.parquet", table)):
        spoil()
        runs.said()
        runs(StandIn(edit=in_another_order), "--compare", reference)
        assert "note: no paired test: " in (said := runs.said()) and "paired p_fake" not in said
        assert json.loads((runs.folder / "out" / "comparison.json").read_text("utf-8"))["paired"] == {}


def test_one_expert_alone(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """`expert:towe` must not quietly report the verdict instead, nor an expert's number as that of an MLLM."""
    runs.refuse("unknown_name", "--model", "expert:towe", fact="did you mean 'tower'")

    one = StandIn(edit=lambda report: replace(report, evidence=report.evidence[:1]))
    monkeypatch.setattr(models, "experts_alone", lambda name: one)
    assert runs(StandIn(), "--model", "expert:good") == 0
    assert list(runs.result()["scorers"]) == ["expert:good"]
    assert runs(StandIn(), "--model", "fusion") == 0
    assert list(runs.result()["scorers"]) == ["fusion", "expert:good"]
    # Accuracy alone makes the majority class look like a model.
    assert runs(StandIn(), "--model", "majority") == 0
    result = runs.result()
    scorer = result["scorers"]["majority"]
    assert scorer["overall"]["auc"]["value"] == 0.5 and scorer["overall"]["at_0.5"]["accuracy"] == 0.6
    assert scorer["answers"]["balanced_accuracy"] == 0.5
    assert result["majority_from"] == "the judged samples"


def test_explanations_against_known_cues(runs: Runs) -> None:
    """The baseline stands beside the model; a template is seen as one; invented cues on real pictures are counted."""
    assert runs(StandIn(), task="describe") == 0
    result = runs.result()
    model, majority = result["scorers"]["model"], result["scorers"]["majority"]
    assert (model["n_fake"], majority["n_fake"]) == (14, 16)  # two fakes could not be judged
    assert model["cues"]["micro"]["precision"] == 1.0 and 0 < model["cues"]["micro"]["recall"] < 1
    assert majority["cues"]["micro"]["f1"] == 1.0 and majority["invented_on_reals"]["value"] == 1.0
    assert 0 < model["invented_on_reals"]["value"] < 0.5
    assert model["distinct_texts"] < 0.2 and model["unscored"] == {"no_face": 1, "not_an_image": 1}
    assert result["majority"] == [["jaw", "blending"]]
    table = tables.table("describe", {"describe": result})
    assert "| majority | " in table and "| template | " in table and "| model, blend | " in table
    assert "majority, " not in table and "template, " not in table
    scorers = result["scorers"] | {"template": majority}
    alike = tables.table("describe", {"describe": result | {"scorers": scorers}})
    assert "| majority = template | " in alike and "| template | " not in alike
    f1 = tables.shown(model["areas"]["micro_f1"])
    assert f"the area F1 of the texts (`model`) is {f1}, that of `expert:good` alone " in table
    # What an expert pointed at stands beside the text that was written with it in view.
    pointing = result["scorers"]["expert:good"]
    assert pointing["n_fake"] == model["n_fake"] and pointing["cues"]["micro"]["precision"] == 0.5
    assert pointing["cues"]["micro"]["recall"] == model["cues"]["micro"]["recall"]
    # Agreement with an empty truth is not a zero and not a one.
    write_csv(runs.data, [{"path": "a.png", "label": "fake"}])
    runs.refuse("nothing_to_measure", task="describe", out="none")


def test_annotations_without_cues_are_scored_as_texts(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `eval.protocols annotations` writes was refused; and no cues known is not an F1 of 0."""
    records: list[dict[str, Any]] = []
    for i in range(8):
        picture(runs.folder / f"p/{i}.png", 0.2 + 0.08 * i)
        record = {"image": f"p/{i}.png", "label": int(i < 4), "question": "Why?"}
        records.append(record | {"answer": ["Nothing is odd.", "It is a photo."] if i < 4 else ["Its jaw is blended."]})
    told = "This image is fake: the jaw is blended."
    records += [record | {"question": "What is odd?", "answer": told} for record in records[4:]]
    (runs.folder / "a.json").write_text(json.dumps(records), "utf-8")
    read = protocols.read_annotations(runs.folder / "a.json", [runs.folder], real=["1"], fake=["0"])
    runs.data = runs.folder / "a.jsonl"
    write_manifest(runs.data, read.samples)
    compared: list[tuple[list[list[str]], list[str]]] = []

    def exact(references: list[list[str]], said: list[str], **_: Any) -> dict[str, Any]:
        compared.append((references, said))
        right = np.mean([text in own for own, text in zip(references, said, strict=True)])
        return {"rouge_l": {"value": float(right), "by": "a stand-in"}}

    monkeypatch.setattr(texts, "text_metrics", exact)
    assert runs(StandIn(), task="describe") == 0
    result = runs.result()
    of_template, of_model = compared
    assert of_template[0] == [["Nothing is odd.", "It is a photo."]] * 4 + [["Its jaw is blended.", told]] * 4
    assert set(of_model[1]) == {told}
    asked = {"questions": 2, "answers": 4 * 2 + 4 * 2, "commonest": {"Why?": 12, "What is odd?": 4}}
    assert result["references"]["annotations"] == asked
    assert (result["references"]["of_the_manifest"], result["references"]["written"]) == (8, 0)
    assert list(result["scorers"]) == ["template", "model"] and result["majority"] is None
    model = result["scorers"]["model"]
    assert not {"cues", "areas", "by_method", "invented_on_reals"} & model.keys()
    assert model["text"]["n"] == sum(bool(row["rationale"]) for row in runs.rows()) > 1
    assert list(result["headline"]) == [f"{n}.{k}" for n in ("template", "model") for k in ("bleu_mean", "rouge_l")]
    rouge = result["headline"]["model.rouge_l"]
    assert (rouge["value"], rouge["interval"], rouge["n"]) == (1.0, None, model["text"]["n"])
    assert result["headline"]["model.bleu_mean"]["value"] is None  # not measured here, which is no zero
    table = tables.table("describe", {"describe": result})
    assert "answers to 2 different questions" in table and "| model | " in table and "F1" not in table
    # Beside pictures with known cues, those without are in the text metrics alone.
    cued = [replace(s, cues=(Cue("jaw", "blending"),)) if i == 7 else s for i, s in enumerate(read.samples)]
    write_manifest(runs.data, cued)
    assert runs(StandIn(), task="describe", out="mixed") == 0
    model = runs.result("mixed")["scorers"]["model"]
    assert model["n_fake"] == model["cues"]["n"] == 1 and model["text"]["n"] > 1


def test_a_clip_id_shared_by_two_clips_is_refused(runs: Runs) -> None:
    """`000_003` under two manipulations would merge into one clip."""
    rows = runs.manifest()
    for row in rows:
        row["video"] = row["group"] + row["method"]
    write_csv(runs.data, [r for r in rows if r["group"]])
    assert runs(StandIn()) == 0
    videos = runs.result()["scorers"]["calibrated"]["videos"]
    assert videos["n"] == 38 and "stock" not in videos
    assert runs(StandIn(), "--compat", "clips") == 0
    stock = runs.result()["scorers"]["calibrated"]["videos"]["stock"]
    assert stock["n"] == len({Path(row["path"]).parent.name for row in rows})  # folders of one name are one clip there
    runs.refuse("unknown_name", "--compat", "clip")
    rows[25]["video"] = rows[24]["video"] = "000_003"
    write_csv(runs.data, rows)
    runs.refuse("clips_share_id", fact="'000_003'")


def test_it_runs_as_a_script() -> None:
    """Run from another folder, the checkout's root is not on the path by itself."""
    script = ROOT / "eval" / "run_bench.py"
    done = subprocess.run([sys.executable, script, "--list"], cwd="/", capture_output=True, text=True, check=True)
    listed = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert listed[: len(TASKS)] == list(TASKS)
    assert {"change jpeg50", "suite codec", "protocol df40-p1"} <= set(listed[len(TASKS) :])


def test_readme_tables_follow_the_results(runs: Runs) -> None:
    """A number in the README that was typed, or that is older than the result file."""
    runs(StandIn())
    results, readme = runs.folder / "results", runs.folder / "README.md"
    results.mkdir()
    readme.write_text("# Title\n\n<!-- table:detect -->\n<!-- /table -->\n\nafter\n", "utf-8")
    result = runs.result()
    result["code"] = {"commit": "c", "dirty": False}
    result["hashes"] |= dict.fromkeys(HASHES, "a")
    (results / "val.json").write_text(json.dumps(result), "utf-8")
    # not the last one, nor none
    assert {tables.table(name, {}) for name in ("summary", *tables.TABLES)} == {tables.NOT_MEASURED}

    def differs() -> bool:
        try:
            tables.main(True, [readme], results)
        except typer.Exit as end:
            return end.exit_code == 1
        return False

    assert differs()
    tables.main(False, [readme], results)
    text = readme.read_text("utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\nafter\n")
    assert "| AUC | calibrated = expert:good | mllm |" in text  # equal figures stand once
    assert " | fakes called fake | photos called fake | fake / real | groups |" in text
    assert "method blend" in text
    assert not differs()
    readme.write_text(text.replace("0.500", "0.501", 1), "utf-8")
    assert differs()
    readme.write_text("<!-- table:detekt -->\n<!-- /table -->\n", "utf-8")
    with raises("table_unknown", "detekt"):
        tables.main(False, [readme], results)


def test_the_tables_say_what_was_called_fake_and_what_real(runs: Runs) -> None:
    """A low AUC of one set beside a high one of another; a user who trusts "likely real" of a fake that was missed."""
    runs(StandIn(shift=-0.15), "--limit", 38, "--seed", 3, "--by", "source,method,split", "--dtype", "fp32")
    result, rows = runs.result(), [row for row in runs.rows() if row["said"]]
    label = {row["path"]: row for row in runs.manifest()}
    said: dict[str, list[str]] = {"fake": [], "real": []}
    of_gan = []
    for row in rows:
        about = label[f"p/{Path(row['path']).name}"]
        said[about["label"]].append(row["said"])
        of_gan += [row["said"]] if about["method"] == "gan" else []
    page = tables.table("detect", {"val": result})
    options = "--limit 38 --seed 3 --by source,method,split --out DIR`"
    assert f"run_bench.py detect --data MANIFEST --dtype fp32 {options}" in page
    older = result | {"settings": {name: v for name, v in result["settings"].items() if name != "options"}}
    assert f"run_bench.py detect --data MANIFEST {options}" in tables.table("detect", {"val": older})
    assert f"{result['data']['n']} pictures that `--limit 38` drew from manifest" in page
    found = f"{said['fake'].count('fake')} of {len(said['fake'])}"
    assert f" | {found}, " in page.split("**all**")[1].splitlines()[0]
    assert f" | {of_gan.count('fake')} of {len(of_gan)}, " in page.split("method gan")[1].splitlines()[0]
    real = f"{said['real'].count('real')} of {len(said['real'])}"
    assert f"Photos called real: {real}, " in page
    summary = tables.table("summary", {"detect": result})
    assert f"called fake | {100 * said['fake'].count('fake') / len(said['fake']):.1f} %" in summary and found in summary
    missed, right = (said[name].count("real") / len(said[name]) for name in ("fake", "real"))
    [doubt] = [line for line in summary.splitlines() if "likely real" in line]
    assert (
        missed and f"| {100 * missed / (missed + right):.1f} %" in doubt and f"and {real} photos called real |" in doubt
    )


def test_a_result_of_unknown_origin_is_not_quoted() -> None:
    """Numbers of code that nobody can get, or of weights that nobody can name."""
    result: dict[str, Any] = {"task": {"name": "detect"}, "model": {"name": "embedded"}}
    result |= {"code": {"commit": "c", "dirty": False}, "hashes": dict.fromkeys(HASHES, "a")}
    assert tables.faults("val", result) == []
    for change, why in (
        ({"code": {"commit": "c", "dirty": True}}, "changes that are in no commit"),
        ({"code": None}, "from which commit"),
        ({"hashes": {"manifest": "m", "base": "b", "calibration": "c"}}, "no SHA-256 of its adapter"),
        ({"hashes": {}}, "no SHA-256 of its manifest"),
    ):
        assert why in "; ".join(tables.faults("val", result | change))


def test_what_lies_in_the_way_is_one_line(runs: Runs) -> None:
    """A table or a reference that was cut off in copying, or a folder in its place, ended in a traceback."""
    cut, file = runs.folder / "cut", runs.folder / "reference.json"
    cut.mkdir()
    (cut / "samples.parquet").write_bytes(b"PAR1")
    with raises("rows_unreadable", cut):
        Store(cut, {}).check([])
    for text in (b"{", b"[" * 5000, b'{"headline": []}', b"\xff"):
        file.write_bytes(text)
        with raises("not_a_result", file):
            compare.Reference.read(file)
    assert runs(StandIn(), out=runs.data.name) == 2
    assert runs(StandIn(), "--seed", "-1") == 2


def test_a_validation_needs_a_whole_result(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a KeyError for a result of another version, which lacks what is read last."""
    monkeypatch.setattr("eval.validation.MIN_GROUPS", 2)
    assert runs(StandIn()) == 0
    whole, file = runs.result(), runs.folder / "out" / "result.json"
    for key in ("settings", "scorers", "model", "data", "task"):
        without = {k: v for k, v in whole.items() if k != key}
        for changed in (without, without | {key: []}, without | {key: None}):
            file.write_text(json.dumps(changed))
            with raises("not_a_finished_run", runs.folder / "out"):
                validation(runs.folder / "out")


def test_looks_at_a_reporting_set_are_counted(runs: Runs) -> None:
    """Versions 4 to 6 were compared on the very set that is reported: the best of several looks is no measurement."""
    ledger = runs.folder / "looks.jsonl"

    def look(weights: str, out: str) -> dict[str, Any]:
        assert runs(StandIn(weights), "--split", "val", "--reporting", ledger, out=out) == 0
        return runs.result(out)

    first, again = look("w1", "a"), look("w1", "b")
    assert first["reporting"] == again["reporting"] == {"versions": ["embedded"], "look": 1}
    assert len(ledger.read_text().splitlines()) == 1
    other = look("w2", "c")
    assert other["reporting"]["look"] == 2 and "look number 2" in (runs.folder / "c" / "result.html").read_text()
    assert "look number 2" in "; ".join(tables.faults("val", other))
    assert "look" not in "; ".join(tables.faults("val", first))
    ledger.write_text("[1]\n")
    runs.refuse("ledger_unusable", "--reporting", ledger, out="d")
