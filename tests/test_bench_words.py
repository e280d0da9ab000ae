"""Tasks that are answered in words, and the models behind them: a served stand-in goes the whole way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eval import answers, command, models, page
from eval.task import judged
from tests import tiny
from tests.stand_in import Reply, Request, StandIn, question_of
from tests.test_run_bench import result_of, write_csv
from x2dfd.experts import BUILTIN
from x2dfd.manifest import Sample
from x2dfd.prompts import CUE_ENDING

pytest.importorskip("openai")

Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    import openai._base_client as base

    monkeypatch.setattr(page, "_plots", lambda result: iter(()))  # tests/test_page.py looks at them
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(base, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(base, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def photos(astronaut: Pixels, tmp_path: Path) -> Path:
    """Two real and two fake pictures of one face, a wall, and a broken file."""
    rows: list[dict[str, Any]] = []
    kinds = {"fake": "FS", "real": "real"}
    for name, pixels, label in (
        ("a", astronaut, "real"),
        ("b", astronaut[:, ::-1], "real"),
        ("c", 255 - (255 - astronaut) // 2, "fake"),
        ("d", astronaut // 2, "fake"),
        ("wall", np.full_like(astronaut, 90), "real"),
    ):
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{name}.png")
        cues = '[{"area": "jaw", "artifact": "blur"}]' if label == "fake" else ""
        rows.append({"path": f"{name}.png", "label": label, "df_class": kinds[label], "cues": cues, "group": name})
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows.append({"path": "broken.png", "label": "fake", "df_class": "", "cues": "", "group": "broken"})
    return write_csv(tmp_path / "m.csv", rows)


def says(text: str) -> Callable[[Request], Reply]:
    """A model with P(fake) 0.8 of every picture, and this text."""

    def reply(request: Request) -> Reply:
        scored = Reply("fake", {"fake": math.log(0.8), "real": math.log(0.2)})
        return scored if request.get("max_tokens") == 1 else Reply(text)

    return reply


def run(task: str, photos: Path, out: Path, server: StandIn | None, *words: str) -> int:
    asked = ["--model", f"m@{server.url}"] if server else []
    return command.main([task, "--data", str(photos), "--out", str(out), *asked, *words])


def test_a_yes_sayer_is_found_out_in_words(photos: Path, tmp_path: Path) -> None:
    """Answers read without the question's polarity make "yes" to everything a finder of all fakes; where what cannot be
    read is dropped from the denominator, silence is the best strategy."""
    with StandIn(says("Yes, it is."), owned_by="hosted") as server:
        assert run("answer", photos, tmp_path / "out", server) == 0
        first, asked = (tmp_path / "out" / "result.json").read_bytes(), len(server.requests)
        assert run("answer", photos, tmp_path / "out", server) == 0
        assert len(server.requests) == asked + 2  # one picture, to see that the model is the same: a score and a text
    assert (tmp_path / "out" / "result.json").read_bytes() == first
    result = result_of(tmp_path / "out")["scorers"]["answers"]
    assert result["n_scored"] == 4 and result["unscored"] == {"no_face": 1, "not_an_image": 1}
    expected = [answers.question_for(f"{n}.png").yes == label
                for n, label in (("a", "real"), ("b", "real"), ("c", "fake"), ("d", "fake"))]  # fmt: skip
    assert result["accuracy"]["value"] == np.mean(expected) and result["invalid"]["value"] == 0
    assert result["p_fake"]["auc"]["value"] == 0.5
    called_real = [answers.question_for(f"{n}.png").yes == "real" for n in "abcd"]
    assert result["disagreement"]["value"] == np.mean(called_real)  # P(fake) is 0.8 throughout
    assert server.requests and not any("score" in question_of(r) for r in server.requests)  # zero-shot: no experts
    with StandIn(says("Hmm, a face."), owned_by="hosted") as server:
        assert run("answer", photos, tmp_path / "mumbled", server) == 0
    result = result_of(tmp_path / "mumbled")["scorers"]["answers"]
    assert result["accuracy"]["value"] == 0.0 and result["invalid"]["value"] == 1.0
    assert result["invalid_answers"] == ["Hmm, a face."] * 4
    assert "Hmm, a face." in (tmp_path / "mumbled" / "result.html").read_text("utf-8")


def test_classes_in_words_and_their_confusion(photos: Path, tmp_path: Path) -> None:
    """A class that the manifest does not state must not be counted, nor an unreadable one be dropped."""
    with StandIn(says("This is a face swap."), owned_by="hosted") as server:
        assert run("classify", photos, tmp_path / "out", server) == 0
    asked = [question_of(r) for r in server.requests if r.get("max_tokens") != 1]
    assert asked and all("face reenactment" in question for question in asked)
    result = result_of(tmp_path / "out")
    classes = result["scorers"]["classes"]
    assert result["skipped_without_class"] == 1 and classes["n_scored"] == 4
    assert classes["accuracy"]["value"] == 0.5 and classes["confusion"]["real"]["FS"] == 2
    assert classes["macro_f1"]["value"] == pytest.approx((2 * 2 / (2 + 4) + 0) / 2)
    assert run("classify", photos, tmp_path / "majority", None, "--model", "majority") == 0
    majority = result_of(tmp_path / "majority")["scorers"]["classes"]
    assert majority["accuracy"]["value"] == pytest.approx(3 / 5)  # it sees no picture, so the wall is no matter


def test_scores_reach_a_server_as_tool_results(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline "with tools" that never told the model what the tools said."""
    monkeypatch.setitem(BUILTIN, tiny.EXPERT, tiny.EXPERT_TARGET)
    with StandIn(says("Yes, it is."), owned_by="hosted") as server:
        assert run("detect", photos, tmp_path / "out", server, "--tools", tiny.EXPERT) == 0
    asked = [question_of(r) for r in server.requests]
    assert len(asked) == 4 and all(q.startswith("Tool results") and f"\n{tiny.EXPERT}: 0." in q for q in asked)
    result = result_of(tmp_path / "out")
    assert list(result["scorers"]) == ["paper", "mllm", f"expert:{tiny.EXPERT}"]
    assert result["model"]["stated"]["asked_with"] == "tool results" and result["model"]["mode"] == "paper"


