"""Task `demographics`: whose photos are called fake, and how sure that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eval.bench import TASKS
from eval.rows import SampleRow
from eval.stats import TOO_FEW
from eval.tasks import demographics
from x2dfd.manifest import Sample


def people(count: int, **extra: str) -> list[Sample]:
    """Photos of one person each."""
    names = [f"{'-'.join(extra.values())}{k}" for k in range(count)]
    return [Sample(name, Path(f"{name}.png"), "real", source="s", group=name, extra=extra) for name in names]


def said(samples: list[Sample], fakes: int) -> list[SampleRow]:
    rows = [SampleRow.of(s) for s in samples]
    for k, row in enumerate(rows):
        row.said, row.p_fake = ("fake", 0.9) if k < fakes else ("real", 0.1)
    return rows


def test_a_gap_stands_with_its_interval_and_few_people_have_none() -> None:
    """Ten false alarms of twenty against none of twenty is a gap; one of three is not, whatever its size."""
    women, men, few = people(20, sex="f", age="30"), people(20, sex="m", age="30"), people(3, sex="x", age="70")
    samples = women + men + few
    rows = said(women, 10) + said(men, 0) + said(few, 1)
    made = demographics.demographics_result(samples, rows, ["2 light"] * 20 + ["6 dark"] * 20 + [""] * 3)
    sex = made["by"]["sex"]
    assert sex["f"]["false_alarms"].value == 0.5 and sex["f"]["above_the_others"].interval[0] > 0.1
    assert sex["m"]["above_the_others"].interval[1] < -0.1
    assert sex["x"]["false_alarms"].note == TOO_FEW and sex["x"]["above_the_others"].interval is None
    assert made["by"]["tone"]["2 light"]["above_the_others"].value == 0.5  # who has no tone is not among the others
    assert made["tone_within_source"]["s"].keys() == {"2 light", "6 dark"} and made["not_recorded"] == []
    assert made["headline"]["false_alarms"].n == 43


def test_what_the_manifest_does_not_record_is_not_guessed() -> None:
    samples = people(10, camera="a")
    made = demographics.demographics_result(samples, said(samples, 1), ["3 intermediate"] * 10)
    assert made["not_recorded"] == ["sex", "age"] and set(made["by"]) == {"tone", "source"}
    task = TASKS["demographics"]
    assert task.needs is not None and task.needs(samples[0])


def tone_of(path: Path, *, equalise: bool = False) -> str:
    return demographics.tone(Sample("a", path, "real"), equalise)


@pytest.mark.parametrize(("gain", "tones"), [(1.0, {"1 very light", "2 light"}), (0.45, {"5 brown", "6 dark"})])
def test_the_tone_follows_the_cheeks(
    gain: float, tones: set[str], astronaut: NDArray[np.uint8], tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray((astronaut * gain).astype(np.uint8)).save(path)
    assert tone_of(path) in tones


def test_a_grey_photo_and_one_without_a_face_have_no_tone(astronaut: NDArray[np.uint8], tmp_path: Path) -> None:
    """Without colour the angle is 90 degrees whoever it shows: everyone very light."""
    path = tmp_path / "a.png"
    Image.fromarray(astronaut).convert("L").save(path)
    assert tone_of(path) == ""
    Image.new("RGB", (64, 64), "red").save(path)
    assert tone_of(path) == ""
    assert tone_of(tmp_path / "absent.png", equalise=True) == ""
