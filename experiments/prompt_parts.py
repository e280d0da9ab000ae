"""What an MLLM makes of the picture, of the scores, and of what experts point at.

    python -m experiments.prompt_parts --data manifest.csv --limit 200 --out build/prompt_parts.json

The same faces are asked about with parts of the question left out, or exchanged against the picture. Nothing is trained
anew for it: a part that is missing here was there in training. Every number is of the largest face of a picture.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import x2dfd
from eval import stats
from eval.bench import as_json
from eval.scoring import common_auc, equalise, micro_f1
from eval.tasks.experts import largest
from x2dfd import prompts
from x2dfd.cli import run_command
from x2dfd.detector import Detector, through_codec
from x2dfd.errors import InputError, X2DFDError
from x2dfd.explain import read_cues
from x2dfd.files import write_text
from x2dfd.manifest import Sample, manifest_sha256, read_manifest
from x2dfd.media import load_picture
from x2dfd.options import Model
from x2dfd.types import Cue, Evidence, Face

VARIANTS = {
    "whole": "picture, scores and pointing, as shipped",
    "no scores": "the bare question",
    "scores only": "no pointing",
    "pointing only": "no scores",
    "scores of chance": "scores drawn at random, nothing pointed at",
    "no picture": "grey in place of the face; scores and pointing its own",
    "all say fake": "every score 0.95, one random cue pointed at",
    "all say real": "every score 0.05, nothing pointed at",
}
Row = dict[str, Any]
"""`logits`: variant -> logit of fake; `told`: what was pointed at, own and exchanged; `named`: what the texts name."""

GREY = 128
_EXCHANGED = tuple(
    Cue(area, artifact)
    for area in ("forehead", "eyebrows", "eyes", "nose", "mouth", "cheeks", "jaw")
    for artifact in ("blending", "blur", "colour", "noise", "missing-detail")
)
"""What is pointed at in place of what an expert points at: cues that the forge makes on single areas."""


def questions(evidence: Sequence[Evidence], rng: np.random.Generator, form: str = "numbers") -> dict[str, str]:
    """Variant -> the question as it is then asked ("no picture" asks that of "whole")."""
    bare = [replace(e, cues=()) for e in evidence]
    drawn = [replace(e, score=float(rng.random())) for e in bare]
    pointer = next((i for i, e in enumerate(evidence) if e.expert == "consistency"), len(evidence) - 1)
    elsewhere = _EXCHANGED[int(rng.integers(len(_EXCHANGED)))]
    fake = [replace(e, score=0.95, cues=(elsewhere,) if i == pointer else ()) for i, e in enumerate(bare)]
    return {
        "whole": prompts.verdict_question(evidence, form),
        "no scores": prompts.QUESTION,
        "scores only": prompts.verdict_question(bare, form),
        "pointing only": prompts.QUESTION + prompts.pointing(evidence),
        "scores of chance": prompts.verdict_question(drawn, form),
        "all say fake": prompts.verdict_question(fake, form),
        "all say real": prompts.verdict_question([replace(e, score=0.05) for e in bare], form),
    }


def exchanged(evidence: Sequence[Evidence], rng: np.random.Generator) -> tuple[list[Evidence], Cue] | None:
    """The evidence with one other cue in place of what is pointed at, on an area at which nobody points.

    None where nobody points, or everybody everywhere.
    """
    areas = {c.area for e in evidence for c in e.cues}
    others = [c for c in _EXCHANGED if c.area not in areas]
    if not areas or not others:
        return None
    cue = others[int(rng.integers(len(others)))]
    return [replace(e, cues=(cue,) if e.cues else ()) for e in evidence], cue


def _row(detector: Detector, sample: Sample, equal: bool) -> Row:
    row: Row = {"reason": None, "error": None}
    row |= {"experts": {}, "logits": {}, "told": {}, "named": {}}
    try:
        pixels = load_picture(sample.path).pixels
        face = largest(load_picture(equalise(pixels)).pixels if equal else pixels)
    except InputError as error:
        return row | {"reason": error.code, "error": f"{error.reason} [{error.code}]"}
    if face is None:
        return row | {"reason": "no_face"}
    rng = np.random.default_rng(zlib.crc32(sample.id.encode()))  # the same in every run, whatever the order
    (face,) = through_codec([face])
    try:
        return row | _asked(detector, sample, face, rng)
    except InputError as error:  # of a served model
        return row | {"reason": error.code, "error": f"{error.reason} [{error.code}]"}


def _asked(detector: Detector, sample: Sample, face: Face, rng: np.random.Generator) -> Row:
    """Of one face, what a row keeps of the model's answers."""
    row: Row = {"logits": {}, "told": {}, "named": {}}
    look = detector.mllm.look(face.crop[None])
    said = detector.told(detector.evidence([face], look)[0])
    row["experts"] = {e.expert: e.score for e in said}
    form = detector.info.score_form
    asked = questions(said, rng, form)
    row["logits"] = {name: float(detector.mllm.verdict_logits(look, [q])[0]) for name, q in asked.items()}
    blind = detector.mllm.look(np.full_like(face.crop[None], GREY))
    row["logits"]["no picture"] = float(detector.mllm.verdict_logits(blind, [asked["whole"]])[0])
    other = exchanged(said, rng) if sample.label == "fake" and sample.cues else None
    if other:
        start = prompts.rationale_start("fake")
        for name, evidence in (("own", said), ("exchanged", other[0])):
            (text,) = detector.mllm.write(look, [prompts.verdict_question(evidence, form)], [start])
            row["told"][name] = sorted({(c.area, c.artifact) for e in evidence for c in e.cues})
            row["named"][name] = sorted({(c.area, c.artifact) for c in read_cues(text)})
    return row


