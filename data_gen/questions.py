"""Cue questions: yes/no questions about a face whose "yes" is evidence of forgery, each tied to one cue.

Our own bank, a reader of published lists, a generator that asks any OpenAI-compatible model, and a control set of
questions that have nothing to do with forgery. The form is that of X2-DFD (arXiv 2410.06126): about eleven words, and
the ending `Answer Yes or No.`
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from x2dfd.assessment import CueQuestion, read_questions
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.explain import read_cues
from x2dfd.files import write_text
from x2dfd.manifest import read_manifest
from x2dfd.prompts import CUE_ENDING
from x2dfd.types import AREAS, ARTIFACTS

__all__ = [
    "CueQuestion",
    "Generated",
    "add_commands",
    "bank",
    "connect",
    "fault",
    "generate",
    "random_questions",
    "read_published",
    "read_questions",
    "write_questions",
]

# Only pairs that a careful viewer could speak of. Several wordings where the forge makes the cue often.
_BANK: dict[str, dict[str, tuple[str, ...]]] = {
    "forehead": {
        "texture": (
            "Does the forehead look unnaturally smooth, as if it were airbrushed?",
            "Does the forehead show smeared patches instead of skin texture?",
        ),
        "lighting": ("Is the forehead lit from a different direction than the rest of the face?",),
        "blending": (
            "Is there a visible seam across the forehead?",
            "Does the forehead show a hard edge, as if another face were pasted there?",
        ),
        "blur": ("Is the forehead more blurred than the eyes and the nose?",),
        "colour": (
            "Does the colour of the forehead differ oddly from that of the cheeks?",
            "Is the forehead tinted differently than the rest of the face?",
        ),
        "geometry": ("Is the forehead distorted or of an implausible shape?",),
        "missing-detail": ("Is fine detail missing from the forehead, as if its creases were erased?",),
        "expression": ("Does the forehead look frozen although the rest of the face moves?",),
        "noise": ("Does the forehead look noisier or grainier than the rest of the face?",),
        "compression": ("Does the forehead look more compressed and blocky than the hair above it?",),
        "frequency": ("Does the forehead show a faint regular grid or repeating pattern?",),
    },
    "eyebrows": {
        "texture": ("Do the eyebrows look smeared or painted on instead of hairy?",),
        "blending": (
            "Is there a visible boundary around the eyebrows, like a pasted patch?",
            "Does the skin around an eyebrow end in a seam or halo?",
        ),
        "blur": ("Are the eyebrows blurred although the eyes below them are sharp?",),
        "colour": (
            "Does the colour of the eyebrows clash with the hair?",
            "Is there a mismatched skin tone around the eyebrows?",
        ),
        "asymmetry": (
            "Are the two eyebrows asymmetric in an implausible way?",
            "Is one eyebrow much higher than the other, as if displaced?",
        ),
        "geometry": ("Are the eyebrows bent or misplaced in an implausible way?",),
        "missing-detail": (
            "Are parts of the eyebrows missing or wiped away?",
            "Do the eyebrows lack detail, with hairs melted together?",
        ),
        "expression": (
            "Does the expression of the eyebrows contradict the rest of the face?",
            "Do the eyebrows look frozen or raised in a stiff, artificial way?",
        ),
    },
    "eyes": {
        "texture": ("Do the irises look smeared or waxy instead of finely textured?",),
        "lighting": (
            "Do the reflections in the two eyes look inconsistent with each other?",
            "Do the eyes show shadows that contradict the light on the face?",
        ),
        "blending": (
            "Is there a visible boundary around the eyes, like a pasted patch?",
            "Does a seam or halo run around one or both eyes?",
        ),
        "blur": (
            "Are the eyes blurred although the rest of the face is sharp?",
            "Do the eyelids and lashes look smudged or out of focus?",
        ),
        "colour": (
            "Do the two irises differ implausibly in colour?",
            "Is there an odd colour cast around the eyes?",
        ),
        "asymmetry": (
            "Are the two eyes asymmetric in size or shape beyond what is usual?",
            "Is one eye clearly larger or higher than the other?",
        ),
        "geometry": (
            "Are the pupils or eyelids distorted into an implausible shape?",
            "Are the eyes misaligned, as if they gazed in two directions?",
        ),
        "missing-detail": (
            "Are eyelashes, pupils or other details of the eyes missing?",
            "Do the eyes look melted, with fine lines wiped away?",
        ),
        "expression": ("Do the eyes look lifeless or unfit for the expression of the mouth?",),
        "noise": (
            "Do the eyes look noisier than the skin around them?",
            "Is there unusual grain on the eyes only?",
        ),
        "compression": (
            "Do the eyes show blocky compression marks, unlike the rest of the face?",
            "Are there small square blocks around the eyes?",
        ),
        "frequency": ("Does a fine repeating pattern or grid cover the eyes?",),
    },
    "nose": {
        "texture": ("Does the nose look waxy or too smooth for its surroundings?",),
        "lighting": ("Is the shadow of the nose inconsistent with the light on the cheeks?",),
        "blending": (
            "Is there a visible boundary around the nose, like a pasted patch?",
            "Does a seam run along the side of the nose?",
        ),
        "blur": (
            "Is the nose blurred although the skin beside it is sharp?",
            "Do the nostrils look smudged or out of focus?",
        ),
        "colour": (
            "Does the colour of the nose differ oddly from the cheeks?",
            "Is the nose paler or redder than its surroundings, like a foreign patch?",
        ),
        "asymmetry": ("Are the two nostrils asymmetric in an implausible way?",),
        "geometry": (
            "Is the nose warped, bent or out of proportion?",
            "Does the nose look stretched or squashed in an unnatural way?",
        ),
        "missing-detail": (
            "Are parts of the nose missing, such as nostrils or its edges?",
            "Does the nose look melted, with its outline wiped away?",
        ),
        "noise": ("Does the nose look noisier or grainier than the cheeks?",),
        "compression": ("Is the nose blocky, as if it alone were heavily compressed?",),
    },
    "mouth": {
        "texture": ("Do the lips look plastic or smeared, without their fine lines?",),
        "lighting": ("Is the light on the lips inconsistent with the light on the chin?",),
        "blending": (
            "Is there a visible boundary around the mouth, like a pasted patch?",
            "Does a seam or halo run around the lips?",
        ),
        "blur": (
            "Is the mouth blurred although the rest of the face is sharp?",
            "Do the edges of the lips look smudged or out of focus?",
        ),
        "colour": (
            "Do the lips have an odd colour that clashes with the face?",
            "Is the area around the mouth tinted differently than the cheeks?",
        ),
        "asymmetry": ("Is the mouth lopsided in a way that looks implausible?",),
        "geometry": (
            "Is the mouth warped, misplaced or out of proportion?",
            "Do the lips look stretched or distorted into an implausible shape?",
        ),
        "missing-detail": (
            "Are details of the lips missing, as if they were wiped away?",
            "Does the mouth look melted, with indistinct lip lines?",
        ),
        "expression": (
            "Is the expression of the mouth inconsistent with that of the eyes?",
            "Does the mouth show a stiff or forced smile?",
            "Are the corners of the mouth pulled into a grimace?",
        ),
        "noise": ("Does the mouth look noisier or grainier than the skin around it?",),
        "compression": (
            "Does the mouth show blocky compression marks, unlike the rest of the face?",
            "Are there small square blocks around the lips?",
        ),
    },
    "teeth": {
        "texture": ("Do the teeth look like one smeared, plastic surface?",),
        "blending": ("Is there a visible seam or halo where teeth and gums meet?",),
        "blur": ("Are the teeth blurred although the face around them is sharp?",),
        "colour": ("Do the teeth have an unnatural colour, too white or tinted?",),
        "geometry": ("Are the teeth misshapen, crooked or of an implausible size?",),
        "missing-detail": (
            "Do the teeth run together without gaps between them?",
            "Do the teeth look melted, so that single ones are indistinct?",
        ),
    },
    "cheeks": {
        "texture": (
            "Do the cheeks look unnaturally smooth or airbrushed?",
            "Do the cheeks show smeared patches instead of pores?",
        ),
        "lighting": ("Is the shading of the cheeks inconsistent with the light elsewhere?",),
        "blending": (
            "Is there a visible seam across one or both cheeks?",
            "Do the cheeks show an abrupt boundary between two layers of skin?",
        ),
        "blur": (
            "Are the cheeks blurred although eyes and mouth are sharp?",
            "Do the cheeks look softer than the rest of the picture?",
        ),
        "colour": ("Do the cheeks show a mismatched skin tone or discoloured patch?",),
        "asymmetry": (
            "Are the two cheeks asymmetric in an implausible way?",
            "Is one cheek clearly larger than the other, as if swollen?",
        ),
        "geometry": ("Are the cheeks warped, bulging or out of proportion?",),
        "missing-detail": ("Is fine detail missing from the cheeks, as if it were erased?",),
        "expression": ("Do the cheeks look frozen although the mouth smiles?",),
        "noise": ("Do the cheeks look noisier or grainier than the forehead?",),
        "compression": ("Are the cheeks broken into small square blocks, unlike the rest?",),
    },
    "jaw": {
        "texture": ("Does the skin along the jaw look smeared or too smooth?",),
        "lighting": ("Is the shadow under the jaw inconsistent with the light on the face?",),
        "blending": (
            "Does the skin along the jaw show a visible blending seam?",
            "Is there a hard edge on the chin, as if another mouth were pasted in?",
        ),
        "blur": ("Is the jaw more blurred than the mouth above it?",),
        "colour": ("Does the colour of the jaw differ oddly from the cheeks?",),
        "asymmetry": ("Is the jaw lopsided in a way that looks implausible?",),
        "geometry": (
            "Is the jaw warped, bent or out of proportion?",
            "Does the chin look stretched or distorted?",
        ),
        "missing-detail": ("Is the jawline indistinct, as if it had melted into the neck?",),
        "noise": ("Does the jaw look noisier or grainier than the rest of the face?",),
        "compression": ("Does the jaw look more compressed and blocky than the forehead?",),
    },
    "ears": {
        "texture": ("Do the ears look waxy or smeared?",),
        "lighting": ("Is the light on the ears inconsistent with the light on the face?",),
        "blending": ("Is there a visible seam or halo where the ears meet the face?",),
        "blur": ("Are the ears far more blurred than the hair beside them?",),
        "colour": ("Do the ears differ oddly in colour from the face?",),
        "asymmetry": ("Are the two ears asymmetric in an implausible way?",),
        "geometry": ("Are the ears misshapen, misplaced or out of proportion?",),
        "missing-detail": ("Are folds or other details missing from the ears?",),
    },
    "hair": {
        "texture": ("Does the hair look smeared or plastic instead of stranded?",),
        "lighting": ("Is the light on the hair inconsistent with the light on the face?",),
        "blending": (
            "Is there a halo or cut-out edge where the hair meets the face?",
            "Does the hairline show a visible seam?",
        ),
        "blur": ("Is the hair near the face blurred although the face is sharp?",),
        "colour": ("Does the hair show an odd colour cast along the face?",),
        "geometry": ("Do strands of hair look bent or broken in an implausible way?",),
        "missing-detail": ("Does the hair lack detail, with its strands melted together?",),
        "noise": ("Does the hair look noisier or grainier than the face?",),
        "frequency": ("Do hair strands form a regular, repeating pattern?",),
    },
    "skin": {
        "texture": (
            "Does the skin look waxy or plastic?",
            "Is the skin unnaturally smooth, without pores or fine lines?",
            "Does the skin look airbrushed in a patchy way?",
        ),
        "lighting": (
            "Is the light on the skin inconsistent with the light in the scene?",
            "Do the shadows on the skin contradict each other in direction?",
        ),
        "blending": (
            "Are there visible seams between patches of skin?",
            "Does the skin look stitched together from two faces?",
        ),
        "blur": (
            "Is the skin of the face more blurred than the hair around it?",
            "Does the skin look hazy while its surroundings are sharp?",
        ),
        "colour": (
            "Does the skin show a tone that clashes with the neck?",
            "Does the skin show a colour cast that its surroundings do not?",
            "Does the skin tone change abruptly from one area to another?",
        ),
        "missing-detail": ("Does the skin lack detail such as pores, moles or fine hairs?",),
        "noise": (
            "Is there more noise on the skin than in the background?",
            "Does the skin look grainy in a way its surroundings do not?",
        ),
        "compression": ("Does the skin show blocky compression marks, unlike its surroundings?",),
        "frequency": (
            "Does the skin show a fine checkerboard or grid pattern?",
            "Does a repeating pattern cover the skin, as if it were upsampled?",
        ),
    },
    "face-contour": {
        "texture": ("Is there a smeared band along the outline of the face?",),
        "lighting": ("Does the light change abruptly at the outline of the face?",),
        "blending": (
            "Is there a visible seam along the contour of the face?",
            "Does the outline of the face look like a pasted mask?",
            "Is there a halo or double edge around the face outline?",
        ),
        "blur": ("Is the outline of the face blurred in an unnatural way?",),
        "colour": ("Does the colour change abruptly at the outline of the face?",),
        "asymmetry": ("Is the outline of the face lopsided in an implausible way?",),
        "geometry": ("Is the contour of the face warped, dented or misshapen?",),
        "missing-detail": ("Is the outline of the face indistinct, as if it had melted away?",),
        "noise": ("Does the amount of noise differ across the outline of the face?",),
        "compression": ("Are there blocky compression marks along the outline of the face?",),
    },
    "neck": {
        "texture": ("Does the neck look smeared or too smooth?",),
        "lighting": ("Is the light on the neck inconsistent with the light on the face?",),
        "blending": ("Is there a visible seam where neck and head meet?",),
        "blur": ("Is the neck far more blurred than the face?",),
        "colour": (
            "Does the neck differ in colour from the face?",
            "Is the neck tinted in a way that clashes with the face?",
        ),
        "geometry": ("Is the neck warped, too narrow or misaligned with the head?",),
        "noise": ("Does the neck look noisier or grainier than the face?",),
    },
    "background": {
        "texture": ("Does the background look smeared in places?",),
        "lighting": ("Is the light in the background inconsistent with the light on the face?",),
        "blending": ("Is there a halo in the background around the head?",),
        "blur": ("Is the background blurred unevenly, in patches near the head?",),
        "colour": ("Does the background show odd colour shifts next to the face?",),
        "geometry": ("Are straight lines of the background bent or warped near the face?",),
        "missing-detail": ("Do objects in the background look melted or incomplete?",),
        "noise": ("Is the noise of the background unlike the noise of the face?",),
        "frequency": ("Does the background show a regular grid or repeating pattern?",),
        "compression": ("Is the background far more compressed and blocky than the face?",),
    },
    "accessories": {
        "lighting": ("Are reflections in the glasses inconsistent with the scene?",),
        "blending": ("Is there a visible seam where glasses or jewellery touch the skin?",),
        "blur": ("Are the glasses or earrings blurred although the face is sharp?",),
        "asymmetry": ("Are the earrings or glasses asymmetric in an implausible way?",),
        "geometry": ("Are glasses, earrings or hat warped or bent in an impossible way?",),
        "missing-detail": ("Are parts of the glasses or earrings missing or melted?",),
    },
    "whole-image": {
        "texture": (
            "Does the whole image look airbrushed or plastic?",
            "Does the whole picture look like a smooth, waxy rendering?",
        ),
        "lighting": ("Is the lighting of the whole image inconsistent with one scene?",),
        "blending": ("Does the whole image look composited from different photos?",),
        "blur": ("Does the sharpness of the whole image differ oddly between areas?",),
        "colour": ("Do the colours of the whole image look unnatural?",),
        "asymmetry": ("Is the face as a whole lopsided in an implausible way?",),
        "geometry": ("Is the face as a whole warped or out of proportion?",),
        "missing-detail": ("Does the whole image lack fine detail that a camera would record?",),
        "expression": ("Does the face as a whole look stiff, frozen or emotionless?",),
        "noise": ("Is the noise of the whole image uneven between areas?",),
        "frequency": (
            "Does the whole image show a fine grid or checkerboard pattern?",
            "Does the whole picture show ringing or a repeating pattern from upsampling?",
        ),
        "compression": ("Do blocky compression marks differ oddly across the whole image?",),
    },
}

_UNRELATED = (
    "Is the person wearing a hat?",
    "Is the person smiling?",
    "Was this picture taken outdoors?",
    "Is the person wearing glasses?",
    "Does the person have a beard?",
    "Does the person have long hair?",
    "Is the person looking at the camera?",
    "Is there a plant in the picture?",
    "Is the person older than forty?",
    "Is the person wearing a tie?",
    "Is the mouth of the person open?",
    "Does the person have dark hair?",
    "Is the person wearing earrings?",
    "Is the background mostly blue?",
    "Is there text in the picture?",
    "Is the person wearing red clothes?",
    "Does the person have curly hair?",
    "Is there a second person in the picture?",
    "Is the head of the person tilted?",
    "Is the person wearing a necklace?",
    "Is the person indoors?",
    "Does the person have a moustache?",
    "Is the person wearing lipstick?",
    "Are the eyes of the person closed?",
    "Is there a window in the picture?",
    "Is the person speaking into a microphone?",
    "Does the person have blue eyes?",
    "Is the person wearing a shirt with a collar?",
    "Is there a wall behind the person?",
    "Does the hair of the person cover the ears?",
    "Is the person wearing a uniform?",
    "Is the picture taken from the side?",
    "Does the person have freckles?",
    "Is the person a child?",
    "Is there a tree behind the person?",
    "Does the person wear a scarf?",
    "Is the person raising a hand?",
    "Is the forehead of the person covered by hair?",
    "Is the person wearing something green?",
    "Is there an animal in the picture?",
)


def bank() -> list[CueQuestion]:
    """Our own questions, in the order of the vocabulary."""
    return [
        CueQuestion(f"{question} {CUE_ENDING}", area, artifact, "bank")
        for area in AREAS
        for artifact in ARTIFACTS
        for question in _BANK[area].get(artifact, ())
    ]


def random_questions(n: int, rng: np.random.Generator) -> list[CueQuestion]:
    """`n` different questions that have nothing to do with forgery: would they rank as well?

    Raises X2DFDError when `n` is more than there are.
    """
    if not 0 <= n <= len(_UNRELATED):
        raise X2DFDError(f"there are {len(_UNRELATED)} unrelated questions, not {n}")
    chosen = sorted(rng.permutation(len(_UNRELATED))[:n].tolist())
    return [CueQuestion(f"{_UNRELATED[i]} {CUE_ENDING}", None, None, "random") for i in chosen]


def some(
    questions: Sequence[CueQuestion], n: int, cues: Collection[tuple[str, str]], rng: np.random.Generator
) -> list[CueQuestion]:
    """`n` of the questions in their order: those on `cues` (area, artifact) first, then others drawn by `rng`.

    An assessment costs pictures x questions; what no picture of the manifest shows can only be asked in vain.

    Raises X2DFDError when there are fewer than `n`.
    """
    if n > len(questions):
        raise X2DFDError(f"there are {len(questions)} questions, not {n}")
    drawn = rng.permutation(len(questions))
    first = sorted(drawn, key=lambda i: (questions[i].area, questions[i].artifact) not in cues)  # a stable sort
    return [questions[i] for i in sorted(first[:n])]


def write_questions(path: Path, questions: Sequence[CueQuestion], provenance: Mapping[str, Any] | None = None) -> None:
    """Write questions as JSON, one a line, with where they come from. `read_questions` reads them back."""
    lines = ",\n".join("  " + json.dumps(asdict(q), ensure_ascii=False) for q in questions)
    origin = json.dumps(provenance or {}, ensure_ascii=False)
    write_text(path, f'{{\n "provenance": {origin},\n "questions": [\n{lines}\n ]\n}}\n')


def read_published(path: Path) -> list[CueQuestion]:
    """Read a published list: a JSON array of strings, or of objects with `question` (X2-DFD's result shape).

    The cue is the first one that the question asserts; questions without a readable cue have None and come last: they
    are assessed, but no cue rests on them. Raises X2DFDError for another shape.
    """
    try:
        entries = json.loads(path.read_text("utf-8"))
        texts = [e if isinstance(e, str) else e["question"] for e in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise X2DFDError(f"{path}: not a list of questions ({error!r})") from error
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise X2DFDError(f"{path}: not a list of questions (empty, or an entry that is no text)")
    questions = []
    for text in _unique(" ".join(t.split()) for t in texts):
        cue = next(iter(read_cues(text.removesuffix(CUE_ENDING))), None)
        questions.append(
            CueQuestion(text, cue.area if cue else None, cue.artifact if cue else None, f"published:{path.name}")
        )
    return sorted(questions, key=lambda q: q.area is None)


def _unique(texts: Iterable[str]) -> list[str]:
    """The texts without those that say the same words in the same order; the first spelling stays."""
    return list({_words(t): t for t in reversed(list(texts))}.values())[::-1]


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


# --- generated ------------------------------------------------------------------------------------------------------

PROMPT = """Write {count} yes/no questions that a careful viewer would ask about a photo of one face, to find out \
whether it is a deepfake.
Rules:
- "Yes" always means evidence of forgery. Never ask whether something looks natural or matches.
- Each question is about exactly one area and one artifact, both from these lists.
  areas: {areas}
  artifacts: {artifacts}
- Name the area and the artifact in plain words; about eleven words; only pairs that make sense.
- Each question ends with "{ending}"
- No question of this list again: {known}
Answer with JSON only: {{"questions": [{{"question": "...", "area": "...", "artifact": "..."}}]}}"""


@dataclass(frozen=True)
class Generated:
    """Questions that a model wrote, and everything needed to tell how."""

    questions: list[CueQuestion]
    model: str
    prompt: str  # the template; the vocabulary and the questions so far are filled in
    rejected: list[dict[str, str]]  # {"question", "reason"} of what was not taken

    def provenance(self) -> dict[str, Any]:
        return {"model": self.model, "prompt": self.prompt, "rejected": self.rejected}


def fault(text: str, area: str, artifact: str) -> str | None:
    """Why a question cannot be taken, or None.

    "Yes" is evidence of forgery exactly when the question, read as a statement, asserts its cue: the parser of
    rationales decides, which knows denials ("free of seams") and praise ("look natural").
    """
    if area not in AREAS or artifact not in ARTIFACTS:
        return f"cue outside the vocabulary: {area} x {artifact}"
    if not text.endswith(f"? {CUE_ENDING}"):
        return f"does not end in '? {CUE_ENDING}'"
    if len(text) > 200:
        return "longer than 200 characters"
    asserted = {(c.area, c.artifact) for c in read_cues(text.removesuffix(CUE_ENDING))}
    if (area, artifact) not in asserted:
        return f"a yes does not plainly assert {area} x {artifact}"
    return None


def generate(
    client: Any,
    model: str,
    n: int,
    *,
    known: Sequence[CueQuestion] = (),
    seed: int = 0,
    batch: int = 25,
    rounds: int | None = None,
) -> Generated:
    """Ask a model for `n` questions that `known` does not hold, through an OpenAI-compatible client.

    What does not pass `fault` or repeats a question is counted and asked for anew, in at most `rounds` requests
    (default: twice as many as would do if all were good). Raises X2DFDError when too few are left by then.
    """
    taken: list[CueQuestion] = []
    rejected: list[dict[str, str]] = []
    seen = {_words(q.text) for q in known}
    for turn in range(rounds if rounds is not None else 2 * -(-n // batch)):
        if len(taken) >= n:
            break
        prompt = PROMPT.format(
            count=min(batch, n - len(taken)),
            areas=", ".join(AREAS),
            artifacts=", ".join(ARTIFACTS),
            ending=CUE_ENDING,
            known=json.dumps([q.text.removesuffix(f" {CUE_ENDING}") for q in (*known, *taken)], ensure_ascii=False),
        )
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_object"},
            seed=seed + turn,
        )
        for entry in _entries(answer.choices[0].message.content or "", rejected):
            text = " ".join(str(entry.get("question", "")).split())
            area, artifact = str(entry.get("area", "")), str(entry.get("artifact", ""))
            reason = "said before" if _words(text) in seen else fault(text, area, artifact)
            if reason:
                rejected.append({"question": text, "reason": reason})
            elif len(taken) < n:
                seen.add(_words(text))
                taken.append(CueQuestion(text, area, artifact, f"generated:{model}"))
    if len(taken) < n:
        reasons = "; ".join(f"{r['question'][:80]!r}: {r['reason']}" for r in rejected[-3:])
        raise X2DFDError(f"{model} gave {len(taken)} usable questions of {n} (last rejected: {reasons or 'none'})")
    return Generated(taken, model, PROMPT, rejected)


def _entries(content: str, rejected: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The objects of a reply; a reply that is not the JSON asked for is one rejection."""
    body = re.sub(r"^\s*```\w*|```\s*$", "", content)  # many models fence their JSON whatever they are told
    try:
        return [dict(entry) for entry in json.loads(body)["questions"]]
    except (ValueError, TypeError, KeyError):
        rejected.append({"question": content[:200], "reason": "the reply is not the JSON that was asked for"})
        return []


def connect(base_url: str | None) -> Any:
    """A client for an OpenAI-compatible endpoint; key and default address come from OPENAI_API_KEY, OPENAI_BASE_URL.

    Raises SetupError when `openai` is not installed or there is no key.
    """
    try:
        import openai
    except ImportError as error:
        raise SetupError("generating questions needs the package openai: pip install -e '.[serve]'") from error
    try:
        return openai.OpenAI(base_url=base_url)
    except openai.OpenAIError as error:
        raise SetupError(f"{error}\nset the key of the endpoint: export OPENAI_API_KEY=...") from error


# --- command --------------------------------------------------------------------------------------------------------

_EPILOG = """Examples:\n
  python -m data_gen questions --out questions.json --unrelated 30\n
  python -m data_gen questions --out q136.json --only 120 --cues-of forged/manifest.jsonl --unrelated 16\n
  python -m data_gen questions --out theirs.json --published released_questions.json
"""


def add_commands(app: typer.Typer) -> None:
    """Register `questions` on the room's command."""

    @app.command(epilog=_EPILOG)
    def questions(
        out: Annotated[Path, typer.Option(help="JSON file to write")],
        published: Annotated[Path | None, typer.Option(help="read this published list instead of our bank")] = None,
        unrelated: Annotated[int, typer.Option(help="add this many unrelated control questions")] = 0,
        count: Annotated[int, typer.Option("--generate", help="add this many questions written by --model")] = 0,
        model: Annotated[str, typer.Option(help="model name at the endpoint")] = "",
        base_url: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint")] = None,
        only: Annotated[int | None, typer.Option(min=1, help="keep this many, before unrelated ones are added")] = None,
        cues_of: Annotated[Path | None, typer.Option(help="with --only: the cues of this manifest first")] = None,
        seed: Annotated[int, typer.Option(help="chooses the questions to keep and the unrelated ones")] = 0,
    ) -> None:
        """Write yes/no cue questions: our bank, a published list, or written by a model."""
        chosen = read_published(published) if published else bank()
        provenance: dict[str, Any] = {}
        if count:
            if not model:
                raise X2DFDError("--generate needs --model")
            made = generate(connect(base_url), model, count, known=chosen, seed=seed)
            chosen, provenance = chosen + made.questions, made.provenance()
        if only is not None:
            known = (
                {(c.area, c.artifact) for sample in read_manifest(cues_of) for c in sample.cues} if cues_of else set()
            )
            chosen = some(chosen, only, known, np.random.default_rng(seed))
        chosen = chosen + random_questions(unrelated, np.random.default_rng(seed))
        write_questions(out, chosen, provenance)
        cues = {(q.area, q.artifact) for q in chosen if q.area}
        apart = sum(q.area is None and q.origin != "random" for q in chosen)
        print(
            f"{out}: {len(chosen)} questions on {len(cues)} cues"
            + (f", {apart} without a readable cue" if apart else "")
        )
