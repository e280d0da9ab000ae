"""The rationale that a person reads: the language model's text, without sentences that contradict the report.

In the calibrated mode no text names a sign of forgery on a photo that is not called fake, none names a single area of
a face that is called generated as a whole or a sign of the whole image where a part is called changed, and none goes
against the verdict or its kind. Sentences that name no sign, or name the experts (`x2dfd.prompts.expert_sentence`),
are left out, too. Sentences written from the report replace them, and add further signs that an expert is sure of, up
to three in all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from x2dfd import prompts
from x2dfd.answer import disagreement, leaning, percent
from x2dfd.explain import mended, read_cues, said_kind, said_labels
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence, FaceReport, Report, Verdict

MAX_CUES = 3  # cues in a text; nobody checks more
MIN_FIRST = 0.5  # probability from which an expert's cue is named
MIN_FURTHER = 0.8  # the same for cues after the first: half of those from 0.65 on are wrong (LOG.md)
_CLAUSES = {
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
_OPENINGS = {"whole": "The face looks generated as a whole", "part": "A part of the photo looks changed"}
_CLOSINGS = ("This ", "That ", "An untouched ", "A camera ", "A generator ", "A face swap ", "Face reenactment ",
             "Face editing ", "Entire face synthesis ")  # fmt: skip
"""Beginnings of most sentences that close training answers; none names a sign (data_gen/words/grammar.json)."""
Sign = tuple[str, str]  # area, artifact
_LABEL = re.compile(rf"\b(?:{'|'.join(AREAS)}) (?:{'|'.join(ARTIFACTS)}): ", re.IGNORECASE)


def _search_sentence(evidence: Sequence[Evidence]) -> str:
    """A sentence on what the experts searched for: both kinds of fakes, where one of them tells them apart."""
    tells_kinds = any(e.kinds for e in evidence)
    traces = "traces of image generators and, area by area, for changes" if tells_kinds else "traces of a change"
    return f"The face was checked for {traces}."


def area_name(area: str) -> str:
    """ "the jaw", "the face contour", "the whole image"."""
    return f"the {area.replace('-', ' ')}"


def cue_clause(cue: Cue) -> str:
    """A cue as one would see it, without capital or full stop; `read_cues` reads the cue back from it."""
    return _CLAUSES[cue.artifact].format(a=area_name(cue.area))


def readable(text: str, verdict: Verdict, evidence: Sequence[Evidence], pointed_only: bool = False) -> str:
    """The text about a face for people, made from the language model's; `evidence`: of the experts with a weight.

    `pointed_only`: of the signs that the language model names, those alone stay that an expert points at."""
    if verdict.label == "inconclusive":
        return undecided(verdict, evidence)
    if verdict.label == "real":
        return f"{_search_sentence(evidence)} None were found."
    cue_sentences = _cue_sentences(text, verdict, signs_to_name(verdict, evidence) if pointed_only else None)
    if not cue_sentences:
        return called_fake(verdict, evidence)
    text = " ".join([f"{_opening(verdict)}.", *cue_sentences])
    named = _signs_of(text)
    cues = _nameable_cues(verdict, evidence, MIN_FURTHER)
    further = [c for c in cues if (c.area, c.artifact) not in named][: max(MAX_CUES - len(named), 0)]
    return f"{text} {_sentence(further)}" if further else text


def signs_to_name(verdict: Verdict, evidence: Sequence[Evidence]) -> frozenset[Sign]:
    """The signs that an expert points at and a text may name of a face that is called fake."""
    return frozenset((c.area, c.artifact) for e in evidence for c in e.cues if not _of_other_kind([c], verdict))


def says_all(text: str, verdict: Verdict, signs: frozenset[Sign]) -> bool:
    """Whether an unfinished text can stop: a sentence has ended and every sign is named, or one is named and a closing
    sentence begins. `readable` would leave out the rest; a sign after a closing sentence, as no training answer has
    one, is given up."""
    named = _signs_of(" ".join(_cue_sentences(text, verdict, signs)))
    if text.endswith((".", "!", "?")):
        return named >= signs
    return bool(named) and f"{sentences_of(text)[-1]} ".startswith(_CLOSINGS)


def _cue_sentences(text: str, verdict: Verdict, signs: frozenset[Sign] | None) -> list[str]:
    """The sentences of a language model's text that name a sign and may stay; only those on `signs`, if given."""
    sentences = sentences_of(mended(prompts.without_experts(text)))
    kept = [_without_label(s) for s in sentences if read_cues(s) and not against(s, verdict)]
    return _each_once([s for s in kept if signs is None or _signs_of(s) <= signs])


def _signs_of(text: str) -> set[Sign]:
    return {(c.area, c.artifact) for c in read_cues(text)}


def _each_once(sentences: Sequence[str]) -> list[str]:
    """The sentences that name a sign which none before them names. Each ends; the last of a cut-off text does not."""
    named: set[Sign] = set()
    kept = []
    for sentence in sentences:
        if not _signs_of(sentence) <= named:
            kept.append(sentence if sentence.endswith((".", "!", "?")) else sentence.rstrip(" ,:;") + ".")
        named |= _signs_of(sentence)
    return kept