def ablation_result(samples: Sequence[Sample], rows: Sequence[Row], threshold: float) -> Row:
    """AUC under each variant, how often the answer goes with the scores, and what the texts go with.

    `threshold`: P(fake) from which the MLLM alone says fake.
    """
    kept = [i for i, row in enumerate(rows) if row["logits"]]
    columns: dict[str, list[float | None]] = {v: [row["logits"].get(v) for row in rows] for v in VARIANTS}
    auc = common_auc(samples, columns)
    at = float(np.log(threshold / (1 - threshold)))
    groups = [samples[i].group for i in kept]

    def says(variant: str) -> list[bool]:
        return [rows[i]["logits"][variant] >= at for i in kept]

    both = list(zip(says("all say fake"), says("all say real"), strict=True))
    obeys = {
        "goes with the scores": [fake and not real for fake, real in both],
        "stays with the picture": [fake == real for fake, real in both],
        "goes against the scores": [real and not fake for fake, real in both],
    }
    result: Row = {"n": len(kept), "variants": VARIANTS, "auc": auc, "mllm_threshold": threshold}
    result["scores against the picture"] = {name: stats.rate(hits, groups) for name, hits in obeys.items()}
    written = [i for i in kept if rows[i]["named"]]
    result["texts"] = {"n": len(written)} | {
        name: _texts(samples, rows, written, name) for name in ("own", "exchanged")
    }
    unscored: dict[str, int] = {}
    for row in rows:
        if not row["logits"]:
            unscored[row["reason"]] = unscored.get(row["reason"], 0) + 1
    return result | {"unscored": unscored}


def _texts(samples: Sequence[Sample], rows: Sequence[Row], written: Sequence[int], name: str) -> Row:
    """Micro F1 of what the texts name against what was pointed at, and against what is there: cues and areas."""
    table: Row = {}
    groups = [samples[i].group for i in written]
    for what, reduce in (("cues", lambda p: {tuple(c) for c in p}), ("areas", lambda p: {area for area, _ in p})):
        named = [reduce(rows[i]["named"][name]) for i in written]
        told = [reduce(rows[i]["told"][name]) for i in written]
        there = [reduce([(c.area, c.artifact) for c in samples[i].cues]) for i in written]
        table[what] = {
            "of what was pointed at": micro_f1(told, named, groups),
            "of what is there": micro_f1(there, named, groups),
        }
    return table


def run(
    data: Annotated[Path, typer.Option(help="manifest")],
    out: Annotated[Path, typer.Option(help="result file")],
    model: Model = "embedded",
    split: Annotated[str | None, typer.Option(help="judge this split only")] = None,
    limit: Annotated[int, typer.Option(help="so many pictures, drawn with the seed", min=1)] = 200,
    seed: int = 0,
) -> None:
    """Ask about the same faces with parts of the question left out, or exchanged against the picture."""
    detector = x2dfd.load(model)
    if not detector.info.in_prompt:
        raise X2DFDError("this takes a model whose question holds experts' scores", code="model_not_for_task")
    samples = read_manifest(data, split=split)
    samples = [samples[i] for i in sorted(np.random.default_rng(seed).permutation(len(samples))[:limit])]
    rows = [_row(detector, sample, equal=True) for sample in samples]
    threshold = detector.calibration.mllm_threshold if detector.calibration else 0.5
    found = {"manifest_sha256": manifest_sha256(data), "model": detector.info.to_dict()}
    found |= ablation_result(samples, rows, threshold)
    write_text(out, json.dumps(as_json(found), indent=1, default=str) + "\n")


if __name__ == "__main__":
    run_command(run)
