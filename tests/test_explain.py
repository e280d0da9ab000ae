"""Rationales read back: what is said counts, what is denied does not, and contradictions come to light."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest

from x2dfd.explain import (
    AREA_WORDS,
    ARTIFACT_WORDS,
    contradictions,
    mended,
    named_spans,
    read_cues,
    said_kind,
    said_label,
)
from x2dfd.prompts import expert_sentence
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence


def pairs(text: str) -> list[tuple[str, str]]:
    return [(c.area, c.artifact) for c in read_cues(text)]


def test_every_phrase_is_read_as_what_it_stands_for() -> None:
    """A cue that no word can name is lost in every score; a longer phrase must not swallow another entry's shorter."""
    assert set(AREA_WORDS) == set(AREAS) and set(ARTIFACT_WORDS) == set(ARTIFACTS)
    for area, phrases in AREA_WORDS.items():
        for phrase in phrases:
            assert (area, "geometry") in pairs(f"The {phrase} looks warped."), phrase
    for artifact, phrases in ARTIFACT_WORDS.items():
        for phrase in phrases:
            assert ("nose", artifact) in pairs(f"The nose: {phrase.replace('*', '')}."), phrase


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The boundary along the jaw is hard.", ["jaw blending"]),
        ("The edges of the face do not match the neck.", ["face-contour blending"]),
        ("The cheeks are overly smooth, almost like plastic.", ["cheeks texture"]),
        ("The eyes are asymmetrical and the eyelashes are missing.", ["eyes asymmetry", "eyes missing-detail"]),
        ("Mismatched skin tone at the forehead.", ["forehead colour"]),
        ("The skin tone is uneven.", ["skin colour"]),
        ("A checkerboard pattern covers the whole picture.", ["whole-image frequency"]),
        ("The nose appears warped, and shadows on the neck look wrong.", ["nose geometry", "neck lighting"]),
        ("The skin around the eyes is blurred.", ["eyes blur"]),
        ("The lips and the chin look pixelated.", ["mouth compression", "jaw compression"]),
        ("The hair is noisier than the background.", ["hair noise"]),
        ("A forced smile that does not fit the eyes.", ["mouth expression"]),
        ("The teeth run together without gaps.", ["teeth missing-detail"]),
        ("The color of the earrings is off.", ["accessories colour"]),
        ("The forehead is too smooth to be natural.", ["forehead texture"]),
        ("Lighting on the face is inconsistent with the background.", ["whole-image lighting"]),
        ("The teeth lack individual definition.", ["teeth missing-detail"]),
        ("The texture of the skin doesn't look natural.", ["skin texture"]),
        # What is denied or natural is no cue: counting words makes every real face full of artifacts.
        ("The eyes look natural.", []),
        ("There is no seam along the jaw.", []),
        ("The mouth shows no sign of blending or blur.", []),
        ("The cheeks are free of noise.", []),
        ("The hair is rendered without blur.", []),
        ("Neither the nose nor the mouth is warped.", []),
        ("The lighting on the forehead is consistent with the background.", []),
        ("Nothing about the eyes is distorted.", []),
        ("The blur of the background is natural.", []),
        ("Blending on the jaw is not visible.", []),
        ("No detail of the nose is missing.", []),
        ("The skin texture is realistic, and the jaw blends smoothly into the neck.", []),
        ("The forehead shows no odd compression, and the nose and the mouth sit in natural proportion.", []),
        ("The image was taken in a room.", []),
        ("The texture of the hair is long and brown.", []),
        ("", []),
        # A denial ends with its clause.
        ("The eyes look natural, but the mouth is warped.", ["mouth geometry"]),
        ("The jaw shows no seam and the eyes are blurred.", ["eyes blur"]),
        ("The jaw is blurred; nothing is wrong with the nose.", ["jaw blur"]),
        ("The nose does not look natural; it is warped.", ["nose geometry"]),
        # Artifacts go to the areas of their own clause: pairing everything with everything would invent cues.
        ("A seam along the jaw, blur on the eyes, noise over the neck.", ["jaw blending", "eyes blur", "neck noise"]),
        ("The eyes, the nose and the mouth are blurred.", ["eyes blur", "nose blur", "mouth blur"]),
        ("The eyes look natural, the mouth and the jaw are blurred.", ["mouth blur", "jaw blur"]),
        ("The eyes look natural. Compression is common online.", []),
        ("The eyes look odd. They are blurred.", ["eyes blur"]),
        ("The jaw is blurred. The chin is blurred, too.", ["jaw blur"]),
        # Words inside words do not fire: `ear` in `appear`, `lip` in `slippery`, `hair` in `chair`.
        ("The eyebrows are blurred.", ["eyebrows blur"]),
        ("Blurred things appear, a slippery chair among them.", []),
        ("1. **Eyes**: The pupils are asymmetric.\n2. **Jaw**\nA faint boundary runs along it.\n3. **Hair:** natural.",
         ["eyes asymmetry", "jaw blending"]),
    ],
)  # fmt: skip
def test_the_cues_of_a_text(text: str, expected: list[str]) -> None:
    assert sorted(f"{area} {artifact}" for area, artifact in pairs(text)) == sorted(expected)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("A faint seam runs along the jaw.", 0.25), ("The jaw is slightly blurred.", 0.25),
        ("A visible seam runs along the jaw.", 0.6), ("An obvious seam runs along the jaw.", 0.9),
        ("The jaw is clearly blurred.", 0.9), ("A seam runs along the jaw.", None),
    ],
)  # fmt: skip
def test_words_of_degree_become_scores(text: str, score: float | None) -> None:
    assert read_cues(text)[0].score == score


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("This image is fake.", "fake"), ("This image is real. The skin texture is natural.", "real"),
        ("It is not real.", "fake"), ("There are no signs of manipulation.", "real"),
        ("The photo appears authentic.", "real"), ("The face was not manipulated, edited or generated.", "real"),
        ("No, this image is fake.", "fake"), ("This is not real, it is fake.", "fake"),
        ("It shows a face swap.", "fake"), ("Without a doubt a deepfake; smoother than real skin.", "fake"),
        ("A real photo would not show this.", None), ("The image is real and does not look odd.", "real"),
        ("Is this image real or fake?", None), ("This image is real. It was manipulated.", None),
        ("The nose is warped.", None), ("Really unrealistic.", None), ("It is unlikely to be real.", "fake"),
        ("This is anything but real.", "fake"), ("I doubt that it is real.", "fake"),
        ("I doubt that this was manipulated.", "real"), ("There is little doubt that this is fake.", "fake"),
        ("I do not doubt that it is real.", "real"), ("That this photo is real is unlikely.", "fake"),
        ("It is not unlikely to be fake.", "fake"),
    ],
)  # fmt: skip
def test_the_decision_of_a_text(text: str, label: str | None) -> None:
    assert said_label(text) == label


