"""The HTML page: safe with hostile text, true to the report, self-contained."""

from __future__ import annotations

import base64
import io
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from tests.raising import raises
from x2dfd import answer, figures, html_report
from x2dfd.curve import curve
from x2dfd.errors import SetupError
from x2dfd.explain import read_cues
from x2dfd.files import write_bytes
from x2dfd.paths import shown_names
from x2dfd.statements import LEAD
from x2dfd.types import Card, Cue, Evidence, FaceReport, Failure, Report, Verdict, renamed

ASTRONAUT = data.astronaut()
HOSTILE = "<img src=x onerror=alert(1)>\"'><script>alert(2)</script>&{{ 7*7 }}"


def ellipse(x: float, y: float, a: float, b: float) -> list[list[float]]:
    turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    return [[x + a * math.cos(t), y + b * math.sin(t)] for t in turn.tolist()]


def face(**changes: Any) -> FaceReport:
    text = (
        "This face looks forged. Around the jaw the blending leaves a soft edge, and the two eyes do not catch the "
        "light in the same way. The frequency expert sees an upsampling trace."
    )
    evidence = (
        Evidence("blend", 0.91), Evidence("frequency", 0.64, "weak trace: the file was compressed before"),
        Evidence("mesonet", 0.22), Evidence("swin", None, "its weights are not here"),
    )  # fmt: skip
    made = FaceReport(
        0, (172.0, 66.0, 106.0, 132.0), 0.97, Verdict("fake", 0.93), 0.88, text,
        cues=(Cue("jaw", "blending", 0.8), Cue("eyes", "lighting"), Cue("whole-image", "frequency")),
        evidence=evidence,
        contradictions=("The rationale calls the eyes asymmetric, but no expert that sees eyes agrees.",),
        areas={
            "jaw": [ellipse(226, 178, 40, 17)],
            "eyes": [ellipse(204, 118, 14, 7), ellipse(246, 116, 14, 7)],
            "hair": [ellipse(226, 50, 60, 20)],
        },
    )  # fmt: skip
    return replace(made, **changes)


def report(**changes: Any) -> Report:
    one = face()
    made = Report(
        "photos/astronaut.jpg", "8f2b" * 16,
        {"kind": "image", "format": "JPEG", "width": 512, "height": 512, "n_frames": 1, "notes": []},
        one.verdict, (one,), one.rationale, one.cues, one.evidence, provenance={"state": "absent"},
        model={"mode": "calibrated", "band": [0.35, 0.72], "threshold": 0.55, "adapter": {"sha256": "ab12" * 16}},
        versions={"x2dfd": "0.1.0", "torch": "2.13.0"}, timings={"faces": 0.02, "mllm": 3.4},
        warnings=("The picture is small; fine traces may be lost.",),
    )  # fmt: skip
    return replace(made, **changes)


TOWER = Evidence("tower", 0.2)  # an expert with a card
_RATE = {"value": 0.02, "interval": [0.0, 0.045], "n": 147}
VALIDATION: dict[str, Any] = {
    "rates": {"false_alarms": _RATE, "misses": _RATE, "answered": {"value": 0.55, "n": 420}, "auc": _RATE},
    "run": "detect", "methods": ["swap"], "sources": ["film"], "n_real": 147, "n_fake": 273, "n_groups": 192,
    "cllr": 0.653,
}  # fmt: skip


_TIMES = ((0, 0.1, Verdict("real", 0.1)), (20, 1.0, Verdict("fake", 0.9)), (30, 1.5, Verdict("fake", 0.8)))
CLIP = report(
    path="clip.mp4",
    media={"kind": "video", "width": 512, "height": 512, "frames": [0, 10, 20, 30]},  # no face in frame 10
    faces=tuple(face(index=k, frame=n, time_s=t, verdict=v) for k, (n, t, v) in enumerate(_TIMES)),
    verdict=Verdict("fake", 0.9),
)


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " * (tag not in {"b", "strong"})

    def handle_endtag(self, tag: str) -> None:
        self.text += " " * (tag not in {"b", "strong"})

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, str | None]]:
        """Attributes of the tags of that name whose attributes hold those words."""
        return [
            found
            for name, found in self.tags
            if name == tag and all(word in (found.get(key) or "").split() for key, word in attrs.items())
        ]


def html_of(*reports: Report | Failure, pictures: Any = None) -> str:
    shown = pictures if pictures is not None else [None if isinstance(r, Failure) else ASTRONAUT for r in reports]
    return html_report.render(list(reports), shown)


