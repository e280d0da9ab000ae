"""How an answer is put to a person: one set of words for the command line, the page, the app and Python.

Machine words (`fake`, `in_band`, `whole` ...) stay in the JSON; what people read is made here and nowhere else.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import itemgetter

from x2dfd.files import Json
from x2dfd.prompts import AGREES_ABOVE, AGREES_BELOW, listed
from x2dfd.statements import PARTLY, of_camera, of_generator
from x2dfd.types import MLLM, Evidence, FaceReport, Report, Verdict

WORDS = {
    "fake": "Likely fake",
    "real": "Likely real",
    "inconclusive": "No answer",
    "none": "Not assessed",
    "failed": "Not judged",
}
"""By `status`; "failed" is of a file without a verdict (x2dfd.types.Failure)."""

KINDS_SAID = {"whole": "made as a whole by a generator", "part": "changed in part"}
"""By kind of fake (x2dfd.types.KINDS)."""

REASONS = {
    "no_face": "No face was found, so nothing was assessed. This says nothing about whether the picture is real. "
    "If it shows a face, a copy in which the face is larger, upright and not covered may give an answer.",
    "not_a_photograph": "This looks like a drawing, a painting or a render. Forgery detection applies to photos only. "
    "If it was made from a photo, judge that one.",
}
DECODED = {
    r"\w+_to_8bit": "finer shades rounded to 8 bits",
    r"alpha_on_white": "transparent parts laid on white",
    r"bt2020_to_bt709": "colours converted from BT.2020 to BT.709",
    r"cmyk_to_rgb": "colours converted from CMYK to RGB",
    r"damaged_frame:(\d+)": r"frame \1 is damaged",
    r"decoding_limit_reached": "stopped at the limit of work for one file",
    r"deinterlaced": "interlaced frames deinterlaced",
    r"exif_orientation:(\d)": r"turned as its orientation tag (\1) says",
    r"exif_unreadable:.*": "its EXIF cannot be read",
    r"faces_turned:(\d+)": r"faces found with the picture turned by \1°",
    r"file_says_([\d.]+)_s": r"the file states a length of \1 s, and its pictures end earlier",
    r"first_of_(\d+)_frames": r"only the first of its \1 pictures was looked at",
    r"frames_missing:(\d+)": r"\1 of the sampled frames could not be decoded",
    r"frames_not_all_counted": "its frames were not all counted",
    r"hash_of_pixels": "given as pixels: the SHA-256 is that of the pixels, not of a file",
    r"hdr_tone_mapped:(.+)": r"HDR (\1) tone-mapped to the range of ordinary pictures",
    r"icc_ignored:.*": "its colour profile cannot be used; colours taken as sRGB",
    r"icc_to_srgb:(.*)": r"colours converted from its profile (\1) to sRGB",
    r"memory_limit_after_(\d+)_frames": r"stopped after \1 frames at the limit of memory",
    r"mirrored:.*": "mirrored as the file says",
    r"one_of_(\d+)_frames": r"only one of its \1 pictures was looked at",
    r"pixel_shape:(.+)": r"stretched to square pixels (they are \1 in the file)",
    r"pixel_shape_ignored": "its stated shape of pixels is implausible and was ignored",
    r"reduced_from:(\d+)x(\d+)": r"decoded smaller than its \1 x \2 pixels",
    r"rotation:(\d+)": r"turned by \1° as the file says",
    r"undecodable_from_frame:(\d+):.*": r"frames from \1 on cannot be decoded",
    r"undecodable_packets:(\d+)": r"pieces of the clip that cannot be decoded: \1",
    r"warning:(.*)": r"the decoder warns: \1",
}
"""By pattern of a code in `Report.media.notes`: what decoding changed or missed, in words."""
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip
SMALL_FACE = 100  # pixels: a face of less width is enlarged about twice for the models
STRONGLY_COMPRESSED = 0.1  # bytes a pixel of a JPEG; photos have 0.11 at quality 50 and 0.15 at 75

NOT_PROOF = "This is a statistical estimate, not proof: do not accuse a person or clear a picture on it alone."
LIMITS = {
    "The estimate": "A probability fitted on pictures with known answers, forged and real taken as equally likely "
    "beforehand. It holds for pictures like those; for other cameras, other kinds of forgery or heavy compression it "
    "can be off in either direction.",
    "The likelihood ratio": "How many times as frequent such a score is among the forged as among the real pictures of "
    "one named run, or the other way round. It rests on the pictures of that run alone, and says nothing about how "
    "likely a forgery was before the picture was looked at.",
    "No answer": "The models are wrong too often at such scores. It means neither slightly fake nor slightly real.",
    "The explanation": "Unless it is marked as a fixed text, a language model wrote it, knowing the answer and the "
    "experts' scores. The program removed what goes against these, and added signs that an expert is sure of. Look at "
    "the named areas yourself.",
    "Experts": "Separate detectors with different blind spots. Each sees some kinds of forgery and misses others, so "
    "they may disagree.",
    "Only faces": "Bodies, backgrounds, captions and the context of a picture are not examined. A real photo can still "
    "mislead.",
}
NEXT_STEPS = (
    "Search for the picture by a reverse image search: older copies show what it looked like.",
    "Find the first publication: who showed it first, when, and with which words.",
    "Ask for the original file from the camera, and judge that: copies lose traces and Content Credentials.",
    "Get a second opinion: another program, and a person who knows the face or the place.",
)
"""What to do next, whatever the answer is."""
NEXT_BRIEFLY = "reverse image search, first publication, the original file, a second opinion"

_SHOWN_AS_THEY_ARE = "\n\t\u00ad\u200c\u200d"  # a soft hyphen and joiners shape words; they reorder nothing


def status(verdict: Verdict) -> str:
    """The key of WORDS."""
    return "none" if verdict.p_fake is None else verdict.label


def word(verdict: Verdict) -> str:
    """ "Likely fake", "Likely real", "No answer" or "Not assessed"."""
    return WORDS[status(verdict)]


def percent(p: float | None) -> str:
    """A probability for people; never rounded to certainty."""
    if p is None:
        return "no estimate"
    return "< 1 %" if p < 0.005 else "> 99 %" if p > 0.995 else f"{100 * p:.0f} %"


def counted(kinds: Iterable[str]) -> str:
    """How many files got which answer, by keys of WORDS: "12 likely fake, 3 no answer"."""
    n = Counter(kinds)
    return ", ".join(f"{n[kind]} {said.lower()}" for kind, said in WORDS.items() if n[kind])


def estimate(verdict: Verdict, model: Json) -> str:
    """P(fake) of a verdict for people; with a digit more near an end of the model's range without an answer, so that it
    does not seem to lie on the other side of it."""
    p = verdict.p_fake
    if p is None or not 0.005 <= p <= 0.995 or percent(p) not in map(percent, model.get("band") or ()):
        return percent(p)
    return bound(p)


def bound(p: float) -> str:
    """An end of the range without an answer, for people."""
    return f"{100 * p:.1f}".removesuffix(".0") + " %"


def in_words(verdict: Verdict, model: Json) -> str:
    """The answer in a line: "Likely fake (changed in part), 93 % chance of a fake"."""
    kind = KINDS_SAID.get(verdict.kind or "") if verdict.label == "fake" else None
    return word(verdict) + (f" ({kind})" if kind else "") + p_words(verdict, model)


def p_words(verdict: Verdict, model: Json) -> str:
    """ ", 93 % chance of a fake"; "" where there is no estimate."""
    return "" if verdict.p_fake is None else f", {estimate(verdict, model)} chance of a fake"


def band(model: Json) -> Sequence[float] | None:
    """The estimates between which a model gives no answer; None where it has no such range, or hardly one."""
    bounds: Sequence[float] | None = model.get("band")
    return bounds if bounds and percent(bounds[0]) != percent(bounds[1]) else None


def reason(report: Report, face: FaceReport | None = None) -> str | None:
    """Why there is no answer about a face, or else about the file, and what may give one, in plain sentences; None
    where there is an answer."""
    verdict = face.verdict if face else report.verdict
    if verdict.label != "inconclusive" and verdict.p_fake is not None:
        return None
    stated = verdict.reason or "unstated"
    if stated == "in_band":
        bounds = band(report.model)
        if report.model.get("band") and not bounds:  # of a calibration on too few pictures; no other copy helps
            turns = "lies where this model's calibration turns from real to fake, so no answer is given."
            return f"The estimate, {estimate(verdict, report.model)}, {turns}"
        between = f" between {bound(bounds[0])} and {bound(bounds[1])}," if bounds else ""
        why = f"The estimate, {estimate(verdict, report.model)}, lies{between} where errors are too frequent to answer."
        return f"{why} {_would_help(report, face or report.decider)}".rstrip()
    return REASONS.get(stated, f"No answer is given; the stated reason is: {stated}.")


def _would_help(report: Report, face: FaceReport | None) -> str:
    """What may give an answer about a face in the band, by what the report holds of its size and the file's."""
    if face is None:
        return ""
    width, media = f"face is {round(face.box[2])} pixels wide", report.media
    pixels = (media.get("width") or 0) * (media.get("height") or 0)
    losses = media.get("format") == "JPEG" and media.get("bytes", pixels) < STRONGLY_COMPRESSED * pixels
    if face.box[2] < SMALL_FACE:
        return f"The {width}{' and the file strongly compressed' * losses}: a larger original may give an answer."
    if losses:
        return "The file is strongly compressed: an original with fewer losses may give an answer."
    other = "clip" if media.get("kind") == "video" else "picture"
    return f"The {width}, so a larger copy is unlikely to help. Another {other} of the same moment may give an answer."


