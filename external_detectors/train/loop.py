"""Shared by the trainings of all experts: balanced draws, augmented views, a resumable loop, figures by method."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from x2dfd.degrade import degrade
from x2dfd.errors import X2DFDError
from x2dfd.experts import read_card
from x2dfd.files import Json, whole
from x2dfd.manifest import Sample

EXAMPLE = "Example:\n\n  python -m external_detectors.train {}"
SOURCE = "trained by this project: external_detectors/train"


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def balanced(samples: Sequence[Sample], rng: np.random.Generator, split: str, by_method: bool = False) -> Iterator[int]:
    """Endless indices: labels alternate, a source is drawn by the root of its size, and a sample of it at random.

    With `by_method`, fakes are drawn by their (first) method instead of their source.
    """
    pools: list[tuple[list[NDArray[np.intp]], NDArray[np.float64]]] = []
    for label in ("real", "fake"):
        sources: dict[str, list[int]] = {}
        for i, sample in enumerate(samples):
            if (sample.label, sample.split) != (label, split):
                continue
            key = sample.method.split("+")[0] if by_method and label == "fake" else sample.source
            sources.setdefault(key, []).append(int(i))
        if not sources:
            raise X2DFDError(f"the manifest has no {label} sample in split {split!r}", code="no_picture_of_label")
        weights = np.array([len(v) ** 0.5 for v in sources.values()])
        pools.append(([np.array(v) for v in sources.values()], weights / weights.sum()))
    while True:
        for groups, weights in pools:
            yield int(rng.choice(groups[int(rng.choice(len(groups), p=weights))]))


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


def auc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve by ranks; None when a label is absent."""
    positives, negatives = scores[labels], scores[~labels]
    if not len(positives) or not len(negatives):
        return None
    greater = (positives[:, None] > negatives[None]).mean() + 0.5 * (positives[:, None] == negatives[None]).mean()
    return float(greater)


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
"""Pictures that a method or a source needs to decide which checkpoint is kept."""


CHOSEN_BY = (
    "the best mean over the worst quarter of methods (of those held out, where there are any) and sources, on these "
    "figures' pictures"
)
"""The note in a card on its checkpoint: held-out methods were not trained on, but they took part in this choice."""


