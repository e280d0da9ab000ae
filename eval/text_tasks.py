"""Tasks whose answers are words: `answer` (DF-D), `classify` (DF-C), `chat` (FC). Parsers: eval.answers.

Every question is about the largest face of a picture, with what the experts say where the model was trained with them.
An answer that cannot be read is counted wrong and shown; a picture that could not be asked about is counted apart.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eval import answers
from eval import metrics as m
from eval.models import tool_results
from eval.scoring import Layout, Resampling, Row, equalised, reason_of, sha256_of
from x2dfd import prompts
from x2dfd.errors import InputError, SetupError, X2DFDError
from x2dfd.explain import said_label
from x2dfd.manifest import Sample
from x2dfd.types import DF_CLASSES, Evidence, Face, Report

LAYOUT = Layout(
    texts=("said", "reason", "question", "answer", "error"), numbers=("p_fake",), packed=("notes", "judgement")
)
"""`p_fake` is the MLLM's own; `said` what was read from the answer (chat: the verdict); `judgement`: of the judge."""

SHOWN = 10  # answers that could not be read, in the result


def blank(sample: Sample) -> Row:
    row: Row = {"id": sample.id, "sha256": sha256_of(sample.path), "experts": {}, "notes": {}, "judgement": {}}
    return row | dict.fromkeys(("p_fake", "said", "reason", "error")) | {"question": "", "answer": ""}


# ---------------------------------------------------------------- asking


def worded(detector: Any, question: str, evidence: Sequence[Evidence]) -> str:
    """The question with what the model is told of the experts: as in its verdict's question, or as tool results."""
    if detector.facts.get("asked_with") == "tool results":
        return tool_results(question, evidence)
    known = [e for e in evidence if e.expert in detector.facts["in_prompt"]]
    return question + prompts.told(known, detector.facts["score_form"])


def ask(
    detector: Any,
    samples: Sequence[Sample],
    *,
    question: Callable[[Sample], str],
    read: Callable[[str, Sample], str],
    equal: bool,
    batch_size: int,
) -> tuple[list[Row], list[Row]]:
    """A row a sample, and where they come from."""
    from x2dfd.detector import versions
    from x2dfd.faces import find_faces
    from x2dfd.media import load_picture

    rows, asked, faces = [blank(s) for s in samples], [], []
    for row, sample in zip(rows, samples, strict=True):
        try:
            found = find_faces(load_picture(equalised(sample.path) if equal else sample.path).pixels)
        except InputError as error:
            row |= {"reason": error.code, "error": f"{error.reason} [{error.code}]"}
            continue
        if found:
            asked.append((row, sample))
            faces.append(found[0])
        else:
            row["reason"] = "no_face"
    for at in range(0, len(faces), batch_size):
        _answered_rows(detector, asked[at : at + batch_size], faces[at : at + batch_size], question, read)
    return rows, [{"model": detector.facts, "versions": versions()}]


def _answered_rows(
    detector: Any,
    asked: Sequence[tuple[Row, Sample]],
    faces: Sequence[Face],
    question: Callable[[Sample], str],
    read: Callable[[str, Sample], str],
) -> None:
    """Fills the rows of faces that go through the model together; what one picture causes is its own row's."""
    from x2dfd.detector import through_codec

    try:
        logits, evidence = detector.judge_faces(faces)
        look = detector.mllm.look(np.stack([f.crop for f in through_codec(faces)]))
        texts = [worded(detector, question(s), said) for (_, s), said in zip(asked, evidence, strict=True)]
        answered = detector.mllm.write(look, texts, [""] * len(texts))
    except InputError as error:  # of a served model, about one of these pictures
        if len(faces) == 1:
            asked[0][0].update({"reason": error.code, "error": f"{error.reason} [{error.code}]"})
            return
        for one, face in zip(asked, faces, strict=True):
            _answered_rows(detector, [one], [face], question, read)
        return
    for (row, sample), own, said, text, answer in zip(asked, logits, evidence, texts, answered, strict=True):
        row |= {"p_fake": float(1 / (1 + np.exp(-own))), "question": text, "answer": answer}
        row |= {"said": read(answer, sample), "experts": {e.expert: e.score for e in said}}
        row["notes"] = {e.expert: e.note for e in said if e.note}


