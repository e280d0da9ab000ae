"""Follow-up questions: recognises their topic, and answers from the report where its facts suffice.

A small language model garbles numbers, so it is asked only about what it sees. The embedded one answers "This points
to manipulation." to a greeting and praises a jaw that was changed, so it is not asked at all (LOG.md). Questions that
nobody here can answer are answered so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches

from x2dfd.answer import (
    KINDS_SAID,
    NEXT_STEPS,
    NOT_PROOF,
    band,
    bound,
    estimate,
    in_words,
    leaning,
    meaning,
    percent,
    reason,
)
from x2dfd.explain import named_areas
from x2dfd.fetch import BASE_NAME
from x2dfd.texts import against, area_name, cue_clause, sentences_of
from x2dfd.types import FaceReport, Report

NO_FACE = "No face was assessed in this file, so nothing can be said about a forgery."
REFUSED = "The language model's answer went against the report, so it is not shown."
HELP = (
    "I can answer from the report only: why, which area, how sure, which expert said what, what to do next, whether to "
    "publish it, whether a filter or compression can be the cause. You can also ask about an area, such as the eyes."
)
_KEYWORDS = (
    "what", "which", "where", "why", "how", "sure", "certain", "explain", "area", "should", "real", "fake", "deepfake",
    "forged", "filter", "publish", "percent", "expert", "trust", "next", "reason", "eyes", "mouth", "teeth", "nose",
)  # fmt: skip
_UNCORRECTED = ("here", "were", "there", "realm")  # words of their own, though near to a keyword

_LANGUAGES = (
    r"german|deutsch|french|fran[cç]ais|spanish|espa[nñ]ol|italian|italiano|portuguese|portugu[eê]s|dutch|polish|"
    r"russian|ukrainian|turkish|arabic|chinese|mandarin|japanese|korean|hindi|swedish|czech|greek|hebrew"
)
_FOREIGN = re.compile(
    r"[\u0370-\u1fff\u3040-\u9fff\uac00-\ud7af]|"
    r"\b(?:warum|wieso|das (?:ist|bild|foto|gesicht)|ist (?:das|es|dies)|wie (?:sicher|ist)|wer ist|echt|bitte|"
    r"was soll|pourquoi|c'est|est[- ]ce|qui est|vraie?|ce visage|puis-je|"
    r"por qu[eé]|es (?:real|falso|verdad)|qui[eé]n|esta|puedo|questa|perch[eé]|[eè] (?:vero|falso)|posso|"
    r"porqu[eê]|waarom|dlaczego|czy|neden)\b",
    re.IGNORECASE,
)


def intent(question: str) -> str | None:
    """The topic of a question, a key of `_ANSWERS`; None for any other."""
    if _FOREIGN.search(question):
        return "language"
    corrected = spelt(question)
    return next((name for name, pattern in _INTENTS if pattern.search(corrected)), None)


def from_report(report: Report, face: FaceReport | None, question: str) -> str | None:
    """The answer from the report's facts about a face; None where only a look at the picture could help."""
    topic = intent(question)
    if face is None:
        return _next_steps(report, face) if topic in ("do", "publish") else NO_FACE
    embedded = report.model.get("base", {}).get("name") == BASE_NAME
    areas = named_areas(spelt(question))
    if areas and topic in (None, "where", "why", "verdict"):
        if (text := _about_areas(report, face, areas)) or embedded:
            return text or _nothing_at(face, areas)
        if topic == "where":
            return None
    if topic is None and any(re.search(rf"\b{re.escape(e.expert)}\b", question, re.IGNORECASE) for e in face.evidence):
        topic = "experts"
    return _ANSWERS[topic](report, face) if topic else HELP if embedded else None


