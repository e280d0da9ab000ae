"""The committed model on real pixels: the README's first lines run, and what is promised of its numbers holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import x2dfd
from data_gen.demo import make_pair
from eval.scoring import equalised
from eval.tasks.experts import Panel, judge
from tests.raising import raises
from x2dfd.adapter import EMBEDDED
from x2dfd.degrade import CODEC, codec, tone
from x2dfd.faces import find_faces
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.prompts import QUESTION
from x2dfd.tower import quick_in_16_bits
from x2dfd.tower_pass import adds_bytes_in_full
from x2dfd.types import Report

pytestmark = pytest.mark.needs_base
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def detector() -> Any:
    return x2dfd.load()


@pytest.fixture
def photos(astronaut: NDArray[np.uint8], tmp_path: Path) -> list[Image.Image]:
    """Eight pictures of one face, of different size and tone, half of them forged twins."""
    pair = [np.asarray(Image.open(path)) for path in make_pair(tmp_path)]
    out = []
    for i in range(8):
        pixels = np.clip(tone(pair[i % 2], 0.3, np.random.default_rng(i)), 0, 255).astype(np.uint8)
        side = (512, 440, 380, 470)[i // 2]
        out.append(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))
    return out


def p_fake(report: Any) -> float:
    assert isinstance(report, Report) and report.verdict.p_fake is not None
    return report.verdict.p_fake


def test_the_readme_begins_with_lines_that_run(
    face_photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug prevented: the first code that a reader copies ends in a traceback."""
    block = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None and "face.jpg" in block[1] and face_photo.name == "face.jpg"
    monkeypatch.chdir(face_photo.parent)
    exec(compile(block[1], "README.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"(real|fake|inconclusive) 0\.\d+", said[0])
    assert len(said[1].split()) >= 4 and any("Evidence(" in line for line in said)


def test_a_verdict_imports_no_more_than_it_reads(face_photo: Path) -> None:
    """Bug prevented: a first verdict that waits for libraries of the language model, which it does not ask."""
    code = f"import json, sys, x2dfd; x2dfd.load().detect({str(face_photo)!r}); "
    code += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"transformers", "tokenizers", "peft", "accelerate", "scipy", "pyarrow", "pandas", "matplotlib"}
    assert heavy.isdisjoint(json.loads(done.stdout))


def test_the_language_model_comes_only_for_a_text(face_photo: Path) -> None:
    """Bug prevented: seconds of loading what no verdict reads; or a text of a model that saw another tower's states."""
    fresh = x2dfd.load(dtype="fp32")
    report = fresh.detect(face_photo)
    assert report.verdict.label == "real" and report.rationale and report.faces[0].p_fake_mllm is None
    lazy: Any = fresh.mllm
    assert lazy._loaded is None
    [face] = find_faces(np.asarray(Image.open(face_photo)))
    crop = codec(face.crop, *CODEC)[None]
    mine = lazy.verdict_logits(lazy.encode(crop), [QUESTION])
    assert lazy._loaded is not None
    assert mine == pytest.approx(lazy.whole.verdict_logits(lazy.whole.encode(crop), [QUESTION]), abs=1e-3)


def test_sixteen_bits_in_the_tower_hardly_move_a_verdict(tmp_path: Path) -> None:
    """Bug prevented: the precision that a CPU with units for bf16 takes by itself changes answers, or is not stated."""
    exact, short = x2dfd.load(dtype="fp32"), x2dfd.load(dtype="bf16")
    assert [d.info.runs_on for d in (exact, short)] == ["cpu fp32", "cpu bf16"]
    for path in make_pair(tmp_path):
        apart = [p_fake(d.detect(path, rationale=False)) for d in (exact, short)]
        assert apart[0] != apart[1] and apart[0] == pytest.approx(apart[1], abs=0.02)
    crops = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    logits = [d.mllm.verdict_logits(d.mllm.encode(crops), [QUESTION] * 2) for d in (exact, short)]
    assert (logits[0] != logits[1]).all() and logits[0] == pytest.approx(logits[1], abs=0.3)
    if not torch.cuda.is_available():
        assert x2dfd.load().info.runs_on == ("cpu bf16" if quick_in_16_bits("cpu") else "cpu fp32")


@pytest.mark.skipif(not adds_bytes_in_full(), reason="this CPU has no VNNI")
def test_bytes_in_the_tower_keep_the_answers(detector: Any, tmp_path: Path) -> None:
    """Bug prevented: int8 that changes answers, that only half of the passes take, or that a report does not state."""
    quick = x2dfd.load(dtype="int8")
    assert re.fullmatch(r"cpu int8, ranges [0-9a-f]{8}", quick.info.runs_on or "")
    for path in make_pair(tmp_path):
        mine, its = (d.detect(path, rationale=False) for d in (quick, detector))
        assert mine.verdict.label == its.verdict.label and p_fake(mine) == pytest.approx(p_fake(its), abs=0.05)
        for one, other in zip(mine.faces[0].evidence, its.faces[0].evidence, strict=True):
            assert one.score != other.score and one.score == pytest.approx(other.score, abs=0.1), one.expert
    assert "rationale" in quick.detect(tmp_path / "forged.jpg").timings  # by the language model, in fp32
    with raises("dtype_unsupported"):
        x2dfd.load(dtype="int8", mode="paper")


@pytest.mark.slow
def test_the_file_format_hardly_moves_the_probability(detector: Any, photos: list[Image.Image], tmp_path: Path) -> None:
    """Bug prevented: a detector of JPEG against PNG."""
    files = []
    for i, photo in enumerate(photos):
        photo.save(tmp_path / f"{i}.png")
        photo.save(tmp_path / f"{i}.jpg", quality=95)
        files += [tmp_path / f"{i}.png", tmp_path / f"{i}.jpg"]
    p = [p_fake(r) for r in detector.detect_many(files, rationale=False)]
    assert np.median(np.abs(np.subtract(p[::2], p[1::2]))) <= 0.05


def test_a_forged_twin_looks_more_forged_than_its_photo(detector: Any, tmp_path: Path) -> None:
    """Bug prevented: labels the wrong way round; a model that says the same of everything."""
    real, forged = make_pair(tmp_path)
    reports = list(detector.detect_many([real, forged]))
    assert p_fake(reports[1]) > p_fake(reports[0]) + 0.1
    assert reports[0].rationale != reports[1].rationale and all(r.rationale for r in reports)


@pytest.mark.slow
def test_the_bench_of_the_experts_sees_what_a_verdict_sees(detector: Any, face_photo: Path) -> None:
    """Bug prevented: crops that skip a step of the detector's are measured as another product."""
    panel = Panel.load(EMBEDDED, list(detector.info.experts), detector)
    [row], _ = judge(panel, {}, [Sample("s", face_photo, "real", group="g")], equal=True, batch_size=8)
    report = detector.detect(equalised(face_photo))
    [logit], _ = detector.judge_faces(find_faces(load_picture(equalised(face_photo)).pixels))
    told = {e.expert: e.score for e in report.evidence} | {"mllm": 1 / (1 + np.exp(-logit))}
    assert len(told) >= 2 and {name: row.experts[name] for name in told} == pytest.approx(told, abs=1e-3)
    assert panel.value("fusion", row.experts) == pytest.approx(report.verdict.p_fake, abs=1e-3)
    assert panel.fusion["missing"] == [] and panel.columns[:2] == ["fusion", "mllm"]
    assert all(report.model[key] == panel.facts()[key] for key in ("crops_through", "experts"))