def page(*reports: Report | Failure, pictures: Any = None) -> Page:
    return Page(html_of(*reports, pictures=pictures))


def picture_in(uri: str | None) -> Image.Image:
    """The picture of a data URI."""
    return Image.open(io.BytesIO(base64.b64decode((uri or "").partition(",")[2])))


def test_hostile_text_in_any_field_stays_text() -> None:
    """A file named like a tag, or a rationale with HTML in it, would run in the reader's browser."""
    evidence = (Evidence(HOSTILE, 0.5, HOSTILE), Evidence(HOSTILE, None, HOSTILE))
    said: dict[str, Any] = {"rationale": HOSTILE, "evidence": evidence}
    one = face(**said, contradictions=(HOSTILE,), verdict=Verdict("inconclusive", 0.5, HOSTILE))
    said |= {"provenance": {"state": HOSTILE, "claim": HOSTILE}, "media": {"kind": HOSTILE, HOSTILE: HOSTILE}}
    said |= {"versions": {HOSTILE: HOSTILE}, "model": {HOSTILE: [HOSTILE]}, "warnings": (HOSTILE,)}
    hostile = report(path=f"{HOSTILE}.jpg", faces=(one,), verdict=one.verdict, **said)
    seen = page(hostile, Failure(HOSTILE, None, HOSTILE, HOSTILE))
    assert not seen.all("script")
    shown = [tag["src"][:22] for tag in seen.all("img") if tag["src"]]
    assert shown == 2 * ["data:image/jpeg;base64"]  # in the list, and large
    assert {tag["href"] for tag in seen.all("a")} == set(html_report.SERVICES.values())
    assert not [name for _, attrs in seen.tags for name in attrs if name.startswith("on")]
    assert "alert(2)" in seen.text and "{{ 7*7 }}" in seen.text


def test_page_asks_nothing_from_anywhere() -> None:
    """A report opened in a newsroom must not tell a server which picture is being looked at, nor a linked page who
    sends its reader."""
    html = html_of(report(), CLIP)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    for link in Page(html).all("a"):
        assert link == {"href": link["href"], "rel": "noreferrer noopener"}
    for address in html_report.SERVICES.values():
        assert f'<a href="{address}"' in html
        html = html.replace(f'<a href="{address}"', "<a")
    for tag, attrs in Page(html).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attrs.get(name)
            assert value is None or value.startswith(("data:image/jpeg", "#"))
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html


@pytest.mark.parametrize(
    ("verdict", "word", "kind"),
    [
        (Verdict("fake", 0.93), "Likely fake", "fake"),
        (Verdict("real", 0.06), "Likely real", "real"),
        (Verdict("inconclusive", 0.5, "in_band"), "No answer", "inconclusive"),
        (Verdict("inconclusive", None, "no_face"), "Not assessed", "none"),
    ],
)
def test_answer_is_a_word_and_an_icon(verdict: Verdict, word: str, kind: str) -> None:
    """Colour alone is lost on a colour-blind reader and on paper; no face must never read as real."""
    faces = () if verdict.p_fake is None else (face(verdict=verdict),)
    html = html_of(report(verdict=verdict, faces=faces))
    answer = re.search(rf'<p class="answer {kind}">\s*<svg class="icon".*?</svg>\s*(.*?)</p>', html, re.S)
    assert answer and answer[1].strip() == word
    judged = verdict.p_fake is not None
    assert ("not proof" in Page(html).text) == judged == ("plays no part in the estimate" in Page(html).text)


def test_scale_places_estimate_and_band() -> None:
    """A marker at the wrong place contradicts the number beside it; no band may be made up, and no calibration."""
    html = html_of(report())
    assert 'class="mark" style="left:93.0%"' in html
    assert 'class="band" style="left:35.0%;width:37.0%"' in html
    assert 'class="tick" style="left:55.0%"' in html
    said = Page(html).all("div", role="img")[0]["aria-label"]
    assert said == "chance of a fake: 93 % on a scale from 0 to 100; no answer is given between 35 % and 72 %"
    for p, shown in {0.9999: "> 99 %", 0.0001: "< 1 %", 0.934: "93 %"}.items():  # what no model can know
        verdict = Verdict("fake" if p > 0.5 else "real", p)
        assert f"Estimated probability of forgery: {shown}" in page(report(verdict=verdict)).text
    paper = page(report(model={"mode": "paper"}))
    assert not paper.all("span", **{"class": "band"}) and "not calibrated" in paper.text


