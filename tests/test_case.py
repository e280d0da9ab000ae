"""The case record and `x2dfd verify`: an honest record holds, and each way of changing it is found."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

import x2dfd
from tests import tiny
from tests.raising import raises
from x2dfd import case, cli
from x2dfd.adapter import EMBEDDED, expert_hashes, read_adapter_card
from x2dfd.calibration import Calibration
from x2dfd.detector import Detector
from x2dfd.errors import SetupError
from x2dfd.loading import load
from x2dfd.model_spec import ModelSpec
from x2dfd.types import MAX_FRAMES, Report
from x2dfd.validation import Validation

Record = dict[str, Any]


pytestmark = pytest.mark.usefixtures("known_expert")


@pytest.fixture(scope="module")
def folders(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The base, and a copy of the adapter with a validation run."""
    adapter = Path(shutil.copytree(folders[1], tmp_path_factory.mktemp("models") / "adapter"))
    validation_of(adapter).save(adapter)
    return folders[0], adapter


def validation_of(adapter: Path) -> Validation:
    card, calibration = read_adapter_card(adapter), Calibration.load(adapter)
    experts = {name: f"{tiny.Brightness.card.version} {sha}" for name, sha in card.experts.items()}
    rate = {"value": 0.02, "interval": [0.0, 0.05], "n": 50}
    return Validation(
        run="detect, manifest abc", manifest_sha256="a" * 64,
        model={"adapter_sha256": card.sha256, "experts": experts, "band": [calibration.low, calibration.high],
               "prompt_sha256": card.prompt_sha256},
        n_real=50, n_fake=60, n_groups=40, methods=("swap",), sources=("film",),
        rates={"false_alarms": rate, "misses": rate, "answered": {"value": 0.5, "n": 110}, "auc": rate}, cllr=0.6,
        steps=((0.0, 0.05, 0.02, 0.1), (0.4, 1.5, 0.8, 2.5), (0.8, 30.0, 9.0, 60.0)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def detector(folders: tuple[Path, Path], known_expert: None) -> Detector:
    return load(f"hub:{folders[0]}+{folders[1]}")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "face.jpg"
    Image.fromarray(skimage.data.astronaut()).save(path, quality=95)
    return path


@pytest.fixture(scope="module")
def report(detector: Detector, photo: Path) -> Report:
    return detector.detect(photo)


@pytest.fixture
def made(report: Report) -> Record:
    record: Record = json.loads(case.dumps([report]))
    return record


def changed(made: Record, change: Callable[[Record], None], *, sealed: bool) -> Record:
    other = copy.deepcopy(made)
    change(other)
    return other | {"seal": case.seal(other)} if sealed else other


def test_an_honest_record_holds_and_holds_for_a_copy(
    made: Record, photo: Path, detector: Detector, tmp_path: Path
) -> None:
    """A check that fails where nothing was touched is switched off by its users: path, times and batch may
    differ. A record that is passed on names no folder; older ones, which do, still hold."""
    holds = case.Verification("holds", (), ())
    assert case.verify(made, photo, detector) == holds
    assert made["reports"][0]["path"] == photo.name and str(photo.parent) not in json.dumps(made)
    assert case.verify(changed(made, _set("path", value=str(photo)), sealed=True), photo, detector) == holds
    assert made["reports"][0]["model"]["weights"] == detector.info.weights
    copied = tmp_path / "another name.jpg"
    shutil.copyfile(photo, copied)
    older = changed(made, lambda m: m["reports"][0]["versions"].update(torch="1.0"), sealed=True)
    found = case.verify(older, copied, detector)
    assert found.outcome == "holds" and "1.0" in found.notes[0]
    copied.write_bytes(photo.read_bytes() + b"\0")  # now it is another file
    found = case.verify(made, copied, detector)
    assert found.outcome == "other_file" and made["reports"][0]["sha256"][:12] in found.differences[0]
    many = changed(made, lambda m: m.update(reports=19 * m["reports"]), sealed=True)
    assert "and 16 more" in case.verify(many, copied, detector).differences[0]
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("a letter")
    broken = json.loads(case.dumps([next(detector.detect_many([tmp_path / "a.jpg"]))]))
    assert case.verify(broken, tmp_path / "b.jpg", detector).outcome == "holds"
    with raises("picture_unreadable", "c.jpg"):  # a wrong path said as "the record does not hold" accuses
        case.verify(broken, tmp_path / "c.jpg", detector)


def _set(*keys: Any, value: Any) -> Callable[[Record], None]:
    def change(made: Record) -> None:
        at: Any = made["reports"][0]
        for key in keys[:-1]:
            at = at[key]
        at[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named", "outcome"),
    [
        (_set("verdict", "label", value="real"), "verdict.label", "differs"),
        (_set("verdict", "reason", value="in_band"), "verdict.reason", "differs"),
        (_set("faces", 0, "verdict", "p_fake", value=0.01), "faces[0].verdict.p_fake", "differs"),
        (_set("faces", 0, "evidence", 0, "score", value=0.0), "faces[0].evidence[0].score", "differs"),
        (_set("faces", 0, "rationale", value="It is real."), "faces[0].rationale", "differs"),
        (_set("likelihood_ratio", "value", value=400.0), "likelihood_ratio.value", "differs"),
        (_set("model", "validation", "rates", "false_alarms", "value", value=0.0), "false_alarms.value", "differs"),
        (_set("model", "weights", "mllm", value=0.0), "model.weights", "differs"),
        (_set("model", "band", value=[0.2, 0.6]), "model.band[0]", "differs"),
        (_set("provenance", "state", value="trusted"), "provenance", "differs"),
        (_set("media", "exif", value={"make": "Nikon"}), "media.exif", "differs"),
        (_set("faces", value=[]), "faces", "differs"),
        (_set("sha256", value="0" * 64), "0" * 12, "other_file"),
        (lambda m: m.update(conclusion="authentic"), "conclusion", "differs"),
        (lambda m: m["cards"].update(ghost=m["cards"][tiny.EXPERT]), "cards.ghost", "differs"),
        (lambda m: m["cards"].pop(tiny.EXPERT), f"cards.{tiny.EXPERT}", "differs"),
        (lambda m: m["cards"][tiny.EXPERT].update(sha256="0" * 64), "sha256", "differs"),
        (lambda m: m["cards"][tiny.EXPERT].update(blind_spot=""), "blind_spot", "other_version"),
        (lambda m: m.update(statement="This is proof."), "statement", "other_version"),
        (lambda m: m["limits"].pop("Only faces"), "limits.Only faces", "other_version"),
        (_set("warnings", value=["none"]), "warnings", "other_version"),
        (_set("evidence", 0, "note", value="sure"), "evidence[0].note", "other_version"),
    ],
)
def test_no_part_of_a_record_can_be_changed_unseen_even_under_a_new_seal(
    change: Callable[[Record], None], named: str, outcome: str, made: Record, photo: Path, detector: Detector,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A hash over the record stops nobody who can compute one: what counts is that judging anew gives the same; nor may
    a record without its limits, or with "this is proof" in it, be confirmed."""
    monkeypatch.setattr("x2dfd.intake.read_provenance", lambda source, format: {"state": "absent"})
    made = changed(made, _set("provenance", value={"state": "absent"}), sealed=True)
    assert case.verify(made, photo, detector).outcome == "holds"
    found = case.verify(changed(made, change, sealed=True), photo, detector)
    assert found.outcome == outcome and any(named in line for line in found.differences), found
    assert not any("seal" in line for line in found.differences)
    unsealed = case.verify(changed(made, change, sealed=False), photo, detector)
    assert unsealed.outcome == "differs" and "seal" in unsealed.differences[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter_sha256", "0" * 64), ("calibration_sha256", "0" * 64), ("validation_sha256", None),
        ("in_prompt", []), ("served", {"host": "h", "model": "m"}), ("runs_on", "cuda bf16"),
    ],
)  # fmt: skip
def test_another_model_is_no_proof_of_tampering(
    key: str, value: Any, made: Record, photo: Path, detector: Detector
) -> None:
    """An updated model gives other numbers; calling that a forged record would accuse an honest office."""
    old = changed(made, _set("model", key, value=value), sealed=True)
    found = case.verify(old, photo, detector)
    assert found.outcome == "other_version" and any(key in line for line in found.differences), found
    assert case.verify({**old, "seal": "0" * 64}, photo, detector).outcome == "differs"


def test_each_report_about_a_file_counts(made: Record, photo: Path, detector: Detector) -> None:
    """Bug prevented: a second report about the same file says "real", and the record holds by the first. A run over
    copies of a file is honest."""
    doubled = changed(made, lambda m: m["reports"].append(m["reports"][0] | {"path": "copy.jpg"}), sealed=True)
    assert case.verify(doubled, photo, detector).outcome == "holds"
    real = doubled["reports"][0]["verdict"] | {"label": "real", "p_fake": 0.01}
    lied = changed(doubled, lambda m: m["reports"][1].update(verdict=real), sealed=True)
    found = case.verify(lied, photo, detector)
    assert found.outcome == "differs" and any("verdict.label" in line for line in found.differences)
    size = changed(made, lambda m: m["reports"][0]["media"].update(bytes=photo.stat().st_size + 100), sealed=True)
    assert case.verify(size, photo, detector).outcome == "differs"


def test_reports_about_other_files_are_named_as_unchecked(
    made: Record, photo: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: "the record holds" is said of a record in which the report about another file was falsified."""
    lied = made["reports"][0] | {"sha256": "0" * 64, "verdict": {"label": "real", "p_fake": 0.01}}
    two = changed(made, lambda m: m["reports"].append(lied), sealed=True)
    assert case.verify(two, photo, detector) == case.Verification("holds", (), (), unchecked=1)
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: detector)
    (tmp_path / "two.case.json").write_text(json.dumps(two))
    for options, told in (([], "not checked: 1 of"), (["--json"], '"unchecked": 1')):
        ran = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "two.case.json"), str(photo), *options])
        assert ran.exit_code == 0 and told in ran.stdout


