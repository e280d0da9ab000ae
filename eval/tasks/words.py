"""Tasks whose answers are words: `answer` (DF-D), `classify` (DF-C), `chat` (FC). Parsers: eval.answers.

Every question is about the largest face of a picture, with what the experts say where the model was trained with them.
An answer that cannot be read is counted wrong and shown; a picture that could not be asked about is counted apart.
A row holds the MLLM's own `p_fake`, and as `said` what was read from the answer (chat: the verdict).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from eval import answers, stats
from eval import metrics as m
from eval.models import TOOL_RESULTS, Opened, tool_results
from eval.rows import Origin, SampleRow, score
from eval.scoring import Part, Scored, equalised, train_apart, unscored
from eval.stats import Measured
from eval.task import DECIDING, NO_ORIGIN, Made, Run, Task
from eval.tasks.detect import majority_rows
from x2dfd import prompts
from x2dfd.errors import InputError, X2DFDError
from x2dfd.explain import said_label
from x2dfd.manifest import Sample
from x2dfd.types import DF_CLASSES, Evidence, Face, Report

if TYPE_CHECKING:
    from x2dfd.detector import Detector


SHOWN = 10  # answers that could not be read, in the result
ASKED: dict[str, tuple[Callable[[Sample], str], Callable[[str, Sample], str]]] = {
    "answer": (
        lambda s: answers.question_for(s.id).text,
        lambda text, s: answers.read_decision(text, answers.question_for(s.id).yes),
    ),
    "classify": (lambda _: answers.CLASS_CHOICES, lambda text, _: answers.read_class(text)),
}
"""Task -> what a sample is asked, and how the answer is read."""


def run_questions(run: Run) -> Made:
    """`answer` and `classify`."""
    options, classes = run.options, run.options.task == "classify"
    model = run.open()
    store = run.store()
    threshold, origin = 0.5, NO_ORIGIN
    if model.name == "majority":
        rows = _majority_classes(run) if classes else majority_rows(run.every(), run.samples)[0]
    else:
        need_texts(model, options.task)
        question, read = ASKED[options.task]
        judge = partial(ask, model.detector, question=question, read=read)
        judge = partial(judge, equal=options.equalise, batch_size=options.batch_size)
        rows, origin = score(judge, run.samples, store)
        if model.detector.calibration:
            threshold = model.detector.calibration.mllm_threshold
    if classes:
        measured = {"skipped_without_class": run.skipped} | classify_result(run.samples, rows)
    else:
        measured = answer_result(run.samples, rows, threshold)
    return Made(store, rows, origin, measured, model.name, model.mode)


def run_chat(run: Run) -> Made:
    model = run.open()
    need_texts(model, run.options.task)
    store = run.store()
    rows, origin = score(partial(converse, model.detector, equal=run.options.equalise), run.samples, store)
    return Made(store, rows, origin, chat_result(run.samples, rows), model.name, model.mode, scores_of=DECIDING)


def need_texts(model: Opened, task: str) -> None:
    """Raises X2DFDError for a model that writes nothing."""
    if not model.writes:
        raise X2DFDError(f"{task} asks for words, and {model.name} writes none", code="model_without_words")


_WORDINGS = f"real or fake in words (DF-D): {len(answers.QUESTIONS)} wordings, half reversed"
ANSWER = Task("answer", "2", "image", _WORDINGS, run_questions)
CLASSIFY = Task(
    "classify",
    "2",
    "image",
    f"which kind of forgery, in words (DF-C): {', '.join(DF_CLASSES)}",
    run_questions,
    lambda s: bool(s.df_class),
    "a known df_class",
)
CHAT = Task("chat", "3", "image", "one follow-up question after the verdict (FC)", run_chat)


def _majority_classes(run: Run) -> list[SampleRow]:
    """The commonest class as everybody's answer."""
    train = [s for s in train_apart(run.every(), run.samples) if s.df_class]
    known = [s.df_class for s in train or run.samples if s.df_class]
    rows = [SampleRow.of(s) for s in run.samples]
    for row in rows:
        row.said = min(set(known), key=lambda c: (-known.count(c), c))
    return rows


