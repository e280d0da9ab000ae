"""The forge: what each method says it did is what it did, and a run is reproducible, resumable and split-safe."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from data_gen import decoders, latent, run_forge
from data_gen.forge import HARMLESS, LATENT, METHODS, Forgery, Method, Photo, changed, forge, joined_cues
from data_gen.run_forge import ForgeConfig, run, split_of
from data_gen.tools import shows_teeth
from data_gen.visibility import visible
from tests.raising import raises
from x2dfd.degrade import codec, degrade, rescale, soft, tone, video_codec
from x2dfd.faces import area_mask, find_faces
from x2dfd.files import file_sha256
from x2dfd.manifest import read_manifest, write_manifest
from x2dfd.types import AREAS, ARTIFACTS, Cue

ROOT = Path(__file__).resolve().parents[1]
Array = NDArray[Any]
Made = dict[tuple[str, float], list[Forgery]]

STRENGTHS = (0.0, 0.5, 1.0)
SEEDS = range(8)


def _photo(pixels: NDArray[np.uint8], group: str) -> Photo:
    [face] = find_faces(pixels)
    return Photo(pixels, face.landmarks, "tests", group)


@pytest.fixture(scope="module")
def photo() -> Photo:
    """The astronaut's head: [300, 300, 3], a face of about 100 pixels."""
    return _photo(np.array(skimage.data.astronaut()[20:320, 90:390]), "a")


@pytest.fixture(scope="module")
def donor(photo: Photo) -> Photo:
    """Somebody else, as far as can be had: mirrored, in other light, warped."""
    other = np.clip(tone(photo.pixels[:, ::-1], 0.8, np.random.default_rng(5)), 0, 255).astype(np.uint8)
    yy, xx = np.mgrid[0:300, 0:300].astype(np.float32)
    across, down = (6 * np.sin(yy / 40)).astype(np.float32), (5 * np.sin(xx / 50)).astype(np.float32)
    other = np.asarray(
        cv2.remap(other, xx + across, yy + down, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT), np.uint8
    )
    return _photo(other, "b")


@pytest.fixture(scope="module")
def made(photo: Photo, donor: Photo) -> Made:
    """Every method at three strengths, with the same generator states at each."""
    cv2.setNumThreads(1)
    return {
        (name, strength): [forge(photo, method, np.random.default_rng([3, s]), donor, strength) for s in SEEDS]
        for name, method in (METHODS | HARMLESS).items()
        for strength in STRENGTHS
    }


def _several(
    photo: Photo, name: str, key: int, n: int, donor: Photo | None = None, strength: float | None = None
) -> list[Forgery]:
    """`n` forgeries of one method, each of its own generator state."""
    return [forge(photo, METHODS[name], np.random.default_rng([key, s]), donor, strength) for s in range(n)]


def _face_size(photo: Photo) -> float:
    return float(np.sqrt(np.prod(np.ptp(photo.landmarks, 0))))


def _grown(mask: Array, photo: Photo, share: float) -> NDArray[np.bool_]:
    k = round(share * _face_size(photo))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * k + 1, 2 * k + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def _change(forgery: Forgery, photo: Photo) -> Array:
    """Grey levels changed at each pixel, mean over the channels."""
    return np.asarray(np.abs(forgery.pixels.astype(np.int16) - photo.pixels).mean(-1))


@pytest.mark.parametrize("name", [*METHODS, *HARMLESS])
def test_shape_type_and_vocabulary(made: Made, photo: Photo, name: str) -> None:
    """Bug prevented: a cue outside the vocabulary, a fake without a cue, a harmless change with one."""
    table = METHODS if name in METHODS else HARMLESS
    for strength in STRENGTHS:
        for f in made[name, strength]:
            assert f.pixels.shape == photo.pixels.shape and f.pixels.dtype == np.uint8
            assert f.mask.shape == photo.pixels.shape[:2] and f.mask.dtype == np.uint8
            assert (f.method, f.df_class, f.strength) == (name, table[name].df_class, strength)
            assert all(c.area in AREAS and c.artifact in ARTIFACTS and 0 <= (c.score or 0) <= 1 for c in f.cues)
            assert len({(c.area, c.artifact) for c in f.cues}) == len(f.cues)
            assert (len(f.cues) >= 1) == (name in METHODS) == (f.df_class != "real")
            assert f.mask.any() == (name in METHODS)
            # Drawn once, far out of the frame or not at all: `caption` may fall on what is white already.
            assert (f.pixels != photo.pixels).any()


