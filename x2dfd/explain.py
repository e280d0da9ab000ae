"""Reads a rationale back into cues, and checks it against the verdict and the experts.

The lexicon is what a careful reader would accept as naming an area or an artifact, in our own explanations and in those
of other models. A clause gives cues only if it names both and does not deny them; what cannot be read is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from x2dfd.prompts import AGREES_ABOVE, AGREES_BELOW
from x2dfd.types import AREAS, ARTIFACTS, Cue, Evidence


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """`name: phrase, phrase` by line; `(a|b)` is a choice."""
    table: dict[str, tuple[str, ...]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, phrases = line.partition(": ")
        for phrase in phrases.split(", "):
            parts = [p.split("|") for p in re.split(r"[()]", phrase)]
            table[name] = (*table.get(name, ()), *("".join(choice) for choice in product(*parts)))
    return table


# In phrases, a space also reads a hyphen, `*` any ending, and the last word its plural; "colour" also reads "color".
AREA_WORDS = _table("""
    forehead: forehead
    eyebrows: eyebrow, brow
    eyes: eye, pupil, iris, irises, eyelid, eyelash, lash, gaze, sclera, eyeball
    nose: nose, nostril, nasal
    mouth: mouth, lip, smile
    teeth: teeth, tooth, dental, incisor
    cheeks: cheek, cheekbone
    jaw: jaw, jawline, jaw line, chin
    ears: ear, earlobe
    hair: hair, hairline, beard, moustache, mustache
    skin: skin, complexion
    face-contour: (face|facial) (contour|outline|edge|boundary|boundaries|oval), silhouette
    face-contour: (whole|entire) face contour, (contour|outline|edge|edges|boundary|boundaries) of the face
    neck: neck, throat
    background: background, backdrop, surroundings
    accessories: accessory, accessories, glasses, sunglasses, eyeglass*, spectacles, earring, jewellery, jewelry
    accessories: necklace
    accessories: hat, piercing
    whole-image: (whole|entire|overall) (image|picture|photo|face), (image|picture|photo|face) as a whole
""")
# Read as the area only where the clause names no other: "the skin tone of the forehead", "the outline of the nose".
VAGUE_AREA_WORDS = _table("""
    skin: skin (tone|colour|texture|surface), pore
    face-contour: contour, outline
    whole-image: image, picture, photo, photograph, face, facial
""")
ARTIFACT_WORDS = _table("""
    texture: (overly|too|unnaturally|unusually|excessively|artificially|abnormally|perfectly|over|very) smooth*
    texture: oversmooth*
    texture: smoothed, airbrush*, plastic*, waxy, wax like, doll like, porcelain, rubbery, poreless, smear*, patchy
    texture: (no|no visible|without|missing|lack*|lack* visible) pores, (no|lack*|lack of|loss of) texture
    texture: (too|overly|unnaturally) uniform
    lighting: wrong light*, lit (from|differently), brighter, darker, (conflicting|missing) shadow, overexposed
    blending: seam, blending, not blend*, poorly blended, boundary, boundaries, (visible|hard|sharp|double) edge, halo
    blending: (visible|hard) transition, pasted, cut out, splic*, stitch*, superimposed, composit*, (join|border) line
    blur: blur*, (out of|not in) focus, defocus*, (lack*|lack of|loss of) sharpness, (not|less) sharp, unsharp
    blur: softer, (too|overly) soft, smudg*, hazy, fuzzy, low* resolution
    colour: discolour*, colour (cast|shift|mismatch), tinted, tinge, paler, redder, oversaturated
    asymmetry: asymmetr*, not symmetric*, lopsided, (uneven|different|differ*) in size, different size, unequal
    asymmetry: (larger|smaller|higher|lower|wider|bigger) than the other, not match each other, not (level|mirror)
    geometry: warp*, distort*, deform*, out of (proportion|shape), disproportion*, misshap*, stretched, squashed, bulg*
    geometry: bent, misalign*, misplaced, too (large|small|big|wide|narrow), crooked, twisted, skewed, wrong size
    missing-detail: missing, (no|lack*|lack of|without|loss of|lost) (detail|fine detail), detail* (lost|gone), melt*
    missing-detail: merge* into, run together, (without|no) gaps, run together without gaps, indistinct, incomplete
    missing-detail: (ill|poorly) defined, poorly rendered, not separated, wiped away, erased, featureless
    missing-detail: (no|without|lack*) (individual|eyelashes|lashes)
    expression: frozen, stiff, forced, lifeless, emotionless, expressionless, blank stare, vacant, grimace
    noise: nois*, grain*, speckl*
    frequency: checkerboard*, grid, (regular|repeating) grid, (repeating|repetitive|repeated|regular) pattern, periodic*
    frequency: moire, frequency, frequencies, spectral, upsampl*, aliasing, ringing, lattice
    compression: compress*, blocky, blockiness, (block|blocking) (artifact|artefact), (square|small) blocks, jpeg
    compression: pixelat*, mosaic