def worded(detector: Detector, question: str, evidence: Sequence[Evidence]) -> str:
    """The question with the expert block: as in the verdict's question, or as tool results."""
    if detector.info.asked_with == TOOL_RESULTS:
        return tool_results(question, evidence)
    return question + prompts.expert_block(detector.for_prompt(evidence), detector.info.score_form)


def ask(
    detector: Detector,
    samples: Sequence[Sample],
    *,
    question: Callable[[Sample], str],
    read: Callable[[str, Sample], str],
    equal: bool,
    batch_size: int,
) -> tuple[list[SampleRow], list[Origin]]:
    """A row a sample, and where they come from."""
    from x2dfd.detector import versions
    from x2dfd.faces import find_faces
    from x2dfd.media import load_picture

    rows: list[SampleRow] = [SampleRow.of(s) for s in samples]
    asked: list[tuple[SampleRow, Sample]] = []
    faces: list[Face] = []
    for row, sample in zip(rows, samples, strict=True):
        try:
            pixels = load_picture(equalised(sample.path) if equal else sample.path).pixels
            found = find_faces(pixels, detector.info.crop_size)
        except InputError as error:
            row.failed(error.code, error.reason)
            continue
        if found:
            asked.append((row, sample))
            faces.append(found[0])
        else:
            row.reason = "no_face"
    for at in range(0, len(faces), batch_size):
        _answered_rows(detector, asked[at : at + batch_size], faces[at : at + batch_size], question, read)
    return rows, [{"model": detector.info.to_dict(), "versions": versions()}]


def _answered_rows(
    detector: Detector,
    asked: Sequence[tuple[SampleRow, Sample]],
    faces: Sequence[Face],
    question: Callable[[Sample], str],
    read: Callable[[str, Sample], str],
) -> None:
    """Fills the rows of faces that go through the model together; what one picture causes is its own row's."""
    from x2dfd.detector import through_codec

    try:
        logits, evidence = detector.judge_faces(faces)
        encoding = detector.mllm.encode(np.stack([f.view for f in through_codec(faces)]))
        texts = [worded(detector, question(s), said) for (_, s), said in zip(asked, evidence, strict=True)]
        answered = detector.mllm.write(encoding, texts, [""] * len(texts))
    except InputError as error:  # of a served model, about one of these pictures
        if len(faces) == 1:
            asked[0][0].failed(error.code, error.reason)
            return
        for one, face in zip(asked, faces, strict=True):
            _answered_rows(detector, [one], [face], question, read)
        return
    for (row, sample), own, said, text, answer in zip(asked, logits, evidence, texts, answered, strict=True):
        row.p_fake, row.question, row.answer = float(1 / (1 + np.exp(-own))), text, answer
        row.said, row.experts = read(answer, sample), {e.expert: e.score for e in said}
        row.notes = {e.expert: e.note for e in said if e.note}


