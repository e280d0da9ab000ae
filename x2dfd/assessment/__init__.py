"""Model feature assessment (MFA): finds the forgery cues that a multimodal LLM can see.

Every yes/no question is put to the model about every labelled face. X2-DFD (arXiv 2410.06126) ranks cues by the hard
answers; this ranking is by the AUC of P(yes), with intervals by group bootstrap and, as controls, shuffled truth and
unrelated questions.

Files written: `answers.parquet` (a row per image), `assessment.json`, `table.md`, `assessment.png`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from x2dfd.assessment.ask import BANK, Answerer, CueQuestion, Floats, Pair, ask_all, chosen_pictures, read_questions
from x2dfd.assessment.rank import (
    MIN_PRESENT,
    RANKED_BY,
    RESAMPLES,
    RULE,
    RULE_TOP_K,
    Bools,
    Entry,
    Finding,
    Ranking,
    Separation,
    Truth,
    experts_for,
    findings,
    group_weights,
    spearman,
    top_mean,
)
from x2dfd.assessment.report import Assessment, chart, read_assessment, strong_cues, table
from x2dfd.errors import X2DFDError
from x2dfd.experts import cards
from x2dfd.files import Json, locked_folder, write_text
from x2dfd.manifest import manifest_sha256
from x2dfd.model_spec import LoadOptions, ModelSpec

if TYPE_CHECKING:
    from x2dfd.crops import CropSet

__all__ = [
    "BANK", "Answerer", "Assessment", "CueQuestion", "Finding", "Separation", "assess", "chart",
    "chosen_pictures", "experts_for", "group_weights", "read_assessment", "read_questions", "run_assess", "spearman",
    "strong_cues", "table",
]  # fmt: skip


def assess(
    model: Answerer,
    data: CropSet,
    questions: Sequence[CueQuestion],
    out: Path,
    *,
    limit: int | None = None,
    split: str | None = None,
    seed: int = 0,
    progress: bool = True,
    top_k: int | None = None,
    manifest_hash: str | None = None,
) -> Assessment:
    """Ask every question about every image, rank questions and cues, and write all of it into `out`.

    A killed run resumes. Questions of origin `random` are the control, with a ranking of their own. With `top_k`, the
    first k are strong, as in the paper, instead of by `RULE`. Raises X2DFDError without both classes, without
    questions, for a repeated question, and when `out` holds answers of another model or question set.
    """
    texts = [q.text for q in questions]
    if duplicates := sorted({t for t in texts if texts.count(t) > 1}):
        raise X2DFDError(f"asked twice: {duplicates[0]}", code="question_twice")
    if all(q.origin == "random" for q in questions):
        raise X2DFDError("no cue questions to ask", code="no_questions")
    pictures = chosen_pictures(data, split, limit, seed)
    with locked_folder(out):
        rows = ask_all(model, data, pictures, texts, out, progress)
    p_yes, answers = np.array([r["p_yes"] for r in rows]), np.array([r["said"] for r in rows])  # [n, q]

    truth = _truth(data, pictures)
    entries = [_entry([q], [j], p_yes, truth) for j, q in enumerate(questions)]
    by_cue: dict[Pair, list[int]] = {}
    for j, q in enumerate(questions):
        if q.cue is not None and q.origin != "random":
            by_cue.setdefault(q.cue, []).append(j)
    rankings = {
        "cues": Ranking(
            [_entry([questions[j] for j in js], js, p_yes, truth) for js in by_cue.values()], truth, seed, top_k
        ),
        "questions": Ranking([e for e in entries if e.question.origin != "random"], truth, seed, top_k),
        "unrelated": Ranking([e for e in entries if e.question.origin == "random"], truth, seed, top_k),
    }
    weights, expert_cards = group_weights(truth.groups, RESAMPLES, seed), cards()
    results = {
        kind: findings(ranking, truth, answers == "yes", answers == "no", weights, top_k, kind == "cues", expert_cards)
        for kind, ranking in rankings.items()
    }
    result = Assessment(
        model=model.name,
        manifest_sha256=manifest_hash,
        questions_sha256=hashlib.sha256(json.dumps([asdict(q) for q in questions]).encode()).hexdigest(),
        split=split,
        limit=limit,
        seed=seed,
        n_real=int((~truth.fake).sum()),
        n_fake=int(truth.fake.sum()),
        n_groups=len(set(truth.groups)),
        n_unusable=len(data.unusable),
        n_unknown_truth=int((~truth.known).sum()),
        ranked_by=RANKED_BY,
        rule=RULE if top_k is None else RULE_TOP_K,
        cues=results["cues"],
        questions=results["questions"],
        unrelated=results["unrelated"],
        control={kind: rankings[kind].control() for kind in ("cues", "questions")},
        stability={kind: rankings[kind].stability() for kind in ("cues", "questions")},
        random=_control_comparison(results["questions"], results["unrelated"], rankings["questions"].k),
        uncovered=tuple(f.cue for f in results["cues"] if f.cue and not f.strong and not f.experts),
    )
    write_text(
        out / "assessment.json", json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    )
    write_text(out / "table.md", table(result))
    return result


def _truth(data: CropSet, pictures: Sequence[int]) -> Truth:
    samples = [data.samples[i] for i in pictures]
    pairs: dict[Pair, Bools] = {}
    for n, sample in enumerate(samples):
        for cue in sample.cues:
            pairs.setdefault((cue.area, cue.artifact), np.zeros(len(samples), bool))[n] = True
    return Truth(
        fake=np.array([s.label == "fake" for s in samples]),
        pairs=pairs,
        known=np.array([s.label == "real" or bool(s.cues) for s in samples]),
        groups=[s.group for s in samples],
    )


def _entry(questions: Sequence[CueQuestion], columns: list[int], p_yes: Floats, truth: Truth) -> Entry:
    first = questions[0]
    has_enough = first.cue is not None and min(int(images.sum()) for images in truth.sides(first.cue)) >= MIN_PRESENT
    question = replace(first, origin=", ".join(dict.fromkeys(q.origin for q in questions)))
    return Entry(question, columns, p_yes[:, columns].mean(1), first.cue if has_enough else None)


def _control_comparison(cue_findings: Sequence[Finding], unrelated: Sequence[Finding], k: int) -> Json | None:
    """Figures of cue questions and unrelated ones, fake against real; the same share of each counts as the best."""
    if not unrelated:
        return None

    def figures(group: Sequence[Finding]) -> Json:
        aucs = np.array([np.nan if f.overall.auc is None else f.overall.auc for f in group])
        best = max(1, round(len(group) * k / len(cue_findings)))
        means = {"mean_auc": top_mean(aucs, len(aucs)), "best_mean_auc": top_mean(aucs, best)}
        return {"n": len(group), "best": best} | means

    return {"cue_questions": figures(cue_findings), "unrelated_questions": figures(unrelated)}


def run_assess(
    data: Path,
    out: Path,
    questions: Path | None = None,
    limit: int | None = None,
    split: str | None = None,
    model: str | ModelSpec = "embedded",
    seed: int = 0,
    loading: LoadOptions | None = None,
) -> None:
    """The command `x2dfd assess`: load, assess, write, and print the main results."""
    to_ask = read_questions(questions or BANK)
    import x2dfd
    from x2dfd.crops import load_crops

    # The answers do not depend on calibration, which comes later in the pipeline.
    options: LoadOptions = {**(loading or {}), "experts": [], "mode": "paper"}
    detector = x2dfd.load(model, **options)
    crops = load_crops(data, workers=min(4, os.cpu_count() or 1), side=detector.info.crop_size)
    a = assess(
        detector.mllm, crops, to_ask, out, limit=limit, split=split, seed=seed, manifest_hash=manifest_sha256(data)
    )
    if not chart(a, out / "assessment.png"):
        print("no chart: matplotlib is not installed (pip install -e '.[bench]')", file=sys.stderr)
    print(table(a).split("\n## ", 1)[0].strip())
    print(f"\n{out / 'table.md'}\n{out / 'assessment.json'}")
