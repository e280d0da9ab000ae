"""The grammar that writes training explanations, which follow "This image is fake." or "This image is real."

A small language model learns these sentences, so they are short and plain, and every clause about a cue begins with the
two words by which a question calls it ("mouth blur: the mouth is smudged"): such a model copies a word sooner than its
meaning (LOG.md). From every explanation `x2dfd.explain.read_cues` reads back exactly the cues that were given:
nothing is claimed beyond them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from x2dfd.types import DF_CLASSES, Cue

Rng = np.random.Generator

MAX_CUES = 3
FAINT_BELOW, CLEAR_FROM = 0.35, 0.7
"""A cue with a score below the first is called faint, from the second on clear, and between them visible."""

_WORDS = json.loads((Path(__file__).parent / "words" / "grammar.json").read_text("utf-8"))
"""Words and sentences by their use.

`areas`: names of an area, its own word included, each with a mark for plurals. `degrees`: adjectives and adverbs of
strength for faint, visible, clear and unmeasured cues. `seen`, `seen_at`: descriptions of an artifact, anywhere or at
one area. `in_order`: statements about real pictures, by the artifact that they deny.
{a} is the area, {an} the article with an adjective of strength, {adj} that adjective alone, {adv} the adverb; verbs in
braces agree with the area.
"""
_VERBS = {"is": "are", "has": "have", "looks": "look", "shows": "show", "keeps": "keep", "sits": "sit"}

# Areas that nearly every portrait shows.
_REAL_AREAS = ("forehead", "eyebrows", "eyes", "nose", "mouth", "cheeks", "jaw", "skin", "face-contour", "background")
_DENIES = re.compile(r"\b(?:no|not|neither|free of)\b")
_ALL_IN_ORDER = tuple(
    line
    for artifact, lines in _WORDS["in_order"].items()
    if artifact not in ("asymmetry", "expression")
    for line in lines
    if not _DENIES.search(line)
)
"""Lines that fit any area and name no sign of forgery: "no seam" tells a reader nothing about a random area."""


def write_explanation(label: str, cues: Sequence[Cue], df_class: str, rng: Rng, pointed: Sequence[Cue] = ()) -> str:
    """An explanation of about 12 to 40 words; the same generator state gives the same text.

    Fake: the `MAX_CUES` strongest cues, strongest first, one clause each, with words of strength from `cue.score`.
    Real: one to three areas that are in order; takes no cues. Cues that experts wrongly point at (`pointed`) are denied
    instead. Raises ValueError where label, class and cues disagree.
    """
    if label not in ("fake", "real") or df_class not in DF_CLASSES or (label == "real") != (df_class == "real"):
        raise ValueError(f"the label {label!r} contradicts the class {df_class!r}")
    if label == "real":
        if cues:
            raise ValueError("a real picture has no cues")
        return _write_real(rng, pointed)
    distinct = {(c.area, c.artifact): c for c in sorted(cues, key=lambda c: c.score or 0.0)}
    chosen = sorted(distinct.values(), key=lambda c: -(c.score or 0.0))[:MAX_CUES]
    if not chosen:
        return _tidy([_one(rng, "nowhere_efs" if df_class == "EFS" else "nowhere"), _one(rng, "closings")])
    text = _one(rng, "openings")
    for i, cue in enumerate(chosen):
        text += (_one(rng, "joins") if i else "") + _describe(cue, df_class, rng)
    closing = ""
    if len(chosen) < MAX_CUES:
        pools = [_WORDS["closings"], _WORDS["closings"], _WORDS["class_closings"][df_class]]
        if len(chosen) == 1:
            pools.append(_WORDS["means"][chosen[0].artifact])
        closing = _pick(rng, pools[int(rng.integers(len(pools)))])
    return _tidy([text + ".", closing])


def class_answer(df_class: str, rng: Rng) -> str:
    """A sentence that names the class of manipulation (DF-C). Raises ValueError for an unknown class."""
    if df_class not in DF_CLASSES:
        raise ValueError(f"unknown class {df_class!r} (known: {', '.join(DF_CLASSES)})")
    return _pick(rng, _WORDS["class_answers"][df_class])


def decision_question(rng: Rng) -> str:
    """A question about real or fake in a user's words; half of them ask for real, half for fake."""
    return _one(rng, "decision_questions")


def class_choices(rng: Rng) -> str:
    """A sentence that offers the classes in random order or, in half of the cases, ""."""
    names = [str(n) for n in rng.permutation(list(_WORDS["class_choices"].values()))]
    return "" if rng.random() < 0.5 else f" Choose one of: {', '.join(names)}."


def kind_question(df_class: str, rng: Rng) -> tuple[str, bool]:
    """A yes/no question about the class of manipulation, and its answer, which is yes in half of the cases."""
    others = [kind for kind in _WORDS["kind_questions"] if kind != df_class]
    yes = bool(df_class in _WORDS["kind_questions"] and rng.random() < 0.5)
    return _pick(rng, _WORDS["kind_questions"][df_class if yes else _pick(rng, others)]), yes


_SAME_PLACE = ({"skin", "forehead"}, {"skin", "cheeks"}, {"skin", "nose"}, {"skin", "jaw", "face-contour"})
"""Areas that overlap: a statement that one is in order is about the other too."""