def read_answer(text: str, sample: Sample) -> str:
    return answers.read_decision(text, answers.question_for(sample.id).yes)


def answer_question(sample: Sample) -> str:
    return answers.question_for(sample.id).text


def read_class(text: str, _: Sample) -> str:
    return answers.read_class(text)


def class_question(_: Sample) -> str:
    return answers.CLASS_CHOICES


# ---------------------------------------------------------------- what is counted


def answer_result(samples: Sequence[Sample], rows: Sequence[Row], threshold: float, draw: Resampling) -> Row:
    """DF-D: an invalid answer is wrong. By what yes means, and by wording, because models say yes."""
    kept, of, result = _answered(samples, rows)
    labels = m.to_labels(s.label for s in of)
    groups = [s.group for s in of]
    right = [row["said"] == s.label for row, s in zip(kept, of, strict=True)]
    invalid = [row["said"] == answers.INVALID for row in kept]

    def rates(chosen: Sequence[int]) -> Row:
        reals, fakes = ([i for i in chosen if labels[i] == label] for label in (0, 1))
        recall = {n: draw.rate([right[i] for i in own], [groups[i] for i in own])
                  for n, own in (("recall_real", reals), ("recall_fake", fakes))}  # fmt: skip
        both = [r["value"] for r in recall.values()]
        mine = [groups[i] for i in chosen]
        return {
            "accuracy": draw.rate([right[i] for i in chosen], mine),
            "balanced_accuracy": None if None in both else sum(both) / 2,
            **recall,
            "invalid": draw.rate([invalid[i] for i in chosen], mine),
        }

    overall = rates(range(len(kept)))
    called = sum(row["said"] == "fake" for row in kept)
    hits = sum(ok for ok, label in zip(right, labels, strict=True) if label == 1)
    n_fake = int(labels.sum())
    overall["f1_fake"] = 2 * hits / (called + n_fake) if called + n_fake else None
    wordings = [answers.question_for(s.id) for s in of]
    result |= overall | {
        "by_polarity": {
            f"yes means {yes}": {"n": len(mine)} | rates(mine)
            for yes in ("fake", "real")
            if (mine := [i for i, q in enumerate(wordings) if q.yes == yes])
        },
        "by_question": {
            q.text: {"n": len(mine), "accuracy": sum(right[i] for i in mine) / len(mine)}
            for q in answers.QUESTIONS
            if (mine := [i for i, w in enumerate(wordings) if w is q])
        },
        "invalid_answers": _shown(kept),
    }
    scored = [i for i, row in enumerate(kept) if row["p_fake"] is not None]
    scores = m.to_scores([kept[i]["p_fake"] for i in scored])
    of_scored = [groups[i] for i in scored]
    result["p_fake"] = {
        name: draw.measure(fn, labels[scored], scores, of_scored)
        for name, fn in (("auc", m.auc), ("average_precision", m.average_precision), ("eer", m.eer))
    }
    # Text against score: the number says one thing and the words another.
    said_both = [i for i in scored if not invalid[i]]
    apart = [(kept[i]["said"] == "fake") != (kept[i]["p_fake"] >= threshold) for i in said_both]
    result["disagreement"] = draw.rate(apart, [groups[i] for i in said_both]) | {"threshold": threshold}
    headline = {f"answers.{k}": overall[k] for k in ("accuracy", "invalid")}
    headline["answers.p_fake.auc"] = result["p_fake"]["auc"] | {"n": len(scored)}
    return {"headline": headline, "scorers": {"answers": result}}