def _answered(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> tuple[list[SampleRow], list[Sample], Part]:
    kept = [(row, s) for row, s in zip(rows, samples, strict=True) if row.said is not None]
    missing = unscored(rows, [None if row.said is None else 1.0 for row in rows])
    return [row for row, _ in kept], [s for _, s in kept], {"n_scored": len(kept), "unscored": missing}


def answer_result(samples: Sequence[Sample], rows: Sequence[SampleRow], threshold: float) -> Part:
    """DF-D: an invalid answer is wrong. By what yes means, and by wording, because models say yes."""
    kept, of, result = _answered(samples, rows)
    right = [row.said == s.label for row, s in zip(kept, of, strict=True)]
    invalid = [row.said == answers.INVALID for row in kept]

    def rate(hits: Sequence[bool], chosen: Sequence[int]) -> Measured:
        return stats.rate([hits[i] for i in chosen], [of[i].group for i in chosen])

    def rates(chosen: Sequence[int]) -> Part:
        real, fake = (rate(right, [i for i in chosen if of[i].label == label]) for label in ("real", "fake"))
        balanced = None if real.value is None or fake.value is None else (real.value + fake.value) / 2
        found = {"accuracy": rate(right, chosen), "balanced_accuracy": balanced, "invalid": rate(invalid, chosen)}
        return found | {"recall_real": real, "recall_fake": fake}

    overall = rates(range(len(kept)))
    called, n_fake = sum(row.said == "fake" for row in kept), sum(s.label == "fake" for s in of)
    hits = sum(ok for ok, s in zip(right, of, strict=True) if s.label == "fake")
    overall["f1_fake"] = 2 * hits / (called + n_fake) if called + n_fake else None
    wordings = [answers.question_for(s.id) for s in of]
    scored = Scored.of(of, [row.p_fake for row in kept])
    # Text against score: the number says one thing and the words another.
    both = [i for i in scored.at if not invalid[i]]
    apart = {i: (kept[i].said == "fake") != ((kept[i].p_fake or 0.0) >= threshold) for i in both}
    result |= overall | {
        "by_polarity": {
            f"yes means {yes}": {"n": len(mine)} | rates(mine)
            for yes in ("fake", "real")
            if (mine := [i for i, q in enumerate(wordings) if q.yes == yes])
        },
        "by_question": {
            q.text: rate(right, mine)
            for q in answers.QUESTIONS
            if (mine := [i for i, w in enumerate(wordings) if w is q])
        },
        "invalid_answers": _shown(kept),
        "p_fake": {"auc": scored.auc(), "eer": m.eer(scored.labels, scored.scores)},
        "disagreement": stats.rate(list(apart.values()), [of[i].group for i in both]),
        "threshold": threshold,
    }
    headline = {f"answers.{k}": overall[k] for k in ("accuracy", "invalid")}
    headline["answers.p_fake.auc"] = result["p_fake"]["auc"]
    return {"headline": headline, "scorers": {"answers": result}}


def classify_result(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """DF-C over samples whose class is known: accuracy, macro-F1, confusion with its column of invalid answers."""
    kept, of, result = _answered(samples, rows)
    truth, said = [str(s.df_class) for s in of], [str(row.said) for row in kept]
    groups = [s.group for s in of]
    result |= {
        "accuracy": stats.rate([t == s for t, s in zip(truth, said, strict=True)], groups),
        "macro_f1": Measured(answers.macro_f1(truth, said), None, len(kept), len(set(groups))),
        "invalid": stats.rate([s == answers.INVALID for s in said], groups),
        "confusion": answers.confusion(truth, said, DF_CLASSES),
        "invalid_answers": _shown(kept),
    }
    headline = {f"classes.{k}": result[k] for k in ("accuracy", "macro_f1", "invalid")}
    return {"headline": headline, "scorers": {"classes": result}}


def _shown(rows: Sequence[SampleRow]) -> list[str]:
    return [row.answer[:200] for row in rows if row.said == answers.INVALID][:SHOWN]


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


def converse(detector: Detector, samples: Sequence[Sample], *, equal: bool) -> tuple[list[SampleRow], list[Origin]]:
    """One follow-up after each verdict."""
    from x2dfd.detector import versions

    rows = []
    for sample in samples:
        row = SampleRow.of(sample)
        rows.append(row)
        try:
            source = equalised(sample.path) if equal else sample.path
            report: Report = detector.detect(source, rationale=True)
            if not report.faces:
                row.reason = "no_face"
                continue
            row.question = follow_up(sample)
            row.answer = detector.chat(report, row.question, source=source)
        except InputError as error:
            row.failed(error.code, error.reason)
            continue
        row.p_fake, row.said = report.verdict.p_fake, report.verdict.label
        row.experts = {e.expert: e.score for e in report.evidence}
    return rows, [{"model": detector.info.to_dict(), "versions": versions()}]


def chat_result(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """What can be counted of answers without reading them: empty ones, those against the verdict, repeated ones."""
    kept, of, result = _answered(samples, rows)
    groups = [s.group for s in of]
    own = [said_label(row.answer) for row in kept]
    against = [o is not None and v.said != "inconclusive" and o != v.said for o, v in zip(own, kept, strict=True)]
    result |= {
        "empty": stats.rate([not row.answer.strip() for row in kept], groups),
        "against_verdict": stats.rate(against, groups),
        "distinct_answers": m.distinct_share([row.answer for row in kept]),
        "by_question": {
            q: {"n": len(mine), "distinct_answers": m.distinct_share(mine)}
            for q in FOLLOW_UPS
            if (mine := [row.answer for row in kept if row.question == q])
        },
    }
    headline = {f"chat.{k}": result[k] for k in ("empty", "against_verdict")}
    return {"headline": headline, "scorers": {"chat": result}}
