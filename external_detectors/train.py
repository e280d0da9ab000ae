"""`python -m external_detectors.train NAME --data MANIFEST`: train an expert from scratch to committed weights.

Real and fake take the same way: the manifest's pictures, the library's own face finder and crop, the same random
degradation. Sampling is balanced over labels, then sources. Stops and resumes: the state is kept in `--state`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from external_detectors.weights_io import WEIGHTS, save_weights, to_unit
from x2dfd.calibration import logit
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import degrade
from x2dfd.errors import X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import write_text
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.types import ARTIFACTS, Card

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_EXAMPLE = "Example:\n\n  python -m external_detectors.train {}"


@app.callback()
def _train() -> None:
    """Train an expert; weights and card are written whole or not at all."""


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _balanced(
    samples: Sequence[Sample], rng: np.random.Generator, split: str, by_method: bool = False
) -> Iterator[int]:
    """Endless indices: label by turns, then source by the root of its size, then a random sample of it.

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
            raise X2DFDError(f"the manifest has no {label} sample in split {split!r}")
        weights = np.array([len(v) ** 0.5 for v in sources.values()])
        pools.append(([np.array(v) for v in sources.values()], weights / weights.sum()))
    while True:
        for groups, weights in pools:
            yield int(rng.choice(groups[int(rng.choice(len(groups), p=weights))]))