def sentences_of(text: str) -> list[str]:
    """The sentences of a text as they are written, each with its punctuation."""
    return re.findall(r"\S[^.!?\n]*(?:[.!?]+|$)", text)


def _without_label(sentence: str) -> str:
    """The sentence without the cue's name in front, where the rest says the same."""
    rest = _LABEL.sub("", sentence)
    return rest[:1].upper() + rest[1:] if _signs_of(rest) == _signs_of(sentence) else sentence


def _opening(verdict: Verdict) -> str:
    return _OPENINGS.get(verdict.kind or "", "The face looks forged")


def against(sentence: str, verdict: Verdict) -> bool:
    """Whether a sentence contradicts a verdict: names a sign on a face not called fake, or the other label or kind."""
    labels, kind, cues = said_labels(sentence), said_kind(sentence), read_cues(sentence)
    if verdict.label != "fake":
        return bool(cues) or "fake" in labels or (verdict.label == "inconclusive" and "real" in labels)
    other_kind = verdict.kind is not None and kind not in (None, verdict.kind)
    return "real" in labels or other_kind or _of_other_kind(cues, verdict)


def _of_other_kind(cues: Sequence[Cue], verdict: Verdict) -> bool:
    """Whether cues name an area of a face that is called generated as a whole, or the whole image where a part is
    called changed.

    Areas named there were wrong: "fine detail is missing in the teeth" of a closed mouth (LOG.md).
    """
    whole = [c.area == "whole-image" for c in cues]
    return (verdict.kind == "whole" and not all(whole)) or (verdict.kind == "part" and any(whole))


def _nameable_cues(verdict: Verdict, evidence: Sequence[Evidence], least: float) -> list[Cue]:
    """The cues of at least that probability that a text may name of a face that is called fake, the surest first."""
    candidates = [c for e in evidence for c in e.cues if not _of_other_kind([c], verdict)]
    cues: dict[tuple[str, str], Cue] = {}
    for cue in sorted(candidates, key=_sureness, reverse=True):
        cues.setdefault((cue.area, cue.artifact), cue)
    return [c for c in cues.values() if _sureness(c) >= least]


def _sureness(cue: Cue) -> float:
    return 1.0 if cue.score is None else cue.score


def _sentence(cues: Sequence[Cue]) -> str:
    """Cues in one sentence, from which `read_cues` reads them back."""
    clause = prompts.listed([cue_clause(c) for c in cues], ", and ")
    return f"{clause[0].upper()}{clause[1:]}."


def called_fake(verdict: Verdict, evidence: Sequence[Evidence]) -> str:
    """A text on why a face is called fake, from the experts' cues."""
    if cues := _nameable_cues(verdict, evidence, MIN_FIRST):
        further = [c for c in cues[1:] if _sureness(c) >= MIN_FURTHER]
        return f"{_opening(verdict)}. {_sentence([cues[0], *further][:MAX_CUES])}"
    if verdict.kind == "whole":
        return f"{_opening(verdict)}. Such traces lie all over a face and are seldom seen by eye, so no area is named."
    if (expert := next((e.expert for e in evidence if map_points([e])), None)) is not None:
        place = f"the map of the {expert} expert marks a place"
        return f"{_opening(verdict)}. No sign is clear enough to be named; {place}."
    return f"{_opening(verdict)}, although no single area stands out."


def map_points(evidence: Sequence[Evidence]) -> bool:
    """Whether an expert's map marks a place that was likelier changed than not."""
    return any(value >= 0.5 for e in evidence for row in e.map for value in row)


def origin(face: FaceReport, report: Report) -> str:
    """Who wrote the rationale about a face; "" where nothing was estimated."""
    verdict = face.verdict
    if verdict.p_fake is None:
        return ""
    if report.model.get("mode") == "paper":
        return f"Written by the language model after the answer was scored. It may be wrong in detail.{leaning(face)}"
    counted = [e for e in face.evidence if e.expert not in report.uncounted]
    # Without a sign it is no sentence of the language model's: `readable` keeps none of these.
    if verdict.label != "fake" or not read_cues(face.rationale) or face.rationale == called_fake(verdict, counted):
        said = "what the experts found" if verdict.label == "fake" else "what was looked at"
        return f"A fixed text: it says {said}.{leaning(face)}"
    return (
        "Written by the language model after the answer was scored, then corrected and completed by what the experts "
        "found. It may be wrong in detail."
    )


def undecided(verdict: Verdict, evidence: Sequence[Evidence]) -> str:
    """A text on what was searched for, and that it decided nothing; no sign is named."""
    if verdict.reason == "not_a_photograph":
        return "This looks like a drawing, a painting or a render and no photo, so it was not judged."
    text = f"{_search_sentence(evidence)} What was found is not clear enough for an answer."
    if (extremes := disagreement(evidence)) is None:
        return text
    low, high = extremes
    return f"{text} The experts disagree: {low.expert} says {percent(low.score)}, {high.expert} {percent(high.score)}."