@pytest.mark.parametrize("name", METHODS)
def test_the_mask_holds_the_change_and_the_areas_of_its_cues(made: Made, photo: Photo, name: str) -> None:
    """Bug prevented: a mask of other pixels than those that were changed, or an inverted one (cv2.seamlessClone writes
    into the one it is given): wrong truth for every map; an explanation scored as right for an area nobody touched.

    Of `self_blend`, the outer layer may be the changed one. A seamless clone (some of `swap`) lets a little colour
    bleed within the rectangle about its mask, as Poisson blending does.
    """
    named = set()
    for strength in STRENGTHS:
        for f in made[name, strength]:
            change = _change(f, photo)
            inside, outside = _grown(f.mask > 0, photo, 0.02), ~_grown(f.mask > 0, photo, 0.06)
            if name == "swap":
                ys, xs = np.nonzero(f.mask)
                box = np.zeros_like(outside)
                box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = True
                assert change[outside & box].mean() < 5 and change[outside & box].max() < 40
                outside &= ~box
            assert name == "self_blend" or change[outside].max(initial=0) == 0
            if strength == 1.0:
                assert change[inside].mean() > 0.5
                assert name == "self_blend" or inside.all() or change[inside].mean() > 5 * change[~inside].mean()
            edge = (cv2.dilate(f.mask, np.ones((3, 3))) > 100) & (cv2.erode(f.mask, np.ones((3, 3))) < 156)
            for cue in f.cues:
                area = area_mask(photo.landmarks, cue.area, photo.pixels.shape) > 0
                named.add((cue.area, cue.artifact))
                assert (f.mask[area] > 25).mean() > 0.1, cue
                if cue.artifact == "blending" and edge.any():  # a seam lies in the area, or right beside it
                    assert edge[_grown(area, photo, 0.08)].sum() > 0.1 * edge.sum(), cue
    assert len(named) > 1 or name in ("relight", "redraw")


@pytest.mark.parametrize("name", METHODS)
def test_change_grows_with_strength(made: Made, photo: Photo, name: str) -> None:
    """Bug prevented: a strength that is recorded as the cue's score but not applied."""

    def much(f: Forgery) -> float:
        inside = f.mask > 0
        if name in ("swap", "transplant", "mouth"):  # what is put in; strength withdraws the match of its colour
            return float(np.abs(f.pixels[inside].mean(0) - photo.pixels[inside].mean(0)).max())
        if name == "resynthesise":  # the mask is at times the face and at times the picture: look at the face
            inside = area_mask(photo.landmarks, "skin", inside.shape) > 0
        return float(_change(f, photo)[inside].sum())

    low, middle, high = (float(np.median([much(f) for f in made[name, s]])) for s in STRENGTHS)
    assert high > 1.05 * low
    assert 0.95 * low <= middle <= 1.05 * high


@pytest.mark.parametrize("name", [*METHODS, *HARMLESS])
def test_a_changed_face_is_still_a_face(made: Made, photo: Photo, name: str) -> None:
    """Bug prevented: a method that wrecks the picture, so that a detector learns wreckage."""
    covers = name in ("big_text", "sticker")  # at full strength they may hide a face, as words and hands do
    for f in made[name, 0.0 if covers else 1.0]:
        [face] = find_faces(f.pixels)
        assert np.linalg.norm(face.landmarks - photo.landmarks, axis=1).mean() < 0.1 * _face_size(photo)
        assert _change(f, photo).mean() < 60


@pytest.mark.parametrize("name", [*METHODS, *HARMLESS])
def test_same_seed_same_bytes(photo: Photo, donor: Photo, name: str) -> None:
    """Bug prevented: a hidden generator, or a method that writes into its input."""
    before = photo.pixels.copy(), donor.pixels.copy()
    method = (METHODS | HARMLESS)[name]
    one, two, other = (forge(photo, method, np.random.default_rng([9, s]), donor) for s in (0, 0, 1))
    assert np.array_equal(one.pixels, two.pixels) and np.array_equal(one.mask, two.mask)
    assert (one.cues, one.strength) == (two.cues, two.strength)
    assert not np.array_equal(one.pixels, other.pixels) and one.strength != other.strength
    assert np.array_equal(photo.pixels, before[0]) and np.array_equal(donor.pixels, before[1])
    if method.needs_donor:
        with pytest.raises(ValueError, match="needs a donor"):
            forge(photo, method, np.random.default_rng(0))


def test_a_cues_score_is_what_shows_and_a_swap_brings_the_donors_face(photo: Photo, donor: Photo) -> None:
    """Bug prevented: a full blur of a face that is blurred already, called "clear" in every explanation; the warp maps
    the photo onto itself; the pasted face is still the photo's."""
    blurred = replace(photo, pixels=np.asarray(cv2.GaussianBlur(photo.pixels, (0, 0), 8), np.uint8))
    scores: dict[str, list[float]] = {}
    for name, who in (("sharp", photo), ("blurred", blurred)):
        scores[name] = [c.score or 0.0 for f in _several(who, "blur_mismatch", 8, 8, strength=1.0) for c in f.cues]
    assert np.median(scores["sharp"]) > 2 * np.median(scores["blurred"])
    for name in ("noise_mismatch", "relight", "smooth_skin", "resynthesise"):
        weak, strong = (
            np.median([f.cues[0].score or 0 for f in _several(photo, name, 8, 8, strength=t)]) for t in (0.1, 0.9)
        )
        assert strong > 1.2 * weak, name
    own, others = (
        np.mean([_change(f, photo)[f.mask > 128].mean() for f in _several(photo, "swap", 4, 6, who, 1.0)])
        for who in (photo, donor)
    )
    assert others > 1.5 * own


