"""Readers of what lies on disk: no label from a name, no silent gap, no person on two sides of a split."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_gen.public_sets import index_label, read_celebdf, read_deepfakebench, read_dfdc, read_ffpp, source_ids
from data_gen.readers import (
    Group,
    Media,
    Reroot,
    components,
    df_class,
    evenly,
    finish,
    labelled,
    natural,
    parse_shares,
    path_parts,
    read_folders,
    read_manifests,
    read_x2dfd_lists,
    split_by_hash,
)
from data_gen.saved_sets import Columns, read_datasets
from eval.bench import check_clips
from tests.pictures import encoded
from tests.raising import raises, says
from tests.sets import as_json, command, index, indexed, touch
from x2dfd.manifest import Sample, read_manifest, write_manifest

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def test_frames_sort_as_people_count_and_are_spread_over_the_clip() -> None:
    """Bug prevented: `int(stem)` raises on StyleGAN-XL's `seed1128.png`; text order puts frame 10 before frame 9; a
    step of 1 takes the first N frames, a second of video, for the whole clip."""
    names = ["seed1128.png", "10.png", "9.png", "seed2.png", "x.png", "009.png"]
    assert sorted(names, key=natural) == ["009.png", "9.png", "10.png", "seed2.png", "seed1128.png", "x.png"]
    assert 10 < evenly(range(32), 1)[0] < 21
    for n in (2, 3, 7, 8, 31, 32, 99):
        chosen = evenly(range(32), n)
        assert len(chosen) == len(set(chosen)) == min(n, 32) and (chosen[0], chosen[-1]) == (0, 31)
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1


def test_groups_and_their_splits() -> None:
    """Bug prevented: A-B and B-C grouped by the first id put B on two sides; an unseeded shuffle, or one of which every
    split changes when a file is added; shares of 0.9 in sum leave a tenth of the data in whichever split comes last."""
    pairs = [("id2", "id10"), ("id7",), ("id10", "id1"), ("id5", "id6")]
    expected = {"id1": "id1", "id2": "id1", "id10": "id1", "id7": "id7", "id5": "id5", "id6": "id5"}
    assert components(pairs) == components(pairs[::-1]) == expected
    splits = [split_by_hash(f"g{i}", SHARES) for i in range(4000)]
    counts = Counter(splits)
    assert all(abs(counts[name] / 4000 - share) < 0.03 for name, share in SHARES.items())
    assert splits[:10] == [split_by_hash(f"g{i}", SHARES) for i in range(10)]
    assert split_by_hash("g", {"a": 0.5, "b": 0.49999999}) in "ab"
    for text in ("", "train", "train=1.5", "train=0.5,test=0.4", "train=2,test=-1", "=1", "train=x"):
        with raises("shares_malformed", repr(text)):
            parse_shares(text)


def test_methods_have_classes_and_unknown_ones_have_none() -> None:
    """Bug prevented: a guessed class becomes the truth of the four-class benchmark."""
    known = {"faceswap": "FS", "NeuralTextures": "FR", "StyleGANXL": "EFS", "styleclip": "FE", "DFDC": "", "": ""}
    assert {m: df_class("fake", m) for m in known} == known
    assert df_class("real", "Deepfakes") == "real"


def test_folders_get_the_label_that_the_user_says(tmp_path: Path) -> None:
    """Bug prevented: `Real3DPortrait` is a set of fakes; a rule on names would call it real."""
    fakes = touch(tmp_path / "Real3DPortrait/a.png").parent
    reals = touch(tmp_path / "fakers_anonymous/b.jpg").parent
    touch(reals / "readme.txt")
    words = ["read", "folder", "--out", out := tmp_path / "set.jsonl"]
    says(command(*words).exception, "option_missing", "--real")  # no label said
    result = command(*words, "--fake", f"Real3DPortrait={fakes}", "--real", reals, "--split", "test")
    assert result.exit_code == 0, result.exception
    assert {s.id: (s.label, s.method, s.split) for s in read_manifest(out)} == {
        "Real3DPortrait/a.png": ("fake", "Real3DPortrait", "test"),
        "fakers_anonymous/b.jpg": ("real", "", "test"),
    }
    assert "{'.txt': 1}" in result.output


def test_a_file_that_is_said_to_be_both_is_refused(tmp_path: Path) -> None:
    """Bug prevented: fakes in a folder inside that of the reals are trained on as real; one folder is two methods."""
    fakes = touch(tmp_path / "all/fakes/b.png").parent
    with raises("samples_contradict", "b.png", "'real'", "'fake'"):
        finish(read_folders(labelled([str(tmp_path / "all")], [str(fakes)])))
    with raises("samples_contradict", "'Deepfakes'", "'FaceSwap'"):
        finish(read_folders(labelled(None, [f"Deepfakes={fakes}", f"FaceSwap={fakes}"])))


def test_clips_of_two_methods_with_one_name_stay_two_clips(tmp_path: Path) -> None:
    """Bug prevented: keyed by folder name alone, 560 fake videos of FF++ become 140, and a mixed group becomes real."""
    for method in ("Deepfakes", "FaceSwap"):
        for i in (1, 2, 10):
            touch(tmp_path / method / "000_003" / f"{i}.png")
    touch(tmp_path / "real" / "000_003" / "1.png")
    touch(tmp_path / "real" / "clip.mp4")
    fakes = [f"{m}={tmp_path / m}" for m in ("Deepfakes", "FaceSwap")]
    samples = finish(read_folders(labelled([str(tmp_path / "real")], fakes), clips=True, frames=2), shares=SHARES)
    clips = Counter(s.video for s in samples)
    assert sorted(clips.values()) == [1, 1, 2, 2]
    assert [s.path.name for s in samples if s.method == "Deepfakes"] == ["1.png", "10.png"]
    assert len({s.group for s in samples}) == 4
    check_clips(samples)


def test_real_and_fake_of_one_folder_are_one_group(tmp_path: Path) -> None:
    """Bug prevented: two lists share their folders, and a clip's real frames train what its fake ones test."""
    given = []
    for label, frames in (("real", (1, 2)), ("fake", (3, 4))):
        paths = [f"{clip:03d}/{n}.png" for clip in range(20) for n in frames]
        for place in paths:
            touch(tmp_path / place)
        given.append((as_json(tmp_path / f"{label}.json", {"images": [{"image_path": p} for p in paths]}), label, ""))
    for group in Group:
        read = read_x2dfd_lists(given, roots=[tmp_path], source="s", clips=True)  # type: ignore[arg-type]
        samples = finish(read, shares=SHARES, group=group)
        sides = {s.path.parent: {o.split for o in samples if o.path.parent == s.path.parent} for s in samples}
        assert len(sides) == 20 and all(len(split) == 1 for split in sides.values())
        assert len({s.video for s in samples}) == 40  # scored apart all the same
        write_manifest(tmp_path / "set.jsonl", samples)
        again = finish(read_manifests([tmp_path / "set.jsonl"]), shares=SHARES, group=group)
        assert {s.path: s.group for s in again} == {s.path: s.group for s in samples}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """Bug prevented: a data set laid out with links reads as empty, or a link to its own parent never ends."""
    touch(tmp_path / "store/a.png")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "set/linked")
    os.symlink(tmp_path / "set", tmp_path / "set/again")
    samples = finish(read_folders(labelled([str(tmp_path / "set")], None)))
    assert [s.id for s in samples] == ["set/linked/a.png"]


