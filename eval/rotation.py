"""Leave-one-source-out figures: what experts say of the sources, generators and forge methods that they never met.

    python -m eval.rotation --towers build/held_out --data photos.csv --data build/forged/manifest.jsonl

`external_detectors.train tower --held-out NAMES` and `... probe --held-out NAMES` make such experts, which share a
folder; `--towers` is a folder of these folders, as `x2dfd calibrate --held-out` takes it. They are asked about what
they were trained without, but for split `val`, which chose the tower's checkpoint. Every generator and method is set
against the photos of the held-out sources, beside the model's own experts, which met them all, each held-out expert
alone, and a single-feature baseline. A method that was not itself held out shows forgeries of a known kind on photos of
sources that the experts never met. A generator is set against other photos of the sources that they met, too (split
`val`, which helped to choose the tower's checkpoint): new fakes among photos of a known kind.

The verdict is that of the model's calibration on the held-out scores. Its thresholds were chosen on photos and
forgeries of such sources, partly these, so that its errors on them are flattered; a held-out generator had a say in
them with the model's own experts alone.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from eval import stats
from eval.bench import as_json, code_state, device
from eval.scoring import Part
from eval.tasks.experts import sharpness
from x2dfd.adapter import EMBEDDED
from x2dfd.calibration import Calibration, logit, logits_of
from x2dfd.cli import run_command
from x2dfd.crops import CropSet, load_sets
from x2dfd.detector import evidence_of, through_codec, versions
from x2dfd.errors import X2DFDError
from x2dfd.experts import Expert, load_expert
from x2dfd.files import file_sha256, write_text
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.model_spec import ModelSpec
from x2dfd.progress import progress
from x2dfd.run_calibrate import AT_ONCE, HeldOut, held_out_in, plain_face
from x2dfd.types import MLLM

NEVER_MET, MET, SHARPNESS = "never met", "met", "sharpness"
"""The columns: P(fake) from the held-out experts, from the model's own, the baseline (the smoother, the likelier fake).
Each held-out expert has a column of its own, too, where there are several."""

AMONG_KNOWN = "among known photos"
"""A column of generators: the held-out experts, against photos of the sources that they met."""

KNOWN = "known photos"


@dataclass
class Row:
    """The pictures of one photo source, generator or forge method."""

    fake: bool
    kind: str  # photos, known photos, generator, method, or method on new photos
    groups: list[str] = field(default_factory=list)
    # By column; the larger, the likelier fake.
    scores: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    verdicts: list[str] = field(default_factory=list)  # on the held-out experts' scores


def rows_of(
    held_out: HeldOut, own: Sequence[Expert], calibration: Calibration, sets: Sequence[CropSet], limit: int
) -> dict[str, Row]:
    """ "KIND NAME" -> its pictures, at most `limit` of them, scored. Raises X2DFDError where no held-out source has
    photos, or nothing else was held out."""
    left_out = held_out.left_out
    chosen: dict[tuple[str, str], list[tuple[CropSet, int]]] = {}
    for crops in sets:
        for i, sample in enumerate(crops.samples):
            if (row := _row_of(sample, left_out)) is not None:
                chosen.setdefault(row, []).append((crops, i))
    if len({kind == "photos" for kind, _ in chosen if kind != KNOWN}) < 2:
        raise X2DFDError(
            f"of {', '.join(sorted(left_out))} these manifests do not hold both photos and fakes to compare",
            code="no_real_source_left_out",
        )
    rows: dict[str, Row] = {}
    for (kind, of), pictures in sorted(chosen.items()):
        if len(pictures) > limit:
            drawn = np.random.default_rng(0).choice(len(pictures), limit, replace=False)
            pictures = [pictures[int(i)] for i in drawn]
        name = f"{kind} {of}"
        rows[name] = Row(kind not in ("photos", KNOWN), kind)
        for at in progress(range(0, len(pictures), AT_ONCE), name):
            _score(rows[name], held_out, own, calibration, pictures[at : at + AT_ONCE])
    return rows


def _score(
    row: Row,
    held_out: HeldOut,
    own: Sequence[Expert],
    calibration: Calibration,
    pictures: Sequence[tuple[CropSet, int]],
) -> None:
    faces = through_codec([plain_face(crops, i) for crops, i in pictures])
    held_out_experts = [held_out.experts.get(expert.card.name, expert) for expert in own]
    covers = {expert.card.name: expert.card.covers for expert in own}
    evidence = zip(pictures, faces, evidence_of(held_out_experts, faces), evidence_of(own, faces), strict=True)
    for (crops, i), face, never_met, met in evidence:
        if any(e.score is None for e in (*never_met, *met)):
            continue
        p_fakes = [calibration.probability(logits_of(None, scores, covers)) for scores in (never_met, met)]
        row.groups.append(crops.samples[i].group)
        row.scores[NEVER_MET].append(logit(p_fakes[0]))
        row.scores[MET].append(logit(p_fakes[1]))
        row.scores[SHARPNESS].append(sharpness(face.crop))
        for e in never_met if len(never_met) > 1 else ():
            row.scores[e.expert].append(float(e.score or 0.0))
        row.verdicts.append(calibration.verdict(p_fakes[0]).label)


def _row_of(sample: Sample, left_out: Collection[str]) -> tuple[str, str] | None:
    """Kind and name of a picture's row, None where it belongs to no figure."""
    methods = [m for m in sample.method.split("+") if m]
    if sample.split == "val":
        untouched = sample.label == "real" and sample.source not in left_out and sample.method in ("", "none")
        return (KNOWN, sample.source) if untouched else None
    if held_out := [m for m in methods if m in left_out]:
        return ("generator" if sample.synthetic else "method", held_out[0])
    if sample.origin not in left_out:
        return None
    return ("photos", sample.source) if sample.label == "real" else ("method on new photos", methods[0])


