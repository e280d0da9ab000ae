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
            segments = [p.split("|") for p in re.split(r"[()]", phrase)]
            table[name] = (*table.get(name, ()), *("".join(choice) for choice in product(*segments)))
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
    accessories: necklace, hat, piercing
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
# off: oddness; calm: its opposite; beside: introduces a comparison; hard, soft, or: separators of clauses.
_OTHERS = _table("""
    off: inconsisten*, unnatural*, mismatch*, not (line up|follow|belong), differ*, disagree*, wrong*, odd*, off
    off: strange*, unusual*, abnormal*, irregular*, abrupt*, uneven*, incorrect*, implausib*, impossibl*, unrealistic*
    off: artificial*, synthetic*, artifact, artefact, anomal*, flaw*, suspicious*, sudden*, weird*, contradict*, clash*
    off: out of place, poor*, fail* to, generated
    off beside: not (match|fit|agree with|belong to), (inconsistent|mismatched|disagree*|clash*) with, differ* from
    beside: than, unlike, compared (with|to), relative to, rest of
    calm: natural*, consisten*, consistent with, normal*, coheren*, realistic*, authentic*, genuine*, plausibl*, match*
    calm: intact, evenly, as expected, symmetric*, continuous*, seamless*, correct*, (run|runs) on, without a break
    calm: agree*, harmonious*, in proportion, uniform*, same, alike, fit, smooth transition*, transition* smoothly
    calm: unbroken, well defined, blend* (smoothly|naturally|well|in), lifelike, ordinary, undisturbed
    not: no, not, never, without, neither, nor, none, nothing, free (of|from), lack*, absence of, hardly, few
    denied: not (visible|present|seen|found|evident|apparent|noticeable|detected), absent
    filler: not only, no (doubt|question), without (a doubt|doubt), a few
    hard: but, while, whereas, although, though, however, yet, except, and (show|look|appear|has|have|is|are)
    soft: and, with, as well as, plus
    or: or
""")


@dataclass(frozen=True)
class _Mark:
    """A phrase of the text and its meanings: {"area": "jaw"}, {"trait": "colour", "vague": "skin"}, {"off": ""}, ..."""

    start: int
    end: int
    means: dict[str, str]


def _index() -> dict[str, tuple[re.Pattern[str], list[dict[str, str]]]]:
    """For each first letter a pattern with a group for each phrase, longest first, and the meanings of the phrases."""
    lexicon: dict[str, dict[str, str]] = {}
    tables = {"area": AREA_WORDS, "vague": VAGUE_AREA_WORDS, "defect": ARTIFACT_WORDS, "trait": TRAIT_WORDS}
    rows = [(kind, name, phrases) for kind, table in tables.items() for name, phrases in table.items()]
    rows += [("degree", name, phrases) for name, phrases in _DEGREES.items()]
    rows += [(kind, "", phrases) for kinds, phrases in _OTHERS.items() for kind in kinds.split()]
    for kind, name, phrases in rows:
        for phrase in phrases:
            lexicon.setdefault(phrase, {})[kind] = name
    index = {}
    for letter in {phrase[0] for phrase in lexicon}:
        entries = sorted((p for p in lexicon if p[0] == letter), key=len, reverse=True)
        forms = (p.replace("*", r"\w*").replace(" ", r"[\s-]+").replace("colour", "colou?r") for p in entries)
        pattern = "|".join(f"({form}{'' if form.endswith('*') else '(?:e?s)?'})" for form in forms)
        index[letter] = (re.compile(rf"(?:{pattern})\b"), [lexicon[p] for p in entries])
    return index


