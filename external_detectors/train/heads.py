"""Training of three of the forensic tower's heads, cues, map and "no photograph", on features that are computed once.

The tower and its verdict stay as they are: a head that names what is wrong needs many looks at few pictures, which
would teach the tower those pictures by heart. The map learns from forgeries alone: it says where, not whether.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from external_detectors.tower_net import GRID, TowerHeads, area_grid
from external_detectors.train.drawing import drawing
from external_detectors.train.loop import ENOUGH, best_threshold, covered, cue_loss, cue_truth, log, next_version
from external_detectors.weights_io import load_weights, save_weights
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card
from x2dfd.files import Json
from x2dfd.progress import progress
from x2dfd.tower import (
    HEAD_LAYERS,
    TowerFeatures,
    cached_features,
    degraded_view,
    quick_in_16_bits,
    tower_states,
    training_rows,
    view_face,
)

BATCH = 64
DRAWINGS = 400  # and as many photos, real and forged
MAP_EPOCHS = 8  # at most: overlap with held-out forgeries stops growing there


def heads(
    data: Annotated[Path, typer.Option(help="manifest of forgeries with cues and masks (data_gen forge)")],
    start: Annotated[Path, typer.Option(help="folder of the tower's weights and card")],
    features: Annotated[Path, typer.Option(help="folder for its outputs, which build and finetune take too")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")],
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    lr: float = 1e-3,
    view_seed: int = 1,
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, drawn by id")] = None,
) -> None:
    """The heads of the tower for cues, the map and what is no photograph; the verdict stays as it was."""
    torch.manual_seed(seed)
    card = read_card(start / "tower.card.json")
    weights = load_weights(card, start)
    net = TowerHeads()
    found = net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("tower.")}, strict=False)
    if unknown := [k for k in found.unexpected_keys]:
        raise X2DFDError(f"{start} holds the tensor {unknown[0]}, which the heads do not have", code="tensor_unknown")
    additions = start / card.weights
    crops = load_crops(data)
    rows = training_rows(crops, limit)
    cache = cached_features(crops, rows, features, max(HEAD_LAYERS), HEAD_LAYERS, view_seed, additions=additions)
    truth, areas = _truth(crops, rows, view_seed)
    splits = np.array([crops.samples[i].split for i in rows])
    net.allowed.copy_(((truth[splits == "train"] > 0).sum(0) >= ENOUGH).float())
    figures = _learn_cues(net, cache, truth, areas, splits, epochs, lr, seed)
    figures |= _learn_map(net, cache, _masks(crops, rows, view_seed), areas, splits, lr, seed)
    figures |= _learn_photo(net, crops, rows[splits == "train"], additions, seed)
    state = {k: v for k, v in weights.items() if k.startswith("tower.")} | net.state_dict()
    figures = {**card.figures, **figures}
    made = replace(card, version=next_version(out, "tower"), covers=covered(net.allowed), figures=figures)
    save_weights(state, made, out)
    print(out / "tower.card.json")


def _truth(crops: CropSet, rows: NDArray[np.intp], view_seed: int) -> tuple[Tensor, Tensor]:
    """Cues of each picture, 1, 0, or -1 for unknown: [n, areas, artifacts]; and the area grids of its view."""
    truth = np.stack([cue_truth(crops.samples[i]) for i in rows])
    views = [view_face(crops, int(i), view_seed).crop_landmarks for i in progress(rows, "area grids")]
    return torch.from_numpy(truth), torch.from_numpy(np.stack([area_grid(points) for points in views]))


def _fit(
    net: TowerHeads,
    parts: Sequence[nn.Module],
    rows: NDArray[np.intp],
    loss_of: Callable[[NDArray[np.intp]], Tensor],
    figures_of: Callable[[], dict[str, float]],
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """Trains parts of the net on rows; keeps the epoch whose first figure is best, and returns its figures."""
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=lr, weight_decay=0.05)
    rng = np.random.default_rng(seed)
    best: tuple[float, dict[str, float], list[dict[str, Tensor]]] = -1.0, {}, []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        net.train()
        order = rng.permutation(rows)
        for at in progress(range(0, len(order), batch), f"epoch {epoch + 1} of {epochs}"):
            loss = loss_of(np.sort(order[at : at + batch]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            figures = figures_of()
        log(f"epoch {epoch + 1}: {figures}")
        if (value := next(iter(figures.values()))) > best[0]:
            best = value, figures, [copy.deepcopy(part.state_dict()) for part in parts]
    for part, state in zip(parts, best[2], strict=True):
        part.load_state_dict(state)
    return best[1]


def _learn_cues(
    net: TowerHeads,
    cache: TowerFeatures,
    truth: Tensor,
    areas: Tensor,
    splits: NDArray[np.str_],
    epochs: int,
    lr: float,
    seed: int,
) -> Json:
    """Trains the cue head; keeps the epoch with the best F1 on split `calib`, and the threshold that gives it."""
    known, shown = (truth >= 0).flatten(1).any(1).numpy(), (truth > 0).flatten(1).any(1).numpy()
    kept = np.flatnonzero((splits == "calib") & known)
    asked = kept[shown[kept]]

    def loss_of(chosen: NDArray[np.intp]) -> Tensor:
        return cue_loss(_cues(net, cache, areas, chosen), truth[chosen], net.allowed)

    def figures_of() -> dict[str, float]:
        if not len(asked):
            return {"cue_f1": 0.0, "cue_threshold": 0.5}
        named = [_cues(net, cache, areas, asked[k : k + BATCH]) for k in range(0, len(asked), BATCH)]
        return best_threshold(torch.cat(named), truth[asked])

    learnt = np.flatnonzero((splits == "train") & known)
    parts = (net.mix, net.name)
    best = _fit(net, parts, learnt, loss_of, figures_of, epochs=epochs, lr=lr, batch=BATCH, seed=seed)
    return {**best, "cue_n": len(kept), "cue_epochs": epochs}


def _masks(crops: CropSet, rows: NDArray[np.intp], view_seed: int) -> Tensor:
    """Where each picture was changed, 1 or 0: [n, GRID, GRID]; nought where no mask says it."""
    found = np.zeros((len(rows), GRID, GRID), np.float32)
    for k, i in enumerate(rows):
        if crops.samples[i].mask is not None and crops.masks is not None:
            mask = cv2.resize(np.asarray(crops.masks[i]), (GRID, GRID), interpolation=cv2.INTER_AREA)
            found[k] = (mask[:, ::-1] if degraded_view(crops.crops[i], view_seed, int(i))[1] else mask) > 127
    return torch.from_numpy(found)


def _learn_map(
    net: TowerHeads,
    cache: TowerFeatures,
    masks: Tensor,
    areas: Tensor,
    splits: NDArray[np.str_],
    lr: float,
    seed: int,
) -> Json:
    """Trains the map on forgeries of a part; keeps the epoch with the best IoU on split `calib`."""
    share = masks.flatten(1).mean(1).numpy()
    partly = (share > 0) & (share < 0.97)
    learnt, kept = np.flatnonzero((splits == "train") & partly), np.flatnonzero((splits == "calib") & partly)
    if not len(learnt) or not len(kept):
        raise X2DFDError("the splits `train` and `calib` hold no forgery with a mask", code="no_mask")

    def loss_of(chosen: NDArray[np.intp]) -> Tensor:
        drawn, wanted = net.map(_patches(cache, chosen), areas[chosen].float() / 255), masks[chosen]
        return F.binary_cross_entropy_with_logits(drawn, wanted) + 1 - _soft_iou(drawn.sigmoid(), wanted).mean()

    def figures_of() -> dict[str, float]:
        """The mean IoU of the maps, each cut at half of its maximum."""
        parts = [kept[k : k + BATCH] for k in range(0, len(kept), BATCH)]
        drawn = torch.cat([net.map(_patches(cache, part), areas[part].float() / 255) for part in parts]).sigmoid()
        cut = (drawn >= 0.5 * drawn.amax((1, 2), keepdim=True)).float()
        return {"map_iou": float(_soft_iou(cut, masks[kept]).mean())}

    best = _fit(net, [net.map], learnt, loss_of, figures_of, epochs=MAP_EPOCHS, lr=lr, batch=BATCH // 2, seed=seed)
    return {"map_iou": round(best["map_iou"], 4), "map_n": len(kept)}


def _soft_iou(drawn: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each map, of values 0 to 1, with its truth: [n]."""
    both = (drawn * truth).flatten(1).sum(1)
    return both / ((drawn + truth).flatten(1).sum(1) - both)


