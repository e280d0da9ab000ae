"""Training of three of the forensic tower's heads, cues, map and "no photograph", on features that are computed once.

The tower and its verdict stay as they are: a head that names cues needs many epochs over few pictures, and the tower
would learn those pictures by heart. The map learns from forgeries alone: it says where a picture was changed, not
whether it was.
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
from external_detectors.train.loop import (
    ENOUGH,
    best_threshold,
    covered,
    cue_loss,
    cue_truth,
    log,
    next_version,
    ridge_logistic,
)
from external_detectors.weights_io import load_weights, save_weights
from x2dfd.crops import MASK_SIZE, CropSet, load_crops
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card
from x2dfd.faces import CROP_SIZE
from x2dfd.files import Json
from x2dfd.manifest import Sample
from x2dfd.progress import progress
from x2dfd.tower import (
    CLOSER,
    CLOSER_MATRIX,
    HEAD_LAYERS,
    TowerFeatures,
    cached_features,
    degraded_view,
    tower_states,
    training_rows,
    view_face,
)

BATCH = 64
MAX_DRAWINGS = 400  # trained on with as many photos, real and forged
MAP_EPOCHS = 8  # after which the overlap with held-out forgeries no longer grew


def heads(
    data: Annotated[Path, typer.Option(help="manifest of forgeries with cues and masks (data_gen forge)")],
    start: Annotated[Path, typer.Option(help="folder of the tower's weights and card")],
    features: Annotated[Path, typer.Option(help="folder of the tower's outputs, which build and finetune use too")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")],
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    lr: float = 1e-3,
    view_seed: int = 1,
    seed: int = 0,
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, sampled by id")] = None,
) -> None:
    """Train the tower's heads for cues, the map and "no photograph"; the verdict stays as it was."""
    torch.manual_seed(seed)
    card, version = read_card(start / "tower.card.json"), next_version(out, "tower")
    weights = load_weights(card, start)
    net = TowerHeads()
    incompatible = net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("tower.")}, strict=False)
    if unknown := incompatible.unexpected_keys:
        raise X2DFDError(f"{start} holds the tensor {unknown[0]}, which the heads do not have", code="tensor_unknown")
    additions = start / card.weights
    crops = load_crops(data)
    if lost := crops.lost():
        log(lost)
    rows = training_rows(crops, limit)
    splits = np.array([crops.samples[i].split for i in rows])
    net.allowed.copy_(torch.from_numpy(named_cues([crops.samples[i] for i in rows[splits == "train"]])))
    cache = cached_features(crops, rows, features, max(HEAD_LAYERS), HEAD_LAYERS, view_seed, additions=additions)
    truth, areas = _targets(crops, rows, view_seed)
    figures = _train_cues(net, cache, truth, areas, splits, epochs, lr, seed)
    figures |= _train_map(net, cache, _masks(crops, rows, view_seed), areas, splits, lr, seed)
    figures |= _fit_photo(net, crops, rows[splits == "train"], additions, seed)
    state = {k: v for k, v in weights.items() if k.startswith("tower.")} | net.state_dict()
    figures = {**card.figures, **figures}
    new_card = replace(card, version=version, covers=covered(net.allowed), figures=figures)
    save_weights(state, new_card, out)
    print(out / "tower.card.json")


