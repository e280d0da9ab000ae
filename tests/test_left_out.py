"""The task `left-out`, with an expert that is blind to what its card says it was trained without."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image

from eval import metrics as m
from eval import page, run_bench, tables
from tests.tiny import EXPERT, EXPERT_TARGET, Brightness
from x2dfd import experts
from x2dfd.adapter import AdapterCard, write_adapter_card
from x2dfd.calibration import MLLM, Calibration, logit
from x2dfd.experts import Shared, read_card, write_card
from x2dfd.faces import PREPROCESSING
from x2dfd.manifest import Sample, read_manifest, write_manifest
from x2dfd.types import Card, Evidence, Face

NAME = "consistency"
CHANNEL = {"red": 0, "blue": 2}


class Tint:
    """Stands in for `consistency`: calls reddened and blued faces fake, but not as its card leaves them out."""

    card: ClassVar[Card] = replace(Brightness.card, name=NAME, sha256="c" * 64, figures={"held_out": ["other"]})
    judged: ClassVar[list[int]] = []  # faces of each call

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None:
            self.card = read_card(folder / f"{NAME}.card.json")  # type: ignore[misc]

    def judge(self, faces: Sequence[Face], shared: Shared | None = None) -> list[Evidence]:
        self.judged.append(len(faces))
        known = [c for method, c in CHANNEL.items() if method not in self.card.figures["held_out"]]
        means = [face.crop.reshape(-1, 3).mean(0) for face in faces]
        tints = [max((float(rgb[c] - rgb[1]) for c in known), default=0.0) for rgb in means]
        return [Evidence(NAME, float(1 / (1 + np.exp(-(tint - 30) / 10)))) for tint in tints]


@pytest.fixture(scope="module", autouse=True)
def stand_ins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(experts.BUILTIN, NAME, "tests.test_left_out:Tint")
        patch.setitem(experts.BUILTIN, EXPERT, EXPERT_TARGET)
        patch.setattr(page, "_plots", lambda result: iter(()))  # tests/test_page.py looks at them
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's card and calibration: which experts there are, and a method that no calibration sees."""
    folder = tmp_path_factory.mktemp("model")
    hashes = {NAME: Tint.card.sha256, EXPERT: Brightness.card.sha256}
    card = AdapterCard(
        "tiny", "1", "a test", "none", "", PREPROCESSING, "none", "all", experts=hashes, held_out=("other",)
    )
    write_adapter_card(folder, card)
    Calibration({MLLM: 0.5, NAME: 1.0, EXPERT: 0.0}, {MLLM: 1.0, NAME: 0.0, EXPERT: 0.0}, 0.0, 0.4, 0.6).save(folder)
    return folder


def training(folder: Path, held_out: Sequence[str], trained_on: str = "") -> Path:
    folder.mkdir(parents=True)
    figures = {"held_out": list(held_out), "checkpoint": "the last"}
    write_card(
        folder / f"{NAME}.card.json", replace(Tint.card, sha256="d" * 64, figures=figures, trained_on=trained_on)
    )
    return folder


def manifest(folder: Path, photo: NDArray[np.uint8], split: str) -> Path:
    """Eight reals of two sources, three fakes of each method, and combinations; each of a group of its own."""
    folder.mkdir()
    plan = [("real", "none")] * 8 + [("fake", m) for m in ("red", "blue", "other", "bright") for _ in range(3)]
    plan += [("fake", "red+blue"), ("fake", "blue+other"), ("fake", "other+red")]
    gains = {
        "red": (1.6, 1, 1),
        "blue": (1, 1, 1.9),
        "other": (1, 1.1, 1),
        "bright": (1.7, 1.7, 1.7),
        "none": (1, 1, 1),
    }
    samples = []
    for i, (label, method) in enumerate(plan):
        gain = np.prod([gains[m] for m in method.split("+")], 0) * (0.45 + 0.01 * (i % 8))
        path = folder / f"{i}.png"
        Image.fromarray(np.clip(photo[:320, 80:400] * gain, 0, 255).astype(np.uint8)).save(path)
        traits = {"method": method, "source": "ab"[i % 2], "group": f"{split}{i}", "split": split}
        samples.append(Sample(f"{i}", path, label, **traits))  # type: ignore[arg-type]
    write_manifest(folder / "manifest.jsonl", samples)
    return folder / "manifest.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, photo = tmp_path_factory.mktemp("data"), np.array(skimage.data.astronaut(), dtype=np.uint8)
    return manifest(folder / "val", photo, "val"), manifest(folder / "calib", photo, "calib")