def _patches(cache: TowerFeatures, chosen: NDArray[np.intp]) -> Tensor:
    """What the heads read of each patch: [n, 196, 4 * 768]."""
    read = [torch.from_numpy(cache.tokens[chosen, k, 1:].astype(np.float32)) for k in range(len(HEAD_LAYERS))]
    return torch.cat([F.layer_norm(r, r.shape[-1:]) for r in read], 2)


def _cues(net: TowerHeads, cache: TowerFeatures, areas: Tensor, chosen: NDArray[np.intp]) -> Tensor:
    """Logits of the cues: [n, areas, artifacts]."""
    return net.cues(_patches(cache, chosen), areas[chosen].float() / 255)


def _learn_photo(net: TowerHeads, crops: CropSet, rows: NDArray[np.intp], additions: Path, seed: int) -> Json:
    """Fits the head that tells a photograph from a drawing; half of the pictures is kept to judge it."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(rows, min(len(rows), 2 * DRAWINGS), replace=False)
    drawn = np.arange(len(chosen)) % 2 == 1
    found = []
    for at in progress(range(0, len(chosen), 16), "drawings"):
        part = [np.ascontiguousarray(crops.crops[i]) for i in chosen[at : at + 16]]
        views = [drawing(c, rng) if d else c for c, d in zip(part, drawn[at : at + 16], strict=True)]
        pixels = torch.from_numpy(np.stack([codec(v, *CODEC) for v in views]))
        dtype = torch.bfloat16 if quick_in_16_bits("cpu") else torch.float32
        found.append(net.statistics(tower_states(pixels, max(HEAD_LAYERS), additions, dtype)))
    net.eval()
    with torch.inference_mode():
        x = net.norm(torch.cat(found).float())
    kept = np.arange(len(chosen)) % 4 >= 2
    weight, bias = _ridge_logistic(x[~kept], torch.from_numpy(~drawn[~kept]).float())
    with torch.no_grad():
        net.photo.weight.copy_(weight[None])
        net.photo.bias.copy_(bias)
        said = (net.photo(x[kept])[:, 0] < np.log(1 / 9)).numpy()  # P(no photograph) of 0.9 and more
    return {
        "drawings_found": round(float(said[drawn[kept]].mean()), 4),
        "photos_called_drawings": round(float(said[~drawn[kept]].mean()), 4),
        "drawings_n": int(kept.sum()),
    }


def _ridge_logistic(x: Tensor, y: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight and bias of a ridge-penalised logistic of x [n, d] and y [n] in {0, 1}, by L-BFGS."""
    x = x.clone()  # out of inference mode
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + ridge / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
