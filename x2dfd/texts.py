"""The rationale that a person reads: what the language model wrote, less what the report's own facts refute.

In the calibrated mode no text names a sign of forgery on a photo that is not called fake, none names a single area of
a face that is called generated as a whole, and none goes against the verdict or its kind. Sentences that name no sign,
or the experts (`x2dfd.prompts.expert_sentence`), are left out, too. What is missing then is written here, from the
report: also further signs that an expert is sure of, up to three in all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from x2dfd import prompts
from x2dfd.answer import disagreement, percent
from x2dfd.explain import mended, read_cues, said_kind, said_labels
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence, Verdict

MAX_NAMED = 3  # cues in a text; more than that nobody checks
CUE_FROM = 0.5  # probability from which what an expert points at is named
FURTHER_FROM = 0.8  # the same, of signs beside the first: of those from 0.65, half are wrong (LOG.md)
_SEEN = {
    "texture": "the texture of {a} is unnatural",
    "lighting": "the light on {a} is odd",
    "blending": "a seam runs along {a}",
    "blur": "a blur lies over {a}",
    "colour": "the colour of {a} is odd",
    "asymmetry": "the two sides of {a} are different",
    "geometry": "the shape of {a} is distorted",
    "missing-detail": "fine detail is missing in {a}",
    "expression": "the expression of {a} is unnatural",
    "noise": "a layer of noise covers {a}",
    "frequency": "a regular pattern runs through {a}",
    "compression": "square blocks show in {a}",
}
_STARTS = {"whole": "The face looks generated as a whole", "part": "A part of the photo looks changed"}
_LABEL = re.compile(rf"\b(?:{'|'.join(AREAS)}) (?:{'|'.join(ARTIFACTS)}): ", re.IGNORECASE)


def looked_at(evidence: Sequence[Evidence], uncounted: frozenset[str]) -> str:
    """What the experts with a weight looked for: both kinds of fakes, where one of them tells the kinds apart."""
    both = any(e.kinds for e in evidence if e.expert not in uncounted)
    what = "traces of image generators and, area by area, for changes" if both else "traces of a change"
    return f"The face was checked for {what}."


def area_name(area: str) -> str:
    """ "the jaw", "the face contour", "the whole image"."""
    return f"the {area.replace('-', ' ')}"


def cue_clause(cue: Cue) -> str:
    """What one would see of a cue, without capital or full stop; `read_cues` reads the cue back from it."""
    return _SEEN[cue.artifact].format(a=area_name(cue.area))


def readable(text: str, verdict: Verdict, evidence: Sequence[Evidence], uncounted: frozenset[str]) -> str:
    """What people read of a face in place of the language model's `text`. `uncounted`: experts without a weight."""
    if verdict.label == "inconclusive":
        return undecided(verdict, evidence, uncounted)
    if verdict.label == "real":
        return f"{looked_at(evidence, uncounted)} None were found."
    sentences = re.findall(r"\S[^.!?\n]*(?:[.!?]+|$)", mended(prompts.closed(text, verdict.label, ())))
    seen = [_unlabelled(s) for s in sentences if read_cues(s) and not against(s, verdict)]
    if not seen:
        return called_fake(verdict, evidence, uncounted)
    text = " ".join([f"{_start(verdict)}.", *seen])
    named = [(c.area, c.artifact) for c in read_cues(text)]
    more = [c for c in pointed_at(verdict, evidence, uncounted, FURTHER_FROM) if (c.area, c.artifact) not in named]
    more = more[: max(MAX_NAMED - len(named), 0)]
    return f"{text} {_sentence(more)}" if more else text


def _unlabelled(sentence: str) -> str:
    """Without the cue's name in front, where the rest says the same: it would be read twice."""
    rest = _LABEL.sub("", sentence)
    same = {(c.area, c.artifact) for c in read_cues(rest)} == {(c.area, c.artifact) for c in read_cues(sentence)}
    return rest[:1].upper() + rest[1:] if same else sentence


def _start(verdict: Verdict) -> str:
    return _STARTS.get(verdict.kind or "", "The face looks forged")


def against(sentence: str, verdict: Verdict) -> bool:
    """Whether a sentence goes against an answer: names a sign on what is not called fake, the other label or kind."""
    said, kind, cues = said_labels(sentence), said_kind(sentence), read_cues(sentence)
    if verdict.label != "fake":
        return bool(cues) or "fake" in said or (verdict.label == "inconclusive" and "real" in said)
    return "real" in said or (verdict.kind is not None and kind not in (None, verdict.kind)) or _local(cues, verdict)


def _local(cues: Sequence[Cue], verdict: Verdict) -> bool:
    """Whether cues name an area of a face that is called generated as a whole: its traces lie all over it.

    Named there, areas were wrong: "fine detail is missing in the teeth" of a closed mouth (LOG.md).
    """
    return verdict.kind == "whole" and any(c.area != "whole-image" for c in cues)


def pointed_at(
    verdict: Verdict, evidence: Sequence[Evidence], uncounted: frozenset[str], least: float = CUE_FROM
) -> list[Cue]:
    """The cues that a text may name of a face that is called fake, the surest first: those that experts with a weight
    point at, with a probability of `least` or more."""
    counted = [c for e in evidence if e.expert not in uncounted for c in e.cues if not _local([c], verdict)]
    cues: dict[tuple[str, str], Cue] = {}
    for cue in sorted(counted, key=_sureness, reverse=True):
        cues.setdefault((cue.area, cue.artifact), cue)
    return [c for c in cues.values() if _sureness(c) >= least]


def _sureness(cue: Cue) -> float:
    return 1.0 if cue.score is None else cue.score


def _sentence(cues: Sequence[Cue]) -> str:
    """Cues in one sentence, from which `read_cues` reads them back."""
    *first, last = map(cue_clause, cues)
    said = f"{', '.join(first)}, and {last}" if first else last
    return f"{said[0].upper()}{said[1:]}."


def called_fake(verdict: Verdict, evidence: Sequence[Evidence], uncounted: frozenset[str] = frozenset()) -> str:
    """Why a face is called fake, from what the experts with a weight point at."""
    if cues := pointed_at(verdict, evidence, uncounted):
        further = [c for c in cues[1:] if _sureness(c) >= FURTHER_FROM]
        return f"{_start(verdict)}. {_sentence([cues[0], *further][:MAX_NAMED])}"
    if verdict.kind == "whole":
        return f"{_start(verdict)}. Such traces lie all over a face and are seldom seen by eye, so no area is named."
    return f"{_start(verdict)}, although no single area stands out."


def undecided(verdict: Verdict, evidence: Sequence[Evidence], uncounted: frozenset[str] = frozenset()) -> str:
    """What was looked at, and that nothing decided; no sign is named."""
    if verdict.reason == "not_a_photograph":
        return "This looks like a drawing, a painting or a render and no photo, so it was not judged."
    found = f"{looked_at(evidence, uncounted)} What was found is not clear enough for an answer."
    if (apart := disagreement(evidence, uncounted)) is None:
        return found
    low, high = apart
    return f"{found} The experts disagree: {low.expert} says {percent(low.score)}, {high.expert} {percent(high.score)}."