def test_picture_and_overlay() -> None:
    """A camera's photo made a page of tens of megabytes; a box scaled by a shrunk picture stands at the wrong place;
    an area that the explanation does not name must not look suspicious."""
    wide = np.repeat(np.repeat(ASTRONAUT, 4, axis=0), 8, axis=1)
    picture = picture_in(page(report(), pictures=[wide]).all("img")[0]["src"])
    assert picture.size == (1200, 600)
    assert abs(np.asarray(picture, float).mean() - ASTRONAUT.mean()) < 2
    seen = page(report(), pictures=[np.ascontiguousarray(ASTRONAUT[::2, ::2])])
    assert [svg for svg in seen.all("svg") if svg.get("viewbox") == "0 0 512 512"]
    box = seen.all("rect", **{"class": "over"})[0]
    assert (box["x"], box["y"], box["width"], box["height"]) == ("172.0", "66.0", "106.0", "132.0")
    assert len(seen.all("polygon")) == 3  # a jaw, two eyes, and no hair
    assert "A jaw" in seen.text and "B eyes" in seen.text
    assert "not drawn whole-image frequency" in seen.text
    with pytest.raises(ValueError):  # else every verdict stands on the wrong photo
        html_report.render([report(), report()], [ASTRONAUT])


def test_two_faces_keep_their_areas_apart() -> None:
    """Area A of one face must not be taken for area A of the other."""
    second = face(index=1, box=(300.0, 60.0, 80.0, 90.0), verdict=Verdict("real", 0.08))
    seen = page(report(faces=(face(), second)))
    assert "1A face 1: jaw" in seen.text and "2A face 2: jaw" in seen.text
    alt = seen.all("img")[0]["alt"]
    assert alt == "astronaut.jpg, face 1: likely fake, 93 % chance of a fake; face 2: likely real, 8 % chance of a fake"
    assert seen.text.count("decides the file's answer") == 1


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug prevented: a score without weight, or of an expert that the weights do not name, is taken for the reason; one
    without its blind spot is misread, and none is drawn as 0."""
    weights = {"mllm": 0.5, "blend": 1.0, "frequency": 1.0, "swin": 1.0, "mesonet": 0.0}
    told = report(model={**report().model, "weights": weights})
    assert html_report.UNCOUNTED not in page(report()).text
    assert told.uncounted == {"mesonet"} and f"mesonet 22 % {html_report.UNCOUNTED}" in page(told).text
    assert page(told).text.count(html_report.UNCOUNTED) == 1
    del weights["mesonet"]
    assert told.uncounted == {"mesonet"}
    seen = page(report())
    assert len(seen.all("div", **{"class": "bar"})) == 3
    tail = seen.text.split("Experts that gave no score")[1]
    assert tail.lstrip().startswith("swin no score its weights are not here")
    card = Card("blend", "1", "here", "MIT", "", "crop", "none", "sees no whole-face synthesis")
    monkeypatch.setattr("x2dfd.html_report.cards", lambda _: {"blend": card})
    assert "blend 91 % Blind spot: sees no whole-face synthesis" in page(report()).text
    monkeypatch.setattr("x2dfd.html_report.cards", lambda _: {"blend": SetupError("card cannot be read")})
    seen = page(report())
    assert "blend 91 %" in seen.text and "Blind spot" not in seen.text


def test_video_shows_its_most_suspicious_frames_and_names_the_rest() -> None:
    """Frames left out of a long video must not vanish without a word."""
    verdicts = [Verdict("fake", 0.75 + i / 100) for i in range(8)]
    faces = tuple(face(frame=10 * i, time_s=i / 2, verdict=v) for i, v in enumerate(verdicts))
    media = {"kind": "video", "width": 512, "height": 512, "frames": [10 * i for i in range(8)]}
    video = report(faces=faces, media=media)
    seen = page(video, pictures=[{10 * i: ASTRONAUT for i in range(8)}])
    shown = seen.all("img")  # the worst first and large, the others beneath it, by time
    whens = ["3.5 s (frame 70)", "1.0 s (frame 20)", "1.5 s (frame 30)", "2.0 s (frame 40)", "2.5 s (frame 50)"]
    assert [(tag["alt"] or "").split(":")[0] for tag in shown] == [f"At {t}" for t in [*whens, "3.0 s (frame 60)"]]
    assert "Most suspicious frame: 3.5 s (frame 70), likely fake" in seen.text
    assert "1.0 s (frame 20), likely fake" in seen.text
    assert "Faces, signs and experts (explained in 6 of 8 frames)" in seen.text and "(1 face)" in page(report()).text
    assert seen.all("div", **{"class": "strip"}) and not page(report()).all("div", **{"class": "strip"})
    wide = {10 * i: np.zeros((400, 1000, 3), np.uint8) for i in range(8)}
    sizes = [picture_in(tag["src"]).width for tag in page(video, pictures=[wide]).all("img")]
    assert sizes == [1000] + 5 * [figures.STRIP_SIDE]
    assert "Faces in other frames (2)" in seen.text and "0.5 s (frame 10) 1 Likely fake 76 %" in seen.text


def test_letters_of_areas_that_share_a_centre_stand_apart() -> None:
    """Bug prevented: nose and skin are both marked, and B hides A."""
    both = {"nose": [ellipse(226, 118, 14, 20)], "skin": [ellipse(227, 119, 40, 60)]}
    one = face(areas=both, cues=(Cue("nose", "noise"), Cue("skin", "noise")))
    [(x, y)], [(a, b)] = figures.letter_places(one, 17.0, 300.0).values()
    assert (x, y) == pytest.approx((226, 118)) and a == pytest.approx(227) and b - y >= 17


def test_a_page_holds_what_a_record_needs() -> None:
    """A file that could not be judged looks clean, a contradiction passes unmarked, or the weights are not named."""
    seen = page(Failure("notes.txt", "00" * 32, "not_an_image", "the file is no picture"))
    assert "Not judged" in seen.text and "the file is no picture" in seen.text and "not_an_image" in seen.text
    assert not seen.all("div", **{"class": "scale"})
    text = page(report()).text
    for fact in ("8f2b" * 16, "JPEG", "512 x 512 pixels", "The explanation contradicts the findings"):
        assert fact in text
    assert "contradicts" not in page(report(faces=(face(contradictions=()),))).text
    many = page(*[report(path=f"{i}.jpg") for i in range(33)], pictures=[None] * 33)  # each once
    assert len(many.all("details", **{"class": "file"})) == 33 and not many.all("nav")
    assert [many.text.count(f" {i}.jpg") for i in range(33)] == [1] * 33
    # The answer and what to do next stand before what is folded.
    html = html_of(report(verdict=Verdict("fake", 0.93, None, "part")))
    first, *_ = html.split("<details")
    assert "Likely fake: changed in part" in first and "reverse image search" in first and "blending leaves" in first


def test_technical_details_are_a_few_rows() -> None:
    """Bug prevented: forty rows a file, whole hashes and lists of layers, that nobody reads and every page carries."""
    model: dict[str, Any] = {"name": "m 9", "mode": "calibrated", "runs_on": "cpu", "band": [0.35, 0.72]}
    model |= {"adapter_sha256": "ab12" * 16, "crops_through": ".jpg 90", "layers": {"text": [0, 1]}, "crop_size": 448}
    text = page(report(model=model)).text
    block = text.split("Technical details")[1].split("The JSON record holds all of it.")[0].strip()
    assert block == (
        "Model m 9, cpu, calibrated Versions x2dfd 0.1.0, torch 2.13.0 SHA-256 begins file 8f2b8f2b8f2b, "
        "model ab12ab12ab12 Face crop 448 pixels, through .jpg 90 Thresholds no answer from 35 % to 72 %"
    )
    assert "ab12" * 4 not in text and "Threshold fake from 50 %" in page(report(model={"threshold": 0.5})).text


def test_a_sign_has_the_probability_of_the_expert_that_points_at_it() -> None:
    """Bug prevented: "Strength 90 %" beside a sign, which is only the text's word of degree ("obviously")."""
    pointed = (
        Evidence("blend", 0.9, cues=(Cue("jaw", "blending", 0.41), Cue("eyes", "texture", 0.99))),
        Evidence("swin", 0.9, cues=(Cue("jaw", "blending", 0.97),)),  # without a weight, so it is not asked
    )
    model = report().model | {"weights": {"blend": 0.5, "swin": 0.0}}
    shown = page(report(faces=(face(evidence=pointed),), model=model)).text
    table = shown.partition("Signs named in the explanation")[2]
    assert "Expert's probability A jaw blending 41 % B eyes lighting –" in table
    assert "Strength" not in shown and "80 %" not in table.partition("What each")[0]