def spelt(question: str) -> str:
    """The question in lower case, its misspelt keywords corrected.

    >>> spelt("Wich aera? Expalin!")
    'which area? explain!'
    """

    def corrected(match: re.Match[str]) -> str:
        word = match[0]
        if word in _UNCORRECTED:
            return word
        anagrams = [keyword for keyword in _KEYWORDS if keyword[0] == word[0] and sorted(keyword) == sorted(word)]
        return next(iter(anagrams or get_close_matches(word, _KEYWORDS, 1, 0.88)), word)

    return re.sub(r"[a-z]{3,}", corrected, question.lower())


def checked(text: str, face: FaceReport) -> str:
    """The language model's answer, without the sentences that go against the face's verdict."""
    sentences = sentences_of(text)
    valid = [s for s in sentences if not against(s, face.verdict)]
    return " ".join(valid) if valid else REFUSED if sentences else "The language model has no answer to this."


def _about_areas(report: Report, face: FaceReport, areas: list[str]) -> str | None:
    """A sentence with the signs at these areas of a face that is called fake; None where nothing names any there."""
    if face.verdict.label != "fake":
        return None
    if cues := [c for c in face.cues if c.area in areas]:
        return "The report names there: " + "; ".join(cue_clause(c) for c in cues) + "."
    if face.verdict.kind == "whole":  # areas that experts name there were wrong
        return None
    expert_cues = [(e.expert, c) for e in face.evidence if e.expert not in report.uncounted for c in e.cues]
    clauses = [f"{cue_clause(c)} (says the {expert} expert)" for expert, c in expert_cues if c.area in areas]
    return f"The explanation does not name it, but {'; '.join(clauses)}." if clauses else None


def _nothing_at(face: FaceReport, areas: list[str]) -> str:
    names = " and ".join(area_name(a) for a in areas)
    if face.verdict.label == "inconclusive":
        return f"Nothing is said about {names}, as there is no answer about this face."
    return f"The report names no sign at {names}. That does not show that nothing was changed there."


def _why(report: Report, face: FaceReport) -> str:
    if face.verdict.p_fake is None:
        return reason(report, face) or ""
    clearest = max(
        (e for e in face.evidence if e.score is not None and e.expert not in report.uncounted),
        key=lambda e: abs((e.score or 0.0) - 0.5),
        default=None,
    )
    texts = [face.rationale or f"{in_words(face.verdict, report.model)}: the report holds no explanation."]
    if face.verdict.label == "inconclusive":
        texts.insert(0, reason(report, face) or "")
        texts.append(leaning(face).strip())
    if clearest is not None:
        texts.append(f"Of the experts that count, the clearest is {clearest.expert}, with {percent(clearest.score)}.")
    return " ".join(filter(None, texts))


def _where(report: Report, face: FaceReport) -> str:
    expert = next((e.expert for e in face.evidence if e.map), None)
    on_map = f" The map of the {expert} expert, on the picture, shows where it suspects a change." if expert else ""
    if face.verdict.label != "fake":
        return "No area: the face is not called fake, so none is pointed at." + (
            " What the map shows is a hint at most." if expert else ""
        )
    if face.verdict.kind == "whole":
        return "No single area: the face looks made as a whole, so its traces can lie anywhere in it."
    if not face.cues:
        return "No single area: the report names none." + on_map
    areas = list(dict.fromkeys(area_name(c.area) for c in face.cues))
    return f"The report points at {', '.join(areas)}: " + "; ".join(cue_clause(c) for c in face.cues) + "." + on_map


def how_sure(report: Report, face: FaceReport) -> str:
    """The report's own numbers in plain words."""
    verdict, bounds = face.verdict, band(report.model)
    if verdict.p_fake is None:
        return f"There is no estimate. {reason(report, face)}"
    calibrated = "calibrated" if report.model.get("mode") != "paper" else "uncalibrated"
    sentences = [f"The {calibrated} estimate that this face is forged is {estimate(verdict, report.model)}."]
    if (no_answer := reason(report, face)) is not None:
        sentences = [no_answer]
    elif bounds:
        low, high = bound(bounds[0]), bound(bounds[1])
        sentences.append(f"Below {low} the answer is real, from {high} on it is fake; in between no answer is given.")
    if face.p_fake_mllm is not None:
        sentences.append(f"The language model alone says {percent(face.p_fake_mllm)}.")
    sentences.append("The estimate holds for pictures like those the models were tested on, and is not proof.")
    return " ".join(sentences)