def test_a_cue_is_measured_by_its_own_effect_and_can_be_seen(photo: Photo) -> None:
    """Bug prevented: every cue gets the whole change as its score: a face sharpened is "clearly blurred"; a faint dial
    on a picture that hides it, called a forgery and explained."""
    mask = area_mask(photo.landmarks, "skin", photo.pixels.shape) / 255.0
    sharp = photo.pixels.astype(np.float32)
    grain = np.random.default_rng(0).standard_normal(sharp.shape) * 15
    changed = {
        "blur": soft(sharp, 2.5),
        "noise": sharp + grain,
        "colour": sharp * 0.8 + 25,
        "sharpened": sharp + 1.5 * (sharp - soft(sharp, 1.5)),
    }
    for kind, new in changed.items():
        after = np.clip(np.rint(sharp * (1 - mask[..., None]) + new * mask[..., None]), 0, 255).astype(np.uint8)
        scores = {cue: visible(photo.pixels, after, mask, cue) for cue in ("blur", "noise", "colour")}
        for cue, score in scores.items():
            if cue == kind:
                assert score > 0.5, (kind, scores)
            elif (kind, cue) != ("sharpened", "noise"):  # both add fine detail, and look alike
                assert score < max(0.15, scores.get(kind, 0) / 2), (kind, scores)
    # Either layer of a blend may be the changed one.
    outside = np.where(mask[..., None] > 0.5, sharp, soft(sharp, 2.5)).round().astype(np.uint8)
    assert visible(photo.pixels, outside, mask, "blur") > 0.3
    flat = replace(photo, pixels=np.full_like(photo.pixels, 120))  # a blur of nothing
    assert all(f.strength == 1 and f.cues[0].score == 0 for f in _several(flat, "blur_mismatch", 2, 6))
    asked = [float(np.random.default_rng([2, s]).uniform(0, 1)) for s in range(6)]
    seen = [f.strength for f in _several(photo, "noise_mismatch", 2, 6)]
    assert seen == [round(a, 3) for a in asked]  # what shows at once stays as it was drawn


def test_donors_are_chosen_by_pose(photo: Photo) -> None:
    """Bug prevented: a frontal face folded onto a profile."""
    turned = photo.landmarks.copy()
    turned[1] += (turned[454] - turned[234]) * 0.25  # the nose far to one side
    profile = replace(photo, landmarks=turned)
    assert np.abs(run_forge.pose(photo) - run_forge.pose(profile)).max() > 0.2
    bigger = replace(photo, landmarks=photo.landmarks * 3 + 20)
    assert np.allclose(run_forge.pose(photo), run_forge.pose(bigger), atol=1e-4)


