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
from collections.abc import Iterable, Iterator
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
from x2dfd.crops import CropSet, load_crops
from x2dfd.degrade import degrade
from x2dfd.errors import X2DFDError
from x2dfd.faces import PREPROCESSING
from x2dfd.files import write_text
from x2dfd.manifest import Sample, manifest_sha256
from x2dfd.types import Card

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

_EXAMPLE = "Example:\n\n  python -m external_detectors.train {}"


@app.callback()
def _train() -> None:
    """Train an expert; weights and card are written whole or not at all."""


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _balanced(data: CropSet, rng: np.random.Generator, split: str) -> Iterator[int]:
    """Endless indices: label by turns, then source by the root of its size, then a random sample of it."""
    pools: list[tuple[list[NDArray[np.intp]], NDArray[np.float64]]] = []
    for label in ("real", "fake"):
        sources: dict[str, list[int]] = {}
        for i in data.where(label=label, split=split):
            sources.setdefault(data.samples[i].source, []).append(int(i))
        if not sources:
            raise X2DFDError(f"the manifest has no {label} sample in split {split!r}")
        weights = np.array([len(v) ** 0.5 for v in sources.values()])
        pools.append(([np.array(v) for v in sources.values()], weights / weights.sum()))
    while True:
        for groups, weights in pools:
            yield int(rng.choice(groups[int(rng.choice(len(groups), p=weights))]))


