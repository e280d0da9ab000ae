"""Texts and follow-ups keep to the report, whatever the language model wrote."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from random import Random

import pytest

from tests.test_html_report import face, report
from x2dfd import follow_up
from x2dfd.answer import leaning
from x2dfd.explain import read_cues, said_labels
from x2dfd.fetch import BASE_NAME
from x2dfd.texts import _CLOSINGS, called_fake, origin, readable, says_all, signs_to_name
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence, Verdict

PART, WHOLE = (Verdict("fake", 0.9, None, kind) for kind in ("part", "whole"))
SURE = (Cue("nose", "noise", 0.9), Cue("jaw", "blending", 0.85))
POINTS = (Evidence("tower", 0.96, cues=(Cue("jaw", "blending", 0.8),)), Evidence("other", 0.1))


@pytest.mark.parametrize("verdict", [Verdict("real", 0.1), Verdict("inconclusive", 0.6, "in_band", "part")])
def test_no_sign_is_named_on_a_photo_that_is_not_called_fake(verdict: Verdict) -> None:
    """Bug prevented: a seam, present or denied, in the text under a real or an undecided photo."""
    wrong = "A seam runs along the jaw. The eyebrows show no colour shift. The eyes keep natural fine detail. "
    wrong += "No manipulation: the photo is real. "
    wrong += "Additionally, the image shows obvious tower artifacts supporting fake."
    text = readable(wrong, verdict, POINTS)
    assert not read_cues(text) and not said_labels(text)
    assert not any(word in text for word in ("seam", "shift", "Additionally", "photo is real", "fine detail"))
    assert ("None were found." in text) == (verdict.label == "real")
    assert ("for an answer" in text) == (verdict.label == "inconclusive")


def test_a_text_says_one_thing_once_and_of_the_kind_of_fake() -> None:
    """Bug prevented: "Skin blur: the skin looks softer", read twice; a close that names no sign and no area."""
    whole = "This looks like a face that no camera ever took."
    # A face that was made at one go has no seam, and single areas of it were named wrongly.
    for local in (whole, f"{whole} A seam runs along the jaw.", "Fine detail is missing in the teeth."):
        text = readable(local, WHOLE, POINTS)
        assert text.startswith("The face looks generated as a whole. Such traces") and not read_cues(text)
    text = readable(f"A fine grid lies over the whole image. {whole}", WHOLE, POINTS)
    assert text == "The face looks generated as a whole. A fine grid lies over the whole image."
    text = readable(whole, PART, POINTS)
    assert text == "A part of the photo looks changed. A seam runs along the jaw."
    said = "Skin blur: the skin looks softer than the rest; jaw blending: the jaw shows a seam. "
    said += "A face swap leaves such traces."
    text = readable(said, PART, POINTS)
    assert text == "A part of the photo looks changed. The skin looks softer than the rest; the jaw shows a seam."
    said = "The mouth looks obviously frozen. The mouth looks noticeably frozen. The nose is grainy,"
    twice = readable(said, PART, ())
    assert twice == "A part of the photo looks changed. The mouth looks obviously frozen. The nose is grainy."
    needed = "Jaw blur: it is everywhere."  # the name in front is all that names the place
    assert needed in readable(needed, Verdict("fake", 0.9), POINTS)


def test_a_text_names_every_sign_that_an_expert_is_sure_of() -> None:
    """Bug prevented: the language model writes of the first of three signs, and the reader looks at no other; or a
    sign that is as often wrong as right stands beside one that is sure."""
    fake, points = PART, SURE
    said = "The nose looks obviously grainy."
    more = (*points, Cue("skin", "noise", 0.8), Cue("hair", "blur", 0.79), Cue("neck", "blur", 0.2))
    tower = Evidence("tower", 0.96, cues=more)
    text = readable(said, fake, (tower,))
    further = "A seam runs along the jaw, and a layer of noise covers the skin."
    assert text == f"A part of the photo looks changed. {said} {further}"
    assert [(c.area, c.artifact) for c in read_cues(text)] == [(c.area, c.artifact) for c in more[:3]]
    faint = Evidence("tower", 0.96, cues=(points[0], Cue("jaw", "blending", 0.79)))
    assert readable(said, fake, (faint,)) == f"A part of the photo looks changed. {said}"
    twice = Evidence("blend", 0.9, cues=(Cue("jaw", "blending", 0.6),))
    assert called_fake(fake, (Evidence("tower", 0.96, cues=points[1:]), twice)).count("jaw") == 1
    first = Evidence("tower", 0.96, cues=(Cue("jaw", "blending", 0.6), Cue("hair", "blur", 0.55)))
    assert readable("", fake, (first,)) == "A part of the photo looks changed. A seam runs along the jaw."
    own = readable("The eyes look obviously melted.", fake, (first,), pointed_only=True)
    assert own == "A part of the photo looks changed. A seam runs along the jaw."  # no expert points at the eyes
    assert said in readable(f"{said} The eyes look obviously melted.", fake, (tower,), pointed_only=True)
    # What it writes beside is not cut, and nothing is added where it names three.
    four = "Mouth blur is seen. Hair blur is seen. Neck blur is seen. Eyes blur is seen."
    assert readable(four, fake, (tower,)) == f"A part of the photo looks changed. {four}"
    alone = readable("", fake, (tower,))
    assert [(c.area, c.artifact) for c in read_cues(alone)] == [(c.area, c.artifact) for c in more[:3]]
    assert "seam" not in readable(said, WHOLE, (tower,))


def test_a_text_is_cut_off_only_where_the_rest_would_be_left_out() -> None:
    """Bug prevented: a second sign lost for a tenth of a second, or seconds spent on words that nobody sees."""
    fake, experts = PART, (Evidence("tower", 0.96, cues=SURE),)
    signs = signs_to_name(fake, experts)
    assert signs == {("nose", "noise"), ("jaw", "blending")}
    text = "Nose noise: the nose looks grainy. Jaw blending: a seam runs along the jaw. This fits a face swap."
    prefixes = [text[:k] for k in range(len(text) + 1)]
    ends = next(p for p in prefixes if says_all(p, fake, signs))
    assert ends == "Nose noise: the nose looks grainy. Jaw blending: a seam runs along the jaw."
    assert readable(ends, fake, experts, pointed_only=True) == readable(text, fake, experts, pointed_only=True)
    one = "Nose noise: the nose looks grainy. This"
    assert says_all(one, fake, signs) and not says_all(one[:-5], fake, signs) and not says_all("This", fake, signs)
    assert not says_all("Skin blur: the skin is blurred. This", fake, signs)  # nothing of it stays
    everywhere = Evidence("tower", 0.96, cues=(*SURE, Cue("whole-image", "frequency", 0.9)))
    assert signs_to_name(WHOLE, (everywhere,)) == {("whole-image", "frequency")}


def test_closing_sentences_of_training_answers_are_known_by_their_beginnings() -> None:
    """Bug prevented: a closing sentence in the grammar that the model learns, and that every text is waited for."""
    grammar = json.loads((Path(__file__).parents[1] / "data_gen" / "words" / "grammar.json").read_text())
    closings = [*grammar["closings"], *chain.from_iterable(grammar["class_closings"].values())]
    assert [c for c in closings if not c.startswith(_CLOSINGS)] == []


def test_signs_in_one_sentence_read_back_as_they_were() -> None:
    """Bug prevented: a clause that names another sign than its own; "and" that makes a blur of the eyes out of a seam
    at the jaw."""
    drawn, every = Random(0), [Cue(area, artifact) for area, artifact in product(AREAS, ARTIFACTS)]
    for _ in range(5):
        drawn.shuffle(every)
        for i in range(0, len(every), 3):
            cues = tuple(every[i : i + 3])
            assert read_cues(called_fake(Verdict("fake", 0.9), (Evidence("tower", 0.9, cues=cues),))) == cues


def test_disagreement_and_missing_answers_are_said() -> None:
    undecided = Verdict("inconclusive", 0.6, "in_band")
    assert "disagree" in readable("", undecided, POINTS)
    assert "disagree" not in readable("", undecided, POINTS[:1])
    assert "only for the likelier side (fake)" in leaning(
        face(verdict=undecided, rationale="A seam runs along the jaw.")
    )
    assert leaning(face(verdict=undecided, rationale=readable("", undecided, POINTS))) == ""
    assert leaning(face(rationale="A seam runs along the jaw.")) == ""


def test_who_wrote_a_text_is_said_truly() -> None:
    """Bugs prevented: a template's sentence that passes for the language model's, under a photo called real and under
    a face called fake of which the language model was not asked."""

    def said(verdict: Verdict, rationale: str, evidence: tuple[Evidence, ...] = (), mode: str = "calibrated") -> str:
        return origin(face(verdict=verdict, rationale=rationale, evidence=evidence), report(model={"mode": mode}))

    real, fake = Verdict("real", 0.1), Verdict("fake", 0.9, kind="whole")
    assert "fixed text" in said(real, "Nothing was found.")
    assert said(Verdict("inconclusive", None, "not_a_photograph"), "A drawing.") == ""
    assert "corrected" in said(fake, "A seam runs along the jaw, it seems.", POINTS)
    assert "fixed text" in said(fake, called_fake(fake, POINTS), POINTS)
    assert "fixed text" in said(fake, "A part of the photo looks changed.", POINTS)  # as an earlier version put it
    assert "language model" in (own := said(real, "No seam.", mode="paper")) and "corrected" not in own


def test_a_text_without_a_sign_sends_to_the_map_that_shows_one() -> None:
    """Bug prevented: "no single area stands out" beside a map with a marked area."""
    marked = Evidence("tower", 0.9, map=((0.1, 0.7),))
    assert "the map of the tower expert marks a place" in called_fake(PART, (marked,))
    assert "no single area" in called_fake(PART, (replace(marked, map=((0.1, 0.4),)),))
    assert "map" not in called_fake(WHOLE, (marked,))


def test_a_changed_part_has_no_sign_of_the_whole_image() -> None:
    """Bug prevented: "A part of the photo looks changed. A regular pattern runs through the whole image." """
    over_all = Evidence("tower", 0.9, cues=(Cue("whole-image", "frequency", 0.9),))
    text = readable("A fine grid lies over the whole image.", PART, (over_all,))
    assert not read_cues(text) and "whole image" not in text
    assert "whole image" in readable("A fine grid lies over the whole image.", WHOLE, (over_all,))


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("Why?", "why"), ("Which area?", "where"), ("How sure are you?", "sure"),
        ("Is it just a beauty filter?", "cause"),
        ("Could it be JPEG compression?", "cause"), ("Is it an old photo?", "cause"), ("What should I do?", "do"),
        ("Who is this?", "who"), ("Can I publish it?", "publish"), ("Answer in German", "language"),
        ("Warum ist das falsch?", "language"), ("How old is she?", "person"), ("Which technique?", "technique"),
        ("Say that this is real.", "verdict"), ("What is the weather?", None), ("wich aera is changed", "where"),
        ("waht should i do", "do"), ("hwo sure ar you", "sure"), ("how can u be so sure", "sure"),
        ("expalin pls", "why"), ("is this a deepfak", "verdict"), ("what does 93 % mean", "sure"),
        ("It is from 1990, could that be the reason?", "cause"), ("you are wrong, this is my own photo", "wrong"),
        ("My friend sent it, is she being scammed?", "do"), ("Ist das Bild echt?", "language"),
        ("Wie sicher bist du?", "language"), ("C'est un vrai visage ?", "language"), ("รูปนี้ปลอมไหม", "language"),
        ("Is that what you meant?", None), ("Thanks", None), ("Were you trained on faces like this?", None),
        ("Was this taken in 2019?", "taken"), ("Is this the boss of my own company?", None),
        ("I took this from Facebook. Is it real?", "verdict"), ("Is this faux?", None),
    ],
)  # fmt: skip
def test_what_is_asked(question: str, asked: str | None) -> None:
    assert follow_up.intent(question) == asked


def test_the_embedded_models_report_is_answered_from_its_facts() -> None:
    """Bug prevented: "This points to manipulation." to a greeting, "the jaw is natural" where the tower points."""
    one = face(evidence=POINTS, cues=(Cue("nose", "noise"),))
    own = report(faces=(one,), model={**report().model, "base": {"name": BASE_NAME}})
    other = report(faces=(one,))
    assert follow_up.from_report(own, one, "hello") == follow_up.HELP
    assert "noise covers the nose" in (follow_up.from_report(own, one, "is the nose ok?") or "")
    told = follow_up.from_report(own, one, "And the jaw?") or ""
    assert "a seam runs along the jaw (says the tower expert)" in told
    other_kinds = Evidence("other", 0.9, kinds={"whole": 0.07, "part": 0.93})
    kinds = Evidence("tower", 0.9, kinds={"whole": 0.81, "part": 0.09})
    both = face(verdict=WHOLE, evidence=(other_kinds, kinds))
    weighed = replace(own, model=own.model | {"weights": {"other": 0, "tower": 1}})
    said = follow_up.from_report(weighed, both, "which technique made it?") or ""
    assert "81 %" in said and "93 %" not in said  # an expert without a weight tells no kind
    named = replace(both, evidence=(replace(kinds, expert="MyExpert"),))
    assert "MyExpert" in (follow_up.from_report(own, named, "what does myexpert see") or "")
    whole = face(verdict=WHOLE, evidence=POINTS, cues=())
    for asked in ("And the jaw?", "Where?"):  # areas named of a face that was generated whole were wrong
        assert "seam" not in (said := follow_up.from_report(own, whole, asked) or "") and "map" not in said and said
    assert "no sign at the ears" in (follow_up.from_report(own, one, "what about the ears") or "")
    assert "tower: 96 %" in (follow_up.from_report(own, one, "what is a tower") or "")
    assert follow_up.from_report(other, one, "hello") is None  # a larger model may have something to say


@pytest.mark.parametrize("label", ["fake", "real", "inconclusive"])
def test_no_answer_goes_against_the_verdict(label: str) -> None:
    """Bug prevented: "No manipulation: the photo is real." about a photo on which nothing was decided."""
    verdict = {"fake": Verdict("fake", 0.9), "real": Verdict("real", 0.1), "inconclusive": Verdict("inconclusive", 0.5)}
    one = face(verdict=verdict[label])
    wrong = "No manipulation: the photo is real." if label != "real" else "A clear seam runs along the jaw."
    assert follow_up.checked(wrong, one) == follow_up.REFUSED
    kept = "The eyes keep natural fine detail."
    assert follow_up.checked(f"{kept} {wrong}", one) == kept
