"""Task `assess`: which cues the MLLM can see (MFA), as `x2dfd assess` ranks them."""

from __future__ import annotations

import os

from eval.rows import SampleRow
from eval.stats import Measured
from eval.task import Made, Run, Task
from eval.tasks.words import need_texts
from x2dfd.assessment import BANK, Finding, assess, chosen_pictures, read_questions
from x2dfd.crops import load_crops


def run(run: Run) -> Made:
    """The ranking, with its files beside the result."""
    from x2dfd.detector import versions

    options, model = run.options, run.open()
    need_texts(model, options.task)
    crops = load_crops(run.manifest, workers=min(4, os.cpu_count() or 1), side=model.detector.info.crop_size)
    found = assess(
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
        told = finding.deciding
        return Measured(told.auc, told.interval, told.n_positive + told.n_negative)

    whole = ["questions_sha256", "n_real", "n_fake", "n_unusable", "rule", "ranked_by"]
    whole += ["control", "stability", "random"]
    measured = {
        "headline": {f"cue {f.area} {f.artifact}.auc": auc(f) for f in found.cues},
        "assessment": {
            "files": "assessment/",
            "strong": [f"{f.area} {f.artifact}" for f in found.cues if f.strong],
            "n_questions": len(found.questions),
            "n_cues": len(found.cues),
            **{name: getattr(found, name) for name in whole},
        },
    }
    origin = {"model": model.detector.info.to_dict(), "versions": versions()}
    asked = [crops.samples[i] for i in chosen_pictures(crops, options.split, options.limit, options.seed)]
    rows = [SampleRow.of(s) for s in asked]
    scores_of = "the largest face, as load_crops cuts it; pictures are not re-encoded"
    return Made(run.store(), rows, origin, measured, model.name, model.mode, scores_of=scores_of, samples=asked)


TASK = Task("assess", "2", "image", "which cues the MLLM can see (MFA), by x2dfd assess", run)
