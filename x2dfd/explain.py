"""Reads a rationale back into cues, and checks it against the verdict and the experts.

The lexicon is what a careful reader would accept as naming an area or an artifact, in our own explanations and in those
of other models. A clause gives cues only if it names both and does not deny them; the parser drops what it cannot read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from x2dfd.prompts import AGREES_ABOVE, AGREES_BELOW
from x2dfd.types import Cue, Evidence

# Phrases: a space also reads a hyphen, `*` reads any ending, a plain last word also reads its plural, "colour" also "color".
AREA_WORDS: dict[str, tuple[str, ...]] = {
    "forehead": ("forehead", "brow region"),
    "eyebrows": ("eyebrow", "brow"),
    "eyes": ("eye", "pupil", "iris", "iri*es", "eyelid", "eyelash", "lash", "gaze", "sclera", "eyeball", "eye socket"),
    "nose": ("nose", "nostril", "nasal", "bridge of the nose"),
    "mouth": ("mouth", "lip", "smile"),
    "teeth": ("teeth", "tooth", "dental", "incisor"),
    "cheeks": ("cheek", "cheekbone"),
    "jaw": ("jaw", "jawline", "jaw line", "chin"),
    "ears": ("ear", "earlobe"),
    "hair": ("hair", "hairline", "hair strand", "beard", "moustache", "mustache"),
    "skin": ("skin", "complexion"),
    "face-contour": (
        "face contour", "facial contour", "contour of the face", "outline of the face", "face outline", "facial outline",
        "face edge", "edge of the face", "edges of the face", "face boundary", "facial boundary", "face boundaries",
        "facial boundaries", "boundary of the face", "boundaries of the face", "face oval", "silhouette",
    ),
    "neck": ("neck", "throat"),
    "background": ("background", "backdrop", "surroundings"),
    "accessories": (
        "accessory", "accessories", "glasses", "sunglasses", "eyeglass*", "spectacles", "earring", "jewellery", "jewelry",
        "necklace", "hat", "piercing",
    ),
    "whole-image": (
        "whole image", "entire image", "whole picture", "entire picture", "whole photo", "entire photo", "whole face",
        "entire face", "image as a whole", "picture as a whole", "photo as a whole", "face as a whole", "overall image",
    ),
}  # fmt: skip
VAGUE_AREA_WORDS: dict[str, tuple[str, ...]] = {
    "skin": ("skin tone", "skin colour", "skin texture", "skin surface", "pore"),
    "face-contour": ("contour", "outline"),
    "whole-image": ("image", "picture", "photo", "photograph", "face", "facial"),
}
"""Read as the area only where the clause names no other: "the skin tone of the forehead", "the outline of the nose"."""

ARTIFACT_WORDS: dict[str, tuple[str, ...]] = {
    "texture": (
        "overly smooth*", "over smooth*", "oversmooth*", "too smooth*", "unnaturally smooth*", "unusually smooth*", "smoothed",
        "excessively smooth*", "artificially smooth*", "abnormally smooth*", "perfectly smooth*", "very smooth", "airbrush*",
        "plastic*", "waxy", "wax like", "doll like", "porcelain", "rubbery", "poreless", "no pores", "no visible pores",
        "without pores", "missing pores", "lack* pores", "lack* visible pores", "lack* texture", "lack of texture",
        "no texture", "loss of texture", "too uniform", "overly uniform", "smear*", "patchy",
    ),
    "lighting": (
        "wrong light*", "lit from", "lit differently", "brighter", "darker", "conflicting shadow", "missing shadow",
        "overexposed", "underexposed",
    ),
    "blending": (
        "seam", "blending", "not blend*", "poorly blended", "boundary", "boundaries", "visible edge", "hard edge", "halo",
        "sharp edge", "double edge", "visible transition", "hard transition", "pasted", "cut out", "spliced", "splicing",
        "stitch*", "superimposed", "composit*", "join line", "border line",
    ),
    "blur": (
        "blur*", "out of focus", "lack* sharpness", "lack of sharpness", "loss of sharpness", "not sharp", "less sharp", "unsharp",
        "softer", "too soft", "overly soft", "not in focus", "defocus*", "smudg*", "hazy", "fuzzy", "low* resolution",
    ),
    "colour": (
        "discolour*", "colour cast", "colour shift", "colour mismatch", "tinted", "tinge", "paler", "redder", "oversaturated",
    ),
    "asymmetry": (
        "asymmetr*", "not symmetric*", "unsymmetric*", "lopsided", "uneven in size", "unequal", "differ* in size",
        "different in size", "different size", "larger than the other", "smaller than the other", "higher than the other",
        "lower than the other", "wider than the other", "bigger than the other", "not match each other", "not level",
        "not mirror",
    ),
    "geometry": (
        "warp*", "distort*", "deform*", "out of proportion", "disproportion*", "misshap*", "stretched", "squashed", "bulg*",
        "bent", "misalign*", "misplaced", "too large", "too small", "too big", "too wide", "too narrow", "crooked", "twisted",
        "skewed", "wrong size", "out of shape",
    ),
    "missing-detail": (
        "missing", "lack* detail", "lack* fine detail", "lack of detail", "lack of fine detail", "no detail", "no fine detail",
        "without detail", "without fine detail", "loss of detail", "lost detail", "detail* lost", "detail* gone", "melt*",
        "merge* into", "run together", "without gaps", "no gaps", "run together without gaps", "indistinct", "ill defined",
        "poorly defined", "poorly rendered", "not separated", "no individual", "without individual", "wiped away", "erased",
        "no eyelashes", "without eyelashes", "no lashes", "without lashes", "featureless", "incomplete",
    ),
    "expression": (
        "frozen", "stiff", "forced smile", "lifeless", "emotionless", "expressionless", "blank stare", "vacant", "grimace",
    ),
    "noise": ("nois*", "grain*", "speckl*"),
    "frequency": (
        "checkerboard*", "grid", "grid like", "repeating pattern", "repetitive pattern", "repeated pattern", "regular pattern",
        "regular grid", "periodic*", "moire", "frequency", "frequencies", "spectral", "upsampl*", "aliasing", "ringing",
        "lattice",
    ),
    "compression": (
        "compress*", "blocky", "blockiness", "block artifact", "block artefact", "blocking artifact", "blocking artefact",
        "square blocks", "small blocks", "jpeg", "pixelat*", "mosaic",
    ),
}  # fmt: skip
TRAIT_WORDS: dict[str, tuple[str, ...]] = {
    "texture": ("texture", "skin texture", "surface", "skin surface", "pore"),
    "lighting": ("light", "lighting", "shadow*", "shading", "shaded", "illuminat*", "highlight", "reflection", "brightness", "lit"),
    "blending": (
        "edge", "transition", "border", "blend", "face boundary", "facial boundary", "face boundaries", "facial boundaries",
        "boundary of the face", "boundaries of the face", "face edge", "edge of the face", "edges of the face",
    ),
    "blur": ("sharpness", "focus", "resolution"),
    "colour": ("colour", "coloured", "colouring", "tone", "skin tone", "skin colour", "hue", "saturation", "complexion"),
    "asymmetry": ("symmetry", "two sides", "both sides", "two halves", "left and right"),
    "geometry": ("shape", "shaped", "proportion", "geometry", "anatom*", "size", "position*", "placement", "alignment"),
    "missing-detail": ("detail", "definition"),
    "expression": ("expression", "smile", "emotion"),
}  # fmt: skip
"""Words that name an artifact only beside a word of oddness: "the texture is odd", "mismatched skin tone"."""

_DEGREES = {
    0.25: ("faint*", "slight*", "subtle", "subtly", "weak*", "minor", "mild*", "a little", "a bit", "a hint of", "barely visible"),
    0.6: ("visible", "visibly", "noticeabl*", "moderate*"),
    0.9: ("clear", "clearly", "obvious*", "strong", "strongly", "heavy", "heavily", "severe*", "marked", "markedly", "pronounced"),
}  # fmt: skip
_OTHERS: dict[str, tuple[str, ...]] = {
    "off": (
        "inconsisten*", "unnatural*", "mismatch*", "not match", "not agree", "not line up", "not follow", "not fit", "not belong",
        "differ*", "disagree*", "wrong*", "odd*", "off", "strange*", "unusual*", "abnormal*", "irregular*", "abrupt*", "uneven*",
        "incorrect*", "implausib*", "impossibl*", "unrealistic*", "artificial*", "synthetic*", "artifact", "artefact", "anomal*",
        "flaw*", "suspicious*", "sudden*", "weird*", "contradict*", "clash*", "out of place", "poor*", "fail* to",
    ),
    "calm": (
        "natural*", "consisten*", "normal*", "coheren*", "realistic*", "authentic*", "genuine*", "plausibl*", "match*", "intact",
        "as expected", "evenly", "symmetric*", "continuous*", "seamless*", "correct*", "run on", "runs on", "without a break",
        "agree*", "harmonious*", "in proportion", "uniform*", "same", "alike", "smooth transition", "transitions smoothly",
        "transition smoothly", "blend* smoothly", "blend* naturally", "blend* well", "blend* in", "well defined", "fit",
        "lifelike", "unbroken", "ordinary", "undisturbed",
    ),
    "not": (
        "no", "not", "never", "without", "neither", "nor", "none", "nothing", "free of", "free from", "lack*", "absence of",
        "hardly", "few",
    ),
    "denied": (
        "not visible", "not present", "not seen", "not found", "not evident", "not apparent", "not noticeable", "not detected",
        "absent",
    ),
    "beside": (
        "than", "unlike", "compared with", "compared to", "relative to", "differ* from", "not match", "not fit", "not agree with",
        "inconsistent with", "mismatched with", "disagree* with", "clash* with", "not belong to", "rest of",
    ),
    "filler": ("not only", "no doubt", "without doubt", "without a doubt", "no question", "a few"),
    "hard": (
        "but", "while", "whereas", "although", "though", "however", "yet", "except", "and show", "and look", "and appear",
        "and has", "and have", "and is", "and are",
    ),
    "soft": ("and", "with", "as well as", "plus"),
    "or": ("or",),
}  # fmt: skip


@dataclass(frozen=True)
class _Mark:
    """A phrase found, and what it may mean: {"area": "jaw"}, {"trait": "colour", "vague": "skin"}, {"off": ""} …"""

    start: int
    end: int
    means: dict[str, str]


def _tables() -> dict[str, dict[str, str]]:
    lexicon: dict[str, dict[str, str]] = {}
    kinds = {"area": AREA_WORDS, "vague": VAGUE_AREA_WORDS, "defect": ARTIFACT_WORDS, "trait": TRAIT_WORDS}
    for kind, table in kinds.items():
        for name, phrases in table.items():
            for phrase in phrases:
                lexicon.setdefault(phrase, {})[kind] = name
    for kind, phrases in _OTHERS.items():
        for phrase in phrases:
            lexicon.setdefault(phrase, {})[kind] = ""
    for degree, phrases in _DEGREES.items():
        for phrase in phrases:
            lexicon.setdefault(phrase, {})["degree"] = str(degree)
    for phrase, means in lexicon.items():  # "inconsistent with" is as odd as "inconsistent", and also compares
        if "beside" in means and phrase not in ("than", "unlike", "compared with", "compared to", "relative to", "rest of"):
            means["off"] = ""
    return lexicon


def _regex(phrase: str) -> str:
    body = re.escape(phrase).replace(r"\*", r"\w*").replace(r"\ ", r"[\s-]+").replace("colour", "colou?r")
    return body + ("" if phrase.endswith("*") else "(?:e?s)?")


_LEXICON = _tables()
_PHRASES = sorted(_LEXICON, key=len, reverse=True)  # longest first: "eyebrow" before "brow", "not match" before "match"
_BREAKS = r"([;—])|([,:()])"  # hard, soft
_SCAN = re.compile(rf"\b(?:{'|'.join(f'({_regex(p)})' for p in _PHRASES)})\b|{_BREAKS}")
_MEANINGS = [*(_LEXICON[p] for p in _PHRASES), {"hard": ""}, {"soft": ""}]

_EXPERT = re.compile(
    r"(?:additionally,?\s+the image shows (?:obvious|very few)[^!?\n]*?|the image shows (?:obvious|very few) [^!?\n]{1,120}? "
    r"art[ei]facts supporting (?:fake|real))(?:\.(?=\s|$)|$)",
    re.IGNORECASE,
)
_CLAIM = re.compile(
    r"\b(obvious|clear|strong|very few|few|no)\s+([\w ,&/.+-]{1,120}?)\s+art[ei]facts(?:\s+supporting\s+(fake|real))?", re.I
)


_PRONOUN = re.compile(r"\W*(?:it|its|they|their|this|these|both|there|one of them)\b", re.I)


def read_cues(text: str) -> tuple[Cue, ...]:
    """The (area, artifact) pairs that a text asserts, in order of appearance, each once.

    A clause that denies an artifact, or finds it natural, gives none. Words of degree set the score to 0.25 (faint), 0.6
    (visible) or 0.9 (clear); otherwise it is None. The experts' closing sentence (see `prompts`) is no cue.
    """
    cues: dict[tuple[str, str], Cue] = {}
    areas: list[str] = []
    heading = False  # the last sentence was a bare area, as in a list: "**Jaw**", then what is wrong with it
    for sentence in _sentences(_EXPERT.sub(" ", text)):
        if not (heading or _PRONOUN.match(sentence)):
            areas = []
        marks = [_Mark(m.start(), m.end(), _MEANINGS[(m.lastindex or 1) - 1]) for m in _SCAN.finditer(sentence)]
        heading = len(sentence.split()) <= 4 and not any(_signals(marks))
        for clause, odd in _clauses(_attributes(marks, sentence)):
            found, artifacts, degree = _read(clause, odd)
            areas = found or areas
            for area in areas:
                for artifact in artifacts:
                    cues.setdefault((area, artifact), Cue(area, artifact, degree))
    return tuple(cues.values())


def _sentences(text: str) -> list[str]:
    """Plain sentences: no markdown, no list numbers, no contractions."""
    text = re.sub(r"(?m)^\s*(?:\d+[.)]|[-•*>#]+)\s+", "", text.lower().replace("’", "'"))
    text = re.sub(r"can't|cannot", "can not", re.sub(r"[*_`#]+", "", text))
    return [s for s in re.split(r"(?<=[.!?])\s+|\n+", text.replace("n't", " not")) if s.strip()]


# Words that turn what follows into its opposite: "does not look natural", "unlike natural skin", "breaks the natural line".
_TURNED = re.compile(
    r"(?:\b(?:not|never|nor|neither|without|lack\w*|loses?|los[ts]|fails? to|than|unlike|instead of|to be|hardly|missing|"
    r"breaks?|interrupts?|disturbs?|too)(?:\s+\w+){0,3}|\bno)\s+$"
)
_OF = re.compile(r"\s+(?:of|on|around|at|near|over|along|under|across|in|beside|between|above|below)(?:\s+\w+){0,2}\s+$")


def _attributes(marks: list[_Mark], sentence: str) -> list[_Mark]:
    """Marks whose meaning depends on their neighbours, settled."""
    out: list[_Mark] = []
    for i, mark in enumerate(marks):
        after = marks[i + 1] if i + 1 < len(marks) else None
        gap = sentence[mark.end : after.start] if after else ""
        if "calm" in mark.means:
            if turn := _TURNED.search(sentence, 0, mark.start):
                # "not … natural" is one word of oddness, and its "not" denies nothing else.
                out = [m for m in out if not (turn.start() <= m.start < turn.end() and "not" in m.means)]
                mark = _Mark(mark.start, mark.end, {"off": ""})
            elif after and "consistent with" in sentence[mark.start : after.end] and "defect" in after.means:
                continue  # "lines consistent with blending"
        elif mark.means.get("area") == "skin" and after and "area" in after.means and _OF.fullmatch(gap):
            mark = _Mark(mark.start, mark.end, {"vague": "skin"})  # "the skin of the forehead" is the forehead
        out.append(mark)
    return out


def _signals(marks: Sequence[_Mark]) -> Iterator[bool]:
    """For each mark, whether it says something of an area."""
    return (bool({"defect", "trait", "off", "calm"} & m.means.keys()) for m in marks)


def _has(marks: Sequence[_Mark], *kinds: str) -> bool:
    return any(kind in m.means for m in marks for kind in kinds)


def _clauses(marks: Sequence[_Mark]) -> Iterator[tuple[list[_Mark], str]]:
    """Clauses, each with the polarity ("off", "not" or "") that it takes over from the one before.

    Commas, "and" and "with" part two clauses only if both sides name an area and say something of it: "a seam along the jaw
    and blur on the eyes" is two, "the eyes and the mouth are blurred" is one.
    """
    pieces: list[tuple[str, list[_Mark]]] = [("hard", [])]
    for mark in marks:
        kind = next((k for k in ("hard", "soft", "or") if k in mark.means), None)
        if kind:
            pieces.append((kind, []))
        else:
            pieces[-1][1].append(mark)
    clause: list[_Mark] = []
    takes = ""
    for i, (link, piece) in enumerate(pieces):
        if clause and (link == "hard" or (_whole(clause) and _opens(pieces[i:]))):
            yield clause, takes
            bare = link != "hard" and not _has(piece, "off", "calm", "defect")
            takes = "off" if bare and _has(clause, "off") else "not" if link == "or" and _has(clause, "not") else ""
            clause = []
        clause = clause + piece
    yield clause, takes


def _whole(marks: Sequence[_Mark]) -> bool:
    return _has(marks, "area", "vague") and _has(marks, "defect", "off", "calm")


def _opens(pieces: Sequence[tuple[str, list[_Mark]]]) -> bool:
    """Whether a new clause begins here; bare areas go with what follows if that goes on about areas first."""
    first = pieces[0][1]
    if not _has(first, "area", "vague"):
        return False
    if any(_signals(first)):
        return True
    for link, piece in pieces[1:]:
        if link == "hard":
            break
        if any(_signals(piece)):
            return "area" in next(m for m in piece if m.means.keys() & {"area", "vague", "defect", "trait"}).means
    return False


def _read(clause: Sequence[_Mark], takes: str) -> tuple[list[str], list[str], float | None]:
    """Areas, artifacts and degree of one clause."""
    denied = [m.start for m in clause if "not" in m.means]
    first_no = -1 if takes == "not" else min(denied, default=10**6)
    calm = [m for m in clause if "calm" in m.means]
    odd = takes == "off" or any("off" in m.means and m.start < first_no for m in clause)
    artifacts = []
    if not _has(clause, "denied"):
        for m in clause:
            natural = any(c.start > m.start or m.start - c.end <= 2 for c in calm)  # "natural blur", "the blur is natural"
            if m.start < first_no and ("defect" in m.means and not natural):
                artifacts.append(m.means["defect"])
            elif m.start < first_no and "trait" in m.means and odd:
                artifacts.append(m.means["trait"])
    areas: list[str] = []
    for kind, skip in (("area", ""), ("vague", "whole-image"), ("vague", "")):
        beside = False  # what something is compared with is not what is odd: "does not match the neck"
        for m in clause:
            beside = beside or ("beside" in m.means and bool(areas))
            if kind in m.means and m.means[kind] != skip and not beside:
                areas.append(m.means[kind])
        if areas:
            break
    degrees = [float(m.means["degree"]) for m in clause if "degree" in m.means]
    degree = None if not degrees else 0.25 if 0.25 in degrees else max(degrees)
    return list(dict.fromkeys(areas)), list(dict.fromkeys(artifacts)), degree


_FAKE = (
    r"fake[ds]?|forged|forger(?:y|ies)|deep-?fakes?|manipulat(?:ed|ions?)|synthetic|synthesi[sz]ed|face synthesis|generated|"
    r"tamper(?:ed|ing)|altered|alterations?|doctored|fabricated|edit(?:ed|ing)|face[- ]swap(?:s|ped|ping)?|reenact\w+|artificial"
)
_REAL = r"real|authentic|genuine|bona[- ]fide|un(?:altered|manipulated|touched|tampered|edited|modified)"
_SAID = re.compile(rf"(?<![\w-])(?:(?P<fake>{_FAKE})|(?P<real>{_REAL}))(?![\w-])")
# Real things named for comparison, choices between both, questions: none of them decides.
_UNDECIDED = re.compile(
    r"[^.!?\n]*\?|\b(?:real|fake|authentic|genuine) or (?:not|real|fake|manipulated)\b|"
    r"\b(?:than|unlike|of|in|from|for|with|as \w+ as)(?: an?| any| the)? (?:real|genuine|authentic) (?=\w)|"
    r"\b(?:fake|artificial) (?:eyelash|lash|nail|tan|teeth|smile|light)\w*|\bno (?:doubt|question)\b|\bnot only\b"
)
_DENIES = re.compile(
    r"\b(?:no|not|never|without|neither|nor|none|nothing|free of|free from|absence of|lacks?|hardly|few|little|"
    r"rather than|instead of|far from|too \w+ to be)\b"
)


def said_label(text: str) -> str | None:
    """The decision that a text expresses by itself, `fake` or `real`; None when it expresses none, or both.

    The experts' closing sentence is not counted: `contradictions` looks at it.
    """
    said = _said(text)
    return said.pop() if len(said) == 1 else None


def _said(text: str) -> set[str]:
    said: set[str] = set()
    plain = _UNDECIDED.sub(" ", "\n".join(_sentences(_EXPERT.sub(" ", text))))
    for clause in re.split(r"[.;:!\n]|\b(?:but|while|whereas|however|although|though|yet)\b", plain):
        before: tuple[str, bool] | None = None  # side and denial of the last word, for lists: "not forged, edited or faked"
        at = 0
        for match in _SAID.finditer(clause):
            side = "fake" if match["fake"] else "real"
            between = clause[at : match.start()]
            listed = before is not None and before[0] == side and len(re.findall(r"\w+", between)) <= 1
            denied = bool(before and before[1]) if listed else bool(_DENIES.search(between.rpartition(",")[2]))
            said.add({"fake": "real", "real": "fake"}[side] if denied else side)
            before, at = (side, denied), match.end()
    return said


def contradictions(text: str, verdict_label: str, evidence: Sequence[Evidence], cues: Sequence[Cue]) -> tuple[str, ...]:
    """Sentences for a reader: where a rationale goes against itself, the verdict, or an expert that it names."""
    found: list[str] = []
    said = _said(text)
    if len(said) == 2:
        found.append("The rationale says both real and fake.")
    elif said and verdict_label in ("fake", "real") and said != {verdict_label}:
        found.append(f"The rationale says {said.pop()}, the verdict is {verdict_label}.")
    if verdict_label == "real" and cues:
        found.append(f"The verdict is real, but the rationale names artifacts: {', '.join(map(_pair, cues))}.")
    for amount, names, side in _CLAIM.findall(text):
        many = amount.lower() in ("obvious", "clear", "strong")
        if side and verdict_label in ("fake", "real") and side.lower() != verdict_label:
            found.append(f"The rationale says that {names} artifacts support {side.lower()}, the verdict is {verdict_label}.")
        known = {e.expert.lower(): e for e in evidence}
        for name in re.split(r",\s*(?:and\s+)?|\s+and\s+", names.lower()):
            expert = known.get(name.strip())
            if expert is None:
                if side:
                    found.append(f"The rationale names an expert that was not asked: {name.strip()}.")
            elif expert.score is None:
                found.append(f"The rationale speaks of {name} artifacts, but the {expert.expert} expert gave no score.")
            elif (many and expert.score < AGREES_BELOW) or (not many and expert.score > AGREES_ABOVE):
                score = f"the {expert.expert} expert's score is {expert.score:.3f}"
                found.append(f"The rationale speaks of {amount.lower()} {name} artifacts, but {score}.")
    return tuple(dict.fromkeys(found))


def _pair(cue: Cue) -> str:
    return f"{cue.area} {cue.artifact}"
