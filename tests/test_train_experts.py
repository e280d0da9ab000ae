"""Training the experts: crops of a manifest, a resumable run, weights that load, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

from data_gen.run_forge import ForgeConfig, run
from external_detectors.consistency_net import POOLED, ConsistencyNet
from external_detectors.lite0 import imagenet_state, lite0
from external_detectors.train import __main__ as train
from external_detectors.train import consistency as train_consistency
from external_detectors.train import loop
from tests.raising import raises
from x2dfd import crops as crops_module
from x2dfd import fetch
from x2dfd.cli import run_command
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import CODEC, codec, tone
from x2dfd.errors import X2DFDError
from x2dfd.experts import load_expert, read_card
from x2dfd.faces import PREPROCESSING, find_faces
from x2dfd.manifest import Sample
from x2dfd.tower import training_rows
from x2dfd.types import ARTIFACTS, Cue


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of sixteen self-blended and plain astronauts, splits train and calib."""
    folder = tmp_path_factory.mktemp("forged")
    pixels, lines = np.array(skimage.data.astronaut()[10:310, 80:380]), ["path,label,source,group,split"]
    for i in range(6):
        view = np.clip(tone(pixels[:, ::-1] if i % 2 else pixels, 0.5, np.random.default_rng(i)), 0, 255)
        cv2.imwrite(str(folder / f"{i}.png"), view[..., ::-1].astype(np.uint8))
        lines.append(f"{i}.png,real,s{i % 2},person{i},{'calib' if i == 5 else 'train'}")
    (folder / "photos.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = ForgeConfig(data=str(folder / "photos.csv"), count=16, seed=3, side=224, methods=("self_blend",))
    return run(config, folder / "out")


def _trained(data: Path, work: Path, *words: str) -> Result:
    options = ["--data", str(data), "--state", str(work / "state"), "--out", str(work / "out"), "--batch", "4"]
    return CliRunner().invoke(train.app, ["consistency", *options, *words])


def _weights(work: Path) -> dict[str, Tensor]:
    return load_file(work / "out" / "consistency.safetensors")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(
    forged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug prevented: after a restart other batches, other dropout, a cold optimizer or a forgotten average."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    assert _trained(forged, tmp_path / "whole", "--steps", "4", "--from-scratch").exit_code == 0
    save = loop.checkpoint

    def killed_after_saving(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "checkpoint", killed_after_saving)
        assert _trained(forged, tmp_path / "cut", "--steps", "4", "--from-scratch").exit_code != 0
    assert not (tmp_path / "cut" / "out").exists()
    steps: list[int] = []

    def noted(path: Path, step: int, *rest: Any) -> None:
        steps.append(step)
        save(path, step, *rest)

    monkeypatch.setattr(loop, "checkpoint", noted)
    assert _trained(forged, tmp_path / "cut", "--steps", "4", "--from-scratch").exit_code == 0
    assert steps == [4]
    whole, cut = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert set(whole) == set(cut)
    assert max(float((whole[k].float() - cut[k].float()).abs().max()) for k in whole) < 1e-6
    states = [load_file(tmp_path / name / "state" / "state.safetensors") for name in ("whole", "cut")]
    assert all(torch.allclose(states[0][k].double(), states[1][k].double(), atol=1e-6) for k in states[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_uses_the_gpu_that_is_there(kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day on the CPU beside an idle card; a state that only the same device can read."""
    assert _trained(kinds, tmp_path, "--steps", "2", "--from-scratch").exit_code == 0
    assert torch.cuda.max_memory_allocated() > 0
    monkeypatch.setattr(loop, "training_device", lambda: torch.device("cpu"))
    assert _trained(kinds, tmp_path, "--steps", "2", "--from-scratch").exit_code == 0


@pytest.mark.slow
def test_consistency_learns_areas_artifacts_and_masks(kinds: Path, tmp_path: Path) -> None:
    """Bug prevented: weights that the expert refuses; a threshold chosen on other pictures than those in use."""
    result = _trained(kinds, tmp_path, "--steps", "3", "--from-scratch")
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == tmp_path / "out" / "consistency.card.json"
    expert = load_expert("consistency", tmp_path / "out")
    assert expert.card.preprocessing == PREPROCESSING and "3 steps of 4" in expert.card.trained_on
    # Three steps moved the weights, and the average follows them.
    torch.manual_seed(0)
    start, moved = ConsistencyNet().state_dict(), _weights(tmp_path)
    assert expert.card.covers == tuple(a for k, a in enumerate(ARTIFACTS) if moved["allowed"][:, k].any())
    assert set(moved) == set(start)
    assert any((moved[k].float() - start[k]).abs().max() > 1e-4 for k in start if k.endswith("weight"))
    assert {"cue_threshold", "calib_auc_by_method"} <= set(expert.card.figures)
    [face] = find_faces(np.array(skimage.data.astronaut()))
    [said] = expert.judge([face])
    assert said.score is not None and len(said.map) == len(said.map[0]) == 14
    truth = train_consistency.LocalTruth(load_crops(kinds))
    k = next(k for k, s in enumerate(truth.samples) if s.method.startswith("area_warp"))
    seeds = [np.random.default_rng(s) for s in range(12)]
    for rng in seeds:
        _, areas, labels, cues, mask = truth.batch([k], rng)
        assert labels.tolist() == [1.0] and (cues != 0).any()
        assert areas.shape[1] == len(POOLED) and mask.any()
    shown = truth.crops.crops[truth.rows[k]]
    assert np.array_equal(truth.batch([k], None)[0][0].numpy(), codec(np.asarray(shown), *CODEC))


@pytest.mark.slow
def test_consistency_goes_on_from_its_own_weights_and_leaves_methods_out(kinds: Path, tmp_path: Path) -> None:
    """Bug prevented: a second training that starts from nothing, or figures on a left-out method that was learnt."""
    first = _trained(kinds, tmp_path, "--from-scratch", "--steps", "2", "--hold-out", "area_warp")
    assert first.exit_code == 0, first.output
    before = _weights(tmp_path)
    again = ["--start", str(tmp_path / "out"), "--steps", "1", "--hold-out"]
    # A step that does not move anything: what is written then is what was started from.
    second = _trained(kinds, tmp_path, *again, "area_warp", "--lr", "0", "--state", str(tmp_path / "2"))
    assert second.exit_code == 0, second.output
    after = _weights(tmp_path)
    moved = [k for k in before if "running" not in k and "num_batches" not in k and k != "allowed"]
    assert all(torch.equal(before[k], after[k]) for k in moved)
    card = load_expert("consistency", tmp_path / "out").card
    assert card.version == "2" and card.trained_on.startswith("first: ")
    assert card.figures["held_out"] == ["area_warp"] and "area_warp" not in card.trained_on.split("Then: ")[1]
    seen = _trained(kinds, tmp_path, *again, "area_warp,blur_mismatch", "--state", str(tmp_path / "3"))
    assert isinstance(seen.exception, X2DFDError) and "trained with blur_mismatch" in str(seen.exception)
    truth = train_consistency.LocalTruth(load_crops(kinds), ["area_warp"])
    kept = {m for k in truth.learnt for m in truth.samples[k].method.split("+")}
    assert "area_warp" not in kept and "blur_mismatch" in kept


def test_consistency_starts_imagenet_state(kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a training that starts from random weights because nothing was said."""
    torch.save(_published(), tmp_path / "efficientnet-lite0.pth")
    monkeypatch.setattr(train_consistency, "require", lambda name: tmp_path)
    assert _trained(kinds, tmp_path, "--steps", "1", "--lr", "0").exit_code == 0
    wanted, found = imagenet_state(tmp_path / "efficientnet-lite0.pth"), _weights(tmp_path)
    assert all(torch.equal(found[f"trunk.{k}"], v.half()) for k, v in wanted.items() if k.endswith("weight"))
    assert "EfficientNet-Lite0" in load_expert("consistency", tmp_path / "out").card.licence


def test_masks_and_areas_follow_the_picture_that_was_mirrored_and_turned() -> None:
    """Bug prevented: a mask half a cell off in every mirrored view, or areas of the other side of the face."""
    [face] = find_faces(np.array(skimage.data.astronaut()))
    spot = np.zeros((224, 224), np.uint8)
    cv2.circle(spot, (90, 120), 14, 255, -1)
    masks = np.asarray(cv2.resize(spot, (56, 56), interpolation=cv2.INTER_AREA), np.uint8)[None]
    sample = Sample(
        "0", Path("x"), "fake", "m", group="0", split="train", cues=(Cue("nose", "blur", 1.0),), mask=Path("y")
    )
    truth = train_consistency.LocalTruth(CropSet([sample], face.crop[None], face.crop_landmarks[None], {}, masks))
    for seed in range(12):
        _, areas, _, _, mask = truth.batch([0], np.random.default_rng(seed))
        _, matrix = loop.augmented(face.crop, np.random.default_rng(seed))
        wanted = (matrix @ [90, 120, 1] + 0.5) / 8 - 0.5
        ys, xs = np.nonzero(mask[0].numpy())
        assert np.abs(np.array([xs.mean(), ys.mean()]) - wanted).max() < 0.3
        nose = areas[0, POOLED.index("nose")].float()
        at = torch.stack([(nose.sum(0) * torch.arange(28)).sum(), (nose.sum(1) * torch.arange(28)).sum()]) / nose.sum()
        there = cv2.transform(face.crop_landmarks[None], matrix)[0][[1, 4, 5, 195]].mean(0)
        assert np.abs(at.numpy() - ((there + 0.5) / 8 - 0.5)).max() < 2


def test_consistency_needs_masks(forged: Path, tmp_path: Path) -> None:
    """Bug prevented: hours of training on pictures whose forged areas nobody recorded."""
    lines = [json.loads(line) for line in forged.read_text().splitlines()]
    bare = forged.parent / "bare.jsonl"
    bare.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "mask"}) + "\n" for r in lines))
    with raises("masks_missing"):
        train_consistency.LocalTruth(load_crops(bare))


def test_one_threshold_serves_pairs_and_areas() -> None:
    """Bug prevented: an F1 of another rule than the expert's own: three cues at most, the likeliest always."""
    chance = np.zeros((2, 3, 2), np.float32)
    there = np.zeros((2, 3, 2), bool)
    chance[0, 0, 0], chance[0, 1, 0], there[0, 0, 0] = 0.9, 0.3, True
    chance[1, 2, 1], there[1, 2, 1] = 0.15, True  # far below the others, but its likeliest
    threshold, cue_f1, area_f1 = train_consistency._cue_threshold(chance, there)
    assert (cue_f1, area_f1) == (1.0, 1.0) and threshold > 0.3


def test_the_state_of_another_training_is_refused(forged: Path, tmp_path: Path) -> None:
    """Bug prevented: weights of the last run's data and steps, under a card that tells of this one's."""
    assert _trained(forged, tmp_path, "--steps", "2", "--from-scratch").exit_code == 0
    before = _weights(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(forged.parent, other)
    with (other / "manifest.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n")
    for data, words, message in (
        (forged, ("--steps", "3", "--seed", "1"), "other data or settings"),
        (forged, ("--steps", "3", "--lr", "0.1"), "other data or settings"),
        (other / "manifest.jsonl", ("--steps", "3"), "other data or settings"),
        (forged, ("--steps", "1"), "more than --steps 1"),
    ):
        result = _trained(data, tmp_path, *words, "--from-scratch")
        assert isinstance(result.exception, X2DFDError) and message in str(result.exception)
    assert all(torch.equal(v, before[k]) for k, v in _weights(tmp_path).items())


@pytest.mark.parametrize(("label", "missing"), [("real", "fake"), ("fake", "real")])
def test_a_manifest_of_one_label_is_refused(
    forged: Path, tmp_path: Path, label: str, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Bug prevented: an expert trained on one class, or a traceback instead of the reason."""
    rows = [json.loads(line) for line in forged.read_text("utf-8").splitlines()]
    # A fake of another split keeps its mask: without any there is nothing to learn areas from.
    kept = [r if r["label"] == label else r | {"split": "calib", "group": "other " + r["group"]} for r in rows]
    data = tmp_path / "one_label.jsonl"
    places = [{k: str(forged.parent / r[k]) for k in ("path", "mask") if k in r} for r in kept]
    data.write_text("".join(json.dumps(r | p) + "\n" for r, p in zip(kept, places, strict=True)), "utf-8")
    words = ["consistency", "--from-scratch", "--steps", "1", "--data", str(data), "--state", str(tmp_path / "s")]
    monkeypatch.setattr(sys, "argv", ["train", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run_command(train.app)
    told = capsys.readouterr()
    assert stopped.value.code == 1 and told.out == ""
    last = told.err.strip().splitlines()[-1]
    assert last.startswith("error [no_picture_of_label]: ") and missing in last and "'train'" in last
    assert not (tmp_path / "out").exists()


def test_figures_by_method() -> None:
    """Bug prevented: an AUC against the wrong real pictures, ties counted as wins, combined fakes counted twice."""
    rows = [("real", "none"), ("real", "denoise"), ("fake", "a"), ("fake", "a+b"), ("fake", "b")]
    samples = [Sample(str(i), Path(f"{i}"), label, method) for i, (label, method) in enumerate(rows)]  # type: ignore[arg-type]
    table = loop.by_method(samples, np.array([0.2, 0.4, 0.4, 0.9, 0.1]))
    assert table == {"a": {"auc": 0.875, "n_fake": 2}, "b": {"auc": 0.0, "n_fake": 1}, "n_real": 2}
    assert loop.by_method(samples[2:], np.array([0.4, 0.9, 0.1])) == {"n_real": 0}


def test_a_checkpoint_is_chosen_by_its_worst_method_and_source() -> None:
    """Bug prevented: a mean over learnt methods that hides the one which got worse, or a camera that looks forged."""
    rows = [("real", "none", "a")] * 10 + [("real", "none", "b")] * 10 + [("fake", "x", "a")] * 10
    rows += [("fake", "y", "a")] * 10 + [("fake", "rare", "a")] * 3
    samples = [Sample(str(i), Path("x"), label, method, source=src) for i, (label, method, src) in enumerate(rows)]  # type: ignore[arg-type]
    scores = np.array([0.0] * 10 + [0.4] * 10 + [1.0] * 10 + [0.2] * 10 + [-1.0] * 3)
    assert loop.worst(samples, scores) == pytest.approx(10 / 23, abs=1e-4)  # source b: three and ten fakes lie below
    lifted = scores + 10 * (np.array([m for _, m, _ in rows]) == "rare")
    assert loop.worst(samples, lifted) == 0.5  # method y against all reals; what three pictures say decides nothing
    assert loop.worst(samples[:20] + samples[20:30], lifted[:30]) == 1.0
    assert loop.worst(samples, lifted, ["x"]) == pytest.approx(13 / 23, abs=1e-4)  # y counts in no method, but in b
    assert loop.worst(samples[:5], scores[:5]) is None
    # Of eight parts the lowest two: one method at chance does not decide alone.
    many = [Sample(str(i), Path("x"), "real", "none", source="a") for i in range(10)]
    many += [Sample(f"{m}{i}", Path("x"), "fake", m, source="a") for m in "pqrstuv" for i in range(10)]
    told = np.array([0.0] * 10 + [v for m in range(7) for v in [-1.0 if m == 0 else 0.0 if m == 1 else 1.0] * 10])
    assert loop.worst(many, told) == pytest.approx((0.0 + 0.5) / 2)


def test_the_best_average_is_kept_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a checkpoint that was chosen in the log alone."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 1)
    monkeypatch.setattr(loop, "log", lambda text: None)

    def trained(worst: dict[int, float], name: str) -> tuple[float, dict[str, Any]]:
        torch.manual_seed(0)
        net = torch.nn.Linear(1, 1, bias=False)
        seen = iter(worst.values())
        best, figures = loop.fit(
            net, lambda rng: (), lambda batch: net.weight.sum(), steps=6, lr=0.1, seed=0, state=tmp_path / name,
            run="r", check=lambda n: {"worst": next(seen)},
        )  # fmt: skip
        return next(best.parameters()).item(), figures

    last, figures = trained({2: 0.1, 4: 0.2, 6: 0.3}, "last")
    assert figures == {"step": 6, "worst": 0.3}
    early, figures = trained({2: 0.5, 4: 0.2, 6: 0.3}, "early")
    assert figures == {"step": 2, "worst": 0.5} and early > last  # the loss pulls the weight down


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


def _published() -> OrderedDict[str, Tensor]:
    """As the published file: the network's tensors in its order under other names, then the classifier."""
    torch.manual_seed(1)
    named = [(k, v + (0.01 if v.is_floating_point() else 1)) for k, v in lite0().state_dict().items()]
    tensors = OrderedDict((f"_blocks.{i}.{k.rsplit('.', 1)[1]}", v) for i, (k, v) in enumerate(named))
    tensors["_fc.weight"], tensors["_fc.bias"] = torch.zeros(1000, 1280), torch.zeros(1000)
    return tensors


def test_lite0_takes_the_published_tensors(tmp_path: Path) -> None:
    """Bug prevented: tensors mapped to their neighbours, or silently left at their random start."""
    published = _published()
    torch.save(published, tmp_path / "x.pth")
    mine = list(imagenet_state(tmp_path / "x.pth").values())
    theirs = [v for k, v in published.items() if not k.startswith("_fc.")]
    assert len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_lite0_refuses_what_is_not_its_file(tmp_path: Path) -> None:
    """Bug prevented: a training that starts from half a network."""
    path = tmp_path / "x.pth"
    names = list(_published())
    less, more, turned, renamed = (_published() for _ in range(4))
    del less[names[7]]
    more["_blocks.extra.weight"] = torch.zeros(3)
    turned[names[0]] = turned[names[0]].transpose(2, 3)[:, :, :2]
    first, second = (n for n in names if n.endswith((".running_mean", ".running_var")) and int(n.split(".")[1]) < 5)
    renamed = OrderedDict((second if k == first else first if k == second else k, v) for k, v in renamed.items())
    for wrong, code in (
        (less, "checkpoint_layers_differ"),
        (more, "checkpoint_layers_differ"),
        (turned, "checkpoint_shape_differs"),
        (renamed, "checkpoint_shape_differs"),
    ):
        torch.save(wrong, path)
        with raises(code, "x2dfd fetch lite0"):
            imagenet_state(path)
    torch.save(torch.zeros(3), path)
    with raises("checkpoint_layers_differ", "x2dfd fetch lite0"):
        imagenet_state(path)
    path.write_bytes(b"<html>not found</html>")
    with raises("checkpoint_unreadable", "x2dfd fetch lite0"):
        imagenet_state(path)
    with raises("checkpoint_unreadable", "x2dfd fetch lite0"):
        imagenet_state(tmp_path / "absent.pth")


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_weight_file_does_not_run(tmp_path: Path) -> None:
    """Bug prevented: a downloaded `.pth` that executes what it likes."""
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"a": _Malicious(tmp_path / "ran")}, protocol=2))
    torch.save({"a": _Malicious(tmp_path / "ran")}, tmp_path / "y.pth")
    for name in ("x.pth", "y.pth"):
        with raises("checkpoint_unreadable"):
            imagenet_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(bool(fetch.missing("lite0")), reason="ImageNet weights are not fetched: x2dfd fetch lite0")
def test_lite0_knows_imagenet() -> None:
    """Bug prevented: another padding, order or activation than the network was trained with."""
    path = fetch.require("lite0") / "efficientnet-lite0.pth"
    net, classifier = lite0().eval(), torch.load(path, map_location="cpu", weights_only=True)
    net.load_state_dict(imagenet_state(path))
    for name, classes in (("chelsea", (281, 282, 285)), ("coffee", (504, 967, 968)), ("rocket", (657, 744))):
        picture = np.asarray(getattr(skimage.data, name)())
        side = min(picture.shape[:2])
        top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
        square = cv2.resize(picture[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)
        x = (torch.from_numpy(np.asarray(square)).permute(2, 0, 1)[None].float() - 127) / 128
        with torch.inference_mode():
            logits = net(x).mean((2, 3)) @ classifier["_fc.weight"].T + classifier["_fc.bias"]
        assert int(logits.argmax()) in classes, name


# --- the crops of a manifest ----------------------------------------------------------------------------------------


@pytest.fixture
def mixed(forged: Path, tmp_path: Path) -> Path:
    """Two usable photos around a picture without a face and a file that is no picture."""
    for i in (0, 1):
        shutil.copy(forged.parents[1] / f"{i}.png", tmp_path / f"{i}.png")
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


def test_a_manifest_without_a_usable_face_is_an_error(mixed: Path) -> None:
    """Bug prevented: an empty training set that fails far from its cause."""
    lines = mixed.read_text("utf-8").splitlines()
    mixed.write_text("\n".join([lines[0], lines[2], lines[3]]) + "\n", encoding="utf-8")
    with raises("no_usable_face"):
        load_crops(mixed)
    with raises("no_usable_face"):
        load_crops(mixed)


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    """A manifest of two forge methods, often combined, and one generator's faces."""
    pixels, lines = (
        np.array(skimage.data.astronaut()[10:310, 80:380]),
        ["path,label,method,df_class,source,group,split"],
    )
    for i in range(12):
        view = np.clip(tone(pixels[:, ::-1] if i % 2 else pixels, 0.5, np.random.default_rng(i)), 0, 255)
        cv2.imwrite(str(tmp_path / f"{i}.png"), view[..., ::-1].astype(np.uint8))
        lines.append(f"{i}.png,{'fake,stylegan1,EFS' if i % 3 == 2 else 'real,none,real'},made{i // 6},person{i},train")
    (tmp_path / "photos.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    config = ForgeConfig(data=str(tmp_path / "photos.csv"), count=40, side=224, methods=("area_warp", "blur_mismatch"))
    return run(replace(config, ready_made=0.3, combine=0.5, calib=0.4), tmp_path / "forged")


def test_a_limit_draws_from_a_manifest_that_is_sorted() -> None:
    """Bug prevented: the first thousand rows of a sorted manifest are all real; or another draw in each stage."""
    samples = [
        Sample(str(i), Path("x"), "real" if i < 50 else "fake", split="train" if i % 5 else "val") for i in range(100)
    ]
    data = CropSet(samples, np.zeros((100, 1, 1, 3), np.uint8), np.zeros((100, 468, 2), np.float32), {})
    few, more = training_rows(data, 20), training_rows(data, 40)
    assert set(few) < set(more) < set(training_rows(data)) and list(few) == sorted(few) and len(few) == 20
    assert 4 < sum(samples[i].label == "real" for i in few) < 16


# --- the card -------------------------------------------------------------------------------------------------------


def test_the_licence_line_is_that_of_the_pictures() -> None:
    """Bug prevented: weights of a user's own CC0 photos said to be bound by FFHQ, or FFHQ's kept quiet about."""
    free = Sample("1", Path("1"), "real", source="mine", extra={"licence": "CC0"})
    bound = Sample("2", Path("2"), "real", source="ffhq", extra={"licence": "CC BY-NC-SA 4.0"})
    silent = Sample("3", Path("3"), "fake", source="web")
    assert loop.licence_of([free]) == "weights: bound by what they were made of (trained on pictures under: CC0)"
    line = loop.licence_of([free, bound, silent], start="MIT")
    assert loop.licence_of([free], start=loop.licence_of([free], start="MIT")) == loop.licence_of([free], start="MIT")
    assert "CC BY-NC-SA 4.0; CC0" in line and "no licence is stated for the pictures of web" in line
    assert line.endswith("; start: MIT") and "FFHQ" not in line


def test_a_card_says_the_next_version_and_whose_pictures(forged: Path, tmp_path: Path) -> None:
    """Bug prevented: every training stamped with one version, so that two files of weights go by it."""
    assert loop.next_version(tmp_path, "consistency") == "1"
    for version in ("1", "2"):
        words = ["--steps", "1", "--state", str(tmp_path / version), "--from-scratch"]
        assert _trained(forged, tmp_path, *words).exit_code == 0
        card = read_card(tmp_path / "out" / "consistency.card.json")
        assert card.version == version
    assert card.licence.endswith("(no licence is stated for the pictures of s0, s1)")
