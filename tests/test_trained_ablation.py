"""Trainings with parts left out: what is left out is gone, all else is equal, the table is of what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_gen.build import BuildConfig, build
from eval import tables, trained_ablation
from eval.scoring import Resampling
from eval.trained_ablation import CHANCE, FUSION, VARIANTS, WHOLE, Asked, measured, variant_records
from tests import tiny
from x2dfd import prompts
from x2dfd.experts import BUILTIN
from x2dfd.explain import read_cues
from x2dfd.manifest import Sample
from x2dfd.types import Cue

Record = dict[str, Any]


def record(task: str, label: str, question: str, answer: str, **more: Any) -> Record:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    common = {
        "id": f"p/{task}",
        "task": task,
        "row": 3,
        "label": label,
        "df_class": "FS" if label == "fake" else "real",
    }
    scores = {"consistency": 0.91, "clip": None}
    pointed = {"consistency": [{"area": "jaw", "artifact": "blending"}]}
    return common | {"scores": scores, "pointed": pointed, "cues": [], "conversations": said} | more


TOLD = " And the consistency score is 0.910 (very high), and the clip score is N/A."
POINTED = " The consistency expert points at jaw blending."
SEAM = "This image is fake. Jaw blending: a seam."
CLOSING = " Additionally, the image shows obvious consistency artifacts supporting fake."
RECORDS = [
    record("detect", "fake", "q", f"{SEAM}{CLOSING}",
           cues=[{"area": "jaw", "artifact": "blending", "score": 0.9}]),
    record("detect_again1", "fake", "q", "This image is fake. Other words."),
    record("detect", "real", "q", "This image is real. No seam runs along the jaw."),
    record("cue0", "real", "q", "No"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        (WHOLE, prompts.QUESTION + TOLD + POINTED, SEAM),
        ("SFS", prompts.QUESTION, SEAM),
        ("WFS", prompts.QUESTION + TOLD + POINTED, "This image is fake."),
        ("numbers", prompts.QUESTION + TOLD.replace(" (very high)", "") + POINTED, SEAM),
        ("words", prompts.QUESTION + TOLD.replace("0.910 (very high)", "very high") + POINTED, SEAM),
    ],
)  # fmt: skip
def test_what_is_left_out_is_gone_and_all_else_is_equal(name: str, question: str, answer: str) -> None:
    """A variant that still holds the part, or lacks another, compares something else than the table says."""
    fake, real = variant_records(RECORDS, VARIANTS[name], "both")
    assert fake["conversations"] == [
        {"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}
    ]  # fmt: skip
    explained = VARIANTS[name].explained
    assert real["conversations"][1]["value"] == "This image is real." + " No seam runs along the jaw." * explained
    assert {k: v for k, v in fake.items() if k != "conversations"} == {
        k: v for k, v in RECORDS[0].items() if k != "conversations"
    }


def test_random_cues_are_not_the_true_ones() -> None:
    many = [RECORDS[0] | {"row": k} for k in range(50)]
    said = [read_cues(r["conversations"][1]["value"]) for r in variant_records(many, VARIANTS["random cues"], "both")]
    assert all(len(cues) == 1 for cues in said)
    assert len({(c.area, c.artifact) for cues in said for c in cues}) > 25


def test_the_figures_by_hand() -> None:
    cues = (Cue("jaw", "blending"), Cue("eyes", "blur"))
    samples = [
        Sample("s0", Path("x"), "fake", group="g0", cues=cues),
        Sample("s1", Path("x"), "fake", group="g1"),
        Sample("s2", Path("x"), "real", group="g2"),
    ]
    asked = [Asked(s, None, ()) for s in samples]  # type: ignore[arg-type]
    said = [[["jaw", "blur"]], [["skin", "noise"]], []]
    rows = {WHOLE: [{"logit": v, "named": n, "text": "t"} for v, n in zip((2.0, -1.0, 0.0), said, strict=True)]}
    rows[CHANCE] = [r | {"named": None} for r in rows[WHOLE]]
    found = measured(asked, rows, [0.9, 0.8, 0.1], Resampling(20, 0))
    assert found["auc"][WHOLE]["value"] == 0.5 and found["auc"][FUSION]["value"] == 1.0
    assert found["n_texts"] == 1 and set(found["texts"]) == {WHOLE}
    assert found["texts"][WHOLE]["areas"]["value"] == pytest.approx(2 / 3)  # one of two areas, none that is not there
    assert found["texts"][WHOLE]["cues"]["value"] == 0.0


@pytest.mark.needs_base
def test_it_trains_asks_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of training that are lost at the second call, or a table of two different runs."""
    import skimage.data

    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    base = tiny.write_base(tmp_path / "base")
    manifest = tiny.write_small_manifest(tmp_path, np.asarray(skimage.data.astronaut()))
    config = BuildConfig(str(manifest), experts=(tiny.EXPERT,), cue_questions=0)
    instructions = build(config, tmp_path / "instructions")
    (tmp_path / "c.yaml").write_text(f"base: {base}\nmax_steps: 2\naccumulate: 1\nlr: 1.0e-2\nsave_steps: 50\n")
    words = [
        "--instructions",
        instructions,
        "--manifest",
        manifest,
        "--data",
        manifest,
        "--config",
        tmp_path / "c.yaml",
    ]
    words += ["--limit", 6, "--bootstrap", 20, "--out", tmp_path / "out", "--only"]
    assert trained_ablation.main([str(w) for w in (*words, f"zero-shot,{WHOLE}")]) == 0
    first = json.loads((tmp_path / "out/result.json").read_text("utf-8"))
    assert set(first["trained"]["auc"]) == {"zero-shot", WHOLE, CHANCE}  # nothing was calibrated with this expert
    card = json.loads((tmp_path / "out/SFS_+_WFS/adapter/card.json").read_text("utf-8"))
    assert card["figures"]["steps"] == 2 and card["experts"]
    # Another call trains what is new, keeps what is there, and makes one table of both.
    capsys.readouterr()
    assert trained_ablation.main([str(w) for w in (*words, "SFS")]) == 0
    told = capsys.readouterr()
    assert "training: SFS" in told.err and f"training: {WHOLE}" not in told.err
    second = json.loads((tmp_path / "out/result.json").read_text("utf-8"))
    assert second["trained"]["auc"][WHOLE] == first["trained"]["auc"][WHOLE] and "SFS" in second["trained"]["auc"]
    assert "| SFS + WFS | " in tables.trained({"r": second})
    assert json.loads((tmp_path / "out/SFS/adapter/card.json").read_text("utf-8"))["experts"] == {}
    assert trained_ablation.main([str(w) for w in (*words, "nothing")]) == 2
