"""Leave-one-out figures of the forensic tower: what weights that never met some sources say of exactly those.

    python -m experiments.left_out --tower build/unseen/one --data photos.csv --data build/forged/manifest.jsonl

A tower that was trained with `external_detectors.train tower --leave-out NAMES` is asked about the pictures of NAMES,
half of them as they are and half degraded, but for split `val`, which chose the tower's checkpoint. The table holds the
AUC by generator and forge method against the real photos of the sources that were left out, and the share of each such
source's photos above the given logit. LOG.md names the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from eval.stats import auc
from external_detectors.tower import Tower
from x2dfd.calibrate import AT_ONCE, face_of
from x2dfd.calibration import logit
from x2dfd.cli import run_command
from x2dfd.crops import load_crops
from x2dfd.detector import evidence_of, through_codec
from x2dfd.errors import X2DFDError
from x2dfd.manifest import Sample
from x2dfd.progress import progress


def left_out(
    tower: Annotated[Path, typer.Option(help="folder with the weights and card of a tower")],
    data: Annotated[list[Path], typer.Option(help="manifest; give it again for more")],
    limit: Annotated[int, typer.Option(help="most pictures of a source, generator or method")] = 120,
    above: Annotated[float, typer.Option(help="logit from which a photo counts as called fake")] = 2.0,
) -> None:
    """What a tower says of the sources, generators and methods that it was trained without."""
    expert = Tower(tower)
    names = set(expert.card.figures["left_out"])
    scores: dict[str, list[float]] = {}
    for path in data:
        crops = load_crops(path)
        rows: dict[str, list[int]] = {}
        for i, sample in enumerate(crops.samples):
            own = {sample.origin, *(sample.method.split("+") if sample.label == "fake" else ())}
            if own & names and sample.split not in ("val", "test"):
                rows.setdefault(_row(sample), []).append(i)
        for name, mine in rows.items():
            if len(mine) > limit:
                mine = sorted(int(i) for i in np.random.default_rng(0).choice(mine, limit, replace=False))
            for start in progress(range(0, len(mine), AT_ONCE), name):
                faces = through_codec([face_of(crops, i, 1) for i in mine[start : start + AT_ONCE]])
                said = evidence_of([expert], faces)
                scores.setdefault(name, []).extend(logit(e.score) for [e] in said if e.score is not None)
    if not any(name.startswith("real") for name in scores):
        raise X2DFDError(
            "none of what the tower was trained without is a source of real photos: nothing to compare with",
            code="no_real_source_left_out",
        )
    reals = np.concatenate([np.array(v) for k, v in scores.items() if k.startswith("real")])
    for name, found in sorted(scores.items()):
        if name.startswith("real"):
            typer.echo(f"{name}: {np.mean(np.array(found) > above):.3f} above {above}, n {len(found)}")
        else:
            labels = np.concatenate([np.ones(len(found)), np.zeros(len(reals))])
            typer.echo(f"{name}: AUC {auc(labels, np.concatenate([found, reals])):.3f}, n {len(found)}/{len(reals)}")


def _row(sample: Sample) -> str:
    return f"real {sample.source}" if sample.label == "real" else sample.method.split("+")[0]


if __name__ == "__main__":
    run_command(left_out)
