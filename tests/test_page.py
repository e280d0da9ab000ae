"""The page of a result: whole in one file, true to the numbers, and safe with names from a manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import curves, page
from eval import metrics as m
from eval.bench import as_json
from eval.rows import SampleRow
from eval.tasks.detect import detect_result
from x2dfd.manifest import Sample


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    rows: list[SampleRow] = []
    for i in range(80):
        fake = i % 2 == 1
        source = "<script>x</script>" if i % 4 < 2 else "film"
        samples.append(
            Sample(f"s{i}", Path("/x"), "fake" if fake else "real", source=source, method="swap" if fake else "none",
                   group=f"g{i}", video=f"v{i // 4}{fake}")
        )  # fmt: skip
        p = float(np.clip(rng.normal(0.7 if fake else 0.45, 0.2), 0, 1)) if i else None
        said = None if p is None else "fake" if p > 0.6 else "real" if p < 0.4 else "inconclusive"
        reason = None if p else "no_face"
        rows.append(SampleRow(f"s{i}", None, None, reason, said or "inconclusive", p, p, {"clip": p}))
    promised = {"false_alarms_allowed": 0.001, "split": "calib", "seen": False}
    measured = as_json(detect_result(samples, rows, "calibrated", ["source", "method"], promised))
    auc = {"value": 0.7, "interval": [0.6, 0.8], "n": 70, "groups": 60}
    before = {"fusion": 0.75, "expert:clip": None}
    return {
        "task": {"name": "detect", "version": "5", "unit": "image"},
        "data": {"manifest": "m.csv", "sha256": "0" * 64, "samples_sha256": "1" * 64, "pictures_sha256": "2" * 64,
                 "split": None, "limit": None, "n": 80, "n_real": 40, "n_fake": 40, "n_groups": 80},
        "model": {"name": "embedded", "mode": "calibrated", "stated": {"name": "e"}},
        "settings": {"equalise": None, "seed": 0}, "code": {"commit": "c", "dirty": True}, "versions": {"numpy": "2"},
        "device": "cpu", "failures": {"not_an_image": 3}, **measured,
        "robustness": {"jpeg50": {"what": "JPEG 50", "unchanged": before,
                                  "auc": {"fusion": auc, "expert:clip": auc | {"value": None}}}},
    }  # fmt: skip


def test_the_page_is_one_file_that_says_what_was_measured(result: dict[str, Any]) -> None:
    """A page that asks a server for a font tells it who reads; a name from a manifest that runs as a script."""
    pytest.importorskip("matplotlib")
    html = page.render(json.loads(json.dumps(result)))
    auc = result["headline"]["calibrated.auc"]
    assert f"{auc['value']:.3f} [{auc['interval'][0]:.3f}, {auc['interval'][1]:.3f}]" in html
    assert html.count("<svg ") == html.count("<figure") == 5  # ROC, calibration, risk, by source, robustness
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of XML; nothing is fetched from there
    assert set(re.findall(r"https?://[^\"' <]+", html)) <= names
    assert "<script" not in html and "&lt;script&gt;" in html
    assert not re.search(r"#0[0-5]0[0-9a-f]0[0-9a-f]", html) and "var(--c0)" in html  # no colour was left behind
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert "in no commit" in html and "3 files could not be judged" in html and "above the 0 % allowed" in html
    answered = result["scorers"]["calibrated"]["answers"]
    assert f'<th scope="row">AUC of those</th><td>{answered["auc"]["value"]:.3f} [' in html
    assert "prefers-color-scheme: dark" in html and "no_face: 1" in html


def test_without_matplotlib_the_numbers_stay(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of hours that ends in an ImportError."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    html = page.render(result)
    assert page.NO_PLOTS.split(":")[0] in html and "<svg" not in html and "All metrics" in html


def test_clips_and_gaps_are_in_the_result(result: dict[str, Any]) -> None:
    """Frames counted as clips; a gap between groups of one picture each."""
    scorer = result["scorers"]["calibrated"]
    assert scorer["videos"]["n"] == 40 and scorer["videos"]["sbi"]["n"] == 40  # two frames a clip
    assert scorer["videos"]["sbi"]["frames_without_score"] == 1
    gaps = scorer["gaps"]["source"]
    by = scorer["by"]["source"]
    aucs = {name: part["auc"]["value"] for name, part in by.items()}
    assert gaps["auc"]["value"] == pytest.approx(max(aucs.values()) - min(aucs.values()))
    assert gaps["auc"]["highest"] == max(aucs, key=lambda n: aucs[n]) and len(gaps["auc"]["figures"]) == 2
    assert set(gaps) == {"auc", "false_alarms", "found"} and "method" not in scorer["gaps"]


def test_curves_by_hand() -> None:
    """A reliability that weighs the commoner class more says something of the manifest, not of the model."""
    labels, scores = m.to_labels(["fake"] + ["real"] * 9), np.array([0.55] + [0.56] * 3 + [0.05] * 6)
    drawn = curves.of(labels, scores)
    [low, middle] = drawn["reliability"]
    assert low == {"bin": [0.0, 0.1], "n": 6, "mean": 0.05, "fake": 0.0}
    assert middle["n"] == 4 and middle["fake"] == pytest.approx(0.5 / (0.5 + 3 * 0.5 / 9), abs=1e-4)
    assert drawn["roc"][0] == [0.0, 0.0] and drawn["roc"][-1] == [1.0, 1.0]
    many = curves.of(np.arange(5000) % 2, np.random.default_rng(0).random(5000))
    assert len(many["roc"]) <= curves.POINTS and many["risk_coverage"][-1][0] == 1.0
    assert curves.of(m.to_labels(["real"]), np.array([0.5])) == {"roc": [], "risk_coverage": [], "reliability": []}
    assert curves.of(labels, scores * -30)["reliability"] == []  # no probability