_INDEX = _index()
_TOKEN = re.compile(r"[a-z]\w*|[;—]|[,:()]")
_EXPERT = re.compile(r"additionally,? the image shows (?:obvious|very few)\b|\bart[ei]facts supporting (?:fake|real)\b")
_PRONOUN = re.compile(r"(?:it|its|they|their|this|these|both|there)\b")
_LINK = re.compile(r" (?:of|on|around|at|near|over|along|under|across|in|beside|between|above|below)(?: \w+)? $")
# Words that turn a natural look into its opposite: "does not look natural", "unlike natural skin".
_REVERSAL = re.compile(
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
        marks = _resolve(list(_marks(sentence)), sentence)
        if not heading and not _PRONOUN.match(sentence):
            areas = []
        heading = len(sentence.split()) <= 4 and not _has(marks, *_FINDINGS)
        for clause, polarity in _clauses(marks):
            clause_areas, artifacts, degree = _read_clause(clause, polarity)
            areas = clause_areas or areas
            for pair in product(areas, artifacts):
                if pair not in cues or cues[pair].score is None:  # "mouth blur: the mouth is slightly smudged"
                    cues[pair] = Cue(*pair, degree)
    return tuple(cues.values())


_HEADED = re.compile(rf"\b({'|'.join(AREAS)}) ({'|'.join(ARTIFACTS)}): ([^.;]*)", re.IGNORECASE)


def mended(text: str) -> str:
    """The text with every clause whose halves name different cues cut down to its first half.

    Our grammar writes "area artifact: what one sees". A small model's halves do not always agree, and the first, which
    it copies from an expert's cues, is right more often (LOG.md).

    >>> mended("Jaw noise: the jaw looks melted; skin blur: the skin is blurred.")
    'Jaw noise looks off; skin blur: the skin is blurred.'
    """

    def repaired(match: re.Match[str]) -> str:
        described = {(c.area, c.artifact) for c in read_cues(match[3])}
        agrees = not described or (match[1].lower(), match[2].lower()) in described
        return match[0] if agrees else f"{match[1]} {match[2]} looks off"

    return _HEADED.sub(repaired, text)


_CLOSING = re.compile(r"additionally, the image shows (.+?) artifacts supporting")
_CLASS_WORDS = re.compile(r"face swap|swapped|reenactment|face editing|face synthesis|generated|no manipulation")


def named_spans(text: str) -> list[tuple[int, int]]:
    """Spans [start, end) of a text that name an area, an artifact, a class of manipulation, or the experts that agree.

    A training may weigh them more than the words around them. Denied ones are included.
    """
    lowered = text.lower()
    if len(lowered) != len(text):  # a few capital letters have longer lower-case forms
        return []
    closing = _CLOSING.search(lowered)
    end = closing.start() if closing else len(lowered)
    spans = [(m.start, m.end) for m in _marks(lowered[:end]) if _has([m], "area", "vague", "defect", "trait")]
    spans += [m.span() for m in _CLASS_WORDS.finditer(lowered)]
    return sorted(spans + ([closing.span(1)] if closing else []))


def _sentences(text: str) -> list[str]:
    """Sentences in lower case without markdown, list numbers, contractions and what the experts say."""
    text = re.sub(r"(?m)^\s*(?:\d+[.)]|[-•*>#]+)\s+|[*_`#]+", "", text.lower().replace("’", "'"))
    text = re.sub(r"can't|cannot", "can not", text).replace("n't", " not")
    sentences = (" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+|\n+", text))
    return [s for s in sentences if s and not _EXPERT.search(s)]


def _marks(sentence: str) -> Iterator[_Mark]:
    position = 0
    while token := _TOKEN.search(sentence, position):
        position = token.end()
        if token[0][0] in ";—,:()":
            yield _Mark(token.start(), position, {"hard" if token[0][0] in ";—" else "soft": ""})
        elif token[0][0] in _INDEX:
            pattern, meanings = _INDEX[token[0][0]]
            if match := pattern.match(sentence, token.start()):
                position = match.end()
                yield _Mark(match.start(), position, meanings[(match.lastindex or 1) - 1])


_FINDINGS = ("defect", "trait", "off", "calm")


def _has(marks: Sequence[_Mark], *kinds: str) -> bool:
    return any(kind in m.means for m in marks for kind in kinds)