""")
# Name an artifact only beside a word of oddness: "the texture is odd", "mismatched skin tone".
TRAIT_WORDS = _table("""
    texture: texture, skin (texture|surface), surface, pore
    lighting: light, lighting, lit, shadow*, shading, shaded, illuminat*, highlight, reflection, brightness
    blending: edge, transition, border, blend, (face|facial) (edge|boundary|boundaries)
    blending: (edge|edges|boundary|boundaries) of the face
    blur: sharpness, focus, resolution
    colour: colour, coloured, colouring, tone, skin (tone|colour), hue, saturation, complexion
    asymmetry: symmetry, (two|both) sides, two halves, left and right
    geometry: shape, shaped, proportion, geometry, anatom*, size, position*, placement, alignment
    missing-detail: detail, definition
    expression: expression, smile, emotion
""")
_DEGREES = _table("""
    0.25: faint*, slight*, subtle, subtly, weak*, minor, mild*, a (little|bit|hint of), barely visible
    0.6: visible, visibly, noticeabl*, moderate*
    0.9: clear, clearly, obvious*, strong, strongly, heavy, heavily, severe*, marked, markedly, pronounced
""")
# off: oddness; calm: the opposite; beside: what follows is compared with; hard, soft, or: what parts clauses.
_OTHERS = _table("""
    off: inconsisten*, unnatural*, mismatch*, not (line up|follow|belong), differ*, disagree*, wrong*, odd*, off
    off: strange*
    off: unusual*, abnormal*, irregular*, abrupt*, uneven*, incorrect*, implausib*, impossibl*, unrealistic*
    off: artificial*
    off: synthetic*, artifact, artefact, anomal*, flaw*, suspicious*, sudden*, weird*, contradict*, clash*, out of place
    off: poor*, fail* to, generated
    off beside: not (match|fit|agree with|belong to), (inconsistent|mismatched|disagree*|clash*) with, differ* from
    beside: than, unlike, compared (with|to), relative to, rest of
    calm: natural*, consisten*, consistent with, normal*, coheren*, realistic*, authentic*, genuine*, plausibl*, match*
    calm: intact, evenly
    calm: as expected, symmetric*, continuous*, seamless*, correct*, (run|runs) on, without a break, agree*, harmonious*
    calm: in proportion, uniform*, same, alike, fit, smooth transition*, transition* smoothly, unbroken, well defined
    calm: blend* (smoothly|naturally|well|in), lifelike, ordinary, undisturbed
    not: no, not, never, without, neither, nor, none, nothing, free (of|from), lack*, absence of, hardly, few
    denied: not (visible|present|seen|found|evident|apparent|noticeable|detected), absent
    filler: not only, no (doubt|question), without (a doubt|doubt), a few
    hard: but, while, whereas, although, though, however, yet, except, and (show|look|appear|has|have|is|are)
    soft: and, with, as well as, plus
    or: or