def decided_by(model: Json) -> str:
    """Who decides the verdicts of a model: "the tower and clip-probe experts", all that have a weight of their own."""
    return _together(_deciders(model, None))


def _deciders(model: Json, kind: str | None) -> list[str]:
    """The experts and the MLLM that have a weight in the verdict, or in the probability of one kind of fake, in the
    order of the report."""
    if model.get("mode") == "paper":
        return [MLLM]
    order = [*(model.get("experts") or {})]
    weighed = {name for name, weight in (model.get("weights") or {}).items() if weight}
    weighed &= set((model.get("counts_for") or {}).get(kind, weighed))
    return sorted(weighed, key=lambda name: (name == MLLM, order.index(name) if name in order else len(order)))


def _together(names: Sequence[str]) -> str:
    experts = [name for name in names if name != MLLM]
    said = [f"the {listed(experts)} expert{'s' * (len(experts) > 1)}"] * bool(experts)
    return " and ".join(said + ["the language model"] * (MLLM in names)) or "the models"


def meaning(report: Report, face: FaceReport | None = None) -> str:
    """What the answer about a face, or else about the file, says, in plain sentences; who says so, and who does not."""
    if (why := reason(report, face)) is not None:
        return why
    verdict, one = (face.verdict, face) if face else (report.verdict, report.decider)
    fake, alone = verdict.label == "fake", face is not None or len(report.faces) == 1
    scores = {e.expert: e.score for e in (face.evidence if face else report.evidence) if e.score is not None}
    if one is not None and one.p_fake_mllm is not None:
        scores[MLLM] = one.p_fake_mllm
    deciders = _deciders(report.model, verdict.kind if fake else None)
    names = [name for name in deciders if name in scores] or deciders
    against = [name for name in names if name in scores and (scores[name] < 0.5) == fake]
    agree = [name for name in names if name not in against]
    who = _together(agree or names)
    who = f"{who[0].upper()}{who[1:]}" if agree or len(names) < 2 else f"Together, {who}"
    if fake:
        subject = "this face" if alone else "the most suspicious face"
        medium = "frame" if report.media.get("kind") == "video" else "photo"
        takes = {
            "whole": "one that a generator made as a whole",
            "part": f"one that was changed in its {medium}: swapped, moved or edited",
        }.get(verdict.kind or "", "a forgery")
        said = f"{who} take{'s' * (len(agree or names) == 1)} {subject} for {takes}."
    else:
        found = "no sign" if alone else "no clear sign"
        said = f"{who} found {found} of a known kind of forgery."
    if against and agree:
        share = listed([percent(scores[name]) for name in against])
        other = _together(against)
        itself = "itself says" if len(against) == 1 else "themselves say"
        said += f" {other[0].upper()}{other[1:]} {itself} {share}."
    if fake:
        return said
    unknown = "This does not show that the picture is authentic: a forgery of an unknown kind can look like this."
    return " ".join([said, *(_missed(report) if face is None else []), unknown])