def test_no_clip_is_judged_on_more_frames_than_verify_takes(photo: Path, detector: Detector) -> None:
    """Bug prevented: `detect --frames 1001` makes a record that `verify` judges on 32 frames and calls false."""
    assert case._frames_stated({"media": {"kind": "video", "frames_asked": MAX_FRAMES}}) == MAX_FRAMES
    assert case._frames_stated({"media": {"kind": "video", "frames_asked": MAX_FRAMES + 1}}) is None
    ran = CliRunner().invoke(cli.app, ["detect", str(photo), "--frames", str(MAX_FRAMES + 1)])
    assert ran.exit_code == 2 and str(MAX_FRAMES) in ran.stderr
    with pytest.raises(ValueError, match=str(MAX_FRAMES)):
        detector.detect(photo, frames=MAX_FRAMES + 1)
    with pytest.raises(ValueError, match=str(MAX_FRAMES)):
        next(iter(detector.detect_many([photo], frames=MAX_FRAMES + 1)))


def test_what_the_file_states_is_part_of_the_record(made: Record, tmp_path: Path, detector: Detector) -> None:
    """Bug prevented: a record whose author cut out "made with a generator" holds."""
    assert made["reports"][0]["provenance"]["statements"] == []
    info = PngInfo()
    info.add_text("Software", "NovelAI")
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "made.png", pnginfo=info)
    honest: Record = json.loads(case.dumps([detector.detect(tmp_path / "made.png")]))
    assert len(honest["reports"][0]["provenance"]["statements"]) == 1
    assert case.verify(honest, tmp_path / "made.png", detector).outcome == "holds"
    cut = changed(honest, _set("provenance", "statements", value=[]), sealed=True)
    assert case.verify(cut, tmp_path / "made.png", detector).outcome == "differs"
    unlisted = changed(honest, lambda m: m["reports"][0]["provenance"].pop("statements"), sealed=True)
    assert case.verify(unlisted, tmp_path / "made.png", detector).outcome == "differs"
    unchecked = changed(cut, _set("provenance", "state", value="not_checked"), sealed=True)
    assert case.verify(unchecked, tmp_path / "made.png", detector).outcome == "differs"