""")


@dataclass(frozen=True)
class _Mark:
    """A phrase found, and what it may mean: {"area": "jaw"}, {"trait": "colour", "vague": "skin"}, {"off": ""}, ..."""

    start: int
    end: int
    means: dict[str, str]


def _index() -> dict[str, tuple[re.Pattern[str], list[dict[str, str]]]]:
    """By first letter, a pattern with a group for each phrase, longest first, and what the phrases mean."""
    lexicon: dict[str, dict[str, str]] = {}
    named = {"area": AREA_WORDS, "vague": VAGUE_AREA_WORDS, "defect": ARTIFACT_WORDS, "trait": TRAIT_WORDS}
    rows = [(kind, name, phrases) for kind, table in named.items() for name, phrases in table.items()]
    rows += [("degree", name, phrases) for name, phrases in _DEGREES.items()]
    rows += [(kind, "", phrases) for kinds, phrases in _OTHERS.items() for kind in kinds.split()]
    for kind, name, phrases in rows:
        for phrase in phrases:
            lexicon.setdefault(phrase, {})[kind] = name
    index = {}
    for letter in {phrase[0] for phrase in lexicon}:
        chosen = sorted((p for p in lexicon if p[0] == letter), key=len, reverse=True)
        forms = (p.replace("*", r"\w*").replace(" ", r"[\s-]+").replace("colour", "colou?r") for p in chosen)
        pattern = "|".join(f"({form}{'' if form.endswith('*') else '(?:e?s)?'})" for form in forms)
        index[letter] = (re.compile(rf"(?:{pattern})\b"), [lexicon[p] for p in chosen])
    return index


_INDEX = _index()
_STEP = re.compile(r"[a-z]\w*|[;—]|[,:()]")
_EXPERT = re.compile(r"additionally,? the image shows (?:obvious|very few)\b|\bart[ei]facts supporting (?:fake|real)\b")
_PRONOUN = re.compile(r"(?:it|its|they|their|this|these|both|there)\b")
_LINK = re.compile(r" (?:of|on|around|at|near|over|along|under|across|in|beside|between|above|below)(?: \w+)? $")
# What turns a natural look into its opposite: "does not look natural", "unlike natural skin".
_TURNS = re.compile(
    r"(?:\b(?:not|never|nor|neither|without|lack\w*|los(?:es|ing|t|s)|fails? to|than|unlike|instead of|to be|hardly|"
    r"missing|breaks?|interrupts?|disturbs?|too)(?: \w+){0,3}|\bno) $"
)


def read_cues(text: str) -> tuple[Cue, ...]:
    """The (area, artifact) pairs that a text asserts, in order of appearance, each once.

    A clause that denies an artifact, or finds it natural, gives none. Words of degree set the score to 0.25 (faint),
    0.6 (visible) or 0.9 (clear), the first that a pair gets; otherwise it is None. The experts' closing sentence (see
    `prompts`) is no cue.
    """
    cues: dict[tuple[str, str], Cue] = {}
    areas: list[str] = []
    heading = False  # the sentence before was a bare area, as in a list: "Jaw", then what is wrong with it
    for sentence in _sentences(text):
        marks = _settle(list(_marks(sentence)), sentence)
        if not heading and not _PRONOUN.match(sentence):
            areas = []
        heading = len(sentence.split()) <= 4 and not _has(marks, *_SAYS)
        for clause, taken in _clauses(marks):
            found, artifacts, degree = _read(clause, taken)
            areas = found or areas
            for pair in product(areas, artifacts):
                if pair not in cues or cues[pair].score is None:  # "mouth blur: the mouth is slightly smudged"
                    cues[pair] = Cue(*pair, degree)
    return tuple(cues.values())


_HEADED = re.compile(rf"\b({'|'.join(AREAS)}) ({'|'.join(ARTIFACTS)}): ([^.;]*)", re.IGNORECASE)


def mended(text: str) -> str:
    """The text without the second half of a clause that describes another cue than its first half names.

    Our grammar writes "area artifact: what one sees"; a small model's halves do not always agree, and the first, which
    it copies from what an expert points at, is right more often (LOG.md).

    >>> mended("Jaw noise: the jaw looks melted; skin blur: the skin is blurred.")
    'Jaw noise looks off; skin blur: the skin is blurred.'
    """

    def one(found: re.Match[str]) -> str:
        described = {(c.area, c.artifact) for c in read_cues(found[3])}
        agrees = not described or (found[1].lower(), found[2].lower()) in described
        return found[0] if agrees else f"{found[1]} {found[2]} looks off"

    return _HEADED.sub(one, text)


_CLOSING = re.compile(r"additionally, the image shows (.+?) artifacts supporting")
_CLASS_WORDS = re.compile(r"face swap|swapped|reenactment|face editing|face synthesis|generated|no manipulation")


def named_spans(text: str) -> list[tuple[int, int]]:
    """Where a text names an area, an artifact, a class of manipulation, or which experts agree: [start, end) each.

    What a training may weigh more than the words around; whether a clause denies it makes no difference.
    """
    low = text.lower()
    if len(low) != len(text):  # a few letters grow when they are made small
        return []
    closing = _CLOSING.search(low)
    end = closing.start() if closing else len(low)
    spans = [(m.start, m.end) for m in _marks(low[:end]) if _has([m], "area", "vague", "defect", "trait")]
    spans += [m.span() for m in _CLASS_WORDS.finditer(low)]
    return sorted(spans + ([closing.span(1)] if closing else []))


def _sentences(text: str) -> list[str]:
    """Sentences in lower case without markdown, list numbers, contractions and what the experts say."""
    text = re.sub(r"(?m)^\s*(?:\d+[.)]|[-•*>#]+)\s+|[*_`#]+", "", text.lower().replace("’", "'"))
    text = re.sub(r"can't|cannot", "can not", text).replace("n't", " not")
    found = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n+", text))
    return [s for s in found if s and not _EXPERT.search(s)]


def _marks(sentence: str) -> Iterator[_Mark]:
    at = 0
    while step := _STEP.search(sentence, at):
        at = step.end()
        if step[0][0] in ";—,:()":
            yield _Mark(step.start(), at, {"hard" if step[0][0] in ";—" else "soft": ""})
        elif step[0][0] in _INDEX:
            pattern, meanings = _INDEX[step[0][0]]
            if hit := pattern.match(sentence, step.start()):
                at = hit.end()
                yield _Mark(hit.start(), at, meanings[(hit.lastindex or 1) - 1])


_SAYS = ("defect", "trait", "off", "calm")


def _has(marks: Sequence[_Mark], *kinds: str) -> bool:
    return any(kind in m.means for m in marks for kind in kinds)


def _settle(marks: list[_Mark], sentence: str) -> list[_Mark]:
    """Marks whose meaning depends on their neighbours."""
    out: list[_Mark] = []
    for i, mark in enumerate(marks):
        after = marks[i + 1] if i + 1 < len(marks) else _Mark(len(sentence), len(sentence), {})
        text, gap = sentence[mark.start : mark.end], sentence[mark.end : after.start]
        if "calm" in mark.means and (turn := _TURNS.search(sentence[: mark.start])):
            # "not ... natural" is one word of oddness, and its "not" denies nothing else.
            out = [m for m in out if not ("not" in m.means and m.start >= turn.start())]
            out.append(_Mark(mark.start, mark.end, {"off": ""}))
        elif text == "consistent with" and gap == " " and "defect" in after.means:
            pass  # "lines consistent with blending"
        elif text.startswith("no ") and any(m.means.get("defect") == "missing-detail" for m in marks[i + 1 : i + 3]):
            out.append(_Mark(mark.start, mark.end, {"not": ""}))  # "no detail of the nose is missing"
        elif mark.means.get("area") == "skin" and "area" in after.means and _LINK.match(gap):
            out.append(_Mark(mark.start, mark.end, {"vague": "skin"}))  # "the skin of the forehead" is the forehead
        else:
            out.append(mark)
    return out


def _clauses(marks: Sequence[_Mark]) -> Iterator[tuple[list[_Mark], str]]:
    """Clauses, each with the polarity (`off`, `not` or "") that it takes over from the one before.

    Commas, "and" and "with" part two clauses only if both sides name an area and say something of it: "a seam along the
    jaw and blur on the eyes" is two, "the eyes and the mouth are blurred" is one.
    """
    pieces: list[tuple[str, list[_Mark]]] = [("hard", [])]
    for mark in marks:
        if _has([mark], "hard", "soft", "or"):
            pieces.append((next(iter(mark.means)), []))
        else:
            pieces[-1][1].append(mark)
    clause: list[_Mark] = []
    taken = ""
    for i, (link, piece) in enumerate(pieces):
        whole = _has(clause, "area", "vague") and _has(clause, "defect", "off", "calm")
        if clause and (link == "hard" or (whole and _opens(pieces[i:]))):
            yield clause, taken
            bare = link != "hard" and not _has(piece, "off", "calm", "defect")
            denies = _has(clause, "not")
            taken = "not" if denies and link == "or" else "off" if bare and not denies and _has(clause, "off") else ""
            clause = []
        clause = clause + piece
    yield clause, taken


def _opens(pieces: Sequence[tuple[str, list[_Mark]]]) -> bool:
    """Whether a new clause begins here; bare areas go with what follows if that begins with an area too."""
    first = pieces[0][1]
    if not _has(first, "area", "vague") or _has(first, *_SAYS):
        return _has(first, "area", "vague")
    for link, piece in pieces[1:]:
        if link == "hard" or _has(piece, *_SAYS):
            return link != "hard" and "area" in next(m for m in piece if _has([m], "area", "vague", *_SAYS)).means
    return False


def _read(clause: Sequence[_Mark], taken: str) -> tuple[list[str], list[str], float | None]:
    """Areas, artifacts and degree of one clause."""
    end = -1 if taken == "not" or _has(clause, "denied") else next((m.start for m in clause if "not" in m.means), 10**6)
    said = [m for m in clause if m.start < end]  # what follows "no" or "without" is denied
    odd = _has(said, "off") or (taken == "off" and not _has(clause, "calm"))
    artifacts = []
    for m in said:
        # "natural blur", "the blur is natural"; but not "natural skin is blurred"
        natural = any("calm" in c.means and (c.start > m.start or m.start - c.end <= 1) for c in clause)
        if "defect" in m.means and not natural:
            artifacts.append(m.means["defect"])
        elif "trait" in m.means and odd:
            artifacts.append(m.means["trait"])
    areas: list[str] = []
    for kind, names in (("area", AREA_WORDS), ("vague", ("skin", "face-contour")), ("vague", AREA_WORDS)):
        for i, m in enumerate(clause):
            if "beside" in m.means and _has(clause[:i], "area", "vague"):
                break  # what a thing is compared with is not what is odd: "does not match the neck"
            if m.means.get(kind) in names:
                areas.append(m.means[kind])
        if areas:
            break
    degrees = [float(m.means["degree"]) for m in clause if "degree" in m.means]
    degree = None if not degrees else 0.25 if 0.25 in degrees else max(degrees)
    return list(dict.fromkeys(areas)), list(dict.fromkeys(artifacts)), degree


_SAID = re.compile(
    r"(?<![\w-])(?:(?P<fake>fake[ds]?|forged|forger(?:y|ies)|deep-?fakes?|manipulat(?:ed|ions?)|synthesi[sz]ed|"
    r"synthetic|face synthesis|generated|tamper(?:ed|ing)|altered|alterations?|doctored|fabricated|edit(?:ed|ing)|"
    r"reenact\w+|face[- ]swap(?:s|ped|ping)?|artificial)|real|authentic|genuine|bona[- ]fide|"
    r"un(?:altered|manipulated|touched|tampered|edited|modified))(?![\w-])"
)
# Real things named for comparison, both sides of a choice, questions: none of them decides.
_UNDECIDED = re.compile(
    r".*\?|\b(?:real|fake|authentic|genuine) or (?:not|real|fake|manipulated)\b|"
    r"\b(?:than|unlike|of|in|from|for|with|as \w+ as)(?: an?| any| the)? (?:real|genuine|authentic) (?=\w)|"
    r"(?:\b(?:an?|any) |^)(?:real|genuine|authentic|un\w+ed) \w+ (?:would|does|do|never)\b|"
    r"\b(?:fake|artificial) (?:eyelash|lash|nail|tan|teeth|smile|light)\w*|"
    r"\b(?:no|little|hardly any|(?:without|beyond)(?: an?y?)?|not|never) (?:doubt|question)(?: that)?\b|"
    r"\bnot only\b|\bnot (?:unlikely|impossible|improbable)\b"
)
_DENIES = re.compile(
    r"\b(?:no|not|never|without|neither|nor|none|nothing|free of|free from|absence of|lacks?|hardly|few|little|"
    r"rather than|instead of|far from|too \w+ to be|unlikely|improbable|implausible|impossible|"
    r"doubt(?:s|ed|ful)?|fail(?:s|ed)? to|pretend\w*)\b"
)
# "That it is real is doubtful": the denial comes after what it denies.
_DENIED_AFTER = re.compile(
    r"^\W*(?:\w+ ){0,2}?(?:is|seems|looks|appears) (?:\w+ )?"
    r"(?:unlikely|improbable|doubtful|false|untrue|wrong|in doubt)\b"
)


def said_label(text: str) -> str | None:
    """The decision that a text expresses by itself, `fake` or `real`; None when it expresses none, or both.

    The experts' closing sentence is not counted: `contradictions` looks at it.
    """
    said = said_labels(text)
    return said.pop() if len(said) == 1 else None


def said_labels(text: str) -> set[str]:
    """Every decision that a text expresses: a subset of {"fake", "real"}; both where it contradicts itself."""
    said: set[str] = set()
    plain = "\n".join(_UNDECIDED.sub(" ", s.replace("anything but", "not")) for s in _sentences(text))
    for clause in re.split(r"[.;:!\n]|\b(?:but|while|whereas|however|although|though|yet)\b", plain):
        at, last = 0, ("", False)
        for match in _SAID.finditer(clause):
            side, between = "fake" if match["fake"] else "real", clause[at : match.start()]
            if last[0] != side or len(re.findall(r"\w+", between)) > 1:  # else a list: "not forged, edited or faked"
                last = side, bool(_DENIES.search(between.rpartition(",")[2]))
            denied = last[1] != bool(_DENIED_AFTER.match(clause[match.end() :]))
            said.add({"fake": "real", "real": "fake"}[side] if denied else side)
            at = match.end()
    return said


_WHOLE = re.compile(
    r"\b(?:no camera|(?:a|an image|some) generator (?:made|drew)|made (?:as a whole )?by a generator|"
    r"(?:from|of) an? (?:image )?generator|(?:looks?|is|are|appears?|seems?) (?:\w+ )?(?:generated|synthetic)|"
    r"(?:entirely|fully|wholly|completely) (?:synthetic|generated)|face synthesis|generated as a whole)\b"
)
_PART = re.compile(
    r"\b(?:face[- ]?swap\w*|swapped|re-?enact\w*|edit(?:ed|ing)|pasted|changed in part|retouch\w*|put on top|"
    r"painted over|two (?:sources|layers)|(?:another|other) (?:source|file)|moved afterwards|changed by hand)\b"
)


def said_kind(text: str) -> str | None:
    """The kind of fake that a text names, of x2dfd.types.KINDS; None where it names none or both."""
    found = set()
    for sentence in _sentences(text):
        if _WHOLE.search(sentence):
            found.add("whole")  # "nothing was pasted in: the whole face is made by a generator"
        elif _PART.search(sentence):
            found.add("part")
    return found.pop() if len(found) == 1 else None


def named_areas(text: str) -> list[str]:
    """The areas that a text names plainly, in order of appearance."""
    return list(dict.fromkeys(m.means["area"] for m in _marks(text.lower()) if "area" in m.means))


_CLAIM = re.compile(
    r"\b(obvious|clear|strong|very few|few|no)\s+((?:(?!\b(?:obvious|clear|strong|few|no)\b)[\w ,&/.+-]){1,120}?)\s+"
    r"art[ei]facts(?:\s+supporting\s+(fake|real))?"
)


def contradictions(
    text: str, verdict_label: str, evidence: Sequence[Evidence], cues: Sequence[Cue], kind: str | None = None
) -> tuple[str, ...]:
    """Sentences for a reader: where a rationale goes against itself, the verdict, its kind, or an expert it names."""
    found: list[str] = []
    said, other = said_labels(text), {"fake": "real", "real": "fake"}.get(verdict_label)
    if len(said) == 2:
        found.append("The rationale says both real and fake.")
    elif other in said:
        found.append(f"The rationale says {other}, the verdict is {verdict_label}.")
    elif verdict_label == "inconclusive" and said:
        found.append(f"The rationale says {min(said)}, and no answer is given.")
    if verdict_label == "fake" and kind and said_kind(text) not in (None, kind):
        other_kind = {"whole": "a change in part", "part": "a face made as a whole"}[kind]
        found.append(f"The rationale speaks of {other_kind}, the verdict does not.")
    if verdict_label == "real" and cues:
        named = ", ".join(f"{c.area} {c.artifact}" for c in cues)
        found.append(f"The verdict is real, but the rationale names artifacts: {named}.")
    for amount, names, side in _CLAIM.findall(text.lower()):
        claim = f"The rationale speaks of {amount} {names} artifacts"
        if side and side == other:
            found.append(f"{claim} supporting {side}, the verdict is {verdict_label}.")
        listed = re.split(r",\s*(?:and\s+)?|\s+and\s+", names)
        known = {e.expert.lower() for e in evidence}
        found += [f"{claim}, but there is no {n} expert." for n in listed if side and n not in known]
        for e in evidence:
            if not re.search(rf"(?<![\w-]){re.escape(e.expert.lower())}(?![\w-])", names):
                continue
            many = amount in ("obvious", "clear", "strong")
            if e.score is None:
                found.append(f"{claim}, but the {e.expert} expert gave no score.")
            elif (many and e.score < AGREES_BELOW) or (not many and e.score > AGREES_ABOVE):
                found.append(f"{claim}, but the {e.expert} expert's score is {e.score:.3f}.")
    return tuple(dict.fromkeys(found))