def test_a_list_without_labels_is_refused(tmp_path: Path) -> None:
    """Bug prevented: X2-DFD's code reads the label from the list's file name; `Real3DPortrait.json` holds fakes."""
    touch(tmp_path / "frames/clip/9.png")
    touch(tmp_path / "frames/clip/10.png")
    images = [{"image_path": f"/old/frames/clip/{n}.png"} for n in (10, 9)]
    file = as_json(tmp_path / "Real3DPortrait.json", {"Description": "/nowhere", "images": images})
    out = tmp_path / "set.jsonl"
    says(command("read", "x2dfd-list", file, "--out", out).exception, "option_missing", "--real LIST")
    assert not out.exists()
    result = command("read", "x2dfd-list", "--fake", file, "--root", tmp_path, "--clips", "--out", out)
    assert result.exit_code == 0, result.exception
    samples = read_manifest(out)
    assert [s.path.name for s in samples] == ["9.png", "10.png"]
    assert {(s.label, s.video) for s in samples} == {("fake", "/fake/frames/clip")}
    assert "old -> " in result.output
    # The root that a list names is used.
    given = {"Description": str(tmp_path / "frames"), "images": [{"image_path": "clip/9.png"}]}
    read = read_x2dfd_lists([(as_json(tmp_path / "lists/x.json", given), "real", "")])
    assert [s.path for s in finish(read)] == [tmp_path / "frames/clip/9.png"]
    with raises("list_malformed", "image_path"):
        read_x2dfd_lists([(as_json(tmp_path / "y.json", {"images": ["a.png"]}), "real", "")])


