"""Instruction data: what is taught must be true of the picture, strong in the ranking, and never held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
from numpy.typing import NDArray

from data_gen.build import BuildConfig, build, corrupted, expert_scores
from data_gen.questions import cue_questions
from tests import tiny
from tests.raising import raises
from x2dfd import prompts
from x2dfd.assessment import CueQuestion, assess
from x2dfd.crops import CropSet, load_crops
from x2dfd.experts import BUILTIN
from x2dfd.explain import read_cues
from x2dfd.files import file_sha256
from x2dfd.manifest import Sample, read_manifest, write_manifest
from x2dfd.mllm import YesNo
from x2dfd.tower import augmented_view
from x2dfd.types import Cue, Evidence

CUES = {("jaw", "blending"), ("eyes", "blur"), ("skin", "colour")}  # of the fakes of the small manifest

Record = dict[str, Any]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_small_manifest(tmp_path_factory.mktemp("small"), np.asarray(skimage.data.astronaut()), 12)


@pytest.fixture(autouse=True)
def known_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)


def made(manifest: Path, out: Path, **given: Any) -> list[Record]:
    settings = {"data": str(manifest), "experts": (tiny.EXPERT,), **given}
    path = build(BuildConfig(**settings), out)
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer(record: Record) -> str:
    return str(record["conversations"][1]["value"])


def question(record: Record) -> str:
    return str(record["conversations"][0]["value"])


def detect(records: Sequence[Record], **equal: str) -> list[Record]:
    return [r for r in records if r["task"] == "detect" and all(r[k] == v for k, v in equal.items())]


def named(record: Record) -> set[tuple[str, str]]:
    return {(c.area, c.artifact) for c in read_cues(answer(record))}


class SeesOnly:
    """A model that sees one cue, and of all others says yes."""

    def __init__(self, cue: tuple[str, str], samples: list[Sample]) -> None:
        self.name, self.cue, self.samples = f"sees {cue}", cue, samples

    def yes_no(self, crop: NDArray[np.uint8], questions: Sequence[str], /) -> YesNo:
        fake = self.samples[int(crop[0, 0, 0])].label == "fake"
        about = {q.text: (q.area, q.artifact) for q in cue_questions()}
        p = np.array([0.9 if about[q] != self.cue or fake else 0.1 for q in questions])
        return YesNo(p, tuple("yes" if x > 0.5 else "no" for x in p))


def ranking(cue: tuple[str, str], out: Path) -> Path:
    """A real assessment, by a model that is good at one cue only."""
    cues = tuple(Cue(a, b) for a, b in sorted(CUES))
    samples = [
        Sample(f"s{i}", Path(f"/x/{i}"), "fake" if i % 2 else "real", group=f"g{i}", cues=cues if i % 2 else ())
        for i in range(60)
    ]
    crops = np.zeros((60, 4, 4, 3), np.uint8)
    crops[:, 0, 0, 0] = np.arange(60)
    questions = [
        CueQuestion(q.text, q.area, q.artifact, q.origin) for q in cue_questions() if (q.area, q.artifact) in CUES
    ]
    data = CropSet(samples, crops, np.zeros((60, 468, 2), np.float32), {})
    assess(SeesOnly(cue, samples), data, questions, out, top_k=1, progress=False)
    return out / "assessment.json"


def test_only_strong_cues_are_explained(manifest: Path, tmp_path: Path) -> None:
    """Another ranking must give other explanations; a model taught cues it cannot see learns to make them up."""
    for strong in sorted(CUES):
        assessment = ranking(strong, tmp_path / strong[0] / "mfa")
        fakes = detect(made(manifest, tmp_path / strong[0], assessment=str(assessment)), label="fake")
        assert len(fakes) == 6
        for record in fakes:
            assert named(record) == {strong}
            assert {(c["area"], c["artifact"]) for c in record["cues"]} == CUES  # the truth stays whole in the record
    everything = made(manifest, tmp_path / "all")
    assert all(named(r) == CUES for r in detect(everything, label="fake"))


def test_explanations_and_cue_questions_are_true_of_the_picture(manifest: Path, tmp_path: Path) -> None:
    """A cue that was not forged into the picture would be taught as seen; a real picture has none; yes only of cues
    that are there and visible; never asked of what is too faint to tell."""
    for seed in range(3):
        records = made(manifest, tmp_path / str(seed), seed=seed, corrupt=0.0)
        for record in detect(records):
            truth = {(c["area"], c["artifact"]) for c in record["cues"]}
            assert named(record) <= truth
            assert (record["label"] == "fake") == bool(truth)
            assert answer(record).startswith(f"This image is {record['label']}.")
    about = {q.text: (q.area, q.artifact) for q in cue_questions()}
    records = [r for r in made(manifest, tmp_path, cue_questions=8) if r["task"].startswith("cue")]
    answers: Counter[str] = Counter()
    for record in records:
        pair = about[question(record).removeprefix("<image>\n")]
        strengths = {(c["area"], c["artifact"]): c["score"] for c in record["cues"]}
        assert answer(record) == ("Yes" if strengths.get(pair, 0) >= 0.2 else "No")
        assert strengths.get(pair, 1) >= 0.2  # skin x colour is there at 0.1: neither yes nor no is fair
        answers[f"{record['label']} {answer(record)}"] += 1
    assert answers["fake Yes"] and answers["fake No"] and answers["real No"] and not answers["real Yes"]


def test_the_questions_are_those_of_inference(manifest: Path, tmp_path: Path) -> None:
    """What is trained on must be what is asked; the score stands in the question and in the record alike."""
    records = made(manifest, tmp_path)
    assert {"detect", "detect_plain", "classify", "detect_asked"} <= {record["task"] for record in records}
    data = load_crops(manifest)
    for record in records:
        asked = question(record).removeprefix("<image>\n")
        evidence = [Evidence(k, v) for k, v in record["scores"].items()]
        assert data.samples[record["row"]].id == record["image"]  # a shift by one pairs every answer with another face
        if record["task"] == "detect":
            assert asked == prompts.verdict_question(evidence)
            assert answer(record).endswith(prompts.expert_sentence(record["label"], evidence))
        elif record["task"] == "detect_plain":
            assert (asked, answer(record)) == (prompts.QUESTION, f"This image is {record['label']}.")
        elif record["task"] == "classify":
            assert asked.startswith(prompts.CLASS_QUESTION) and asked.endswith(prompts.expert_block(evidence))
        elif record["task"] == "detect_asked":
            assert answer(record) == f"This image is {record['label']}."
    both = made(manifest, tmp_path / "both", score_form="both")
    told = [r for r in both if r["scores"] and " score is " in question(r)]
    for record in told:  # a form that only some questions use would teach the model two languages
        assert prompts.expert_scores([Evidence(k, v) for k, v in record["scores"].items()], "both") in question(record)
    assert told


def test_the_sentence_on_experts_can_be_left_out(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f"s{i}": [Evidence(tiny.EXPERT, (0.05, 0.95)[i % 2])] for i in range(100)}
    monkeypatch.setattr("data_gen.build.expert_scores", lambda *_: known)
    plain, short = (detect(made(manifest, tmp_path / str(c), corrupt=0.0, closing=c)) for c in (True, False))
    cut = 0
    for one, other in zip(plain, short, strict=True):
        evidence = [Evidence(k, v) for k, v in one["scores"].items()]
        closing = prompts.expert_sentence(one["label"], evidence)
        assert answer(one) == answer(other) + closing
        cut += bool(closing)
    assert cut


def test_a_fake_is_explained_as_often_as_asked_and_its_class_is_true(manifest: Path, tmp_path: Path) -> None:
    """The same cues in other words and beside other wrong scores; a real picture is no lesson in cues; A face swap is
    one, and is no face that was generated as a whole."""
    records = made(manifest, tmp_path, explanations=3, corrupt=0.5)
    told: dict[str, list[Record]] = {}
    for record in records:
        if record["task"] == "detect" or record["task"].startswith("detect_again"):
            told.setdefault(record["image"], []).append(record)
    for mine in told.values():
        assert len(mine) == (3 if mine[0]["label"] == "fake" else 1)
        assert len({answer(r) for r in mine}) == len(mine)
    assert any(len({str(r["scores"]) for r in mine}) > 1 for mine in told.values())
    found = [r for seed in range(6) for r in made(manifest, tmp_path / str(seed), seed=seed) if "kind" in r["task"]]
    said = {(question(r).split("\n")[1], r["df_class"], answer(r)) for r in found}
    assert {(k, a) for q, k, a in said if "swap" in q} == {("FS", "Yes"), ("real", "No")}
    assert {(k, a) for q, k, a in said if "free of" in q or "unmanipulated" in q} == {("FS", "No"), ("real", "Yes")}
    assert {a for q, _, a in said if "generated as a whole" in q or "synthesis" in q} == {"No"}


def test_corruption_has_the_promised_share_and_spares_calibration(manifest: Path, tmp_path: Path) -> None:
    """Wrong scores teach doubt in training; in calibration they would only make the probability wrong; half missing,
    half random; at rate 0 nothing is touched."""
    clean = {r["image"]: r["scores"] for r in detect(made(manifest, tmp_path / "a", corrupt=0.0))}
    records = detect(made(manifest, tmp_path / "b", corrupt=1.0))
    assert all(r["scores"] == clean[r["image"]] for r in records if r["split"] == "calib")
    assert all(r["scores"] != clean[r["image"]] for r in records if r["split"] == "train")
    evidence = [Evidence("a", 0.5)] * 20_000
    rng = np.random.default_rng(0)
    assert corrupted(evidence, 0.0, rng) == evidence
    out = corrupted(evidence, 0.2, rng)
    assert np.mean([e.score is None for e in out]) == pytest.approx(0.1, abs=0.01)
    assert np.mean([e.score not in (None, 0.5) for e in out]) == pytest.approx(0.1, abs=0.01)


def test_what_is_left_out_is_not_trained_on_and_changes_no_other_record(manifest: Path, tmp_path: Path) -> None:
    """Figures on "unseen" methods are worth nothing if a combined forgery smuggles the method in; one random stream for
    all would make every ablation a different data set; one that cannot be made again cannot be checked."""
    whole = {r["id"]: r for r in made(manifest, tmp_path / "a")}
    assert {r["method"] for r in whole.values()} == {"", "swap", "warp", "swap+warp"}
    made(manifest, tmp_path / "again")
    made(manifest, tmp_path / "other", seed=1)
    first, again, other = ((tmp_path / n / "instructions.jsonl").read_bytes() for n in ("a", "again", "other"))
    assert again == first != other
    fewer = {r["id"]: r for r in made(manifest, tmp_path / "b", held_out=("warp",))}
    methods = {split: {r["method"] for r in fewer.values() if r["split"] == split} for split in ("train", "calib")}
    assert methods["train"] == {"", "swap"} and "swap+warp" in methods["calib"]
    few = {r["id"]: r for r in made(manifest, tmp_path / "c", limit=3)}
    assert len({r["image"] for r in few.values()}) == 3
    for part in (fewer, few):
        assert 0 < len(part) < len(whole) and all(whole[k] == r for k, r in part.items())


def test_the_data_card_counts_what_is_there(manifest: Path, tmp_path: Path) -> None:
    """A card that is off by one is not read a second time."""
    records = made(manifest, tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    main, tasks = detect(records), Counter(r["task"].rstrip("0123456789") for r in records)
    assert tasks["detect"] == tasks["detect_plain"] == tasks["classify"] == 12 and tasks["cue"] == 24
    assert card.items() >= {
        "pictures": 12, "records": dict(tasks), "split": {"calib": 2, "train": 10}, "licence": {"not stated": 12},
        "label": {"fake": 6, "real": 6}, "df_class": {"FS": 6, "real": 6},
        "method": {"": 6, "swap": 2, "swap+warp": 2, "warp": 2},
        "cues": {"jaw x blending": 6, "eyes x blur": 6, "skin x colour": 6},
        "distinct_answers": round(len({answer(r) for r in main}) / 12, 4),
        "manifest_sha256": file_sha256(manifest),
        "instructions_sha256": file_sha256(tmp_path / "instructions.jsonl"),
    }.items()  # fmt: skip
    assert card["config"]["experts"] == [tiny.EXPERT]
    table = pq.read_table(tmp_path / "instructions.parquet").to_pylist()
    assert [(r["id"], json.loads(r["cues"])) for r in table] == [(r["id"], r["cues"]) for r in records]


def test_pictures_that_are_left_out_are_counted(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: pictures that are missing or show no face are left out, and nothing says how many."""
    gone = [replace(s, path=tmp_path / "gone.png") if s.id == "s3" else s for s in read_manifest(manifest)]
    write_manifest(tmp_path / "gone.jsonl", gone)
    records = made(tmp_path / "gone.jsonl", tmp_path / "out")
    assert "s3" not in {r["image"] for r in records}
    assert "1 of 12 pictures not used: no usable face (s3, not_found)" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "card.json").read_text())["without_a_face"] == 1