def test_degradations_follow_their_seed_and_go_the_right_way(photo: Photo) -> None:
    """Bug prevented: a rescale that is not undone, floats that wrap around, or a generator of its own; quality, factor
    or sigma with the wrong sign; colours swapped or rows lost in a codec."""
    results = [degrade(photo.pixels, np.random.default_rng(s)) for s in range(30)]
    assert all(r.shape == photo.pixels.shape and r.dtype == np.uint8 for r in results)
    assert all(np.array_equal(r, degrade(photo.pixels, np.random.default_rng(s))) for s, r in enumerate(results))
    changes = [float(np.abs(r.astype(int) - photo.pixels).mean()) for r in results]
    assert max(changes) < 60 and sum(c > 0.5 for c in changes) > 15 and min(changes) < 0.5

    def rough(x: Array) -> float:
        return float(np.abs(cv2.Laplacian(np.asarray(x, np.float32), cv2.CV_32F)).mean())

    def off(x: Array) -> float:
        return float(np.abs(np.asarray(x, np.float32) - photo.pixels).mean())

    sharp, rng = photo.pixels.astype(np.float32), np.random.default_rng
    assert rough(soft(sharp, 3.0)) < rough(soft(sharp, 1.0)) < rough(sharp)
    assert rough(rescale(sharp, 0.3)) < rough(rescale(sharp, 0.8)) < rough(sharp)
    for kind in (".jpg", ".webp"):
        assert 0 < off(codec(photo.pixels, kind, 95)) < off(codec(photo.pixels, kind, 20)) < 12
    with pytest.raises((RuntimeError, cv2.error)):
        codec(photo.pixels, ".nonsense", 90)
    faint, some, much = (off(tone(photo.pixels, strength, rng(1))) for strength in (0.0, 0.2, 1.0))
    assert faint < 1e-3 < some < much
    odd = photo.pixels[:223, :221]
    losses = [float(np.abs(video_codec(odd, crf).astype(int) - odd).mean()) for crf in (16, 26, 38)]
    assert video_codec(odd, 26).shape == odd.shape
    assert losses == sorted(losses) and losses[0] < 4 and losses[2] < 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 14 astronauts in other light: ten of split train, four of test, two ready-made fakes of each."""
    folder = tmp_path_factory.mktemp("photos")
    pixels, rows = np.array(skimage.data.astronaut()[10:310, 80:380]), []
    for i in range(14):
        rng = np.random.default_rng(i)
        view = np.clip(tone(pixels[:, ::-1] if i % 2 else pixels, 0.5, rng), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), view[..., ::-1])
        split = "train" if i < 10 else "test"
        row = {"path": f"{i}.png", "label": "real", "source": f"s{i % 3}", "group": f"person{i}", "split": split}
        if i % 5 > 2 and i != 13:
            row |= {"label": "fake", "method": "stylegan", "df_class": "EFS"}
        rows.append(row)
    return _write_rows(folder / "manifest.jsonl", rows)


@pytest.fixture
def config(photos: Path) -> ForgeConfig:
    return ForgeConfig(data=str(photos), count=20, seed=7, side=160, combine=0.2, ready_made=0.1, calib=0.4)


@pytest.fixture
def all_forged(config: ForgeConfig) -> ForgeConfig:
    """Settings by which every picture is one forgery of a photo."""
    return replace(config, forged=1.0, ready_made=0, combine=0)


def _files(out: Path) -> dict[str, str]:
    return {p.relative_to(out).as_posix(): file_sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}


def _rows(manifest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in manifest.read_text("utf-8").splitlines()]


def _write_rows(manifest: Path, rows: list[dict[str, Any]]) -> Path:
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return manifest


def _forged(config: ForgeConfig, out: Path, workers: int = 1, **changes: Any) -> list[dict[str, Any]]:
    """The rows of a run with these settings changed."""
    return _rows(run(replace(config, **changes), out, workers))


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(config: ForgeConfig, tmp_path: Path) -> None:
    """Bug prevented: a generator shared by items, so that the order of work changes the data."""
    run(config, tmp_path / "one", workers=1)
    run(config, tmp_path / "two", workers=2)
    files = _files(tmp_path / "one")
    assert len(files) > 20 and files == _files(tmp_path / "two")
    run(replace(config, seed=8), tmp_path / "other")
    assert not set(files.values()) & {h for n, h in _files(tmp_path / "other").items() if n.endswith(".jpg")}


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(
    config: ForgeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: after a crash, half-written rows, missing pictures, or everything made anew."""
    run(config, tmp_path / "whole")
    work, done = run_forge._work, []

    def killed(index: int) -> dict[str, Any]:
        if index == 7:
            raise KeyboardInterrupt
        return work(index)

    def counted(index: int) -> dict[str, Any]:
        done.append(index)
        return work(index)

    monkeypatch.setattr(run_forge, "_work", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "cut")
    part = tmp_path / "cut" / "manifest.part.jsonl"
    lines = part.read_text("utf-8").splitlines(keepends=True)
    assert len(lines) == 7 and not (tmp_path / "cut" / "manifest.jsonl").exists()
    part.write_text("".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2], encoding="utf-8")
    monkeypatch.setattr(run_forge, "_work", counted)
    run(config, tmp_path / "cut")
    assert done == list(range(6, config.count))
    assert _files(tmp_path / "cut") == _files(tmp_path / "whole")