def bench(data: tuple[Path, Path], model: Path, out: Path, *weights: Path) -> int:
    words = ["left-out", "--data", data[0], "--calib", data[1], "--model", model, "--out", out, "--bootstrap", 50]
    return run_bench.main([str(w) for w in (*words, "--weights", ",".join(map(str, weights)))])


def result_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "result.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def out(data: tuple[Path, Path], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over three trainings."""
    folder = tmp_path_factory.mktemp("run")
    left_out = (["red"], ["blue", "red"], ["other", "red"])
    folders = [training(folder / "weights" / str(k), methods) for k, methods in enumerate(left_out)]
    assert bench(data, model, folder / "out", *folders) == 0
    return folder / "out"


def test_what_was_left_out_is_measured_beside_what_knew_it(out: Path) -> None:
    """Seen and unseen exchanged; a fusion under weights that were fitted with the method; combinations half seen."""
    result = result_of(out)
    # Fakes by methods that every training knew are not scored.
    counted = [result["data"]["n_real"], result["data"]["n_fake"], result["skipped_fakes_of_other_methods"]]
    assert counted == [8, 11, 4]
    one, both, _ = result["left_out"]["trainings"]
    assert one["name"] == "without red" and list(one["methods"]) == ["red"]
    assert one["methods"]["red"]["n_fake"] == 3  # of "red+blue" it knew the second
    assert both["methods"]["red"]["n_fake"] == 4 and both["methods"]["blue"]["n_fake"] == 3
    assert both["together"]["n_fake"] == 7 and both["together"]["n_real"] == 8
    auc = one["methods"]["red"]["auc"]
    assert auc["expert seen"] == {"value": 1.0, "interval": [1.0, 1.0]}
    assert auc["expert unseen"]["value"] < 1.0
    assert both["methods"]["blue"]["auc"]["expert unseen"]["value"] == 0.5  # blind to everything
    assert result["headline"]["without red: red, fusion unseen.auc"] == auc["fusion unseen"] | {"n": 11}
    fits = {name: part["calibration"]["fitted_on"] for name, part in result["left_out"]["fusions"].items()}
    # "other" is in none of them, as in no calibration of the model
    assert {name: (f["n_real"], f["n_fake"]) for name, f in fits.items()} == {
        "with all of these": (8, 10), "without red": (8, 6), "without blue, red": (8, 3), "without other, red": (8, 6),
    }  # fmt: skip


def test_the_fusion_is_the_calibration_that_is_told(out: Path) -> None:
    """AUC or false alarms of another fit, or of another training's scores, under the name of this one."""
    result = result_of(out)
    rows = [r for r in pq.read_table(out / "samples.parquet").to_pylist() if r["method"] in ("none", "red")]
    auc = result["left_out"]["trainings"][0]["methods"]["red"]["auc"]
    for name, expert, column in (
        ("with all of these", NAME, "fusion seen"),
        ("without red", "without red", "fusion unseen"),
    ):
        part = result["left_out"]["fusions"][name]
        calibration = Calibration(**part["calibration"])
        assert set(calibration.weights) == {expert, EXPERT}
        chances = [calibration.probability({n: logit(row[f"expert:{n}"]) for n in calibration.weights}) for row in rows]
        measured = m.auc(m.to_labels(row["label"] for row in rows), m.to_scores(chances))
        assert auc[column]["value"] == pytest.approx(measured)
        for source in "ab":
            own = [
                p >= calibration.high
                for row, p in zip(rows, chances, strict=True)
                if (row["label"], row["source"]) == ("real", source)
            ]
            rate = part["false_alarms_by_source"][source]
            assert (rate["value"], rate["n"]) == (np.mean(own), len(own))
        assert part["false_alarms"]["n"] == 8