def _augmented(crop: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    import cv2

    out = degrade(np.ascontiguousarray(crop), rng)
    if rng.random() < 0.5:
        out = np.ascontiguousarray(out[:, ::-1])
    if rng.random() < 0.5:  # faces are never found twice at the same place
        size = out.shape[0]
        matrix = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(-6, 6), rng.uniform(0.93, 1.1))
        matrix[:, 2] += rng.uniform(-0.03, 0.03, 2) * size
        out = np.asarray(cv2.warpAffine(out, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE), np.uint8)
    return out


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
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    state.mkdir(parents=True, exist_ok=True)
    saved = state / "state.safetensors"
    modules: dict[str, torch.nn.Module] = {"net": net, "average": average}
    run = json.dumps({"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed})
    done = _restore(saved, run, modules, optimizer) if saved.is_file() else 0
    if done > steps:
        raise X2DFDError(f"{saved} is {done} steps old, more than --steps {steps}; choose another --state")
    started, losses = time.monotonic(), []
    for step in range(done, steps):
        rng = np.random.default_rng([seed, step])  # a resumed run draws what the uninterrupted one would
        draw = _balanced(crops, rng, "train")
        chosen = [next(draw) for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([_augmented(crops.crops[i], rng) for i in chosen]))
        labels = torch.tensor([float(crops.samples[i].label == "fake") for i in chosen])
        for group in optimizer.param_groups:
            warm, progress = min(1.0, (step + 1) / 100), step / steps
            group["lr"] = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        net.train()
        loss = F.binary_cross_entropy_with_logits(net(to_unit(pixels)), labels * 0.96 + 0.02)
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
            if check is not None and ((step + 1) % (2 * SAVE_EVERY) == 0 or step + 1 == steps):
                _log(json.dumps(_check_blending(average.module, load_crops(check, workers))))
    figures = _check_blending(average.module, load_crops(check, workers)) if check is not None else {}
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
        figures={"calib_auc_by_method": figures},
    )
    card = save_weights(average.module.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


def _check_blending(net: torch.nn.Module, data: CropSet) -> dict[str, Any]:
    indices = data.where(split="calib")
    net.eval()
    with torch.inference_mode():
        parts = np.array_split(indices, max(1, len(indices) // 32))
        scores = [net(to_unit(torch.from_numpy(np.asarray(data.crops[part])))) for part in parts]
    return by_method([data.samples[i] for i in indices], torch.cat(scores).double().numpy())


@app.command(epilog=_EXAMPLE.format("clip --data build/forged/manifest.jsonl"))
def clip(
    data: Annotated[Path, typer.Option(help="manifest of forgeries, ready-made fakes and real photos")],
    features: Annotated[Path | None, typer.Option(help="folder of cached tower features; default: by the data")] = None,
    out: Annotated[Path, typer.Option(help="folder for weights and cards")] = WEIGHTS,
    oof: Annotated[Path | None, typer.Option(help="also write out-of-fold scores of the samples here (JSON)")] = None,
    keep: Annotated[str, typer.Option(help="layers whose patches are cached too, for the MLLM's training")] = "",
    limit: Annotated[int | None, typer.Option(help="at most this many pictures")] = None,
    view_seed: int = 1,
    workers: int = 1,
) -> None:
    """Experts `clip` and `forgery`: logistic heads over the tower's layers; the ridge is chosen on split `calib`."""
    from external_detectors.clip_heads import HEADS, LAYERS
    from x2dfd.tower import cached_features, training_rows

    crops = load_crops(data, workers)
    rows = training_rows(crops, limit)
    layers = [int(k) for k in keep.split(",") if k]
    cached = cached_features(crops, rows, features or data.parent / ".tower", LAYERS, layers, view_seed)
    samples = [crops.samples[i] for i in cached.rows]
    raw = torch.from_numpy(np.asarray(cached.statistics, np.float32)).flatten(1)
    train = np.array([s.split == "train" for s in samples])
    mean, std = raw[torch.from_numpy(train)].mean(0), raw[torch.from_numpy(train)].std(0) + 1e-4
    x = raw.sub_(mean).div_(std)
    fake = np.array([s.label == "fake" for s in samples])
    whole = np.array([_synthetic(s) for s in samples])
    # Group folds: the scores a training picture gets from a head that never saw its person or photo.
    fold = np.array([int(hashlib.sha256(s.group.encode()).hexdigest(), 16) % 4 for s in samples])
    folds: dict[str, dict[str, float]] = {}

    def logits(state: dict[str, torch.Tensor]) -> NDArray[np.float64]:
        return np.asarray((x @ state["weight"] + state["bias"]).double().numpy())

    for name, positive in zip(HEADS, (whole, fake & ~whole), strict=True):
        mine = ~fake | positive

        def head(
            use: NDArray[np.bool_], ridge: float, positive: NDArray[np.bool_] = positive
        ) -> dict[str, torch.Tensor]:
            return _fit_head(x, positive, use & (~fake | positive), samples, ridge)

        tables, means = {}, {}
        for r in (0.1, 1.0, 3.0):
            tables[r] = _head_figures(logits(head(train, r)), ~train & mine, samples)
            aucs = [v["auc"] for v in tables[r]["auc_by_method"].values() if isinstance(v, dict)]
            means[r] = float(np.mean(aucs or [0]))
        ridge = max(means, key=lambda r: means[r])
        _log(f"{name}: calib AUC, mean over methods, by ridge: {means}")
        left_out = {}
        for method in _LEFT_OUT:
            gone = np.array([method in s.method.split("+") for s in samples])
            first = np.array([s.method.split("+")[0] == method for s in samples])
            tested = ~train & (~fake | (first & positive))
            if not (tested & fake).any() or not (positive & train & ~gone).any():
                continue  # nothing to test on, or nothing else to learn from
            scored = logits(head(train & ~gone, ridge))
            chosen = [s for s, t in zip(samples, tested, strict=True) if t]
            left_out[method] = by_method(chosen, scored[tested])[method]
        _log(f"{name}: left one method out: {left_out}")
        scores = np.zeros(len(samples))
        for k in range(4):
            scores[fold == k] = logits(head(train & (fold != k), ridge))[fold == k]
        state = head(train, ridge)
        scores[~train] = logits(state)[~train]
        folds[name] = {s.id: round(1 / (1 + math.exp(-v)), 4) for s, v in zip(samples, scores.tolist(), strict=True)}
        card = Card(
            name=name,
            version="1",
            source="trained by this project: external_detectors/train.py",
            licence="weights: research and evaluation only "
            "(trained in part on FFHQ, CC BY-NC-SA 4.0, and StyleGAN outputs, CC BY-NC 4.0)",
            sha256="",
            preprocessing=PREPROCESSING,
            paper="after Koutlis & Papadopoulos, Leveraging Representations from Intermediate Encoder-blocks, "
            "ECCV 2024",
            blind_spot=_HEAD_BLIND_SPOTS[name],
            trained_on=f"{int((train & mine).sum())} pictures: "
            f"real photos and harmless changes against {_HEAD_FAKES[name]}; "
            f"sources: {_sources(s for s, m in zip(samples, train & mine, strict=True) if m)}",
            figures={"ridge": ridge, "calib": tables[ridge], "left_one_method_out": left_out},
        )
        save_weights({**state, "mean": mean, "std": std}, card, out)
        print(out / f"{name}.card.json")
    if oof is not None:
        write_text(oof, json.dumps(folds))


def _sources(samples: Iterable[Sample]) -> str:
    return ", ".join(sorted({s.source for s in samples}))


_LEFT_OUT = ("stylegan1", "sd21", "swap", "transplant", "relight", "area_warp", "resynthesise")
"""Methods whose absence from training is tried; every one would take an hour on two cores."""

_HEAD_FAKES = {"clip": "pictures made by generators as a whole", "forgery": "photos forged in part by data_gen"}
_HEAD_BLIND_SPOTS = {
    "clip": "Generators unlike the ones it was trained on; small, blurred or strongly compressed faces; "
    "faces changed in part.",
    "forgery": "Faint changes of a small area; strong compression; faces that a generator made as a whole.",
}


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
    optimizer = torch.optim.LBFGS([w, b], max_iter=40, history_size=10, line_search_fn="strong_wolfe")

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