@pytest.mark.parametrize(("label", "score"), [("fake", 0.9), ("real", 0.1)])
def test_the_experts_sentence_gives_no_cues(label: str, score: float) -> None:
    """`blending artifacts` there is an expert's name: read as a cue, every answer would get one."""
    sentence = expert_sentence(label, [Evidence("blending", score), Evidence("frequency", score)])
    assert sentence
    for cut in (len(sentence), -20, -35):  # also where generation stopped early
        assert read_cues(f"This image is {label}. The nose is warped.{sentence[:cut]}") == (Cue("nose", "geometry"),)
    assert said_label(sentence) is None


SEEN = [Evidence("blending", 0.9), Evidence("clip", 0.5), Evidence("noise", None)]
MILD = [Evidence("blending", 0.12), Evidence("clip", 0.9)]
SEAM = "This image is fake. A clear seam runs along the jaw." + expert_sentence("fake", SEEN)
WHOLE = "This looks like a face that no camera ever took."
OBVIOUS, FEW = (
    "This image is {}. Additionally, the image shows {} blending and clip artifacts supporting {}.".format(*words)
    for words in (("fake", "obvious", "fake"), ("real", "very few", "real"))
)


@pytest.mark.parametrize(
    ("text", "label", "evidence", "kind", "told"),
    [
        ("This image is real. The nose is warped.", "fake", [], None, ["says real, but the verdict is fake"]),
        ("This image is real. The nose is warped.", "real", [], None, ["verdict is real", "artifacts: nose geometry"]),
        ("This image is fake. It is genuine.", "fake", [], None, ["says both real and fake"]),
        (SEAM, "fake", SEEN, None, []),
        (SEAM, "inconclusive", SEEN, None, ["says fake, but no answer is given"]),
        (WHOLE, "fake", [], "part", ["describes a face made as a whole, but the verdict does not"]),
        (WHOLE, "fake", [], "whole", []),
        (OBVIOUS, "fake", MILD, None, ["obvious", "blending expert's score is 0.120"]),
        (FEW, "real", MILD, None, ["very few", "clip expert's score is 0.900"]),
        (OBVIOUS, "fake", [SEEN[0], Evidence("clip", None)], None, ["clip expert gave no score"]),
        (OBVIOUS, "fake", MILD[1:], None, ["no blending expert"]),
        ("This image is fake, with obvious blending artifacts.", "fake", MILD, None, ["score is 0.120"]),
    ],
)
def test_a_rationale_against_the_verdict_or_an_expert_is_reported(
    text: str, label: str, evidence: list[Evidence], kind: str | None, told: list[str]
) -> None:
    """Bug prevented: "a face that no camera ever took" under a photo that was changed in part; a language model copies
    the closing sentence without reading the score."""
    messages = contradictions(text, label, evidence, read_cues(text), kind)
    assert len(messages) == bool(told) and all(fact in messages[0] for fact in told)


