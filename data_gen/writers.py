"""The grammar that writes training explanations: what stands after "This image is fake." or "This image is real."

A small language model learns these sentences, so they are short and plain, and every clause about a cue begins with the
two words by which a question calls it ("mouth blur: the mouth is smudged"): such a model copies a word sooner than its
meaning (LOG.md). Whatever is written here, `x2dfd.explain.read_cues` reads back as exactly the cues that were given:
nothing is claimed beyond them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from x2dfd.types import DF_CLASSES, Cue

Rng = np.random.Generator

MAX_CUES = 3
FAINT_BELOW, CLEAR_FROM = 0.35, 0.7
"""Below the first, a cue is called faint; from the second on, clear; in between, visible."""

# How an area is called, and whether the name is a plural. The area's own word is always part of it.
_AREA_NAMES: dict[str, tuple[tuple[str, bool], ...]] = {
    "forehead": (("the forehead", False), ("the whole forehead", False), ("the skin of the forehead", False)),
    "eyebrows": (("the eyebrows", True), ("both eyebrows", True), ("the line of the eyebrows", False)),
    "eyes": (("the eyes", True), ("the area of the eyes", False), ("the region around the eyes", False)),
    "nose": (("the nose", False), ("the area of the nose", False), ("the nose region", False)),
    "mouth": (("the mouth", False), ("the area of the mouth", False), ("the mouth region", False)),
    "teeth": (("the teeth", True), ("the row of teeth", False), ("the area of the teeth", False)),
    "cheeks": (("the cheeks", True), ("the area of the cheeks", False), ("the skin of the cheeks", False)),
    "jaw": (("the jaw", False), ("the line of the jaw", False), ("the jaw region", False)),
    "ears": (("the ears", True), ("the area of the ears", False), ("the region around the ears", False)),
    "hair": (("the hair", False), ("the area of the hair", False), ("the hair region", False)),
    "skin": (("the skin", False), ("the facial skin", False), ("the skin of the face", False)),
    "face-contour": (("the face contour", False), ("the contour of the face", False), ("the face contour line", False)),
    "neck": (("the neck", False), ("the skin of the neck", False), ("the neck region", False)),
    "background": (("the background", False), ("the area of the background", False), ("the background region", False)),
    "accessories": (("the accessories", True), ("the worn accessories", True), ("the area of the accessories", False)),
    "whole-image": (("the whole image", False), ("the image as a whole", False), ("the whole of the image", False)),
}

_VERBS = {"is": "are", "has": "have", "looks": "look", "shows": "show", "keeps": "keep", "sits": "sit"}

# Adjectives and adverbs of strength: faint, visible, clear, and for a cue that nobody measured.
_DEGREES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("faint", "slight", "subtle"), ("slightly", "faintly", "subtly")),
    (("visible", "noticeable"), ("visibly", "noticeably")),
    (("clear", "obvious", "strong"), ("clearly", "obviously", "markedly")),
    (("",), ("",)),
)

# What one would see. {a} is the area, {an} the article with an adjective of strength, {adj} that adjective alone, {adv}
# the adverb; verbs in braces agree with the area.
_SEEN: dict[str, tuple[str, ...]] = {
    "texture": (
        "{a} {looks} {adv} too smooth", "{a} {has} {an} plastic texture", "the texture of {a} is {adv} unnatural",
        "{a} {looks} {adv} waxy", "{a} {looks} {adv} airbrushed", "{a} {has} {an} patchy texture",
    ),
    "lighting": (
        "the light on {a} is {adv} inconsistent with the rest", "{a} {is} {adv} lit from another side than the rest",
        "{a} {shows} {an} mismatch in lighting", "the shading of {a} is {adv} wrong", "the light on {a} is {adv} odd",
        "the shading of {a} {adv} disagrees with the rest",
    ),
    "blending": (
        "{an} seam runs along {a}", "{a} {shows} {an} seam", "{an} boundary runs along {a}",
        "{a} {looks} {adv} pasted in",
        "{a} {shows} {adj} blending marks", "there is {an} join line at {a}", "{an} blending seam lies at {a}",
    ),
    "blur": (
        "{a} {is} {adv} blurred", "{a} {looks} {adv} softer than the rest", "{an} blur lies over {a}",
        "{a} {is} {adv} out of focus", "{a} {looks} {adv} smudged", "{a} {is} {adv} less sharp than the rest",
    ),
    "colour": (
        "the colour of {a} is {adv} mismatched with the rest", "{a} {has} {an} colour cast",
        "{a} {shows} {an} colour shift",
        "the tone of {a} is {adv} different from the rest", "{a} {is} {adv} off in colour",
        "{a} {looks} {adv} discoloured",
    ),
    "asymmetry": (
        "{a} {is} {adv} asymmetric", "the two sides of {a} are {adv} different", "{a} {shows} {an} asymmetry",
        "{a} {looks} {adv} lopsided", "the left and right of {a} are {adv} mismatched", "{an} asymmetry shows in {a}",
    ),
    "geometry": (
        "{a} {is} {adv} warped", "{a} {looks} {adv} out of proportion", "the shape of {a} is {adv} distorted",
        "{a} {is} {adv} misshapen", "{a} {shows} {an} distortion", "the shape of {a} is {adv} wrong",
    ),
    "missing-detail": (
        "fine detail is {adv} missing in {a}", "{a} {shows} {an} loss of detail", "{a} {looks} {adv} melted",
        "{a} {is} {adv} poorly defined", "small detail in {a} is {adv} wiped away", "{a} {looks} {adv} featureless",
    ),
    "expression": (
        "the expression of {a} is {adv} unnatural", "{a} {looks} {adv} frozen", "{a} {looks} {adv} stiff",
        "{a} {looks} {adv} wrong for the expression", "{a} {has} {an} odd expression",
        "the expression of {a} is {adv} off",
    ),
    "noise": (
        "{a} {is} {adv} noisy", "{an} grain lies over {a}", "the grain of {a} {adv} differs from the rest",
        "{a} {shows} {adj} noise", "{an} layer of noise covers {a}", "{a} {looks} {adv} grainy",
    ),
    "frequency": (
        "{an} repeating grid lies over {a}", "{an} checkerboard pattern covers {a}",
        "{a} {shows} {an} periodic pattern",
        "{a} {shows} {adj} traces of upsampling", "{an} regular pattern runs through {a}", "{a} {shows} {an} fine grid",
    ),
    "compression": (
        "{a} {is} {adv} blocky", "{a} {shows} {adj} compression", "{adj} square blocks show in {a}",
        "{a} {looks} {adv} more compressed than the rest", "{a} {shows} {adj} block artifacts",
        "{adj} compression marks {a}",
    ),
}  # fmt: skip

# What is seen at one area only.
_SEEN_AT: dict[tuple[str, str], tuple[str, ...]] = {
    ("teeth", "missing-detail"): ("the teeth {adv} run together without gaps", "single teeth are {adv} indistinct"),
    ("eyes", "missing-detail"): (
        "the lashes and pupils of the eyes look {adv} melted", "lashes of the eyes are {adv} missing",
    ),
    ("eyes", "asymmetry"): (
        "the two eyes are {adv} different in size", "one of the eyes is {adv} larger than the other",
    ),
    ("eyebrows", "asymmetry"): ("the two eyebrows are {adv} different in size",),
    ("eyebrows", "missing-detail"): ("the strokes of the eyebrows are {adv} wiped away",),
    ("mouth", "missing-detail"): (
        "the lip lines of the mouth look {adv} melted", "the lips of the mouth are {adv} poorly defined",
    ),
    ("mouth", "expression"): (
        "the corners of the mouth look {adv} wrong for the expression",
        "the expression of the lips and mouth is {adv} stiff",
    ),
    ("nose", "missing-detail"): ("the nostrils of the nose are {adv} poorly defined",),
    ("skin", "texture"): ("the skin looks {adv} too smooth and poreless", "the skin texture is {adv} unnatural"),
    ("skin", "colour"): (
        "the skin tone of the face is {adv} mismatched", "the skin tone is {adv} mismatched with the rest",
    ),
    ("forehead", "colour"): ("the skin tone of the forehead is {adv} mismatched with the rest",),
    ("neck", "colour"): ("the skin tone of the neck is {adv} mismatched with the rest",),
    ("jaw", "blending"): ("{an} seam follows the line of the jaw", "{an} soft seam runs along the jaw"),
    ("face-contour", "blending"): ("{an} seam follows the face contour", "the face contour looks {adv} cut out"),
    ("whole-image", "frequency"): ("{an} fine repeating grid lies over the whole image",),
}  # fmt: skip

_WHOLE_FACE = (
    "the face as a whole looks generated, and the whole image has {an} plastic texture",
    "the face as a whole looks synthetic, and the texture of the whole image is {adv} unnatural",
    "the whole image looks generated, with {an} plastic texture",
    "the face as a whole looks generated, and the whole image is {adv} too smooth",
)
_NOWHERE = (
    "The face looks manipulated, although no single area stands out.",
    "The picture looks manipulated, but no single area gives it away.",
    "No single area stands out, yet the face as a whole looks manipulated.",
)
_NOWHERE_EFS = (
    "The face as a whole looks generated, although no single area stands out.",
    "The face as a whole looks synthetic, but no single area gives it away.",
    "No single area stands out, yet the face as a whole looks generated.",
    "All of this face seems to come from a generator rather than from a camera.",
    "It looks like the output of an image generator, the whole of it.",
    "This looks like a face that no camera ever took.",
    "Nothing here was pasted in: the whole face looks made by a generator.",
)

_OPENINGS = ("", "", "", "", "on a close look, ", "most telling, ")
_JOINS = ("; ", "; ", ". ", ". Also, ")

_MEANS: dict[str, tuple[str, ...]] = {
    "texture": ("A filter or a generator seems to have worked there.",),
    "lighting": ("Two sources seem to have been mixed.",),
    "blending": ("Two layers seem to meet there.", "Something seems to have been put on top."),
    "blur": ("A patch of another quality seems to have been put in.",),
    "colour": ("Two sources seem to have been mixed.",),
    "asymmetry": ("One side seems to have been changed by hand.",),
    "geometry": ("The pixels there seem to have been moved.",),
    "missing-detail": ("Something seems to have been painted over there.",),
    "expression": ("The muscles there seem to have been moved afterwards.",),
    "noise": ("That part seems to come from another source.",),
    "frequency": ("A generator often leaves such a trace.",),
    "compression": ("That part seems to come from another file.",),
}
_CLOSINGS = (
    "This points to manipulation.", "This is a sign of manipulation.", "An untouched photo does not look like this.",
    "This suggests that it was manipulated.", "That is typical of manipulated pictures.",
    "That speaks for manipulation.",
    "A camera alone does not produce this.",
)  # fmt: skip
_CLASS_CLOSINGS = {
    "FS": ("This fits a face swap.", "A face swap leaves such traces."),
    "FR": ("This fits face reenactment.", "Face reenactment leaves such traces."),
    "FE": ("This fits face editing.", "Face editing leaves such traces."),
    "EFS": ("This fits an entirely synthetic face.", "Entire face synthesis leaves such traces."),
}

# Of a real picture: what was looked at, and that it is in order. Only areas that nearly every portrait shows.
_REAL_AREAS = ("forehead", "eyebrows", "eyes", "nose", "mouth", "cheeks", "jaw", "skin", "face-contour", "background")
# By the artifact that each line denies.
_IN_ORDER: dict[str, tuple[str, ...]] = {
    "texture": (
        "the texture of {a} runs on without a break", "{a} {keeps} a natural texture", "the texture of {a} is natural",
    ),
    "blending": ("no seam runs along {a}", "{a} {shows} no boundary or seam", "{a} {is} free of blending marks"),
    "colour": (
        "the colour of {a} is consistent with the rest", "{a} {has} the same tone as the rest",
        "{a} {shows} no colour shift",
    ),
    "lighting": ("the light on {a} is consistent with the rest", "light and shadow fall naturally on {a}"),
    "blur": ("{a} {is} not blurred against the rest", "{a} {shows} no local blur"),
    "geometry": (
        "{a} {is} neither warped nor stretched", "{a} {sits} in natural proportion", "the shape of {a} is natural",
    ),
    "missing-detail": ("{a} {keeps} natural fine detail", "{a} {shows} no lost detail"),
    "noise": ("{a} {has} the same grain as the rest", "{a} {shows} no added noise"),
    "frequency": ("no grid or block pattern lies over {a}", "{a} {shows} no repeating pattern"),
    "compression": ("no grid or block pattern lies over {a}", "{a} {shows} no odd compression"),
    "asymmetry": ("both sides of {a} agree",),
    "expression": ("the expression of {a} is natural",),
}  # fmt: skip
_DENIES = re.compile(r"\b(?:no|not|neither|free of)\b")
_ALL_IN_ORDER = tuple(
    line
    for artifact, lines in _IN_ORDER.items()
    if artifact not in ("asymmetry", "expression")
    for line in lines
    if not _DENIES.search(line)
)
"""What can be said of any area, and names no sign of forgery: "no seam" tells a reader nothing of a random area."""

_REAL_CLOSINGS = (
    "", "Nothing points to manipulation.", "No sign of manipulation is visible.", "There is no trace of editing.",
    "All of it is consistent.", "It looks like an untouched photo.", "Nothing looks generated.",
)  # fmt: skip

_CLASS_ANSWERS: dict[str, tuple[str, ...]] = {
    "FS": ("This is a face swap.", "The face was swapped: this is a face swap.", "It shows a face swap."),
    "FR": ("This is face reenactment.", "The face was moved: this is face reenactment.", "It shows face reenactment."),
    "FE": ("This is face editing.", "Parts of the face were changed: this is face editing.", "It shows face editing."),
    "EFS": (
        "This is entire face synthesis.", "The face was generated: this is entire face synthesis.",
        "It shows entire face synthesis.",
    ),
    "real": ("There is no manipulation.", "This face shows no manipulation.", "No manipulation: the photo is real."),
}  # fmt: skip


def write_explanation(label: str, cues: Sequence[Cue], df_class: str, rng: Rng, pointed: Sequence[Cue] = ()) -> str:
    """An explanation of about 12 to 40 words; the same generator state gives the same text.

    Fake: the `MAX_CUES` strongest cues, strongest first, one clause each, with words of strength from `cue.score`.
    Real: one to three areas that are in order; takes no cues. What experts point at, wrongly then (`pointed`), is
    denied first. Raises ValueError where label, class and cues disagree.
    """
    if label not in ("fake", "real") or df_class not in DF_CLASSES or (label == "real") != (df_class == "real"):
        raise ValueError(f"label {label!r} and class {df_class!r} do not agree")
    if label == "real":
        if cues:
            raise ValueError("a real picture has no cues")
        return _write_real(rng, pointed)
    distinct = {(c.area, c.artifact): c for c in sorted(cues, key=lambda c: c.score or 0.0)}
    chosen = sorted(distinct.values(), key=lambda c: -(c.score or 0.0))[:MAX_CUES]
    if not chosen:
        return _tidy([_pick(rng, _NOWHERE_EFS if df_class == "EFS" else _NOWHERE), _pick(rng, _CLOSINGS)])
    text = _pick(rng, _OPENINGS)
    for i, cue in enumerate(chosen):
        text += (_pick(rng, _JOINS) if i else "") + _describe(cue, df_class, rng)
    closing = ""
    if len(chosen) < MAX_CUES:
        pools = [_CLOSINGS, _CLOSINGS, _CLASS_CLOSINGS[df_class]]
        if len(chosen) == 1:
            pools.append(_MEANS[chosen[0].artifact])
        closing = _pick(rng, pools[int(rng.integers(len(pools)))])
    return _tidy([text + ".", closing])


def class_answer(df_class: str, rng: Rng) -> str:
    """A sentence that names the class of manipulation (DF-C). Raises ValueError for an unknown class."""
    if df_class not in _CLASS_ANSWERS:
        raise ValueError(f"unknown class {df_class!r} (known: {', '.join(DF_CLASSES)})")
    return _pick(rng, _CLASS_ANSWERS[df_class])


# What users may ask instead of the one question, and what "yes" would mean.
_DECISION_QUESTIONS = (
    "Is this face fake?", "Is this a deepfake?", "Has someone tampered with this face?",
    "Does this face come from a generator or an editing tool?", "Is this photo forged?", "Was this face altered?",
    "Is this face real?", "Is this a genuine photo?", "Is this picture untouched?",
    "Did a camera take this face as it is?", "Can I believe this photo?", "Is everything in this photo authentic?",
)  # fmt: skip
_CLASS_CHOICES = {
    "FS": "face swap", "FR": "face reenactment", "FE": "face editing", "EFS": "entire face synthesis",
    "real": "no manipulation",
}  # fmt: skip
_KIND_QUESTIONS: dict[str, tuple[str, ...]] = {
    "FS": ("Was this face swapped for another?", "Is this a face swap?"),
    "FE": ("Was a part of this face edited?", "Is this face editing?"),
    "EFS": ("Is this face generated as a whole?", "Is this entire face synthesis?"),
    "real": ("Is this face free of any manipulation?", "Is this an unmanipulated face?"),
}


def decision_question(rng: Rng) -> str:
    """A question about real or fake in a user's words; half of them ask for real, half for fake."""
    return _pick(rng, _DECISION_QUESTIONS)


