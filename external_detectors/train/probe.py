"""Training of the expert `clip-probe`: a penalised logistic on features of CLIP, which itself is not trained.

The pictures are those of the tower's training, each as it is and in augmented views, among them self-blended photos.
CLIP's features are computed once. Each training on them then takes seconds, also one with held-out sources.
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

from external_detectors.clip_probe import FEATURES, LAYERS, VERSION, clip_features
from external_detectors.train.drawing import DRAWING_VERSION
from external_detectors.train.loop import by_method, licence_of, log, next_version, ridge_logistic
from external_detectors.train.tower import Pictures
from external_detectors.weights_io import save_weights
from x2dfd.crops import load_sets
from x2dfd.errors import X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import file_sha256, locked_folder
from x2dfd.manifest import manifest_sha256
from x2dfd.options import names
from x2dfd.progress import progress
from x2dfd.tower import VIEWS, CachedArray
from x2dfd.types import Card

BATCH, NAME = 16, "clip-probe"
View = tuple[int, int, int]
"""Manifest, picture, and the number of its view: 0 is the picture as it is in use."""


def probe(
    data: Annotated[list[Path], typer.Option(help="manifest of photos and fakes; give it again for more")],
    features: Annotated[Path, typer.Option(help="folder for CLIP's features, which are computed once")],
    out: Annotated[Path, typer.Option(help="folder for weights and cards")],
    leave_out: Annotated[str, typer.Option("--held-out", help="sources, generators and methods, comma-separated")] = "",
    views: Annotated[int, typer.Option(min=1, help="views of a picture: as it is, and augmented ones")] = 2,
    ridge: Annotated[float, typer.Option(help="penalty on the squared weights of standardised features")] = 0.1,
    int8: Annotated[bool, typer.Option("--int8", help="CLIP in 8 bits: twice as quick on CPUs with VNNI")] = False,
    seed: int = 0,
    crop_workers: int = 1,
) -> None:
    """The probe on CLIP as it is: real or fake."""
    left_out = names(leave_out)
    pictures = Pictures(load_sets(data, crop_workers, on_remark=log), left_out, seed)
    samples = [pictures.at(k, i) for k, i in pictures.rows]
    if not {"EFS", None} <= {s.df_class if s.label == "fake" else None for s in samples}:
        raise X2DFDError("the pictures hold no photo, or no fake of class EFS", code="too_few_pictures")
    version = next_version(out, NAME)
    places = [place for place in pictures.all_rows if pictures.at(*place).split in ("", "train", "val")]
    all_views = [(k, i, v) for v in range(views) for k, i in places if not (v and pictures.at(k, i).split == "val")]
    with locked_folder(features, wait=True):
        seen, (fake, photo) = _features(pictures, all_views, features, seed, int8)
    row_of = {view: row for row, view in enumerate(all_views)}
    rows = np.array([row_of[k, i, v] for v in range(views) for k, i in pictures.rows], np.intp)
    odds = np.tile(pictures.odds, views)
    val_rows = [row_of[k, i, 0] for k, i in pictures.validation_rows]
    val_samples = [pictures.at(k, i) for k, i in pictures.validation_rows]
    settings = {"data": [manifest_sha256(path) for path in data], "views": views, "ridge": ridge, "seed": seed}
    settings |= {"int8": True} if int8 else {}
    used = photo[rows]
    weight, bias = _fit(seen, fake, rows[used], odds[used], ridge)
    scores = seen[val_rows].astype(np.float64) @ weight + bias
    card = Card(
        name=NAME,
        version=version,
        source="trained by this project: external_detectors/train",
        licence=licence_of(samples),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="features of CLIP's layers after Koutlis & Papadopoulos, arXiv 2402.19091; CLIP, arXiv 2103.00020",
        blind_spot="Changes of a part, and generators whose faces look like photos to CLIP; it knows no places.",
        trained_on=f"{len(samples)} pictures; sources: {', '.join(sorted({s.source for s in samples}))}",
        covers=("EFS",),
        figures={
            "left_out": list(left_out),
            "settings": settings,
            "auc": by_method(val_samples, scores) if val_samples else {},
        },
    )
    save_weights({"weight": torch.from_numpy(weight), "bias": torch.tensor(float(bias))}, card, out)
    print(out / f"{NAME}.card.json")


def _features(
    pictures: Pictures, all_views: Sequence[View], folder: Path, seed: int, int8: bool
) -> tuple[NDArray[np.float16], list[NDArray[np.bool_]]]:
    """CLIP's features of each view, [n, FEATURES], and which views are fake and which are photographs (forged or not,
    but no drawings). A cut-off run resumes."""
    digest = hashlib.sha256()
    for k, i, view in all_views:
        digest.update(
            f"{pictures.at(k, i).id}\n{pictures.at(k, i).label}\n{pictures.at(k, i).df_class}\n{view}\n".encode()
            + pictures.sets[k].crops[i].tobytes()
        )
    base = file_sha256(require("base") / "model.safetensors")
    key = {"views": digest.hexdigest(), "features": VERSION, "layers": list(LAYERS), "seed": seed, "base": base}
    key |= VIEWS | {"drawings": DRAWING_VERSION} | ({"int8": True} if int8 else {})
    dtype = torch.int8 if int8 else None
    shape = (len(all_views), FEATURES + 2)  # the last two: fake, photograph
    cache = CachedArray(folder, "features.npy", key, shape)
    rows = cache.open()
    for start in progress(range(cache.done, len(all_views), BATCH), "CLIP's features"):
        batch = all_views[start : start + BATCH]
        items = [pictures.sample(k, i, np.random.default_rng([seed, v, k, i]) if v else None) for k, i, v in batch]
        crops = torch.from_numpy(np.stack([item[0] for item in items]))
        truth = np.array([[item[1], item[6]] for item in items], np.float16)
        rows[start : start + BATCH] = np.concatenate([clip_features(crops, dtype).numpy().astype(np.float16), truth], 1)
        if (start // BATCH) % 16 == 15 or start + BATCH >= len(all_views):
            cache.save(rows, min(start + BATCH, len(all_views)))
    return rows[:, :FEATURES], [rows[:, FEATURES + k] > 0 for k in range(2)]


def _fit(
    features: NDArray[np.float16],
    labels: NDArray[np.bool_],
    train_rows: NDArray[np.intp],
    weights: NDArray[np.float64],
    ridge: float,
) -> tuple[NDArray[np.float32], np.float32]:
    """Weight and bias for features as they are, of a logistic on standardised ones; fakes and photos weigh the same."""
    x, y = features[train_rows].astype(np.float32), labels[train_rows]
    weights = np.where(y, weights / weights[y].sum(), weights / weights[~y].sum()).astype(np.float32) / 2
    mean = np.average(x, axis=0, weights=weights)
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights)) + 1e-4
    standardised = torch.from_numpy(((x - mean) / spread).astype(np.float32))
    fitted = ridge_logistic(standardised, torch.from_numpy(y).float(), ridge, torch.from_numpy(weights))
    weight = (fitted[0].numpy() / spread).astype(np.float32)
    return weight, np.float32(fitted[1].item() - weight @ mean)