def _resolve(marks: list[_Mark], sentence: str) -> list[_Mark]:
    """Marks whose meaning depends on their neighbours."""
    resolved: list[_Mark] = []
    for i, mark in enumerate(marks):
        after = marks[i + 1] if i + 1 < len(marks) else _Mark(len(sentence), len(sentence), {})
        text, gap = sentence[mark.start : mark.end], sentence[mark.end : after.start]
        if "calm" in mark.means and (reversal := _REVERSAL.search(sentence[: mark.start])):
            # "not ... natural" is one word of oddness, and its "not" denies nothing else.
            resolved = [m for m in resolved if not ("not" in m.means and m.start >= reversal.start())]
            resolved.append(_Mark(mark.start, mark.end, {"off": ""}))
        elif text == "consistent with" and gap == " " and "defect" in after.means:
            pass  # "lines consistent with blending"
        elif text.startswith("no ") and any(m.means.get("defect") == "missing-detail" for m in marks[i + 1 : i + 3]):
            resolved.append(_Mark(mark.start, mark.end, {"not": ""}))  # "no detail of the nose is missing"
        elif mark.means.get("area") == "skin" and "area" in after.means and _LINK.match(gap):
            resolved.append(_Mark(mark.start, mark.end, {"vague": "skin"}))  # "the skin of the forehead": the forehead
        else:
            resolved.append(mark)
    return resolved


def _clauses(marks: Sequence[_Mark]) -> Iterator[tuple[list[_Mark], str]]:
    """Clauses, each with the polarity (`off`, `not` or "") that it inherits from the one before.

    Commas, "and" and "with" separate two clauses only if both sides name an area and say something about it: "a seam
    along the jaw and blur on the eyes" is two, "the eyes and the mouth are blurred" is one.
    """
    pieces: list[tuple[str, list[_Mark]]] = [("hard", [])]
    for mark in marks:
        if _has([mark], "hard", "soft", "or"):
            pieces.append((next(iter(mark.means)), []))
        else:
            pieces[-1][1].append(mark)
    clause: list[_Mark] = []
    polarity = ""
    for i, (link, piece) in enumerate(pieces):
        complete = _has(clause, "area", "vague") and _has(clause, "defect", "off", "calm")
        if clause and (link == "hard" or (complete and _begins_clause(pieces[i:]))):
            yield clause, polarity
            bare = link != "hard" and not _has(piece, "off", "calm", "defect")
            denied, odd = _has(clause, "not"), _has(clause, "off")
            polarity = "not" if denied and link == "or" else "off" if bare and not denied and odd else ""
            clause = []
        clause = clause + piece
    yield clause, polarity


def _begins_clause(pieces: Sequence[tuple[str, list[_Mark]]]) -> bool:
    """Whether a new clause begins here. Bare areas begin one if the first piece with a finding begins with an area."""
    first = pieces[0][1]
    if not _has(first, "area", "vague") or _has(first, *_FINDINGS):
        return _has(first, "area", "vague")
    for link, piece in pieces[1:]:
        if link == "hard" or _has(piece, *_FINDINGS):
            return link != "hard" and "area" in next(m for m in piece if _has([m], "area", "vague", *_FINDINGS)).means
    return False


def _read_clause(clause: Sequence[_Mark], polarity: str) -> tuple[list[str], list[str], float | None]:
    """Areas, artifacts and degree of one clause."""
    denied = polarity == "not" or _has(clause, "denied")
    end = -1 if denied else next((m.start for m in clause if "not" in m.means), 10**6)
    asserted = [m for m in clause if m.start < end]  # what follows "no" or "without" is denied
    odd = _has(asserted, "off") or (polarity == "off" and not _has(clause, "calm"))
    artifacts = []
    for m in asserted:
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


