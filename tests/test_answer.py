"""The words of an answer: the same in the terminal, on the page, in the app and in Python, and true of the report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import pieces
from tests.test_html_report import Page, face, page, report
from x2dfd import html_report
from x2dfd.answer import bound, clip, decided_by, decoding, estimate, meaning, number, place, reason, reconciled
from x2dfd.statements import read_statements, source_type
from x2dfd.terminal import block
from x2dfd.types import Evidence, FaceReport, Report, Verdict

FAKE, REAL, OPEN = Verdict("fake", 0.93, None, "part"), Verdict("real", 0.04), Verdict("inconclusive", 0.6, "in_band")
MODEL: dict[str, Any] = {"mode": "calibrated", "band": [0.21, 0.85], "weights": {"tower": 0.8, "blend": 0.0}}


def told(one: Report) -> list[str]:
    """What a person reads of a report in the terminal, on the page, in the app and in Python."""
    shown = (block(one), page(one).text, Page(pieces.card(one)).text, str(one))
    return [" ".join(text.split()) for text in shown]


def clip_of(*verdicts: Verdict | None, whole: Verdict | None = None) -> Report:
    """A clip with a frame a second, each with a face of that verdict; with None, without a face. `whole`: its own
    answer, else that of its first face."""
    faces = [face(verdict=v, frame=24 * i, time_s=float(i)) for i, v in enumerate(verdicts) if v]
    media = report().media | {"kind": "video", "frames": [24 * i for i in range(len(verdicts))]}
    own = tuple(replace(one, index=k) for k, one in enumerate(faces))
    return report(faces=own, media=media, verdict=whole or own[0].verdict, model=MODEL)


def test_what_decoding_changed_is_told_in_words() -> None:
    """Bug prevented: a clip was deinterlaced or tone-mapped, and only the JSON has it; a new code without words."""
    notes = ["deinterlaced", "pixel_shape:16:9", "hdr_tone_mapped:HLG", "first_of_6_frames", "odd_code"]
    one = report(media=report().media | {"notes": notes})
    for text in told(one)[:2]:
        assert "interlaced frames deinterlaced; stretched to square pixels (they are 16:9 in the file); HDR" in text
        assert "first of its 6 pictures was looked at; odd_code" in text
    assert "decoding:" not in block(report())
    folder, names = Path(html_report.__file__).parent, ("animations", "sniffing", "stills", "video")
    sources = "".join((folder / f"{name}.py").read_text() for name in names)
    codes = re.findall(r'notes(?:\.append\(| \+= \[| = \[)f?"([^"]+)"', sources)
    codes += re.findall(r'"((?:rotation|mirrored):\w+)"', sources)
    assert len(codes) > 25
    for code in ("faces_turned:90", "one_of_8_frames", *(re.sub(r"\{.*?\}", "8", code) for code in codes)):
        code += "HLG" * code.endswith(":")
        assert decoding(report(media={"notes": [code]})) != code, code


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            (REAL, FAKE, OPEN, FAKE, None),
            "5 frames looked at (1 without a face), 2 look fake, between 1.0 s and 3.0 s: "
            "too few to call the clip fake.",
        ),
        ((FAKE, REAL), "2 frames looked at, 1 looks fake, at 0.0 s."),
        ((REAL, REAL, FAKE), "3 frames looked at, 1 looks fake, at 2.0 s: too few to call the clip fake."),
        ((REAL, OPEN), "2 frames looked at, none looks fake."),
        ((REAL,), "1 frame looked at, none looks fake."),
    ],
)
def test_a_clip_says_how_many_frames_look_fake_and_when(verdicts: tuple[Verdict | None, ...], said: str) -> None:
    """Bug prevented: one number for half a minute, and nobody knows where in it to look."""
    assert all(said in text for text in told(clip_of(*verdicts)))
    assert clip(report()) is None
    shy = clip_of(REAL, FAKE, whole=Verdict("inconclusive", 0.38, "in_band"))
    assert "1 looks fake, at 1.0 s: too few to call the clip fake." in block(shy)
    assert "of the most suspicious face: " in block(shy) and "likelier side" not in block(shy)
    nothing = replace(clip_of(REAL), faces=(), verdict=Verdict("inconclusive", None, "no_face"))
    assert clip(nothing) == "1 frame looked at (1 without a face)."


def test_a_frame_counts_by_its_worst_face_and_that_face_has_one_number() -> None:
    """Bug prevented: a face that is "face 2/2" in the terminal and "Face 4" on the page; a frame counted twice."""
    one = clip_of(REAL, REAL, FAKE)
    real, *others = one.faces
    two = [replace(real, index=i, frame=24 * (i // 2), time_s=i // 2 * 1.0) for i in range(2)]
    faces = (*two, *(replace(f, index=i) for i, f in enumerate(others, 2)), replace(others[-1], index=4))
    worst = replace(others[-1], index=5, verdict=Verdict("fake", 0.99, None, "part"))
    one = replace(one, faces=(*faces, worst))
    assert clip(one) == "3 frames looked at, 1 looks fake, at 2.0 s: too few to call the clip fake."
    assert one.decider is worst and number(worst, one) == 3
    assert "face 3 of 3, at 2.0 s" in block(one)
    shown = page(one).text
    assert "Why: face 3, 2.0 s (frame 48)" in shown and "Face 3, 2.0 s (frame 48)" in shown and "Face 6" not in shown
    assert pieces.named(worst, one) == "At 2.0 s, face 3"


def test_of_several_faces_the_terminal_counts_all() -> None:
    """Bug prevented: "face 1/2" beside "Likely fake", and not a word of the other face."""
    two = (face(index=0, verdict=FAKE), face(index=1, verdict=REAL))
    text = block(report(faces=two, verdict=FAKE))
    assert "face 1 of 2" in text and "2 faces: 1 likely fake, 1 likely real" in text
    assert "face" not in block(report(faces=two[:1], verdict=FAKE)).splitlines()[0]


def test_a_face_among_several_is_told_by_its_place() -> None:
    """Bug prevented: "face 4 of 4", numbered by size, which nobody finds in the picture."""

    def places(*lefts: float) -> list[str]:
        faces = tuple(face(index=i, box=(x, 9.0, 20.0, 20.0)) for i, x in enumerate(lefts))
        return [place(one, report(faces=faces)) for one in faces]

    assert places(50.0) == [""]
    assert places(90.0, 10.0) == ["on the right", "on the left"]
    assert places(50.0, 10.0, 90.0) == ["in the middle", "on the far left", "on the far right"]
    assert places(60.0, 90.0, 10.0, 30.0)[::3] == ["second from the right", "second from the left"]
    assert places(50.0, 52.0) == ["", ""]  # one above the other
    assert places(*(12.0 * i for i in range(24)))[11:13] == ["twelfth from the left", "twelfth from the right"]
    two = (face(index=0, verdict=REAL), face(index=1, verdict=FAKE, box=(10.0, 60.0, 90.0, 99.0)))
    one = report(faces=two, verdict=FAKE)
    assert "face 2 of 2 (on the left)" in block(one)
    shown = page(one).text
    assert "Why: face 2 (on the left)" in shown and "Face 1 (on the right)" in shown


def xmp(name: str) -> dict[str, str]:
    kind, says = source_type(name)
    return {"kind": kind, "says": says, "where": "XMP DigitalSourceType, byte 9"}


@pytest.mark.parametrize(
    ("name", "verdict", "said"),
    [
        ("trainedAlgorithmicMedia", REAL, "a generator made it, and the faces alone look real"),
        ("compositeWithTrainedAlgorithmicMedia", REAL, "a generator edited it, and the faces alone look real"),
        ("digitalCapture", FAKE, "a camera took it, and the faces alone look fake"),
        ("trainedAlgorithmicMedia", FAKE, "both point to a fake"),
        ("trainedAlgorithmicMedia", Verdict("fake", 0.93, None, "whole"), None),
        ("trainedAlgorithmicMedia", OPEN, None),
        ("digitalCapture", REAL, None),
        ("print", FAKE, None),
    ],
)
def test_a_statement_that_opposes_the_answer_is_reconciled(name: str, verdict: Verdict, said: str | None) -> None:
    """Bug prevented: "made with an AI generator" above "Likely real", and the reader picks one of them."""
    one = report(verdict=verdict, faces=(face(verdict=verdict),), provenance={"statements": [xmp(name)]}, model=MODEL)
    line = reconciled(one)
    if said is None:
        assert line is None
    else:
        assert line is not None and said in line
        assert all(line in text for text in told(one))
    assert one.verdict == verdict and f"{verdict.p_fake:.0%}".replace("%", " %") in block(one)


def test_a_camera_that_took_an_ingredient_did_not_take_the_file() -> None:
    """Bug prevented: an edited photo whose Content Credentials list the camera's original, called a contradiction."""
    stated = xmp("digitalCapture") | {"where": 'Content Credentials, ingredient "a.jpg", c2pa.actions, action 1'}
    assert reconciled(report(verdict=FAKE, provenance={"statements": [stated]})) is None
    both = [xmp("digitalCapture"), xmp("compositeWithTrainedAlgorithmicMedia")]  # nothing opposes: the file states it
    assert reconciled(report(verdict=FAKE, provenance={"statements": both})) is None
    assert read_statements(b"", "JPEG") == [] and reconciled(report(verdict=FAKE)) is None


