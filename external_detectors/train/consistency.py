"""Training of the expert `consistency`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from external_detectors.train.loop import (
    CHOSEN_BY,
    SOURCE,
    auc,
    augmented,
    balanced,
    by_method,
    fit,
    licence_of,
    next_version,
    source_names,
    worst,
)
from external_detectors.weights_io import WEIGHTS, load_weights, save_weights, to_unit
from x2dfd.calibration import logit
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import Json
from x2dfd.manifest import manifest_sha256
from x2dfd.options import names
from x2dfd.types import ARTIFACTS, Card

IMAGENET = "EfficientNet-Lite0 of ImageNet, Apache-2.0"


def consistency(
    data: Annotated[Path, typer.Option(help="manifest of forgeries with cues and masks (data_gen forge)")],
    state: Annotated[Path, typer.Option(help="folder for the resumable state")] = Path("build/consistency"),
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    start: Annotated[Path | None, typer.Option(help="folder of its own weights to start from; else ImageNet's")] = None,
    hold_out: Annotated[str, typer.Option(help="forge methods kept out of training, comma-separated")] = "",
    steps: int = 1600,
    batch: int = 24,
    lr: float = 6e-4,
    seed: int = 0,
    workers: int = 1,
    from_scratch: Annotated[bool, typer.Option(help="start from random weights (for tests)")] = False,
) -> None:
    """The area-wise network on photos that were forged in part: label, area x artifact pairs, and mask."""
    from external_detectors.consistency_net import ConsistencyNet
    from external_detectors.lite0 import imagenet_state

    torch.manual_seed(seed)
    crops = load_crops(data, workers)
    held_out = names(hold_out)
    truth = LocalTruth(crops, held_out)
    net = ConsistencyNet()
    before = read_card(start / "consistency.card.json") if start else None
    if start and before:
        if known := sorted(set(held_out) - set(before.figures.get("held_out", ()))):
            raise X2DFDError(
                f"{start} holds weights that were trained with {', '.join(known)}: nothing is left out",
                code="start_knows_left_out",
            )
        net.load_state_dict(load_weights(before, start))
    elif not from_scratch:
        net.trunk.load_state_dict(imagenet_state(require("lite0") / "efficientnet-lite0.pth"))
    net.allowed.copy_(truth.allowed)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, ...]:
        draw = balanced([truth.samples[k] for k in truth.learnt], rng, "train", by_method=True)
        return truth.batch([truth.learnt[next(draw)] for _ in range(batch)], rng)

    def loss_of(drawn: tuple[Tensor, ...]) -> Tensor:
        pixels, areas, labels, cues, masks = drawn
        fake, named, where = net(to_unit(pixels), areas.float() / 255)
        verdict = F.binary_cross_entropy_with_logits(fake, labels * 0.96 + 0.02)
        known = (cues >= 0) & (net.allowed > 0)
        each = F.binary_cross_entropy_with_logits(named, (cues > 0).float(), reduction="none")
        # Cues are rare: one or two among a hundred pairs.
        naming = (each * known * (1 + 5 * (cues > 0))).sum() / known.sum().clamp(min=1) * 12
        # A mask is half there or not at all: real pictures have an empty one.
        placing = F.binary_cross_entropy_with_logits(where, masks, reduction="none").mean()
        total: Tensor = verdict + naming + placing
        return total

    settings = {"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed, "hold_out": hold_out}
    run = json.dumps(settings | {"start": before.sha256 if before else "scratch" if from_scratch else "imagenet"})
    check = partial(truth.figures, split="calib", held_out=held_out)
    trained, figures = fit(net, batch_of, loss_of, steps=steps, lr=lr, seed=seed, state=state, run=run, check=check)
    learnt = [truth.samples[k] for k in truth.learnt]
    methods = sorted({s.method.split("+")[0] for s in learnt if s.label == "fake"})
    earlier = f"first: {before.trained_on.removeprefix('first: ')}. Then: " if before else ""
    # What neither the start nor this run has learnt is still unseen.
    unseen = {*held_out, *(before.figures.get("held_out", ()) if before else ())}
    unseen -= {m for s in learnt for m in s.method.split("+")}
    card = Card(
        name="consistency",
        version=str(int(before.version) + 1) if before else next_version(out, "consistency"),
        source=SOURCE,
        licence=licence_of(learnt, start=before.licence if before else "" if from_scratch else IMAGENET),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="none: a network of this project",
        blind_spot="A face that a generator made as a whole is consistent with itself; strong compression levels "
        "differences out; a kind of change that it was not trained on is found less often and named wrongly; "
        "what covers the changed part, a text or a sticker, hides it.",
        trained_on=f"{earlier}{len(learnt)} pictures, {steps} steps of {batch}: real photos, harmless changes and "
        f"forgeries in part ({', '.join(methods)}); no fake of any generator; sources: {source_names(learnt)}",
        figures={"held_out": sorted(unseen), "checkpoint": CHOSEN_BY, **figures},
        covers=tuple(a for k, a in enumerate(ARTIFACTS) if truth.allowed[:, k].any()),
    )
    card = save_weights(trained.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


CUE_SEEN_FROM = 0.15
"""Cues with a lower score are neither targets nor errors, as few people would see them."""


class LocalTruth:
    """The targets of the network: cues and masks of the pictures of a forge run."""

    def __init__(self, crops: CropSet, held_out: Sequence[str] = ()) -> None:
        from external_detectors.consistency_net import POOLED

        if crops.masks is None or not any(s.mask for s in crops.samples):
            raise X2DFDError("no masks: this expert learns from forgeries of `data_gen forge`", code="masks_missing")
        self.crops, self.masks = crops, crops.masks
        self.rows = [i for i, s in enumerate(crops.samples) if s.label == "real" or s.mask]
        self.samples = [crops.samples[i] for i in self.rows]
        self.cues = np.zeros((len(self.rows), len(POOLED), len(ARTIFACTS)), np.int8)
        for k, sample in enumerate(self.samples):
            for cue in sample.cues:
                if cue.area not in POOLED:
                    raise X2DFDError(
                        f"{sample.id}: the mesh cannot place {cue.area!r}, so it cannot be learnt",
                        code="cue_unplaceable",
                    )
                seen = cue.score is None or cue.score >= CUE_SEEN_FROM
                self.cues[k, POOLED.index(cue.area), ARTIFACTS.index(cue.artifact)] = 1 if seen else -1
        # A picture that combines methods is held out if one of them is.
        hidden = [bool(set(s.method.split("+")) & set(held_out)) for s in self.samples]
        self.learnt = [k for k, s in enumerate(self.samples) if s.split == "train" and not hidden[k]]
        self.allowed = torch.from_numpy(((self.cues[self.learnt] > 0).sum(0) >= 10).astype(np.float32))

    def batch(self, chosen: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """Pixels, area grids, labels, cues (1, 0, or -1 for neither) and masks.

        Degraded with a generator; else through the codec that every crop in use goes through.
        """
        import cv2

        from external_detectors.consistency_net import GRID, area_grid

        pixels, areas, masks = [], [], []
        for k in chosen:
            row = self.rows[k]
            view, matrix = np.asarray(self.crops.crops[row]), np.eye(2, 3)
            if rng is not None:
                view, matrix = augmented(view, rng)
            else:
                view = codec(view, *CODEC)
            mask = np.asarray(self.masks[row])
            # The same move on the mask's grid; a cell's centre lies between the crop's pixels.
            step = view.shape[0] / mask.shape[0]
            centre = np.full(2, (step - 1) / 2)
            small = matrix.copy()
            small[:, 2] = (matrix[:, :2] @ centre + matrix[:, 2] - centre) / step
            mask = cv2.warpAffine(mask, small, mask.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
            masks.append(cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA))
            pixels.append(view)
            areas.append(area_grid(cv2.transform(self.crops.landmarks[row][None], matrix)[0].astype(np.float32)))
        labels = torch.tensor([float(self.samples[k].label == "fake") for k in chosen])
        target = torch.from_numpy((np.stack(masks) > 64).astype(np.float32))
        cues = torch.from_numpy(self.cues[list(chosen)])
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(areas)), labels, cues, target

    def figures(self, net: torch.nn.Module, split: str, held_out: Sequence[str] = ()) -> Json:
        """AUC by method, pixel AUC of the map, and the threshold and F1 of its cues, on pictures as they are in use."""
        from external_detectors.consistency_net import POINTS_FROM, both_ways

        chosen = [k for k, s in enumerate(self.samples) if s.split == split]
        if not chosen:
            return {"cue_threshold": 0.5}
        net.eval()
        fakes, chances, maps, truths = [], [], [], []
        with torch.inference_mode():
            for start in range(0, len(chosen), 32):
                pixels, areas, _, _, masks = self.batch(chosen[start : start + 32], None)
                fake, named, where = both_ways(net, pixels, areas)
                fakes.append(fake)
                chances.append(named.sigmoid())
                maps.append(where)
                truths.append(masks)
        samples = [self.samples[k] for k in chosen]
        scores = torch.cat(fakes).double().numpy()
        table: Json = {"calib_auc_by_method": by_method(samples, scores)}
        table["worst"] = worst(samples, scores, held_out)
        shown = [k for k, s in enumerate(samples) if s.cues and (self.cues[chosen[k]] > 0).any()]
        table["cue_threshold"] = 0.5
        if shown:
            # As in use: it points at nothing on a face that it finds in order. Cues too faint to see count neither way.
            cues = self.cues[[chosen[k] for k in shown]]
            chance = torch.cat(chances)[shown].numpy() * (scores[shown] >= logit(POINTS_FROM))[:, None, None]
            chance = np.where(cues < 0, 0, chance)
            table["cue_threshold"], table["cue_f1"], table["area_f1"] = _cue_threshold(chance, cues > 0)
            table["threshold_chosen_on"] = "the same pictures"
            places, drawn = torch.cat(maps)[shown].numpy(), torch.cat(truths)[shown].numpy() > 0
            values = [auc(d.ravel(), p.ravel()) for p, d in zip(places, drawn, strict=True)]
            measured = [v for v in values if v is not None]
            table |= {"pixel_auc": round(float(np.mean(measured)), 4)} if measured else {}
            table["n_with_cues"] = len(shown)
        return table


def _cue_threshold(chance: NDArray[np.float32], there: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Threshold with the best F1 over (area, artifact) pairs, that F1, and the F1 over areas at it.

    The likeliest pair of a picture counts as named from LIKELY on, as in use. `chance`, `there`: [n, areas, artifacts].
    """
    from external_detectors.consistency_net import LIKELY, MAX_CUES

    n = len(chance)
    flat = chance.reshape(n, -1)
    order = np.argsort(-flat, 1)[:, :MAX_CUES]
    top = np.zeros_like(flat, bool)
    np.put_along_axis(top, order, True, 1)
    first = np.zeros_like(flat, bool)
    np.put_along_axis(first, order[:, :1], True, 1)
    best = (0.5, 0.0, 0.0)
    for threshold in np.arange(0.1, 0.95, 0.05):
        named = (top & (flat >= threshold)) | (first & (flat >= LIKELY))
        pairs = named.reshape(chance.shape)
        f1 = _f1(pairs, there)
        if f1 > best[1]:
            best = (round(float(threshold), 2), round(f1, 4), round(_f1(pairs.any(2), there.any(2)), 4))
    return best


def _f1(named: NDArray[np.bool_] | np.bool_, there: NDArray[np.bool_] | np.bool_) -> float:
    """F1 over all entries of two boolean arrays."""
    return float(2 * (named & there).sum() / max(1, named.sum() + there.sum()))