def test_the_assessment_is_a_task_with_a_result(photos: Path, tmp_path: Path) -> None:
    """A ranking whose numbers stand in no result file cannot be compared with the next one."""
    asked = [{"text": f"Is the jaw blurred? {CUE_ENDING}", "area": "jaw", "artifact": "blur", "origin": "bank"}]
    (tmp_path / "q.json").write_text(json.dumps({"questions": asked}), "utf-8")
    with StandIn(lambda _: Reply("Yes", {"Yes": math.log(0.7), "No": math.log(0.2)}), owned_by="hosted") as server:
        assert run("assess", photos, tmp_path / "out", server, "--questions", str(tmp_path / "q.json")) == 0
    result = result_of(tmp_path / "out")
    assert result["headline"]["cue jaw blur.auc"]["value"] == 0.5 and result["headline"]["cue jaw blur.auc"]["n"] == 4
    assert result["assessment"]["n_unusable"] == 2 and (tmp_path / "out" / "assessment" / "table.md").is_file()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("answer --model fusion", "model_without_words"), ("chat --model majority", "model_without_words"),
        ("detect --model template", "template_knows_label"), ("detect --model hub:", "model_malformed"),
        ("detect --model fusion --mode paper", "options_conflict"), ("detect --tools clip", "options_conflict"),
        ("detect --model expert:clip --device cpu", "options_conflict"),
        ("locate --model fusion", "nothing_to_measure"),
        ("locate --model majority", "model_not_for_task"), ("experts --model majority", "model_not_for_task"),
        ("experts --model expert:tower", "model_not_for_task"),  # it would quietly be the embedded model's experts
        ("experts --changes jpg50", "unknown_name"), ("experts --experts brightnes", "unknown_name"),
        ("experts --with-mllm --model fusion", "with_mllm_not_for_run"),
        ("detect --with-mllm", "with_mllm_not_for_run"),
        ("experts --with-mllm --experts clip", "with_mllm_not_for_run"),
        ("experts --with-mllm --mode paper", "with_mllm_not_for_run"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_told(
    words: str, code: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """A baseline that is told the label has AUC 1.0; an option or a misspelt change that is dropped."""
    monkeypatch.setattr(models, "experts_alone", lambda name: None)
    assert command.main([*words.split(), "--data", str(photos), "--out", str(tmp_path / "out")]) == 2
    assert f"error [{code}]: " in capsys.readouterr().err


def test_the_template_is_beside_every_description(photos: Path, tmp_path: Path) -> None:
    """ROUGE of a template looks like understanding where no template stands beside it."""
    assert run("describe", photos, tmp_path / "out", None, "--model", "template") == 0
    result = result_of(tmp_path / "out")
    template = result["scorers"]["template"]
    assert template["cues"]["micro"]["f1"] == 1.0 and template["invented_on_reals"]["value"] == 0.0
    assert template["text"]["n"] == 5 and "bleu_1" in template["text"]
    assert result["references"]["of_the_manifest"] == 0 and result["references"]["written"] == 5


@pytest.mark.needs_base
def test_experts_without_their_mllm_decide_by_themselves(astronaut: Pixels, tmp_path: Path) -> None:
    """An absent MLLM that counts as "not fake" would lower every probability of the fusion."""
    from x2dfd.adapter import EMBEDDED
    from x2dfd.calibration import Calibration, logits_of

    detector = models.experts_alone(None)
    report = detector.detect(Image.fromarray(astronaut))
    assert len(report.evidence) == len(detector.experts)
    logits = logits_of(None, report.evidence, {e.card.name: e.card.covers for e in detector.experts})
    assert report.verdict.p_fake == pytest.approx(Calibration.load(EMBEDDED).probability(logits))
    opened = models.Opened("fusion", "fusion", detector, "calibrated")
    sample = Sample("a", tmp_path / "a.png", "real")
    Image.fromarray(astronaut).save(sample.path)
    [row], _ = judged(opened, [sample], equalise=False, rationale=False, batch_size=1)
    assert row.p_mllm is None and row.p_fake is not None and row.sha256
    json.dumps(detector.info.to_dict())