def test_who_decides_is_named() -> None:
    """Bug prevented: "to the models" where a single expert has a weight."""
    assert decided_by(MODEL) == "the tower expert" and decided_by({}) == "the models"
    assert decided_by({"mode": "calibrated", "weights": {"mllm": 0.2, "tower": 1}}) == (
        "the tower expert and the language model"
    )
    two = {"experts": {"tower": "1", "probe": "1"}, "weights": {"probe": 1, "tower": 1, "mllm": 0}}
    assert decided_by(two) == "the tower and probe experts"
    assert decided_by({"mode": "paper", "weights": None}) == "the language model"
    assert meaning(report(model=MODEL)).startswith("The tower expert takes this face for ")
    assert meaning(report(model=MODEL, verdict=REAL)).startswith("The tower expert found no sign")


@pytest.mark.parametrize(
    ("verdict", "scores", "said"),
    [
        (FAKE, (0.9, 0.2, 0.8), "The tower and contrast experts take this face for one that was changed in its photo"),
        (FAKE, (0.9, 0.9, 0.2), "The contrast expert itself says 20 %."),
        (
            Verdict("fake", 0.9, None, "whole"),
            (0.9, 0.8, 0.1),
            "The tower and probe experts take this face for ",
        ),
        (REAL, (0.1, 0.2, 0.7), "The contrast expert itself says 70 %."),
        (REAL, (0.1, 0.2, 0.3), "The tower, probe and contrast experts found no sign"),
        (FAKE, (0.4, 0.9, 0.4), "Together, the tower and contrast experts take this face"),
        (FAKE, (0.9, 0.9, None), "The tower expert takes this face"),
        (REAL, (0.1, None, None), "The tower expert found no sign"),
    ],
)
def test_only_experts_that_said_so_are_named(verdict: Verdict, scores: tuple[float | None, ...], said: str) -> None:
    """Bug prevented: an answer put into the mouth of an expert that said the opposite, or does not look for such."""
    names = ("tower", "probe", "contrast")
    model = {
        "mode": "calibrated", "experts": dict.fromkeys(names, "1"), "weights": dict.fromkeys(names, 0.5),
        "counts_for": {"whole": ["probe", "tower"], "part": ["contrast", "tower"]},
    }  # fmt: skip
    evidence = tuple(map(Evidence, names, scores))
    text = meaning(report(model=model, verdict=verdict, faces=(face(verdict=verdict),), evidence=evidence))
    assert said in text and ("itself" in text) == ("itself" in said)