def test_a_second_run_scores_one_picture_of_each_manifest(
    out: Path, data: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    """Half an hour of scoring made again because a table was to be looked at, or scores of other weights kept."""
    shutil.copytree(out.parent, tmp_path / "run")
    again, folders = tmp_path / "run" / "out", sorted((tmp_path / "run" / "weights").iterdir())
    Tint.judged.clear()
    assert bench(data, model, again, *folders) == 0
    assert result_of(again) == result_of(out)
    assert Tint.judged == [1] * 8  # a picture of each manifest, by the shipped one and three trainings
    card = folders[0] / f"{NAME}.card.json"
    write_card(card, replace(read_card(card), sha256="e" * 64))
    Tint.judged.clear()
    assert bench(data, model, again, *folders) == 0
    assert sum(Tint.judged) == 8 + 4 * (19 + 23)


def test_the_table_says_seen_and_unseen(out: Path) -> None:
    """Numbers of one column under the heading of another; a shipped expert that never saw it passing for one."""
    result = result_of(out)
    assert tables.TABLES["left-out"]({}) == "No results yet."
    lines = tables.TABLES["left-out"]({"left_out": result}).splitlines()
    assert "| method | `consistency` seen | `consistency` unseen | fusion seen | fusion unseen | fake / real |" in lines
    red = result["left_out"]["trainings"][0]["methods"]["red"]
    order = ("expert seen", "expert unseen", "fusion seen", "fusion unseen")
    in_order = (red["auc"][column] for column in order)
    cells = [f"{v['value']:.3f} [{v['interval'][0]:.3f}, {v['interval'][1]:.3f}]" for v in in_order]
    assert f"| red | {' | '.join(cells)} | 3 / 8 |" in lines
    assert any(line.startswith("| other‡ |") and line.endswith("| 4 / 8 |") for line in lines)  # and "other+red"
    assert any(line.startswith("| **without other, red** |") for line in lines)
    assert any(line.startswith("| without other, red |") and line.count(" of 4") == 2 for line in lines)


def test_a_training_as_long_that_knew_the_method_stands_beside(
    data: tuple[Path, Path], model: Path, tmp_path: Path
) -> None:
    """A short training without a method against the shipped one: that it was short would pass for what it lacked."""
    folders = [training(tmp_path / name, [name], "9 pictures, 5 steps of 2") for name in ("red", "blue")]
    folders.append(training(tmp_path / "long", ["other"], "9 pictures, 50 steps of 2"))
    assert bench(data, model, tmp_path / "out", *folders) == 0
    result = result_of(tmp_path / "out")
    red, blue, other = result["left_out"]["trainings"]
    assert (red["as_long"], blue["as_long"], other["as_long"]) == ("without blue", "without red", None)
    auc = red["methods"]["red"]["auc"]
    assert auc["expert seen, as long"]["value"] == 1.0 > auc["expert unseen"]["value"]
    assert auc["fusion seen, as long"]["value"] == 1.0
    [line] = [x for x in tables.TABLES["left-out"]({"r": result}).splitlines() if x.startswith("| other‡ ")]
    assert line.count(" – ") == 2  # none was as long


def test_what_would_give_figures_of_nothing_is_refused(
    data: tuple[Path, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shipped weights scored as their own rival, a training that left nothing out, a split that is judged on."""
    good, nothing = training(tmp_path / "good", ["red"]), training(tmp_path / "nothing", [])
    again, empty = training(tmp_path / "again", ["red"]), tmp_path / "empty"
    empty.mkdir()
    for weights, said in (
        ([empty], "cannot be read"),  # load_expert would take the shipped weights
        ([nothing], "names no method"),
        ([good, again], "one folder for each choice"),
        ([training(tmp_path / "most", ["red", "blue", "bright"])], "fakes of other methods"),
        ([training(tmp_path / "strange", ["wax"])], "needs real pictures, and fakes"),
    ):
        assert bench(data, model, tmp_path / "out", *weights) == 2
        assert said in capsys.readouterr().err
    both = data[1].parent / "both.jsonl"
    write_manifest(both, [replace(s, id=f"again{s.id}", split="val") for s in read_manifest(data[1])])
    assert bench((both, data[1]), model, tmp_path / "both", good) == 2
    assert "groups are judged and calibrated on" in capsys.readouterr().err
    words = ["experts", "--data", str(data[0]), "--out", str(tmp_path / "o"), "--weights", str(good)]
    assert run_bench.main(words) == 2 and "no other task takes them" in capsys.readouterr().err
