"""Training of the expert `clip-probe`: a penalised logistic on the class tokens of CLIP, which itself is not trained.

The pictures are those of the tower's training, each as it is and in augmented views, among them self-blended photos.
CLIP's tokens are computed once. Each training on them then takes seconds, also one with held-out sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from external_detectors.train.loop import by_method, licence_of, log, next_version, ridge_logistic
from external_detectors.train.tower import Pictures
from external_detectors.weights_io import save_weights
from x2dfd.crops import load_crops
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import alone, file_sha256
from x2dfd.manifest import manifest_sha256
from x2dfd.options import names
from x2dfd.progress import progress
from x2dfd.tower import CLASS_LAYERS, VIEWS, WIDTH, CachedArray, class_tokens
from x2dfd.types import Card

BATCH = 16
View = tuple[int, int, int]
"""Manifest, picture, and the number of its view: 0 is the picture as it is in use."""


def probe(
    data: Annotated[list[Path], typer.Option(help="manifest of photos and fakes; give it again for more")],
    features: Annotated[Path, typer.Option(help="folder for CLIP's class tokens, which are computed once")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")],
    leave_out: Annotated[str, typer.Option("--held-out", help="sources, generators and methods, comma-separated")] = "",
    views: Annotated[int, typer.Option(min=1, help="views of a picture: as it is, and augmented ones")] = 2,
    ridge: Annotated[float, typer.Option(help="penalty on the squared weights of standardised tokens")] = 0.1,
    seed: int = 0,
    crop_workers: int = 1,
) -> None:
    """The probe on CLIP as it is: real or fake, from its class tokens."""
    sets = [load_crops(path, crop_workers) for path in data]
    left_out = names(leave_out)
    pictures = Pictures(sets, left_out, seed)
    places = [(k, i) for k, crops in enumerate(sets) for i in range(len(crops.samples))]
    places = [(k, i) for k, i in places if pictures.at(k, i).split in ("", "train", "val")]
    all_views = [(k, i, v) for v in range(views) for k, i in places if not (v and pictures.at(k, i).split == "val")]
    with alone(features, wait=True):
        tokens, labels, photos = _tokens(pictures, all_views, features, seed)
    row_of = {view: row for row, view in enumerate(all_views)}
    rows = np.array([row_of[k, i, v] for v in range(views) for k, i in pictures.rows], np.intp)
    train_rows = rows[photos[rows]]
    weights = np.tile(pictures.odds, views)[photos[rows]]
    weight, bias = _fit(tokens, labels, train_rows, weights, ridge)
    log(f"{len(train_rows)} views of {len(pictures.rows)} pictures")
    val_samples = [pictures.at(k, i) for k, i in pictures.judged]
    scores = tokens[[row_of[k, i, 0] for k, i in pictures.judged]].astype(np.float32) @ weight + bias
    samples = [pictures.at(k, i) for k, i in pictures.rows]
    card = Card(
        name="clip-probe",
        version=next_version(out, "clip-probe"),
        source="trained by this project: external_detectors/train",
        licence=licence_of(samples),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="class tokens of CLIP's layers after Koutlis & Papadopoulos, arXiv 2402.19091; CLIP, arXiv 2103.00020",
        blind_spot="Faint changes of a small part, and generators whose faces look like photos to CLIP; it cannot say "
        "where or why.",
        trained_on=f"{len(samples)} pictures; sources: {', '.join(sorted({s.source for s in samples}))}",
        covers=("EFS", "FS", "FR", "FE"),
        figures={
            "left_out": list(left_out),
            "settings": {
                "data": [manifest_sha256(path) for path in data], "views": views, "ridge": ridge, "seed": seed
            },
            "auc": by_method(val_samples, scores.astype(np.float64)) if val_samples else {},
        },
    )  # fmt: skip
    save_weights({"weight": torch.from_numpy(weight), "bias": torch.tensor(float(bias))}, card, out)
    print(out / "clip-probe.card.json")


def _tokens(
    pictures: Pictures, all_views: Sequence[View], folder: Path, seed: int
) -> tuple[NDArray[np.float16], NDArray[np.bool_], NDArray[np.bool_]]:
    """Of each view CLIP's class tokens, whether it is fake, and whether it is a photograph. A cut-off run resumes."""
    digest = hashlib.sha256()
    for k, i, view in all_views:
        digest.update(
            f"{pictures.at(k, i).id}\n{pictures.at(k, i).label}\n{view}\n".encode()
            + pictures.sets[k].crops[i].tobytes()
        )
    base = file_sha256(require("base") / "model.safetensors")
    cache = CachedArray(
        folder,
        "class_tokens.npy",
        {"views": digest.hexdigest(), "layers": list(CLASS_LAYERS), "seed": seed, "base": base, **VIEWS},
    )
    rows = cache.open((len(all_views), len(CLASS_LAYERS) * WIDTH + 2))  # the last two: fake, photograph
    for start in progress(range(cache.done, len(all_views), BATCH), "class tokens"):
        batch = all_views[start : start + BATCH]
        items = [pictures.sample(k, i, np.random.default_rng([seed, v, k, i]) if v else None) for k, i, v in batch]
        crops = torch.from_numpy(np.stack([item[0] for item in items]))
        truth = np.array([[item[1], item[6]] for item in items], np.float16)
        rows[start : start + BATCH] = np.concatenate([class_tokens(crops).numpy().astype(np.float16), truth], 1)
        if (start // BATCH) % 16 == 15 or start + BATCH >= len(all_views):
            cache.save(rows, min(start + BATCH, len(all_views)))
    return rows[:, :-2], rows[:, -2] > 0, rows[:, -1] > 0


def _fit(
    tokens: NDArray[np.float16],
    labels: NDArray[np.bool_],
    train_rows: NDArray[np.intp],
    weights: NDArray[np.float64],
    ridge: float,
) -> tuple[NDArray[np.float32], np.float32]:
    """Weight and bias for tokens as they are, of a logistic on standardised ones; fakes and photos weigh the same."""
    x, y = tokens[train_rows].astype(np.float32), labels[train_rows]
    weights = np.where(y, weights / weights[y].sum(), weights / weights[~y].sum()).astype(np.float32) / 2
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights)) + 1e-4
    standardised = torch.from_numpy(((x - mean) / spread).astype(np.float32))
    fitted = ridge_logistic(standardised, torch.from_numpy(y).float(), ridge, torch.from_numpy(weights))
    weight = (fitted[0].numpy() / spread).astype(np.float32)
    return weight, np.float32(fitted[1].item() - weight @ mean)