def test_merged_manifests_are_grouped_anew(tmp_path: Path) -> None:
    """Bug prevented: reals and swaps read apart have different group names, and the same face lands on two sides."""
    real = Sample("r", tmp_path / "r.png", "real", group="FF/071", extra={"sources": ["FF/071"]})
    other = {"path": "o.png", "label": "real", "group": "mine", "split": "val"}
    write_manifest(tmp_path / "real.jsonl", [real])
    row = 'f.png,fake,FF/054,"[""FF/071"", ""FF/054""]"'
    (tmp_path / "fake.csv").write_text(f"path,label,group,sources\n{row}\n")
    pq.write_table(pa.Table.from_pylist([other]), tmp_path / "other.parquet")
    files = [tmp_path / n for n in ("real.jsonl", "fake.csv", "other.parquet")]
    out = tmp_path / "all.jsonl"
    assert command("read", "manifest", *files, "--out", out).exit_code == 0
    merged = read_manifest(out)
    told = [(s.label, s.group, s.split) for s in merged]
    assert told == [("real", "FF/054", ""), ("fake", "FF/054", ""), ("real", "mine", "val")]
    again = finish(read_manifests([out]))
    assert [s.group for s in again] == [s.group for s in merged]
    with raises("unknown_name", "did you mean 'val'"):
        finish(read_manifests(files, only=["vla"]))
    (tmp_path / "bad.csv").write_text("path,label,sources\na.png,real,FF/071\n")
    with raises("sources_malformed", "'FF/071'"):
        read_manifests([tmp_path / "bad.csv"])


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    """Bug prevented: half a data set that looks complete; JSON lines in a file that is called .csv."""
    touch(tmp_path / "a/1.png")
    out = tmp_path / "set.jsonl"
    for code, *words in (
        ("manifest_format_unknown", "--out", tmp_path / "set.csv"),
        ("shares_malformed", "--out", out, "--shares", "train=0.5"),
        ("options_conflict", "--out", out, "--shares", "train=1", "--split", "test"),
        ("folder_missing", "--out", out, "--fake", tmp_path / "missing"),
        ("samples_contradict", "--out", out, "--fake", tmp_path / "a"),
    ):
        says(command("read", "folder", "--real", tmp_path / "a", *words).exception, code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_saved_data_sets_become_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: encoding the pictures anew adds a format trace; label 1 is real in some sets, fake in others."""
    with monkeypatch.context() as patch, raises("package_missing", "pip install 'x2dfd[train]'"):
        patch.setitem(sys.modules, "datasets", None)
        read_datasets([tmp_path], tmp_path / "images", Columns(real=("0",)))
    datasets = pytest.importorskip("datasets")
    jpeg = encoded(Image.new("RGB", (32, 32), "red"), "JPEG", quality=71)
    again = encoded(Image.new("RGB", (32, 32), "blue"), "PNG")
    text, kind = datasets.Value("string"), datasets.ClassLabel(names=["fake", "real"])
    features = datasets.Features({"picture": datasets.Image(), "kind": kind, "person": text, "how": text})
    pictures = [{"bytes": kept, "path": None} for kept in (jpeg, again)]
    rows = {"picture": pictures, "kind": [1, 0], "person": ["p1", "p1"], "how": [None, "DiT"]}
    table = datasets.Dataset.from_dict(rows, features=features)
    broken = datasets.Dataset.from_dict(rows | {"picture": [{"bytes": b"no picture", "path": None}] * 2}, features)
    datasets.DatasetDict({"train": table, "broken": broken}).save_to_disk(str(tmp_path / "saved"))
    columns = Columns("picture", "kind", ("real",), ("0",), method="how", group="person")
    read = read_datasets([tmp_path / "saved"], tmp_path / "images", columns, only=["train"])
    real, fake = finish(read)
    assert real.path.read_bytes() == jpeg and real.path.suffix == ".jpg"
    assert (real.label, real.group, real.split) == ("real", "saved/p1", "train")
    assert (fake.label, fake.group, fake.method, fake.df_class) == ("fake", "saved/p1", "DiT", "EFS")
    assert fake.path.stem in fake.id and fake.path.suffix == ".png"
    with raises("files_missing", "2 of 4"):
        finish(read_datasets([tmp_path / "saved"], tmp_path / "images", columns))
    for wrong, code, fact in (
        (Columns("pictures", "kind", ("real",)), "unknown_name", "did you mean 'picture'"),
        (Columns("picture", "kind", ("real",), ("synthetic",)), "label_unclear", "saved"),
        (Columns("picture", "kind"), "option_missing", "--real-value"),
    ):
        with raises(code, fact):
            read_datasets([tmp_path / "saved"], tmp_path / "images", wrong)
    with raises("dataset_unreadable", tmp_path):
        read_datasets([tmp_path], tmp_path / "images", columns)


CELEB = "Celeb-DF-v2/YouTube-real/frames/00170"
STYLES = {
    "windows, absolute": ("T:\\data\\datasets\\rgb\\" + CELEB.replace("/", "\\"), CELEB),
    "posix, relative": (CELEB, CELEB),
    "leading slash, but relative": (f"/{CELEB}", CELEB),
    "DF40 test root": ("deepfakes_detection_datasets/DF40/blendface/cdf/frames/id0_id1_0000", None),
    "DF40, below the root": ("DiT/cdf/Celeb-real/id6_0004", "DF40/DiT/cdf/Celeb-real/id6_0004"),
    "DF40 train, below the root": ("StyleGAN2/001", "DF40_train/StyleGAN2/001"),
    "author's cluster": (f"/Youtu_Pangu_Security_Public/youtu-pangu-public/someone/{CELEB}", f"rgb/{CELEB}"),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_path_style_is_found(tmp_path: Path, style: str) -> None:
    """Bug prevented: an index of another machine (or system) reads as an empty data set."""
    listed, lies = STYLES[style]
    folder = tmp_path / "root" / (lies or listed.removeprefix("deepfakes_detection_datasets/"))
    for name in ("000.png", "seed1128.png"):
        touch(folder / name)
    separator = "\\" if "\\" in listed else "/"
    frames = [f"{listed}{separator}{name}" for name in ("seed1128.png", "000.png")]
    file = as_json(tmp_path / "x.json", index("Set", {"UADFV_Fake": {"clip": frames}}))
    read = read_deepfakebench([file], [tmp_path / "root"])
    samples = finish(read)
    assert [s.path for s in samples] == [folder / "000.png", folder / "seed1128.png"]
    assert "1 of 1 folders found" in read.notes[0]
    assert str(tmp_path) not in samples[0].id + str(samples[0].video)


def test_a_folder_is_listed_once_and_its_prefix_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a stat of each of 160,000 files on a network disk; a search of all roots for every folder."""
    clips = {f"{i:03}": [f"Set/frames/{i:03}/{j}.png" for j in range(20)] for i in range(50)}
    indexed(tmp_path / "rgb", tmp_path / "near.json", "Set", {"UADFV_Real": clips})
    away = {clip: [f"/far/away/{frame}" for frame in frames] for clip, frames in clips.items()}
    file = as_json(tmp_path / "x.json", index("Set", {"UADFV_Real": away}))
    calls: Counter[str] = Counter()
    for name in ("stat", "scandir"):
        original = getattr(os, name)

        def counted(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            calls[_name] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)
    read = read_deepfakebench([file], [tmp_path])
    assert len(read.samples) == 1000
    assert calls["scandir"] == 50 and calls["stat"] < 200
    assert read.notes == [f"50 of 50 folders found: far/away -> {tmp_path / 'rgb'}"]


def test_missing_files_are_refused_unless_allowed(tmp_path: Path) -> None:
    """Bug prevented: a benchmark over the third of the files that happened to be unpacked."""
    clips: dict[str, Any] = {n: [f"Set/frames/{n}/{i}.png" for i in range(60)] for n in ("a", "b")}
    whole = indexed(tmp_path, tmp_path / "whole.json", "Set", {"UADFV_Fake": clips})
    (tmp_path / clips["a"][-1]).unlink()
    read = read_deepfakebench([whole], [tmp_path])
    assert len(finish(read)) == 119  # 0.8 %
    assert "missing: 1 of 120 (0.83%), such as Set/frames/a/59.png" in read.notes
    clips["c"] = ["Set/frames/c/1.png"]
    holes = as_json(tmp_path / "holes.json", index("Set", {"UADFV_Fake": clips}))
    out = tmp_path / "set.jsonl"
    words = ["read", "deepfakebench", holes, "--root", tmp_path, "--out", out]
    says(command(*words).exception, "files_missing", "2 of 121 are missing", "2 of 3 folders found")
    assert not out.exists()
    assert command(*words, "--allow-missing").exit_code == 0
    assert len(read_manifest(out)) == 119
    # DFDC's index has a malformed entry under val: it must neither crash nor vanish.
    clips = {"a": {"label": "DFDC_Real", "frames": ["Set/frames/a/1.png"]}, "frames": ["Set/frames/b/1.png"]}
    read = read_deepfakebench([as_json(tmp_path / "x.json", {"DFDC": {"DFDC_Real": {"val": clips}}})], [tmp_path])
    with raises("files_missing", "1 of 2", "no list of frames"):
        finish(read)
    assert len(finish(read, allow_missing=True)) == 1


def test_a_path_cannot_climb_out_of_the_root(tmp_path: Path) -> None:
    """Bug prevented: an index from the internet lists `../../private`, and a report shows what lies there."""
    touch(tmp_path / "private/a.png")
    (tmp_path / "root").mkdir()
    file = as_json(tmp_path / "x.json", index("Set", {"UADFV_Fake": {"c": ["x/../../private/a.png"]}}))
    with raises("files_missing", "1 of 1"):
        finish(read_deepfakebench([file], [tmp_path / "root"]))
    assert path_parts("\\\\a\\.\\b//c") == ("a", "b", "c")
    assert Reroot([tmp_path]).folder(()) == (tmp_path, "")


def test_labels_of_an_index_are_asserted(tmp_path: Path) -> None:
    """Bug prevented: under "real is 0, all else 1" a misspelt `FF-raal` is a fake; a record contradicts its class."""
    for name in ("FF-real", "CelebDFv1_real", "DFDCP_Real", "e4e_Real", "MRAA_real"):
        assert index_label(name) == ("real", "")
    assert index_label("FF-F2F") == ("fake", "Face2Face")
    assert index_label("Real3DPortrait_Fake") == ("fake", "Real3DPortrait")
    assert index_label("odd", {"odd": "real"}) == ("real", "")
    taken_back = ("not-real", "Not_Real", "non-real", "semi-real", "fake_real", "not_fake", "half_Fake")
    for name in ("FF-raal", "surreal", "unreal", "fakes", "", *taken_back):
        with raises("class_unlabelled", f"--label {name}=fake"):
            index_label(name)
    touch(tmp_path / "v/1.png")
    record = {"label": "UADFV_Real", "frames": ["v/1.png"]}
    file = as_json(tmp_path / "x.json", {"UADFV": {"UADFV_Fake": {"test": {"v": record}}}})
    with raises("label_contradicts", "'UADFV_Real'", "'UADFV_Fake'"):
        read_deepfakebench([file], [tmp_path])
    odd = as_json(tmp_path / "odd.json", index("Mine", {"odd": {"v": ["v/1.png"]}}))
    words = ["read", "deepfakebench", odd, "--root", tmp_path, "--out", tmp_path / "o.jsonl"]
    says(command(*words).exception, "class_unlabelled", "--label odd=fake")
    says(command(*words, "--label", "odd=maybe").exception, "option_malformed", "odd=maybe")
    assert command(*words, "--label", "odd=fake").exit_code == 0
    assert read_manifest(tmp_path / "o.jsonl")[0].label == "fake"


def test_compression_levels_are_known_by_content(tmp_path: Path) -> None:
    """Bug prevented: a level read from the set's name; `_c40` files hold the key without its suffix."""
    clips: dict[str, Any] = {}
    for level in ("c23", "c40"):
        for name in ("071", "071_054"):
            touch(tmp_path / f"FF/{level}/{name}/1.png")
        clips[level] = {"071": {"label": "FF-real", "frames": [f"FF/{level}/071/1.png"]}}
    content = {"FaceForensics++": {"FF-real": {"train": {}, "test": {**clips, "raw": {}}}}}
    plain, c40 = (as_json(tmp_path / f"FaceForensics++{end}.json", content) for end in ("", "_c40"))
    with raises("compression_ambiguous", "c23, c40", "--compression"):
        read_deepfakebench([plain], [tmp_path])
    with raises("compression_unknown", "raw"):
        read_deepfakebench([plain], [tmp_path], compression="raw")
    (chosen,) = finish(read_deepfakebench([plain], [tmp_path], compression="c23"))
    (named,) = finish(read_deepfakebench([c40], [tmp_path]))
    told = [(s.source, s.extra["compression"]) for s in (chosen, named)]
    assert told == [("FaceForensics++", level) for level in ("c23", "c40")]
    # A set without levels: its clips are not mistaken for them.
    clips = {"c23x": ["UADFV/fake/frames/c23/1.png"]}
    file = indexed(tmp_path, tmp_path / "u.json", "UADFV", {"UADFV_Fake": clips})
    assert "compression" not in finish(read_deepfakebench([file], [tmp_path]))[0].extra


def test_odd_indices_of_df40(tmp_path: Path) -> None:
    """Bug prevented: a key that differs from the file's name, `train: {}` and `frames: []` end in a KeyError; the reals
    that every index repeats are counted many times; the clip of a fake merges with the real one of the same name."""
    touch(tmp_path / "Celeb-DF-v2/Celeb-real/frames/id6_0004/000.png")
    files = []
    for method in ("DiT", "SiT"):
        touch(tmp_path / f"DF40/{method}/cdf/Celeb-real/id6_0004/23645.png")
        real = {"id6_0004": ["/Celeb-DF-v2/Celeb-real/frames/id6_0004/000.png"]}
        fake = {"id6_0004": [f"{method}/cdf/Celeb-real/id6_0004/23645.png"], "id7_0001": []}
        content = index(f"{method}_cdf", {f"{method}_Real": real, f"{method}_Fake": fake})
        content[f"{method}_cdf"][f"{method}_Fake"] |= {"train": {}, "val": {}}
        files.append(as_json(tmp_path / f"{method}_cdf_save.json", content))
    read = read_deepfakebench(files, [tmp_path])
    samples = finish(read)
    told = [(s.label, s.method, s.df_class) for s in samples]
    assert told == [("real", "", "real"), ("fake", "DiT", "EFS"), ("fake", "SiT", "EFS")]
    assert {(s.source, s.split) for s in samples} == {("Celeb-DF-v2", "test")}
    assert len({s.video for s in samples}) == 3 and len({s.group for s in samples}) == 1
    assert "listed more than once, kept once: 1" in read.notes
    check_clips(samples)


def test_collected_sets_of_df40_keep_their_methods(tmp_path: Path) -> None:
    """Bug prevented: `FSAll` as one method hides which of ten methods a detector fails on."""
    paths = [f"deepfakes_detection_datasets/DF40/{m}/ff/frames/071_054/1.png" for m in ("blendface", "newmethod")]
    for path in paths:
        touch(tmp_path / path.removeprefix("deepfakes_detection_datasets/"))
    clips = {"a": [paths[0]], "b": [paths[1]]}
    file = as_json(tmp_path / "FSAll_ff.json", index("FSAll_ff", {"FSAll_Fake": clips}))
    samples = finish(read_deepfakebench([file], [tmp_path]))
    assert [(s.method, s.df_class) for s in samples] == [("blendface", "FS"), ("", "FS")]
    assert samples[0].extra["sources"] == ["FaceForensics++/071", "FaceForensics++/054"]


def test_test_clips_in_the_training_split_are_refused(tmp_path: Path) -> None:
    """Bug prevented: DeepfakeBench's Celeb-DF index lists its test clips under train and val too."""
    clips = {"id0_0001": ["Celeb-DF-v1/Celeb-real/frames/id0_0001/1.png"]}
    file = indexed(tmp_path, tmp_path / "x.json", "Celeb-DF-v1", {"CelebDFv1_real": clips})
    content = json.loads(file.read_text())
    splits = content["Celeb-DF-v1"]["CelebDFv1_real"]
    splits["train"] = splits["val"] = splits["test"]
    as_json(file, content)
    with raises("split_contradicts", "'test'", "'train'", "--only"):
        finish(read_deepfakebench([file], [tmp_path]))
    assert [s.split for s in finish(read_deepfakebench([file], [tmp_path], only=["test"]))] == ["test"]
    with raises("unknown_name", "did you mean 'test'"):
        finish(read_deepfakebench([file], [tmp_path], only=["tset"]))


def test_given_splits_that_share_people_are_refused(tmp_path: Path) -> None:
    """Bug prevented: the same actors in train and test, as in DFD; the error must say what one can do."""
    content: dict[str, Any] = {"DFD_fake": {}, "DFD_real": {}}
    for name, split, clip in (("DFD_fake", "train", "01_02__kitchen__AB"), ("DFD_real", "test", "02__kitchen")):
        path = touch(tmp_path / f"dfd/{clip}/1.png").relative_to(tmp_path).as_posix()
        content[name][split] = {clip: {"label": name, "frames": [path]}}
    file = as_json(tmp_path / "x.json", {"DeepFakeDetection": content})
    with raises("group_across_splits", "--only", "--shares", "--group clip"):
        finish(read_deepfakebench([file], [tmp_path]))
    assert {s.split for s in finish(read_deepfakebench([file], [tmp_path]), group=Group.clip)} == {"train", "test"}
    assert len({s.split for s in finish(read_deepfakebench([file], [tmp_path]), shares=SHARES)}) == 1


@pytest.mark.parametrize("content", ["[", "[]", '{"a": 1}', '{"a": {"b_Fake": []}}', '{"a": {"b_Fake": {"test": 3}}}'])
def test_a_broken_index_is_an_error_of_ours(tmp_path: Path, content: str) -> None:
    """Bug prevented: a traceback for a cut-off download."""
    (tmp_path / "x.json").write_text(content)
    with raises("not_json" if content == "[" else "not_an_object", "x.json"):
        read_deepfakebench([tmp_path / "x.json"], [tmp_path])


def ffpp(root: Path, methods: tuple[str, ...], media: Media = Media.frames) -> None:
    """The clips of PAIRS, each of two frames or a video."""

    def clip(folder: str, name: str) -> None:
        files = (f"{name}/9.png", f"{name}/10.png") if media is Media.frames else (f"{name}.mp4",)
        for file in files:
            touch(root / folder / "c23" / media.value / file)

    for split, listed in PAIRS.items():
        as_json(root / f"{split}.json", listed)
        for a, b in listed:
            for name in (a, b):
                clip("original_sequences/youtube", name)
            for method in methods:
                for name in (f"{a}_{b}", f"{b}_{a}"):
                    clip(f"manipulated_sequences/{method}", name)


PAIRS = {"train": [["071", "054"], ["087", "081"]], "val": [["720", "672"]], "test": [["953", "974"]]}


@pytest.mark.parametrize("media", list(Media))
def test_ffpp_keeps_a_pair_and_both_sources_together(tmp_path: Path, media: Media) -> None:
    """Bug prevented: a split by clip leaves a face in train and its swap in test."""
    methods = ("Deepfakes", "NeuralTextures")
    ffpp(tmp_path, methods, media)
    samples = finish(read_ffpp(tmp_path, methods=methods, media=media))
    each = 2 if media is Media.frames else 1
    assert Counter((s.split, s.label) for s in samples) == {
        ("train", "real"): 4 * each, ("train", "fake"): 8 * each, ("val", "real"): 2 * each,
        ("val", "fake"): 4 * each, ("test", "real"): 2 * each, ("test", "fake"): 4 * each,
    }  # fmt: skip
    assert Counter(s.df_class for s in samples) == {"real": 8 * each, "FS": 8 * each, "FR": 8 * each}
    assert len({s.group for s in samples}) == 4 and len({s.video for s in samples}) == 24
    check_clips(samples)
    anew = finish(read_ffpp(tmp_path, methods=methods, media=media), shares={"a": 0.3, "b": 0.7})
    a, b = ({source for s in anew if s.split == split for source in s.extra["sources"]} for split in "ab")
    assert a and b and not a & b


def test_ffpp_says_what_is_wrong(tmp_path: Path) -> None:
    """Bug prevented: a method that was not downloaded, or a misspelt one, gives a benchmark without it."""
    ffpp(tmp_path, ("Deepfakes",))
    wrong: tuple[tuple[dict[str, Any], str, str], ...] = (
        ({"methods": ["Deepfakes", "FaceSwap"]}, "folder_unreadable", "manipulated_sequences/FaceSwap"),
        ({"methods": ["Deepfake"]}, "unknown_name", "did you mean 'Deepfakes'"),
        ({"compression": "c32"}, "unknown_name", "c32"),
        ({"methods": ["Deepfakes"], "lists": tmp_path / "lists"}, "not_json", "train.json"),
    )
    for options, code, fact in wrong:
        with raises(code, fact):
            read_ffpp(tmp_path, **options)
    for file in (tmp_path / "manipulated_sequences/Deepfakes/c23/frames/953_974").iterdir():
        file.unlink()
    with raises("files_missing", "Deepfakes/953_974"):
        finish(read_ffpp(tmp_path, methods=["Deepfakes"], only=["test"]))
    assert len(finish(read_ffpp(tmp_path, methods=["Deepfakes"], only=["val"], frames=1))) == 4


def test_deepfakedetection_has_no_splits_of_its_own(tmp_path: Path) -> None:
    """Bug prevented: its 28 actors appear in every clip, so the stock split into train, val and test is none."""
    touch(tmp_path / "original_sequences/actors/c23/videos/02__kitchen.mp4")
    touch(tmp_path / "manipulated_sequences/DeepFakeDetection/c23/videos/01_02__kitchen__AB12.mp4")
    out = tmp_path / "set.jsonl"
    words = ["--methods", "DeepFakeDetection", "--media", "videos", "--out", out]
    assert command("read", "ffpp", tmp_path, *words).exit_code == 0
    told = [(s.label, s.split, s.group) for s in read_manifest(out)]
    assert sorted(told) == [(label, "", "DeepFakeDetection/01") for label in ("fake", "real")]
    # a source clip in FF++, and elsewhere a folder of seeds
    assert source_ids("StyleGAN2", "001") == [] == source_ids("FaceForensics++", "1001")


CELEB_LIST = "1 YouTube-real/00170.mp4\n1 Celeb-real/id2_0001.mp4\n0 Celeb-synthesis/id2_id3_0001.mp4\n"


def celebdf(root: Path) -> None:
    for clip in ("YouTube-real/00170", "Celeb-real/id2_0001", "Celeb-synthesis/id2_id3_0001", "Celeb-real/id3_0007"):
        folder, name = clip.split("/")
        touch(root / folder / "frames" / name / "000.png")
        touch(root / folder / f"{name}.mp4")
    (root / "List_of_testing_videos.txt").write_text(CELEB_LIST)


@pytest.mark.parametrize("media", list(Media))
def test_celebdf_ones_are_real(tmp_path: Path, media: Media) -> None:
    """Bug prevented: in this list alone 1 means REAL; read the usual way, the AUC is one minus the true one."""
    celebdf(tmp_path)
    samples = finish(read_celebdf(tmp_path, media=media))
    told = [(s.path.parts[len(tmp_path.parts)], s.label) for s in samples]
    assert told == [("Celeb-real", "real"), ("Celeb-synthesis", "fake"), ("YouTube-real", "real")]
    assert {s.split for s in samples} == {"test"}
    assert [s.group for s in samples] == ["Celeb-DF/id2", "Celeb-DF/id2", "Celeb-DF/00170"]
    (tmp_path / "List_of_testing_videos.txt").write_text("0 YouTube-real/00170.mp4\n")
    with raises("label_contradicts", "line 1", "YouTube-real"):
        read_celebdf(tmp_path, media=media)


def test_celebdf_clips_outside_the_list_are_no_training_split(tmp_path: Path) -> None:
    """Bug prevented: the other clips, taken for training, show the people of the test clips."""
    celebdf(tmp_path)
    out = tmp_path / "set.jsonl"
    refused = command("read", "celebdf", tmp_path, "--all", "--out", out).exception
    says(refused, "group_across_splits", "'Celeb-DF/id2'", "'test'", "--shares")
    assert not out.exists()
    listed = "1 YouTube-real/00170.mp4\n1 Celeb-real/id2_0001.mp4\n"
    (tmp_path / "List_of_testing_videos.txt").write_text(listed)
    assert command("read", "celebdf", tmp_path, "--all", "--group", "clip", "--out", out).exit_code == 0
    assert {s.id.split("/")[3]: s.split for s in read_manifest(out)}["id3_0007"] == ""
    assert command("read", "celebdf", tmp_path, "--all", "--shares", "train=0.5,test=0.5", "--out", out).exit_code == 0
    assert len({(s.group, s.split) for s in read_manifest(out) if "id" in s.id.split("/")[3]}) == 1
    for line in ("1 elsewhere/1.mp4", "real Celeb-real/id2_0001.mp4", "Celeb-real/id2_0001.mp4"):
        (tmp_path / "List_of_testing_videos.txt").write_text(line)
        with raises("list_malformed", "line 1"):
            read_celebdf(tmp_path)
    (tmp_path / "List_of_testing_videos.txt").write_text("1 Celeb-real/id9_0009.mp4")
    with raises("files_missing", "1 of 1"):
        finish(read_celebdf(tmp_path))


def test_dfdc_groups_a_fake_with_its_original(tmp_path: Path) -> None:
    """Bug prevented: the original in train, its forgery in val; `1` of labels.csv read as real."""
    part = {
        "a.mp4": {"label": "REAL", "split": "train"},
        "b.mp4": {"label": "FAKE", "split": "train", "original": "a.mp4"},
        "c.mp4": {"label": "FAKE", "split": "train", "original": "z.mp4"},
    }
    metadata = as_json(tmp_path / "dfdc_train_part_0/metadata.json", part)
    labels = tmp_path / "test/labels.csv"
    for name in ("d", "e"):
        touch(tmp_path / f"test/frames/{name}/0.png")
    for name in part:
        touch(metadata.parent / name)
    labels.write_text("filename,label\nd.mp4,1\ne.mp4,0\n")
    train = finish(read_dfdc([metadata]))
    assert [(s.label, s.group, s.split, s.df_class) for s in train] == [
        ("real", "DFDC/a", "train", "real"),
        ("fake", "DFDC/a", "train", ""),
        ("fake", "DFDC/c", "train", ""),
    ]
    test = finish(read_dfdc([labels], media=Media.frames), split="test")
    assert [(s.label, s.split, s.path.name) for s in test] == [("fake", "test", "0.png"), ("real", "test", "0.png")]
    labels.write_text("filename,label\nd.mp4,FAKE\n")
    with raises("list_malformed", "row 1"):
        read_dfdc([labels], media=Media.frames)
    as_json(metadata, {"a.mp4": {"split": "train"}})
    with raises("label_missing", "a.mp4"):
        read_dfdc([metadata])