def test_experts_that_support_the_other_verdict_and_the_kind_of_a_text() -> None:
    assert any("supporting fake, but the verdict" in c for c in contradictions(OBVIOUS[20:], "real", MILD[1:], ()))
    part = "This fits a face swap."
    assert (said_kind(WHOLE), said_kind(part), said_kind(f"{WHOLE} {part}")) == ("whole", "part", None)


def test_reading_is_fast_and_needs_no_torch() -> None:
    """It stands on the road of every picture, and `import x2dfd` must stay instant."""
    code = "import sys, x2dfd.explain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    text = "This image is fake. A clear seam runs along the jaw, and the skin tone of the forehead is mismatched. " * 2
    assert min(timeit.repeat(lambda: read_cues(text), number=1, repeat=20)) < 0.01  # seconds; measured: 0.0002


def test_what_a_text_names_is_found_where_it_stands() -> None:
    """A span that is off by a word gives weight to the wrong tokens."""
    closing = "Additionally, the image shows obvious clip artifacts supporting fake."
    text = f"A seam follows the jaw. This fits reenactment. {closing}"
    assert [text[a:b] for a, b in named_spans(text)] == ["seam", "jaw", "reenactment", "obvious clip"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Jaw noise: the jaw looks clearly melted. This is a sign.", "Jaw noise looks off. This is a sign."),
        ("Jaw noise: it is grainy; cheeks blending: the cheeks look smudged.",
         "Jaw noise: it is grainy; cheeks blending looks off."),
        ("Skin colour: the jaw is off in colour.", "Skin colour looks off."),  # another area
        ("Jaw blending: a line.", "Jaw blending: a line."),  # nothing that could be read as another
        ("On a close look, face-contour blending: a seam runs along the face contour.",) * 2,
        ("Mouth blur: the mouth is smudged and a seam runs along the jaw.",) * 2,  # it says that too, not instead
        ("What I see: the jaw is melted.",) * 2,
    ],
)  # fmt: skip
def test_a_clause_whose_halves_disagree_keeps_its_first(text: str, kept: str) -> None:
    """ "Jaw noise: the jaw looks melted" tells a reader two things, and one of them is nowhere."""
    assert mended(text) == kept


def test_every_mended_clause_names_its_cue() -> None:
    for area in AREAS:
        for artifact in ARTIFACTS:
            other = "the nose is warped" if area != "nose" else "the jaw is warped"
            text = mended(f"{area} {artifact}: {other}.".capitalize())
            assert text.endswith(" looks off.") and pairs(text) == [(area, artifact)], text
