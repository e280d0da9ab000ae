"""Training of the expert `spectrum-noise`."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from external_detectors.spectrum_features import features, perceptron
from external_detectors.train.loop import (
    SOURCE,
    auc,
    balance,
    by_method,
    by_source,
    licence_of,
    log,
    next_version,
    source_names,
)
from external_detectors.weights_io import WEIGHTS, save_weights
from x2dfd.crops import CropSet, load_crops
from x2dfd.faces import PREPROCESSING
from x2dfd.manifest import Sample
from x2dfd.progress import progress
from x2dfd.tower import training_rows, view_face
from x2dfd.types import Card

_CHOICES: tuple[tuple[int, float], ...] = ((0, 1.0), (12, 1.0), (12, 0.1), (32, 1.0), (32, 0.1))
"""Hidden units (none: a logistic regression) and the penalty on the weights, to choose from."""


def spectrum_noise(
    data: Annotated[Path, typer.Option(help="manifest of forgeries, ready-made fakes and real photos")],
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, drawn at random")] = None,
    seed: Annotated[int, typer.Option(help="of that draw")] = 0,
    view_seed: int = 1,
    workers: int = 1,
) -> None:
    """A small scikit-learn model on spectrum and noise; its size is chosen on methods left out and the worst source."""
    crops = load_crops(data, workers)
    rows = training_rows(crops)
    if limit is not None and limit < len(rows):  # a manifest may be sorted by label or source
        rows = np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
    x, samples = _measured(crops, [int(i) for i in rows], view_seed)
    fake = np.array([s.label == "fake" for s in samples])
    train = np.array([s.split == "train" for s in samples])
    first = np.array([s.method.split("+")[0] for s in samples])
    used = [set(s.method.split("+")) for s in samples]
    methods = [str(m) for m, n in Counter(first[fake]).most_common() if n >= 40]
    source = np.array([s.source for s in samples])
    table = []
    for units, penalty in _CHOICES:
        left = {}
        for method in methods:
            hidden = np.array([method in u for u in used])
            state = _fit(x, fake, train & ~hidden, samples, units, penalty)
            tested = ~train & (~fake | (first == method))
            left[method] = auc(fake[tested], perceptron(state, x[tested]))
        state = _fit(x, fake, train, samples, units, penalty)
        scores = perceptron(state, x)
        by = {
            s: auc(fake[m], scores[m])
            for s in sorted({str(s) for s in source[~fake]})
            if (m := ~train & (source == s)).any()
        }
        known = {k: round(v, 4) for k, v in left.items() if v is not None}
        shown = {k: round(v, 4) for k, v in by.items() if v is not None}
        worth = (np.mean(list(known.values())) + min(shown.values(), default=0.5)) / 2 if known else 0.0
        table.append((float(worth), units, penalty, state, known, shown))
        log(f"{units} hidden units, penalty {penalty:g}: {worth:.4f}; left out {known}; by source {shown}")
    worth, units, penalty, state, left_out, of_source = max(table, key=lambda row: row[0])
    checked = [s for s, t in zip(samples, train, strict=True) if not t]
    scores = perceptron(state, x[~train])
    learnt = [s for s in samples if s.split == "train"]
    card = Card(
        name="spectrum-noise",
        version=next_version(out, "spectrum-noise"),
        source=SOURCE,
        licence=licence_of(learnt),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="after Durall et al., Watch your Up-Convolution, CVPR 2020, and Fridrich & Kodovsky, Rich Models for "
        "Steganalysis of Digital Images, IEEE TIFS 2012",
        blind_spot="Strong compression and scaling write a spectrum and a noise of their own; so do filters that are "
        "laid over a forgery afterwards.",
        trained_on=f"two views each of {int(train.sum()) // 2} pictures: real photos and harmless changes against "
        f"forgeries and generated faces; sources: {source_names(learnt)}",
        figures={
            "chosen": {
                "on": "the same pictures",
                "hidden_units": units,
                "penalty": penalty,
                "worth": round(worth, 4),
                "of": len(_CHOICES),
            },
            "auc_method_left_out": left_out,
            "auc_of_source": of_source,
            "calib_auc_by_method": by_method(checked, scores),
            "real_above_half": by_source(checked, scores),
        },
    )
    save_weights({k: torch.from_numpy(np.asarray(v, np.float32)) for k, v in state.items()}, card, out)
    print(out / f"{card.name}.card.json")


def _measured(crops: CropSet, rows: list[int], view_seed: int) -> tuple[NDArray[np.float32], list[Sample]]:
    """Features of each picture as it is and as its degraded training view, and the samples they belong to."""
    x, samples = [], []
    for i in progress(rows, "measuring"):
        face = view_face(crops, i, view_seed)
        x += [features(np.asarray(crops.crops[i]), crops.landmarks[i]), features(face.crop, face.crop_landmarks)]
        samples += [crops.samples[i]] * 2
    return np.stack(x), samples


def _fit(
    x: NDArray[np.float32],
    fake: NDArray[np.bool_],
    use: NDArray[np.bool_],
    samples: list[Sample],
    units: int,
    penalty: float,
) -> dict[str, NDArray[Any]]:
    """The numbers of one trained model."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    mean, std = x[use].mean(0), x[use].std(0) + 1e-3
    z = np.clip((x[use] - mean) / std, -8, 8)
    weights = balance(use, fake, samples, by_method=True)[use]
    weights = weights * len(weights) / weights.sum()
    if units == 0:
        plain = LogisticRegression(C=1 / penalty, max_iter=400).fit(z, fake[use], weights)
        return {"mean": mean, "std": std, "out.weight": plain.coef_[0], "out.bias": plain.intercept_[0]}
    net = MLPClassifier((units,), alpha=penalty, learning_rate_init=3e-3, batch_size=256, max_iter=25, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopped early on purpose
        net.fit(z, fake[use], sample_weight=weights)
    (a, b), (c, d) = net.coefs_, net.intercepts_
    return {
        "mean": mean, "std": std, "hidden.weight": a, "hidden.bias": c, "out.weight": b[:, 0], "out.bias": d[0],
    }  # fmt: skip
