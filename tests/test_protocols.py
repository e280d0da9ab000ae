"""Published protocols: which sets belong to them, what is refused, and what the stock loader's quirks do to numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from eval import metrics, stats
from eval.protocols import PROTOCOLS, Compat, app, index_sets, pool_clips, read_annotations, sampled
from tests.raising import raises, says
from tests.sets import as_json, indexed, touch
from x2dfd.manifest import Sample, read_manifest

REALS, FAKES = 178, 888
"""Test clips of DF40's EFS sets in the domain of Celeb-DF; every real clip has the folder name of a fake one."""


def command(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture(scope="module")
def df40(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """A set shaped as DF40's EFS in the domain of Celeb-DF: 1,066 clips of one frame each."""
    root = tmp_path_factory.mktemp("df40")
    fakes = {f"m{i % 5}/{i:04d}": [f"EFS/m{i % 5}/{i:04d}/{i}.png"] for i in range(FAKES)}
    reals = {f"{i:04d}": [f"Celeb-DF-v2/Celeb-real/frames/{i:04d}/{i}.png"] for i in range(REALS)}
    classes = {"EFSAll_Fake": fakes, "EFSAll_Real": reals}
    indexed(root, root / "json" / "EFSAll_cdf.json", "EFSAll_cdf", classes)
    sets = index_sets(PROTOCOLS["df40-p2"], root / "json", [root], sets=["EFSAll_cdf"])
    return sets["EFSAll_cdf"][0]


def test_equal_folder_names_merge_under_compat_and_only_there(df40: list[Sample]) -> None:
    """Bug prevented: 178 real clips swallowed by fakes of the same folder name, and an AUC points too low."""
    labels = metrics.to_labels(s.label for s in df40)
    # A detector of video AUC about .92: real and fake apart by two standard deviations.
    gaps = []
    for seed in range(10):
        scores = np.random.default_rng(seed).normal(labels * 2.0, 1.0)
        names, clip_labels, clip_scores = metrics.pool_by([s.video or s.id for s in df40], labels, scores)
        assert (len(names), int(clip_labels.sum())) == (REALS + FAKES, FAKES) == (1066, 888)
        stock_names, stock_labels, stock_scores = pool_clips(df40, labels, scores)
        assert (len(stock_names), int(stock_labels.sum())) == (888, 710)
        right, stock = stats.auc(clip_labels, clip_scores), stats.auc(stock_labels, stock_scores)
        assert right is not None and stock is not None
        gaps.append(right - stock)
    assert np.mean(gaps) > 0.08  # how many points depends on how scores are drawn
    # `000_003` of four manipulations is four clips, and one easy one for the stock loader.
    samples = [
        Sample(f"{m}{i}", Path(f"/d/{m}/frames/000_003/{i}.png"), "fake", m, video=f"ff/fake/{m}/frames/000_003")
        for m in ("DF", "F2F", "FS", "NT")
        for i in range(3)
    ]
    labels, scores = np.ones(12, np.int64), np.arange(12.0)
    assert len({s.video for s in samples}) == 4
    names, _, pooled = pool_clips(samples, labels, scores)
    assert (names, pooled.tolist()) == (["000_003"], [5.5])


def test_frames_are_spread_and_first_only_under_compat() -> None:
    """Bug prevented: of 32 frames the first eight, which show one second of the clip."""
    samples = [Sample(f"{i}", Path(f"/d/c/{i}.png"), "real", video="c") for i in reversed(range(32))]
    spread = [s.id for s in sampled(samples, 8)]
    assert spread[0] == "0" and spread[-1] == "31" and len(spread) == 8 and spread == sorted(spread, key=int)
    assert [s.id for s in sampled(samples, 8, Compat(frames=True))] == [str(i) for i in range(8)]
    assert len(sampled(samples, None, Compat(frames=True))) == 32
    assert Compat.parse("") == Compat() and Compat.parse("clips,frames") == Compat(True, True)
    with raises("unknown_name", "did you mean 'clips'"):
        Compat.parse("clip")


def test_a_protocol_is_written_set_by_set_and_never_in_part(tmp_path: Path) -> None:
    """Bug prevented: "P1" over the one index that was there; a set over the files that happened to be unpacked; the
    eight swaps of another table called P1."""
    assert PROTOCOLS["df40-p1"].sets == ("FSAll_ff", "FRAll_ff", "EFSAll_ff")
    listed = command("list")
    assert listed.exit_code == 0 and all(f"{name}\tv" in listed.stdout for name in PROTOCOLS)
    root, indices, out = tmp_path / "data", tmp_path / "json", tmp_path / "out"
    for key in PROTOCOLS["df40-p1"].sets[:2]:
        name = key.removesuffix("_ff")
        fakes = {"a": [f"{key}/f/a/{i}.png" for i in range(40)]}
        classes = {f"{name}_Fake": fakes, f"{name}_Real": {"b": ["ff/b/1.png"]}}
        indexed(root, indices / f"{key}.json", key, classes)
    words = ["write", "df40-p1", "--indices", indices, "--root", root, "--out", out]
    says(command(*words).exception, "index_missing", "EFSAll_ff.json")
    assert not out.exists()
    done = command(*words, "--sets", "FSAll_ff,FRAll_ff")
    assert done.exit_code == 0, done.exception
    samples = read_manifest(out / "FSAll_ff.jsonl", split="test")
    assert sum(s.label == "fake" for s in samples) == 32 and {s.extra["set"] for s in samples} == {"FSAll_ff"}
    card = json.loads((out / "protocol.json").read_text("utf-8"))
    assert card["sets"]["FRAll_ff"]["clips"] == {"real": 1, "fake": 1} and card["compat"] == []
    (root / "ff/b/1.png").unlink()
    says(command(*words, "--sets", "FSAll_ff").exception, "files_missing", "1 of")
    says(command(*words, "--sets", "FSAll").exception, "unknown_name", "FSAll_ff")
    says(command("write", "df40-p9", "--out", out).exception, "unknown_name", "df40-p9")
    says(command("write", "df40-p4", "--root", root, "--out", out).exception, "option_missing", "--sets")


def test_other_counts_than_the_makers_are_said(tmp_path: Path) -> None:
    """Bug prevented: a number over three clips set beside one over 140."""
    root, indices = tmp_path / "data", tmp_path / "json"
    for key in PROTOCOLS["ffpp"].sets:
        classes = {key: {"000_003": [f"{key}/000_003/1.png"]}, "FF-real": {"000": ["real/000/1.png"]}}
        indexed(root, indices / f"{key}.json", key, classes, level="c23")
    sets = index_sets(PROTOCOLS["ffpp"], indices, [root])
    assert all(len(samples) == 2 for samples, _ in sets.values())
    assert "1 real and 1 fake clips, where its makers count 140 and 140" in " ".join(sets["FF-NT"][1])
    with raises("compression_unknown", "c40"):
        index_sets(PROTOCOLS["ffpp"], indices, [root], compression="c40")


def test_folders_and_lists_are_protocols_too(tmp_path: Path) -> None:
    """Bug prevented: a second reader with another idea of a label, or reals guessed from `real_test`."""
    for label, clip in (("real", "1"), ("fake", "2")):
        for i in range(3):
            touch(tmp_path / label / clip / f"{i}.png")
    for name in ("wilddeepfake", "deepfakeface"):
        out = tmp_path / name
        says(command("write", name, "--out", out).exception, "option_missing", "--real", "--fake")
        words = ["--real", tmp_path / "real", "--fake", f"gen={tmp_path / 'fake'}", "--frames", "2", "--out", out]
        done = command("write", name, *words)
        assert done.exit_code == 0, done.exception
        samples = read_manifest(out / f"{name}.jsonl")
        assert [s.label for s in samples].count("fake") == (2 if name == "wilddeepfake" else 3)
        assert {s.method for s in samples if s.label == "fake"} == {"gen"}
    touch(tmp_path / "Celeb-real/frames/id0_0000/000.png")
    (tmp_path / "List_of_testing_videos.txt").write_text("1 Celeb-real/id0_0000.mp4\n", encoding="utf-8")
    done = command("write", "celebdf", "--root", tmp_path, "--out", tmp_path / "celeb")
    assert done.exit_code == 0 and "178 and 340" in done.stdout, done.exception
    says(command("write", "dfd", "--out", tmp_path / "x").exception, "option_missing", "--root")


def test_annotations_keep_every_answer_and_ask_for_the_polarity(tmp_path: Path) -> None:
    """Bug prevented: of several answers only the last is a reference; FakeVLM's 1, which is real, read as fake."""
    for name in ("a", "b"):
        touch(tmp_path / f"img/{name}.png")
    talk = [{"from": "human", "value": "<image>\nReal?"}, {"from": "gpt", "value": "No, the skin."}]
    records: list[dict[str, Any]] = [
        {"image": "x/img/a.png", "label": 1, "question": "Why?", "answer": "the eyes"},
        {"image": "x/img/a.png", "label": 1, "question": "Why?", "answer": ["the nose", "the eyes"]},
        {"image": "x/img/a.png", "label": 1, "question": "Where?", "answer": "mouth"},
        {"image": "x\\img\\b.png", "label": 0, "conversations": talk},
    ]
    file = as_json(tmp_path / "a.json", records)
    out = tmp_path / "a.jsonl"
    words = ["annotations", file, "--root", tmp_path, "--out", out]
    says(command(*words).exception, "option_missing", "--real-value")
    done = command(*words, "--real-value", 1, "--fake-value", 0)
    assert done.exit_code == 0 and "2 pictures, 3 questions, 4 answers" in done.stdout, done.exception
    a, b = read_manifest(out)
    assert (a.label, b.label) == ("real", "fake")
    assert a.extra["references"][0] == {"question": "Why?", "answers": ["the eyes", "the nose"]}
    assert b.extra["references"] == [{"question": "Real?", "answers": ["No, the skin."]}]
    changes: dict[str, dict[str, Any]] = {
        "label_unclear": {"label": 2}, "label_contradicts": {"label": 0}, "exchange_malformed": {"answer": ""},
    }  # fmt: skip
    for code, change in changes.items():
        as_json(file, [records[0], records[0] | change])
        with raises(code):
            read_annotations(file, [tmp_path], real=["1"], fake=["0"])