def classify_result(samples: Sequence[Sample], rows: Sequence[Row], draw: Resampling) -> Row:
    """DF-C over samples whose class is known: accuracy, macro-F1, confusion with its column of invalid answers."""
    kept, of, result = _answered(samples, rows)
    truth, said = [s.df_class for s in of], [row["said"] for row in kept]
    groups = [s.group for s in of]

    def f1(index: m.Labels, _: m.Floats) -> float | None:
        return answers.macro_f1([truth[i] for i in index], [said[i] for i in index])

    at = np.arange(len(kept))
    result |= {
        "accuracy": draw.rate([t == s for t, s in zip(truth, said, strict=True)], groups),
        "macro_f1": draw.measure(f1, at, np.zeros(len(at)), groups),
        "invalid": draw.rate([s == answers.INVALID for s in said], groups),
        "confusion": answers.confusion(truth, said, DF_CLASSES),
        "invalid_answers": _shown(kept),
    }
    headline = {f"classes.{k}": result[k] | {"n": len(kept)} for k in ("accuracy", "macro_f1", "invalid")}
    return {"headline": headline, "scorers": {"classes": result}}


def _answered(samples: Sequence[Sample], rows: Sequence[Row]) -> tuple[list[Row], list[Sample], Row]:
    kept = [(row, s) for row, s in zip(rows, samples, strict=True) if row["said"] is not None]
    missing = Counter(reason_of(row, "") for row in rows if row["said"] is None)
    counts: Row = {"n_scored": len(kept), "unscored": dict(sorted(missing.items()))}
    return [row for row, _ in kept], [s for _, s in kept], counts


def _shown(rows: Sequence[Row]) -> list[str]:
    return [row["answer"][:200] for row in rows if row["said"] == answers.INVALID][:SHOWN]


# ---------------------------------------------------------------- chat

FOLLOW_UPS = (
    "Why do you think so?",
    "What about the eyes?",
    "What about the mouth?",
    "What about the jaw line?",
    "What about the skin?",
    "Which technique was used, if any?",
    "Are you sure? I took this photo myself.",
    "My editor needs one sentence. What do I write?",
)


def follow_up(sample: Sample) -> str:
    """The follow-up that a sample gets: always the same for its id."""
    return FOLLOW_UPS[int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8]) % len(FOLLOW_UPS)]


def converse(
    detector: Any, samples: Sequence[Sample], *, equal: bool, judge: Judge | None, batch_size: int
) -> tuple[list[Row], list[Row]]:
    """One follow-up after each verdict; with a judge, its judgement of the answer."""
    from x2dfd.detector import versions

    rows = []
    for sample in samples:
        row = blank(sample)
        rows.append(row)
        try:
            source = equalised(sample.path) if equal else sample.path
            report: Report = detector.detect(source, rationale=True)
            if not report.faces:
                row["reason"] = "no_face"
                continue
            question = follow_up(sample)
            answer = detector.chat(report, question, source=source)
        except InputError as error:
            row |= {"reason": error.code, "error": f"{error.reason} [{error.code}]"}
            continue
        row |= {"p_fake": report.verdict.p_fake, "said": report.verdict.label, "question": question, "answer": answer}
        row["experts"] = {e.expert: e.score for e in report.evidence}
        if judge:
            row["judgement"] = judge(sample, question, answer)
    stated = detector.facts | ({"judge": judge.facts()} if judge else {})
    return rows, [{"model": stated, "versions": versions()}]