def test_a_fakes_card_opens_with_its_strongest_sign() -> None:
    """Bug prevented: the first of several signs leads, and the one that experts are sure of stands below."""
    said = "A part of the photo looks changed. The skin looks faintly grainy. A seam runs along the jaw."
    points = Evidence("tower", 0.97, cues=(Cue("skin", "noise", 0.6), Cue("jaw", "blending", 0.9)))
    unweighed = Evidence("other", 0.9, cues=(Cue("skin", "noise", 0.99),))
    one = face(rationale=said, cues=read_cues(said), evidence=(points, unweighed))
    told = report(faces=(one,), evidence=one.evidence, model={"weights": {"tower": 1.0, "other": 0.0}})
    assert html_report.strongest_sign(told) == "a seam runs along the jaw."
    text = page(told).text
    assert text.index("Strongest sign: a seam runs along the jaw.") < text.index("Estimated probability")
    none = face(rationale="The face looks generated as a whole.", cues=(), evidence=())
    real = face(verdict=Verdict("real", 0.1))
    for other in (report(faces=(none,)), report(faces=(real,), verdict=real.verdict), report(faces=())):
        assert html_report.strongest_sign(other) == "" and "Strongest sign" not in page(other).text


def test_an_experts_map_can_be_laid_over_the_picture() -> None:
    """Bug prevented: a map that is drawn beside the face, hides the photo at once, or needs a script."""
    rows = ((0.0, 1.0), (0.5, 0.0))
    corners = ((100.0, 50.0), (300.0, 50.0), (100.0, 250.0))
    mapped = face(evidence=(Evidence("consistency", 0.9, map=rows),), crop=corners)
    html = html_of(report(faces=(mapped,)))
    assert 'transform="matrix(100.0000 0.0000 0.0000 100.0000 100.0000 50.0000)"' in html
    assert 'type="checkbox"' in html and "<script" not in html and ".map { display: none; }" in html
    [overlay] = Page(html).all("image", **{"class": "map"})
    alpha = np.asarray(picture_in(overlay["href"]))[..., 3]
    assert alpha.tolist() == [[0, 110], [55, 0]]  # the face is seen through it
    assert 'class="of-map"' not in html_of(report())