def write_follow_up(
    label: str, cues: Sequence[Cue], df_class: str, rng: Rng, touched: Sequence[str] = ()
) -> tuple[str, str]:
    """A question that a user may ask after the verdict, and an answer that the truth supports (free conversation).

    It is about one area, the reasons, or the technique, and never about an area of a fake without known cues, as nobody
    knows the answer. `touched` areas were changed although no cue names them; they are not called in order.
    """
    kind = rng.random()
    if kind < 0.2:
        return _one(rng, "class_questions"), class_answer(df_class, rng)
    if kind < 0.45 or (label == "fake" and not cues):
        return _one(rng, "why_questions"), write_explanation(label, cues, df_class, rng)
    cue_areas = sorted({c.area for c in cues})
    changed_areas = {*cue_areas, *touched}
    neighbours = {other for group in _SAME_PLACE if changed_areas & group for other in group}
    others = [a for a in _REAL_AREAS if a not in changed_areas | neighbours and "whole-image" not in changed_areas]
    area = _pick(rng, cue_areas) if cue_areas and (not others or rng.random() < 0.6) else _pick(rng, others)
    name, plural = _WORDS["areas"][area][0]
    question = _fill(_one(rng, "area_questions"), name, plural)
    area_cues = sorted((c for c in cues if c.area == area), key=lambda c: -(c.score or 0.0))[:2]
    if area_cues:
        return question, _tidy([". ".join(_describe(c, df_class, rng) for c in area_cues) + "."])
    return question, _tidy([_one(rng, "fine").format(line=_fill(_pick(rng, _ALL_IN_ORDER), name, plural))])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of words (Li et al. 2016, arXiv 1510.03055); 0 if there are none."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    split = [text.lower().split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _pick(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _one(rng: Rng, use: str) -> str:
    return _pick(rng, _WORDS[use])


def _degree(score: float | None) -> int:
    if score is None:
        return 3
    return 0 if score < FAINT_BELOW else 1 if score < CLEAR_FROM else 2


def _describe(cue: Cue, df_class: str, rng: Rng) -> str:
    """One clause about the cue, without capital or full stop: its words in a question, then a description."""
    templates = _WORDS["seen"][cue.artifact]
    special = _WORDS["seen_at"].get(cue.area, {}).get(cue.artifact, ())
    if df_class == "EFS" and (cue.area, cue.artifact) == ("whole-image", "texture"):
        templates = _WORDS["whole_face"]
    elif special and rng.random() < 0.4:
        templates = special
    if cue.area == "whole-image":
        templates = tuple(t for t in templates if "the rest" not in t)  # there is no rest
    adjectives, adverbs = _WORDS["degrees"][_degree(cue.score)]
    adjective = _pick(rng, adjectives)
    names = _WORDS["areas"][cue.area]
    name, plural = names[0] if rng.random() < 0.6 else names[int(rng.integers(len(names)))]
    clause = _fill(_pick(rng, templates), name, plural, adj=adjective, an=f"a {adjective}", adv=_pick(rng, adverbs))
    return f"{cue.area} {cue.artifact}: {clause}"


def _fill(template: str, name: str, plural: bool, **words: str) -> str:
    verbs = {one: many if plural else one for one, many in _VERBS.items()}
    return template.format(a=name, **verbs, **words)


def _write_real(rng: Rng, pointed: Sequence[Cue] = ()) -> str:
    if pointed:
        denied = _pick(rng, _WORDS["joins"][:3]).join(_deny(c, rng) for c in pointed)
        return _tidy([denied + ".", _one(rng, "real_closings")])
    count = int(rng.integers(1, 4))
    areas = [str(a) for a in rng.choice(_REAL_AREAS, size=count, replace=False)]
    groups = [areas[:1], areas[1:] or areas]  # two statements even about a single area
    lines = rng.choice(_ALL_IN_ORDER, size=2, replace=False)
    clauses = []
    for group, line in zip(groups, lines, strict=True):
        plural = len(group) > 1 or _WORDS["areas"][group[0]][0][1]
        clauses.append(_fill(str(line), " and ".join(_WORDS["areas"][a][0][0] for a in group), plural))
    return _tidy([_pick(rng, (". ", ", and ", "; ")).join(clauses) + ".", _one(rng, "real_closings")])


def _deny(cue: Cue, rng: Rng) -> str:
    """One clause that finds no such cue, without capital or full stop."""
    lines = _WORDS["in_order"][cue.artifact]
    if cue.area == "whole-image":
        lines = tuple(line for line in lines if "the rest" not in line)
    name, plural = _WORDS["areas"][cue.area][0]
    return _fill(_pick(rng, lines), name, plural)


def _tidy(sentences: Sequence[str]) -> str:
    """Joined, with single spaces, "an" before a vowel, and capitals where sentences begin."""
    words = " ".join(sentences).split()
    for i, word in enumerate(words):
        if word.lower() == "a" and i + 1 < len(words) and words[i + 1][0] in "aeiou":
            word = "an"
        words[i] = word[0].upper() + word[1:] if i == 0 or words[i - 1][-1] == "." else word
    return " ".join(words)