def test_a_fake_of_unknown_class_and_an_empty_set_are_refused(manifest: Path, tmp_path: Path) -> None:
    """Both end in a sentence that names the manifest, not in a traceback or in a file of nothing."""
    samples = read_manifest(manifest)
    loose = [{"id": s.id, "path": str(s.path), "label": s.label, "split": "train"} for s in samples[:3]]
    write_manifest(tmp_path / "loose.jsonl", loose)
    with raises("df_class_missing", "1 fakes"):
        made(tmp_path / "loose.jsonl", tmp_path / "out")
    write_manifest(tmp_path / "real.jsonl", [loose[0], loose[2]])
    records = made(tmp_path / "real.jsonl", tmp_path / "out")
    assert {r["df_class"] for r in records} == {"real"}
    write_manifest(tmp_path / "test.jsonl", [{**r, "split": "test"} for r in loose])
    with raises("no_usable_picture", "test.jsonl"):
        made(tmp_path / "test.jsonl", tmp_path / "none")
    assert not (tmp_path / "none" / "instructions.jsonl").exists()


def test_experts_judge_training_views_through_the_codec(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: scores in training of crops that no expert in use gets to see."""
    data = load_crops(manifest)
    seen: list[NDArray[np.uint8]] = []

    class Looker(tiny.Brightness):
        def judge(self, faces: Any, shared: Any = None) -> list[Evidence]:
            seen.extend(f.crop for f in faces)
            return super().judge(faces, shared)

    monkeypatch.setattr("data_gen.build.load_expert", lambda *_: Looker())
    expert_scores(data, [0, 1], BuildConfig(str(manifest), experts=(tiny.EXPERT,)))
    assert all((a == augmented_view(data.crops[i], 1, i)).all() for i, a in enumerate(seen)) and len(seen) == 2