def test_the_language_model_is_named_by_its_own_number() -> None:
    model = {"mode": "calibrated", "weights": {"mllm": 0.3, "tower": 0.5}}
    told = []
    for p_fake in (0.9, 0.1):
        one = face(verdict=FAKE, p_fake_mllm=p_fake)
        told.append(meaning(report(model=model, verdict=FAKE, faces=(one,), evidence=(Evidence("tower", 0.95),))))
    assert told[0].startswith("The tower expert and the language model take this face")
    assert "The language model itself says 10 %" in told[1]


def test_an_answer_never_seems_to_lie_in_the_range_without_one() -> None:
    """Bug prevented: "Likely fake 78 %" beside "between 17 % and 78 % no answer is given"."""
    model = {"band": [0.1652, 0.7815]}
    near = [Verdict("fake", 0.782), Verdict("real", 0.1651), Verdict("inconclusive", 0.781), Verdict("fake", 0.85)]
    assert [estimate(verdict, model) for verdict in near] == ["78.2 %", "16.5 %", "78.1 %", "85 %"]
    certain = [Verdict("fake", 0.9999), Verdict("real", 0.0001)]
    assert [estimate(v, {"band": [0.004, 0.997]}) for v in certain] == ["> 99 %", "< 1 %"]
    assert [bound(p) for p in (0.1652, 0.8)] == ["16.5 %", "80 %"]
    assert [estimate(Verdict("real", p), {}) for p in (0.003, 0.1651)] == ["< 1 %", "17 %"]


