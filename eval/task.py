"""A task of the benchmark, its input and its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from eval import models
from eval.changes import Change, changes_of
from eval.rows import Judge, Origin, SampleRow, Store
from eval.scoring import Part, changed, equalised
from x2dfd.errors import InputError, X2DFDError
from x2dfd.manifest import Sample, read_manifest
from x2dfd.types import Failure, Report

NO_ORIGIN: Origin = {"model": {}, "versions": {}}
DECIDING = "the face that decided the verdict"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    task: str
    data: Path  # a manifest, or a CueBench folder
    out: Path
    choice: models.Choice
    split: str | None = None
    limit: int | None = None
    by: tuple[str, ...] = ("source", "method")
    seed: int = 0
    batch_size: int = 8
    equalise: bool = True
    experts: str | None = None
    changes: str | None = None
    with_mllm: bool = False
    sentence_encoder: Path | None = None
    questions: Path | None = None
    compat: str = ""
    reporting: Path | None = None  # the ledger of looks, where this is a reporting set

    def one_change(self) -> Change | None:
        """The change under which `detect` judges. Raises X2DFDError if several are named, UnknownName for others."""
        changes = changes_of(self.changes or "")
        if len(changes) > 1:
            raise X2DFDError(
                f"detect judges under one change a run, and --changes {self.changes} is {len(changes)}, such as "
                f"{next(iter(changes))}: give each its own run and its own --out",
                code="changes_too_many",
            )
        return next(iter(changes.values()), None)


@dataclass(frozen=True)
class Run:
    """The input of a task."""

    options: Options
    manifest: Path
    sha256: str  # of the manifest
    version: str  # of the task
    samples: list[Sample]
    skipped: int  # samples without the truth that the task needs

    def store(self, **extra: object) -> Store:
        """The rows of this task, manifest and model. Raises X2DFDError where `--out` holds only rows of others."""
        options = self.options
        key = {"task": options.task, "version": self.version, "manifest": self.sha256, "equalise": options.equalise}
        store = Store(options.out, key | {"model": options.choice.key()} | extra)
        store.check(self.samples)
        return store

    def every(self) -> list[Sample]:
        """All samples of the manifest."""
        return read_manifest(self.manifest)

    def open(self) -> models.Opened:
        return models.open_model(self.options.choice)


@dataclass(frozen=True)
class Outcome:
    """The output of a task."""

    store: Store
    rows: list[SampleRow]
    origin: Origin
    measured: Part  # `headline` is one of its parts
    model: str
    mode: str | None = None
    stated: Part = field(default_factory=dict)  # facts on the model that its answers do not state
    scores_of: str = "the largest face"
    change: str | None = None  # what was done to every picture before it was judged
    samples: list[Sample] | None = None  # if the task chose its own


@dataclass(frozen=True)
class Task:
    """A question and its figures; a change of either is a new version."""

    name: str
    version: str
    unit: str
    line: str
    run: Callable[[Run], Outcome]
    needs: Callable[[Sample], bool] | None = None  # whether a sample has the necessary truth
    truth: str = ""  # that truth in words


def judged(
    model: models.Opened,
    samples: Sequence[Sample],
    *,
    equalise: bool,
    rationale: bool,
    batch_size: int,
    change: Change | None = None,
) -> tuple[list[SampleRow], list[Origin]]:
    """A row for each sample, in order, and the origins that the answers state. `change` is made to every picture."""
    answers: dict[str, Report | Failure] = {}
    sources: list[Path | bytes] = []
    readable: list[Sample] = []
    for sample in samples:
        try:
            if change:
                sources.append(changed(sample.path, change, sample.id, equal=equalise))
            else:
                sources.append(equalised(sample.path) if equalise else sample.path)
            readable.append(sample)
        except InputError as error:
            answers[sample.id] = Failure(str(sample.path), None, error.code, error.reason)
    reports = model.detector.detect_many(sources, batch_size=batch_size, rationale=rationale) if sources else ()
    for sample, report in zip(readable, reports, strict=True):
        answers[sample.id] = report
    origins = [{"model": a.model, "versions": a.versions} for s in samples if isinstance(a := answers[s.id], Report)]
    rows = [to_row(s, answers[s.id]) for s in samples]
    if not model.writes:  # number and text are not those of an MLLM
        for row in rows:
            row.p_mllm, row.rationale, row.cues = None, "", []
    return rows, origins


def judge_of(run: Run, model: models.Opened, *, rationale: bool, change: Change | None = None) -> Judge:
    """`judged` with the options of a run, for `eval.rows.score`."""
    equalise, batch_size = run.options.equalise, run.options.batch_size
    return partial(judged, model, equalise=equalise, batch_size=batch_size, rationale=rationale, change=change)


def to_row(sample: Sample, answer: Report | Failure) -> SampleRow:
    """The row of an answer. The MLLM's and the experts' scores are those of the face that decided the verdict."""
    row = SampleRow.of(sample)
    if isinstance(answer, Failure):
        return row.failed(answer.code, answer.reason)
    scored_faces = [f for f in answer.faces if f.verdict.p_fake is not None]
    face = max(scored_faces, key=lambda f: f.verdict.p_fake or 0.0, default=None)
    row.p_fake, row.said, row.reason = answer.verdict.p_fake, answer.verdict.label, answer.verdict.reason
    row.p_mllm = face.p_fake_mllm if face else None
    row.contradictions = list(face.contradictions) if face else []
    row.experts = {e.expert: e.score for e in answer.evidence}
    row.notes = {e.expert: e.note for e in answer.evidence if e.note}
    row.pointed = {e.expert: [(c.area, c.artifact) for c in e.cues] for e in answer.evidence if e.cues}
    row.rationale, row.cues = answer.rationale, [(c.area, c.artifact) for c in answer.cues]
    row.each_face = [f.verdict.p_fake for f in scored_faces if f.verdict.p_fake is not None]
    return row