_LABEL_WORD = re.compile(
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
_NEGATION = re.compile(
    r"\b(?:no|not|never|without|neither|nor|none|nothing|free of|free from|absence of|lacks?|hardly|few|little|"
    r"rather than|instead of|far from|too \w+ to be|unlikely|improbable|implausible|impossible|"
    r"doubt(?:s|ed|ful)?|fail(?:s|ed)? to|pretend\w*)\b"
)
# "That it is real is doubtful": the denial comes after what it denies.
_NEGATION_AFTER = re.compile(
    r"^\W*(?:\w+ ){0,2}?(?:is|seems|looks|appears) (?:\w+ )?"
    r"(?:unlikely|improbable|doubtful|false|untrue|wrong|in doubt)\b"
)


def said_label(text: str) -> str | None:
    """The decision that a text expresses by itself, `fake` or `real`; None when it expresses none, or both.

    The experts' closing sentence is not counted: `contradictions` looks at it.
    """
    labels = said_labels(text)
    return labels.pop() if len(labels) == 1 else None


def said_labels(text: str) -> set[str]:
    """Every decision that a text expresses: a subset of {"fake", "real"}; both where it contradicts itself."""
    labels: set[str] = set()
    decisive = "\n".join(_UNDECIDED.sub(" ", s.replace("anything but", "not")) for s in _sentences(text))
    for clause in re.split(r"[.;:!\n]|\b(?:but|while|whereas|however|although|though|yet)\b", decisive):
        position, previous = 0, ("", False)
        for match in _LABEL_WORD.finditer(clause):
            label, between = "fake" if match["fake"] else "real", clause[position : match.start()]
            if previous[0] != label or len(re.findall(r"\w+", between)) > 1:  # else a list: "not forged or edited"
                previous = label, bool(_NEGATION.search(between.rpartition(",")[2]))
            denied = previous[1] != bool(_NEGATION_AFTER.match(clause[match.end() :]))
            labels.add({"fake": "real", "real": "fake"}[label] if denied else label)
            position = match.end()
    return labels


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
    kinds = set()
    for sentence in _sentences(text):
        if _WHOLE.search(sentence):
            kinds.add("whole")  # "nothing was pasted in: the whole face is made by a generator"
        elif _PART.search(sentence):
            kinds.add("part")
    return kinds.pop() if len(kinds) == 1 else None


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
    """Sentences for a reader, on each contradiction of a rationale to itself, the verdict, its kind or an expert."""
    messages: list[str] = []
    labels, opposite = said_labels(text), {"fake": "real", "real": "fake"}.get(verdict_label)
    if len(labels) == 2:
        messages.append("The rationale says both real and fake.")
    elif opposite in labels:
        messages.append(f"The rationale says {opposite}, but the verdict is {verdict_label}.")
    elif verdict_label == "inconclusive" and labels:
        messages.append(f"The rationale says {min(labels)}, but no answer is given.")
    if verdict_label == "fake" and kind and said_kind(text) not in (None, kind):
        other_kind = {"whole": "a change in part", "part": "a face made as a whole"}[kind]
        messages.append(f"The rationale describes {other_kind}, but the verdict does not.")
    if verdict_label == "real" and cues:
        cue_names = ", ".join(f"{c.area} {c.artifact}" for c in cues)
        messages.append(f"The verdict is real, but the rationale names artifacts: {cue_names}.")
    for amount, names, side in _CLAIM.findall(text.lower()):
        claim = f"The rationale claims {amount} {names} artifacts"
        if side and side == opposite:
            messages.append(f"{claim} supporting {side}, but the verdict is {verdict_label}.")
        claimed = re.split(r",\s*(?:and\s+)?|\s+and\s+", names)
        present = {e.expert.lower() for e in evidence}
        messages += [f"{claim}, but there is no {name} expert." for name in claimed if side and name not in present]
        for e in evidence:
            if not re.search(rf"(?<![\w-]){re.escape(e.expert.lower())}(?![\w-])", names):
                continue
            many = amount in ("obvious", "clear", "strong")
            if e.score is None:
                messages.append(f"{claim}, but the {e.expert} expert gave no score.")
            elif (many and e.score < AGREES_BELOW) or (not many and e.score > AGREES_ABOVE):
                messages.append(f"{claim}, but the {e.expert} expert's score is {e.score:.3f}.")
    return tuple(dict.fromkeys(messages))
