"""Training of the expert `clip-cues`: a head for cues on areas of CLIP, which itself is not trained.

The pictures are taken as they are in use. Augmented views of the same pictures made the head worse, more pictures made
it better (LOG.md). How much it counts beside the tower's own head, and from which probability both name a cue, is
chosen on pictures of split `calib`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from external_detectors.clip_cues import NAME, CueHead
from external_detectors.clip_probe import FEATURES, LAYERS, VERSION, clip_areas
from external_detectors.tower import load_heads
from external_detectors.tower_net import POOLED, TowerHeads, area_grid
from external_detectors.train.heads import fit_epochs, named_cues
from external_detectors.train.loop import (
    best_threshold,
    covered,
    cue_loss,
    cue_truth,
    licence_of,
    log,
    next_version,
    ridge_logistic,
)
from external_detectors.train.tower import held_out_rows, own_origins
from external_detectors.weights_io import save_weights
from x2dfd.crops import CropSet, load_sets
from x2dfd.degrade import CODEC, codec
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import Json, file_sha256, locked_folder
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.options import names
from x2dfd.progress import progress
from x2dfd.tower import CLOSER_MATRIX, HEAD_LAYERS, VIEWS, CachedArray, tower_states
from x2dfd.types import Card

BATCH, READ = 64, 16  # pictures of a step, and of a pass of CLIP
SHARES = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0)
MAX_CALIB = 800  # pictures on which the share is chosen


def cues(
    data: Annotated[list[Path], typer.Option(help="manifest of forgeries with cues (data_gen forge); again for more")],
    tower: Annotated[Path, typer.Option(help="folder of the tower's weights and card, with whose head this one joins")],
    features: Annotated[Path, typer.Option(help="folder for CLIP's areas, which are computed once")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")],
    leave_out: Annotated[str, typer.Option("--held-out", help="sources, generators and methods, comma-separated")] = "",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    lr: float = 1e-3,
    int8: Annotated[bool, typer.Option("--int8", help="CLIP in 8 bits: twice as quick on CPUs with VNNI")] = False,
    seed: int = 0,
    crop_workers: int = 1,
) -> None:
    """The expert on the cues of areas of CLIP, which the tower joins with its own."""
    torch.manual_seed(seed)
    left_out, card_of_tower = names(leave_out), read_card(tower / "tower.card.json")
    heads_of_tower = load_heads(card_of_tower, tower)
    sets = load_sets(data, crop_workers, on_remark=log)
    places, is_held_out = _places(sets, left_out)
    samples = [sets[k].samples[i] for k, i in places]
    calib, fake = np.array([s.split == "calib" for s in samples]), np.array([s.label == "fake" for s in samples])
    truth = torch.from_numpy(np.stack([cue_truth(s) for s in samples]))
    train_rows, scored_rows = np.flatnonzero(~calib & ~is_held_out), np.flatnonzero(calib & ~is_held_out)
    calib_rows = scored_rows[(truth[scored_rows] > 0).flatten(1).any(1).numpy()]
    if not len(calib_rows) or fake[scored_rows].all():
        raise X2DFDError(
            "split `calib` holds no forgery with cues or no photo; they choose how much the head counts", code="no_cues"
        )
    calib_rows = np.sort(np.random.default_rng(seed).permutation(calib_rows)[:MAX_CALIB])
    net, version = CueHead(), next_version(out, NAME)
    net.allowed.copy_(torch.from_numpy(named_cues([samples[i] for i in train_rows])))
    with locked_folder(features, wait=True):
        areas = _areas(sets, places, features, int8)

    def logits_of(rows: NDArray[np.intp]) -> Tensor:
        logits: Tensor = net(torch.from_numpy(areas[rows].astype(np.float32)))
        return logits

    def evaluate() -> dict[str, float]:
        return best_threshold(torch.cat([logits_of(rows) for rows in _batches(calib_rows)]), truth[calib_rows])

    def loss_fn(rows: NDArray[np.intp]) -> Tensor:
        return cue_loss(logits_of(rows), truth[rows], net.allowed)

    alone = fit_epochs(net, [net], train_rows, loss_fn, evaluate, epochs=epochs, lr=lr, batch=BATCH, seed=seed)
    with torch.inference_mode():
        own = torch.cat([logits_of(rows) for rows in _batches(calib_rows)])
        evidence = torch.cat([net.changed(logits_of(rows)) for rows in _batches(scored_rows)])
        of_tower = _of_tower(sets, [places[i] for i in calib_rows], heads_of_tower, tower / card_of_tower.weights)
    share, by_share = _weigh(net, of_tower, own, truth[calib_rows])
    slope, offset = _fit_score(evidence, fake[scored_rows])
    net.slope.fill_(slope)
    net.offset.fill_(offset)
    settings = {"data": [manifest_sha256(path) for path in data], "epochs": epochs, "lr": lr, "seed": seed}
    figures = {
        **by_share[share],
        "cue_n": len(calib_rows),
        "share": share,
        "auc": round(float(roc_auc_score(fake[scored_rows], evidence)), 4),
        "auc_n": len(scored_rows),
        "cue_f1_alone": alone["cue_f1"],
        "cue_f1_of_tower": by_share[0.0]["cue_f1"],
        "left_out": list(left_out),
        "tower": card_of_tower.sha256,
        "settings": settings | ({"int8": True} if int8 else {}),
    }
    save_weights(net.state_dict(), _card([samples[i] for i in train_rows], version, net, figures), out)
    print(out / f"{NAME}.card.json")


Places = list[tuple[int, int]]
"""Set and row of each picture."""


def _places(sets: list[CropSet], left_out: tuple[str, ...]) -> tuple[Places, NDArray[np.bool_]]:
    """The pictures that can teach, and which of them are held out.

    No area of a face made as a whole is named, and of some fakes the areas are unknown, so these teach nothing here.
    """
    origins = {name for crops in sets for s in crops.samples for name in own_origins(s)}
    if absent := [name for name in left_out if name not in origins]:  # such as generators: no forgeries
        log(f"no picture here is of {', '.join(absent)}")
    places = [
        (k, i)
        for k, crops in enumerate(sets)
        for i, s in enumerate(crops.samples)
        if s.split in ("train", "calib")
        and s.df_class != "EFS"
        and ((truth := cue_truth(s)) >= 0).any()
        and (s.label == "real" or truth.any())
    ]
    held_out = held_out_rows(sets, left_out)
    return places, np.array([place in held_out for place in places], bool)


def _card(learnt_from: Sequence[Sample], version: str, net: CueHead, figures: Json) -> Card:
    return Card(
        name=NAME,
        version=version,
        source="trained by this project: external_detectors/train",
        licence=licence_of(learnt_from),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="features of CLIP's layers after Koutlis & Papadopoulos, arXiv 2402.19091; CLIP, arXiv 2103.00020",
        blind_spot="Faces made as a whole, and changes whose signs the forge does not make.",
        trained_on=f"{len(learnt_from)} pictures; sources: {', '.join(sorted({s.source for s in learnt_from}))}",
        covers=covered(net.allowed)[1:],  # all but EFS
        figures=figures,
    )


def _weigh(net: CueHead, of_tower: Tensor, own: Tensor, truth: Tensor) -> tuple[float, dict[float, dict[str, float]]]:
    """Give this head the share in both logits, [n, areas, artifacts], that has the best F1; the figures of each."""
    by_share = {}
    for share in SHARES:
        net.share.fill_(share)
        by_share[share] = best_threshold(net.join(of_tower, own), truth)
        log(f"share {share}: {by_share[share]}")
    best = max(by_share, key=lambda share: by_share[share]["cue_f1"])
    net.share.fill_(best)
    return best, by_share


def _fit_score(evidence: Tensor, is_fake: NDArray[np.bool_]) -> tuple[float, float]:
    """Slope and offset of the logit of P(changed in part), where forgeries and photos are equally frequent."""
    labels, n = torch.from_numpy(is_fake).float(), int(is_fake.sum())
    weights = torch.where(labels > 0, 0.5 / n, 0.5 / (len(is_fake) - n))
    weight, bias = ridge_logistic(evidence[:, None], labels, 0.0, weights)
    return float(weight), float(bias)


def _batches(rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def _crops(sets: list[CropSet], places: Places) -> Tensor:
    """The crops as they are in use: [n, CROP_SIZE, CROP_SIZE, 3]."""
    return torch.from_numpy(np.stack([codec(np.ascontiguousarray(sets[k].crops[i]), *CODEC) for k, i in places]))


def _areas(sets: list[CropSet], places: Places, folder: Path, int8: bool) -> NDArray[np.float16]:
    """CLIP's areas of each picture, [n, areas, FEATURES]. A cut-off run resumes."""
    digest = hashlib.sha256()
    for k, i in places:
        digest.update(sets[k].samples[i].id.encode() + sets[k].crops[i].tobytes() + sets[k].landmarks[i].tobytes())
    base = file_sha256(require("base") / "model.safetensors")
    key = {"pictures": digest.hexdigest(), "features": VERSION, "layers": list(LAYERS), "base": base}
    key |= VIEWS | ({"int8": True} if int8 else {})
    cache = CachedArray(folder, "areas.npy", key, (len(places), len(POOLED), FEATURES))
    rows = cache.open()
    for start in progress(range(cache.done, len(places), READ), "CLIP's areas"):
        batch = places[start : start + READ]
        grids = np.stack([area_grid(np.asarray(sets[k].landmarks[i], np.float32)) for k, i in batch])
        areas = clip_areas(_crops(sets, batch), torch.from_numpy(grids).float() / 255, torch.int8 if int8 else None)
        rows[start : start + READ] = areas.numpy().astype(np.float16)
        if (start // READ) % 16 == 15 or start + READ >= len(places):
            cache.save(rows, min(start + READ, len(places)))
    return rows


def _of_tower(sets: list[CropSet], places: Places, heads: TowerHeads, additions: Path) -> Tensor:
    """Logits of the tower's own head for cues: [n, areas, artifacts]."""
    found = []
    for start in progress(range(0, len(places), READ), "the tower's cues"):
        batch = places[start : start + READ]
        states = tower_states(_crops(sets, batch), max(HEAD_LAYERS), additions)
        points = [cv2.transform(sets[k].landmarks[i][None], CLOSER_MATRIX)[0].astype(np.float32) for k, i in batch]
        grids = torch.from_numpy(np.stack([area_grid(p) for p in points])).float() / 255
        patches = torch.cat([F.layer_norm(states[k].float(), states[k].shape[-1:])[:, 1:] for k in HEAD_LAYERS], 2)
        found.append(heads.cues(patches, grids))
    return torch.cat(found)
