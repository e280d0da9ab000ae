"""Crops of a manifest, figures that choose a checkpoint, and lines of a card, which the trainings share."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data

from external_detectors.train import loop
from tests.raising import raises
from x2dfd import crops as crops_module
from x2dfd.crops import CropSet, load_crops, load_sets
from x2dfd.experts import write_card
from x2dfd.faces import PREPROCESSING, find_faces
from x2dfd.manifest import Sample
from x2dfd.tower import training_rows
from x2dfd.types import Card


def test_a_checkpoint_is_chosen_by_its_worst_method_and_source() -> None:
    """Bug prevented: a mean over learnt methods that hides the one which got worse, or a camera that looks forged; an
    AUC against the wrong real pictures, ties counted as wins, combined fakes counted twice."""
    kinds = [("real", "none"), ("real", "denoise"), ("fake", "a"), ("fake", "a+b"), ("fake", "b")]
    few = [Sample(str(i), Path(f"{i}"), label, method) for i, (label, method) in enumerate(kinds)]  # type: ignore[arg-type]
    table = loop.by_method(few, np.array([0.2, 0.4, 0.4, 0.9, 0.1]))
    assert table == {"a": {"auc": 0.875, "n_fake": 2}, "b": {"auc": 0.0, "n_fake": 1}, "n_real": 2}
    assert loop.by_method(few[2:], np.array([0.4, 0.9, 0.1])) == {"n_real": 0}
    rows = [("real", "none", "a")] * 10 + [("real", "none", "b")] * 10 + [("fake", "x", "a")] * 10
    rows += [("fake", "y", "a")] * 10 + [("fake", "rare", "a")] * 3
    samples = [Sample(str(i), Path("x"), label, method, source=src) for i, (label, method, src) in enumerate(rows)]  # type: ignore[arg-type]
    scores = np.array([0.0] * 10 + [0.4] * 10 + [1.0] * 10 + [0.2] * 10 + [-1.0] * 3)
    assert loop.worst(samples, scores) == pytest.approx(10 / 23, abs=1e-4)  # source b: three and ten fakes lie below
    lifted = scores + 10 * (np.array([m for _, m, _ in rows]) == "rare")
    assert loop.worst(samples, lifted) == 0.5  # method y against all reals; what three pictures say decides nothing
    assert loop.worst(samples[:20] + samples[20:30], lifted[:30]) == 1.0
    assert loop.worst(samples[:5], scores[:5]) is None
    # Of eight parts the lowest two: one method at chance does not decide alone.
    many = [Sample(str(i), Path("x"), "real", "none", source="a") for i in range(10)]
    many += [Sample(f"{m}{i}", Path("x"), "fake", m, source="a") for m in "pqrstuv" for i in range(10)]
    told = np.array([0.0] * 10 + [v for m in range(7) for v in [-1.0 if m == 0 else 0.0 if m == 1 else 1.0] * 10])
    assert loop.worst(many, told) == pytest.approx((0.0 + 0.5) / 2)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two usable photos around a picture without a face and a file that is no picture."""
    photo = np.array(skimage.data.astronaut()[10:310, 80:380, ::-1])
    for i, view in enumerate((photo, photo[:, ::-1])):
        cv2.imwrite(str(tmp_path / f"{i}.png"), view)
    cv2.imwrite(str(tmp_path / "flat.png"), np.full((200, 200, 3), 90, np.uint8))
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    lines = ["path,label,split", "0.png,real,train", "flat.png,real,train", "text.png,fake,train", "1.png,fake,calib"]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "m.csv"


def test_crops_belong_to_their_samples(mixed: Path) -> None:
    """Bug prevented: after an unusable file every crop stands at its neighbour's place."""
    data = load_crops(mixed)
    assert [s.id for s in data.samples] == ["0.png", "1.png"]
    assert data.unusable == {"flat.png": "no_face", "text.png": "not_an_image"}
    assert data.crops.shape == (2, 224, 224, 3) and data.landmarks.shape == (2, 468, 2)
    for i, sample in enumerate(data.samples):
        picture = cv2.cvtColor(np.asarray(cv2.imread(str(sample.path))), cv2.COLOR_BGR2RGB)
        face = find_faces(np.asarray(picture, np.uint8))[0]
        assert np.array_equal(data.crops[i], face.crop) and np.array_equal(data.landmarks[i], face.crop_landmarks)
    assert data.where(label="fake").tolist() == [1]
    assert data.where(label="real", split="train").tolist() == [0]
    assert data.where(label="real", split="calib").tolist() == []


