"""How an answer is put to a person: one set of words for the command line, the page, the app and Python.

Machine words (`fake`, `in_band`, `whole` ...) stay in the JSON; what people read is made here and nowhere else.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from x2dfd.prompts import AGREES_ABOVE, AGREES_BELOW
from x2dfd.types import Evidence, FaceReport, Report, Verdict

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
    "no_face": "No face was found, so nothing was assessed. This says nothing about whether the picture is real.",
    "in_band": "The estimate lies in the range in which the models are wrong too often to give an answer.",
    "not_a_photograph": "This looks like a drawing, a painting or a render. Forgery detection applies to photos only.",
}

NOT_PROOF = "This is a statistical estimate, not proof: do not accuse a person or clear a picture on it alone."
LIMITS = {
    "The estimate": "A probability fitted on pictures with known answers, forged and real taken as equally likely "
    "beforehand. It holds for pictures like those; for other cameras, other kinds of forgery or heavy compression it "
    "can be off in either direction.",
    "The likelihood ratio": "How many times as frequent such a score is among the forged as among the real pictures of "
    "one named run. It says nothing of how likely a forgery was before the picture was looked at, and it is bounded by "
    "what a run of that size can support.",
    "No answer": "The models are wrong too often at such scores. It means neither slightly fake nor slightly real.",
    "The explanation": "Text from a language model that was told the answer and the experts' scores, without the "
    "sentences that go against them. Look at the named areas yourself.",
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


def in_words(verdict: Verdict) -> str:
    """The answer in a line: "Likely fake (changed in part), 93 %"."""
    kind = KINDS_SAID.get(verdict.kind or "") if verdict.label == "fake" else None
    return word(verdict) + (f" ({kind})" if kind else "") + p_words(verdict)


def p_words(verdict: Verdict) -> str:
    """ ", 93 %"; "" where there is no estimate."""
    return "" if verdict.p_fake is None else f", {percent(verdict.p_fake)}"


def reason(verdict: Verdict) -> str | None:
    """Why there is no answer, in one or two plain sentences; None where there is one."""
    if verdict.label != "inconclusive" and verdict.p_fake is not None:
        return None
    stated = verdict.reason or "unstated"
    return REASONS.get(stated, f"No answer is given; the stated reason is: {stated}.")


def meaning(verdict: Verdict, faces: int = 1) -> str:
    """What an answer about a file with that many faces says, in plain sentences."""
    if (why := reason(verdict)) is not None:
        return why
    if verdict.label == "fake":
        subject = "this face" if faces == 1 else "the most suspicious face"
        kinds = {
            "whole": f"To the models, {subject} looks made as a whole by a generator and not taken by a camera.",
            "part": f"To the models, {subject} comes from a photo that was changed in part: swapped, moved or edited.",
        }
        other = f"To the models, {subject} looks more like the forged faces they know than like real ones."
        return kinds.get(verdict.kind or "", other)
    found = "no sign" if faces == 1 else "in no face a sign"
    return (
        f"The models found {found} of the forgeries they know. "
        "That does not show the picture is authentic: a forgery of an unknown kind can look like this."
    )


def stance(verdict: Verdict, rationale: str) -> str:
    """What a rationale argues for: the answer, or, where there is none, only the likelier side or no side at all."""
    from x2dfd.explain import read_cues, said_labels

    if verdict.label != "inconclusive":
        return f"argues for the answer: {word(verdict).lower()}"
    if read_cues(rationale) or said_labels(rationale):
        return f"argues only for the likelier side ({verdict.side}); no answer was given"
    return "argues for no side; no answer was given"


def origin(verdict: Verdict, rationale: str, calibrated: bool) -> str:
    """Who wrote a rationale, or for what it argues where there is no answer; "" where nothing was estimated."""
    if verdict.p_fake is None:
        return ""
    if verdict.label == "inconclusive":
        return f"This text {stance(verdict, rationale)}."
    if verdict.label == "real" and calibrated:
        return "A fixed text: it says what was looked at."
    mended = ", and corrected where it contradicted the report" if calibrated else ""
    return f"Written by the language model after the answer was scored{mended}. It may be wrong in detail."


def disagreement(
    evidence: Sequence[Evidence], uncounted: frozenset[str] = frozenset()
) -> tuple[Evidence, Evidence] | None:
    """The experts with a weight that lie furthest apart, lower first, where one leans to real and the other to fake."""
    spoke = [e for e in evidence if e.score is not None and e.expert not in uncounted]
    low = min(spoke, key=lambda e: e.score or 0.0, default=None)
    high = max(spoke, key=lambda e: e.score or 0.0, default=None)
    if low is None or high is None or (low.score or 0.0) > AGREES_BELOW or (high.score or 0.0) < AGREES_ABOVE:
        return None
    return low, high


def summary(report: Report) -> str:
    """A report in a few lines, as `str(report)` gives it."""
    lines = [f"{report.path or '(no path)'}: {in_words(report.verdict)}", meaning(report.verdict, len(report.faces))]
    if report.rationale and report.verdict.p_fake is not None:  # else it says again why nothing was assessed
        decider: FaceReport | None = report.decider
        lines.append(f"Rationale ({stance(decider.verdict if decider else report.verdict, report.rationale)}):")
        lines.append(report.rationale)
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