def worst(samples: Sequence[Sample], scores: NDArray[np.float64], held_out: Collection[str] = ()) -> float | None:
    """The figure that chooses a checkpoint: the mean of the lowest quarter of the AUCs of methods and of real sources.

    Methods: those in `held_out` where there are any, each against all real pictures; else all. Sources: the real
    pictures of each against all fakes. The mean over what was learnt would choose what is learnt by heart; the lowest
    alone, where a method is near chance, by that method's noise. None where no method or source has enough pictures.
    """
    real = np.array([s.label == "real" for s in samples], bool)
    methods = np.array([s.method.split("+")[0] for s in samples])
    sources = np.array([s.source for s in samples])
    parts = [~real & (methods == m) for m in sorted(set(methods[~real])) if not held_out or m in held_out]
    pairs = [(part, real) for part in parts] + [(~real, real & (sources == s)) for s in sorted(set(sources[real]))]
    found = [
        auc(~real[fakes | reals], scores[fakes | reals])
        for fakes, reals in pairs
        if min(fakes.sum(), reals.sum()) >= ENOUGH
    ]
    lowest = sorted(v for v in found if v is not None)[: max(1, len(found) // 4)]
    return round(float(np.mean(lowest)), 4) if lowest else None


SAVE_EVERY = 200
"""Steps between two states on disk; the last step is always saved."""


def checkpoint(
    path: Path, step: int, run: str, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """All tensors of a training state as safetensors, with dropout's generator; step and run in its metadata."""
    tensors = {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
    tensors["generator"] = torch.get_rng_state()
    with whole(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(step), "run": run})


def restore(path: Path, run: str, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state back; returns its step. Raises X2DFDError for the state of another run."""
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    if metadata.get("run") != run:
        raise X2DFDError(
            f"{path} is the state of a training with other data or settings; choose another --state",
            code="training_state_differs",
        )
    tensors = load_file(path)
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, field = key.split(".", 2)
            state["state"].setdefault(int(number), {})[field] = value
    optimizer.load_state_dict(state)
    if "generator" in tensors:
        torch.set_rng_state(tensors["generator"])
    return int(metadata["step"])


def training_device() -> torch.device:
    """A CUDA device where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    net: torch.nn.Module,
    batch_of: Callable[[np.random.Generator], tuple[Tensor, ...]],
    loss_of: Callable[[tuple[Tensor, ...]], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    state: Path,
    run: str,
    check: Callable[[torch.nn.Module], Json],
) -> tuple[torch.nn.Module, Json]:
    """Train a network, resuming from `state`; returns the best moving average of its weights, and its figures.

    `batch_of` draws a batch (in a thread, while the one before is learnt), `loss_of` gives its loss. `check` is asked
    about the average now and then, and at the end: its figures are logged, and the highest `worst` among them decides
    which average is kept; the last, where they have none. The network learns on `training_device()`, where a batch is
    moved to; it is checked and returned on the CPU. Raises X2DFDError for the state of another run.
    """
    place = training_device()
    net = net.to(place)
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    state.mkdir(parents=True, exist_ok=True)
    saved = state / "state.safetensors"
    modules: dict[str, torch.nn.Module] = {"net": net, "average": average}
    done = restore(saved, run, modules, optimizer) if saved.is_file() else 0
    best = state / "best.safetensors"
    if not done:
        best.unlink(missing_ok=True)  # of a run that has no state is of another run
    if done > steps:
        raise X2DFDError(
            f"{saved} is {done} steps old, more than --steps {steps}; choose another --state",
            code="training_state_too_old",
        )
    started, losses = time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:
        # A generator a step: a resumed run draws what the uninterrupted one would.
        ahead = pool.submit(batch_of, np.random.default_rng([seed, done]))
        for step in range(done, steps):
            batch = tuple(part.to(place) for part in ahead.result())
            ahead = pool.submit(batch_of, np.random.default_rng([seed, step + 1]))
            for group in optimizer.param_groups:
                warm, progress = min(1.0, (step + 1) / 100), step / steps
                group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            net.train()
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
            average.update_parameters(net)
            losses.append(loss.item())
            if (step + 1) % 50 == 0:
                rate = (time.monotonic() - started) / (step + 1 - done)
                left = rate * (steps - step - 1) / 60
                log(f"step {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {rate:.2f} s/step, {left:.0f} min left")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                if (step + 1) % (2 * SAVE_EVERY) == 0 and step + 1 < steps:
                    _keep_better(best, step + 1, average.module, check)
                checkpoint(saved, step + 1, run, modules, optimizer)
    figures = _keep_better(best, steps, average.module, check)
    trained: torch.nn.Module = average.module.cpu()
    trained.load_state_dict(load_file(best))
    return trained.eval(), figures


def _keep_better(best: Path, step: int, net: torch.nn.Module, check: Callable[[torch.nn.Module], Json]) -> Json:
    """Writes the weights to `best` unless better ones lie there; the figures of those that lie there then."""
    from safetensors import safe_open

    net = net if next(net.parameters()).device.type == "cpu" else copy.deepcopy(net).cpu()
    figures = {"step": step, **check(net)}
    log(json.dumps(figures))
    if best.is_file():
        with safe_open(best, "pt") as stream:
            before: Json = json.loads(stream.metadata()["figures"])
        if before.get("worst") is not None and before["worst"] > (figures.get("worst") or 0.0):
            return before
    with whole(best) as temporary:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, temporary, {"figures": json.dumps(figures)})
    return figures


def source_names(samples: Iterable[Sample]) -> str:
    return ", ".join(sorted({s.source for s in samples}))


def licence_of(samples: Iterable[Sample], start: str = "") -> str:
    """The licence line of weights, from the column `licence` of the pictures they were trained on.

    `start`: the licence of weights that the training began with; what it repeats is said once. Sources without a
    licence are named.
    """
    stated: set[str] = set()
    silent: set[str] = set()
    for sample in samples:
        text = str(sample.extra.get("licence") or "").strip()
        (stated if text else silent).add(text or sample.source or "(no source)")
    parts = ["trained on pictures under: " + "; ".join(sorted(stated))] if stated else []
    if silent:
        parts.append(f"no licence is stated for the pictures of {', '.join(sorted(silent))}")
    return "; start: ".join(
        dict.fromkeys(
            [f"weights: bound by what they were made of ({'. '.join(parts)})", *filter(None, start.split("; start: "))]
        )
    )


def next_version(folder: Path, name: str) -> str:
    """One more than the version of the card that lies in `folder`; "1" where there is none, or it has no number."""
    path = folder / f"{name}.card.json"
    before = read_card(path).version if path.is_file() else ""
    return str(int(before) + 1) if before.isdecimal() else "1"