@pytest.mark.slow
def test_crops_are_computed_once_and_anew_for_another_manifest(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: yesterday's crops under today's labels, or a wait at every start."""
    first = np.array(load_crops(mixed, workers=2).crops)
    with monkeypatch.context() as patch:
        patch.setattr(crops_module, "_compute", lambda *_: pytest.fail("computed again"))
        assert np.array_equal(load_crops(mixed).crops, first)
    lines = mixed.read_text("utf-8").splitlines()
    mixed.write_text("\n".join([lines[0], lines[4], lines[1]]) + "\n", encoding="utf-8")
    again = load_crops(mixed)
    assert [s.id for s in again.samples] == ["1.png", "0.png"] and not again.unusable
    assert np.array_equal(again.crops, first[::-1])


TWO_RUNS = """
import sys, time
from pathlib import Path
from x2dfd import crops

manifest, alone = Path(sys.argv[1]), crops._crop

def slow(paths):
    while len(list(manifest.parent.glob("*.ready"))) < 2:
        time.sleep(0.1)
    time.sleep(0.7)
    (manifest.parent / "cropped.txt").open("a").write(f"{paths[0]}\\n")
    return alone(paths)

crops._crop = slow
(manifest.parent / f"{sys.argv[2]}.ready").touch()
print([s.id for s in crops.load_crops(manifest).samples])
"""


@pytest.mark.slow
def test_crops_of_a_folder_that_cannot_be_written_are_kept_in_the_cache(
    mixed: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: pictures on a read-only disk end in "Read-only file system", without a way out."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("X2DFD_CACHE", str(cache))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != mixed.parent)
    before = sorted(mixed.parent.iterdir())
    made = load_crops(mixed)
    assert len(made.samples) == 2 and sorted(mixed.parent.iterdir()) == before
    monkeypatch.setattr(crops_module, "_compute", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(load_crops(mixed).crops, made.crops)


def test_the_second_of_two_runs_reads_the_crops_of_the_first(mixed: Path) -> None:
    """The slower of two trainings that began together ended with 'No such file: crops.part.npy'."""
    both = [
        subprocess.Popen([sys.executable, "-c", TWO_RUNS, str(mixed), name], stdout=subprocess.PIPE, stderr=-1)
        for name in "ab"
    ]
    said = [run.communicate(timeout=120) for run in both]
    assert [out.decode().strip() for out, _ in said] == ["['0.png', '1.png']"] * 2, said
    assert sum(b"waiting" in err for _, err in said) == 1
    assert len((mixed.parent / "cropped.txt").read_text("utf-8").splitlines()) == 4  # each file once


def test_a_damaged_cache_is_computed_anew(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: after a copy that was cut off, every run on the manifest ended in a ValueError or KeyError."""
    first, folder = np.array(load_crops(mixed).crops), mixed.parent / ".crops-m"
    found = [crops_module._crop((str(mixed.parent / f"{i}.png"), None, 224)) for i in range(2)]
    faces = {str(mixed.parent / f"{i}.png"): face for i, face in enumerate(found)}
    monkeypatch.setattr(crops_module, "_crop", lambda given: faces.get(given[0], "no_face"))
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    left_over: list[tuple[str, bytes | None]] = [(name, whole[name][:-9]) for name in whole if name.endswith("s.npy")]
    left_over += [("landmarks.npy", None), ("index.json", whole["index.json"][:40]), ("crops.npy", b"PK")]
    left_over += [("index.json", json.dumps({"key": json.loads(whole["index.json"])["key"]}).encode())]
    for name, left in left_over:  # by a kill, a full disk or an older version
        (folder / name).unlink()
        if left is not None:
            (folder / name).write_bytes(left)
        data = load_crops(mixed)
        assert np.array_equal(data.crops, first) and len(data.landmarks) == 2, name
        assert data.masks is not None and len(data.masks) == 2, name


def test_what_a_run_reads_is_not_emptied_under_it(mixed: Path) -> None:
    """Bug prevented: a training that is killed (SIGBUS), or reads noughts, while another makes its files anew."""
    load_crops(mixed)
    folder = mixed.parent / ".crops-m"
    np.save(folder / "masks.npy", np.full((2, 56, 56), 7, np.uint8))
    old = load_crops(mixed).masks
    (folder / "index.json").unlink()
    new = load_crops(mixed).masks
    assert old is not None and new is not None and (old == 7).all() and not new.any()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_a_full_disk_is_an_error_before_the_work(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a run that writes to a mapped file on a full disk is killed (SIGBUS) without a word."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = mixed.parent / ".crops-m"
    with monkeypatch.context() as patch, raises("cannot_write", "No space left", folder):
        patch.setattr(os, "posix_fallocate", full)
        load_crops(mixed)
    assert not list(folder.glob("*.npy"))

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert len(load_crops(mixed).samples) == 2


def test_a_manifest_without_a_usable_face_is_an_error(mixed: Path) -> None:
    """Bug prevented: an empty training set that fails far from its cause."""
    lines = mixed.read_text("utf-8").splitlines()
    mixed.write_text("\n".join([lines[0], lines[2], lines[3]]) + "\n", encoding="utf-8")
    for _ in range(2):
        with raises("no_usable_face"):
            load_crops(mixed)


def test_a_training_says_which_pictures_it_cannot_use(mixed: Path) -> None:
    """Bug prevented: a set of which a third shows no face is trained on without a word."""
    lines: list[str] = []
    [crops] = load_sets([mixed], on_remark=lines.append)
    assert crops.unusable and lines == [f"{mixed}: {crops.lost()}"]


def test_a_limit_draws_from_a_manifest_that_is_sorted() -> None:
    """Bug prevented: the first thousand rows of a sorted manifest are all real; or another draw in each stage."""
    kinds = [("real" if i < 50 else "fake", "train" if i % 5 else "val") for i in range(100)]
    samples = [Sample(str(i), Path("x"), label, split=split) for i, (label, split) in enumerate(kinds)]  # type: ignore[arg-type]
    data = CropSet(samples, np.zeros((100, 1, 1, 3), np.uint8), np.zeros((100, 468, 2), np.float32), {})
    few, more = training_rows(data, 20), training_rows(data, 40)
    assert set(few) < set(more) < set(training_rows(data)) and list(few) == sorted(few) and len(few) == 20
    assert 4 < sum(samples[i].label == "real" for i in few) < 16


def test_a_card_says_the_licence_of_its_pictures_and_the_next_version(tmp_path: Path) -> None:
    """Bug prevented: weights of a user's own CC0 photos said to be bound by FFHQ, or FFHQ's kept quiet about; every
    training stamped with one version, so that two files of weights go by it."""
    assert loop.next_version(tmp_path, "odd") == "1"
    card = Card("odd", "1", "here", "MIT", "", PREPROCESSING, "no paper", "everything")
    write_card(tmp_path / "odd.card.json", card)
    assert loop.next_version(tmp_path, "odd") == "2"
    free = Sample("1", Path("1"), "real", source="mine", extra={"licence": "CC0"})
    bound = Sample("2", Path("2"), "real", source="ffhq", extra={"licence": "CC BY-NC-SA 4.0"})
    silent = Sample("3", Path("3"), "fake", source="web")
    assert loop.licence_of([free]) == "weights: bound by what they were made of (trained on pictures under: CC0)"
    assert loop.licence_of([free, bound]).startswith("weights: research and evaluation only (")
    unstated = Sample("4", Path("4"), "real", source="web", extra={"licence": "not stated"})
    assert loop.licence_of([free, unstated]) == loop.licence_of([free, silent])
    line = loop.licence_of([free, bound, silent])
    assert line.startswith("weights: research and evaluation only (")
    assert "CC BY-NC-SA 4.0; CC0" in line and "no licence is stated for the pictures of web" in line
    assert "FFHQ" not in line