def who_said(report: Report, face: FaceReport) -> str:
    """Each expert's score, a line each."""
    if not face.evidence:
        return "No expert was asked about this face."
    lines = [
        f"- {e.expert}: "
        + (f"no score ({e.note or 'no reason was given'})" if e.score is None else percent(e.score))
        + (" (no weight of its own in the verdict)" if e.expert in report.uncounted else "")
        for e in face.evidence
    ]
    mllm_line = "" if face.p_fake_mllm is None else f"\n- the language model itself: {percent(face.p_fake_mllm)}"
    return "Each expert's own probability that this face is forged:\n" + "\n".join(lines) + mllm_line


def _technique(report: Report, face: FaceReport) -> str:
    if face.verdict.label != "fake":
        return "None is named: the face is not called fake."
    kinds = next((e.kinds for e in face.evidence if e.kinds and e.expert not in report.uncounted), {})
    shares = ", ".join(f"{KINDS_SAID[k]} {percent(p)}" for k, p in kinds.items() if k in KINDS_SAID)
    kind = KINDS_SAID.get(face.verdict.kind or "")
    sentence = f"It looks {kind}" + (f" (by the expert that tells the kinds apart: {shares})." if shares else ".")
    return (sentence if kind else "The report does not say how it was made.") + (
        " Which program or which person made it cannot be told from the picture."
    )


def _other_cause(report: Report, face: FaceReport) -> str:
    if face.verdict.label == "fake" and face.verdict.kind != "whole":
        text = "Yes, that is possible: beauty filters and retouching change a photo in part, and the models do not "
        text += "tell them apart from a forgery meant to deceive."
    elif face.verdict.label == "fake":
        text = "A filter or compression seldom makes a face look generated as a whole, but it is not excluded."
    else:
        text = "Compression, scans, screenshots and small copies wipe out traces, so a forgery can pass unseen in them."
    return text + " Judge the original file: if the answer changes, the copy's history was the cause."


def _next_steps(report: Report, face: FaceReport | None) -> str:
    return "What to do next:\n" + "\n".join(f"- {step}" for step in NEXT_STEPS)


def _publish(report: Report, face: FaceReport | None) -> str:
    steps = _next_steps(report, face)
    return f"Not on this alone, neither the picture as true nor the claim that it is fake. {NOT_PROOF}\n{steps}"


def _verdict(report: Report, face: FaceReport) -> str:
    return f"{in_words(face.verdict, report.model)}. {meaning(report, face)}"


def _fixed(text: str) -> Callable[[Report, FaceReport], str]:
    return lambda report, face: text


def _language(report: Report, face: FaceReport) -> str:
    proof = "" if face.verdict.p_fake is None else f" {NOT_PROOF}"
    return f"I can answer in English only. To translate: {in_words(face.verdict, report.model)}.{proof}"