def _augmented(crop: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
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


def _auc(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> float | None:
    """Area under the ROC curve by ranks; None when a label is absent."""
    positives, negatives = scores[labels], scores[~labels]
    if not len(positives) or not len(negatives):
        return None
    greater = (positives[:, None] > negatives[None]).mean() + 0.5 * (positives[:, None] == negatives[None]).mean()
    return float(greater)


def by_method(samples: list[Sample], scores: NDArray[np.float64]) -> dict[str, Any]:
    """AUC of each method's fakes (by the first method where two were combined) against all real ones, with counts."""
    real = np.array([s.label == "real" for s in samples])
    methods = np.array([s.method.split("+")[0] for s in samples])
    table: dict[str, Any] = {}
    for method in sorted(set(methods[~real])):
        chosen = real | (methods == method)
        value = _auc(~real[chosen], scores[chosen])
        if value is not None:
            table[method] = {"auc": round(value, 4), "n_fake": int((methods == method).sum())}
    table["n_real"] = int(real.sum())
    return table


SAVE_EVERY = 200
"""Steps between two states on disk; the last step is always saved."""


def _checkpoint(
    path: Path, step: int, run: str, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    """All tensors of a training state as safetensors, with dropout's generator; step and run in its metadata."""
    tensors = {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in state.items()}
    tensors["generator"] = torch.get_rng_state()
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(step), "run": run})
    temporary.replace(path)


def _restore(path: Path, run: str, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Put a saved state back; returns its step. Raises X2DFDError for the state of another run."""
    from safetensors import safe_open

    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    if metadata.get("run", run) != run:
        raise X2DFDError(f"{path} is the state of a training with other data or settings; choose another --state")
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


def _fit(
    net: torch.nn.Module,
    batch_of: Callable[[np.random.Generator], Any],
    loss_of: Callable[[Any], Tensor],
    *,
    steps: int,
    lr: float,
    seed: int,
    state: Path,
    run: str,
    check: Callable[[torch.nn.Module], object],
) -> torch.nn.Module:
    """Train a network, resuming from `state`; returns the moving average of its weights.

    `batch_of` draws a batch (in a thread, while the one before is learnt), `loss_of` gives its loss; `check` is asked
    about the average now and then, and its answer is logged. Raises X2DFDError for the state of another run.
    """
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    state.mkdir(parents=True, exist_ok=True)
    saved = state / "state.safetensors"
    modules: dict[str, torch.nn.Module] = {"net": net, "average": average}
    done = _restore(saved, run, modules, optimizer) if saved.is_file() else 0
    if done > steps:
        raise X2DFDError(f"{saved} is {done} steps old, more than --steps {steps}; choose another --state")
    started, losses = time.monotonic(), []
    with ThreadPoolExecutor(1) as pool:
        # A generator a step: a resumed run draws what the uninterrupted one would.
        ahead = pool.submit(batch_of, np.random.default_rng([seed, done]))
        for step in range(done, steps):
            batch = ahead.result()
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
                _log(f"step {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f} {rate:.2f} s/step, {left:.0f} min left")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                _checkpoint(saved, step + 1, run, modules, optimizer)
                if (step + 1) % (2 * SAVE_EVERY) == 0 and step + 1 < steps:
                    _log(json.dumps(check(average.module)))
    trained: torch.nn.Module = average.module
    return trained.eval()


@app.command(epilog=_EXAMPLE.format("blending --data build/sbi/manifest.jsonl --steps 2400"))
def blending(
    data: Annotated[Path, typer.Option(help="manifest of self-blended images and real photos (data_gen forge)")],
    state: Annotated[Path, typer.Option(help="folder for the resumable state")] = Path("build/blending"),
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    check: Annotated[Path | None, typer.Option(help="manifest whose split `calib` is scored by method")] = None,
    steps: int = 2400,
    batch: int = 24,
    lr: float = 6e-4,
    seed: int = 0,
    workers: int = 1,
    from_scratch: Annotated[bool, typer.Option(help="no ImageNet start (for tests)")] = False,
) -> None:
    """EfficientNet-Lite0 on self-blended images of real faces only."""
    from external_detectors.lite0 import Lite0, from_imagenet
    from x2dfd.fetch import require

    torch.manual_seed(seed)
    crops = load_crops(data, workers)
    net = Lite0() if from_scratch else from_imagenet(require("lite0") / "efficientnet-lite0.pth")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checked = load_crops(check, workers) if check is not None else None

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        draw = _balanced(crops.samples, rng, "train")
        chosen = [next(draw) for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([_augmented(crops.crops[i], rng)[0] for i in chosen]))
        return pixels, torch.tensor([float(crops.samples[i].label == "fake") for i in chosen])

    def loss_of(drawn: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = drawn
        return F.binary_cross_entropy_with_logits(net(to_unit(pixels)), labels * 0.96 + 0.02)

    def figures_of(trained: torch.nn.Module) -> dict[str, Any]:
        return _check_blending(trained, checked) if checked is not None else {}

    run = json.dumps({"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed})
    trained = _fit(net, batch_of, loss_of, steps=steps, lr=lr, seed=seed, state=state, run=run, check=figures_of)
    card = Card(
        name="blending",
        version="1",
        source="trained by this project: external_detectors/train.py",
        licence="weights: research and evaluation only (trained in part on FFHQ, CC BY-NC-SA 4.0); start: Apache-2.0",
        sha256="",
        preprocessing=PREPROCESSING,
        paper="Shiohara & Yamasaki, Detecting Deepfakes with Self-Blended Images, CVPR 2022",
        blind_spot="Faces that are synthetic as a whole have no seam; strong compression and blur hide one.",
        trained_on=f"self-blended images of real photos only ({len(crops.samples)} pictures, {steps} steps of {batch})"
        f"; no fake of any generator; sources: {_sources(s for s in crops.samples if s.split == 'train')}",
        figures={"calib_auc_by_method": figures_of(trained)},
    )
    card = save_weights(trained.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


def _check_blending(net: torch.nn.Module, data: CropSet) -> dict[str, Any]:
    indices = data.where(split="calib")
    net.eval()
    with torch.inference_mode():
        parts = np.array_split(indices, max(1, len(indices) // 32))
        scores = [net(to_unit(torch.from_numpy(np.asarray(data.crops[part])))) for part in parts]
    return by_method([data.samples[i] for i in indices], torch.cat(scores).double().numpy())


@app.command(epilog=_EXAMPLE.format("consistency --data build/local/manifest.jsonl --steps 1600"))
def consistency(
    data: Annotated[Path, typer.Option(help="manifest of forgeries with cues and masks (data_gen forge)")],
    state: Annotated[Path, typer.Option(help="folder for the resumable state")] = Path("build/consistency"),
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    start: Annotated[Path, typer.Option(help="folder of the `blending` expert that it starts from")] = WEIGHTS,
    steps: int = 1600,
    batch: int = 24,
    lr: float = 6e-4,
    seed: int = 0,
    workers: int = 1,
) -> None:
    """The area-wise network on photos that were forged in part: label, area x artifact pairs, and mask."""
    from external_detectors.consistency_net import ConsistencyNet, start_from
    from external_detectors.weights_io import load_weights
    from x2dfd.experts import read_card

    torch.manual_seed(seed)
    crops = load_crops(data, workers)
    truth = _LocalTruth(crops)
    net = ConsistencyNet()
    start_from(net, load_weights(read_card(start / "blending.card.json"), start))
    net.allowed.copy_(truth.allowed)
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch_of(rng: np.random.Generator) -> tuple[Tensor, ...]:
        draw = _balanced(truth.samples, rng, "train", by_method=True)
        return truth.batch([next(draw) for _ in range(batch)], rng)

    def loss_of(drawn: tuple[Tensor, ...]) -> Tensor:
        pixels, areas, labels, cues, masks = drawn
        fake, named, where = net(to_unit(pixels), areas.float() / 255)
        verdict = F.binary_cross_entropy_with_logits(fake, labels * 0.96 + 0.02)
        known = (cues >= 0) & (truth.allowed > 0)
        each = F.binary_cross_entropy_with_logits(named, (cues > 0).float(), reduction="none")
        # Cues are rare: one or two among a hundred pairs.
        naming = (each * known * (1 + 5 * (cues > 0))).sum() / known.sum().clamp(min=1) * 12
        # A mask is half there or not at all: real pictures have an empty one.
        placing = F.binary_cross_entropy_with_logits(where, masks, reduction="none").mean()
        return verdict + naming + placing

    def figures_of(trained: torch.nn.Module) -> dict[str, Any]:
        return truth.figures(trained, "calib")

    settings = {"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed}
    run = json.dumps(settings | {"start": read_card(start / "blending.card.json").sha256})
    trained = _fit(net, batch_of, loss_of, steps=steps, lr=lr, seed=seed, state=state, run=run, check=figures_of)
    learnt = [s for s in truth.samples if s.split == "train"]
    methods = sorted({s.method.split("+")[0] for s in learnt if s.label == "fake"})
    card = Card(
        name="consistency",
        version="1",
        source="trained by this project: external_detectors/train.py",
        licence="weights: research and evaluation only (trained in part on FFHQ, CC BY-NC-SA 4.0); start: Apache-2.0",
        sha256="",
        preprocessing=PREPROCESSING,
        paper="none: a network of this project; the start after Shiohara & Yamasaki, CVPR 2022",
        blind_spot="A face that a generator made as a whole is consistent with itself; strong compression levels "
        "differences out; a kind of change that it was not trained on is found less often and named wrongly.",
        trained_on=f"{len(learnt)} pictures, {steps} steps of {batch}: real photos, harmless changes and "
        f"forgeries in part ({', '.join(methods)}); no fake of any generator; sources: {_sources(learnt)}",
        figures=figures_of(trained),
    )
    card = save_weights(trained.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


CUE_SEEN_FROM = 0.15
"""Cues of a lower score are neither asked for nor punished: few eyes would see them."""


class _LocalTruth:
    """Where and how the pictures of a forge run were changed, as the area-wise network's targets."""

    def __init__(self, crops: CropSet) -> None:
        from external_detectors.consistency_net import POOLED

        if crops.masks is None or not any(s.mask for s in crops.samples):
            raise X2DFDError("no masks: this expert learns from forgeries of `data_gen forge`")
        self.crops, self.masks = crops, crops.masks
        self.rows = [i for i, s in enumerate(crops.samples) if s.label == "real" or s.mask]
        self.samples = [crops.samples[i] for i in self.rows]
        self.cues = np.zeros((len(self.rows), len(POOLED), len(ARTIFACTS)), np.int8)
        for k, sample in enumerate(self.samples):
            for cue in sample.cues:
                if cue.area not in POOLED:
                    raise X2DFDError(f"{sample.id}: the mesh cannot place {cue.area!r}, so it cannot be learnt")
                seen = cue.score is None or cue.score >= CUE_SEEN_FROM
                self.cues[k, POOLED.index(cue.area), ARTIFACTS.index(cue.artifact)] = 1 if seen else -1
        train = np.array([s.split == "train" for s in self.samples])
        self.allowed = torch.from_numpy(((self.cues[train] > 0).sum(0) >= 10).astype(np.float32))

    def batch(self, chosen: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, ...]:
        """Pixels, area grids, labels, cues (1, 0, or -1 for neither) and masks; degraded with a generator."""
        import cv2

        from external_detectors.consistency_net import GRID, area_grid

        pixels, areas, masks = [], [], []
        for k in chosen:
            row = self.rows[k]
            view, matrix = np.asarray(self.crops.crops[row]), np.eye(2, 3)
            if rng is not None:
                view, matrix = _augmented(view, rng)
            mask = np.asarray(self.masks[row])
            # The same move on the mask's grid; a cell's centre lies between the crop's pixels.
            step = view.shape[0] / mask.shape[0]
            centre = np.full(2, (step - 1) / 2)
            small = matrix.copy()
            small[:, 2] = (matrix[:, :2] @ centre + matrix[:, 2] - centre) / step
            mask = cv2.warpAffine(mask, small, mask.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
            masks.append(cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_AREA))
            pixels.append(view)
            areas.append(area_grid(cv2.transform(self.crops.landmarks[row][None], matrix)[0].astype(np.float32)))
        labels = torch.tensor([float(self.samples[k].label == "fake") for k in chosen])
        target = torch.from_numpy((np.stack(masks) > 64).astype(np.float32))
        cues = torch.from_numpy(self.cues[list(chosen)])
        return torch.from_numpy(np.stack(pixels)), torch.from_numpy(np.stack(areas)), labels, cues, target

    def figures(self, net: torch.nn.Module, split: str) -> dict[str, Any]:
        """AUC by method, pixel AUC of the map, and the threshold and F1 of its cues, on undegraded pictures."""
        from external_detectors.consistency_net import POINTS_FROM

        chosen = [k for k, s in enumerate(self.samples) if s.split == split]
        if not chosen:
            return {"cue_threshold": 0.5}
        net.eval()
        fakes, chances, maps, truths = [], [], [], []
        with torch.inference_mode():
            for start in range(0, len(chosen), 32):
                pixels, areas, _, _, masks = self.batch(chosen[start : start + 32], None)
                fake, named, where = net(to_unit(pixels), areas.float() / 255)
                fakes.append(fake)
                chances.append(named.sigmoid())
                maps.append(where)
                truths.append(masks)
        samples = [self.samples[k] for k in chosen]
        scores = torch.cat(fakes).double().numpy()
        table: dict[str, Any] = {"calib_auc_by_method": by_method(samples, scores)}
        shown = [k for k, s in enumerate(samples) if s.cues and (self.cues[chosen[k]] > 0).any()]
        table["cue_threshold"] = 0.5
        if shown:
            # As in use: it points at nothing on a face that it finds in order. Cues too faint to see count neither way.
            cues = self.cues[[chosen[k] for k in shown]]
            chance = torch.cat(chances)[shown].numpy() * (scores[shown] >= logit(POINTS_FROM))[:, None, None]
            chance = np.where(cues < 0, 0, chance)
            table["cue_threshold"], table["cue_f1"], table["area_f1"] = _cue_threshold(chance, cues > 0)
            table["threshold_chosen_on"] = "the same pictures"
            places, drawn = torch.cat(maps)[shown].numpy(), torch.cat(truths)[shown].numpy() > 0
            values = [_auc(d.ravel(), p.ravel()) for p, d in zip(places, drawn, strict=True)]
            measured = [v for v in values if v is not None]
            table |= {"pixel_auc": round(float(np.mean(measured)), 4)} if measured else {}
            table["n_with_cues"] = len(shown)
        return table


def _cue_threshold(chance: NDArray[np.float32], there: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Threshold with the best F1 over (area, artifact) pairs, that F1, and the F1 over areas at it.

    The likeliest pair of a picture counts as named from LIKELY on, as in use. `chance`, `there`: [n, areas, artifacts].
    """
    from external_detectors.consistency_net import LIKELY, MAX_CUES

    n = len(chance)
    flat = chance.reshape(n, -1)
    order = np.argsort(-flat, 1)[:, :MAX_CUES]
    top = np.zeros_like(flat, bool)
    np.put_along_axis(top, order, True, 1)
    first = np.zeros_like(flat, bool)
    np.put_along_axis(first, order[:, :1], True, 1)
    best = (0.5, 0.0, 0.0)
    for threshold in np.arange(0.1, 0.95, 0.05):
        named = (top & (flat >= threshold)) | (first & (flat >= LIKELY))
        pairs = named.reshape(chance.shape)
        f1 = _f1(pairs, there)
        if f1 > best[1]:
            best = (round(float(threshold), 2), round(f1, 4), round(_f1(pairs.any(2), there.any(2)), 4))
    return best


def _f1(named: Any, there: Any) -> float:
    """F1 over all entries of two boolean arrays."""
    return float(2 * (named & there).sum() / max(1, named.sum() + there.sum()))


@app.command(epilog=_EXAMPLE.format("clip --data build/forged/manifest.jsonl"))
def clip(
    data: Annotated[Path, typer.Option(help="manifest of forgeries, ready-made fakes and real photos")],
    features: Annotated[Path | None, typer.Option(help="folder of cached tower features; default: by the data")] = None,
    out: Annotated[Path, typer.Option(help="folder for weights and card")] = WEIGHTS,
    oof: Annotated[Path | None, typer.Option(help="also write out-of-fold scores of the samples here (JSON)")] = None,
    keep: Annotated[str, typer.Option(help="layers whose patches are cached too, for the MLLM's training")] = "",
    limit: Annotated[int | None, typer.Option(help="at most this many pictures")] = None,
    ridge: Annotated[float, typer.Option(help="penalty on the head's weights")] = 0.1,
    view_seed: int = 1,
    workers: int = 1,
) -> None:
    """A logistic head over the tower's layers: faces that a generator made as a whole."""
    from external_detectors.clip_head import LAYERS, TOWER_LAYERS
    from x2dfd.tower import cached_features, training_rows

    crops = load_crops(data, workers)
    rows = training_rows(crops, limit)
    layers = [int(k) for k in keep.split(",") if k]
    cached = cached_features(crops, rows, features or data.parent / ".tower", TOWER_LAYERS, layers, view_seed)
    samples = [crops.samples[i] for i in cached.rows]
    raw = torch.from_numpy(np.asarray(cached.statistics[:, :LAYERS], np.float32)).flatten(1)
    train = np.array([s.split == "train" for s in samples])
    mean, std = raw[torch.from_numpy(train)].mean(0), raw[torch.from_numpy(train)].std(0) + 1e-4
    x = raw.sub_(mean).div_(std)
    fake = np.array([s.label == "fake" for s in samples])
    whole = np.array([_synthetic(s) for s in samples])
    mine = ~fake | whole  # photos that were forged in part are the other experts' task

    def head(use: NDArray[np.bool_]) -> dict[str, torch.Tensor]:
        return _fit_head(x, whole, use & mine, samples, ridge)

    def logits(state: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        return np.asarray((x @ state["weight"] + state["bias"]).double().numpy())

    state = head(train)
    scores = logits(state)
    figures = {"ridge": ridge, "calib": _head_figures(scores, ~train & mine, samples), **_unseen(head, logits, samples)}
    _log(json.dumps(figures))
    if oof is not None:
        # Group folds: the scores a training picture gets from a head that never saw its person or photo.
        fold = np.array([int(hashlib.sha256(s.group.encode()).hexdigest(), 16) % 4 for s in samples])
        for k in range(4):
            scores = np.where(train & (fold == k), logits(head(train & (fold != k))), scores)
        known = {s.id: round(1 / (1 + math.exp(-v)), 4) for s, v in zip(samples, scores.tolist(), strict=True)}
        write_text(oof, json.dumps({"clip": known}))
    card = Card(
        name="clip",
        version="2",
        source="trained by this project: external_detectors/train.py",
        licence="weights: research and evaluation only "
        "(trained in part on FFHQ, CC BY-NC-SA 4.0, and StyleGAN outputs, CC BY-NC 4.0)",
        sha256="",
        preprocessing=PREPROCESSING,
        paper="after Koutlis & Papadopoulos, Leveraging Representations from Intermediate Encoder-blocks, ECCV 2024",
        blind_spot="Generators unlike the ones it was trained on, above all on photos from sources it does not know: "
        "there it is no better than chance; small, blurred or strongly compressed faces; faces changed in part.",
        trained_on=f"{int((train & mine).sum())} pictures: real photos and harmless changes against pictures made by "
        f"generators as a whole; sources: {_sources(s for s, m in zip(samples, train & mine, strict=True) if m)}",
        figures=figures,
    )
    save_weights({**state, "mean": mean, "std": std}, card, out)
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
    whole = np.array([_synthetic(s) for s in samples])
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
            both[f"{generator} / {left}"] = round(float(_auc(hidden[tested], scored[tested]) or 0), 4)
    return {"false_alarms_of_a_source_left_out": alarms, "auc_generator_and_source_left_out": both}


def _sources(samples: Iterable[Sample]) -> str:
    return ", ".join(sorted({s.source for s in samples}))


def _synthetic(sample: Sample) -> bool:
    """The whole picture comes from a generator (as opposed to a photo that was changed)."""
    return sample.label == "fake" and sample.mask is None


def _fit_head(
    x: torch.Tensor, positive: NDArray[np.bool_], use: NDArray[np.bool_], samples: list[Sample], ridge: float
) -> dict[str, torch.Tensor]:
    """A ridge-penalised logistic head on the samples `use` of standardised features.

    Raises X2DFDError when a label is absent.
    """
    if not (use & positive).any() or not (use & ~positive).any():
        raise X2DFDError("a head needs real and fake pictures in split `train`; forge some, or pass ready-made fakes")
    weight, bias = _logistic(x[torch.from_numpy(use)], positive[use], _balance(use, positive, samples)[use], ridge)
    return {"weight": weight, "bias": bias.reshape(1)}


def _balance(use: NDArray[np.bool_], positive: NDArray[np.bool_], samples: list[Sample]) -> NDArray[np.float64]:
    """Weights that give both labels a half, and within each label the root of each source's size."""
    weights = np.zeros(len(samples))
    for side in (use & positive, use & ~positive):
        sources = np.array([s.source for s in samples])
        for source in set(sources[side]):
            mine = side & (sources == source)
            weights[mine] = mine.sum() ** -0.5
        weights[side] /= weights[side].sum() * 2
    return weights


def _logistic(x: Tensor, y: NDArray[np.bool_], weights: NDArray[np.float64], ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge logistic regression by L-BFGS; the penalty is ridge / features * |w|^2 / 2 after standardising."""
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
    real = np.array([s.label == "real" for s in kept])
    sources = np.array([s.source for s in kept])
    above = {str(s): round(float((picked[real & (sources == s)] >= 0).mean()), 3) for s in sorted(set(sources[real]))}
    return {"auc_by_method": by_method(kept, picked), "real_above_half": above}


def main() -> None:
    try:
        app()
    except X2DFDError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