def test_a_small_face_is_enlarged_to_the_middle_and_leaves_no_blank_edge() -> None:
    """In a wide picture the marks lie on a few pixels; enlarged about a wrong point, the face is out of sight."""
    for x in (0.0, 400.0, 950.0):
        style = figures.closer(face(box=(x, 300.0, 50.0, 60.0)), 1000.0, 800.0)
        found = {name: float(value.rstrip("%")) for name, value in re.findall(r"--(\w+):([\d.]+%?)", style)}
        scale, fixed = found["scale"], 10 * found["x"]
        left, right = (fixed + scale * (at - fixed) for at in (x, x + 50))
        assert scale > 5 and left >= -1 and right <= 1001  # the face is in sight
        assert 0 <= fixed <= 1000 and (x != 400.0 or abs((left + right) / 2 - 500) < 5)
    assert figures.closer(face(box=(100.0, 100.0, 500.0, 600.0)), 1000.0, 800.0) == ""


def test_the_weight_of_a_score_stands_with_propositions_interval_and_limits() -> None:
    """A bare number reads as "x times more likely fake"; without its limits it claims what no run of that size can."""
    ratio = {"value": 0.25, "interval": [0.1, 1.5], "limits": [0.04, 50.0], "run": "detect, manifest 9f516b"}
    ratio |= {"propositions": ["H1: forged.", "H2: as taken."]}
    text = page(report(likelihood_ratio=ratio, model={"mode": "calibrated", "validation": VALIDATION})).text
    assert "such a score was 4 times (95 %: 0.667 to 10) as frequent among real pictures as among forged ones" in text
    assert "the interval holds 1" in text and "gives a 20 % (95 %: 9 % to 60 %) chance of a fake" in text
    assert "No score in that run had a ratio above 50 towards a forgery, or above 25 towards a photo." in text
    assert "H1: forged. H2: as taken." in text and "detect, manifest 9f516b" in text
    assert "Real pictures called fake 2.0 % (95 %: 0.0 % to 4.5 %), of 147" in text
    none = page(report(likelihood_ratio={"value": None, "reason": "no run is at hand"})).text
    assert "ikelihood ratio" in text and "ikelihood ratio" not in none  # nor its place among the limits
    rated = page(report(model={"mode": "calibrated", "validation": VALIDATION})).text
    assert "Error rates of the model" in rated and "ikelihood ratio" not in rated
    why = {"value": None, "reason": "the validation run holds pictures, not videos"}
    clip = page(report(likelihood_ratio=why, model={"mode": "calibrated", "validation": VALIDATION})).text
    assert "There is no likelihood ratio: the validation run holds pictures, not videos." in clip
    forged = page(report(likelihood_ratio=ratio | {"value": 8.0, "interval": [2, 20]})).text
    assert "8 times (95 %: 2 to 20) as frequent among forged pictures as among real ones" in forged