_ANSWERS: dict[str, Callable[[Report, FaceReport], str]] = {
    "language": _language,
    "who": _fixed("I cannot say: people are not identified here. A reverse image search may lead to a caption."),
    "person": _fixed("I cannot say: age, origin, feelings and character are not judged here, only signs of forgery."),
    "taken": _fixed(
        "The picture does not show that. What the file states about its origin is in the report; anyone can write such "
        "a statement."
    ),
    "publish": _publish,
    "wrong": _fixed(
        "It is an estimate and can be wrong. Judge the original file from the camera: if the answer changes, what the "
        "copy went through was the cause."
    ),
    "do": _next_steps,
    "cause": _other_cause,
    "sure": how_sure,
    "experts": who_said,
    "technique": _technique,
    "where": _where,
    "why": _why,
    "verdict": _verdict,
}
_INTENTS = tuple(
    (name, re.compile(rf"\b(?:{'|'.join(patterns)})"))
    for name, patterns in {
        "language": (rf"(?:in|into|speak|to) (?:{_LANGUAGES})\b", "translat", r"(?:other|another|my) language\b"),
        "sure": (
            r"how (?:\w+ ){0,4}(?:sure|certain|confident|likely|reliable|accurate)", "probabilit", "percent",
            "confiden", "certain", r"what does .*\d",
            r"are you sure\b", r"could (?:it|you|this) be wrong\b", r"trust (?:you|this|the)\b",
        ),
        "experts": (r"(?:experts?|detectors?|scores?|blind spots?)\b",),
        "technique": (
            r"wh(?:ich|at) (?:technique|kind|sort|type|tool|program|software|app|ai|generator|model|method)\b",
            r"how was (?:it|this|that|he|she) (?:made|done|faked|forged|edited|changed|generated)\b",
            r"what was (?:done|changed|edited)\b", r"who (?:made|faked|forged|created|did)\b", r"face ?swap\b",
            r"(?:midjourney|stable diffusion|dall-?e|gan)\b",
        ),
        "who": (
            r"who(?:'s| is| are| was)\b", r"whose\b", r"name of\b", r"recogni[sz]e\b", r"identify\b",
            r"is (?:this|that|it) (?:mr|mrs|ms|president|senator)\b",
        ),
        "person": (
            r"how old (?:is|are|was)\b", r"(?:his|her|their) age\b", "ethnic", r"race\b", "nationalit",
            r"(?:he|she|they) feels?\b",
            r"in love\b", r"(?:beautiful|attractive|handsome|honest|lying)\b",
        ),
        "taken": (
            r"(?:when|where) (?:was|is|were) (?:it|this|that|the \w+) (?:taken|shot|made|from)\b", r"which camera\b",
            r"(?:taken|shot) (?:in|on|at|before|after)\b",
            r"metadata\b", r"exif\b", r"c2pa\b", r"content credentials\b",
        ),
        "wrong": (
            r"(?:you are|you're|that is|that's|this is|it is|it's) (?:wrong|incorrect|a mistake|not true|mistaken)\b",
            r"my own (?:photo|picture|selfie|face|camera)\b", r"i (?:took|shot|made) (?:it|this)\b(?! from)",
        ),
        "publish": (
            "publish", r"print (?:it|this)\b", r"(?:post|share|accuse|sue|court|police)\b",
            r"as (?:a )?(?:proof|evidence)\b",
        ),
        "do": (
            r"what (?:should|can|do|must|shall|could) (?:i|we|one)\b", r"what (?:now|next)\b", r"next steps?\b", "scam",
            r"how (?:can|do|could|should) (?:i|we) (?:check|verify|find out|confirm|know|test)\b",
        ),
        "cause": (
            r"filters?\b", r"make-?up\b", "compress", r"jpe?g\b", r"whatsapp\b", "scan", "blurr?y", "retouch",
            "old (?:photo|picture|image|camera)", r"(?:is|was) old\b", r"(?:from|in) (?:the )?(?:1[89]|20)\d\ds?\b",
            r"low (?:quality|resolution)\b", "screenshot", "resiz", "photoshop",
            r"beauty\b", r"black and white\b", r"small (?:photo|picture|image|copy)\b",
        ),
        "where": (r"(?:which|what) (?:area|part|place|region|spot)", r"where\b", r"show me\b"),
        "why": (
            r"why\b", r"what makes you\b", r"reasons?\b", r"explain\b", r"how (?:do|can|did) you (?:know|tell)\b",
            "what (?:did|do|can) you (?:see|look|find)", "tell me (?:more|about)", r"convince\b",
            r"(?:proof|evidence)\b",
        ),
        "verdict": (
            r"(?:real|fake|genuine|authentic|forged|deep-?fake|manipulated|generated|true|verdict|answer)\b",
        ),
    }.items()
)  # fmt: skip
"""In the order in which they are tried."""
