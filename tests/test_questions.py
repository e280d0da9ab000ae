"""Cue questions: a yes is evidence of forgery, of exactly the cue it is filed under."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from data_gen.forge import METHODS, Photo, forge
from data_gen.questions import (
    connect,
    cue_questions,
    fault,
    generate,
    random_questions,
    read_published,
    some,
    write_questions,
)
from tests.raising import raises
from tests.sets import command
from x2dfd.assessment import BANK, CueQuestion, read_questions
from x2dfd.explain import read_cues
from x2dfd.faces import find_faces
from x2dfd.types import AREAS, ARTIFACTS


def cues(questions: Sequence[CueQuestion]) -> set[tuple[str, str]]:
    return {(q.area, q.artifact) for q in questions if q.area and q.artifact}


def test_bank_is_large_and_without_repetition() -> None:
    """Bug prevented: one question twice counts twice in every mean; an area or artifact that is never asked about."""
    questions = cue_questions()
    assert len(questions) >= 120
    assert len({re.sub(r"\W+", " ", q.text.lower()) for q in questions}) == len(questions)
    assert {q.area for q in questions} == set(AREAS) and {q.artifact for q in questions} == set(ARTIFACTS)
    lengths = [len(q.text.removesuffix(" Answer Yes or No.").split()) for q in questions]
    assert max(lengths) <= 16 and 9 <= np.mean(lengths) <= 13  # about eleven words, as published
    # A yes asserts the question's own cue, and there is no "teeth expression": pairs filled in mechanically.
    assert [q.text for q in questions if fault(q.text, str(q.area), str(q.artifact))] == []
    faces = {"forehead", "eyebrows", "eyes", "mouth", "cheeks", "whole-image"}
    assert {a for a, b in cues(questions) if b == "expression"} <= faces
    assert len(cues(questions)) < len(AREAS) * len(ARTIFACTS)


def test_bank_asks_about_everything_the_forge_makes(astronaut: NDArray[np.uint8]) -> None:
    """Bug prevented: a forged cue that no question asks about is never assessed, so never taught."""
    head = astronaut[20:276, 110:366]
    small = cv2.resize(head, (128, 128), interpolation=cv2.INTER_AREA)
    landmarks = (find_faces(head)[0].landmarks / 2).astype(np.float32)
    photo = Photo(np.asarray(small, np.uint8), landmarks, "s", "g")
    made: set[tuple[str, str]] = set()
    for method in METHODS.values():
        for seed in range(40):
            forgery = forge(photo, method, np.random.default_rng(seed), photo)
            made |= {(c.area, c.artifact) for c in forgery.cues}
    assert len(made) > 40
    assert made - cues(cue_questions()) == set()


def test_shipped_file_is_the_bank() -> None:
    """Bug prevented: the bank is edited and `x2dfd assess` still asks the old questions.

    Write it anew: python -m data_gen questions --out x2dfd/questions.json
    """
    assert read_questions(BANK) == cue_questions()


def test_unrelated_questions_have_nothing_to_do_with_forgery() -> None:
    """Bug prevented: a control that asks about an artifact, repeats itself, or differs from run to run."""
    questions = random_questions(30, np.random.default_rng(1))
    assert len({q.text for q in questions}) == 30
    assert questions == random_questions(30, np.random.default_rng(1)) != random_questions(30, np.random.default_rng(2))
    for q in questions:
        assert q.area is None and q.origin == "random" and q.text.endswith("? Answer Yes or No.")
        assert read_cues(q.text) == ()
    with raises("too_few_questions", 1000):
        random_questions(1000, np.random.default_rng(0))


def test_questions_read_back_with_their_provenance(tmp_path: Path) -> None:
    """Bug prevented: quotes or signs in a question break the file; the prompt of a generated set is lost."""
    odd = CueQuestion('Does the "skin" look waxy – or plastic? Answer Yes or No.', "skin", "texture", "generated:m")
    questions = [odd, *random_questions(2, np.random.default_rng(0))]
    write_questions(tmp_path / "q.json", questions, {"model": "m", "prompt": "p"})
    assert read_questions(tmp_path / "q.json") == questions
    assert json.loads((tmp_path / "q.json").read_text("utf-8"))["provenance"] == {"model": "m", "prompt": "p"}


def test_published_lists_get_cues_where_they_name_one(tmp_path: Path) -> None:
    """Bug prevented: a guessed cue for a question that names none; a question that is dropped in silence."""
    texts = [
        "Is the overall impression strange to you? Answer Yes or No.",
        "Is there a visible seam along the jaw? Answer Yes or No.",
        "Is there a visible  seam along the jaw? Answer yes or no.",
        "Do the eyes look natural? Answer Yes or No.",
    ]
    file = tmp_path / "list.json"
    for rows in (texts, [{"question": t, "real_accuracy": 0.5} for t in texts]):
        file.write_text(json.dumps(rows))
        read = read_published(file)
        told = [(q.text, q.area, q.artifact) for q in read]
        assert told == [(texts[1], "jaw", "blending"), (texts[0], None, None), (texts[3], None, None)]
        assert {q.origin for q in read} == {"published:list.json"}
    for text in ("{}", "[]", "[1]", '[{"text": "x"}]', "no json"):
        file.write_text(text)
        with raises("questions_malformed", "list.json"):
            read_published(file)


class Client:
    """The shape of an OpenAI client, answering from a list."""

    def __init__(self, *replies: str) -> None:
        self.replies, self.requests = list(replies), list[dict[str, Any]]()
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    def _create(self, **request: Any) -> Any:
        self.requests.append(request)
        message = SimpleNamespace(content=self.replies.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])


def entry(question: str, area: str, artifact: str) -> dict[str, str]:
    return {"question": question, "area": area, "artifact": artifact}


SEAM = entry("Is there a visible seam along the jaw? Answer Yes or No.", "jaw", "blending")
BLUR = entry("Are the eyes strangely blurred? Answer Yes or No.", "eyes", "blur")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (entry("Do the eyes look natural? Answer Yes or No.", "eyes", "texture"), "plainly assert"),
        (entry("Is there a seam along the jaw? Answer Yes or No.", "nose", "blending"), "plainly assert"),
        (entry("Is there a seam along the jaw?", "jaw", "blending"), "does not end"),
        (entry("Is there a seam along the chin strap? Answer Yes or No.", "strap", "blending"), "vocabulary"),
        ({"question": "Is it fake? Answer Yes or No."}, "vocabulary"),
        (SEAM, "said before"),
    ],
)
def test_what_a_model_writes_is_checked(bad: dict[str, str], reason: str) -> None:
    """Bug prevented: a question whose yes means real, or whose cue is not ours, enters the ranking."""
    made, provenance = generate(Client(json.dumps({"questions": [SEAM, bad, BLUR]})), "m", 2)
    assert [q.text for q in made] == [SEAM["question"], BLUR["question"]]
    assert {q.origin for q in made} == {"generated:m"}
    [rejected] = provenance["rejected"]
    assert reason in rejected["reason"]


def test_generation_asks_again_and_says_how_it_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: one bad reply ends the run, the same question comes again, or fewer than asked for pass as all."""
    known = [CueQuestion(SEAM["question"], "jaw", "blending", "bank")]
    client = Client("Sorry, I cannot.", "```json\n" + json.dumps({"questions": [SEAM, BLUR]}) + "\n```")
    made, provenance = generate(client, "m", 1, known=known, seed=7)
    assert [q.text for q in made] == [BLUR["question"]]
    assert [r["reason"] for r in provenance["rejected"]] == [
        "the reply is not the JSON that was asked for",
        "said before",
    ]
    assert "seam along the jaw" in client.requests[0]["messages"][0]["content"]
    assert [r["seed"] for r in client.requests] == [7, 8]
    assert provenance["model"] == "m" and "evidence of forgery" in provenance["prompt"]
    with raises("generation_short", "1 of 3"):
        generate(Client(json.dumps({"questions": [SEAM]}), "{}"), "m", 3)
    monkeypatch.setitem(sys.modules, "openai", None)
    with raises("package_missing", "pip install"):
        connect("http://localhost:1/v1")


