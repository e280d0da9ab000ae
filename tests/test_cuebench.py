"""CueBench: the same set of the same photos, whole or refused, with the truth about each picture on its card."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray

from data_gen.forge import HARMLESS, METHODS
from eval import cuebench
from eval.cuebench import build, open_set
from tests.raising import raises
from x2dfd.degrade import tone
from x2dfd.files import file_sha256
from x2dfd.manifest import read_manifest

DONATED = {m.name for m in METHODS.values() if m.needs_donor}


def files(folder: Path) -> dict[str, str]:
    """Hashes of all pictures and of the manifest's rows."""
    return {p.name: file_sha256(p) for p in sorted((folder / "images").iterdir())}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two people, as far as can be had."""
    folder = tmp_path_factory.mktemp("photos")
    head: NDArray[np.uint8] = np.array(skimage.data.astronaut()[20:260, 110:350])
    other = np.clip(tone(head[:, ::-1], 0.8, np.random.default_rng(5)), 0, 255).astype(np.uint8)
    for name, pixels in (("a", head), ("b", other)):
        cv2.imwrite(str(folder / f"{name}.png"), cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR))
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "set"
    build(photos, out, per_method=1)
    return out


def test_the_packages_own_portrait_gives_a_set_that_says_how_small_it_is(tmp_path: Path) -> None:
    """Bug prevented: a bench of one person read as if it were of many, or a swap with oneself in it."""
    card = build(None, tmp_path, per_method=1)
    samples = read_manifest(open_set(tmp_path))
    assert card["groups"] == 1 and card["licences"] == ["public domain (NASA)"] and not card["standard_size"]
    assert set(card["methods_left_out_for_want_of_a_second_group"]) == DONATED
    assert {s.method for s in samples} == set(METHODS) - DONATED | set(HARMLESS) | {"none"}
    assert all((s.label == "fake") == bool(s.cues) == bool(s.mask) for s in samples)
    assert card["pictures"] == len(samples) == sum(card["by_label"].values())
    assert card["by_cue"] and sum(card["by_cue"].values()) == sum(len(s.cues) for s in samples)


def test_harmless_changes_lie_over_forgeries_too(photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a model that takes text or grain for a mark of real photos looks good."""
    build(photos, tmp_path, per_method=2)
    samples = read_manifest(open_set(tmp_path))
    fakes = [s for s in samples if s.label == "fake"]
    over = [s.extra.get("harmless") for s in fakes]
    assert sum(h is not None for h in over) == len(fakes) / 2 and len(set(over)) > len(HARMLESS) / 2
    assert all(s.extra.get("harmless") == s.method for s in samples if s.label == "real" and s.method != "none")


@pytest.mark.slow
def test_the_set_follows_from_the_photos_not_from_their_names(photos: Path, whole: Path, tmp_path: Path) -> None:
    """Bug prevented: two people with the same photos compare numbers on different forgeries."""
    assert {s.method for s in read_manifest(open_set(whole))} == set(METHODS) | set(HARMLESS) | {"none"}
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for old, new in (("a", "z"), ("b", "c")):
        (renamed / f"{new}.png").write_bytes((photos / f"{old}.png").read_bytes())
    (renamed / "twice.png").write_bytes((photos / "a.png").read_bytes())  # the same photo again changes nothing
    build(renamed, tmp_path / "set", per_method=1)
    assert files(tmp_path / "set") == files(whole)
    cards = [json.loads((f / "cuebench.json").read_text("utf-8")) for f in (tmp_path / "set", whole)]
    assert cards[0]["photos"] == cards[1]["photos"] and cards[0]["manifest_sha256"] == cards[1]["manifest_sha256"]


@pytest.mark.slow
def test_a_cut_off_set_is_refused(photos: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: half a set scored as if it were the whole; or one begun anew with other pictures."""
    made: list[str] = []
    real = cuebench._make

    def make(stop_after: int | None, item: Any, *rest: Any) -> Any:
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(item.name)
        return real(item, *rest)

    monkeypatch.setattr(cuebench, "_make", partial(make, 4))
    with pytest.raises(KeyboardInterrupt):
        build(photos, tmp_path, per_method=1)
    with raises("cuebench_unfinished", tmp_path):
        open_set(tmp_path)
    with raises("settings_differ", tmp_path):
        build(photos, tmp_path, per_method=2)
    monkeypatch.setattr(cuebench, "_make", partial(make, None))
    build(photos, tmp_path, per_method=1)
    assert len(set(made)) == len(made) > 4
    assert files(tmp_path) == files(whole)
    assert not (tmp_path / "manifest.part.jsonl").exists()


def test_a_changed_or_missing_file_is_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a set that lost pictures on a copy gives a number without a word."""
    plan = cuebench.plan
    monkeypatch.setattr(cuebench, "plan", lambda *words: plan(*words)[:4])
    build(photos, tmp_path, per_method=1)
    picture = next(iter(read_manifest(open_set(tmp_path)))).path
    data = picture.read_bytes()
    picture.write_bytes(data[:-9])
    with raises("cuebench_files_differ", 1):
        open_set(tmp_path)
    with raises("cuebench_files_differ", 1):
        build(photos, tmp_path, per_method=1)
    picture.write_bytes(data)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(manifest.read_text("utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with raises("cuebench_manifest_differs", manifest):
        open_set(tmp_path)


def test_photos_without_a_face_are_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a folder of landscapes that quietly becomes a bench of the two faces in it."""
    plan = cuebench.plan
    monkeypatch.setattr(cuebench, "plan", lambda *words: plan(*words)[:2])
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes((photos / "a.png").read_bytes())
    cv2.imwrite(str(folder / "grey.png"), np.full((90, 90, 3), 90, np.uint8))
    with raises("photos_unusable", "1 of 2", "--allow-missing"):
        build(folder, tmp_path / "out")
    card = build(folder, tmp_path / "out", allow_missing=True)
    assert (card["photos_given"], card["photos_unusable"], card["groups"]) == (2, 1, 1)
    (folder / "a.png").unlink()
    with raises("no_usable_picture"):
        build(folder, tmp_path / "none", allow_missing=True)
    with raises("number_out_of_range", "--per-method 0"):
        build(folder, tmp_path / "none", per_method=0)
