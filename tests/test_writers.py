"""The explanations that a model is trained on: true to the cues, readable back, short, and not all alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from data_gen.writers import (
    CLEAR_FROM,
    FAINT_BELOW,
    MAX_CUES,
    class_answer,
    distinct_n,
    write_explanation,
    write_follow_up,
)
from x2dfd.explain import contradictions, read_cues, said_label
from x2dfd.prompts import expert_cues
from x2dfd.types import AREAS, ARTIFACTS, DF_CLASSES, Cue, Evidence

PAIRS = tuple(itertools.product(AREAS, ARTIFACTS))
FORGED = tuple(c for c in DF_CLASSES if c != "real")
SCORES = (None, 0.1, 0.5, 0.9)


def heard_degree(score: float | None) -> float | None:
    """What `read_cues` gives for the words that stand for a score."""
    return None if score is None else 0.25 if score < FAINT_BELOW else 0.6 if score < CLEAR_FROM else 0.9


def examples(n: int, seed: int) -> Iterator[tuple[list[Cue], str, str]]:
    rng = np.random.default_rng(seed)
    for _ in range(n):
        chosen = rng.choice(len(PAIRS), size=int(rng.integers(1, MAX_CUES + 1)), replace=False)
        cues = [Cue(*pair, score=SCORES[int(rng.integers(4))]) for pair in (PAIRS[int(i)] for i in chosen)]
        df_class = FORGED[int(rng.integers(len(FORGED)))]
        yield cues, df_class, write_explanation("fake", cues, df_class, rng)


def assert_closed(cues: list[Cue], text: str) -> None:
    said = {(c.area, c.artifact): c.score for c in read_cues(text)}
    assert said == {(c.area, c.artifact): heard_degree(c.score) for c in cues}, text
    whole = f"This image is fake. {text}"
    assert said_label(whole) == "fake", text
    assert contradictions(whole, "fake", [], cues) == ()


def test_every_cue_is_read_back_with_its_strength() -> None:
    """Training on a text that claims more or less than the truth teaches invention."""
    rng = np.random.default_rng(1)
    for pair, score, df_class in itertools.product(PAIRS, SCORES, FORGED):
        for _ in range(2):
            cues = [Cue(*pair, score=score)]
            assert_closed(cues, write_explanation("fake", cues, df_class, rng))
    # Two clauses run together would pair the area of one with the artifact of the other.
    for cues, _, text in examples(1500, seed=2):
        assert_closed(cues, text)
        assert text[0].isupper() and text.endswith(".") and "  " not in text and "{" not in text
        assert not any(bad in f" {text}" for bad in (" ,", " .", "..", " a a", " a o", " a e", ". a", ". t")), text


def test_what_is_pointed_at_wrongly_is_denied() -> None:
    """A text about other areas leaves the reader with an expert that nobody answers; a real picture has no cues."""
    rng = np.random.default_rng(3)
    for _ in range(2000):
        text = write_explanation("real", (), "real", rng)
        assert read_cues(text) == () and said_label(f"This image is real. {text}") == "real", text
        assert any(area.split("-")[-1] in text for area in AREAS), text
    for area in AREAS:
        for artifact in ARTIFACTS:
            text = write_explanation("real", (), "real", rng, [Cue(area, artifact)])
            assert read_cues(text) == () and said_label(f"This image is real. {text}") == "real", text
            assert area.split("-")[-1].lower() in text.lower() and "rest" not in text * (area == "whole-image"), text


def test_the_area_is_named_in_its_own_word_and_early() -> None:
    """A reader that knows only the vocabulary must find the area, and a truncated answer must still hold it."""
    rng = np.random.default_rng(6)
    for area, artifact in PAIRS:
        for _ in range(8):
            text = write_explanation("fake", [Cue(area, artifact, 0.9)], "FE", rng)
            first = text.split(". ")[0].lower()
            assert all(word in first for word in area.split("-")), text
            assert read_cues(f"{first}.")[0].artifact == artifact, text


def test_a_clause_begins_with_what_the_question_calls_it() -> None:
    """A small model copies "mouth blur" from what an expert points at; that "smudged" means it, hardly ever."""
    for cues, _, text in examples(300, seed=9):
        pointed = expert_cues([Evidence("consistency", 0.9, cues=tuple(cues))]).lower()
        for cue in cues:
            called = f"{cue.area} {cue.artifact}"
            assert called in pointed and f"{called}: " in text.lower(), text


def test_one_cue_has_many_surface_forms() -> None:
    """With few forms a model learns to recite, and answers look alike for all pictures."""
    rng = np.random.default_rng(7)
    for pair in PAIRS:
        assert len({write_explanation("fake", [Cue(*pair, score=0.5)], "FE", rng) for _ in range(80)}) >= 30, pair
    reals = [write_explanation("real", (), "real", rng) for _ in range(300)]
    assert len(set(reals)) > 280
    # Long answers are where a small model starts to invent.
    lengths = np.array([len(text.split()) for text in [*reals, *(text for *_, text in examples(1500, seed=5))]])
    assert lengths.max() <= 44 and lengths.min() >= 7 and 12 <= lengths.mean() <= 28


def test_the_strongest_cues_come_first_and_the_rest_is_left_out() -> None:
    rng, jaw = np.random.default_rng(8), Cue("jaw", "blending", 0.9)
    cues = [Cue("nose", "noise", 0.2), jaw, Cue("eyes", "blur", 0.5), Cue("skin", "colour", 0.4)]
    said = read_cues(write_explanation("fake", cues, "FS", rng))
    assert [(c.area, c.artifact) for c in said] == [("jaw", "blending"), ("eyes", "blur"), ("skin", "colour")]
    twice = [Cue("jaw", "blending", 0.2), jaw]
    assert [c.score for c in read_cues(write_explanation("fake", twice, "FS", rng))] == [0.9]


def test_a_forgery_without_local_cues_claims_none() -> None:
    rng = np.random.default_rng(10)
    for df_class in FORGED:
        texts = {write_explanation("fake", (), df_class, rng) for _ in range(60)}
        assert all(read_cues(t) == () and said_label(f"This image is fake. {t}") == "fake" for t in texts)
        assert len(texts) > 10
    whole = {write_explanation("fake", [Cue("whole-image", "texture", 0.8)], "EFS", rng).lower() for _ in range(50)}
    assert all("as a whole looks" in t or "whole image looks generated" in t for t in whole)


@pytest.mark.parametrize(
    ("label", "cues", "df_class"),
    [
        ("real", (), "FS"), ("fake", (), "real"), ("inconclusive", (), "FS"), ("fake", (), "XX"),
        ("real", (Cue("jaw", "blur"),), "real"),
    ],
)  # fmt: skip
def test_label_class_and_cues_must_agree(label: str, cues: tuple[Cue, ...], df_class: str) -> None:
    """A mislabelled row must stop the build, not become a training sentence."""
    with pytest.raises(ValueError):
        write_explanation(label, cues, df_class, np.random.default_rng(0))


def test_class_answers_name_their_class_and_no_other() -> None:
    rng = np.random.default_rng(13)
    names = {
        "FS": "face swap", "FR": "face reenactment", "FE": "face editing", "EFS": "entire face synthesis",
        "real": "no manipulation",
    }  # fmt: skip
    for df_class, name in names.items():
        texts = {class_answer(df_class, rng).lower() for _ in range(40)}
        assert len(texts) >= 3
        assert all([n for n in names.values() if n in t] == [name] for t in texts)
        assert {said_label(t) for t in texts} == {"real" if df_class == "real" else "fake"}
    with pytest.raises(ValueError, match="XX"):
        class_answer("XX", rng)


def test_distinct_n_counts_repetition() -> None:
    assert distinct_n(["the jaw", "the jaw"], 1) == pytest.approx(0.5)
    assert distinct_n(["a b c", "b c d"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["a"], 2) == 0.0
    with pytest.raises(ValueError):
        distinct_n(["a"], 0)


def test_a_follow_up_claims_no_more_than_the_truth() -> None:
    rng = np.random.default_rng(11)
    asked: set[str] = set()
    for cues, df_class, _ in examples(1500, seed=12):
        question, answer = write_follow_up("fake", cues, df_class, rng, touched=["eyes"])
        true = {(c.area, c.artifact) for c in cues}
        assert {(c.area, c.artifact) for c in read_cues(answer)} <= true, (question, answer)
        if answer.startswith(("Nothing stands out there", "I see no trace there", "That looks fine")):
            assert not any(f" {area}" in question.lower() for area in {c.area for c in cues} | {"eyes"}), question
        asked.add(question)
    assert len(asked) > 50
    for _ in range(300):
        _, answer = write_follow_up("real", (), "real", rng)
        assert read_cues(answer) == ()
    for _ in range(200):  # what a generator's face shows where, nobody knows
        question, _ = write_follow_up("fake", (), "EFS", rng)
        assert not any(area in question.lower() for area in ("eyes", "nose", "mouth", "jaw", "skin"))