def test_likely_real_says_how_many_forgeries_look_like_it() -> None:
    """Bug prevented: 4 % in large letters, and 12 % of validated pictures with such a score in a folded section."""
    one = report(model=MODEL, verdict=REAL, likelihood_ratio={"value": 0.25})
    assert "20 % of the pictures with such a score were forged" in meaning(one)
    assert "validation" not in meaning(replace(one, likelihood_ratio={"value": None, "reason": "a clip"}))
    assert "validation" not in meaning(replace(one, verdict=FAKE))


def test_no_answer_says_where_the_score_lies() -> None:
    """Bug prevented: "no answer", and not a word of how near it was."""
    one = report(verdict=OPEN, faces=(face(verdict=OPEN),), model=MODEL)
    why = reason(one) or ""
    assert all(fact in why for fact in ("60 %", "21 %", "85 %"))
    assert "between" not in (reason(replace(one, model={})) or "between")  # a served model may state no band
    hardly = replace(one, model=MODEL | {"band": [0.5999995, 0.6000005]})  # fitted on a few pictures of one score
    narrow = reason(hardly) or ""
    assert "turns from real to fake" in narrow and "between" not in narrow and "larger" not in narrow
    assert all(narrow in text and "60 % and 60 %" not in text for text in told(hardly))
    assert all(why in text for text in told(one)) and f"why: {why}" in " ".join(block(one).split())
    assert reason(report(verdict=FAKE)) is None and reason(one, face(verdict=FAKE)) is None


def test_what_may_give_an_answer_follows_from_why_there_is_none() -> None:
    """Bug prevented: "a larger or less compressed original" of a large face in a camera's own file, and of a small one
    in a file that nobody compressed."""
    large, small = face(verdict=OPEN), face(verdict=OPEN, box=(170.0, 60.0, 40.4, 52.0), index=1)
    few = report().media | {"bytes": 20_000}  # of 512 x 512 pixels

    def advice(one: FaceReport, media: dict[str, Any]) -> str:
        return (reason(report(verdict=OPEN, faces=(one,), media=media)) or "").partition("to answer. ")[2]

    tiny, squeezed, neither = advice(small, report().media), advice(large, few), advice(large, few | {"bytes": 60_000})
    assert "40 pixels" in tiny and "larger" in tiny and "compressed" not in tiny
    assert "compressed" in squeezed and "larger" not in squeezed
    assert all(fact in advice(small, few) for fact in ("40 pixels", "larger", "compressed"))
    assert "106 pixels" in neither and "compressed" not in neither and neither == advice(large, report().media)
    assert advice(large, few | {"format": "WEBP"}) == neither  # the same bytes hold more in another format
    moving = advice(large, report().media | {"kind": "video"})
    assert "Another picture" in neither and moving == neither.replace("picture", "clip")
    both = report(verdict=OPEN, faces=(large, small))
    assert neither in (reason(both) or "") and tiny in (reason(both, small) or "")
    for why in ("no_face", "not_a_photograph"):
        said = reason(report(verdict=Verdict("inconclusive", None, why), faces=()))
        assert said and "pixels" not in said and "compressed" not in said
