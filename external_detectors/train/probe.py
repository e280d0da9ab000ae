"""Training of the experts `clip-probe` and `clip-contrast`: penalised logistics on features of CLIP, which itself is
not trained.

The pictures are those of the tower's training, each as it is and in augmented views, among them self-blended photos.
`clip-contrast` learns from photos and fakes that were changed in part, `clip-probe` from all. CLIP's features are
computed once. Each training on them then takes seconds, also one with held-out sources.
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

from external_detectors.clip_probe import CLASS_FEATURES, FEATURES, LAYERS, VERSION, clip_features
from external_detectors.tower_net import KINDS
from external_detectors.train.drawing import DRAWING_VERSION
from external_detectors.train.loop import by_method, licence_of, log, next_version, ridge_logistic
from external_detectors.train.tower import Pictures
from external_detectors.weights_io import save_weights
from x2dfd.crops import load_sets
from x2dfd.errors import X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.fetch import require
from x2dfd.files import file_sha256, locked_folder
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.options import names
from x2dfd.progress import progress
from x2dfd.tower import VIEWS, CachedArray
from x2dfd.types import Card

BATCH = 16
View = tuple[int, int, int]
"""Manifest, picture, and the number of its view: 0 is the picture as it is in use."""

EXPERTS = (
    (
        "clip-probe",
        CLASS_FEATURES,
        ("EFS",),
        "Changes of a part, and generators whose faces look like photos to CLIP; it cannot say where or why.",
    ),
    (
        "clip-contrast",
        FEATURES,
        ("FS", "FR", "FE"),
        "Faces made as a whole, and faint changes of a small part; it cannot say where or why.",
    ),
)
"""Name, number of features, classes of fakes, blind spot."""


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
    """The probes on CLIP as it is: real or fake, and real or changed in part."""
    left_out = names(leave_out)
    pictures = Pictures(load_sets(data, crop_workers), left_out, seed)
    samples = [pictures.at(k, i) for k, i in pictures.rows]
    experts = _trainable(samples, out)
    versions = {name: next_version(out, name) for name, *_ in experts}
    places = [place for place in pictures.all_rows if pictures.at(*place).split in ("", "train", "val")]
    all_views = [(k, i, v) for v in range(views) for k, i in places if not (v and pictures.at(k, i).split == "val")]
    with locked_folder(features, wait=True):
        seen, (fake, photo, whole) = _features(pictures, all_views, features, seed, int8)
    row_of = {view: row for row, view in enumerate(all_views)}
    rows = np.array([row_of[k, i, v] for v in range(views) for k, i in pictures.rows], np.intp)
    odds = np.tile(pictures.odds, views)
    val_rows = [row_of[k, i, 0] for k, i in pictures.validation_rows]
    val_samples = [pictures.at(k, i) for k, i in pictures.validation_rows]
    settings = {"data": [manifest_sha256(path) for path in data], "views": views, "ridge": ridge, "seed": seed}
    settings |= {"int8": True} if int8 else {}
    for expert, n_features, covers, blind_spot in experts:
        all_kinds = "EFS" in covers
        used = photo[rows] & (all_kinds | ~fake[rows] | ~whole[rows])
        x = seen[:, :n_features]
        weight, bias = _fit(x, fake, rows[used], odds[used], ridge)
        log(f"{expert}: {int(used.sum())} views")
        judged = [k for k, s in enumerate(val_samples) if all_kinds or s.df_class != "EFS"]
        learnt_from = [s for s in samples if all_kinds or s.df_class != "EFS"]
        scores = x[[val_rows[k] for k in judged]].astype(np.float64) @ weight + bias
        card = Card(
            name=expert,
            version=versions[expert],
            source="trained by this project: external_detectors/train",
            licence=licence_of(learnt_from),
            sha256="",
            preprocessing=PREPROCESSING,
            paper="features of CLIP's layers after Koutlis & Papadopoulos, arXiv 2402.19091; CLIP, arXiv 2103.00020",
            blind_spot=blind_spot,
            trained_on=f"{len(learnt_from)} pictures; sources: {', '.join(sorted({s.source for s in learnt_from}))}",
            covers=covers,
            figures={
                "left_out": list(left_out),
                "settings": settings,
                "auc": by_method([val_samples[k] for k in judged], scores) if judged else {},
            },
        )
        save_weights({"weight": torch.from_numpy(weight), "bias": torch.tensor(float(bias))}, card, out)
        print(out / f"{expert}.card.json")


def _trainable(samples: Sequence[Sample], out: Path) -> Sequence[tuple[str, int, tuple[str, ...], str]]:
    """The EXPERTS for whose classes there are fakes. Raises X2DFDError where `out` holds another one of them, of an
    earlier training, which would pass for one of this training."""
    classes = {s.df_class for s in samples if s.label == "fake"}
    chosen = [expert for expert in EXPERTS if classes & set(expert[2])]
    for name, _, covers, _ in EXPERTS:
        if name in {expert[0] for expert in chosen}:
            continue
        reason = f"the pictures hold no fakes of {', '.join(covers)}"
        if (card := out / f"{name}.card.json").exists():
            raise X2DFDError(
                f"{card} is of an earlier training, and {name} cannot be trained now: {reason}; give another --out, or "
                "remove its card and weights",
                code="old_expert_there",
            )
        log(f"{name} is not trained: {reason}")
    return chosen


def _features(
    pictures: Pictures, all_views: Sequence[View], folder: Path, seed: int, int8: bool
) -> tuple[NDArray[np.float16], list[NDArray[np.bool_]]]:
    """CLIP's features of each view, [n, FEATURES], and which views are fake, which are photographs (forged or not, but
    no drawings), and which were made as a whole or derived from such a picture. A cut-off run resumes."""
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
    shape = (len(all_views), FEATURES + 3)  # the last three: fake, photograph, whole
    cache = CachedArray(folder, "features.npy", key, shape)
    rows = cache.open()
    for start in progress(range(cache.done, len(all_views), BATCH), "CLIP's features"):
        batch = all_views[start : start + BATCH]
        items = [pictures.sample(k, i, np.random.default_rng([seed, v, k, i]) if v else None) for k, i, v in batch]
        crops = torch.from_numpy(np.stack([item[0] for item in items]))
        truth = np.array([[item[1], item[6], item[2] == KINDS.index("EFS")] for item in items], np.float16)
        rows[start : start + BATCH] = np.concatenate([clip_features(crops, dtype).numpy().astype(np.float16), truth], 1)
        if (start // BATCH) % 16 == 15 or start + BATCH >= len(all_views):
            cache.save(rows, min(start + BATCH, len(all_views)))
    return rows[:, :FEATURES], [rows[:, FEATURES + k] > 0 for k in range(3)]


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