def measured(rows: dict[str, Row]) -> Part:
    """By name the counts, the verdicts, and of fakes the AUC of each column against all held-out photos."""
    photos = [row for row in rows.values() if row.kind == "photos"]
    known = [row for row in rows.values() if row.kind == KNOWN]
    table: Part = {}
    for name, row in rows.items():
        wrong = "real" if row.fake else "fake"
        part: Part = {
            "kind": row.kind,
            "n": len(row.verdicts),
            "answered": stats.rate([verdict != "inconclusive" for verdict in row.verdicts], row.groups),
            "wrong": stats.rate([verdict == wrong for verdict in row.verdicts], row.groups),
        }
        if row.fake:
            part["auc"] = {column: _auc(row, photos, column) for column in row.scores}
        if row.kind == "generator" and known:
            part["auc"][AMONG_KNOWN] = _auc(row, known, NEVER_MET)
        table[name] = part
    return table


def _auc(fakes: Row, photos: Sequence[Row], column: str) -> stats.Measured:
    reals = [score for row in photos for score in row.scores[column]]
    labels = np.array([0] * len(reals) + [1] * len(fakes.groups))
    groups = [g for row in photos for g in row.groups]
    return stats.measured_auc(labels, np.array([*reals, *fakes.scores[column]]), [*groups, *fakes.groups])


def summary(towers: Sequence[Part]) -> Part:
    """Over all towers: mean and worst AUC of generators and of methods; the pictures that were answered and wrongly."""
    every = [part for tower in towers for part in tower["rows"].values()]
    found: Part = {}
    for kind in ("generator", "method", "method on new photos"):
        for column, key in ((NEVER_MET, kind), (AMONG_KNOWN, f"{kind} {AMONG_KNOWN}")):
            values = [part["auc"][column].value for part in every if part["kind"] == kind and column in part["auc"]]
            if values:
                found[key] = {"mean_auc": float(np.mean(values)), "worst_auc": float(np.min(values)), "n": len(values)}
    rows = [part for part in every if part["kind"] != KNOWN]
    weights = [part["n"] for part in rows]
    found["answered"] = float(np.average([part["answered"].value for part in rows], weights=weights))
    for fake, key in ((False, "false_alarms"), (True, "called_real")):
        some = [part for part in rows if (part["kind"] != "photos") == fake]
        found[key] = float(np.average([p["wrong"].value for p in some], weights=[p["n"] for p in some]))
        found[f"worst_{key}"] = float(np.max([p["wrong"].value for p in some]))
    return found


def run(
    towers: Annotated[
        Path, typer.Option(help="folder whose subfolders hold experts that were trained without some sources")
    ],
    data: Annotated[list[Path], typer.Option(help="manifest; give it again for more")],
    model: Annotated[
        Path, typer.Option(help="adapter directory, for its calibration and experts", show_default="embedded")
    ] = EMBEDDED,
    limit: Annotated[int, typer.Option(min=1, help="at most this many pictures of a source, generator or method")] = 60,
    out: Annotated[Path, typer.Option(help="result file")] = Path("build/rotation.json"),
) -> None:
    """What experts say of what they never met."""
    folder = ModelSpec.parse(str(model)).adapter or EMBEDDED
    calibration = Calibration.load(folder)
    names = [name for name in calibration.weights if calibration.counts(name) and name != MLLM]
    own = [load_expert(name, folder / "experts") for name in names]
    held_out_sets = held_out_in(towers, names)
    sets = load_sets(data, on_remark=partial(typer.echo, err=True))
    found: list[Part] = []
    for held_out in held_out_sets:
        typer.echo(f"without {', '.join(sorted(held_out.left_out))}", err=True)
        rows = rows_of(held_out, own, calibration, sets, limit)
        hashes = {name: expert.card.sha256 for name, expert in held_out.experts.items()}
        found.append({"sha256": hashes, "left_out": sorted(held_out.left_out), "rows": measured(rows)})
    result = {
        "task": {"name": "rotation", "version": "2", "unit": "image"},
        "model": {"name": "embedded" if folder == EMBEDDED else folder.name},
        "hashes": {
            "manifest": [manifest_sha256(path) for path in data],
            "calibration": file_sha256(folder / "calibration.json"),
            "experts": {expert.card.name: expert.card.sha256 for expert in own},
        },
        "limit": limit,
        "towers": found,
        "summary": summary(found),
        "code": code_state(),
        "device": device(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    text = json.dumps(as_json(result), indent=1, allow_nan=False) + "\n"
    write_text(out, text)
    typer.echo(json.dumps(as_json(result["summary"]), indent=1))


if __name__ == "__main__":
    run_command(run, "Example:\n\n  python -m eval.rotation --towers build/held_out --data photos.csv")