def named_cues(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """The cues that enough training pictures show, [areas, artifacts]. Raises X2DFDError where there is none."""
    shown = np.sum([cue_truth(s) > 0 for s in samples], 0)
    if (most := int(np.max(shown))) < ENOUGH:
        raise X2DFDError(
            f"the heads need at least {ENOUGH} training pictures that show the same cue, and of these {len(samples)} "
            f"at most {most} do: forge or take more",
            code="too_few_pictures",
        )
    return np.asarray(shown >= ENOUGH)


def _targets(crops: CropSet, rows: NDArray[np.intp], view_seed: int) -> tuple[Tensor, Tensor]:
    """Each picture's cues (1, 0, or -1: unknown), [n, areas, artifacts], and the area grids of what the tower sees."""
    truth = np.stack([cue_truth(crops.samples[i]) for i in rows])
    views = [view_face(crops, int(i), view_seed).crop_landmarks for i in progress(rows, "area grids")]
    points = (cv2.transform(v[None], CLOSER_MATRIX)[0].astype(np.float32) for v in views)
    return torch.from_numpy(truth), torch.from_numpy(np.stack([area_grid(p) for p in points]))


def fit_epochs(
    net: nn.Module,
    modules: Sequence[nn.Module],
    rows: NDArray[np.intp],
    loss_fn: Callable[[NDArray[np.intp]], Tensor],
    evaluate: Callable[[], dict[str, float]],
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
) -> dict[str, float]:
    """Train modules of the net on rows, restore the epoch whose first figure is best, and return its figures."""
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=lr, weight_decay=0.05)
    rng = np.random.default_rng(seed)
    best: tuple[float, dict[str, float], list[dict[str, Tensor]]] = -1.0, {}, []
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + np.cos(np.pi * epoch / epochs))
        net.train()
        order = rng.permutation(rows)
        for start in progress(range(0, len(order), batch), f"epoch {epoch + 1} of {epochs}"):
            loss = loss_fn(np.sort(order[start : start + batch]))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            figures = evaluate()
        log(f"epoch {epoch + 1}: {figures}")
        if (value := next(iter(figures.values()))) > best[0]:
            best = value, figures, [copy.deepcopy(module.state_dict()) for module in modules]
    for module, state in zip(modules, best[2], strict=True):
        module.load_state_dict(state)
    return best[1]


def _train_cues(
    net: TowerHeads,
    cache: TowerFeatures,
    truth: Tensor,
    areas: Tensor,
    splits: NDArray[np.str_],
    epochs: int,
    lr: float,
    seed: int,
) -> Json:
    """Train the cue head; keep the epoch with the best F1 on split `calib`, and the threshold that gives it."""
    labelled, positive = (truth >= 0).flatten(1).any(1).numpy(), (truth > 0).flatten(1).any(1).numpy()
    calib_rows = np.flatnonzero((splits == "calib") & labelled)
    scored_rows = calib_rows[positive[calib_rows]]

    def loss_fn(indices: NDArray[np.intp]) -> Tensor:
        return cue_loss(_cues(net, cache, areas, indices), truth[indices], net.allowed)

    def evaluate() -> dict[str, float]:
        if not len(scored_rows):
            return {"cue_f1": 0.0, "cue_threshold": 0.5}
        logits = [_cues(net, cache, areas, scored_rows[k : k + BATCH]) for k in range(0, len(scored_rows), BATCH)]
        return best_threshold(torch.cat(logits), truth[scored_rows])

    train_rows = np.flatnonzero((splits == "train") & labelled)
    modules = (net.mix, net.name)
    best = fit_epochs(net, modules, train_rows, loss_fn, evaluate, epochs=epochs, lr=lr, batch=BATCH, seed=seed)
    return {**best, "cue_n": len(calib_rows), "cue_epochs": epochs}


def _masks(crops: CropSet, rows: NDArray[np.intp], view_seed: int) -> Tensor:
    """The part of each mask that the tower sees, 1 where changed, else 0: [n, GRID, GRID]. No mask gives zeros."""
    margin = CLOSER * MASK_SIZE // CROP_SIZE
    masks = np.zeros((len(rows), GRID, GRID), np.float32)
    for k, i in enumerate(rows):
        if crops.samples[i].mask is not None and crops.masks is not None:
            mask = np.asarray(crops.masks[i])[margin:-margin, margin:-margin]
            mask = cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA)
            masks[k] = (mask[:, ::-1] if degraded_view(crops.crops[i], view_seed, int(i))[1] else mask) > 127
    return torch.from_numpy(masks)