def _missed(report: Report) -> list[str]:
    """How many forgeries look as real as this file, by the validation run."""
    ratio = report.likelihood_ratio.get("value")
    if ratio is None:
        return []
    share = percent(ratio / (1 + ratio))
    return [
        f"In the validation run, {share} of the pictures with such a score were forged, where forged and real pictures "
        "count the same."
    ]


def decoding(report: Report) -> str:
    """What decoding changed or missed, "interlaced frames deinterlaced; ..."; a code without words as it is."""

    def words(code: str) -> str:
        matches = ((re.fullmatch(pattern, code, re.DOTALL), said) for pattern, said in DECODED.items())
        return next((match.expand(said) for match, said in matches if match), code)

    return "; ".join(words(str(code)) for code in report.media.get("notes") or ())


def remarks(report: Report) -> list[str]:
    """What follows the meaning of a report's answer, a line each: a clip's frames, and a statement that opposes it."""
    return [line for line in (clip(report), reconciled(report)) if line]


def clip(report: Report) -> str | None:
    """How many frames of a clip were looked at, how many of them look fake, and when; None for a picture.

    "32 frames looked at, 9 look fake, between 1.2 s and 3.4 s."
    """
    if report.media.get("kind") != "video":
        return None
    worst: dict[int | None, FaceReport] = {}
    for face in report.faces:
        worst[face.frame] = max(worst.get(face.frame, face), face, key=FaceReport.suspicion)
    n = max(len(report.media.get("frames") or ()), len(worst))
    fake = [f for f in worst.values() if f.verdict.label == "fake"]
    said = f"{n} frame{'' if n == 1 else 's'} looked at"
    said += f" ({n - len(worst)} without a face)" if n > len(worst) else ""
    if report.verdict.p_fake is None:
        return f"{said}."
    said += f", {len(fake) or 'none'} look{'s' if len(fake) < 2 else ''} fake"
    if times := [face.time_s for face in fake if face.time_s is not None]:
        first, last = f"{min(times):.1f} s", f"{max(times):.1f} s"
        said += f", at {first}" if first == last else f", between {first} and {last}"
    return f"{said}: too few to call the clip fake." if fake and report.verdict.label != "fake" else f"{said}."