def class_choices(rng: Rng) -> str:
    """A sentence that offers the classes in random order, or "" as often."""
    names = [str(n) for n in rng.permutation(list(_CLASS_CHOICES.values()))]
    return "" if rng.random() < 0.5 else f" Choose one of: {', '.join(names)}."


def kind_question(df_class: str, rng: Rng) -> tuple[str, bool]:
    """A yes/no question about the class of manipulation, and its answer; as often yes as no."""
    others = [kind for kind in _KIND_QUESTIONS if kind != df_class]
    yes = bool(df_class in _KIND_QUESTIONS and rng.random() < 0.5)
    return _pick(rng, _KIND_QUESTIONS[df_class if yes else _pick(rng, others)]), yes


_AREA_QUESTIONS = (
    "What about {a}?", "Is something wrong with {a}?", "Look at {a} again. What do you see?",
    "Do you see a trace at {a}?", "And {a}?", "How {is} {a}?",
)  # fmt: skip
_WHY_QUESTIONS = (
    "Why do you think so?", "Why?", "What makes you say that?", "Explain it to my editor", "What did you look at?",
    "Where should I look?",
)  # fmt: skip
_CLASS_QUESTIONS = ("Which technique?", "What kind of manipulation is it?", "How was it made?", "What was done to it?")
_SAME_PLACE = ({"skin", "forehead"}, {"skin", "cheeks"}, {"skin", "nose"}, {"skin", "jaw", "face-contour"})
"""Areas that lie over one another: who says that one is in order speaks of the other too."""

