"""Training of the expert `clip`: a logistic head on the tower's layers."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

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
from x2dfd.crops import load_crops
from x2dfd.errors import X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import write_text
from x2dfd.manifest import Sample
from x2dfd.types import Card


def clip(
    data: Annotated[Path, typer.Option(help="manifest of forgeries, ready-made fakes and real photos")],
    features: Annotated[Path | None, typer.Option(help="folder of cached tower features; default: by the data")] = None,
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    oof: Annotated[Path | None, typer.Option(help="also write out-of-fold scores of the samples here (JSON)")] = None,
    left_out: Annotated[
        Path | None,
        typer.Option(help="also write, a folder for each source and generator, a head that never learnt it"),
    ] = None,
    keep: Annotated[str, typer.Option(help="layers whose patches are cached too, for the MLLM's training")] = "",
    limit: Annotated[int | None, typer.Option(help="at most this many pictures, drawn by their ids")] = None,
    ridge: Annotated[float, typer.Option(help="penalty on the head's weights")] = 0.1,
    view_seed: int = 1,
    workers: int = 1,
) -> None:
    """A logistic head over the tower's layers: faces that a generator made as a whole."""
    from external_detectors.clip_head import FIRST, LAST, TOWER_LAYERS
    from x2dfd.tower import cached_features, training_rows

    crops = load_crops(data, workers)
    rows = training_rows(crops, limit)
    if oof is None and not keep:  # photos that were forged in part are the other experts' task
        rows = np.array([i for i in rows if crops.samples[i].label == "real" or crops.samples[i].synthetic], int)
    layers = [int(k) for k in keep.split(",") if k]
    cached = cached_features(crops, rows, features or data.parent / ".tower", TOWER_LAYERS, layers, view_seed)
    samples = [crops.samples[i] for i in cached.rows]
    raw = torch.from_numpy(np.asarray(cached.statistics[:, FIRST:LAST], np.float32)).flatten(1)
    train = np.array([s.split == "train" for s in samples])
    mean, std = raw[torch.from_numpy(train)].mean(0), raw[torch.from_numpy(train)].std(0) + 1e-4
    x = raw.sub_(mean).div_(std)
    fake = np.array([s.label == "fake" for s in samples])
    whole = np.array([s.synthetic for s in samples])
    mine = ~fake | whole  # photos that were forged in part are the other experts' task

    def head(use: NDArray[np.bool_]) -> dict[str, torch.Tensor]:
        return _fit_head(x, whole, use & mine, samples, ridge)

    def logits(state: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        return np.asarray((x @ state["weight"] + state["bias"]).double().numpy())

    state = head(train)
    scores = logits(state)
    figures = {"ridge": ridge, "calib": _head_figures(scores, ~train & mine, samples), **_unseen(head, logits, samples)}
    log(json.dumps(figures))
    if oof is not None:
        # Group folds: the scores a training picture gets from a head that never saw its person or photo.
        fold = np.array([int(hashlib.sha256(s.group.encode()).hexdigest(), 16) % 4 for s in samples])
        for k in range(4):
            scores = np.where(train & (fold == k), logits(head(train & (fold != k))), scores)
        known = {s.id: round(1 / (1 + math.exp(-v)), 4) for s, v in zip(samples, scores.tolist(), strict=True)}
        write_text(oof, json.dumps({"clip": known}))
    learnt = [s for s, use in zip(samples, train & mine, strict=True) if use]
    figures["learnt"] = sorted({s.method for s in learnt if s.label == "fake"})
    card = Card(
        name="clip",
        version=next_version(out, "clip"),
        source=SOURCE,
        licence=licence_of(learnt),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="after Koutlis & Papadopoulos, Leveraging Representations from Intermediate Encoder-blocks, ECCV 2024",
        blind_spot="Generators unlike the ones it was trained on, above all on photos from sources it does not know: "
        "there it is no better than chance; small, blurred or strongly compressed faces; faces changed in part.",
        trained_on=f"{len(learnt)} pictures: real photos and harmless changes against pictures made by "
        f"generators as a whole; sources: {source_names(learnt)}",
        figures=figures,
    )
    card = save_weights({**state, "mean": mean, "std": std}, card, out)
    if left_out is not None:
        for name in sorted({s.origin for s in learnt} - {""}):
            rest = train & mine & np.array([s.origin != name for s in samples])
            if fake[rest].all() or not fake[rest].any():
                log(f"without {name} there is nothing to learn from")
                continue
            of_rest = replace(card, trained_on=f"as {card.sha256}, without {name}", figures={"held_out": [name]})
            save_weights({**head(rest), "mean": mean, "std": std}, of_rest, left_out / name)
    print(out / "clip.card.json")


def _unseen(
    head: Callable[[NDArray[np.bool_]], dict[str, torch.Tensor]],
    logits: Callable[[dict[str, torch.Tensor]], NDArray[np.float64]],
    samples: list[Sample],
) -> dict[str, Any]:
    """What carries over: a real source left out, a generator left out, and both at once.

    A head that calls whatever it does not know fake is good at generators left out and bad at cameras left out; only
    both at once tell. Left-out pictures are tested whatever their split.
    """
    source = np.array([s.source for s in samples])
    real = np.array([s.label == "real" for s in samples])
    whole = np.array([s.synthetic for s in samples])
    method = np.array([s.method for s in samples])
    sources = [s for s, n in Counter(source[real]).most_common() if n >= 20]
    generators = [m for m, n in Counter(method[whole]).most_common() if n >= 20]
    train = np.array([s.split == "train" for s in samples])
    alarms, both = {}, {}
    for left in sources:
        gone = source == left
        seen = train & ~gone
        if not (real & ~gone & ~train).any() or not (real & seen).any() or not (whole & seen).any():
            continue
        scored = logits(head(train & ~gone))
        # The threshold is set where the head has not learnt: its own pictures would promise too much.
        threshold = np.quantile(scored[real & ~gone & ~train], 0.95)
        alarms[left] = {
            "rate": round(float((scored[real & gone] > threshold).mean()), 4),
            "n": int((real & gone).sum()),
        }
        for generator in generators:
            hidden = whole & (method == generator)
            if not (whole & train & ~hidden & ~gone).any():
                continue
            scored = logits(head(train & ~gone & ~hidden))
            tested = hidden | (real & gone)
            value = auc(hidden[tested], scored[tested])
            both[f"{generator} / {left}"] = None if value is None else round(value, 4)
    return {"false_alarms_of_a_source_left_out": alarms, "auc_generator_and_source_left_out": both}


def _fit_head(
    x: torch.Tensor, positive: NDArray[np.bool_], use: NDArray[np.bool_], samples: list[Sample], ridge: float
) -> dict[str, torch.Tensor]:
    """A ridge-penalised logistic head on the samples `use` of standardised features.

    Raises X2DFDError when a label is absent.
    """
    if not (use & positive).any() or not (use & ~positive).any():
        raise X2DFDError(
            "a head needs real and fake pictures in split `train`; forge some, or pass ready-made fakes "
            "(df_class EFS, no mask)"
        )
    weight, bias = _logistic(x[torch.from_numpy(use)], positive[use], balance(use, positive, samples)[use], ridge)
    return {"weight": weight, "bias": bias.reshape(1)}


def _logistic(x: Tensor, y: NDArray[np.bool_], weights: NDArray[np.float64], ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge logistic regression by L-BFGS; the penalty is ridge * |w|^2 / 2 after standardising."""
    target, balance = torch.from_numpy(y).float(), torch.from_numpy(weights).float()
    w, b = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    # To the end: stopped early, it calls fake whatever it does not know, and generators left out look easy.
    optimizer = torch.optim.LBFGS([w, b], max_iter=150, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        each = F.binary_cross_entropy_with_logits(x @ w + b, target, reduction="none")
        loss = (each * balance).sum() + 0.5 * ridge * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def _head_figures(logits: NDArray[np.float64], chosen: NDArray[np.bool_], samples: list[Sample]) -> dict[str, Any]:
    """AUC by method, and the share of real pictures of each source that score above one half."""
    kept = [s for s, c in zip(samples, chosen, strict=True) if c]
    picked = logits[chosen]
    return {"auc_by_method": by_method(kept, picked), "real_above_half": by_source(kept, picked)}