def test_what_all_files_share_stands_once() -> None:
    """Bug prevented: a report of many files says the same error rates and blind spots in each file's section."""
    rated = report(model={"mode": "calibrated", "validation": VALIDATION}, faces=(face(evidence=(TOWER,)),))
    ratio = {"value": None, "reason": "no run is at hand"}
    clip = replace(rated, media=rated.media | {"kind": "video"}, likelihood_ratio=ratio)
    other = replace(rated, model={"mode": "paper", "validation": VALIDATION})
    once, apart, alone = (page(*some).text for some in ((rated, clip), (rated, other), (rated,)))
    assert [text.count("Cost of the scores") for text in (once, apart, alone)] == [1, 2, 1]
    assert [text.count("Blind spot ") + text.count("Blind spot:") for text in (once, apart, alone)] == [1, 3, 2]
    assert once.count("are at the end of the page") == once.count("are in the experts' cards") == 2
    assert "end of the page" not in apart + alone and once.count("There is no likelihood ratio: no run") == 1
    assert once.count("clips, whose most suspicious frames") == 1 and "clips, whose" not in apart + alone


def test_file_facts_cards_and_credentials_stand_on_the_page() -> None:
    """An editor has to see which file was judged, with which weights, and what its credentials say."""
    media = {**report().media, "bytes": 1234567, "modified": "2024-05-06T07:08:09+00:00", "exif": {"make": HOSTILE}}
    provenance = {"state": "invalid", "codes": ["assertion.dataHash.mismatch"], "signer": HOSTILE}
    shown = page(report(media=media, provenance=provenance, faces=(face(evidence=(Evidence("tower", 0.2),)),)))
    for fact in ("1,234,567 bytes, 512 x 512 pixels", media["modified"], provenance["codes"][0], "do not match it"):
        assert fact in shown.text
    assert shown.text.count("alert(2)") == 2 and not shown.all("script")
    assert "tower, version" in shown.text and "What to do next" in shown.text


def test_what_the_file_states_leads_the_page_and_is_apart() -> None:
    """Bug prevented: a generator's own recipe in the file is a technical detail, or moves the number."""
    made = {"kind": "generated", "says": HOSTILE, "where": 'PNG text "parameters", byte 41'}
    part = {"kind": "part_generated", "says": "digital source type compositeSynthetic", "where": "XMP, byte 9"}
    before, shown = page(report()), page(report(provenance={"state": "absent", "statements": [part, made]}))
    lead, answer = shown.text.index(LEAD), shown.text.index("Estimated probability")
    assert lead < shown.text.index("alert(2)") < answer and 'PNG text "parameters", byte 41' in shown.text[lead:answer]
    assert "can be removed" in shown.text[lead:answer] and "can be added" in shown.text[lead:answer]
    assert "compositeSynthetic" in shown.text[answer:] and "compositeSynthetic" not in shown.text[:answer]
    assert LEAD not in before.text and not shown.all("script")
    only_part = page(report(provenance={"state": "absent", "statements": [part]}))
    assert LEAD not in only_part.text and "compositeSynthetic" in only_part.text


def test_pdf_comes_from_a_printer_or_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing browser must not end in a traceback, and a browser that fails must not leave half a file."""
    out = tmp_path / "a.pdf"
    monkeypatch.setenv("PATH", str(tmp_path))
    with raises("browser_missing", "install chromium"):
        html_report.write_pdf(out, "<p>")
    browser = tmp_path / "chromium"
    lines = "import sys; from pathlib import Path; page = Path(sys.argv[-1].removeprefix('file://')).read_bytes()"
    lines += "; [Path(a.partition('=')[2]).write_bytes(b'%PDF' + page) for a in sys.argv if a.startswith('--print-to')]"
    browser.write_text(f"#!{sys.executable}\n{lines}\n")
    browser.chmod(0o755)
    html_report.write_pdf(out, "<p>page</p>")
    assert out.read_bytes() == b"%PDF<p>page</p>"
    browser.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    with raises("print_failed"):
        html_report.write_pdf(out, "other")
    assert out.read_bytes() == b"%PDF<p>page</p>"


def test_a_page_names_no_folder_above_its_files() -> None:
    """Bug prevented: heading, tab and failures of a report that is passed on name a source, or the user's home."""
    source = "/people/anna/source-Mueller"
    html = html_of(report(path=f"{source}/g.jpg"))
    assert "anna" not in html and "Mueller" not in html and "<title>x2dfd report: g.jpg</title>" in html
    broken = Failure(f"{source}/b.jpg", None, "failed", f"decoding failed: [Errno 5] {source}/b.jpg")
    html = html_of(report(path=f"{source}/sub/g.jpg"), broken, report(path=None))
    assert "anna" not in html and "Mueller" not in html
    assert "<bdi>sub/g.jpg</bdi>" in html and "<bdi>b.jpg</bdi>" in html and "[Errno 5] b.jpg" in html


