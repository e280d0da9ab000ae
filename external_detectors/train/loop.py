"""Shared by the trainings of tower and heads: augmented views, cues as targets, figures, and lines of a card."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
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
    """Cues that a sample shows (1), does not show (0), or that are unknown or too faint (-1): [areas, artifacts]."""
    unknown = sample.label == "fake" and not sample.cues
    truth = np.full((len(POOLED), len(ARTIFACTS)), -1 if unknown else 0, np.int8)
    for cue in sample.cues:
        if cue.area in POOLED:
            seen = cue.score is None or cue.score >= CUE_SEEN_FROM
            truth[POOLED.index(cue.area), ARTIFACTS.index(cue.artifact)] = 1 if seen else -1
    return truth


def cue_loss(logits: Tensor, truth: Tensor, allowed: Tensor) -> Tensor:
    """Of cues [n, areas, artifacts]. One or two of a hundred pairs are shown, so these weigh more than the others."""
    known = (truth >= 0) & (allowed > 0)
    each = F.binary_cross_entropy_with_logits(logits, (truth > 0).float(), reduction="none")
    return (each * known * (1 + 5 * (truth > 0))).sum() / known.sum().clamp(min=1) * 12


def best_threshold(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """The probability from which naming at most MAX_CUES cues has the best F1 over (area, artifact), and that F1.

    Both tensors: [n, areas, artifacts]. What is unknown or too faint is neither right nor wrong.
    """
    chances, right, unsure = logits.sigmoid().flatten(1), (truth > 0).flatten(1), (truth < 0).flatten(1)
    best = chances.topk(MAX_CUES)
    found: dict[float, float] = {}
    for threshold in np.arange(0.1, 0.95, 0.05).round(2).tolist():
        said = chances.new_zeros(chances.shape).scatter(1, best.indices, (best.values >= threshold).float()) * ~unsure
        found[threshold] = float(2 * (said * right).sum() / (said.sum() + right.sum()).clamp(min=1))
    threshold = max(found, key=lambda t: found[t])
    return {"cue_f1": round(found[threshold], 4), "cue_threshold": threshold}


def covered(allowed: Tensor) -> tuple[str, ...]:
    """What a card covers: every class of fakes, and the cues that training has shown."""
    return ("EFS", "FS", "FR", "FE", *(f"{POOLED[a]} {ARTIFACTS[r]}" for a, r in allowed.nonzero().tolist()))


def auc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve; None when a label is absent."""
    positives, negatives = scores[labels], scores[~labels]
    if not len(positives) or not len(negatives):
        return None
    return float(mannwhitneyu(positives, negatives).statistic) / (len(positives) * len(negatives))


def by_method(samples: list[Sample], scores: NDArray[np.float64]) -> Json:
    """AUC of each method's fakes (by the first method where two were combined) against all real ones, with counts."""
    real = np.array([s.label == "real" for s in samples])
    methods = np.array([s.method.split("+")[0] for s in samples])
    table: Json = {}
    for method in sorted(set(methods[~real])):
        chosen = real | (methods == method)
        value = auc(~real[chosen], scores[chosen])
        if value is not None:
            table[method] = {"auc": round(value, 4), "n_fake": int((methods == method).sum())}
    table["n_real"] = int(real.sum())
    return table


ENOUGH = 10
"""Pictures that a method or a source needs to decide which checkpoint is kept, and a cue to be named."""


def worst(samples: Sequence[Sample], scores: NDArray[np.float64]) -> float | None:
    """The figure that chooses a checkpoint: the mean of the lowest quarter of the AUCs of methods and of real sources.

    A method's fakes are compared with all real pictures, a source's real pictures with all fakes. The mean over what
    was learnt would choose what is learnt by heart; the lowest alone, where a method is near chance, by that method's
    noise. None where no method or source has enough pictures.
    """
    real = np.array([s.label == "real" for s in samples], bool)
    methods = np.array([s.method.split("+")[0] for s in samples])
    sources = np.array([s.source for s in samples])
    parts = [~real & (methods == m) for m in sorted(set(methods[~real]))]
    pairs = [(part, real) for part in parts] + [(~real, real & (sources == s)) for s in sorted(set(sources[real]))]
    found = [
        auc(~real[fakes | reals], scores[fakes | reals])
        for fakes, reals in pairs
        if min(fakes.sum(), reals.sum()) >= ENOUGH
    ]
    lowest = sorted(v for v in found if v is not None)[: max(1, len(found) // 4)]
    return round(float(np.mean(lowest)), 4) if lowest else None


def licence_of(samples: Iterable[Sample]) -> str:
    """The licence line of weights, from the column `licence` of the pictures they were trained on. Sources without one
    are named."""
    stated: set[str] = set()
    silent: set[str] = set()
    for sample in samples:
        text = str(sample.extra.get("licence") or "").strip()
        text = "" if text.lower() == "not stated" else text  # as `data_gen adopt` writes it
        (stated if text else silent).add(text or sample.source or "(no source)")
    parts = ["trained on pictures under: " + "; ".join(sorted(stated))] if stated else []
    if silent:
        parts.append(f"no licence is stated for the pictures of {', '.join(sorted(silent))}")
    bound = silent or any(
        re.search(r"\bNC\b|non-?\s?commercial|research|no licence|none stated", text, re.IGNORECASE) for text in stated
    )
    allowed = "research and evaluation only" if bound else "bound by what they were made of"
    return f"weights: {allowed} ({'. '.join(parts)})"


def next_version(folder: Path, name: str) -> str:
    """One more than the version of the card that lies in `folder`; "1" where there is none, or it has no number."""
    path = folder / f"{name}.card.json"
    before = read_card(path).version if path.is_file() else ""
    return str(int(before) + 1) if before.isdecimal() else "1"
