"""The leak report: what stands on two sides of a split is found, and nothing else is."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from data_gen.leaks import NEAR, FileFacts, as_text, file_facts, find_leaks, form_leaks, near_pairs
from tests.raising import raises, says
from tests.sets import command
from x2dfd.manifest import Sample, write_manifest


def photo(seed: int, side: int = 96) -> NDArray[np.uint8]:
    """Smooth random blobs: like a photo to a difference hash, another one for every seed. [side, side, 3]."""
    noise = np.random.default_rng(seed).normal(size=(8, 8, 3))
    big = cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 60 * big, 0, 255).astype(np.uint8)


def save(path: Path, pixels: NDArray[np.uint8], quality: int = 95) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return path.name


def manifest(folder: Path, rows: list[dict[str, Any]], name: str = "set") -> Path:
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


@pytest.mark.parametrize("near", [0, 1, 4, 8])
def test_banding_finds_what_comparing_all_pairs_finds(near: int) -> None:
    """Bug prevented: a pair that differs in every band but few bits is missed; one that shares bands counts twice."""
    rng = np.random.default_rng(near)
    n = 300
    coarse = rng.integers(0, 2**64, n, np.uint64)
    fine = np.zeros((n, 4), np.uint64)
    for i in range(0, n, 2):  # neighbours differ in 0 to 9 bits
        bits = rng.choice(64, int(rng.integers(0, 10)), replace=False)
        coarse[i + 1] = coarse[i] ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64), initial=0)
    coarse[40:60] = coarse[40]  # a crowded bucket
    side = rng.integers(0, 3, n)
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(n), 2)
        if side[i] != side[j] and int(coarse[i] ^ coarse[j]).bit_count() <= near
    }
    found = near_pairs(coarse, fine, side, near, keep=10**6)
    assert found.pairs == len(expected) == len(found.closest)
    assert {(min(i, j), max(i, j)) for _, i, j in found.closest} == expected
    assert found.items == {i for pair in expected for i in pair}


def test_the_finer_hash_has_the_last_word() -> None:
    """Bug prevented: two aligned faces have alike 64-bit hashes; calling them duplicates drowns the true ones."""
    coarse = np.zeros(2, np.uint64)
    fine = np.array([[0, 0, 0, 0], [(1 << 17) - 1, 0, 0, 0]], np.uint64)
    assert near_pairs(coarse, fine, np.array([0, 1]), 4).pairs == 0
    fine[1, 0] >>= np.uint64(1)
    assert near_pairs(coarse, fine, np.array([0, 1]), 4).pairs == 1
    with raises("near_out_of_range", 16):
        near_pairs(coarse, fine, np.array([0, 1]), 16)


@pytest.mark.slow
def test_a_hundred_thousand_pictures_take_seconds() -> None:
    """Bug prevented: five billion comparisons in Python for a set of ordinary size."""
    rng = np.random.default_rng(0)
    coarse, fine = rng.integers(0, 2**64, 100_000, np.uint64), np.zeros((100_000, 4), np.uint64)
    start = time.process_time()
    assert near_pairs(coarse, fine, np.arange(100_000) % 2).pairs < 3
    assert time.process_time() - start < 20


def test_a_copy_on_the_other_side_is_found_however_it_was_saved(tmp_path: Path) -> None:
    """Bug prevented: a training picture, re-encoded or resized, is tested on; or any two photos count as copies."""
    rows = []
    for seed in range(12):
        rows.append({"path": save(tmp_path / f"train{seed}.jpg", photo(seed)), "label": "real", "split": "train"})
    small = cv2.resize(photo(1), (60, 60), interpolation=cv2.INTER_AREA)
    copies = {"a.jpg": photo(0), "b.jpg": small, "c.png": photo(2)}
    for name, pixels in (copies | {f"other{s}.jpg": photo(s) for s in range(20, 30)}).items():
        save(tmp_path / name, pixels.astype(np.uint8), quality=60)
        rows.append({"path": name, "label": "fake", "split": "test"})
    (tmp_path / "same.jpg").write_bytes((tmp_path / "train3.jpg").read_bytes())
    rows.append({"path": "same.jpg", "label": "real", "split": "test"})
    save(tmp_path / "twin.jpg", photo(4), quality=50)
    rows.append({"path": "twin.jpg", "label": "real", "split": "train"})  # on the same side: no leak
    report = find_leaks([manifest(tmp_path, rows)])
    assert (report["near"]["pairs"], report["near"]["files"]) == (3, 6)
    pairs = {frozenset(name.split()[0] for name in pair["files"]) for pair in report["near"]["examples"]}
    assert pairs == {frozenset((f"train{i}.jpg", name)) for i, name in enumerate(copies)}
    assert report["identical"]["examples"] == [["train3.jpg (real, train)", "same.jpg (real, test)"]]
    assert report["groups"]["n"] == 0 and report["leaks"]
    text = as_text(report)
    assert "identical files on two sides: 1" in text and "3 pairs of 6 files (8 of 64 bits)" in text


def test_groups_shared_by_two_manifests_are_found(tmp_path: Path) -> None:
    """Bug prevented: training set and benchmark, each sound in itself, show the same people."""
    for i in range(4):
        save(tmp_path / f"{i}.jpg", photo(i))
    train = [{"path": "0.jpg", "label": "real", "group": "id1"}, {"path": "1.jpg", "label": "real"}]
    fake = {"path": "2.jpg", "label": "fake", "group": "id3", "sources": ["id3", "id1"]}
    first = manifest(tmp_path, train, "train")
    second = manifest(tmp_path, [fake, {"path": "3.jpg", "label": "real"}], "bench")
    report = find_leaks([first, second])
    assert report["groups"] == {"n": 1, "examples": {"id1": ["bench: (no split)", "train: (no split)"]}}
    assert report["sides"] == {"bench: (no split)": 2, "train: (no split)": 2}
    assert "id1: bench: (no split), train: (no split)" in as_text(report)
    # The same bytes as real and as fake, under two names.
    (tmp_path / "b.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    rows = [{"path": "0.jpg", "label": "real"}, {"path": "b.jpg", "label": "fake"}]
    report = find_leaks([manifest(tmp_path, rows)])
    assert report["identical_with_two_labels"]["n"] == 1 and report["identical"]["n"] == 0
    assert "identical files with two labels: 1" in as_text(report) and "only one side" in as_text(report)


def test_labels_that_the_file_format_gives_away_are_found(tmp_path: Path) -> None:
    """Bug prevented: a detector that is in truth a "JPEG or PNG" classifier, or one of size or quality."""
    rows = []
    for i in range(40):
        fake = i % 2 == 1
        side = 96 if i % 4 < 2 else 64  # says nothing
        name = save(tmp_path / f"{i}.{'png' if fake else 'jpg'}", photo(i, side))
        rows.append({"path": name, "label": "fake" if fake else "real"})
    report = find_leaks([manifest(tmp_path, rows)])
    form = {leak["trait"]: leak for leak in report["form"]}
    assert form["format"]["balanced_accuracy"] == 1.0 and form["format"]["rule"] == "fake if PNG"
    assert form["JPEG quantisation step"]["balanced_accuracy"] == 1.0
    assert form["width"]["balanced_accuracy"] < 0.75
    assert "1.00  format: fake if PNG" in as_text(report)


def test_quality_and_size_are_found_and_chance_is_chance(tmp_path: Path) -> None:
    """Bug prevented: a rule scored on the pictures it was fitted to finds a leak in any small set."""
    rows = []
    for i in range(60):
        save(tmp_path / f"{i}.jpg", photo(i), quality=60 if i % 2 else 92)
        rows.append({"path": f"{i}.jpg", "label": "fake" if i % 2 else "real"})
    form = {leak["trait"]: leak for leak in find_leaks([manifest(tmp_path, rows)])["form"]}
    assert form["JPEG quantisation step"]["balanced_accuracy"] == 1.0
    assert form["JPEG quantisation step"]["rule"].startswith("fake if more than")
    assert form["format"]["balanced_accuracy"] == form["width"]["balanced_accuracy"] == 0.5
    assert form["format"]["rule"] == form["width"]["rule"] == "never fake"

    rng = np.random.default_rng(1)
    samples = [Sample(str(i), tmp_path, "fake" if i % 2 else "real", group=str(i)) for i in range(400)]
    (random,) = form_leaks(samples, [FileFacts(form={"bytes per pixel": float(rng.normal())}) for _ in samples])
    assert 0.4 < random["balanced_accuracy"] < 0.6
    assert form_leaks(samples[:1], [FileFacts(form={"width": 1.0})]) == []


def test_what_cannot_be_compared_is_counted(tmp_path: Path) -> None:
    """Bug prevented: flat pictures are all alike to a hash and fill the report; a broken file stops the run."""
    rows = [{"path": "gone.jpg", "label": "real", "split": "train"}]
    (tmp_path / "text.jpg").write_text("no picture")
    rows.append({"path": "text.jpg", "label": "real", "split": "train"})
    for i, split in enumerate(("train", "test")):
        save(tmp_path / f"{split}.jpg", np.full((64, 64, 3), 100 + i, np.uint8))
        rows.append({"path": f"{split}.jpg", "label": "real", "split": split})
    report = find_leaks([manifest(tmp_path, rows)])
    assert report["flat"] == 2 and report["near"]["pairs"] == 0
    assert report["unreadable"] == {"not_an_image": 1, "not_found": 1}
    assert "form: too few" in as_text(report) and "unreadable: not_an_image 1, not_found 1" in as_text(report)


def test_videos_are_looked_at_too(tmp_path: Path) -> None:
    """Bug prevented: a manifest may list clips; without a frame of each, a re-encoded clip passes."""
    for name, code in (("a.avi", "MJPG"), ("b.avi", "XVID")):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter.fourcc(*code), 10, (96, 96))
        if not writer.isOpened():
            pytest.skip("this OpenCV writes no videos")
        for _ in range(5):
            writer.write(photo(7))
        writer.release()
    a, b = (file_facts(str(tmp_path / name)) for name in ("a.avi", "b.avi"))
    assert a.sha256 != b.sha256 and a.coarse is not None and b.coarse is not None
    assert (a.coarse ^ b.coarse).bit_count() <= NEAR and not a.form


def test_the_exit_code_is_asked_for(tmp_path: Path) -> None:
    """Bug prevented: a leak that no script notices; or exit code 1 for a run that did what it should."""
    save(tmp_path / "a.jpg", photo(0))
    save(tmp_path / "b.jpg", photo(0))
    save(tmp_path / "c.jpg", photo(1))
    train = {"path": "a.jpg", "label": "real", "split": "train"}
    leaky, sound = (
        manifest(tmp_path, [train, train | {"path": f"{name}.jpg", "split": "test"}], name) for name in ("b", "c")
    )
    assert command("leaks", leaky).exit_code == command("leaks", sound, "--check").exit_code == 0
    assert command("leaks", leaky, "--check").exit_code == 1
    report = json.loads(command("leaks", leaky, "--json", "--workers", "2").stdout)
    assert report["identical"]["n"] == 1 and report["leaks"] is True
    one = {"path": "a.jpg", "label": "real", "group": "g", "split": "train"}
    rows = [one, one | {"path": "b.jpg", "split": "test"}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    says(command("leaks", tmp_path / "bad.jsonl").exception, "group_across_splits", "'g'")
