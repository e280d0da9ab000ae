"""Leave-one-source-out figures: of what a tower never met, and of nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eval import rotation, tables
from eval.bench import as_json
from tests import tiny
from tests.raising import raises
from x2dfd.calibration import Calibration, Logistic
from x2dfd.crops import CropSet
from x2dfd.manifest import Sample
from x2dfd.run_calibrate import HeldOut

RULE = Logistic({tiny.EXPERT: 1.0}, {tiny.EXPERT: 0.0}, -0.7)
CALIBRATION = Calibration({"whole": RULE, "part": RULE}, 0.3, 0.7)


def picture(id: str, label: str, source: str, method: str = "", df_class: str = "", split: str = "train") -> Sample:
    mask = Path("mask.png") if method == "swap" else None
    return Sample(id, Path(f"{id}.png"), label, method, df_class, source, f"g{id}", split, mask=mask)  # type: ignore[arg-type]


def crops_of(pictures: list[tuple[Sample, int]]) -> CropSet:
    crops = np.stack([np.full((224, 224, 3), b, np.uint8) for _, b in pictures])
    return CropSet([s for s, _ in pictures], crops, np.zeros((len(crops), 468, 2), np.float32), {})


def test_what_a_tower_never_met_is_set_against_the_photos_it_never_met() -> None:
    """Bug prevented: pictures of known sources, or of the split that chose the checkpoint, make up the figures. Photos
    of known sources stand beside generators alone, in a column of their own."""
    bright = [(picture(f"n{i}", "real", "new"), 40 + i) for i in range(4)]
    bright += [(picture(f"g{i}", "fake", "sdxl", "sdxl", "EFS"), (20, 230, 231)[i]) for i in range(3)]
    bright += [(picture(f"s{i}", "fake", "new", "swap", "FS"), 220 + i) for i in range(2)]
    bright += [(picture("v", "real", "new", split="val"), 255), (picture("o", "real", "old"), 255)]
    bright += [(picture("w", "fake", "old", "swap", "FS"), 0)]
    bright += [(picture(f"k{i}", "real", "old", split="val"), 25) for i in range(2)]
    bright += [(picture("x", "fake", "old", "swap", "FS", "val"), 0)]
    expert = tiny.Brightness()
    held_out = HeldOut({tiny.EXPERT: expert}, frozenset({"new", "sdxl"}))
    rows = rotation.rows_of(held_out, [expert], CALIBRATION, [crops_of(bright)], 60)
    assert {name: (row.kind, len(row.verdicts)) for name, row in rows.items()} == {
        "photos new": ("photos", 4), "generator sdxl": ("generator", 3),
        "method on new photos swap": ("method on new photos", 2), "known photos old": ("known photos", 2),
    }  # fmt: skip
    found = rotation.measured(rows)
    assert found["generator sdxl"]["auc"]["never met"].value == pytest.approx(2 / 3)
    assert found["generator sdxl"]["auc"]["among known photos"].value == pytest.approx(2 / 3)
    assert "among known photos" not in found["method on new photos swap"]["auc"]
    assert found["method on new photos swap"]["auc"]["never met"].value == 1 and "auc" not in found["photos new"]
    assert found["generator sdxl"]["wrong"].value == pytest.approx(1 / 3) and found["photos new"]["wrong"].value == 0
    whole = rotation.summary([{"rows": found}])
    assert whole["generator"] == {"mean_auc": pytest.approx(2 / 3), "worst_auc": pytest.approx(2 / 3), "n": 1}
    assert (whole["answered"], whole["false_alarms"], whole["called_real"]) == (1, 0, pytest.approx(1 / 5))
    part = as_json({"sha256": {}, "left_out": ["new", "sdxl"], "rows": found})
    page = tables.table("rotation", {"rotation": {"task": {"name": "rotation"}, "towers": [part]}})
    assert "| generator sdxl | 0.667‡ | 0.667‡ |" in page and "without new, sdxl" in page
    assert set(found["generator sdxl"]["auc"]) == {"never met", "met", "sharpness", "among known photos"}
    dark = tiny.Darkness()
    both = HeldOut({tiny.EXPERT: expert, "darkness": dark}, frozenset({"new", "sdxl"}))
    alone = rotation.measured(rotation.rows_of(both, [expert, dark], CALIBRATION, [crops_of(bright)], 60))
    auc = alone["generator sdxl"]["auc"]
    assert auc[tiny.EXPERT].value == pytest.approx(2 / 3) and auc["darkness"].value == pytest.approx(1 / 3)
    held_out = HeldOut({tiny.EXPERT: expert}, frozenset({"new", "swap"}))
    few = rotation.rows_of(held_out, [expert], CALIBRATION, [crops_of(bright)] * 2, 1)
    assert {name: len(row.verdicts) for name, row in few.items()} == {
        "photos new": 1, "method swap": 1, "known photos old": 1,
    }  # fmt: skip


def test_without_photos_of_a_held_out_source_there_is_no_figure() -> None:
    """Bug prevented: an AUC against photos that the tower learnt from."""
    bright = [(picture("g", "fake", "sdxl", "sdxl", "EFS"), 200), (picture("o", "real", "old"), 20)]
    with raises("no_real_source_left_out", "sdxl"):
        rotation.rows_of(HeldOut({}, frozenset({"sdxl"})), [tiny.Brightness()], CALIBRATION, [crops_of(bright)], 60)
