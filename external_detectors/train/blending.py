"""Training of the expert `blending`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from external_detectors.train.loop import (
    SOURCE,
    augmented,
    balanced,
    by_method,
    fit,
    licence_of,
    next_version,
    source_names,
    worst,
)
from external_detectors.weights_io import WEIGHTS, save_weights, to_unit
from x2dfd.crops import CropSet, load_crops
from x2dfd.faces import PREPROCESSING
from x2dfd.manifest import manifest_sha256
from x2dfd.types import Card


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
        draw = balanced(crops.samples, rng, "train")
        chosen = [next(draw) for _ in range(batch)]
        pixels = torch.from_numpy(np.stack([augmented(crops.crops[i], rng)[0] for i in chosen]))
        return pixels, torch.tensor([float(crops.samples[i].label == "fake") for i in chosen])

    def loss_of(drawn: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = drawn
        return F.binary_cross_entropy_with_logits(net(to_unit(pixels)), labels * 0.96 + 0.02)

    def figures_of(trained: torch.nn.Module) -> dict[str, Any]:
        return _check_blending(trained, checked) if checked is not None else {}

    settings = {"data": manifest_sha256(data), "batch": batch, "lr": lr, "seed": seed, "from_scratch": from_scratch}
    run = json.dumps(settings | {"check": manifest_sha256(check) if check else None})
    trained, figures = fit(
        net, batch_of, loss_of, steps=steps, lr=lr, seed=seed, state=state, run=run, check=figures_of
    )
    learnt = [s for s in crops.samples if s.split == "train"]
    card = Card(
        name="blending",
        version=next_version(out, "blending"),
        source=SOURCE,
        licence=licence_of(learnt, start="" if from_scratch else "EfficientNet-Lite0 of ImageNet, Apache-2.0"),
        sha256="",
        preprocessing=PREPROCESSING,
        paper="Shiohara & Yamasaki, Detecting Deepfakes with Self-Blended Images, CVPR 2022",
        blind_spot="Faces that are synthetic as a whole have no seam; strong compression and blur hide one.",
        trained_on=f"self-blended images of real photos only ({len(learnt)} pictures, {steps} steps of {batch})"
        f"; no fake of any generator; sources: {source_names(learnt)}",
        figures=figures,
    )
    card = save_weights(trained.state_dict(), card, out)
    print(out / f"{card.name}.card.json")


def _check_blending(net: torch.nn.Module, data: CropSet) -> dict[str, Any]:
    indices = data.where(split="calib")
    net.eval()
    with torch.inference_mode():
        parts = np.array_split(indices, max(1, len(indices) // 32))
        scores = [net(to_unit(torch.from_numpy(np.asarray(data.crops[part])))) for part in parts]
    samples, said = [data.samples[i] for i in indices], torch.cat(scores).double().numpy()
    return {"calib_auc_by_method": by_method(samples, said), "worst": worst(samples, said)}