_FINE = ("Nothing stands out there: {line}.", "I see no trace there: {line}.", "That looks fine: {line}.")


def write_follow_up(
    label: str, cues: Sequence[Cue], df_class: str, rng: Rng, touched: Sequence[str] = ()
) -> tuple[str, str]:
    """A question that a user may ask after the verdict, and an answer that the truth bears out (free conversation).

    About one area, the reasons, or the technique. A fake without known cues is never asked about an area: nobody knows.
    `touched`: areas that were changed although no cue names them; they are not said to be in order.
    """
    kind = rng.random()
    if kind < 0.2:
        return _pick(rng, _CLASS_QUESTIONS), class_answer(df_class, rng)
    if kind < 0.45 or (label == "fake" and not cues):
        return _pick(rng, _WHY_QUESTIONS), write_explanation(label, cues, df_class, rng)
    named = sorted({c.area for c in cues})
    changed = {*named, *touched}
    near = {other for group in _SAME_PLACE if changed & group for other in group}
    others = [a for a in _REAL_AREAS if a not in changed | near and "whole-image" not in changed]
    area = _pick(rng, named) if named and (not others or rng.random() < 0.6) else _pick(rng, others)
    name, plural = _AREA_NAMES[area][0]
    question = _fill(_pick(rng, _AREA_QUESTIONS), name, plural)
    found = sorted((c for c in cues if c.area == area), key=lambda c: -(c.score or 0.0))[:2]
    if found:
        return question, _tidy([". ".join(_describe(c, df_class, rng) for c in found) + "."])
    return question, _tidy([_pick(rng, _FINE).format(line=_fill(_pick(rng, _ALL_IN_ORDER), name, plural))])


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of words (Li et al. 2016, arXiv 1510.03055); 0 if there are none."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    split = [text.lower().split() for text in texts]
    grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _pick(rng: Rng, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _degree(score: float | None) -> int:
    if score is None:
        return 3
    return 0 if score < FAINT_BELOW else 1 if score < CLEAR_FROM else 2


def _describe(cue: Cue, df_class: str, rng: Rng) -> str:
    """One clause about the cue, without capital or full stop: what a question calls it, then what one would see."""
    templates = _SEEN[cue.artifact]
    special = _SEEN_AT.get((cue.area, cue.artifact), ())
    if df_class == "EFS" and (cue.area, cue.artifact) == ("whole-image", "texture"):
        templates = _WHOLE_FACE
    elif special and rng.random() < 0.4:
        templates = special
    if cue.area == "whole-image":
        templates = tuple(t for t in templates if "the rest" not in t)  # there is no rest
    adjectives, adverbs = _DEGREES[_degree(cue.score)]
    adjective = _pick(rng, adjectives)
    names = _AREA_NAMES[cue.area]
    name, plural = names[0] if rng.random() < 0.6 else names[int(rng.integers(len(names)))]
    seen = _fill(_pick(rng, templates), name, plural, adj=adjective, an=f"a {adjective}", adv=_pick(rng, adverbs))
    return f"{cue.area} {cue.artifact}: {seen}"


def _fill(template: str, name: str, plural: bool, **words: str) -> str:
    verbs = {one: many if plural else one for one, many in _VERBS.items()}
    return template.format(a=name, **verbs, **words)


def _write_real(rng: Rng, pointed: Sequence[Cue] = ()) -> str:
    if pointed:
        return _tidy([_pick(rng, _JOINS[:3]).join(_deny(c, rng) for c in pointed) + ".", _pick(rng, _REAL_CLOSINGS)])
    count = int(rng.integers(1, 4))
    areas = [str(a) for a in rng.choice(_REAL_AREAS, size=count, replace=False)]
    groups = [areas[:1], areas[1:] or areas]  # two things are said even of a single area
    lines = rng.choice(_ALL_IN_ORDER, size=2, replace=False)
    parts = []
    for group, line in zip(groups, lines, strict=True):
        plural = len(group) > 1 or _AREA_NAMES[group[0]][0][1]
        parts.append(_fill(str(line), " and ".join(_AREA_NAMES[a][0][0] for a in group), plural))
    return _tidy([_pick(rng, (". ", ", and ", "; ")).join(parts) + ".", _pick(rng, _REAL_CLOSINGS)])


def _deny(cue: Cue, rng: Rng) -> str:
    """One clause that finds no such cue, without capital or full stop."""
    lines = _IN_ORDER[cue.artifact]
    if cue.area == "whole-image":
        lines = tuple(line for line in lines if "the rest" not in line)
    name, plural = _AREA_NAMES[cue.area][0]
    return _fill(_pick(rng, lines), name, plural)


def _tidy(sentences: Sequence[str]) -> str:
    """Joined, with single spaces, "an" before a vowel, and capitals where sentences begin."""
    words = " ".join(sentences).split()
    for i, word in enumerate(words):
        if word.lower() == "a" and i + 1 < len(words) and words[i + 1][0] in "aeiou":
            word = "an"
        words[i] = word[0].upper() + word[1:] if i == 0 or words[i - 1][-1] == "." else word
    return " ".join(words)
