"""Measures the ranges of the tower's inputs, which its passes in 8 bits need: `ranges`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from external_detectors.clip_probe import LAYERS
from external_detectors.train.loop import log
from x2dfd.adapter import TOWER
from x2dfd.crops import load_sets
from x2dfd.errors import SetupError, X2DFDError
from x2dfd.progress import progress
from x2dfd.tower import (
    HEAD_LAYERS,
    augmented_view,
    clip_pixels,
    closer,
    load_tower_pass,
    ranges_file,
    training_rows,
    write_ranges,
)
from x2dfd.tower_pass import InputRange

SMOOTHING = 0.8
"""How much of a channel's outliers moves into the weights (alpha of SmoothQuant, arXiv 2211.10438). The class token is
nearest to that in fp32 with 0.75 to 0.85."""

BATCH, MIN_PICTURES = 16, 64


class _Largest:
    """The lowest and highest input of every channel of every product."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, name: str, inputs: Tensor, weight: Tensor) -> None:
        low, high = inputs.flatten(0, -2).aminmax(dim=0)
        if name in self._seen:
            low, high = torch.minimum(low, self._seen[name][0]), torch.maximum(high, self._seen[name][1])
        self._seen[name] = low, high, weight

    def ranges(self) -> dict[str, InputRange]:
        found = {}
        for name, (low, high, weight) in self._seen.items():
            inputs, outputs = torch.maximum(-low, high).clamp(min=1e-4), weight.abs().amax(0).clamp(min=1e-5)
            divisor = (inputs**SMOOTHING / outputs ** (1 - SMOOTHING)).half().float()  # as the file holds it
            found[name] = InputRange(divisor, float((low / divisor).min()), float((high / divisor).max()))
        return found


def ranges(
    data: Annotated[list[Path], typer.Option(help="manifest of photos and fakes; give it again for more")],
    model: Annotated[Path | None, typer.Option(help="adapter folder with a forensic tower")] = None,
    clip: Annotated[bool, typer.Option("--clip", help="CLIP as it is, whose ranges belong to the package")] = False,
    limit: Annotated[int, typer.Option(min=1, help="pictures of each manifest, of the splits for training")] = 256,
    seed: int = 0,
    crop_workers: int = 1,
) -> None:
    """Measure the ranges that `--dtype int8` needs, beside the weights that they belong to."""
    if clip == (model is not None):
        raise X2DFDError("give --model DIR, or --clip", code="option_invalid")
    additions = model / TOWER if model else None
    if additions and not additions.is_file():
        raise SetupError(
            f"{model} holds no forensic tower ({TOWER}); give an adapter directory", code="weights_missing"
        )
    largest = _Largest()
    run = load_tower_pass(max(HEAD_LAYERS if additions else LAYERS), additions, torch.float32, largest)
    seen = 0
    for crops in load_sets(data, crop_workers, on_remark=log):
        rows = training_rows(crops, limit)
        for start in progress(range(0, len(rows), BATCH), "ranges"):
            views = [augmented_view(crops.crops[i], seed, int(i)) for i in rows[start : start + BATCH]]
            pixels = clip_pixels(torch.from_numpy(np.stack(views)))
            with torch.inference_mode():
                run(closer(pixels) if additions else pixels)
        seen += len(rows)
    if seen < MIN_PICTURES:
        raise X2DFDError(
            f"{seen} pictures are of split train, val or calib; ranges need {MIN_PICTURES}", code="too_few_pictures"
        )
    write_ranges(additions, largest.ranges(), seen)
    print(ranges_file(additions))
