"""Shared by the trainings of the experts: augmented views, cues as targets, figures, and lines of a card."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torch import Tensor
from torch.nn import functional as F

from external_detectors.tower_net import CUE_SEEN_FROM, MAX_CUES, POOLED
from x2dfd.degrade import degrade
from x2dfd.experts import read_card
from x2dfd.files import Json
from x2dfd.manifest import Sample
from x2dfd.types import ARTIFACTS


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def augmented(crop: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A degraded, perhaps mirrored and moved view, and the affine [2, 3] from the crop's pixels to the view's."""
    import cv2

    out = degrade(np.ascontiguousarray(crop), rng)
    size = out.shape[0]
    matrix = np.eye(2, 3)
    if rng.random() < 0.5:
        out = np.ascontiguousarray(out[:, ::-1])
        matrix = np.array([[-1.0, 0.0, size - 1.0], [0.0, 1.0, 0.0]])
    if rng.random() < 0.5:  # faces are never found twice at the same place
        move = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-6, 6), rng.uniform(0.93, 1.1))
        move[:, 2] += rng.uniform(-0.03, 0.03, 2) * size
        out = np.asarray(cv2.warpAffine(out, move, (size, size), borderMode=cv2.BORDER_REPLICATE), np.uint8)
        matrix = move @ np.concatenate([matrix, [[0.0, 0.0, 1.0]]])
    return out, matrix


def cue_truth(sample: Sample) -> NDArray[np.int8]:
    """The cues of a sample, [areas, artifacts]: 1 where it shows one, 0 where not, -1 if unknown or too faint."""
    unknown = sample.label == "fake" and not sample.cues
    truth = np.full((len(POOLED), len(ARTIFACTS)), -1 if unknown else 0, np.int8)
    for cue in sample.cues:
        if cue.area in POOLED:
            visible = cue.score is None or cue.score >= CUE_SEEN_FROM
            truth[POOLED.index(cue.area), ARTIFACTS.index(cue.artifact)] = 1 if visible else -1
    return truth


def cue_loss(logits: Tensor, truth: Tensor, allowed: Tensor) -> Tensor:
    """The loss of cue logits [n, areas, artifacts]. Only 1 or 2 % of the pairs are positive, so these weigh more."""
    counted = (truth >= 0) & (allowed > 0)
    each = F.binary_cross_entropy_with_logits(logits, (truth > 0).float(), reduction="none")
    return (each * counted * (1 + 5 * (truth > 0))).sum() / counted.sum().clamp(min=1) * 12


def best_threshold(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """The probability from which naming at most MAX_CUES cues has the best F1 over (area, artifact), and that F1.

    Both tensors: [n, areas, artifacts]. Cues that are unknown or too faint do not count.
    """
    probabilities, positive, unknown = logits.sigmoid().flatten(1), (truth > 0).flatten(1), (truth < 0).flatten(1)
    best = probabilities.topk(MAX_CUES)
    f1: dict[float, float] = {}
    for threshold in np.arange(0.1, 0.95, 0.05).round(2).tolist():
        named = torch.zeros_like(probabilities).scatter(1, best.indices, (best.values >= threshold).float()) * ~unknown
        f1[threshold] = float(2 * (named * positive).sum() / (named.sum() + positive.sum()).clamp(min=1))
    threshold = max(f1, key=lambda t: f1[t])
    return {"cue_f1": round(f1[threshold], 4), "cue_threshold": threshold}


def covered(allowed: Tensor) -> tuple[str, ...]:
    """What a card covers: every class of fakes, and the cues that enough training pictures show."""
    return ("EFS", "FS", "FR", "FE", *(f"{POOLED[a]} {ARTIFACTS[r]}" for a, r in allowed.nonzero().tolist()))


def auc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve; None without real or without fake pictures."""
    positives, negatives = scores[labels], scores[~labels]
    if not len(positives) or not len(negatives):
        return None
    return float(mannwhitneyu(positives, negatives).statistic) / (len(positives) * len(negatives))


def by_method(samples: list[Sample], scores: NDArray[np.float64]) -> Json:
    """AUC of each method's fakes against all real pictures, with counts. Combined methods count as their first."""
    real = np.array([s.label == "real" for s in samples])
    methods = np.array([s.method.split("+")[0] for s in samples])
    table: Json = {}
    for method in sorted(set(methods[~real])):
        compared = real | (methods == method)
        value = auc(~real[compared], scores[compared])
        if value is not None:
            table[method] = {"auc": round(value, 4), "n_fake": int((methods == method).sum())}
    table["n_real"] = int(real.sum())
    return table


ENOUGH = 10
"""The fewest pictures with which a method or source counts in the choice of a checkpoint, and a cue may be named."""


def worst(samples: Sequence[Sample], scores: NDArray[np.float64]) -> float | None:
    """The figure that chooses a checkpoint: the mean of the lowest quarter of the AUCs of methods and of real sources.

    A method's fakes are compared with all real pictures, a source's real pictures with all fakes. The mean of all AUCs
    would favour a checkpoint that learnt its pictures by heart, and the lowest AUC alone would follow the noise of a
    method near chance. None where no method or source has enough pictures.
    """
    real = np.array([s.label == "real" for s in samples], bool)
    methods = np.array([s.method.split("+")[0] for s in samples])
    sources = np.array([s.source for s in samples])
    comparisons = [(~real & (methods == m), real) for m in sorted(set(methods[~real]))]
    comparisons += [(~real, real & (sources == s)) for s in sorted(set(sources[real]))]
    aucs = [
        auc(~real[fakes | reals], scores[fakes | reals])
        for fakes, reals in comparisons
        if min(fakes.sum(), reals.sum()) >= ENOUGH
    ]
    lowest = sorted(v for v in aucs if v is not None)[: max(1, len(aucs) // 4)]
    return round(float(np.mean(lowest)), 4) if lowest else None


def licence_of(samples: Iterable[Sample]) -> str:
    """The licence line of a card, from the column `licence` of its training pictures; it names sources without one."""
    licences: set[str] = set()
    unlicensed: set[str] = set()
    for sample in samples:
        text = str(sample.extra.get("licence") or "").strip()
        text = "" if text.lower() == "not stated" else text  # as `data_gen adopt` writes it
        (licences if text else unlicensed).add(text or sample.source or "(no source)")
    sentences = ["trained on pictures under: " + "; ".join(sorted(licences))] if licences else []
    if unlicensed:
        sentences.append(f"no licence is stated for the pictures of {', '.join(sorted(unlicensed))}")
    limits = re.compile(r"\bNC\b|non-?\s?commercial|research|no licence|none stated", re.IGNORECASE)
    restricted = unlicensed or any(map(limits.search, licences))
    terms = "research and evaluation only" if restricted else "bound by what they were made of"
    return f"weights: {terms} ({'. '.join(sentences)})"


def next_version(folder: Path, name: str) -> str:
    """The version after that of the card in `folder`; "1" without such a card, or if its version is no number."""
    path = folder / f"{name}.card.json"
    previous = read_card(path).version if path.is_file() else ""
    return str(int(previous) + 1) if previous.isdecimal() else "1"


def ridge_logistic(x: Tensor, y: Tensor, ridge: float = 1e-2, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a ridge-penalised logistic of x [n, d] and y [n] in {0, 1}, by L-BFGS. `weights` [n] of the
    pictures have the sum 1; without them all count the same."""
    x = x.clone()  # out of inference mode
    shares = torch.full((len(y),), 1 / len(y)) if weights is None else weights
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(x @ weight + bias, y, reduction="none")
        loss = shares @ losses + ridge / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()