def test_files_are_called_by_their_path_from_the_common_folder() -> None:
    """Bug prevented: two files of one name that nobody can tell apart; a name with the whole path of a folder that
    holds everything, or an error where paths cannot be compared."""
    for paths, names in (
        (["/people/anna/a.jpg"], ["a.jpg"]),
        (["a.jpg", "/nowhere/b.jpg"], ["a.jpg", "b.jpg"]),
        (["/people/anna/x/a.jpg", "/people/anna/x/y/a.jpg", None], ["a.jpg", "y/a.jpg", None]),
        (["/people/anna/a.jpg", "/mnt/b.jpg"], ["a.jpg", "b.jpg"]),  # nothing in common
        (["/people/anna/a.jpg", "/mnt/a.jpg"], ["anna/a.jpg", "mnt/a.jpg"]),
        (["/a.jpg", "/mnt/a.jpg", "/mnt/a.jpg"], ["a.jpg", "mnt/a.jpg", "mnt/a.jpg"]),
        (["x/a.jpg", "y/a.jpg"], ["x/a.jpg", "y/a.jpg"]),
        ([""], [""]),
        (["/"], ["/"]),
        ([], []),
    ):
        assert shown_names(paths) == names


def test_a_clips_page_has_its_curve() -> None:
    """Bug prevented: a page that hides when a clip turns; a line through frames in which nobody is seen; a point at
    another height than its number."""
    html = html_of(CLIP, pictures=[{n: ASTRONAUT for n, *_ in _TIMES}])
    [plot] = Page(html).all("div", **{"class": "plot"})
    assert plot["role"] == "img" and "highest 90 % at 1.0 s, lowest 10 % at 0.1 s; 2 frames look fake" in str(plot)
    assert re.findall(r'class="dot on-(\w+)" d="M([\d. ]+)h', html) == [
        ("real", "12.50 90.00"), ("fake", "62.50 10.00"), ("fake", "87.50 20.00")
    ]  # fmt: skip
    assert re.findall(r'<polyline points="([^"]+) "', html) == ["62.50,10.00 87.50,20.00"]  # none in the second frame
    assert '<rect class="band" x="0" width="100" y="28.0" height="37.0"/>' in html
    assert html.count('<path class="marked"') == 3 and "0.1 s" in html and "1.5 s" in html
    assert 'class="plot"' in html_of(CLIP, pictures=[None]) and 'class="plot"' not in html_of(report())
    none = replace(CLIP, faces=tuple(replace(f, verdict=Verdict("inconclusive", None, "x")) for f in CLIP.faces))
    assert curve(none, [0, 10, 20, 30]) is None and curve(CLIP, [0]) is None


def test_files_are_listed_once_the_likeliest_fakes_first() -> None:
    """Bug prevented: the one forgery among thirty files stands in the middle, between files that nobody could judge."""
    p_of = {"a": 0.1, "b": 0.5, "c": 0.8, "d": 0.95, "e": 0.6}
    labels = {"a": "real", "b": "inconclusive", "c": "fake", "d": "fake", "e": "inconclusive"}
    reports: list[Report | Failure] = []
    for name, p in p_of.items():
        verdict = Verdict(labels[name], p, None, "whole" if name == "d" else None)  # type: ignore[arg-type]
        reports.append(report(path=f"{name}.jpg", verdict=verdict, faces=(face(verdict=verdict),)))
    reports.insert(0, report(path="n.jpg", verdict=Verdict("inconclusive", None, "no_face"), faces=()))
    reports.insert(0, Failure("x.txt", None, "not_an_image", "no picture"))
    html = html_of(*reports)
    assert re.findall(r"<bdi>([^<]+)</bdi>", html) == [f"{c}.jpg" for c in "dcaebn"] + ["x.txt"]
    seen = page(*reports)
    for line in ("Likely fake (2)", "Likely fake: made as a whole by a generator, 95 % chance of a fake"):
        assert line in seen.text
    assert "4 of 7 files got no answer: 2 are too uncertain, 1 was not assessed, 1 was not judged." in seen.text
    assert len(seen.all("img", **{"class": "thumb"})) == 6 and len(seen.all("span", **{"class": "thumb"})) == 1
    small = picture_in(seen.all("img", **{"class": "thumb"})[0]["src"])
    assert small.size == (figures.THUMB, figures.THUMB)
    assert "files got no answer" not in page(report(), report()).text + page(report()).text