def test_the_command_writes_bank_control_and_published(tmp_path: Path) -> None:
    """Bug prevented: `--published` that still writes the bank; a control set that changes with every call."""
    out = tmp_path / "q.json"
    for _ in range(2):
        command("questions", "--out", str(out), "--unrelated", "5")
        read = read_questions(out)
        assert read[:-5] == cue_questions() and read[-5:] == random_questions(5, np.random.default_rng(0))
    (tmp_path / "list.json").write_text(json.dumps([SEAM["question"], "Is it odd? Answer Yes or No."]))
    result = command("questions", "--out", str(out), "--published", str(tmp_path / "list.json"))
    assert [q.area for q in read_questions(out)] == ["jaw", None] and "1 without a readable cue" in result.output


def test_fewer_questions_are_those_that_the_pictures_can_answer(tmp_path: Path) -> None:
    """Bug prevented: a cut bank that asks about cues which no picture shows, or another one at every call."""
    manifest = tmp_path / "m.jsonl"
    row = {"path": "a.png", "label": "fake", "cues": [{"area": "jaw", "artifact": "blending"}]}
    manifest.write_text(json.dumps(row) + "\n")
    out = str(tmp_path / "q.json")
    command("questions", "--out", out, "--only", "9", "--cues-of", str(manifest), "--unrelated", "2")
    read = read_questions(tmp_path / "q.json")
    kept, jaw = read[:-2], [q for q in cue_questions() if (q.area, q.artifact) == ("jaw", "blending")]
    assert len(kept) == 9 and len(read) == 11 and 0 < len(jaw) < 9
    assert set(jaw) <= set(kept) <= set(cue_questions())
    assert kept == some(cue_questions(), 9, {("jaw", "blending")}, np.random.default_rng(0))  # and so in every call
    assert kept != some(cue_questions(), 9, {("jaw", "blending")}, np.random.default_rng(1))
    with raises("too_few_questions", len(cue_questions())):
        some(cue_questions(), len(cue_questions()) + 1, set(), np.random.default_rng(0))