def test_a_record_of_other_shapes_is_one_line(tmp_path: Path, made: Record) -> None:
    """Bug prevented: a record from elsewhere ends `verify` with a traceback."""
    shapes: Any = (("cards", []), ("reports", [[]]), ("reports", [{"model": 3}]), ("reports", {}), ("seal", 3))
    for text in (
        "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": "a", "format": "b"}', "[]", "null", "{}",
        "\xff" * 9000, *(json.dumps(made | {key: value}) for key, value in shapes),
    ):  # fmt: skip
        (tmp_path / "a.case.json").write_text(text, "latin-1")
        with raises("not_a_case_record", "a.case.json") as caught:
            case.read(tmp_path / "a.case.json")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    (tmp_path / "a.html").write_text("<!doctype html>")
    with raises("not_a_case_record", "NAME.case.json") as caught:  # the page is what people have open
        case.read(tmp_path / "a.html")
    assert "not JSON" in str(caught.value) and "char" not in str(caught.value)
    with raises("modes_mixed"):
        case.mode_stated(changed(made, _set("model", "mode", value=["paper"]), sealed=True))


def test_what_changed_here_is_told_from_what_changed_in_the_record(
    made: Record, photo: Path, detector: Detector, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration, a validation run or a text made anew since then does not make the record's author a forger."""

    def like(calibration: Calibration | None = None, validation: Validation | None = None, **facts: Any) -> Detector:
        return Detector(
            detector.mllm, detector.experts, calibration or detector.calibration, replace(detector.info, **facts),
            validation=validation or detector.validation,
        )  # fmt: skip

    assert detector.calibration is not None
    refitted = like(calibration=replace(detector.calibration, low=0.2))
    validated = like(validation=replace(validation_of(folders[1]), cllr=0.7))
    for other, named in ((refitted, "calibration_sha256"), (validated, "validation_sha256")):
        found = case.verify(made, photo, other)
        assert found.outcome == "other_version" and named in found.differences[0]
    reworded = replace(tiny.Brightness.card, blind_spot="anything but brightness")
    monkeypatch.setattr(case, "cards", lambda _: {tiny.EXPERT: reworded})
    found = case.verify(made, photo, like(blind_spot="nothing"))
    assert found.outcome == "other_version" and len(found.differences) == 2
    assert f"cards.{tiny.EXPERT}.blind_spot" in found.differences[0] and "model.blind_spot" in found.differences[1]
    lied = changed(made, _set("verdict", "label", value="real"), sealed=True)
    assert case.verify(lied, photo, detector).outcome == "differs"


def test_the_command_computes_as_the_record_says_and_has_an_exit_code_for_each_outcome(
    made: Record, photo: Path, detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script has to tell "forged" from "cannot be checked here" and from "no such file"; a record of a GPU in bf16
    checked in fp32, or one of a served model checked locally, can only fail; a record of a model of one's own, checked
    without it, seems forged."""
    asked: list[dict[str, Any]] = []

    def load(model: ModelSpec, **options: Any) -> Detector:
        asked.append({k: v for k, v in ({"model": model} | options).items() if v is not None})
        return detector

    monkeypatch.setattr(x2dfd, "load", load)
    path, there = tmp_path / "a.case.json", "x2dfd@http://localhost:8000/v1+DIR"

    def verify(record: Any, *options: str, of: Path = photo) -> Any:
        path.write_text(json.dumps(record))
        return CliRunner().invoke(cli.app, ["verify", str(path), str(of), "--json", *options])

    old = changed(made, _set("model", "adapter_sha256", value="0" * 64), sealed=True)
    lied = changed(made, _set("verdict", "label", value="real"), sealed=True)
    for record, code in ((made, 0), (lied, 3), (old, 4), ({"format": "x"}, 1)):
        ran = verify(record)
        assert ran.exit_code == code, ran.output
        if code in case.EXIT_CODES.values():
            assert case.EXIT_CODES[json.loads(ran.stdout)["outcome"]] == code
    assert verify(made, of=tmp_path / "none.jpg").exit_code == 1
    path.write_text(json.dumps(old))
    for own, told in (([], True), (["--model", "DIR"], False)):
        words = CliRunner().invoke(cli.app, ["verify", str(path), str(photo), *own]).stdout
        assert words.startswith("CANNOT BE CONFIRMED") and ("name it: --model DIR" in words) is told
    copied = tmp_path / "other.jpg"
    copied.write_bytes(photo.read_bytes() + b"\0")  # "the record does not hold" would accuse who took the wrong file
    ran = verify(made, of=copied)
    assert (ran.exit_code, json.loads(ran.stdout)["outcome"]) == (5, "other_file")
    unsealed = verify(changed(made, lambda m: m.update(made="today"), sealed=False), of=copied)
    assert unsealed.exit_code == 3 and len(json.loads(unsealed.stdout)["differences"]) == 2
    on_gpu = changed(made, _set("model", "runs_on", value="cuda bf16"), sealed=True)
    plain = {"model": ModelSpec(), "mode": "calibrated"}
    for options, wanted in (
        ((), {"dtype": "bf16"}), (("--device", "cuda:1", "--dtype", "fp16"), {"device": "cuda:1", "dtype": "fp16"}),
        (("--model", there), {"model": ModelSpec.parse(there)}),
    ):  # fmt: skip
        assert verify(on_gpu, *options).exit_code == 4 and asked[-1] == plain | wanted
    in_bytes = changed(made, _set("model", "runs_on", value="cpu int8, ranges 01234567"), sealed=True)
    assert verify(in_bytes).exit_code == 4 and asked[-1] == plain | {"dtype": "int8"}


@pytest.mark.slow
def test_detect_writes_page_and_record_and_a_later_explanation_agrees(
    report: Report, detector: Detector, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record beside the page is what can be checked later; without a printer a PDF is refused before the work; an
    explanation that follows the app's verdict must be the record's, and move nothing."""
    heard: list[str] = []
    quick = detector.detect(photo, rationale=False)
    later = detector.explain(quick, photo, on_text=heard.append)
    assert later.faces == report.faces and later.rationale == report.rationale
    assert (later.verdict, later.evidence, later.cues) == (report.verdict, report.evidence, report.cues)
    assert len(heard) > 1  # as the model writes it; what a person reads in the end is mended
    with raises("other_picture"):
        detector.explain(replace(quick, sha256="0"), photo)
    monkeypatch.setattr(x2dfd, "load", lambda *_, **__: detector)
    ran = CliRunner().invoke(cli.app, ["detect", str(photo), "--report", str(tmp_path / "face.html")])
    assert ran.exit_code == 0, ran.output
    made = case.read(tmp_path / "face.case.json")
    assert case.verify(made, photo, detector).outcome == "holds"
    assert Report.from_dict(made["reports"][0]).verdict == report.verdict
    assert set(made["cards"]) == {tiny.EXPERT} and made["next_steps"]
    assert made["reports"][0]["sha256"] in (tmp_path / "face.html").read_text()
    monkeypatch.setattr("x2dfd.html_report.printer", lambda: (_ for _ in ()).throw(SetupError("no printer")))
    ran = CliRunner().invoke(cli.app, ["detect", str(photo), "--report", str(tmp_path / "other.pdf")])
    assert ran.exit_code == 1 and "no printer" in ran.output and not list(tmp_path.glob("other*"))


def test_likelihood_ratio_comes_from_a_run_of_this_very_model(report: Report, folders: tuple[Path, Path]) -> None:
    """Error rates of other weights, or of another band, would be quoted as this model's."""
    validation = validation_of(folders[1])
    assert report.verdict.p_fake is not None
    expected = validation.likelihood_ratio(report.verdict.p_fake)
    assert {k: report.likelihood_ratio[k] for k in expected} == expected and expected["limits"] == [0.05, 30.0]
    assert report.model["validation"]["run"] == "detect, manifest abc" and "steps" not in report.model["validation"]
    for key, value in (("adapter_sha256", "x"), ("band", [0.3, 0.61]), ("experts", {})):
        assert not validation.fits(report.model | {key: value})
    ratios = [validation.likelihood_ratio(p)["value"] for p in (0.0, 0.39, 0.4, 0.8, 1.0)]
    assert ratios == [0.05, 0.05, 1.5, 30.0, 30.0]


def test_validation_files_are_checked(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    """Likelihood ratios that fall with the score, or a cut file, must not be quoted. Bug prevented: rates without a
    number end the report after all judging, and figures that name no model pass as any model's."""
    validation = validation_of(folders[1])
    assert Validation.load(tmp_path) is None
    validation.save(tmp_path)
    assert Validation.load(tmp_path) == validation
    good, rates = asdict(validation), asdict(validation)["rates"]
    wrong: tuple[dict[str, Any], ...] = (
        {"steps": [[0, 2, 1, 3], [0.5, 1, 1, 1]]}, {"steps": []}, {"steps": [[0, 2, 3, 4]]}, {"steps": [[-1, 2, 1, 3]]},
        {"steps": [[0, "2", 1, 3]]}, {"steps": {}}, {"cllr": -1}, {"n_real": 0}, {"methods": "swap"}, {"model": []},
        {"rates": rates | {"false_alarms": {"value": -3, "n": 50}}}, {"rates": {}}, {"rates": rates | {"misses": 0.1}},
        {"rates": rates | {"misses": {"value": 0.1, "n": 50, "interval": [0.5, 0.2]}}},
        {"rates": rates | {"auc": {"value": 9}}}, {"odd": 1}, {"steps": [[0.99, 2, 1, 3]]}, {"model": {}},
        {"model": {key: value for key, value in good["model"].items() if key != "prompt_sha256"}},
        *({"rates": rates | {name: rates["misses"] | change}} for name in ("misses", "auc") for change in (
            {"value": None}, {"value": [0.1, 0.2]}, {"value": "hi"}, {"interval": 0.1}, {"n": "many"}, {"n": -5},
            {"n": True}, {"n": None},
        )), {"rates": rates | {"auc": "hi"}},
    )  # fmt: skip
    for broken in ("{", "[]", "[" * 100_000, *(json.dumps(good | change) for change in wrong)):
        (tmp_path / "validation.json").write_text(broken)
        with raises("validation_unreadable", "eval.validation"):
            Validation.load(tmp_path)


def test_the_shipped_validation_is_of_the_shipped_model() -> None:
    """New weights beside the figures of the old ones; where there is no run yet, the file has to go."""
    validation = Validation.load(EMBEDDED)
    if validation is None:
        return
    card, calibration = read_adapter_card(EMBEDDED), Calibration.load(EMBEDDED)
    assert validation.model["adapter_sha256"] == card.sha256, "run eval.validation, or delete validation.json"
    assert validation.model["band"] == [calibration.low, calibration.high]
    wanted = expert_hashes(card, calibration)
    assert {name: text.split()[1] for name, text in validation.model["experts"].items()} == wanted


def test_pav_ratios_are_bounded_and_rise() -> None:
    """A perfect separation of forty pictures supports a ratio of about twenty, not an infinite one."""
    pytest.importorskip("sklearn")
    from eval.validation import steps

    labels = np.repeat([0, 1], 20)
    scores = np.linspace(0.1, 0.9, 40)
    table = steps(scores, labels, [str(i) for i in range(40)], draws=50)
    assert [row[1] for row in table] == [pytest.approx(1 / 20, rel=0.01), pytest.approx(20, rel=0.01)]
    assert table[0][0] == 0.0 and 0.4 < table[1][0] < 0.6
    noise = np.random.default_rng(0).permutation(scores)
    for _, ratio, low, high in steps(noise, labels, [str(i) for i in range(40)], draws=50):
        assert low <= ratio <= high
    with raises("not_a_finished_run", "nowhere"):
        from eval.validation import validation

        validation(Path("nowhere"))
