"""Task `assess`: which cues the MLLM can see (MFA), as `x2dfd assess` ranks them."""

from __future__ import annotations

import os

from eval.rows import SampleRow
from eval.stats import Measured
from eval.task import Outcome, Run, Task
from eval.tasks.words import need_texts
from x2dfd.assessment import BANK, Finding, assess, chosen_pictures, read_questions
from x2dfd.crops import load_crops
from x2dfd.detector import versions


def run(run: Run) -> Outcome:
    """The ranking; its files go into the folder of the result."""
    options, model = run.options, run.open()
    need_texts(model, options.task)
    crops = load_crops(run.manifest, workers=min(4, os.cpu_count() or 1), side=model.detector.info.crop_size)
    assessment = assess(
        model.detector.mllm,
        crops,
        read_questions(options.questions or BANK),
        options.out / "assessment",
        limit=options.limit,
        split=options.split,
        seed=options.seed,
        manifest_hash=run.sha256,
    )

    def auc(finding: Finding) -> Measured:
        cue_question = finding.deciding
        return Measured(cue_question.auc, cue_question.interval, cue_question.n_positive + cue_question.n_negative)

    fields = ["questions_sha256", "n_real", "n_fake", "n_unusable", "rule", "ranked_by"]
    fields += ["control", "stability", "random"]
    measured = {
        "headline": {f"cue {f.area} {f.artifact}.auc": auc(f) for f in assessment.cues},
        "assessment": {
            "files": "assessment/",
            "strong": [f"{f.area} {f.artifact}" for f in assessment.cues if f.strong],
            "n_questions": len(assessment.questions),
            "n_cues": len(assessment.cues),
            **{name: getattr(assessment, name) for name in fields},
        },
    }
    origin = {"model": model.detector.info.to_dict(), "versions": versions()}
    samples = [crops.samples[i] for i in chosen_pictures(crops, options.split, options.limit, options.seed)]
    rows = [SampleRow.of(s) for s in samples]
    scores_of = "the largest face, as load_crops cuts it; pictures are not re-encoded"
    return Outcome(run.store(), rows, origin, measured, model.name, model.mode, scores_of=scores_of, samples=samples)


TASK = Task("assess", "2", "image", "which cues the MLLM can see (MFA), by x2dfd assess", run)
