"""Tasks whose answers are words: `answer` (DF-D), `classify` (DF-C), `chat` (FC). Parsers: eval.answers.

Every question is about a picture's largest face, and states the experts' scores if the model was trained with them.
An answer that cannot be read counts as wrong and is listed; a picture without an answer is counted separately.
A row holds the MLLM's own `p_fake`, and as `said` the decision or class in the answer (chat: the verdict).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from eval import answers
from eval import metrics as m
from eval.models import TOOL_RESULTS, Opened, tool_results
from eval.rows import Origin, SampleRow, score
from eval.scoring import Judged, Part, Scored, called_fake, equalised, share, train_apart, unscored
from eval.stats import Measured
from eval.task import DECIDING, NO_ORIGIN, Outcome, Run, Task
from eval.tasks.detect import majority_rows
from x2dfd import prompts
from x2dfd.calibration import sigmoid
from x2dfd.detector import Detector, through_codec, versions
from x2dfd.errors import InputError, X2DFDError
from x2dfd.explain import said_label
from x2dfd.faces import find_faces
from x2dfd.manifest import Sample
from x2dfd.media import load_picture
from x2dfd.types import DF_CLASSES, Evidence, Face, Report

MAX_EXAMPLES = 10  # answers that could not be read, in the result
EXCHANGES: dict[str, tuple[Callable[[Sample], str], Callable[[str, Sample], str]]] = {
    "answer": (
        lambda s: answers.question_for(s.id).text,
        lambda text, s: answers.read_decision(text, answers.question_for(s.id).yes),
    ),
    "classify": (lambda _: answers.CLASS_CHOICES, lambda text, _: answers.read_class(text)),
}
"""Task -> the question to a sample, and the reading of its answer."""


def run_questions(run: Run) -> Outcome:
    """`answer` and `classify`."""
    options, classes = run.options, run.options.task == "classify"
    model = run.open()
    store = run.store()
    threshold, origin = 0.5, NO_ORIGIN
    if model.name == "majority":
        rows = _majority_classes(run) if classes else majority_rows(run.every(), run.samples)[0]
    else:
        need_texts(model, options.task)
        question, read = EXCHANGES[options.task]
        judge = partial(ask, model.detector, question=question, read=read)
        judge = partial(judge, equal=options.equalise, batch_size=options.batch_size)
        rows, origin = score(judge, run.samples, store)
        if model.detector.calibration:
            threshold = model.detector.calibration.mllm_threshold
    if classes:
        measured = {"skipped_without_class": run.skipped} | classify_result(run.samples, rows)
    else:
        measured = answer_result(run.samples, rows, threshold)
    return Outcome(store, rows, origin, measured, model.name, model.mode)


def run_chat(run: Run) -> Outcome:
    model = run.open()
    need_texts(model, run.options.task)
    store = run.store()
    rows, origin = score(partial(converse, model.detector, equal=run.options.equalise), run.samples, store)
    return Outcome(store, rows, origin, chat_result(run.samples, rows), model.name, model.mode, scores_of=DECIDING)


def need_texts(model: Opened, task: str) -> None:
    """Raises X2DFDError for a model that writes no text."""
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
    """The commonest class as the answer for every sample."""
    train = [s for s in train_apart(run.every(), run.samples) if s.df_class]
    classes = [s.df_class for s in train or run.samples if s.df_class]
    rows = [SampleRow.of(s) for s in run.samples]
    for row in rows:
        row.said = min(set(classes), key=lambda c: (-classes.count(c), c))
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
    """A row for each sample, and their origin."""
    rows: list[SampleRow] = [SampleRow.of(s) for s in samples]
    pending: list[tuple[SampleRow, Sample]] = []
    faces: list[Face] = []
    for row, sample in zip(rows, samples, strict=True):
        try:
            pixels = load_picture(equalised(sample.path) if equal else sample.path).pixels
            largest = find_faces(pixels, detector.info.crop_size)
        except InputError as error:
            row.failed(error.code, error.reason)
            continue
        if largest:
            pending.append((row, sample))
            faces.append(largest[0])
        else:
            row.reason = "no_face"
    for start in range(0, len(faces), batch_size):
        _fill_rows(detector, pending[start : start + batch_size], faces[start : start + batch_size], question, read)
    return rows, [{"model": detector.info.to_dict(), "versions": versions()}]


def _fill_rows(
    detector: Detector,
    pending: Sequence[tuple[SampleRow, Sample]],
    faces: Sequence[Face],
    question: Callable[[Sample], str],
    read: Callable[[str, Sample], str],
) -> None:
    """Fills the rows of faces that go through the model as one batch; an error is recorded for its own picture only."""
    try:
        logits, evidence = detector.judge_faces(faces)
        encoding = detector.mllm.encode(np.stack([f.view for f in through_codec(faces)]))
        texts = [worded(detector, question(s), items) for (_, s), items in zip(pending, evidence, strict=True)]
        replies = detector.mllm.write(encoding, texts, [""] * len(texts))
    except InputError as error:  # a served model refused one of these pictures
        if len(faces) == 1:
            pending[0][0].failed(error.code, error.reason)
            return
        for pair, face in zip(pending, faces, strict=True):
            _fill_rows(detector, [pair], [face], question, read)
        return
    for (row, sample), logit, items, text, answer in zip(pending, logits, evidence, texts, replies, strict=True):
        row.p_fake, row.question, row.answer = float(sigmoid(logit)), text, answer
        row.said, row.experts = read(answer, sample), {e.expert: e.score for e in items}
        row.notes = {e.expert: e.note for e in items if e.note}


def _with_answer(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> tuple[list[Judged], Part]:
    answered = [(s, row) for s, row in zip(samples, rows, strict=True) if row.said is not None]
    missing = unscored(rows, [None if row.said is None else 1.0 for row in rows])
    return answered, {"n_scored": len(answered), "unscored": missing}


def _right(sample: Sample, row: SampleRow) -> bool:
    return row.said == sample.label


def _invalid(_: Sample, row: SampleRow) -> bool:
    return row.said == answers.INVALID


def answer_result(samples: Sequence[Sample], rows: Sequence[SampleRow], threshold: float) -> Part:
    """DF-D: an invalid answer is wrong. Also by the meaning of yes and by wording, because models tend to say yes."""
    answered, result = _with_answer(samples, rows)

    def rates(chosen: Sequence[Judged]) -> Part:
        real, fake = (share([p for p in chosen if p[0].label == label], _right) for label in ("real", "fake"))
        balanced = None if real.value is None or fake.value is None else (real.value + fake.value) / 2
        figures = {"accuracy": share(chosen, _right), "balanced_accuracy": balanced, "invalid": share(chosen, _invalid)}
        return figures | {"recall_real": real, "recall_fake": fake}

    overall = rates(answered)
    fakes = [(s, row) for s, row in answered if s.label == "fake"]
    of_both = sum(row.said == "fake" for _, row in answered) + len(fakes)
    overall["f1_fake"] = 2 * sum(_right(s, row) for s, row in fakes) / of_both if of_both else None
    wordings = [answers.question_for(s.id) for s, _ in answered]
    scored = Scored.of([s for s, _ in answered], [row.p_fake for _, row in answered])
    # Conflicts: the score means one label and the words state the other.
    readable = [answered[i] for i in scored.at if not _invalid(*answered[i])]
    result |= overall | {
        "by_polarity": {
            f"yes means {yes}": {"n": len(chosen)} | rates(chosen)
            for yes in ("fake", "real")
            if (chosen := [p for p, q in zip(answered, wordings, strict=True) if q.yes == yes])
        },
        "by_question": {
            question.text: share(chosen, _right)
            for question in answers.QUESTIONS
            if (chosen := [p for p, q in zip(answered, wordings, strict=True) if q is question])
        },
        "invalid_answers": _examples(answered),
        "p_fake": {"auc": scored.auc(), "eer": m.eer(scored.labels, scored.scores)},
        "disagreement": share(readable, lambda s, row: called_fake(s, row) != ((row.p_fake or 0.0) >= threshold)),
        "threshold": threshold,
    }
    headline = {f"answers.{k}": overall[k] for k in ("accuracy", "invalid")}
    headline["answers.p_fake.auc"] = result["p_fake"]["auc"]
    return {"headline": headline, "scorers": {"answers": result}}


def classify_result(samples: Sequence[Sample], rows: Sequence[SampleRow]) -> Part:
    """DF-C over samples whose class is known: accuracy, macro-F1, confusion with its column of invalid answers."""
    answered, result = _with_answer(samples, rows)
    truth, predictions = [s.df_class for s, _ in answered], [str(row.said) for _, row in answered]
    accuracy = share(answered, lambda s, row: row.said == s.df_class)
    result |= {
        "accuracy": accuracy,
        "macro_f1": Measured(answers.macro_f1(truth, predictions), None, accuracy.n, accuracy.groups),
        "invalid": share(answered, _invalid),
        "confusion": answers.confusion(truth, predictions, DF_CLASSES),
        "invalid_answers": _examples(answered),
    }
    headline = {f"classes.{k}": result[k] for k in ("accuracy", "macro_f1", "invalid")}
    return {"headline": headline, "scorers": {"classes": result}}


def _examples(answered: Sequence[Judged]) -> list[str]:
    return [row.answer[:200] for s, row in answered if _invalid(s, row)][:MAX_EXAMPLES]


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
    """Counts of answers that are empty, contradict the verdict or repeat others."""
    answered, result = _with_answer(samples, rows)

    def against(_: Sample, row: SampleRow) -> bool:
        return said_label(row.answer) not in (None, row.said) and row.said != "inconclusive"

    result |= {
        "empty": share(answered, lambda _, row: not row.answer.strip()),
        "against_verdict": share(answered, against),
        "distinct_answers": m.distinct_share([row.answer for _, row in answered]),
        "by_question": {
            q: {"n": len(texts), "distinct_answers": m.distinct_share(texts)}
            for q in FOLLOW_UPS
            if (texts := [row.answer for _, row in answered if row.question == q])
        },
    }
    headline = {f"chat.{k}": result[k] for k in ("empty", "against_verdict")}
    return {"headline": headline, "scorers": {"chat": result}}