def reconciled(report: Report) -> str | None:
    """A line where the file states another origin than its picture shows; None where they agree or one is silent."""
    verdict, made = report.verdict, bool(of_generator(report.provenance))
    edited = any(s.get("kind") == PARTLY for s in report.provenance.get("statements") or ())
    if verdict.label == "real" and (made or edited):
        did, other = ("made", "") if made else ("edited", ", or what it edited is no face")
        return (
            f"The file says that a generator {did} it, and the faces alone look real: either the statement was added, "
            f"or the generator left nothing in them that {decided_by(report.model)} can see{other}."
        )
    if verdict.label == "fake" and verdict.kind == "part" and made:
        return (
            "The file says that a generator made it, and the face looks changed in part: both point to a fake; how "
            "it was made is less certain."
        )
    if verdict.label == "fake" and of_camera(report.provenance) and not made and not edited:
        return (
            "The file says that a camera took it, and the faces alone look fake: either the statement was added or "
            "outlasted a later change of the photo, or the estimate is wrong."
        )
    return None


def number(face: FaceReport, report: Report) -> int:
    """A face's number among those of its picture or frame, from 1."""
    return 1 + sum(other.frame == face.frame and other.index < face.index for other in report.faces)


def place(face: FaceReport, report: Report) -> str:
    """Where a face stands among several of a picture, "second from the left"; "" for a single one and in a clip."""
    n = len(report.faces)
    if n < 2 or face.frame is not None:
        return ""
    ordered = sorted(report.faces, key=lambda one: one.box[0] + one.box[2] / 2)
    left = ordered.index(face)
    for a, b in pairwise(ordered):  # one above the other: neither is further left
        if face in (a, b) and b.box[0] + b.box[2] / 2 - a.box[0] - a.box[2] / 2 < face.box[2] / 2:
            return ""
    side, rank = ("left", left) if left < n / 2 else ("right", n - 1 - left)
    if n == 2 * left + 1:
        return "in the middle"
    return f"{ORDINALS[rank]} from the {side}" if rank else f"on the {'far ' * (n > 2)}{side}"


def leaning(face: FaceReport) -> str:
    """A sentence, with a space before it, where a text argues for one side although there is no answer; else ""."""
    from x2dfd.explain import read_cues, said_labels

    if face.verdict.label != "inconclusive" or not (read_cues(face.rationale) or said_labels(face.rationale)):
        return ""
    return f" This text argues only for the likelier side ({face.verdict.side}); no answer was given."


def disagreement(evidence: Sequence[Evidence]) -> tuple[Evidence, Evidence] | None:
    """The experts that lie furthest apart, lower first, where one leans to real and the other to fake."""
    spoke = [(e.score, e) for e in evidence if e.score is not None]
    if not spoke:
        return None
    (least, low), (most, high) = min(spoke, key=itemgetter(0)), max(spoke, key=itemgetter(0))
    return (low, high) if least <= AGREES_BELOW and most >= AGREES_ABOVE else None


def summary(report: Report) -> str:
    """A report in a few lines, as `str(report)` gives it."""
    lines = [f"{report.path or '(no path)'}: {in_words(report.verdict, report.model)}"]
    lines += [meaning(report), *remarks(report)]
    if report.rationale and report.verdict.p_fake is not None:  # else it says again why nothing was assessed
        decider = report.decider
        lines.append(f"Explanation: {report.rationale}{leaning(decider) if decider else ''}")
    if report.cues:
        lines.append("Cues: " + ", ".join(f"{c.area} · {c.artifact}" for c in report.cues))
    lines.append(f"Next: {NEXT_BRIEFLY}.")
    return "\n".join(shown(line) for line in lines)


def shown(text: str) -> str:
    """The text with control and direction characters spelled out: a file's name must not turn what is around it."""
    return "".join(
        c
        if c in _SHOWN_AS_THEY_ARE or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp")
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )
