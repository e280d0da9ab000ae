"""The bench of the experts, with experts that a test can predict: what is joined, changed, placed and used again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from eval import command, localisation, page, scoring, tables
from eval.changes import CHANGES, FORMAT_SWAP, Change
from eval.rows import SampleRow
from eval.tasks import experts as experts_bench
from tests.raising import raises
from tests.test_run_bench import result_of
from tests.tiny import EXPERT, EXPERT_TARGET, Brightness
from x2dfd import experts
from x2dfd.adapter import AdapterCard, write_adapter_card
from x2dfd.calibration import Calibration, Logistic, logit
from x2dfd.crops import MASK_SIZE
from x2dfd.errors import SetupError
from x2dfd.experts import Shared
from x2dfd.faces import CROP_SIZE, PREPROCESSING, area_polygons, find_faces
from x2dfd.manifest import Sample, write_manifest
from x2dfd.types import MLLM, Card, Evidence, Face

POINTER = "pointer"
POINTER_TARGET = "tests.test_experts_bench:Pointer"
CUT = "no score for dark faces"


class Pointer:
    """Points at the mouth, always; gives no score for dark faces."""

    card: ClassVar[Card] = replace(Brightness.card, name=POINTER)
    judged: ClassVar[list[int]] = []  # faces of each call

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        self.judged.append(len(faces))
        return [self._of(face) for face in faces]

    def _of(self, face: Face) -> Evidence:
        grid = np.full((MASK_SIZE, MASK_SIZE), 0.1, np.float32)
        for polygon in area_polygons(face.crop_landmarks)["mouth"]:
            cv2.fillPoly(grid, [(polygon * (MASK_SIZE / CROP_SIZE)).round().astype(np.int32)], 0.4)
        rows = tuple(tuple(float(x) for x in row) for row in grid)
        dark = face.crop.mean() < 60
        return Evidence(POINTER, None if dark else 0.5, CUT if dark else None, map=rows)


@pytest.fixture(autouse=True)
def two_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(experts.BUILTIN, EXPERT, EXPERT_TARGET)
    monkeypatch.setitem(experts.BUILTIN, POINTER, POINTER_TARGET)
    monkeypatch.setattr(page, "_plots", lambda result: iter(()))  # tests/test_page.py looks at them
    monkeypatch.setattr(Pointer, "judged", [])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An adapter's card and calibration: what the fusion needs, and no weights of any model."""
    folder = tmp_path / "model"
    card = AdapterCard(
        "tiny", "1", "a test", "none", "", PREPROCESSING, "none", "all", experts={EXPERT: "b" * 64, POINTER: "b" * 64},
        held_out=("blend",),
    )  # fmt: skip
    write_adapter_card(folder, card)
    weights = {MLLM: 0.5, EXPERT: 4.0, POINTER: 0.0}
    logistic = Logistic(weights, {MLLM: 1.0, EXPERT: -0.4, POINTER: 0.0}, 0.0)
    Calibration({"part": logistic}, 0.4, 0.6, fitted_on={"experts": card.experts}).save(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, astronaut: NDArray[np.uint8]) -> Path:
    """Six reals and six fakes of one face, fakes brighter by tendency and masked at the mouth; one without a face."""
    folder = tmp_path / "data"
    folder.mkdir()
    photo = astronaut[:320, 80:400]
    mask = np.zeros(photo.shape[:2], np.uint8)
    [face] = find_faces(photo)
    for polygon in area_polygons(face.landmarks)["mouth"]:
        cv2.fillPoly(mask, [polygon.round().astype(np.int32)], 255)
    Image.fromarray(mask).save(folder / "mask.png")
    samples = []
    for i in range(12):
        fake = i % 2 == 1
        scale = (0.35, 0.5, 0.6, 1.0, 0.7, 1.1, 0.65, 0.9, 0.55, 0.58, 0.62, 1.05)[i]
        path = folder / f"{i}.png"
        Image.fromarray(np.clip(photo * scale, 0, 255).astype(np.uint8)).save(path)
        traits = {"method": "blend", "mask": folder / "mask.png"} if fake else {"method": "none"}
        samples.append(Sample(f"s{i}", path, "fake" if fake else "real", source="ab"[i // 6], group=f"g{i}", **traits))
    Image.new("RGB", (80, 80), "white").save(folder / "white.png")
    samples.append(Sample("white", folder / "white.png", "real", source="c", group="white"))
    (folder / "broken.png").write_bytes(b"not a picture")
    samples.append(Sample("broken", folder / "broken.png", "fake", source="c", group="broken", method="blend"))
    write_manifest(folder / "manifest.jsonl", samples)
    return folder / "manifest.jsonl"


def bench(data: Path, model: Path, out: Path, *words: Any, task: str = "experts") -> dict[str, Any]:
    given = [task, "--experts", f"{EXPERT},{POINTER}", "--data", data, "--model", model, "--out", out, *words]
    assert command.main([str(word) for word in given]) == 0
    return result_of(out)


def test_experts_fusion_and_baseline_stand_side_by_side(data: Path, model: Path, tmp_path: Path) -> None:
    """The fusion is the shipped calibration with the MLLM at its mean, and no MLLM is loaded for it."""
    result = bench(data, model, tmp_path / "out", "--changes", "none")
    scorers = result["scorers"]
    assert list(scorers) == ["fusion", f"expert:{EXPERT}", f"expert:{POINTER}", "baseline:sharpness"]
    assert result["model"]["stated"]["fusion"]["missing"] == [MLLM]
    assert scorers["fusion"]["unscored"] == {"no_face": 1, "not_an_image": 1}
    assert scorers[f"expert:{POINTER}"]["unscored"][CUT] == 1
    overall = scorers["fusion"]["overall"]
    # only the brightness weighs, so the fusion ranks as it does
    assert overall["auc"]["value"] == scorers[f"expert:{EXPERT}"]["overall"]["auc"]["value"] > 0.5
    assert "ece" not in scorers["baseline:sharpness"]["overall"]  # no probability
    rows = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()}
    assert len(rows) == 14
    for row in rows.values():
        if row[f"expert:{EXPERT}"] is not None:
            by_hand = 1 / (1 + np.exp(-4.0 * (logit(row[f"expert:{EXPERT}"]) + 0.4)))
            assert row["p_fake"] == pytest.approx(by_hand)
            assert row["said"] == ("fake" if by_hand >= 0.6 else "real" if by_hand < 0.4 else "inconclusive")
    assert (rows["white"]["said"], rows["white"]["reason"]) == ("inconclusive", "no_face")
    assert (rows["broken"]["said"], rows["broken"]["reason"]) == (None, "not_an_image")
    for source in "abc":  # a mean over cameras hides the one whose photos are all called fake
        said = [r["said"] == "fake" for r in rows.values() if r["label"] == "real" and r["source"] == source]
        rate = scorers["fusion"]["answers"]["false_alarms_by"]["source"][source]
        assert (rate["value"], rate["n"]) == (np.mean(said), len(said))


def test_a_second_run_scores_one_picture_and_joins_the_calibration_anew(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run of hours that starts anew because its own fusion is not in what is scored, or for another band; a
    fusion of retrained experts under the old weights' calibration."""
    words = ("--changes", "half")
    first = bench(data, model, tmp_path / "out", *words)
    Pointer.judged.clear()
    assert bench(data, model, tmp_path / "out", *words) == first
    assert sum(Pointer.judged) == 2  # a picture and its change
    Calibration.save(replace(Calibration.load(model), high=0.0, low=0.0), model)
    Pointer.judged.clear()
    second = bench(data, model, tmp_path / "out", *words)
    assert sum(Pointer.judged) == 2
    assert second["scorers"]["fusion"]["answers"]["false_alarms"]["value"] == 6 / 7  # all but the one without a face
    assert first["scorers"]["fusion"]["answers"]["false_alarms"]["value"] < 6 / 7
    assert second["scorers"][f"expert:{EXPERT}"] == first["scorers"][f"expert:{EXPERT}"]
    monkeypatch.setattr(Brightness, "card", replace(Brightness.card, sha256="c" * 64))
    other = bench(data, model, tmp_path / "other", "--changes", "none")
    assert "fusion" not in other["scorers"] and EXPERT in other["model"]["stated"]["fusion"]["left_out"]


def test_a_change_is_scored_and_a_lost_face_is_counted(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that hides the hard faces would pass as robustness if only what is left were shown."""

    def turned(pixels: NDArray[np.uint8], _: object) -> NDArray[np.uint8]:
        """The photo with the brightness that stands opposite among those of `data`."""
        return np.asarray(np.clip(pixels * (80.0 / pixels.mean()) ** 2, 0, 255), np.uint8)

    monkeypatch.setitem(CHANGES, "noise", Change("noise", "the order of brightness turned round", turned))
    monkeypatch.setitem(CHANGES, "blur", Change("blur", "black", lambda pixels, _: np.zeros_like(pixels)))
    result = bench(data, model, tmp_path / "out", "--changes", "blur,noise")
    black, noise = result["robustness"]["blur"], result["robustness"]["noise"]
    assert black["lost_face"] == {"real": 6, "fake": 6} and black["had_face"] == 12
    assert (black["auc"]["fusion"]["value"], black["auc"]["fusion"]["n"]) == (None, 0)
    assert black["unchanged"]["fusion"] is None
    unchanged = result["scorers"]["fusion"]["overall"]["auc"]["value"]
    assert noise["unchanged"]["fusion"] == unchanged
    assert noise["auc"]["fusion"]["value"] == pytest.approx(1 - unchanged)
    assert noise["auc"]["fusion"]["n"] == 12 and noise["lost_face"] == {"real": 0, "fake": 0}
    assert result["format_swap"] is None


def test_a_map_is_measured_against_the_mask_beside_two_that_know_nothing(
    data: Path, model: Path, tmp_path: Path
) -> None:
    """A mask on another grid than the map gives chance; a map of low numbers must not fail for its scale; reals, and
    fakes without a mask, counted among what was not found."""
    placed = bench(data, model, tmp_path / "out", "--changes", "none")["localisation"]
    assert (placed["n_masks"], placed["n"], placed["left_out"]) == (6, 6, {})
    maps = placed["maps"]
    assert list(maps) == [POINTER, localisation.CENTRE, localisation.OVAL]
    assert maps[POINTER]["auc"]["value"] > 0.97 and maps[POINTER]["iou"]["value"] > 0.8
    assert maps[POINTER]["iou_by_threshold"]["0.5"] > 0.8  # its highest number is 0.4: thresholds are shares of that
    assert maps[localisation.OVAL]["iou"]["value"] < 0.3 and 0.5 < maps[localisation.OVAL]["auc"]["value"] < 0.97
    assert maps[POINTER]["by_method"]["blend"]["n"] == 6
    result = bench(data, model, tmp_path / "located", task="locate")
    assert result["data"]["n"] == result["data"]["n_fake"] == 6 and result["skipped_without_mask"] == 8
    assert f"map:{POINTER}.pixel_auc" in result["headline"] and "map:baseline:oval.iou" in result["headline"]
    assert "robustness" not in result and result["localisation"]["n_masks"] == 6


def test_a_threshold_is_never_chosen_on_its_own_picture() -> None:
    """The best threshold of the very pictures that are measured flatters every map; a photo and its forgery on two
    sides make every refit look good."""
    of = localisation.THRESHOLDS
    curves = np.zeros((4, len(of)))
    curves[:2, of.index(0.2)] = 1.0  # groups a and b are best at .2
    curves[2:, of.index(0.8)] = 0.9
    found, used = localisation._at_thresholds_of_others(curves, np.array([0, 0, 1, 1]))
    assert found.tolist() == [0, 0, 0, 0] and used == [0.2, 0.8]
    alone, used = localisation._at_thresholds_of_others(curves[:2], np.array([0, 0]))
    assert alone.tolist() == [0, 0] and used == [0.5]
    groups = [f"g{i // 3}" for i in range(60)]
    part = scoring.folds(groups)
    assert all(len({p for p, g in zip(part, groups, strict=True) if g == name}) == 1 for name in groups)
    assert set(part) == set(range(scoring.FOLDS)) and scoring.folds(groups[::-1]).tolist() == part[::-1].tolist()


def test_with_the_mllm_the_fusion_is_the_whole_verdict() -> None:
    """Bug prevented: a table of "the fusion" that leaves out the part which weighs most."""

    class Named:
        card = replace(Brightness.card, name="good")

    calibration = Calibration({"part": Logistic({MLLM: 0.5, "good": 1.0}, {MLLM: 2.0, "good": 0.0}, 0.0)}, 0.3, 0.7)
    alone = experts_bench.Panel([Named()], (), calibration, {}, {})  # type: ignore[list-item]
    whole = replace(alone, whole=SimpleNamespace())  # type: ignore[arg-type]
    assert alone.columns[:2] == ["fusion", "expert:good"] and whole.columns[:2] == ["fusion", MLLM]
    row = SampleRow("a", None, experts={MLLM: 0.2, "good": 0.9})
    experts_bench.join(whole, [row])
    logits: dict[str, float | None] = {MLLM: logit(0.2), "good": logit(0.9)}
    assert row.p_fake == pytest.approx(calibration.probability({"part": logits})) and row.said is not None
    # What could be opened and has no answer was not assessed, which is not "real".
    blind = SampleRow("b", None, experts={"good": None}, reason="no_face")
    experts_bench.join(alone, [blind])
    assert (blind.p_fake, blind.said, blind.reason) == (None, "inconclusive", "no_face")


def test_ours_and_mesonet_are_scored_where_they_can_be_loaded(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """One expert whose weights are not here must not stop the others; one that was asked for by name must."""

    def load(name: str, folder: Path | None = None) -> Any:
        if name != EXPERT:
            raise SetupError(f"{name} is not here")
        return Brightness()

    monkeypatch.setattr(experts_bench, "load_expert", load)
    found, reasons = experts_bench.load_experts(None)
    assert [e.card.name for e in found] == [EXPERT] and "mesonet" in reasons
    with raises("setup", "mesonet"):
        experts_bench.load_experts(["mesonet"])
    monkeypatch.setattr(experts_bench, "load_expert", lambda name, folder=None: load("none"))
    with raises("no_expert"):
        experts_bench.load_experts(None)


@pytest.mark.slow
def test_a_method_is_unseen_by_the_fusion_only_where_every_part_left_it_out(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held out of the last step, trained on by the expert that decides: no figure on unseen forgeries."""
    monkeypatch.setattr(tables, "MIN_SLICE", 1)
    result = bench(data, model, tmp_path / "out", "--changes", "none")
    assert result["held_out"] == {"fusion": [], f"expert:{EXPERT}": [], f"expert:{POINTER}": []}
    assert "†" not in tables.table("experts", {"experts": result}).split("method blend*")[1]
    # the pointer has no weight, so that what it was trained on does not matter
    monkeypatch.setattr(Brightness, "card", replace(Brightness.card, figures={"held_out": ["blend", "other"]}))
    result = bench(data, model, tmp_path / "out", "--changes", "none")
    assert result["held_out"]["fusion"] == ["blend"] and result["held_out"][f"expert:{EXPERT}"] == ["blend", "other"]
    row = tables.table("experts", {"experts": result}).split("method blend*")[1].splitlines()[0]
    assert row.count("†") == 2


def test_the_tables_hold_what_the_result_says(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of another column or of another metric under a heading; a figure of few pictures shown as certain."""
    result = bench(data, model, tmp_path / "out", "--changes", f"{FORMAT_SWAP},half")
    assert "method blend" not in tables.table("experts", {"experts": result})  # of six fakes
    monkeypatch.setattr(tables, "MIN_SLICE", 6)
    texts = {name: tables.table(name, {"experts": result}) for name in ("experts", "robustness", "localisation")}
    assert all(f" --changes {FORMAT_SWAP},half --out DIR`" in text for text in texts.values())
    maps = result["localisation"]["maps"]
    for name, part in maps.items():
        figures = f"{tables.shown(part['auc'])} | {tables.shown(part['iou'])}"
        assert f"| {name} | {figures} | 6 | 6 |" in texts["localisation"]
    best = max(maps[name]["iou"]["value"] for name in (localisation.CENTRE, localisation.OVAL))
    row = next(line for line in tables.table("summary", {"experts": result}).splitlines() if "The map" in line)
    assert f"{maps[POINTER]['iou']['value']:.3f}" in row and f"{best:.3f}" in row and row.endswith("| 6 fakes |")
    auc = result["scorers"]["fusion"]["overall"]["auc"]
    cell = f"{auc['value']:.3f}{tables.FEW_MARK}"  # twelve groups
    assert f"| AUC | {cell} |" in texts["experts"] and f"| unchanged | {cell} |" in texts["robustness"]
    assert "method blend*" in texts["experts"] and "| 6 / 6 | 12 |" in texts["experts"]
    swap, rows = result["format_swap"], pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    pairs = [(r[f"expert:{EXPERT}"], json.loads(r["changed"]).get(FORMAT_SWAP)) for r in rows]
    moved = [abs(after[EXPERT] - before) for before, after in pairs if after]  # of signed moves the mean is none
    assert swap[f"expert:{EXPERT}"]["median"] == pytest.approx(np.median(moved))
    assert 0 < swap[f"expert:{EXPERT}"]["median"] < 0.01 and swap["fusion"]["n"] == 12
    assert "baseline:sharpness" not in swap  # it gives no probability
    assert f"| fusion | {swap['fusion']['median']:.3f} | {swap['fusion']['p90']:.3f} | 12 |" in texts["robustness"]
    half = result["robustness"]["half"]["auc"]["fusion"]["value"]
    assert f"| half | {half:.3f}" in texts["robustness"]