def test_a_finished_run_is_returned_and_another_one_refused(
    config: ForgeConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: two runs mixed in one folder, or somebody's manifest handed back as if we had made it."""
    small = replace(config, count=3)
    manifest = run(small, tmp_path / "out")
    before = _files(tmp_path / "out")
    monkeypatch.setattr(run_forge, "_item", lambda *_: pytest.fail("made again"))
    assert run(small, tmp_path / "out") == manifest
    for other in (replace(small, seed=1), replace(small, count=4), replace(small, methods=("relight",))):
        with raises("settings_differ", tmp_path / "out"):
            run(other, tmp_path / "out")
    with raises("not_a_forge_run"):
        run(small, photos.parent)
    assert _files(tmp_path / "out") == before


def test_a_finished_run_makes_deleted_pictures_again(config: ForgeConfig, tmp_path: Path) -> None:
    """Bug prevented: a run whose pictures were deleted is called finished, and a training misses them."""
    forged = replace(config, count=3, forged=1.0, ready_made=0.0)
    manifest = run(forged, tmp_path)
    before, rows = _files(tmp_path), _rows(manifest)
    masked = next(row for row in rows if "mask" in row)
    other = next(row for row in rows if row is not masked)
    (tmp_path / masked["mask"]).unlink()
    (tmp_path / other["path"]).unlink()
    assert run(forged, tmp_path) == manifest and _files(tmp_path) == before


def test_rows_say_what_is_on_disk(config: ForgeConfig, all_forged: ForgeConfig, photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a mask of another size than its picture, a hash of other bytes, a label that the cues belie; a
    data card that cannot say under what licence its pictures stand."""
    samples = read_manifest(run(replace(config, count=40, ready_made=0.2), tmp_path / "out"))
    chosen = _forged(all_forged, tmp_path / "chosen", splits=("test",), methods=("relight",), count=6)
    assert {(r["split"], r["method"]) for r in chosen} == {("test", "relight")}
    assert len(samples) == len({s.id for s in samples}) == 40
    kinds = {"real": 0, "forged": 0, "ready": 0}
    originals = {s.group: s for s in read_manifest(photos)}
    for s in samples:
        picture = cv2.imread(str(s.path))
        assert picture is not None and max(picture.shape) <= 160 and s.path.suffix == ".jpg"
        assert s.extra["sha256"] == file_sha256(s.path)
        assert s.source == originals[s.group].source
        kind = "real" if s.label == "real" else "forged" if s.mask else "ready"
        kinds[kind] += 1
        assert s.extra.get("harmless") in (None, *HARMLESS)
        if kind == "forged":
            mask = cv2.imread(str(s.mask), cv2.IMREAD_UNCHANGED)
            assert mask is not None and mask.shape == picture.shape[:2] and mask.max() > 25
            assert s.extra["shows"] == run_forge.shows(max(c.score or 0 for c in s.cues))
            assert s.cues and set(s.method.split("+")) <= set(METHODS) and originals[s.group].label == "real"
        elif kind == "ready":
            assert (s.method, s.df_class) == ("stylegan", "EFS") and originals[s.group].label == "fake"
            assert s.cues == ()  # what it shows where, nobody knows
        else:
            assert not s.cues and s.mask is None and s.method == (s.extra.get("harmless") or "none")
            assert originals[s.group].label == "real"
    assert min(kinds.values()) >= 3, kinds
    assert any("+" in s.method for s in samples)
    keys = ("label", "method", "df_class", "source", "group", "split")
    rows = [{"path": str(s.path), **{k: getattr(s, k) for k in keys}} for s in read_manifest(config.data)]
    write_manifest(tmp_path / "m.jsonl", [row | {"licence": "CC0"} for row in rows])
    for data, licence in ((str(tmp_path / "m.jsonl"), "CC0"), (config.data, None)):
        rows = _forged(config, tmp_path / str(licence), data=data, count=3)
        assert [row.get("licence") for row in rows] == [licence] * 3


@pytest.mark.slow
def test_harmless_changes_have_the_same_odds_under_every_label(config: ForgeConfig, tmp_path: Path) -> None:
    """Bug prevented: text, glasses or grain on real photos alone, which is then learnt as a mark of real photos."""
    mixed = replace(config, count=150, ready_made=0.3, methods=("smooth_skin", "noise_mismatch"))
    samples = read_manifest(run(replace(mixed, harmless=0.5), tmp_path / "half"))
    kinds = {
        "real": [s for s in samples if s.label == "real"],
        "forged": [s for s in samples if s.label == "fake" and s.mask],
        "ready": [s for s in samples if s.label == "fake" and not s.mask],
    }
    for kind, mine in kinds.items():
        changed_share = np.mean([s.extra.get("harmless") is not None for s in mine])
        assert len(mine) > 20 and abs(changed_share - 0.5) < 4 * 0.5 / np.sqrt(len(mine)), (kind, changed_share)
        assert len({s.extra.get("harmless") for s in mine}) > 5
    for share in (0.0, 1.0):
        samples = read_manifest(run(replace(mixed, count=12, harmless=share), tmp_path / str(share)))
        assert all((s.extra.get("harmless") is not None) == bool(share) for s in samples)


def test_under_a_harmless_change_the_truth_is_what_still_shows(photo: Photo) -> None:
    """Bug prevented: a cue that a blur has taken, a mask of what a sticker hides."""
    rng = np.random.default_rng(4)
    noisy = forge(photo, METHODS["noise_mismatch"], rng, strength=1.0)
    scores = {}
    for name in ("soft_focus", "glasses"):
        found = [changed(photo, noisy, HARMLESS[name], np.random.default_rng(k)) for k in range(6)]
        scores[name] = float(np.mean([c.score or 0 for f in found for c in f.cues]))
        assert all(f.cues and (f.method, f.df_class) == (noisy.method, noisy.df_class) for f in found)
    before = float(np.mean([c.score or 0 for c in noisy.cues]))
    assert scores["soft_focus"] < 0.6 * before and scores["glasses"] > 0.8 * before
    # Where a flat shape covers the forgery, the mask has a hole of that shape; elsewhere it is the old one.
    found = [changed(photo, noisy, HARMLESS["sticker"], np.random.default_rng(k)) for k in range(12)]
    holes = [(f.mask == 0) & (noisy.mask > 0) for f in found]
    assert max(h.mean() for h in holes) > 0.005
    for f, hole in zip(found, holes, strict=True):
        assert np.array_equal(f.mask[~hole], noisy.mask[~hole])
        assert (f.pixels[hole] == f.pixels[hole][:1]).all() or len(np.unique(f.pixels[hole], axis=0)) < 400
    # Text stands at the same pixels of the photo and of its forgery: there the two are one.
    text = changed(photo, noisy, HARMLESS["big_text"], np.random.default_rng(3))
    written = (text.pixels != noisy.pixels).any(-1)
    assert 0.002 < written.mean() < 0.3 and np.array_equal(text.pixels[~written], noisy.pixels[~written])
    # What would cover the whole forgery is not made; one that is half transparent is changed like any other.

    def wall(photo: Photo, donor: Photo | None, strength: float, rng: np.random.Generator) -> Any:
        return np.full(photo.pixels.shape, 90.0), np.zeros(photo.pixels.shape[:2]), []

    assert changed(photo, noisy, Method("wall", "real", wall), np.random.default_rng(1)) is noisy
    faint = replace(noisy, mask=(noisy.mask // 2).astype(np.uint8))
    for name in HARMLESS:
        if name != "sticker":
            assert changed(photo, faint, HARMLESS[name], np.random.default_rng(3)) is not faint, name


@pytest.mark.slow
def test_the_forge_draws_with_the_decoders_it_is_given(all_forged: ForgeConfig, tmp_path: Path) -> None:
    """Bug prevented: `data_gen decoders --out FILE` writes what the forge never looks at."""
    own = tmp_path / "own.safetensors"
    decoders.save_bank({d.name: decoders.Autoencoder(d) for d in decoders.DESIGNS}, own)
    config = replace(all_forged, count=2, methods=("redraw",))
    a, b, c, d = (
        [r["sha256"] for r in _forged(config, tmp_path / name, workers, decoders=file)]
        for name, workers, file in (("a", 1, None), ("b", 1, str(own)), ("c", 2, str(own)), ("d", 1, None))
    )
    assert b == c and a == d and not set(a) & set(b)
    assert json.loads((tmp_path / "b" / "forge.json").read_text())["decoders"] == file_sha256(own)
    with raises("settings_differ", tmp_path / "b"):
        run(config, tmp_path / "b")
    (tmp_path / "other.safetensors").write_bytes(b"none of it")
    for wrong, code in (
        ({"decoders": str(tmp_path / "other.safetensors")}, "decoders_unreadable"),
        ({"decoders": str(tmp_path / "absent.safetensors")}, "decoders_missing"),
        ({"decoders": str(own), "methods": ("relight",)}, "decoders_unused"),
    ):
        with raises(code):
            run(replace(config, **wrong), tmp_path / "e")


@pytest.mark.slow
def test_splits_never_share_a_group_or_a_donor(all_forged: ForgeConfig, photos: Path, tmp_path: Path) -> None:
    """Bug prevented: a test identity that was seen in training, as a photo or as the face that was pasted in."""
    split_by_group = {s.group: split_of(s, all_forged.calib) for s in read_manifest(photos)}
    assert set(split_by_group.values()) == {"train", "calib", "test"}
    rows = _forged(all_forged, tmp_path / "out", count=60, methods=("swap", "transplant"))
    assert len(rows) == 60 and {r["split"] for r in rows} == {"train", "calib", "test"}
    assert all(r["split"] == split_by_group[r["group"]] == split_by_group[r["donor"]] for r in rows)
    assert all(r["group"] != r["donor"] for r in rows)


@pytest.mark.parametrize(
    ("changes", "code", "fact"),
    [
        ({"methods": ("self_blnd",)}, "unknown_name", "did you mean 'self_blend'"),
        ({"methods": ("swap",), "combine": 0.5}, "donor_methods_alone", "swap"),
        ({"forged": 1.5}, "share_out_of_range", "forged"),
        ({"splits": ("nowhere",)}, "no_real_picture", "no real"),
        ({"ready_made": 0.5, "splits": ("test",)}, "no_fake_picture", 0.5),
        # A row without a split counts as train, while another picture of that person stands in test.
        ({"data": "leak.jsonl", "calib": 0}, "group_across_splits", "person12"),
    ],
)
def test_settings_that_cannot_work_are_refused_first(
    config: ForgeConfig, photos: Path, tmp_path: Path, changes: dict[str, Any], code: str, fact: object
) -> None:
    """Bug prevented: a typo found after an hour, shares silently shifted, a traceback out of a worker process."""
    rows = _rows(photos)
    rows[0] |= {"group": rows[12]["group"], "split": ""}
    leak = _write_rows(photos.with_name("leak.jsonl"), rows)
    if "data" in changes:
        changes = changes | {"data": str(leak)}
    with raises(code, fact):
        run(replace(config, **changes), tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [None, "path,label\na.png,maybe\n", '{"path": "a.png", "label"\n'])
def test_the_command_prints_its_manifest_or_one_line(photos: Path, tmp_path: Path, text: str | None) -> None:
    """Bug prevented: the next stage cannot be given the name of this one's result; a traceback out of two workers."""
    data = photos
    if text is not None:
        data = tmp_path / ("bad.csv" if "," in text[:5] else "bad.jsonl")
        data.write_text(text, encoding="utf-8")
    options = ["--count", "2", "--forged", "1", "--methods", "relight", *(["--workers", "2"] if text else [])]
    words = [sys.executable, "-m", "data_gen", "forge", "--data", str(data), "--out", str(tmp_path / "o"), *options]
    told = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if text is None:
        assert told.returncode == 0 and [Path(told.stdout.strip())] == [tmp_path / "o" / "manifest.jsonl"], told.stderr
        assert [r["method"] for r in _rows(tmp_path / "o" / "manifest.jsonl")] == ["relight"] * 2
    else:
        assert told.returncode == 1 and told.stdout == ""
        assert len(told.stderr.strip().splitlines()) == 1 and told.stderr.startswith("error [")


def test_what_was_undone_or_hidden_is_not_claimed(photo: Photo) -> None:
    """Bug prevented: a face that is softened, then sharpened beyond what it was, explained as blurred; noise claimed on
    skin that was smoothed afterwards; a plain cue lost to a faint one."""

    def made(sharpen: float, claims: list[tuple[str, str]]) -> set[str]:
        def make(photo: Photo, donor: Photo | None, strength: float, rng: np.random.Generator) -> Any:
            new = soft(photo.pixels.astype(np.float32), 1.0)
            new = np.clip(new + sharpen * (new - soft(new, 2.0)), 0, 255) * 0.8
            mask = area_mask(photo.landmarks, "skin", photo.pixels.shape) / 255.0
            return photo.pixels * (1 - mask[..., None]) + new * mask[..., None], mask, claims

        f = forge(photo, Method("test", "FS", make), np.random.default_rng(0), strength=0.5)
        return {c.artifact for c in f.cues}

    both = [("skin", "blur"), ("skin", "colour")]
    assert made(0.0, both) == {"blur", "colour"} and made(3.0, both) == {"colour"}
    assert made(3.0, both[:1]) == {"blur"}  # a forgery without any cue could not be explained at all
    first = forge(photo, METHODS["noise_mismatch"], np.random.default_rng(0), strength=0.9)
    kept = joined_cues(photo.pixels, first, replace(first, cues=()))
    assert [(c.area, c.artifact) for c in kept] == [(c.area, c.artifact) for c in first.cues]
    undone = Forgery(photo.pixels, first.mask, (Cue("jaw", "blur", 0.8),), "undo", "FE", 1.0)
    assert joined_cues(photo.pixels, first, undone) == (Cue("jaw", "blur", 0.8),)
    area, artifact = first.cues[0].area, first.cues[0].artifact
    faint = Forgery(first.pixels, first.mask, (Cue(area, artifact, 0.01),), "again", "FE", 1.0)
    assert joined_cues(photo.pixels, first, faint)[0].score == kept[0].score


def test_a_mouth_needs_no_donor_and_changes_nothing_else(photo: Photo, donor: Photo) -> None:
    """Bug prevented: reenactment that only clips can be made with, or that moves the eyes."""
    for seed in range(6):
        for other in (None, donor):
            made = forge(photo, METHODS["mouth"], np.random.default_rng(seed), other, strength=0.8)
            assert {c.area for c in made.cues} <= {"mouth", "teeth"} and made.df_class == "FR"
            inside = _grown(area_mask(photo.landmarks, "mouth", photo.pixels.shape), photo, 0.45)
            eyes = area_mask(photo.landmarks, "eyes", photo.pixels.shape) > 0
            assert made.mask.max() == 255 and not made.mask[~inside].any() and not made.mask[eyes].any()


def test_a_mouth_comes_from_another_frame_of_the_clip(
    all_forged: ForgeConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: a mouth of another person, or of the very same frame, where the clip has others."""
    reals = [r for r in _rows(photos) if r["label"] == "real" and r.get("split") != "test"][:4]
    clip = [r | {"group": "clip", "source": "s", "split": "train"} for r in reals]
    data = _write_rows(photos.with_name("clip.jsonl"), clip)
    given: list[tuple[Photo, Photo | None]] = []

    def noted(photo: Photo, method: Method, rng: Any, donor: Photo | None = None) -> Forgery:
        given.append((photo, donor))
        return forge(photo, method, rng, donor)

    monkeypatch.setattr(run_forge, "forge", noted)
    mouths = replace(all_forged, data=str(data), count=6, calib=0, harmless=0, methods=("mouth",))
    run(mouths, tmp_path / "a")
    assert all(d is not None and d.group == p.group and d.pixels is not p.pixels for p, d in given)
    _write_rows(data, clip[:1])
    given.clear()
    run(mouths, tmp_path / "b")
    assert given and all(d is None for _, d in given)


@pytest.fixture
def taesd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with random weights in the layout of TAESD's files."""
    torch.manual_seed(0)
    folder = tmp_path / "taesd"
    folder.mkdir()
    for part, net in (("encoder", latent.encoder(4)), ("decoder", latent.decoder(4))):
        save_file({k: v.bfloat16() for k, v in net.state_dict().items()}, folder / f"taesd_{part}.safetensors")
        monkeypatch.setitem(latent.SHA256, f"taesd_{part}", file_sha256(folder / f"taesd_{part}.safetensors"))
    latent.load.cache_clear()
    return folder


def test_latent_networks_have_the_published_layout() -> None:
    """Bug prevented: layers in another order, so that no published file loads."""
    nets = (latent.encoder(16), latent.decoder(4))
    into, out = ({k: tuple(v.shape) for k, v in net.state_dict().items()} for net in nets)
    assert len(into) == len(out) == 67
    assert [f"{k}.bias" in into for k in (0, 2, 6, 10, 14)] == [True, False, False, False, True]
    assert into["14.weight"] == (16, 64, 3, 3) and into["13.conv.4.bias"] == (64,)
    assert [f"{k}.bias" in out for k in (1, 7, 12, 17, 19)] == [True, False, False, False, True]
    assert out["1.weight"] == (64, 4, 3, 3) and out["19.weight"] == (3, 64, 3, 3) and "18.conv.0.weight" in out


@pytest.mark.slow
def test_a_redraw_in_a_latent_space_speaks_of_what_shows(
    all_forged: ForgeConfig, taesd: Path, tmp_path: Path, photo: Photo
) -> None:
    """Bug prevented: cues where nothing changed; a run that says nothing of the weights it drew with."""
    config = replace(all_forged, count=2, side=96, redraw=str(taesd), methods=tuple(LATENT))
    rows, again = (_forged(config, tmp_path / out) for out in "ab")
    assert [r["sha256"] for r in rows] == [r["sha256"] for r in again]
    assert {(r["method"], r["df_class"]) for r in rows} <= {("latent_redraw", "EFS"), ("latent_face", "FE")}
    assert json.loads((tmp_path / "a" / "forge.json").read_text())["redraw"] == ["taesd"]
    latent.use(taesd)
    small = np.asarray(cv2.resize(photo.pixels, (120, 120), interpolation=cv2.INTER_AREA), np.uint8)
    photo = replace(photo, pixels=small, landmarks=photo.landmarks * 0.4)
    whole, face = (forge(photo, LATENT[m], np.random.default_rng(1), strength=0.5) for m in LATENT)
    assert whole.mask.min() == 255 and face.mask[0, 0] == 0
    assert {c.area for c in face.cues} <= {"skin", "eyes", "mouth", "teeth"} and len(face.cues) > 1
    assert not any(c.area == "teeth" for c in face.cues) or shows_teeth(photo)


def test_weights_to_redraw_with_are_the_pinned_ones(config: ForgeConfig, taesd: Path, tmp_path: Path) -> None:
    """Bug prevented: a file from anywhere draws the training set, or a missing half is made up."""
    config = replace(config, methods=("latent_face",), redraw=str(taesd))
    for wrong, code in (
        ({"redraw": None}, "redraw_incomplete"),
        ({"methods": ("relight",)}, "redraw_incomplete"),
        ({"redraw": str(tmp_path)}, "autoencoder_missing"),
    ):
        with raises(code):
            run(replace(config, **wrong), tmp_path / "e")
    with (taesd / "taesd_decoder.safetensors").open("ab") as stream:
        stream.write(b"x")
    latent.load.cache_clear()
    with raises("autoencoder_hash_differs"):
        run(config, tmp_path / "e")
    (taesd / "taesd_decoder.safetensors").unlink()
    with raises("autoencoder_incomplete", "taesd_decoder.safetensors"):
        run(config, tmp_path / "e")


@pytest.mark.slow
def test_video_comes_over_every_label_alike(config: ForgeConfig, tmp_path: Path) -> None:
    """Bug prevented: H.264 that stands on fakes alone and is learnt as their mark, or cues that it has wiped away."""
    config = replace(config, count=40, harmless=0.5, combine=0.0)
    rows = _forged(config, tmp_path / "half", video=0.5)
    for label in ("real", "fake"):
        assert 0.15 < np.mean(["video" in r.get("harmless", "") for r in rows if r["label"] == label]) < 0.85, label
    names = {r["harmless"] for r in rows if "harmless" in r}
    assert "video" in names and any(n.endswith("+video") for n in names) and names & set(HARMLESS)
    assert not any("video" in r.get("harmless", "") for r in _forged(config, tmp_path / "none", video=0.0))