def chat_result(samples: Sequence[Sample], rows: Sequence[Row], judge: Judge | None, draw: Resampling) -> Row:
    """What can be counted without a judge; the judge's marks stand apart and never in the headline."""
    kept, of, result = _answered(samples, rows)
    groups = [s.group for s in of]
    own = [said_label(row["answer"]) for row in kept]
    against = [o is not None and v["said"] != "inconclusive" and o != v["said"] for o, v in zip(own, kept, strict=True)]
    result |= {
        "empty": draw.rate([not row["answer"].strip() for row in kept], groups),
        "against_verdict": draw.rate(against, groups),
        "distinct_answers": m.distinct_share([row["answer"] for row in kept]),
        "by_question": {
            q: {"n": len(mine), "distinct_answers": m.distinct_share(mine)}
            for q in FOLLOW_UPS
            if (mine := [row["answer"] for row in kept if row["question"] == q])
        },
    }
    if judge:
        marks = [row["judgement"].get("mark") for row in kept]
        known = [i for i, mark in enumerate(marks) if mark is not None]
        scores = m.to_scores([marks[i] for i in known])
        mean = draw.measure(m.mean, np.zeros(len(known), np.int64), scores, [groups[i] for i in known])
        result["judge"] = judge.facts() | {"mark": mean | {"n": len(known)}, "invalid": len(kept) - len(known)}
    headline = {f"chat.{k}": result[k] for k in ("empty", "against_verdict")}
    return {"headline": headline, "scorers": {"chat": result}}


JUDGE_SYSTEM = "You mark answers about photos of faces. You see the truth and the answer, not the photo."
JUDGE_PROMPT = (
    "Truth: {truth}\nQuestion: {question}\nAnswer: {answer}\n"
    "Mark the answer from 1 (wrong, or says nothing) to 5 (true to the truth above, and answers the question). "
    "What the truth does not bear out is wrong. Reply with the number alone."
)
_MARK = re.compile(r"\W*([1-5])\W*")


@dataclass
class Judge:
    """A model at an OpenAI-compatible endpoint that marks answers; OPENAI_API_KEY is its key, kept nowhere."""

    url: str
    model: str
    seed: int

    def __post_init__(self) -> None:
        try:
            import openai
        except ImportError as error:
            raise SetupError("a judge needs the package openai: pip install 'x2dfd[serve]'") from error
        import os

        self._errors = openai.OpenAIError
        self._client = openai.OpenAI(
            base_url=self.url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=60, max_retries=3
        )

    def facts(self) -> Row:
        prompt = json.dumps([JUDGE_SYSTEM, JUDGE_PROMPT])
        return {
            "model": self.model,
            "host": self._client.base_url.host,
            "seed": self.seed,
            "temperature": 0,
            "system": JUDGE_SYSTEM,
            "prompt": JUDGE_PROMPT,
            "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        }

    def __call__(self, sample: Sample, question: str, answer: str) -> Row:
        """`mark` 1..5, or None where the reply is no mark, and the reply. Raises SetupError when nothing answers."""
        asked = JUDGE_PROMPT.format(truth=truth_of(sample), question=question, answer=answer)
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "system", "content": JUDGE_SYSTEM}, {"role": "user", "content": asked}],
                temperature=0,
                seed=self.seed,
                max_tokens=8,
            )
            text = reply.choices[0].message.content or ""
        except (self._errors, IndexError, AttributeError) as error:
            host = self._client.base_url.host
            raise SetupError(f"the judge at {host} does not answer: {type(error).__name__}. Run again later") from None
        found = _MARK.fullmatch(text)
        return {"mark": int(found[1]) if found else None, "reply": text[:80]}


def truth_of(sample: Sample) -> str:
    """What is known of a sample, in words for the judge."""
    if sample.label == "real":
        return "the photo is real."
    signs = "; ".join(f"{c.area}: {c.artifact}" for c in sample.cues)
    kind = f" ({sample.df_class})" if sample.df_class else ""
    return f"the photo is fake{kind}. " + (f"Its signs: {signs}." if signs else "Its signs are not known.")


def need_texts(model: Any, task: str) -> None:
    """Raises X2DFDError for a model that writes nothing."""
    if not model.writes:
        raise X2DFDError(f"{task} asks for words, and {model.name} writes none")
