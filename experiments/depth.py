"""How many layers of the forensic tower does a verdict need? Quality and seconds at three depths.

    python -m experiments.depth --tower FOLDER --train build/forged/manifest.jsonl --test build/val/manifest.jsonl

A logistic on the statistics of the layers up to a depth (what the tower's own verdict reads) learns from pictures of
split `train` and is asked about the test manifest. The additions were trained for all twelve layers, so this says what
the first layers know already, not what a tower trained to that depth would know.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn import functional as F

from eval.stats import auc
from external_detectors.train.heads import _ridge_logistic
from x2dfd.cli import run_command
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import CODEC, codec
from x2dfd.progress import progress
from x2dfd.tower import quick_in_16_bits, tower_states

DEPTHS = {8: (3, 6, 8), 10: (3, 6, 9, 10), 12: (3, 6, 9, 12)}


def depth(
    tower: Annotated[Path, typer.Option(help="folder with tower.safetensors")],
    train: Annotated[Path, typer.Option(help="manifest to fit on, split `train`")],
    test: Annotated[Path, typer.Option(help="manifest to report on, all of it")],
    limit: Annotated[int, typer.Option(help="most pictures of each manifest")] = 1000,
) -> None:
    """AUC of a logistic on the first 8, 10 and 12 layers, and seconds a face."""
    additions = tower / "tower.safetensors"
    fitted, asked = load_crops(train), load_crops(test)
    mine = _draw([i for i, s in enumerate(fitted.samples) if s.split == "train"], limit)
    theirs = _draw(list(range(len(asked.samples))), limit)
    x, y = _statistics(fitted, mine, additions), torch.tensor([fitted.samples[i].label == "fake" for i in mine]).float()
    z, truth = _statistics(asked, theirs, additions), np.array([asked.samples[i].label == "fake" for i in theirs])
    for layers, read in DEPTHS.items():
        known, new = (torch.cat([part[layer] for layer in read], 1) for part in (x, z))
        mean, spread = known.mean(0), known.std(0).clamp(min=1e-6)
        weight, bias = _ridge_logistic((known - mean) / spread, y, 0.1)
        scores = (((new - mean) / spread) @ weight + bias).numpy()
        typer.echo(f"{layers} layers: AUC {auc(truth, scores):.3f}, {_seconds(layers, additions):.3f} s a face")


def _draw(rows: list[int], limit: int) -> list[int]:
    return sorted(int(i) for i in np.random.default_rng(0).permutation(rows)[:limit])


def _statistics(crops: CropSet, rows: list[int], additions: Path) -> dict[int, torch.Tensor]:
    """Mean and deviation over the patches of each layer that a depth reads: layer -> [n, 2 * 768]."""
    layers = sorted({layer for read in DEPTHS.values() for layer in read})
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for start in progress(range(0, len(rows), 16), "tower"):
        views = [codec(np.ascontiguousarray(crops.crops[i]), *CODEC) for i in rows[start : start + 16]]
        with torch.autocast("cpu", torch.bfloat16, enabled=quick_in_16_bits("cpu")):
            states = tower_states(torch.from_numpy(np.stack(views)), max(layers), additions)
        for layer in layers:
            patches = F.layer_norm(states[layer].float(), states[layer].shape[-1:])[:, 1:]
            found[layer].append(torch.cat([patches.mean(1), patches.var(1).add(1e-6).sqrt()], 1))
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def _seconds(layers: int, additions: Path) -> float:
    """The median of nine passes over one face."""
    one = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    taken = []
    for _ in range(10):
        begun = time.process_time()
        tower_states(one, layers, additions)
        taken.append(time.process_time() - begun)
    return float(np.median(taken[1:]))


if __name__ == "__main__":
    run_command(depth)