def _train_map(
    net: TowerHeads,
    cache: TowerFeatures,
    masks: Tensor,
    areas: Tensor,
    splits: NDArray[np.str_],
    lr: float,
    seed: int,
) -> Json:
    """Train the map on forgeries that change part of a picture; keep the epoch with the best IoU on split `calib`."""
    share = masks.flatten(1).mean(1).numpy()
    local = (share > 0) & (share < 0.97)
    train_rows, calib_rows = np.flatnonzero((splits == "train") & local), np.flatnonzero((splits == "calib") & local)
    if not len(train_rows) or not len(calib_rows):
        raise X2DFDError("the splits `train` and `calib` hold no forgery with a mask", code="no_mask")

    def loss_fn(indices: NDArray[np.intp]) -> Tensor:
        logits, target = net.map(_patches(cache, indices), areas[indices].float() / 255), masks[indices]
        return F.binary_cross_entropy_with_logits(logits, target) + 1 - _soft_iou(logits.sigmoid(), target).mean()

    def evaluate() -> dict[str, float]:
        """The mean IoU of the maps, each cut at half of its maximum."""
        batches = [calib_rows[k : k + BATCH] for k in range(0, len(calib_rows), BATCH)]
        maps = torch.cat([net.map(_patches(cache, batch), areas[batch].float() / 255) for batch in batches]).sigmoid()
        binary = (maps >= 0.5 * maps.amax((1, 2), keepdim=True)).float()
        return {"map_iou": float(_soft_iou(binary, masks[calib_rows]).mean())}

    best = fit_epochs(
        net, [net.map], train_rows, loss_fn, evaluate, epochs=MAP_EPOCHS, lr=lr, batch=BATCH // 2, seed=seed
    )
    return {"map_iou": round(best["map_iou"], 4), "map_n": len(calib_rows)}


def _soft_iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of each map, with values from 0 to 1, and its target: [n]."""
    intersection = (predicted * target).flatten(1).sum(1)
    return intersection / ((predicted + target).flatten(1).sum(1) - intersection)


def _patches(cache: TowerFeatures, indices: NDArray[np.intp]) -> Tensor:
    """The features of each patch that the heads read: [n, 196, 4 * 768]."""
    layers = [torch.from_numpy(cache.tokens[indices, k, 1:].astype(np.float32)) for k in range(len(HEAD_LAYERS))]
    return torch.cat([F.layer_norm(layer, layer.shape[-1:]) for layer in layers], 2)


def _cues(net: TowerHeads, cache: TowerFeatures, areas: Tensor, indices: NDArray[np.intp]) -> Tensor:
    """Logits of the cues: [n, areas, artifacts]."""
    return net.cues(_patches(cache, indices), areas[indices].float() / 255)


def _fit_photo(net: TowerHeads, crops: CropSet, rows: NDArray[np.intp], additions: Path, seed: int) -> Json:
    """Fit the head that tells photographs from drawings on half of the pictures; figures are from the other half."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(rows, min(len(rows), 2 * MAX_DRAWINGS), replace=False)
    is_drawing = np.arange(len(chosen)) % 2 == 1
    statistics = []
    for start in progress(range(0, len(chosen), 16), "drawings"):
        originals = [np.ascontiguousarray(crops.crops[i]) for i in chosen[start : start + 16]]
        views = [drawing(c, rng) if d else c for c, d in zip(originals, is_drawing[start : start + 16], strict=True)]
        pixels = torch.from_numpy(np.stack([codec(v, *CODEC) for v in views]))
        statistics.append(net.statistics(tower_states(pixels, max(HEAD_LAYERS), additions)))
    net.eval()
    with torch.inference_mode():
        x = net.norm(torch.cat(statistics).float())
    is_test = np.arange(len(chosen)) % 4 >= 2
    weight, bias = ridge_logistic(x[~is_test], torch.from_numpy(~is_drawing[~is_test]).float())
    with torch.no_grad():
        net.photo.weight.copy_(weight[None])
        net.photo.bias.copy_(bias)
        called_drawing = (net.photo(x[is_test])[:, 0] < np.log(1 / 9)).numpy()  # P(no photograph) of 0.9 and more
    return {
        "drawings_found": round(float(called_drawing[is_drawing[is_test]].mean()), 4),
        "photos_called_drawings": round(float(called_drawing[~is_drawing[is_test]].mean()), 4),
        "drawings_n": int(is_test.sum()),
    }
