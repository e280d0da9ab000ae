"""Cue questions: yes/no questions about a face whose "yes" is evidence of forgery, each tied to one cue.

The shipped questions, a reader of published lists, a generator that asks any OpenAI-compatible model, and a control set
of questions that have nothing to do with forgery. The form is that of X2-DFD (arXiv 2410.06126): about eleven words,
and the ending `Answer Yes or No.`
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from x2dfd.assessment import CueQuestion
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.explain import read_cues
from x2dfd.files import Json, parse_json, write_text
from x2dfd.manifest import read_manifest
from x2dfd.model_spec import ModelSpec
from x2dfd.prompts import CUE_ENDING
from x2dfd.types import AREAS, ARTIFACTS

if TYPE_CHECKING:
    import openai


_WORDS: Json = json.loads((Path(__file__).parent / "words" / "questions.json").read_text("utf-8"))
"""`bank`: wordings by area and artifact, for pairs that a careful viewer could name, several where the forge makes
the cue often; `unrelated`: questions that have nothing to do with forgery."""


def cue_questions() -> list[CueQuestion]:
    """Our own questions, in the order of the vocabulary."""
    return [
        CueQuestion(f"{question} {CUE_ENDING}", area, artifact, "bank")
        for area in AREAS
        for artifact in ARTIFACTS
        for question in _WORDS["bank"][area].get(artifact, ())
    ]


def random_questions(n: int, rng: np.random.Generator) -> list[CueQuestion]:
    """`n` different questions that have nothing to do with forgery, as a control for the ranking. Raises X2DFDError if
    there are fewer."""
    unrelated = _WORDS["unrelated"]
    if not 0 <= n <= len(unrelated):
        raise X2DFDError(
            f"{n} unrelated questions were asked for, but there are {len(unrelated)}", code="too_few_questions"
        )
    chosen = sorted(rng.permutation(len(unrelated))[:n].tolist())
    return [CueQuestion(f"{unrelated[i]} {CUE_ENDING}", None, None, "random") for i in chosen]


def some(
    questions: Sequence[CueQuestion], n: int, cues: Collection[tuple[str, str]], rng: np.random.Generator
) -> list[CueQuestion]:
    """`n` of the questions in their order: those on `cues` (area, artifact) first, then others drawn by `rng`, as an
    assessment costs pictures x questions. Raises X2DFDError when there are fewer than `n`."""
    if n > len(questions):
        raise X2DFDError(f"{n} questions were asked for, but there are {len(questions)}", code="too_few_questions")
    order = rng.permutation(len(questions))
    priority = sorted(order, key=lambda i: (questions[i].area, questions[i].artifact) not in cues)  # a stable sort
    return [questions[i] for i in sorted(priority[:n])]


def write_questions(path: Path, questions: Sequence[CueQuestion], provenance: Json | None = None) -> None:
    """Write questions as JSON, one per line, with their provenance. `read_questions` reads them back."""
    lines = ",\n".join("  " + json.dumps(asdict(q), ensure_ascii=False) for q in questions)
    origin = json.dumps(provenance or {}, ensure_ascii=False)
    write_text(path, f'{{\n "provenance": {origin},\n "questions": [\n{lines}\n ]\n}}\n')


def read_published(path: Path) -> list[CueQuestion]:
    """Read a published list: a JSON array of strings, or of objects with `question` (X2-DFD's result shape). The cue is
    the first that a question asserts; questions without one come last: no cue rests on them. Raises X2DFDError."""
    try:
        entries = parse_json(path.read_bytes())
        texts = [e if isinstance(e, str) else e["question"] for e in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise X2DFDError(f"{path}: not a list of questions ({error!r:.200})", code="questions_malformed") from error
    if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
        raise X2DFDError(f"{path}: a list of questions must hold texts, and one at least", code="questions_malformed")
    unique: dict[str, str] = {}  # of the same words in the same order, the first spelling stays
    for text in (" ".join(t.split()) for t in texts):
        unique.setdefault(_words(text), text)
    questions = []
    for text in unique.values():
        cue = next(iter(read_cues(text.removesuffix(CUE_ENDING))), None)
        questions.append(
            CueQuestion(text, cue.area if cue else None, cue.artifact if cue else None, f"published:{path.name}")
        )
    return sorted(questions, key=lambda q: q.area is None)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


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
_BATCH = 25  # questions asked for in one request, at most


def fault(text: str, area: str, artifact: str) -> str | None:
    """The reason for rejecting a question, or None. "Yes" is evidence of forgery exactly when the question, read as a
    statement, asserts its cue; the parser of rationales, which recognises denials and praise, decides that."""
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
    client: openai.OpenAI, model: str, n: int, *, known: Sequence[CueQuestion] = (), seed: int = 0
) -> tuple[list[CueQuestion], Json]:
    """Ask a model for `n` questions that `known` does not hold, through an OpenAI-compatible client. Returns them with
    their provenance: the model, the template of the prompt, and the rejected ones with reasons.

    Questions that `fault` rejects and repetitions are replaced, in at most twice as many requests as would do if all
    were good. Raises X2DFDError when there are too few by then.
    """
    accepted: list[CueQuestion] = []
    rejected: list[dict[str, str]] = []
    seen = {_words(q.text) for q in known}
    for turn in range(2 * -(-n // _BATCH)):
        if len(accepted) >= n:
            break
        prompt = PROMPT.format(
            count=min(_BATCH, n - len(accepted)),
            areas=", ".join(AREAS),
            artifacts=", ".join(ARTIFACTS),
            ending=CUE_ENDING,
            known=json.dumps([q.text.removesuffix(f" {CUE_ENDING}") for q in (*known, *accepted)], ensure_ascii=False),
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
            elif len(accepted) < n:
                seen.add(_words(text))
                accepted.append(CueQuestion(text, area, artifact, f"generated:{model}"))
    if len(accepted) < n:
        reasons = "; ".join(f"{r['question'][:80]!r}: {r['reason']}" for r in rejected[-3:])
        raise X2DFDError(
            f"{model} wrote {len(accepted)} of {n} questions that can be used (last rejected: {reasons or 'none'})",
            code="generation_short",
        )
    return accepted, {"model": model, "prompt": PROMPT, "rejected": rejected}


def _entries(content: str, rejected: list[dict[str, str]]) -> list[Json]:
    """The objects of a reply; a reply in any other form than the requested JSON is one rejection."""
    body = re.sub(r"^\s*```\w*|```\s*$", "", content)  # many models fence their JSON whatever the prompt says
    try:
        return [dict(entry) for entry in parse_json(body)["questions"]]
    except (ValueError, TypeError, KeyError):
        rejected.append({"question": content[:200], "reason": "the reply is not the JSON that was asked for"})
        return []


def connect(base_url: str) -> openai.OpenAI:
    """A client for an OpenAI-compatible endpoint, whose key comes from OPENAI_API_KEY. Raises SetupError without the
    package or a key."""
    try:
        import openai
    except ImportError as error:
        raise SetupError("--generate needs openai: pip install -e '.[serve]'", code="package_missing") from error
    try:
        return openai.OpenAI(base_url=base_url)
    except openai.OpenAIError as error:
        raise SetupError(f"{error}; set the endpoint's key: export OPENAI_API_KEY=...", code="key_missing") from error


EPILOG = """Examples:\n
  python -m data_gen questions --out questions.json --unrelated 30\n
  python -m data_gen questions --out q136.json --only 120 --cues-of forged/manifest.jsonl --unrelated 16\n
  python -m data_gen questions --out theirs.json --published released_questions.json
"""


def command(
    out: Annotated[Path, typer.Option(help="JSON file to write")],
    published: Annotated[
        Path | None, typer.Option(help="read this published list instead of the shipped questions")
    ] = None,
    unrelated: Annotated[int, typer.Option(min=0, help="add this many unrelated control questions")] = 0,
    count: Annotated[int, typer.Option("--generate", min=0, help="add this many questions written by --model")] = 0,
    model: Annotated[str, typer.Option(metavar="NAME@URL", help="a model of an OpenAI-compatible endpoint")] = "",
    only: Annotated[int | None, typer.Option(min=1, help="keep this many, before unrelated ones are added")] = None,
    cues_of: Annotated[Path | None, typer.Option(help="with --only: the cues of this manifest first")] = None,
    seed: Annotated[int, typer.Option(min=0, help="chooses the questions to keep and the unrelated ones")] = 0,
) -> None:
    """Write yes/no cue questions: the shipped ones, a published list, or new ones of a model."""
    chosen = read_published(published) if published else cue_questions()
    provenance: Json = {}
    if count:
        spec = ModelSpec.parse(model)
        if spec.name is None or spec.url is None or spec.adapter is not None:
            raise X2DFDError("--generate needs --model NAME@http://HOST/v1", code="option_missing")
        generated, provenance = generate(connect(spec.url), spec.name, count, known=chosen, seed=seed)
        chosen = chosen + generated
    if only is not None:
        first = {(c.area, c.artifact) for sample in read_manifest(cues_of) for c in sample.cues} if cues_of else set()
        chosen = some(chosen, only, first, np.random.default_rng(seed))
    chosen = chosen + random_questions(unrelated, np.random.default_rng(seed))
    write_questions(out, chosen, provenance)
    cues = {(q.area, q.artifact) for q in chosen if q.area}
    without_cue = sum(q.area is None and q.origin != "random" for q in chosen)
    print(
        f"{out}: {len(chosen)} questions on {len(cues)} cues"
        + (f", {without_cue} without a readable cue" if without_cue else "")
    )