def test_thumbnail_shows_the_face_that_decides() -> None:
    """Bug prevented: a wide picture's middle, without its face, is what stands for it; of a clip any frame."""
    wide = np.hstack([ASTRONAUT, np.zeros((512, 1536, 3), np.uint8)])
    made = figures.thumbnail(report(media=report().media | {"width": 2048}), wide)
    assert made is not None and picture_in(made["uri"]).size == (384, 96)
    assert (round(made["x"]), round(made["y"])) == (11, 26)
    frames = {n: np.full((64, 64, 3), n, np.uint8) for n in (0, 10, 20, 30)}
    shown = figures.thumbnail(CLIP, frames)
    assert shown is not None and np.asarray(picture_in(shown["uri"]))[0, 0, 0] == 20
    assert figures.thumbnail(CLIP, {}) is None and figures.thumbnail(report(), None) is None


def test_labels_keep_their_size_on_pictures_of_any_size() -> None:
    """Bug prevented: a picture of 170 pixels in a column of 460, with words that shrink or grow with it."""
    html = html_of(report(), pictures=[np.ascontiguousarray(ASTRONAUT[::3, ::6])])
    assert "--ratio:0.50" in html  # the column's width, as far as that is not too high
    assert re.search(r'<text class="letter" x="44\.\d+%" y="34\.\d+%"', html) and "font-size=" not in html
    [chip] = Page(html).all("span", **{"class": "chip"})
    assert chip["class"] == "chip on-fake above" and "--left:33.59%;--top:12.89%" in str(chip["style"])
    low = html_of(report(faces=(face(box=(0.0, 10.0, 100.0, 200.0)),)))
    assert 'class="chip on-fake"' in low and "--top:41.02%" in low  # beneath the box, not on the forehead


@pytest.mark.parametrize("kind", ["fake", "real", "inconclusive", "none"])
def test_next_steps_go_with_the_answer(kind: str) -> None:
    """Bug prevented: who gets no answer reads what to do about a fake; a step that is lost in another order."""
    p = None if kind == "none" else 0.5
    verdict = Verdict("inconclusive" if p is None else kind, p, "no_face" if p is None else None)  # type: ignore[arg-type]
    steps = html_report.next_steps(verdict)
    assert steps[0].text == html_report.FIRST_STEPS[kind]
    assert sorted(step.text for step in steps[1:]) == sorted(answer.NEXT_STEPS)
    assert {address for step in steps for _, address in step.links} == set(html_report.SERVICES.values())
    text = page(report(verdict=verdict, faces=() if p is None else (face(verdict=verdict),))).text
    assert html_report.FIRST_STEPS[kind] in text and "TinEye" in text and "Google Lens" in text
    assert any("single frame" in step.text for step in html_report.next_steps(verdict, video=True))


def test_odd_characters_are_spelled_out(tmp_path: Path) -> None:
    """A right-to-left mark shows `photo\u202egpj.exe` as a JPEG's; stray bytes are surrogates that no file can hold."""
    out = tmp_path / "report.html"
    path = "photo\u202egpj.exe \x1b[31m caf\udce9.jpg"
    write_bytes(out, html_report.render([report(path=path)], [None]).encode("utf-8"))
    html = out.read_text("utf-8")
    assert "photo\\u202egpj.exe \\x1b[31m caf\\udce9.jpg" in html and "\u202e" not in html and "\x1b" not in html


def test_a_files_name_in_a_reason_is_no_other_word() -> None:
    """Bug prevented: "the 8-bit file - broken" with the folder in it, of a picture that came through standard input."""
    reason = "a and /x/a/b.png: the 8-bit file - broken"
    failures = [Failure(path, None, "unreadable", reason) for path in ("-", "/x/a/b.png")]
    names = shown_names([one.path for one in failures])
    assert names == ["-", "b.png"]
    assert [one.reason for one in renamed(failures, names) if isinstance(one, Failure)] == [
        reason, "a and b.png: the 8-bit file - broken",
    ]  # fmt: skip
